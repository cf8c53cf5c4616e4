"""Checks every kernel on this device against plain float64 computations.

    python -m bench.check                       # on the GPU where there is one
    python -m bench.check --device cpu --tiny   # the PyTorch implementations
    TRITON_INTERPRET=1 AVA_KERNELS_BACKEND=triton python -m bench.check --device cpu --tiny

Covered: routing with capacity, bias and groups; counting sort; moving rows; the experts' MLP with all its gradients
and the grouped product, for even, skewed, one-sided and dropping loads, sizes that fit no tile, no tokens, strided
weights; the rotation; attention with all its gradients, causal, full, windowed, capped, packed, with heads that share
keys and values, by each implementation; gradient statistics and clipping. Everything runs twice and must give the same
bits; on a GPU, also from a CUDA graph, without waiting for the device, and with tensors that reach past 2³¹ elements. A
case that fails is a line of output and an exit code of 1; only a lost device ends the run. Needs torch, triton and
ava_kernels alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ava_kernels import Routing, apply_rotary, grouped_mm, moe_mlp, rope_attention, rope_table, route
from ava_kernels.experts.rows import dot_rows, sum_rows, take_rows
from ava_kernels.routing.op import counting_sort
from torch import Tensor

from bench import gradients, machine

Case = tuple[str, Callable[[], None]]  # its name, and what raises if something is wrong

# T, E, K, M, I
SIZES = [(1024, 8, 2, 256, 512), (1000, 64, 8, 768, 256), (777, 128, 8, 512, 64), (300, 256, 16, 1024, 128)]
ODD = [(1, 8, 2, 256, 128), (0, 8, 2, 256, 128), (333, 16, 4, 200, 72), (65, 5, 3, 77, 35), (129, 1, 1, 64, 16)]
TINY = [(24, 4, 2, 16, 16), (40, 9, 3, 24, 8)]
TINY_ODD = [(1, 4, 2, 16, 8), (0, 4, 2, 16, 8), (13, 5, 3, 7, 3)]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": lambda h: F.silu(h.chunk(2, dim=-1)[0]) * h.chunk(2, dim=-1)[1],
    "geglu": lambda h: F.gelu(h.chunk(2, dim=-1)[0]) * h.chunk(2, dim=-1)[1],
    "gelu": F.gelu,
    "relu2": lambda h: F.relu(h).square(),
}
LOADS = ("even", "zipf", "one", "dropped", "rerouted")
FAR = 2**31  # elements from the first to the last


def logits_of(load: str, T: int, E: int, K: int, device: str) -> Tensor:
    """Logits (T, E) whose K best experts are loaded evenly, as a learned router does, or all by one.

    `even` gives every expert T·K/E tokens where that is whole. `zipf` draws K different experts for every token with
    probabilities that fall as 1/√rank, in an order of the experts that has nothing to do with their numbers.
    """
    if load == "even":
        first_T = torch.randperm(T, device=device) % E
        step = max(1, E // K)
        chosen_TK = (first_T[:, None] + step * torch.arange(K, device=device)) % E
        return torch.full((T, E), -20.0, device=device).scatter_(1, chosen_TK, torch.randn(T, K, device=device))
    if load == "one":
        logits_TE = torch.randn(T, E, device=device)
        logits_TE[:, E // 2] += 20
        return logits_TE
    share_E = (torch.randperm(E, device=device) + 1.0).pow(-0.5)
    gumbel_TE = -torch.empty(T, E, device=device).exponential_().log()
    return share_E.log() + gumbel_TE


def expert_mlp(
    x: Tensor, gate_up: Tensor, down: Tensor, expert: Tensor, weight: Tensor, activation: str = "swiglu"
) -> Tensor:
    """`moe_mlp` by a loop over experts in the inputs' own dtype; choices below 0 are dropped. Differentiable."""
    out = x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    for e in range(len(gate_up)):
        token, choice = (expert == e).nonzero(as_tuple=True)
        y = F.linear(ACTIVATIONS[activation](F.linear(x[token], gate_up[e])), down[e])
        out = out.index_add(0, token, y.to(out.dtype) * weight[token, choice, None].to(out.dtype))
    return out.to(x.dtype)


def results_of(run: Callable[..., Tensor], tensors: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """The output and the gradient of every tensor."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def relative_error(found: Tensor, exact: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖, NaN if a value is not finite. In float64, one expert's weights at a time."""
    if found.shape != exact.shape:
        raise ValueError(f"the result has the shape {tuple(found.shape)}, not {tuple(exact.shape)}")
    parts = zip(found, exact, strict=True) if found.dim() == 3 else [(found, exact)]
    squares = [((a.double() - b).square().sum(), b.double().square().sum()) for a, b in parts]
    error, norm = (torch.stack(each).sum() for each in zip(*squares, strict=True))
    return (error / norm).sqrt().item()


def far(t: Tensor, dim: int) -> Tensor:
    """The same numbers, as far apart along one dimension that offsets do not fit into 32 bits."""
    distance = -(-FAR // (t.shape[dim] - 1) // 64) * 64  # a multiple of what tensor descriptors and vectors want
    strides = list(torch.empty_like(t.select(dim, 0), memory_format=torch.contiguous_format).stride())
    strides.insert(dim, distance)
    storage = t.new_empty((t.shape[dim] - 1) * distance + t.select(dim, 0).numel())
    return storage.as_strided(t.shape, strides).copy_(t)


def has_room_for_far(device: str, count: int, dtype: torch.dtype) -> bool:
    return device == "cuda" and torch.cuda.mem_get_info()[0] > 1.25 * count * FAR * dtype.itemsize


def compare(names: list[str], found: list[Tensor], exact: list[Tensor], same: list[Tensor]) -> None:
    """Each result's error is at most that of the same computation in the same dtype: 4 times in the norm, 8 times in
    the largest, more where there are too few numbers to tell; and a quarter of the dtype's epsilon in any case, a whole
    one of few numbers."""
    epsilon = torch.finfo(found[0].dtype).eps
    for name, got, truth, peer in zip(names, found, exact, same, strict=True):
        if got.shape != truth.shape or got.dtype != peer.dtype:
            raise AssertionError(f"{name} is {got.dtype} {tuple(got.shape)}, not {peer.dtype} {tuple(truth.shape)}")
        if not truth.numel():
            continue
        few, least = (4, epsilon) if truth.numel() < 64 else (1, epsilon / 4)
        error, allowed = (got.double() - truth).abs(), (peer.double() - truth).abs()
        for kind, measure, factor in (("norm", torch.linalg.vector_norm, 4.0), ("largest", torch.amax, 8.0)):
            limit = few * factor * measure(allowed) + least * measure(truth.abs())
            if not measure(error) <= limit:  # NaN fails too
                raise AssertionError(
                    f"{name}: the {kind} error is {measure(error):.3e}, allowed are {limit:.3e}, "
                    f"at values of {measure(truth.abs()):.3e}"
                )


def same_bits(first: list[Tensor], second: list[Tensor]) -> None:
    for index, (a, b) in enumerate(zip(first, second, strict=True)):
        if not torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)):  # NaN equals NaN
            raise AssertionError(f"result {index} has other bits the second time")


# --- Cases ---


def routing(device: str, tiny: bool, dtypes: list[torch.dtype]) -> Iterator[Case]:
    sizes = [(24, 7, 2)] if tiny else [(4096, 64, 8), (1000, 128, 8), (2048, 256, 8), (333, 7, 3), (0, 8, 2), (1, 4, 4)]
    variants: dict[str, dict[str, Any]] = {
        "no capacity": {},
        "drop": {"capacity": 0.5, "overflow": "drop"},
        "next best": {"capacity": 1.0},
        "one reroute": {"capacity": 0.7, "max_reroutes": 1},
        "by probability": {"capacity": 1.0, "priority": "probability"},
        "sigmoid": {"score": "sigmoid", "normalize": False, "scale": 2.5},
        "bias": {"capacity": 1.0, "expert_bias": True},
    }
    for T, E, K in sizes:
        for name, options in variants.items():
            yield f"T {T}, E {E}, K {K}, {name}", lambda a=(device, T, E, K, options): _route(*a)
    yield "groups", lambda: _route(device, 200, 16, 3, {"num_groups": 4, "group_top_k": 2, "score": "sigmoid"})


def _route(device: str, T: int, E: int, K: int, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    logits = torch.randn(T, E, device=device) + torch.randn(E, device=device)
    if T > 8:
        logits[3, 1], logits[5] = float("nan"), float("-inf")
    options = dict(options)
    if "capacity" in options:
        options["capacity"] = int(options["capacity"] * T * K / E) + 1
    if options.get("expert_bias"):
        options["expert_bias"] = 0.1 * torch.randn(E, device=device)
    upstream = [torch.randn(shape, device=device, dtype=torch.float64) for shape in ((T, K), (T, E), (T,), (E,))]

    def run(logits: Tensor, options: dict[str, Any]) -> tuple[Routing, Tensor]:
        leaf = logits.requires_grad_()
        found = route(leaf, K, **options)
        outputs = [found.weight, found.probs, found.lse, found.mean_prob]
        held = [u.where(o.isfinite(), 0).to(o.dtype) for u, o in zip(upstream, outputs, strict=True)]
        return found, torch.autograd.grad(outputs, leaf, held)[0]

    (found, dlogits), (again, dagain) = run(logits.clone(), options), run(logits.clone(), options)
    wide = {key: value.double() if isinstance(value, Tensor) else value for key, value in options.items()}
    exact, dexact = run(logits.double(), wide)
    fields = [field.name for field in dataclasses.fields(Routing)]
    same_bits([*(getattr(found, f) for f in fields), dlogits], [*(getattr(again, f) for f in fields), dagain])
    different = int((found.expert != exact.expert).sum())
    # By logits the choice is exact; scores that are nearly equal may be ranked otherwise after rounding.
    by_score = {"priority", "expert_bias", "num_groups"} & options.keys()
    if different > (T * K // 1000 if by_score else 0):
        raise AssertionError(f"{different} of {T * K} choices are not the reference's")
    if different:
        return
    for name in ("requested", "offsets", "token", "slot", "rerouted", "dropped"):
        if not torch.equal(getattr(found, name), getattr(exact, name)):
            raise AssertionError(f"{name} is not the reference's")
    for name in ("weight", "probs", "lse", "mean_prob"):
        torch.testing.assert_close(
            getattr(found, name).double(), getattr(exact, name), rtol=1e-5, atol=1e-6, equal_nan=True
        )
    torch.testing.assert_close(dlogits.double(), dexact, rtol=1e-4, atol=1e-5, equal_nan=True)


def sorting(device: str, tiny: bool, dtypes: list[torch.dtype]) -> Iterator[Case]:
    for N in (0, 100) if tiny else (0, 1, 1000, 300_007):
        for bins in (1, 128) if tiny else (1, 7, 128, 1024):
            for dtype in (torch.int16, torch.int32, torch.int64):
                yield f"{N} keys, {bins} bins, {dtype}", lambda a=(device, N, bins, dtype): _sort(*a)


def _sort(device: str, N: int, bins: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    key = torch.randint(-2, bins + 2, (2 * N,)).to(dtype)[::2]
    inside = torch.where((key >= 0) & (key < bins), key.long(), bins)
    found = [list(counting_sort(key.to(device), bins)) for _ in range(2)]
    same_bits(*found)
    order, count = (t.cpu() for t in found[0])
    if not torch.equal(order.long(), inside.sort(stable=True).indices):
        raise AssertionError("the order is not that of a stable sort")
    if not torch.equal(count.long(), torch.bincount(inside, minlength=bins + 1)[:bins]):
        raise AssertionError("the counts are not bincount's")


def rows(device: str, tiny: bool, dtypes: list[torch.dtype]) -> Iterator[Case]:
    for T, K, H in [(7, 3, 5), (9, 2, 40)] if tiny else [(500, 8, 2048), (333, 3, 515), (64, 16, 1), (0, 2, 64)]:
        for dtype in dtypes:
            for weighted in (False, True):
                yield (
                    f"{T}·{K} rows of {H}, {dtype}{', weighted' * weighted}",
                    lambda a=(T, K, H, dtype, weighted): _rows(device, *a),
                )


def _rows(device: str, T: int, K: int, H: int, dtype: torch.dtype, weighted: bool) -> None:
    torch.manual_seed(0)
    R = T * K + 5
    x, y = torch.randn(T, 2 * H, device=device).to(dtype)[:, :H], torch.randn(R, H, device=device).to(dtype)
    pair = torch.randint(-1, T * K + 1, (R,), device=device)
    row = torch.randint(-1, R + 1, (T, K), device=device, dtype=torch.int32)
    weight = torch.randn(T, K, device=device) if weighted else None

    def run(x: Tensor, y: Tensor, weight: Tensor | None) -> list[Tensor]:
        flat = None if weight is None else weight.flatten()
        return [take_rows(x, pair, K, flat), sum_rows(y, row, weight), dot_rows(y, row, x)]

    found = run(x, y, weight)
    same_bits(found, run(x, y, weight))
    exact = run(x.double(), y.double(), None if weight is None else weight.double())
    rounded = [t.to(got.dtype) for t, got in zip(exact, found, strict=True)]
    for name, got, truth, once in zip(("take_rows", "sum_rows", "dot_rows"), found, exact, rounded, strict=True):
        limit = 2 * (once.double() - truth).abs() + 2.0**-17 * H**0.5
        if got.shape != truth.shape or ((got.double() - truth).abs() > limit).any():
            raise AssertionError(f"{name} is not the float64 result, rounded")


def experts(device: str, tiny: bool, dtypes: list[torch.dtype]) -> Iterator[Case]:
    sizes, odd = (TINY, TINY_ODD) if tiny else (SIZES, ODD)
    for size in sizes:
        for dtype in dtypes:
            for load in LOADS:
                yield _named(size, dtype, load), lambda a=(size, dtype, load): _experts(device, *a)
    for size in odd:
        for dtype in dtypes[:2]:
            yield _named(size, dtype, "zipf"), lambda a=(size, dtype, "zipf"): _experts(device, *a)
    for activation in list(ACTIVATIONS)[1:]:
        for dtype in dtypes[:2]:
            yield (
                f"{_named(sizes[0], dtype, 'zipf')}, {activation}",
                lambda a=(sizes[0], dtype, "zipf", activation): _experts(device, *a),
            )
    for dtype in dtypes[:2]:
        yield (
            f"{_named(sizes[0], dtype, 'zipf')}, strided",
            lambda a=(sizes[0], dtype, "zipf"): _experts(device, *a, strided=True),
        )
    hopper = device == "cuda" and torch.cuda.get_device_capability()[0] == 9
    if has_room_for_far(device, 3, dtypes[0]):
        for backend in (None, *["hopper"] * (hopper and dtypes[0] != torch.float32)):
            yield (
                f"{_named(sizes[0], dtypes[0], 'zipf')}, far{f', {backend}' * bool(backend)}",
                lambda a=backend: _experts(device, sizes[0], dtypes[0], "zipf", spread=True, backend=a),
            )
    if hopper:
        for size in (*sizes, *odd):
            for dtype in (d for d in dtypes if d != torch.float32):
                for load in LOADS:
                    yield (
                        f"{_named(size, dtype, load)}, hopper",
                        lambda a=(size, dtype, load): _experts(device, *a, backend="hopper"),
                    )
    if device == "cuda":
        yield "no wait, and from a CUDA graph with other inputs", _captured


def _named(size: tuple[int, ...], dtype: torch.dtype, load: str) -> str:
    return "T {}, E {}, K {}, M {}, I {}, ".format(*size) + f"{dtype}, {load}"


def _experts(
    device: str,
    size: tuple[int, ...],
    dtype: torch.dtype,
    load: str,
    activation: str = "swiglu",
    *,
    strided: bool = False,
    spread: bool = False,
    backend: Any = None,
) -> None:
    T, E, K, M, I = size
    torch.manual_seed(0)
    logits = logits_of("zipf" if load in ("dropped", "rerouted") else load, T, E, K, device)
    limits: dict[str, dict[str, Any]] = {
        "dropped": {"capacity": T * K // (2 * E), "overflow": "drop"},
        "rerouted": {"capacity": -(-T * K // E)},
    }
    chosen = route(logits, K, **limits.get(load, {}))
    H = 2 * I if activation in ("swiglu", "geglu") else I
    shapes = ((T, M), 1.0), ((E, H, M), M**-0.5), ((E, M, I), I**-0.5)
    tensors = [(torch.randn(shape, device=device) * std).to(dtype) for shape, std in shapes]
    tensors.append(chosen.weight.detach())
    upstream = torch.randn(T, M, device=device).to(dtype)
    given = list(tensors)
    if strided:
        given[1:3] = [t.mT.contiguous().mT for t in tensors[1:3]]
    if spread:
        given[:3] = [far(t, 0) for t in tensors[:3]]

    def ours(x: Tensor, gate_up: Tensor, down: Tensor, weight: Tensor) -> Tensor:
        given = dataclasses.replace(chosen, weight=weight)
        return moe_mlp(x, gate_up, down, given, activation=activation, backend=backend)

    def loop(x: Tensor, gate_up: Tensor, down: Tensor, weight: Tensor) -> Tensor:
        return expert_mlp(x, gate_up, down, chosen.expert, weight, activation)

    found = results_of(ours, given, upstream)
    same_bits(found, results_of(ours, given, upstream))
    exact = results_of(loop, [t.double() for t in tensors], upstream)
    same = results_of(loop, tensors, upstream)
    compare(["output", "dx", "dgate_up", "ddown", "dweight"], found, exact, same)


def _captured() -> None:
    """Routing and experts, forward and backward."""
    T, E, K, M, I = 512, 32, 4, 256, 128
    torch.manual_seed(0)
    shapes = ((T, M), 1.0), ((E, 2 * I, M), M**-0.5), ((E, M, I), I**-0.5)
    x, gate_up, down = ((torch.randn(s, device="cuda") * std).bfloat16().requires_grad_() for s, std in shapes)
    logits = logits_of("zipf", T, E, K, "cuda").requires_grad_()
    upstream = torch.randn(T, M, device="cuda").bfloat16()

    def step() -> list[Tensor]:
        out = moe_mlp(x, gate_up, down, route(logits, K, capacity=T * K // E + 8))
        return [out, *torch.autograd.grad(out, [x, gate_up, down, logits], upstream)]

    machine.on_side_stream(step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph, captured = machine.capture(step)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
        logits.copy_(logits_of("even", T, E, K, "cuda"))
    graph.replay()
    same_bits(captured, step())


def products(device: str, tiny: bool, dtypes: list[torch.dtype]) -> Iterator[Case]:
    sizes = [(24, 4, 16, 8), (13, 3, 7, 5)] if tiny else [(2048, 16, 512, 256), (1000, 64, 256, 128), (300, 5, 77, 35)]
    for size in sizes:
        for dtype in dtypes:
            for layout in ("plain", "transposed", "contracted"):
                name = "N {}, E {}, M {}, P {}".format(*size)
                yield f"{name}, {dtype}, {layout}", lambda a=(size, dtype, layout): _product(device, *a)


def _product(device: str, size: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    N, E, M, P = size
    torch.manual_seed(0)
    ends = torch.randint(0, N + 1, (E,)).sort().values
    ends[E // 2] = ends[E // 2 - 1]  # an expert without rows
    ends[-1] = N
    spans = list(zip([0, *ends.tolist()[:-1]], ends.tolist(), strict=True))
    offs = ends.to(device, torch.int32)
    shapes = {"plain": ((N, M), (E, M, P)), "transposed": ((N, M), (E, P, M)), "contracted": ((N, M), (N, P))}[layout]
    x, w = (torch.randn(shape, device=device).to(dtype) for shape in shapes)

    def views(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return (x.mT if layout == "contracted" else x), (w.mT if layout == "transposed" else w)

    def ours(x: Tensor, w: Tensor) -> Tensor:
        x, w = views(x, w)
        return grouped_mm(x, w, offs=offs)

    def loop(x: Tensor, w: Tensor) -> Tensor:
        x, w = views(x, w)
        if w.dim() == 2:
            return torch.stack([x[:, start:end] @ w[start:end] for start, end in spans])
        return torch.cat([x[start:end] @ w[e] for e, (start, end) in enumerate(spans)])

    upstream = torch.randn(loop(x, w).shape, device=device).to(dtype)
    found = results_of(ours, [x, w], upstream)
    same_bits(found, results_of(ours, [x, w], upstream))
    exact = results_of(loop, [x.double(), w.double()], upstream)
    compare(["product", "dx", "dw"], found, exact, results_of(loop, [x, w], upstream))


def rotations(device: str, tiny: bool, dtypes: list[torch.dtype]) -> Iterator[Case]:
    sizes = (
        [(2, 5, 3, 10, 4)] if tiny else [(2, 1000, 16, 128, 64), (3, 333, 5, 80, 16), (1, 1, 1, 2, 1), (4, 0, 2, 8, 4)]
    )
    for size in sizes:
        for dtype in dtypes:
            for way in ("plain", "interleaved", "packed", "positions", "inplace", "strided"):
                name = "B {}, S {}, H {}, D {}, {} pairs".format(*size)
                yield f"{name}, {dtype}, {way}", lambda a=(size, dtype, way): _rotation(device, *a)
    if has_room_for_far(device, 4, dtypes[0]):
        yield f"more than {FAR} elements, {dtypes[0]}", lambda: _long_rotation(device, dtypes[0])


def _rotation(device: str, size: tuple[int, ...], dtype: torch.dtype, way: str) -> None:
    B, S, H, D, pairs = size
    torch.manual_seed(0)
    x, upstream = (torch.randn(B, S, H, D, device=device).to(dtype) for _ in range(2))
    cos, sin = rope_table(2 * S + 1, 2 * pairs, device=torch.device(device))
    places = torch.randint(0, 2 * S + 1, (B, S), device=device) if way == "positions" else None
    interleaved, token = way == "interleaved", torch.arange(S, device=device).expand(B, S)

    def rotated(x: Tensor) -> Tensor:
        """By products of complex numbers."""
        part = x[..., : 2 * pairs]
        part = part.unflatten(-1, (pairs, 2)) if interleaved else part.unflatten(-1, (2, pairs)).mT
        at = token if places is None else places
        angle = torch.complex(cos[at], sin[at]).to(torch.complex128 if x.dtype == torch.float64 else torch.complex64)
        wide = torch.promote_types(x.dtype, torch.float32)
        pair = torch.view_as_real(torch.view_as_complex(part.to(wide).contiguous()) * angle[:, :, None])
        part = (pair if interleaved else pair.mT).flatten(-2).to(x.dtype)
        return torch.cat((part, x[..., 2 * pairs :]), dim=-1)

    def ours(x: Tensor) -> Tensor:
        if way == "packed":
            ends = S * torch.arange(B + 1, device=device, dtype=torch.int32)
            return apply_rotary(x.flatten(0, 1), cos, sin, cu_seqlens=ends).view_as(x)
        x = x.mT.contiguous().mT if way == "strided" else x.clone() if way == "inplace" else x
        return apply_rotary(x, cos, sin, interleaved=interleaved, position_ids=places, inplace=way == "inplace")

    found = results_of(ours, [x], upstream)
    same_bits(found, results_of(ours, [x], upstream))
    exact = results_of(rotated, [x.double()], upstream)
    compare(["output", "dx"], found, exact, results_of(rotated, [x], upstream))


def _long_rotation(device: str, dtype: torch.dtype) -> None:
    """The first and the last rows of one tensor, against the same rows alone."""
    torch.manual_seed(0)
    H, D, ends = 16, 128, 4
    S = FAR // (H * D) + 2 * ends
    x = torch.zeros(1, S, H, D, device=device, dtype=dtype)
    rows = torch.cat((torch.arange(ends), torch.arange(S - ends, S))).to(device)
    x[:, rows] = torch.randn(1, 2 * ends, H, D, device=device).to(dtype)
    cos, sin = rope_table(1000, D, device=torch.device(device))
    places = torch.arange(S, device=device)[None] % 1000
    upstream = x.roll(1, dims=-1)
    found = results_of(lambda x: apply_rotary(x, cos, sin, position_ids=places), [x], upstream)
    near = [x[:, rows], upstream[:, rows]]
    alone = results_of(lambda x: apply_rotary(x, cos, sin, position_ids=places[:, rows]), near[:1], near[1])
    same_bits([t[:, rows] for t in found], alone)


def attentions(device: str, tiny: bool, dtypes: list[torch.dtype]) -> Iterator[Case]:
    """B, S, query heads, key heads, D."""
    sizes = [(1, 20, 2, 1, 16), (2, 1, 2, 1, 16)]
    if not tiny:
        sizes = [(2, 512, 4, 4, 128), (1, 1000, 8, 1, 64), (2, 333, 4, 2, 80)]
    sizes += [] if tiny else [(1, 300, 2, 1, 256), (1, 257, 3, 3, 32), (2, 1, 2, 1, 64)]
    ways: dict[str, dict[str, Any]] = {
        "causal": {},
        "full": {"causal": False},
        "window": {"window_size": (max(3, sizes[0][1] // 5), 0)},
        "softcap": {"softcap": 5.0},
        "packed": {},
        "interleaved": {"interleaved": True},
        "part of a head": {},
    }
    for size in sizes:
        for dtype in dtypes:
            for way, options in ways.items():
                name = "B {}, S {}, H {}/{}, D {}".format(*size)
                yield f"{name}, {dtype}, {way}", lambda a=(size, dtype, way, options): _attention(device, *a)
                for backend in _others(device, size[-1], dtype, way):
                    forced = size, dtype, way, {**options, "backend": backend}
                    yield f"{name}, {dtype}, {way}, {backend}", lambda a=forced: _attention(device, *a)
    if has_room_for_far(device, 3, dtypes[0]):
        for backend in (None, *_others(device, sizes[0][-1], dtypes[0], "causal")):
            options = {} if backend is None else {"backend": backend}
            yield (
                "B {}, S {}, H {}/{}, D {}".format(*sizes[0]) + f", {dtypes[0]}, far{f', {backend}' * bool(backend)}",
                lambda a=options: _attention(device, sizes[0], dtypes[0], "causal", a, spread=True),
            )


def _others(device: str, D: int, dtype: torch.dtype, way: str) -> list[str]:
    """Which of attention's backends can be asked for, apart from what is checked without asking."""
    if device != "cuda":
        return []
    hopper = torch.cuda.get_device_capability()[0] == 9 and D <= 128 and dtype != torch.float32
    return ["sdpa"] * (way in ("causal", "full")) + ["hopper"] * hopper


def _attention(
    device: str,
    size: tuple[int, ...],
    dtype: torch.dtype,
    way: str,
    options: dict[str, Any],
    *,
    spread: bool = False,
) -> None:
    B, S, H_q, H_kv, D = size
    torch.manual_seed(0)
    options = {"deterministic": options.get("backend") != "sdpa", **options}
    tensors = [torch.randn(B, S, heads, D, device=device).to(dtype) for heads in (H_q, H_kv, H_kv)]
    upstream = torch.randn(B, S, H_q, D, device=device).to(dtype)
    rotary_dim = D // 4 * 2 if way == "part of a head" else D
    cos, sin = rope_table(S, rotary_dim, device=torch.device(device))
    ends = [S * b // 3 for b in range(3 * B + 1)] if way == "packed" else [S * b for b in range(B + 1)]
    left, right = options.get("window_size", (S, S))
    seen = torch.arange(S, device=device) - torch.arange(S, device=device)[:, None]  # how far a key is ahead
    seen = (seen >= -left) & (seen <= (0 if options.get("causal", True) else right))
    interleaved = options.get("interleaved", False)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if way != "packed":
            return rope_attention(q, k, v, cos, sin, **options)
        cu = torch.tensor(ends, device=device, dtype=torch.int32)
        flat = [t.flatten(0, 1) for t in (q, k, v)]
        return rope_attention(*flat, cos, sin, cu_seqlens=cu, max_seqlen=S, **options).view_as(q)

    def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        for start, end in itertools.pairwise(ends):
            q_SHD, k_SHD, v_SHD = (t.flatten(0, 1)[start:end] for t in (q, k, v))
            q_SHD, k_SHD = (apply_rotary(t[None], cos, sin, interleaved=interleaved)[0] for t in (q_SHD, k_SHD))
            k_SHD, v_SHD = (t.repeat_interleave(H_q // H_kv, dim=1) for t in (k_SHD, v_SHD))
            scores = torch.einsum("qhd,khd->hqk", q_SHD, k_SHD) * D**-0.5
            if cap := options.get("softcap"):
                scores = cap * torch.tanh(scores / cap)
            weights = scores.masked_fill(~seen[: end - start, : end - start], float("-inf")).softmax(-1)
            outs.append(torch.einsum("hqk,khd->qhd", weights, v_SHD))
        return torch.cat(outs).view_as(q)

    given = [far(t, 1) for t in tensors] if spread else tensors
    found = results_of(ours, given, upstream)
    if options["deterministic"]:
        same_bits(found, results_of(ours, given, upstream))
    exact = results_of(written_out, [t.double() for t in tensors], upstream)
    results = zip(["output", "dq", "dk", "dv"], found, exact, results_of(written_out, tensors, upstream), strict=True)
    if S == 1:  # the only key's weight is 1: dq and dk are 0, and ours what two orders of a sum differ by
        results = [each for each in results if each[0] in ("output", "dv")]
        if not max(found[1].abs().amax(), found[2].abs().amax()) <= 1e-4:
            raise AssertionError("the gradient of a query or key that has only one to meet is not 0")
    compare(*map(list, zip(*results, strict=True)))


def statistics(device: str, tiny: bool, dtypes: list[torch.dtype]) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        sizes = (20_000, 60) if tiny else (20_000_000, 400)
        yield (
            f"{sizes[0]} elements, {dtype}",
            lambda a=(*sizes, dtype, device): gradients.check(gradients.make_tensors(*a)),
        )


def dtypes_of(device: str) -> list[torch.dtype]:
    if device == "cuda":
        return [torch.bfloat16, torch.float16, torch.float32]
    # Triton's interpreter cuts bfloat16 off where a GPU rounds.
    interpreted = os.environ.get("AVA_KERNELS_BACKEND") == "triton"
    return [torch.float32, torch.float16 if interpreted else torch.bfloat16]


GROUPS = {
    "routing": routing,
    "counting_sort": sorting,
    "rows": rows,
    "moe_mlp": experts,
    "grouped_mm": products,
    "rotary": rotations,
    "attention": attentions,
    "gradients": statistics,
}


def run_group(name: str, device: str, tiny: bool, dtypes: list[torch.dtype]) -> Iterator[dict[str, Any]]:
    """Runs its cases one by one → what came out of each."""
    for case, check in GROUPS[name](device, tiny, dtypes):
        outcome: dict[str, Any] = {"kernel": name, "case": case, "ok": True}
        try:
            check()
            if device == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            outcome |= {
                "ok": False,
                "error": f"{type(error).__name__}: {error}"[:2000],
                "at": f"{place.filename}:{place.lineno}",
            }
        yield outcome
        if is_lost(outcome.get("error", "")):
            return  # whatever follows on this device would fail for the same reason


def is_lost(error: object) -> bool:
    """Whether nothing more can run on the device in this process."""
    return any(text in str(error) for text in ("CUDA error", "Triton Error [CUDA]"))


def main() -> int:
    parser = argparse.ArgumentParser(description="Checks every kernel on this device against float64.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="sizes for the interpreter")
    parser.add_argument("--only", action="append", choices=GROUPS, help="repeatable; all if left out")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="all if left out")
    parser.add_argument("--json", type=Path, help="append one line of JSON a case to this file")
    options = parser.parse_args()
    dtypes = [getattr(torch, options.dtype)] if options.dtype else dtypes_of(options.device)
    failed = 0
    for name in options.only or GROUPS:
        for outcome in run_group(name, options.device, options.tiny, dtypes):
            failed += not outcome["ok"]
            verdict = "ok" if outcome["ok"] else f"FAILED  {outcome['error'].splitlines()[0]}  ({outcome['at']})"
            print(f"{name:14} {outcome['case']:60} {verdict}", flush=True)
            if options.json:
                with options.json.open("a") as file:
                    file.write(json.dumps(outcome) + "\n")
    print(f"{failed} cases failed" if failed else "every case is right")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
