"""What a person watching the run sees: a line every few steps, and a progress bar on a terminal."""

from __future__ import annotations

import logging
import math
import sys
import time
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)


def duration(seconds: float) -> str:
    """`1:02:03`, `2:03`; `?` where it is not known yet."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def step_line(record: dict[str, Any], max_steps: int, eta: float) -> str:
    """`step 120/1000 | loss 3.2101 | lr 4.00e-03 | norm 0.41 | reroute 4.1 % | 11,800 tok/s | MFU 41.2 % | ETA 1:15`.

    What overflowed, as a mean over blocks, is only there where something did; lengths and batches where they change.
    """
    parts = [
        f"step {record['step']}/{max_steps}",
        f"loss {record['loss']:.4f}",
        f"lr {record['learning_rate']:.2e}",
        f"norm {record['grad_norm']:.2f}",
    ]
    if "sequence_length" in record:
        parts.append(f"length {record['sequence_length']:,}")
    if "micro_batches" in record:
        parts.append(f"micro-batches {record['micro_batches']}")
    for word, key in (("reroute", "rerouted"), ("drop", "dropped")):
        shares = record.get("routing", {}).get(key)
        if shares and any(shares):
            parts.append(f"{word} {100 * sum(shares) / len(shares):.1f} %")
    parts.append(f"{record['tokens_per_second']:,.0f} tok/s")
    if record["mfu"] is not None:
        parts.append(f"MFU {100 * record['mfu']:.1f} %")
    parts.append(f"ETA {duration(eta)}")
    return " | ".join(parts)


class StepBar:
    """A bar over the run's steps, shown if `enabled` and stderr is a terminal, and their pace."""

    def __init__(self, first: int, total: int, enabled: bool):
        self._left = total - first
        self._started_at = time.perf_counter()
        self.steps_done = 0
        self._bar = tqdm(
            total=total,
            initial=first,
            disable=not (enabled and sys.stderr.isatty()),
            unit="step",
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )

    def advance(self, loss: float, steps: int = 1) -> None:
        self.steps_done += steps
        self._bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        self._bar.update(steps)

    def eta(self) -> float:
        """Seconds to the end at this launch's pace so far, evaluations and saves included."""
        pace = (time.perf_counter() - self._started_at) / self.steps_done
        return pace * (self._left - self.steps_done)

    def close(self) -> None:
        self._bar.close()


class BarSafeHandler(logging.Handler):
    """Writes log lines above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()
