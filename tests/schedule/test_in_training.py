"""The overlay and the noise scale in real runs on two ranks: what they say, and that a resumed run says the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from corpus import write_config, write_corpus
from distributed import run_on_ranks

from ava_fast.config import Config, load_config
from ava_fast.data.loader import TokenLoader
from ava_fast.data.prepare import prepare
from ava_fast.engine import close_distributed, init_distributed
from ava_fast.model.transformer import Transformer
from ava_fast.observe.report import write_report
from ava_fast.observe.run import read_metrics
from ava_fast.schedule.adaptive import AdaptiveRate
from ava_fast.schedule.learning_rate import learning_rate
from ava_fast.schedule.noise_scale import NoiseScale
from ava_fast.trainer import Trainer, seed_generators

STEPS, EVERY, STAGES = 12, 3, (0, 2, 3)
OVERRIDES = [
    f"training.max_steps={STEPS}",
    "training.warmup_steps=1",
    "training.learning_rate=0.001",
    "training.lr_scheduler_type=cosine_with_restarts",
    "training.num_cycles=2",
    "training.adaptive_lr.enabled=true",
    "training.adaptive_lr.plateau_patience=2",
    "training.adaptive_lr.min_improvement=0.5",
    "training.adaptive_lr.max_lr=0.0012",
    f"training.noise_scale_steps={EVERY}",
    f"checkpoint.save_steps={STEPS // 2}",
    "evaluation.eval_steps=0",
    "moe.jitter=0",
    "moe.aux_loss_weight=0",  # else a part's gradient depends on what it is routed with
    "moe.z_loss_weight=0",
]


def settings(file: str, stage: int) -> Config:
    return load_config(file, [*OVERRIDES, f"deepspeed.zero_stage={stage}"])


def exercise(file: str, shards: str, root: Path) -> dict[int, tuple[list[Any], list[Any]]]:
    """Runs on every rank of two → by stage, the records of a whole run and of one from its middle on."""
    init_distributed(settings(file, 0))
    seen = {}
    for stage in STAGES:
        config, runs = settings(file, stage), []
        for name in ("whole", "rest"):
            folder = root / f"{name}{stage}"
            folder.mkdir(exist_ok=True)
            trainer = Trainer(config, folder, Path(shards))
            if name == "rest":
                trainer.load(root / f"whole{stage}" / "checkpoints" / f"step_{STEPS // 2}")
            trainer.run()
            dist.barrier()
            runs.append(read_metrics(folder / "metrics.jsonl"))
        if stage == 0 and dist.get_rank() == 0:
            write_report(root / "whole0", config, {"status": "finished", "parameters": trainer.parameters})
        seen[stage] = runs[0], runs[1]
    close_distributed()
    return seen


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("schedule")


@pytest.fixture(scope="module")
def file(root: Path) -> str:
    return str(write_config(root / "c.yaml", write_corpus(root / "text")))


@pytest.fixture(scope="module")
def shards(file: str) -> str:
    data = load_config(file).data
    return str(prepare(data.data_dir, data.cache_dir, vocab_size=load_config(file).model.vocab_size))


@pytest.fixture(scope="module")
def seen(file: str, shards: str, root: Path) -> dict[int, tuple[list[Any], list[Any]]]:
    return run_on_ranks(exercise, 2, file, shards, root, timeout=300.0)[0]


def of(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    clock = {"seconds", "tokens_per_second"}
    return [{key: value for key, value in r.items() if key not in clock} for r in records if r["kind"] == kind]


@pytest.mark.parametrize("stage", STAGES)
def test_rates_are_the_overlays_and_every_change_is_told(
    stage: int, seen: dict[int, tuple[list[Any], list[Any]]], file: str
) -> None:
    training, records = settings(file, stage).training, seen[stage][0]
    adaptive, changes = AdaptiveRate(training), []
    for step, record in enumerate(of(records, "step")):
        assert record["learning_rate"] == adaptive.rate(step)
        assert record["scheduled_rate"] == learning_rate(step, training)
        change = adaptive.observe(step, record["loss"], record["grad_norm"])
        if change is not None:
            changes.append({"kind": "rate", "step": step + 1, "factor": change.factor, "reason": change.reason})
    assert of(records, "rate") == changes
    assert len(changes) >= 2
    assert any(r["learning_rate"] != r["scheduled_rate"] for r in of(records, "step"))


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_in_the_middle_it_goes_on_to_the_bit(stage: int, seen: dict[int, tuple[list[Any], list[Any]]]) -> None:
    whole, rest = seen[stage]
    for kind in ("step", "rate"):
        assert [r for r in of(whole, kind) if r["step"] > STEPS // 2] == of(rest, kind)


@pytest.mark.parametrize("stage", STAGES)
def test_noise_scale_is_that_of_the_parts_gradients(
    stage: int, seen: dict[int, tuple[list[Any], list[Any]]], file: str, shards: str
) -> None:
    config = settings(file, stage)
    training = config.training
    seed_generators(training.seed)
    model = Transformer(config)
    parts = []
    for rank in range(2):
        loader = TokenLoader(
            Path(shards),
            max_length=config.data.max_length,
            batch_size=training.batch_size,
            seed=training.seed,
            rank=rank,
            world_size=2,
        )
        for _ in range(training.gradient_accumulation_steps):
            model.zero_grad()
            model(*loader.next_batch()).objective.backward()
            parts.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    expected = NoiseScale(2, 8)
    expected.update(
        sum(part.square().sum().item() for part in parts) / len(parts),
        torch.stack(parts).mean(0).square().sum().item(),
    )
    records = of(seen[stage][0], "step")
    assert records[0]["noise_scale"] == pytest.approx(expected.sequences, rel=1e-3)
    scales = [record["noise_scale"] for record in records]
    measured = [step for step in range(1, STEPS) if scales[step] != scales[step - 1]]
    assert measured == list(range(EVERY, STEPS, EVERY))


def test_the_report_shows_them(seen: dict[int, tuple[list[Any], list[Any]]], root: Path) -> None:
    text = (root / "whole0" / "report.md").read_text()
    noise = of(seen[0][0], "step")[-1]["noise_scale"]
    assert f"| gradient noise scale | {noise:,.0f} sequences" in text
    assert (root / "whole0" / "loss.png").stat().st_size > 10_000
