"""Time from launch to the end of the first step, as a user waits for it.

    python -m bench.startup

Starts configs/demo.yaml for one step, with its data already prepared, on one process and on two under torchrun, and
times until the first step's line is printed.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import machine

RUNS = 4


def main() -> None:
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, 2):
            _launch(ranks, Path(folder))  # prepares the data and fills the disk cache
            seconds = [_launch(ranks, Path(folder)) for _ in range(RUNS)]
            results[f"{ranks} rank{'s' if ranks > 1 else ''}"] = machine.spread(seconds)
            print(f"{ranks} rank(s): {statistics.median(seconds):.1f} s from launch to the first step", flush=True)
    print(machine.write("startup_cpu", {"runs": RUNS, "launch_to_first_step": results}))


def _launch(ranks: int, folder: Path) -> float:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    settings = {"logging.output_dir": folder, "training.max_steps": 1, "evaluation.max_sequences": 8}
    overrides = [part for key, value in settings.items() for part in ("--override", f"{key}={value}")]
    command = [sys.executable, *torchrun, "-m", "ava_fast.train", "--config", "configs/demo.yaml", *overrides]
    started_at = time.perf_counter()
    process = subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step 1/1 "):
            elapsed = time.perf_counter() - started_at
            process.stdout.read()
            process.wait()
            return elapsed
    raise SystemExit("the run took no step:\n" + "".join(lines))


if __name__ == "__main__":
    main()
