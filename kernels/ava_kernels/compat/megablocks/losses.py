"""The routers' two losses, collected over a model's layers until they are read and cleared, once a step."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

_load_balancing: list[tuple[Tensor, Tensor]] = []
_log_sum_exp: list[Tensor] = []


def save_load_balancing_loss(loss: tuple[Tensor, Tensor]) -> None:
    """Adds one layer's (requests per expert (E,), scores (T, E)). MoE and dMoE do so themselves in training."""
    _load_balancing.append(loss)


def get_load_balancing_loss() -> list[tuple[Tensor, Tensor]]:
    """What was saved since the last clear, one entry a layer."""
    return _load_balancing


def clear_load_balancing_loss() -> None:
    """Forgets what was saved, and the graph that it holds on to: call it after every step."""
    _load_balancing.clear()


def batched_load_balancing_loss(args: Any) -> Tensor | float:
    """moe_loss_weight · mean over layers of E · Σ_e f_e · P_e, as a 0-d tensor; 0.0 where the weight is 0.

    f_e is the share of the T·K requests that name expert e, before capacity; P_e is its mean score, through which the
    gradient flows (Fedus et al., 2021, "Switch Transformers"). The mean is over `num_layers`, also on a pipeline stage
    that holds only some. Raises ValueError where not every layer saved exactly once.
    """
    if args.moe_loss_weight == 0:
        return 0.0
    layers = args.num_layers // args.pipeline_model_parallel_size
    if args.num_layers_per_virtual_pipeline_stage is not None:
        layers = args.num_layers_per_virtual_pipeline_stage
    if len(_load_balancing) != layers:
        raise ValueError(
            f"{len(_load_balancing)} layers saved their load-balancing loss, but num_layers = {args.num_layers}, "
            f"pipeline_model_parallel_size = {args.pipeline_model_parallel_size} and "
            f"num_layers_per_virtual_pipeline_stage = {args.num_layers_per_virtual_pipeline_stage} make {layers}: "
            "layers save in training only, and clear_load_balancing_loss() belongs after every step"
        )
    losses = []
    for requests_E, scores_TE in _load_balancing:
        tokens = max(len(scores_TE), 1)
        scores_TE = scores_TE.to(torch.promote_types(scores_TE.dtype, torch.float32))
        share_E = requests_E.to(scores_TE.dtype) / (tokens * args.moe_top_k)
        losses.append(torch.dot(share_E, scores_TE.sum(0) / tokens))
    return args.moe_loss_weight * args.moe_num_experts / args.num_layers * torch.stack(losses).sum()


def save_log_sum_exp(lse_T: Tensor) -> None:
    """Adds one router's log Σ exp of each token's logits."""
    _log_sum_exp.append(lse_T)


def clear_router_zloss() -> None:
    """Forgets what the routers saved, which with moe_zloss_weight they do in evaluation too: call it after every step,
    and after an evaluation."""
    _log_sum_exp.clear()


def batched_router_zloss(args: Any) -> Tensor | float:
    """moe_zloss_weight · mean squared log-sum-exp of the logits, one for each router (routers,); not yet summed.

    Without a weight it warns and returns 0 (Zoph et al., 2022, "ST-MoE"). Raises ValueError where no router saved.
    """
    if args.moe_zloss_weight == 0:
        warnings.warn("batched_router_zloss was called with moe_zloss_weight=0: the loss is 0", stacklevel=2)
        return 0
    if not _log_sum_exp:
        raise ValueError("no router has run since the last clear_router_zloss(): there is no z-loss to collect")
    return args.moe_zloss_weight * torch.stack([lse_T.square().sum() / max(len(lse_T), 1) for lse_T in _log_sum_exp])
