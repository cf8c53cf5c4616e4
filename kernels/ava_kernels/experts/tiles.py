"""Which tile each product of `kernels.py` is cut into, and which kernels are taken where nobody asks for some, by
`tiles.json` (`ava_kernels/tiles.py` tells how it is read).

A problem is "E×M×I bfloat16" where it is pinned; all others are "16 bit" or "32 bit", which may have entries of their
own: "16 bit, odd" where M or I is no multiple of 64, and before that "16 bit, unaligned" where one is no multiple of 16
bytes.

Which kernels stands under "moe_mlp", by the same problems or, for all that have no entry of their own, "any": names of
op.py's backends, the fastest first. What ships is "triton" alone, as nothing was measured on a GPU yet; `python -m
bench.experts --pin` writes what it measured.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ava_kernels import tiles

SHIPPED = Path(__file__).with_name("tiles.json")
KERNELS = ("up", "grouped_mm", "down_backward", "weight_grad")
ORDERED = ("triton", "hopper")


class Tile(NamedTuple):
    BM: int  # rows: of the experts' tokens, of a weight's gradient in `weight_grad`
    BN: int  # columns; with a gated activation a tile of `up` has as many again
    BK: int  # what is multiplied and added at a time
    warps: int
    stages: int  # operands in flight
    G: int  # tiles of rows that go through the columns together
    programs: int  # most that are resident on a processor


def tile_for(kernel: str, x: Tensor, E: int, M: int, I: int) -> Tile:
    """The tile of one of KERNELS for x's device and dtype, and experts (E, 2I, M) and (E, M, I)."""
    generation, problems = tiles.generation(x.device), _problems(x.dtype, E, M, I)
    return Tile(*tiles.find(SHIPPED, kernel, generation, problems, len(Tile._fields)))


def order_for(x: Tensor, E: int, M: int, I: int) -> list[str]:
    """Of ORDERED, the fastest first, for x's device and dtype, and experts (E, 2I, M) and (E, M, I)."""
    problems = *_problems(x.dtype, E, M, I), "any"
    return tiles.find_order(SHIPPED, "moe_mlp", tiles.generation(x.device), problems, ORDERED)


@functools.cache
def _problems(dtype: torch.dtype, E: int, M: int, I: int) -> tuple[str, ...]:
    """The most special first."""
    others = f"{8 * dtype.itemsize} bit"
    unaligned = [f"{others}, unaligned"] if M * dtype.itemsize % 16 or I * dtype.itemsize % 16 else []
    odd = [f"{others}, odd"] if M % 64 or I % 64 else []
    return problem(E, M, I, dtype), *unaligned, *odd, others


def problem(E: int, M: int, I: int, dtype: torch.dtype) -> str:
    """The name of one that is pinned."""
    return f"{E}×{M}×{I} {str(dtype).removeprefix('torch.')}"
