"""Which tile each kernel of `kernels.py` is cut into, by `tiles.json` (`ava_kernels/tiles.py` tells how it is read).

A problem is "16 bit, 128, causal": the bits of an element, the elements of a head padded to a power of two, and causal,
full or window; or, for every mask that has no entry of its own, "16 bit, 128".

What ships is reasoned, so that 16 bits spill nothing (`python -m bench.sm90`) and that sm_86, sm_89 and sm_120 have the
shared memory, 99 KiB; it was not measured on a GPU yet.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import triton
from torch import Tensor

from ava_kernels import tiles

SHIPPED = Path(__file__).with_name("tiles.json")
KERNELS = ("forward", "keys", "queries")


class Tile(NamedTuple):
    BM: int  # queries: what `keys` loops over
    BN: int  # keys: what the other two loop over
    warps: int
    stages: int


def tile_for(kernel: str, q: Tensor, left: int, right: int) -> Tile:
    """The tile of one of KERNELS for queries (…, D), and a window: -1 where it is unbounded."""
    problems = _problems(q.element_size(), q.shape[-1], left, right)
    return Tile(*tiles.find(SHIPPED, kernel, tiles.generation(q.device), problems, len(Tile._fields)))


def problem(element_size: int, D: int, left: int, right: int) -> str:
    """The name of the most special one."""
    return _problems(element_size, D, left, right)[0]


@functools.cache
def _problems(element_size: int, D: int, left: int, right: int) -> tuple[str, str]:
    mask = {(-1, -1): "full", (-1, 0): "causal"}.get((left, right), "window")
    others = f"{8 * element_size} bit, {max(32, triton.next_power_of_2(D))}"
    return f"{others}, {mask}", others
