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


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    conjugate: bool = False,
) -> Tensor:
    """Turns the first 2·cos.shape[-1] features of every head; the rest pass through.

    x (B, S, H, D), or packed (T, H, D) with `cu_seqlens`, int32 (documents + 1) offsets from 0 to T. cos, sin (S_max,
    rotary_dim / 2), row s for position s. Positions count from 0 in every row or document, unless `position_ids`,
    (S), (B, S) or packed (T), gives them. Pairs are (i, i + rotary_dim/2), or (2i, 2i+1) if `interleaved`.
    `conjugate` turns the other way, which is also the gradient. Computed in float32 (float64 for float64 input),
    returned in x's dtype. Raises ValueError where the shapes do not fit, and on a CPU where a position has no row.
    """
    length, half = x.shape[-3], cos.shape[-1]
    if x.dim() != (4 if cu_seqlens is None else 3):
        raise ValueError(f"x {tuple(x.shape)}: must be (B, S, H, D), or (T, H, D) with cu_seqlens")
    if position_ids is not None and position_ids.shape not in (x.shape[:-2], x.shape[-3:-2]):
        raise ValueError(f"position_ids {tuple(position_ids.shape)} do not fit x {tuple(x.shape)}: one for every token")
    counted = cu_seqlens is None and position_ids is None
    if cos.shape != sin.shape or (counted and cos.shape[0] < length) or 2 * half > x.shape[-1]:
        raise ValueError(
            f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} do not fit x {tuple(x.shape)}: "
            "both must be (at least the largest position + 1, at most D / 2)"
        )
    if counted:
        rows = [table[:length] for table in (cos, sin)]
    else:
        positions = packed_positions(cu_seqlens, length) if position_ids is None else position_ids  # type: ignore[arg-type]
        if positions.device.type == "cpu" and positions.numel() and int(positions.max()) >= cos.shape[0]:
            raise ValueError(f"cos and sin have {cos.shape[0]} rows, but a position is {int(positions.max())}")
        rows = [table[positions] for table in (cos, sin)]
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos_S1P, sin_S1P = (row.unsqueeze(-2).to(dtype) for row in rows)
    if conjugate:
        sin_S1P = -sin_S1P
    turned = x[..., : 2 * half].to(dtype)
    first, second = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    pair = (first * cos_S1P - second * sin_S1P, second * cos_S1P + first * sin_S1P)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    turned = turned.to(x.dtype)
    return turned if 2 * half == x.shape[-1] else torch.cat((turned, x[..., 2 * half :]), dim=-1)


def packed_positions(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Every token's place in its own document, int64 (tokens), from the documents' offsets."""
    place_T = torch.arange(tokens, device=cu_seqlens.device)
    document_T = torch.searchsorted(cu_seqlens, place_T, right=True, out_int32=True) - 1
    return place_T - cu_seqlens[document_T]
