"""Attention's forward pass for Hopper: the kernel that `hopper.forward` launches, and what backward shares; see there.

Shape suffixes: M queries and N keys of a tile, A and B the rows and columns of a tile of scores, which is either of
them, D elements of a head, padded to a power of two, P pairs of them.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ava_kernels.hopper import GROUP, clear_behind, fetch

LOG2E: gl.constexpr = gl.constexpr(1.4426950408889634)


@gluon.jit
def _sequence(number, cu, S):
    """→ the batch entry, the first row and the number of rows of a sequence, which with `cu` is a packed document."""
    b, first, length = number, number * 0, S
    if cu is not None:
        b = number * 0
        first = gl.load(cu + number)
        length = gl.load(cu + number + 1) - first
    return b, first, length


@gluon.jit
def _span(
    first, length, shift, others, below, above, HAS_BELOW: gl.constexpr, HAS_ABOVE: gl.constexpr, STEP: gl.constexpr
):
    """What the 128 rows from `first` on, of `length`, meet, when row i meets i + shift - below … i + shift + above of
    the others → the first tile's first, how many tiles of STEP, none where a packed document is too short to have such
    rows; the first that all rows meet, and the first behind it that not all meet."""
    last = gl.minimum(first + 2 * GROUP, length) - 1
    start, end = 0, others
    whole_start, whole_end = 0, others
    if HAS_BELOW:
        start = gl.maximum(first + shift - below, 0) // STEP * STEP
        whole_start = gl.maximum(last + shift - below, 0)
    if HAS_ABOVE:
        end = gl.minimum(last + shift + above + 1, others)
        whole_end = gl.minimum(first + shift + above + 1, others)
    tiles = gl.where(first < length, gl.cdiv(gl.maximum(end - start, 0), STEP), 0)
    return start, tiles, whole_start, whole_end


@gluon.jit
def _forward_producer(shared, BN: gl.constexpr, STAGES: gl.constexpr):
    """What the producer warp does."""
    k, v, k_smem, v_smem, k_full, k_empty, v_full, v_empty, b, h, first, tiles = shared
    for tile in range(tiles):
        stage, phase = tile % STAGES, tile // STAGES & 1
        mbarrier.wait(k_empty.index(stage), phase ^ 1)
        mbarrier.expect(k_full.index(stage), k.block_type.nbytes)
        fetch(k, [b, first + tile * BN, h, 0], k_full.index(stage), k_smem.index(stage))
        mbarrier.wait(v_empty.index(stage), phase ^ 1)
        mbarrier.expect(v_full.index(stage), v.block_type.nbytes)
        fetch(v, [b, first + tile * BN, h, 0], v_full.index(stage), v_smem.index(stage))


@gluon.jit
def _part(there_A, column_D, HEAD: gl.constexpr, D: gl.constexpr):
    """→ (A, D) or (A, 1): which elements of rows are in memory."""
    part_AD = there_A[:, None]
    if HEAD < D:
        part_AD = part_AD & (column_D < HEAD)[None, :]
    return part_AD


@gluon.jit
def _load_rotated(
    q, offset_M, there_M, position_M, cos, sin, cos_stride, sin_stride,
    HEAD: gl.constexpr, D: gl.constexpr, ROTARY_DIM: gl.constexpr, INTERLEAVED: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """→ (M, D) heads at the offsets, rotated; 0 where none is. An element's partner is fetched a second time, from the
    cache."""
    column_D = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    x_MD = gl.load(q + offset_M[:, None] + column_D[None, :], mask=_part(there_M, column_D, HEAD, D), other=0.0)
    if ROTARY_DIM > 0:
        if INTERLEAVED:
            first_D = column_D % 2 == 0
            pair_D = column_D // 2
            partner_D = gl.where(first_D, column_D + 1, column_D - 1)
        else:
            first_D = column_D < ROTARY_DIM // 2
            pair_D = gl.where(first_D, column_D, column_D - ROTARY_DIM // 2)
            partner_D = gl.where(first_D, column_D + ROTARY_DIM // 2, column_D - ROTARY_DIM // 2)
        rotates_MD = there_M[:, None] & (column_D < ROTARY_DIM)[None, :]
        y_MD = gl.load(q + offset_M[:, None] + partner_D[None, :], mask=rotates_MD, other=0.0).to(gl.float32)
        at_M = position_M.to(gl.int64)
        cos_MD = gl.load(cos + (at_M * cos_stride)[:, None] + pair_D[None, :], mask=rotates_MD, other=1.0)
        sin_MD = gl.load(sin + (at_M * sin_stride)[:, None] + pair_D[None, :], mask=rotates_MD, other=0.0)
        y_MD = gl.where(first_D[None, :], -y_MD, y_MD)
        rotated_MD = x_MD.to(gl.float32) * cos_MD.to(gl.float32) + y_MD * sin_MD.to(gl.float32)
        x_MD = rotated_MD.to(x_MD.dtype)
    return x_MD


@gluon.jit
def _scores(product, scale, softcap, HAS_SOFTCAP: gl.constexpr):
    """→ scores before their unit, and the slope of those with it along scale · product."""
    if HAS_SOFTCAP:
        scores = 1.0 - 2.0 / (gl.exp2(product * (scale / softcap * (2.0 * LOG2E))) + 1.0)  # tanh
        slope = 1.0 - scores * scores
    else:
        scores, slope = product, 1.0
    return scores, slope


@gluon.jit
def _unit(scale, softcap, HAS_SOFTCAP: gl.constexpr):
    """→ what makes scores those of powers of 2, above 0. It is left to the exponential, which multiplies by it in the
    instruction that subtracts."""
    return (softcap if HAS_SOFTCAP else scale) * LOG2E


@gluon.jit
def _range(place_A, length, shift, others, below, above, HAS_BELOW: gl.constexpr, HAS_ABOVE: gl.constexpr):
    """→ the first and the end of the others that each row meets, when row i meets i + shift - below … i + shift +
    above of them, and rows behind the last none: two comparisons an element at most."""
    start_A = place_A + (shift - below) if HAS_BELOW else place_A * 0
    end_A = gl.minimum(place_A + (shift + above + 1), others) if HAS_ABOVE else place_A * 0 + others
    return start_A, gl.where(place_A < length, end_A, 0)


@gluon.jit
def _seen(start_A, end_A, others_B, HAS_BELOW: gl.constexpr):
    """→ (A, B): which of the others the rows of such ranges meet."""
    seen_AB = others_B[None, :] < end_A[:, None]
    if HAS_BELOW:
        seen_AB = seen_AB & (others_B[None, :] >= start_A[:, None])
    return seen_AB


@gluon.jit
def _softmax_step(
    product_MN, row_max_M, row_sum_M, start_M, end_M, n_N, masked, scale, softcap,
    HAS_LEFT: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
):  # fmt: skip
    """One tile of the online softmax → its weights p, the rows' new maximum and sum, the factor for earlier sums."""
    s_MN, _ = _scores(product_MN, scale, softcap, HAS_SOFTCAP)
    unit = _unit(scale, softcap, HAS_SOFTCAP)
    if masked:
        s_MN = gl.where(_seen(start_M, end_M, n_N, HAS_LEFT), s_MN, float("-inf"))
    new_max_M = gl.maximum(row_max_M, gl.max(s_MN, 1))
    base_M = gl.where(new_max_M == float("-inf"), 0.0, new_max_M * unit)  # nothing seen yet
    p_MN = gl.exp2(s_MN * unit - base_M[:, None])
    rescale_M = gl.exp2(row_max_M * unit - base_M)
    return p_MN, new_max_M, row_sum_M * rescale_M + gl.sum(p_MN, 1), rescale_M


@gluon.jit
def _forward_consumer(
    shared, HEAD: gl.constexpr, D: gl.constexpr, ROTARY_DIM: gl.constexpr, INTERLEAVED: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
    PACKED: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, NUMBER: gl.constexpr,
):  # fmt: skip
    """What consumer 0 or 1 does: 64 queries from beginning to end."""
    (
        q, q_stride, cos, sin, cos_stride, sin_stride, position, out, rotated_q, out_stride, lse,
        q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, ping_pong,
        block, start, tiles, whole_start, whole_end, len_q, len_k, scale, softcap, left, right,
    ) = shared  # fmt: skip
    dtype: gl.constexpr = q.dtype.element_ty
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    heads: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    weights: gl.constexpr = gl.DotOperandLayout(0, heads, 2)
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    first = block * (2 * GROUP) + NUMBER * GROUP
    queries_M = first + gl.arange(0, GROUP, layout=gl.SliceLayout(1, rows))
    there_M = queries_M < len_q
    position_M = queries_M
    if position is not None:
        position_M = gl.load(position + queries_M, mask=there_M, other=0)
    q_MD = _load_rotated(
        q, queries_M.to(gl.int64) * q_stride, there_M, position_M, cos, sin, cos_stride, sin_stride,
        HEAD, D, ROTARY_DIM, INTERLEAVED, rows,
    )  # fmt: skip
    column_D = gl.arange(0, D, layout=gl.SliceLayout(0, rows))
    at_MD = (queries_M.to(gl.int64) * out_stride)[:, None] + column_D[None, :]
    part_MD = _part(there_M, column_D, HEAD, D)
    if rotated_q is not None:
        gl.store(rotated_q + at_MD, q_MD, mask=part_MD)
    q_own = q_smem.index(NUMBER)
    q_own.store(q_MD)
    hopper.fence_async_shared()

    m_M = first + gl.arange(0, GROUP, layout=gl.SliceLayout(1, scores))
    tile_N = gl.arange(0, BN, layout=gl.SliceLayout(0, scores))
    start_M, end_M = _range(m_M, len_q, len_k - len_q, len_k, left, right, HAS_LEFT, HAS_RIGHT)
    row_max_M = gl.full([GROUP], float("-inf"), gl.float32, gl.SliceLayout(1, scores))
    row_sum_M = gl.full([GROUP], 0.0, gl.float32, gl.SliceLayout(1, scores))
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
        p_MN, row_max_M, row_sum_M, rescale_M = _softmax_step(
            product_MN, row_max_M, row_sum_M, start_M, end_M, start + tile_N, masked, scale, softcap,
            HAS_LEFT, HAS_SOFTCAP,
        )  # fmt: skip
        p_MN = gl.convert_layout(p_MN.to(dtype), weights)
        for tile in range(1, tiles):
            stage, phase = tile % STAGES, tile // STAGES & 1
            last_stage, last_phase = (tile - 1) % STAGES, (tile - 1) // STAGES & 1
            mbarrier.wait(k_full.index(stage), phase)
            mbarrier.wait(ping_pong.index(NUMBER), (tile - 1) & 1)
            issued = hopper.warpgroup_mma(
                q_own, k_smem.index(stage).reshape([BN, D]).permute((1, 0)), zero_MN, use_acc=False, is_async=True
            )
            mbarrier.wait(v_full.index(last_stage), last_phase)
            adding = hopper.warpgroup_mma(p_MN, v_smem.index(last_stage).reshape([BN, D]), out_MD, is_async=True)
            mbarrier.arrive(ping_pong.index(1 - NUMBER))
            product_MN = hopper.warpgroup_mma_wait(1, deps=(issued,))
            mbarrier.arrive(k_empty.index(stage))
            n = start + tile * BN
            masked = (n < whole_start) | (n + BN > whole_end)
            p_MN, row_max_M, row_sum_M, rescale_M = _softmax_step(
                product_MN, row_max_M, row_sum_M, start_M, end_M, n + tile_N, masked, scale, softcap,
                HAS_LEFT, HAS_SOFTCAP,
            )  # fmt: skip
            p_MN = gl.convert_layout(p_MN.to(dtype), weights)
            out_MD = hopper.warpgroup_mma_wait(0, deps=(adding,))
            mbarrier.arrive(v_empty.index(last_stage))
            out_MD = out_MD * gl.convert_layout(rescale_M, gl.SliceLayout(1, heads))[:, None]
        last_stage, last_phase = (tiles - 1) % STAGES, (tiles - 1) // STAGES & 1
        mbarrier.wait(v_full.index(last_stage), last_phase)
        if PACKED:
            end = len_k - start - (tiles - 1) * BN
            if end < BN:
                clear_behind(v_smem.index(last_stage).reshape([BN, D]), end)
        adding = hopper.warpgroup_mma(p_MN, v_smem.index(last_stage).reshape([BN, D]), out_MD, is_async=True)
        out_MD = hopper.warpgroup_mma_wait(0, deps=(adding,))
    empty_M = row_max_M == float("-inf")
    row_sum_M = gl.where(empty_M, 1.0, row_sum_M)
    out_MD = out_MD * gl.convert_layout(1.0 / row_sum_M, gl.SliceLayout(1, heads))[:, None]
    q_own.store(out_MD.to(dtype))  # nobody reads the queries any more
    gl.store(out + at_MD, q_own.load(rows), mask=part_MD)
    lse_M = row_max_M * _unit(scale, softcap, HAS_SOFTCAP) + gl.log2(row_sum_M)
    lse_M = gl.where(empty_M, float("-inf"), lse_M / LOG2E)
    gl.store(lse + m_M, lse_M, mask=m_M < len_q)


@gluon.jit
def _hopper_forward(
    q, q_stride_b, q_stride_s, q_stride_h, k, v, cos, sin, cos_stride, sin_stride, position, position_stride_b,
    out, rotated_q, lse, cu_q, cu_k, blocks, S_q, S_k, H, q_per_kv,
    scale, softcap, left, right,
    HEAD: gl.constexpr, D: gl.constexpr, ROTARY_DIM: gl.constexpr, INTERLEAVED: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
    PACKED: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    block = blocks - 1 - gl.program_id(0) % blocks  # with a causal mask the last ones take longest
    h, number = gl.program_id(0) // blocks % H, gl.program_id(0) // blocks // H
    b, first_q, len_q = _sequence(number, cu_q, S_q)
    _, first_k, len_k = _sequence(number, cu_k, S_k)
    start, tiles, whole_start, whole_end = _span(
        block * (2 * GROUP), len_q, len_k - len_q, len_k, left, right, HAS_LEFT, HAS_RIGHT, BN
    )
    queries: gl.constexpr = gl.NVMMASharedLayout.get_default_for([GROUP, D], q.dtype.element_ty)
    q_smem = gl.allocate_shared_memory(q.dtype.element_ty, [2, GROUP, D], queries)
    k_smem = gl.allocate_shared_memory(k.dtype, [STAGES, 1, BN, 1, D], k.layout)
    v_smem = gl.allocate_shared_memory(v.dtype, [STAGES, 1, BN, 1, D], v.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ping_pong = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    for group in gl.static_range(2):
        mbarrier.init(ping_pong.index(group), count=1)
    mbarrier.arrive(ping_pong.index(0))
    b_64, h_64, row = b.to(gl.int64), h.to(gl.int64), first_q.to(gl.int64)  # what follows begins at the sequence
    q += b_64 * q_stride_b + row * q_stride_s + h_64 * q_stride_h
    at = ((b_64 * S_q + row) * H + h_64) * HEAD
    out += at
    if rotated_q is not None:
        rotated_q += at
    lse += (b_64 * H + h_64) * S_q + row
    if position is not None:
        position += b_64 * position_stride_b + row
    shared = (
        q, q_stride_s, cos, sin, cos_stride, sin_stride, position, out, rotated_q, H * HEAD, lse,
        q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, ping_pong,
        block, start, tiles, whole_start, whole_end, len_q, len_k, scale, softcap, left, right,
    )  # fmt: skip
    fetched = k, v, k_smem, v_smem, k_full, k_empty, v_full, v_empty, b, h // q_per_kv, first_k + start, tiles
    gl.warp_specialize(
        [
            (
                _forward_consumer,
                (shared, HEAD, D, ROTARY_DIM, INTERLEAVED, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, PACKED, BN, STAGES, 0),
            ),
            (
                _forward_consumer,
                (shared, HEAD, D, ROTARY_DIM, INTERLEAVED, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, PACKED, BN, STAGES, 1),
            ),
            (_forward_producer, (fetched, BN, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
