"""A rank that fails while the others wait for it in a collective: every rank ends soon and says why, and a resumed run
goes on as if it had never seen the batch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from corpus import write_config, write_corpus
from distributed import run_on_ranks
from failing_run import sabotage
from launch import TIMEOUT, only_run

from ava_fast.checkpoint import store
from ava_fast.checkpoint.shards import read_weights
from ava_fast.config import Config, load_config
from ava_fast.data.prepare import prepare
from ava_fast.engine import close_distributed, init_distributed
from ava_fast.errors import LostRank
from ava_fast.observe.run import read_metrics
from ava_fast.trainer import Trainer

ENDED = 40.0  # seconds in which a rank must have left; a collective would wait for 600
BATCH, STEPS = 8, 6  # sequences of a step, and steps


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lost")


@pytest.fixture(scope="module")
def file(root: Path) -> Path:
    return write_config(root / "c.yaml", write_corpus(root / "text"))


@pytest.fixture(scope="module")
def shards(file: Path) -> str:
    data = load_config(file).data
    return str(prepare(data.data_dir, data.cache_dir, vocab_size=load_config(file).model.vocab_size))


def settings(file: Path | str, stage: int = 3) -> Config:
    overrides = [f"deepspeed.zero_stage={stage}", f"training.max_steps={STEPS}", "checkpoint.save_steps=2"]
    return load_config(file, [*overrides, "evaluation.eval_steps=0"])


def torchrun(file: Path, *what: str, stage: int, restarts: int = 0) -> tuple[int, str]:
    """A run that is to fail → torchrun's exit code, and what it printed. Raises TimeoutExpired if it hangs."""
    again = f"--max-restarts={restarts}"
    script = Path(__file__).with_name("failing_run.py")
    overrides = [f"--override=deepspeed.zero_stage={stage}", "--override=checkpoint.save_steps=2"]
    overrides += ["--override=evaluation.eval_steps=0", f"--override=training.max_steps={STEPS}"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", again, str(script)]
    done = subprocess.run(
        [*command, *what, "--config", str(file), *overrides],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
    )
    return done.returncode, done.stdout


def go_on(file: str, shards: str, resumed: Path, clean: Path) -> dict[str, Any]:
    """Runs on every rank: the failed run resumed, and one that never sees the batch at which it failed."""
    config = settings(file)
    init_distributed(config)
    trainer = Trainer(config, resumed, Path(shards))
    trainer.load(store.list_checkpoints(resumed / "checkpoints")[0])
    seen: dict[str, Any] = {"from": trainer.step}
    trainer.run()
    seen["resumed"] = trainer.engine.gather_weights()
    clean.mkdir(exist_ok=True)
    trainer = Trainer(config, clean, Path(shards))
    trainer.loader.avoid = [(3 * BATCH, 4 * BATCH)]
    trainer.run()
    seen["clean"] = trainer.engine.gather_weights()
    dist.barrier()
    close_distributed()
    return seen


def test_an_exception_in_forward_under_zero_3_costs_its_batch_and_the_run_goes_on(
    file: Path, shards: str, root: Path
) -> None:
    """By itself where torchrun may start the workers anew, else with --resume."""
    code, output = torchrun(file, "forward", "1", "3", stage=3, restarts=1)
    run = only_run(file)
    said = (run / "logs" / "errors.log").read_text()
    assert code == 0
    for words in ("stopped in step 4: rank 1 failed: ValueError: no such luck (failing_run.py:", "--resume latest"):
        assert words in said
        assert words in output
    assert f"the newest checkpoint is {run / 'checkpoints' / 'step_2'}" in said
    (restart,) = [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "restart"]
    assert (restart["lost_step"], restart["step"]) == (3, 2)
    assert "| status | finished |" in (run / "report.md").read_text()
    assert "rank 1 failed: ValueError: no such luck" in (run / "report.md").read_text()
    assert store.avoided(run / "checkpoints") == [(3 * BATCH, 4 * BATCH)]

    shutil.copytree(run / "checkpoints" / "step_2", root / "resumed" / "checkpoints" / "step_2")
    shutil.copy(run / "checkpoints" / "avoid.json", root / "resumed" / "checkpoints")
    seen = run_on_ranks(go_on, 2, str(file), shards, root / "resumed", root / "clean")[0]
    assert seen["from"] == 2
    went_on = read_weights(run / "checkpoints" / f"step_{STEPS}" / "engine")
    for weights in (went_on, seen["resumed"]):
        assert all(torch.equal(weights[name], seen["clean"][name]) for name in seen["clean"])
    losses = {
        folder.name: [(r["step"], r["loss"]) for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "step"]
        for folder in (run, root / "resumed", root / "clean")
    }
    assert losses[run.name] == losses["clean"]
    assert losses["resumed"] == losses["clean"][2:]
    assert len(losses["clean"]) == STEPS


def fail(what: str, rank: int, stage: int, file: str, shards: str, folder: Path) -> tuple[str, int, float]:
    """Runs on every rank → what ended it, with which exit code, and after how many seconds."""
    config = settings(file, stage)
    init_distributed(config)
    folder.mkdir(exist_ok=True)
    trainer = Trainer(config, folder, Path(shards))
    sabotage(trainer, what, rank, 1)
    started_at = time.monotonic()
    try:
        trainer.run()
    except LostRank as error:
        ended = str(error), error.exit_code, time.monotonic() - started_at
        if trainer.engine.rank != rank:
            close_distributed()
        return ended
    raise AssertionError("it did not end")


@pytest.mark.parametrize(("what", "rank", "stage"), [("forward", 0, 3), ("backward", 1, 2)])
def test_no_rank_survives_another(what: str, rank: int, stage: int, file: Path, shards: str, root: Path) -> None:
    ended = run_on_ranks(fail, 2, what, rank, stage, str(file), shards, root / what, timeout=2 * ENDED)
    for error, code, seconds in ended:
        assert f"rank {rank} failed: ValueError: no such luck" in error
        assert code == 3
        assert seconds < ENDED
    assert store.avoided(root / what / "checkpoints") == [(BATCH, 2 * BATCH)]


def test_a_killed_rank_ends_the_others_and_the_run_can_go_on(file: Path, root: Path) -> None:
    other = write_config(root / "killed" / "c.yaml", root / "text", data={"cache_dir": str(root / "data")})
    code, output = torchrun(other, "killed", "1", "3", stage=1)
    assert code != 0
    run = only_run(other)
    said = (run / "logs" / "errors.log").read_text()
    assert "a collective failed, as another rank has died or cannot be reached" in said
    assert "Go on with --resume latest" in output
    assert store.avoided(run / "checkpoints") == []
