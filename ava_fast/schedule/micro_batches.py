"""How many micro-batches a step takes: its batch in units of `training.batch_size`, which itself stays what it is.

sizes = MicroBatches(config)
sizes.at(step)
sizes.observe(noise_scale.sequences)        # after a measurement; moves it only where it follows the noise scale
"""

from __future__ import annotations

import math

from ava_fast.config import Config

FASTEST = 2.0
"""Between two measurements, which are noisy, the batch grows or shrinks at most by this factor."""


class MicroBatches:
    """A pure function of the step, but for `noise_scale`: then `count` goes into checkpoints."""

    def __init__(self, config: Config):
        self._config, self._base = config.curriculum.batch, config.training.gradient_accumulation_steps
        self._sequences = config.training.batch_size
        self.count = self._bounded(self._base)
        """What `noise_scale` has led to so far."""

    def at(self, step: int) -> int:
        """Of optimizer step `step`, counted from 0."""
        config = self._config
        match config.shape:
            case "constant":
                return self._base
            case "stages":
                reached = [stage.micro_batches for stage in config.stages or () if stage.step <= step]
                return reached[-1] if reached else self._base
            case "cyclical":
                height = 1.0 - abs(2.0 * (step % config.period) / config.period - 1.0)
                return config.min_micro_batches + _rounded(
                    height * (config.max_micro_batches - config.min_micro_batches)
                )
            case "noise_scale":
                return self.count

    def rate_factor(self, micro_batches: int) -> float:
        """What a step of so many multiplies the learning rate by."""
        return math.sqrt(micro_batches / self._base) if self._config.learning_rate == "sqrt" else 1.0

    def observe(self, noise_scale: float | None) -> str | None:
        """Learns the noise scale, in sequences; None: it is not known → what has changed, in words."""
        if self._config.shape != "noise_scale" or noise_scale is None:
            return None
        wanted = min(max(noise_scale / self._sequences, self.count / FASTEST), self.count * FASTEST)
        before, self.count = self.count, self._bounded(_rounded(wanted))
        if self.count == before:
            return None
        return (
            f"the gradient noise scale is {noise_scale:,.0f} sequences: a step takes {self.count} micro-batches from "
            f"now on, {before} until now"
        )

    def load(self, count: int | None) -> None:
        """Goes on with what a checkpoint had; None: it is from before there was any."""
        if count is not None:
            self.count = self._bounded(count)

    def _bounded(self, count: int) -> int:
        return min(max(count, self._config.min_micro_batches), self._config.max_micro_batches)


def _rounded(value: float) -> int:
    """Halves up: `round` would take them to even numbers."""
    return math.floor(value + 0.5)
