"""What becomes of a step: one verdict from its loss and gradient norm, the same on every rank.

A step is bad if a rank failed over it, if its loss or its gradient norm is not finite, if the norm is above `max_norm`,
or if the norm or the loss lies far above those of the last healthy steps: more than `deviations` robust standard
deviations (1.4826 · the median absolute deviation) above their median, once the window is full. The deviation counts as
at least a tenth of a median norm and at least 0.02 nats or a fiftieth of a median loss, so a norm must be 1 +
deviations / 10 times the median, whatever the calm before. Bad values never enter a window.

| this step | bad steps among the last `window` | verdict | the batch | the rate |
|---|---|---|---|---|
| good | any | APPLY | counts | · factor, which climbs back to 1 |
| bad | at most `max_skips` | SKIP | as if it had never been | as it was |
| bad | more, rate whole | CUT | if finite: clipped and applied; else as SKIP | · `emergency_factor` |
| bad | more, rate reduced, a roll-back left | ROLL_BACK | skipped, with all since trouble began | reduced anew |
| bad | more, rate reduced, no roll-back left | STOP | as SKIP | |
| out of memory | any | STOP | as SKIP | |

CUT, ROLL_BACK and STOP start the count of bad steps anew and empty the windows: what is usual is learned again, so a
norm that has risen for good is accepted, at a reduced rate. After a cut the rate climbs back linearly over
`recovery_steps` good steps; only then is the next trouble answered by a cut again and not by a roll-back. STOP also
forgets cut and roll-backs, for a run that a person resumes.

    judge = Judge(config.stability, config.training.adaptive_lr.emergency_factor)
    ruling = judge.rule(loss, grad_norm, can_roll_back=True)
    if ruling.apply: update at lr * ruling.factor

Pure Python, no clock, no randomness: equal inputs give equal rulings. The scale 1.4826 makes the median absolute
deviation of a normal distribution its standard deviation (Hampel, 1974).
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from statistics import median
from typing import Any

from ava_fast.settings import StabilityConfig

_NORM_FLOOR, _LOSS_FLOOR = 0.1, 0.02  # least deviation, as a share of the median; of the loss, in nats below 1


class Verdict(str, Enum):
    """See the table above."""

    APPLY = "APPLY"
    SKIP = "SKIP"
    CUT = "CUT"
    ROLL_BACK = "ROLL_BACK"
    STOP = "STOP"


class Trouble(str, Enum):
    """What was wrong with a bad step; the first that holds."""

    MEMORY = "out of memory"
    EXCEPTION = "exception in the model"
    DATA = "batch not readable"
    LOSS = "loss not finite"
    GRADIENT = "gradient not finite"
    EXPLOSION = "gradient explosion"
    SPIKE = "loss spike"


FAILURES = (Trouble.MEMORY, Trouble.EXCEPTION, Trouble.DATA)
"""What leaves no numbers to judge."""


@dataclass(frozen=True)
class Ruling:
    """What to do with a step, and why."""

    verdict: Verdict
    apply: bool
    """Whether the optimizer takes this gradient."""
    factor: float
    """Of the learning rate, now."""
    trouble: Trouble | None = None
    reason: str = ""
    """In words; empty for a good step."""


class Judge:
    """Rules over steps in their order. Its state goes into checkpoints."""

    def __init__(self, config: StabilityConfig, emergency_factor: float = 0.5):
        self._config, self._emergency_factor = config, emergency_factor
        self._norms: deque[float] = deque(maxlen=config.window)
        self._losses: deque[float] = deque(maxlen=config.window)
        self._recent: deque[bool] = deque(maxlen=config.window)  # of the last steps, which were bad
        self._cut, self._recovered = 1.0, 0  # the last cut's factor, good steps since
        self._rollbacks = 0
        self.counts: Counter[str] = Counter()
        """How many bad steps there were, by Trouble and by Verdict."""

    @property
    def calm(self) -> bool:
        """No bad step in sight and the rate whole."""
        return self._cut == 1.0 and not any(self._recent)

    @property
    def factor(self) -> float:
        """Of the learning rate, for a good step now."""
        return self._cut + (1.0 - self._cut) * self._recovered / self._config.recovery_steps

    @property
    def bad_steps(self) -> int:
        """Bad steps since the run began."""
        return sum(self.counts[trouble.value] for trouble in Trouble)

    def rule(
        self, loss: float, grad_norm: float, *, can_roll_back: bool, failures: Mapping[Trouble, int] = {}
    ) -> Ruling:
        """The verdict on a step whose loss and norm (before clipping) all ranks agree on.

        `can_roll_back`: there is a checkpoint. `failures`: on how many ranks which of FAILURES came instead of numbers.
        For a finite loss of which no gradient was taken, pass a NaN norm.
        """
        found = _failure(failures) or self._trouble(loss, grad_norm)
        self._recent.append(found is not None)
        if found is None:
            return self._good(loss, grad_norm)
        trouble, reason = found
        bad = sum(self._recent)
        verdict = Verdict.STOP if trouble is Trouble.MEMORY else self._verdict(bad, can_roll_back)
        reason = f"{reason} ({bad} bad of the last {len(self._recent)} steps)"
        if verdict is not Verdict.SKIP:
            self._start_anew(verdict)
        self.counts.update((trouble.value, verdict.value))
        applied = verdict is Verdict.CUT and trouble in (Trouble.EXPLOSION, Trouble.SPIKE)
        return Ruling(verdict, applied, self.factor, trouble, reason)

    def _good(self, loss: float, grad_norm: float) -> Ruling:
        self._losses.append(loss)
        self._norms.append(grad_norm)
        ruling = Ruling(Verdict.APPLY, True, self.factor)
        if self._cut < 1.0:
            self._recovered += 1
            if self._recovered >= self._config.recovery_steps:
                self._cut, self._recovered = 1.0, 0
        return ruling

    def _verdict(self, bad: int, can_roll_back: bool) -> Verdict:
        if bad <= self._config.max_skips:
            return Verdict.SKIP
        if self._cut == 1.0:
            return Verdict.CUT
        if can_roll_back and self._rollbacks < self._config.max_rollbacks:
            return Verdict.ROLL_BACK
        return Verdict.STOP

    def _start_anew(self, verdict: Verdict) -> None:
        for window in (self._norms, self._losses, self._recent):
            window.clear()
        if verdict is Verdict.CUT:
            self._cut = self._emergency_factor
        elif verdict is Verdict.ROLL_BACK:
            self._rollbacks += 1
        else:
            self._cut, self._rollbacks = 1.0, 0
        self._recovered = 0

    def _trouble(self, loss: float, grad_norm: float) -> tuple[Trouble, str] | None:
        config = self._config
        if not math.isfinite(loss):
            return Trouble.LOSS, f"the loss is {loss}"
        if not math.isfinite(grad_norm):
            return Trouble.GRADIENT, f"the gradient norm is {grad_norm}"
        if config.max_norm is not None and grad_norm > config.max_norm:
            return Trouble.EXPLOSION, f"the gradient norm is {grad_norm:.4g}, stability.max_norm {config.max_norm:g}"
        limit = self._limit(self._norms, _NORM_FLOOR, 0.0)
        if grad_norm > limit:
            return Trouble.EXPLOSION, f"the gradient norm is {grad_norm:.4g}, {_usual(self._norms, limit)}"
        limit = self._limit(self._losses, _LOSS_FLOOR, 1.0)
        if loss > limit:
            return Trouble.SPIKE, f"the loss is {loss:.4g}, {_usual(self._losses, limit)}"
        return None

    def _limit(self, window: Collection[float], floor: float, least: float) -> float:
        """The largest value that is not far above the window's; infinite until it is full."""
        if self._config.deviations is None or len(window) < self._config.window:
            return math.inf
        middle = median(window)
        deviation = 1.4826 * median(abs(value - middle) for value in window)
        return middle + self._config.deviations * max(deviation, floor * max(least, abs(middle)))

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON."""
        return {
            "norms": list(self._norms),
            "losses": list(self._losses),
            "recent": list(self._recent),
            "cut": self._cut,
            "recovered": self._recovered,
            "rollbacks": self._rollbacks,
            "counts": dict(self.counts),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken. If the window has been made smaller since, the latest values stay."""
        for name, window in (("norms", self._norms), ("losses", self._losses), ("recent", self._recent)):
            window.clear()
            window.extend(state[name])
        self._cut, self._recovered, self._rollbacks = state["cut"], state["recovered"], state["rollbacks"]
        self.counts = Counter(state["counts"])


def _failure(failures: Mapping[Trouble, int]) -> tuple[Trouble, str] | None:
    for trouble in FAILURES:
        if ranks := failures.get(trouble, 0):
            return trouble, f"{trouble.value} on {ranks} rank{'s' if ranks > 1 else ''}"
    return None


def _usual(window: Collection[float], limit: float) -> str:
    return f"{median(window):.4g} is usual, at most {limit:.4g} was expected"
