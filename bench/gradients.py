"""Times gradient statistics and clipping beside what trainers run today: torch, DeepSpeed's path, apex's algorithm.

    OMP_NUM_THREADS=2 python -m bench.gradients          # on the GPU where there is one

On a CPU 50 million float32 elements in 400 tensors, on a GPU a thousand million bfloat16 in 2,000; sizes differ as a
model's do. Contenders take turns, so that a machine whose speed drifts slows all of them. Each finds the norm and
whether a value is not finite:

- torch: `torch.nn.utils.get_total_norm(foreach=True)` and a pass of `isfinite` over every tensor;
- foreach: `_foreach_norm`, the norm of the norms, and whether that is finite;
- deepspeed: for each tensor `isinf`, `isnan` and `vector_norm` of its double, then one wait for the result;
- apex: its algorithm as documented, 110 tensors a launch, float32 sums and a flag for what is not finite. Restated with
  `_foreach_norm` on such groups, as the package is not to be had: a stand-in, on a GPU slower than its own kernel.

`clip` multiplies all of them by a factor below 1, `clip by 1` by 1, beside `_foreach_mul_`. On a GPU, bytes read over
time are given as a share of what a copy reads and writes, and every contender runs from a CUDA graph too where it can,
without the time that the host takes to launch it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from ava_kernels import clip_, grad_stats
from ava_kernels.gradients import reference
from torch import Tensor

from bench import machine

SIZES = {"cpu": (50_000_000, 400, torch.float32), "cuda": (1_000_000_000, 2_000, torch.bfloat16)}
APEX_GROUP = 110
PEERS = ("torch", "foreach", "deepspeed", "apex")


def make_tensors(elements: int, count: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Shares of `elements` from one to thirty of the smallest: few large, many small."""
    weights = [1 + 29 * (index % 7 == 0) + index % 3 for index in range(count)]
    sizes = [elements * weight // sum(weights) for weight in weights]
    sizes[0] += elements - sum(sizes)
    return [torch.randn(size, device=device).mul_(1e-3).to(dtype) for size in sizes]


def torch_path(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    norm = torch.nn.utils.get_total_norm(tensors, foreach=True)
    return norm, torch.stack([t.isfinite().all() for t in tensors]).all()


def foreach(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    norm = torch.stack(torch._foreach_norm(tensors)).norm()
    return norm, norm.isfinite()


def deepspeed(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    overflow = torch.zeros((), dtype=torch.bool, device=tensors[0].device)
    for t in tensors:
        overflow = overflow | t.isinf().any() | t.isnan().any()
    norms = [torch.linalg.vector_norm(t.double()) for t in tensors]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    return norm, torch.tensor(not (overflow.item() or norm.item() == float("inf")))


def apex(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    groups = [tensors[begin : begin + APEX_GROUP] for begin in range(0, len(tensors), APEX_GROUP)]
    norms = [torch.stack(torch._foreach_norm(group, 2, torch.float32)).norm() for group in groups]
    norm = torch.stack(norms).norm()
    return norm, norm.isfinite()


def main() -> None:
    parser = argparse.ArgumentParser(description="Times gradient statistics beside torch, DeepSpeed's path and apex's.")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--elements", type=int)
    parser.add_argument("--tensors", type=int)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    elements, count, dtype = SIZES[device]
    elements, count = options.elements or elements, options.tensors or count
    torch.manual_seed(0)
    tensors = make_tensors(elements, count, dtype, device)
    check(tensors)
    result = {"elements": elements, "tensors": count, "dtype": str(dtype), "runs": options.runs}
    result["bytes"] = elements * dtype.itemsize  # read
    result |= _measure(tensors, device, options.runs)
    for name, figures in result["contenders"].items():
        print(f"  {name:28} {figures['median_ms']:9.3f} ms  ({figures['q1_ms']:.3f} – {figures['q3_ms']:.3f})")
    print({name: round(ratio["median"], 2) for name, ratio in result["ratios"].items()})
    print(machine.write(f"gradients_{device}", result))


def _measure(tensors: list[Tensor], device: str, runs: int) -> dict[str, Any]:
    factor, one = torch.tensor(1.0 - 1e-3, device=device), torch.tensor(1.0, device=device)
    contenders: dict[str, Callable[[], Any]] = {
        "ours": lambda: grad_stats(tensors),
        "ours, per tensor": lambda: grad_stats(tensors, per_tensor=True),
        "torch": lambda: torch_path(tensors),
        "foreach": lambda: foreach(tensors),
        "deepspeed": lambda: deepspeed(tensors),
        "apex": lambda: apex(tensors),
        "ours, clip": lambda: clip_(tensors, factor),
        "foreach, clip": lambda: torch._foreach_mul_(tensors, factor),
        "ours, clip by 1": lambda: clip_(tensors, one),
    }
    if device == "cuda":
        for name in ("ours", "ours, clip", "ours, clip by 1", "torch", "foreach", "apex"):
            contenders[f"{name}, captured"] = _capture(contenders[name])
        source = torch.cat([t.flatten() for t in tensors])
        target = torch.empty_like(source)
        contenders["copy"] = lambda: target.copy_(source)
    seconds = machine.alternate(contenders, device, runs, warm_up=2, label="gradients")
    ratios = {name: machine.spread_of_ratios(seconds[name], seconds["ours"]) for name in PEERS}
    ratios["clip"] = machine.spread_of_ratios(seconds["foreach, clip"], seconds["ours, clip"])
    result: dict[str, Any] = {
        "ratios": ratios,
        "contenders": {name: machine.spread(times) for name, times in seconds.items()},
    }
    if device == "cuda":
        copy = statistics.median(seconds["copy"])  # reads and writes every byte; the statistics only read
        for name in ("ours", "ours, captured"):
            result[f"share_of_copy_bandwidth: {name}"] = copy / 2 / statistics.median(seconds[name])
    return result


def _capture(action: Callable[[], Any]) -> Callable[[], None]:
    machine.on_side_stream(action)
    return machine.capture(action)[0].replay


def check(tensors: list[Tensor]) -> None:
    """On this device: our results are the reference's, twice the same, also from a CUDA graph and after a NaN."""
    few = [t[:100_001] for t in tensors[:50]] + [tensors[0][1:200], tensors[0].float()[:70_000]]
    for spoilt in (None, float("nan"), float("-inf"), 1e30):
        given = [t.clone() for t in few]
        if spoilt is not None:
            given[7][5] = given[30][-1] = spoilt
        expected = reference.stats(given, True)
        found = [grad_stats(given, per_tensor=True) for _ in range(2)]
        for name in reference.Outputs._fields:
            value, again = (getattr(stats, name) for stats in found)
            torch.testing.assert_close(value, getattr(expected, name), rtol=2.0**-22, atol=0, equal_nan=True)
            torch.testing.assert_close(value, again, rtol=0, atol=0, equal_nan=True)
        if tensors[0].is_cuda and spoilt is None:
            results: list[Any] = []
            replay = _capture(lambda given=given, results=results: results.append(grad_stats(given)))  # type: ignore[misc]
            given[3].mul_(100)
            replay()
            torch.testing.assert_close(results[-1].norm, grad_stats(given).norm, rtol=0, atol=0)
        factor = torch.tensor(0.3, device=given[0].device)
        scaled = [t.clone() for t in given]
        clip_(given, factor)
        reference.scale_(scaled, factor)
        torch.testing.assert_close(given, scaled, rtol=0, atol=0, equal_nan=True)


if __name__ == "__main__":
    main()
