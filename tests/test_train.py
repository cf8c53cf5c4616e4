"""Whole runs through the public command: golden losses, resuming to the bit, interruption, and every refusal."""

import json
import math
import re
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus import write_config, write_corpus
from launch import interrupt, launch, only_run, records

from ava_fast import cli, train
from ava_fast.config import load_config
from ava_fast.data.prepare import prepare
from ava_fast.data.shards import read_index
from ava_fast.data.tokenizer import load_tokenizer
from ava_fast.model.huggingface import write_model
from ava_fast.model.transformer import Transformer

# World size → the loss of each step of the configuration in corpus.py. What changes these numbers changes training:
# say why when you replace them.
GOLDEN = {
    1: [
        5.7263,
        5.6022,
        5.2204,
        4.8623,
        4.5906,
        4.3585,
        4.1897,
        3.9666,
        3.8655,
        3.7842,
        3.7116,
        3.642,
        3.6679,
        3.6863,
        3.6218,
        3.6036,
        3.6134,
        3.5477,
        3.5601,
        3.5556,
    ],
    2: [
        5.7263,
        5.6024,
        5.219,
        4.8622,
        4.5888,
        4.3526,
        4.1831,
        3.9601,
        3.8577,
        3.778,
        3.7073,
        3.6358,
        3.664,
        3.6859,
        3.6207,
        3.6017,
        3.6125,
        3.5464,
        3.5596,
        3.5539,
    ],
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture(scope="module")
def straight(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """World size → the folder of a run of 20 steps that nothing disturbed."""
    runs = {}
    for ranks in (1, 2):
        config = write_config(tmp_path_factory.mktemp(f"straight{ranks}") / "c.yaml", corpus)
        finished = launch(config, ranks=ranks)
        assert finished.returncode == 0, finished.stdout
        runs[ranks] = only_run(config)
    return runs


def copy_run(run: Path, into: Path) -> Path:
    return Path(shutil.copytree(run, into / run.name))


@pytest.mark.parametrize("ranks", [1, 2])
def test_golden_losses(ranks: int, straight: dict[int, Path]) -> None:
    losses = [record["loss"] for record in records(straight[ranks], "step")]
    assert losses == pytest.approx(GOLDEN[ranks], rel=1e-4)  # to the bit only on one kind of CPU


def test_a_run_leaves_what_it_promises(straight: dict[int, Path]) -> None:
    run = straight[2]
    for name in ("config.yaml", "report.md", "loss.png", "logs/training.log", "logs/errors.log", "logs/debug.log"):
        assert (run / name).is_file(), name
    assert (run / "logs" / "errors.log").read_text() == ""
    assert "held-out loss" in (run / "logs" / "evaluation.log").read_text()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best", "latest", "step_10", "step_20"]
    steps = records(run, "step")
    assert [step["step"] for step in steps] == list(range(1, 21))
    assert steps[-1]["tokens"] == 20 * 2 * 4 * 32
    assert all(step["grad_norm"] > 0 for step in steps)
    assert steps[-1]["loss"] < steps[0]["loss"] - 1.0
    assert [evaluation["step"] for evaluation in records(run, "evaluation")] == [10, 20]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["bigram"] < summary["unigram"]
    assert summary["continuation"]


def test_the_number_of_ranks_changes_nothing_but_rounding(corpus: Path, tmp_path: Path) -> None:
    # Router noise differs by rank, and the balance loss is not linear in the batch: both off.
    losses = []
    for ranks in (1, 2):
        config = write_config(
            tmp_path / str(ranks) / "c.yaml",
            corpus,
            moe={"jitter": 0.0, "aux_loss_weight": 0.0},
            training={"max_steps": 6},
        )
        assert launch(config, ranks=ranks).returncode == 0
        run = only_run(config)
        losses.append([record["loss"] for kind in ("step", "evaluation") for record in records(run, kind)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(("ranks", "number"), [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_interrupted_and_resumed_equals_undisturbed_to_the_bit(
    ranks: int, number: signal.Signals, corpus: Path, straight: dict[int, Path], tmp_path: Path
) -> None:
    config = write_config(tmp_path / "c.yaml", corpus)
    code = interrupt(config, ranks=ranks, after_step=6, number=number)
    if ranks == 1:  # torchrun has a code of its own
        assert code == 75
    run = only_run(config)
    stopped_at = int((run / "checkpoints" / "latest").read_text().removeprefix("step_"))
    assert 6 <= stopped_at < 20
    assert len(records(run, "step")) == stopped_at
    assert "| status | interrupted |" in (run / "report.md").read_text()

    resumed = launch(config, "--resume", "latest" if ranks == 2 else str(run), ranks=ranks)
    assert resumed.returncode == 0, resumed.stdout
    assert f"resuming after step {stopped_at}" in resumed.stdout
    assert only_run(config) == run
    for kind in ("step", "evaluation"):
        assert records(run, kind) == records(straight[ranks], kind)


def test_a_finished_run_is_not_redone(straight: dict[int, Path]) -> None:
    run = straight[1]
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    again = launch(run.parents[2] / "c.yaml", "--resume", "latest")
    assert again.returncode == 0
    assert "has finished" in again.stdout
    assert "bigram" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_fresh_optimizer_on_old_weights(straight: dict[int, Path], tmp_path: Path) -> None:
    run = straight[1]
    checkpoint = copy_run(run, tmp_path) / "checkpoints" / "step_10"
    options = ["--override", "training.max_steps=20", "--resume", str(checkpoint), "--reset-optimizer"]
    assert train.main(["--config", str(run / "config.yaml"), *options]) == 0
    resumed, straight_steps = records(tmp_path / run.name, "step"), records(run, "step")
    assert resumed[:10] == straight_steps[:10]
    assert resumed[10]["loss"] == straight_steps[10]["loss"]  # the same weights and the same batch
    assert resumed[11]["loss"] != straight_steps[11]["loss"]


def test_a_missing_run_to_resume_is_said_and_a_new_one_starts(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "c.yaml", corpus, training={"max_steps": 1})
    assert train.main(["--config", str(config), "--resume", "latest", "--experiment-name", "it's"]) == 2
    assert "logging.experiment_name" in capsys.readouterr().err
    assert train.main(["--config", str(config), "--resume", "latest", "--experiment-name", "new"]) == 0
    assert "no run named new to resume; starting a new one" in capsys.readouterr().out
    assert only_run(config).name.endswith("_new")


def test_zero_3_with_recomputation_equals_zero_1(corpus: Path, straight: dict[int, Path], tmp_path: Path) -> None:
    config = write_config(
        tmp_path / "c.yaml", corpus, deepspeed={"zero_stage": 3}, memory={"activation_checkpointing": True}
    )
    finished = launch(config, ranks=2)
    assert finished.returncode == 0, finished.stdout
    run = only_run(config)
    for kind in ("step", "evaluation"):
        ours, reference = records(run, kind), records(straight[2], kind)
        assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in reference], rel=1e-4)
    assert json.loads((run / "summary.json").read_text())["continuation"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_that_fills_up_during_a_save_leaves_nothing_half_written(
    ranks: int, corpus: Path, tmp_path: Path
) -> None:
    changes = {
        "checkpoint": {"save_steps": 2},
        "distributed": {"health_checks": "off"},
    }  # they would refuse such a disk
    config = write_config(tmp_path / "c.yaml", corpus, **changes)

    def limit_file_size() -> None:  # a write past the limit fails as one to a full disk does
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    failed = launch(config, ranks=ranks, preexec_fn=limit_file_size)
    assert failed.returncode == (3 if ranks == 1 else 1)
    lines = [line for line in failed.stdout.splitlines() if "could not be written" in line]
    assert len(lines) == 1, failed.stdout
    (line,) = lines
    assert "step_2: the checkpoint could not be written" in line
    assert "there is no checkpoint yet" in line
    assert "rank0]: Traceback" not in failed.stdout
    assert list((only_run(config) / "checkpoints").iterdir()) == []


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
        ({}, ["--resume", "{step_10}", "--override", "model.qk_norm=true"], "model.qk_norm is True, there it is False"),
        ({}, ["--resume", "{step_10}", "--override", "training.seed=1"], "training.seed was 0, is 1"),
        ({}, ["--resume", "{damaged}"], "rank_0.json: is not what was written"),
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
    shutil.copy(straight[1] / "checkpoints" / "step_20" / "tokenizer.json", tmp_path)
    copied = copy_run(straight[1], tmp_path) / "checkpoints"
    generators = copied / "step_20" / "rank_0.json"
    generators.write_bytes(generators.read_bytes()[:-1] + b"?")
    places = {"tmp": str(tmp_path), "step_10": str(copied / "step_10"), "damaged": str(copied / "step_20")}
    filled = {
        section: {key: value.format(**places) if isinstance(value, str) else value for key, value in body.items()}
        for section, body in changes.items()
    }
    config = write_config(tmp_path / "c.yaml", corpus, **filled)
    checkpoints_before = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}

    assert train.main(["--config", str(config), *(argument.format(**places) for argument in arguments)]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    assert says in captured.out + captured.err
    assert not list(tmp_path.glob("outputs/runs/*/checkpoints"))
    assert not list(tmp_path.rglob("*.tmp*"))
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("*")} == checkpoints_before


def test_a_world_that_cannot_share_the_batch_is_refused_before_anything_starts(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "c.yaml", corpus)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert train.main(["--config", str(config)]) == 2
    assert "training.batch_size: cannot be shared out over 3 ranks" in capsys.readouterr().err


def test_training_that_diverges_is_skipped_cut_and_stopped_with_code_3(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(
        tmp_path / "c.yaml",
        corpus,
        training={"learning_rate": 1e37, "warmup_steps": 0},
        stability={"max_skips": 1, "max_rollbacks": 0},
    )
    assert train.main(["--config", str(config)]) == 3
    out, run = capsys.readouterr().out, only_run(config)
    assert "STOP" in out
    assert f"an emergency checkpoint is {run / 'checkpoints'}" in out
    assert "training.learning_rate (now 1e+37)" in out
    assert [record["verdict"] for record in records(run, "verdict")] == ["SKIP", "CUT", "SKIP", "STOP"]
    report, errors = (run / "report.md").read_text(), (run / "logs" / "errors.log").read_text()
    assert "| status | stopped |" in report
    assert "2 × SKIP, 1 × CUT, 1 × STOP" in report
    assert "| SKIP | the gradient norm is " in report
    assert errors.count("WARNING") >= 4
    assert train.main(["--config", str(config), "--resume", "latest", "--override", "training.learning_rate=0.01"]) == 3


def test_a_poisoned_document_is_passed_over_named_and_replayed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A token that one document alone has, and whose embedding is not a number."""
    text = write_corpus(tmp_path / "text", documents=8, words=300)
    (text / "000.txt").write_text("ba ko \x07\n")
    config = write_config(tmp_path / "c.yaml", text, training={"seed": 52})  # whose twelfth batch has it
    settings = load_config(config)
    shards = prepare(text, settings.data.cache_dir, vocab_size=settings.model.vocab_size)
    (token,) = load_tokenizer(shards).encode("\x07", add_special_tokens=False).ids
    tokens = np.fromfile(shards / "train" / "00000.bin", "<u2")
    (place,) = (tokens == token).nonzero()[0]
    document = int((tokens[:place] == read_index(shards).eos_id).sum())
    weights = Transformer(settings).state_dict()
    weights["embed.weight"][token] = math.nan
    write_model(weights, settings.model_dump(include={"model", "moe"}), tmp_path / "weights", None)

    finished = launch(config, "--override", f"training.init_from={tmp_path / 'weights'}", ranks=2)
    assert finished.returncode == 0, finished.stdout
    run = only_run(config)
    (verdict,) = records(run, "verdict")
    assert verdict["step"] == 11
    assert (verdict["verdict"], verdict["trouble"]) == ("SKIP", "loss not finite")
    (culprit,) = verdict["culprits"]
    assert document in culprit["documents"]
    steps = records(run, "step")
    assert [step["step"] for step in steps] == list(range(1, 21))
    assert steps[-1]["loss"] < steps[0]["loss"] - 1.0
    told = f"rank {culprit['rank']}: documents {', '.join(map(str, culprit['documents'][:5]))}"
    assert told in (run / "logs" / "errors.log").read_text()
    assert told in (run / "report.md").read_text()
    assert "| bad steps | 1 × loss not finite, 1 × SKIP |" in (run / "report.md").read_text()

    (batch,) = (run / "bad_batches").iterdir()
    assert batch.name == f"step_11_at_{12 * 8}"
    assert cli.main(["replay", str(batch)]) == 0  # with the weights of step 10
    by_rank = dict(re.findall(r"rank (\d): loss (\S+) ", said := capsys.readouterr().out))
    assert said.startswith(f"the batch after step 11, with the weights of {run}/checkpoints/step_10\n")
    other = 1 - culprit["rank"]
    assert by_rank[str(culprit["rank"])] == "nan"
    assert 3 < float(by_rank[str(other)]) < 6
    (worst,) = [line for line in said.splitlines() if "sequence" in line and "loss nan" in line]
    assert "\\x07" in worst
    assert said.count("gradient not finite in ") == 1
    assert cli.main(["replay", str(run)]) == 2
    assert "holds no bad batch" in capsys.readouterr().err
