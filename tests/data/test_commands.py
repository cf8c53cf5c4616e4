"""The data commands as a user strings them together: what they print, what they leave, their exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from samples import jsonl, parquet, text, write_all
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from ava_fast import cli
from ava_fast.data.shards import read_index
from ava_fast.data.tokenizer import load_tokenizer, round_trip_fault, train_tokenizer
from ava_fast.data.validate import validate


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_validate_tokenizer_prepare_validate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts, tokenizer, output = tmp_path / "texts", tmp_path / "tokenizer", tmp_path / "shards"
    write_all(texts)
    (texts / "second" / "bad.jsonl").write_bytes(jsonl(range(200, 250)) + b"{\n" + jsonl(range(200, 210)))
    code, out, _ = run(capsys, "validate", str(texts))
    assert code == 2
    assert "FAILED  samples     " in out
    assert "second/bad.jsonl line 51: is not JSON" in out

    options = ["--vocab-size", "300", "--min-frequency", "2", "--special-token", "<|user|>"]
    code, out, _ = run(capsys, "tokenizer", "train", "--data-dir", str(texts), "--output", str(tokenizer), *options)
    assert (code, out.startswith(f"{tokenizer}/tokenizer.json: 300 tokens")) == (0, True)
    code, out, _ = run(capsys, "tokenizer", "check", str(tokenizer))
    assert code == 0
    assert "300 tokens, documents end with <|endoftext|> (0)" in out

    arguments = ["--data-dir", str(texts), "--output", str(output), "--vocab-size", "300", "--max-loss", "0.1"]
    code, out, _ = run(capsys, "prepare", *arguments, "--tokenizer", str(tokenizer), "--min-length", "70")
    assert code == 0
    lines = out.splitlines()
    (folder,) = output.iterdir()
    assert lines[0].split() == ["source", "files", "documents", "MB", "tokens"]
    assert [line.split()[0] for line in lines[1:4]] == [".", "first", "second"]
    assert "1 arrow_file, 1 json, 2 jsonl, 1 jsonl.zstd" in lines[3]
    assert "left out 10: a copy of an earlier document, such as second/bad.jsonl: 'document 200" in out
    assert "not read, 1 ×: second/bad.jsonl line 51 is not JSON: Expecting property name" in out
    assert f"every place is in {folder}/skipped.jsonl" in out
    assert lines[-1] == f"train on it with --data-dir {folder}"

    code, out, _ = run(capsys, "validate", str(folder), "--json")
    tree = json.loads(out)
    assert (code, tree["ok"]) == (0, True)
    assert [check["name"] for check in tree["checks"]] == ["exists", "index", "hashes", "documents", "loss"]
    shard = folder / "train" / "00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2] + b"\0\1")
    code, out, _ = run(capsys, "validate", str(folder), "--json")
    assert code == 2
    assert json.loads(out)["checks"][2] == {
        "name": "hashes",
        "ok": False,
        "detail": "6 of 7 files agree: train/00000.bin",
        "values": {"files": 7, "wrong": ["train/00000.bin"]},
    }


def test_the_checklist_of_a_folder_of_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(range(50)) + jsonl(range(5)))
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0")
    checks = {check.name: check for check in validate(tmp_path)}
    assert all(check.ok for check in checks.values())
    assert checks["files"].detail == "1 can be read"
    assert checks["formats"].detail == "1 jsonl"
    assert checks["other files"].detail == "1 are not data: image.png is binary: it holds a NUL byte"
    assert checks["text"].detail.startswith("'text' in 1 files; ")
    assert checks["duplicates"].detail.startswith("5 of 55 sampled documents are copies: in a.jsonl and a.jsonl")
    characters = sum(len(text(n).encode()) for n in [*range(50), *range(5)])
    estimate = int(checks["tokens"].detail.split()[1].strip(",").replace(",", ""))
    assert characters / 6 < estimate < characters / 3
    (tmp_path / "b.parquet").write_bytes(b"PAR1 cut off")
    failed = [check for check in validate(tmp_path) if not check.ok]
    assert [check.name for check in failed] == ["files"]
    assert "b.parquet begins as Parquet but is cut off or damaged" in failed[0].detail
    assert checks["confidence"].detail == "1.0 in every file"
    assert checks["tokens"].values == {"estimate": estimate}
    assert checks["duplicates"].values == {"copies": 5, "of": 55}
    lines = jsonl(range(10)).splitlines(keepends=True)
    (tmp_path / "c.jsonl").write_bytes(b"".join([*lines[:9], b"words\n"]))
    least = next(check for check in validate(tmp_path) if check.name == "confidence")
    assert least.detail.startswith("at least 0.9, of c.jsonl: 9 of 10 samples are JSON objects")
    assert least.values == {"least": 0.9, "path": "c.jsonl"}
    assert [check.ok for check in validate(tmp_path / "nowhere")] == [False]


def test_every_filter_of_the_command_leaves_out_what_it_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    words = text(3, 60)
    rows = ["short", "buy " * 50, "on and on it goes, and " * 9, words, words + " more", words, text(1), text(2)]
    rows += [f"aloud, {text(4)}"]
    (texts / "x.jsonl").write_text("".join(json.dumps({"body": row}) + "\n" for row in rows))
    # The installed command has the folder of its script first on the path, and not the one the user is in.
    (tmp_path / "mine.py").write_text("def ask(text):\n    return 'loud' if 'aloud' in text else None\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    options = ["--min-length", "20", "--max-consecutive-repeats", "9", "--max-repetition", "0.5", "--hook", "mine:ask"]
    options += ["--near-duplicates", "0.8", "--text-column", "body", "--vocab-size", "300"]
    code, out, _ = run(capsys, "prepare", "--data-dir", "texts", "--output", "out", *options)
    assert code == 0
    assert [line for line in out.splitlines() if line.startswith("left out")] == [
        "left out 1: shorter than 20 characters, such as x.jsonl line 1: 'short'",
        f"left out 1: one word or line more than 9 times in a row, such as x.jsonl line 2: {'buy ' * 20!r}",
        "left out 1: repetition above 0.5, such as x.jsonl line 3: " + repr(("on and on it goes, and " * 9)[:80]),
        f"left out 1: loud, such as x.jsonl line 9: {('aloud, ' + text(4))[:80]!r}",
        f"left out 1: a copy of an earlier document, such as x.jsonl: {words[:80]!r}",
        f"left out 1: a near-copy of an earlier document, such as x.jsonl: {words[:80]!r}",
    ]
    (folder,) = (tmp_path / "out").iterdir()
    assert read_index(folder).train.documents + read_index(folder).validation.documents == 3


def test_each_kind_of_loss_is_shown_with_a_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    data = bytearray(parquet(range(300)))
    data[2000:2100] = bytes(byte ^ 255 for byte in data[2000:2100])
    (texts / "a.parquet").write_bytes(data)
    (texts / "b").symlink_to("nowhere")
    arguments = ["--data-dir", str(texts), "--output", str(tmp_path / "out" / "deep"), "--vocab-size", "300"]
    code, out, err = run(capsys, "prepare", *arguments)
    assert code == 2
    assert err.startswith("data.max_loss: ")
    assert not (tmp_path / "out").exists(), "nothing half-written stays"
    code, out, _ = run(capsys, "prepare", *arguments, "--max-loss", "0.9")
    assert code == 0
    lines = [line for line in out.splitlines() if line.startswith("not read")]
    assert [line.partition(":")[2].split(":")[0] for line in lines] == [
        " b cannot be read",
        " a.parquet row group 0 row 0 cannot be read",
    ]


def test_a_trained_tokenizer_is_reproducible_and_keeps_to_its_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts"
    write_all(texts, 40)
    made = []
    for name in ("one", "two"):
        arguments = ["--data-dir", str(texts), "--output", str(tmp_path / name), "--vocab-size", "310"]
        assert run(capsys, "tokenizer", "train", *arguments)[0] == 0
        made.append((tmp_path / name / "tokenizer.json").read_bytes())
    assert made[0] == made[1]
    rare = train_tokenizer(["abab xy"], 300, min_frequency=2, special_tokens=["<|user|>"])
    assert rare.token_to_id("<|user|>") == 1
    assert rare.token_to_id("ab") is not None
    assert rare.token_to_id("xy") is None, "a pair that occurs once is no token"
    assert rare.encode("<|user|>").ids == [1]


def test_a_tokenizer_that_loses_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert round_trip_fault(train_tokenizer(["some text"], 260)) is None
    lower = Tokenizer.from_str(train_tokenizer(["some text"], 260).to_str())
    lower.normalizer = normalizers.Lowercase()
    assert round_trip_fault(lower) is not None
    words = Tokenizer(models.WordLevel({"?": 0, "</s>": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    code, out, err = run(capsys, "tokenizer", "check", str(tmp_path))
    assert code == 2
    assert "does not come back from its tokens" in err
    assert out.startswith("2 tokens, documents end with </s> (1)")


def test_a_configuration_chooses_column_filters_and_loss(tmp_path: Path) -> None:
    from corpus import write_config

    from ava_fast import train

    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "x.jsonl").write_bytes(jsonl(range(60), "body") + b'{"body": "short"}\n' + b"{\n")
    sections = {"data": {"text_column": "body"}, "filters": {"min_length": 20}, "training": {"max_steps": 1}}
    config = write_config(tmp_path / "c.yaml", texts, **sections)
    assert train.main(["--config", str(config)]) == 2, "a line of 62 is more than 1 %"
    assert train.main(["--config", str(config), "--override", "data.max_loss=0.1"]) == 0
    (folder,) = (tmp_path / "data").iterdir()
    index = read_index(folder)
    assert index.train.documents + index.validation.documents == 60
    assert index.rejected == {"shorter than 20 characters": 1}
    assert load_tokenizer(folder)


def test_ctrl_c_is_one_line_and_the_same_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("a", "b"):
        (texts / f"{name}.jsonl").write_bytes(jsonl(range(ord(name) * 100, ord(name) * 100 + 50)))
    (tmp_path / "hasty.py").write_text(
        "import os, pathlib, signal\n"
        f"once = pathlib.Path({str(tmp_path / 'once')!r})\n"
        "def hook(text):\n"
        "    if 'document 9820 ' in text and not once.exists():\n"
        "        once.touch()\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["--data-dir", str(texts), "--output", str(tmp_path / "out"), "--vocab-size", "300"]
    train_tokenizer([text(1)], 300).save(str(tmp_path / "tokenizer.json"))
    arguments += ["--tokenizer", str(tmp_path / "tokenizer.json"), "--hook", "hasty:hook"]
    code, out, err = run(capsys, "prepare", *arguments)
    assert (code, out, err) == (75, "", "interrupted; the same command goes on from here\n")
    (work,) = (tmp_path / "out").iterdir()
    finished = {path: path.stat().st_ino for path in work.glob("*.npz")}
    assert finished, "the first file"
    code, out, _ = run(capsys, "prepare", *arguments)
    assert code == 0
    assert "2 jsonl  100 " in out
