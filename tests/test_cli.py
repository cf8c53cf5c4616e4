"""The commands around a run, as a user strings them together."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from corpus import write_config, write_corpus
from launch import only_run

from ava_fast import cli, summary, train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    config = write_config(folder / "c.yaml", write_corpus(folder / "text"), training={"max_steps": 8})
    assert train.main(["--config", str(config)]) == 0
    return only_run(config)


def continuation(source: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    capsys.readouterr()
    assert cli.main(["generate", str(source), "--prompt", "ba ko", "--max-new-tokens", "12", *options]) == 0
    return capsys.readouterr().out


def test_a_run_exports_loads_in_transformers_and_comes_back(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = continuation(run, capsys)
    exported, imported = tmp_path / "hf", tmp_path / "ours"
    assert cli.main(["export", str(run), "--output", str(exported)]) == 0
    assert "mixtral" in capsys.readouterr().out

    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    model = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    prompt = tokenizer("ba ko", return_tensors="pt", add_special_tokens=False)
    theirs = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]
    assert tokenizer.decode(theirs, skip_special_tokens=True).rstrip("\n") == ours.rstrip("\n")

    assert cli.main(["import", str(exported), "--output", str(imported)]) == 0
    assert continuation(imported, capsys) == ours
    again = tmp_path / "again"
    assert cli.main(["export", str(imported), "--output", str(again)]) == 0
    assert (again / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()


def test_what_was_trained_with_kernels_for_a_gpu_generates_on_the_host(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = continuation(run, capsys)
    weights, config, tokenizer = cli.read_source(run)
    for_gpu = config.model_copy(update={"training": config.training.model_copy(update={"attention_backend": "hopper"})})
    monkeypatch.setattr(cli, "read_source", lambda path: (weights, for_gpu, tokenizer))
    assert continuation(run, capsys) == ours
    (shards,) = {file.parent for file in run.parents[2].rglob("index.json")}
    assert summary._continuation(for_gpu, weights, shards) == summary._continuation(config, weights, shards)


def test_training_starts_from_imported_weights(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", str(run), "--output", str(tmp_path / "hf")]) == 0
    assert cli.main(["import", str(tmp_path / "hf"), "--output", str(tmp_path / "ours")]) == 0
    options = [f"training.init_from={tmp_path}/ours", "training.max_steps=1", "training.learning_rate=1e-9"]
    overrides = [part for option in options for part in ("--override", option)]
    assert train.main(["--config", str(run / "config.yaml"), *overrides]) == 0
    old, new = run / "logs" / "evaluation.log", sorted(run.parent.iterdir())[-1] / "logs" / "evaluation.log"
    assert old.read_text().split("|")[-2] == new.read_text().split("|")[-2]  # the same held-out loss

    wrong = ["--override", "moe.top_k=1"]
    assert train.main(["--config", str(run / "config.yaml"), *overrides, *wrong]) == 2
    assert "moe.top_k is 1, there it is 2" in capsys.readouterr().out


def test_generation_is_seeded(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    warm = ["--temperature", "2.0"]
    assert continuation(run, capsys, *warm) == continuation(run, capsys, *warm)
    assert continuation(run, capsys, *warm) != continuation(run, capsys, *warm, "--seed", "1")
    assert continuation(run, capsys).startswith("ba ko")


def test_prepared_shards_are_trained_on_directly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_corpus(tmp_path / "text")
    output = str(tmp_path / "shards")
    assert cli.main(["prepare", "--data-dir", str(text), "--output", output, "--vocab-size", "300"]) == 0
    printed = capsys.readouterr().out
    assert "held-out tokens" in printed
    (folder,) = Path(output).iterdir()
    assert printed.splitlines()[-1] == f"train on it with --data-dir {folder}"
    config = write_config(tmp_path / "c.yaml", text, training={"max_steps": 1})
    assert train.main(["--config", str(config), "--data-dir", str(folder)]) == 0
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "{tmp}", "--prompt", "x"], "holds no checkpoint"),
        (["generate", "{run}", "--prompt", ""], "--prompt"),
        (["export", "{run}", "--output", "{run}"], "{run}"),
        (["export", "{run}", "--output", "{tmp}/x", "--architecture", "qwen3_moe"], "qk_norm"),
        (["import", "{tmp}", "--output", "{tmp}/x"], "config.json"),
        (["prepare", "--data-dir", "{tmp}/nowhere", "--output", "{tmp}/x"], "nowhere"),
        (["prepare", "--output", "{tmp}/x", "--near-duplicates", "0"], "--near-duplicates: 0.0 cannot be"),
        (["prepare", "--output", "{tmp}/x", "--processes", "0"], "--processes: 0 is too few"),
        (["tokenizer", "train", "--output", "{tmp}/x", "--vocab-size", "256"], "256 is too small"),
        (["tokenizer", "check", "{tmp}"], "neither a tokenizer.json nor"),
        (["download", "--dataset", "nothing", "--output", "{tmp}/x"], "'nothing' is neither owner/name nor one of"),
        (["preflight", "--config", "{tmp}/nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_code_2(
    arguments: list[str], says: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([argument.format(run=run, tmp=tmp_path) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert says.format(run=run) in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_the_command_is_installed() -> None:
    command = [str(Path(sys.executable).parent / "ava-fast"), "--help"]
    shown = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=True).stdout
    for name in ("preflight", "prepare", "tokenizer", "validate", "download", "generate", "export", "import"):
        assert name in shown
