"""Checkpoints on disk: whole or absent, listed with their hashes, verified before they are read.

checkpoints/step_100.tmp/     while it is written
checkpoints/step_100/         afterwards, by one rename
    manifest.json             format, step, world size, settings, position, every file's size and SHA-256
    engine/                   weights and optimizer state (Engine.save)
    rank_0.pt …               each rank's random number generators
checkpoints/latest            the name of the newest
checkpoints/avoid.json        stretches of the data that no run from these checkpoints sees again, if there are any
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from ava_fast.errors import UserError
from ava_fast.files import sync, write_synced

FORMAT_VERSION = 2
MANIFEST = "manifest.json"


def open_folder(checkpoints: Path, step: int) -> Path:
    """An empty `step_N.tmp`; what an earlier, interrupted save left there goes."""
    folder = checkpoints / f"step_{step}.tmp"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def commit(folder: Path, contents: dict[str, Any], keep: int | None) -> Path:
    """Hashes and syncs every file in `step_N.tmp`, writes the manifest last, renames it to `step_N`, points `latest`
    at it, and deletes the oldest beyond `keep`. `contents` joins the manifest. Returns the final folder."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        sync(path)
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync(path)
    manifest = {"format_version": FORMAT_VERSION, **contents, "files": files}
    write_synced(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    sync(folder)
    final = folder.with_suffix("")
    shutil.rmtree(final, ignore_errors=True)  # of a run that was resumed from before it
    folder.rename(final)
    write_synced(final.parent / "latest.tmp", final.name.encode())
    os.replace(final.parent / "latest.tmp", final.parent / "latest")
    sync(final.parent)
    if keep is not None:
        for old in list_checkpoints(final.parent)[:-keep]:
            if old != final:
                shutil.rmtree(old)
    return final


def discard(folder: Path) -> None:
    """Removes what a failed save left."""
    shutil.rmtree(folder, ignore_errors=True)


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Finished checkpoints, oldest step first."""
    found = [
        path
        for path in checkpoints.glob("step_*")
        if path.name.removeprefix("step_").isdigit() and (path / MANIFEST).is_file()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def rewind(checkpoint: Path) -> None:
    """Makes `checkpoint` the newest: points `latest` at it and deletes those after it."""
    checkpoints = checkpoint.parent
    write_synced(checkpoints / "latest.tmp", checkpoint.name.encode())
    os.replace(checkpoints / "latest.tmp", checkpoints / "latest")
    sync(checkpoints)
    found = list_checkpoints(checkpoints)
    for newer in found[found.index(checkpoint) + 1 :]:
        shutil.rmtree(newer)


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


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the latest one of a run or of its `checkpoints` folder.

    Raises UserError if there is none.
    """
    if (path / MANIFEST).is_file():
        return path
    for checkpoints in (path / "checkpoints", path):
        latest = checkpoints / "latest"
        if latest.is_file():
            return checkpoints / latest.read_text().strip()
    raise UserError(f"{path}: holds no checkpoint; name a run's folder or a folder step_N in its checkpoints")


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose every file is as it was written.

    Raises UserError naming the file that is missing, of another size or of another hash, or the format version that
    this release does not read.
    """
    try:
        manifest: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text())
        version, files = manifest["format_version"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(checkpoint / MANIFEST, f"cannot be read: {error}") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{checkpoint}: has format version {version}; this release reads {FORMAT_VERSION}")
    for name, written in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise _damaged(path, "is missing")
        if path.stat().st_size != written["bytes"]:
            raise _damaged(path, f"has {path.stat().st_size} bytes, {written['bytes']} were written")
        if _sha256(path) != written["sha256"]:
            raise _damaged(path, "is not what was written: its SHA-256 differs")
    return manifest


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path}: {what}; the checkpoint is damaged, resume from an older one with --resume PATH")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
