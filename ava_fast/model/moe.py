"""The mixture-of-experts block, and the dense MLP that stands in its place in dense layers."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from ava_kernels import Routing, load_balancing_loss, moe_mlp, route, router_z_loss, update_expert_bias
from torch import Tensor, nn

from ava_fast.config import Config
from ava_fast.parts import part


class Routed(NamedTuple):
    """What one pass of a block tells of its routing, all on the device. Only the two losses are differentiable."""

    balance_loss: Tensor  # 0-d float32
    z_loss: Tensor  # 0-d float32
    entropy: Tensor  # 0-d float32: of a token's normalised scores, mean over tokens, as a share of log E
    rerouted: Tensor  # 0-d: share of the T·K requests that another expert holds than they first named
    dropped: Tensor  # 0-d: share of the requests that no expert holds
    requested: Tensor  # (E,) int32: requests that named each expert, before capacity


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
    """Routes every token to `top_k` of `num_experts` SwiGLU experts, plus shared experts that see all tokens.

    In training experts have a capacity if `capacity_factor` is set, in evaluation if `eval_capacity_factor` is.
    """

    z3_leaf = True  # ZeRO-3 must gather it whole: ranks reach different experts, and would wait for each other's
    expert_bias: Tensor | None

    def __init__(self, config: Config):
        super().__init__()
        moe, M = config.moe, config.model.hidden_size
        self.config = moe
        self.router = nn.Parameter(torch.empty(moe.num_experts, M))
        self.gate_up = nn.Parameter(torch.empty(moe.num_experts, 2 * moe.intermediate_size, M))
        self.down = nn.Parameter(torch.empty(moe.num_experts, M, moe.intermediate_size))
        self.shared = DenseMlp(M, moe.shared_experts * moe.intermediate_size) if moe.shared_experts else None
        self.shared_gate = nn.Linear(M, 1, bias=False) if moe.shared_expert_gate else None
        # A buffer: saved with the weights, but no gradient moves it, and a bf16 run leaves it in float32, where its
        # small steps are not rounded away. `update_expert_biases` moves it.
        bias_E = torch.zeros(moe.num_experts, dtype=torch.float32) if moe.expert_bias_rate else None
        self.register_buffer("expert_bias", bias_E)

    def forward(self, x_BSM: Tensor) -> tuple[Tensor, Routed]:
        """→ output (B, S, M), and what there is to say of the routing."""
        x_TM = x_BSM.flatten(0, -2)
        with part("routing"):
            routing, logits_TE = self._route(x_TM)
            routed = _routed(routing, logits_TE, self.config.score == "sigmoid")
        with part("experts"):
            out_TM = moe_mlp(x_TM, self.gate_up, self.down, routing)
            if self.shared is not None:
                shared_TM = self.shared(x_TM)
                if self.shared_gate is not None:
                    shared_TM = self.shared_gate(x_TM).sigmoid() * shared_TM
                out_TM = out_TM + shared_TM
        return out_TM.view_as(x_BSM), routed

    def _route(self, x_TM: Tensor) -> tuple[Routing, Tensor]:
        """→ the routing, and its logits (T, E) float32."""
        moe = self.config
        router_input_TM = x_TM.float()
        if self.training and moe.jitter:
            noise = torch.empty_like(router_input_TM).uniform_(1.0 - moe.jitter, 1.0 + moe.jitter)
            router_input_TM = router_input_TM * noise
        logits_TE = F.linear(router_input_TM, self.router.float())  # float32: rounded logits swap experts
        routing = route(
            logits_TE,
            moe.top_k,
            capacity=self._capacity(len(x_TM)),
            overflow=moe.overflow,
            priority=moe.priority,
            max_reroutes=moe.max_reroutes,
            score=moe.score,
            normalize=moe.normalize,
            expert_bias=self.expert_bias,
            num_groups=moe.num_groups,
            group_top_k=moe.group_top_k,
            scale=moe.scale,
        )
        return routing, logits_TE

    def _capacity(self, T: int) -> int | None:
        moe = self.config
        factor = moe.capacity_factor if self.training else moe.eval_capacity_factor
        if factor is None:
            return None
        return math.ceil(min(T, factor * T * moe.top_k / moe.num_experts))  # a token asks an expert only once


def update_expert_biases(model: nn.Module, requested_LE: Tensor) -> None:
    """Moves the bias of each of the model's L MoE blocks, if they have one, by the requests of a whole step: the counts
    (L, E), summed over micro-batches and ranks, so that every rank does the same."""
    blocks = [module for module in model.modules() if isinstance(module, MoeBlock)]
    for block, requested_E in zip(blocks, requested_LE, strict=True):
        if block.expert_bias is not None:
            update_expert_bias(block.expert_bias, requested_E, block.config.expert_bias_rate)


def _routed(routing: Routing, logits_TE: Tensor, sigmoid: bool) -> Routed:
    with torch.no_grad():
        score_TE, requests = routing.probs, routing.expert.numel()
        if sigmoid:
            share_TE = score_TE / score_TE.sum(-1, keepdim=True).clamp_min(torch.finfo(score_TE.dtype).tiny)
            entropy_T = torch.special.entr(share_TE).sum(-1)
        else:
            entropy_T = routing.lse - torch.linalg.vecdot(score_TE, logits_TE)  # −Σ p log p, in one pass
        entropy = entropy_T.nanmean() / math.log(max(2, score_TE.shape[1]))
        rerouted, dropped = routing.rerouted / requests, routing.dropped / requests
    return Routed(load_balancing_loss(routing), router_z_loss(routing), entropy, rerouted, dropped, routing.requested)
