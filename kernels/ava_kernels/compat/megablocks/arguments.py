"""The settings of a layer, under MegaBlocks' names and with its defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

InitFn = Callable[[Tensor], Any]
"""Fills a tensor in place."""

DEFAULT_ACTIVATION_FN = partial(F.gelu, approximate="tanh")
_NORMAL: InitFn = partial(torch.nn.init.normal_, mean=0.0, std=0.02)


def _default_device() -> int | torch.device:
    return torch.cuda.current_device() if torch.cuda.is_available() else torch.device("cpu")


@dataclasses.dataclass
class Arguments:
    """What a MoE or dMoE layer is made of. Raises ValueError, naming the field, for what is not supported."""

    hidden_size: int = 1024
    """Width of a token."""
    ffn_hidden_size: int = 4096
    """Inner width of one expert."""
    num_layers: int = 1
    """MoE layers of the whole model: as many save their loss in a step."""
    bias: bool = True
    """One bias (hidden_size,) behind the experts, and biases in the shared expert."""
    return_bias: bool = True
    """Return (out, bias) instead of out + bias."""
    activation_fn: Callable[[Tensor], Tensor] = DEFAULT_ACTIVATION_FN
    """Between the experts' two products; with a glu, of the gate."""

    moe_num_experts: int = 1
    """Experts, at most 1024."""
    moe_top_k: int = 1
    """Experts per token, at most 32."""
    moe_capacity_factor: float = 1
    """MoE: an expert takes int(factor · tokens · top_k / experts) tokens; no limit where that is 0."""
    moe_normalize_expert_weights: float | None = None
    """Divide a token's weights by their norm of this order; None or 0: leave them."""
    moe_loss_weight: float = 0.1
    """Weight of the load-balancing loss; 0: none is saved."""
    moe_jitter_eps: float | None = None
    """In training the router sees x times uniform noise of 1 ± eps; None: no noise."""
    moe_lbl_in_fp32: bool = False
    """Without effect: the loss is always float32."""

    moe_expert_model_parallelism: bool = False
    """Only False."""
    expert_parallel_group: Any = None
    """Only None."""
    pipeline_model_parallel_size: int = 1
    """Stages that share num_layers: a stage saves num_layers // stages losses."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Losses saved in a step, where it is not num_layers // stages."""

    memory_optimized_mlp: bool = False
    """Keep no activation for backward, but compute it again."""
    mlp_type: str = "mlp"
    """mlp: w2 · act(w1 · x). glu: w2 · (act(w1 · x) · (v1 · x)). MoE's experts are always mlp."""
    mlp_impl: str = "grouped"
    """grouped or sparse: without effect, as both are the same function."""

    fp16: bool = True
    """Parameters in float16."""
    bf16: bool = False
    """Parameters in bfloat16, unless fp16 is set; with neither, in torch's default dtype."""
    device: int | torch.device = dataclasses.field(default_factory=_default_device)
    """Where the parameters are made: the current GPU, or the CPU where there is none."""
    init_method: InitFn = _NORMAL
    """Fills the router's weight and the experts' w1 and v1, (experts, ffn_hidden_size, hidden_size)."""
    output_layer_init_method: InitFn = _NORMAL
    """Fills the experts' w2, of the same shape."""

    uniform_expert_assignment: bool = False
    """Deal the experts out in turn, whatever the router says: for timing."""

    shared_expert: bool = False
    """Add the output of an expert of mlp_type that every token passes."""
    fc_cls: Any = torch.nn.Linear
    """Class of the shared expert's layers, called with (in, out, bias=, device=, **fc_kwargs)."""
    fc_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """More arguments for fc_cls."""
    remat_act_fn: bool = True
    """Without effect, as in MegaBlocks."""
    shared_expert_hidden_size: int | None = None
    """Inner width of the shared expert; None: ffn_hidden_size."""
    shared_expert_weighted_sum: bool = False
    """Weigh the shared expert by 1 / (top_k + 1) and the others' sum by top_k / (top_k + 1), instead of adding."""

    moe_zloss_weight: float = 0
    """Weight of the router's z-loss; 0: none is saved."""
    moe_zloss_in_fp32: bool = False
    """Without effect: the loss is always float32."""

    def __post_init__(self) -> None:
        for name, only in (("moe_expert_model_parallelism", False), ("expert_parallel_group", None)):
            given = getattr(self, name)
            if given is not only:
                raise ValueError(
                    f"{name} is {given!r}; only {only} is supported: every rank holds all experts of its layers"
                )
        for name, allowed in (("mlp_type", ("mlp", "glu")), ("mlp_impl", ("grouped", "sparse"))):
            given = getattr(self, name)
            if given not in allowed:
                raise ValueError(f"{name} is {given!r}; it must be {allowed[0]!r} or {allowed[1]!r}")
        for name in (
            "hidden_size",
            "ffn_hidden_size",
            "num_layers",
            "moe_num_experts",
            "moe_top_k",
            "pipeline_model_parallel_size",
        ):
            given = getattr(self, name)
            if given < 1:
                raise ValueError(f"{name} is {given}; it must be 1 or more")
        if self.moe_top_k > self.moe_num_experts:
            raise ValueError(
                f"moe_top_k is {self.moe_top_k}; it must not be above moe_num_experts ({self.moe_num_experts})"
            )
        if self.moe_capacity_factor < 0:
            raise ValueError(f"moe_capacity_factor is {self.moe_capacity_factor}; it must be 0 or more")
        if not callable(self.activation_fn):
            raise ValueError(f"activation_fn is {self.activation_fn!r}; it must be callable")
        if self.shared_expert_hidden_size is None:
            self.shared_expert_hidden_size = self.ffn_hidden_size

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        if self.fp16:
            return torch.float16
        return torch.bfloat16 if self.bf16 else torch.get_default_dtype()


def own_arguments(args: Any) -> Arguments:
    """A checked copy of an `Arguments` object, ours or MegaBlocks'.

    Fields that an older MegaBlocks lacks get their defaults. Raises ValueError for a field that we lack, unless it has
    its default value.
    """
    ours = {field.name for field in dataclasses.fields(Arguments)}
    for field in dataclasses.fields(args):
        given = getattr(args, field.name)
        if field.name not in ours and given != field.default:
            raise ValueError(f"{field.name} is {given!r}; only its default, {field.default!r}, is supported")
    return Arguments(**{name: getattr(args, name) for name in ours if hasattr(args, name)})
