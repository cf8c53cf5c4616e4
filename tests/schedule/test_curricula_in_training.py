"""Curricula and modes in real runs: what each step sees, that one or two ranks see the same, and that a run resumed in
the middle of any of them goes on to the bit."""

from __future__ import annotations

import json
import logging
import math
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
from ava_fast.schedule.learning_rate import learning_rate
from ava_fast.schedule.length import in_pieces, sequence_length
from ava_fast.schedule.micro_batches import MicroBatches
from ava_fast.schedule.scores import easy_first
from ava_fast.trainer import Trainer, seed_generators

STEPS, HALF, BATCH, LENGTH, LOG = 12, 6, 4, 32, 5
FIXED = [
    f"training.max_steps={STEPS}",
    "training.warmup_steps=2",
    "training.learning_rate=0.003",
    f"checkpoint.save_steps={HALF}",
    "evaluation.eval_steps=0",
    "moe.jitter=0",
    "moe.aux_loss_weight=0",  # else a part's gradient depends on what it is routed with
    "moe.z_loss_weight=0",
]
STAGES = "[{step: 0, micro_batches: 3}, {step: 5, micro_batches: 1}, {step: 8, micro_batches: 2}]"
# Every kind of each curriculum, in three runs; a checkpoint lies in the midst of every one.
CURRICULA = {
    "stages, cycles, threshold": [
        "curriculum.length.shape=stages",
        "curriculum.length.stages=[8, 16]",
        "curriculum.length.ratio=0.9",
        "curriculum.batch.shape=cyclical",
        "curriculum.batch.max_micro_batches=3",
        "curriculum.batch.period=5",
        "curriculum.batch.learning_rate=sqrt",
        "curriculum.difficulty.measure=rarity",
        "curriculum.difficulty.ratio=0.9",
        "training.lr_scheduler_type=onecycle",
    ],
    "linear, noise scale, order": [
        "curriculum.length.shape=linear",
        "curriculum.length.start=4",
        "curriculum.length.ratio=1.0",
        "curriculum.batch.shape=noise_scale",
        "curriculum.batch.max_micro_batches=6",
        "curriculum.difficulty.measure=length",
        "curriculum.difficulty.mode=order",
        "data.document_attention=true",
        "training.noise_scale_steps=2",
        "training.lr_scheduler_type=wsd",
        "training.decay_ratio=0.8",
        "deepspeed.zero_stage=2",
    ],
    "exponential, stages, root": [
        "curriculum.length.shape=exponential",
        "curriculum.length.start=4",
        "curriculum.length.ratio=1.0",
        "curriculum.batch.shape=stages",
        f"curriculum.batch.stages={STAGES}",
        "curriculum.difficulty.measure=rarity",
        "curriculum.difficulty.pacing=root",
        "training.lr_scheduler_type=sgdr",
        "training.restart_steps=4",
        "training.adaptive_lr.enabled=true",
        "training.adaptive_lr.plateau_patience=4",
        "deepspeed.zero_stage=3",
    ],
}
CYCLES, NOISE, STAGED = CURRICULA
CONSTANT = ["training.lr_scheduler_type=constant", "training.warmup_type=polynomial"]
MODES = {"standard": ["training.mode=standard", *CONSTANT], "fast": ["training.mode=fast", *CONSTANT]}
# Losses of the first, a middle and the last step.
GOLDEN = {
    "stages, cycles, threshold": [5.7132356, 5.2540946, 5.1249359],
    "linear, noise scale, order": [5.7238257, 5.2278807, 4.9858007],
    "exponential, stages, root": [5.7084649, 5.2551651, 4.8339294],
    "standard": [5.7262663, 5.1839662, 4.6156956],
}
DEBUG = ["training.mode=debug", "training.detect_anomaly=true", "deepspeed.zero_stage=0"]


def settings(file: str, name: str) -> Config:
    fixed = [*FIXED, f"logging.log_steps={LOG}"]
    return load_config(file, [*fixed, *{**CURRICULA, **MODES, "debug": DEBUG}[name]])


def once(file: str, shards: str, root: Path, name: str) -> list[dict[str, Any]]:
    """Runs on every rank → the records of one run, whose rows are computed three at a time at most, then cut."""
    settled = settings(file, name)
    config = settled.model_copy(update={"memory": settled.memory.model_copy(update={"micro_batch": 3})})
    init_distributed(config)
    Trainer(config, root, Path(shards)).run()
    close_distributed()
    return read_metrics(root / "metrics.jsonl")


def exercise(file: str, shards: str, root: Path, names: list[str]) -> dict[str, Any]:
    """Runs on every rank → by name, the records of a whole run and of one from its middle on."""
    init_distributed(settings(file, "standard"))
    seen: dict[str, Any] = {}
    for name in names:
        config, runs = settings(file, name), []
        for part in ("whole", "rest"):
            folder = root / f"{part} {name}"
            folder.mkdir(exist_ok=True)
            trainer = Trainer(config, folder, Path(shards))
            if part == "rest":
                trainer.load(root / f"whole {name}" / "checkpoints" / f"step_{HALF}")
            trainer.run()
            dist.barrier()
            runs.append(read_metrics(folder / "metrics.jsonl"))
        seen[name] = runs
    seen["debug"] = _debug(settings(file, "debug"), root / "debug", shards)
    seen["first batch"] = _first_batch(settings(file, STAGED), shards)
    close_distributed()
    return seen


def _first_batch(config: Config, shards: str) -> tuple[float, float]:
    """Loss and gradient norm of the first step of a plain model over all its rows at once."""
    loader = TokenLoader(
        Path(shards), max_length=LENGTH, batch_size=3 * BATCH, seed=0, orders=easy_first(config, Path(shards))
    )
    seed_generators(config.training.seed)
    model = Transformer(config)
    output = model(*in_pieces(loader.next_batch(), 4))
    output.objective.backward()
    squares = sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None)
    return output.loss.item(), math.sqrt(squares)


def _hooks(model: Transformer) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def _debug(config: Config, folder: Path, shards: str) -> dict[str, Any]:
    """On the last rank a module gives NaN in the fourth forward pass, and has a backward pass that does in the
    ninth."""
    folder.mkdir(exist_ok=True)
    trainer, passes = Trainer(config, folder, Path(shards)), 0

    def break_it(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        nonlocal passes
        passes += module.training
        if dist.get_rank() != dist.get_world_size() - 1 or not module.training:
            return None
        if passes == 4:
            return output * math.nan
        return output + (output * 0).sqrt() if passes == 9 else None

    model = trainer.engine.model
    assert isinstance(model, Transformer)
    model.blocks[1].mlp_norm.register_forward_hook(break_it)
    lines, hooks = list[str](), _hooks(model)
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    package = logging.getLogger("ava_fast")
    package.setLevel(logging.DEBUG)
    package.addHandler(handler)
    trainer.run()
    package.removeHandler(handler)
    dist.barrier()
    return {
        "records": read_metrics(folder / "metrics.jsonl"),
        "lines": lines,
        "left": (torch.are_deterministic_algorithms_enabled(), torch.is_anomaly_enabled(), _hooks(model) - hooks),
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("curricula")


@pytest.fixture(scope="module")
def file(root: Path) -> str:
    return str(write_config(root / "c.yaml", write_corpus(root / "text")))


@pytest.fixture(scope="module")
def shards(file: str) -> str:
    data = load_config(file).data
    return str(prepare(data.data_dir, data.cache_dir, vocab_size=load_config(file).model.vocab_size))


@pytest.fixture(scope="module")
def seen(file: str, shards: str, root: Path) -> dict[str, Any]:
    return run_on_ranks(exercise, 2, file, shards, root, [*CURRICULA, *MODES], timeout=240.0)[0]


def of(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    clock = {"seconds", "tokens_per_second"}
    return [{key: value for key, value in r.items() if key not in clock} for r in records if r["kind"] == kind]


@pytest.mark.parametrize("name", [*CURRICULA, "fast"])
def test_resumed_in_the_middle_it_goes_on_to_the_bit(name: str, seen: dict[str, Any]) -> None:
    whole, rest = seen[name]
    for kind in ("step", "rate", "evaluation"):
        assert [r for r in of(whole, kind) if r["step"] > HALF] == of(rest, kind)
    assert of(rest, "step")[-1]["step"] == STEPS


@pytest.mark.parametrize("name", [*CURRICULA, "standard"])
def test_golden_losses(name: str, seen: dict[str, Any]) -> None:
    losses = [record["loss"] for record in of(seen[name][0], "step")]
    assert [losses[at] for at in (0, HALF, STEPS - 1)] == pytest.approx(GOLDEN[name], rel=1e-3)


@pytest.mark.parametrize("name", [CYCLES, STAGED])
def test_every_step_has_the_batch_the_length_and_the_rate_of_its_curricula(
    name: str, seen: dict[str, Any], file: str
) -> None:
    config = settings(file, name)
    sizes, records = MicroBatches(config), of(seen[name][0], "step")
    assert [r["micro_batches"] for r in records] == [sizes.at(step) for step in range(STEPS)]
    assert [r["sequence_length"] for r in records] == [sequence_length(step, config) for step in range(STEPS)]
    for step, record in enumerate(records):
        factor = math.sqrt(record["micro_batches"] / 2) if name == CYCLES else 1.0
        assert record["learning_rate"] == record.get("scheduled_rate", learning_rate(step, config.training)) * factor
    assert len({r["micro_batches"] for r in records}) == 3
    assert len({r["sequence_length"] for r in records}) >= 3


@pytest.mark.parametrize("name", list(CURRICULA))
def test_tokens_are_counted_exactly(name: str, seen: dict[str, Any], root: Path) -> None:
    total = 0
    for record in of(seen[name][0], "step"):
        total += record["micro_batches"] * BATCH * LENGTH
        assert record["tokens"] == total
    manifest = json.loads((root / f"whole {name}" / "checkpoints" / f"step_{STEPS}" / "manifest.json").read_text())
    assert manifest["data"]["position"] * LENGTH == manifest["tokens"] == total


def test_the_batch_follows_the_noise_scale(seen: dict[str, Any]) -> None:
    records, sizes, count = of(seen[NOISE][0], "step"), [], 2
    for step, record in enumerate(records):
        sizes.append(count)
        if step % 2 == 0 and record["noise_scale"] is not None:
            wanted = min(max(record["noise_scale"] / BATCH, count / 2), count * 2)
            count = min(max(math.floor(wanted + 0.5), 1), 6)
    assert [r["micro_batches"] for r in records] == sizes
    assert len(set(sizes)) > 1


def test_loss_and_gradient_are_means_over_the_steps_own_micro_batches(seen: dict[str, Any]) -> None:
    first = of(seen[STAGED][0], "step")[0]
    assert first["micro_batches"] == 3
    assert (first["loss"], first["grad_norm"]) == pytest.approx(seen["first batch"], rel=1e-4)


def test_one_rank_sees_what_two_do(seen: dict[str, Any], file: str, shards: str, root: Path) -> None:
    alone = root / "alone"
    alone.mkdir()
    one = run_on_ranks(once, 1, file, shards, alone, CYCLES)[0]
    for own, two in zip(of(one, "step"), of(seen[CYCLES][0], "step"), strict=True):
        assert own["loss"] == pytest.approx(two["loss"], rel=1e-4)
        assert own["tokens"] == two["tokens"]


def test_fast_trains_the_same_and_records_every_few_steps(seen: dict[str, Any], root: Path, file: str) -> None:
    standard, fast = (of(seen[name][0], "step") for name in MODES)
    assert [record["step"] for record in fast] == [LOG, HALF, 2 * LOG, STEPS]
    assert [record.pop("steps") for record in fast] == [5, 1, 4, 2]
    assert fast == [record for record in standard if record["step"] in (LOG, HALF, 2 * LOG, STEPS)]
    for record in seen["fast"][0]:
        if record["kind"] == "step":
            tokens = record["steps"] * 2 * BATCH * LENGTH
            assert record["tokens_per_second"] * record["seconds"] * record["steps"] == pytest.approx(tokens)
    summary = {"status": "finished", "parameters": 1}
    text = write_report(root / "whole fast", settings(file, "fast"), summary).read_text()
    assert f"| steps | {STEPS} |" in text


def test_debug_names_the_module_and_the_operation(seen: dict[str, Any]) -> None:
    verdicts = of(seen["debug"]["records"], "verdict")
    assert len(verdicts) == 2
    culprits = [each for verdict in verdicts for each in verdict["culprits"]]
    assert [each["rank"] for each in culprits] == [1, 1]
    assert culprits[0]["module"].startswith("blocks.1.mlp_norm: 2,048 of 2,048 values are not finite")
    assert "Function 'MulBackward0' returned nan" in culprits[1]["errors"][0]
    assert "module" not in culprits[1]
    lines = seen["debug"]["lines"]
    assert "blocks.0.attention.qkv (Linear) gives float32 (2, 32, 64)" in lines
    assert sum(line.startswith("blocks.0.attention.qkv") for line in lines) == 2  # of the first step's micro-batches
    assert sum(f"/{STEPS} | loss" in line for line in lines) == STEPS
    assert any("blocks.1.mlp_norm: 2,048 of" in line for line in lines if line.startswith("after step"))


def test_debug_leaves_torch_as_it_was(seen: dict[str, Any]) -> None:
    assert seen["debug"]["left"] == (False, False, 0)
