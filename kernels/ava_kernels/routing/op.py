"""The public routing operations: `route`, a choice made elsewhere as a Routing, losses, expert bias, counting sort.

`route` is one custom op with one custom op for its gradient; both are opaque to torch.compile. On CUDA tensors they
launch the kernels of `kernels.py`, elsewhere they run `reference.py`, which is also the definition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ava_kernels.backend import runs_on_triton
from ava_kernels.routing import reference

MAX_EXPERTS, MAX_TOP_K = 1024, 32
_INTEGERS = (torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Routing:
    """Which experts hold each token, and the same sorted by expert. T tokens, E experts, K choices, N = T·K pairs.

    Scores, weights and probabilities are float32 (float64 for float64 logits).
    """

    expert: Tensor
    """(T, K) int32: the expert that holds the token's k-th request, −1 where it was dropped."""
    weight: Tensor
    """(T, K): its weight, 0 where it was dropped; differentiable."""
    probs: Tensor
    """(T, E): every expert's score; differentiable."""
    lse: Tensor
    """(T,): log Σ exp of the token's logits; differentiable."""
    mean_prob: Tensor
    """(E,): `probs.mean(0)`; differentiable, at less cost than `probs`."""
    requested: Tensor
    """(E,) int32: how many of the top-k requests named each expert, before capacity."""
    offsets: Tensor
    """(E+1,) int32: expert e holds the entries offsets[e] … offsets[e+1]−1 of `token` and `slot`."""
    token: Tensor
    """(N,) int32: the kept pairs' tokens in expert order, then token order; behind them the dropped pairs'."""
    slot: Tensor
    """(N,) int32: the same pairs' slots."""
    rerouted: Tensor
    """0-d int64: requests held by another expert than they first named."""
    dropped: Tensor
    """0-d int64: requests that no expert holds."""


def route(
    logits: Tensor,
    top_k: int,
    *,
    capacity: int | None = None,
    overflow: Literal["next_best", "drop"] = "next_best",
    priority: Literal["choice", "probability"] = "choice",
    max_reroutes: int | None = None,
    score: Literal["softmax", "sigmoid"] = "softmax",
    normalize: bool = True,
    expert_bias: Tensor | None = None,
    num_groups: int | None = None,
    group_top_k: int | None = None,
    scale: float = 1.0,
) -> Routing:
    """Sends every token to its `top_k` best experts, and those that a full expert rejects to their next-best.

    logits (T, E), any float dtype and strides, E ≤ 1024, top_k ≤ 32. `capacity` is the most requests that an expert
    accepts; without it nothing is rejected. `overflow="drop"` drops what is rejected, "next_best" lets it ask on for
    at most `max_reroutes` rounds (default: until its candidates run out); "drop" takes no `max_reroutes`. Requests are
    served in order of (slot, token), or with `priority="probability"` by falling score. `expert_bias` (E,), float, is
    added to the scores for the choice alone, not for the weights. With `num_groups` equal groups of experts, a token
    only asks those of its `group_top_k` best. `normalize` makes the weights of a token's experts add up to `scale`;
    otherwise they are `scale` times the scores. `reference.py` says all this exactly.

    A token with a NaN or +Inf logit, or with nothing but −Inf, requests nothing: its K requests count as dropped, its
    probabilities and its gradient are 0. A NaN in the bias counts as −Inf; infinite ones count as the largest numbers.

    The same input gives the same bits. Without bias and groups the choice is the same on every device too; with them it
    depends on the scores' rounding. The kernels never make the host wait for the device. `reference.py` does: on a GPU
    it runs for float64 logits, without Triton, and with `AVA_KERNELS_BACKEND=torch`. Raises ValueError, naming the
    argument.
    """
    _check(logits, top_k, capacity, max_reroutes, expert_bias, num_groups, group_top_k)
    if not -math.inf < scale < math.inf:  # isfinite does not compile where scale is symbolic
        raise ValueError(f"scale is {scale}; it must be finite")
    for name, given, allowed in (
        ("overflow", overflow, ("next_best", "drop")),
        ("priority", priority, ("choice", "probability")),
        ("score", score, ("softmax", "sigmoid")),
    ):
        if given not in allowed:
            raise ValueError(f"{name} is {given!r}; it must be {allowed[0]!r} or {allowed[1]!r}")
    if overflow == "drop" and max_reroutes:
        raise ValueError(
            f"max_reroutes is {max_reroutes}, but overflow is 'drop', which reroutes nothing: it must be None or 0, or "
            "overflow 'next_best'"
        )
    E = logits.shape[1]
    rounds = 0 if overflow == "drop" else min(E, E if max_reroutes is None else max_reroutes)
    outputs = torch.ops.ava_kernels.route(
        logits,
        None if expert_bias is None else expert_bias.detach(),
        top_k,
        capacity,
        rounds,
        priority == "probability",
        score == "sigmoid",
        normalize,
        num_groups or 1,
        group_top_k or 1,
        float(scale),
    )
    return Routing(**dict(zip(reference.Outputs._fields, outputs, strict=True)))


def routing_from(expert: Tensor, weight: Tensor, num_experts: int) -> Routing:
    """The Routing of a choice made elsewhere, such as by another library's router.

    expert (T, K), int16, int32 or int64, and weight (T, K), any float dtype; K ≤ 32, num_experts ≤ 1024. A token names
    an expert once at most; a number outside 0 … num_experts−1, such as −1, drops the request: its weight counts as 0
    and gets no gradient. The pairs come in the order in which `route` gives them for the same choice.

    What a choice does not tell is neutral: `probs`, `lse`, `mean_prob` and with them both losses are 0, without a
    gradient; `rerouted` is 0; `requested` counts what is held. Differentiable in `weight`. Never waits for the device,
    so `expert`'s numbers are not checked. Raises ValueError, naming the argument.
    """
    for name, given, kinds in (("expert", expert, "integers"), ("weight", weight, "floats")):
        right = given.is_floating_point() if kinds == "floats" else given.dtype in _INTEGERS
        if given.dim() != 2 or not right:
            raise ValueError(f"{name} is {given.dtype} of shape {tuple(given.shape)}; it must be {kinds} (T, K)")
    if weight.shape != expert.shape or weight.device != expert.device:
        raise ValueError(
            f"weight has the shape {tuple(weight.shape)} on {weight.device}, expert {tuple(expert.shape)} on "
            f"{expert.device}: there must be a weight for each, on the same device"
        )
    T, K = expert.shape
    if not 1 <= K <= MAX_TOP_K:
        raise ValueError(f"expert has {K} columns; the experts of a token must be 1 to {MAX_TOP_K}")
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"num_experts is {num_experts}; it must lie between 1 and {MAX_EXPERTS}")
    held_TK = (expert >= 0) & (expert < num_experts)
    expert_TK = torch.where(held_TK, expert, -1).int()
    weight_TK = torch.where(held_TK, weight, 0.0).to(torch.promote_types(weight.dtype, torch.float32))
    order_N, count_E = counting_sort(expert_TK.flatten(), num_experts)
    token_N = order_N // K
    zero = torch.zeros((), dtype=weight_TK.dtype, device=weight.device)
    return Routing(
        expert=expert_TK,
        weight=weight_TK,
        probs=zero.expand(T, num_experts),
        lse=zero.expand(T),
        mean_prob=zero.expand(num_experts),
        requested=count_E,
        offsets=F.pad(count_E.cumsum(0, dtype=torch.int32), (1, 0)),
        token=token_N,
        slot=order_N - token_N * K,
        rerouted=torch.zeros((), dtype=torch.int64, device=expert.device),
        dropped=(~held_TK).sum(),
    )


def load_balancing_loss(routing: Routing) -> Tensor:
    """E · Σ_e f_e · P_e (Switch Transformer, Fedus et al., 2021). 0-d.

    f_e is the share of the T·K requests that name expert e before capacity, P_e its mean score; the gradient flows
    through P. With softmax scores 1 when balanced. Sigmoid scores are taken as they are: a token's do not add up to 1,
    so a balanced load costs the mean sum of a token's scores. Raises ValueError for what is no Routing.
    """
    if not isinstance(routing, Routing):
        raise ValueError(f"routing is a {type(routing).__name__}; it must be a Routing, such as route returns")
    E = len(routing.mean_prob)
    share_E = routing.requested.to(routing.mean_prob.dtype) / max(routing.expert.numel(), 1)
    return E * (share_E * routing.mean_prob).sum()


def router_z_loss(logits: Tensor | Routing) -> Tensor:
    """Mean squared log-sum-exp of the router's logits: keeps them small (ST-MoE, Zoph et al., 2022). 0-d.

    Takes the logits (T, E), or what `route` made of them: then the gradient is part of route's own backward pass, and
    tokens that requested nothing count as 0. Raises ValueError for other shapes and for integers.
    """
    if isinstance(logits, Routing):
        lse_T = logits.lse
    else:
        _check_logits(logits)
        lse_T = logits.to(torch.promote_types(logits.dtype, torch.float32)).logsumexp(-1)
    return lse_T.square().sum() / max(len(lse_T), 1)


@torch.no_grad()
def update_expert_bias(bias: Tensor, routing: Routing | Tensor, rate: float) -> Tensor:
    """Moves each expert's bias by `rate` towards an even load, in place; returns it.

    bias (E,) float: raised where an expert was requested less often than the mean, lowered where more often (Wang et
    al., 2024, "Auxiliary-loss-free load balancing"). `routing` may be the counts (E,) themselves, such as
    `routing.requested` summed over micro-batches and ranks. Raises ValueError if the sizes differ, or for integers.
    """
    if not bias.is_floating_point():
        raise ValueError(f"bias is {bias.dtype} of shape {tuple(bias.shape)}; it must be floats (E,)")
    requested_E = (routing.requested if isinstance(routing, Routing) else routing).to(torch.int64)
    if bias.shape != requested_E.shape:
        raise ValueError(f"bias has the shape {tuple(bias.shape)}; the routing has {len(requested_E)} experts")
    below_E = (requested_E.sum() - len(requested_E) * requested_E).sign()
    return bias.add_(below_E.to(bias.dtype), alpha=rate)


def _check(
    logits: Tensor,
    top_k: int,
    capacity: int | None,
    max_reroutes: int | None,
    expert_bias: Tensor | None,
    num_groups: int | None,
    group_top_k: int | None,
) -> None:
    _check_logits(logits)
    _check_integer("top_k", top_k)
    _check_integer("capacity", capacity, " or None; round a capacity factor times the even load T·top_k / E up to one")
    _check_integer("max_reroutes", max_reroutes, " or None")
    _check_integer("num_groups", num_groups, " or None")
    _check_integer("group_top_k", group_top_k, " or None")
    T, E = logits.shape
    if not 1 <= E <= MAX_EXPERTS:
        raise ValueError(f"logits has {E} columns; the number of experts must lie between 1 and {MAX_EXPERTS}")
    if not 1 <= top_k <= min(E, MAX_TOP_K):
        limit = f"the number of experts ({E})" if E <= MAX_TOP_K else f"{MAX_TOP_K}"
        raise ValueError(f"top_k is {top_k}; it must lie between 1 and {limit}")
    if T * top_k >= 2**31:
        raise ValueError(f"{T} tokens times top_k {top_k} are 2³¹ requests or more; route fewer tokens at a time")
    for name, given in (("capacity", capacity), ("max_reroutes", max_reroutes)):
        if given is not None and given < 0:
            raise ValueError(f"{name} is {given}; it must be 0 or more, or None for no limit")
    if expert_bias is not None and (expert_bias.shape != (E,) or not expert_bias.is_floating_point()):
        raise ValueError(
            f"expert_bias is {expert_bias.dtype} of shape {tuple(expert_bias.shape)}; it must be floats ({E},)"
        )
    if expert_bias is not None and expert_bias.device != logits.device:
        raise ValueError(f"expert_bias is on {expert_bias.device}, logits are on {logits.device}: move one of them")
    if (num_groups is None) != (group_top_k is None):
        raise ValueError("num_groups and group_top_k go together: give both, or neither")
    if num_groups is None or group_top_k is None:
        return
    if num_groups < 1 or E % num_groups:
        raise ValueError(f"num_groups is {num_groups}; it must divide the number of experts ({E})")
    if not 1 <= group_top_k <= num_groups:
        raise ValueError(f"group_top_k is {group_top_k}; it must lie between 1 and num_groups ({num_groups})")
    if top_k > group_top_k * (E // num_groups):
        raise ValueError(
            f"top_k is {top_k}, but {group_top_k} of {num_groups} groups hold only "
            f"{group_top_k * (E // num_groups)} experts: raise group_top_k or lower top_k"
        )


def _check_logits(logits: Tensor) -> None:
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(f"logits are {logits.dtype} of shape {tuple(logits.shape)}; they must be floats (T, E)")


def _check_integer(name: str, given: int | None, otherwise: str = "") -> None:
    """Refuses what is certainly none, and so lets through the integers that torch.compile and NumPy have."""
    if isinstance(given, (float, bool, str)):
        raise ValueError(f"{name} is {given!r}; it must be an integer{otherwise}")


def _implementation(tensor: Tensor) -> ModuleType:
    if runs_on_triton(tensor):
        from ava_kernels.routing import kernels  # triton is not installed everywhere

        return kernels
    return reference


_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("ava_kernels::route", mutates_args=())
def _route(
    logits: Tensor,
    expert_bias: Tensor | None,
    top_k: int,
    capacity: int | None,
    max_reroutes: int,
    by_probability: bool,
    sigmoid: bool,
    normalize: bool,
    num_groups: int,
    group_top_k: int,
    scale: float,
) -> _Outputs:
    with torch.cuda.device_of(logits):
        return _implementation(logits).forward(
            logits,
            expert_bias,
            top_k,
            capacity,
            max_reroutes,
            by_probability,
            sigmoid,
            normalize,
            num_groups,
            group_top_k,
            scale,
        )


@_route.register_fake
def _(
    logits: Tensor,
    expert_bias: Tensor | None,
    top_k: int,
    capacity: int | None,
    max_reroutes: int,
    by_probability: bool,
    sigmoid: bool,
    normalize: bool,
    num_groups: int,
    group_top_k: int,
    scale: float,
) -> _Outputs:
    T, E = logits.shape
    scores = torch.promote_types(logits.dtype, torch.float32)

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    return (
        empty(T, top_k, dtype=scores),
        empty(T, top_k),
        empty(T, E, dtype=scores),
        empty(T, dtype=scores),
        empty(E, dtype=scores),
        empty(E),
        empty(E + 1),
        empty(T * top_k),
        empty(T * top_k),
        empty(dtype=torch.int64),
        empty(dtype=torch.int64),
    )


@torch.library.custom_op("ava_kernels::route_backward", mutates_args=())
def _route_backward(
    logits: Tensor | None,
    probs: Tensor,
    lse: Tensor,
    expert: Tensor,
    weight: Tensor | None,
    dweight: Tensor | None,
    dprobs: Tensor | None,
    dlse: Tensor | None,
    dmean_prob: Tensor | None,
    sigmoid: bool,
    normalize: bool,
    scale: float,
) -> Tensor:
    with torch.cuda.device_of(probs):
        return _implementation(probs).backward(
            logits, probs, lse, expert, weight, dweight, dprobs, dlse, dmean_prob, sigmoid, normalize, scale
        )


@_route_backward.register_fake
def _(logits: Tensor | None, probs: Tensor, *rest: Any) -> Tensor:
    return torch.empty(probs.shape, dtype=probs.dtype, device=probs.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Outputs) -> None:
    logits, *_, sigmoid, normalize, _, _, scale = inputs
    weight, expert, probs, lse, *_ = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits if sigmoid else None, probs, lse, expert, weight if normalize else None)
    ctx.sigmoid, ctx.normalize, ctx.scale, ctx.dtype = sigmoid, normalize, scale, logits.dtype


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    dweight, _, dprobs, dlse, dmean_prob, *_ = grads
    dlogits = torch.ops.ava_kernels.route_backward(
        *ctx.saved_tensors, dweight, dprobs, dlse, dmean_prob, ctx.sigmoid, ctx.normalize, ctx.scale
    )
    return (dlogits.to(ctx.dtype), *[None] * 10)


_route.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("ava_kernels::counting_sort", mutates_args=())
def counting_sort(key: Tensor, bins: int, counts_only: bool = False) -> tuple[Tensor, Tensor]:
    """Where the keys come from in their stable order, and how often each of 0 … bins−1 occurs.

    key (N,), int16, int32 or int64 of any stride, 1 ≤ bins ≤ 1024 → order (N,) int32, empty if `counts_only`, and count
    (bins,) int32. Keys outside 0 … bins−1 are not counted and come last, in their own order. Never waits for the
    device. Raises ValueError for other shapes, dtypes and sizes.
    """
    if key.dim() != 1 or key.dtype not in _INTEGERS or len(key) >= 2**31:
        raise ValueError(
            f"key is {key.dtype} of shape {tuple(key.shape)}; it must be int16, int32 or int64 (N,), N < 2³¹"
        )
    if not 1 <= bins <= MAX_EXPERTS:
        raise ValueError(f"bins is {bins}; it must lie between 1 and {MAX_EXPERTS}")
    if runs_on_triton(key):
        from ava_kernels.routing import kernels

        with torch.cuda.device_of(key):
            return kernels.counting_sort(key, bins, counts_only)
    bin_N = torch.where((key >= 0) & (key < bins), key, bins).long()
    order_N = bin_N[:0] if counts_only else bin_N.sort(stable=True).indices
    count = torch.zeros(bins + 1, dtype=torch.int32, device=key.device)
    count.scatter_add_(0, bin_N, torch.ones_like(bin_N, dtype=torch.int32))
    return order_N.int(), count[:bins]


@counting_sort.register_fake
def _(key: Tensor, bins: int, counts_only: bool = False) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(0 if counts_only else len(key), dtype=torch.int32, device=key.device),
        torch.empty(bins, dtype=torch.int32, device=key.device),
    )
