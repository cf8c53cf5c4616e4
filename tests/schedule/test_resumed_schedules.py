"""Every schedule, every warmup, and an emergency cut on top of the overlay: resumed in the midst of it, the run goes on
to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus import write_config, write_corpus
from launch import records

from ava_fast.config import Config, load_config
from ava_fast.data.prepare import prepare
from ava_fast.engine import close_distributed, init_distributed
from ava_fast.schedule.adaptive import AdaptiveRate
from ava_fast.schedule.learning_rate import learning_rate
from ava_fast.trainer import Trainer

STEPS, EVERY, BATCH, BURST = 12, 3, 4, 5
FIXED = [f"training.max_steps={STEPS}", f"checkpoint.save_steps={EVERY}", "checkpoint.save_total_limit=null"]
FIXED += ["evaluation.eval_steps=0", "evaluation.max_sequences=2", "training.gradient_accumulation_steps=1"]
FIXED += [f"training.batch_size={BATCH}", "training.warmup_steps=5", "training.lr_end=0.0001"]
# The checkpoint after step 3 lies in the warmup, that after step 9 in what follows.
CASES = {
    "cosine": ["training.warmup_type=cosine"],
    "cosine_with_restarts": ["training.num_cycles=2", "training.cycle_decay=0.5"],
    "linear": ["training.warmup_type=polynomial"],
    "polynomial": ["training.power=2", "training.warmup_type=exponential"],
    "onecycle": [],
    "sgdr": ["training.restart_steps=3"],
    "wsd": ["training.decay_ratio=0.4"],
    "constant": [],
}
OVERLAY = ["training.adaptive_lr.enabled=true", "training.adaptive_lr.plateau_patience=2", "training.warmup_steps=1"]
OVERLAY += ["training.adaptive_lr.min_improvement=0.5", "stability.recovery_steps=8"]
OVERLAY += ["stability.max_norm=1000", "stability.max_skips=0"]


def settings(file: Path, name: str, *overrides: str) -> Config:
    return load_config(file, [*FIXED, f"training.lr_scheduler_type={name}", *overrides])


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resumed")
    return write_config(root / "c.yaml", write_corpus(root / "text"))


@pytest.fixture(scope="module")
def shards(file: Path) -> Iterator[Path]:
    config = load_config(file)
    init_distributed(config)
    yield Path(prepare(config.data.data_dir, config.data.cache_dir, vocab_size=config.model.vocab_size))
    close_distributed()


def train(config: Config, shards: Path, folder: Path, start: Path | None = None) -> Path:
    """The gradients of the fifth batch burst."""
    folder.mkdir()
    trainer = Trainer(config, folder, shards)

    def burst(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * 1e6 if trainer.loader.position == BURST * BATCH else gradient

    if config.stability.max_norm:
        trainer.engine.model.get_parameter("blocks.1.mlp.down").register_hook(burst)
    if start is not None:
        trainer.load(start)
    trainer.run()
    return folder


def resumed(config: Config, shards: Path, root: Path, steps: list[int]) -> list[dict[str, Any]]:
    """The whole run's records, once those that go on from the checkpoints have turned out to be the same."""
    whole = train(config, shards, root / "whole")
    for step in steps:
        rest = train(config, shards, root / str(step), whole / "checkpoints" / f"step_{step}")
        for kind in ("step", "rate"):
            assert records(rest, kind) == [each for each in records(whole, kind) if each["step"] > step]
    return records(whole, "step")


@pytest.mark.parametrize("name", list(CASES))
def test_in_the_warmup_and_in_the_schedule(name: str, file: Path, shards: Path, tmp_path: Path) -> None:
    config = settings(file, name, *CASES[name])
    rates = [record["learning_rate"] for record in resumed(config, shards, tmp_path, [3, 9])]
    assert rates == [learning_rate(step, config.training) for step in range(STEPS)]
    assert len(set(rates[:5])) == 5  # it was one


def test_in_the_recovery_from_a_cut_which_composes_with_the_overlay(file: Path, shards: Path, tmp_path: Path) -> None:
    config = settings(file, "cosine", *OVERLAY)
    steps = resumed(config, shards, tmp_path, [6])
    assert [step["verdict"] for step in steps].count("CUT") == 1
    cut = [1.0] * (BURST - 1) + [0.5]  # and back in eight good steps
    cut += [min(1.0, 0.5 + 0.5 * good / 8) for good in range(STEPS - BURST)]
    overlay, seen = AdaptiveRate(config.training), []
    for step, (record, factor) in enumerate(zip(steps, cut, strict=True)):
        assert record["learning_rate"] == pytest.approx(overlay.rate(step) * factor, rel=1e-12)
        seen.append(overlay.factor * factor)
        if record["verdict"] == "CUT":
            overlay.disturbed()
        else:
            overlay.observe(step, record["loss"], record["grad_norm"])
    assert min(seen) < 0.5  # both at once
