"""`ava-fast checkpoint`, as a person and as a program read it."""

import json
import shutil
from pathlib import Path

import pytest
from corpus import write_config, write_corpus
from launch import only_run

from ava_fast import cli, train
from ava_fast.checkpoint import store
from ava_fast.checkpoint.shards import Shards


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A configuration and its run, with checkpoints at 2, 4 and 6 steps."""
    folder = tmp_path_factory.mktemp("commands")
    changes = {"training": {"max_steps": 6}, "checkpoint": {"save_steps": 2}, "evaluation": {"eval_steps": 4}}
    config = write_config(folder / "c.yaml", write_corpus(folder / "text"), **changes)
    assert train.main(["--config", str(config)]) == 0
    return config, only_run(config)


@pytest.fixture
def run(source: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(source[1], tmp_path / "run"))


def said(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    capsys.readouterr()
    assert cli.main(["checkpoint", *map(str, arguments)]) == code
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_list_and_verify(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "list", run).splitlines()
    assert [line.split()[0] for line in lines] == ["step", "2", "4", "6", "3"]
    assert "best" in lines[2]
    assert "latest" in lines[3]
    assert said(capsys, "verify", run).count(": whole, ") == 3
    damaged = run / "checkpoints" / "step_4" / "engine" / "rank_0.safetensors"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    entries = json.loads(said(capsys, "list", run, "--json"))
    assert [entry["step"] for entry in entries if "damage" not in entry] == [2, 4, 6]  # list does not read it
    out = said(capsys, "verify", run, code=2)
    assert f"{damaged}: is not what was written" in out
    assert out.count(": whole, ") == 2
    assert said(capsys, "verify", run / "checkpoints" / "step_6").count("whole") == 1
    damaged.write_bytes(content[:-1])
    assert "step_4" in said(capsys, "list", run).splitlines()[2]


def test_show_and_diff(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "show", run)
    assert "6 of 6" in out
    assert "1 rank(s), ZeRO-1, fp32" in out
    assert "AdamW after 6 steps" in out
    assert json.loads(said(capsys, "show", run, "--json")) == store.peek(run / "checkpoints" / "step_6")
    same = json.loads(said(capsys, "diff", run, run / "checkpoints" / "step_6", "--json"))
    assert not same["settings"]
    assert all(entry["master"]["different"] == 0 == entry["exp_avg"]["largest"] for entry in same["tensors"])
    changed = json.loads(said(capsys, "diff", run / "checkpoints" / "step_2", run, "--json"))["tensors"]
    first, second = (Shards(run / "checkpoints" / f"step_{step}" / "engine").weights() for step in (2, 6))
    for entry in changed:
        difference = (first[entry["name"]] - second[entry["name"]]).abs().max().item()
        assert entry["master"]["largest"] == pytest.approx(difference, rel=1e-6)
    assert "0 of 17 tensors are the same" in said(capsys, "diff", run / "checkpoints" / "step_2", run)


def test_smoke_tells_weights_that_are_not_those_of_the_recorded_loss(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert said(capsys, "smoke", run).rstrip().endswith("when it was saved: well")
    weights = Shards.weights
    monkeypatch.setattr(Shards, "weights", lambda self: {name: 1.1 * w for name, w in weights(self).items()})
    result = json.loads(said(capsys, "smoke", run, "--json", code=2))
    assert not result["well"]
    assert result["recorded"] != pytest.approx(result["found"], rel=1e-4)


def test_prune(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = run / "checkpoints"
    assert "1 of 3 would go" in said(capsys, "prune", run, "--keep", 1, "--dry-run")
    assert len(store.list_checkpoints(checkpoints)) == 3
    assert json.loads(said(capsys, "prune", run, "--keep", 1, "--json"))["deleted"] == [str(checkpoints / "step_2")]
    assert [path.name for path in store.list_checkpoints(checkpoints)] == ["step_4", "step_6"]  # the best, the latest


def test_what_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for action in ("list", "verify", "show", "smoke"):
        assert "holds no checkpoint" in said(capsys, action, tmp_path, code=2)


def test_a_killed_and_resumed_run_is_proved_the_same_and_an_altered_one_is_not(
    source: tuple[Path, Path], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ava_fast.checkpoint.prove import compare

    out = said(capsys, "prove", "--config", source[0], "--steps", 16, "--keep-runs", tmp_path / "runs")
    assert out == (
        "16 steps, and 8 + SIGKILL + the rest, on 1 rank(s): the same to the bit: 51 tensors, random generators and "
        "data position\n"
    )
    (metrics,) = (tmp_path / "runs" / "killed").glob("runs/*/logs/training.log")
    assert "resuming after step 8" in metrics.read_text()
    found = compare(run / "checkpoints" / "step_4", run / "checkpoints" / "step_6")
    assert len(found["different"]) == 51
    assert found["relative"] > 1e-3
    assert not found["state"]
