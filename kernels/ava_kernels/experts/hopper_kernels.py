"""The experts' products for Hopper: the kernels that `hopper.py` launches; see there.

A tile is 128 rows of one expert and two times 128 columns, in `_hopper_down_backward` once. The kernels are persistent:
every program goes through its share of all experts' tiles. So do each of its warp groups, which meet at a ring of
stages: what is multiplied next is loaded while the last products run, across the ends of tiles.

Shape suffixes: B rows of a consumer, C columns, L what is multiplied and added at a time.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ava_kernels.hopper import GROUP, fetch

COLUMNS: gl.constexpr = gl.constexpr(128)  # of one accumulator
DEPTH: gl.constexpr = gl.constexpr(64)  # what is multiplied and added at a time
LOG2E: gl.constexpr = gl.constexpr(1.4426950408889634)
SWIZZLE: gl.constexpr = gl.constexpr(8)  # tiles of rows that go through the columns together


@gluon.jit
def _next_share(next_tile, tiles, programs):
    """→ the first tile of the next expert that is this program's, which has had its share of `tiles`."""
    return (next_tile + programs - tiles % programs) % programs


@gluon.jit
def _swizzle(tile, rows, columns):
    """→ row and column of a tile, when SWIZZLE tiles of rows go through the columns together."""
    group = tile // (SWIZZLE * columns)
    height = gl.minimum(rows - group * SWIZZLE, SWIZZLE)
    within = tile - group * SWIZZLE * columns
    return group * SWIZZLE + within % height, within // height


@gluon.jit
def _fetch_weights(w, w_smem, stage, full, expert, at, column, second, WIDE: gl.constexpr, HALVES: gl.constexpr):
    """One stage of weights: HALVES tiles of columns, `second` apart. WIDE: columns lie side by side, not what is summed
    over."""
    for half in gl.static_range(HALVES):
        if WIDE:
            place = [expert, at, column + half * second]
        else:
            place = [expert, column + half * second, at]
        fetch(w, place, full.index(stage), w_smem.index(HALVES * stage + half))


@gluon.jit
def _producer(shared, WIDE: gl.constexpr, HALVES: gl.constexpr, STAGES: gl.constexpr):
    """What the producer warp does where rows lie in their experts' order."""
    x, w, x_smem, w_smem, full, empty, ends, E, L, columns, width, second, programs = shared
    next_tile = gl.program_id(0)
    start, step = next_tile * 0, next_tile * 0
    for expert in range(E):
        end = gl.load(ends + expert)
        rows = gl.cdiv(end - start, 2 * GROUP)
        for tile in range(next_tile, rows * columns, programs):
            row, column = _swizzle(tile, rows, columns)
            for at in range(0, L, DEPTH):
                stage, phase = step % STAGES, step // STAGES & 1
                mbarrier.wait(empty.index(stage), phase ^ 1)
                mbarrier.expect(full.index(stage), 2 * x.block_type.nbytes + HALVES * w.block_type.nbytes)
                for group in gl.static_range(2):
                    place = [start + (2 * row + group) * GROUP, at]
                    fetch(x, place, full.index(stage), x_smem.index(2 * stage + group))
                _fetch_weights(w, w_smem, stage, full, expert, at, column * width, second, WIDE, HALVES)
                step += 1
        next_tile = _next_share(next_tile, rows * columns, programs)
        start = end


@gluon.jit
def _gather_producer(shared, WIDE: gl.constexpr, HALVES: gl.constexpr, STAGES: gl.constexpr, UNIT: gl.constexpr):
    """What the producer warps do where rows are named by token: these come by asynchronous copies, which their stage
    is told of a few steps later, when they have landed."""
    x, x_stride, token, w, x_smem, w_smem, full, empty, ends, E, L, columns, width, second, programs = shared
    late: gl.constexpr = STAGES - 2  # the groups still read the stage before the one that they wait for
    rows_of: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    x_stride, L = x_stride // UNIT * UNIT, L // UNIT * UNIT  # so that the compiler sees it
    next_tile = gl.program_id(0)
    start, step = next_tile * 0, next_tile * 0
    row_B = gl.arange(0, GROUP, layout=gl.SliceLayout(1, rows_of))
    at_L = gl.arange(0, DEPTH, layout=gl.SliceLayout(0, rows_of))
    for expert in range(E):
        end = gl.load(ends + expert)
        rows = gl.cdiv(end - start, 2 * GROUP)
        for tile in range(next_tile, rows * columns, programs):
            row, column = _swizzle(tile, rows, columns)
            first = start + row * (2 * GROUP)
            # Rows behind the last repeat it: their results are not stored.
            token_B = gl.load(token + gl.minimum(first + row_B, end - 1)).to(gl.int64)
            token_B2 = gl.load(token + gl.minimum(first + GROUP + row_B, end - 1)).to(gl.int64)
            x_BL = x + (token_B * x_stride)[:, None] + at_L[None, :]
            x_BL2 = x + (token_B2 * x_stride)[:, None] + at_L[None, :]
            for at in range(0, L, DEPTH):
                stage, phase = step % STAGES, step // STAGES & 1
                mbarrier.wait(empty.index(stage), phase ^ 1)
                mbarrier.expect(full.index(stage), HALVES * w.block_type.nbytes)
                _fetch_weights(w, w_smem, stage, full, expert, at, column * width, second, WIDE, HALVES)
                here_BL = (at + at_L < L)[None, :]
                async_copy.async_copy_global_to_shared(x_smem.index(2 * stage), x_BL + at, mask=here_BL)
                async_copy.async_copy_global_to_shared(x_smem.index(2 * stage + 1), x_BL2 + at, mask=here_BL)
                async_copy.commit_group()
                async_copy.wait_group(late)  # all of these warps: the compiler puts their barrier behind it
                hopper.fence_async_shared()
                if step >= late:
                    mbarrier.arrive(full.index((step - late) % STAGES))
                step += 1
        next_tile = _next_share(next_tile, rows * columns, programs)
        start = end
    async_copy.wait_group(0)
    hopper.fence_async_shared()
    for landed in range(gl.maximum(step - late, 0), step):
        mbarrier.arrive(full.index(landed % STAGES))


@gluon.jit
def _multiply(
    x_smem, w_smem, full, empty, step, L, WIDE: gl.constexpr, HALVES: gl.constexpr, STAGES: gl.constexpr,
    NUMBER: gl.constexpr,
):  # fmt: skip
    """What consumer 0 or 1 does of a tile's products → its rows (B, 128) times each half of the columns, float32."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    first_BC = gl.zeros([GROUP, COLUMNS], gl.float32, layout)
    second_BC = gl.zeros([GROUP, COLUMNS], gl.float32, layout)
    begun = step
    for _ in range(0, L, DEPTH):
        stage, phase = step % STAGES, step // STAGES & 1
        x_BL = x_smem.index(2 * stage + NUMBER)
        mbarrier.wait(full.index(stage), phase)
        first = hopper.warpgroup_mma(x_BL, _operand(w_smem.index(HALVES * stage), WIDE), first_BC, is_async=True)
        if HALVES == 2:
            second = hopper.warpgroup_mma(
                x_BL, _operand(w_smem.index(HALVES * stage + 1), WIDE), second_BC, is_async=True
            )
            first_BC, second_BC = hopper.warpgroup_mma_wait(2, deps=(first, second))
        else:
            first_BC = hopper.warpgroup_mma_wait(1, deps=(first,))
        if step > begun:
            mbarrier.arrive(empty.index((step - 1) % STAGES))
        step += 1
    if HALVES == 2:
        first_BC, second_BC = hopper.warpgroup_mma_wait(0, deps=(first_BC, second_BC))
    else:
        first_BC = hopper.warpgroup_mma_wait(0, deps=(first_BC,))
    mbarrier.arrive(empty.index((step - 1) % STAGES))
    return first_BC, second_BC, step


@gluon.jit
def _operand(tile, WIDE: gl.constexpr):
    """→ (L, C): weights as a product takes them."""
    if WIDE:
        w_LC = tile.reshape([DEPTH, COLUMNS])
    else:
        w_LC = tile.reshape([COLUMNS, DEPTH]).permute((1, 0))
    return w_LC


@gluon.jit
def _halves(x_BC):
    """→ the left and the right half of the columns."""
    parts: gl.constexpr = [x_BC.shape[0], 2, x_BC.shape[1] // 2]
    return gl.split(gl.permute(gl.reshape(x_BC, parts), [0, 2, 1]))


@gluon.jit
def _place(row, end, column, limit, stride, UNIT: gl.constexpr, C: gl.constexpr):
    """→ offsets and mask of (B, C) elements: rows before `end`, columns before `limit`."""
    rows_of: gl.constexpr = gl.BlockedLayout([1, 8], [256 // C, C // 8], [4, 1], [1, 0])
    row_B = row + gl.arange(0, GROUP, layout=gl.SliceLayout(1, rows_of))
    column_C = column + gl.arange(0, C, layout=gl.SliceLayout(0, rows_of))
    at_BC = (row_B.to(gl.int64) * (stride // UNIT * UNIT))[:, None] + column_C[None, :]
    return at_BC, (row_B < end)[:, None] & (column_C < limit // UNIT * UNIT)[None, :]


@gluon.jit
def _by_rows(x_BC, smem):
    """→ (B, C) as memory has it, through shared memory: what a thread has of a product does not lie side by side."""
    C: gl.constexpr = x_BC.shape[1]
    rows_of: gl.constexpr = gl.BlockedLayout([1, 8], [256 // C, C // 8], [4, 1], [1, 0])
    smem.store(x_BC)
    return smem.load(rows_of)


@gluon.jit
def _store(to, x_BC, smem, at_BC, here_BC):
    gl.store(to + at_BC, _by_rows(x_BC, smem), mask=here_BC)


@gluon.jit
def _activate(gate, up, ACTIVATION: gl.constexpr):
    """→ a, and its slopes along gate and up."""
    if ACTIVATION == "geglu":
        share = 0.5 + 0.5 * gl.erf(gate * 0.7071067811865476)
        slope = share + gate * gl.exp2(gate * gate * (-0.5 * LOG2E)) * 0.3989422804014327
    else:
        root = gl.rsqrt(1.0 + gl.exp2(gate * -LOG2E))
        share = root * root
        slope = share + gate * share * (1.0 - share)
    act = gate * share
    return act * up, slope * up, act


@gluon.jit
def _grouped_mm_consumer(shared, WIDE: gl.constexpr, STAGES: gl.constexpr, UNIT: gl.constexpr, NUMBER: gl.constexpr):
    x_smem, w_smem, out_smem, full, empty, ends, out, E, L, P, columns, programs = shared
    dtype: gl.constexpr = out.dtype.element_ty
    own = out_smem.index(NUMBER)
    C: gl.constexpr = out_smem.shape[2]  # columns that are stored at a time: registers are few
    next_tile = gl.program_id(0)
    start, step = next_tile * 0, next_tile * 0
    for expert in range(E):
        end = gl.load(ends + expert)
        rows = gl.cdiv(end - start, 2 * GROUP)
        for tile in range(next_tile, rows * columns, programs):
            row, column = _swizzle(tile, rows, columns)
            first_BC, second_BC, step = _multiply(x_smem, w_smem, full, empty, step, L, WIDE, 2, STAGES, NUMBER)
            row = start + (2 * row + NUMBER) * GROUP
            column = column * (2 * COLUMNS)
            for _half in gl.static_range(2):
                left_BC, right_BC = _halves(first_BC)
                at_BC, here_BC = _place(row, end, column, P, P, UNIT, C)
                _store(out, left_BC.to(dtype), own, at_BC, here_BC)
                at_BC, here_BC = _place(row, end, column + C, P, P, UNIT, C)
                _store(out, right_BC.to(dtype), own, at_BC, here_BC)
                first_BC, column = second_BC, column + COLUMNS
        next_tile = _next_share(next_tile, rows * columns, programs)
        start = end


@gluon.jit
def _up_consumer(
    shared, ACTIVATION: gl.constexpr, WIDE: gl.constexpr, STAGES: gl.constexpr, UNIT: gl.constexpr,
    NUMBER: gl.constexpr,
):  # fmt: skip
    x_smem, w_smem, out_smem, full, empty, ends, h, a, E, M, I, columns, programs = shared
    dtype: gl.constexpr = h.dtype.element_ty
    own = out_smem.index(NUMBER)
    C: gl.constexpr = out_smem.shape[2]  # columns that are stored at a time: registers are few
    next_tile = gl.program_id(0)
    start, step = next_tile * 0, next_tile * 0
    for expert in range(E):
        end = gl.load(ends + expert)
        rows = gl.cdiv(end - start, 2 * GROUP)
        for tile in range(next_tile, rows * columns, programs):
            row, column = _swizzle(tile, rows, columns)
            gate, up, step = _multiply(x_smem, w_smem, full, empty, step, M, WIDE, 2, STAGES, NUMBER)
            row = start + (2 * row + NUMBER) * GROUP
            column = column * COLUMNS
            gate_BC, gate_BC2 = _halves(gate)
            up_BC, up_BC2 = _halves(up)
            for part in gl.static_range(2):
                at_BC, here_BC = _place(row, end, column + part * C, I, 2 * I, UNIT, C)
                gate_BC = _by_rows(gate_BC.to(dtype), own)
                gl.store(h + at_BC, gate_BC, mask=here_BC)
                up_BC = _by_rows(up_BC.to(dtype), own)
                gl.store(h + I // UNIT * UNIT + at_BC, up_BC, mask=here_BC)
                # Of the rounded h, which is what backward will see.
                a_BC, _, _ = _activate(gate_BC.to(gl.float32), up_BC.to(gl.float32), ACTIVATION)
                at_BC, here_BC = _place(row, end, column + part * C, I, I, UNIT, C)
                gl.store(a + at_BC, a_BC.to(dtype), mask=here_BC)
                gate_BC, up_BC = gate_BC2, up_BC2
        next_tile = _next_share(next_tile, rows * columns, programs)
        start = end


@gluon.jit
def _part_of_h(h, row, end, column, I, UNIT: gl.constexpr, C: gl.constexpr):
    """→ (B, C) each: gate and up, 0 where there are none."""
    at_BC, here_BC = _place(row, end, column, I, 2 * I, UNIT, C)
    gate_BC = gl.load(h + at_BC, mask=here_BC, other=0.0)
    return gate_BC, gl.load(h + I // UNIT * UNIT + at_BC, mask=here_BC, other=0.0)


@gluon.jit
def _down_backward_consumer(
    shared, K: gl.constexpr, ACTIVATION: gl.constexpr, WIDE: gl.constexpr, STAGES: gl.constexpr,
    UNIT: gl.constexpr, NUMBER: gl.constexpr,
):  # fmt: skip
    (
        x_smem, w_smem, full, empty, ends, h, weight, token, slot, dh, weighted_a, parts,
        E, M, I, N, columns, programs,
    ) = shared  # fmt: skip
    dtype: gl.constexpr = h.dtype.element_ty
    C: gl.constexpr = COLUMNS // 4  # columns that are worked on at a time: registers are few
    rows_of: gl.constexpr = gl.BlockedLayout([1, 8], [256 // C, C // 8], [4, 1], [1, 0])
    next_tile = gl.program_id(0)
    start, step = next_tile * 0, next_tile * 0
    for expert in range(E):
        end = gl.load(ends + expert)
        rows = gl.cdiv(end - start, 2 * GROUP)
        for tile in range(next_tile, rows * columns, programs):
            row, column = _swizzle(tile, rows, columns)
            at = start + (2 * row + NUMBER) * GROUP
            first = column * COLUMNS
            # h is asked for two parts ahead of its use, the first before the product, which hides that it takes time.
            gate_BC, up_BC = _part_of_h(h, at, end, first, I, UNIT, C)
            gate_BC2, up_BC2 = _part_of_h(h, at, end, first + C, I, UNIT, C)
            row_B = at + gl.arange(0, GROUP, layout=gl.SliceLayout(1, rows_of))
            pair_B = gl.minimum(row_B, end - 1)
            weight_at_B = gl.load(token + pair_B).to(gl.int64) * K + gl.load(slot + pair_B)
            weight_B = gl.load(weight + weight_at_B).to(gl.float32)
            da, _, step = _multiply(x_smem, w_smem, full, empty, step, M, WIDE, 1, STAGES, NUMBER)
            half_BC, half_BC2 = _halves(da)  # before the token's weight
            part_B = gl.zeros([GROUP], gl.float32, gl.SliceLayout(1, rows_of))
            for quarter in gl.static_range(4):
                if quarter % 2 == 0:
                    da_BC, da_BC2 = _halves(half_BC)
                da_rows_BC = gl.convert_layout(da_BC, rows_of)
                a_BC, slope_BC, slope_up_BC = _activate(gate_BC.to(gl.float32), up_BC.to(gl.float32), ACTIVATION)
                gate_BC, up_BC = gate_BC2, up_BC2
                if quarter < 2:
                    gate_BC2, up_BC2 = _part_of_h(h, at, end, first + (quarter + 2) * C, I, UNIT, C)
                at_BC, here_BC = _place(at, end, first + quarter * C, I, 2 * I, UNIT, C)
                if parts is not None:  # columns behind the last have an a of 0, but maybe a da that is not finite
                    part_B += gl.sum(gl.where(here_BC, da_rows_BC * a_BC, 0.0), 1)
                da_rows_BC = da_rows_BC * weight_B[:, None]
                gl.store(dh + at_BC, (da_rows_BC * slope_BC).to(dtype), mask=here_BC)
                gl.store(dh + I // UNIT * UNIT + at_BC, (da_rows_BC * slope_up_BC).to(dtype), mask=here_BC)
                if weighted_a is not None:
                    at_BC, here_BC = _place(at, end, first + quarter * C, I, I, UNIT, C)
                    gl.store(weighted_a + at_BC, (a_BC * weight_B[:, None]).to(dtype), mask=here_BC)
                da_BC = da_BC2
                if quarter == 1:
                    half_BC = half_BC2
            if parts is not None:
                gl.store(parts + column.to(gl.int64) * N + row_B, part_B, mask=row_B < end)
        next_tile = _next_share(next_tile, rows * columns, programs)
        start = end


@gluon.jit
def _barriers(STAGES: gl.constexpr, ARRIVALS: gl.constexpr):
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=ARRIVALS)
        mbarrier.init(empty.index(stage), count=2)
    return full, empty


@gluon.jit
def _ring(dtype: gl.constexpr, w, HALVES: gl.constexpr, STAGES: gl.constexpr, ARRIVALS: gl.constexpr):
    """→ stages of rows and of weights, and their barriers."""
    rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([GROUP, DEPTH], dtype)
    x_smem = gl.allocate_shared_memory(dtype, [2 * STAGES, GROUP, DEPTH], rows)
    tile: gl.constexpr = w.block_type.shape
    w_smem = gl.allocate_shared_memory(w.dtype, [HALVES * STAGES, tile[0], tile[1], tile[2]], w.layout)
    full, empty = _barriers(STAGES, ARRIVALS)
    return x_smem, w_smem, full, empty


@gluon.jit
def _out_smem(dtype: gl.constexpr):
    """→ what each group stores half of its columns through."""
    half: gl.constexpr = COLUMNS // 2
    parts: gl.constexpr = gl.NVMMASharedLayout.get_default_for([GROUP, half], dtype)
    return gl.allocate_shared_memory(dtype, [2, GROUP, half], parts)


@gluon.jit
def _hopper_grouped_mm(
    x, w, ends, out, E, L, P, programs, WIDE: gl.constexpr, STAGES: gl.constexpr, UNIT: gl.constexpr
):
    dtype: gl.constexpr = out.dtype.element_ty
    x_smem, w_smem, full, empty = _ring(dtype, w, 2, STAGES, 1)
    out_smem = _out_smem(dtype)
    columns = gl.cdiv(P, 2 * COLUMNS)
    width = columns * 0 + 2 * COLUMNS
    fetched = x, w, x_smem, w_smem, full, empty, ends, E, L, columns, width, width // 2, programs
    shared = x_smem, w_smem, out_smem, full, empty, ends, out, E, L, P, columns, programs
    gl.warp_specialize(
        [
            (_grouped_mm_consumer, (shared, WIDE, STAGES, UNIT, 0)),
            (_grouped_mm_consumer, (shared, WIDE, STAGES, UNIT, 1)),
            (_producer, (fetched, WIDE, 2, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _hopper_up(
    x, x_stride, w, token, ends, h, a, E, M, I, programs,
    ACTIVATION: gl.constexpr, WIDE: gl.constexpr, STAGES: gl.constexpr, UNIT: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = h.dtype.element_ty
    x_smem, w_smem, full, empty = _ring(dtype, w, 2, STAGES, 2)
    out_smem = _out_smem(dtype)
    columns = gl.cdiv(I, COLUMNS)
    width = columns * 0 + COLUMNS
    fetched = x, x_stride, token, w, x_smem, w_smem, full, empty, ends, E, M, columns, width, I, programs
    shared = x_smem, w_smem, out_smem, full, empty, ends, h, a, E, M, I, columns, programs
    gl.warp_specialize(
        [
            (_up_consumer, (shared, ACTIVATION, WIDE, STAGES, UNIT, 0)),
            (_up_consumer, (shared, ACTIVATION, WIDE, STAGES, UNIT, 1)),
            (_gather_producer, (fetched, WIDE, 2, STAGES, UNIT)),
        ],
        [4, 4],
        [208, 88],
    )


@gluon.jit
def _hopper_down_backward(
    dout, dout_stride, w, h, weight, token, slot, ends, dh, weighted_a, parts, E, M, I, N, programs,
    K: gl.constexpr, ACTIVATION: gl.constexpr, WIDE: gl.constexpr, STAGES: gl.constexpr, UNIT: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = h.dtype.element_ty
    x_smem, w_smem, full, empty = _ring(dtype, w, 1, STAGES, 2)
    columns = gl.cdiv(I, COLUMNS)
    width = columns * 0 + COLUMNS
    fetched = dout, dout_stride, token, w, x_smem, w_smem, full, empty, ends, E, M, columns, width, width, programs
    shared = (
        x_smem, w_smem, full, empty, ends, h, weight, token, slot, dh, weighted_a, parts,
        E, M, I, N, columns, programs,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_down_backward_consumer, (shared, K, ACTIVATION, WIDE, STAGES, UNIT, 0)),
            (_down_backward_consumer, (shared, K, ACTIVATION, WIDE, STAGES, UNIT, 1)),
            (_gather_producer, (fetched, WIDE, 1, STAGES, UNIT)),
        ],
        [4, 4],
        [208, 88],
    )
