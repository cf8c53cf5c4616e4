"""Times the rotation of queries and keys, with its gradient, beside how models write it, and Liger's kernel.

    OMP_NUM_THREADS=2 python -m bench.rotary             # on the GPU where there is one: bfloat16

"plain" rotates halves with cat and two products, as transformers' models do; Liger's kernel runs where it is installed.
Every contender's queries, keys and their gradients are first compared with float64. Each of the 2·T·(H_q + H_kv)·D
elements is read and written once forward and once backward: those are the bytes. A ratio is a peer's time over ours.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import machine
from bench.attention import WRONG, Problem, Size, liger_rotation, make_problem, our_rotation, plain_rotation
from bench.check import relative_error

SIZES = {
    "cuda": [Size(16384 // 4096, 4096, H_q, H_kv, D, "causal") for D in (128, 64) for H_q, H_kv in ((16, 16), (64, 8))],
    "cpu": [Size(4, 512, 8, 8, 64, "causal"), Size(4, 512, 8, 2, 64, "causal")],
}
CONTENDERS: dict[str, Callable[..., tuple[Tensor, ...]]] = {"ours": our_rotation, "plain": plain_rotation}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--size", action="append", type=Size.of, help="B,S,H_q,H_kv,D,causal; repeatable")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for size in options.size or SIZES[device]:
        rows.append(measure(size, device, options.runs))
        print(f"rotation {size.key()}: " + ", ".join(_told(*item) for item in rows[-1]["contenders"].items()))
        for name, why in rows[-1]["failed"].items():
            print(f"  {name}: {why.splitlines()[0][:140]}")
    print(machine.write(f"rotary_{device}", {"runs": options.runs, "sizes": rows}))


def _told(name: str, figures: dict[str, Any]) -> str:
    return f"{name} {figures['median_ms']:.3f} ms ({figures['ratio']['median']:.2f}×)"


def rotated_with_gradients(rotate: Callable[..., tuple[Tensor, ...]], problem: Problem, size: Size) -> list[Tensor]:
    """Queries and keys, rotated, and their gradients where the products with fixed numbers are asked for."""
    q, k = (t.detach().clone().requires_grad_() for t in problem.tensors[:2])  # Liger's writes into what it is given
    rotated = rotate(q * 1, k * 1, *problem.tables, size, problem.cu)
    gradients = torch.autograd.grad(rotated, (q, k), (problem.upstream, problem.tensors[2].detach()))
    return [*(t.detach() for t in rotated), *gradients]


def measure(size: Size, device: str, runs: int) -> dict[str, Any]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    contenders = CONTENDERS | ({"Liger": liger_rotation} if device == "cuda" else {})
    problem = make_problem(size, device, dtype)
    exact_problem = Problem([t.detach().double() for t in problem.tensors], problem.upstream.double(), *problem[2:])
    exact = rotated_with_gradients(plain_rotation, exact_problem, size)
    failed = {}
    for name, rotate in list(contenders.items()):
        try:
            error = max(
                relative_error(a, b) for a, b in zip(rotated_with_gradients(rotate, problem, size), exact, strict=True)
            )
            if not error <= WRONG:
                raise ValueError(f"wrong: relative error {error:.3g}")
        except Exception as error:  # a peer that is not installed, or does not work here
            failed[name] = f"{type(error).__name__}: {error}"
            del contenders[name]
    actions = {name: action(rotate, problem, size) for name, rotate in contenders.items()}
    actions = {name: action(rotate, problem, size) for name, rotate in contenders.items()}
    seconds = machine.alternate(actions, device, runs, before=machine.emptied_cache(device))
    ours = seconds.get("ours")
    elements = size.B * size.S * (size.H_q + size.H_kv) * size.D
    return {
        "size": size._asdict(),
        "bytes": 4 * elements * dtype.itemsize,
        "contenders": {
            name: {
                **machine.spread(times),
                "gb_per_second": 4 * elements * dtype.itemsize / statistics.median(times) / 1e9,
                "ratio": machine.spread_of_ratios(times, ours or times),
            }
            for name, times in seconds.items()
        },
        "failed": failed,
    }


def action(rotate: Callable[..., tuple[Tensor, ...]], problem: Problem, size: Size) -> Callable[[], object]:
    def run() -> object:
        q, k, _ = problem.tensors
        rotated = rotate(q, k, *problem.tables, size, problem.cu)
        return torch.autograd.grad(rotated, (q, k), (problem.upstream, problem.tensors[2].detach()))

    return run


if __name__ == "__main__":
    main()
