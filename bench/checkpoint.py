"""How long training waits for a checkpoint, beside others' ways to save the same state.

    OMP_NUM_THREADS=1 python -m bench.checkpoint [--repeats 5]

One rank trains a mixture of experts of 38 M parameters (456 MB of weights and moments). In turn, after a step each:

    ours, blocking          hashed, synced to the disk, committed
    ours, while training    what `Trainer.save` takes, and what the next step then waits for the copy
    torch.save              of the same tensors to one file; neither hashed nor synced
    DeepSpeed               its save_checkpoint; neither hashed nor synced
    torch, asynchronous     torch.distributed.checkpoint.async_save: until it returns
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from tqdm import tqdm

from ava_fast.config import load_config
from ava_fast.data.prepare import prepare
from ava_fast.engine import close_distributed, init_distributed
from ava_fast.trainer import Trainer
from bench import machine

SETTINGS = {
    "model.vocab_size": 2048,
    "model.hidden_size": 512,
    "model.num_layers": 4,
    "model.num_heads": 8,
    "moe.num_experts": 8,
    "moe.intermediate_size": 640,
    "data.max_length": 128,
    "data.data_dir": Path(__file__).resolve().parent.parent / "ava_fast",
    "training.batch_size": 4,
    "checkpoint.save_steps": 0,
    "checkpoint.save_total_limit": 1,
    "deepspeed.zero_stage": 1,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ava_bench_") as name:
        folder = Path(name)
        overrides = [f"{key}={value}" for key, value in SETTINGS.items()]
        config = load_config(None, [*overrides, f"data.cache_dir={folder / 'data'}"])
        shards = prepare(config.data.data_dir, config.data.cache_dir, vocab_size=config.model.vocab_size)
        init_distributed(config)
        result = measure(Trainer(config, folder / "run", Path(shards)), folder, options.repeats)
        close_distributed()
    print(machine.write("checkpoint_cpu", result))


def measure(trainer: Trainer, folder: Path, repeats: int) -> dict[str, Any]:
    ways: dict[str, Callable[[], float]] = {
        "ours, blocking": lambda: _ours(trainer, wait=True),
        "ours, while training": lambda: _ours(trainer, wait=False),
        "torch.save": lambda: _timed(lambda: torch.save(_state(trainer), folder / "torch.pt")),
        "DeepSpeed, blocking": lambda: _timed(
            lambda: trainer.engine._engine.save_checkpoint(str(folder / "deepspeed"), tag="x", save_latest=False)
        ),
        "torch, asynchronous": lambda: _asynchronous(trainer, folder / "dcp"),
    }
    trainer._step()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    steps: list[float] = []
    for _ in tqdm(range(repeats + 1), unit="round", disable=None, leave=False):  # the first is not counted
        for name, way in ways.items():
            seconds[name].append(way())
            for leftover in (folder / "deepspeed", folder / "dcp"):
                shutil.rmtree(leftover, ignore_errors=True)
            steps.append(_timed(trainer._step))
    counted = {name: values[1:] for name, values in seconds.items()}
    stall = counted["ours, while training"]
    medians = {name: statistics.median(values) for name, values in counted.items()}
    for name, median in medians.items():
        share = statistics.median(stall) / median
        print(f"{name:<24} {1e3 * median:9.1f} ms   our stall is {100 * share:6.2f} % of it")
    return {
        "repeats": repeats,
        "parameters": trainer.parameters,
        "state_bytes": sum(tensor.nbytes for tensor in _state(trainer).values()),
        "contenders": {name: machine.spread(values) for name, values in counted.items()},
        "ratios": {name: machine.spread_of_ratios(values, stall) for name, values in counted.items()},
        "stall_as_share_of_blocking": machine.spread_of_ratios(stall, counted["ours, blocking"]),
        "step_without_a_save": machine.spread(steps[-repeats:]),
    }


def _state(trainer: Trainer) -> dict[str, torch.Tensor]:
    return trainer.engine.state().tensors


def _timed(action: Callable[[], Any]) -> float:
    started_at = time.perf_counter()
    action()
    return time.perf_counter() - started_at


def _ours(trainer: Trainer, *, wait: bool) -> float:
    trainer._note_saves = lambda: None  # type: ignore[method-assign]  # by which a step would take the news away
    trainer.save(wait=wait)
    if not wait:
        trainer._step()
        trainer.keeper.settle()
    return float(trainer.keeper.news.pop()["stall_seconds"])


def _asynchronous(trainer: Trainer, folder: Path) -> float:
    started_at = time.perf_counter()
    future = dcp.async_save(_state(trainer), checkpoint_id=str(folder))
    elapsed = time.perf_counter() - started_at
    future.result()  # type: ignore[union-attr]
    return elapsed


if __name__ == "__main__":
    main()
