"""Draws the curricula into docs/images/curricula.png.

python -m bench.curricula
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot

from ava_fast.config import Config, load_config
from ava_fast.schedule.difficulty import EasyFirst
from ava_fast.schedule.length import sequence_length
from ava_fast.schedule.micro_batches import MicroBatches

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "curricula.png"
STEPS, ROWS = 1000, 4000
COLOURS = ("#1f5f99", "#c8553d", "#5a8f3c")
LENGTHS = {
    "stages [128, 256, 512]": ["shape=stages", "stages=[128, 256, 512]"],
    "linear from 128": ["shape=linear", "start=128"],
    "exponential from 32": ["shape=exponential", "start=32"],
}
BATCHES = {
    "stages": ["shape=stages", "stages=[{step: 200, micro_batches: 2}, {step: 600, micro_batches: 6}]"],
    "cyclical, period 250": ["shape=cyclical", "min_micro_batches=1", "max_micro_batches=8", "period=250"],
}


def main() -> None:
    figure, (lengths, batches, rows) = pyplot.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for colour, (name, settings) in zip(COLOURS, LENGTHS.items(), strict=True):
        config = _config("length", settings)
        drawn = [sequence_length(step, config) for step in range(STEPS)]
        lengths.step(range(STEPS), drawn, where="post", color=colour, label=name)
    lengths.set_yscale("log", base=2)
    lengths.set_ylabel("sequence length")
    for colour, (name, settings) in zip(COLOURS, BATCHES.items(), strict=False):
        sizes = MicroBatches(_config("batch", settings))
        batches.step(range(STEPS), [sizes.at(step) for step in range(STEPS)], where="post", color=colour, label=name)
    batches.set_ylabel("micro-batches a step")
    batches.set_ylim(0.5, 10)
    # Rows numbered by difficulty: a dot for one of every four draws.
    places = np.arange(0, STEPS * 4)
    order = EasyFirst(np.arange(ROWS, dtype=np.uint32), mode="threshold", horizon=len(places) // 2, seed=0)
    rows.plot(places[::4] / 4, order.at(places[::4]) / ROWS, ".", markersize=2.5, color=COLOURS[0])
    rows.set_ylabel("difficulty of the rows drawn")
    rows.set_title("threshold, linear from 0.2", fontsize=10)
    lengths.legend(fontsize="small", loc="lower right")
    batches.legend(fontsize="small", loc="upper left")
    for axis in (lengths, batches, rows):
        axis.grid(alpha=0.3)
    figure.supxlabel("step of 1,000", fontsize=10)
    figure.savefig(PICTURE, dpi=110)


def _config(section: str, settings: list[str]) -> Config:
    overrides = [f"curriculum.{section}.{setting}" for setting in settings]
    return load_config(None, [f"training.max_steps={STEPS}", "data.max_length=1024", *overrides])


if __name__ == "__main__":
    main()
