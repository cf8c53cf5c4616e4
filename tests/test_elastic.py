"""torchrun starts the workers anew: the run goes on by itself in its folder, with the weights of one that was never
disturbed, at the world size that there is, or stays ended."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus import write_config, write_corpus
from launch import only_run, records

from ava_fast import train
from ava_fast.checkpoint import store
from ava_fast.checkpoint.shards import read_weights
from ava_fast.distributed import elastic
from ava_fast.observe.run import read_metrics
from ava_fast.trainer import Trainer
from bench import chaos_elastic

SHORT = {"training": {"max_steps": 6}, "checkpoint": {"save_steps": 2, "save_total_limit": None, "asynchronous": False}}
QUIET = {"evaluation": {"eval_steps": 0, "ngram_baselines": False, "prompt": None, "max_sequences": 7}}


class Killed(BaseException):
    """As if the process had been: nothing catches it."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("elastic") / "text")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is torchrun's, and whatever trains in it has it for an agent."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")


def start(config: Path, *arguments: str, die_in: int | None = None) -> int:
    """One start of the only worker → its exit code. `die_in`: it is killed in this step."""
    step = Trainer._step

    def deadly(trainer: Trainer) -> Any:
        if trainer.step + 1 == die_in:
            raise Killed
        return step(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", deadly)
        return train.main(["--config", str(config), *arguments])


def killed(config: Path, *arguments: str, step: int) -> None:
    with pytest.raises(Killed):
        start(config, *arguments, die_in=step)


def restarts(run: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "restart"]


def test_a_start_that_follows_another_goes_on_in_its_folder_from_what_verifies(
    corpus: Path, tmp_path: Path, started: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "straight" / "c.yaml", corpus, **SHORT, **QUIET)
    assert start(config) == 0
    straight = only_run(config)

    config = write_config(tmp_path / "c.yaml", corpus, **SHORT, **QUIET)
    killed(config, step=2)  # before there is a checkpoint
    killed(config, step=6)
    (run,) = (tmp_path / "outputs" / "runs").iterdir()
    damaged = run / "checkpoints" / "step_4" / "rank_0.json"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    capsys.readouterr()
    assert start(config, "--resume", "latest") == 0  # what the command says is for the first start alone
    said = capsys.readouterr().out
    assert "started anew after step 5: the workers were ended without a word" in said
    assert "rank_0.json: is not what was written" in said
    assert f"resuming after step 2 from {run / 'checkpoints' / 'step_2'}" in said
    assert only_run(config) == run
    assert records(run, "step") == records(straight, "step")
    weights = [read_weights(folder / "checkpoints" / "step_6" / "engine") for folder in (run, straight)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    assert [(r["restarts"], r["lost_step"], r["step"]) for r in restarts(run)] == [(1, 1, 0), (2, 5, 2)]
    report = (run / "report.md").read_text()
    assert "| restarts | 2, which cost 4 steps done again |" in report
    assert "| 5 | 2 | 1 |" in report

    assert start(config) == 0  # torchrun would do so had another worker failed while this one left
    assert f"{run} has ended for good: it has finished" in capsys.readouterr().err
    assert only_run(config) == run


def test_another_torchrun_starts_another_run(
    corpus: Path, tmp_path: Path, started: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path / "c.yaml", corpus, **SHORT, **QUIET)
    killed(config, step=2)
    monkeypatch.setattr(elastic, "agent", lambda: "another")
    killed(config, step=2)
    assert len(list((tmp_path / "outputs" / "runs").iterdir())) == 2


def test_what_lies_ahead_of_the_checkpoint_that_was_asked_for_is_not_gone_on_from(
    corpus: Path, tmp_path: Path, started: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "c.yaml", corpus, **SHORT, **QUIET)
    assert start(config) == 0
    checkpoints = only_run(config) / "checkpoints"
    again = ["--resume", str(checkpoints / "step_2"), "--override", "training.learning_rate=0.02"]
    monkeypatch.setattr(elastic, "agent", lambda: "another")
    killed(config, *again, step=4)
    killed(config, *again, step=6)
    assert start(config, *again) == 0
    said = capsys.readouterr().out
    assert said.count(f"resuming after step 2 from {checkpoints / 'step_2'}") == 2
    assert said.count(f"resuming after step 4 from {checkpoints / 'step_4'}") == 1
    assert store.read_manifest(checkpoints / "step_6")["config"]["training"]["learning_rate"] == 0.02


def test_a_run_that_was_stopped_for_good_stays_so(
    corpus: Path, tmp_path: Path, started: None, capsys: pytest.CaptureFixture[str]
) -> None:
    hopeless = {"training": {"learning_rate": 1e37, "warmup_steps": 0}}
    config = write_config(tmp_path / "c.yaml", corpus, **hopeless, stability={"max_skips": 1, "max_rollbacks": 0})
    assert start(config) == 3
    why = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("stopped after step"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert start(config) == 3
    assert f"{only_run(config)} has ended for good: {why}" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert json.loads((only_run(config) / elastic.NOTE).read_text())["ended"][0] == 3


@pytest.fixture
def disturbed(corpus: Path, tmp_path: Path) -> Path:
    short = {"training": {"max_steps": 10}, "checkpoint": {"save_steps": 2}, "moe": {"jitter": 0.0}}
    return write_config(tmp_path / "c.yaml", corpus, **short, **QUIET, deepspeed={"zero_stage": 2})


def test_a_node_is_lost_and_another_joins_and_every_sequence_is_seen_once(disturbed: Path) -> None:
    figures = chaos_elastic.scale(disturbed)
    assert figures["sequences"] == 10 * 8
    assert 0 <= figures["steps_redone"] <= 3


def test_a_rank_that_is_stopped_is_found_and_replaced(disturbed: Path) -> None:
    figures = chaos_elastic.stopped(disturbed, heartbeat=6)  # with less a busy machine has ranks look dead
    assert figures["sequences"] == 10 * 8
    run = only_run(disturbed)
    (record,) = (run / "logs").glob("stuck_rank_*.txt")
    assert record.name == "stuck_rank_0.txt"
    for words in ("rank 1: no sign of life for 6 s", "gloo:all_reduce", "not done", "in _step"):
        assert words in record.read_text()
    assert "rank 1 hung: no sign of life for 6 s" in (run / "report.md").read_text()


def test_nodes_that_could_not_join_are_warned_of_at_the_start(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path / "c.yaml", corpus, training={"max_steps": 1}, **QUIET)
    monkeypatch.delenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", raising=False)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--rdzv-backend=c10d"]
    torchrun += ["--rdzv-endpoint=localhost:0", "--rdzv-conf=last_call_timeout=1", "-m", "ava_fast.train"]
    done = subprocess.run([*torchrun, "--config", str(config)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (line,) = (only_run(config) / "logs" / "errors.log").read_text().splitlines()
    assert "torchrun --nnodes=1:2: a node that joins later" in line
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in line
