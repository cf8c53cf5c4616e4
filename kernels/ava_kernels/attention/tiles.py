"""Which tile each kernel is cut into, and which implementation is taken where nobody asks for one, by `tiles.json`
(`ava_kernels/tiles.py` tells how it is read).

A problem is "16 bit, 128, causal": the bits of an element, the elements of a head padded to a power of two, and causal,
full or window; or, for every mask that has no entry of its own, "16 bit, 128". For the kernels of `hopper.py` it is
"16 bit, 128, softcap", which takes more registers, or, with or without, "16 bit, 128".

Implementations stand under "attention", by "16 bit, 128, causal", full, window or packed, or all that has no entry of
its own, "any": names of op.py's backends, the fastest first; the first that has what is asked for is taken.

What ships is reasoned and was not measured on a GPU yet: tiles, so that 16 bits spill nothing (`python -m bench.sm90`)
and that sm_86, sm_89 and sm_120 have the shared memory, 99 KiB; the implementations by what others publish of cuDNN's.
`python -m bench.attention --pin` writes what it measured.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ava_kernels import tiles

SHIPPED = Path(__file__).with_name("tiles.json")
KERNELS = ("forward", "dkdv", "dq")
ORDERED = ("triton", "hopper", "sdpa")
HOPPER = ("hopper_forward", "hopper_dkdv", "hopper_dq")


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


def ring_for(kernel: str, q: Tensor, softcap: float) -> Ring:
    """The ring of one of HOPPER for queries (…, D)."""
    problems = ring_problems(q.element_size(), q.shape[-1], softcap > 0)
    return Ring(*tiles.find(SHIPPED, kernel, tiles.generation(q.device), problems, len(Ring._fields)))


def order_for(device: torch.device, problem: str) -> tuple[str, ...]:
    """Implementations, the fastest first."""
    return tuple(tiles.find_order(SHIPPED, "attention", tiles.generation(device), (problem, "any"), ORDERED))


def order_problem(element_size: int, D: int, left: int, right: int, packed: bool) -> str:
    """Its name; by comparisons only, which torch.compile can follow with sizes that it does not know."""
    head = next(padded for padded in (32, 64, 128, 256) if padded >= D)
    mask = "packed" if packed else "window" if left >= 0 or right > 0 else "causal" if right == 0 else "full"
    return f"{8 * element_size} bit, {head}, {mask}"


def problem(element_size: int, D: int, left: int, right: int) -> str:
    """The name of the most special one."""
    return _problems(element_size, D, left, right)[0]


@functools.cache
def ring_problems(element_size: int, D: int, softcap: bool) -> tuple[str, ...]:
    """Their names, the most special one first."""
    others = _others(element_size, D)
    return (f"{others}, softcap", others) if softcap else (others,)


@functools.cache
def _problems(element_size: int, D: int, left: int, right: int) -> tuple[str, str]:
    mask = {(-1, -1): "full", (-1, 0): "causal"}.get((left, right), "window")
    others = _others(element_size, D)
    return f"{others}, {mask}", others


def _others(element_size: int, D: int) -> str:
    return f"{8 * element_size} bit, {max(32, 1 << (D - 1).bit_length())}"
