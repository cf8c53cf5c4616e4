"""Which features go together: every cell of docs/compatibility.md is run, or its refusal is seen.

python tests/test_compatibility.py > docs/compatibility.md
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from corpus import write_config, write_corpus
from distributed import run_on_ranks
from torch._dynamo.utils import counters as dynamo_counters

from ava_fast.config import Config, ConfigError, load_config
from ava_fast.data.prepare import prepare
from ava_fast.engine import close_distributed, init_distributed
from ava_fast.errors import UserError
from ava_fast.observe.run import read_metrics
from ava_fast.trainer import Trainer

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
STAGES = range(4)
BF16 = "training.precision=bf16"
# What a row sets beside the ZeRO stage; fp32 unless it says otherwise.
FEATURES = {
    "fp32": [],
    "bf16": [BF16],
    "activation checkpointing": ["memory.activation_checkpointing=true"],
    "activation checkpointing, bf16": ["memory.activation_checkpointing=true", BF16],
    "optimizer on the host": ["memory.offload_optimizer=true"],
    "optimizer on the host, bf16, torch.compile": ["memory.offload_optimizer=true", BF16, "training.compile=true"],
    "torch.compile": ["training.compile=true"],
    "torch.compile, bf16": ["training.compile=true", BF16],
    "torch.compile, activation checkpointing": ["training.compile=true", "memory.activation_checkpointing=true"],
    "torch.compile, PCGrad": ["training.compile=true", "stability.gradient_surgery=pcgrad"],
    "torch.compile, documents apart": ["training.compile=true", "data.document_attention=true"],
    "attention by torch's fastest": ["training.attention_backend=sdpa"],
    "attention by torch's fastest, bf16": ["training.attention_backend=sdpa", BF16],
    "attention by its definition": ["training.attention_backend=torch"],
    "attention by its definition, bf16": ["training.attention_backend=torch", BF16],
    "documents apart": ["data.document_attention=true"],
    "documents apart, bf16": ["data.document_attention=true", BF16],
    "tied embeddings": ["model.tie_embeddings=true"],
    "tied embeddings, bf16": ["model.tie_embeddings=true", BF16],
    "experts with a capacity, next-best rerouting": ["moe.capacity_factor=0.8"],
    "balancing by an expert bias": ["moe.expert_bias_rate=0.01"],
    "shared experts with a gate": ["moe.shared_experts=1", "moe.shared_expert_gate=true"],
    "no experts": ["moe.num_experts=0"],
    "gradient surgery, PCGrad": ["stability.gradient_surgery=pcgrad"],
    "gradient surgery, PCGrad, bf16": ["stability.gradient_surgery=pcgrad", BF16],
    "gradient surgery, adaptive": ["stability.gradient_surgery=adaptive"],
    "gradient surgery, adaptive, bf16": ["stability.gradient_surgery=adaptive", BF16],
}
# What a run sees when, in one row: each by itself is in tests/schedule.
FEATURES["curricula: lengths, batches and difficulty"] = [
    "curriculum.length.shape=linear",
    "curriculum.length.start=8",
    "curriculum.batch.shape=cyclical",
    "curriculum.batch.period=3",
    "curriculum.difficulty.measure=rarity",
]
FEATURES["debug mode"] = ["training.mode=debug"]
# What goes with no ZeRO stage.
REFUSED = [
    ["deepspeed.zero_stage=0", "stability.gradient_surgery=pcgrad", "training.gradient_accumulation_steps=1"],
    ["training.attention_backend=sdpa", "data.document_attention=true"],
    ["training.attention_backend=hopper"],
    ["training.attention_backend=hopper", "training.precision=bf16", "model.head_dim=136"],
    ["model.hidden_size=30", "model.num_heads=4"],
    ["model.num_heads=4", "model.num_kv_heads=3"],
    ["model.num_layers=2", "model.num_dense_layers=3"],
    ["moe.num_experts=4", "moe.top_k=5"],
    ["moe.overflow=drop", "moe.max_reroutes=2"],
    ["moe.num_groups=2", "moe.group_top_k=null"],
    ["moe.num_experts=4", "moe.num_groups=3", "moe.group_top_k=1"],
    ["moe.shared_experts=0", "moe.shared_expert_gate=true"],
    ["stability.window=8", "stability.max_skips=8"],
    ["training.learning_rate=0.001", "training.lr_end=0.01"],
    ["training.max_steps=10", "training.warmup_steps=11"],
    ["data.max_length=128", "curriculum.length.shape=linear", "curriculum.length.start=48"],
    ["data.max_length=128", "curriculum.length.shape=stages", "curriculum.length.stages=[64, 32]"],
    ["curriculum.batch.shape=noise_scale", "training.noise_scale_steps=0"],
    ["curriculum.batch.shape=cyclical", "deepspeed.zero_stage=0", "stability.gradient_surgery=pcgrad"],
    ["curriculum.difficulty.measure=loss", "curriculum.difficulty.reference=null"],
    ["training.mode=debug", "training.compile=true"],
    ["memory.thresholds=[0.75, 0.8, 0.8, 0.9]"],
]
SAVED = ["deepspeed.zero_stage=1"]  # of the checkpoint that is resumed
RESUMED = {
    "the same": [],
    "another ZeRO stage": ["deepspeed.zero_stage=2"],
    "another precision": [BF16],
    "another batch size": ["training.batch_size=8"],
    "other gradient accumulation": ["training.gradient_accumulation_steps=3"],
    "another learning rate and schedule": ["training.learning_rate=0.001", "training.lr_scheduler_type=wsd"],
}
OTHER_MODEL = ["model.hidden_size=48"]  # refused with and without the optimizer's state


def settings(file: str | None, overrides: list[str]) -> Config:
    """Small, and so that what stages must agree on does not depend on noise."""
    fixed = ["training.max_steps=3", "training.gradient_accumulation_steps=2", "checkpoint.save_steps=0"]
    return load_config(file, [*fixed, "evaluation.eval_steps=0", "evaluation.max_sequences=4", *overrides])


def refusal(overrides: list[str]) -> str | None:
    """Why these settings are refused, in the first fault's words; None if they are not."""
    try:
        settings(None, overrides)
    except ConfigError as error:
        return str(error.faults[0])
    return None


def cell(feature: str, stage: int) -> tuple[str, str | None]:
    """`works`, or `refused` and why."""
    why = refusal([*FEATURES[feature], f"deepspeed.zero_stage={stage}"])
    return ("refused" if why else "works"), why


def page() -> str:
    lines = [
        "# What goes together",
        "",
        "Written by `python tests/test_compatibility.py`; a test keeps it current. Every `works` is a training run on",
        "two ranks in the tests, whose losses are those of the row's first column. Every `refused` is refused before",
        "anything is allocated, with exit code 2 and one line that names the key.",
        "",
        "## Features and ZeRO stages",
        "",
        "| | " + " | ".join(f"ZeRO {stage}" for stage in STAGES) + " |",
        "|---" * (len(STAGES) + 1) + "|",
    ]
    reasons: list[str] = []
    for feature in FEATURES:
        cells = []
        for stage in STAGES:
            word, why = cell(feature, stage)
            if why:
                general = re.sub(r"given: \w+", "given: …", why.replace(f"(now {stage})", "(now N)"))
                if general not in reasons:
                    reasons.append(general)
                word = f"{word} <sup>{reasons.index(general) + 1}</sup>"
            cells.append(word)
        lines.append(f"| {feature} | {' | '.join(cells)} |")
    lines += ["", *(f"{number}. `{why}`" for number, why in enumerate(reasons, start=1))]
    lines += ["", "## Refused in every stage", "", "| settings | what is said |", "|---|---|"]
    lines += [f"| {', '.join(f'`{each}`' for each in overrides)} | {refusal(overrides)} |" for overrides in REFUSED]
    lines += [
        "",
        "## Resuming with other settings",
        "",
        "| the run that resumes has | `--resume` | `--resume --reset-optimizer` |",
        "|---|---|---|",
        *(f"| {what} | works | works |" for what in (*RESUMED, "another number of ranks")),
        "| another model | refused | refused |",
        "",
        "## Not in these tables",
        "",
        "There is no setting yet for expert parallelism. Attention by our kernels (`triton`, `hopper`) needs a",
        "GPU: where there is none, the preflight refuses it.",
        "What an exception on one rank leads to depends on the ZeRO stage:",
        "[When training misbehaves](when-training-misbehaves.md).",
    ]
    return "\n".join(lines) + "\n"


def losses(config: Config, shards: str, folder: Path) -> list[float]:
    """Of a whole run's steps, and held out; it leaves a checkpoint."""
    folder.mkdir(exist_ok=True)
    Trainer(config, folder, Path(shards)).run()
    dist.barrier()
    return [r["loss"] for r in read_metrics(folder / "metrics.jsonl") if r["kind"] in ("step", "evaluation")]


def exercise(file: str, shards: str, root: Path) -> dict[Any, Any]:
    """Runs on every rank of two."""
    init_distributed(settings(file, []))
    seen: dict[Any, Any] = {}
    for feature, overrides in FEATURES.items():
        for stage in STAGES:
            if cell(feature, stage)[0] == "works":
                config = settings(file, [*overrides, f"deepspeed.zero_stage={stage}"])
                torch._dynamo.reset()  # it forgets no model by itself, and after eight compiles no more
                graphs = dynamo_counters["stats"]["unique_graphs"]
                seen[feature, stage] = losses(config, shards, root / f"{feature}{stage}")
                assert (dynamo_counters["stats"]["unique_graphs"] > graphs) == config.training.compile
    losses(settings(file, SAVED), shards, root / "saved")
    for what, overrides in {**RESUMED, "another model": OTHER_MODEL}.items():
        for optimizer in (True, False):
            trainer = Trainer(
                settings(file, [*SAVED, *overrides, "training.max_steps=4"]), root / "resumed", Path(shards)
            )
            try:
                trainer.load(root / "saved" / "checkpoints" / "step_3", optimizer=optimizer)
                assert trainer._step()[0].apply
                seen[what, optimizer] = "works"
            except UserError:
                seen[what, optimizer] = "refused"
    close_distributed()
    return seen


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    root = tmp_path_factory.mktemp("compatibility")
    file = str(write_config(root / "c.yaml", write_corpus(root / "text")))
    data = load_config(file).data
    shards = str(prepare(data.data_dir, data.cache_dir, vocab_size=load_config(file).model.vocab_size))
    return run_on_ranks(exercise, 2, file, shards, root, timeout=900.0)[0]


@pytest.mark.parametrize("feature", FEATURES)
def test_what_works_trains_alike_in_every_stage(feature: str, seen: dict[Any, Any]) -> None:
    found = {stage: seen[feature, stage] for stage in STAGES if cell(feature, stage)[0] == "works"}
    assert found
    first = next(iter(found.values()))
    assert len(first) == 4
    assert all(math.isfinite(loss) for loss in first)
    assert first[2] < first[0]
    for stage, loss in found.items():
        # bf16: a step's rounding may move a weight to the neighbouring value.
        assert loss == pytest.approx(first, rel=2**-8 if BF16 in FEATURES[feature] else 1e-5), stage


@pytest.mark.parametrize("overrides", REFUSED, ids=", ".join)
def test_what_is_refused_is_refused_by_name(overrides: list[str]) -> None:
    why = refusal(overrides) or ""
    assert why.partition(":")[0] in [override.partition("=")[0] for override in overrides]
    assert "allowed: " in why


@pytest.mark.parametrize("what", [*RESUMED, "another model"])
def test_resuming(what: str, seen: dict[Any, Any]) -> None:
    for optimizer in (True, False):
        assert seen[what, optimizer] == ("refused" if what == "another model" else "works")


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tests/test_compatibility.py > docs/compatibility.md"


if __name__ == "__main__":
    print(page(), end="")
