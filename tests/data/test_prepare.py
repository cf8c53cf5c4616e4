"""From files to shards and back to the same text; made once, shared by processes, remade when anything changes."""

from __future__ import annotations

import email
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import ava_fast.data.prepare as prepare_module
import ava_fast.data.tokenizer as tokenizer_module
import ava_fast.data.work as work_module
from ava_fast.data.corpus import scan, split
from ava_fast.data.prepare import prepare
from ava_fast.data.shards import TokenStream, read_index
from ava_fast.data.tokenizer import load_tokenizer
from ava_fast.errors import UserError


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    shutil.copytree(Path(json.__file__).parent, folder / "json", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(Path(email.__file__).parent, folder / "email", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "trick.txt").write_text("the token <|endoftext|> in a text is text")
    return folder


def make(texts: Path, **changes: object) -> Path:
    return prepare(texts, texts.parent / "cache", **{"vocab_size": 300, "progress": False, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("characters", [None, 1000])
def test_the_shards_decode_to_the_documents(
    texts: Path, characters: int | None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if characters is not None:  # documents of many pieces, many batches of pieces, many tasks
        monkeypatch.setattr(tokenizer_module, "PIECE_CHARACTERS", characters)
        monkeypatch.setattr(prepare_module, "BATCH_CHARACTERS", 3 * characters)
        monkeypatch.setattr(work_module, "CALL_CHARACTERS", 2 * characters)
        monkeypatch.setattr(work_module, "PART_BYTES", 5 * characters)
    (texts / "image.png").write_bytes(b"\x89PNG\0")
    with caplog.at_level(logging.WARNING):
        folder = make(texts, validation_fraction=0.2)
    index, tokenizer = read_index(folder), load_tokenizer(folder)
    corpus = scan(texts)
    sides = dict(zip(("train", "validation"), split(corpus.files, 0.2), strict=True))
    for name, documents in sides.items():
        stream = TokenStream(folder, index, name)
        decoded = tokenizer.decode(stream.read(0, len(stream)).tolist(), skip_special_tokens=False)
        assert decoded == "".join(f"{document.read()}<|endoftext|>" for document in documents)
        ends = (stream.read(0, len(stream)) == index.eos_id).sum()
        assert ends == len(documents) == index.split(name).documents
        assert index.split(name).bytes == sum(document.size for document in documents)
    assert index.vocab_size == 300
    assert index.source == str(texts)
    # email/__init__.py and others may be empty in some Python: count what the scan says.
    assert index.skipped == len(corpus.skipped) >= 1
    skipped = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert {"path": "image.png", "reason": "is binary: it holds a NUL byte"} in skipped
    assert f"left out {index.skipped} places" in caplog.text


def test_the_same_input_is_prepared_once_and_gives_the_same_bytes(texts: Path) -> None:
    folder = make(texts)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert make(texts) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    moved = texts.rename(texts.with_name("moved"))
    again = prepare(moved, moved.parent / "other", vocab_size=300, progress=False)
    assert again.name == folder.name
    for path in folder.rglob("*.bin"):
        assert path.read_bytes() == (again / path.relative_to(folder)).read_bytes()
    assert (folder / "tokenizer.json").read_bytes() == (again / "tokenizer.json").read_bytes()


def test_whatever_changes_the_result_gives_another_folder(texts: Path) -> None:
    folders = [make(texts), make(texts, vocab_size=301), make(texts, validation_fraction=0.3)]
    (texts / "trick.txt").write_text("the token <|endoftext|> in a text is TEXT")
    folders.append(make(texts))
    folders.append(make(texts, tokenizer_name=folders[0]))
    assert len(set(folders)) == 5
    assert make(texts, tokenizer_name=folders[0]) == folders[-1]


def test_only_training_text_reaches_the_tokenizer(texts: Path) -> None:
    (document, *_) = split(scan(texts).files, 0.05)[1]
    document.path.write_text(document.read() + "\nzqxzqx" * 5000)
    folder = make(texts, vocab_size=350)
    assert len(load_tokenizer(folder).encode("zqxzqx").ids) == 6


def test_a_damaged_cache_is_refused(texts: Path) -> None:
    shard = make(texts) / "train/00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"train/00000\.bin holds [\d,]+ bytes where the index says [\d,]+; delete"):
        make(texts)


def test_a_prepared_folder_is_used_as_it_is(texts: Path) -> None:
    folder = make(texts)
    other = make(texts, vocab_size=299)
    assert prepare(folder, "unused", vocab_size=300) == folder
    assert prepare(folder, "unused", vocab_size=4000, tokenizer_name=folder) == folder
    with pytest.raises(UserError, match=r"model\.vocab_size: 299 is too small .* at least 300"):
        prepare(folder, "unused", vocab_size=299)
    with pytest.raises(UserError, match=r"data\.tokenizer_name: .* is not the tokenizer that .* was prepared with"):
        prepare(folder, "unused", vocab_size=300, tokenizer_name=other)
    assert not Path("unused").exists()


def test_a_foreign_tokenizer_adds_nothing_of_its_own(tmp_path: Path, texts: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "def": 1, "<s>": 2, "</s>": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    tokenizer.enable_truncation(5)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    folder = make(texts, tokenizer_name=tmp_path)
    index = read_index(folder)
    assert (index.vocab_size, index.eos_id) == (4, 3)
    assert (folder / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    stream = TokenStream(folder, index, "train")
    documents = split(scan(texts).files, 0.05)[0]
    expected = [[*(1 if word == "def" else 0 for word in document.read().split()), 3] for document in documents]
    assert stream.read(0, len(stream)).tolist() == [token for document in expected for token in document]
    with pytest.raises(UserError, match=r"model\.vocab_size: 3 is too small .* at least 4"):
        make(texts, tokenizer_name=tmp_path, vocab_size=3)


def test_processes_that_prepare_at_once_agree(texts: Path) -> None:
    script = (
        "import sys; from ava_fast.data.prepare import prepare\n"
        "print(prepare(sys.argv[1], sys.argv[2], vocab_size=300, progress=False))"
    )
    command = [sys.executable, "-c", script, str(texts), str(texts.parent / "cache")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    (folder,) = folders
    assert [path.name for path in (texts.parent / "cache").iterdir()] == [Path(folder).name]
    assert read_index(folder).train.tokens > 1000


def test_a_single_file_gives_both_splits(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "book.txt").write_text("it was the best of times\n" * 200)
    index = read_index(make(tmp_path / "texts", validation_fraction=0.1))
    assert index.train.bytes == 4500
    assert index.validation.bytes == 500
    assert index.validation.tokens > 1
