"""Moving rows in Triton: `rows.py` says what is computed. One launch each; none depends on data.

A program of take_rows and sum_rows makes a block of the result, B rows by C columns. All blocks of the same columns
start before any of the next: what is read again, a token for each of its choices, can then still be in the second-level
cache. A program of dot_rows goes through the columns of B pairs.

Shape suffixes: B rows, tokens or pairs of a block, C columns of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Block sizes, powers of two.
COLUMNS = 512  # most columns of a block
ELEMENTS = 4096  # most elements of a block


def take_rows(x: Tensor, pair: Tensor, top_k: int, weight: Tensor | None) -> Tensor:
    """`rows.take_rows`."""
    (T, H), R = x.shape, len(pair)
    out = x.new_empty(R, H)
    if out.numel():
        x = _with_whole_rows(x)
        B, C = _block(R, H)
        _take_rows[(triton.cdiv(R, B), triton.cdiv(H, C))](
            x, x.stride(0), pair.contiguous(), _contiguous(weight), out, R, H, T * top_k, K=top_k, B=B, C=C
        )
    return out


def sum_rows(x: Tensor, row: Tensor, weight: Tensor | None) -> Tensor:
    """`rows.sum_rows`."""
    (R, H), (T, K) = x.shape, row.shape
    out = x.new_empty(T, H)
    if out.numel():
        x = _with_whole_rows(x)
        B, C = _block(T, H)
        _sum_rows[(triton.cdiv(T, B), triton.cdiv(H, C))](
            x, x.stride(0), row.contiguous(), _contiguous(weight), out, R, H, T, K=K, B=B, C=C
        )
    return out


def dot_rows(x: Tensor, row: Tensor, y: Tensor) -> Tensor:
    """`rows.dot_rows`."""
    (R, H), N = x.shape, row.numel()
    if not (N and H):
        return x.new_zeros(row.shape, dtype=torch.float32)
    out = x.new_empty(row.shape, dtype=torch.float32)
    x, y = _with_whole_rows(x), _with_whole_rows(y)
    B, C = _block(N, H)
    _dot_rows[(triton.cdiv(N, B),)](
        x, x.stride(0), row.contiguous(), y, y.stride(0), out, R, H, N, K=row.shape[1], B=B, C=C
    )
    return out


def _block(rows: int, H: int) -> tuple[int, int]:
    columns = min(COLUMNS, triton.next_power_of_2(H))
    return min(max(1, ELEMENTS // columns), triton.next_power_of_2(rows)), columns


def _with_whole_rows(x: Tensor) -> Tensor:
    """x, or a copy where the elements of a row are not side by side."""
    return x if x.stride(1) == 1 else x.contiguous()


def _contiguous(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()


@triton.jit
def _take_rows(
    x_ptr,
    x_stride,
    pair_ptr,
    weight_ptr,
    out_ptr,
    R,
    H,
    pairs,
    K: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
):
    row_B = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    column_C = tl.program_id(1) * C + tl.arange(0, C)
    here_C = column_C < H
    pair_B = tl.load(pair_ptr + row_B, mask=row_B < R, other=-1).to(tl.int64)
    held_B = (pair_B >= 0) & (pair_B < pairs)
    at_BC = (pair_B // K)[:, None] * x_stride + column_C[None, :]
    x_BC = tl.load(x_ptr + at_BC, mask=held_B[:, None] & here_C[None, :], other=0.0)
    if weight_ptr is not None:
        weight_B = tl.load(weight_ptr + pair_B, mask=held_B, other=0.0).to(tl.float32)
        x_BC = x_BC.to(tl.float32) * weight_B[:, None]
    tl.store(out_ptr + row_B[:, None] * H + column_C[None, :], x_BC, mask=(row_B < R)[:, None] & here_C[None, :])


@triton.jit
def _sum_rows(
    x_ptr,
    x_stride,
    row_ptr,
    weight_ptr,
    out_ptr,
    R,
    H,
    T,
    K: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
):
    token_B = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    column_C = tl.program_id(1) * C + tl.arange(0, C)
    here_C = column_C < H
    sum_BC = tl.zeros([B, C], tl.float32)
    for k in range(K):  # unrolled, 32 choices would need more registers than there are
        pair_B = token_B * K + k
        row_B = tl.load(row_ptr + pair_B, mask=token_B < T, other=-1).to(tl.int64)
        held_B = (row_B >= 0) & (row_B < R)
        at_BC = row_B[:, None] * x_stride + column_C[None, :]
        x_BC = tl.load(x_ptr + at_BC, mask=held_B[:, None] & here_C[None, :], other=0.0).to(tl.float32)
        if weight_ptr is not None:
            x_BC *= tl.load(weight_ptr + pair_B, mask=held_B, other=0.0).to(tl.float32)[:, None]
        sum_BC += x_BC
    tl.store(out_ptr + token_B[:, None] * H + column_C[None, :], sum_BC, mask=(token_B < T)[:, None] & here_C[None, :])


@triton.jit
def _dot_rows(
    x_ptr,
    x_stride,
    row_ptr,
    y_ptr,
    y_stride,
    out_ptr,
    R,
    H,
    pairs,
    K: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
):
    pair_B = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    row_B = tl.load(row_ptr + pair_B, mask=pair_B < pairs, other=-1).to(tl.int64)
    held_B = (row_B >= 0) & (row_B < R)
    x_B, y_B = x_ptr + row_B * x_stride, y_ptr + (pair_B // K) * y_stride
    sum_BC = tl.zeros([B, C], tl.float32)
    for start in range(0, H, C):
        column_C = start + tl.arange(0, C)
        here_BC = held_B[:, None] & (column_C < H)[None, :]
        x_BC = tl.load(x_B[:, None] + column_C[None, :], mask=here_BC, other=0.0).to(tl.float32)
        sum_BC += x_BC * tl.load(y_B[:, None] + column_C[None, :], mask=here_BC, other=0.0).to(tl.float32)
    tl.store(out_ptr + pair_B, tl.sum(sum_BC, axis=1), mask=pair_B < pairs)
