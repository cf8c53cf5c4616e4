"""Gradient statistics in plain PyTorch: the definition, and what runs where the extension is not built.

Squares are summed in float64, so that neither the largest float32 overflows nor the smallest vanishes. A float64
magnitude above 1e154 does overflow, as in torch. A large tensor is gone through piece by piece, so that it needs no
copy of itself in float64: a rank's whole gradient may be one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PIECE = 2**22  # elements


class Outputs(NamedTuple):
    """What `stats` finds; `ava_kernels.GradStats` describes the fields. The last three are empty if not asked for."""

    norm: Tensor
    max_abs: Tensor
    nonfinite: Tensor
    first_nonfinite: Tensor
    tensor_norm: Tensor
    tensor_max_abs: Tensor
    tensor_nonfinite: Tensor


def stats(tensors: Sequence[Tensor], per_tensor: bool) -> Outputs:
    """At least one tensor, all on one device. Float64 results if a tensor is float64, float32 otherwise."""
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    N = len(tensors)
    found_N3 = torch.stack([_of_one(t) for t in tensors])
    squares_N, max_abs_N, nonfinite_N = found_N3[:, 0], found_N3[:, 1], found_N3[:, 2].long()
    index_N = torch.arange(N, device=squares_N.device)
    first = torch.where(nonfinite_N > 0, index_N, N).amin()
    kept = N if per_tensor else 0
    return Outputs(
        norm=squares_N.sum().sqrt().to(dtype),
        max_abs=max_abs_N.amax().to(dtype),
        nonfinite=nonfinite_N.sum(),
        first_nonfinite=torch.where(first < N, first, -1),
        tensor_norm=squares_N[:kept].sqrt().to(dtype),
        tensor_max_abs=max_abs_N[:kept].to(dtype),
        tensor_nonfinite=nonfinite_N[:kept].clone(),
    )


def _of_one(tensor: Tensor) -> Tensor:
    """→ (3,) float64: the sum of squares, the largest magnitude and the number of non-finite elements, which is exact
    below 2⁵³."""
    if not tensor.numel():
        return torch.zeros(3, dtype=torch.float64, device=tensor.device)
    found = [
        torch.stack((t.double().square().sum(), t.abs().amax().double(), (t.numel() - t.isfinite().sum()).double()))
        for t in _pieces(tensor)
    ]
    if len(found) == 1:
        return found[0]
    found_P3 = torch.stack(found)
    return torch.stack((found_P3[:, 0].sum(), found_P3[:, 1].amax(), found_P3[:, 2].sum()))


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    """Views. A tensor whose elements do not lie side by side is cut along its longest dimension."""
    if tensor.numel() <= PIECE:
        return (tensor,)
    if tensor.is_contiguous():
        return tensor.view(-1).split(PIECE)
    dim = max(range(tensor.dim()), key=lambda dim: tensor.shape[dim])
    return tensor.split(max(1, PIECE * tensor.shape[dim] // tensor.numel()), dim)


def scale_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    """Multiplies in float32, in float64 for a float64 tensor, and rounds to the tensor's dtype."""
    for t in (piece for tensor in tensors for piece in _pieces(tensor)):
        work = torch.promote_types(t.dtype, torch.float32)
        t.copy_(t.to(work) * coefficient.to(work))
