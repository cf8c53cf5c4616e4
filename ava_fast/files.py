"""Writing what must survive a power cut."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_synced(path: Path, data: bytes) -> None:
    """Writes a file whose content is on the disk when this returns; its name is only after `sync` of the folder."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


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
