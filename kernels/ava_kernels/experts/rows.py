"""Moving rows between tokens and experts: copies, sums, and the products that the gradient of the weights is made of.

A row holds one of the N = T·K (token, choice) pairs, pair t·K + k being token t's choice k, or none.
    take_rows   tokens → rows: out[r] = weight[pair[r]] · x[pair[r] // K]
    sum_rows    rows → tokens: out[t] = Σ_k weight[t, k] · x[row[t, k]]
    dot_rows    rows · tokens: out[t, k] = ⟨x[row[t, k]], y[t]⟩
A row that holds no pair and a pair that is in no row have a number out of range instead, and count as 0: nothing is
read for them. The gradients of the first two are made of these three too, but none has one of its own: only the caller
knows the index in both directions. The caller also sees to it that the shapes fit.

Products and sums are in float32 (float64 for float64), rounded once at the end, and sums have a fixed order, so the
same input gives the same bits. On CUDA tensors these run the kernels of `row_kernels.py`.
Traffic, for rows of b bytes and besides the indices: take_rows reads between T·b and N·b, as more or fewer of a token's
K reads find it in the cache, and writes R·b; sum_rows reads N·b and writes T·b; dot_rows reads N·b + T·b.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ava_kernels.backend import runs_on_triton


@torch.library.custom_op("ava_kernels::take_rows", mutates_args=())
def take_rows(x: Tensor, pair: Tensor, top_k: int, weight: Tensor | None = None) -> Tensor:
    """Each row's token, times the pair's weight; 0 for rows that hold no pair.

    x (T, H) float, pair (R,) int32 or int64, weight (T·top_k,) float, or None for 1 → (R, H) in x's dtype.
    """
    T, H = x.shape
    N = T * top_k
    if runs_on_triton(x):
        from ava_kernels.experts import row_kernels

        with torch.cuda.device_of(x):
            return row_kernels.take_rows(x, pair, top_k, weight)
    if not N:
        return x.new_zeros(len(pair), H)
    pair_R = pair.clamp(0, N - 1)
    out_RH = x.index_select(0, pair_R // top_k)
    if weight is not None:
        out_RH.mul_(weight.index_select(0, pair_R)[:, None])
    return _zero_unless(pair == pair_R, out_RH)


@take_rows.register_fake
def _(x: Tensor, pair: Tensor, top_k: int, weight: Tensor | None = None) -> Tensor:
    return x.new_empty(len(pair), x.shape[1])


@torch.library.custom_op("ava_kernels::sum_rows", mutates_args=())
def sum_rows(x: Tensor, row: Tensor, weight: Tensor | None = None) -> Tensor:
    """Each token's rows, times their weights, added in the order of its choices.

    x (R, H) float, row (T, K) int32 or int64, weight (T, K) float, or None for 1 → (T, H) in x's dtype.
    """
    if runs_on_triton(x):
        from ava_kernels.experts import row_kernels

        with torch.cuda.device_of(x):
            return row_kernels.sum_rows(x, row, weight)
    T, K = row.shape
    out_TH = x.new_zeros(T, x.shape[1], dtype=_sum_dtype(x))
    for k in range(K if len(x) else 0):  # no (T, K, H) is ever made
        rows_TH, held_T = _rows(x, row[:, k])
        if weight is None:
            out_TH += rows_TH
        else:
            out_TH.addcmul_(rows_TH, torch.where(held_T, weight[:, k], 0.0)[:, None])
    return out_TH.to(x.dtype)


@sum_rows.register_fake
def _(x: Tensor, row: Tensor, weight: Tensor | None = None) -> Tensor:
    return x.new_empty(len(row), x.shape[1])


@torch.library.custom_op("ava_kernels::dot_rows", mutates_args=())
def dot_rows(x: Tensor, row: Tensor, y: Tensor) -> Tensor:
    """The product of each of a token's rows with the token's own: with dout for y, the gradient of sum_rows' weights.

    x (R, H) float, row (T, K) int32 or int64, y (T, H) float → (T, K) float32 (float64 for float64 x).
    """
    if runs_on_triton(x):
        from ava_kernels.experts import row_kernels

        with torch.cuda.device_of(x):
            return row_kernels.dot_rows(x, row, y)
    out_TK = x.new_zeros(row.shape, dtype=_sum_dtype(x))
    y_TH = y.to(out_TK.dtype)
    for k in range(row.shape[1] if len(x) else 0):
        rows_TH, held_T = _rows(x, row[:, k])
        out_TK[:, k] = torch.linalg.vecdot(rows_TH.to(y_TH.dtype), y_TH).masked_fill_(~held_T, 0.0)
    return out_TK


@dot_rows.register_fake
def _(x: Tensor, row: Tensor, y: Tensor) -> Tensor:
    return x.new_empty(row.shape, dtype=_sum_dtype(x))


def _rows(x_RH: Tensor, row_T: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (T, H), 0 where the number is out of range, and where it is not (T,)."""
    inside_T = row_T.clamp(0, len(x_RH) - 1)
    held_T = row_T == inside_T
    return _zero_unless(held_T, x_RH.index_select(0, inside_T)), held_T


def _zero_unless(held_R: Tensor, rows_RH: Tensor) -> Tensor:
    """In place. Most often all are held: on a CPU, where looking is free, that saves a pass over the rows."""
    if rows_RH.is_cpu and held_R.all():
        return rows_RH
    return rows_RH.masked_fill_(~held_R[:, None], 0.0)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
