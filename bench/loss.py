"""Times the loss over the vocabulary, from the last layer to its gradients, beside torch's and Liger's.

    OMP_NUM_THREADS=2 python -m bench.loss               # on the GPU where there is one: bfloat16

"ours" is `ava_fast.model.head`, which never holds all logits; "plain" is F.linear and F.cross_entropy in float32, as
models have it; Liger's fused one runs where it is installed. Each gives the mean loss of T tokens and the gradients of
x (T, M) and the weights (V, M); all are first compared with float64. FLOPs are 6·T·M·V. On a GPU `peak` is the memory
on top of inputs and gradients' own. A ratio is a peer's time over ours.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ava_fast.model.head import Head
from bench import machine
from bench.check import relative_error
from bench.experts import WRONG


class Size(NamedTuple):
    T: int
    M: int
    V: int

    @classmethod
    def of(cls, text: str) -> Size:
        return cls(*map(int, text.split(",")))


SIZES = {
    "cuda": [Size(16384, 2048, 50304), Size(16384, 4096, 151936)],
    "cpu": [Size(1024, 128, 1024), Size(2048, 256, 8192)],
}
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # x (T, M), weight (V, M), labels (T)


def ours(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    with torch.device("meta"):
        head = Head(x.shape[1], len(weight))
    return torch.func.functional_call(head, {"weight": weight}, (x, labels))


def plain(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(x, weight)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)


def liger(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    module = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    return module.LigerFusedLinearCrossEntropyLoss()(weight, x, labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--size", action="append", type=Size.of, help="T,M,V; repeatable")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for size in options.size or SIZES[device]:
        rows.append(measure(size, device, options.runs))
        print(f"loss of {size.T} tokens, width {size.M}, {size.V} words: ", end="")
        print(", ".join(_told(*item) for item in rows[-1]["contenders"].items()), flush=True)
        for name, why in rows[-1]["failed"].items():
            print(f"  {name}: {why.splitlines()[0][:140]}")
    print(machine.write(f"loss_{device}", {"runs": options.runs, "sizes": rows}))


def _told(name: str, figures: dict[str, Any]) -> str:
    return f"{name} {figures['median_ms']:.3f} ms ({figures['ratio']['median']:.2f}×)"


def problem_of(size: Size, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(size.T, size.M, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(size.V, size.M, device=device) * size.M**-0.5).to(dtype).requires_grad_()
    return x, weight, torch.randint(size.V, (size.T,), device=device)


def results_of(loss: Loss, x: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
    value = loss(x, weight, labels)
    return [value.detach(), *torch.autograd.grad(value, (x, weight))]


def measure(size: Size, device: str, runs: int) -> dict[str, Any]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    contenders: dict[str, Loss] = {"ours": ours, "plain": plain} | ({"Liger": liger} if device == "cuda" else {})
    few = problem_of(size._replace(T=min(size.T, 256)), device, dtype)
    exact = results_of(plain, *(t.detach().double().requires_grad_() for t in few[:2]), few[2])
    failed: dict[str, str] = {}
    memory: dict[str, dict[str, int]] = {}
    problem = problem_of(size, device, dtype)
    for name, loss in list(contenders.items()):
        try:
            error = max(relative_error(a, b) for a, b in zip(results_of(loss, *few), exact, strict=True))
            if not error <= WRONG:
                raise ValueError(f"wrong: relative error {error:.3g}")
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            kept = results_of(loss, *problem)  # fits into memory
            if device == "cuda":
                own = sum(t.numel() * t.element_size() for t in kept)
                memory[name] = {"peak": torch.cuda.max_memory_allocated() - before - own}
            del kept
        except Exception as error:  # a peer that is not installed, or does not work here
            failed[name] = f"{type(error).__name__}: {error}"
            del contenders[name]
    actions = {name: lambda loss=loss: results_of(loss, *problem) for name, loss in contenders.items()}
    seconds = machine.alternate(actions, device, runs, label=f"loss {size.V}", before=machine.emptied_cache(device))
    flops = 6 * size.T * size.M * size.V
    return {
        "size": size._asdict(),
        "flops": flops,
        # x and weights read, their gradients written, each once: what no loss can do without
        "bytes": 2 * (size.T + size.V) * size.M * dtype.itemsize,
        "contenders": {
            name: {
                **machine.spread(times),
                "tflops": flops / statistics.median(times) / 1e12,
                "ratio": machine.spread_of_ratios(times, seconds.get("ours", times)),
                **memory.get(name, {}),
            }
            for name, times in seconds.items()
        },
        "failed": failed,
    }


if __name__ == "__main__":
    main()
