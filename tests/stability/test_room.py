"""The ladder out of memory: what is tried in which order, and that a run which climbed it is one that began so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from corpus import write_config, write_corpus
from distributed import run_on_ranks
from hypothesis import given
from hypothesis import strategies as st

from ava_fast.config import Config, load_config
from ava_fast.data.batches import cut
from ava_fast.data.prepare import prepare
from ava_fast.engine import close_distributed, init_distributed
from ava_fast.errors import TrainingError, UserError
from ava_fast.observe.run import read_metrics
from ava_fast.stability import room
from ava_fast.stability.room import Room
from ava_fast.trainer import Trainer


@given(st.integers(1, 300), st.integers(0, 300))
def test_the_search_ends_at_the_largest_micro_batch_that_fits(rows: int, fits: int) -> None:
    now, tries = Room(recompute=True, micro_batch=rows, zero_stage=0), 0
    while True:
        tries += 1
        if now.micro_batch <= fits:
            if not now.searching:
                break
            now = now.passed()
        else:
            then = now.more(1, may_shard=False)
            if then is None:
                assert fits == 0
                return
            now = then
    assert now == Room(True, min(rows, fits), 0)
    assert tries <= 2 + rows.bit_length()


def test_the_rungs_in_their_order() -> None:
    rungs, now = [], Room(recompute=False, micro_batch=4, zero_stage=0)
    while now is not None:
        rungs.append(str(now))
        now = now.more(2, may_shard=True)
    assert rungs == [
        "micro-batches of 4, ZeRO-0",
        "activation checkpointing, micro-batches of 4, ZeRO-0",
        "activation checkpointing, micro-batches of 2, ZeRO-0",
        "activation checkpointing, micro-batches of 1, ZeRO-0",
        "activation checkpointing, micro-batches of 1, ZeRO-2",
        "activation checkpointing, micro-batches of 1, ZeRO-2, the optimizer on the host",
    ]
    last = Room(recompute=True, micro_batch=1, zero_stage=0)
    assert last.more(1, may_shard=True) == Room(True, 1, 2, offload=True)
    assert last.more(2, may_shard=False) is None
    assert replace(last, zero_stage=3).more(2, may_shard=True) is None


def test_rows_of_a_batch_keep_their_documents() -> None:
    tokens_BS = torch.arange(12).view(4, 3)
    cu_seqlens = torch.tensor([0, 2, 3, 6, 7, 9, 12], dtype=torch.int32)
    tokens, labels, documents = cut((tokens_BS, tokens_BS + 1, cu_seqlens), 1, 3)
    assert tokens.tolist() == [[3, 4, 5], [6, 7, 8]]
    assert labels.tolist() == [[4, 5, 6], [7, 8, 9]]
    assert documents.tolist() == [0, 3, 4, 6]
    assert documents.dtype == torch.int32


# What each case fits into; and, as it would be configured, what it ends with.
CASES = {
    "recompute": (lambda run: run.recompute, ["memory.activation_checkpointing=true"]),
    "micro-batch": (
        lambda run: run.recompute and run.rows <= 3,
        ["memory.activation_checkpointing=true", "memory.micro_batch=3"],
    ),
    "ZeRO-2": (
        lambda run: run.stage == 2,
        ["memory.activation_checkpointing=true", "memory.micro_batch=1", "deepspeed.zero_stage=2"],
    ),
    "offload": (
        lambda run: run.offloads,
        [
            "memory.activation_checkpointing=true",
            "memory.micro_batch=1",
            "deepspeed.zero_stage=2",
            "memory.offload_optimizer=true",
        ],
    ),
    "nothing": (lambda run: False, []),
}
STAGES = {"recompute": (0, 1, 2), "micro-batch": (0, 1, 2), "ZeRO-2": (0,), "offload": (1,), "nothing": (1,)}
BASE = ["training.batch_size=8", "training.max_steps=5", "evaluation.eval_steps=0", "checkpoint.save_steps=0"]
BASE += ["data.document_attention=true"]


class Tight:
    """Raises as an allocator does, on rank 1, unless the pass fits."""

    def __init__(self, trainer: Trainer, fits: Any):
        self.trainer, self.fits, self.rows = trainer, fits, 0
        build = trainer._build

        def rebuild(model: Any) -> None:
            build(model)
            self.watch()

        trainer._build = rebuild  # type: ignore[method-assign]
        self.watch()

    @property
    def recompute(self) -> bool:
        return self.trainer.engine.model.recompute

    @property
    def stage(self) -> int:
        return self.trainer.config.deepspeed.zero_stage

    @property
    def offloads(self) -> bool:
        return self.trainer.config.memory.offload_optimizer

    def watch(self) -> None:
        self.trainer.engine.model.register_forward_pre_hook(self.allocate)

    def allocate(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.rows = len(inputs[0])
        if module.training and dist.get_rank() == 1 and not self.fits(self):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def settings(file: str, stage: int, *overrides: str) -> Config:
    return load_config(file, [*BASE, f"deepspeed.zero_stage={stage}", *overrides])


def train(config: Config, shards: str, folder: Path, fits: Any = None) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    trainer, error = Trainer(config, folder, Path(shards)), None
    if fits is not None:
        Tight(trainer, fits)
    try:
        trainer.run()
    except TrainingError as stopped:
        error = str(stopped)
    dist.barrier()
    return {
        "error": error,
        "records": read_metrics(folder / "metrics.jsonl"),
        "position": trainer.loader.position,
        "counts": dict(trainer.judge.counts),
    }


def exercise(file: str, shards: str, root: Path) -> dict[Any, dict[str, Any]]:
    """Runs on every rank of two."""
    init_distributed(settings(file, 0))
    seen: dict[Any, dict[str, Any]] = {}
    for case, (fits, overrides) in CASES.items():
        for stage in STAGES[case]:
            folder = root / f"{case}{stage}"
            seen[case, stage] = train(settings(file, stage), shards, folder / "climbed", fits)
            if overrides:
                begun = train(settings(file, stage, *overrides), shards, folder / "begun")
                seen[case, stage]["begun"] = begun
    again = Trainer(settings(file, 1), root / "micro-batch1" / "climbed", Path(shards))
    seen["again"] = {"room": str(again._room)}
    close_distributed()
    return seen


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("room")


@pytest.fixture(scope="module")
def seen(root: Path) -> dict[Any, dict[str, Any]]:
    file = str(write_config(root / "c.yaml", write_corpus(root / "text")))
    data = load_config(file).data
    shards = str(prepare(data.data_dir, data.cache_dir, vocab_size=load_config(file).model.vocab_size))
    return run_on_ranks(exercise, 2, file, shards, root, timeout=300.0)[0]


def steps(run: dict[str, Any]) -> list[dict[str, Any]]:
    clock = {"seconds", "tokens_per_second"}
    return [{k: v for k, v in r.items() if k not in clock} for r in run["records"] if r["kind"] == "step"]


@pytest.mark.parametrize(
    ("case", "stage"), [(case, stage) for case in CASES for stage in STAGES[case] if CASES[case][1]]
)
def test_a_run_that_climbed_is_one_that_began_so(case: str, stage: int, seen: dict[Any, dict[str, Any]]) -> None:
    run = seen[case, stage]
    assert run["error"] is None
    assert len(steps(run)) == 5
    assert steps(run) == steps(run["begun"])
    assert run["position"] == run["begun"]["position"]  # no sequence lost or repeated
    made = [record for record in run["records"] if record["kind"] == "memory"]
    assert run["counts"] == {"step taken again in less memory": len(made)}
    assert all(record["step"] == 0 for record in made)
    expected = {"recompute": 1, "micro-batch": 4, "ZeRO-2": 4, "offload": 5}
    assert len(made) == expected[case]
    if case == "micro-batch":
        assert [record["micro_batch"] for record in made] == [4, 2, 3, 3]
        assert [record["recompute"] for record in made] == [True] * 4


def test_smaller_passes_train_the_same(seen: dict[Any, dict[str, Any]]) -> None:
    whole, parts = steps(seen["recompute", 1]), steps(seen["micro-batch", 1])
    # The balance loss and jitter see other tokens together; the loss and its gradient are the batch's.
    assert parts[0]["loss"] == pytest.approx(whole[0]["loss"], rel=1e-3)
    assert parts[0]["grad_norm"] == pytest.approx(whole[0]["grad_norm"], rel=1e-2)


def test_at_the_ladders_end_it_stops_with_advice(seen: dict[Any, dict[str, Any]]) -> None:
    run = seen["nothing", 1]
    for words in ("out of memory on 1 rank", "emergency checkpoint", "training.batch_size (now 8)"):
        assert words in run["error"]
    assert [r["zero_stage"] for r in run["records"] if r["kind"] == "memory"] == [1, 1, 1, 2, 2]


def test_a_resumed_run_begins_with_what_was_found(seen: dict[Any, dict[str, Any]], root: Path) -> None:
    assert seen["again"]["room"] == "activation checkpointing, micro-batches of 3, ZeRO-1"
    folder = root / "micro-batch1" / "climbed"
    config = settings(str(root / "c.yaml"), 1, "memory.on_out_of_memory=stop")
    assert room.kept(folder, config, 4) == config
    own = settings(str(root / "c.yaml"), 3, "memory.micro_batch=2")
    assert room.with_room(own, Room(True, 2, 3)) == room.kept(folder, own, 4)
    room.keep(folder, Room(True, 1, 2, offload=True))
    assert room.with_room(own, Room(True, 1, 3)) == room.kept(folder, own, 4)
    assert Room.of(room.kept(folder, settings(str(root / "c.yaml"), 1), 4), 4) == Room(True, 1, 2, offload=True)
    bad = root / "bad"
    bad.mkdir()
    (bad / room.FILE).write_text("{")
    with pytest.raises(UserError, match="delete it"):
        room.kept(bad, own, 4)


def test_a_process_whose_memory_is_limited_finds_its_way(tmp_path: Path) -> None:
    file = write_config(
        tmp_path / "c.yaml",
        write_corpus(tmp_path / "text", documents=40),
        data={"max_length": 256},
        training={"batch_size": 64, "max_steps": 3, "gradient_accumulation_steps": 1},
        evaluation={"eval_steps": 0, "max_sequences": 2, "prompt": None},
        deepspeed={"zero_stage": 0},
    )
    limited = Path(__file__).with_name("limited_run.py")
    result = subprocess.run(
        [sys.executable, str(limited), "150", "--config", str(file)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (run,) = (tmp_path / "outputs" / "runs").iterdir()
    records = read_metrics(run / "metrics.jsonl")
    made = [record for record in records if record["kind"] == "memory"]
    assert made
    assert json.loads((run / room.FILE).read_text())["micro_batch"] == made[-1]["micro_batch"] < 64
    assert len([record for record in records if record["kind"] == "step"]) == 3
