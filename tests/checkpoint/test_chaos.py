"""Quick forms of `make chaos`: killed runs, damaged checkpoints, disks that fail."""

import shutil
from pathlib import Path

import pytest

from bench import chaos

STEPS = 10


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> chaos.Runs:
    return chaos.undisturbed(tmp_path_factory.mktemp("chaos"), STEPS)


def test_two_killed_ranks_end_to_the_bit_as_two_undisturbed_ones(plain: chaos.Runs, tmp_path: Path) -> None:
    shutil.copytree(plain.folder.parent / "data", tmp_path / "data")
    figures = chaos.kills(tmp_path, count=2, steps=STEPS, plain=plain)
    assert sum(figures["kills"].values()) == 2
    assert any("checkpoint was written" in moment or "after a save" in moment for moment in figures["kills"])
    assert figures["listed_checkpoints_read_whole"] > 0


def test_every_damage_to_any_file_is_found_and_the_older_checkpoint_taken(plain: chaos.Runs, tmp_path: Path) -> None:
    figures = chaos.corruptions(tmp_path, count=60, plain=plain)
    assert figures["found"] == 60
    assert figures["files"] == 8
    assert len(figures["damages"]) == 7


@pytest.mark.skipif(shutil.which("cc") is None, reason="the fault layer is built with a C compiler")
def test_a_full_disk_stops_the_run_in_one_line_and_breaks_nothing(plain: chaos.Runs, tmp_path: Path) -> None:
    shutil.copytree(plain.folder.parent / "data", tmp_path / "data")
    (figures,) = chaos.disks(tmp_path, ["full"], ranks=1).values()
    assert figures["listed_checkpoints_read_whole"] >= 1
    assert figures["says"].startswith("the checkpoint could not be written ([Errno 28] No space left on device); the")
