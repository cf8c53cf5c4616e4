"""Attention over rotated queries and keys, in plain PyTorch: SDPA over the reference rotation."""

from __future__ import annotations

from itertools import pairwise

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
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """softmax(scale · R(q) R(k)ᵀ + mask) v, with R the rotation by position; without cos, plain attention.

    q (B, S_q, H_q, D), k and v (B, S_k, H_kv, D) with H_q a multiple of H_kv, → (B, S_q, H_q, D). cos, sin (S_max,
    rotary_dim / 2) with a row for every position: the place in the sequence, or `position_ids`, (S) or (B, S), for
    queries and keys alike. `causal` is aligned to the bottom right: the last query sees every key. Queries that see no
    key give zeros. `softmax_scale` defaults to 1/√D.

    Packed: q (T, H_q, D), k and v (T, H_kv, D) with `cu_seqlens`, int32 (documents + 1) offsets from 0 to T. No token
    sees another document, and positions count from 0 in each unless `position_ids` (T) gives them. `max_seqlen` is at
    least the longest document's length; kernels need it, here it is only checked. The offsets are read on the host.

    Raises ValueError where heads, offsets or positions do not fit.
    """
    S_q, S_k, H_q, H_kv = q.shape[-3], k.shape[-3], q.shape[-2], k.shape[-2]
    if H_kv == 0 or H_q % H_kv:
        raise ValueError(f"{H_q} query heads cannot share {H_kv} key/value heads: H_q must be a multiple of H_kv")
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin belong together: give both or neither")
    if position_ids is not None and (S_q != S_k or cos is None):
        raise ValueError(f"position_ids need cos, sin and as many keys as queries; there are {S_k} and {S_q}")
    if cos is not None and sin is not None:
        q, k = (
            apply_rotary(t, cos, sin, interleaved=interleaved, position_ids=position_ids, cu_seqlens=cu_seqlens)
            for t in (q, k)
        )
    if cu_seqlens is None:
        return _attention(q, k, v, causal, softmax_scale)
    offsets = _checked(cu_seqlens, max_seqlen, S_q, S_k)
    starts: dict[int, list[int]] = {}  # by length: documents of one length are one call
    for start, end in pairwise(offsets):
        starts.setdefault(end - start, []).append(start)
    rows, parts = [], []
    for length, begins in starts.items():
        row = (torch.tensor(begins)[:, None] + torch.arange(length)).flatten().to(q.device)
        own_q, own_k, own_v = (t.index_select(0, row).unflatten(0, (len(begins), length)) for t in (q, k, v))
        rows.append(row)
        parts.append(_attention(own_q, own_k, own_v, causal, softmax_scale).flatten(0, 1))
    return torch.cat(parts).index_select(0, torch.cat(rows).argsort()) if parts else torch.zeros_like(q)


def _attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, softmax_scale: float | None) -> Tensor:
    S_q, S_k = q.shape[1], k.shape[1]
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
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out_BHSD.transpose(1, 2)


def _checked(cu_seqlens: Tensor, max_seqlen: int | None, S_q: int, S_k: int) -> list[int]:
    offsets: list[int] = cu_seqlens.tolist()
    if cu_seqlens.dtype != torch.int32 or not offsets or offsets != sorted(offsets) or offsets[0] != 0:
        raise ValueError(f"cu_seqlens must be int32 offsets that rise from 0, not {cu_seqlens.dtype} {offsets[:5]} …")
    if not offsets[-1] == S_q == S_k:
        raise ValueError(f"cu_seqlens end at {offsets[-1]}, but there are {S_q} queries and {S_k} keys")
    longest = max((end - start for start, end in pairwise(offsets)), default=0)
    if max_seqlen is not None and longest > max_seqlen:
        raise ValueError(f"max_seqlen is {max_seqlen}, but a document has {longest} tokens")
    return offsets
