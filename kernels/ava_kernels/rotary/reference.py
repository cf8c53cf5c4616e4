"""Rotary position embedding (Su et al., 2021, "RoFormer"), in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, position: Tensor | None, interleaved: bool, conjugate: bool) -> Tensor:
    """`op.apply_rotary` of x (B, S, H, D), position (B, S) int, or None for 0 … S−1.

    (a, b) → (a·cos − b·sin, b·cos + a·sin) is x · (cos, cos) + (b, a) · (−sin, sin): fewer passes over memory, also
    those of the gradient, than pair by pair.
    """
    half = cos.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    where = slice(x.shape[1]) if position is None else position
    cos_SD, sin_SD = (table[where].unsqueeze(-2).to(dtype) for table in (cos, sin))
    signed = (sin_SD, -sin_SD) if conjugate else (-sin_SD, sin_SD)
    rotated = x[..., : 2 * half].to(dtype)
    if interleaved:
        cos_SD, sin_SD = torch.stack((cos_SD, cos_SD), dim=-1).flatten(-2), torch.stack(signed, dim=-1).flatten(-2)
        swapped = rotated.unflatten(-1, (half, 2)).flip(-1).flatten(-2)
    else:
        cos_SD, sin_SD = torch.cat((cos_SD, cos_SD), dim=-1), torch.cat(signed, dim=-1)
        swapped = rotated.roll(half, dims=-1)
    rotated = torch.addcmul(rotated * cos_SD, swapped, sin_SD).to(x.dtype)
    return rotated if 2 * half == x.shape[-1] else torch.cat((rotated, x[..., 2 * half :]), dim=-1)
