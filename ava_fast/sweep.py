"""Trains one configuration with every combination of some settings, and compares.

    ava-fast sweep --config configs/mine.yaml --set training.learning_rate=1e-3,3e-3 --set training.batch_size=8,16

Each run is `ava_fast.train` in processes of its own, under `<output>/<its values>/`. Called again, the command passes
over what has finished and resumes what was interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from ava_fast.config import load_config
from ava_fast.errors import Interrupted, UserError
from ava_fast.observe.console import duration
from ava_fast.observe.report import smooth
from ava_fast.observe.run import read_metrics


@dataclass(frozen=True)
class Trial:
    """One combination, and where it runs."""

    values: dict[str, str]
    folder: Path

    @property
    def overrides(self) -> list[str]:
        return [f"{key}={value}" for key, value in self.values.items()]

    @property
    def name(self) -> str:
        """`learning_rate=1e-3, batch_size=8`"""
        return ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in self.values.items())

    def run_folder(self) -> Path | None:
        """The newest that it has made."""
        return max(self.folder.glob("runs/run_*"), default=None)

    def result(self) -> dict[str, Any] | None:
        """Its summary, once it has finished."""
        run = self.run_folder()
        try:
            summary: dict[str, Any] = json.loads((run / "summary.json").read_text()) if run else {}
        except (OSError, ValueError):
            return None
        return summary if summary.get("status") == "finished" else None


def trials(config: str, sets: list[str], overrides: list[str], output: Path) -> list[Trial]:
    """Every combination, the last `--set` changing fastest. Raises UserError if one of them is not a configuration."""
    choices: dict[str, list[str]] = {}
    for text in sets:
        key, equals, values = text.partition("=")
        parts = _split(values)
        if not equals or not all(parts):
            raise UserError(f"--set {text}: is not section.key=value,value,…")
        if key in choices:
            raise UserError(f"--set {text}: {key} is set twice; give all its values at once")
        choices[key] = list(dict.fromkeys(parts))
    found = []
    for values_of_one in itertools.product(*choices.values()):
        chosen = dict(zip(choices, values_of_one, strict=True))
        trial = Trial(chosen, output / re.sub(r"[^A-Za-z0-9.=_-]+", "_", ",".join(map("=".join, chosen.items()))))
        load_config(config, [*overrides, *trial.overrides])
        found.append(trial)
    if len({trial.folder for trial in found}) < len(found):
        raise UserError("--set: two values differ only in characters that a folder's name cannot hold")
    return found


def _split(values: str) -> list[str]:
    """At commas outside of brackets and quotes: `[1,2],[3]` are two."""
    parts, depth, quote = [""], 0, ""
    for character in values:
        if character == quote:
            quote = ""
        elif not quote and character in "'\"":
            quote = character
        elif not quote:
            depth += (character in "[{") - (character in "]}")
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def run(options: argparse.Namespace) -> int:
    output = Path(options.output or f"outputs/sweeps/{Path(options.config).stem}")
    every = trials(options.config, options.sets, options.override, output)
    done = [trial for trial in every if trial.result()]
    left = [trial for trial in every if trial not in done]
    print(f"{len(every)} runs under {output}" + (f", {len(done)} of them finished before" if done else ""))
    output.mkdir(parents=True, exist_ok=True)
    codes: dict[Path, int] = {}
    with ThreadPoolExecutor(options.jobs) as pool, _Children() as children:
        started_at = {pool.submit(_train, trial, options, children): trial for trial in left}
        with (
            _interruptible(),
            tqdm(total=len(left), unit="run", dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar,
        ):
            for future in as_completed(started_at):
                trial, (code, seconds) = started_at[future], future.result()
                codes[trial.folder] = code
                tqdm.write(f"{trial.name} | {_outcome(trial, code)} | {duration(seconds)}", file=sys.stdout)
                bar.update()
    lines = _table(every, codes)
    (output / "sweep.md").write_text("\n".join(["# Sweep", "", "![](sweep.png)", "", *lines, ""]), encoding="utf-8")
    print("\n".join(lines))
    if any(trial.run_folder() for trial in every):
        _plot(every, output / "sweep.png")
        print(f"table and plot: {output / 'sweep.md'}, {output / 'sweep.png'}")
    failed = [trial for trial in every if not trial.result()]
    if failed:
        why = failed[0].folder / "output.log"
        raise UserError(f"{len(failed)} of {len(every)} runs did not finish; {why} says why")
    return 0


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("interrupted; the same command goes on") from None


class _Children:
    """The processes that run; none outlives the command."""

    def __init__(self) -> None:
        self._running: list[subprocess.Popen[bytes]] = []
        self._ended = False

    def __enter__(self) -> _Children:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        for process in list(self._running):
            process.terminate()  # a run saves its step and leaves, and this command can go on with it

    def run(self, command: list[str], log: Path) -> int:
        with log.open("ab") as file:
            if self._ended:
                return -1
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
            self._running.append(process)
            code = process.wait()
        self._running.remove(process)
        return code


def _train(trial: Trial, options: argparse.Namespace, children: _Children) -> tuple[int, float]:
    trial.folder.mkdir(parents=True, exist_ok=True)
    (trial.folder / "overrides.yaml").write_text(yaml.safe_dump(trial.values))
    began = time.monotonic()
    launcher = [sys.executable, "-m"]
    if options.nproc_per_node > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc_per_node={options.nproc_per_node}", "-m"]
    command = [*launcher, "ava_fast.train", "--config", options.config, "--resume", "latest"]
    settings = [*options.override, *trial.overrides, f"logging.output_dir={json.dumps(str(trial.folder))}"]
    command += [part for setting in settings for part in ("--override", setting)]
    return children.run(command, trial.folder / "output.log"), time.monotonic() - began


def _outcome(trial: Trial, code: int | None) -> str:
    result = trial.result()
    if result:
        return f"held-out loss {result['heldout_loss']:.4f}"
    return "not finished" if code is None else f"failed, exit code {code}"


def _table(every: list[Trial], codes: dict[Path, int]) -> list[str]:
    """Best first."""
    keys = list(every[0].values)
    lines = ["| " + " | ".join([*keys, "held-out loss", "tokens/s"]) + " |", "|---" * (len(keys) + 2) + "|"]
    for trial in sorted(every, key=lambda each: (each.result() or {}).get("heldout_loss", float("inf"))):
        result = trial.result()
        rate = f"{result['tokens_per_second']:,.0f}" if result else ""
        shown = f"{result['heldout_loss']:.4f}" if result else _outcome(trial, codes.get(trial.folder))
        lines.append("| " + " | ".join([*trial.values.values(), shown, rate]) + " |")
    return lines


def _plot(every: list[Trial], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curves, ends) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    colours = pyplot.get_cmap("viridis")
    for number, trial in enumerate(every):
        colour = colours(0.95 * number / max(1, len(every) - 1))
        run_folder, result = trial.run_folder(), trial.result()
        metrics = run_folder / "metrics.jsonl" if run_folder else None
        steps = [r for r in read_metrics(metrics) if r["kind"] == "step"] if metrics and metrics.exists() else []
        if steps:
            losses = smooth([step["loss"] for step in steps])
            curves.plot([step["tokens"] for step in steps], losses, color=colour, linewidth=1.2, label=trial.name)
        if result:
            ends.plot(result["heldout_loss"], number, "o", color=colour)
    curves.set_xlabel("tokens")
    curves.set_ylabel("training loss, smoothed (nats per token)")
    curves.legend(fontsize="small")
    ends.set_yticks(range(len(every)), [trial.name for trial in every], fontsize="small")
    ends.set_ylim(len(every) - 0.5, -0.5)
    ends.set_xlabel("held-out loss (nats per token)")
    for axis in (curves, ends):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def add_command(commands: Any) -> None:
    command = commands.add_parser("sweep", help="train every combination of some settings, and compare")
    command.add_argument("--config", required=True)
    command.add_argument(
        "--set", dest="sets", action="append", required=True, metavar="SECTION.KEY=A,B,…", help="repeatable"
    )
    command.add_argument("--override", action="append", default=[], metavar="SECTION.KEY=VALUE", help="of every run")
    command.add_argument("--output", help="default outputs/sweeps/<the config's name>")
    command.add_argument("--jobs", type=_positive, default=1, metavar="N", help="runs at a time, default 1")
    command.add_argument("--nproc_per_node", type=_positive, default=1, metavar="N", help="ranks of a run, default 1")
    command.set_defaults(command=run)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)
