"""What schedules, curricula and modes add to a step of the demo.

    OMP_NUM_THREADS=1 python -m bench.overhead [--rounds 40] [--pairs 150]

Three times. Alone: each part's share of a step's code, many times over, beside the median step. Together: trainers of
configs/demo.yaml that differ in one setting take steps in turn, on one process and one thread, with the run's folder
and its records on the disk; each step over that of the standard one in the same round. Switched: one trainer whose
steps have all of it on and off in turn, so that weights, optimizer and their places in memory are the same; each over
the step next to it, and steps that are off over each other, which shows what the machine does by itself. The first is
exact and leaves out what a part does to caches; the others have it all, and the noise of the machine. All in processor
time, as the machine may have other work.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ava_fast.config import Config, load_config
from ava_fast.data.loader import TokenLoader
from ava_fast.engine import close_distributed, init_distributed
from ava_fast.observe.run import start_logging, stop_logging
from ava_fast.schedule.adaptive import AdaptiveRate
from ava_fast.schedule.learning_rate import learning_rate
from ava_fast.schedule.length import in_pieces, sequence_length
from ava_fast.schedule.micro_batches import MicroBatches
from ava_fast.schedule.noise_scale import NoiseScale
from ava_fast.schedule.scores import easy_first
from ava_fast.stability.utilisation import Utilisation
from ava_fast.train import prepare_data
from ava_fast.trainer import Trainer
from bench import machine

OVERLAY = ["training.adaptive_lr.enabled=true"]
LENGTHS = ["curriculum.length.shape=stages", "curriculum.length.stages=[128]"]  # the cut is paid for, nothing is cut
BATCHES = ["curriculum.batch.shape=cyclical", "curriculum.batch.max_micro_batches=1", "curriculum.batch.period=100"]
DIFFICULTY = ["curriculum.difficulty.measure=rarity"]
EVERYTHING = [*OVERLAY, *LENGTHS, *BATCHES, *DIFFICULTY]  # beside the thresholds of memory, which are on by default
# What of a trainer has to do with them, and what not: these take turns, the rest stays.
SWITCHED = ("config", "adaptive", "rate", "batch_sizes", "loader", "_utilisation")
# `standard` is there twice: the second says how far apart two equal runs are on this machine.
VARIANTS: dict[str, list[str]] = {
    "standard": [],
    "standard again": [],
    "fast": ["training.mode=fast"],
    "debug": ["training.mode=debug"],
    "debug, detect_anomaly": ["training.mode=debug", "training.detect_anomaly=true"],
    "overlay": OVERLAY,
    "lengths": LENGTHS,
    "batches": BATCHES,
    "difficulty": DIFFICULTY,
    "overlay and curricula": EVERYTHING,
}
# The noise scale needs gradients of two sizes: a step of two micro-batches, measured at every tenth step and at each.
MEASURED = {
    "two micro-batches": [],
    "noise scale, every step": ["training.noise_scale_steps=1"],
    "noise scale, every 10th": ["training.noise_scale_steps=10"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--pairs", type=int, default=150)
    options = parser.parse_args()
    rounds = options.rounds
    torch.set_num_threads(1)
    init_distributed(_demo([]))
    with tempfile.TemporaryDirectory() as folder:
        start_logging(None)
        shards = prepare_data(_demo([]))
        results = _in_turn(VARIANTS, shards, Path(folder), rounds)
        two = {name: [*own, "training.gradient_accumulation_steps=2"] for name, own in MEASURED.items()}
        results |= _in_turn(two, shards, Path(folder), rounds // 2)
        step = results["standard"]["step_ms"]
        parts = {name: {"us": us, "share_of_step": us / 1e3 / step} for name, us in _parts(shards).items()}
        whole = _switched(shards, Path(folder), options.pairs)
        stop_logging()
    close_distributed()
    for name, each in parts.items():
        print(f"{name}: {each['us']:.1f} µs, {each['share_of_step']:.4%} of a step of {step:.0f} ms")
    found = {"alone": parts, "together": results, "switched": whole}
    path = machine.write("overhead_cpu", {"config": "configs/demo.yaml", "rounds": rounds, **found})
    print(path)


def _demo(overrides: list[str]) -> Config:
    fixed = ["evaluation.eval_steps=0", "checkpoint.save_steps=0", "evaluation.max_sequences=8"]
    return load_config("configs/demo.yaml", [*fixed, *overrides])


def _in_turn(variants: dict[str, list[str]], shards: Any, root: Path, rounds: int) -> dict[str, Any]:
    """Steps of all in turn, in an order that turns with the rounds."""
    names, seconds = list(variants), {name: list[float]() for name in variants}
    with contextlib.ExitStack() as stack:
        trainers = {}
        for name, overrides in variants.items():
            folder = root / name
            folder.mkdir()
            trainers[name] = Trainer(_demo(overrides), folder, shards)
            stack.enter_context(trainers[name]._progress.open(0, 0))
        for at in range(rounds + 3):
            for name in names[at % len(names) :] + names[: at % len(names)]:
                with trainers[name]._look.at(
                    trainers[name].engine.model
                ):  # of debug: its hooks come and go outside of the time taken
                    started_at = time.process_time()
                    trainers[name].advance()
                    elapsed = time.process_time() - started_at
                if at >= 3:
                    seconds[name].append(elapsed)
    base, results = seconds[names[0]], {}
    for name, own in seconds.items():
        ratios = sorted(a / b for a, b in zip(own, base, strict=True))
        first, median, third = statistics.quantiles(ratios, n=4) if name != names[0] else (1.0, 1.0, 1.0)
        results[name] = {
            "step_ms": 1e3 * statistics.median(own),
            "over": names[0],
            "ratio": median,
            "ratio_q1": first,
            "ratio_q3": third,
        }
        print(f"{name}: {1e3 * statistics.median(own):.1f} ms, × {median:.3f} ({first:.3f}–{third:.3f})", flush=True)
    return results


def _switched(shards: Any, root: Path, pairs: int) -> dict[str, Any]:
    """Ratios of steps of one trainer with everything on to those with everything off, and of two that are off."""
    (root / "on").mkdir()
    (root / "off").mkdir()
    trainer = Trainer(_demo(EVERYTHING), root / "on", shards)
    ways = {"on": {name: vars(trainer)[name] for name in SWITCHED}}
    plain = Trainer(_demo(["memory.thresholds=null"]), root / "off", shards)
    ways["off"] = {name: vars(plain)[name] for name in SWITCHED}
    ways["off again"] = ways["off"]
    names, seconds = list(ways), {name: list[float]() for name in ways}
    with trainer._progress.open(0, 0):
        for at in machine.turns(pairs + 3, "switched"):
            for name in names[at % 3 :] + names[: at % 3]:
                vars(trainer).update(ways[name])
                started_at = time.process_time()
                trainer.advance()
                elapsed = time.process_time() - started_at
                if at >= 3:
                    seconds[name].append(elapsed)
    result: dict[str, Any] = {"pairs": pairs, "off": machine.spread(seconds["off"])}
    for name in ("on", "off again"):
        ratios = result[f"{name} over off"] = machine.spread_of_ratios(seconds[name], seconds["off"])
        print(f"{name} over off: {ratios['median']:.4f} ({ratios['q1']:.4f}–{ratios['q3']:.4f}), {pairs} pairs")
    return result


def _parts(shards: Any) -> dict[str, float]:
    """Microseconds a step, each alone."""
    full = _demo([*OVERLAY, *DIFFICULTY, "curriculum.length.shape=linear", "curriculum.batch.shape=cyclical"])
    training, adaptive, sizes = full.training, AdaptiveRate(full.training), MicroBatches(full)
    generator, scale = np.random.default_rng(0), NoiseScale(1, 2)
    losses = generator.normal(3, 0.1, 20_000).tolist()
    batch = (torch.zeros(8, 128, dtype=torch.int64), torch.zeros(8, 128, dtype=torch.int64))
    shared: dict[str, Any] = {"max_length": 128, "batch_size": 8, "seed": 0}
    loaders = [TokenLoader(shards, **shared), TokenLoader(shards, **shared, orders=easy_first(full, shards))]
    plain, ordered = (min(_microseconds(lambda _, own=own: own.next_batch()) for _ in range(5)) for own in loaders)
    memory = Utilisation(0, 1, torch.device("cpu"), full.memory.thresholds)
    return {
        "schedule": _microseconds(lambda step: learning_rate(step % 1000, training)),
        "overlay": _microseconds(lambda step: (adaptive.rate(step % 1000), adaptive.observe(999, losses[step], 1.0))),
        "noise scale, between measurements": _microseconds(lambda step: scale.sequences),
        "lengths": _microseconds(lambda step: in_pieces(batch, sequence_length(step % 500, full))),
        "batches": _microseconds(lambda step: (sizes.at(step), sizes.rate_factor(2))),
        "thresholds of memory": _microseconds(lambda _: (memory.look(), memory.heard(memory.share()))),
        "difficulty, in the thread that reads ahead": max(0.0, ordered - plain),
        "a batch without it": plain,
    }


def _microseconds(action: Any, times: int = 4000) -> float:
    started_at = time.process_time()
    for step in range(times):
        action(step)
    return 1e6 * (time.process_time() - started_at) / times


if __name__ == "__main__":
    main()
