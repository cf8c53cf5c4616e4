"""A run's folder: where it is, its logs and its metrics.

outputs/runs/run_20260131_120000_name/
    config.yaml      the resolved settings
    metrics.jsonl    one record per step, one per evaluation
    logs/            training.log, evaluation.log, errors.log, debug.log
    checkpoints/     step_N/, latest
    report.md        loss.png, routing.png
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from ava_fast.config import Config
from ava_fast.errors import UserError
from ava_fast.observe.console import BarSafeHandler

EVALUATION_LOG = "ava_fast.evaluate"  # loggers under this name also write evaluation.log


def runs_folder(config: Config) -> Path:
    return Path(config.logging.output_dir) / "runs"


def new_run(config: Config) -> Path:
    """Makes an empty run folder named after the time and the experiment. Raises UserError if that cannot be done."""
    while True:
        name = time.strftime("run_%Y%m%d_%H%M%S")
        if config.logging.experiment_name:
            name += f"_{config.logging.experiment_name}"
        folder = runs_folder(config) / name
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if not folder.is_dir():
                raise _unwritable(folder.parent, "a file is in its place") from None
            time.sleep(1.0)  # another run took this second
        except OSError as error:
            raise _unwritable(folder.parent, error.strerror or str(error)) from None


def _unwritable(folder: Path, why: str) -> UserError:
    return UserError(
        f"{folder}: a run's folder cannot be made there ({why}); set logging.output_dir to a writable folder"
    )


def newest_run(config: Config) -> Path | None:
    """The newest run of this experiment name that has a checkpoint to resume from."""
    name = config.logging.experiment_name
    candidates = [
        path.parent.parent
        for path in runs_folder(config).glob("run_*/checkpoints/step_*")
        if path.name.removeprefix("step_").isdigit() and _experiment_of(path.parent.parent.name) == name
    ]
    return max(candidates, key=lambda path: path.name, default=None)


def _experiment_of(run_name: str) -> str | None:
    """`run_20260131_120000_my_name` → `my_name`; None for a run without one."""
    parts = run_name.split("_", 3)
    return parts[3] if len(parts) == 4 else None


class Metrics:
    """metrics.jsonl: appended line by line, so that a run that dies leaves all but its last line."""

    def __init__(self, path: Path, keep_steps: int, keep_verdicts: int = 0):
        """Opens for appending. Of a run that is resumed or rolled back, records after step `keep_steps` are dropped,
        and of its verdicts, which belong to no step, those after the first `keep_verdicts`."""
        if path.exists():
            kept, verdicts = [], 0
            for record in read_metrics(path):
                verdicts += record["kind"] == "verdict"
                if verdicts <= keep_verdicts if record["kind"] == "verdict" else record["step"] <= keep_steps:
                    kept.append(record)
            replacement = path.with_suffix(".tmp")
            replacement.write_text("".join(json.dumps(record) + "\n" for record in kept))
            os.replace(replacement, path)
        self._file = path.open("a", buffering=1)

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        self._file.close()


def number(value: float) -> float | None:
    """As JSON has it: None for what it has no number for."""
    return value if math.isfinite(value) else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole records; a last line cut short by a crash is not one."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


_handlers: list[tuple[logging.Logger, logging.Handler]] = []  # what start_logging opened


def start_logging(folder: Path | None) -> None:
    """Log lines go to the terminal and, on the rank that was given the run's folder, to its logs."""
    package = logging.getLogger("ava_fast")
    package.setLevel(logging.DEBUG)
    package.propagate = False
    if folder is None:
        _attach(package, logging.NullHandler(), logging.DEBUG)
        return
    _attach(package, BarSafeHandler(), logging.INFO)
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    for name, level in (("training", logging.INFO), ("errors", logging.WARNING), ("debug", logging.DEBUG)):
        _attach(package, _file(logs / f"{name}.log"), level)
    _attach(logging.getLogger(EVALUATION_LOG), _file(logs / "evaluation.log"), logging.INFO)


def logging_started() -> bool:
    return bool(_handlers)


def stop_logging() -> None:
    """Closes what `start_logging` opened; what is logged afterwards is the process's again."""
    package = logging.getLogger("ava_fast")
    package.setLevel(logging.NOTSET)
    package.propagate = True
    while _handlers:
        logger, handler = _handlers.pop()
        logger.removeHandler(handler)
        handler.close()


def _file(path: Path) -> logging.Handler:
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    return handler


def _attach(logger: logging.Logger, handler: logging.Handler, level: int) -> None:
    handler.setLevel(level)
    logger.addHandler(handler)
    _handlers.append((logger, handler))


def say(line: str) -> None:
    """A line to the terminal before a run has a log."""
    print(line, file=sys.stdout, flush=True)
