"""RMSNorm (Zhang and Sennrich, 2019), with a backward pass of its own where torch has none that is fused."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SMALL = 2**15  # elements up to which calls cost more than memory, and torch's are in C++: a token that is generated
CHUNK = 2**17  # elements that backward takes at a time, so that what it makes of them stays in the cache


class RMSNorm(nn.RMSNorm):
    """x (…, N) → weight · x / √(mean x² + eps), each row by itself. Parameters are those of `torch.nn.RMSNorm`."""

    def __init__(self, size: int, eps: float):
        super().__init__(size, eps)

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (…, N), weight (N,) → like x.

    On a CPU in float32 and float64, with more than `SMALL` elements, it is differentiable once, and keeps x and a
    number a row for that. Elsewhere, and where torch.compile fuses it with what stands beside it, it is `F.rms_norm`.
    """
    written_out = x.device.type in ("cpu", "meta") and x.dtype == weight.dtype and x.dtype.itemsize >= 4
    if written_out and not torch.compiler.is_compiling() and x.numel() > SMALL:
        return _RMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        N = len(weight)
        dx, dweight = torch.empty_like(x, memory_format=torch.contiguous_format), torch.zeros_like(weight)
        rows = max(1, CHUNK // N)
        chunks = (t.reshape(-1, t.shape[-1]).split(rows) for t in (x, dy, scale, dx))
        for x_TN, dy_TN, scale_T1, dx_TN in zip(*chunks, strict=True):
            normed_TN = x_TN * scale_T1
            torch.mul(dy_TN, normed_TN, out=dx_TN)
            dweight += dx_TN.sum(0)
            mean_T = torch.mv(dx_TN, weight).div_(-N)
            torch.mul(dy_TN, weight, out=dx_TN)
            dx_TN.addcmul_(normed_TN, mean_T[:, None]).mul_(scale_T1)
        return dx, dweight, None
