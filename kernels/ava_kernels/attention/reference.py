"""Attention in plain PyTorch, which is also the definition: scores, mask and softmax written out, where torch's fused
attention does not compute the same."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ava_kernels.rotary.op import places
from ava_kernels.rotary.reference import rotate

CHUNK = 2**24  # most scores that are written out at a time


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    position: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    interleaved: bool,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """`op.attention`; lse is None unless it is asked for. Documents are computed one by one: reads `cu_q` and `cu_k` on
    the host."""
    if cos is not None and sin is not None:
        positions = [position, position]
        if position is None and cu_q is not None and cu_k is not None:
            positions = [places(cu, t.shape[1])[None] for cu, t in ((cu_q, q), (cu_k, k))]
        q, k = (rotate(t, cos, sin, where, interleaved, False) for t, where in zip((q, k), positions, strict=True))
    options = scale, left, right, softcap, return_lse
    if cu_q is None or cu_k is None:
        return _sequences(q, k, v, *options)
    ends_q, ends_k = cu_q.tolist(), cu_k.tolist()
    outs, lses = [], []
    for i in range(len(ends_q) - 1):
        rows_q, rows_k = slice(ends_q[i], ends_q[i + 1]), slice(ends_k[i], ends_k[i + 1])
        out, lse = _sequences(q[:, rows_q], k[:, rows_k], v[:, rows_k], *options)
        outs.append(out)
        lses.append(lse)
    rest = q[:, ends_q[-1] :]
    outs.append(torch.zeros_like(rest))
    if not return_lse:
        return torch.cat(outs, dim=1), None
    lses.append(torch.full_like(rest[..., 0].transpose(1, 2), float("-inf"), dtype=_sum_dtype(q)))
    return torch.cat(outs, dim=1), torch.cat([lse for lse in lses if lse is not None], dim=2)


def _sequences(
    q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int, softcap: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """(B, S, H, D) all → out, and lse (B, H, S_q)."""
    if softcap or return_lse:
        return _written_out(q, k, v, scale, left, right, softcap)
    S_q, S_k, mask = q.shape[1], k.shape[1], None
    fused_causal = left < 0 and right == 0 and S_q == S_k  # torch's own causal mask is aligned to the top left
    if not fused_causal and (left >= 0 or right >= 0):
        mask = visible(S_q, S_k, left, right, q.device)
    out_BHSD = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=fused_causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out_BHSD.transpose(1, 2), None


def _written_out(
    q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int, softcap: float
) -> tuple[Tensor, Tensor]:
    """Some heads at a time, so that not all scores are there at once."""
    (B, S_q, H, _), S_k = q.shape, k.shape[1]
    heads = max(1, CHUNK // max(1, B * S_q * S_k))
    group = H // k.shape[2]
    hidden = ~visible(S_q, S_k, left, right, q.device)
    blind = hidden.all(-1)  # queries that see nothing: a softmax over minus infinities alone has no gradient
    hidden = hidden & ~blind[:, None]
    outs, lses = [], []
    for first in range(0, H, heads):
        chosen = torch.arange(first, min(H, first + heads), device=q.device)
        q_BHSD, k_BHSD, v_BHSD = (
            t.index_select(2, of).transpose(1, 2).to(_sum_dtype(q))
            for t, of in ((q, chosen), (k, chosen // group), (v, chosen // group))
        )
        scores = (q_BHSD @ k_BHSD.mT) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(hidden, float("-inf"))
        lse_BHS = scores.logsumexp(-1)
        weights = (scores - lse_BHS[..., None]).exp().masked_fill(blind[:, None], 0.0)
        outs.append((weights @ v_BHSD).transpose(1, 2).to(q.dtype))
        lses.append(lse_BHS.masked_fill(blind, float("-inf")))
    return torch.cat(outs, dim=2), torch.cat(lses, dim=1)


def visible(S_q: int, S_k: int, left: int, right: int, device: torch.device) -> Tensor:
    """(S_q, S_k) bool: which keys a query sees, aligned to the bottom right; −1 is no limit."""
    ahead = torch.arange(S_k, device=device) - (torch.arange(S_q, device=device)[:, None] + S_k - S_q)
    seen = torch.ones_like(ahead, dtype=torch.bool)
    if left >= 0:
        seen &= ahead >= -left
    if right >= 0:
        seen &= ahead <= right
    return seen


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
