"""Everything that is to be known about this code on a GPU, in one command and a given time.

    make bench-gpu                                  # 8 minutes
    make bench-gpu BUDGET=30
    python -m bench.gpu --device cpu --budget 5     # tries this script itself where there is no GPU

What is done, in this order, each as a process of its own with a time limit, so that none can end the rest: what machine
this is; the gradient extension's CUDA half built if it is not and nvcc is there; every kernel checked against float64
(`bench.check`); how fast this GPU multiplies and copies; the operations at the shapes of published models (`SHARES`),
after which kernels are chosen by what was measured (`--pin` of bench.experts and bench.attention); better tiles for
experts and attention where they are less ahead of a peer than they should be, and these timed again; a whole training
step. What one does not use of its share of the time is left to the others. Results are JSON files in `bench/results`:
`gpu_cuda.json` tells how every step went and is rewritten after each. The exit code is 0 if all went well, 1 if not, 2
without a GPU. `python -m bench.guard gpu` then compares with the baseline, `python -m bench.report` makes the page.

Needs a Python with its headers, torch and triton, and a C compiler, nothing from the network: `make bench-gpu` takes
`.venv` if it is there, or else `PYTHON` (python3), and finds this code by PYTHONPATH. Peers are timed where they are
installed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.figures import is_ours

ROOT = Path(__file__).parents[1]
EXTENSION = ROOT / "kernels" / "ava_kernels" / "gradients"
# The experts' kernels are the most, so each dtype is a process.
CHECKS = [
    *(("moe_mlp", dtype) for dtype in ("bfloat16", "float16", "float32")),
    *(("attention", dtype) for dtype in ("bfloat16", "float16", "float32")),
    *((name, None) for name in ("routing", "counting_sort", "rows", "grouped_mm", "rotary", "gradients")),
]
# Of the time that is left after checks and ceilings; the most telling first.
SHARES = {
    "experts": 0.33,
    "attention": 0.22,
    "routing": 0.05,
    "gradients": 0.06,
    "rotary": 0.03,
    "norm": 0.03,
    "loss": 0.04,
    "experts' tiles": 0.06,
    "experts, tuned": 0.03,
    "hopper's tiles": 0.03,
    "attention's tiles": 0.03,
    "attention, tuned": 0.02,
    "training step": 0.09,
}
# What ratio to a peer there should be, at least; where there is less, tiles are searched for.
EXPERTS_AHEAD = {"grouped_mm": 1.5, "liger": 1.3}
ATTENTION_AHEAD, SHORT, LONG_AHEAD = 1.0, 4096, 0.9  # of every peer; in longer sequences
# Python sees what this module cannot: whether the extension loads, with which halves.
FIND_EXTENSION = (
    "import sys; from ava_kernels.gradients.op import _find_extension; sys.exit(not _find_extension('cuda'))"
)


def main() -> int:
    parser = argparse.ArgumentParser(description="Checks and times everything on this GPU.")
    parser.add_argument("--budget", type=float, default=8.0, help="minutes")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--results", type=Path, help="where to write; bench/results if left out, nowhere lasting on a CPU"
    )
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench.gpu: this machine has no NVIDIA GPU that torch can use; nothing was measured", file=sys.stderr)
        return 2
    if options.device == "cuda" and (missing := not_there()):
        print(f"bench.gpu: {missing}; nothing was measured", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    with tempfile.TemporaryDirectory() as folder:
        results = options.results or (machine.RESULTS if options.device == "cuda" else Path(folder) / "results")
        os.environ["BENCH_RESULTS"] = str(results.resolve())
        machine.RESULTS = results.resolve()
        return Session(options.device, time.monotonic() + 60 * options.budget, Path(folder)).run()


def not_there() -> str | None:
    """What Triton needs on this machine to launch anything, in words; None if it is there."""
    if not any(map(shutil.which, (os.environ.get("CC") or "gcc", "gcc", "clang"))):
        return "Triton needs a C compiler, and there is no gcc or clang; install one, or name it in CC"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        return f"Triton needs Python's headers, and there is no {header}; install them (python3-dev)"
    return None


running: set[subprocess.Popen[str]] = set()


class Session:
    """The steps and what came out of them, written after each."""

    def __init__(self, device: str, deadline: float, folder: Path) -> None:
        self.device, self.deadline, self.folder = device, deadline, folder
        self.result: dict[str, Any] = {"environment": environment(), "steps": {}}
        self.lock = threading.Lock()

    def run(self) -> int:
        print(json.dumps(self.result["environment"], indent=1), flush=True)
        cpu = self.device == "cpu"
        self.build_extension()
        with ThreadPoolExecutor(1 if cpu else len(CHECKS)) as pool:
            wrong = [case for cases in pool.map(self.check, CHECKS) for case in cases if not case["ok"]]
        print(f"{len(wrong)} cases are wrong", flush=True)
        self.step("ceilings", ["-m", "bench.ceilings", *(["--size", "256", "--floats", "100000"] if cpu else [])], 60)
        self.measure()
        bad = {name: step["status"] for name, step in self.result["steps"].items() if step["status"] != "ok"}
        print(f"not well: {bad}" if bad else "all steps went well")
        print(machine.RESULTS / f"gpu_{self.device}.json")
        return int(bool(bad or wrong))

    def measure(self) -> None:
        cpu = self.device == "cpu"
        for name in SHARES:
            if (arguments := self.arguments(name, cpu)) is not None:
                self.step(name, arguments, self.allotted(name) + 20)

    def allotted(self, name: str) -> float:
        """Seconds: of what is left, its share among those that are still to come."""
        later = list(SHARES.values())[list(SHARES).index(name) :]
        return max(5.0, self.left() * SHARES[name] / sum(later))

    def arguments(self, name: str, cpu: bool) -> list[str] | None:
        """Of Python, or None where there is nothing to do."""
        budget = ["--budget", f"{self.allotted(name) / 60:.2f}"]
        few = ["--runs", "3"] if cpu else []
        if name in ("routing", "gradients"):
            small = {"routing": ["--tokens", "256"], "gradients": ["--elements", "100000", "--tensors", "50"]}[name]
            return ["-m", f"bench.{name}", *(small + few if cpu else [])]
        if name in ("rotary", "norm", "loss"):
            size = {"rotary": "1,32,2,1,16,causal", "norm": "64,16,residual", "loss": "64,16,100"}[name]
            return ["-m", f"bench.{name}", *(["--size", size, *few] if cpu else [])]
        if name == "experts":
            more = ["--rows", "0", *few] if cpu else ["--pin"]
            return ["-m", "bench.experts", "--device", self.device, *budget, *more]
        if name == "attention":
            small = ["--size", "1,32,2,1,16,causal", *few] if cpu else []
            return ["-m", "bench.attention", "--device", self.device, *budget, *(small if cpu else ["--pin"])]
        if name == "training step":
            return ["-m", "bench.training_step", *(["--size", "demo", *few] if cpu else budget)]
        operation = "experts" if "experts" in name else "attention"
        sizes = behind(machine.RESULTS / f"{operation}_{self.device}.json")
        kind = name.split("'")[0]
        if cpu or not sizes or (kind == "hopper" and not self.is_hopper()):
            return None
        if "tiles" in name:
            return ["-m", "bench.tune", kind, *budget, "--shapes", *sizes]
        again = [word for size in sizes for word in ("--size", size)]
        quick = ["--only-quick"] if operation == "experts" else []
        return ["-m", f"bench.{operation}", *budget, *quick, "--name", f"{operation}_cuda_tuned", *again]

    def is_hopper(self) -> bool:
        return torch.cuda.get_device_capability()[0] == 9

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def step(self, name: str, arguments: list[str], limit: float, echo: str = "") -> dict[str, Any]:
        """Runs Python with these arguments for at most `limit` seconds and no longer than the budget. Of its output,
        lines that contain `echo` are shown."""
        seconds = min(limit, self.left())
        if seconds < 5:
            outcome: dict[str, Any] = {"status": "no time left"}
        else:
            print(f"--- {name}", flush=True)
            outcome = run_python(arguments, seconds, self.device, echo)
        with self.lock:
            self.result["steps"][name] = outcome
            machine.write(f"gpu_{self.device}", self.result)
        if outcome["status"] != "ok":
            print(f"--- {name}: {outcome['status']}", flush=True)
        return outcome

    def check(self, group: tuple[str, str | None]) -> list[dict[str, Any]]:
        """Cases of one group of `bench.check`, and one that failed for a process that ended badly."""
        kernel, dtype = group
        name = " ".join(["check", kernel, *([dtype] if dtype else [])])
        path = self.folder / f"{name}.jsonl"
        arguments = ["-m", "bench.check", "--device", self.device, "--only", kernel, "--json", str(path)]
        arguments += ["--dtype", dtype] if dtype else []
        arguments += ["--tiny"] if self.device == "cpu" else []
        outcome = self.step(name, arguments, max(60.0, 0.6 * self.left()), echo="FAILED")  # compiling takes most
        cases = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        if outcome["status"] not in ("ok", "exit code 1"):  # 1: it has said itself what is wrong
            last = " | ".join(outcome.get("output", [])[-3:])
            cases.append({"kernel": kernel, "case": dtype, "ok": False, "error": f"{outcome['status']}: {last}"})
        with self.lock:
            self.result.setdefault("cases", {})[name] = {
                "right": sum(case["ok"] for case in cases),
                "wrong": [case for case in cases if not case["ok"]],
            }
            machine.write(f"gpu_{self.device}", self.result)
        return cases

    def build_extension(self) -> None:
        if self.device == "cuda" and run_python(["-c", FIND_EXTENSION], 60, "cuda", None)["status"] != "ok":
            self.step("build the extension", ["setup.py", "-q", "build_ext", "--inplace"], 150, echo="error")


def behind(path: Path) -> list[str]:
    """Of results of the experts or of attention: the sizes, as `--size` has them, at which ours is less ahead of a peer
    than it should be."""
    try:
        rows = json.loads(path.read_text())["sizes"]
    except (OSError, ValueError):
        return []
    found = [size_of(row) for row in rows if (attention_is_behind if "H_q" in row["size"] else experts_are_behind)(row)]
    return list(dict.fromkeys(found))


def size_of(row: dict[str, Any]) -> str:
    size = row["size"]
    return ",".join(map(str, size.values() if isinstance(size, dict) else size))


def experts_are_behind(row: dict[str, Any]) -> bool:
    return any(
        peer in row["ratios"] and any(ratio["median"] < least for ratio in row["ratios"][peer].values())
        for peer, least in EXPERTS_AHEAD.items()
    )


def attention_is_behind(row: dict[str, Any]) -> bool:
    """The faster of our own kernels, of any peer, in forward or backward."""
    times = row["contenders"]
    both = [times[name] for name in ("ours, triton", "ours, hopper") if name in times]
    own = min(both, key=lambda it: it["forward"]["median_ms"] + it["backward"]["median_ms"], default=None)
    least = ATTENTION_AHEAD if row["size"]["S"] <= SHORT else LONG_AHEAD
    return own is not None and any(
        figures[direction]["median_ms"] < least * own[direction]["median_ms"]
        for name, figures in times.items()
        if not is_ours(name)
        for direction in ("forward", "backward")
    )


def run_python(arguments: list[str], seconds: float, device: str, echo: str | None) -> dict[str, Any]:
    """A Python process with this code on its path → how it ended, how long it took, the last lines of its output. It is
    killed with its children when time is up. Lines that contain `echo` are printed."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep), "PYTHONUNBUFFERED": "1"}
    if device == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""
    else:  # what tests may have left
        variables.pop("TRITON_INTERPRET", None)
        variables.pop("AVA_KERNELS_BACKEND", None)
    started_at = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    running.add(process)
    lines: list[str] = []

    def read() -> None:
        assert process.stdout
        for line in process.stdout:
            lines.append(line.rstrip())
            if echo is not None and echo in line:
                print(line, end="", flush=True)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        code = process.wait(seconds)
        status = "ok" if code == 0 else f"exit code {code}"
    except subprocess.TimeoutExpired:
        status = f"killed after {seconds:.0f} s"
    finally:
        kill(process)
        running.discard(process)
        process.wait()
    reader.join(5)
    return {"status": status, "seconds": round(time.monotonic() - started_at, 1), "output": lines[-40:]}


def kill(process: subprocess.Popen[str]) -> None:
    """With its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def stop(signal_number: int, frame: Any) -> None:
    """Told to end, leaves nothing behind that would hold the GPU."""
    for process in list(running):
        kill(process)
    os._exit(1)


def environment() -> dict[str, Any]:
    found: dict[str, Any] = {
        "executable": sys.executable,
        "cuda": torch.version.cuda,
        "cores": os.cpu_count(),
        "packages": sorted(f"{d.metadata['Name']} {d.version}" for d in distributions() if _is_of_interest(d)),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "second_level_cache": properties.L2_cache_size,
        }
    for name, command in (
        ("driver", ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]),
        ("nvcc", ["nvcc", "--version"]),
    ):
        try:
            output = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
            found[name] = output.splitlines()[-1] if output else None
        except (OSError, subprocess.SubprocessError):
            found[name] = None
    return found


def _is_of_interest(distribution: Any) -> bool:
    words = ("torch", "triton", "liger", "sonic", "quack", "cutlass", "megablocks", "grouped", "flash", "transformers")
    return any(word in (distribution.metadata["Name"] or "").lower() for word in words)


if __name__ == "__main__":
    sys.exit(main())
