"""The experts' grouped GEMMs in Triton: four launches forward, seven backward make the MLP, and none depends on data.

    _up             forward   h = x_t · W1_e, its rows gathered by token; a = activation(h) in the epilogue
    _grouped_mm     forward   y = a · W2_e; backward the same for dx, before a token's rows are added up
    _down_backward  backward  da = dout_t · W2_eᵀ, gathered by token; the epilogue makes dh, weight · a and d weight
    _weight_grad    backward  dW1 and dW2, the rows of one side gathered by token
    _invert         both      where each pair's row is, for adding up its token's rows (`row_kernels.py`)
    _add_parts      backward  d weight from the parts that the tiles of `_down_backward` made of it

An expert's rows are ends[e-1] … ends[e]-1, cut into tiles of BM rows; the last one is masked, and nothing is padded in
memory. The kernels are persistent: every program goes through the tiles of all experts in steps of the number of
programs, so the grid does not depend on how the tokens fell. Within an expert the tiles are swizzled: G tiles of rows
go through the columns together, so that what they share stays in the L2 cache.

On sm_90 and later, weights and contiguous rows are loaded by TMA, if `_descriptor` can make a descriptor of them;
gathered rows are loaded by cp.async on every device. Offsets are 64 bits wide; numbers of rows, tiles and columns fit
into 32. Products are accumulated in float32, every sum has a fixed order.

Shape suffixes: B rows of a tile, C its columns, L what is multiplied and added at a time, E experts, padded to a power
of two.
"""

from __future__ import annotations

import functools
import math
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ava_kernels.dot import float32_is_exact, tile_dot
from ava_kernels.experts import row_kernels
from ava_kernels.experts.reference import GATED
from ava_kernels.experts.tiles import Tile, tile_for
from ava_kernels.tiles import capability

PAIRS = 1024  # of a block of `_invert` and `_add_parts`

# How an operand is fetched.
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
POINTERS: tl.constexpr = tl.constexpr(0)
DESCRIPTOR: tl.constexpr = tl.constexpr(1)  # what is summed over lies side by side
DESCRIPTOR_T: tl.constexpr = tl.constexpr(2)  # the columns of the result do


def forward(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weight: Tensor,
    token: Tensor,
    slot: Tensor,
    ends: Tensor,
    activation: str,
    on_hopper: bool = False,
) -> tuple[Tensor, Tensor]:
    """`reference.forward` on the device, without waiting for it; `on_hopper`, by `hopper.py` where that can."""
    (E, H, M), I, N = gate_up.shape, down.shape[2], len(token)
    x = _with_whole_rows(x)
    h, a = x.new_empty(N, H), x.new_empty(N, I)
    if not (on_hopper and _for_hopper().up(x, gate_up, token, ends, h, a, activation)):
        _launch_up(x, gate_up, token, ends, h, a, activation)
    y = _launch_grouped_mm(a, down.mT, ends, tile_for("grouped_mm", x, E, M, I), on_hopper=on_hopper)
    return row_kernels.sum_rows(y, _row_of_pair(token, slot, ends, weight.shape), weight), h


def _for_hopper() -> ModuleType:
    from ava_kernels.experts import hopper  # Gluon is not in every Triton

    return hopper


def _launch_up(x: Tensor, gate_up: Tensor, token: Tensor, ends: Tensor, h: Tensor, a: Tensor, activation: str) -> None:
    """h (N, H) and a (N, I), of rows of x (T, M)."""
    (E, _, M), (N, I) = gate_up.shape, a.shape
    t = tile_for("up", x, E, M, I)
    w, w_strides, W = _right(gate_up.mT, t.BN, t.BK)
    _up[_grid(t, x.device, N, E, I)](
        x,
        x.stride(0),
        w,
        *w_strides,
        token,
        ends,
        h,
        a,
        E,
        M,
        I,
        ACTIVATION=activation,
        GATED=activation in GATED,
        W=W,
        WHOLE=M % t.BK == 0,
        **_constants(t, x, E, M, I),
    )


def backward(
    dout: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weight: Tensor,
    token: Tensor,
    slot: Tensor,
    ends: Tensor,
    h: Tensor,
    activation: str,
    needs: list[bool],
    gate_up_sum: Tensor | None,
    down_sum: Tensor | None,
    on_hopper: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """`reference.backward` on the device, without waiting for it; `on_hopper`, by `hopper.py` where that can."""
    (E, H, M), I, N = gate_up.shape, down.shape[2], len(token)
    needs_x, needs_gate_up, needs_down, needs_weight = needs
    x, dout, weight = _with_whole_rows(x), _with_whole_rows(dout), weight.contiguous()
    dx = dgate_up = ddown = dweight = None
    dh = x.new_empty(N, H)
    weighted_a = x.new_empty(N, I) if needs_down else None
    product = dout, down, h, weight, token, slot, ends, dh, weighted_a, needs_weight, activation
    done, parts = _for_hopper().down_backward(*product) if on_hopper else (False, None)
    if not done:
        parts = _launch_down_backward(*product)
    row = _row_of_pair(token, slot, ends, weight.shape)
    t = tile_for("weight_grad", x, E, M, I)
    if weighted_a is not None:
        ddown = torch.empty_like(down) if down_sum is None else down_sum
        _launch_weight_grad(dout, token, weighted_a, None, ends, ddown, down_sum is not None, t, on_hopper)
        del weighted_a, product  # what follows may have its memory
    if needs_gate_up:
        dgate_up = torch.empty_like(gate_up) if gate_up_sum is None else gate_up_sum
        _launch_weight_grad(dh, None, x, token, ends, dgate_up, gate_up_sum is not None, t, on_hopper)
    if needs_x:
        dx_rows = _launch_grouped_mm(dh, gate_up, ends, tile_for("grouped_mm", x, E, M, I), on_hopper=on_hopper)
        dx = row_kernels.sum_rows(dx_rows, row, None)
    if parts is not None:
        dweight = torch.empty_like(weight)
        _add_parts[(triton.cdiv(N, PAIRS),)](parts, row, dweight, len(parts), N, B=PAIRS)
    return dx, dgate_up, ddown, dweight


def _launch_down_backward(
    dout: Tensor,
    down: Tensor,
    h: Tensor,
    weight: Tensor,
    token: Tensor,
    slot: Tensor,
    ends: Tensor,
    dh: Tensor,
    weighted_a: Tensor | None,
    needs_weight: bool,
    activation: str,
) -> Tensor | None:
    """dh (N, H) and weighted_a (N, I), of rows of dout (T, M) → the parts (·, N) of weight's gradient, float32."""
    (E, M, I), N = down.shape, len(token)
    t = tile_for("down_backward", dout, E, M, I)
    w, w_strides, W = _right(down, t.BN, t.BK)
    parts = dout.new_empty(triton.cdiv(I, t.BN), N, dtype=torch.float32) if needs_weight else None
    _down_backward[_grid(t, dout.device, N, E, I)](
        dout,
        dout.stride(0),
        w,
        *w_strides,
        h,
        weight,
        token,
        slot,
        ends,
        dh,
        weighted_a,
        parts,
        E,
        M,
        I,
        N,
        K=weight.shape[1],
        ACTIVATION=activation,
        GATED=activation in GATED,
        W=W,
        WHOLE=M % t.BK == 0,
        **_constants(t, dout, E, M, I),
    )
    return parts


def grouped_mm(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """`reference.grouped_mm` on the device, without waiting for it. Rows of no expert are 0."""
    E = len(ends)
    if w.dim() == 3:
        return _launch_grouped_mm(x, w, ends, tile_for("grouped_mm", x, E, w.shape[2], w.shape[1]), zero_the_rest=True)
    out = x.new_empty(E, x.shape[0], w.shape[1])
    _launch_weight_grad(x.mT, None, w, None, ends, out, False, tile_for("weight_grad", x, E, x.shape[0], w.shape[1]))
    return out


def _launch_grouped_mm(
    x: Tensor, w: Tensor, ends: Tensor, t: Tile, zero_the_rest: bool = False, on_hopper: bool = False
) -> Tensor:
    """x (N, L), w (E, L, P) → (N, P): each expert's rows times its weight; the rows of no expert are not written."""
    (N, L), (E, _, P) = x.shape, w.shape
    out = x.new_empty(N, P)
    if on_hopper and _for_hopper().grouped_mm(x, w, ends, out):
        return out
    left, X = _left(x, t.BM, t.BK)
    w, w_strides, W = _right(w, t.BN, t.BK)
    _grouped_mm[_grid(t, x.device, N, E + 1, P)](
        left,
        *x.stride(),
        w,
        *w_strides,
        ends,
        out,
        E,
        L,
        P,
        N,
        X=X,
        W=W,
        WHOLE=L % t.BK == 0,
        ZERO_THE_REST=zero_the_rest,
        **_constants(t, x, E, L, P),
    )
    return out


def _launch_weight_grad(
    x: Tensor,
    x_token: Tensor | None,
    y: Tensor,
    y_token: Tensor | None,
    ends: Tensor,
    out: Tensor,
    accumulate: bool,
    t: Tile,
    on_hopper: bool = False,
) -> None:
    """out (E, M, P) = or += Σ over an expert's rows of x (·, M)ᵀ · y (·, P), whose rows lie in the experts' order, or
    are named by token (N,)."""
    if out.stride(1) == 1 < out.stride(2):  # transposed: so is what is computed, that what is stored lies side by side
        out, x, x_token, y, y_token = out.mT, y, y_token, x, x_token
    if on_hopper and not accumulate and _for_hopper().weight_grad(x, x_token, y, y_token, ends, out):
        return
    E, M, P = out.shape
    tiles = E * triton.cdiv(M, t.BM) * triton.cdiv(P, t.BN)
    constants = _constants(t, x, E, M, P, y.stride(0), *out.stride()[:2])
    del constants["EXPERTS"]
    left, X = _left(x, t.BK, t.BM) if x_token is None else (x, POINTERS.value)
    right, Y = _left(y, t.BK, t.BN) if y_token is None else (y, POINTERS)
    _weight_grad[(min(tiles, t.programs * _processors(x.device)),)](
        left,
        *x.stride(),
        x_token,
        right,
        *y.stride(),
        y_token,
        ends,
        out,
        *out.stride(),
        E,
        M,
        P,
        X=X,
        Y=Y,
        WHOLE=M % t.BM == 0 and P % t.BN == 0,
        ACCUMULATE=accumulate,
        **constants,
    )


def _row_of_pair(token: Tensor, slot: Tensor, ends: Tensor, shape: torch.Size) -> Tensor:
    """(T, K) int32: the row that holds each pair, -1 where none does."""
    row = token.new_empty(shape)
    _invert[(triton.cdiv(len(token), PAIRS),)](token, slot, ends, row, len(ends), len(token), K=shape[1], B=PAIRS)
    return row


def _left(x: Tensor, rows: int, columns: int) -> tuple[Tensor | TensorDescriptor, int]:
    """x (N, L) as it is given to a kernel that fetches tiles (rows, columns) of it, and how it fetches them."""
    descriptor = _descriptor(x, rows, columns)
    return (x, POINTERS.value) if descriptor is None else (descriptor, DESCRIPTOR.value)


def _right(w: Tensor, columns: int, depth: int) -> tuple[Tensor | TensorDescriptor, tuple[int, ...], int]:
    """w (E, L, P) as it is given to a kernel that fetches tiles (depth, columns) of one expert, w's strides, and how it
    fetches them.

    All experts together are one matrix to the descriptor. A tile that reaches over an expert's end then holds the
    next one's numbers: in columns that are not stored, but in L it must not.
    """
    _, L, P = w.shape
    strides = w.stride()
    if strides[0] == P * strides[2] and (descriptor := _descriptor(_merged(w.mT), columns, depth)):
        return descriptor, strides, DESCRIPTOR.value
    if L % depth == 0 and strides[0] == L * strides[1] and (descriptor := _descriptor(_merged(w), depth, columns)):
        return descriptor, strides, DESCRIPTOR_T.value
    return w, strides, POINTERS.value


def _merged(w: Tensor) -> Tensor:
    """(E, R, C) → (E·R, C), a view: the experts lie R rows apart."""
    return w.as_strided((w.shape[0] * w.shape[1], w.shape[2]), w.stride()[1:])


def _descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor | None:
    """For tiles of a matrix, or None where the device has no such thing or the matrix is not what it takes: its rows
    whole, 16 bytes aligned and not overlapping."""
    aligned = x.stride(1) == 1 and x.stride(0) >= x.shape[1] and x.stride(0) * x.element_size() % 16 == 0
    if not (aligned and x.numel() and x.data_ptr() % 16 == 0 and _has_accelerator(x.device)):
        return None
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])


def _has_accelerator(device: torch.device) -> bool:
    return capability(device) >= (9, 0)


@functools.cache
def _processors(device: torch.device) -> int:
    """Without a GPU: an H200's, or in the interpreter so few that a program has several tiles."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 3


def _grid(t: Tile, device: torch.device, N: int, E: int, columns: int) -> tuple[int]:
    """As many programs as are resident, or as there can be tiles at most."""
    tiles = (N // t.BM + min(E, N)) * triton.cdiv(columns, t.BN)
    return (min(tiles, t.programs * _processors(device)),)


def _constants(t: Tile, x: Tensor, E: int, *sizes: int) -> dict[str, Any]:
    """What all products are compiled with. float32 is multiplied as torch multiplies it. UNIT elements, a power of two,
    divide x's row stride and all sizes: wide loads need to know."""
    exact = x.dtype != torch.float32 or float32_is_exact()
    return {
        "PRECISION": "ieee" if exact else "tf32",
        "UNIT": math.gcd(16, x.stride(0), *sizes),
        "EXPERTS": triton.next_power_of_2(E),
        "BM": t.BM,
        "BN": t.BN,
        "BK": t.BK,
        "G": t.G,
        "num_warps": t.warps,
        "num_stages": t.stages,
    }


def _with_whole_rows(x: Tensor) -> Tensor:
    """x, or a copy where the elements of a row are not side by side."""
    return x if x.stride(1) == 1 else x.contiguous()


@triton.jit
def _multiple(size, UNIT: tl.constexpr):
    """→ size, which UNIT divides, in a form from which the compiler sees that it does. (It passes over tl.multiple_of
    an argument, and looks at arguments for a divisor of 16 alone.)"""
    return size // UNIT * UNIT


@triton.jit
def _tiles_of_experts(ends_ptr, E, BM: tl.constexpr, EXPERTS: tl.constexpr):
    """→ how many tiles of rows each expert has, and how many it and those before it have."""
    expert_E = tl.arange(0, EXPERTS)
    end_E = tl.load(ends_ptr + expert_E, mask=expert_E < E, other=0)
    start_E = tl.load(ends_ptr + expert_E - 1, mask=(expert_E > 0) & (expert_E < E), other=0)
    tiles_E = tl.cdiv(end_E - start_E, BM)
    return tiles_E, tl.cumsum(tiles_E, axis=0)


@triton.jit
def _find(tile, ends_ptr, tiles_E, until_E, columns, EXPERTS: tl.constexpr, BM: tl.constexpr, G: tl.constexpr):
    """→ a tile's expert, the first and the end of its rows, and its number among the `columns` tiles of columns."""
    over_E = until_E * columns <= tile
    expert = tl.sum(over_E.to(tl.int32), axis=0)
    before = tl.max(tl.where(over_E, until_E, 0), axis=0)
    tiles = tl.sum(tl.where(tl.arange(0, EXPERTS) == expert, tiles_E, 0), axis=0)
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    row, column = _swizzle(tile - before * columns, tiles, columns, G)
    return expert, start + row * BM, tl.load(ends_ptr + expert), column


@triton.jit
def _swizzle(tile, rows, columns, G: tl.constexpr):
    """→ row and column of a tile, when G tiles of rows go through the columns together."""
    group = tile // (G * columns)
    height = tl.minimum(rows - group * G, G)
    within = tile - group * G * columns
    return group * G + within % height, within // height


@triton.jit
def _left_tile(
    x, offset_B, row, stride, at, L, X: tl.constexpr, WHOLE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr
):
    """→ (BM, BK): rows at offset_B, or from `row` on, columns from `at` on, 0 from L on."""
    if X == DESCRIPTOR:
        x_BL = x.load([row, at])
    else:
        at_L = at + tl.arange(0, BK)
        where = x + offset_B[:, None] + at_L[None, :].to(tl.int64) * stride
        if WHOLE:
            x_BL = tl.load(where)
        else:
            x_BL = tl.load(where, mask=(at_L < L)[None, :], other=0.0)
    return x_BL


@triton.jit
def _right_tile(
    w, stride_e, stride_l, stride_p, expert, at, column, L, P, W: tl.constexpr, WHOLE: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """→ (BK, BN): one expert's rows from `at` on, 0 from L on, and columns from `column` on."""
    if W == DESCRIPTOR:
        w_LC = tl.trans(w.load([expert * P + column, at]))
    elif W == DESCRIPTOR_T:
        w_LC = w.load([expert * L + at, column])
    else:
        at_L = at + tl.arange(0, BK)
        column_C = column + tl.arange(0, BN)
        where = w + expert.to(tl.int64) * stride_e + at_L[:, None].to(tl.int64) * stride_l
        where += column_C[None, :].to(tl.int64) * stride_p
        if WHOLE:
            w_LC = tl.load(where, mask=(column_C < P)[None, :], other=0.0)
        else:
            w_LC = tl.load(where, mask=(at_L < L)[:, None] & (column_C < P)[None, :], other=0.0)
    return w_LC


@triton.jit
def _halves(x_BC):
    """→ the left and the right half of the columns. What is done to a tile at the end is done to one part after the
    other, or it would not fit into the registers."""
    x_BC = tl.reshape(x_BC, (x_BC.shape[0], 2, x_BC.shape[1] // 2))
    return tl.split(tl.permute(x_BC, (0, 2, 1)))


@triton.jit
def _gelu(h):
    """→ gelu(h) = h · Φ(h) and its slope."""
    share = 0.5 + 0.5 * tl.erf(h * 0.7071067811865476)
    return h * share, share + h * tl.exp2(h * h * (-0.5 * LOG2E)) * 0.3989422804014327


@triton.jit
def _silu(h):
    """→ silu(h) and its slope. The sigmoid is a square of a root, which is half the instructions of a division."""
    root = tl.rsqrt(1.0 + tl.exp2(h * -LOG2E))
    share = root * root
    return h * share, share * (1.0 + h * (1.0 - share))


@triton.jit
def _activate(gate, up, ACTIVATION: tl.constexpr):
    """→ a, and its slopes along gate and up. `up` counts in gated activations alone, and so does the second slope."""
    if ACTIVATION == "relu2":
        positive = tl.where(gate <= 0.0, 0.0, gate)  # a NaN stays one
        a, slope, slope_up = positive * positive, 2.0 * positive, up
    elif ACTIVATION == "gelu":
        a, slope = _gelu(gate)
        slope_up = up
    else:
        if ACTIVATION == "geglu":
            act, slope = _gelu(gate)
        else:
            act, slope = _silu(gate)
        a, slope, slope_up = act * up, slope * up, act
    return a, slope, slope_up


@triton.jit
def _up(
    x, x_stride, w, w_stride_e, w_stride_l, w_stride_p, token_ptr, ends_ptr, h_ptr, a_ptr, E, M, I,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, W: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr, EXPERTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    x_stride, M, I = _multiple(x_stride, UNIT), _multiple(M, UNIT), _multiple(I, UNIT)
    H = 2 * I if GATED else I
    columns = tl.cdiv(I, BN)
    tiles_E, until_E = _tiles_of_experts(ends_ptr, E, BM, EXPERTS)
    for tile in range(tl.program_id(0), tl.max(until_E, axis=0) * columns, tl.num_programs(0)):
        expert, row, end, column = _find(tile, ends_ptr, tiles_E, until_E, columns, EXPERTS, BM, G)
        row_B = row + tl.arange(0, BM)
        # Rows behind the last repeat it: their results are not stored.
        offset_B = tl.load(token_ptr + tl.minimum(row_B, end - 1)).to(tl.int64) * x_stride
        first = column * BN
        gate = tl.zeros([BM, BN], tl.float32)
        up = gate
        for at in range(0, M, BK):
            x_BL = _left_tile(x, offset_B, row, 1, at, M, POINTERS, WHOLE, BM, BK)
            w_LC = _right_tile(w, w_stride_e, w_stride_l, w_stride_p, expert, at, first, M, H, W, WHOLE, BN, BK)
            gate = tile_dot(x_BL, w_LC, gate, PRECISION)
            if GATED:
                w_LC = _right_tile(w, w_stride_e, w_stride_l, w_stride_p, expert, at, I + first, M, H, W, WHOLE, BN, BK)
                up = tile_dot(x_BL, w_LC, up, PRECISION)
        gate_BC, gate_BC2 = _halves(gate)
        up_BC, up_BC2 = _halves(up)
        for half in tl.static_range(2):
            column_C = first + half * (BN // 2) + tl.arange(0, BN // 2)
            here_BC = (row_B < end)[:, None] & (column_C < I)[None, :]
            h_BC = h_ptr + row_B[:, None].to(tl.int64) * H + column_C[None, :]
            dtype = h_ptr.dtype.element_ty
            gate_BC = gate_BC.to(dtype)
            tl.store(h_BC, gate_BC, mask=here_BC)
            if GATED:
                up_BC = up_BC.to(dtype)
                tl.store(h_BC + I, up_BC, mask=here_BC)
            # Of the rounded h, which is what backward will see.
            a, _, _ = _activate(gate_BC.to(tl.float32), up_BC.to(tl.float32), ACTIVATION)
            tl.store(a_ptr + row_B[:, None].to(tl.int64) * I + column_C[None, :], a.to(dtype), mask=here_BC)
            gate_BC, up_BC = gate_BC2, up_BC2


@triton.jit
def _grouped_mm(
    x, x_stride_n, x_stride_l, w, w_stride_e, w_stride_l, w_stride_p, ends_ptr, out_ptr, E, L, P, N,
    X: tl.constexpr, W: tl.constexpr, WHOLE: tl.constexpr, ZERO_THE_REST: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr, EXPERTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    x_stride_n, L, P = _multiple(x_stride_n, UNIT), _multiple(L, UNIT), _multiple(P, UNIT)
    columns = tl.cdiv(P, BN)
    tiles_E, until_E = _tiles_of_experts(ends_ptr, E, BM, EXPERTS)
    tiles = tl.max(until_E, axis=0) * columns
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        expert, row, end, column = _find(tile, ends_ptr, tiles_E, until_E, columns, EXPERTS, BM, G)
        row_B = row + tl.arange(0, BM)
        offset_B = tl.minimum(row_B, end - 1).to(tl.int64) * x_stride_n
        first = column * BN
        out = tl.zeros([BM, BN], tl.float32)
        for at in range(0, L, BK):
            x_BL = _left_tile(x, offset_B, row, x_stride_l, at, L, X, WHOLE, BM, BK)
            w_LC = _right_tile(w, w_stride_e, w_stride_l, w_stride_p, expert, at, first, L, P, W, WHOLE, BN, BK)
            out = tile_dot(x_BL, w_LC, out, PRECISION)
        column_C = first + tl.arange(0, BN)
        where_BC = out_ptr + row_B[:, None].to(tl.int64) * P + column_C[None, :]
        tl.store(where_BC, out.to(out_ptr.dtype.element_ty), mask=(row_B < end)[:, None] & (column_C < P)[None, :])
    if ZERO_THE_REST:
        held = tl.load(ends_ptr + E - 1)
        for tile in range(tl.program_id(0), tl.cdiv(N - held, BM) * columns, tl.num_programs(0)):
            row_B = held + tile // columns * BM + tl.arange(0, BM)
            column_C = tile % columns * BN + tl.arange(0, BN)
            where_BC = out_ptr + row_B[:, None].to(tl.int64) * P + column_C[None, :]
            tl.store(where_BC, 0.0, mask=(row_B < N)[:, None] & (column_C < P)[None, :])


@triton.jit
def _part_of_h(h_ptr, row_B, end, column, I, GATED: tl.constexpr, C: tl.constexpr):
    """→ (B, C) each: gate and up of the rows before `end`, columns from `column` on."""
    column_C = column + tl.arange(0, C)
    here_BC = (row_B < end)[:, None] & (column_C < I)[None, :]
    h_BC = h_ptr + row_B[:, None].to(tl.int64) * (2 * I if GATED else I) + column_C[None, :]
    gate = tl.load(h_BC, mask=here_BC, other=0.0)
    up = gate
    if GATED:
        up = tl.load(h_BC + I, mask=here_BC, other=0.0)
    return gate, up


@triton.jit
def _down_backward(
    dout, dout_stride, w, w_stride_e, w_stride_l, w_stride_p, h_ptr, weight_ptr, token_ptr, slot_ptr, ends_ptr,
    dh_ptr, weighted_a_ptr, parts_ptr, E, M, I, N, K: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, W: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr, EXPERTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    dout_stride, M, I = _multiple(dout_stride, UNIT), _multiple(M, UNIT), _multiple(I, UNIT)
    H = 2 * I if GATED else I
    columns = tl.cdiv(I, BN)
    tiles_E, until_E = _tiles_of_experts(ends_ptr, E, BM, EXPERTS)
    for tile in range(tl.program_id(0), tl.max(until_E, axis=0) * columns, tl.num_programs(0)):
        expert, row, end, column = _find(tile, ends_ptr, tiles_E, until_E, columns, EXPERTS, BM, G)
        row_B = row + tl.arange(0, BM)
        pair_B = tl.minimum(row_B, end - 1)
        token_B = tl.load(token_ptr + pair_B).to(tl.int64)
        weight_B = tl.load(weight_ptr + token_B * K + tl.load(slot_ptr + pair_B)).to(tl.float32)
        offset_B = token_B * dout_stride
        first = column * BN
        # h is asked for one part ahead of its use, the first before the product, which hides that it takes time.
        gate, up = _part_of_h(h_ptr, row_B, end, first, I, GATED, BN // 4)
        da = tl.zeros([BM, BN], tl.float32)  # before the token's weight
        for at in range(0, M, BK):
            dout_BL = _left_tile(dout, offset_B, row, 1, at, M, POINTERS, WHOLE, BM, BK)
            w_LC = _right_tile(w, w_stride_e, w_stride_l, w_stride_p, expert, at, first, M, I, W, WHOLE, BN, BK)
            da = tile_dot(dout_BL, w_LC, da, PRECISION)
        half_BC, half_BC2 = _halves(da)
        part_B = tl.zeros([BM], tl.float32)
        for quarter in tl.static_range(4):
            if quarter % 2 == 0:
                da_BC, da_BC2 = _halves(half_BC)
            column_C = first + quarter * (BN // 4) + tl.arange(0, BN // 4)
            here_BC = (row_B < end)[:, None] & (column_C < I)[None, :]
            at_BC = row_B[:, None].to(tl.int64) * H + column_C[None, :]
            gate_next, up_next = gate, up
            if quarter < 3:
                gate_next, up_next = _part_of_h(h_ptr, row_B, end, first + (quarter + 1) * (BN // 4), I, GATED, BN // 4)
            a, slope, slope_up = _activate(gate.to(tl.float32), up.to(tl.float32), ACTIVATION)
            dtype = dh_ptr.dtype.element_ty
            if parts_ptr is not None:
                part_B += tl.sum(tl.where(here_BC, da_BC * a, 0.0), axis=1)
            if weighted_a_ptr is not None:
                where_BC = weighted_a_ptr + row_B[:, None].to(tl.int64) * I + column_C[None, :]
                tl.store(where_BC, (a * weight_B[:, None]).to(dtype), mask=here_BC)
            da_BC *= weight_B[:, None]
            tl.store(dh_ptr + at_BC, (da_BC * slope).to(dtype), mask=here_BC)
            if GATED:
                tl.store(dh_ptr + at_BC + I, (da_BC * slope_up).to(dtype), mask=here_BC)
            da_BC, gate, up = da_BC2, gate_next, up_next
            if quarter == 1:
                half_BC = half_BC2
        if parts_ptr is not None:
            tl.store(parts_ptr + column.to(tl.int64) * N + row_B, part_B, mask=row_B < end)


@triton.jit
def _rows_of_a_sum(
    x, stride_n, stride_m, token_ptr, row, end, column, M, X: tl.constexpr, WHOLE: tl.constexpr, TAIL: tl.constexpr,
    BK: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """→ (BK, BM): rows from `row` on, or the tokens they name, columns from `column` on; of a TAIL, 0 from `end` on."""
    row_L = row + tl.arange(0, BK)
    here_L = row_L < end
    if X == DESCRIPTOR:
        x_LB = x.load([row, column])
        if TAIL:  # behind the end are the next expert's rows, or none's, where a NaN may stand
            x_LB = tl.where(here_L[:, None], x_LB, 0.0)
    else:
        column_B = column + tl.arange(0, BM)
        if token_ptr is not None:
            if TAIL:
                row_L = tl.load(token_ptr + row_L, mask=here_L, other=0)
            else:
                row_L = tl.load(token_ptr + row_L)
        where = x + row_L[:, None].to(tl.int64) * stride_n + column_B[None, :].to(tl.int64) * stride_m
        if TAIL:
            x_LB = tl.load(where, mask=here_L[:, None] & (column_B < M)[None, :], other=0.0)
        elif WHOLE:
            x_LB = tl.load(where)
        else:
            x_LB = tl.load(where, mask=(column_B < M)[None, :], other=0.0)
    return x_LB


@triton.jit
def _weight_grad(
    x, x_stride_n, x_stride_m, x_token_ptr, y, y_stride_n, y_stride_p, y_token_ptr, ends_ptr,
    out_ptr, out_stride_e, out_stride_m, out_stride_p, E, M, P,
    X: tl.constexpr, Y: tl.constexpr, WHOLE: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    x_stride_n, y_stride_n = _multiple(x_stride_n, UNIT), _multiple(y_stride_n, UNIT)
    M, P = _multiple(M, UNIT), _multiple(P, UNIT)
    out_stride_e, out_stride_m = _multiple(out_stride_e, UNIT), _multiple(out_stride_m, UNIT)
    rows, columns = tl.cdiv(M, BM), tl.cdiv(P, BN)
    for tile in range(tl.program_id(0), E * rows * columns, tl.num_programs(0)):
        expert = tile // (rows * columns)
        row, column = _swizzle(tile - expert * rows * columns, rows, columns, G)
        m, p = row * BM, column * BN
        start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
        end = tl.load(ends_ptr + expert)
        whole_end = end - (end - start) % BK
        out = tl.zeros([BM, BN], tl.float32)
        for at in range(start, whole_end, BK):
            x_LB = _rows_of_a_sum(x, x_stride_n, x_stride_m, x_token_ptr, at, end, m, M, X, WHOLE, False, BK, BM)
            y_LC = _rows_of_a_sum(y, y_stride_n, y_stride_p, y_token_ptr, at, end, p, P, Y, WHOLE, False, BK, BN)
            out = tile_dot(tl.trans(x_LB), y_LC, out, PRECISION)
        if whole_end < end:
            x_LB = _rows_of_a_sum(x, x_stride_n, x_stride_m, x_token_ptr, whole_end, end, m, M, X, WHOLE, True, BK, BM)
            y_LC = _rows_of_a_sum(y, y_stride_n, y_stride_p, y_token_ptr, whole_end, end, p, P, Y, WHOLE, True, BK, BN)
            out = tile_dot(tl.trans(x_LB), y_LC, out, PRECISION)
        m_B, p_C = m + tl.arange(0, BM), p + tl.arange(0, BN)
        where_BC = out_ptr + tl.cast(expert, tl.int64) * out_stride_e
        where_BC += m_B[:, None].to(tl.int64) * out_stride_m + p_C[None, :].to(tl.int64) * out_stride_p
        here_BC = (m_B < M)[:, None] & (p_C < P)[None, :]
        if ACCUMULATE:
            tl.atomic_add(where_BC, out, mask=here_BC, sem="relaxed")  # nobody else adds to it: the bits are the sum's
        else:
            tl.store(where_BC, out.to(out_ptr.dtype.element_ty), mask=here_BC)


@triton.jit
def _invert(token_ptr, slot_ptr, ends_ptr, row_ptr, E, N, K: tl.constexpr, B: tl.constexpr):
    row_B = tl.program_id(0) * B + tl.arange(0, B)
    here_B = row_B < N
    pair_B = tl.load(token_ptr + row_B, mask=here_B, other=0) * K + tl.load(slot_ptr + row_B, mask=here_B, other=0)
    held = tl.load(ends_ptr + E - 1)
    tl.store(row_ptr + pair_B, tl.where(row_B < held, row_B, -1), mask=here_B)


@triton.jit
def _add_parts(parts_ptr, row_ptr, out_ptr, parts, N, B: tl.constexpr):
    pair_B = tl.program_id(0) * B + tl.arange(0, B)
    row_B = tl.load(row_ptr + pair_B, mask=pair_B < N, other=-1)
    sum_B = tl.zeros([B], tl.float32)
    for part in range(parts):
        sum_B += tl.load(parts_ptr + tl.cast(part, tl.int64) * N + row_B, mask=row_B >= 0, other=0.0)
    tl.store(out_ptr + pair_B, sum_B.to(out_ptr.dtype.element_ty), mask=pair_B < N)
