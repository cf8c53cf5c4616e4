"""Whole runs through the public command: golden losses, resuming to the bit, interruption, and every refusal."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from corpus import write_config, write_corpus

from ava_fast import train
from ava_fast.observe.run import read_metrics

TIMEOUT = 120

# Loss of each step of the configuration in corpus.py. What changes them changes training: say why when you do.
GOLDEN_1_RANK = [
    5.72262,
    5.52674,
    5.08751,
    4.77536,
    4.51262,
    4.26716,
    4.07409,
    3.9094,
    3.79072,
    3.74695,
    3.68575,
    3.62948,
    3.5091,
    3.56429,
    3.56228,
    3.54541,
    3.51822,
    3.5322,
    3.55334,
    3.50902,
]


@pytest.mark.parametrize(
    ("changes", "arguments", "says"),
    [
        ({"data": {"data_dir": "{tmp}/nowhere"}}, [], "nowhere"),
        ({"data": {"data_dir": "{tmp}/empty"}}, [], "empty"),
        ({"model": {"vocab_size": 280}, "data": {"tokenizer_name": "{tmp}/tokenizer.json"}}, [], "model.vocab_size"),
        ({"data": {"max_length": 100_000}}, [], "data.max_length"),
        ({"logging": {"output_dir": "{tmp}/file"}}, [], "logging.output_dir"),
        ({"training": {"init_from": "{tmp}/empty"}}, [], "empty"),
        ({}, ["--resume", "{tmp}/empty"], "empty: holds no checkpoint"),
        ({}, ["--reset-optimizer"], "--reset-optimizer: needs --resume"),
        ({}, ["--resume", "{run}", "--override", "model.qk_norm=true"], "model.qk_norm is True, there it is False"),
        ({}, ["--resume", "{run}", "--override", "training.seed=1"], "training.seed was 0, is 1"),
        ({}, ["--resume", "{run}", "--override", "deepspeed.zero_stage=0"], "zero_stage"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line_and_leaves_nothing(
    changes: dict[str, Any],
    arguments: list[str],
    says: str,
    corpus: Path,
    straight: dict[int, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    places = {"tmp": str(tmp_path), "run": ""}
    if "{run}" in arguments:
        places["run"] = str(copy_run(straight[1], tmp_path) / "checkpoints" / "step_10")
    if "{tmp}/tokenizer.json" in str(changes):
        checkpoint = straight[1] / "checkpoints" / "step_20"
        (tmp_path / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    filled = {
        section: {k: v.format(**places) if isinstance(v, str) else v for k, v in body.items()}
        for section, body in changes.items()
    }
    config = write_config(tmp_path / "c.yaml", corpus, **filled)
    before = set(tmp_path.rglob("*"))

    assert train.main(["--config", str(config), *(argument.format(**places) for argument in arguments)]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    assert says in captured.out + captured.err
    assert not list(tmp_path.glob("outputs/runs/*/checkpoints"))
    assert not [path for path in tmp_path.rglob("*") if ".tmp" in path.name and path not in before]


def test_a_world_that_cannot_share_the_batch_is_refused_before_anything_starts(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "c.yaml", corpus)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert train.main(["--config", str(config)]) == 2
    assert "training.batch_size: cannot be shared out over 3 ranks" in capsys.readouterr().err


def test_training_that_diverges_stops_with_code_3(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "c.yaml", corpus, training={"learning_rate": 1e37, "warmup_steps": 0})
    assert train.main(["--config", str(config)]) == 3
    assert "was not taken" in capsys.readouterr().out
    assert "| status | stopped |" in (only_run(config) / "report.md").read_text()
