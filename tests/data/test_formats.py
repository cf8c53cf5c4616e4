"""A file is what its content says, with a confidence and reasons; what is not surely something is set aside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import MAKERS, arrow, jsonl, parquet, text, zstd

from ava_fast.data.formats import Detected, detect


def look(folder: Path, data: bytes, name: str = "file", column: str | None = None) -> Detected:
    (folder / name).write_bytes(data)
    return detect(folder / name, column)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("misleading", ["file", "picture.png", "x.parquet", "x.gz"])
def test_the_content_decides_whatever_the_name(tmp_path: Path, name: str, misleading: str) -> None:
    found = look(tmp_path, MAKERS[name](range(60)), misleading)
    kind, _, compression = name.partition(",")[0].partition(".")
    assert (found.kind, found.compression or "", found.column) == (kind, compression, "text")
    assert found.confidence == 1.0
    assert found.reasons
    assert found.refused is None


@pytest.mark.parametrize("make", [jsonl, parquet, arrow])
def test_the_text_column_is_found_or_asked_for(tmp_path: Path, make: object) -> None:
    def data(column: str) -> bytes:
        return make(range(20), column)  # type: ignore[operator,no-any-return]

    assert look(tmp_path, data("content")).column == "content"
    assert look(tmp_path, data("body"), column="body").column == "body"
    found = look(tmp_path, data("body"))
    assert found.kind is None
    assert found.damaged
    assert "without a text column ('text' or 'content'); its" in str(found.refused)
    assert "body" in str(found.refused)
    assert str(found.refused).endswith("name one as data.text_column")
    assert "('id')" in str(look(tmp_path, data("text"), column="id").refused), "numbers are no text"


def test_text_comes_before_content(tmp_path: Path) -> None:
    both = json.dumps({"content": "c", "text": "t"}).encode()
    assert look(tmp_path, both).column == "text"
    assert look(tmp_path, json.dumps({"content": "c", "text": None}).encode()).column == "content"


@pytest.mark.parametrize(
    ("bad", "kind"), [(0, "jsonl"), (1, "jsonl"), (3, "jsonl"), (4, None), (6, None), (10, "text")]
)
def test_the_confidence_is_the_share_of_ten_samples(tmp_path: Path, bad: int, kind: str | None) -> None:
    lines = jsonl(range(10)).splitlines(keepends=True)
    lines[:bad] = [b"just words\n"] * bad
    found = look(tmp_path, b"".join(lines))
    assert found.kind == kind
    assert found.confidence == pytest.approx(1 - bad / 10 if bad < 5 else bad / 10)
    if kind is None:
        assert "JSON objects" in str(found.refused)
        assert "UTF-8 text" in str(found.refused)
        assert f"confidence {found.confidence:.1f} of 0.7" in str(found.refused)


def test_lines_that_alternate_are_seen_to_be_of_two_kinds(tmp_path: Path) -> None:
    for count in (40, 200, 8000):
        lines = jsonl(range(count)).splitlines(keepends=True)
        lines[::2] = [f"{'words that are no JSON ' * (number % 7 + 5)}\n".encode() for number in range(count // 2)]
        found = look(tmp_path, b"".join(lines))
        assert found.kind is None, (count, found)
        assert "not surely" in str(found.refused)


def test_the_samples_are_spread_over_a_large_file(tmp_path: Path) -> None:
    lines = jsonl(range(8000)).splitlines(keepends=True)
    lines[4000:] = [b"words that are no JSON at all, and many of them, to make this half as large\n" * 4] * 4000
    found = look(tmp_path, b"".join(lines))
    assert found.kind is None
    assert 0.3 <= found.confidence <= 0.7


@pytest.mark.parametrize(
    ("data", "kind", "says"),
    [
        (b"", None, "is empty"),
        (b" \n\t\n", None, "is empty"),
        (b"\x89PNG\r\n\x1a\n\0\0\0", None, "is binary"),
        (b'{"name": "x", "version": "1"}\n', None, "without a text column"),
        (b'{\n "name": "x",\n "version": {"a": 1}\n}\n', None, "is one JSON object"),
        (b"{ return 1; }\n", "text", ""),
        (b"rings \x07\n", "text", ""),
        (b"\x01\x02\x03\x04\x05\x06\x07 and so on", None, "is binary: it holds a lot of control characters"),
        (b"[section]\nkey = 1\n", "text", ""),
        (b"[a link](x.html) and text\n", "text", ""),
        (b'["one", "two"]', "json", ""),
        (b'"one"\n"two"\n', "jsonl", ""),
        (b"[1, 2, 3]", "text", ""),
        ("größe 日本\n".encode(), "text", ""),
        ("größe".encode("utf-16"), "text", ""),
        ("größe".encode("utf-32"), "text", ""),
        (b"\xff\xfe\x00\xdcaa", None, "begins with a mark of utf-16 but is not"),
        (b"caf\xe9 ol\xe9", None, "UTF-8"),
        (b"PAR1 and no more", None, "begins as Parquet but is cut off or damaged"),
        (b"ARROW1\0\0 and no more", None, "begins as an Arrow file but is cut off or damaged"),
        (b"\x1f\x8b\x08 and no more", None, "is gzip, and the compressed data"),
        (arrow(range(3), stream=True).replace(b"text", b"te\x80t"), None, "begins as an Arrow stream but is"),
        (zstd(parquet(range(3))), None, "is Parquet or Arrow inside zstd; unpack it"),
        (b'[{"text": "never closed', None, "its first element cannot be read"),
    ],
)
def test_small_and_odd_files(tmp_path: Path, data: bytes, kind: str | None, says: str) -> None:
    found = look(tmp_path, data)
    assert found.kind == kind
    assert says in str(found.refused)
    assert (found.refused is None) == (kind is not None)
    assert found.reasons


def test_a_json_array_of_long_records_is_not_text(tmp_path: Path) -> None:
    long = [{"text": text(n, 40_000)} for n in range(3)]
    assert look(tmp_path, json.dumps(long).encode()).kind == "json"


@pytest.mark.parametrize(("name", "damaged"), [("x.jsonl", True), ("x.png", False)])
def test_only_what_promised_text_counts_as_a_loss(tmp_path: Path, name: str, damaged: bool) -> None:
    assert look(tmp_path, b"\0" * 5000, name).damaged is damaged
    photo = b"".join(b"\xff\xd8%c\n" % (n % 5) for n in range(500))  # some lines hold a NUL, none is UTF-8
    assert look(tmp_path, photo, name).damaged is damaged


JSON_PIECES = [b"[", b"{", b"}", b"]", b'"text"', b":", b",", b"\n", b'"a"', b"1"]
MARKS = [b"\xff", b"\0", b"PAR1", b"ARROW1", b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"\xff\xff\xff\xff"]
PIECES = st.lists(st.sampled_from(JSON_PIECES + MARKS), max_size=20).map(b"".join)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=300) | st.text(max_size=200).map(str.encode) | PIECES)
def test_any_bytes_get_a_verdict(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    found = look(tmp_path_factory.getbasetemp(), data)
    assert (found.kind is None) == (found.refused is not None)
    assert 0 <= found.confidence <= 1
    assert found.reasons
