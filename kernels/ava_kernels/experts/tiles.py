"""Which tile each product of `kernels.py` is cut into: a table, `tiles.json`, that ships with the package.

Its keys are the device ("sm_90"; a device takes the entries of the newest generation that is not newer than itself),
then the kernel, then the problem: "E×M×I bfloat16" for one that is pinned, "16 bit" or "32 bit" for all others, which
may have entries of their own: "16 bit, odd" where M or I is no multiple of 64, and before that "16 bit, unaligned"
where one is no multiple of 16 bytes.
`python -m bench.tune experts` searches for better tiles on a GPU and keeps what it finds in a file of the same form,
`~/.cache/ava_kernels/tiles.json` (`AVA_KERNELS_CACHE` names another folder), which goes before the table. Nothing is
searched for while a model trains.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

SHIPPED = Path(__file__).with_name("tiles.json")
KERNELS = ("up", "rows", "back", "weights")
NEWEST = (9, 0)  # what a machine without a GPU compiles for

Table = dict[str, dict[str, dict[str, list[int]]]]


class Tile(NamedTuple):
    BM: int  # rows: of the experts' tokens, of a weight's gradient in `weights`
    BN: int  # columns; with a gated activation a tile of `up` has as many again
    BK: int  # what is multiplied and added at a time
    warps: int
    stages: int  # operands in flight
    G: int  # tiles of rows that take turns at a tile of columns
    programs: int  # most that are resident on a processor


def tile_for(kernel: str, x: Tensor, E: int, M: int, I: int) -> Tile:
    """The tile of one of KERNELS for x's device and dtype, and experts (E, 2I, M) and (E, M, I)."""
    return _find(kernel, _device(x), x.dtype, E, M, I)


@functools.cache
def _find(kernel: str, device: str, dtype: torch.dtype, E: int, M: int, I: int) -> Tile:
    others = f"{8 * dtype.itemsize} bit"
    keys = [problem(E, M, I, dtype), others]
    if M % 64 or I % 64:
        keys.insert(1, f"{others}, odd")
    if M * dtype.itemsize % 16 or I * dtype.itemsize % 16:
        keys.insert(1, f"{others}, unaligned")
    for table in (_read(cache_file()), _read(SHIPPED)):
        generations = [name for name in table if name.startswith("sm_") and int(name[3:]) <= int(device[3:])]
        for name in sorted(generations, key=lambda name: int(name[3:]), reverse=True):
            entries = table[name].get(kernel, {})
            for key in keys:
                if key in entries:
                    return Tile(*entries[key])
    raise RuntimeError(f"{SHIPPED} has no tile of {kernel} for {device} and {others}")  # an older GPU than sm_80


def problem(E: int, M: int, I: int, dtype: torch.dtype) -> str:
    """The key of a pinned tile."""
    return f"{E}×{M}×{I} {str(dtype).removeprefix('torch.')}"


def cache_file() -> Path:
    return Path(os.environ.get("AVA_KERNELS_CACHE") or Path.home() / ".cache" / "ava_kernels") / "tiles.json"


def forget() -> None:
    """Reads the tables again at the next launch."""
    _find.cache_clear()


def _read(path: Path) -> Table:
    """Raises ValueError if the file is there and is no table."""
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text())
        for kernels in table.values():
            for entries in kernels.values():
                for tile in entries.values():
                    Tile(*map(int, tile))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: is no table of tiles ({error}); delete it, or make it anew by bench.tune") from None
    return table


def _device(x: Tensor) -> str:
    return "sm_{}{}".format(*capability(x.device))


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else NEWEST
