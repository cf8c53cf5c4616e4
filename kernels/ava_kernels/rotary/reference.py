"""Rotary position embedding (Su et al., 2021, "RoFormer"), in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, position: Tensor | None, interleaved: bool, conjugate: bool) -> Tensor:
    """`op.apply_rotary` of x (B, S, H, D), position (B, S) int, or None for 0 … S−1."""
    half = cos.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    where = slice(x.shape[1]) if position is None else position
    cos_SD, sin_SD = (table[where].unsqueeze(-2).to(dtype) for table in (cos, sin))
    if conjugate:
        sin_SD = -sin_SD
    rotated = x[..., : 2 * half].to(dtype)
    first, second = (rotated[..., ::2], rotated[..., 1::2]) if interleaved else rotated.chunk(2, dim=-1)
    pair = (first * cos_SD - second * sin_SD, second * cos_SD + first * sin_SD)
    rotated = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    rotated = rotated.to(x.dtype)
    return rotated if 2 * half == x.shape[-1] else torch.cat((rotated, x[..., 2 * half :]), dim=-1)
