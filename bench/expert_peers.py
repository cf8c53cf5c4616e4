"""The expert MLPs that `bench.experts` times: ours and its peers, each with its own calls and weight layout.

Every contender starts from the same tokens, expert numbers (T, K) and weights (T, K), so sorting the pairs by expert
is part of its time; only "ours, sorted" is spared it, as `route` does it in passing. What a peer needs in another
layout or dtype is converted before. Getting one ready imports it, and raises whatever keeps it from running.

    grouped_mm        the composition a good PyTorch user would write: gather, two grouped products and SwiGLU, weighted
                      sum; no gradient is scattered. Also under torch.compile.
    lean grouped_mm   the same with a backward of its own that keeps x and h alone
    bmm               two products, with as many rows for every expert, and nothing else: the bound of a dense kernel
    liger             liger-kernel's Triton kernels, autotuned; when in a hurry, over a few of their configurations
    liger-cute        liger-cute-kernels on one rank; what it keeps is in NVSHMEM's heap, which torch does not count
    sonic-moe         its layer without the router; needs sm_90, Python 3.12 and quack-kernels 0.3.11
    megablocks        its dropless layer without the router, by grouped-gemm
    transformers …    Qwen3-MoE's experts. Not batched_mm: it copies an expert's weights for every pair.

Not here: ScatterMoE, which no package index has.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from ava_kernels import Routing, moe_mlp, route
from ava_kernels.routing.op import counting_sort
from torch import Tensor

from bench import machine
from bench.check import logits_of


@dataclasses.dataclass
class Problem:
    x: Tensor
    """(T, M), a leaf, as are the next three."""
    gate_up: Tensor
    """(E, 2I, M), gate first."""
    down: Tensor
    """(E, M, I)"""
    weight: Tensor
    """(T, K) float32, of values that bfloat16 holds too."""
    routing: Routing
    upstream: Tensor
    """(T, M): the gradient of the output."""

    @property
    def expert(self) -> Tensor:
        return self.routing.expert


@dataclasses.dataclass
class Contender:
    forward: Callable[[Tensor], Any]
    """x → output"""
    leaves: list[Tensor]
    """What the gradient is taken of, besides x."""
    backward: Callable[[Any, list[Tensor]], tuple[Tensor, ...]]
    """Output, [x, *leaves] → their gradients"""
    canonical: Callable[..., list[Tensor]] | None = None
    """The leaves' gradients → those of gate_up, down and weight in the problem's layouts; None if there is nothing to
    compare."""


def make_problem(
    T: int,
    M: int,
    I: int,
    E: int,
    K: int,
    load: str,
    device: str,
    dtype: torch.dtype,
) -> Problem:
    """Unit-scale inputs; `load` as `check.logits_of` has it."""
    torch.manual_seed(0)
    routing = route(logits_of(load, T, E, K, device), K)
    shapes = ((T, M), 1.0), ((E, 2 * I, M), M**-0.5), ((E, M, I), I**-0.5)
    x, gate_up, down = (torch.randn(shape, device=device, dtype=dtype).mul_(std) for shape, std in shapes)
    weight = routing.weight.detach().bfloat16().float()
    for leaf in (x, gate_up, down, weight):
        leaf.requires_grad_()
    return Problem(x, gate_up, down, weight, routing, torch.randn(T, M, device=device, dtype=dtype))


def _plain(problem: Problem, forward: Callable[[Tensor], Tensor], leaves: list[Tensor] | None = None) -> Contender:
    """One output, gradients by autograd; without `leaves`, of the problem's own."""
    return Contender(
        forward=forward,
        leaves=[problem.gate_up, problem.down, problem.weight] if leaves is None else leaves,
        backward=lambda out, leaves: torch.autograd.grad(out, leaves, problem.upstream),
        canonical=lambda *gradients: list(gradients),
    )


# --- Ours ---


def ours(problem: Problem, backend: Any = None) -> Contender:
    E, K = len(problem.gate_up), problem.expert.shape[1]

    def forward(x: Tensor) -> Tensor:
        order, count = counting_sort(problem.expert.flatten(), E)
        sorted_ = dataclasses.replace(
            problem.routing,
            token=order // K,
            slot=order % K,
            offsets=F.pad(count.cumsum(0, dtype=torch.int32), (1, 0)),
            weight=problem.weight,
        )
        return moe_mlp(x, problem.gate_up, problem.down, sorted_, backend=backend)

    return _plain(problem, forward)


def ours_sorted(problem: Problem, backend: Any = None) -> Contender:
    routing = dataclasses.replace(problem.routing, weight=problem.weight)
    return _plain(problem, lambda x: moe_mlp(x, problem.gate_up, problem.down, routing, backend=backend))


def ours_captured(problem: Problem) -> Contender:
    """From CUDA graphs, one for each direction: without the host's time, and so without a wait for the device."""
    eager = ours(problem, "triton")
    leaves = [problem.x, *eager.leaves]
    machine.on_side_stream(lambda: eager.backward(eager.forward(problem.x), leaves))
    forward, out = machine.capture(lambda: eager.forward(problem.x))
    backward, gradients = machine.capture(lambda: eager.backward(out, leaves), forward.pool())

    def replay_forward(x: Tensor) -> Tensor:
        forward.replay()
        return out

    def replay_backward(out: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
        backward.replay()
        return gradients

    return Contender(replay_forward, eager.leaves, replay_backward, eager.canonical)


# --- PyTorch ---


class _Permute(torch.autograd.Function):
    """Rows by number; the gradient gathers as well, instead of scattering into zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        """`inverse` (len(x), c): where the c copies of each row went."""
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        rows = dout.index_select(0, inverse.flatten())
        return (rows if inverse.shape[1] == 1 else rows.view(*inverse.shape, -1).sum(1)), None, None


def _sort(expert: Tensor, E: int) -> tuple[Tensor, Tensor, Tensor]:
    """→ the pairs in expert order, where each pair went (T, K), cumulative ends (E,)"""
    order = expert.flatten().argsort(stable=True)
    row = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    count = torch.zeros(E, dtype=torch.int32, device=order.device)
    count.scatter_add_(0, expert.flatten().long(), torch.ones_like(order, dtype=torch.int32))
    return order, row.view_as(expert), count.cumsum(0, dtype=torch.int32)


def by_grouped_mm(x: Tensor, gate_up: Tensor, down: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
    (T, K), E = expert.shape, len(gate_up)
    order, row_TK, ends = _sort(expert, E)
    h = F.grouped_mm(_Permute.apply(x, order // K, row_TK), gate_up.mT, offs=ends)
    gate, up = h.chunk(2, dim=-1)
    y = F.grouped_mm(F.silu(gate) * up, down.mT, offs=ends)
    y_TKM = _Permute.apply(y, row_TK.flatten(), order[:, None]).view(T, K, -1)
    return torch.bmm(weight.to(x.dtype)[:, None], y_TKM)[:, 0]


def composition(problem: Problem) -> Contender:
    p = problem
    return _plain(p, lambda x: by_grouped_mm(x, p.gate_up, p.down, p.expert, p.weight))


def compiled(problem: Problem) -> Contender:
    torch._dynamo.config.recompile_limit = 64  # one for every size; beyond it, it would run uncompiled
    p, compose = problem, torch.compile(by_grouped_mm, dynamic=False, fullgraph=True)
    return _plain(p, lambda x: compose(x, p.gate_up, p.down, p.expert, p.weight))


class _Lean(torch.autograd.Function):
    """The composition with the gradients of `ava_kernels.experts.reference`: keeps x and h."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        (T, K), E = expert.shape, len(gate_up)
        order, row_TK, ends = _sort(expert, E)
        h = F.grouped_mm(x.index_select(0, order // K), gate_up.mT, offs=ends)
        gate, up = h.chunk(2, dim=-1)
        y = F.grouped_mm(F.silu(gate).mul_(up), down.mT, offs=ends)
        ctx.save_for_backward(x, gate_up, down, weight, order, row_TK, ends, h)
        y_TKM = y.index_select(0, row_TK.flatten()).view(T, K, -1)
        return torch.bmm(weight.to(x.dtype)[:, None], y_TKM)[:, 0]

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up, down, weight, order, row_TK, ends, h = ctx.saved_tensors
        (T, K), token = row_TK.shape, order // row_TK.shape[1]
        weight_N1 = weight.flatten()[order, None].to(x.dtype)
        gate, up = h.chunk(2, dim=-1)
        silu = F.silu(gate)
        a = silu * up
        dout_N = dout.index_select(0, token)
        da = F.grouped_mm(dout_N, down, offs=ends)
        dweight = torch.linalg.vecdot(da.float(), a.float())[row_TK.flatten()].view(T, K)
        ddown = F.grouped_mm(dout_N.mT, a.mul_(weight_N1), offs=ends)
        da.mul_(weight_N1)
        dh = torch.cat([torch.ops.aten.silu_backward(da * up, gate), da * silu], dim=-1)
        dgate_up = F.grouped_mm(dh.mT, x.index_select(0, token), offs=ends)
        dx_N = F.grouped_mm(dh, gate_up, offs=ends)
        dx = dx_N.index_select(0, row_TK.flatten()).view(T, K, -1).sum(1)
        return dx, dgate_up, ddown, None, dweight


def lean(problem: Problem) -> Contender:
    p = problem
    return _plain(p, lambda x: _Lean.apply(x, p.gate_up, p.down, p.expert, p.weight))


def bmm(problem: Problem) -> Contender:
    (T, K), (E, two_I, M) = problem.expert.shape, problem.gate_up.shape
    like = {"device": problem.x.device, "dtype": problem.x.dtype}
    R = max(1, T * K // E)
    x_ERM, a_ERI, dh_ER2I = (torch.randn(E, R, width, **like) for width in (M, two_I // 2, two_I))

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.bmm(x_ERM, problem.gate_up.mT), torch.bmm(a_ERI, problem.down.mT)

    def backward(out: Any, leaves: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves[1:], [dh_ER2I, x_ERM.detach()])

    leaves = [x_ERM.requires_grad_(), a_ERI.requires_grad_(), problem.gate_up, problem.down]
    return Contender(forward, leaves, backward)


# --- Other packages ---


def liger(problem: Problem, quick: bool = False) -> Contender:
    """liger-kernel 0.8.5: `LigerFusedMoEFunction.apply(x, gate_up, down, top_k_index int32, top_k_weights)`."""
    moe = importlib.import_module("liger_kernel.ops.fused_moe")
    if quick:
        _few_configurations(importlib.import_module("liger_kernel.ops.fused_moe_kernels"))
    weight = problem.weight.detach().to(problem.x.dtype).requires_grad_()
    index = problem.expert.int()

    def forward(x: Tensor) -> Tensor:
        return moe.LigerFusedMoEFunction.apply(x, problem.gate_up, problem.down, index, weight)

    return _plain(problem, forward, [problem.gate_up, problem.down, weight])


def _few_configurations(kernels: Any) -> None:
    """Of the 32, 16 and 40 that its kernels try at every size, those most likely to win on a large GPU."""
    likely = (
        {"BLOCK_N": 128, "BLOCK_K": 64},
        {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32},
        {"BLOCK_H": 256, "BLOCK_K": 8},
    )
    for kernel in vars(kernels).values():
        if configurations := getattr(kernel, "configs", None):
            few = [c for c in configurations if c.kwargs in likely]
            kernel.configs = [c for c in few if c.num_stages in (3, 4)] or few or configurations


def liger_cute(problem: Problem) -> Contender:
    """liger-cute-kernels 0.8.5: `moe_fused(X, expert_indices int32, expert_weights bf16, gate (E, I, M), up (E, I, M),
    down (E, M, I), num_experts, top_k, pg)`. One forward must be followed by its backward before the next."""
    os.environ.setdefault("NVSHMEM_SYMMETRIC_SIZE", "24G")
    cute = importlib.import_module("liger_cute_kernels")
    dist = torch.distributed
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
        torch.cuda.set_device(problem.x.device)
        # Its limits are fixed by the first call, and must do for every size.
        limits = cute.MoEConfig(
            max_tokens=40960, hidden_size=4096, num_experts=256, top_k=16, num_hosts=1, gpus_per_host=1
        )
        cute.configure(device=problem.x.device, moe=limits)
    moe_fused = importlib.import_module("liger_kernel.ops.cute.ops.moe").moe_fused
    E, K = len(problem.gate_up), problem.expert.shape[1]
    gate, up = (t.detach().contiguous().requires_grad_() for t in problem.gate_up.chunk(2, dim=1))
    weight = problem.weight.detach().bfloat16().requires_grad_()
    index = problem.expert.int()

    def forward(x: Tensor) -> Tensor:
        return moe_fused(x, index, weight, gate, up, problem.down, E, K, None)

    def canonical(dgate: Tensor, dup: Tensor, ddown: Tensor, dweight: Tensor) -> list[Tensor]:
        return [torch.cat([dgate, dup], dim=1), ddown, dweight]

    contender = _plain(problem, forward, [gate, up, problem.down, weight])
    contender.canonical = canonical
    return contender


def sonic_moe(problem: Problem) -> Contender:
    """sonic-moe 0.1.2: the two autograd functions and the metadata kernels of `moe_TC_softmax_topk_layer`, which has no
    entry for choices made elsewhere but a slower one. Gate and up rows interleaved, as it prefers them."""
    functional = importlib.import_module("sonicmoe.functional")
    swiglu = importlib.import_module("sonicmoe.enums").ActivationType.SWIGLU
    (T, K), (E, two_I, M) = problem.expert.shape, problem.gate_up.shape
    index = problem.expert.int()
    gate_up = problem.gate_up.detach().view(E, 2, -1, M).transpose(1, 2).reshape(E, two_I, M).requires_grad_()

    def forward(x: Tensor) -> Tensor:
        gather, scatter, reverse = (torch.empty(T * K, dtype=torch.int32, device=x.device) for _ in range(3))
        count, offset = (torch.empty(n, dtype=torch.int32, device=x.device) for n in (E, E + 1))
        functional.TC_topk_router_metadata_triton(index, E, count, offset, gather, scatter, reverse)
        w1, w2 = gate_up.permute(1, 2, 0), problem.down.permute(1, 2, 0)
        shared = (gather, scatter, reverse, None, False)
        a, h = functional._UpProjection.apply(x, w1, None, offset, T * K, K, *shared, swiglu, False, False)
        return functional._DownProjection.apply(a, h, w2, None, problem.weight, offset, T, K, *shared, swiglu)

    def canonical(dgate_up: Tensor, ddown: Tensor, dweight: Tensor) -> list[Tensor]:
        return [dgate_up.view(E, -1, 2, M).transpose(1, 2).reshape(E, two_I, M), ddown, dweight]

    contender = _plain(problem, forward, [gate_up, problem.down, problem.weight])
    contender.canonical = canonical
    return contender


def megablocks(problem: Problem) -> Contender:
    """megablocks 0.10.0: `ParallelDroplessMLP(args).forward_once(x (s, b, h), weights (T, K), experts (T, K))`; its w1
    (gate), v1 (up) and w2 are (E·I, M)."""
    Arguments = importlib.import_module("megablocks.layers.arguments").Arguments
    layers = importlib.import_module("megablocks.layers.dmoe")
    (T, K), (E, two_I, M) = problem.expert.shape, problem.gate_up.shape
    bf16 = problem.x.dtype == torch.bfloat16
    arguments = Arguments(
        hidden_size=M,
        ffn_hidden_size=two_I // 2,
        bias=False,
        return_bias=False,
        activation_fn=F.silu,
        moe_num_experts=E,
        moe_top_k=K,
        moe_loss_weight=0.0,
        mlp_type="glu",
        mlp_impl="grouped",
        fp16=not bf16,
        bf16=bf16,
        device=problem.x.device,
    )
    layer = layers.ParallelDroplessMLP(arguments)
    gate, up = problem.gate_up.detach().chunk(2, dim=1)
    with torch.no_grad():
        layer.mlp.w1.copy_(gate.reshape(-1, M))
        layer.mlp.v1.copy_(up.reshape(-1, M))
        layer.mlp.w2.copy_(problem.down.mT.reshape(-1, M))
    weight = problem.weight.detach().to(problem.x.dtype).requires_grad_()

    def forward(x: Tensor) -> Tensor:
        out, _ = layer.forward_once(x[None], weight, problem.expert)
        return out.view(T, M)

    def canonical(dgate: Tensor, dup: Tensor, ddown: Tensor, dweight: Tensor) -> list[Tensor]:
        dgate_up = torch.cat([dgate.view(E, -1, M), dup.view(E, -1, M)], dim=1)
        return [dgate_up, ddown.view(E, -1, M).mT, dweight]

    contender = _plain(problem, forward, [layer.mlp.w1, layer.mlp.v1, layer.mlp.w2, weight])
    contender.canonical = canonical
    return contender


def transformers(problem: Problem, implementation: str) -> Contender:
    config = importlib.import_module("transformers").Qwen3MoeConfig(
        hidden_size=problem.x.shape[1],
        moe_intermediate_size=problem.down.shape[2],
        num_experts=len(problem.down),
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        layer = importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe").Qwen3MoeExperts(config)
    layer.gate_up_proj = torch.nn.Parameter(problem.gate_up.detach())
    layer.down_proj = torch.nn.Parameter(problem.down.detach())
    weight = problem.weight.detach().to(problem.x.dtype).requires_grad_()
    index = problem.expert.long()
    return _plain(problem, lambda x: layer(x, index, weight), [layer.gate_up_proj, layer.down_proj, weight])


OURS = ("ours", "ours, sorted", "ours, hopper", "ours, captured")
SLOW = ("grouped_mm, compiled", "liger", "sonic-moe", "liger-cute", "megablocks")  # to get ready
Prepare = Callable[[Problem], Contender]


def contenders(device: str, quick: bool) -> dict[str, Prepare]:
    """By name, those that are to be had for nothing first."""
    if device == "cpu":
        return {
            "ours": ours,
            "ours, sorted": ours_sorted,
            "transformers grouped_mm": lambda p: transformers(p, "grouped_mm"),
            "transformers eager": lambda p: transformers(p, "eager"),
            "grouped_mm": composition,
            "lean grouped_mm": lean,
        }
    return {
        "ours": lambda p: ours(p, "triton"),  # whatever an earlier run has pinned
        "ours, sorted": lambda p: ours_sorted(p, "triton"),
        "ours, hopper": lambda p: ours(p, "hopper"),
        "ours, captured": ours_captured,
        "bmm": bmm,
        "grouped_mm": composition,
        "lean grouped_mm": lean,
        "grouped_mm, compiled": compiled,
        "liger": lambda p: liger(p, quick),
        "sonic-moe": sonic_moe,
        "liger-cute": liger_cute,
        "megablocks": megablocks,
    }
