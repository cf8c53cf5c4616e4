"""Attention in plain PyTorch, which is also the definition: scores, mask and softmax written out, where torch's fused
attention does not compute the same."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ava_kernels.backend import is_known
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
    """`op.attention`; lse is None unless it is asked for."""
    if cos is not None and sin is not None:
        positions = [position, position]
        if position is None and cu_q is not None and cu_k is not None:
            positions = [places(cu, t.shape[1])[None] for cu, t in ((cu_q, q), (cu_k, k))]
        q, k = (rotate(t, cos, sin, where, interleaved, False) for t, where in zip((q, k), positions, strict=True))
    options = scale, left, right, softcap, return_lse
    if cu_q is None or cu_k is None:
        return _sequences(q, k, v, *options)
    if is_known(
        cu_q
    ):  # autograd's gradient of this takes half the time of the one that the operation needs written out
        return by_document(q, k, v, cu_q, cu_k, options)
    out, lse = torch.ops.ava_kernels.attention_by_document(q, k, v, cu_q, cu_k, *options)
    return out, lse if return_lse else None


def by_document(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, options: tuple[float, int, int, float, bool]
) -> tuple[Tensor, Tensor | None]:
    """(1, T, H, D) all, and `_sequences`' options → out, and lse (1, H, T_q) or None. Reads `cu_q` and `cu_k` on the
    host."""
    check_documents(q, k, cu_q, cu_k)
    outs, lses = [], []
    for rows_q, rows_k in _documents(cu_q, cu_k):
        out, lse = _sequences(q[:, rows_q], k[:, rows_k], v[:, rows_k], *options)
        outs.append(out)
        lses.append(lse)
    rest = q[:, int(cu_q[-1]) :]
    outs.append(torch.zeros_like(rest))
    if not options[-1]:
        return torch.cat(outs, dim=1), None
    lses.append(torch.full_like(rest[..., 0].transpose(1, 2), float("-inf"), dtype=_sum_dtype(q)))
    return torch.cat(outs, dim=1), torch.cat([lse for lse in lses if lse is not None], dim=2)


def by_document_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    options: tuple[float, int, int, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """→ dq, dk, dv. Written out, as autograd is not to be had within a custom op."""
    dq, dk, dv = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    for rows_q, rows_k in _documents(cu_q, cu_k):
        dq[:, rows_q], dk[:, rows_k], dv[:, rows_k] = _written_out_backward(
            dout[:, rows_q],
            None if dlse is None else dlse[..., rows_q],
            q[:, rows_q],
            k[:, rows_k],
            v[:, rows_k],
            *options,
        )
    return dq, dk, dv


def check_documents(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor) -> None:
    """Raises ValueError if they do not hold documents of these tokens. Reads them on the host."""
    for cu, tokens in ((cu_q, q.shape[1]), (cu_k, k.shape[1])):
        ends = cu.tolist()
        if ends[0] or sorted(ends) != ends or ends[-1] > tokens:
            some = ends if len(ends) < 20 else f"{ends[:8]} … {ends[-8:]}"
            raise ValueError(
                f"cu_seqlens is {some}; it must hold 0 and the documents' ends, each as large as the one before it, "
                f"the last at most {tokens}, the number of tokens"
            )


def _documents(cu_q: Tensor, cu_k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Each document's queries and keys."""
    for ends in zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True):
        yield slice(*ends[0]), slice(*ends[1])


def _sequences(
    q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int, softcap: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """(B, S, H, D) all → out, and lse (B, H, S_q)."""
    if softcap or return_lse:
        return _written_out(q, k, v, scale, left, right, softcap)
    S_q, S_k = q.shape[1], k.shape[1]
    options: dict[str, Any] = {}  # branches, as torch's attention refuses symbolic truths, which torch.compile has
    if q.shape[2] != k.shape[2]:
        options["enable_gqa"] = True
    if left < 0 and right == 0 and S_q == S_k:  # torch's own causal mask is aligned to the top left
        options["is_causal"] = True
    elif left >= 0 or right >= 0:
        options["attn_mask"] = visible(S_q, S_k, left, right, q.device)
    q_BHSD, k_BHSD, v_BHSD = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q_BHSD, k_BHSD, v_BHSD, scale=scale, **options).transpose(1, 2), None


def _written_out(
    q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int, softcap: float
) -> tuple[Tensor, Tensor]:
    hidden, blind = _hidden(q, k, left, right)
    outs, lses = [], []
    for chosen, shared in _some_heads(q, k):
        q_BHSD, k_BHSD, v_BHSD = (_heads(t, of) for t, of in ((q, chosen), (k, shared), (v, shared)))
        scores = _capped((q_BHSD @ k_BHSD.mT) * scale, softcap).masked_fill(hidden, float("-inf"))
        lse_BHS = scores.logsumexp(-1)
        weights = (scores - lse_BHS[..., None]).exp().masked_fill(blind[:, None], 0.0)
        outs.append((weights @ v_BHSD).transpose(1, 2).to(q.dtype))
        lses.append(lse_BHS.masked_fill(blind, float("-inf")))
    return torch.cat(outs, dim=2), torch.cat(lses, dim=1)


def _written_out_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    left: int,
    right: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, blind = _hidden(q, k, left, right)
    dq, dk, dv = (torch.zeros_like(t, dtype=_sum_dtype(t)) for t in (q, k, v))
    for chosen, shared in _some_heads(q, k):
        q_BHSD, k_BHSD, v_BHSD, dout_BHSD = (
            _heads(t, of) for t, of in ((q, chosen), (k, shared), (v, shared), (dout, chosen))
        )
        scores = _capped((q_BHSD @ k_BHSD.mT) * scale, softcap)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).masked_fill(blind[:, None], 0.0)
        dweights = dout_BHSD @ v_BHSD.mT
        dscores = dweights - (weights * dweights).sum(-1, keepdim=True)
        if dlse is not None:
            dscores += dlse[:, chosen, :, None]
        dscores *= weights
        if softcap:
            dscores *= 1 - (scores / softcap).square_()
        dscores *= scale
        dq[:, :, chosen] = (dscores @ k_BHSD).transpose(1, 2)
        dk.index_add_(2, shared, (dscores.mT @ q_BHSD).transpose(1, 2))
        dv.index_add_(2, shared, (weights.mT @ dout_BHSD).transpose(1, 2))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _some_heads(q: Tensor, k: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some query heads at a time, so that not all scores are there at once, and the key heads that they share."""
    (B, S_q, H, _), S_k = q.shape, k.shape[1]
    heads = max(1, CHUNK // max(1, B * S_q * S_k))
    for first in range(0, H, heads):
        chosen = torch.arange(first, min(H, first + heads), device=q.device)
        yield chosen, chosen // (H // k.shape[2])


def _heads(x: Tensor, chosen: Tensor) -> Tensor:
    """(B, H, S, D) of those heads, in the dtype that products are summed in."""
    return x.index_select(2, chosen).transpose(1, 2).to(_sum_dtype(x))


def _hidden(q: Tensor, k: Tensor, left: int, right: int) -> tuple[Tensor, Tensor]:
    """Which keys a query does not see (S_q, S_k); and the queries that see none (S_q,), whose keys are not hidden: a
    softmax over minus infinities alone has no gradient."""
    hidden = ~visible(q.shape[1], k.shape[1], left, right, q.device)
    blind = hidden.all(-1)
    return hidden & ~blind[:, None], blind


def _capped(scores: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(scores / softcap) if softcap else scores


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
