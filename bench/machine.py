"""What a result needs beside its numbers: hardware, versions, command and date."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(os.environ.get("BENCH_RESULTS") or Path(__file__).parent / "results")


def describe() -> dict[str, Any]:
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": " ".join(["python -m", _module(), *sys.argv[1:]]),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: _version(name) for name in ("torch", "triton", "transformers", "deepspeed")},
        "python": platform.python_version(),
    }


def _version(name: str) -> str | None:
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


def write(name: str, result: dict[str, Any]) -> Path:
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**describe(), **result}, indent=1) + "\n")
    return path
