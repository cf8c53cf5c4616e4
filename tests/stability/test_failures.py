"""Errors by kind, what is tried again, and the watcher that ends a rank which does not come back."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from corpus import write_config, write_corpus
from distributed import run_on_ranks

from ava_fast import trainer as trainer_module
from ava_fast.checkpoint import store
from ava_fast.config import load_config
from ava_fast.data.prepare import prepare
from ava_fast.distributed import health
from ava_fast.engine import close_distributed, init_distributed
from ava_fast.errors import Interrupted, LostRank, TrainingError
from ava_fast.observe.report import write_report
from ava_fast.observe.run import read_metrics
from ava_fast.stability import failures
from ava_fast.stability.failures import attempt, is_device_fault, is_network, is_out_of_memory, may_pass, retried
from ava_fast.stability.judge import Judge, Trouble, Verdict
from ava_fast.trainer import Trainer

STALE = OSError(errno.ESTALE, "Stale file handle")


def allocate_too_much() -> None:
    torch.empty(2**62, dtype=torch.int8)


def test_errors_are_told_apart() -> None:
    with pytest.raises(RuntimeError) as host:
        allocate_too_much()
    cublas = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    for error in (host.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), cublas):
        assert is_out_of_memory(error)
        assert not is_network(error)
        assert not is_device_fault(error)
    for error in (STALE, ConnectionResetError(), TimeoutError(), dist.DistBackendError("NCCL error")):
        assert is_network(error)
        assert not is_out_of_memory(error)
    for error in (ValueError("gloo"), FileNotFoundError(errno.ENOENT, "no"), OSError(errno.ENOSPC, "full")):
        assert not is_network(error)
        assert not is_out_of_memory(error)
    assert is_device_fault(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))


def test_only_network_errors_are_tried_again_and_not_for_ever() -> None:
    pauses: list[float] = []

    def failing(times: int, error: Exception) -> Any:
        left = [error] * times

        def action() -> str:
            if left:
                raise left.pop()
            return "done"

        return action

    assert retried(failing(2, STALE), pauses.append) == ("done", 2)
    assert pauses == list(failures.PAUSES[:2])
    with pytest.raises(OSError, match="Stale"):
        retried(failing(len(failures.PAUSES) + 1, STALE), pauses.append)
    pauses.clear()
    with pytest.raises(FileNotFoundError):
        retried(failing(1, FileNotFoundError(errno.ENOENT, "no")), pauses.append)
    assert not pauses
    assert may_pass(attempt(failing(1, STALE)) or "")
    assert not may_pass(attempt(failing(1, OSError(errno.ENOSPC, "full"))) or "")
    assert attempt(failing(0, STALE)) is None


def test_out_of_memory_stops_at_once_and_outranks_what_else_failed() -> None:
    judge = Judge(load_config(None).stability)
    ruling = judge.rule(1.0, 1.0, can_roll_back=True, failures={Trouble.DATA: 1, Trouble.MEMORY: 2})
    assert (ruling.verdict, ruling.apply, ruling.trouble) == (Verdict.STOP, False, Trouble.MEMORY)
    assert "out of memory on 2 ranks" in ruling.reason
    ruling = judge.rule(1.0, 1.0, can_roll_back=True, failures={Trouble.DATA: 1})
    assert (ruling.verdict, ruling.trouble) == (Verdict.SKIP, Trouble.DATA)
    assert judge.counts == {"out of memory": 1, "batch not readable": 1, "STOP": 1, "SKIP": 1}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("failures")
    return write_config(root / "c.yaml", write_corpus(root / "text"))


@pytest.fixture
def trainer(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trainer]:
    """One rank, in this process, that pauses for milliseconds."""
    config = load_config(file, ["training.max_steps=4", "checkpoint.save_steps=2", "evaluation.eval_steps=0"])
    for module in (failures, trainer_module):
        monkeypatch.setattr(module, "PAUSES", (0.001, 0.001))
    shards = prepare(config.data.data_dir, config.data.cache_dir, vocab_size=config.model.vocab_size)
    init_distributed(config)
    try:
        yield Trainer(config, tmp_path, Path(shards))
    finally:
        close_distributed()


def failing_at(calls: set[int], action: Any) -> Any:
    """`action`, but these calls of it fail as a remote disk does."""
    count = 0

    def call(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        done = action(*arguments)
        if count in calls:
            raise STALE
        return done

    return call


def test_a_disk_that_comes_back_costs_no_batch_and_no_checkpoint(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = trainer.loader
    monkeypatch.setattr(loader, "next_batch", failing_at({3, 4}, loader.next_batch))
    monkeypatch.setattr(store, "open_folder", failing_at({1}, store.open_folder))
    trainer.run()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records if record["kind"] == "step"] == [1, 2, 3, 4]
    assert loader.position == 4 * 8
    assert not [record for record in records if record["kind"] == "verdict"]
    retries = [(record["step"], record["retries"]) for record in records if record["kind"] == "retry"]
    assert retries == [(1, 2), (2, 1)]
    assert trainer.judge.counts == {failures.RETRIED: 3}
    assert [path.name for path in store.list_checkpoints(tmp_path / "checkpoints")] == ["step_2", "step_4"]
    report = write_report(tmp_path, trainer.config, {"status": "finished", "parameters": 1})
    assert "| network errors, tried again | 3 |" in report.read_text()


def test_a_disk_that_stays_away_costs_the_batch_and_then_ends_the_run_where_it_must_save(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = trainer.loader
    monkeypatch.setattr(loader, "next_batch", failing_at({3, 4, 5}, loader.next_batch))
    monkeypatch.setattr(store, "open_folder", failing_at(set(range(9)), store.open_folder))
    with pytest.raises(TrainingError, match=r"step_2: the checkpoint could not be written .*Stale file handle"):
        trainer.run()  # it trains on while the save is tried again
    (verdict,) = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] == "verdict"]
    assert (verdict["trouble"], verdict["verdict"], verdict["step"]) == ("batch not readable", "SKIP", 1)
    assert "Stale file handle" in verdict["culprits"][0]["errors"][0]
    assert loader.position == 5 * 8


def test_a_broken_gpu_ends_the_run_resumably_and_no_batch_is_blamed(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every further call would fail as well: nothing is skipped, and the batch is read again."""

    def broken(batch: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(trainer, "_forward", broken)
    with pytest.raises(LostRank, match="illegal memory access") as lost:
        trainer.run()
    assert lost.value.exit_code == Interrupted.exit_code
    assert store.avoided(tmp_path / "checkpoints") == []
    assert not trainer.judge.counts


def stuck() -> None:
    """Rank 0 waits for rank 1, which has failed and does not go away."""
    health._EVERY, health._BEFORE_ABORT, health._BEFORE_END = 0.1, 0.1, 0.5
    init_distributed(load_config(None))
    with health.Watch() as watch:
        if dist.get_rank() == 1:
            watch.tell("no such luck")
            watch.__exit__(None, None, None)
            time.sleep(60)
        dist.barrier()


def test_a_rank_that_does_not_come_back_is_ended() -> None:
    with pytest.raises(RuntimeError, match="rank 0 died without a word"):
        run_on_ranks(stuck, 2, timeout=30.0)
