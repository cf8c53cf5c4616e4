"""Which tile each kernel is cut into, by `tiles.json` (`ava_kernels/tiles.py` tells how it is read).

A problem is "16 bit, 128, causal": the bits of an element, the elements of a head padded to a power of two, and causal,
full or window; or, for every mask that has no entry of its own, "16 bit, 128". For the kernels of `hopper.py` it is
"16 bit, 128", "16 bit, 128, softcap" or "16 bit, 128, softcap, packed": what takes more registers.

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
HOPPER = ("hopper_forward", "hopper_keys", "hopper_queries")


class Tile(NamedTuple):
    BM: int  # queries: what `keys` loops over
    BN: int  # keys: what the other two loop over
    warps: int
    stages: int


class Ring(NamedTuple):
    """What passes by the 128 rows that a program of `hopper.py` has."""

    rows: int  # of a tile
    stages: int  # tiles in shared memory


def tile_for(kernel: str, q: Tensor, left: int, right: int) -> Tile:
    """The tile of one of KERNELS for queries (…, D), and a window: -1 where it is unbounded."""
    problems = _problems(q.element_size(), q.shape[-1], left, right)
    return Tile(*tiles.find(SHIPPED, kernel, tiles.generation(q.device), problems, len(Tile._fields)))


def ring_for(kernel: str, q: Tensor, softcap: float, packed: bool) -> Ring:
    """The ring of one of HOPPER for queries (…, D)."""
    problems = ring_problems(q.element_size(), q.shape[-1], softcap > 0, packed)
    return Ring(*tiles.find(SHIPPED, kernel, tiles.generation(q.device), problems, len(Ring._fields)))


def problem(element_size: int, D: int, left: int, right: int) -> str:
    """The name of the most special one."""
    return _problems(element_size, D, left, right)[0]


@functools.cache
def ring_problems(element_size: int, D: int, softcap: bool, packed: bool) -> tuple[str, ...]:
    """Their names, the most special one first."""
    others = _others(element_size, D)
    capped = f"{others}, softcap"
    return (f"{capped}, packed",) * (softcap and packed) + (capped,) * softcap + (others,)


@functools.cache
def _problems(element_size: int, D: int, left: int, right: int) -> tuple[str, str]:
    mask = {(-1, -1): "full", (-1, 0): "causal"}.get((left, right), "window")
    others = _others(element_size, D)
    return f"{others}, {mask}", others


def _others(element_size: int, D: int) -> str:
    return f"{8 * element_size} bit, {max(32, triton.next_power_of_2(D))}"
