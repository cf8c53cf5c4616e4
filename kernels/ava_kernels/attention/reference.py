"""Attention over rotated queries and keys, in plain PyTorch: SDPA over the reference rotation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ava_kernels.rotary.reference import apply_rotary


def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    interleaved: bool = False,
) -> Tensor:
    """softmax(scale · R(q) R(k)ᵀ + mask) v, with R the rotation by position; without cos, plain attention.

    q (B, S_q, H_q, D), k and v (B, S_k, H_kv, D) with H_q a multiple of H_kv, → (B, S_q, H_q, D). cos, sin
    (≥ max(S_q, S_k), rotary_dim / 2). `causal` is aligned to the bottom right: the last query sees every key. Queries
    that see no key give zeros. `softmax_scale` defaults to 1/√D. Raises ValueError where the heads do not fit.
    """
    S_q, S_k, H_q, H_kv = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    if H_kv == 0 or H_q % H_kv:
        raise ValueError(f"{H_q} query heads cannot share {H_kv} key/value heads: H_q must be a multiple of H_kv")
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin belong together: give both or neither")
    if cos is not None and sin is not None:
        q = apply_rotary(q, cos, sin, interleaved=interleaved)
        k = apply_rotary(k, cos, sin, interleaved=interleaved)
    mask = None
    if causal and S_q != S_k and S_q > 1:  # SDPA's own causal mask is aligned to the top left
        mask = torch.ones(S_q, S_k, dtype=torch.bool, device=q.device).tril(S_k - S_q)
    out_BHSD = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal and S_q == S_k,
        scale=softmax_scale,
        enable_gqa=H_q != H_kv,
    )
    return out_BHSD.transpose(1, 2)
