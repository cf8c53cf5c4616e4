"""The mixture-of-experts block, and the dense MLP that stands in its place in dense layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from ava_kernels import load_balancing_loss, moe_mlp, route, router_z_loss
from torch import Tensor, nn

from ava_fast.config import Config


class DenseMlp(nn.Module):
    """SwiGLU: x (…, M) → (…, M). Gate and up projection are one matrix, gate first."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class MoeBlock(nn.Module):
    """Routes every token to `top_k` of `num_experts` SwiGLU experts, plus shared experts that see all tokens."""

    z3_leaf = True  # ZeRO-3 must gather it whole: ranks reach different experts, and would wait for each other's

    def __init__(self, config: Config):
        super().__init__()
        moe, M = config.moe, config.model.hidden_size
        self.top_k, self.normalize, self.jitter = moe.top_k, moe.normalize, moe.jitter
        self.router = nn.Parameter(torch.empty(moe.num_experts, M))
        self.gate_up = nn.Parameter(torch.empty(moe.num_experts, 2 * moe.intermediate_size, M))
        self.down = nn.Parameter(torch.empty(moe.num_experts, M, moe.intermediate_size))
        self.shared = DenseMlp(M, moe.shared_experts * moe.intermediate_size) if moe.shared_experts else None
        self.shared_gate = nn.Linear(M, 1, bias=False) if moe.shared_expert_gate else None

    def forward(self, x_BSM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """→ output (B, S, M), load-balancing loss and z-loss (0-d float32)."""
        x_TM = x_BSM.flatten(0, -2)
        router_input_TM = x_TM.float()
        if self.training and self.jitter:
            noise = torch.empty_like(router_input_TM).uniform_(1.0 - self.jitter, 1.0 + self.jitter)
            router_input_TM = router_input_TM * noise
        logits_TE = F.linear(router_input_TM, self.router.float())  # float32: rounded logits swap experts
        routing = route(logits_TE, self.top_k, normalize=self.normalize)
        out_TM = moe_mlp(x_TM, self.gate_up, self.down, routing)
        if self.shared is not None:
            shared_TM = self.shared(x_TM)
            out_TM = out_TM + (shared_TM if self.shared_gate is None else self.shared_gate(x_TM).sigmoid() * shared_TM)
        return out_TM.view_as(x_BSM), load_balancing_loss(routing), router_z_loss(logits_TE)
