"""The experts' public operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ava_kernels.experts import reference
from ava_kernels.routing.op import Routing


def grouped_mm(x: Tensor, w: Tensor, *, offs: Tensor) -> Tensor:
    """Rows offs[e-1] … offs[e]-1 of x times w[e]: `torch.nn.functional.grouped_mm`.

    x (N, M), w (E, M, P), offs (E,) int32 cumulative ends → (N, P); or x (M, N), w (N, P) → (E, M, P).
    """
    return reference.grouped_mm(x, w, offs)


def moe_mlp(x: Tensor, gate_up: Tensor, down: Tensor, routing: Routing) -> Tensor:
    """Σ_k weight · down_e · (silu(gate_e · x) · up_e · x) over each token's experts.

    x (T, M), gate_up (E, 2I, M) with the gate's rows first, down (E, M, I), all of one float dtype → (T, M). Keeps
    2 tensors for backward: x and the experts' pre-activations (T·K, 2I). Differentiable in x, gate_up, down and
    routing.weight. Raises ValueError where the shapes do not fit.
    """
    E, two_I, M = gate_up.shape
    if x.shape[-1] != M or down.shape != (E, M, two_I // 2) or two_I % 2 or routing.offsets.shape[0] != E + 1:
        raise ValueError(
            f"x {tuple(x.shape)}, gate_up {tuple(gate_up.shape)}, down {tuple(down.shape)} and a routing over "
            f"{routing.offsets.shape[0] - 1} experts do not fit: they must be (T, M), (E, 2I, M), (E, M, I) and E"
        )
    weight_N = routing.weight[routing.token, routing.slot]
    return _MoeMlp.apply(x, gate_up, down, weight_N, routing.token, routing.offsets[1:])


class _MoeMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, weight: Tensor, token: Tensor, ends: Tensor
    ) -> Tensor:
        out, h = reference.forward(x, gate_up, down, weight, token, ends)
        ctx.save_for_backward(x, gate_up, down, weight, token, ends, h)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return *reference.backward(dout, *ctx.saved_tensors), None, None
