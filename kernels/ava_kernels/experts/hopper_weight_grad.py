"""The gradients of the experts' weights for Hopper: the kernel that `hopper.weight_grad` launches; see there.

A tile is 128 rows and two times 128 columns of one expert's gradient, a sum over that expert's rows.

Shape suffixes: B rows of a consumer, C columns, L what is multiplied and added at a time.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ava_kernels.experts.hopper_kernels import COLUMNS, DEPTH, _barriers, _halves, _out_smem, _place, _store, _swizzle
from ava_kernels.hopper import GROUP, clear_behind, fetch


@gluon.jit
def _tile_of_sums(tile, ends, rows, columns):
    """→ a tile's expert, its row and column among that expert's, and the first and the end of what it sums over."""
    expert = tile // (rows * columns)
    row, column = _swizzle(tile - expert * rows * columns, rows, columns)
    start = gl.load(ends + (expert - 1), mask=expert > 0, other=0)
    return expert, row, column, start, gl.load(ends + expert)


@gluon.jit
def _weight_grad_producer(shared, GATHERED: gl.constexpr, STAGES: gl.constexpr, UNIT: gl.constexpr):
    """What the producer warps do where an expert's rows are summed over: those of one side are GATHERED by token, 0 for
    the left and 1 for the right, those of the other lie side by side."""
    (
        x, x_stride, token, y, left_smem, right_smem, full, empty, ends, E, M, P, rows, columns, programs,
    ) = shared  # fmt: skip
    late: gl.constexpr = STAGES - 2
    C: gl.constexpr = COLUMNS if GATHERED else GROUP
    rows_of: gl.constexpr = gl.BlockedLayout([1, 8], [256 // C, C // 8], [4, 1], [1, 0])
    x_stride = x_stride // UNIT * UNIT
    limit = (P if GATHERED else M) // UNIT * UNIT
    step = gl.program_id(0) * 0
    row_L = gl.arange(0, DEPTH, layout=gl.SliceLayout(1, rows_of))
    column_C = gl.arange(0, C, layout=gl.SliceLayout(0, rows_of))
    for tile in range(gl.program_id(0), E * rows * columns, programs):
        _, row, column, start, end = _tile_of_sums(tile, ends, rows, columns)
        first, first_other = row * (2 * GROUP), column * (2 * COLUMNS)
        if GATHERED:
            first, first_other = first_other, first
        for at in range(start, end, DEPTH):
            stage, phase = step % STAGES, step // STAGES & 1
            token_L = gl.load(token + gl.minimum(at + row_L, end - 1)).to(gl.int64)
            x_LC = x + (token_L * x_stride)[:, None] + (first + column_C)[None, :]
            here_L = (at + row_L < end)[:, None]
            mbarrier.wait(empty.index(stage), phase ^ 1)
            mbarrier.expect(full.index(stage), 2 * y.block_type.nbytes)
            for half in gl.static_range(2):
                if GATHERED:
                    fetch(y, [at, first_other + half * GROUP], full.index(stage), left_smem.index(2 * stage + half))
                    to = right_smem.index(2 * stage + half)
                else:
                    fetch(y, [at, first_other + half * COLUMNS], full.index(stage), right_smem.index(2 * stage + half))
                    to = left_smem.index(2 * stage + half)
                here_LC = here_L & (first + half * C + column_C < limit)[None, :]
                async_copy.async_copy_global_to_shared(to, x_LC + half * C, mask=here_LC)
            async_copy.commit_group()
            async_copy.wait_group(late)  # all of these warps: the compiler puts their barrier behind it
            hopper.fence_async_shared()
            if step >= late:
                mbarrier.arrive(full.index((step - late) % STAGES))
            step += 1
    async_copy.wait_group(0)
    hopper.fence_async_shared()
    for landed in range(gl.maximum(step - late, 0), step):
        mbarrier.arrive(full.index(landed % STAGES))


@gluon.jit
def _weight_grad_consumer(
    shared, GATHERED: gl.constexpr, STAGES: gl.constexpr, UNIT: gl.constexpr, NUMBER: gl.constexpr
):
    (
        left_smem, right_smem, out_smem, full, empty, ends, out, stride_e, stride_m, E, M, P, rows, columns, programs,
    ) = shared  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    dtype: gl.constexpr = out.dtype.element_ty
    own = out_smem.index(NUMBER)
    C: gl.constexpr = out_smem.shape[2]
    step = gl.program_id(0) * 0
    for tile in range(gl.program_id(0), E * rows * columns, programs):
        expert, row, column, start, end = _tile_of_sums(tile, ends, rows, columns)
        first_BC = gl.zeros([GROUP, COLUMNS], gl.float32, layout)
        second_BC = gl.zeros([GROUP, COLUMNS], gl.float32, layout)
        begun = step
        for at in range(start, end, DEPTH):
            stage, phase = step % STAGES, step // STAGES & 1
            left_LB = left_smem.index(2 * stage + NUMBER)
            right_LC, right_LC2 = right_smem.index(2 * stage), right_smem.index(2 * stage + 1)
            mbarrier.wait(full.index(stage), phase)
            if at + DEPTH > end:  # rows of the next expert, or of none; those that were gathered are 0
                if GATHERED:
                    clear_behind(left_LB, end - at)
                else:
                    clear_behind(right_LC, end - at)
                    clear_behind(right_LC2, end - at)
            first = hopper.warpgroup_mma(left_LB.permute((1, 0)), right_LC, first_BC, is_async=True)
            second = hopper.warpgroup_mma(left_LB.permute((1, 0)), right_LC2, second_BC, is_async=True)
            first_BC, second_BC = hopper.warpgroup_mma_wait(2, deps=(first, second))
            if step > begun:
                mbarrier.arrive(empty.index((step - 1) % STAGES))
            step += 1
        first_BC, second_BC = hopper.warpgroup_mma_wait(0, deps=(first_BC, second_BC))
        if step > begun:
            mbarrier.arrive(empty.index((step - 1) % STAGES))
        row, column = (2 * row + NUMBER) * GROUP, column * (2 * COLUMNS)
        to = out + expert.to(gl.int64) * (stride_e // UNIT * UNIT)
        for _half in gl.static_range(2):
            left_BC, right_BC = _halves(first_BC)
            at_BC, here_BC = _place(row, M, column, P, stride_m, UNIT, C)
            _store(to, left_BC.to(dtype), own, at_BC, here_BC)
            at_BC, here_BC = _place(row, M, column + C, P, stride_m, UNIT, C)
            _store(to, right_BC.to(dtype), own, at_BC, here_BC)
            first_BC, column = second_BC, column + COLUMNS


@gluon.jit
def _hopper_weight_grad(
    x, x_stride, token, y, ends, out, stride_e, stride_m, E, M, P, programs,
    GATHERED: gl.constexpr, STAGES: gl.constexpr, UNIT: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = out.dtype.element_ty
    left: gl.constexpr = gl.NVMMASharedLayout.get_default_for([DEPTH, GROUP], dtype)
    right: gl.constexpr = gl.NVMMASharedLayout.get_default_for([DEPTH, COLUMNS], dtype)
    left_smem = gl.allocate_shared_memory(dtype, [2 * STAGES, DEPTH, GROUP], left)
    right_smem = gl.allocate_shared_memory(dtype, [2 * STAGES, DEPTH, COLUMNS], right)
    out_smem = _out_smem(dtype)
    full, empty = _barriers(STAGES, 2)
    rows, columns = gl.cdiv(M, 2 * GROUP), gl.cdiv(P, 2 * COLUMNS)
    fetched = x, x_stride, token, y, left_smem, right_smem, full, empty, ends, E, M, P, rows, columns, programs
    shared = (
        left_smem, right_smem, out_smem, full, empty, ends, out, stride_e, stride_m, E, M, P, rows, columns, programs,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_weight_grad_consumer, (shared, GATHERED, STAGES, UNIT, 0)),
            (_weight_grad_consumer, (shared, GATHERED, STAGES, UNIT, 1)),
            (_weight_grad_producer, (fetched, GATHERED, STAGES, UNIT)),
        ],
        [4, 4],
        [224, 56],
    )
