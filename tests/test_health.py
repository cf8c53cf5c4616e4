"""What is watched while ranks train: that each makes progress, at the others' pace, on a machine that is well."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from corpus import write_config, write_corpus
from distributed import run_on_ranks
from torch._C._distributed_c10d import TCPStore

from ava_fast import train
from ava_fast.config import Config, load_config
from ava_fast.data.batches import Batch
from ava_fast.distributed import health, machine
from ava_fast.distributed.pace import Pace
from ava_fast.distributed.rendezvous import meet
from ava_fast.engine import close_distributed, init_distributed
from ava_fast.errors import LostRank
from ava_fast.observe.report import write_report
from ava_fast.observe.run import read_metrics
from ava_fast.trainer import Trainer

SLOW_FROM = 4  # the step
OVERRIDES = ["training.max_steps=10", "logging.log_steps=2", "evaluation.eval_steps=0", "checkpoint.save_steps=0"]


def slow_rank(file: str, folder: Path) -> list[machine.Row]:
    """Runs on every rank: rank 1 computes a tenth as fast before the run, and reads slowly in the midst of it."""
    config = load_config(file, OVERRIDES)
    init_distributed(config)
    speed = machine.matmul_speed
    if dist.get_rank() == 1:
        machine.matmul_speed = lambda *arguments: speed(*arguments) / 10  # type: ignore[assignment]
    rows = machine.examine(config)
    folder.mkdir(exist_ok=True)
    trainer = Trainer(config, folder, train.prepare_data(config))
    next_batch = trainer.loader.next_batch

    def slowly() -> Batch:
        if dist.get_rank() == 1 and trainer.step >= SLOW_FROM:
            time.sleep(0.2)
        return next_batch()

    trainer.loader.next_batch = slowly  # type: ignore[method-assign]
    trainer.run()
    close_distributed()
    return rows


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[machine.Row], Path, Config]:
    root = tmp_path_factory.mktemp("slow")
    file = write_config(root / "c.yaml", write_corpus(root / "text"), moe={"num_experts": 0})
    rows = run_on_ranks(slow_rank, 2, str(file), root / "run")
    assert rows[0] == rows[1]
    return rows[0], root / "run", load_config(file, OVERRIDES)


def test_a_rank_that_computes_slowly_is_refused_with_its_numbers(slow: tuple[list[machine.Row], Path, Config]) -> None:
    rows = {row.name: row for row in slow[0]}
    assert [name for name in rows if not rows[name].ok] == ["matmul"]
    assert rows["matmul"].detail.startswith("rank 1 on ")
    assert "exclude it, or raise distributed.health_ratio" in rows["matmul"].detail
    assert list(rows) == ["matmul", "copy", "all-reduce", "clocks", "write"]


def test_a_rank_that_stays_slow_is_named(slow: tuple[list[machine.Row], Path, Config]) -> None:
    _, run, config = slow
    paces = {r["step"]: r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "pace"}
    assert list(paces) == [2, 4, 6, 8, 10]
    found = {step: [each["rank"] for each in record["outliers"]] for step, record in paces.items()}
    assert found[6] == found[8] == found[10] == [1]
    (last,) = paces[10]["outliers"]
    assert last["in_a_row"] >= 3
    assert last["seconds"] >= 2 * 0.2  # two micro-batches a step
    assert last["times"] == pytest.approx(last["seconds"] / paces[10]["median"], rel=0.01)
    report = write_report(run, config, {"status": "finished", "parameters": 1}).read_text()
    assert f"| slow rank | rank 1 on {last['host']}: up to " in report


def hang(folder: Path) -> None:
    """Rank 1 sleeps in a step, rank 0 waits for it."""
    config = load_config(None, ["distributed.timeout_step=1"])
    init_distributed(config)
    health._EVERY = 0.2
    with health.Watch(config.distributed, folder) as watch:
        watch.enter("anything")
        if dist.get_rank() == 1:
            watch.enter("step")
            time.sleep(90)
        dist.barrier()


def test_a_rank_that_hangs_ends_itself_and_says_where(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        run_on_ranks(hang, 2, tmp_path)
    said = (tmp_path / "logs" / "stuck_rank_1.txt").read_text()
    assert "because of rank 1: in phase step for more than distributed.timeout_step (1 s)" in said
    assert "test_health.py" in said
    assert "in hang" in said


def hang_in_the_checks(file: str) -> None:
    """Runs on every rank: rank 1's device never answers."""
    config = load_config(file, ["distributed.timeout_start=1"])
    init_distributed(config)
    if dist.get_rank() == 1:
        machine.matmul_speed = lambda *arguments: time.sleep(60) or 0.0
    train._examine(config)


def test_a_machine_that_hangs_when_it_is_looked_at_is_ended(tmp_path: Path) -> None:
    file = write_config(tmp_path / "c.yaml", write_corpus(tmp_path / "text"))
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        run_on_ranks(hang_in_the_checks, 2, str(file))
    assert time.monotonic() - began < 40


def test_a_collective_that_takes_too_long_leaves_a_record(tmp_path: Path) -> None:
    file = write_config(tmp_path / "c.yaml", write_corpus(tmp_path / "text"))
    config = load_config(file, OVERRIDES)
    init_distributed(config)
    try:
        trainer = Trainer(config, tmp_path, train.prepare_data(config))
        error = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 600000ms for recv operation")
        with health.Watch() as watch:
            assert "a collective failed" in str(trainer._lost(error, watch))
    finally:
        close_distributed()
    said = (tmp_path / "logs" / "stuck_rank_0.txt").read_text()
    assert "rank 0 on" in said
    assert "step 1\nbecause of RuntimeError: [gloo/transport" in said
    assert "gloo:broadcast" in said


@pytest.mark.parametrize("number", [1, 3])
def test_what_an_aborted_collective_gave_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Nor is it written down: neither the first one of a step, for its loss, nor the third, for the norm; DeepSpeed has
    one in between."""
    file = write_config(tmp_path / "c.yaml", write_corpus(tmp_path / "text"))
    config = load_config(file, OVERRIDES)
    init_distributed(config)
    try:
        trainer = Trainer(config, tmp_path, train.prepare_data(config))
        before = trainer.engine.gather_weights()
        aborted, calls = threading.Event(), 0
        monkeypatch.setattr(health, "_aborted", aborted)
        all_reduce = dist.all_reduce

        def cut_short(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                aborted.set()
            return all_reduce(*arguments, **options)

        monkeypatch.setattr(dist, "all_reduce", cut_short)
        with pytest.raises(LostRank, match="the communicators were aborted"):
            trainer.run()
        assert calls == number
        after = trainer.engine.gather_weights()
        assert all(torch.equal(before[name], after[name]) for name in before)
    finally:
        close_distributed()
    assert not [record for record in read_metrics(tmp_path / "metrics.jsonl") if record["kind"] == "step"]


def test_on_a_gpu_the_own_time_is_the_devices_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        """Two seconds apart."""

        def __init__(self, enable_timing: bool) -> None: ...
        def record(self) -> None: ...
        def elapsed_time(self, other: Any) -> float:
            return 2000.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    pace = Pace(0, 1, 1.5, 8, cuda=True)
    for _ in range(2):
        with pace:
            time.sleep(0.05)
        with pace:
            time.sleep(0.05)
        shares = pace.share()
        pace.heard(shares)
    assert shares == [4.0]  # of the step before


def test_each_start_meets_apart_from_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a store in which ranks of earlier starts have left what they said."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    server.set("ava_fast/asks/1", "a rank that is gone")
    server.set("exception_dump", "nccl's watchdogs end the process that finds this")
    seen: list[list[bytes]] = []
    for start in range(2):
        stores: dict[int, Any] = {}

        def join(rank: int, stores: dict[int, Any] = stores) -> None:
            stores[rank] = meet(rank, 3, timedelta(seconds=20))

        ranks = [threading.Thread(target=join, args=(rank,)) for rank in range(3)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        assert not any(stores[rank].check(["said"]) for rank in range(3))
        assert not server.check(["exception_dump"])
        stores[0].set("said", str(start))
        seen.append([stores[rank].get("said") for rank in range(3)])
    assert seen == [[b"0"] * 3, [b"1"] * 3]
    with pytest.raises(dist.DistError, match="ranks 1 have not come"):
        meet(0, 2, timedelta(seconds=0.1))


@pytest.mark.parametrize(
    ("said", "well", "words"),
    [
        ({}, True, "45 °C of 90"),
        ({"errors": 2}, False, "2 memory errors that were not corrected"),
        ({"rows": (0, 1, 0, 1)}, False, "memory rows that could not be replaced"),
        ({"rows": (0, 1, 1, 0)}, True, "a reset is pending"),
        ({"reasons": 8}, True, "slowed by heat"),
        ({"errors": None, "rows": None, "celsius": None}, True, "no fault is known"),
    ],
)
def test_a_gpu_is_judged_by_what_nvml_says(said: dict[str, Any], well: bool, words: str) -> None:
    """There is none here: the words are those of pynvml's functions."""

    class NVMLError(Exception):
        pass

    def answer(name: str, usual: Any) -> Any:
        def ask(*_: Any) -> Any:
            if (value := said.get(name, usual)) is None:
                raise NVMLError
            return value

        return ask

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        NVML_MEMORY_ERROR_TYPE_UNCORRECTED=1,
        NVML_VOLATILE_ECC=0,
        NVML_TEMPERATURE_GPU=0,
        NVML_TEMPERATURE_THRESHOLD_SLOWDOWN=1,
        nvmlClocksThrottleReasonHwThermalSlowdown=8,
        nvmlClocksThrottleReasonSwThermalSlowdown=16,
        nvmlClocksThrottleReasonHwPowerBrakeSlowdown=32,
        nvmlDeviceGetTotalEccErrors=answer("errors", 0),
        nvmlDeviceGetRemappedRows=answer("rows", (0, 0, 0, 0)),
        nvmlDeviceGetTemperature=answer("celsius", 45),
        nvmlDeviceGetTemperatureThreshold=answer("limit", 90 if said.get("celsius", 45) else None),
        nvmlDeviceGetCurrentClocksThrottleReasons=answer("reasons", 0),
    )
    row = machine.gpu_row(nvml, None)
    assert row.ok is well
    assert words in row.detail
