"""Searches for better tiles of the experts' products on this GPU, and keeps them for `ava_kernels` to find.

    python -m bench.tune experts [--budget MINUTES] [--shapes T,M,I,E,K …] [--dtype bfloat16] [--ship]

For one kernel after the other (up, rows, back, weights) every candidate takes the place of the tile in use, and the
whole pass that the kernel belongs to is timed, forward or backward. A candidate that does not compile, needs more
memory than there is, or gives another result is passed over. What beats the tile in use by more than 1 % replaces it.

Results go, problem by problem as they are found, into `~/.cache/ava_kernels/tiles.json` (AVA_KERNELS_CACHE names
another folder); with --ship into the table in the package. Their form stands in `ava_kernels/experts/tiles.py`.
Without a GPU it exits with 2, unless the kernels are interpreted (TRITON_INTERPRET=1): to test the search, not the
tiles.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from ava_kernels import moe_mlp, route
from ava_kernels.experts import tiles
from ava_kernels.experts.tiles import KERNELS, Table, Tile

from bench import machine

# T, M, I, E, K: of OLMoE and Qwen3, then the published benchmarks', the widest spread first.
SHAPES = [
    (32768, 2048, 1024, 64, 8), (8192, 2048, 768, 128, 8), (24576, 1536, 512, 64, 4), (32768, 4096, 1024, 64, 4),
    (40960, 768, 256, 128, 8), (32768, 4096, 512, 256, 16), (24576, 1536, 256, 128, 8), (24576, 1536, 1024, 32, 2),
    (40960, 768, 512, 64, 4), (40960, 768, 1024, 32, 2), (32768, 4096, 256, 256, 16), (32768, 4096, 512, 128, 8),
    (32768, 4096, 1024, 128, 8), (32768, 4096, 2048, 64, 4),
]  # fmt: skip
GAIN = 1.01  # how much faster a candidate must be
PASS = {"up": "forward", "rows": "backward", "back": "backward", "weights": "backward"}


def candidates(kernel: str, elements: int) -> Iterator[Tile]:
    """Tiles worth a try for operands of `elements` bytes an element."""
    gated = kernel == "up"  # two accumulators
    for BM, BN, BK in itertools.product((64, 128, 256), (64, 128, 256), (32, 64)):
        accumulator = BM * BN * (2 if gated else 1)
        if not 64 * 64 <= accumulator <= 128 * 256 or (kernel == "back" and accumulator > 128 * 128):
            continue
        warps = 4 if accumulator <= 128 * 64 else 8
        for stages in (3, 4, 5):
            if (BM + BN * (2 if gated else 1)) * BK * elements * (stages - (kernel == "weights")) > 220 * 1024:
                continue
            for G in (4, 8, 16) if stages == 4 else (8,):
                yield Tile(BM, BN, BK, warps, stages, G, 1 if warps == 8 else 2)


def tune(shape: tuple[int, ...], dtype: torch.dtype, device: str, found: Path, deadline: float, runs: int) -> None:
    """Searches one problem, and writes into `found` what is better. Candidates are put into `tiles.cache_file()`."""
    T, M, I, E, K = shape
    run = _Problem(T, M, I, E, K, dtype, device)
    problem, generation = tiles.problem(E, M, I, dtype), "sm_{}{}".format(*tiles.capability(run.x.device))
    x = run.x
    truth = run.results()
    for kernel in KERNELS:
        best = tiles.tile_for(kernel, x, E, M, I)
        best_seconds = first_seconds = run.seconds(PASS[kernel], runs)
        tried = failed = 0
        for candidate in candidates(kernel, dtype.itemsize):
            if time.monotonic() > deadline:
                break
            tried += 1
            _write(tiles.cache_file(), generation, kernel, problem, candidate)
            try:
                same = run.results_like(truth)
                seconds = run.seconds(PASS[kernel], runs) if same else float("inf")
            except Exception as error:  # the compiler's and the driver's refusals have no common class
                print(f"  {kernel} {tuple(candidate)}: {type(error).__name__}", flush=True)
                same, seconds = True, float("inf")
            if not same:
                print(f"  {kernel} {tuple(candidate)}: WRONG RESULT", flush=True)
            failed += seconds == float("inf")
            if seconds * GAIN < best_seconds:
                best, best_seconds = candidate, seconds
        _write(tiles.cache_file(), generation, kernel, problem, best)
        if best_seconds < first_seconds:
            _write(found, generation, kernel, problem, best)
        print(
            f"{problem} {kernel}: {tuple(best)}, {PASS[kernel]} {1e3 * best_seconds:.3f} ms "
            f"({first_seconds / best_seconds:.2f}× the tile in use before; {tried} tried, {failed} failed)",
            flush=True,
        )


class _Problem:
    """A forward and backward pass of the experts, at one problem."""

    def __init__(self, T: int, M: int, I: int, E: int, K: int, dtype: torch.dtype, device: str):
        generator = torch.Generator(device).manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device)

        self.routing = route(random(T, E), K)
        self.x = random(T, M).to(dtype).requires_grad_()
        self.gate_up = (random(E, 2 * I, M) * M**-0.5).to(dtype).requires_grad_()
        self.down = (random(E, M, I) * I**-0.5).to(dtype).requires_grad_()
        self.dout = random(T, M).to(dtype)
        self.device = device

    def forward(self) -> torch.Tensor:
        return moe_mlp(self.x, self.gate_up, self.down, self.routing)

    def results(self) -> list[torch.Tensor]:
        out = self.forward()
        return [out, *torch.autograd.grad(out, (self.x, self.gate_up, self.down), self.dout)]

    def results_like(self, truth: list[torch.Tensor]) -> bool:
        """Whether results are those of other tiles: sums in another order, no more."""
        allowed = 4 * torch.finfo(self.x.dtype).eps
        return all((a - b).norm() <= allowed * b.norm() for a, b in zip(self.results(), truth, strict=True))

    def seconds(self, which: str, runs: int) -> float:
        """The median time of a pass."""
        if which == "forward":
            with torch.no_grad():
                return self._median(self.forward, runs)
        out = self.forward()
        tensors = (self.x, self.gate_up, self.down)
        return self._median(lambda: torch.autograd.grad(out, tensors, self.dout, retain_graph=True), runs)

    def _median(self, action: Callable[[], Any], runs: int) -> float:
        return statistics.median([machine.timed(action, self.device) for _ in range(runs + 2)][2:])


def _write(path: Path, generation: str, kernel: str, problem: str, tile: Tile) -> None:
    """Puts one tile into the table at `path`, whole or not at all."""
    table: Table = json.loads(path.read_text()) if path.is_file() else {}
    table.setdefault(generation, {}).setdefault(kernel, {})[problem] = list(tile)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(".tmp")
    text = json.dumps(table, indent=1, ensure_ascii=False)
    written.write_text(machine.lists_on_a_line(text) + "\n")
    os.replace(written, path)
    tiles.forget()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("operation", choices=["experts"])
    parser.add_argument("--budget", type=float, default=10.0, help="minutes (default: 10)")
    parser.add_argument("--shapes", nargs="+", help="T,M,I,E,K each (default: those of the benchmarks)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--runs", type=int, default=20, help="timed runs of a candidate (default: 20)")
    parser.add_argument("--ship", action="store_true", help="write into the table that the package ships")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and os.environ.get("AVA_KERNELS_BACKEND") != "triton":
        print("bench.tune needs a GPU, and torch finds none here", file=sys.stderr)
        return 2
    shapes = [tuple(map(int, text.split(","))) for text in arguments.shapes] if arguments.shapes else SHAPES
    own = tiles.cache_file()
    found = tiles.SHIPPED if arguments.ship else own
    deadline = time.monotonic() + 60 * arguments.budget
    with tempfile.TemporaryDirectory() as folder:  # a search that is broken off leaves no candidate behind
        if own.is_file():
            shutil.copy(own, folder)
        os.environ["AVA_KERNELS_CACHE"] = folder
        for shape in shapes:
            if time.monotonic() > deadline:
                print("the budget is spent; --budget gives more", flush=True)
                break
            tune(shape, getattr(torch, arguments.dtype), device, found, deadline, arguments.runs)
    print(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
