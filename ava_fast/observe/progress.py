"""What a run records as it goes: metrics.jsonl, the bar and the step lines. On ranks other than 0 nothing happens."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ava_fast.config import Config
from ava_fast.distributed import pace
from ava_fast.observe.console import StepBar, step_line
from ava_fast.observe.run import Metrics

logger = logging.getLogger(__name__)


class Progress:
    """`with progress.open(step, bad_steps): progress.write(record)`; closed, nothing is written either."""

    def __init__(self, config: Config, run_folder: Path, rank: int):
        self._config, self._path, self._rank = config, run_folder / "metrics.jsonl", rank
        self._metrics: Metrics | None = None
        self._bar: StepBar | None = None

    @contextmanager
    def open(self, step: int, bad_steps: int) -> Iterator[None]:
        """Begins after `step` steps and `bad_steps` verdicts: what the file holds of later ones is dropped."""
        self._begin(step, bad_steps)
        try:
            yield
        finally:
            self._end()

    def back_to(self, step: int, bad_steps: int) -> None:
        """The same anew, after a rollback; nothing where it is closed."""
        if self._metrics:
            self._end()
            self._begin(step, bad_steps)

    def write(self, record: dict[str, Any]) -> None:
        if self._metrics:
            self._metrics.write(record)

    def step(self, record: dict[str, Any], speeds: pace.Pace) -> None:
        """Records a step, or those since the last one recorded; with a line where one is due."""
        if self._metrics is None or self._bar is None:
            return
        step, training, log_steps = record["step"], self._config.training, self._config.logging.log_steps
        self._metrics.write(record)
        first = self._bar.steps_done == 0
        self._bar.advance(record["loss"], record.get("steps", 1))
        if step % log_steps == 0 and (paces := speeds.report(step)):
            self._metrics.write(paces)
            if slow := pace.line(paces):
                logger.warning(f"step {step}: {slow}")
        if first or step % (1 if training.mode == "debug" else log_steps) == 0:
            logger.info(step_line(record, training.max_steps, self._bar.eta()))

    def _begin(self, step: int, bad_steps: int) -> None:
        if self._rank == 0:
            self._metrics = Metrics(self._path, step, bad_steps)
            self._bar = StepBar(step, self._config.training.max_steps, enabled=self._config.logging.progress)

    def _end(self) -> None:
        if self._metrics and self._bar:
            self._bar.close()
            self._metrics.close()
        self._bar = self._metrics = None
