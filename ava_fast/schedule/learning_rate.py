"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from ava_fast.config import TrainingConfig

WSD_DECAY_SHARE = 0.2  # of the run, as in MiniCPM (Hu et al., 2024), which found a tenth to a fifth to be enough


def warmup_steps(training: TrainingConfig) -> int:
    """Steps of linear warmup, from `warmup_steps` or else `warmup_ratio`."""
    if training.warmup_steps is not None:
        return training.warmup_steps
    return round(training.warmup_ratio * training.max_steps)


def learning_rate(step: int, training: TrainingConfig) -> float:
    """The rate of optimizer step `step`, counted from 0: linear warmup to the peak, then the schedule's shape.

    The first step already learns (its rate is peak / warmup), the last one (`max_steps` − 1) has `lr_end`.
    """
    warmup, last = warmup_steps(training), training.max_steps - 1
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    peak, end = training.learning_rate, training.lr_end
    progress = min(1.0, (step - warmup) / max(1, last - warmup))
    match training.lr_scheduler_type:
        case "constant":
            return peak
        case "linear":
            return peak + (end - peak) * progress
        case "cosine":
            return end + (peak - end) * 0.5 * (1.0 + math.cos(math.pi * progress))
        case "wsd":
            decay = min(WSD_DECAY_SHARE * training.max_steps, max(1, last - warmup))
            return peak + (end - peak) * max(0.0, 1.0 - (last - step) / decay) if step < last else end
