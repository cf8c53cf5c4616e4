"""Times rotation and attention beside their peers: forward and backward apart, at pretraining's lengths.

    python -m bench.attention [--budget MINUTES]         # on a GPU: bfloat16
    OMP_NUM_THREADS=2 python -m bench.attention          # on a CPU: float32

Every contender takes queries and keys before the rotation. "ours, triton" is `rope_attention` with its own kernels,
"ours, hopper" with those for H100 and H200, "ours, sdpa" with torch's behind our rotation; "separate, triton" is our
kernels behind a rotation of its own, which shows what fusing gains by itself. Peers are cuDNN's and FlashAttention's
kernels in torch and flash-attn 4, each behind our rotation and, where Liger is installed, behind Liger's. Packed rows
hold three documents of S/8, S/4 and 5·S/8 tokens; there torch's `varlen_attn` and flash-attn 4 are the peers.

Before it is timed, each contender's output and gradients are compared with float64 at fewer tokens; one that is wrong
or fails is recorded with the reason. Contenders take turns. On a GPU the second-level cache is overwritten before each
run, and each size is a process of its own: where that crashes or hangs, the contender that ran is left out from then on
(ours at that size) and the size begun again. FLOPs are 4·H·D for each query and key that see each other (half of S²
where causal), 2.5 times that backward; ratios are a contender's time over the first one's. Results are written after
every size.

--pin puts the order of our implementations, by the mean of forward and backward times over all sizes of a problem, into
the table that `rope_attention` chooses by: `~/.cache/ava_kernels/tiles.json`, or with --ship that of the package.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from ava_kernels import apply_rotary, rope_attention, rope_table, tiles
from ava_kernels.attention.tiles import SHIPPED, order_problem
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import machine, tables
from bench.check import is_lost, relative_error
from bench.experts import WARM_UP, WRONG, follow


class Size(NamedTuple):
    B: int
    S: int
    H_q: int
    H_kv: int
    D: int
    mask: str  # causal, full, packed

    @classmethod
    def of(cls, text: str) -> Size:
        *numbers, mask = text.split(",")
        return cls(*map(int, numbers), mask)  # type: ignore[arg-type]

    def key(self) -> str:
        return ",".join(map(str, self))

    def ends(self) -> list[int]:
        """Of the documents, 0 first."""
        cuts = (0, self.S // 8, self.S // 8 * 3) if self.mask == "packed" else (0,)
        return [b * self.S + cut for b in range(self.B) for cut in cuts] + [self.B * self.S]


HEADS = [(16, 16, 64), (16, 16, 128), (64, 8, 64), (64, 8, 128)]
SIZES = {
    "cuda": [
        Size(16384 // S, S, *heads, mask)
        for mask in ("causal", "packed", "full")
        for S in (4096, 2048, 1024, 8192, 16384)
        for heads in HEADS[::-1]
    ],
    "cpu": [Size(4, 512, 8, 8, 64, "causal"), Size(4, 512, 8, 2, 64, "causal"), Size(4, 512, 8, 2, 64, "packed")],
}
OURS = ("ours, triton", "ours, hopper", "ours, sdpa", "separate, triton")
CHECKED_TOKENS = {"cuda": 1024, "cpu": 64}

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Size, Tensor], Tensor]  # q, k, v, cos, sin, size, cu_seqlens


def ours(q: Tensor, k: Tensor, v: Tensor, cos: Any, sin: Any, size: Size, cu: Tensor, backend: Any = None) -> Tensor:
    if size.mask != "packed":
        return rope_attention(q, k, v, cos, sin, causal=size.mask == "causal", backend=backend)
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    longest = size.S - size.S // 8 * 3
    return rope_attention(*flat, cos, sin, cu_seqlens=cu, max_seqlen=longest, backend=backend).view_as(q)


def separate(rotate: Any, attend: Any, q: Tensor, k: Tensor, v: Tensor, cos: Any, sin: Any, *rest: Any) -> Tensor:
    q, k = rotate(q, k, cos, sin, *rest)
    return attend(q, k, v, *rest)


# What a model makes once a step for all of its layers is not part of a rotation's time.


@functools.lru_cache(maxsize=4)
def places(size: Size, device: torch.device) -> Tensor:
    """(B, S): each token's place in its document."""
    lengths = [end - start for start, end in itertools.pairwise(size.ends())]
    return torch.cat([torch.arange(n, device=device) for n in lengths]).view(size.B, size.S)


@functools.lru_cache(maxsize=8)
def whole_table(half: Tensor, size: Size, dtype: torch.dtype) -> Tensor:
    """(B, S, D), as transformers' models have it: each angle twice."""
    return torch.cat((half, half), dim=-1)[places(size, half.device)].to(dtype)


def our_rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, size: Size, cu: Tensor) -> tuple[Tensor, ...]:
    at = places(size, q.device) if size.mask == "packed" else None
    return apply_rotary(q, cos, sin, position_ids=at), apply_rotary(k, cos, sin, position_ids=at)


def liger_rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, size: Size, cu: Tensor) -> tuple[Tensor, ...]:
    """Writes into q and k where it can."""
    rotate = importlib.import_module("liger_kernel.transformers.rope").liger_rotary_pos_emb
    whole = [whole_table(t, size, q.dtype) for t in (cos, sin)]
    q, k = rotate(q.transpose(1, 2), k.transpose(1, 2), *whole)
    return q.transpose(1, 2), k.transpose(1, 2)


def plain_rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, size: Size, cu: Tensor) -> tuple[Tensor, ...]:
    """As transformers' models write it."""
    cos, sin = (whole_table(t, size, q.dtype)[:, :, None] for t in (cos, sin))
    half = q.shape[-1] // 2
    return tuple(t * cos + torch.cat((-t[..., half:], t[..., :half]), dim=-1) * sin for t in (q, k))


def by_torch(backend: SDPBackend | None, q: Tensor, k: Tensor, v: Tensor, size: Size, cu: Tensor) -> Tensor:
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    mask = None
    if size.mask == "packed":
        document = torch.searchsorted(cu, torch.arange(size.B * size.S, device=q.device), right=True)
        document = document.view(size.B, 1, size.S)
        mask = (document[..., None] == document[..., None, :]).tril()
    attend = partial(
        F.scaled_dot_product_attention,
        *heads_first,
        attn_mask=mask,
        is_causal=size.mask == "causal",
        enable_gqa=size.H_q != size.H_kv,
    )
    if backend is None:
        return attend().transpose(1, 2)
    with sdpa_kernel(backend):
        return attend().transpose(1, 2)


def by_varlen(q: Tensor, k: Tensor, v: Tensor, size: Size, cu: Tensor) -> Tensor:
    attend = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    longest = size.S - size.S // 8 * 3
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    return attend(*flat, cu, cu, longest, longest, window_size=(-1, 0), enable_gqa=size.H_q != size.H_kv).view_as(q)


def by_flash_4(q: Tensor, k: Tensor, v: Tensor, size: Size, cu: Tensor) -> Tensor:
    interface = importlib.import_module("flash_attn.cute.interface")
    if size.mask != "packed":
        out = interface.flash_attn_func(q, k, v, causal=size.mask == "causal")
    else:
        flat = [t.flatten(0, 1) for t in (q, k, v)]
        out = interface.flash_attn_varlen_func(*flat, cu_seqlens_q=cu, cu_seqlens_k=cu, causal=True)
    return (out[0] if isinstance(out, tuple) else out).view_as(q)


def contenders(device: str, mask: str) -> dict[str, Attend]:
    if device == "cpu":
        return {"ours": ours, "plain rotation, SDPA": partial(separate, plain_rotation, partial(by_torch, None))}
    kernels: dict[str, Any] = {"flash-attn 4": by_flash_4}
    if mask == "packed":
        kernels["torch's varlen"] = by_varlen
    else:
        kernels["cuDNN"] = partial(by_torch, SDPBackend.CUDNN_ATTENTION)
        kernels["FlashAttention"] = partial(by_torch, SDPBackend.FLASH_ATTENTION)
    rotations = {"": our_rotation} if mask == "packed" else {"": our_rotation, "Liger's rotation, ": liger_rotation}
    own = partial(ours, backend="triton")
    return {
        "ours, triton": own,
        "ours, hopper": partial(ours, backend="hopper"),
        **({} if mask == "packed" else {"ours, sdpa": partial(ours, backend="sdpa")}),
        "separate, triton": partial(separate, our_rotation, lambda q, k, v, *rest: own(q, k, v, None, None, *rest)),
        **{
            prefix + name: partial(separate, rotate, attend)
            for prefix, rotate in rotations.items()
            for name, attend in kernels.items()
        },
    }


class Problem(NamedTuple):
    tensors: list[Tensor]
    upstream: Tensor
    tables: tuple[Tensor, Tensor]
    cu: Tensor


def make_problem(size: Size, device: str, dtype: torch.dtype) -> Problem:
    torch.manual_seed(0)
    B, S, H_q, H_kv, D, _ = size
    q, k, v, upstream = (torch.randn(B, S, H, D, device=device).to(dtype) for H in (H_q, H_kv, H_kv, H_q))
    cu = torch.tensor(size.ends(), dtype=torch.int32, device=device)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    return Problem(leaves, upstream, rope_table(S, D, device=torch.device(device)), cu)


def results_of(attend: Attend, problem: Problem, size: Size, dtype: torch.dtype) -> list[Tensor]:
    leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in problem.tensors]
    out = attend(*leaves, *problem.tables, size, problem.cu)
    return [out.detach(), *torch.autograd.grad(out, leaves, problem.upstream.to(dtype))]


def run(device: str, size: Size, runs: int, without: list[str]) -> Iterator[dict[str, Any]]:
    """Events: {"at": the contender about to run}, {"row": figures}."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    known = contenders(device, size.mask)
    failed = {name: "left out before" for name in known if {name, f"{name}@{size.key()}"} & set(without)}
    small_size = size._replace(B=1, S=min(size.S, CHECKED_TOKENS[device]))
    small = make_problem(small_size, device, dtype)
    exact = results_of(partial(ours, backend="torch"), small, small_size, torch.float64)
    problem = make_problem(size, device, dtype)
    errors: dict[str, dict[str, float]] = {}
    for name in [name for name in known if name not in failed]:
        yield {"at": name}
        try:
            found = results_of(known[name], small, small_size, dtype)
            errors[name] = {
                kind: max(relative_error(a, b) for a, b in zip(mine, true, strict=True))
                for kind, mine, true in zip(("output", "dq", "dk", "dv"), found, exact, strict=True)
            }
            if wrong := {kind: f"{error:.3g}" for kind, error in errors[name].items() if not error <= WRONG}:
                raise ValueError(f"wrong: relative errors {wrong}")
            results_of(known[name], problem, size, dtype)  # fits into memory, and is ready
        except Exception as error:
            if is_lost(error):
                raise
            failed[name] = f"{type(error).__name__}: {error}"
    del small, exact
    ready = {name: attend for name, attend in known.items() if name not in failed}
    cache = torch.empty(machine.CACHE, dtype=torch.int8, device=device) if device == "cuda" else None
    seconds: dict[str, dict[str, list[float]]] = {name: {"forward": [], "backward": []} for name in ready}
    for turn in machine.turns(WARM_UP + runs, f"attention {size.key()}"):
        for name, attend in ready.items():
            yield {"at": name}
            out: list[Tensor] = []

            def forward(attend: Attend = attend, out: list[Tensor] = out) -> None:
                out.append(attend(*problem.tensors, *problem.tables, size, problem.cu))

            def backward(out: list[Tensor] = out) -> None:
                torch.autograd.grad(out.pop(), problem.tensors, problem.upstream)

            for direction, action in (("forward", forward), ("backward", backward)):
                elapsed = machine.timed(action, device, cache.zero_ if cache is not None else None)
                if turn >= WARM_UP:
                    seconds[name][direction].append(elapsed)
    pairs = sum((end - start) ** 2 for start, end in itertools.pairwise(size.ends()))
    flops = 4 * size.H_q * size.D * pairs / (1 if size.mask == "full" else 2)
    first = next(iter(seconds), None)
    heads = size.B * size.S * size.D * (size.H_q + size.H_kv) * dtype.itemsize  # queries and keys, or out and values
    yield {
        "row": {
            "size": size._asdict(),
            "flops": {"forward": flops, "backward": 2.5 * flops},
            "bytes": {"forward": 2 * heads, "backward": 4 * heads},  # q k v out; these and their gradients
            "contenders": {
                name: {
                    **{
                        direction: {
                            **machine.spread(times[direction]),
                            "tflops": factor * flops / statistics.median(times[direction]) / 1e12,
                            "ratio": machine.spread_of_ratios(times[direction], seconds[first][direction]),
                        }
                        for direction, factor in (("forward", 1), ("backward", 2.5))
                    },
                    "relative_errors": errors[name],
                }
                for name, times in seconds.items()
                if first is not None
            },
            "failed": failed,
        }
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Times rotation and attention beside their peers.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", action="append", type=Size.of, help="B,S,H_q,H_kv,D,causal|full|packed; repeatable")
    parser.add_argument("--name", help="of the file of results; attention_cpu or attention_cuda if left out")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--budget", type=float, help="minutes; what is not done by then is left out")
    parser.add_argument("--patience", type=float, default=150.0, help="seconds that a contender may take to compile")
    parser.add_argument("--without", action="append", default=[], help="a contender to leave out; repeatable")
    parser.add_argument("--pin", action="store_true", help="choose by these results from now on")
    parser.add_argument("--ship", action="store_true", help="and write that into the table that the package ships")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.runs < 3:
        parser.error(f"--runs is {options.runs}; quartiles need at least 3")
    sizes = options.size or SIZES[options.device]
    results = options.name or f"attention_{options.device}"
    if options.worker:
        with options.worker.open("a") as file:
            for event in run(options.device, sizes[0], options.runs, options.without):
                file.write(json.dumps(event) + "\n")
                file.flush()
        return 0
    deadline = time.monotonic() + 60 * options.budget if options.budget else float("inf")
    result: dict[str, Any] = {"runs": options.runs, "sizes": [], "left_out": {}, "not_run": []}
    todo = list(sizes)
    without = list(options.without)
    while todo and time.monotonic() < deadline:
        for event in events_of(options, todo[0], without, deadline):
            if "row" in event:
                result["sizes"].append(event["row"])
                _print(event["row"])
                todo.pop(0)
            elif "ended" in event:
                # What is wrong with ours may be so at one size; a peer gets no second chance.
                place = f"@{todo[0].key()}" if event["at"] in OURS else ""
                name = event["at"] + place if event["at"] else todo.pop(0).key()
                without.append(name)
                result["left_out"][name] = event["ended"]
                print(f"left out: {name}: {event['ended']}", flush=True)
        result["not_run"] = [size.key() for size in todo]
        machine.write(results, result)
    print(machine.write(results, result))
    if options.pin or options.ship:
        generation = tiles.generation(torch.device(options.device))
        for problem, order in orders(result["sizes"], 2 if options.device == "cuda" else 4).items():
            tables.keep(SHIPPED if options.ship else tiles.cache_file(), generation, "attention", problem, order)
            print(f"{problem}: {', '.join(order)}")
    return 0 if result["sizes"] else 1


def orders(rows: list[dict[str, Any]], element_size: int) -> dict[str, list[str]]:
    """→ of every problem, those of our implementations that did all of its sizes, the fastest first."""
    logs: dict[str, dict[str, list[float]]] = {}
    sizes: dict[str, int] = {}
    for row in rows:
        D, mask = row["size"]["D"], row["size"]["mask"]
        problem = order_problem(element_size, D, -1, -1 if mask == "full" else 0, mask == "packed")
        sizes[problem] = sizes.get(problem, 0) + 1
        for name, figures in row["contenders"].items():
            if name.startswith("ours, "):
                total = figures["forward"]["median_ms"] + figures["backward"]["median_ms"]
                logs.setdefault(problem, {}).setdefault(name.removeprefix("ours, "), []).append(math.log(total))
    return {
        problem: sorted((n for n in names if len(names[n]) == sizes[problem]), key=lambda n: sum(names[n]))
        for problem, names in logs.items()
    }


def events_of(options: argparse.Namespace, size: Size, without: list[str], deadline: float) -> Iterator[dict[str, Any]]:
    """{"row": …} of one size, or {"ended": why, "at": the contender that ran or None}; on a GPU, of another process."""
    if options.device == "cpu":
        yield from (event for event in run("cpu", size, options.runs, without) if "row" in event)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "events"
        path.touch()
        command = [sys.executable, "-m", "bench.attention", "--device", options.device, "--runs", str(options.runs)]
        command += ["--worker", str(path), "--size", size.key(), *(w for name in without for w in ("--without", name))]
        running = None
        for event in follow(command, path, deadline, options.patience):
            running = event.get("at", running)
            if "row" in event or "ended" in event:
                yield {**event, "at": running}


def _print(row: dict[str, Any]) -> None:
    print("batch {B}, length {S}, heads {H_q}/{H_kv} of {D}, {mask}".format(**row["size"]))
    for name, figures in row["contenders"].items():
        line = f"  {name:32}"
        for direction in ("forward", "backward"):
            f = figures[direction]
            line += f" {f['median_ms']:8.3f} ms ({f['q1_ms']:.3f} – {f['q3_ms']:.3f}) {f['tflops']:7.2f} TFLOP/s"
            line += f" {f['ratio']['median']:5.2f}× |"
        print(line)
    for name, why in row["failed"].items():
        print(f"  {name:32} {why.splitlines()[0][:140]}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
