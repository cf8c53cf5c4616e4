"""Searches for better tiles of an operation's kernels on this GPU, and keeps them for `ava_kernels` to find.

    python -m bench.tune experts [--shapes T,M,I,E,K …]
    python -m bench.tune attention [--shapes B,S,H_q,H_kv,D,causal|full|packed …]
    python -m bench.tune hopper [--shapes B,S,H_q,H_kv,D,causal|full|packed …]
                        for each:  [--budget MINUTES] [--dtype bfloat16] [--ship]

For one kernel after the other (of the experts: up, grouped_mm, down_backward, weight_grad; of attention: forward, dkdv,
dq; of attention for Hopper: hopper_forward, hopper_dkdv, hopper_dq) every candidate that has the registers and the
shared memory takes the place of the tile in use, and the whole pass that the kernel belongs to is timed, forward or
backward. A candidate that does not compile, needs more memory than there is, or gives another result is passed over.
What beats the tile in use by more than 1 % replaces it. A problem's kernels have equal parts of the time that is left.

Results go, kernel by kernel as they are found, into `~/.cache/ava_kernels/tiles.json` (AVA_KERNELS_CACHE names another
folder); with --ship into the operation's table in the package. Their form stands in `ava_kernels/tiles.py`. Routing and
rotation wait for memory, not for tiles, and have none to search for. Without a GPU it exits with 2, unless the kernels
are interpreted (TRITON_INTERPRET=1, AVA_KERNELS_BACKEND=triton): to test the search, not the tiles.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import statistics
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from ava_kernels import moe_mlp, rope_attention, rope_table, route, tiles
from ava_kernels.attention import tiles as attention_tiles
from ava_kernels.experts import tiles as experts_tiles
from torch import Tensor

from bench import machine, tables
from bench.attention import Size

GAIN = 1.01  # how much faster a candidate must be
SHARED_MEMORY = 220 * 1024  # of a program, at most, on any GPU
REGISTERS = 192  # of a thread, for accumulators: what is left of 255 is for addresses and operands


class Problem(ABC):
    """A forward and backward pass of an operation, at one shape."""

    PASSES: ClassVar[dict[str, str]]  # of every kernel: which pass it belongs to
    name: str  # in tables
    leaves: tuple[Tensor, ...]
    dout: Tensor

    @abstractmethod
    def tile_for(self, kernel: str) -> tuple[int, ...]:
        """The one in use."""

    @abstractmethod
    def candidates(self, kernel: str) -> Iterator[tuple[int, ...]]:
        """Tiles worth a try."""

    @abstractmethod
    def forward(self) -> Tensor: ...

    def results(self) -> list[Tensor]:
        out = self.forward()
        return [out, *torch.autograd.grad(out, self.leaves, self.dout)]

    def results_like(self, truth: list[Tensor]) -> bool:
        """Whether results are those of other tiles: sums in another order, no more."""
        allowed = 4 * torch.finfo(self.dout.dtype).eps
        return all((a - b).norm() <= allowed * b.norm() for a, b in zip(self.results(), truth, strict=True))

    def seconds(self, kernel: str, runs: int) -> float:
        """The median time of the pass that a kernel belongs to."""
        if self.PASSES[kernel] == "forward":
            with torch.no_grad():
                return self._median(self.forward, runs)
        out = self.forward()
        return self._median(lambda: torch.autograd.grad(out, self.leaves, self.dout, retain_graph=True), runs)

    def _median(self, action: Callable[[], Any], runs: int) -> float:
        device = self.dout.device.type
        return statistics.median([machine.timed(action, device) for _ in range(runs + 2)][2:])


class Experts(Problem):
    SHAPES: ClassVar = [  # of OLMoE and Qwen3, then the published benchmarks', the widest spread first
        (32768, 2048, 1024, 64, 8), (8192, 2048, 768, 128, 8), (24576, 1536, 512, 64, 4), (32768, 4096, 1024, 64, 4),
        (40960, 768, 256, 128, 8), (32768, 4096, 512, 256, 16), (24576, 1536, 256, 128, 8), (24576, 1536, 1024, 32, 2),
        (40960, 768, 512, 64, 4), (40960, 768, 1024, 32, 2), (32768, 4096, 256, 256, 16), (32768, 4096, 512, 128, 8),
        (32768, 4096, 1024, 128, 8), (32768, 4096, 2048, 64, 4),
    ]  # fmt: skip
    SHAPE = "T,M,I,E,K"
    SHIPPED = experts_tiles.SHIPPED
    PASSES: ClassVar = {
        "up": "forward",
        "grouped_mm": "backward",
        "down_backward": "backward",
        "weight_grad": "backward",
    }

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: str):
        T, M, I, E, K = shape
        random = _random(device)
        self.sizes = E, M, I
        self.name = experts_tiles.problem(E, M, I, dtype)
        self.routing = route(random(T, E), K)
        x = random(T, M).to(dtype).requires_grad_()
        gate_up = (random(E, 2 * I, M) * M**-0.5).to(dtype).requires_grad_()
        down = (random(E, M, I) * I**-0.5).to(dtype).requires_grad_()
        self.leaves = x, gate_up, down
        self.dout = random(T, M).to(dtype)

    @staticmethod
    def shape_of(text: str) -> tuple[int, ...]:
        """Raises ValueError if it is none."""
        T, M, I, E, K = map(int, text.split(","))
        return T, M, I, E, K

    def tile_for(self, kernel: str) -> tuple[int, ...]:
        return experts_tiles.tile_for(kernel, self.dout, *self.sizes)

    def candidates(self, kernel: str) -> Iterator[tuple[int, ...]]:
        elements = self.dout.element_size()
        gated = kernel == "up"  # two accumulators
        for BM, BN, BK in itertools.product((64, 128, 256), (64, 128, 256), (32, 64)):
            accumulator = BM * BN * (2 if gated else 1)
            if not 64 * 64 <= accumulator <= 128 * 256 or (kernel == "down_backward" and accumulator > 128 * 128):
                continue
            warps = 4 if accumulator <= 128 * 64 else 8
            for stages in (3, 4, 5):
                operands = (BM + BN * (2 if gated else 1)) * BK * elements
                if operands * (stages - (kernel == "weight_grad")) > SHARED_MEMORY:
                    continue
                for G in (4, 8, 16) if stages == 4 else (8,):
                    yield experts_tiles.Tile(BM, BN, BK, warps, stages, G, 1 if warps == 8 else 2)

    def forward(self) -> Tensor:
        return moe_mlp(*self.leaves, self.routing, backend="triton")  # whatever is pinned


class Attention(Problem):
    # For each problem, which is the head's size and the mask, one length and number of heads of the benchmarks'.
    SHAPES: ClassVar = [Size(4, 4096, 64, 8, D, mask) for mask in ("causal", "full") for D in (128, 64)]
    SHAPE = "B,S,H_q,H_kv,D,causal|full|packed"
    SHIPPED = attention_tiles.SHIPPED
    PASSES: ClassVar = {"forward": "forward", "dkdv": "backward", "dq": "backward"}
    BACKEND: ClassVar = "triton"

    def __init__(self, shape: Size, dtype: torch.dtype, device: str):
        self.size = B, S, H_q, H_kv, D, mask = shape
        random = _random(device)
        self.window = -1, -1 if mask == "full" else 0
        self.name = attention_tiles.problem(dtype.itemsize, D, *self.window)
        q, k, v = (random(B, S, H, D).to(dtype).requires_grad_() for H in (H_q, H_kv, H_kv))
        self.leaves = q, k, v
        self.dout = random(B, S, H_q, D).to(dtype)
        self.table = rope_table(S, D, device=torch.device(device))
        self.cu_seqlens = torch.tensor(shape.ends(), dtype=torch.int32, device=device)

    @staticmethod
    def shape_of(text: str) -> Size:
        """Raises ValueError or TypeError if it is none."""
        size = Size.of(text)
        if size.mask not in ("causal", "full", "packed"):
            raise ValueError(text)
        return size

    def tile_for(self, kernel: str) -> tuple[int, ...]:
        return attention_tiles.tile_for(kernel, self.dout, *self.window)

    def candidates(self, kernel: str) -> Iterator[tuple[int, ...]]:
        """`own` rows stay with a program, of two operands backward and of one forward; `other` rows pass by."""
        D, elements = max(32, 1 << (self.size.D - 1).bit_length()), self.dout.element_size()
        fetched, outs = (1, 1) if kernel == "forward" else (2, 2 if kernel == "dkdv" else 1)
        for own, other, warps in itertools.product((128, 64, 32), (64, 128, 32), (8, 4)):
            scores = own * other * (1 if kernel == "forward" else 2)  # these and, backward, their gradients
            if (own * D * outs + scores) / (32 * warps) > REGISTERS:
                continue
            for stages in (2, 3, 1, 4):
                if (fetched * own + 2 * stages * other) * D * elements <= SHARED_MEMORY:
                    sizes = (other, own) if kernel == "dkdv" else (own, other)
                    yield attention_tiles.Tile(*sizes, warps, stages)

    def forward(self) -> Tensor:
        q, k, v = self.leaves
        if self.size.mask != "packed":
            return rope_attention(q, k, v, *self.table, causal=self.size.mask == "causal", backend=self.BACKEND)
        flat = [t.flatten(0, 1) for t in (q, k, v)]
        longest = self.size.S - self.size.S // 8 * 3
        packed = {"cu_seqlens": self.cu_seqlens, "max_seqlen": longest}
        return rope_attention(*flat, *self.table, **packed, backend=self.BACKEND).view_as(q)


class Hopper(Attention):
    """By the kernels of `hopper.py`, whose rings are alike for every mask."""

    SHAPES: ClassVar = [Size(4, 4096, 64, 8, D, "causal") for D in (128, 64)]
    PASSES: ClassVar = {"hopper_forward": "forward", "hopper_dkdv": "backward", "hopper_dq": "backward"}
    BACKEND: ClassVar = "hopper"

    def __init__(self, shape: Size, dtype: torch.dtype, device: str):
        super().__init__(shape, dtype, device)
        self.name = attention_tiles.ring_problems(dtype.itemsize, shape.D, False)[0]

    def tile_for(self, kernel: str) -> tuple[int, ...]:
        return attention_tiles.ring_for(kernel, self.dout, 0.0)

    def candidates(self, kernel: str) -> Iterator[tuple[int, ...]]:
        """128 rows stay with a program, of two operands backward and of one forward."""
        D = max(32, 1 << (self.size.D - 1).bit_length())
        own = 128 * D * (1 if kernel == "hopper_forward" else 2)
        for rows, stages in itertools.product((128, 64, 32, 16), (2, 3, 4, 5)):
            if (own + 2 * stages * rows * D) * self.dout.element_size() <= SHARED_MEMORY:
                yield attention_tiles.Ring(rows, stages)


OPERATIONS: dict[str, type[Experts] | type[Attention]] = {
    "experts": Experts,
    "attention": Attention,
    "hopper": Hopper,
}


def tune(problem: Problem, found: Path, deadline: float, runs: int) -> None:
    """Searches one problem, and writes into `found` what is better. Candidates are put into `tiles.cache_file()`."""
    generation = tiles.generation(problem.dout.device)
    truth = problem.results()
    for number, (kernel, which) in enumerate(problem.PASSES.items()):
        until = time.monotonic() + (deadline - time.monotonic()) / (len(problem.PASSES) - number)
        best = problem.tile_for(kernel)
        best_seconds = first_seconds = problem.seconds(kernel, runs)
        tried = failed = 0
        for candidate in problem.candidates(kernel):
            if time.monotonic() > until:
                break
            tried += 1
            tables.keep(tiles.cache_file(), generation, kernel, problem.name, candidate)
            try:
                same = problem.results_like(truth)
                seconds = problem.seconds(kernel, runs) if same else float("inf")
            except Exception as error:  # the compiler's and the driver's refusals have no common class
                print(f"  {kernel} {tuple(candidate)}: {type(error).__name__}", flush=True)
                same, seconds = True, float("inf")
            if not same:
                print(f"  {kernel} {tuple(candidate)}: WRONG RESULT", flush=True)
            failed += seconds == float("inf")
            if seconds * GAIN < best_seconds:
                best, best_seconds = candidate, seconds
        tables.keep(tiles.cache_file(), generation, kernel, problem.name, best)
        if best_seconds < first_seconds:
            tables.keep(found, generation, kernel, problem.name, best)
        print(
            f"{problem.name} {kernel}: {tuple(best)}, {which} {1e3 * best_seconds:.3f} ms "
            f"({first_seconds / best_seconds:.2f}× the tile in use before; {tried} tried, {failed} failed)",
            flush=True,
        )


def _random(device: str) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator, device=device)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("operation", choices=OPERATIONS)
    parser.add_argument("--budget", type=float, default=10.0, help="minutes (default: 10)")
    shapes = ", ".join(f"{kind.SHAPE} for {name}" for name, kind in OPERATIONS.items())
    parser.add_argument("--shapes", nargs="+", help=f"{shapes} (default: those of the benchmarks)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--runs", type=int, default=20, help="timed runs of a candidate (default: 20)")
    parser.add_argument("--ship", action="store_true", help="write into the table that the package ships")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and os.environ.get("AVA_KERNELS_BACKEND") != "triton":
        print("bench.tune needs a GPU, and torch finds none here", file=sys.stderr)
        return 2
    kind = OPERATIONS[arguments.operation]
    shapes = []
    for text in arguments.shapes or ():
        try:
            shapes.append(kind.shape_of(text))
        except (TypeError, ValueError):
            parser.error(f"--shapes: {text} is no shape of {arguments.operation}; it must be {kind.SHAPE}")
    own = tiles.cache_file()
    found = kind.SHIPPED if arguments.ship else own
    deadline = time.monotonic() + 60 * arguments.budget
    searched: dict[str, Any] = {}
    failed = False
    with tempfile.TemporaryDirectory() as folder:  # a search that is broken off leaves no candidate behind
        if own.is_file():
            shutil.copy(own, folder)
        os.environ["AVA_KERNELS_CACHE"] = folder
        for shape in shapes or kind.SHAPES:
            try:
                problem = kind(shape, getattr(torch, arguments.dtype), device)
                if problem.name in searched:
                    print(f"{problem.name}: {tuple(shape)} has the tiles of {searched[problem.name]}", flush=True)
                    continue
                if time.monotonic() > deadline:
                    print("the budget is spent; --budget gives more", flush=True)
                    break
                tune(problem, found, deadline, arguments.runs)
                searched[problem.name] = tuple(shape)
            except Exception as error:  # such as too little memory: others may fit
                print(f"{tuple(shape)}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                failed = True
    print(found)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
