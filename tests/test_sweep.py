"""Sweeps: every combination once, compared, and gone on with after an interruption."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from corpus import write_config, write_corpus

from ava_fast import cli
from ava_fast.errors import UserError
from ava_fast.sweep import trials


def test_every_combination_the_last_changing_fastest(tmp_path: Path) -> None:
    config = str(write_config(tmp_path / "c.yaml", tmp_path))
    found = trials(config, ["training.learning_rate=1e-3,3e-3", "training.batch_size=8,16"], [], tmp_path)
    assert [trial.name for trial in found] == [
        "learning_rate=1e-3, batch_size=8",
        "learning_rate=1e-3, batch_size=16",
        "learning_rate=3e-3, batch_size=8",
        "learning_rate=3e-3, batch_size=16",
    ]
    assert found[0].folder.name == "training.learning_rate=1e-3_training.batch_size=8"
    (quoted, other) = trials(config, ["evaluation.prompt='a,b',c"], [], tmp_path)
    assert (quoted.overrides, other.overrides) == (["evaluation.prompt='a,b'"], ["evaluation.prompt=c"])


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (["training.learning_rate"], "is not section.key=value,value"),
        (["training.learning_rate=1,,2"], "is not section.key=value,value"),
        (["training.seed=1", "training.seed=2"], "set twice"),
        (["training.learning_rate=1e-3,zero"], "given: 'zero'"),
        (["evaluation.prompt=a b,a_b"], "differ only"),
    ],
)
def test_what_is_no_sweep_is_refused(sets: list[str], says: str, tmp_path: Path) -> None:
    config = str(write_config(tmp_path / "c.yaml", tmp_path))
    with pytest.raises(UserError, match=says):
        trials(config, sets, [], tmp_path)


def test_a_sweep_is_interrupted_gone_on_with_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_config(tmp_path / "c.yaml", write_corpus(tmp_path / "text"), training={"max_steps": 6})
    arguments = ["sweep", "--config", str(file), "--set", "training.learning_rate=1e-6,0.01"]
    arguments += ["--output", str(tmp_path / "sweep")]
    output = tmp_path / "output"
    process = subprocess.Popen(
        [sys.executable, "-m", "ava_fast.cli", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=output.open("wb"),
        stderr=subprocess.STDOUT,
    )
    slow = tmp_path / "sweep" / "training.learning_rate=1e-6"
    while not list(slow.glob("runs/run_*/report.md")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 75, output.read_text()
    ran = list(slow.glob("runs/run_*"))
    time.sleep(1.1)  # a run anew would have another name

    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert list(slow.glob("runs/run_*")) == ran
    table = [line for line in said.splitlines() if line.startswith("|")]
    assert table[0] == "| training.learning_rate | held-out loss | tokens/s |"
    assert [line.split(" | ")[0] for line in table[2:]] == ["| 0.01", "| 1e-6"]  # best first
    assert (tmp_path / "sweep" / "sweep.md").read_text().count("\n| ") == 3
    assert (tmp_path / "sweep" / "sweep.png").stat().st_size > 10_000

    began = time.monotonic()
    assert cli.main(arguments) == 0
    assert "2 of them finished before" in capsys.readouterr().out
    assert time.monotonic() - began < 30
    assert list(slow.glob("runs/run_*")) == ran


def test_a_run_that_fails_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_config(tmp_path / "c.yaml", tmp_path / "nowhere")
    arguments = ["sweep", "--config", str(file), "--set", "training.seed=1", "--output", str(tmp_path / "sweep")]
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert "seed=1 | failed, exit code 2" in captured.out
    assert "1 of 1 runs did not finish" in captured.err
    assert "nowhere" in (tmp_path / "sweep" / "training.seed=1" / "output.log").read_text()
