"""Starts `ava_fast.train` as a user does, on one process or under torchrun, and reads what the run left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ava_fast.observe.run import read_metrics

TIMEOUT = 180


def command(config: Path, *arguments: str, ranks: int = 1) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"] if ranks > 1 else []
    return [sys.executable, *torchrun, "-m", "ava_fast.train", "--config", str(config), *arguments]


def launch(config: Path, *arguments: str, ranks: int = 1, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs to the end; stdout holds both streams."""
    return subprocess.run(
        command(config, *arguments, ranks=ranks),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
        **options,
    )


def interrupt(config: Path, *, ranks: int, after_step: int, number: signal.Signals) -> int:
    """Starts a run and sends it a signal once step `after_step` is in its metrics; the exit code."""
    process = subprocess.Popen(
        command(config, ranks=ranks),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        metrics = list(config.parent.glob("outputs/runs/*/metrics.jsonl"))
        if metrics and len(read_metrics(metrics[0])) >= after_step:
            process.send_signal(number)
            break
        time.sleep(0.01)
    return process.wait(TIMEOUT)


def only_run(config: Path) -> Path:
    """The folder of the one run beside this configuration."""
    (run,) = (config.parent / "outputs" / "runs").iterdir()
    return run


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    """The run's metrics of one kind, without what depends on the clock."""
    clock = {"seconds", "tokens_per_second"}
    found = [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == kind]
    return [{key: value for key, value in record.items() if key not in clock} for record in found]
