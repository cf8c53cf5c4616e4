"""Gradient statistics in plain PyTorch: the definition, and what runs where the extension is not built.

Squares are summed in float64, so that neither the largest float32 overflows nor the smallest vanishes. A float64
magnitude above 1e154 does overflow, as in torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


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
    squares_N = torch.stack([t.double().square().sum() for t in tensors])
    max_abs_N = torch.stack([t.abs().amax().double() if t.numel() else squares_N.new_zeros(()) for t in tensors])
    nonfinite_N = torch.stack([t.numel() - t.isfinite().sum() for t in tensors])
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


def scale_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    """Multiplies in float32, in float64 for a float64 tensor, and rounds to the tensor's dtype."""
    for t in tensors:
        work = torch.promote_types(t.dtype, torch.float32)
        t.copy_(t.to(work) * coefficient.to(work))
