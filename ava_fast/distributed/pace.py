"""How long each rank's own work in a step takes, without what it waits for others: who holds the rest up.

    with pace:                        # around what this rank does alone, several times a step
        …
    shares = pace.share()             # joins an all-reduce that the step has anyway
    pace.heard(sums)                  # what became of it
    record = pace.report(step)        # now and then, on rank 0

What is done alone depends on where ranks first wait for each other (`Engine.collectives`): under ZeRO 0 and 1 all but
the step's end, under 2 reading and the forward pass, under 3 reading.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter, deque
from types import TracebackType
from typing import Any

import torch

_NOISE = 0.02  # seconds: what a machine's own business may cost a step
NAMED_AFTER = 3
"""Reports in a row that find a rank slow, before it is named: any rank may be for a while."""


class Pace:
    """One on each rank. On a GPU a step's times are those of the step before, so that nothing waits for the device."""

    def __init__(self, rank: int, world_size: int, ratio: float, window: int, *, cuda: bool):
        self.hosts = ["?"] * world_size
        self._rank, self._ratio, self._cuda = rank, ratio, cuda
        self._own = 0.0
        self._events: list[torch.cuda.Event] = []
        self._steps: deque[list[float]] = deque(maxlen=window)
        self._in_a_row: Counter[int] = Counter()  # reports, for each rank that the last one found slow

    def __enter__(self) -> Pace:
        self._mark()
        self._began_at = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not self._cuda:
            self._own += time.perf_counter() - self._began_at
        self._mark()

    def _mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)

    def share(self) -> list[float]:
        """This rank's seconds in its place, 0 in the others'. Starts the next step."""
        shares = [0.0] * len(self.hosts)
        shares[self._rank], self._own = self._own, 0.0
        return shares

    def heard(self, seconds: list[float]) -> None:
        """Every rank's. Called when the device has been waited for."""
        self._steps.append(seconds)
        if self._cuda:
            pairs = zip(self._events[::2], self._events[1::2], strict=True)
            self._own = sum(begun.elapsed_time(ended) for begun, ended in pairs) / 1000
            self._events.clear()

    def report(self, step: int) -> dict[str, Any] | None:
        """For metrics.jsonl: medians over the last steps, and the ranks that are slower than the others by the ratio.
        None in a world of one."""
        if len(self.hosts) == 1 or not self._steps:
            return None
        medians = [statistics.median(seconds) for seconds in zip(*self._steps, strict=True)]
        usual = statistics.median_low(medians)
        slow = [rank for rank, own in enumerate(medians) if own > usual * self._ratio and own > usual + _NOISE]
        self._in_a_row = Counter({rank: self._in_a_row[rank] + 1 for rank in slow})
        outliers = [
            {
                "rank": rank,
                "host": self.hosts[rank],
                "seconds": medians[rank],
                "times": round(medians[rank] / max(usual, 1e-9), 2),
                "in_a_row": self._in_a_row[rank],
            }
            for rank in slow
        ]
        return {"kind": "pace", "step": step, "median": usual, "slowest": max(medians), "outliers": outliers}


def line(record: dict[str, Any]) -> str | None:
    """`rank 3 on node7 takes 0.41 s a step for its own work, 1.8 × the others' median`; None if there is none to name
    that has not been."""
    named = [
        f"rank {each['rank']} on {each['host']} takes {each['seconds']:.3g} s a step for its own work, "
        f"{each['times']:.3g} × the others' median"
        for each in record["outliers"]
        if each["in_a_row"] == NAMED_AFTER
    ]
    return "; ".join(named) or None
