"""Times the experts' MLP beside its peers: forward and backward apart, at the sizes of published models.

    python -m bench.experts [--budget MINUTES]           # on a GPU: bfloat16, Triton and CUDA peers
    OMP_NUM_THREADS=2 python -m bench.experts            # on a CPU: float32, transformers' experts

`expert_peers.py` says who they are. Each size runs with an even load and with one that a router learns (`zipf`: its
heaviest expert has several times the mean; `load` gives how many). Before it is timed, every contender's output and
gradients are compared with float32 ones at fewer tokens; one that is wrong, fails or takes too long to get ready is
recorded with the reason, and not timed. Contenders take turns, so that a machine whose speed drifts slows all of them.
On a GPU the second-level cache is overwritten before each run, and while that lasts the host can get ahead, as it does
in training; whoever waits for the device loses that. Floating-point operations are 6·T·M·I·K forward and 12·T·M·I·K
backward; ratios are a peer's time over that of "ours". Memory is torch's: `kept` is what lives between forward and
backward besides weights and output, to be compared with `kept_floor`, x and h; `peak` is on top of the inputs.

On a GPU the work is done in a second process. Where that crashes or hangs, the contender that ran is left out from then
on and the size is begun again. Results are written after every size, the most telling ones first: all sizes without the
contenders that take long to compile and tune themselves, then all again with them.

--pin puts the sizes at which "ours, hopper" takes less time than "ours", all loads and both directions together, into
the table that `moe_mlp` chooses by: `~/.cache/ava_kernels/tiles.json`, or with --ship that of the package.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ava_kernels import tiles
from ava_kernels.experts.tiles import SHIPPED
from ava_kernels.experts.tiles import problem as problem_of
from torch import Tensor

from bench import machine, tables
from bench.check import expert_mlp, is_lost, relative_error, results_of
from bench.expert_peers import OURS, SLOW, Contender, Problem, contenders, make_problem


class Size(NamedTuple):
    T: int
    M: int
    I: int
    E: int
    K: int

    @classmethod
    def of(cls, text: str) -> Size:
        return cls(*map(int, text.split(",")))

    def key(self) -> str:
        return ",".join(map(str, self))

    def __str__(self) -> str:
        return f"{self.T} tokens, width {self.M}, {self.E} experts of {self.I}, {self.K} choices"


SIZES = {
    "cuda": [
        Size(32768, 2048, 1024, 64, 8),  # OLMoE
        Size(8192, 2048, 768, 128, 8),  # Qwen3-30B-A3B
        Size(32768, 4096, 1024, 128, 8),
        Size(24576, 1536, 256, 128, 8),
        Size(40960, 768, 256, 128, 8),
        Size(32768, 4096, 512, 256, 16),
        Size(32768, 4096, 2048, 64, 4),
        Size(40960, 768, 1024, 32, 2),
        Size(24576, 1536, 1024, 32, 2),
        Size(40960, 768, 512, 64, 4),
        Size(24576, 1536, 512, 64, 4),
        Size(32768, 4096, 1024, 64, 4),
        Size(32768, 4096, 512, 128, 8),
        Size(32768, 4096, 256, 256, 16),
    ],
    "cpu": [
        Size(2048, 256, 512, 8, 2),
        Size(2048, 256, 64, 64, 8),
        Size(8192, 256, 64, 128, 8),
        Size(8192, 256, 64, 64, 8),
    ],
}
LOADS = ("even", "zipf")
CHECKED_TOKENS = {"cuda": 2048, "cpu": 256}
WRONG = 0.03  # largest relative error: bfloat16 makes 0.005, a wrong tile in 64 makes 0.1
WARM_UP = 3


def main() -> int:
    parser = argparse.ArgumentParser(description="Times the experts' MLP beside its peers.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", help="numbers of the sizes to run, such as 0,3; all if left out")
    parser.add_argument("--size", action="append", type=Size.of, help="T,M,I,E,K instead of those here; repeatable")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--budget", type=float, help="minutes; what is not done by then is left out")
    parser.add_argument("--patience", type=float, help="seconds that a contender may take to compile and tune itself")
    parser.add_argument("--without", action="append", default=[], help="a contender to leave out; repeatable")
    parser.add_argument("--processes", action="store_true", help="work in a second process on a CPU too")
    parser.add_argument("--only-quick", action="store_true", help="without contenders that are slow to compile")
    parser.add_argument("--name", help="of the file of results; experts_cpu or experts_cuda if left out")
    parser.add_argument("--pin", action="store_true", help="choose by these results from now on")
    parser.add_argument("--ship", action="store_true", help="and write that into the table that the package ships")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    name = options.name or f"experts_{options.device}"
    sizes = options.size or SIZES[options.device]
    if options.rows:
        numbers = [int(n) for n in options.rows.split(",")]
        if not all(0 <= n < len(sizes) for n in numbers):
            parser.error(f"--rows is {options.rows}; it must name sizes from 0 to {len(sizes) - 1}")
        sizes = [sizes[n] for n in numbers]
    if options.runs < 3:
        parser.error(f"--runs is {options.runs}; quartiles need at least 3")
    quick = options.budget is not None and options.budget < 60
    patience = options.patience or (max(90.0, 10 * options.budget) if quick else 1200.0)
    # On a GPU a size takes little time once all are ready; on a CPU nothing is left out.
    allotted = 50 * options.budget / 2 / len(sizes) if options.budget and options.device == "cpu" else float("inf")
    events = run(
        options.device, sizes, options.runs, options.without, quick, patience, not options.only_quick, allotted
    )
    if options.worker:
        with options.worker.open("a") as file:
            for event in events:
                file.write(json.dumps(event) + "\n")
                file.flush()
        return 0
    deadline = time.monotonic() + 60 * options.budget if options.budget else float("inf")
    result: dict[str, Any] = {"runs": options.runs, "quick": quick, "sizes": [], "left_out": {}, "not_run": []}
    if options.device == "cuda" or options.processes:
        events = in_processes(options, sizes, deadline, patience)
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for event in events:
        if "row" in event:
            rows[(*event["row"]["size"], event["row"]["routing"])] = event["row"]
            _print(event["row"])
        elif "left_out" in event:
            result["left_out"][event["left_out"]] = event["why"]
            print(f"left out: {event['left_out']}: {event['why']}", flush=True)
        else:
            continue
        result["sizes"] = list(rows.values())
        result["not_run"] = [f"{size}, {load}" for size in sizes for load in LOADS if (*size, load) not in rows]
        machine.write(name, result)
        if time.monotonic() > deadline and options.device == "cuda":
            break
    print(machine.write(name, result))
    if options.pin or options.ship:
        generation = tiles.generation(torch.device(options.device))
        for problem in better_on_hopper(result["sizes"]):
            table = SHIPPED if options.ship else tiles.cache_file()
            tables.keep(table, generation, "moe_mlp", problem, ["hopper", "triton"])
            print(f"{problem}: hopper, triton")
    return 0 if result["sizes"] else 1


def better_on_hopper(rows: list[dict[str, Any]]) -> list[str]:
    """→ the problems, by their name in tables, at which "ours, hopper" is faster by more than 1 %."""
    seconds: dict[str, list[float]] = {}
    for row in rows:
        pair = [row["contenders"].get(name) for name in ("ours", "ours, hopper")]
        _, M, I, E, _ = row["size"]
        total = seconds.setdefault(problem_of(E, M, I, torch.bfloat16), [0.0, 0.0])
        for number, figures in enumerate(pair):
            for direction in ("forward", "backward"):
                total[number] += figures[direction]["median_ms"] if figures else float("inf")
    return [problem for problem, (ours, hopper) in seconds.items() if 1.01 * hopper < ours]


def _print(row: dict[str, Any]) -> None:
    print(f"{row['name']}, {row['routing']}, heaviest expert {row['load']:.1f}× the mean")
    for name, figures in row["contenders"].items():
        line = f"  {name:24}"
        for direction in ("forward", "backward"):
            f = figures[direction]
            line += f" {f['median_ms']:8.3f} ms ({f['q1_ms']:.3f} – {f['q3_ms']:.3f}) {f['tflops']:6.2f} TFLOP/s"
            if name in row["ratios"]:
                line += f" {row['ratios'][name][direction]['median']:5.2f}×"
            line += " |"
        if "kept" in figures:
            line += f" kept {figures['kept'] / 2**20:,.0f} of {row['kept_floor'] / 2**20:,.0f} MiB"
        print(line)
    for name, why in row["failed"].items():
        print(f"  {name:24} {why.splitlines()[0][:140]}")
    sys.stdout.flush()


# --- The second process ---


def in_processes(
    options: argparse.Namespace, sizes: list[Size], deadline: float, patience: float
) -> Iterator[dict[str, Any]]:
    """Events of workers, each of which goes on where the last one fell; first of those without slow contenders."""
    without = list(options.without)
    with tempfile.TemporaryDirectory() as folder:
        left: list[str] = []
        waves = [["--only-quick"]] if options.only_quick else [["--only-quick"], []]
        for attempt in range(100):
            if not left:
                if not waves:
                    return
                wave, left = waves.pop(0), [size.key() for size in sizes]
            path = Path(folder) / f"events_{attempt}"
            path.touch()
            command = [sys.executable, "-m", "bench.experts", "--device", options.device, "--runs", str(options.runs)]
            command += ["--worker", str(path), "--patience", str(patience), *wave]
            command += [word for key in left for word in ("--size", key)]
            command += [word for name in without for word in ("--without", name)]
            command += ["--budget", str(options.budget)] if options.budget else []
            size, running = left[0], None
            for event in follow(command, path, deadline, patience):
                yield event
                if "done" in event:
                    left.remove(event["done"])
                elif "at" in event:
                    size, running = event["size"], event["at"]
                elif "ended" in event:
                    break
            else:
                if left:  # time is up
                    return
                continue
            if running is None:
                left.remove(size)
                yield {"left_out": f"size {size}", "why": event["ended"]}
            else:
                # What is wrong with ours may be so at one size; a peer gets no second chance.
                without.append(f"{running}@{size}" if running in OURS else running)
                yield {"left_out": without[-1], "why": event["ended"]}


def follow(command: list[str], path: Path, deadline: float, patience: float) -> Iterator[dict[str, Any]]:
    """Runs a command and yields the JSON lines that it writes to `path`. If it fails, or writes nothing for `patience`
    seconds and is killed, the last event is {"ended": why}; at the deadline it is killed without one. An event may have
    a "patience" of its own."""
    with path.with_suffix(".stderr").open("w+") as errors:
        process = subprocess.Popen(command, stdout=errors, stderr=errors)
        try:
            with path.open() as file:
                heard_at, allowed, buffer = time.monotonic(), patience, ""
                while True:
                    over = process.poll() is not None
                    buffer += file.read()
                    *lines, buffer = buffer.split("\n")
                    now = time.monotonic()
                    for event in map(json.loads, lines):
                        heard_at, allowed = now, event.get("patience", patience)
                        yield event
                    if over:
                        if process.returncode:
                            errors.seek(0)
                            last = " | ".join(errors.read().strip().splitlines()[-3:])
                            yield {"ended": f"exit code {process.returncode}: {last}"}
                        return
                    if now > deadline:
                        return
                    if now - heard_at > allowed:
                        yield {"ended": f"no sign of life for {allowed:.0f} s"}
                        return
                    time.sleep(0.1)
        finally:
            process.kill()
            process.wait()


# --- One size ---


def run(
    device: str,
    sizes: list[Size],
    runs: int,
    without: list[str],
    quick: bool,
    patience: float,
    slow: bool,
    allotted: float = float("inf"),
) -> Iterator[dict[str, Any]]:
    """Events: {"at": the contender about to run, or None}, {"row": figures of a size and load}, {"done": a size}.
    A size and load takes `allotted` seconds to time, or as long as the least runs take. Without `slow`, those that take
    long to compile and tune themselves have no part in it."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for size in sizes:
        yield {"at": None, "size": size.key(), "patience": 5 * patience}
        known = {name: prepare for name, prepare in contenders(device, quick).items() if slow or name not in SLOW}
        failed = {name: "left out before" for name in known if name in without or f"{name}@{size.key()}" in without}
        errors: dict[str, dict[str, float]] = {}
        for load in LOADS:
            problem = make_problem(*size, load, device, dtype)
            ready: dict[str, Contender] = {}
            for name in [name for name in known if name not in failed]:
                yield {"at": name, "size": size.key(), "patience": patience * (5 if name in OURS else 1)}
                with _noting(name, ready, failed):  # tunes itself at the full size
                    ready[name] = known[name](problem)
                    ready[name].backward(ready[name].forward(problem.x), [problem.x, *ready[name].leaves])
                    _synchronize(device)
                _free(device)
            yield {"at": None, "size": size.key()}
            if load == LOADS[0]:
                small = make_problem(*size._replace(T=CHECKED_TOKENS[device]), "zipf", device, dtype)
                exact = exact_results(small)
                for name in list(ready):
                    yield {"at": name, "size": size.key()}
                    with _noting(name, ready, failed):
                        errors[name] = errors_of(known[name](small), small, exact)
                        if wrong := {
                            kind: f"{error:.3g}" for kind, error in errors[name].items() if not error <= WRONG
                        }:
                            raise ValueError(f"wrong: relative errors {wrong}")
                    _free(device)
                del small, exact
            yield from _time(problem, ready, device, runs, size, load, failed, errors, allotted)
            del problem, ready
            _free(device)
        yield {"done": size.key()}


@contextmanager
def _noting(name: str, ready: dict[str, Contender], failed: dict[str, str]) -> Iterator[None]:
    """An error within moves the contender from `ready` to `failed`. A lost device ends this process."""
    try:
        yield
    except Exception as error:
        if is_lost(error):
            raise
        failed[name] = f"{type(error).__name__}: {error}"
        ready.pop(name, None)


def exact_results(problem: Problem) -> list[Tensor]:
    def loop(x: Tensor, gate_up: Tensor, down: Tensor, weight: Tensor) -> Tensor:
        return expert_mlp(x, gate_up, down, problem.expert, weight)

    given = (problem.x, problem.gate_up, problem.down, problem.weight)
    return results_of(loop, [t.detach().float() for t in given], problem.upstream)


def errors_of(contender: Contender, problem: Problem, exact: list[Tensor]) -> dict[str, float]:
    """Relative errors of the output and the gradients, or none if there is nothing to compare."""
    if contender.canonical is None:
        return {}
    out = contender.forward(problem.x)
    dx, *rest = contender.backward(out, [problem.x, *contender.leaves])
    found = [out.detach(), dx, *contender.canonical(*rest)]
    kinds = ("output", "dx", "dgate_up", "ddown", "dweight")
    return {kind: relative_error(a, b) for kind, a, b in zip(kinds, found, exact, strict=True)}


def _time(
    problem: Problem,
    ready: dict[str, Contender],
    device: str,
    runs: int,
    size: Size,
    load: str,
    failed: dict[str, str],
    errors: dict[str, dict[str, float]],
    allotted: float,
) -> Iterator[dict[str, Any]]:
    T, M, I, E, K = size
    cache = torch.empty(machine.CACHE, dtype=torch.int8, device=device) if device == "cuda" else None
    seconds: dict[str, dict[str, list[float]]] = {name: {"forward": [], "backward": []} for name in ready}
    memory: dict[str, dict[str, int]] = {}
    for run in machine.turns(WARM_UP + runs, f"{size}, {load}", allotted):
        for name, contender in ready.items():
            yield {"at": name, "size": size.key()}
            leaves = [problem.x, *contender.leaves]
            out: list[Any] = []

            def forward(contender: Contender = contender, out: list[Any] = out) -> None:
                out.append(contender.forward(problem.x))

            def backward(contender: Contender = contender, out: list[Any] = out, leaves: Any = leaves) -> None:
                contender.backward(out.pop(), leaves)

            for direction, action in (("forward", forward), ("backward", backward)):
                elapsed = machine.timed(action, device, cache.zero_ if cache is not None else None)
                if run >= WARM_UP:
                    seconds[name][direction].append(elapsed)
            if device == "cuda" and run == 0 and name not in ("bmm", "ours, captured"):
                memory[name] = _memory(problem, contender)
    count = torch.bincount(problem.expert.flatten().long(), minlength=E).double()
    flops = {"forward": 6 * T * M * I * K, "backward": 12 * T * M * I * K}
    # Each once: x, out, h and the weights; then dout, x, dx, h, the weights and their gradients.
    rows, weights = T * M, 3 * E * M * I
    elements = {"forward": 2 * rows + 2 * T * K * I + weights, "backward": 3 * rows + 2 * T * K * I + 2 * weights}
    row: dict[str, Any] = {
        "name": str(size),
        "size": list(size),
        "routing": load,
        "runs": min((len(times["forward"]) for times in seconds.values()), default=0),
        "load": (count.max() / count.mean()).item(),
        "flops": flops,
        "bytes": {direction: problem.x.element_size() * count for direction, count in elements.items()},
        "kept_floor": problem.x.element_size() * (T * M + 2 * T * K * I),
        "contenders": {
            name: {
                **{
                    direction: {
                        **machine.spread(times[direction]),
                        "tflops": flops[direction] / statistics.median(times[direction]) / 1e12,
                    }
                    for direction in flops
                },
                **memory.get(name, {}),
                "relative_errors": errors.get(name),
            }
            for name, times in seconds.items()
        },
        "ratios": {},
        "failed": dict(failed),
    }
    if "ours" in seconds:
        row["ratios"] = {
            name: {
                direction: machine.spread_of_ratios(times[direction], seconds["ours"][direction]) for direction in flops
            }
            for name, times in seconds.items()
            if name != "ours"
        }
    yield {"row": row}


def _memory(problem: Problem, contender: Contender) -> dict[str, int]:
    """Bytes kept for backward, x included if it is kept, and the most at a time, gradients included."""
    _free("cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    x = problem.x.clone()  # lives on only where it is kept
    out = contender.forward(x)
    del x
    kept = torch.cuda.memory_allocated() - before - out.numel() * out.element_size()
    contender.backward(out, [problem.x, *contender.leaves])
    return {"kept": kept, "peak": torch.cuda.max_memory_allocated() - before}


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _free(device: str) -> None:
    if device == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
