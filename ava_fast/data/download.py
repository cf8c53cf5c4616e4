"""Corpora from the Hugging Face hub, into folders of Parquet that `ava-fast prepare` reads.

    (folder,) = download("wikipedia", None, Path("data"))        # a name in manifest.yaml, or owner/name

Files arrive one after the other, each verified against the hub's checksum before it counts; one that is not Parquet
becomes Parquet (`convert`) before the next arrives. `.download.json` in the folder says which are there, from which
commit. A download that was interrupted goes on in the middle of a file.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import json
import logging
import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import Field, ValidationError

from ava_fast.data.convert import Converted, to_parquet
from ava_fast.data.formats import DATA_SUFFIXES
from ava_fast.data.prepare import progress_bar
from ava_fast.errors import UserError
from ava_fast.files import sync, write_whole
from ava_fast.settings import Section

CURATED = Path(__file__).with_name("manifest.yaml")
ATTEMPTS = 5
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
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
    license_source: str | None = None
    """Where that was read."""
    text_column: str | None = None
    """Of its records. None: `text`, or else `content`."""


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


def download(
    dataset: str | None,
    manifest: str | None,
    output: Path,
    max_files: int | None = None,
    text_column: str | None = None,
    as_is: bool = False,
) -> list[Path]:
    """The folders of one data set, or of all in a manifest. `as_is` converts nothing.

    Raises UserError where a data set does not exist or is gated, where the hub cannot be reached, and where a file
    keeps failing; what had arrived stays for the next call.
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
    return [_fetch(entry, output / entry.name, max_files, text_column or entry.text_column, as_is) for entry in entries]


def _fetch(entry: Entry, folder: Path, max_files: int | None, text_column: str | None, as_is: bool) -> Path:
    hub = _library()

    def list_files() -> Any:
        return hub.HfApi().dataset_info(entry.repository, revision=entry.revision, files_metadata=True)

    info = _retry(list_files, entry, ATTEMPTS - 2)
    listed = sorted(info.siblings or [], key=lambda item: item.rfilename)
    wanted = [item for item in listed if _is_wanted(item.rfilename, entry.files)][:max_files]
    if not wanted:
        what = f"matches {', '.join(entry.files)}" if entry.files else "is of a format that is read"
        raise UserError(f"--dataset: {entry.repository} has no file that {what}")
    license_name = entry.license if entry.license != "not given" else str((info.card_data or {}).get("license"))
    total = sum(item.size or 0 for item in wanted)
    logger.info("%s at %s: %d files, license %s", entry.repository, info.sha, len(wanted), license_name)
    record_file = folder / ".download.json"
    record = _read_record(record_file)
    if record.get("revision") != info.sha:  # other content under the same names
        record = {"repository": entry.repository, "revision": info.sha, "license": license_name, "files": {}}
    files = record["files"]
    with progress_bar(total, entry.name, True) as bar:
        for item in wanted:
            arrived, known = folder / item.rfilename, files.get(item.rfilename, {})
            stored = folder / known["parquet"]["name"] if "parquet" in known else None
            if stored is not None and _size(stored) == known["parquet"]["size"]:
                bar.update(item.size)
                arrived.unlink(missing_ok=True)  # a run was interrupted just here
                continue
            if known and _size(arrived) == item.size:
                bar.update(item.size)
            else:
                known = _fetch_file(entry, info.sha, item, arrived, bar.update)
            files[item.rfilename] = known
            write_whole(record_file, json.dumps(record, indent=1).encode())
            if not as_is and "stays" not in known:
                files[item.rfilename] = known | _convert(folder, item.rfilename, text_column)
                write_whole(record_file, json.dumps(record, indent=1).encode())
                if "parquet" in files[item.rfilename]:
                    arrived.unlink()
    return folder


def _convert(folder: Path, name: str, text_column: str | None) -> dict[str, Any]:
    """What the record says of a file that was to become Parquet."""
    with progress_bar((folder / name).stat().st_size, f"{name} to Parquet", True) as bar:
        try:
            converted = to_parquet(folder, name, text_column, bar.update)
        except OSError as error:
            raise UserError(f"--output: {folder}: {error.strerror or error}; free some space") from None
    if isinstance(converted, Converted):
        return {"parquet": converted._asdict()}
    if converted != "is Parquet":
        logger.warning("%s stays as it is: %s", name, converted)
    return {"stays": converted}


def _fetch_file(
    entry: Entry, revision: str, item: Any, target: Path, passed: Callable[[int], object]
) -> dict[str, Any]:
    """Fetches a file, or the rest of one that an earlier call began, and compares it with the hub's checksum."""
    hub = _library()
    url = hub.hf_hub_url(entry.repository, item.rfilename, repo_type="dataset", revision=revision)
    part = target.with_name(f".{target.name}.part")
    target.parent.mkdir(parents=True, exist_ok=True)

    def attempt() -> dict[str, Any]:
        size = _size(part)
        headers = {**hub.utils.build_hf_headers(), "Accept-Encoding": "identity"}
        if size < item.size:
            if size:
                headers["Range"] = f"bytes={size}-"
            session = hub.get_session()
            with session.stream("GET", url, headers=headers, timeout=60, follow_redirects=True) as response:
                hub.utils.hf_raise_for_status(response)
                # A server that ignores the range sends all of it.
                with part.open("ab" if response.status_code == 206 else "wb") as file:
                    for block in response.iter_raw():
                        file.write(block)
                        passed(len(block))
        if _size(part) < item.size:
            raise ConnectionError(f"{item.rfilename} broke off after {_size(part):,} of {item.size:,} bytes")
        sha256 = _verify(part, item)
        sync(part)
        part.replace(target)
        return {"size": item.size, "sha256": sha256}

    return _retry(attempt, entry, ATTEMPTS, lambda: _size(part))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _verify(path: Path, item: Any) -> str:
    """SHA-256 of a file that is what the hub says; what is not is removed. Small files have git's checksum there."""
    sha256, git = hashlib.sha256(), hashlib.sha1(f"blob {_size(path)}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
            git.update(block)
    expected, got = (item.lfs.sha256, sha256) if item.lfs is not None else (item.blob_id, git)
    if got.hexdigest() != expected:
        path.unlink()
        raise _WrongChecksum(f"{item.rfilename} arrived with another checksum than the hub's")
    return sha256.hexdigest()


class _WrongChecksum(Exception):
    pass


def _retry(
    action: Callable[[], Result], entry: Entry, attempts: int, progress: Callable[[], object] = lambda: None
) -> Result:
    """The action's result, tried again where that may help: `attempts` times since `progress()` last changed.

    Raises UserError. The hub's library raises what its HTTP library does, which differs by version: everything that it
    does not say to be final, and that is not of the disk, is taken for a failure of the network.
    """
    errors = _library().errors
    final = {
        errors.GatedRepoError: "is gated: accept its terms on its page, then set HF_TOKEN",
        errors.RepositoryNotFoundError: "does not exist, or is private: check its name, or set HF_TOKEN",
        errors.RevisionNotFoundError: f"has no revision {entry.revision}",
        errors.EntryNotFoundError: "lacks a file that it lists; try again later",
        errors.HFValidationError: "is not a name on the hub",
    }
    failures, before = 0, progress()
    while True:
        try:
            return action()
        except tuple(final) as error:
            reason = next(words for kind, words in final.items() if isinstance(error, kind))
            raise UserError(f"--dataset: {entry.repository} {reason}") from None
        except Exception as error:
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise UserError(f"--output: {error.filename or 'a file'}: {error.strerror}; free some space") from None
            now = progress()
            failures, before = (failures if now == before else 0) + 1, now
            if failures == attempts or isinstance(error, errors.OfflineModeIsEnabled):
                raise UserError(_unreachable(entry, error)) from None
            pause = BACK_OFF_SECONDS * 2 ** (failures - 1)
            logger.warning("%s, trying again in %.0f s", _reason(error), pause)
            time.sleep(pause)


def _unreachable(entry: Entry, error: Exception) -> str:
    if isinstance(error, _WrongChecksum):
        return f"--dataset: {entry.repository}: {error}, {ATTEMPTS} times; try again later"
    server = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    include = "".join(f" --include {shlex.quote(pattern)}" for pattern in entry.files or [])
    return (
        f"--dataset: {server} cannot be reached, or keeps failing ({_reason(error)}); where there is a network, run "
        f"`hf download {entry.repository} --repo-type dataset{include} --local-dir D`, copy D here, prepare it with "
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
