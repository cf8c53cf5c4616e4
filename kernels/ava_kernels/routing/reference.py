"""Top-k routing of tokens to experts and the losses that keep it balanced, in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """Which experts each token goes to, and the same sorted by expert.

    expert (T, K) int32; weight (T, K) float32, differentiable; probs (T, E) float32, differentiable;
    requested (E,) int32, how many of the T·K requests name each expert; offsets (E+1,) int32: expert e owns the
    entries offsets[e] … offsets[e+1]-1 of token (N,) int64 and slot (N,) int64, which are in expert order, then token
    order.
    """

    expert: Tensor
    weight: Tensor
    probs: Tensor
    requested: Tensor
    offsets: Tensor
    token: Tensor
    slot: Tensor


def route(
    logits: Tensor,
    top_k: int,
    *,
    score: Literal["softmax", "sigmoid"] = "softmax",
    normalize: bool = True,
    scale: float = 1.0,
) -> Routing:
    """Sends each token to its top_k best experts; none is full, nothing is dropped.

    logits (T, E), any float dtype, scored in float32 (float64 for float64 input). Ties go to the lower expert.
    `normalize` makes a token's weights add up to `scale`. Raises ValueError for top_k outside 1 … E.
    """
    E = logits.shape[1]
    if not 1 <= top_k <= E:
        raise ValueError(f"top_k is {top_k}; it must lie between 1 and the number of experts ({E})")
    logits_TE = logits.to(torch.promote_types(logits.dtype, torch.float32))
    probs_TE = logits_TE.softmax(-1) if score == "softmax" else logits_TE.sigmoid()
    # Ranked by the logits: scores are monotone in them but can tie where logits do not. A stable sort, as topk
    # leaves the order of ties open.
    expert_TK = logits_TE.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weight_TK = probs_TE.gather(1, expert_TK)
    if normalize:
        smallest = torch.finfo(weight_TK.dtype).tiny  # sigmoids below exp(-104) are all zero
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True).clamp_min(smallest)
    if scale != 1.0:
        weight_TK = weight_TK * scale

    by_expert_N = expert_TK.flatten().sort(stable=True).indices
    requested_E = torch.bincount(expert_TK.flatten(), minlength=E)
    offsets = torch.zeros(E + 1, dtype=torch.int32, device=logits.device)
    offsets[1:] = requested_E.cumsum(0)
    return Routing(
        expert=expert_TK.int(),
        weight=weight_TK,
        probs=probs_TE,
        requested=requested_E.int(),
        offsets=offsets,
        token=by_expert_N // top_k,
        slot=by_expert_N % top_k,
    )


def load_balancing_loss(routing: Routing) -> Tensor:
    """E · Σ_e f_e · P_e, 1 when balanced (Switch Transformer, Fedus et al., 2021).

    f_e is the share of requests that name expert e, P_e its mean probability; the gradient flows through P. 0-d.
    """
    T, E = routing.probs.shape
    if T == 0:
        return routing.probs.sum()
    share_E = routing.requested.to(routing.probs.dtype) / routing.expert.numel()
    return E * (share_E * routing.probs.mean(0)).sum()


def router_z_loss(logits: Tensor) -> Tensor:
    """Mean squared log-sum-exp of the router's logits (T, E): keeps them small (ST-MoE, Zoph et al., 2022). 0-d."""
    if logits.shape[0] == 0:
        return logits.sum()
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).logsumexp(-1).square().mean()
