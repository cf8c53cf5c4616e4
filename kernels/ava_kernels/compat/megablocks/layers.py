"""The layers: a router, experts with or without capacity, and a shared expert."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ava_kernels.backend import as_autocast
from ava_kernels.compat.megablocks import ops
from ava_kernels.compat.megablocks.arguments import Arguments, InitFn, own_arguments
from ava_kernels.compat.megablocks.losses import save_load_balancing_loss, save_log_sum_exp
from ava_kernels.experts.op import grouped_mm
from ava_kernels.routing.op import Routing, route


class MoE(torch.nn.Module):
    """A mixture of experts of limited capacity.

    x (…, hidden_size), usually (sequence, batch, hidden_size) → (out of x's shape, bias (hidden_size,)), or out + bias
    with `return_bias=False`, or out alone with `bias=False`.

    An expert takes C = int(moe_capacity_factor · tokens · top_k / experts) pairs, those of the lowest tokens, and
    drops the rest, which then add nothing to their tokens (`overflow="drop"`, as in MegaBlocks). That order differs
    from the one of `ava_kernels.route`, where all tokens' first choices come before any second. With
    `overflow="next_best"` it is route's: what an expert rejects goes on to the token's next-best expert, and only
    what no expert has room for is dropped; the weights are then those of the experts held.

    C = 0, which very few tokens give too, means that nothing is dropped. MegaBlocks then reads the fullest expert's
    count on the host and pads all to it; here it is the product without padding of `dMoE`, and nothing is read.

    Parameters: router.layer.weight (E, H), experts.mlp.w1 (E, H, F), experts.mlp.w2 (E, F, H), experts.bias (H,);
    shared_expert.{up_proj, down_proj}, and gate_proj if `mlp_type="glu"`, which here changes the shared expert only.
    """

    dropless = False

    def __init__(self, args: Any, *, overflow: Literal["drop", "next_best"] = "drop") -> None:
        super().__init__()
        if overflow not in ("drop", "next_best"):
            raise ValueError(f"overflow is {overflow!r}; it must be 'drop' or 'next_best'")
        self.args = own_arguments(args)
        self.overflow = overflow
        self.router = _Router(self.args)
        self.experts = _Experts(self.args, self.dropless)
        self.shared_expert = _SharedExpert(self.args) if self.args.shared_expert else None

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        args = self.args
        if x.dim() < 2 or x.shape[-1] != args.hidden_size:
            raise ValueError(f"x has the shape {tuple(x.shape)}; its last dimension must be {args.hidden_size}")
        (x,) = as_autocast(x)
        x_TH = x.reshape(-1, args.hidden_size)
        capacity = self._capacity(len(x_TH))
        routing: Routing = self.router(x_TH, capacity if self.overflow == "next_best" else None)
        weight_N = _normalized(routing.weight, args.moe_normalize_expert_weights).flatten()
        if args.uniform_expert_assignment:
            expert_N = torch.arange(len(weight_N), dtype=torch.int32, device=x.device) % args.moe_num_experts
            requests_E = ops.histogram(expert_N, args.moe_num_experts)
            indices_N, bins_E = ops.sort(expert_N)[1], ops.inclusive_cumsum(requests_E, 0)
        else:
            requests_E, bins_E = routing.requested, routing.offsets[1:]
            indices_N = routing.token * args.moe_top_k + routing.slot
        if self.training and args.moe_loss_weight > 0:
            save_load_balancing_loss((requests_E, routing.probs))

        out = self.experts(x_TH, indices_N, bins_E, weight_N, capacity)
        if self.shared_expert is not None:
            out = self.shared_expert.added_to(out, x_TH)
        return (out[0].view(x.shape), out[1]) if isinstance(out, tuple) else out.view(x.shape)

    def _capacity(self, tokens: int) -> int | None:
        """How many pairs an expert takes; None: all."""
        if self.dropless:
            return None
        mean = self.args.moe_top_k * tokens / self.args.moe_num_experts
        return int(self.args.moe_capacity_factor * mean) or None


class dMoE(MoE):
    """A mixture of experts that drops nothing, whatever the router asks for; otherwise as `MoE`.

    Parameters: experts.mlp.{w1, w2}, and v1 if `mlp_type="glu"`, are (E·F, H), expert after expert.
    """

    dropless = True

    def __init__(self, args: Any) -> None:
        super().__init__(args)


class _Router(torch.nn.Module):
    def __init__(self, args: Arguments) -> None:
        super().__init__()
        self.args = args
        self.layer = torch.nn.Linear(
            args.hidden_size, args.moe_num_experts, bias=False, device=args.device, dtype=args.dtype
        )
        with torch.no_grad():
            args.init_method(self.layer.weight)

    def forward(self, x_TH: Tensor, capacity: int | None) -> Routing:
        if self.training and self.args.moe_jitter_eps is not None:
            low, high = 1.0 - self.args.moe_jitter_eps, 1.0 + self.args.moe_jitter_eps
            x_TH = x_TH * (low + torch.rand_like(x_TH) * (high - low))
        routing = route(self.layer(x_TH), self.args.moe_top_k, capacity=capacity, normalize=False)
        if self.args.moe_zloss_weight != 0:
            save_log_sum_exp(routing.lse)
        return routing


class _Experts(torch.nn.Module):
    def __init__(self, args: Arguments, dropless: bool) -> None:
        super().__init__()
        self.args = args
        self.mlp = _ExpertsMlp(args, dropless)
        bias_H = torch.zeros(args.hidden_size, device=args.device, dtype=args.dtype)
        self.bias = torch.nn.Parameter(bias_H) if args.bias else None

    def forward(
        self, x_TH: Tensor, indices_N: Tensor, bins_E: Tensor, weight_N: Tensor, capacity: int | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As `MoE.forward`, of tokens whose pairs are already in the order of their experts."""
        K = self.args.moe_top_k
        if capacity is None:
            # Pairs that no expert holds come last and weigh nothing: the last expert takes them, as every row must be
            # written by one.
            ends_E = bins_E.clone()
            ends_E[-1:] = len(indices_N)
            rows_NH = self.mlp(ops.gather(x_TH, indices_N, indices_N, bins_E, K), ends_E)
            out_TH = ops.scatter(rows_NH, indices_N, indices_N, weight_N, bins_E, K)
        else:
            rows_ECH = self.mlp(ops.binned_gather(x_TH, indices_N, bins_E, capacity, K))
            out_TH = ops.binned_scatter(rows_ECH, indices_N, weight_N, bins_E, K)
        if self.bias is None:
            return out_TH
        return (out_TH, self.bias) if self.args.return_bias else out_TH + self.bias


class _ExpertsMlp(torch.nn.Module):
    def __init__(self, args: Arguments, dropless: bool) -> None:
        super().__init__()
        self.args, self.dropless = args, dropless
        w1_EFH = self._new(args.init_method)
        w2_EFH = self._new(args.output_layer_init_method)
        self.w1 = torch.nn.Parameter(w1_EFH.flatten(0, 1) if dropless else w1_EFH.mT.contiguous())
        self.w2 = torch.nn.Parameter(w2_EFH.flatten(0, 1) if dropless else w2_EFH)
        gated = dropless and args.mlp_type == "glu"
        self.v1 = torch.nn.Parameter(self._new(args.init_method).flatten(0, 1)) if gated else None

    def _new(self, init: InitFn) -> Tensor:
        args = self.args
        shape = (args.moe_num_experts, args.ffn_hidden_size, args.hidden_size)
        weight_EFH = torch.empty(shape, device=args.device, dtype=args.dtype)
        with torch.no_grad():
            init(weight_EFH)
        return weight_EFH

    def forward(self, x: Tensor, ends_E: Tensor | None = None) -> Tensor:
        """Rows of experts, (E, C, H), or (N, H) with the experts' ends → the same shape."""
        product = torch.bmm if ends_E is None else functools.partial(grouped_mm, offs=ends_E)
        gate = product(x, self._in(self.w1))
        up = None if self.v1 is None else product(x, self._in(self.v1))
        w2_EFH = as_autocast(self.w2)[0].view(-1, self.args.ffn_hidden_size, self.args.hidden_size)

        def second_half(gate: Tensor, up: Tensor | None, w2_EFH: Tensor) -> Tensor:
            a = self.args.activation_fn(gate)
            return product(a if up is None else a * up, w2_EFH)

        if self.args.memory_optimized_mlp:
            return checkpoint(second_half, gate, up, w2_EFH, use_reentrant=False)
        return second_half(gate, up, w2_EFH)

    def _in(self, weight: Tensor) -> Tensor:
        """→ (E, H, F)"""
        (weight,) = as_autocast(weight)
        if not self.dropless:
            return weight
        return weight.view(-1, self.args.ffn_hidden_size, self.args.hidden_size).mT


class _SharedExpert(torch.nn.Module):
    def __init__(self, args: Arguments) -> None:
        super().__init__()
        self.args = args
        kwargs: dict[str, Any] = {"bias": args.bias, "device": args.device}
        if args.fc_cls is torch.nn.Linear:  # another class may not know the argument
            kwargs["dtype"] = args.dtype
        kwargs |= args.fc_kwargs
        self.up_proj = args.fc_cls(args.hidden_size, args.shared_expert_hidden_size, **kwargs)
        self.down_proj = args.fc_cls(args.shared_expert_hidden_size, args.hidden_size, **kwargs)
        gated = args.mlp_type == "glu"
        self.gate_proj = args.fc_cls(args.hidden_size, args.shared_expert_hidden_size, **kwargs) if gated else None

    def forward(self, x_TH: Tensor) -> Tensor:
        act = self.args.activation_fn
        if self.gate_proj is None:
            return self.down_proj(act(self.up_proj(x_TH)))
        return self.down_proj(act(self.gate_proj(x_TH)) * self.up_proj(x_TH))

    def added_to(self, out: Tensor | tuple[Tensor, Tensor], x_TH: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The experts' output, or output and bias, with the shared expert's added; weighted, where that is set."""
        shared_TH = self(x_TH)
        if self.args.shared_expert_weighted_sum:
            K = self.args.moe_top_k
            shared_TH, share = shared_TH / (K + 1), K / (K + 1)
            out = (out[0] * share, out[1] * share) if isinstance(out, tuple) else out * share
        return (out[0] + shared_TH, out[1]) if isinstance(out, tuple) else out + shared_TH


def _normalized(weight_TK: Tensor, order: float | None) -> Tensor:
    """A token's weights over their norm; a token that no expert holds keeps its zeros."""
    if not order:
        return weight_TK
    norm_T1 = torch.linalg.vector_norm(weight_TK, ord=order, dim=-1, keepdim=True)
    return weight_TK / norm_T1.clamp_min(torch.finfo(norm_T1.dtype).tiny)
