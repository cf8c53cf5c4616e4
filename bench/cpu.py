"""Everything that a CPU can tell about this code's speed, beside its peers, in a given time.

    make bench
    python -m bench.cpu [--budget MINUTES] [--only SUITE]…

Each suite is a process of its own; one that fails is told at the end, and the rest goes on. Suites that have no end of
their own take as many runs as their share of the time allows, eight turns at least. Results go into bench/results, and
from there into docs/benchmarks.md and README's table (`bench.report`). The exit code is 0 if all went well, else 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time

from bench import machine

# The others of bench.training_step take seconds a turn, and minutes in all.
SIZES = [word for size in ("demo", "wide_2k", "fine_2k", "many_8k") for word in ("--size", size)]
# Suite → threads (0: one a core), and what its command takes; "{m}" is its share of the minutes, at a budget of 10.
SUITES: dict[str, tuple[int, float, list[str]]] = {
    "ceilings": (0, 0.2, []),
    "gradients": (0, 0.2, []),
    "rotary": (0, 0.2, []),
    "norm": (0, 0.6, []),
    "loss": (0, 0.3, []),
    "routing": (0, 0.8, ["--budget", "{m}"]),
    "attention": (0, 0.4, []),
    "experts": (0, 1.8, ["--budget", "{m}"]),
    "training_step": (0, 2.6, ["--budget", "{m}", *SIZES]),
    "loader": (1, 0.5, ["--tokens", "60"]),
    "data": (0, 0.9, ["--mb", "8", "--runs", "3"]),
    "checkpoint": (0, 0.5, []),
    "startup": (1, 0.8, []),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--budget", type=float, default=10.0, help="minutes (default: 10)")
    parser.add_argument("--only", action="append", choices=SUITES, help="repeatable")
    options = parser.parse_args()
    names = options.only or [name for name in SUITES if importlib.util.find_spec(f"bench.{name}")]
    started_at, failed = time.monotonic(), []
    for number, name in enumerate(names, start=1):
        seconds = time.monotonic() - started_at
        print(
            f"--- {number} of {len(names)}: {name}, after {seconds / 60:.1f} of {options.budget:g} minutes", flush=True
        )
        threads, minutes, arguments = SUITES[name]
        share = f"{minutes * options.budget / 10:.2f}"
        command = [sys.executable, "-m", f"bench.{name}", *(word.replace("{m}", share) for word in arguments)]
        variables = {**os.environ, "OMP_NUM_THREADS": str(threads or os.cpu_count() or 1)}
        variables["CUDA_VISIBLE_DEVICES"] = ""  # bench-gpu is for that
        if subprocess.run(command, cwd=machine.ROOT, env=variables).returncode:
            failed.append(name)
    print(f"{(time.monotonic() - started_at) / 60:.1f} minutes; {machine.RESULTS}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
