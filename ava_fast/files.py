"""Writing what must survive a power cut."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_synced(path: Path, data: bytes) -> None:
    """Writes a file whose content is on the disk when this returns; its name is only after `sync` of the folder."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_hashed(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Writes a file as `write_synced` does, piece by piece → its size and the SHA-256 of what was given, both taken
    before the disk had a say."""
    size, digest = 0, hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for piece in pieces:
            digest.update(piece)
            size += len(piece)
            while len(piece):
                piece = memoryview(piece)[file.write(piece) :]
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file that has its old content, or none, until the new one is on the disk."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    write_synced(temporary, data)
    temporary.rename(path)


def sync(path: Path) -> None:
    """Flushes a file that is already written, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
