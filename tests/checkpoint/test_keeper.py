"""Saving while training goes on, and loading what can be trusted: one rank, in this process."""

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus import write_config, write_corpus

from ava_fast.checkpoint import keeper, store
from ava_fast.checkpoint.shards import Shards, read_weights
from ava_fast.checkpoint.snapshot import Snapshot
from ava_fast.config import load_config
from ava_fast.data.prepare import prepare
from ava_fast.engine import close_distributed, init_distributed
from ava_fast.errors import TrainingError, UserError
from ava_fast.observe.run import read_metrics
from ava_fast.trainer import Trainer


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("keeper")
    file = str(write_config(folder / "c.yaml", write_corpus(folder / "text")))
    config = load_config(file)
    return file, Path(prepare(config.data.data_dir, config.data.cache_dir, vocab_size=config.model.vocab_size))


def make(shards: tuple[str, Path], folder: Path, *overrides: str) -> Trainer:
    fixed = ["training.max_steps=6", "checkpoint.save_steps=2", "evaluation.eval_steps=2"]
    return Trainer(load_config(shards[0], [*fixed, *overrides]), folder, shards[1])


@pytest.fixture
def trainer(shards: tuple[str, Path], tmp_path: Path) -> Iterator[Trainer]:
    init_distributed(load_config(shards[0]))
    yield make(shards, tmp_path)
    close_distributed()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_checkpoint_is_of_the_moment_when_it_was_asked_for_and_training_waits_for_its_copy_alone(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copying, let_commit, copy, commit = threading.Event(), threading.Event(), Snapshot.copy, store.commit
    waited = []

    def late(self: Snapshot) -> Any:
        copying.wait(20.0)  # until the next step is about to update
        return copy(self)

    def held(*arguments: Any) -> Path:
        assert let_commit.wait(20.0)
        return commit(*arguments)

    def wait(self: Snapshot) -> float:
        waited.append(self._copied.is_set())
        copying.set()
        self._copied.wait()
        return 0.25

    monkeypatch.setattr(Snapshot, "copy", late)
    monkeypatch.setattr(Snapshot, "wait", wait)
    monkeypatch.setattr(store, "commit", held)
    trainer._step()
    trainer.save()
    expected, moments = trainer.engine.gather_weights(), dict(trainer.engine.state().tensors)
    expected, moments = ({k: v.clone() for k, v in each.items()} for each in (expected, moments))
    trainer._step()
    trainer._step()  # three steps are taken, and nothing is on the disk yet
    assert waited == [False]
    assert store.list_checkpoints(tmp_path / "checkpoints") == []
    let_commit.set()
    trainer.keeper.settle()
    saved = Shards(tmp_path / "checkpoints" / "step_1" / "engine")
    assert same(saved.weights(), expected)
    assert not same(saved.weights(), trainer.engine.gather_weights())
    for key in (key for key in moments if key.startswith("exp_avg")):
        kind, _, name = key.partition("/")
        assert torch.equal(saved.read(kind, name, 0, moments[key].numel()), moments[key]), key
    (record,) = trainer.keeper.news
    assert record["stall_seconds"] > 0.25
    assert record["bytes"] == sum(f["bytes"] for f in store.peek(tmp_path / "checkpoints" / "step_1")["files"].values())


@pytest.mark.parametrize("policy", ["skip", "wait"])
def test_a_save_that_comes_too_soon(
    policy: str, shards: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init_distributed(load_config(shards[0]))
    trainer = make(shards, tmp_path, f"checkpoint.when_busy={policy}")
    free, begun, commit = threading.Event(), [], store.commit

    def held(folder: Path, *rest: Any) -> Path:
        begun.append(folder.name)
        assert free.wait(20.0)
        return commit(folder, *rest)

    monkeypatch.setattr(store, "commit", held)
    trainer._step()
    trainer.save()
    trainer._step()
    if policy == "wait":
        threading.Timer(0.3, free.set).start()
    trainer.save()
    assert free.is_set() == (policy == "wait")
    free.set()
    trainer.keeper.settle()
    steps = [1] if policy == "skip" else [1, 2]
    assert [path.name for path in store.list_checkpoints(tmp_path / "checkpoints")] == [f"step_{n}" for n in steps]
    assert trainer.keeper.saved_at == steps[-1]
    close_distributed()


def test_a_run_writes_what_each_save_cost(trainer: Trainer, tmp_path: Path) -> None:
    trainer.run()
    found = [record for record in read_metrics(tmp_path / "metrics.jsonl") if record["kind"] == "checkpoint"]
    assert [record["step"] for record in found] == [2, 4, 6]
    assert all(record["asynchronous"] and record["stall_seconds"] > 0 for record in found)
    assert all(record["bytes"] > 12 * trainer.parameters and record["write_seconds"] > 0 for record in found)
    assert store.pointed(tmp_path / "checkpoints", "best") is not None


def test_no_room_for_a_copy_ends_the_run_in_one_line_and_an_emergency_save_needs_none(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Snapshot) -> None:
        self._copied.set()
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(Snapshot, "copy", full)
    trainer._step()
    trainer.save()
    with pytest.raises(TrainingError, match=r"step_1: the checkpoint could not be written \(can't allocate memory\)"):
        trainer.keeper.settle()
    trainer.save(emergency=True)
    manifest = store.read_manifest(tmp_path / "checkpoints" / "step_1")
    assert not manifest["stability"]["calm"]


def test_loading_passes_over_what_is_damaged_and_says_so(
    trainer: Trainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer.run()
    folder = tmp_path / "checkpoints"
    newest, second, oldest = store.candidates(tmp_path)
    (newest / "engine" / "rank_0.safetensors").write_bytes(b"no weights")
    (second / "manifest.sha256").unlink()
    with caplog.at_level(logging.WARNING):
        assert trainer.load(newest, second, oldest) == oldest == folder / "step_2"
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [warning.split(": ")[0] for warning in warnings] == [
        str(newest / "engine" / "rank_0.safetensors"),
        str(second / "manifest.sha256"),
    ]
    assert trainer.step == 2
    assert same(trainer.engine.gather_weights() or {}, read_weights(oldest / "engine"))
    with pytest.raises(UserError, match=r"rank_0\.safetensors: has 10 bytes, .*resume from another one"):
        trainer.load(newest)


def test_what_a_rank_s_failure_says_every_rank_knows() -> None:
    assert keeper.attempted(lambda: 3) == (3, None)

    def fail() -> None:
        raise OSError(28, "No space left on device")

    assert keeper.attempted(fail) == (None, "[Errno 28] No space left on device")
