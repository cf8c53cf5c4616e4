"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from ava_fast.settings import TrainingConfig

ONE_CYCLE_START = 1 / 25  # of the peak, as in torch's OneCycleLR
EXPONENTIAL_START = 0.01  # of the peak


def warmup_steps(training: TrainingConfig) -> int:
    """Steps of warmup, from `warmup_steps` or else `warmup_ratio`."""
    if training.warmup_steps is not None:
        return training.warmup_steps
    return round(training.warmup_ratio * training.max_steps)


def learning_rate(step: int, training: TrainingConfig) -> float:
    """The rate of optimizer step `step`, counted from 0: warmup to the peak, then the schedule's shape.

    The first step already learns (with a linear warmup its rate is peak / warmup), the last one (`max_steps` − 1) has
    `lr_end`. torch's and transformers' schedulers of the same names give the same rates after warmup if they are told
    of `max_steps` − 1 steps; they spend their first step at rate 0.

    `cosine_with_restarts` and `sgdr` (Loshchilov & Hutter, 2017): the first fits `num_cycles` equal cycles into the
    run; the second begins with `restart_steps` and makes every cycle `restart_factor` times as long, so that the run
    may end within one. `onecycle` (Smith & Topin, 2018) climbs from a 25th of the peak along a cosine and falls along
    another; the betas stay. `wsd` (Hu et al., 2024): flat, then linear over the last `decay_ratio` of the run.
    """
    kind, peak, end = training.lr_scheduler_type, training.learning_rate, training.lr_end
    warmup, last = warmup_steps(training), training.max_steps - 1
    if step < warmup:
        if kind == "onecycle":
            return _cosine(peak * ONE_CYCLE_START, peak, step / max(1, warmup - 1)) if warmup > 1 else peak
        return peak * _warmup_share((step + 1) / warmup, training)
    if kind == "onecycle" and warmup:
        warmup -= 1  # the fall begins at the last step of the climb, which is the peak
    progress = min(1.0, (step - warmup) / max(1, last - warmup))
    match kind:
        case "constant":
            return peak
        case "linear":
            return peak + (end - peak) * progress
        case "polynomial":
            return end + (peak - end) * (1.0 - progress) ** training.power
        case "cosine" | "onecycle":
            return _cosine(peak, end, progress)
        case "cosine_with_restarts":
            cycle = min(math.floor(training.num_cycles * progress), training.num_cycles - 1)
            return _cosine(_cycle_peak(cycle, training), end, training.num_cycles * progress - cycle)
        case "sgdr":
            cycle, within = _sgdr_cycle(step - warmup, training)
            return _cosine(_cycle_peak(cycle, training), end, within)
        case "wsd":
            decay = min(training.decay_ratio * training.max_steps, max(1, last - warmup))
            return peak + (end - peak) * max(0.0, 1.0 - (last - step) / decay) if step < last else end


def _warmup_share(done: float, training: TrainingConfig) -> float:
    """Of the peak, when `done` of the warmup has passed, above 0 and at most 1."""
    match training.warmup_type:
        case "linear":
            return done
        case "cosine":
            return 0.5 * (1.0 - math.cos(math.pi * done))
        case "polynomial":
            return done**training.warmup_power
        case "exponential":
            return EXPONENTIAL_START ** (1.0 - done)


def _cycle_peak(cycle: int, training: TrainingConfig) -> float:
    return max(training.lr_end, training.learning_rate * training.cycle_decay**cycle)


def _sgdr_cycle(step: int, training: TrainingConfig) -> tuple[int, float]:
    """The cycle that `step`, counted from the end of warmup, lies in, and the share of it that has passed."""
    cycle, length = 0, training.restart_steps
    while step >= length:
        step, cycle, length = step - length, cycle + 1, length * training.restart_factor
    return cycle, step / length


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))
