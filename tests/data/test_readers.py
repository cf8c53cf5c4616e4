"""Whatever a file holds, what can be read is read once, the rest is named with its place, and memory is bounded."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import MAKERS, arrow, jsonl, parquet, text, zstd

from ava_fast.data import readers
from ava_fast.data.formats import detect
from ava_fast.data.readers import Lines, Lost, Part, Record, divide, read

NUMBERS = range(200)
TEXTS = [text(n) for n in NUMBERS]


def items(path: Path, part_bytes: int | None = None) -> list[Record | Lost | Lines]:
    """Everything in all parts of a file."""
    found = detect(path)
    assert found.kind is not None, found
    original = readers.PART_BYTES
    readers.PART_BYTES = part_bytes or original
    try:
        spans = divide(found.kind, path, path.stat().st_size, found.compression, found.encoding)
    finally:
        readers.PART_BYTES = original
    parts = [Part(found.kind, *span, found.column, found.compression, found.encoding) for span in spans]
    return [item for part in parts for item in read(path, part)]


def records(everything: list[Record | Lost | Lines]) -> list[str]:
    return [item.text for item in everything if isinstance(item, Record)]


def losses(everything: list[Record | Lost | Lines]) -> list[Lost]:
    return [item for item in everything if isinstance(item, Lost)]


@pytest.mark.parametrize("part_bytes", [None, 1000, 17])
@pytest.mark.parametrize("name", MAKERS)
def test_every_format_gives_its_documents_once_and_in_order(tmp_path: Path, name: str, part_bytes: int | None) -> None:
    path = tmp_path / "file"
    path.write_bytes(MAKERS[name](NUMBERS))
    everything = items(path, part_bytes)
    assert records(everything) == TEXTS
    assert losses(everything) == []
    lines = [item.total for item in everything if isinstance(item, Lines)]
    assert sum(lines) == (200 if name.startswith("jsonl") else 0)
    positions = [item.position for item in everything if isinstance(item, Record)]
    assert positions == sorted(positions)
    assert positions[-1] <= path.stat().st_size


@settings(deadline=None, max_examples=150)
@given(st.lists(st.sampled_from(["\n", "\r\n", "", " ", "a", "\u2028", "é", "\n\n"]), max_size=12), st.integers(1, 40))
def test_the_parts_of_a_jsonl_file_share_its_lines_wherever_they_are_cut(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[str], part_bytes: int
) -> None:
    texts = [f"{number}{piece}" for number, piece in enumerate(pieces)] or ["x"]
    ends = [piece if "\n" in piece else "\n" for piece in pieces] or [""]
    path = tmp_path_factory.getbasetemp() / "parts"
    lines = [json.dumps({"text": item}) + end for item, end in zip(texts, ends, strict=True)]
    path.write_bytes("".join(lines).encode())
    assert records(items(path, part_bytes)) == texts


BROKEN_LINES = [
    (b"{broken", "is not JSON: Expecting property name"),
    (b'{"text": "cut o', "is not JSON: Unterminated string"),
    (b'{"text": "caf\xe9"}', "is not UTF-8: byte 13 of the line"),
    (b'{"text": 5}', "'text' is a number, not text"),
    (b'{"text": null}', "'text' is null, not text"),
    (b'{"other": "x"}', "has no 'text'"),
    (b"[1]", "is an array, not an object"),
    (b'{"text": "\\ud800"}', "its text holds half of a surrogate pair"),
    (b"[" * 200_000, "is nested too deep"),
    (b"\0" * 40, "is not JSON: Expecting value"),
    (b"9" * 5000, "Exceeds the limit"),
]


@pytest.mark.parametrize(("line", "reason"), BROKEN_LINES)
def test_a_broken_line_costs_itself_alone(tmp_path: Path, line: bytes, reason: str) -> None:
    lines = jsonl(NUMBERS).splitlines()
    lines[70] = line
    path = tmp_path / "file"
    for name, data in (("plain", b"\n".join(lines)), ("packed", gzip.compress(b"\n".join(lines)))):
        path.write_bytes(data)
        everything = items(path)
        assert records(everything) == TEXTS[:70] + TEXTS[71:]
        (lost,) = losses(everything)
        assert lost.where == {"line": 71}
        assert lost.reason.startswith(reason)
        assert lost.records == 1
        assert lost.bytes == (len(line) + 1 if name == "plain" else 0)


def test_a_blank_text_is_named_and_no_loss(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(jsonl(range(9)) + b'\n\n{"text": " \\n"}\n')
    (lost,) = losses(items(path))
    assert (lost.reason, lost.where, lost.bytes, lost.records) == ("its text is empty", {"line": 12}, 0, 0)


@pytest.mark.parametrize("documents", [50, 300])
@pytest.mark.parametrize("pack", [lambda data: gzip.compress(data, mtime=0), zstd])
def test_a_compressed_file_that_is_cut_off_or_damaged_gives_what_comes_before(
    tmp_path: Path, pack: Callable[[bytes], bytes], documents: int
) -> None:
    generator = random.Random(0)  # hardly compressible, so that the break is in the middle of the content
    texts = ["".join(chr(generator.randint(33, 0xD7FF)) for _ in range(3000)) for _ in range(documents)]
    data = pack("".join(json.dumps({"text": item}, ensure_ascii=False) + "\n" for item in texts).encode())
    path = tmp_path / "file"
    path.write_bytes(data[: len(data) // 2])
    everything = items(path)
    got = records(everything)
    assert documents / 5 < len(got) < documents * 3 / 4
    assert got == texts[: len(got)]
    lost = losses(everything)[-1]
    assert "compressed data" in lost.reason
    assert lost.where == {"line": len(got) + 1}
    whole = "\n".join(texts)
    data = pack(whole.encode())
    path.write_bytes(data[: len(data) // 2])
    (prefix,) = records(items(path))
    assert whole.startswith(prefix)
    assert len(prefix) > len(whole) / 5, "of plain text too"
    path.write_bytes(pack(b'{"text": "a"}\n' * 4) + pack(b'{"text": "b"}\n'))
    assert records(items(path)) == ["a"] * 4 + ["b"], "files joined by cat"


def test_a_json_array_goes_on_behind_a_broken_element_where_lines_show_the_next(tmp_path: Path) -> None:
    path = tmp_path / "file"
    data = MAKERS["json, a line each"](NUMBERS).decode()
    path.write_text(data.replace('"document 50 ', '"document "50" '))
    everything = items(path)
    assert records(everything) == TEXTS[:50] + TEXTS[51:]
    assert [(lost.where, lost.reason) for lost in losses(everything)] == [({"record": 51}, "is not JSON")]
    path.write_text(MAKERS["json"](NUMBERS).decode().replace('"document 50 ', '"document "50" '))
    everything = items(path)
    assert records(everything) == TEXTS[:50]
    (lost,) = losses(everything)
    assert lost.where == {"record": 51}
    assert "nothing behind it can be read" in lost.reason
    assert lost.bytes > 0.6 * path.stat().st_size


def test_a_json_array_that_does_not_end_says_so(tmp_path: Path) -> None:
    path = tmp_path / "file"
    data = MAKERS["json"](NUMBERS)
    path.write_bytes(data[:-1])
    everything = items(path)
    assert records(everything) == TEXTS
    assert [lost.reason for lost in losses(everything)] == ["is missing: the array does not end"]
    path.write_bytes(data[:-20])
    everything = items(path)
    assert records(everything) == TEXTS[:-1]
    assert len(losses(everything)) == 1


def test_a_damaged_row_group_costs_itself_alone(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    path = tmp_path / "file"
    path.write_bytes(parquet(NUMBERS))
    column = pq.ParquetFile(path).metadata.row_group(1).column(1)
    with path.open("r+b") as file:
        file.seek(column.dictionary_page_offset or column.data_page_offset)
        file.write(b"\xff" * 60)
    everything = items(path)
    assert records(everything) == TEXTS[:50] + TEXTS[100:]
    (lost,) = losses(everything)
    assert lost.where == {"row_group": 1, "row": 0}
    assert lost.records == 50
    assert lost.reason.startswith("cannot be read: ")


def test_a_null_and_a_mis_encoded_value_cost_themselves_alone(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "file"
    values = pa.array([b"one", None, b"caf\xe9", "größe".encode()], pa.binary()).view(pa.string())
    table = pa.table({"text": values})
    for kind in ("parquet", "arrow"):
        if kind == "parquet":
            pq.write_table(table, path)
        else:
            with pa.ipc.new_file(str(path), table.schema) as writer:
                writer.write_table(table)
        everything = items(path)
        assert records(everything) == ["one", "größe"]
        faults = [(lost.where["row"], lost.reason) for lost in losses(everything)]
        assert faults == [(1, "is null"), (2, "is not UTF-8")]


def test_a_damaged_arrow_batch_is_not_followed_out_of_bounds(tmp_path: Path) -> None:
    path = tmp_path / "file"
    data = bytearray(arrow(NUMBERS))
    place = data.index(b"document 50 ")  # the second batch: the offsets lie before its characters
    data[place - 200 : place - 100] = b"\x7f" * 100
    path.write_bytes(bytes(data))
    everything = items(path)
    assert records(everything) == TEXTS[:50] + TEXTS[100:]
    assert [lost.where["batch"] for lost in losses(everything)] == [1]


def test_long_plain_text_is_cut_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LONGEST_TEXT", 1000)
    content = "".join(f"zeile {n} größe 日本\n" for n in range(500)) + "日" * 2000
    path = tmp_path / "file"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_bytes(content.encode(encoding))
        pieces = records(items(path))
        assert "".join(pieces) == content
        assert len(pieces) > 10
        assert all(piece.endswith("\n") for piece in pieces[:8])
        assert max(map(len, pieces)) < 2100


def test_a_line_that_is_too_long_is_named_and_the_next_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LONGEST_RECORD", 5000)
    monkeypatch.setattr(readers, "_BLOCK", 512)
    path = tmp_path / "file"
    lines = jsonl(range(20)).splitlines(keepends=True)
    long = json.dumps({"text": "x" * 9000}).encode() + b"\n"
    path.write_bytes(b"".join([*lines[:9], long, *lines[9:]]))
    for part_bytes in (None, 700, 4000):
        everything = items(path, part_bytes)
        assert records(everything) == TEXTS[:20]
        (lost,) = losses(everything)
        assert lost.reason == "is longer than 0 MiB"
        assert lost.bytes == len(long)


def test_a_hole_of_20_gb_is_read_in_bounded_memory(memory_folder: Path) -> None:
    path = memory_folder / "big.jsonl"
    with path.open("wb") as file:
        file.write(jsonl(range(3000)))
        file.seek(20 * 10**9)
        file.write(b"\n" + jsonl(range(3000, 3200)))
    script = f"""
import resource
from pathlib import Path
from ava_fast.data.formats import detect
from ava_fast.data.readers import Part, Record, Lost, read
path = Path({str(path)!r})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = detect(path)
items = list(read(path, Part("jsonl", 0, path.stat().st_size, "text")))
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(sum(isinstance(item, Record) for item in items), [item for item in items if isinstance(item, Lost)])
print(grown // 1024, found.kind, found.refused)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    first, second = result.stdout.splitlines()
    assert first.startswith("3200 [Lost(reason='is longer than 64 MiB', where={'line': 3001}")
    megabytes, kind, *_ = second.split()
    assert int(megabytes) < 400
    assert kind == "None", "a file that is nearly all hole is set aside"
    assert "9 of 10 samples are binary" in second


WRECKS = [*MAKERS, "text"]


@settings(deadline=None, max_examples=40)
@given(st.data())
@pytest.mark.parametrize("name", WRECKS)
def test_no_damage_makes_a_reader_fail_or_invent(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    """Bytes flipped, cut out, doubled, cut off: a verdict, and documents that are pieces of the right ones."""
    original = MAKERS[name](range(30)) if name != "text" else "\n".join(TEXTS).encode()
    content = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, max(0, len(content) - 1)))
        length = data.draw(st.integers(1, 200))
        match data.draw(st.sampled_from(["flip", "zero", "remove", "double", "cut"])):
            case "flip":
                content[place : place + 1] = bytes([data.draw(st.integers(0, 255))])
            case "zero":
                content[place : place + length] = bytes(len(content[place : place + length]))
            case "remove":
                del content[place : place + length]
            case "double":
                content[place:place] = content[place : place + length]
            case "cut":
                del content[place:]
    path = tmp_path_factory.getbasetemp() / f"wreck-{os.getpid()}"
    path.write_bytes(content)
    found = detect(path)
    if found.kind is None:
        assert found.refused
        return
    got = 0
    for start, stop in divide(found.kind, path, len(content), found.compression, found.encoding):
        for item in read(path, Part(found.kind, start, stop, found.column, found.compression, found.encoding)):
            if isinstance(item, Record):
                got += 1
                item.text.encode()
                assert item.text.strip()
            elif isinstance(item, Lost):
                assert item.reason
                assert item.bytes >= 0
                assert item.records >= 0
    assert got <= 60
