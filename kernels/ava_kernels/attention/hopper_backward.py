"""Attention's backward pass for Hopper: the kernels that `hopper.backward` launches; see there.

Scores are computed again in each of the two. `_hopper_dkdv` has them keys by queries, so that weights and their
gradients are, in registers, the left operands of the products that dv and dk are summed from.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ava_kernels.attention.hopper_forward import LOG2E, _part, _range, _scores, _seen, _sequence, _span, _unit
from ava_kernels.hopper import GROUP, clear_behind, fetch


@gluon.jit
def _fetch_own(own_x, own_y, own_smem, own_full, b, first, h):
    """Two tiles of 64 own rows of two tensors."""
    mbarrier.expect(own_full, 2 * own_x.block_type.nbytes + 2 * own_y.block_type.nbytes)
    for group in gl.static_range(2):
        fetch(own_x, [b, first + group * GROUP, h, 0], own_full, own_smem.index(group))
        fetch(own_y, [b, first + group * GROUP, h, 0], own_full, own_smem.index(2 + group))


@gluon.jit
def _dq_producer(shared, STAGES: gl.constexpr):
    """What the producer warp does: own rows, then pairs of tiles of keys and values."""
    q, dout, k, v, own_smem, k_smem, v_smem, own_full, full, empty, b, own_first, own_h, first, h, tiles = shared
    if tiles > 0:
        _fetch_own(q, dout, own_smem, own_full, b, own_first, own_h)
    for i in range(tiles):
        stage, phase = i % STAGES, i // STAGES & 1
        row = first + i * k.block_type.shape[1]
        mbarrier.wait(empty.index(stage), phase ^ 1)
        mbarrier.expect(full.index(stage), k.block_type.nbytes + v.block_type.nbytes)
        fetch(k, [b, row, h, 0], full.index(stage), k_smem.index(stage))
        fetch(v, [b, row, h, 0], full.index(stage), v_smem.index(stage))


@gluon.jit
def _sums_of_rows(lse, delta, i, tiles, stride, start, len_q, BM: gl.constexpr):
    """→ lse, in units of log 2, and delta of the queries of step i; 0 behind the last."""
    layout: gl.constexpr = gl.BlockedLayout([max(BM // 32, 1)], [32], [1], [0])
    m_M = start + i % tiles * BM + gl.arange(0, BM, layout=layout)
    row = (i // tiles).to(gl.int64) * stride
    lse_M = gl.load(lse + row + m_M, mask=m_M < len_q, other=0.0) * LOG2E
    return lse_M, gl.load(delta + row + m_M, mask=m_M < len_q, other=0.0)


@gluon.jit
def _dkdv_producer(shared, BM: gl.constexpr, STAGES: gl.constexpr):
    """What the producer warp does: own rows, then pairs of tiles of queries and of output's gradients, of one head
    after the other, and the two numbers of each of their rows, which are asked for one step ahead."""
    (
        k, v, q, dout, own_smem, q_smem, dout_smem, lse_smem, delta_smem, own_full, full, empty,
        lse, delta, lse_stride, b, own_first, own_h, first_q, start, h, q_per_kv, tiles, len_q,
    ) = shared  # fmt: skip
    steps = q_per_kv * tiles
    if steps > 0:
        _fetch_own(k, v, own_smem, own_full, b, own_first, own_h)
        lse_M, delta_M = _sums_of_rows(lse, delta, tiles * 0, tiles, lse_stride, start, len_q, BM)
        for i in range(steps):
            stage, phase = i % STAGES, i // STAGES & 1
            row, head = first_q + start + i % tiles * BM, h + i // tiles
            mbarrier.wait(empty.index(stage), phase ^ 1)
            mbarrier.expect(full.index(stage), q.block_type.nbytes + dout.block_type.nbytes)
            fetch(q, [b, row, head, 0], full.index(stage), q_smem.index(stage))
            fetch(dout, [b, row, head, 0], full.index(stage), dout_smem.index(stage))
            lse_smem.index(stage).store(lse_M)
            delta_smem.index(stage).store(delta_M)
            mbarrier.arrive(full.index(stage))
            lse_M, delta_M = _sums_of_rows(
                lse, delta, gl.minimum(i + 1, steps - 1), tiles, lse_stride, start, len_q, BM
            )


@gluon.jit
def _unrotated(x_AD, position, place, length, cos, sin, cos_stride, sin_stride, INTERLEAVED: gl.constexpr):
    """→ x (A, D) float32, all of it rotated by the negative angles of the rows from `place` on."""
    rows: gl.constexpr = x_AD.shape[0]
    pairs: gl.constexpr = x_AD.shape[1] // 2
    if INTERLEAVED:
        first_AP, second_AP = gl.split(gl.reshape(x_AD, [rows, pairs, 2]))
    else:
        first_AP, second_AP = gl.split(gl.permute(gl.reshape(x_AD, [rows, 2, pairs]), [0, 2, 1]))
    layout: gl.constexpr = first_AP.type.layout
    place_A = place + gl.arange(0, rows, layout=gl.SliceLayout(1, layout))
    there_A = place_A < length
    position_A = place_A.to(gl.int64)
    if position is not None:
        position_A = gl.load(position + place_A, mask=there_A, other=0).to(gl.int64)
    pair_P = gl.arange(0, pairs, layout=gl.SliceLayout(0, layout))
    cos_AP = gl.load(cos + (position_A * cos_stride)[:, None] + pair_P[None, :], mask=there_A[:, None], other=1.0)
    sin_AP = gl.load(sin + (position_A * sin_stride)[:, None] + pair_P[None, :], mask=there_A[:, None], other=0.0)
    cos_AP, sin_AP = cos_AP.to(gl.float32), sin_AP.to(gl.float32)
    x_AP2 = gl.join(first_AP * cos_AP + second_AP * sin_AP, second_AP * cos_AP - first_AP * sin_AP)
    if INTERLEAVED:
        x_AD = gl.reshape(x_AP2, [rows, 2 * pairs])
    else:
        x_AD = gl.reshape(gl.permute(x_AP2, [0, 2, 1]), [rows, 2 * pairs])
    return x_AD


@gluon.jit
def _store_rows(to, stride, x_AD, smem, place, length, HEAD: gl.constexpr, D: gl.constexpr):
    """Stores x (A, D) as the rows from `place` on of a head, through shared memory that nobody else uses."""
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    smem.store(x_AD.to(to.dtype.element_ty))
    place_A = place + gl.arange(0, GROUP, layout=gl.SliceLayout(1, rows))
    column_D = gl.arange(0, D, layout=gl.SliceLayout(0, rows))
    at_AD = (place_A.to(gl.int64) * stride)[:, None] + column_D[None, :]
    gl.store(to + at_AD, smem.load(rows), mask=_part(place_A < length, column_D, HEAD, D))


@gluon.jit
def _dkdv_consumer(
    shared, HEAD: gl.constexpr, D: gl.constexpr, ROTARY_DIM: gl.constexpr, INTERLEAVED: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
    PACKED: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, NUMBER: gl.constexpr,
):  # fmt: skip
    """What consumer 0 or 1 does: dk and dv of 64 keys."""
    (
        cos, sin, cos_stride, sin_stride, position, dk, dv, stride,
        own_smem, q_smem, dout_smem, lse_smem, delta_smem, own_full, full, empty, own_place, q_per_kv,
        start, tiles, whole_start, whole_end, len_q, len_k, scale, softcap, left, right,
    ) = shared  # fmt: skip
    dtype: gl.constexpr = dk.dtype.element_ty
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    heads: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    weights: gl.constexpr = gl.DotOperandLayout(0, heads, 2)
    place = own_place + NUMBER * GROUP
    k_own = own_smem.index(NUMBER).reshape([GROUP, D])
    v_own = own_smem.index(2 + NUMBER).reshape([GROUP, D])
    n_N = place + gl.arange(0, GROUP, layout=gl.SliceLayout(1, scores))
    start_N, end_N = _range(n_N, len_k, len_q - len_k, len_q, right, left, HAS_RIGHT, HAS_LEFT)
    columns: gl.constexpr = gl.SliceLayout(0, scores)
    tile_M = gl.arange(0, BM, layout=columns)
    zero_NM = gl.zeros([GROUP, BM], gl.float32, scores)
    dk_ND = gl.zeros([GROUP, D], gl.float32, heads)
    dv_ND = gl.zeros([GROUP, D], gl.float32, heads)
    unit = _unit(scale, softcap, HAS_SOFTCAP)
    if tiles > 0:
        mbarrier.wait(own_full, 0)
    step = start * 0
    for _member in range(q_per_kv):
        for tile in range(tiles):
            stage, phase = step % STAGES, step // STAGES & 1
            m = start + tile * BM
            q_MD = q_smem.index(stage).reshape([BM, D])
            dout_MD = dout_smem.index(stage).reshape([BM, D])
            mbarrier.wait(full.index(stage), phase)
            if PACKED and m + BM > len_q:
                clear_behind(q_MD, len_q - m)
                clear_behind(dout_MD, len_q - m)
            product = hopper.warpgroup_mma(k_own, q_MD.permute((1, 0)), zero_NM, use_acc=False, is_async=True)
            dweight = hopper.warpgroup_mma(v_own, dout_MD.permute((1, 0)), zero_NM, use_acc=False, is_async=True)
            lse_M = lse_smem.index(stage).load(columns)
            product_NM = hopper.warpgroup_mma_wait(1, deps=(product,))
            s_NM, slope = _scores(product_NM, scale, softcap, HAS_SOFTCAP)
            p_NM = gl.exp2(s_NM * unit - lse_M[None, :])
            if (m < whole_start) | (m + BM > whole_end):
                p_NM = gl.where(_seen(start_N, end_N, m + tile_M, HAS_RIGHT), p_NM, 0.0)
            dv_sum = hopper.warpgroup_mma(gl.convert_layout(p_NM.to(dtype), weights), dout_MD, dv_ND, is_async=True)
            delta_M = delta_smem.index(stage).load(columns)
            dp_NM = hopper.warpgroup_mma_wait(1, deps=(dweight,))
            ds_NM = gl.convert_layout((p_NM * (dp_NM - delta_M[None, :]) * slope).to(dtype), weights)
            dk_sum = hopper.warpgroup_mma(ds_NM, q_MD, dk_ND, is_async=True)
            dv_ND, dk_ND = hopper.warpgroup_mma_wait(0, deps=(dv_sum, dk_sum))
            mbarrier.arrive(empty.index(stage))
            step += 1
    _store_rows(dv, stride, dv_ND, v_own, place, len_k, HEAD, D)
    dk_ND = dk_ND * scale
    if ROTARY_DIM > 0:
        dk_ND = _unrotated(dk_ND, position, place, len_k, cos, sin, cos_stride, sin_stride, INTERLEAVED)
    _store_rows(dk, stride, dk_ND, k_own, place, len_k, HEAD, D)


@gluon.jit
def _dq_consumer(
    shared, HEAD: gl.constexpr, D: gl.constexpr, ROTARY_DIM: gl.constexpr, INTERLEAVED: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
    PACKED: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, NUMBER: gl.constexpr,
):  # fmt: skip
    """What consumer 0 or 1 does: dq of 64 queries."""
    (
        lse, delta, cos, sin, cos_stride, sin_stride, position, dq, stride,
        own_smem, k_smem, v_smem, own_full, full, empty, own_place,
        start, tiles, whole_start, whole_end, len_q, len_k, scale, softcap, left, right,
    ) = shared  # fmt: skip
    dtype: gl.constexpr = dq.dtype.element_ty
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    heads: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    weights: gl.constexpr = gl.DotOperandLayout(0, heads, 2)
    place = own_place + NUMBER * GROUP
    q_own = own_smem.index(NUMBER).reshape([GROUP, D])
    dout_own = own_smem.index(2 + NUMBER).reshape([GROUP, D])
    m_M = place + gl.arange(0, GROUP, layout=gl.SliceLayout(1, scores))
    start_M, end_M = _range(m_M, len_q, len_k - len_q, len_k, left, right, HAS_LEFT, HAS_RIGHT)
    tile_N = gl.arange(0, BN, layout=gl.SliceLayout(0, scores))
    lse_M = gl.load(lse + m_M, mask=m_M < len_q, other=0.0) * LOG2E
    delta_M = gl.load(delta + m_M, mask=m_M < len_q, other=0.0)
    zero_MN = gl.zeros([GROUP, BN], gl.float32, scores)
    dq_MD = gl.zeros([GROUP, D], gl.float32, heads)
    unit = _unit(scale, softcap, HAS_SOFTCAP)
    if tiles > 0:
        mbarrier.wait(own_full, 0)
    for tile in range(tiles):
        stage, phase = tile % STAGES, tile // STAGES & 1
        n = start + tile * BN
        k_ND = k_smem.index(stage).reshape([BN, D])
        v_ND = v_smem.index(stage).reshape([BN, D])
        mbarrier.wait(full.index(stage), phase)
        if PACKED and n + BN > len_k:
            clear_behind(k_ND, len_k - n)
            clear_behind(v_ND, len_k - n)
        product = hopper.warpgroup_mma(q_own, k_ND.permute((1, 0)), zero_MN, use_acc=False, is_async=True)
        dweight = hopper.warpgroup_mma(dout_own, v_ND.permute((1, 0)), zero_MN, use_acc=False, is_async=True)
        product_MN = hopper.warpgroup_mma_wait(1, deps=(product,))
        s_MN, slope = _scores(product_MN, scale, softcap, HAS_SOFTCAP)
        p_MN = gl.exp2(s_MN * unit - lse_M[:, None])
        if (n < whole_start) | (n + BN > whole_end):
            p_MN = gl.where(_seen(start_M, end_M, n + tile_N, HAS_LEFT), p_MN, 0.0)
        dp_MN = hopper.warpgroup_mma_wait(0, deps=(dweight,))
        ds_MN = gl.convert_layout((p_MN * (dp_MN - delta_M[:, None]) * slope).to(dtype), weights)
        dq_sum = hopper.warpgroup_mma(ds_MN, k_ND, dq_MD, is_async=True)
        dq_MD = hopper.warpgroup_mma_wait(0, deps=(dq_sum,))
        mbarrier.arrive(empty.index(stage))
    dq_MD = dq_MD * scale
    if ROTARY_DIM > 0:
        dq_MD = _unrotated(dq_MD, position, place, len_q, cos, sin, cos_stride, sin_stride, INTERLEAVED)
    _store_rows(dq, stride, dq_MD, q_own, place, len_q, HEAD, D)


@gluon.jit
def _ring(x, y, STAGES: gl.constexpr, ARRIVALS: gl.constexpr):
    """→ stages of two tensors' tiles, and their barriers; the barrier of what is fetched once."""
    shape: gl.constexpr = x.block_type.shape
    x_smem = gl.allocate_shared_memory(x.dtype, [STAGES, shape[0], shape[1], shape[2], shape[3]], x.layout)
    y_smem = gl.allocate_shared_memory(y.dtype, [STAGES, shape[0], shape[1], shape[2], shape[3]], y.layout)
    own_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(own_full, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=ARRIVALS)
        mbarrier.init(empty.index(stage), count=2)
    return x_smem, y_smem, own_full, full, empty


@gluon.jit
def _hopper_dkdv(
    k, v, q, dout, lse, delta, cos, sin, cos_stride, sin_stride, position, position_stride_b, dk, dv, cu_q, cu_k,
    blocks, S_q, S_k, H_kv, q_per_kv, scale, softcap, left, right,
    HEAD: gl.constexpr, D: gl.constexpr, ROTARY_DIM: gl.constexpr, INTERLEAVED: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
    PACKED: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    block = gl.program_id(0) % blocks  # with a causal mask the first ones take longest
    h, number = gl.program_id(0) // blocks % H_kv, gl.program_id(0) // blocks // H_kv
    b, first_q, len_q = _sequence(number, cu_q, S_q)
    _, first_k, len_k = _sequence(number, cu_k, S_k)
    place = block * (2 * GROUP)
    start, tiles, whole_start, whole_end = _span(
        place, len_k, len_q - len_k, len_q, right, left, HAS_RIGHT, HAS_LEFT, BM
    )  # fmt: skip
    b_64, h_64 = b.to(gl.int64), h.to(gl.int64)  # what follows begins at the sequence
    at = ((b_64 * S_k + first_k) * H_kv + h_64) * HEAD
    dk += at
    dv += at
    at = (b_64 * H_kv + h_64) * q_per_kv * S_q + first_q
    lse += at
    delta += at
    if position is not None:
        position += b_64 * position_stride_b + first_k
    own_smem = gl.allocate_shared_memory(k.dtype, [4, 1, GROUP, 1, D], k.layout)
    q_smem, dout_smem, own_full, full, empty = _ring(q, dout, STAGES, 2)
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BM], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BM], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    shared = (
        cos, sin, cos_stride, sin_stride, position, dk, dv, H_kv * HEAD,
        own_smem, q_smem, dout_smem, lse_smem, delta_smem, own_full, full, empty, place, q_per_kv,
        start, tiles, whole_start, whole_end, len_q, len_k, scale, softcap, left, right,
    )  # fmt: skip
    fetched = (
        k, v, q, dout, own_smem, q_smem, dout_smem, lse_smem, delta_smem, own_full, full, empty,
        lse, delta, S_q, b, first_k + place, h, first_q, start, h * q_per_kv, q_per_kv, tiles, len_q,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (
                _dkdv_consumer,
                (shared, HEAD, D, ROTARY_DIM, INTERLEAVED, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, PACKED, BM, STAGES, 0),
            ),
            (
                _dkdv_consumer,
                (shared, HEAD, D, ROTARY_DIM, INTERLEAVED, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, PACKED, BM, STAGES, 1),
            ),
            (_dkdv_producer, (fetched, BM, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _hopper_dq(
    q, dout, k, v, lse, delta, cos, sin, cos_stride, sin_stride, position, position_stride_b, dq, cu_q, cu_k,
    blocks, S_q, S_k, H, q_per_kv, scale, softcap, left, right,
    HEAD: gl.constexpr, D: gl.constexpr, ROTARY_DIM: gl.constexpr, INTERLEAVED: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
    PACKED: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    block = blocks - 1 - gl.program_id(0) % blocks
    h, number = gl.program_id(0) // blocks % H, gl.program_id(0) // blocks // H
    b, first_q, len_q = _sequence(number, cu_q, S_q)
    _, first_k, len_k = _sequence(number, cu_k, S_k)
    place = block * (2 * GROUP)
    start, tiles, whole_start, whole_end = _span(
        place, len_q, len_k - len_q, len_k, left, right, HAS_LEFT, HAS_RIGHT, BN
    )  # fmt: skip
    b_64, h_64 = b.to(gl.int64), h.to(gl.int64)  # what follows begins at the sequence
    dq += ((b_64 * S_q + first_q) * H + h_64) * HEAD
    at = (b_64 * H + h_64) * S_q + first_q
    lse += at
    delta += at
    if position is not None:
        position += b_64 * position_stride_b + first_q
    own_smem = gl.allocate_shared_memory(q.dtype, [4, 1, GROUP, 1, D], q.layout)
    k_smem, v_smem, own_full, full, empty = _ring(k, v, STAGES, 1)
    shared = (
        lse, delta, cos, sin, cos_stride, sin_stride, position, dq, H * HEAD,
        own_smem, k_smem, v_smem, own_full, full, empty, place,
        start, tiles, whole_start, whole_end, len_q, len_k, scale, softcap, left, right,
    )  # fmt: skip
    fetched = (
        q, dout, k, v, own_smem, k_smem, v_smem, own_full, full, empty,
        b, first_q + place, h, first_k + start, h // q_per_kv, tiles,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (
                _dq_consumer,
                (shared, HEAD, D, ROTARY_DIM, INTERLEAVED, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, PACKED, BN, STAGES, 0),
            ),
            (
                _dq_consumer,
                (shared, HEAD, D, ROTARY_DIM, INTERLEAVED, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, PACKED, BN, STAGES, 1),
            ),
            (_dq_producer, (fetched, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
