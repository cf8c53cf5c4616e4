"""What the kernels for Hopper in Gluon share."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import tma

GROUP: gl.constexpr = gl.constexpr(64)  # rows of a warp group: what one wgmma has
CHUNK: gl.constexpr = gl.constexpr(16)  # rows that are cleared at a time: registers are few
fetch = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its name in triton 3.8, and before


def runs_on(x: Tensor) -> bool:
    """Whether x is on an H100, H200 or their like, or has no memory, as in a plan of what a run will need."""
    return x.is_meta or (x.is_cuda and _has_capability_9(x.device.index))


@torch.compiler.assume_constant_result
def _has_capability_9(index: int) -> bool:
    return torch.cuda.get_device_capability(index)[0] == 9


@gluon.jit
def clear_behind(tile, end):
    """Sets the rows of a fetched tile (A, C) from `end` on to 0: what they hold belongs to somebody else. It is
    multiplied by 0 anyhow, but 0 · NaN would remain of it."""
    A: gl.constexpr = tile.shape[0]
    C: gl.constexpr = tile.shape[1]
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // C, C // 8], [4, 1], [1, 0])
    for first in gl.static_range(0, A, CHUNK):
        part = tile.slice(first, CHUNK)
        row_A = first + gl.arange(0, CHUNK, layout=gl.SliceLayout(1, rows))
        x_AC = part.load(rows)
        part.store(gl.where((row_A < end)[:, None], x_AC, gl.zeros_like(x_AC)))
    hopper.fence_async_shared()
