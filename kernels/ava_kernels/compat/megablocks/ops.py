"""Sorting (token, choice) pairs by expert, and moving tokens to their experts' rows and back.

    indices holds N = T·K numbers of pairs, pair t·K + k being token t's choice k, in the order of their experts:
        bin_ids, indices = sort(experts)                  # experts (N,), of token t from t·K on
        bins = inclusive_cumsum(histogram(experts, E), 0)   # (E,): where each expert's pairs end

Gradients flow through x and weights, once. No operation waits for the device; all give the same bits every time. On
CUDA tensors our Triton kernels do the work, apart from sums and indices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ava_kernels.experts.rows import dot_rows, sum_rows, take_rows
from ava_kernels.routing.op import MAX_EXPERTS, counting_sort

_INTEGERS = (torch.int16, torch.int32, torch.int64)


def histogram(x: Tensor, max_val: int) -> Tensor:
    """How often each of 0 … max_val−1 occurs in each row; other values are not counted.

    x (N,) or (B, N), int16, int32 or int64 → int32 (max_val,) or (B, max_val). Raises ValueError for anything else.
    Our kernels count an x (N,) with max_val ≤ 1024; anything else is torch's.
    """
    _check_integers("x", x, (1, 2))
    if x.dim() == 1 and _sortable(x, max_val):
        return counting_sort(x, max_val, counts_only=True)[1]
    return _count(x, max_val) if x.dim() == 2 else _count(x[None], max_val)[0]


def sort(x: Tensor, end_bit: int | None = None) -> tuple[Tensor, Tensor]:
    """Stable ascending sort → the sorted values and where they were, both in x's dtype.

    x (N,), int16, int32 or int64. With `end_bit` only that many low bits count, taken as a number ≥ 0. Raises
    ValueError for another dtype or shape, an `end_bit` outside 1 … the dtype's bits, or positions that do not fit into
    the dtype. Our kernels sort by up to 10 bits; more are torch's to sort, and so is x without `end_bit`.
    """
    _check_integers("x", x, (1,))
    info = torch.iinfo(x.dtype)
    if len(x) > info.max + 1:
        raise ValueError(f"x has {len(x)} elements; their positions do not fit into its dtype, {x.dtype}")
    key, bins = x, 0
    if end_bit is not None:
        if not 1 <= end_bit <= info.bits:
            raise ValueError(f"end_bit is {end_bit}; it must lie between 1 and {info.bits} for {x.dtype}")
        if end_bit < info.bits:
            key, bins = x & (2**end_bit - 1), 2**end_bit
    order = counting_sort(key, bins)[0] if _sortable(key, bins) else key.argsort(stable=True)
    return x.index_select(0, order), order.to(x.dtype)


def inclusive_cumsum(x: Tensor, dim: int) -> Tensor:
    """Sums of the elements up to and with each, along `dim` (of a vector: along it, whatever `dim` is), in x's dtype.

    x (N,) or (B, N), int16, int32 or int64 → the same shape. Raises ValueError for anything else.
    """
    _check_integers("x", x, (1, 2))
    return x.cumsum(dim if x.dim() == 2 else 0, dtype=x.dtype)


def exclusive_cumsum(x: Tensor, dim: int) -> Tensor:
    """Sums of the elements before each; otherwise as `inclusive_cumsum`."""
    return inclusive_cumsum(x, dim) - x


def gather(x: Tensor, indices: Tensor, bin_ids: Tensor, bins: Tensor, top_k: int) -> Tensor:
    """Every pair's token, in the order of the experts: out[n] = x[indices[n] // top_k].

    x (T, H) float, indices (N,) a permutation of the N = T·top_k pairs → (N, H). `bin_ids` (N,) and `bins` (E,) are
    not needed, as indices already has the order. Raises ValueError where the shapes do not fit.
    """
    _check_pairs(x, 2, indices, None, top_k)
    _check_tokens(x, indices, top_k)
    return _Take.apply(x, indices.long(), top_k)


def scatter(x: Tensor, indices: Tensor, bin_ids: Tensor, weights: Tensor | None, bins: Tensor, top_k: int) -> Tensor:
    """Adds up each token's top_k rows, times their weights: out[t] = Σ_k weights[t·top_k + k] · x[its row].

    x (N, H) float, in the order of indices (N,), a permutation of the N = T·top_k pairs; weights (N,) float by pair,
    or None for 1 → (T, H) in x's dtype. `bin_ids` and `bins` are not needed. Raises ValueError where the shapes do not
    fit.
    """
    _check_pairs(x, 2, indices, weights, top_k)
    if len(x) != len(indices):
        raise ValueError(f"x has {len(x)} rows, indices has {len(indices)} pairs: there must be a row for each")
    return _Combine.apply(x, weights, indices.long(), len(indices), top_k)


def binned_gather(x: Tensor, indices: Tensor, bins: Tensor, bin_size: int, top_k: int) -> Tensor:
    """Every expert's first `bin_size` pairs' tokens: out[e, j] = x[indices[start_e + j] // top_k], 0 past its last.

    x (T, H) float, indices (T·top_k,), bins (E,) cumulative ends → (E, bin_size, H). Pairs beyond `bin_size` are left
    out, as are those behind the last bin. Raises ValueError where the shapes do not fit.
    """
    _check_pairs(x, 2, indices, None, top_k)
    _check_tokens(x, indices, top_k)
    if bins.dim() != 1 or bin_size < 0:
        raise ValueError(f"bins has the shape {tuple(bins.shape)}, bin_size is {bin_size}: they must be (E,) and ≥ 0")
    pair_R = _pairs_in_bins(indices.long(), bins.long(), bin_size)
    return _Take.apply(x, pair_R, top_k).view(len(bins), bin_size, x.shape[1])


def binned_scatter(x: Tensor, indices: Tensor, weights: Tensor | None, bins: Tensor, top_k: int) -> Tensor:
    """`scatter` of rows that `binned_gather` laid out; a pair that no bin holds adds 0.

    x (E, bin_size, H) float, indices (T·top_k,), weights (T·top_k,) float by pair or None for 1, bins (E,) → (T, H) in
    x's dtype. Raises ValueError where the shapes do not fit.
    """
    _check_pairs(x, 3, indices, weights, top_k)
    if bins.shape != x.shape[:1]:
        raise ValueError(f"bins has the shape {tuple(bins.shape)}, x has {len(x)} bins: there must be an end for each")
    pair_R = _pairs_in_bins(indices.long(), bins.long(), x.shape[1])
    return _Combine.apply(x.flatten(0, 1), weights, pair_R, len(indices), top_k)


def _count(x_BN: Tensor, bins: int) -> Tensor:
    last = torch.where((x_BN >= 0) & (x_BN < bins), x_BN.long(), bins)  # one more bin for what is out of range
    count = torch.zeros(len(x_BN), bins + 1, dtype=torch.int32, device=x_BN.device)
    return count.scatter_add_(1, last, torch.ones_like(last, dtype=torch.int32))[:, :bins].contiguous()


def _sortable(key_N: Tensor, bins: int) -> bool:
    """Whether counting_sort takes it."""
    return 1 <= bins <= MAX_EXPERTS and len(key_N) < 2**31


# Below, R rows each hold one of the N pairs, or none: then the pair's number is N. The other way around a pair is in
# one of the R rows, or in none: then the row's number is R.


def _pairs_in_bins(indices_N: Tensor, bins_E: Tensor, bin_size: int) -> Tensor:
    """The pair in each of the E·bin_size rows."""
    N = len(indices_N)
    start_E = torch.cat([bins_E.new_zeros(1), bins_E[:-1]])
    place_EC = start_E[:, None] + torch.arange(bin_size, device=bins_E.device)
    if not N:
        return place_EC.flatten().zero_()
    return torch.where(place_EC < bins_E[:, None], indices_N[place_EC.clamp_max(N - 1)], N).flatten()


def _rows_of_pairs(pair_R: Tensor, pairs: int, top_k: int) -> Tensor:
    """The row of each pair, (T, K)."""
    R = len(pair_R)
    row = torch.full((pairs + 1,), R, device=pair_R.device)  # the last entry takes the rows that hold none
    return row.scatter_(0, pair_R, torch.arange(R, device=pair_R.device))[:pairs].view(-1, top_k)


class _Take(torch.autograd.Function):
    """Tokens → rows. Its gradient is a sum over choices; that of index_select adds in no fixed order on a GPU."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, pair_R: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(pair_R)
        ctx.pairs, ctx.top_k = len(x_TH) * top_k, top_k
        return take_rows(x_TH, pair_R, top_k)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout_RH: Tensor) -> tuple[Tensor | None, ...]:
        (pair_R,) = ctx.saved_tensors
        return sum_rows(dout_RH, _rows_of_pairs(pair_R, ctx.pairs, ctx.top_k)), None, None


class _Combine(torch.autograd.Function):
    """Rows → tokens."""

    @staticmethod
    def forward(ctx: Any, x_RH: Tensor, weight_N: Tensor | None, pair_R: Tensor, pairs: int, top_k: int) -> Tensor:
        row_TK = _rows_of_pairs(pair_R, pairs, top_k)
        ctx.save_for_backward(x_RH if ctx.needs_input_grad[1] else None, weight_N, pair_R, row_TK)
        ctx.top_k = top_k
        return sum_rows(x_RH, row_TK, None if weight_N is None else weight_N.view(row_TK.shape))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout_TH: Tensor) -> tuple[Tensor | None, ...]:
        x_RH, weight_N, pair_R, row_TK = ctx.saved_tensors
        dx_RH = dweight_N = None
        if ctx.needs_input_grad[0]:
            dx_RH = take_rows(dout_TH, pair_R, ctx.top_k, weight_N)
        if x_RH is not None:
            dweight_N = dot_rows(x_RH, row_TK, dout_TH).flatten().to(weight_N.dtype)
        return dx_RH, dweight_N, None, None, None


def _check_integers(name: str, x: Tensor, dimensions: tuple[int, ...]) -> None:
    if x.dtype not in _INTEGERS or x.dim() not in dimensions:
        shapes = "(N,) or (B, N)" if 2 in dimensions else "(N,)"
        raise ValueError(
            f"{name} is {x.dtype} of shape {tuple(x.shape)}; it must be int16, int32 or int64 of shape {shapes}"
        )


def _check_pairs(x: Tensor, dimensions: int, indices: Tensor, weights: Tensor | None, top_k: int) -> None:
    if x.dim() != dimensions or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}; it must be floats in {dimensions} dimensions")
    _check_integers("indices", indices, (1,))
    if top_k < 1 or len(indices) % top_k:
        raise ValueError(f"indices has {len(indices)} pairs; it must have top_k ({top_k}) for each token")
    if weights is not None and weights.shape != indices.shape:
        raise ValueError(
            f"weights has the shape {tuple(weights.shape)}; it must have one for each pair, {tuple(indices.shape)}"
        )


def _check_tokens(x: Tensor, indices: Tensor, top_k: int) -> None:
    if len(x) * top_k != len(indices):
        raise ValueError(f"indices has {len(indices)} pairs; {len(x)} tokens of top_k {top_k} have {len(x) * top_k}")
