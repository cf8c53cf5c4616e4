"""Counts instructions under valgrind: what is slower without any noise.

    python -m bench.instructions

Two groups, each to be compared with a baseline of the same tools only: "extension", the C++ half of gradient statistics
on a million elements, compiled with setup.py's flags and a stand-in for torch's threads (`bench/callgrind`); "loader",
what Python, numpy and torch execute for a batch of 16 sequences of 512 tokens in shuffled order. On valgrind's
processor there is AVX2 if the machine has it, and no AVX-512.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from bench import machine

# setup.py's, but for what concerns linking with torch.
FLAGS = ["-std=c++20", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-Wno-psabi"]
SWITCH = """
#include <valgrind/callgrind.h>
extern "C" void start() { CALLGRIND_START_INSTRUMENTATION; }
extern "C" void stop() { CALLGRIND_STOP_INSTRUMENTATION; }
"""
BATCHES = 50


class Group(NamedTuple):
    tools: Callable[[], dict[str, str | None]]
    count: Callable[[], dict[str, int]]


def count_extension(root: Path = machine.ROOT, only: str = "") -> dict[str, int]:
    """Of the sources under `root`, the cases whose names begin so."""
    with tempfile.TemporaryDirectory() as folder:
        program, harness = Path(folder) / "grad_stats", root / "bench" / "callgrind"
        subprocess.run(["g++", *FLAGS, f"-I{harness}", harness / "grad_stats.cpp", "-o", program], check=True)
        cases = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
        return {
            f"extension, {case}": _callgrind(["--toggle-collect=measured"], [program, case])
            for case in cases
            if case.startswith(only)
        }


def count_loader(root: Path = machine.ROOT) -> dict[str, int]:
    """Of the loader under `root`."""
    from bench.loader import write_random

    with tempfile.TemporaryDirectory() as folder:
        shards, library = Path(folder) / "shards", Path(folder) / "switch.so"
        write_random(shards, 1_000_000)
        library.with_suffix(".cpp").write_text(SWITCH)
        subprocess.run(["g++", "-shared", "-fPIC", library.with_suffix(".cpp"), "-o", library], check=True)
        code = f"from bench.instructions import read_batches; read_batches({str(shards)!r}, {str(library)!r})"
        total = _callgrind(["--instr-atstart=no"], [sys.executable, "-c", code], root)
        return {"loader, a batch": total // BATCHES}


def read_batches(shards: str, library: str) -> None:
    """Under valgrind: reads batches, of which all but the first are counted."""
    from ava_fast.data.loader import TokenLoader

    switch = ctypes.CDLL(library)
    loader = TokenLoader(shards, max_length=512, batch_size=16, seed=0)
    for _ in range(3):
        loader.next_batch()
    gc.disable()  # a collection walks over everything that is imported, whatever that has to do with the loader
    switch.start()
    for _ in range(BATCHES):
        loader.next_batch()
    switch.stop()


def _callgrind(options: list[str], command: list[str | Path], root: Path = machine.ROOT) -> int:
    variables = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", *options, *command],
        capture_output=True,
        text=True,
        cwd=root,  # from where `python -c` imports first
        env=variables,
    )
    found = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode or not found or not int(found[1]):
        raise RuntimeError(f"valgrind counted nothing in {command}, exit code {done.returncode}: {done.stderr[-500:]}")
    return int(found[1])


def _line(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[0]


def _vectors() -> str:
    flags = machine.of_cpu("flags") or ""
    return "AVX2" if "avx2" in flags.split() else platform.machine()


def _extension_tools() -> dict[str, str | None]:
    return {"compiler": _line("g++", "--version"), "valgrind": _line("valgrind", "--version"), "vectors": _vectors()}


def _loader_tools() -> dict[str, str | None]:
    packages = {name: machine.installed(name) for name in ("numpy", "torch")}
    return {
        "python": platform.python_version(),
        **packages,
        "valgrind": _line("valgrind", "--version"),
        "vectors": _vectors(),
    }


GROUPS = {"extension": Group(_extension_tools, count_extension), "loader": Group(_loader_tools, count_loader)}


def main() -> None:
    for group in GROUPS.values():
        for name, count in group.count().items():
            print(f"{name:32} {count:12,} instructions", flush=True)


if __name__ == "__main__":
    main()
