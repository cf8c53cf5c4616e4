"""Does rerouting help? Trains the demo's model with capacity factor 1.0, dropping what overflows or sending it on.

    OMP_NUM_THREADS=1 python -m bench.rerouting [--seeds 3] [--jobs 2] [--output outputs/rerouting]
    OMP_NUM_THREADS=1 python -m bench.rerouting --name unbalanced --set moe.aux_loss_weight=0

Every seed trains three times over the same batches from the same weights: without capacity, with next-best rerouting,
and dropping. Each model's held-out loss is then measured in the same three ways, 1,024 tokens at a time: without
capacity it tells what was learned, with it what a deployment with a capacity would get. Finished runs in `output` are
not repeated. Writes bench/results/rerouting_cpu_NAME.json and docs/images/rerouting_NAME.png.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ava_fast.checkpoint.shards import read_weights
from ava_fast.config import load_config
from ava_fast.data.loader import heldout_sequences
from ava_fast.data.prepare import prepare
from ava_fast.model.transformer import Transformer
from ava_fast.observe.run import read_metrics
from bench import machine

TRAINING: dict[str, list[str]] = {
    "no capacity": [],
    "next best": ["moe.capacity_factor=1.0", "moe.overflow=next_best"],
    "drop": ["moe.capacity_factor=1.0", "moe.overflow=drop"],
}
HELDOUT: dict[str, list[str]] = {
    "no capacity": [],
    "next best": ["moe.eval_capacity_factor=1.0", "moe.overflow=next_best"],
    "drop": ["moe.eval_capacity_factor=1.0", "moe.overflow=drop"],
}
IMAGES = Path(__file__).parents[1] / "docs" / "images"


def main() -> None:
    parser = argparse.ArgumentParser(description="Held-out loss with and without rerouting at capacity factor 1.0.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=Path("outputs/rerouting"))
    parser.add_argument("--name", default="balanced")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every run; repeatable")
    options = parser.parse_args()
    runs = [(variant, seed) for seed in range(options.seeds) for variant in TRAINING]
    with ThreadPoolExecutor(options.jobs) as pool:
        records = list(
            pool.map(lambda run: _train(*run, options.steps, options.output / options.name, options.set), runs)
        )
    by_variant: dict[str, list[dict[str, Any]]] = {variant: [] for variant in TRAINING}
    for (variant, _), record in zip(runs, records, strict=True):
        by_variant[variant].append(record)
    rows = {}
    print("held-out loss, nats (mean over seeds), measured   " + "   ".join(f"{how:>11}" for how in HELDOUT))
    for variant, seeds in by_variant.items():
        means = {how: statistics.mean(seed["heldout_loss"][how] for seed in seeds) for how in HELDOUT}
        rows[variant] = {"mean_heldout_loss": means, "seeds": seeds}
        print(f"  trained {variant:40}" + "   ".join(f"{mean:11.4f}" for mean in means.values()))
    settings = {"steps": options.steps, "config": "configs/demo.yaml", "set": options.set, "capacity_factor": 1.0}
    print(machine.write(f"rerouting_cpu_{options.name}", {**settings, "trained": rows}))
    _plot(by_variant, IMAGES / f"rerouting_{options.name}.png")


def _train(variant: str, seed: int, steps: int, output: Path, common: list[str]) -> dict[str, Any]:
    folder = output / f"{variant.replace(' ', '_')}_{seed}"
    if not list(folder.glob(f"**/step_{steps}/manifest.json")):
        shutil.rmtree(folder, ignore_errors=True)
        settings = [f"training.seed={seed}", f"training.max_steps={steps}", f"logging.output_dir={folder}"]
        settings += [f"evaluation.eval_steps={steps // 5}", f"checkpoint.save_steps={steps}"]
        overrides = [part for setting in settings + common + TRAINING[variant] for part in ("--override", setting)]
        command = [sys.executable, "-m", "ava_fast.train", "--config", "configs/demo.yaml", *overrides]
        finished = subprocess.run(
            command,
            env={"OMP_NUM_THREADS": "1", **os.environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if finished.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{finished.stdout}")
    run = next(folder.glob("**/metrics.jsonl")).parent
    routing = [m["routing"] for m in read_metrics(run / "metrics.jsonl") if m["kind"] == "step"]
    record = {
        "seed": seed,
        "heldout_loss": {how: _heldout_loss(run, steps, overrides) for how, overrides in HELDOUT.items()},
        "dropped": _mean(routing, "dropped"),
        "rerouted": _mean(routing, "rerouted"),
    }
    print(f"{variant:12} seed {seed}: {100 * record['dropped']:.1f} % dropped, {100 * record['rerouted']:.1f} % "
          f"rerouted, held out {record['heldout_loss']}", flush=True)  # fmt: skip
    return record


@torch.no_grad()
def _heldout_loss(run: Path, steps: int, overrides: list[str]) -> float:
    config = load_config(run / "config.yaml", overrides)
    model = Transformer(config)
    model.load_state_dict(read_weights(run / "checkpoints" / f"step_{steps}" / "engine"))
    model.eval()
    data = config.data
    shards = prepare(
        data.data_dir, data.cache_dir, vocab_size=config.model.vocab_size, validation_fraction=data.validation_fraction
    )
    limit = config.evaluation.max_sequences
    sequences_NS1 = torch.from_numpy(heldout_sequences(shards, max_length=data.max_length, limit=limit))
    batches = sequences_NS1.split(config.training.batch_size)
    return statistics.mean(float(model(batch[:, :-1], batch[:, 1:]).loss) for batch in batches)


def _mean(routing: list[dict[str, list[float]]], name: str) -> float:
    """Over steps and blocks."""
    return statistics.mean(statistics.mean(step[name]) for step in routing)


def _plot(by_variant: dict[str, list[dict[str, Any]]], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained", width_ratios=(1, 2))
    colours = dict(zip(TRAINING, ("tab:grey", "tab:blue", "tab:red"), strict=True))
    for variant, seeds in by_variant.items():
        axes[0].bar(variant, 100 * statistics.mean(seed["dropped"] for seed in seeds), color=colours[variant])
        shift = 0.12 * (list(TRAINING).index(variant) - 1)
        for place, how in enumerate(HELDOUT):
            losses = [seed["heldout_loss"][how] for seed in seeds]
            axes[1].plot([place + shift] * len(losses), losses, "o", color=colours[variant], alpha=0.6, markersize=5)
            mean = statistics.mean(losses)
            label = f"trained: {variant}" if place == 0 else None
            axes[1].plot(
                [place + shift - 0.05, place + shift + 0.05], [mean, mean], color=colours[variant], label=label
            )
    axes[0].set_ylabel("requests dropped in training (%)")
    axes[1].set_xticks(range(len(HELDOUT)), [f"measured: {how}" for how in HELDOUT])
    axes[1].set_ylabel("held-out loss (nats per token)")
    axes[1].grid(axis="y", alpha=0.3)
    axes[1].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
