"""A learning-rate range test (Smith, 2017): train while the rate rises exponentially, and see where the loss falls
fastest and where it turns.

    ava-fast find-lr --config configs/mine.yaml --write

It trains a copy: of the initial weights, or of a checkpoint's, whose run is not touched.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tqdm import tqdm

from ava_fast.config import Config, load_config
from ava_fast.errors import UserError
from ava_fast.files import write_whole
from ava_fast.settings import CurriculumConfig

DIVERGED = 4.0  # times the best smoothed loss, as fastai's finder has it
SAME = 0.05  # of what the loss falls in all: minima that differ by less are noise
PICKS = ("steepest", "tenth", "minimum")


@dataclass(frozen=True)
class RangeTest:
    """What a range test saw. Losses in nats per token, means over ranks."""

    rates: list[float]
    losses: list[float]
    diverged: bool

    def smooth(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The losses without their noise: quadratics fitted to a fifth of the test around each.

        A quadratic dips below every loss beside a spike, and would find the minimum there; so of each loss and its
        neighbours the median counts, which leaves what rises or falls as it is.
        """
        losses, window = np.array(self.losses), max(5, len(self.losses) // 5) | 1
        losses[1:-1] = np.median([losses[:-2], losses[1:-1], losses[2:]], axis=0)
        return savitzky_golay(losses, min(window, (len(losses) - 1) | 1), 2)

    def suggestions(self) -> dict[str, float]:
        """Rates: where the loss falls `steepest` per factor of the rate, at its `minimum`, and a `tenth` of that. Of
        several equally low places the first is the minimum: the later ones are a model that has begun to bounce."""
        smooth, log_rates = self.smooth(), np.log(self.rates)
        low = smooth <= smooth.min() + SAME * (smooth[0] - smooth.min())
        first = int(np.argmax(low))
        end = first + int(np.argmin(low[first:])) if not low[first:].all() else len(low)
        lowest = first + int(np.argmin(smooth[first:end]))
        slope = np.gradient(smooth, log_rates)
        steepest = int(np.argmin(slope[: max(lowest, 1)]))
        minimum = self.rates[lowest]
        return {"steepest": self.rates[steepest], "tenth": minimum / 10, "minimum": minimum}


def savitzky_golay(values: np.ndarray[Any, Any], window: int, order: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """values (N,), N ≥ window odd > order → (N,): each the value there of the polynomial of degree `order` that fits
    its window best; at the ends, of the first and last whole window (Savitzky & Golay, 1964)."""
    half = window // 2
    powers = np.vander(np.arange(-half, half + 1), order + 1, increasing=True).astype(np.float64)
    projection = powers @ np.linalg.pinv(powers)  # a window's values → its polynomial's
    smooth = np.empty(len(values))
    smooth[half : len(values) - half] = np.convolve(values, projection[half, ::-1], mode="valid")
    smooth[:half] = (projection @ values[:window])[:half]
    smooth[len(values) - half :] = (projection @ values[-window:])[half + 1 :]
    return smooth


def range_test(
    config: Config, shards: Any, start: float, end: float, steps: int, weights: dict[str, torch.Tensor] | None
) -> RangeTest:
    """Trains `steps` steps with rates from `start` to `end`, fewer if the loss diverges. Collective; leaves nothing."""
    from ava_fast.distributed.rank_0 import on_rank_0
    from ava_fast.trainer import Trainer

    with ExitStack() as stack:
        # One for all ranks, as a step that lacks memory may go through a checkpoint there.
        folder = on_rank_0(lambda: stack.enter_context(tempfile.TemporaryDirectory(prefix="ava-fast-find-lr-")))
        trainer = Trainer(_for_test(config, steps), Path(folder), shards, weights)
        trainer.rate = lambda step: start * (end / start) ** (step / (steps - 1))
        rates: list[float] = []
        losses: list[float] = []
        average, best = 0.0, math.inf
        hidden = _rank() != 0 or not sys.stderr.isatty()
        with tqdm(total=steps, unit="step", dynamic_ncols=True, disable=hidden) as bar:
            for step in range(steps):
                ruling, loss = trainer.advance()
                if not ruling.apply:  # not finite
                    return RangeTest(rates, losses, diverged=True)
                rates.append(trainer.rate(step))
                losses.append(loss)
                average = 0.9 * average + 0.1 * loss
                smoothed = average / (1 - 0.9 ** (step + 1))
                best = min(best, smoothed)
                if smoothed > DIVERGED * best:
                    return RangeTest(rates, losses, diverged=True)
                bar.set_postfix_str(f"lr {rates[-1]:.1e}, loss {smoothed:.3f}", refresh=False)
                bar.update()
        return RangeTest(rates, losses, diverged=False)


def _for_test(config: Config, steps: int) -> Config:
    """The run's settings without what judges, measures or saves."""
    training = config.training.model_copy(update={"max_steps": steps, "noise_scale_steps": 0})
    stability = config.stability.model_copy(update={"deviations": None, "max_norm": None, "dump_batches": 0})
    curriculum = CurriculumConfig()  # made for the whole run, of which this is none
    return config.model_copy(update={"training": training, "stability": stability, "curriculum": curriculum})


def plot(test: RangeTest, suggested: dict[str, float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 5), layout="constrained")
    axis.plot(test.rates, test.losses, color="#9ec5e8", linewidth=0.8, label="each step")
    axis.plot(test.rates, test.smooth(), color="#1f5f99", linewidth=1.8, label="smoothed")
    for (name, rate), colour in zip(suggested.items(), ("#c8553d", "#666666", "#999999"), strict=True):
        axis.axvline(rate, color=colour, linestyle="--", linewidth=1.2, label=f"{name} {rate:.2e}")
    axis.set_xscale("log")
    axis.set_xlabel("learning rate")
    axis.set_ylabel("loss (nats per token)")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def set_in_file(path: Path, section: str, key: str, value: float) -> None:
    """Sets one number in a YAML file in place; comments, order and everything else stay."""
    text = path.read_text(encoding="utf-8")
    root = yaml.compose(text)
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    body = next((node for name, node in pairs if name.value == section), None)
    shown = f"{value:.3g}"
    if not isinstance(body, yaml.MappingNode):
        if body is not None:  # `training:` with nothing in it
            raise UserError(f"{path}: {section} is empty; write {key}: {shown} under it")
        changed = f"{text.rstrip()}\n\n{section}:\n  {key}: {shown}\n".lstrip()
    elif (old := next((node for name, node in body.value if name.value == key), None)) is not None:
        changed = text[: old.start_mark.index] + shown + text[old.end_mark.index :]
    else:
        first = body.value[0][0].start_mark
        between = ", " if body.flow_style else "\n" + " " * first.column
        changed = f"{text[: first.index]}{key}: {shown}{between}{text[first.index :]}"
    write_whole(path, changed.encode())


def run(options: argparse.Namespace) -> int:
    """The command, on one process or on every rank under torchrun."""
    from ava_fast.engine import close_distributed, init_distributed
    from ava_fast.preflight import run_checks
    from ava_fast.train import initial_weights, prepare_data

    config = load_config(options.config, options.override)
    start, end = options.start_lr, options.end_lr
    if not 0 < start < end < math.inf:
        raise UserError(f"--start-lr {start:g}, --end-lr {end:g}: both above 0, and the first below the second")
    if options.steps < 20:
        raise UserError(f"--steps {options.steps}: too few to see a curve; at least 20")
    failed = [check.detail for check in run_checks(config, int(os.environ.get("WORLD_SIZE", "1"))) if not check.ok]
    if failed:
        raise UserError("; ".join(failed))
    init_distributed(config)
    try:
        shards = prepare_data(config)
        weights = options.load(Path(options.source)) if options.source else initial_weights(config)
        test = range_test(config, shards, start, end, options.steps, weights)
        if _rank() == 0:
            _show(test, options)
    finally:
        close_distributed()
    return 0


def _show(test: RangeTest, options: argparse.Namespace) -> None:
    if len(test.losses) < 10:
        raise UserError(f"the loss diverged after {len(test.losses)} steps; begin lower, with --start-lr")
    suggested, picture = test.suggestions(), Path(options.output)
    picture.parent.mkdir(parents=True, exist_ok=True)
    plot(test, suggested, picture)
    picture.with_suffix(".json").write_text(
        json.dumps({"rates": test.rates, "losses": test.losses, "suggested": suggested}, indent=1)
    )
    ended = "the loss diverged" if test.diverged else "the loss did not diverge"
    print(f"{len(test.rates)} steps from {test.rates[0]:.1e} to {test.rates[-1]:.1e}; {ended}")
    print(f"  steepest fall           {suggested['steepest']:.2e}")
    print(f"  a tenth of the minimum  {suggested['tenth']:.2e}")
    print(f"  minimum                 {suggested['minimum']:.2e}   (already too high for a run)")
    print(f"plot: {picture}")
    if options.write:
        set_in_file(Path(options.config), "training", "learning_rate", suggested[options.write])
        print(f"{options.config}: training.learning_rate is now {suggested[options.write]:.3g}")


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def add_command(commands: Any, load: Any) -> None:
    """`load`: path of a run, checkpoint or imported folder → its weights."""
    command = commands.add_parser("find-lr", help="range test: which learning rate suits")
    command.add_argument("--config", required=True)
    command.add_argument("--override", action="append", default=[], metavar="SECTION.KEY=VALUE")
    command.add_argument("--start-lr", type=float, default=1e-6, help="default 1e-6")
    command.add_argument("--end-lr", type=float, default=1.0, help="default 1")
    command.add_argument("--steps", type=int, default=200, help="default 200")
    command.add_argument("--from", dest="source", help="a run, checkpoint or imported folder: its weights, on a copy")
    command.add_argument("--output", default="find-lr.png", help="the plot; the numbers go beside it as .json")
    command.add_argument(
        "--write", nargs="?", const="steepest", choices=PICKS, help="put a suggestion (steepest) into the config"
    )
    command.set_defaults(command=run, load=load)
