"""What a result needs beside its numbers: hardware, versions, clocks, commit, command and date; and how to time pairs.

Every file of results is one JSON object: what `describe` says, and then the suite's own: `runs`, the shapes, FLOPs and
bytes of each row, and for every contender the median and quartiles of its times. A ratio is the median, with quartiles,
of the ratios of times taken in the same turn: contenders run one after the other in every turn, so a machine that slows
down slows both halves of a pair.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = Path(os.environ.get("BENCH_RESULTS") or Path(__file__).parent / "results")
LOAD_BEFORE = os.getloadavg()[0]  # before this process has done anything
CODE = ("ava_fast", "kernels", "csrc", "configs", "bench/*.py")  # what results depend on
LEAST_TURNS = 8  # with those that warm up
CACHE = 2 << 30  # bytes: more than any second-level cache, and long enough to write for the host to get ahead
VERSIONS = ("torch", "triton", "transformers", "deepspeed", "tokenizers", "datasets")


def describe() -> dict[str, Any]:
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": " ".join(["python -m", _module(), *sys.argv[1:]]),
        "commit": commit(),
        "cpu": of_cpu("model name") or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(LOAD_BEFORE, 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "clocks": _clocks(),
        "versions": {name: installed(name) for name in VERSIONS},
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def commit() -> str | None:
    """Of this code: "1a2b3c4", with "+" behind it if files differ from it. Where there is no git, what BENCH_COMMIT
    says: a copy on a machine of its own does not know where it came from."""
    if given := os.environ.get("BENCH_COMMIT"):
        return given
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "--", *CODE], capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def of_cpu(key: str) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":")[1].strip() for line in lines if line.startswith(key)), None)


def _clocks() -> dict[str, Any]:
    """In MHz, as far as the machine tells: the CPU's now, the GPU's now and at most."""
    found: dict[str, Any] = {"cpu": float(mhz) if (mhz := of_cpu("cpu MHz")) else None}
    if torch.cuda.is_available():
        asked = "clocks.sm,clocks.max.sm,clocks.mem,power.limit"
        command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader,nounits"]
        try:
            output = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.splitlines()
            values = map(str.strip, output[0].split(","))
            found |= dict(zip(("gpu", "gpu_most", "gpu_memory", "power_limit_watts"), values, strict=False))
        except (OSError, IndexError, subprocess.SubprocessError):
            pass
    return found


def installed(name: str) -> str | None:
    """A package's version."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else sys.argv[0]


def timed(action: Callable[[], object], device: str, before: Callable[[], object] | None = None) -> float:
    """Seconds that one call takes; on a GPU, by its own clock, after `before`: work that lets the host get ahead."""
    if device == "cpu":
        started_at = time.perf_counter()
        action()
        return time.perf_counter() - started_at
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    if before:
        before()
    start.record()
    action()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def turns(count: int, label: str, seconds: float = float("inf")) -> Iterator[int]:
    """range(count), or as many as `seconds` allow, but LEAST_TURNS; on a terminal, says meanwhile how many are done and
    how long the rest will take."""
    shown, started_at = sys.stderr.isatty(), time.monotonic()
    for turn in range(count):
        yield turn
        if turn + 1 >= LEAST_TURNS and time.monotonic() - started_at > seconds:
            return
        if shown:
            left = (time.monotonic() - started_at) / (turn + 1) * (count - turn - 1)
            line = f"  {label}: {turn + 1} of {count} turns, {left:.0f} s left"
            print(f"\r{line[:100]:100}", end="" if left else "\r" + " " * 100 + "\r", file=sys.stderr, flush=True)


def emptied_cache(device: str) -> Callable[[], object] | None:
    """What to do `before` a short operation on a GPU: nothing of it is in a cache then, and the host has 0.5 ms to get
    ahead, so that kernels are timed and not the Python that launches them."""
    return torch.empty(CACHE, dtype=torch.int8, device=device).zero_ if device == "cuda" else None


def alternate(
    contenders: dict[str, Callable[[], object]],
    device: str,
    runs: int,
    warm_up: int = 3,
    label: str = "timing",
    allotted: float = float("inf"),
    before: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Seconds of `runs` calls of each, or of as many as the allotted seconds allow; all of them once in every turn,
    each after `before`."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in turns(warm_up + runs, label, allotted):
        for name, contender in contenders.items():
            elapsed = timed(contender, device, before)
            if turn >= warm_up:
                seconds[name].append(elapsed)
    return seconds


def capture(action: Callable[[], Any], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of an action that has run before, and what the action returned. Fails if it waits for the device."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = action()
    return graph, result


def on_side_stream(action: Callable[[], object]) -> None:
    """Once, away from the stream that everything else runs on: what must come before a capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        action()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def spread(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles of a list of times, in milliseconds."""
    first, median, third = statistics.quantiles(seconds, n=4)
    return {"median_ms": 1e3 * median, "q1_ms": 1e3 * first, "q3_ms": 1e3 * third}


def spread_of_ratios(numerators: list[float], denominators: list[float]) -> dict[str, float]:
    """Median and quartiles of the ratios of paired times."""
    first, median, third = statistics.quantiles([a / b for a, b in zip(numerators, denominators, strict=True)], n=4)
    return {"median": median, "q1": first, "q3": third}


def lists_on_a_line(text: str) -> str:
    """JSON in which a list of numbers or words takes one line."""
    return re.sub(r"\[[\w\s,.\"-]+\]", lambda found: f"[{' '.join(found[0][1:-1].split())}]", text)


def write(name: str, result: dict[str, Any]) -> Path:
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**describe(), **result}, indent=1) + "\n")
    return path
