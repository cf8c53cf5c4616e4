"""The range test: its smoothing and suggestions on curves that are known, and the command on a real model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
import yaml
from corpus import write_config, write_corpus
from distributed import run_on_ranks
from launch import launch, only_run

from ava_fast import cli, find_lr, train, trainer
from ava_fast.config import Config, load_config
from ava_fast.engine import close_distributed, init_distributed
from ava_fast.errors import UserError
from ava_fast.find_lr import RangeTest, savitzky_golay, set_in_file


def test_smoothing_keeps_polynomials_and_has_the_published_weights() -> None:
    x = np.arange(30.0)
    for order in (1, 2, 3):
        values = sum(((-1) ** power) * x**power / 10**power for power in range(order + 1))
        np.testing.assert_allclose(savitzky_golay(values, 9, order), values, rtol=1e-9, atol=1e-12)
    impulse = np.zeros(21)
    impulse[10] = 35.0
    np.testing.assert_allclose(savitzky_golay(impulse, 5, 2)[8:13], [-3, 12, 17, 12, -3], atol=1e-12)


def test_suggestions_of_a_curve_that_is_known() -> None:
    rates = np.geomspace(1e-6, 1.0, 200)
    at = np.log10(rates)
    losses = 6 - 2 / (1 + np.exp(-3 * (at + 3))) + np.exp(3 * (at + 0.3))  # falls fastest at 1e-3, turns about 0.1
    generator = np.random.default_rng(0)
    test = RangeTest(list(rates), list(losses + generator.normal(0, 0.02, 200)), diverged=True)
    suggested = test.suggestions()
    assert suggested["steepest"] == pytest.approx(1e-3, rel=0.5)
    assert suggested["minimum"] == pytest.approx(rates[np.argmin(losses)], rel=0.6)
    assert suggested["tenth"] == pytest.approx(suggested["minimum"] / 10)
    losses[150] *= 20  # one bad step, where the curve has turned: beside it nothing dips, and nothing else moves
    spiked = RangeTest(list(rates), list(losses), diverged=True)
    assert spiked.smooth().min() == pytest.approx(min(losses), rel=0.05)
    assert spiked.suggestions()["minimum"] == pytest.approx(rates[np.argmin(losses)], rel=0.6)


def test_of_two_minima_the_first_counts_unless_the_second_is_lower_by_more_than_noise() -> None:
    rates = np.geomspace(1e-6, 1.0, 200)
    at = np.log10(rates)
    for depth, lowest in ((2.02, 1e-3), (2.5, 1e-1)):
        losses = 6 - 2 * np.exp(-2 * (at + 3) ** 2) - depth * np.exp(-2 * (at + 1) ** 2)
        suggested = RangeTest(list(rates), list(losses), diverged=True).suggestions()
        assert suggested["minimum"] == pytest.approx(lowest, rel=0.3)
        assert suggested["steepest"] < 1e-1


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            "# mine\ntraining:\n  seed: 1  # one\n  learning_rate: 4.0e-3  # peak\n",
            "# mine\ntraining:\n  seed: 1  # one\n  learning_rate: 0.00123  # peak\n",
        ),
        ("training:\n    seed: 1\n", "training:\n    learning_rate: 0.00123\n    seed: 1\n"),
        ("training: {seed: 1}\n", "training: {learning_rate: 0.00123, seed: 1}\n"),
        ("model:\n  num_layers: 2\n", "model:\n  num_layers: 2\n\ntraining:\n  learning_rate: 0.00123\n"),
        ("", "training:\n  learning_rate: 0.00123\n"),
    ],
)
def test_a_rate_is_put_into_a_file_and_the_rest_stays(before: str, after: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(before)
    set_in_file(path, "training", "learning_rate", 1.2345e-3)
    assert path.read_text() == after
    assert load_config(path).training.learning_rate == 0.00123
    assert list(tmp_path.iterdir()) == [path]


def test_an_empty_section_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("training:\n")
    with pytest.raises(UserError, match="training is empty"):
        set_in_file(tmp_path / "c.yaml", "training", "learning_rate", 1e-3)


def test_the_command_finds_writes_and_touches_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_config(tmp_path / "c.yaml", write_corpus(tmp_path / "text"), training={"max_steps": 2})
    assert launch(file).returncode == 0
    run = only_run(file)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    arguments = ["find-lr", "--config", str(file), "--steps", "60", "--output", str(tmp_path / "found" / "lr.png")]
    assert cli.main([*arguments, "--from", str(run), "--write", "tenth"]) == 0
    said = capsys.readouterr().out
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert only_run(file) == run
    found = json.loads((tmp_path / "found" / "lr.json").read_text())
    assert found["rates"][0] == pytest.approx(1e-6)
    assert found["rates"][1] / found["rates"][0] == pytest.approx(found["rates"][11] / found["rates"][10])
    assert min(found["losses"]) < found["losses"][0] - 0.5
    written = yaml.safe_load(file.read_text())["training"]["learning_rate"]
    assert written == pytest.approx(found["suggested"]["tenth"], rel=5e-3)
    assert f"learning_rate is now {written:.3g}" in said
    assert (tmp_path / "found" / "lr.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--start-lr", "1", "--end-lr", "0.1"], "the first below the second"),
        (["--steps", "5"], "at least 20"),
        (["--override", "training.sed=1"], "closest valid key: training.seed"),
    ],
)
def test_what_cannot_be_tested_is_refused(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_config(tmp_path / "c.yaml", write_corpus(tmp_path / "text"))
    assert cli.main(["find-lr", "--config", str(file), *arguments]) == 2
    assert says in capsys.readouterr().err


def range_of(file: str) -> tuple[list[float], str, bool]:
    """Runs on every rank → the losses, the folder that it had, and whether that is there afterwards."""
    config = load_config(file)
    init_distributed(config)
    folders = []

    class Noted(trainer.Trainer):
        def __init__(self, config: Config, run_folder: Path, *others: Any):
            folders.append(run_folder)
            super().__init__(config, run_folder, *others)

    trainer.Trainer = Noted  # type: ignore[misc]
    found = find_lr.range_test(config, train.prepare_data(config), 1e-5, 1e-2, 4, None)
    dist.barrier()
    close_distributed()
    return found.losses, str(folders[0]), folders[0].exists()


def test_all_ranks_have_one_folder(tmp_path: Path) -> None:
    """Through it goes a step that does not fit into memory; nothing is left of it."""
    file = write_config(tmp_path / "c.yaml", write_corpus(tmp_path / "text"))
    first, second = run_on_ranks(range_of, 2, str(file))
    assert first == second
    assert len(first[0]) == 4
    assert not first[2]
