"""flash-attn 2's functions over our attention and rotation: signatures, defaults and results are its own (2.8).

    from ava_kernels.compat.flash_attn import flash_attn_func, flash_attn_varlen_func   # flash_attn
    from ava_kernels.compat.flash_attn import apply_rotary_emb                          # flash_attn.layers.rotary

Masks are aligned to the bottom right, as there: query i is at i + S_k - S_q. `window_size` is (left, right), -1 for no
limit; None for that, which flash-attn 4 writes, is refused. Any float dtype, any head dimension to 256, any device.

Refused with a ValueError that names it: dropout_p above 0, alibi_slopes, block_table. `return_attn_probs=True` gives
(out, lse, None), where there the third, of use to tests alone, is None or without meaning too. Otherwise than there: a
query that sees no key has an lse of minus infinity, not plus; rows behind the last of cu_seqlens are 0, not undefined;
lse has a gradient; `deterministic` is so in both its values with packed sequences and windows (`rope_attention` has
the rest).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ava_kernels.attention import reference
from ava_kernels.attention.op import MAX_HEAD_DIM, attention, is_window, rope_attention
from ava_kernels.backend import runs_on_triton
from ava_kernels.rotary.op import apply_rotary, places

Result = Tensor | tuple[Tensor, Tensor, None]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """q (B, S_q, H_q, D), k and v (B, S_k, H_kv, D), H_q a multiple of H_kv → (B, S_q, H_q, D), and with
    return_attn_probs lse (B, H_q, S_q) and None."""
    _refuse(dropout_p, alibi_slopes)
    _check_window(window_size)
    if not return_attn_probs:
        return rope_attention(
            q,
            k,
            v,
            causal=causal,
            softmax_scale=softmax_scale,
            window_size=window_size,
            softcap=softcap,
            deterministic=deterministic,
        )
    out, lse = rope_attention(
        q,
        k,
        v,
        causal=causal,
        softmax_scale=softmax_scale,
        window_size=window_size,
        softcap=softcap,
        deterministic=deterministic,
        return_lse=True,
    )
    return out, lse, None


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` of kv (B, S_k, 2, H_kv, D)."""
    _check_packed("kv", kv, 5, 2)
    rest = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    k, v = kv.unbind(2)
    return flash_attn_func(q, k, v, *rest)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` of qkv (B, S, 3, H, D)."""
    _check_packed("qkv", qkv, 5, 3)
    rest = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    q, k, v = qkv.unbind(2)
    return flash_attn_func(q, k, v, *rest)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """q (T_q, H_q, D), k and v (T_k, H_kv, D), cu_seqlens (sequences + 1) int32 each: 0 and the ends, at most
    max_seqlen apart → (T_q, H_q, D), and with return_attn_probs lse (H_q, T_q) and None. No sequence sees another."""
    _refuse(dropout_p, alibi_slopes)
    _check_window(window_size)
    if block_table is not None:
        raise ValueError("block_table is given, and a paged cache is not computed here: leave it out")
    _check_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, softcap)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    left, right = window_size[0], 0 if causal else window_size[1]
    q, k, v = (t[None] for t in (q, k, v))
    mask = cu_seqlens_q, cu_seqlens_k, float(scale), left, right, float(softcap), False
    lse: Tensor | None
    if runs_on_triton(q):
        out, lse = attention(q, k, v, None, None, None, *mask, int(max_seqlen_q), int(max_seqlen_k))
    else:
        out, lse = reference.attention(q, k, v, None, None, None, *mask, return_attn_probs)
    return (out[0], lse[0], None) if return_attn_probs and lse is not None else out[0]


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` of kv (T_k, 2, H_kv, D)."""
    _check_packed("kv", kv, 4, 2)
    rest = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *rest)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` of qkv (T, 3, H, D)."""
    _check_packed("qkv", qkv, 4, 3)
    rest = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *rest)


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """`apply_rotary` of x (B, S, H, D), or with cu_seqlens (T, H, D), cos and sin (positions, rotary_dim / 2), where
    each sequence begins at position `seqlen_offsets`, an int, or (sequences,) ints, which must stay within the table.
    max_seqlen, the longest sequence's length, serves to check the table's; None will do.
    """
    if max_seqlen is not None and cu_seqlens is None:
        raise ValueError("max_seqlen is given without cu_seqlens, which pack the sequences that it is about")
    if isinstance(seqlen_offsets, Tensor):
        sequences = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        if tuple(seqlen_offsets.shape) != (sequences,) or seqlen_offsets.is_floating_point():
            raise ValueError(
                f"seqlen_offsets is {seqlen_offsets.dtype} of shape {tuple(seqlen_offsets.shape)}; it must be an int, "
                f"or integers ({sequences},)"
            )
        if cu_seqlens is None:
            position_ids = seqlen_offsets[:, None] + torch.arange(x.shape[1], device=x.device)
        elif sequences:
            token = torch.arange(x.shape[0], device=x.device, dtype=cu_seqlens.dtype)
            sequence = (torch.searchsorted(cu_seqlens, token, right=True) - 1).clamp(max=sequences - 1)
            position_ids = places(cu_seqlens, x.shape[0]) + seqlen_offsets[sequence]
        else:
            position_ids = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
        return apply_rotary(
            x, cos, sin, interleaved=interleaved, inplace=inplace, cu_seqlens=cu_seqlens, position_ids=position_ids
        )
    longest = x.shape[1] if cu_seqlens is None else max_seqlen or 0
    if seqlen_offsets < 0 or seqlen_offsets + longest > len(cos):
        raise ValueError(
            f"seqlen_offsets is {seqlen_offsets} and the longest sequence has {longest} tokens, but cos and sin have "
            f"{len(cos)} positions"
        )
    cos, sin = cos[seqlen_offsets:], sin[seqlen_offsets:]
    return apply_rotary(x, cos, sin, interleaved=interleaved, inplace=inplace, cu_seqlens=cu_seqlens)


def _refuse(dropout_p: float, alibi_slopes: Tensor | None) -> None:
    if dropout_p != 0.0:
        raise ValueError(f"dropout_p is {dropout_p}, and attention without dropout alone is computed here: give 0.0")
    if alibi_slopes is not None:
        raise ValueError("alibi_slopes is given, and attention without a position bias alone is computed here")


def _check_window(window_size: tuple[int, int]) -> None:
    if not is_window(window_size):
        raise ValueError(f"window_size is {window_size}; it must be (left, right), each 0 or more, or -1 for no limit")


def _check_packed(name: str, tensor: Tensor, dims: int, parts: int) -> None:
    if tensor.dim() != dims or tensor.shape[dims - 3] != parts:
        tokens = "B, S" if dims == 5 else "T"
        raise ValueError(f"{name} has the shape {tuple(tensor.shape)}; it must be ({tokens}, {parts}, H, D)")


def _check_varlen(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, softcap: float) -> None:
    if not q.dim() == k.dim() == v.dim() == 3 or k.shape != v.shape or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit: they must be (T, H, D), k and "
            "v alike, with one head dimension"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}; all three must be the same float dtype")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] or not 1 <= q.shape[2] <= MAX_HEAD_DIM:
        raise ValueError(
            f"q has {q.shape[1]} heads, k and v {k.shape[1]}, of {q.shape[2]} elements: q's heads must be a multiple "
            f"of k's, and a head have 1 to {MAX_HEAD_DIM} elements"
        )
    if softcap < 0:
        raise ValueError(f"softcap is {softcap}; it must be 0, for none, or more")
    for name, cu in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        if cu.dim() != 1 or cu.dtype != torch.int32 or len(cu) < 1:
            raise ValueError(f"{name} is {cu.dtype} of shape {tuple(cu.shape)}; it must be int32 (sequences + 1,)")
    if len(cu_q) != len(cu_k):
        raise ValueError(f"cu_seqlens_q has {len(cu_q)} numbers, cu_seqlens_k {len(cu_k)}; both must have as many")
