"""Copies of checkpoints at a URL that fsspec can write: s3://bucket/folder, gs://…, file:///mnt/….

<url>/<run>/step_100.1f3a9c02/    the checkpoint's files, manifest last; the digits are those of the manifest's hash
<url>/<run>/latest                the name of the newest that is whole

Every upload has a prefix of its own and overwrites nothing. Each file is read back and hashed after it was written;
what fails is tried again with growing pauses. A prefix without its last file, `manifest.sha256`, was cut off: nobody
reads it, and the next upload clears it. Large files go in parts, which is fsspec's and the store's business.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fsspec

from ava_fast.checkpoint import store
from ava_fast.errors import UserError
from ava_fast.stability.failures import PAUSES, Result, in_a_line

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step_(\d+)\.[0-9a-f]{8}")
_BLOCK = 8 * 2**20


def is_url(source: str) -> bool:
    """Rather than a path."""
    return "://" in source


def check(url: str) -> None:
    """Writes a file there and deletes it. Raises UserError if that fails, or no installed package can."""
    fs, root = _open(url)
    try:
        _makedirs(fs, root)
        fs.pipe_file(f"{root}/preflight", b"x")
        fs.rm_file(f"{root}/preflight")
    except Exception as error:  # whatever a store's client raises
        raise UserError(f"{url}: cannot be written to: {in_a_line(error)}") from None


def upload(checkpoint: Path, url: str) -> str:
    """Copies a checkpoint under `url` (a run's), verifies it and makes it the latest there → its name.

    Raises OSError if it could not be done; what was the latest before still is.
    """
    fs, root = _open(url)
    with store.reading(checkpoint):
        manifest = store.peek(checkpoint)
        own = checkpoint / store.MANIFEST
        digest = hashlib.sha256(own.read_bytes()).hexdigest()
        name = f"step_{manifest['step']}.{digest[:8]}"
        hashes = {file: written["sha256"] for file, written in manifest["files"].items()} | {store.MANIFEST: digest}
        last = checkpoint / store.MANIFEST_HASH
        hashes[store.MANIFEST_HASH] = hashlib.sha256(last.read_bytes()).hexdigest()
        for file, expected in hashes.items():
            _insist(f"{url}/{name}/{file}", partial(_put, fs, checkpoint / file, f"{root}/{name}/{file}", expected))
    _insist(f"{url}/latest", lambda: fs.pipe_file(f"{root}/latest", name.encode()))
    return name


def rotate(checkpoints: Path, url: str) -> None:
    """Deletes what has no counterpart on the disk, cut off uploads too, but not the latest."""
    fs, root = _open(url)
    kept = {path.name for path in store.list_checkpoints(checkpoints)}
    latest = _latest(fs, root)
    for name in _names(fs, root):
        if name != latest and (name.partition(".")[0] not in kept or not _whole(fs, root, name)):
            fs.rm(f"{root}/{name}", recursive=True)


def download(url: str, runs: Path) -> list[Path]:
    """Fetches the latest checkpoint of the run at `url`, or if it is damaged the next older, into `runs`; or, where
    `url` is a checkpoint's, that → it. Raises UserError if there is none that verifies."""
    url = url.rstrip("/")
    head, _, tail = url.rpartition("/")
    named = _NAME.fullmatch(tail)
    fs, root = _open(head if named else url)
    run = root.rstrip("/").rpartition("/")[2]
    try:
        names = [tail] if named else _insist(url, lambda: _order(fs, root))
    except OSError as error:
        raise UserError(f"{url}: cannot be read: {error}") from None
    refused = []
    for name in names:
        target = runs / run / "checkpoints" / name.partition(".")[0]
        try:
            return [_fetch(fs, f"{root}/{name}", target)]
        except (UserError, OSError) as error:
            refused.append(f"{name}: {error}")
            logger.warning(f"{url}/{name}: {error}; the next one is tried")
    raise UserError(f"{url}: holds no checkpoint that can be used; {'; '.join(refused) or 'no step_N.… is there'}")


class Uploader:
    """Uploads from a thread; of checkpoints that wait while one is under way, only the newest is. After each, `tidy`
    is called: what is being uploaded is not deleted, but then it may be."""

    def __init__(self, url: str, checkpoints: Path, tidy: Callable[[], object] = lambda: None):
        self.url, self.checkpoints, self._tidy = url, checkpoints, tidy
        self._waiting: Path | None = None
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None

    def offer(self, checkpoint: Path) -> None:
        """Has it uploaded."""
        with self._change:
            self._waiting = checkpoint
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True, name="upload")
                self._thread.start()

    def finish(self) -> None:
        """Waits for what was offered. What could not be uploaded has been logged."""
        while (thread := self._thread) is not None:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._change:
                checkpoint, self._waiting = self._waiting, None
                if checkpoint is None:
                    self._thread = None
                    return
            started_at = time.perf_counter()
            try:
                name = upload(checkpoint, self.url)
                logger.info(f"uploaded {self.url}/{name} | {time.perf_counter() - started_at:.1f} s")
                self._tidy()
                rotate(self.checkpoints, self.url)
            except Exception as error:  # whatever a store's client raises: training does not depend on it
                logger.error(f"{self.url}: {checkpoint.name} is on this disk alone, it could not be uploaded: {error}")


def _open(url: str) -> tuple[Any, str]:
    try:
        fs, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        extra = "; install ava-fast[s3]" if url.startswith("s3:") else ""
        raise UserError(f"{url}: cannot be opened: {error}{extra}") from None
    return fs, str(root).rstrip("/")


def _insist(what: str, action: Callable[[], Result]) -> Result:
    """Tries again whatever a store's client raises; the last error as OSError."""
    for pause in PAUSES:
        try:
            return action()
        except Exception as error:
            logger.warning(f"{what}: {in_a_line(error)}; tried again in {pause:g} s")
            time.sleep(pause)
    try:
        return action()
    except Exception as error:
        raise OSError(f"{what}: {in_a_line(error)}") from error


def _put(fs: Any, file: Path, target: str, expected: str) -> None:
    _makedirs(fs, target.rpartition("/")[0])
    fs.put_file(str(file), target)
    fs.invalidate_cache()
    digest, size = hashlib.sha256(), fs.info(target)["size"]
    if size != file.stat().st_size:
        raise OSError(f"{target}: has {size} bytes after {file.stat().st_size} were written")
    with fs.open(target, "rb", block_size=_BLOCK) as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise OSError(f"{target}: is not what was written: its SHA-256 differs")


def _makedirs(fs: Any, folder: str) -> None:
    """Where there is such a thing as a folder; in an object store it might be a bucket."""
    if "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)):
        fs.makedirs(folder, exist_ok=True)


def _fetch(fs: Any, source: str, target: Path) -> Path:
    if target.exists():
        try:
            store.read_manifest(target)
            return target
        except UserError:
            store.discard(target)
    folder = target.with_suffix(".tmp")
    store.discard(folder)
    try:
        for name in (store.MANIFEST, store.MANIFEST_HASH):
            _get(fs, f"{source}/{name}", folder / name)
        for name in store.peek(folder)["files"]:
            _get(fs, f"{source}/{name}", folder / name)
        store.read_manifest(folder)
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    store.point(target, store.LATEST)
    return target


def _get(fs: Any, source: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    _insist(source, lambda: fs.get_file(source, str(target)))


def _names(fs: Any, root: str) -> list[str]:
    fs.invalidate_cache()
    try:
        names = {str(path).rstrip("/").rpartition("/")[2] for path in fs.ls(root, detail=False)}
    except FileNotFoundError:
        return []
    return [name for name in names if _NAME.fullmatch(name)]


def _order(fs: Any, root: str) -> list[str]:
    """The latest, then the others that are whole, newest first."""
    latest = _latest(fs, root)
    names = sorted(_names(fs, root), key=lambda name: (name != latest, -int(_NAME.fullmatch(name)[1])))  # type: ignore[index]
    return [name for name in names if _whole(fs, root, name)]


def _latest(fs: Any, root: str) -> str | None:
    try:
        return str(fs.cat_file(f"{root}/latest").decode(errors="replace")).strip()
    except FileNotFoundError:
        return None


def _whole(fs: Any, root: str, name: str) -> bool:
    return bool(fs.exists(f"{root}/{name}/{store.MANIFEST_HASH}"))
