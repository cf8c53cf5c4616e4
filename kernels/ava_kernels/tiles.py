"""Tables of the tiles that kernels are cut into, by device, kernel and problem; and of which kernels there are to be.

An operation that has a choice ships its table beside its kernels, as `tiles.json`:

    {"sm_90": {"up": {"64×2048×1024 bfloat16": [128, 128, 64, 8, 4, 8, 1], "16 bit": …}, …}, "sm_80": …}

A device takes the entries of the newest generation that is not newer than itself. How a problem is called, and what
the numbers of a tile are, the operation's own `tiles.py` says; where it can choose between implementations, their names
stand in the place of numbers, the fastest first. `python -m bench.tune` searches for better tiles on a
GPU and keeps what it finds in one file of the same form for all operations, whose kernels have different names:
`~/.cache/ava_kernels/tiles.json` (`AVA_KERNELS_CACHE` names another folder). It goes before the tables, on devices of
the very generation that an entry is for. Nothing is searched for while a model trains.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import torch

NEWEST = (9, 0)  # what a machine without a GPU compiles for

Table = dict[str, dict[str, dict[str, list[Any]]]]


@functools.cache
def find(shipped: Path, kernel: str, generation: str, problems: tuple[str, ...], numbers: int) -> list[int]:
    """→ the numbers of a kernel's tile for the first of `problems` that has one, on a device of this generation.

    The user's file goes before the one that ships. Raises ValueError if a file is there and is no such table, or if the
    tile has not that many numbers; RuntimeError if no table has the tile.
    """
    path, problem, tile = _entry(shipped, kernel, generation, problems)
    if len(tile) != numbers or not all(type(number) is int for number in tile):
        raise _no_table(path, f"{kernel}, {problem}: {tile} are not {numbers} numbers")
    return tile


@functools.cache
def find_order(
    shipped: Path, operation: str, generation: str, problems: tuple[str, ...], known: tuple[str, ...]
) -> list[str]:
    """→ names of implementations, the fastest first, found as tiles are. Raises as `find`: ValueError for a name that
    is not among `known`, too."""
    path, problem, names = _entry(shipped, operation, generation, problems)
    if not names or not set(names) <= set(known):
        raise _no_table(path, f"{operation}, {problem}: {names} are not some of {', '.join(known)}")
    return names


def _entry(shipped: Path, kernel: str, generation: str, problems: tuple[str, ...]) -> tuple[Path, str, list[Any]]:
    for path in (cache_file(), shipped):
        table = _read(path)
        generations = [name for name in table if name.startswith("sm_") and int(name[3:]) <= int(generation[3:])]
        if path != shipped:  # what was measured on another generation says nothing of this one
            generations = [name for name in generations if name == generation]
        for name in sorted(generations, key=lambda name: int(name[3:]), reverse=True):
            entries = table[name].get(kernel, {})
            for problem in problems:
                if problem in entries:
                    return path, problem, entries[problem]
    raise RuntimeError(f"{shipped} has nothing of {kernel} for {generation} and {problems[-1]}")  # older than sm_80


def cache_file() -> Path:
    return Path(os.environ.get("AVA_KERNELS_CACHE") or Path.home() / ".cache" / "ava_kernels") / "tiles.json"


def forget() -> None:
    """Reads the tables again at the next launch."""
    find.cache_clear()
    find_order.cache_clear()


def _read(path: Path) -> Table:
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text())
        for kernels in table.values():
            for entries in kernels.values():
                if not all(isinstance(entry, list) for entry in entries.values()):
                    raise ValueError(f"{entries}: entries are lists")
    except (ValueError, TypeError, AttributeError) as error:
        raise _no_table(path, str(error)) from None
    return table


def _no_table(path: Path, why: str) -> ValueError:
    return ValueError(f"{path}: is no table of tiles ({why}); delete it, or make it anew by bench.tune")


def generation(device: torch.device) -> str:
    """ "sm_90" """
    return "sm_{}{}".format(*capability(device))


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else NEWEST
