"""Rotary position embedding (Su et al., 2021, "RoFormer"), in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_table(
    length: int, rotary_dim: int, theta: float = 10000.0, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0 … length-1, each (length, rotary_dim / 2) float32.

    Pair i turns by position · theta^(-2i / rotary_dim). The angles are computed in float32, as the models do that
    weights are exchanged with.
    """
    if rotary_dim <= 0 or rotary_dim % 2:
        raise ValueError(f"rotary_dim is {rotary_dim}; it must be even and positive, since the rotation turns pairs")
    exponents = torch.arange(0, rotary_dim, 2, device=device, dtype=torch.float32) / rotary_dim
    frequencies = 1.0 / theta**exponents
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, position: Tensor | None, interleaved: bool, conjugate: bool) -> Tensor:
    """`op.apply_rotary` of x (B, S, H, D), position (B, S) int, or None for 0 … S−1."""
    half = cos.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    where = slice(x.shape[1]) if position is None else position
    cos_SD, sin_SD = (table[where].unsqueeze(-2).to(dtype) for table in (cos, sin))
    if conjugate:
        sin_SD = -sin_SD
    turned = x[..., : 2 * half].to(dtype)
    first, second = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    pair = (first * cos_SD - second * sin_SD, second * cos_SD + first * sin_SD)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    turned = turned.to(x.dtype)
    return turned if 2 * half == x.shape[-1] else torch.cat((turned, x[..., 2 * half :]), dim=-1)
