"""Every format becomes the same shards, by however many processes and whenever they are killed; losses are limited."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import WORDS, arrow, jsonl, parquet, text, write_all

import ava_fast.data.convert as convert_module
import ava_fast.data.corpus as corpus_module
import ava_fast.data.pool as pool_module
import ava_fast.data.prepare as prepare_module
import ava_fast.data.readers as readers_module
import ava_fast.data.validate as validate_module
import ava_fast.data.work as work_module
from ava_fast.data.corpus import scan
from ava_fast.data.prepare import prepare
from ava_fast.data.shards import DOCUMENT, TokenStream, read_index
from ava_fast.data.tokenizer import load_tokenizer, train_tokenizer
from ava_fast.errors import UserError
from ava_fast.settings import FiltersConfig


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([" ".join(WORDS) * 3], 300).save(str(folder / "tokenizer.json"))
    return folder


def make(source: Path, output: Path, tokenizer: Path, **changes: Any) -> Path:
    return prepare(source, output, **{"vocab_size": 300, "tokenizer_name": tokenizer, "progress": False, **changes})


def documents(folder: Path) -> dict[str, list[str]]:
    """By split, found by the boundaries rather than the ends of text."""
    index, tokenizer = read_index(folder), load_tokenizer(folder)
    result = {}
    for name in ("train", "validation"):
        stream = TokenStream(folder, index, name)
        table = np.fromfile(folder / name / "documents.bin", DOCUMENT)
        starts = [0, *table["end"][:-1].tolist()]
        result[name] = []
        for start, (end, size, source) in zip(starts, table.tolist(), strict=True):
            tokens = stream.read(start, end).tolist()
            assert tokens[-1] == index.eos_id
            assert index.eos_id not in tokens[:-1]
            result[name].append(tokenizer.decode(tokens[:-1], skip_special_tokens=False))
            assert len(result[name][-1].encode()) == size
            assert source < len(index.sources)
        assert len(table) == index.split(name).documents
    return result


def content(folder: Path) -> dict[str, bytes]:
    """Every file but the index, whose source may lie elsewhere."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "index.json"
    }


def test_every_format_arrives_whole(tmp_path: Path, tokenizer: Path) -> None:
    texts = write_all(tmp_path / "texts")
    folder = make(tmp_path / "texts", tmp_path / "out", tokenizer)
    sides = documents(folder)
    in_order = [document for name in sorted(texts) for document in texts[name]]
    heldout = set(sides["validation"])
    assert sides["train"] == [document for document in in_order if document not in heldout]
    assert sorted(sides["train"] + sides["validation"]) == sorted(in_order)
    assert 20 < len(heldout) < 90, "about a twentieth of 962"
    index = read_index(folder)
    assert [(source.name, source.documents) for source in index.sources] == [(".", 1), ("first", 481), ("second", 480)]
    assert index.sources[1].files == {"arrow_stream": 1, "json": 1, "jsonl.gzip": 1, "parquet": 1, "text": 1}
    assert sum(source.tokens for source in index.sources) == index.train.tokens + index.validation.tokens
    assert index.loss is not None
    assert (index.loss.share, index.skipped, index.rejected) == (0.0, 0, {})


def test_the_result_is_the_same_for_any_number_of_processes(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_all(tmp_path / "texts")
    (tmp_path / "texts" / "bad.jsonl").write_bytes(jsonl(range(70)) + b"{\n{\n" + jsonl(range(70, 100)))
    for module in (work_module, readers_module):
        monkeypatch.setattr(module, "PART_BYTES", 3000)
    monkeypatch.setattr(prepare_module, "BATCH_CHARACTERS", 2000)
    filters = FiltersConfig(near_duplicates=0.9)
    results = [
        content(make(tmp_path / "texts", tmp_path / f"out{n}", tokenizer, processes=n, filters=filters, max_loss=0.1))
        for n in (1, 2, 3)
    ]
    assert results[0] == results[1] == results[2]
    assert json.loads(results[0]["skipped.jsonl"])["line"] == 71
    assert json.loads(results[0]["skipped.jsonl"])["to"] == 72


def test_a_killed_run_goes_on_without_a_document_lost_or_repeated(tmp_path: Path, tokenizer: Path) -> None:
    source = tmp_path / "texts"
    source.mkdir()
    for number in range(4):
        (source / f"{number}.jsonl").write_bytes(jsonl(range(400 * number, 400 * (number + 1))))
    script = f"""
import os, signal, sys
import ava_fast.data.prepare as prepare, ava_fast.data.readers as readers, ava_fast.data.work as work
readers.PART_BYTES = work.PART_BYTES = 10_000
prepare.BATCH_CHARACTERS = 5_000
left, save = int(sys.argv[3]), work.save_batch
def save_and_die(*arguments):
    global left
    left -= 1
    save(*arguments)
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
work.save_batch = save_and_die
options = dict(vocab_size=300, tokenizer_name={str(tokenizer)!r}, progress=False, processes=1)
print(prepare.prepare(sys.argv[1], sys.argv[2], **options))
"""

    def run(output: Path, dies_after: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", script, str(source), str(output), str(dies_after)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    whole = run(tmp_path / "whole", -1)
    assert whole.returncode == 0, whole.stderr
    killed, times = tmp_path / "killed", 0
    while True:
        result = run(killed, 25)
        if result.returncode == 0:
            break
        assert result.returncode == -signal.SIGKILL, result.stderr
        (work,) = killed.iterdir()
        done = list(work.glob("0*.npz"))
        times += 1
        assert len(done) == 25 * times, "nothing is computed twice"
        (work / f".{done[0].name}.abcd").write_bytes(b"half a batch")  # what a kill in the middle of a write leaves
    assert times >= 2
    assert content(Path(result.stdout.strip())) == content(Path(whole.stdout.strip()))
    assert [path.name for path in killed.iterdir()] == [Path(result.stdout.strip()).name]
    sides = documents(Path(result.stdout.strip()))
    assert sorted(sides["train"] + sides["validation"]) == sorted(text(n) for n in range(1600))


def test_a_killed_run_of_several_processes_leaves_no_worker_and_goes_on(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "texts"
    source.mkdir()
    (source / "x.jsonl").write_bytes(jsonl(range(4000)))
    script = f"""
import sys
import ava_fast.data.prepare as prepare, ava_fast.data.readers as readers, ava_fast.data.work as work
readers.PART_BYTES = work.PART_BYTES = 20_000
prepare.BATCH_CHARACTERS = 5_000
options = dict(vocab_size=300, tokenizer_name={str(tokenizer)!r}, progress=False, processes=2)
prepare.prepare(sys.argv[1], sys.argv[2], **options)
"""
    process = subprocess.Popen([sys.executable, "-c", script, str(source), str(tmp_path / "out")])
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "out").glob(".*.work/0*.npz"))) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task").glob("*/children")
    workers = [int(pid) for file in children for pid in file.read_text().split()]
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was killed, not done"
    assert len(workers) == 2
    while any(_is_running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(_is_running, workers))
    for module in (work_module, readers_module):
        monkeypatch.setattr(module, "PART_BYTES", 20_000)
    monkeypatch.setattr(prepare_module, "BATCH_CHARACTERS", 5_000)
    sides = documents(make(source, tmp_path / "out", tokenizer, processes=2))
    assert sorted(sides["train"] + sides["validation"]) == sorted(text(n) for n in range(4000))
    assert len(list((tmp_path / "out").iterdir())) == 1


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_file_that_kills_its_reader_is_given_up_and_named(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "texts"
    source.mkdir()
    for name in ("a", "b", "c"):
        (source / f"{name}.jsonl").write_bytes(jsonl(range(ord(name) * 100, ord(name) * 100 + 50)))
    (source / "b.jsonl").write_bytes(jsonl(range(5)) + b'{"text": "kill"}\n')
    (tmp_path / "deadly.py").write_text(
        "import os\ndef hook(text):\n    if text == 'kill':\n        os.kill(os.getpid(), 11)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    filters = FiltersConfig(hook="deadly:hook")
    folder = make(source, tmp_path / "out", tokenizer, processes=2, filters=filters, max_loss=0.1)
    (entry,) = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert entry == {"path": "b.jsonl", "reason": f"its reader died, {pool_module.ATTEMPTS} times (exit code -11)"}
    sides = documents(folder)
    assert len(sides["train"] + sides["validation"]) == 100
    with pytest.raises(UserError, match=r"data\.max_loss: .* b\.jsonl: its reader died"):
        make(source, tmp_path / "again", tokenizer, processes=2, filters=filters)


@pytest.mark.parametrize("processes", [1, 2])
def test_too_much_loss_stops_before_anything_is_written(
    tmp_path: Path, tokenizer: Path, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (work_module, readers_module):
        monkeypatch.setattr(module, "PART_BYTES", 5000)
    source = tmp_path / "texts"
    source.mkdir()
    lines = jsonl(range(1000)).splitlines(keepends=True)
    lines[500:520] = [b'{"text": cut}\n'] * 20
    (source / "x.jsonl").write_bytes(b"".join(lines))
    with pytest.raises(UserError, match=r"^data\.max_loss: 2\.00% of .* more than 1\.00%: x\.jsonl: is not JSON"):
        make(source, tmp_path / "out", tokenizer, processes=processes)
    assert not (tmp_path / "out").exists()
    folder = make(source, tmp_path / "out", tokenizer, processes=processes, max_loss=0.02)
    assert read_index(folder).train.documents + read_index(folder).validation.documents == 980
    with pytest.raises(UserError, match=r"data\.max_loss: 2\.00%"):  # also of what is there already
        make(source, tmp_path / "out", tokenizer, max_loss=0.01)


def test_a_damaged_file_counts_with_all_its_bytes_and_an_image_does_not(tmp_path: Path, tokenizer: Path) -> None:
    source = tmp_path / "texts"
    source.mkdir()
    (source / "x.jsonl").write_bytes(jsonl(range(50)))
    (source / "image.png").write_bytes(b"\x89PNG\0" * 10_000)
    make(source, tmp_path / "out", tokenizer)
    (source / "y.parquet").write_bytes(b"\0" * 1000)
    with pytest.raises(UserError, match=r"data\.max_loss: .* y\.parquet: is binary: it holds a NUL byte"):
        make(source, tmp_path / "other", tokenizer)


def test_what_is_left_out_is_counted_by_reason_with_a_sample(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "texts"
    source.mkdir()
    words = text(3, 60)
    rows = [text(1), "short", text(1), "buy " * 50, "also short", words, words + " more", "日本 " + text(8), text(2)]
    (source / "x.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (tmp_path / "quality.py").write_text("def ask(text):\n    return 'east asian' if text.startswith('日') else None\n")
    monkeypatch.syspath_prepend(tmp_path)
    filters = FiltersConfig(min_length=20, max_consecutive_repeats=9, near_duplicates=0.8, hook="quality:ask")
    folder = make(source, tmp_path / "out", tokenizer, filters=filters)
    sides = documents(folder)
    assert sorted(sides["train"] + sides["validation"]) == sorted([text(1), words, text(2)])
    entries = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    shown = {entry["reason"]: (entry["count"], entry.get("line"), entry["text"][:10]) for entry in entries}
    assert shown == {
        "shorter than 20 characters": (2, 2, "short"),
        "one word or line more than 9 times in a row": (1, 4, "buy buy bu"),
        "east asian": (1, 8, ("日本 " + text(8))[:10]),
        "a copy of an earlier document": (1, None, text(1)[:10]),
        "a near-copy of an earlier document": (1, None, words[:10]),
    }
    assert read_index(folder).rejected == {reason: count for reason, (count, _, _) in shown.items()}


def test_a_file_that_changes_meanwhile_is_refused(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "texts"
    source.mkdir()
    for name in ("a", "b"):
        (source / f"{name}.jsonl").write_bytes(jsonl(range(20)))
    (tmp_path / "writer.py").write_text(
        f"def hook(text):\n    with open({str(source / 'b.jsonl')!r}, 'a') as file:\n        file.write('{{}}')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"data\.data_dir: .*b\.jsonl changed while the folder was being prepared"):
        make(source, tmp_path / "out", tokenizer, filters=FiltersConfig(hook="writer:hook"))
    assert not (tmp_path / "out").exists()


def test_a_terminal_shows_bytes_tokens_and_the_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    source = tmp_path / "texts"
    source.mkdir()
    (source / "x.jsonl").write_bytes(jsonl(range(200)))
    monkeypatch.setattr(prepare_module, "BAR_DELAY_SECONDS", 0)
    monkeypatch.setattr(prepare_module, "BATCH_CHARACTERS", 5000)
    monkeypatch.setattr("sys.stderr", Terminal())
    prepare(source, tmp_path / "out", vocab_size=300)
    bars = [line for line in sys.stderr.getvalue().split("\r") if line.startswith("tokenizing")]  # type: ignore[attr-defined]
    size = (source / "x.jsonl").stat().st_size
    assert re.search(
        rf"100%\|.*\| {size / 1e3:.1f}k/{size / 1e3:.1f}k \[00:0\d<00:00, .*B/s, .* M tokens, [\d,]+ tokens/s\]",
        bars[-1],
    )


def test_other_filters_give_another_folder(tmp_path: Path, tokenizer: Path) -> None:
    source = tmp_path / "texts"
    source.mkdir()
    (source / "x.jsonl").write_bytes(jsonl(range(20)) + jsonl(range(3)))
    kept, left = (
        make(source, tmp_path / "out", tokenizer, filters=FiltersConfig(exact_duplicates=flag))
        for flag in (False, True)
    )
    assert kept != left
    assert [sum(map(len, documents(folder).values())) for folder in (kept, left)] == [23, 20]


def test_a_single_record_cannot_be_divided(tmp_path: Path, tokenizer: Path) -> None:
    source = tmp_path / "texts"
    source.mkdir()
    (source / "x.jsonl").write_bytes(jsonl(range(1)))
    with pytest.raises(UserError, match=r"data\.data_dir: one document is left of .* two are needed"):
        make(source, tmp_path / "out", tokenizer)
    assert not (tmp_path / "out").exists()


def test_a_hundred_thousand_small_files(memory_folder: Path, tokenizer: Path) -> None:
    source = memory_folder / "texts"
    for folder in range(100):
        (source / f"{folder}").mkdir(parents=True)
        descriptor = os.open(source / f"{folder}", os.O_RDONLY)
        for number in range(1000):
            file = os.open(f"{number}", os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=descriptor)
            os.write(file, b"%d %d" % (folder, number))
            os.close(file)
        os.close(descriptor)
    folder = make(source, memory_folder / "out", tokenizer)
    index = read_index(folder)
    assert index.train.documents + index.validation.documents == 100_000
    assert len(index.sources) == 100
    assert all(source.documents == 1000 for source in index.sources)


def test_commands_that_read_in_their_own_process_survive_a_file_that_kills_its_reader(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "texts"
    source.mkdir()
    for name in ("a", "b", "c"):
        (source / f"{name}.parquet").write_bytes(parquet(range(ord(name) * 100, ord(name) * 100 + 50)))
    (tmp_path / "deadly_read.py").write_text(
        "import os\n"
        "from ava_fast.data import corpus, readers, validate\n"
        "def read(path, part):\n"
        "    for number, item in enumerate(readers.read(path, part)):\n"
        "        if path.name == 'b.parquet' and number == 20:\n"
        "            os.kill(os.getpid(), 11)\n"
        "        yield item\n"
        "def sample(file):\n"
        "    yield from read(file.path, readers.Part(file.kind, 0, 1, file.column))\n"
        "def look(root, name, column):\n"
        "    if name == 'b.parquet':\n"
        "        os.kill(os.getpid(), 11)\n"
        "    yield corpus.look(root, name, column)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    deadly = importlib.import_module("deadly_read")
    monkeypatch.setattr(work_module, "read", deadly.read)
    monkeypatch.setattr(validate_module, "_sample", deadly.sample)
    (samples,) = [check for check in validate_module.validate(source) if check.name == "samples"]
    assert samples.values == {
        "documents": 100,
        "unreadable": 1,
        "first": ["b.parquet: its reader died (exit code -11)"],
    }
    folder = make(source, tmp_path / "out", tokenizer, processes=1, max_loss=0.5)
    (entry,) = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert entry == {"path": "b.parquet", "reason": "its reader died (exit code -11)"}
    plan = work_module.make_plan(scan(source).files, FiltersConfig())
    assert len(list(prepare_module.training_texts(plan, 0.0, lambda size: None))) == 100
    monkeypatch.setattr(convert_module, "read", deadly.read)
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "b.parquet").write_bytes(arrow(range(50)))
    assert convert_module.to_parquet(hub, "b.parquet") == "its reader died (exit code -11)"
    assert os.listdir(hub) == ["b.parquet"]
    monkeypatch.setattr(corpus_module, "_look_and_divide", deadly.look)
    (skipped,) = scan(source).skipped
    assert (skipped.path, skipped.reason) == ("b.parquet", "its reader died (exit code -11)")
    assert skipped.lost == (source / "b.parquet").stat().st_size
