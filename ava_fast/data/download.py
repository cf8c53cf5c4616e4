"""Corpora from the Hugging Face hub, into folders that `ava-fast prepare` reads as they are.

    (folder,) = download("wikipedia", None, Path("data"))        # a name in manifest.yaml, or owner/name

Files arrive one after the other, each verified against the hub's checksum before it counts: `.download.json` in the
folder says which did, from which commit. A download that was interrupted goes on in the middle of a file.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import Field, ValidationError

from ava_fast.config import Section
from ava_fast.data.formats import DATA_SUFFIXES
from ava_fast.errors import UserError
from ava_fast.files import write_whole

CURATED = Path(__file__).with_name("manifest.yaml")
ATTEMPTS = 5
BACK_OFF_SECONDS = 1.0
"""Before the second attempt; twice as long before each next one."""

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class Entry(Section):
    """A corpus on the hub."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    repository: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    files: list[str] | None = None
    """Patterns. None: every file of a format that is read."""
    revision: str = "main"
    license: str = "not given"


def read_manifest(path: Path) -> list[Entry]:
    """The corpora that a manifest lists. Raises UserError naming the entry at fault."""
    try:
        tree = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise UserError(f"--manifest: {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--manifest: {path} is not YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(tree, dict) or not tree:
        raise UserError(f"--manifest: {path} must hold names, each with its repository and license")
    entries = []
    for name, body in tree.items():
        try:
            entries.append(Entry(name=name, **body))
        except (ValidationError, TypeError) as error:
            detail = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": "is no mapping"}
            where = ".".join(map(str, [name, *detail["loc"]]))
            raise UserError(f"--manifest: {path}: {where}: {detail['msg']}") from None
    return entries


def download(dataset: str | None, manifest: str | None, output: Path, max_files: int | None = None) -> list[Path]:
    """The folders of one data set, or of all in a manifest.

    Raises UserError where a data set does not exist or is gated, where the hub cannot be reached, and where a file keeps
    failing; what had arrived stays for the next call.
    """
    if manifest is not None:
        entries = read_manifest(Path(manifest))
    else:
        curated = {entry.name: entry for entry in read_manifest(CURATED)}
        if dataset in curated:
            entries = [curated[dataset]]
        elif dataset is not None and dataset.count("/") == 1 and all(dataset.split("/")):
            entries = [Entry(name=dataset.replace("/", "--"), repository=dataset)]
        else:
            raise UserError(f"--dataset: {dataset!r} is neither owner/name nor one of {', '.join(curated)}")
    return [_fetch(entry, output / entry.name, max_files) for entry in entries]


def _fetch(entry: Entry, folder: Path, max_files: int | None) -> Path:
    hub = _library()
    if not sys.stderr.isatty():
        hub.utils.disable_progress_bars()
    api = hub.HfApi()
    info = _retry(
        lambda: api.dataset_info(entry.repository, revision=entry.revision, files_metadata=True), entry, ATTEMPTS - 2
    )
    license_name = entry.license if entry.license != "not given" else str((info.card_data or {}).get("license"))
    wanted = sorted(
        (item for item in info.siblings or [] if _is_wanted(item.rfilename, entry.files)),
        key=lambda item: item.rfilename,
    )[:max_files]
    if not wanted:
        raise UserError(
            f"--dataset: {entry.repository} has no file that matches {entry.files or 'a format that is read'}"
        )
    total = sum(item.size or 0 for item in wanted)
    logger.info(
        "%s at %s, license %s: %d files, %.1f MB", entry.repository, info.sha, license_name, len(wanted), total / 1e6
    )
    record_file = folder / ".download.json"
    record = _read_record(record_file)
    if record.get("revision") != info.sha:  # other content under the same names
        record = {"repository": entry.repository, "revision": info.sha, "license": license_name, "files": {}}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for item in wanted:
            arrived = folder / item.rfilename
            if item.rfilename in record["files"] and arrived.is_file() and arrived.stat().st_size == item.size:
                continue
            record["files"][item.rfilename] = _retry(
                lambda item=item: _fetch_file(hub, entry, info.sha, item, folder), entry, ATTEMPTS
            )
            write_whole(record_file, json.dumps(record, indent=1).encode())
    except OSError as error:
        raise UserError(f"--output: {folder} cannot be written: {error.strerror or error}") from None
    return folder


def _fetch_file(hub: Any, entry: Entry, revision: str, item: Any, folder: Path) -> dict[str, Any]:
    """Fetches one file, or the rest of it, and compares it with the hub's checksum. What differs is removed."""
    path = Path(
        hub.hf_hub_download(entry.repository, item.rfilename, repo_type="dataset", revision=revision, local_dir=folder)
    )
    sha256, git = hashlib.sha256(), hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
            if item.lfs is None:
                git.update(block)
    expected, got = (item.lfs.sha256, sha256) if item.lfs is not None else (item.blob_id, git)
    if expected is not None and got.hexdigest() != expected:
        path.unlink()
        raise _WrongChecksum(f"{item.rfilename} arrived with another checksum than the hub's")
    return {"size": path.stat().st_size, "sha256": sha256.hexdigest()}


class _WrongChecksum(Exception):
    pass


def _retry(action: Callable[[], Result], entry: Entry, attempts: int) -> Result:
    """The action's result, tried again where that may help.

    Raises UserError. The hub's library raises what its HTTP library does, which differs by version: everything that it
    does not say to be final is taken for a failure of the network.
    """
    errors = _library().errors
    final = {
        errors.GatedRepoError: "is gated: accept its terms on its page, then set HF_TOKEN",
        errors.RepositoryNotFoundError: "does not exist, or is private: check its name, or set HF_TOKEN",
        errors.RevisionNotFoundError: f"has no revision {entry.revision}",
        errors.RemoteEntryNotFoundError: "lacks a file that it lists; try again later",
        errors.HFValidationError: "is not a name on the hub",
    }
    for attempt in range(1, attempts + 1):
        try:
            return action()
        except tuple(final) as error:
            reason = next(words for kind, words in final.items() if isinstance(error, kind))
            raise UserError(f"--dataset: {entry.repository} {reason}") from None
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (28, 122, 13, 30) and error.filename is not None:
                raise  # the disk, not the network
            if attempt == attempts or isinstance(error, errors.OfflineModeIsEnabled):
                raise UserError(_unreachable(entry, error)) from None
            pause = BACK_OFF_SECONDS * 2 ** (attempt - 1)
            logger.warning("%s, trying again in %.0f s", _reason(error), pause)
            time.sleep(pause)
    raise AssertionError("unreachable")


def _unreachable(entry: Entry, error: Exception) -> str:
    if isinstance(error, _WrongChecksum):
        return f"--dataset: {entry.repository}: {error}, {ATTEMPTS} times; try again later"
    server = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    return (
        f"--dataset: {server} cannot be reached, or keeps failing ({_reason(error)}); where there is a network, run "
        f"`hf download {entry.repository} --repo-type dataset --local-dir D`, copy D here, and prepare it with "
        "--data-dir D; run the same command again to go on"
    )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:150] or type(error).__name__


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and isinstance(record.get("files"), dict) else {}


def _is_wanted(name: str, patterns: list[str] | None) -> bool:
    if any(part in ("", ".", "..") for part in name.split("/")) or name.startswith("."):
        return False
    if patterns is not None:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    path = Path(name)
    return path.suffix.lower() in DATA_SUFFIXES - {".md", ".txt"} and path.name != "dataset_infos.json"


def _library() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError:
        raise UserError("download: needs huggingface_hub: pip install 'ava-fast[hub]'") from None
    return huggingface_hub
