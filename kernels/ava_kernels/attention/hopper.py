"""Attention for Hopper in Gluon, forward and backward, by warps that specialise.

    (rotary) _rotate   forward   keys, once
    _hopper_forward    forward   turns its queries as it fetches them, keeps them turned for backward; out and lse
    (kernels) _dots    backward  ⟨out, dout⟩ of every query
    _hopper_keys       backward  dk and dv of 128 keys, dk turned back before it is stored
    _hopper_queries    backward  dq of 128 queries, turned back likewise

In each, one warp fetches tiles by TMA into a ring of stages, and two groups of four warps compute with 64 rows each. In
the forward pass a group issues the product with the next keys before it waits for that with the last values, so that
its softmax runs while tensor cores work; a token that goes to and fro lets one group issue while the other is at its
softmax (the schedule of Shah et al., 2024, "FlashAttention-3"). The weights of the softmax stay in registers. Sums are
in a fixed order, so the same input gives the same bits.

The formulas of `kernels.py`, with tiles of other sizes, so not the same bits as there. It is for what pretraining
mostly asks for: heads of 64 or 128, 16 bits, sequences that are not packed, with any mask, cap and rotation.

Not run on a GPU yet, so taken only where `backend="hopper"` asks for it. What is known of it: it compiles for sm_90
without spills (`python -m bench.sm90`), and its tests run every warp of it on a CPU, against the definition.

Shape suffixes: M queries and N keys of a tile, A and B the rows and columns of a tile of scores, which is either of
them, D elements of a head, P pairs of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ava_kernels.rotary import kernels as rotary

if TYPE_CHECKING:
    from ava_kernels.attention.kernels import Shape

LOG2E: gl.constexpr = gl.constexpr(1.4426950408889634)
GROUP: gl.constexpr = gl.constexpr(64)  # rows of a group of warps: what one wgmma has
# By elements of a head: keys of a tile and stages of the forward pass; queries and stages of `_hopper_keys`, keys and
# stages of `_hopper_queries`. As large as they can be without a spill; not measured on a GPU yet.
FORWARD = {64: (128, 3), 128: (128, 2)}
CAPPED = {64: (128, 3), 128: (64, 4)}  # with softcap, which takes registers
KEYS = {64: (64, 3), 128: (32, 3)}
QUERIES = {64: (64, 3), 128: (64, 3)}
fetch = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its name in triton 3.8, and before


def takes(q: Tensor) -> bool:
    """Whether such queries can be taken."""
    return q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] in FORWARD


def runs_on(q: Tensor) -> bool:
    return q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    position: Tensor | None,
    shape: Shape,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`kernels.forward`, for what `takes` lets through, without documents."""
    (B, S_q, H_q, D), S_k, H_kv = q.shape, k.shape[1], k.shape[2]
    out = q.new_empty(q.shape)
    lse = q.new_empty((B, H_q, S_q), dtype=torch.float32)
    turned_k = k.new_empty(0 if cos is None else k.shape)
    if cos is not None and sin is not None:
        cos, sin = (t if t.stride(1) == 1 else t.contiguous() for t in (cos, sin))
        rotary.rotate(k, cos, sin, position, shape.interleaved, False, turned_k)
        k = turned_k
    turned_q = q.new_empty(q.shape if keep and cos is not None else 0)
    q = q if q.stride(3) == 1 else q.contiguous()
    BN, stages = (CAPPED if shape.softcap else FORWARD)[D]
    blocks = triton.cdiv(S_q, 2 * GROUP.value)
    if not (blocks and B and S_k):
        return out.zero_(), lse.fill_(float("-inf")), turned_q, turned_k
    _hopper_forward[(blocks * B * H_q,)](
        q,
        *q.stride()[:3],
        _heads(k, BN),
        _heads(v, BN),
        *_table(cos, sin, position),
        out,
        lse,
        turned_q if turned_q.numel() else None,
        S_q * H_q * D,
        H_q * D,
        blocks,
        S_q,
        S_k,
        H_q,
        H_q // H_kv,
        *_numbers(shape),
        **_constants(shape, D, cos),
        BN=BN,
        STAGES=stages,
    )
    return out, lse, turned_q, turned_k


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
    shape: Shape,
) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels.backward`, for what `takes` lets through, without documents."""
    from ava_kernels.attention import hopper_backward, kernels

    (B, S_q, H_q, D), S_k, H_kv = q.shape, k.shape[1], k.shape[2]
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    if not (dq.numel() and dk.numel()):
        return dq.zero_(), dk.zero_(), dv.zero_()
    dots = kernels.dots(out, dout, dlse)
    fused = cos is not None and 2 * cos.shape[1] == D
    table = (cos, sin, position) if fused else (None, None, None)
    (BM, key_stages), (BN, query_stages) = KEYS[D], QUERIES[D]
    arguments = lse, dots, *_table(*table)
    numbers = H_q // H_kv, *_numbers(shape)
    constants = _constants(shape, D, table[0])
    own = GROUP.value
    blocks = triton.cdiv(S_k, 2 * own)
    hopper_backward._hopper_keys[(blocks * B * H_kv,)](
        *(_heads(k, own), _heads(v, own), _heads(q, BM), _heads(dout, BM)),
        *(*arguments, dk, dv, blocks, S_q, S_k, H_kv, *numbers),
        **constants,
        BM=BM,
        STAGES=key_stages,
    )
    blocks = triton.cdiv(S_q, 2 * own)
    hopper_backward._hopper_queries[(blocks * B * H_q,)](
        *(_heads(q, own), _heads(dout, own), _heads(k, BN), _heads(v, BN)),
        *(*arguments, dq, blocks, S_q, S_k, H_q, *numbers),
        **constants,
        BN=BN,
        STAGES=query_stages,
    )
    if cos is not None and sin is not None and not fused:
        for gradient in (dq, dk):
            rotary.rotate(gradient, cos, sin, position, shape.interleaved, True, gradient)
    return dq, dk, dv


def _heads(x: Tensor, rows: int) -> TensorDescriptor:
    """(B, S, H, D) as tiles of so many rows of one head; rows behind the end of a sequence are 0."""
    strides = [stride * x.element_size() for stride in x.stride()[:3]]
    if x.stride(3) != 1 or x.data_ptr() % 16 or any(stride % 16 or stride == 0 for stride in strides):
        x = x.contiguous()  # what TMA cannot fetch
    tile = [1, rows, 1, x.shape[3]]
    layout = gl.NVMMASharedLayout.get_default_for(tile, gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), tile, layout)


def _table(cos: Tensor | None, sin: Tensor | None, position: Tensor | None) -> tuple[Any, ...]:
    strides = (0, 0) if cos is None or sin is None else (cos.stride(0), sin.stride(0))
    return cos, sin, *strides, position, 0 if position is None else position.stride(0)


def _numbers(shape: Shape) -> tuple[Any, ...]:
    return shape.scale, shape.softcap, max(shape.left, 0), max(shape.right, 0)


def _constants(shape: Shape, D: int, cos: Tensor | None) -> dict[str, Any]:
    return {
        "D": D,
        "TURNED": 0 if cos is None else 2 * cos.shape[1],
        "INTERLEAVED": shape.interleaved,
        "HAS_LEFT": shape.left >= 0,
        "HAS_RIGHT": shape.right >= 0,
        "HAS_SOFTCAP": shape.softcap > 0,
        "num_warps": 4,
        "maxnreg": 168,  # of all warps together, before they are shared out
    }


@gluon.jit
def _span(
    first, length, shift, others, below, above, HAS_BELOW: gl.constexpr, HAS_ABOVE: gl.constexpr, STEP: gl.constexpr
):
    """What the 128 rows from `first` on, of `length`, meet, when row i meets i + shift - below … i + shift + above of
    the others → the first tile's first, how many tiles of STEP; the first that all rows meet, and the first behind it
    that not all meet."""
    last = gl.minimum(first + 2 * GROUP, length) - 1
    start, end = 0, others
    whole_start, whole_end = 0, others
    if HAS_BELOW:
        start = gl.maximum(first + shift - below, 0) // STEP * STEP
        whole_start = gl.maximum(last + shift - below, 0)
    if HAS_ABOVE:
        end = gl.minimum(last + shift + above + 1, others)
        whole_end = gl.minimum(first + shift + above + 1, others)
    return start, gl.cdiv(gl.maximum(end - start, 0), STEP), whole_start, whole_end


@gluon.jit
def _fetch(
    k, v, k_smem, v_smem, k_full, k_empty, v_full, v_empty, b, h, start, tiles, BN: gl.constexpr, STAGES: gl.constexpr
):
    """What the fetching warp does."""
    for tile in range(tiles):
        stage, phase = tile % STAGES, tile // STAGES & 1
        mbarrier.wait(k_empty.index(stage), phase ^ 1)
        mbarrier.expect(k_full.index(stage), k.block_type.nbytes)
        fetch(k, [b, start + tile * BN, h, 0], k_full.index(stage), k_smem.index(stage))
        mbarrier.wait(v_empty.index(stage), phase ^ 1)
        mbarrier.expect(v_full.index(stage), v.block_type.nbytes)
        fetch(v, [b, start + tile * BN, h, 0], v_full.index(stage), v_smem.index(stage))


@gluon.jit
def _turned(
    q, offset_M, there_M, position_M, cos, sin, cos_stride, sin_stride,
    D: gl.constexpr, TURNED: gl.constexpr, INTERLEAVED: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """→ (M, D) heads at the offsets, turned; 0 where none is. An element's partner is fetched a second time, from the
    cache."""
    column_D = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    x_MD = gl.load(q + offset_M[:, None] + column_D[None, :], mask=there_M[:, None], other=0.0)
    if TURNED > 0:
        if INTERLEAVED:
            first_D = column_D % 2 == 0
            pair_D = column_D // 2
            partner_D = gl.where(first_D, column_D + 1, column_D - 1)
        else:
            first_D = column_D < TURNED // 2
            pair_D = gl.where(first_D, column_D, column_D - TURNED // 2)
            partner_D = gl.where(first_D, column_D + TURNED // 2, column_D - TURNED // 2)
        turns_MD = there_M[:, None] & (column_D < TURNED)[None, :]
        y_MD = gl.load(q + offset_M[:, None] + partner_D[None, :], mask=turns_MD, other=0.0).to(gl.float32)
        at_M = position_M.to(gl.int64)
        cos_MD = gl.load(cos + (at_M * cos_stride)[:, None] + pair_D[None, :], mask=turns_MD, other=1.0)
        sin_MD = gl.load(sin + (at_M * sin_stride)[:, None] + pair_D[None, :], mask=turns_MD, other=0.0)
        y_MD = gl.where(first_D[None, :], -y_MD, y_MD)
        turned_MD = x_MD.to(gl.float32) * cos_MD.to(gl.float32) + y_MD * sin_MD.to(gl.float32)
        x_MD = turned_MD.to(x_MD.dtype)
    return x_MD


@gluon.jit
def _scores(product, scale, softcap, HAS_SOFTCAP: gl.constexpr):
    """→ scores in units of log 2, and their slope along scale · product."""
    if HAS_SOFTCAP:
        tanh = 1.0 - 2.0 / (gl.exp(2.0 * (product * scale / softcap)) + 1.0)
        scores, slope = tanh * (softcap * LOG2E), 1.0 - tanh * tanh
    else:
        scores, slope = product * (scale * LOG2E), 1.0
    return scores, slope


@gluon.jit
def _seen(m, n, S_q, S_k, left, right, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr):
    """→ (A, B): which keys n a query m sees; one of them is (A, 1), the other (1, B)."""
    seen = (m < S_q) & (n < S_k)
    if HAS_LEFT:
        seen = seen & (n >= m + (S_k - S_q - left))
    if HAS_RIGHT:
        seen = seen & (n <= m + (S_k - S_q + right))
    return seen


@gluon.jit
def _weights(
    product_MN, most_M, total_M, m_M, n_N, masked, S_q, S_k, scale, softcap, left, right,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
):  # fmt: skip
    """→ the tile's weights p, the largest score and the sum so far, and by what earlier sums shrink."""
    s_MN, _ = _scores(product_MN, scale, softcap, HAS_SOFTCAP)
    if masked:
        seen_MN = _seen(m_M[:, None], n_N[None, :], S_q, S_k, left, right, HAS_LEFT, HAS_RIGHT)
        s_MN = gl.where(seen_MN, s_MN, float("-inf"))
    more_M = gl.maximum(most_M, gl.max(s_MN, 1))
    base_M = gl.where(more_M == float("-inf"), 0.0, more_M)  # nothing seen yet
    p_MN = gl.exp2(s_MN - base_M[:, None])
    shrink_M = gl.exp2(most_M - base_M)
    return p_MN, more_M, total_M * shrink_M + gl.sum(p_MN, 1), shrink_M


@gluon.jit
def _attend(
    shared, D: gl.constexpr, TURNED: gl.constexpr, INTERLEAVED: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr, NUMBER: gl.constexpr,
):  # fmt: skip
    """What group 0 or 1 does: 64 queries from beginning to end."""
    (
        q, q_stride_b, q_stride_s, q_stride_h, cos, sin, cos_stride, sin_stride, position, position_stride_b,
        out, lse, turned_q, turned_stride_b, turned_stride_s,
        q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, turns,
        block, b, h, start, tiles, whole_start, whole_end, S_q, S_k, H, scale, softcap, left, right,
    ) = shared  # fmt: skip
    dtype: gl.constexpr = q.dtype.element_ty
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    heads: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    weights: gl.constexpr = gl.DotOperandLayout(0, heads, 2)
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    first = block * (2 * GROUP) + NUMBER * GROUP
    queries_M = first + gl.arange(0, GROUP, layout=gl.SliceLayout(1, rows))
    there_M = queries_M < S_q
    b_64, h_64 = b.to(gl.int64), h.to(gl.int64)
    position_M = queries_M
    if position is not None:
        position_M = gl.load(position + b_64 * position_stride_b + queries_M, mask=there_M, other=0)
    offset_M = b_64 * q_stride_b + h_64 * q_stride_h + queries_M.to(gl.int64) * q_stride_s
    q_MD = _turned(
        q, offset_M, there_M, position_M, cos, sin, cos_stride, sin_stride, D, TURNED, INTERLEAVED, rows
    )  # fmt: skip
    column_D = gl.arange(0, D, layout=gl.SliceLayout(0, rows))
    if turned_q is not None:
        kept_M = b_64 * turned_stride_b + h_64 * D + queries_M.to(gl.int64) * turned_stride_s
        gl.store(turned_q + kept_M[:, None] + column_D[None, :], q_MD, mask=there_M[:, None])
    q_own = q_smem.index(NUMBER)
    q_own.store(q_MD)
    hopper.fence_async_shared()

    m_M = first + gl.arange(0, GROUP, layout=gl.SliceLayout(1, scores))
    tile_N = gl.arange(0, BN, layout=gl.SliceLayout(0, scores))
    most_M = gl.full([GROUP], float("-inf"), gl.float32, gl.SliceLayout(1, scores))
    total_M = gl.full([GROUP], 0.0, gl.float32, gl.SliceLayout(1, scores))
    out_MD = gl.zeros([GROUP, D], gl.float32, heads)
    zero_MN = gl.zeros([GROUP, BN], gl.float32, scores)
    if tiles > 0:
        mbarrier.wait(k_full.index(0), 0)
        issued = hopper.warpgroup_mma(
            q_own, k_smem.index(0).reshape([BN, D]).permute((1, 0)), zero_MN, use_acc=False, is_async=True
        )
        product_MN = hopper.warpgroup_mma_wait(0, deps=(issued,))
        mbarrier.arrive(k_empty.index(0))
        masked = (start < whole_start) | (start + BN > whole_end)
        p_MN, most_M, total_M, shrink_M = _weights(
            product_MN, most_M, total_M, m_M, start + tile_N, masked, S_q, S_k, scale, softcap, left, right,
            HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP,
        )  # fmt: skip
        p_MN = gl.convert_layout(p_MN.to(dtype), weights)
        for tile in range(1, tiles):
            stage, phase = tile % STAGES, tile // STAGES & 1
            last_stage, last_phase = (tile - 1) % STAGES, (tile - 1) // STAGES & 1
            mbarrier.wait(k_full.index(stage), phase)
            mbarrier.wait(turns.index(NUMBER), (tile - 1) & 1)
            issued = hopper.warpgroup_mma(
                q_own, k_smem.index(stage).reshape([BN, D]).permute((1, 0)), zero_MN, use_acc=False, is_async=True
            )
            mbarrier.wait(v_full.index(last_stage), last_phase)
            adding = hopper.warpgroup_mma(p_MN, v_smem.index(last_stage).reshape([BN, D]), out_MD, is_async=True)
            mbarrier.arrive(turns.index(1 - NUMBER))
            product_MN = hopper.warpgroup_mma_wait(1, deps=(issued,))
            mbarrier.arrive(k_empty.index(stage))
            n = start + tile * BN
            masked = (n < whole_start) | (n + BN > whole_end)
            p_MN, most_M, total_M, shrink_M = _weights(
                product_MN, most_M, total_M, m_M, n + tile_N, masked, S_q, S_k, scale, softcap, left, right,
                HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP,
            )  # fmt: skip
            p_MN = gl.convert_layout(p_MN.to(dtype), weights)
            out_MD = hopper.warpgroup_mma_wait(0, deps=(adding,))
            mbarrier.arrive(v_empty.index(last_stage))
            out_MD = out_MD * gl.convert_layout(shrink_M, gl.SliceLayout(1, heads))[:, None]
        last_stage, last_phase = (tiles - 1) % STAGES, (tiles - 1) // STAGES & 1
        mbarrier.wait(v_full.index(last_stage), last_phase)
        adding = hopper.warpgroup_mma(p_MN, v_smem.index(last_stage).reshape([BN, D]), out_MD, is_async=True)
        out_MD = hopper.warpgroup_mma_wait(0, deps=(adding,))
    empty_M = most_M == float("-inf")
    total_M = gl.where(empty_M, 1.0, total_M)
    out_MD = out_MD / gl.convert_layout(total_M, gl.SliceLayout(1, heads))[:, None]
    q_own.store(out_MD.to(dtype))  # nobody reads the queries any more
    to_M = ((b_64 * S_q + queries_M) * H + h_64) * D
    gl.store(out + to_M[:, None] + column_D[None, :], q_own.load(rows), mask=there_M[:, None])
    lse_M = gl.where(empty_M, float("-inf"), (most_M + gl.log2(total_M)) / LOG2E)
    gl.store(lse + (b_64 * H + h_64) * S_q + m_M, lse_M, mask=m_M < S_q)


@gluon.jit
def _hopper_forward(
    q, q_stride_b, q_stride_s, q_stride_h, k, v, cos, sin, cos_stride, sin_stride, position, position_stride_b,
    out, lse, turned_q, turned_stride_b, turned_stride_s, blocks, S_q, S_k, H, SHARED, scale, softcap, left, right,
    D: gl.constexpr, TURNED: gl.constexpr, INTERLEAVED: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    block = blocks - 1 - gl.program_id(0) % blocks  # with a causal mask the last ones take longest
    h, b = gl.program_id(0) // blocks % H, gl.program_id(0) // blocks // H
    start, tiles, whole_start, whole_end = _span(
        block * (2 * GROUP), S_q, S_k - S_q, S_k, left, right, HAS_LEFT, HAS_RIGHT, BN
    )
    queries: gl.constexpr = gl.NVMMASharedLayout.get_default_for([GROUP, D], q.dtype.element_ty)
    q_smem = gl.allocate_shared_memory(q.dtype.element_ty, [2, GROUP, D], queries)
    k_smem = gl.allocate_shared_memory(k.dtype, [STAGES, 1, BN, 1, D], k.layout)
    v_smem = gl.allocate_shared_memory(v.dtype, [STAGES, 1, BN, 1, D], v.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    for group in gl.static_range(2):
        mbarrier.init(turns.index(group), count=1)
    mbarrier.arrive(turns.index(0))
    shared = (
        q, q_stride_b, q_stride_s, q_stride_h, cos, sin, cos_stride, sin_stride, position, position_stride_b,
        out, lse, turned_q, turned_stride_b, turned_stride_s,
        q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, turns,
        block, b, h, start, tiles, whole_start, whole_end, S_q, S_k, H, scale, softcap, left, right,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_attend, (shared, D, TURNED, INTERLEAVED, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, BN, STAGES, 0)),
            (_attend, (shared, D, TURNED, INTERLEAVED, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, BN, STAGES, 1)),
            (
                _fetch,
                (k, v, k_smem, v_smem, k_full, k_empty, v_full, v_empty, b, h // SHARED, start, tiles, BN, STAGES),
            ),
        ],
        [4, 1],
        [240, 24],
    )
