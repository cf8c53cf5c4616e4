"""Attention over rotated queries and keys in Triton, forward and backward.

    (rotary) _rotate   forward   keys, once
    _forward           forward   rotates its queries as it loads them and keeps them rotated for backward; out and lse
    _delta             backward  ⟨out, dout⟩ of every query
    _dkdv              backward  dk and dv, one program per tile of keys; dk is rotated back before it is stored
    _dq                backward  dq, one program per tile of queries, rotated back likewise

Rotating keys inside the loop over them would rotate each once per tile of queries. What the rotation costs is then, for
H_q query heads, H_kv key heads and T tokens of D elements of b bytes: T·(2·H_kv + H_q)·D·b bytes, the keys read and
written, the queries written (only where there will be a backward pass); a separate pass before attention and one after
its gradient take 4·T·(H_q + H_kv)·D·b. Gradients of heads that are rotated in part, or whose size is no
power of two, are rotated back by passes of their own: 2·T·(H_q + H_kv)·D·b more.

Scores are computed again in backward, once by each of its two kernels: no sum is atomic, so the same input gives the
same bits. A tile of queries meets the tiles of keys that some of its queries see; those that all of them see wholly are
not masked. Scores are in units of log 2: p = 2^(s - lse). Offsets are 64 bits wide.

Shape suffixes: M queries and N keys of a tile, D elements of a head, padded to a power of two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ava_kernels.attention.tiles import Tile, tile_for
from ava_kernels.dot import float32_is_exact, tile_dot
from ava_kernels.rotary import kernels as rotary

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


class Shape(NamedTuple):
    """What forward and backward are asked for, apart from tensors. `left` and `right` are -1 where unbounded."""

    scale: float
    left: int
    right: int
    softcap: float
    interleaved: bool
    max_q: int
    max_k: int


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    position: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    shape: Shape,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """→ out like q, lse (B, H, S) or (H, T) float32, and the rotated queries (empty unless `keep`) and keys.

    q (B, S_q, H_q, D), k and v (B, S_k, H_kv, D), B = 1 where cu_q and cu_k (documents + 1) pack them; position (B, S).
    """
    q, k, v = (_with_whole_heads(t) for t in (q, k, v))
    cos, sin = (t if t is None or t.stride(1) == 1 else t.contiguous() for t in (cos, sin))
    (B, S_q, H_q, _), S_k, H_kv = q.shape, k.shape[1], k.shape[2]
    out = torch.zeros_like(q, memory_format=torch.contiguous_format) if cu_q is not None else q.new_empty(q.shape)
    lse = q.new_full((B, H_q, S_q), float("-inf"), dtype=torch.float32)
    rotated_k = k.new_empty(0)
    if cos is not None and sin is not None:
        rotated_k = k.new_empty(k.shape)
        rotary.rotate(k, cos, sin, position, shape.interleaved, False, rotated_k)
    rotated_q = q.new_empty(q.shape if keep and cos is not None else 0)
    tile = tile_for("forward", q, shape.left, shape.right)
    documents = B if cu_q is None else len(cu_q) - 1
    blocks = triton.cdiv(shape.max_q, tile.BM)
    if blocks and documents:
        _forward[(blocks * documents * H_q,)](
            q,
            *q.stride()[:3],
            *_with_strides(k if cos is None else rotated_k),
            v,
            *v.stride()[:3],
            cos,
            sin,
            *_table_strides(cos, sin),
            position,
            0 if position is None else position.stride(0),
            cu_q,
            cu_k,
            out,
            lse,
            rotated_q if rotated_q.numel() else None,
            S_q * H_q * q.shape[3],
            H_q * q.shape[3],
            blocks,
            S_q,
            S_k,
            H_q,
            H_q // H_kv,
            **_constants(q, cos, shape, tile),
        )
    return out, lse, rotated_q, rotated_k


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    position: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    shape: Shape,
) -> tuple[Tensor, Tensor, Tensor]:
    """→ dq, dk, dv. q and k are the rotated ones, if there is a table."""
    q, k, v, dout = (_with_whole_heads(t) for t in (q, k, v, dout))
    cos, sin = (t if t is None or t.stride(1) == 1 else t.contiguous() for t in (cos, sin))
    (B, S_q, H_q, D), S_k, H_kv = q.shape, k.shape[1], k.shape[2]
    new = torch.zeros_like if cu_q is not None else torch.empty_like
    dq, dk, dv = (new(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    if not dq.numel():
        return dq, dk.zero_(), dv.zero_()
    dot = delta(out, dout, dlse)
    fused = cos is not None and 2 * cos.shape[1] == D == max(16, triton.next_power_of_2(D))
    table = (cos, sin) if fused else (None, None)
    documents = B if cu_q is None else len(cu_q) - 1
    common = (
        q, *q.stride()[:3], k, *k.stride()[:3], v, *v.stride()[:3], dout, *dout.stride()[:3],
        lse, dot, *table, *_table_strides(*table), position, 0 if position is None else position.stride(0), cu_q, cu_k,
    )  # fmt: skip
    sizes = S_q, S_k, H_q, H_q // H_kv
    tile = tile_for("dkdv", q, shape.left, shape.right)
    blocks = triton.cdiv(shape.max_k, tile.BN)
    if blocks and documents:
        constants = _constants(q, table[0], shape, tile)
        _dkdv[(blocks * documents * H_kv,)](*common, dk, dv, blocks, *sizes, **constants)
    tile = tile_for("dq", q, shape.left, shape.right)
    blocks = triton.cdiv(shape.max_q, tile.BM)
    if blocks and documents:
        constants = _constants(q, table[0], shape, tile)
        _dq[(blocks * documents * H_q,)](*common, dq, blocks, *sizes, **constants)
    if cos is not None and sin is not None and not fused:
        for gradient in (dq, dk):
            rotary.rotate(gradient, cos, sin, position, shape.interleaved, True, gradient)
    return dq, dk, dv


def delta(out: Tensor, dout: Tensor, dlse: Tensor | None) -> Tensor:
    """⟨out, dout⟩ − dlse of every query → (B, H, S) float32. out (B, S, H, D) contiguous, dout with whole heads."""
    B, S, H, D = out.shape
    dot = out.new_empty((B, H, S), dtype=torch.float32)
    D_padded = max(16, triton.next_power_of_2(D))
    R = max(1, 4096 // D_padded)
    rows = B * S * H
    dout, dlse = _with_whole_heads(dout), None if dlse is None else dlse.contiguous()
    _delta[(triton.cdiv(rows, R),)](
        out, dout, *dout.stride()[:3], dlse, dot, rows, S, H, D=D, D_PADDED=D_padded, R=R
    )  # fmt: skip
    return dot


def _with_strides(x: Tensor) -> tuple[Tensor, int, int, int]:
    return x, x.stride(0), x.stride(1), x.stride(2)


def _table_strides(cos: Tensor | None, sin: Tensor | None) -> tuple[int, int]:
    return (0, 0) if cos is None or sin is None else (cos.stride(0), sin.stride(0))


def _constants(q: Tensor, cos: Tensor | None, shape: Shape, tile: Tile) -> dict[str, Any]:
    exact = q.dtype != torch.float32 or float32_is_exact()
    return {
        "scale": shape.scale,
        "softcap": shape.softcap,
        "left": max(shape.left, 0),
        "right": max(shape.right, 0),
        "D": q.shape[-1],
        "D_PADDED": max(16, triton.next_power_of_2(q.shape[-1])),
        "ROTARY_DIM": 0 if cos is None else 2 * cos.shape[1],
        "INTERLEAVED": shape.interleaved,
        "HAS_LEFT": shape.left >= 0,
        "HAS_RIGHT": shape.right >= 0,
        "HAS_SOFTCAP": shape.softcap > 0,
        "PRECISION": "ieee" if exact else "tf32",
        "BM": tile.BM,
        "BN": tile.BN,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _with_whole_heads(x: Tensor) -> Tensor:
    """x, or a copy where the elements of a head are not side by side."""
    return x if x.stride(3) == 1 else x.contiguous()


@triton.jit
def _document(cu_ptr, document, S):
    """→ the batch entry, the first row and the number of rows of a sequence."""
    b, first, length = document, 0, S  # one return: behind a second the compiler goes on reading
    if cu_ptr is not None:
        b = 0
        first = tl.load(cu_ptr + document)
        length = tl.load(cu_ptr + document + 1) - first
    return tl.cast(b, tl.int64), tl.cast(first, tl.int64), length


@triton.jit
def _load_heads(ptr, offset_M, there_M, D: tl.constexpr, D_PADDED: tl.constexpr):
    """→ (M, D): heads at the offsets, 0 where none is."""
    column_D = tl.arange(0, D_PADDED)
    where_MD = ptr + offset_M[:, None] + column_D[None, :]
    if D == D_PADDED:
        x_MD = tl.load(where_MD, mask=there_M[:, None], other=0.0)
    else:
        x_MD = tl.load(where_MD, mask=there_M[:, None] & (column_D < D)[None, :], other=0.0)
    return x_MD


@triton.jit
def _load_rotated(
    ptr, offset_M, there_M, position_M, cos_ptr, sin_ptr, cos_stride, sin_stride,
    D: tl.constexpr, D_PADDED: tl.constexpr, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """→ (M, D): `_load_heads`, rotated. Where a head is rotated in part, or D is no power of two, an element's partner
    is fetched a second time: from the cache, where it just came to."""
    x_MD = _load_heads(ptr, offset_M, there_M, D, D_PADDED)
    if ROTARY_DIM == D and D == D_PADDED:
        x_MD = _rotate_tile(
            x_MD.to(tl.float32), there_M, position_M, cos_ptr, sin_ptr, cos_stride, sin_stride, 1.0,
            ptr.dtype.element_ty, INTERLEAVED,
        )  # fmt: skip
    elif ROTARY_DIM > 0:
        column_D = tl.arange(0, D_PADDED)
        if INTERLEAVED:
            first_D = column_D % 2 == 0
            pair_D = column_D // 2
            partner_D = tl.where(first_D, column_D + 1, column_D - 1)
        else:
            first_D = column_D < ROTARY_DIM // 2
            pair_D = tl.where(first_D, column_D, column_D - ROTARY_DIM // 2)
            partner_D = tl.where(first_D, column_D + ROTARY_DIM // 2, column_D - ROTARY_DIM // 2)
        rotates_MD = there_M[:, None] & (column_D < ROTARY_DIM)[None, :]
        y_MD = tl.load(ptr + offset_M[:, None] + partner_D[None, :], mask=rotates_MD, other=0.0).to(tl.float32)
        at_MD = position_M[:, None].to(tl.int64)
        cos_MD = tl.load(cos_ptr + at_MD * cos_stride + pair_D[None, :], mask=rotates_MD, other=1.0).to(tl.float32)
        sin_MD = tl.load(sin_ptr + at_MD * sin_stride + pair_D[None, :], mask=rotates_MD, other=0.0).to(tl.float32)
        y_MD = tl.where(first_D[None, :], -y_MD, y_MD)
        x_MD = (x_MD.to(tl.float32) * cos_MD + y_MD * sin_MD).to(ptr.dtype.element_ty)
    return x_MD


@triton.jit
def _rotate_tile(
    x_MD, there_M, position_M, cos_ptr, sin_ptr, cos_stride, sin_stride, direction,
    dtype: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """→ x (M, D) float32, all of it rotated by its rows' angles times `direction`, 1 or −1, in `dtype`."""
    BM: tl.constexpr = x_MD.shape[0]
    P: tl.constexpr = x_MD.shape[1] // 2
    pair_P = tl.arange(0, P)
    at_MP = position_M[:, None].to(tl.int64)
    cos_MP = tl.load(cos_ptr + at_MP * cos_stride + pair_P[None, :], mask=there_M[:, None], other=1.0).to(tl.float32)
    sin_MP = tl.load(sin_ptr + at_MP * sin_stride + pair_P[None, :], mask=there_M[:, None], other=0.0).to(tl.float32)
    sin_MP *= direction
    if INTERLEAVED:
        first_MP, second_MP = tl.split(tl.reshape(x_MD, (BM, P, 2)))
    else:
        first_MP, second_MP = tl.split(tl.permute(tl.reshape(x_MD, (BM, 2, P)), (0, 2, 1)))
    rotated_MP = first_MP * cos_MP - second_MP * sin_MP
    x_MP2 = tl.join(rotated_MP.to(dtype), (second_MP * cos_MP + first_MP * sin_MP).to(dtype))
    if INTERLEAVED:
        x_MD = tl.reshape(x_MP2, (BM, 2 * P))
    else:
        x_MD = tl.reshape(tl.permute(x_MP2, (0, 2, 1)), (BM, 2 * P))
    return x_MD


@triton.jit
def _store_unrotated(
    ptr, offset_M, there_M, x_MD, position_M, cos_ptr, sin_ptr, cos_stride, sin_stride,
    D: tl.constexpr, D_PADDED: tl.constexpr, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Stores x (M, D) float32, rotated by the negative angles if ROTARY_DIM, which is then all of D."""
    if ROTARY_DIM > 0:
        dtype: tl.constexpr = ptr.dtype.element_ty
        x_MD = _rotate_tile(
            x_MD, there_M, position_M, cos_ptr, sin_ptr, cos_stride, sin_stride, -1.0, dtype, INTERLEAVED
        )
    column_D = tl.arange(0, D_PADDED)
    mask_MD = there_M[:, None] & (column_D < D)[None, :]
    tl.store(ptr + offset_M[:, None] + column_D[None, :], x_MD.to(ptr.dtype.element_ty), mask=mask_MD)


@triton.jit
def _scores(product, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """→ scores before their unit, and the slope of those with it along scale · product."""
    if HAS_SOFTCAP:
        s = 1.0 - 2.0 / (tl.exp2(product * (scale / softcap * (2.0 * LOG2E))) + 1.0)  # tanh
        slope = 1.0 - s * s
    else:
        s, slope = product, 1.0
    return s, slope


@triton.jit
def _unit(scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """→ what makes scores those of powers of 2, above 0. It is left to the exponential, which multiplies by it in the
    instruction that subtracts."""
    return (softcap if HAS_SOFTCAP else scale) * LOG2E


@triton.jit
def _range(place_A, length, shift, others, below, above, HAS_BELOW: tl.constexpr, HAS_ABOVE: tl.constexpr):
    """→ the first and the end of the others that each row meets, when row i meets i + shift - below … i + shift +
    above of them, and rows behind the last none: two comparisons an element at most."""
    start_A = place_A + (shift - below) if HAS_BELOW else place_A * 0
    end_A = tl.minimum(place_A + (shift + above + 1), others) if HAS_ABOVE else place_A * 0 + others
    return start_A, tl.where(place_A < length, end_A, 0)


@triton.jit
def _seen(start_A, end_A, others_B, HAS_BELOW: tl.constexpr):
    """→ (A, B): which of the others the rows of such ranges meet."""
    seen_AB = others_B[None, :] < end_A[:, None]
    if HAS_BELOW:
        seen_AB = seen_AB & (others_B[None, :] >= start_A[:, None])
    return seen_AB


@triton.jit
def _spans(
    first, last, shift, len_other, below, above, HAS_BELOW: tl.constexpr, HAS_ABOVE: tl.constexpr, STEP: tl.constexpr
):
    """Which tiles, of STEP, a tile first … last meets, when i meets i + shift - below … i + shift + above.

    → start, start and end of those that all of it meets, end: before and behind those a mask is needed.
    """
    start = tl.maximum(first + shift - below, 0) if HAS_BELOW else 0
    end = tl.minimum(last + shift + above + 1, len_other) if HAS_ABOVE else len_other
    whole_start = tl.maximum(last + shift - below, 0) if HAS_BELOW else 0
    whole_end = tl.maximum(tl.minimum(first + shift + above + 1, len_other), 0) if HAS_ABOVE else len_other
    start = start // STEP * STEP
    end = tl.maximum(end, start)
    whole_start = tl.minimum(tl.cdiv(whole_start, STEP) * STEP, tl.cdiv(end, STEP) * STEP)
    whole_end = tl.maximum(whole_end // STEP * STEP, whole_start)
    return start, whole_start, whole_end, end


@triton.jit
def _attend(
    q_MD, k, k_stride_s, v, v_stride_s, start, whole_start, whole_end, end, start_M, end_M,
    row_max_M, row_sum_M, out_MD, len_k, scale, softcap, D: tl.constexpr, D_PADDED: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The softmax goes on over the keys start … end-1 → largest score, sum and output so far."""
    unit = _unit(scale, softcap, HAS_SOFTCAP)
    for n in range(start, end, BN):
        n_N = n + tl.arange(0, BN)
        there_N = n_N < len_k
        k_ND = _load_heads(k, n_N.to(tl.int64) * k_stride_s, there_N, D, D_PADDED)
        s_MN = tile_dot(q_MD, tl.trans(k_ND), None, PRECISION)
        s_MN, _ = _scores(s_MN, scale, softcap, HAS_SOFTCAP)
        if (n < whole_start) | (n + BN > whole_end):
            s_MN = tl.where(_seen(start_M, end_M, n_N, HAS_LEFT), s_MN, float("-inf"))
        new_max_M = tl.maximum(row_max_M, tl.max(s_MN, axis=1))
        base_M = tl.where(new_max_M == float("-inf"), 0.0, new_max_M * unit)  # nothing seen yet
        p_MN = tl.exp2(s_MN * unit - base_M[:, None])
        rescale_M = tl.exp2(row_max_M * unit - base_M)
        row_sum_M = row_sum_M * rescale_M + tl.sum(p_MN, axis=1)
        v_ND = _load_heads(v, n_N.to(tl.int64) * v_stride_s, there_N, D, D_PADDED)
        out_MD = tile_dot(p_MN.to(v_ND.dtype), v_ND, out_MD * rescale_M[:, None], PRECISION)
        row_max_M = new_max_M
    return row_max_M, row_sum_M, out_MD


@triton.jit
def _forward(
    q, q_stride_b, q_stride_s, q_stride_h, k, k_stride_b, k_stride_s, k_stride_h, v, v_stride_b, v_stride_s, v_stride_h,
    cos_ptr, sin_ptr, cos_stride, sin_stride, position_ptr, position_stride_b, cu_q_ptr, cu_k_ptr,
    out_ptr, lse_ptr, rotated_q_ptr, rotated_stride_b, rotated_stride_s,
    blocks, S_q, S_k, H, GROUP, scale, softcap, left, right,
    D: tl.constexpr, D_PADDED: tl.constexpr, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    block = blocks - 1 - tl.program_id(0) % blocks  # with a causal mask the last ones take longest
    h, document = tl.program_id(0) // blocks % H, tl.program_id(0) // blocks // H
    b, first_q, len_q = _document(cu_q_ptr, document, S_q)
    _, first_k, len_k = _document(cu_k_ptr, document, S_k)
    if block * BM < len_q:
        m_M = block * BM + tl.arange(0, BM)
        there_M = m_M < len_q
        row_M = first_q + m_M
        position_M = m_M
        if position_ptr is not None:
            position_M = tl.load(position_ptr + b * position_stride_b + row_M, mask=there_M, other=0)
        offset_M = b * q_stride_b + row_M * q_stride_s + h.to(tl.int64) * q_stride_h
        q_MD = _load_rotated(
            q,
            offset_M,
            there_M,
            position_M,
            cos_ptr,
            sin_ptr,
            cos_stride,
            sin_stride,
            D,
            D_PADDED,
            ROTARY_DIM,
            INTERLEAVED,
        )
        column_D = tl.arange(0, D_PADDED)
        if rotated_q_ptr is not None:
            to_M = b * rotated_stride_b + row_M * rotated_stride_s + h.to(tl.int64) * D
            mask_MD = there_M[:, None] & (column_D < D)[None, :]
            tl.store(rotated_q_ptr + to_M[:, None] + column_D[None, :], q_MD, mask=mask_MD)
            if D_PADDED == 64:
                # Computed operands of this width go through registers, and wgmma then waits for each other; fetched
                # ones do not.
                tl.debug_barrier()
                q_MD = _load_heads(rotated_q_ptr, to_M, there_M, D, D_PADDED)
        k += b * k_stride_b + first_k * k_stride_s + (h // GROUP).to(tl.int64) * k_stride_h
        v += b * v_stride_b + first_k * v_stride_s + (h // GROUP).to(tl.int64) * v_stride_h
        last = tl.minimum(block * BM + BM, len_q) - 1
        start, whole_start, whole_end, end = _spans(
            block * BM, last, len_k - len_q, len_k, left, right, HAS_LEFT, HAS_RIGHT, BN
        )
        start_M, end_M = _range(m_M, len_q, len_k - len_q, len_k, left, right, HAS_LEFT, HAS_RIGHT)
        row_max_M = tl.full([BM], float("-inf"), tl.float32)
        row_sum_M = tl.zeros([BM], tl.float32)
        out_MD = tl.zeros([BM, D_PADDED], tl.float32)
        row_max_M, row_sum_M, out_MD = _attend(
            q_MD, k, k_stride_s, v, v_stride_s, start, whole_start, whole_end, end, start_M, end_M,
            row_max_M, row_sum_M, out_MD, len_k, scale, softcap, D, D_PADDED, HAS_LEFT, HAS_SOFTCAP, PRECISION, BN,
        )  # fmt: skip
        empty_M = row_max_M == float("-inf")
        out_MD = out_MD * (1.0 / tl.where(empty_M, 1.0, row_sum_M))[:, None]
        to_M = ((b * S_q + row_M) * H + h) * D
        mask_MD = there_M[:, None] & (column_D < D)[None, :]
        tl.store(out_ptr + to_M[:, None] + column_D[None, :], out_MD.to(out_ptr.dtype.element_ty), mask=mask_MD)
        lse_M = tl.where(
            empty_M, float("-inf"), (row_max_M * _unit(scale, softcap, HAS_SOFTCAP) + tl.log2(row_sum_M)) / LOG2E
        )
        tl.store(lse_ptr + (b * H + h) * S_q + row_M, lse_M, mask=there_M)


@triton.jit
def _delta(
    out_ptr, dout_ptr, dout_stride_b, dout_stride_s, dout_stride_h, dlse_ptr, delta_ptr, rows, S, H,
    D: tl.constexpr, D_PADDED: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    row_R = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    there_R = row_R < rows
    token_R, h_R = row_R // H, row_R % H
    b_R, s_R = token_R // S, token_R % S
    out_RD = _load_heads(out_ptr, row_R * D, there_R, D, D_PADDED).to(tl.float32)
    offset_R = b_R * dout_stride_b + s_R * dout_stride_s + h_R * dout_stride_h
    dout_RD = _load_heads(dout_ptr, offset_R, there_R, D, D_PADDED).to(tl.float32)
    delta_R = tl.sum(out_RD * dout_RD, axis=1)
    at_R = (b_R * H + h_R) * S + s_R
    if dlse_ptr is not None:  # of the softmax's own log-sum: p grows with it
        delta_R -= tl.load(dlse_ptr + at_R, mask=there_R, other=0.0)
    tl.store(delta_ptr + at_R, delta_R, mask=there_R)


@triton.jit
def _dkdv_span(
    k_ND, v_ND, q, q_stride_s, dout, dout_stride_s, lse_ptr, delta_ptr, start, whole_start, whole_end, end,
    start_N, end_N, dk_ND, dv_ND, len_q, scale, softcap, D: tl.constexpr, D_PADDED: tl.constexpr,
    HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Adds what the queries start … end-1 send to a tile of keys. Scores are computed keys by queries."""
    unit = _unit(scale, softcap, HAS_SOFTCAP)
    for m in range(start, end, BM):
        m_M = m + tl.arange(0, BM)
        there_M = m_M < len_q
        q_MD = _load_heads(q, m_M.to(tl.int64) * q_stride_s, there_M, D, D_PADDED)
        s_NM = tile_dot(k_ND, tl.trans(q_MD), None, PRECISION)
        s_NM, slope = _scores(s_NM, scale, softcap, HAS_SOFTCAP)
        lse_M = tl.load(lse_ptr + m_M, mask=there_M, other=0.0) * LOG2E
        p_NM = tl.exp2(s_NM * unit - lse_M[None, :])
        if (m < whole_start) | (m + BM > whole_end):
            p_NM = tl.where(_seen(start_N, end_N, m_M, HAS_RIGHT), p_NM, 0.0)
        dout_MD = _load_heads(dout, m_M.to(tl.int64) * dout_stride_s, there_M, D, D_PADDED)
        dv_ND = tile_dot(p_NM.to(dout_MD.dtype), dout_MD, dv_ND, PRECISION)
        dp_NM = tile_dot(v_ND, tl.trans(dout_MD), None, PRECISION)
        delta_M = tl.load(delta_ptr + m_M, mask=there_M, other=0.0)
        ds_NM = p_NM * (dp_NM - delta_M[None, :]) * slope
        dk_ND = tile_dot(ds_NM.to(q_MD.dtype), q_MD, dk_ND, PRECISION)
    return dk_ND, dv_ND


@triton.jit
def _dkdv(
    q, q_stride_b, q_stride_s, q_stride_h, k, k_stride_b, k_stride_s, k_stride_h, v, v_stride_b, v_stride_s, v_stride_h,
    dout, dout_stride_b, dout_stride_s, dout_stride_h, lse_ptr, delta_ptr,
    cos_ptr, sin_ptr, cos_stride, sin_stride, position_ptr, position_stride_b, cu_q_ptr, cu_k_ptr,
    dk_ptr, dv_ptr, blocks, S_q, S_k, H, GROUP, scale, softcap, left, right,
    D: tl.constexpr, D_PADDED: tl.constexpr, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    H_kv = H // GROUP
    block = tl.program_id(0) % blocks  # with a causal mask the first ones take longest
    h, document = tl.program_id(0) // blocks % H_kv, tl.program_id(0) // blocks // H_kv
    b, first_q, len_q = _document(cu_q_ptr, document, S_q)
    _, first_k, len_k = _document(cu_k_ptr, document, S_k)
    if block * BN < len_k:
        n_N = block * BN + tl.arange(0, BN)
        there_N = n_N < len_k
        row_N = first_k + n_N
        h_k = h.to(tl.int64)
        k_ND = _load_heads(k, b * k_stride_b + row_N * k_stride_s + h_k * k_stride_h, there_N, D, D_PADDED)
        v_ND = _load_heads(v, b * v_stride_b + row_N * v_stride_s + h_k * v_stride_h, there_N, D, D_PADDED)
        last = tl.minimum(block * BN + BN, len_k) - 1
        start, whole_start, whole_end, end = _spans(
            block * BN, last, len_q - len_k, len_q, right, left, HAS_RIGHT, HAS_LEFT, BM
        )
        if (block + 1) * BN > len_k:
            whole_end = whole_start  # the keys that are not there must be masked
        start_N, end_N = _range(n_N, len_k, len_q - len_k, len_q, right, left, HAS_RIGHT, HAS_LEFT)
        dk_ND = tl.zeros([BN, D_PADDED], tl.float32)
        dv_ND = tl.zeros([BN, D_PADDED], tl.float32)
        for member in range(GROUP):
            h_q = h_k * GROUP + member
            q_h = q + b * q_stride_b + first_q * q_stride_s + h_q * q_stride_h
            dout_h = dout + b * dout_stride_b + first_q * dout_stride_s + h_q * dout_stride_h
            rows = (b * H + h_q) * S_q + first_q
            dk_ND, dv_ND = _dkdv_span(
                k_ND, v_ND, q_h, q_stride_s, dout_h, dout_stride_s, lse_ptr + rows, delta_ptr + rows,
                start, whole_start, whole_end, end, start_N, end_N, dk_ND, dv_ND, len_q, scale, softcap,
                D, D_PADDED, HAS_RIGHT, HAS_SOFTCAP, PRECISION, BM,
            )  # fmt: skip
        position_N = n_N
        if position_ptr is not None:
            position_N = tl.load(position_ptr + b * position_stride_b + row_N, mask=there_N, other=0)
        to_N = ((b * S_k + row_N) * H_kv + h) * D
        _store_unrotated(
            dv_ptr, to_N, there_N, dv_ND, position_N, cos_ptr, sin_ptr, cos_stride, sin_stride, D, D_PADDED, 0, False
        )
        _store_unrotated(
            dk_ptr, to_N, there_N, dk_ND * scale, position_N, cos_ptr, sin_ptr, cos_stride, sin_stride,
            D, D_PADDED, ROTARY_DIM, INTERLEAVED,
        )  # fmt: skip


@triton.jit
def _dq_span(
    q_MD, dout_MD, lse_M, delta_M, k, k_stride_s, v, v_stride_s, start, whole_start, whole_end, end, start_M, end_M,
    dq_MD, len_k, scale, softcap, D: tl.constexpr, D_PADDED: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Adds what the keys start … end-1 send to a tile of queries."""
    unit = _unit(scale, softcap, HAS_SOFTCAP)
    for n in range(start, end, BN):
        n_N = n + tl.arange(0, BN)
        there_N = n_N < len_k
        k_ND = _load_heads(k, n_N.to(tl.int64) * k_stride_s, there_N, D, D_PADDED)
        s_MN = tile_dot(q_MD, tl.trans(k_ND), None, PRECISION)
        s_MN, slope = _scores(s_MN, scale, softcap, HAS_SOFTCAP)
        p_MN = tl.exp2(s_MN * unit - lse_M[:, None])
        if (n < whole_start) | (n + BN > whole_end):
            p_MN = tl.where(_seen(start_M, end_M, n_N, HAS_LEFT), p_MN, 0.0)
        v_ND = _load_heads(v, n_N.to(tl.int64) * v_stride_s, there_N, D, D_PADDED)
        dp_MN = tile_dot(dout_MD, tl.trans(v_ND), None, PRECISION)
        ds_MN = p_MN * (dp_MN - delta_M[:, None]) * slope
        dq_MD = tile_dot(ds_MN.to(k_ND.dtype), k_ND, dq_MD, PRECISION)
    return dq_MD


@triton.jit
def _dq(
    q, q_stride_b, q_stride_s, q_stride_h, k, k_stride_b, k_stride_s, k_stride_h, v, v_stride_b, v_stride_s, v_stride_h,
    dout, dout_stride_b, dout_stride_s, dout_stride_h, lse_ptr, delta_ptr,
    cos_ptr, sin_ptr, cos_stride, sin_stride, position_ptr, position_stride_b, cu_q_ptr, cu_k_ptr,
    dq_ptr, blocks, S_q, S_k, H, GROUP, scale, softcap, left, right,
    D: tl.constexpr, D_PADDED: tl.constexpr, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    block = blocks - 1 - tl.program_id(0) % blocks
    h, document = tl.program_id(0) // blocks % H, tl.program_id(0) // blocks // H
    b, first_q, len_q = _document(cu_q_ptr, document, S_q)
    _, first_k, len_k = _document(cu_k_ptr, document, S_k)
    if block * BM < len_q:
        m_M = block * BM + tl.arange(0, BM)
        there_M = m_M < len_q
        row_M = first_q + m_M
        h_q = h.to(tl.int64)
        q_MD = _load_heads(q, b * q_stride_b + row_M * q_stride_s + h_q * q_stride_h, there_M, D, D_PADDED)
        offset_M = b * dout_stride_b + row_M * dout_stride_s + h_q * dout_stride_h
        dout_MD = _load_heads(dout, offset_M, there_M, D, D_PADDED)
        at_M = (b * H + h) * S_q + row_M
        lse_M = tl.load(lse_ptr + at_M, mask=there_M, other=0.0) * LOG2E
        delta_M = tl.load(delta_ptr + at_M, mask=there_M, other=0.0)
        k += b * k_stride_b + first_k * k_stride_s + (h_q // GROUP) * k_stride_h
        v += b * v_stride_b + first_k * v_stride_s + (h_q // GROUP) * v_stride_h
        last = tl.minimum(block * BM + BM, len_q) - 1
        start, whole_start, whole_end, end = _spans(
            block * BM, last, len_k - len_q, len_k, left, right, HAS_LEFT, HAS_RIGHT, BN
        )
        start_M, end_M = _range(m_M, len_q, len_k - len_q, len_k, left, right, HAS_LEFT, HAS_RIGHT)
        dq_MD = tl.zeros([BM, D_PADDED], tl.float32)
        dq_MD = _dq_span(
            q_MD, dout_MD, lse_M, delta_M, k, k_stride_s, v, v_stride_s, start, whole_start, whole_end, end,
            start_M, end_M, dq_MD, len_k, scale, softcap, D, D_PADDED, HAS_LEFT, HAS_SOFTCAP, PRECISION, BN,
        )  # fmt: skip
        position_M = m_M
        if position_ptr is not None:
            position_M = tl.load(position_ptr + b * position_stride_b + row_M, mask=there_M, other=0)
        _store_unrotated(
            dq_ptr, ((b * S_q + row_M) * H + h_q) * D, there_M, dq_MD * scale, position_M,
            cos_ptr, sin_ptr, cos_stride, sin_stride, D, D_PADDED, ROTARY_DIM, INTERLEAVED,
        )  # fmt: skip
