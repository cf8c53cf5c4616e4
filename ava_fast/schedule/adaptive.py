"""An overlay on any schedule: the rate follows how training goes.

Healthy steps after warmup are taken in periods of `plateau_patience`. A period is a plateau if its mean loss is not
below the best earlier period's by `min_improvement`. On a plateau with steady gradients training has room to move
faster: the factor grows. On one with unsteady gradients it bounces: the factor shrinks. Gradients are steady if no step
of the period was bad and the robust spread of their norms is below a third of their median.

    rate = schedule · factor, within [min_lr, max_lr] as far as the schedule itself is

An emergency cut (stability/judge.py) multiplies that once more. Pure Python: equal inputs give equal rates.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from ava_fast.schedule.learning_rate import learning_rate, warmup_steps
from ava_fast.settings import TrainingConfig

STEADY = 1 / 3  # norms of a model that trains well spread by a tenth of their median; of one that bounces, by half


@dataclass(frozen=True)
class Change:
    """What a plateau led to."""

    factor: float
    """From now on."""
    reason: str


class AdaptiveRate:
    """The rate of every step, and what it learns from it. Its state goes into checkpoints."""

    def __init__(self, training: TrainingConfig):
        self._training, self._config = training, training.adaptive_lr
        self._least = self._config.min_lr or training.learning_rate / 100
        self._most = self._config.max_lr or training.learning_rate * 2
        self.factor = 1.0
        self._best: float | None = None
        self._losses: list[float] = []
        self._norms: list[float] = []
        self._disturbed = False

    def rate(self, step: int) -> float:
        """Of optimizer step `step`, counted from 0, before any emergency cut."""
        base = learning_rate(step, self._training)
        adapted = base * self.factor
        if self.factor > 1.0:
            return max(base, min(adapted, self._most))
        return min(base, max(adapted, self._least))

    def disturbed(self) -> None:
        """A bad step: the period under way has no steady gradients."""
        self._disturbed = True

    def observe(self, step: int, loss: float, grad_norm: float) -> Change | None:
        """Learns from step `step`, which was healthy and has been taken → what it changes, if it ends a plateau."""
        config = self._config
        if not config.enabled or step < warmup_steps(self._training):
            return None
        self._losses.append(loss)
        self._norms.append(grad_norm)
        if len(self._losses) < config.plateau_patience:
            return None
        mean, middle = fmean(self._losses), median(self._norms)
        spread = 1.4826 * median(abs(norm - middle) for norm in self._norms)
        steady = not self._disturbed and spread < STEADY * middle
        self._losses, self._norms, self._disturbed = [], [], False
        best, self._best = self._best, mean if self._best is None else min(mean, self._best)
        if best is None or mean < best - config.min_improvement * abs(best):
            return None
        before, rate = self.factor, self.rate(step)
        wanted = before * (config.growth_factor if steady else config.plateau_factor)
        base = learning_rate(step, self._training)
        if base > 0.0:  # no further than the bounds reach, or it would take as many plateaus to come back
            wanted = min(max(wanted, min(1.0, self._least / base)), max(1.0, self._most / base))
        self.factor = wanted
        if wanted == before:
            return None
        gradients = "steady" if steady else "unsteady"
        return Change(
            wanted,
            f"{config.plateau_patience} steps with a mean loss of {mean:.4f}, the best was {best:.4f}, and {gradients} "
            f"gradients: the learning rate goes from {rate:.2e} to {self.rate(step):.2e}",
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON."""
        return {
            "factor": self.factor,
            "best": self._best,
            "losses": self._losses,
            "norms": self._norms,
            "disturbed": self._disturbed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.factor, self._best, self._disturbed = state["factor"], state["best"], state["disturbed"]
        self._losses, self._norms = list(state["losses"]), list(state["norms"])
