"""Times RMSNorm with its gradients, as the model has it, beside torch's, torch's compiled, and Liger's.

    OMP_NUM_THREADS=2 python -m bench.norm               # on the GPU where there is one: bfloat16

"residual": a sum of two tensors, which goes on, and its norm; "alone": the norm of what is there, as of heads. "ours"
is `ava_fast.model.norm`, on a GPU the same as "torch". Liger's kernels run where it is installed. Results and all
gradients are first compared with float64. Bytes are those of R·N elements that must be read and written, forward and
backward: 5 times alone, 8 times with the sum. A ratio is a peer's time over ours.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ava_fast.model.norm import rms_norm
from bench import machine
from bench.check import relative_error
from bench.experts import WRONG

EPS = 1e-5


class Size(NamedTuple):
    R: int  # rows
    N: int
    kind: str  # residual, alone

    @classmethod
    def of(cls, text: str) -> Size:
        rows, width, kind = text.split(",")
        if kind not in ("residual", "alone"):
            raise ValueError(text)
        return cls(int(rows), int(width), kind)


SIZES = {
    "cuda": [Size(16384, 2048, "residual"), Size(16384, 4096, "residual"), Size(16384 * 16, 128, "alone")],
    "cpu": [
        Size(1024, 128, "residual"),
        Size(2048, 256, "residual"),
        Size(2048, 1024, "residual"),
        Size(2048 * 8, 64, "alone"),
    ],
}
Norm = Callable[[Tensor, Tensor, float], Tensor]
Contender = Callable[[list[Tensor], Tensor], list[Tensor]]  # what is added up (R, N), weight (N,) → sum (or not), norm


def by_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def with_sum(norm: Norm, summands: list[Tensor], weight: Tensor) -> list[Tensor]:
    if len(summands) == 1:
        return [norm(summands[0], weight, EPS)]
    total = summands[0] + summands[1]
    return [total, norm(total, weight, EPS)]


def liger(summands: list[Tensor], weight: Tensor) -> list[Tensor]:
    if len(summands) == 1:
        function = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
        return [function.apply(summands[0], weight, EPS, 0.0, "llama", False)]
    function = importlib.import_module("liger_kernel.ops.fused_add_rms_norm").LigerFusedAddRMSNormFunction
    normed, total = function.apply(*summands, weight, EPS, 0.0, "llama", False)
    return [total, normed]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--size", action="append", type=Size.of, help="R,N,residual|alone; repeatable")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for size in options.size or SIZES[device]:
        rows.append(measure(size, device, options.runs))
        print(f"norm of {size.R} × {size.N}, {size.kind}: ", end="")
        print(", ".join(_told(*item) for item in rows[-1]["contenders"].items()), flush=True)
        for name, why in rows[-1]["failed"].items():
            print(f"  {name}: {why.splitlines()[0][:140]}")
    print(machine.write(f"norm_{device}", {"runs": options.runs, "sizes": rows}))


def _told(name: str, figures: dict[str, Any]) -> str:
    return f"{name} {figures['median_ms']:.3f} ms ({figures['ratio']['median']:.2f}×)"


def contenders(device: str) -> dict[str, Contender]:
    plain = partial(with_sum, by_torch)
    known: dict[str, Contender] = {"ours": partial(with_sum, rms_norm), "torch": plain}
    known["torch, compiled"] = torch.compile(plain, dynamic=False)
    return known | ({"Liger": liger} if device == "cuda" else {})


def problem_of(size: Size, device: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """→ what is added up, the weight, and upstream gradients."""
    torch.manual_seed(0)
    count = 2 if size.kind == "residual" else 1
    summands = [torch.randn(size.R, size.N, device=device).to(dtype).requires_grad_() for _ in range(count)]
    weight = torch.randn(size.N, device=device).to(dtype).requires_grad_()
    return summands, weight, [torch.randn(size.R, size.N, device=device).to(dtype) for _ in range(count)]


def results_of(contender: Contender, summands: list[Tensor], weight: Tensor, upstream: list[Tensor]) -> list[Tensor]:
    outs = contender(summands, weight)
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, [*summands, weight], upstream)]


def measure(size: Size, device: str, runs: int) -> dict[str, Any]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    summands, weight, upstream = problem_of(size, device, dtype)
    doubles = [t.detach().double().requires_grad_() for t in (*summands, weight)]
    exact = results_of(partial(with_sum, by_torch), doubles[:-1], doubles[-1], [t.double() for t in upstream])
    failed, actions = {}, {}
    for name, contender in contenders(device).items():
        action = partial(results_of, contender, summands, weight, upstream)
        try:
            error = max(relative_error(a, b) for a, b in zip(action(), exact, strict=True))
            if not error <= WRONG:
                raise ValueError(f"wrong: relative error {error:.3g}")
            actions[name] = action
        except Exception as error:  # a peer that is not installed, or does not work here
            failed[name] = f"{type(error).__name__}: {error}"
    seconds = machine.alternate(actions, device, runs, before=machine.emptied_cache(device))
    moved = (8 if size.kind == "residual" else 5) * size.R * size.N * dtype.itemsize
    return {
        "size": size._asdict(),
        "bytes": moved,
        "contenders": {
            name: {
                **machine.spread(times),
                "gb_per_second": moved / statistics.median(times) / 1e9,
                "ratio": machine.spread_of_ratios(times, seconds.get("ours", times)),
            }
            for name, times in seconds.items()
        },
        "failed": failed,
    }


if __name__ == "__main__":
    main()
