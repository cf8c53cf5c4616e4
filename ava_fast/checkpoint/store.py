"""Checkpoints on disk: whole or absent, listed with their hashes, verified before they are read.

checkpoints/step_100.tmp/     while it is written
checkpoints/step_100/         afterwards, by one rename
    manifest.json             format, step, settings, position in the data, every file's size and SHA-256
    manifest.sha256           the manifest's own; `sha256sum -c manifest.sha256` checks it
    engine/                   weights and optimizer state (checkpoint.shards)
    rank_0.json …             each rank's random number generators
    tokenizer.json
checkpoints/step_50.gone/     while it is deleted
checkpoints/latest, best      the names of the newest and of that with the lowest held-out loss
checkpoints/avoid.json        stretches of the data that no run from these checkpoints sees again, if there are any
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ava_fast.errors import UserError
from ava_fast.files import sha256, sync, write_synced

FORMAT_VERSION = 3
MANIFEST, MANIFEST_HASH = "manifest.json", "manifest.sha256"
LATEST, BEST = "latest", "best"
Files = dict[str, dict[str, Any]]
"""By its path in the checkpoint, each file's `bytes` and `sha256`."""


def open_folder(checkpoints: Path, step: int) -> Path:
    """An empty `step_N.tmp`; what earlier, interrupted saves and deletions left goes."""
    for left in (*checkpoints.glob("step_*.tmp"), *checkpoints.glob("step_*.gone")):
        shutil.rmtree(left, ignore_errors=True)
    folder = checkpoints / f"step_{step}.tmp"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def commit(folder: Path, contents: dict[str, Any], files: Files) -> Path:
    """Makes `step_N.tmp`, whose files are on the disk, a checkpoint: writes the manifest last, renames it to `step_N`
    and points `latest` at it. `contents` joins the manifest. Returns the final folder."""
    manifest = json.dumps({"format_version": FORMAT_VERSION, **contents, "files": files}, indent=1).encode()
    write_synced(folder / MANIFEST, manifest)
    write_synced(folder / MANIFEST_HASH, _hash_line(manifest))
    for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        sync(path)
    final = folder.with_suffix("")
    if final.exists():  # of a run that was resumed from before it
        _delete(final)
    folder.rename(final)
    point(final, LATEST)
    return final


def point(checkpoint: Path, name: str) -> None:
    """Makes `latest` or `best` name this checkpoint, at once or not at all."""
    temporary = checkpoint.parent / f"{name}.tmp"
    write_synced(temporary, checkpoint.name.encode())
    os.replace(temporary, checkpoint.parent / name)
    sync(checkpoint.parent)


def pointed(checkpoints: Path, name: str) -> Path | None:
    """What `latest` or `best` names, if that is there."""
    try:
        path = checkpoints / (checkpoints / name).read_text().strip()
        return path if path in list_checkpoints(checkpoints) else None
    except (OSError, ValueError):  # none yet, or not even text
        return None


def rotate(
    checkpoints: Path, *, newest: int | None, every: int = 0, best: int = 0, dry_run: bool = False
) -> list[Path]:
    """Deletes all but the `newest` checkpoints, those at every `every`-th step and the `best` by held-out loss, and
    points `best` at the first of these. What `latest` or `best` names stays, and what someone reads. → what went, or
    would with `dry_run`."""
    saved = list_checkpoints(checkpoints)
    ranked = sorted((loss, -_step(path), path) for path in saved if (loss := _heldout_loss(path)) is not None)
    if ranked and pointed(checkpoints, BEST) != ranked[0][2] and not dry_run:
        point(ranked[0][2], BEST)
    if newest is None:
        return []
    kept = {*saved[-newest:], *(path for _, _, path in ranked[:best])}
    kept |= {path for path in saved if every and _step(path) % every == 0}
    kept |= {path for name in (LATEST, BEST) if (path := pointed(checkpoints, name)) is not None}
    gone = [path for path in saved if path not in kept and not _in_use(path)]
    for path in gone if not dry_run else ():
        _delete(path)
    return gone


def discard(folder: Path) -> None:
    """Removes what a failed save left."""
    shutil.rmtree(folder, ignore_errors=True)


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Finished checkpoints, oldest step first; damage is not looked for."""
    found = [path for path in checkpoints.glob("step_*") if path.name.removeprefix("step_").isdigit() and path.is_dir()]
    return sorted(found, key=_step)


def rewind(checkpoint: Path) -> None:
    """Makes `checkpoint` the newest: points `latest` at it and deletes those after it."""
    point(checkpoint, LATEST)
    found = list_checkpoints(checkpoint.parent)
    for newer in found[found.index(checkpoint) + 1 :]:
        _delete(newer)


def avoid(checkpoints: Path, stretch: tuple[int, int]) -> None:
    """Adds a stretch of positions [start, stop) of the data to those that a resumed run passes over."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    stretches = [*avoided(checkpoints), stretch]
    write_synced(checkpoints / "avoid.tmp", json.dumps(stretches).encode())
    os.replace(checkpoints / "avoid.tmp", checkpoints / "avoid.json")


def avoided(checkpoints: Path) -> list[tuple[int, int]]:
    """What `avoid` has added."""
    try:
        return [(start, stop) for start, stop in json.loads((checkpoints / "avoid.json").read_text())]
    except FileNotFoundError:
        return []


def candidates(path: Path) -> list[Path]:
    """The checkpoints that `path` may mean, the best choice first: itself, or of a run or of its `checkpoints` folder
    the latest and then the others, newest first.

    Raises UserError if there is none.
    """
    if (path / MANIFEST).is_file() or path in list_checkpoints(path.parent):
        return [path]
    for checkpoints in (path / "checkpoints", path):
        if saved := list_checkpoints(checkpoints)[::-1]:
            latest = pointed(checkpoints, LATEST)
            return [latest, *(each for each in saved if each != latest)] if latest else saved
    raise UserError(f"{path}: holds no checkpoint; name a run's folder or a folder step_N in its checkpoints")


def find_checkpoint(path: Path) -> Path:
    """The first of `candidates` that verifies. Raises UserError if none does."""
    refused = []
    for checkpoint in candidates(path):
        try:
            read_manifest(checkpoint)
        except UserError as error:
            refused.append(str(error))
        else:
            return checkpoint
    raise UserError("; ".join(refused))


def peek(checkpoint: Path) -> dict[str, Any]:
    """The manifest, checked against its own hash alone.

    Raises UserError if it is damaged or of a format version that this release does not read.
    """
    path = checkpoint / MANIFEST
    try:
        content, expected = path.read_bytes(), (checkpoint / MANIFEST_HASH).read_bytes()
    except OSError as error:
        if _version(path) in range(1, FORMAT_VERSION):  # an earlier format has no hash of its own
            raise _foreign(checkpoint, _version(path)) from None
        what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise _damaged(Path(error.filename), what) from None
    if expected != _hash_line(content):
        raise _damaged(path, f"is not what was written: {MANIFEST_HASH} says so")
    manifest: dict[str, Any] = json.loads(content)
    if manifest["format_version"] != FORMAT_VERSION:
        raise _foreign(checkpoint, manifest["format_version"])
    return manifest


def verify(checkpoint: Path, files: Files) -> None:
    """Raises UserError naming the first file that is missing, of another size or of another hash."""
    for name, written in files.items():
        path = checkpoint / name
        try:
            size = path.stat().st_size
            if size != written["bytes"]:
                raise _damaged(path, f"has {size} bytes, {written['bytes']} were written")
            if sha256(path) != written["sha256"]:
                raise _damaged(path, "is not what was written: its SHA-256 differs")
        except FileNotFoundError:
            raise _damaged(path, "is missing") from None
        except OSError as error:
            raise _damaged(path, f"cannot be read: {error.strerror}") from None


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose every file is as it was written. Raises as `peek` and `verify` do."""
    manifest = peek(checkpoint)
    verify(checkpoint, manifest["files"])
    return manifest


@contextlib.contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """While it is open, no process's `rotate` deletes the checkpoint."""
    try:
        file = (checkpoint / MANIFEST).open("rb")
    except OSError:  # damaged: whoever reads it will say so
        yield
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def _in_use(checkpoint: Path) -> bool:
    try:
        with (checkpoint / MANIFEST).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _delete(checkpoint: Path) -> None:
    """No half of it is ever listed."""
    gone = checkpoint.with_suffix(".gone")
    shutil.rmtree(gone, ignore_errors=True)
    checkpoint.rename(gone)
    shutil.rmtree(gone)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _heldout_loss(checkpoint: Path) -> float | None:
    """If it was taken with these very weights."""
    try:
        manifest = peek(checkpoint)
    except UserError:
        return None
    return manifest.get("heldout_loss") if manifest.get("heldout_step") == manifest.get("step") else None


def _hash_line(manifest: bytes) -> bytes:
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode()


def _version(manifest: Path) -> Any:
    try:
        return json.loads(manifest.read_bytes())["format_version"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _foreign(checkpoint: Path, version: Any) -> UserError:
    return UserError(f"{checkpoint}: has format version {version}; this release reads {FORMAT_VERSION}")


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path}: {what}; the checkpoint is damaged")
