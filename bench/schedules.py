"""Draws every schedule into docs/images/schedules.png.

python -m bench.schedules
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from ava_fast.schedule.learning_rate import learning_rate
from ava_fast.settings import TrainingConfig

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "schedules.png"
STEPS = 1000
SHOWN: dict[str, dict[str, Any]] = {
    "cosine": {},
    "linear": {},
    "polynomial, power 3": {"lr_scheduler_type": "polynomial", "power": 3.0},
    "wsd": {},
    "constant": {},
    "onecycle, warmup_ratio 0.3": {"lr_scheduler_type": "onecycle", "warmup_ratio": 0.3},
    "cosine_with_restarts, num_cycles 4": {"lr_scheduler_type": "cosine_with_restarts", "num_cycles": 4},
    "sgdr, cycle_decay 0.7": {"lr_scheduler_type": "sgdr", "restart_steps": 130, "cycle_decay": 0.7},
    "warmup_type": {"warmup_steps": 600},
}


def main() -> None:
    figure, axes = pyplot.subplots(3, 3, figsize=(11, 7), sharex=True, sharey=True, layout="constrained")
    for axis, (title, settings) in zip(axes.flat, SHOWN.items(), strict=True):
        kinds = ("linear", "cosine", "polynomial", "exponential") if title == "warmup_type" else ("linear",)
        for kind in kinds:
            chosen = {"lr_scheduler_type": title if not settings else "cosine", "warmup_type": kind, **settings}
            training = TrainingConfig(max_steps=STEPS, learning_rate=1.0, **chosen)
            rates = [learning_rate(step, training) for step in range(STEPS)]
            axis.plot(rates, linewidth=1.6, label=kind, color="#1f5f99" if len(kinds) == 1 else None)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        if len(kinds) > 1:
            axis.legend(fontsize="small")
    figure.supxlabel("step of 1,000")
    figure.supylabel("share of training.learning_rate")
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    main()
