"""Records of one part of a file, in bounded memory; what cannot be read comes out as `Lost`, with its place and reason.

    for item in read(path, part):          # Part("jsonl", start=0, stop=16 << 20, column="text")
        ...                                # Record(text, where, position) or Lost(reason, where, position)

A part is a stretch of bytes of a text or JSONL file, of row groups of a Parquet file, of record batches of an Arrow
file, or a whole file of another kind. The parts of a file hold each of its records once. No record is longer than
`LONGEST_RECORD`, and nothing larger is ever in memory.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ava_fast.data.formats import COLUMNS, Compression, Kind, Truncated, decoded_blocks, open_content

PART_BYTES = 4 << 20
"""Of a file of records that can be divided."""
LONGEST_TEXT = 16 << 20
"""A plain text file is one document up to here; a longer one is cut at line ends."""
LONGEST_RECORD = 64 << 20
ROWS = 256
"""Rows of a Parquet file in memory at a time."""
_BLOCK = 1 << 20

Where = dict[str, int]
"""A record's place: {"line": 1}, {"record": 1} or {"row_group": 0, "row": 0}; lines are counted within the part."""


@dataclass(frozen=True)
class Part:
    """What `read` needs to know beside the path."""

    kind: Kind
    start: int
    stop: int
    column: str | None = None
    compression: Compression | None = None
    encoding: str = "utf-8-sig"


class Record(NamedTuple):
    """One document."""

    text: str
    where: Where
    position: int
    """Bytes of the file read so far, near enough for a progress bar."""


class Lost(NamedTuple):
    """Something that cannot be read."""

    reason: str
    where: Where
    position: int
    bytes: int
    """How much of the file it is, near enough for the limit on loss."""
    records: int = 1


class Lines(NamedTuple):
    """Comes last of a part of a JSONL file: how many lines it has."""

    total: int


Item = Record | Lost | Lines


def divide(kind: Kind, path: Path, size: int, compression: Compression | None, encoding: str) -> list[tuple[int, int]]:
    """A file's parts as (start, stop), in order; the same at every call."""
    if compression is None and kind == "jsonl":
        edges = [*range(0, size, PART_BYTES), size]
        return list(pairwise(edges))
    if compression is None and kind == "text" and encoding == "utf-8-sig" and size > LONGEST_TEXT:
        with path.open("rb") as file:
            edges = [0, *(_text_edge(file, edge) for edge in range(LONGEST_TEXT, size, LONGEST_TEXT)), size]
        return [(start, stop) for start, stop in pairwise(edges) if start < stop]
    if kind == "parquet":
        import pyarrow.parquet

        metadata = pyarrow.parquet.ParquetFile(path).metadata
        sizes = [metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups)]
        return _groups(sizes)
    if kind == "arrow_file":
        import pyarrow

        with pyarrow.OSFile(str(path)) as source:
            batches = pyarrow.ipc.open_file(source).num_record_batches
        return _groups([size // max(1, batches)] * batches)
    return [(0, size)]


def read(path: Path, part: Part) -> Iterator[Item]:
    """The part's records in order. Raises OSError only where the file cannot be opened."""
    if part.kind == "parquet":
        yield from _parquet(path, part)
    elif part.kind in ("arrow_file", "arrow_stream"):
        yield from _arrow(path, part)
    else:
        with path.open("rb", buffering=_BLOCK) as file:
            try:
                if part.kind == "jsonl":
                    yield from _jsonl(file, part)
                elif part.kind == "json":
                    yield from _json_array(file, part)
                else:
                    yield from _text(file, part)
            except OSError as error:
                position = file.tell()
                yield Lost(f"cannot be read on: {error.strerror or error}", {}, position, max(0, part.stop - position))


def _groups(sizes: list[int]) -> list[tuple[int, int]]:
    """Neighbours of about PART_BYTES together."""
    groups, start, total = [], 0, 0
    for number, size in enumerate(sizes, 1):
        total += max(0, size)
        if total >= PART_BYTES or number == len(sizes):
            groups.append((start, number))
            start, total = number, 0
    return groups


def _text_edge(file: BinaryIO, offset: int) -> int:
    """Where the line at `offset` ends, or the character, if that line is very long."""
    file.seek(offset - 1)
    block = file.read(_BLOCK)
    end = block.find(b"\n")
    if end >= 0:
        return offset + end
    inside = 1
    while inside < len(block) and block[inside] & 0xC0 == 0x80:
        inside += 1
    return offset - 1 + inside


# Plain text


def _text(file: BinaryIO, part: Part) -> Iterator[Item]:
    if part.compression is None and part.encoding == "utf-8-sig":
        file.seek(part.start)
        data = file.read(part.stop - part.start)
        if part.start == 0:
            data = data.removeprefix(codecs.BOM_UTF8)
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            yield Lost(f"is not UTF-8 text: byte {part.start + error.start}", {}, part.stop, len(data))
            return
        if "\0" in text:
            yield Lost(f"is binary: byte {part.start + data.index(0)} is NUL", {}, part.stop, len(data))
        elif text.strip():
            yield Record(text, {}, part.stop)
        return
    kept, number, stream = "", 0, open_content(file, part.compression)
    failure: str | None = None
    try:
        for block in decoded_blocks(stream, part.encoding):
            kept += block
            while len(kept) > LONGEST_TEXT:
                cut = kept.rfind("\n", 0, LONGEST_TEXT) + 1 or LONGEST_TEXT
                number += 1
                yield Record(kept[:cut], {"record": number}, file.tell())
                kept = kept[cut:]
    except (Truncated, UnicodeError) as error:
        failure = f"is not {part.encoding} text" if isinstance(error, UnicodeError) else str(error)
    if kept.strip():
        number += 1
        yield Record(kept, {"record": number}, file.tell())
    if failure:
        position = file.tell()
        yield Lost(failure, {"record": number + 1}, position, max(1, part.stop - position))


# JSON


class Blank(ValueError):
    """A record whose text is empty: it is in the ledger, and no loss."""


def text_of(value: Any, column: str | None) -> str:
    """A record's text. Raises ValueError saying why there is none."""
    if isinstance(value, str):
        text = value
    elif not isinstance(value, dict):
        raise ValueError(f"is {_json_type(value)}, not an object")
    else:
        name = column or next((name for name in COLUMNS if name in value), COLUMNS[0])
        if name not in value:
            raise ValueError(f"has no {name!r}")
        if not isinstance(value[name], str):
            raise ValueError(f"{name!r} is {_json_type(value[name])}, not text")
        text = value[name]
    if not text.strip():
        raise Blank("its text is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("its text holds half of a surrogate pair") from None
    return text


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _jsonl(file: BinaryIO, part: Part) -> Iterator[Item]:
    stream = open_content(file, part.compression)
    number, stop = 0, part.stop if part.compression is None else None
    try:
        for line, length in _lines(stream, part.start, stop):
            number += 1
            position = min(file.tell(), part.stop)
            if part.compression is not None:
                length = 0  # a line's share of a compressed file is not known; its record counts
            if line is None:
                reason = f"is longer than {LONGEST_RECORD >> 20} MiB"
                yield Lost(reason, {"line": number}, position, length)
                continue
            if not line.strip():
                continue
            try:
                value = json.loads(line.rstrip(b"\r\n").decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                yield Lost(f"is not UTF-8: byte {error.start} of the line", {"line": number}, position, length)
            except RecursionError:
                yield Lost("is nested too deep", {"line": number}, position, length)
            except json.JSONDecodeError as error:
                reason = f"is not JSON: {error.msg.removesuffix(' at')} at character {error.pos}"
                yield Lost(reason, {"line": number}, position, length)
            except ValueError as error:  # an integer of more than 4,300 digits
                yield Lost(str(error)[:200], {"line": number}, position, length)
            else:
                yield _record(value, part.column, {"line": number}, position, length)
    except Truncated as error:
        position = file.tell()
        yield Lost(str(error), {"line": number + 1}, position, max(1, part.stop - position))
    yield Lines(number)


def _lines(stream: BinaryIO, start: int, stop: int | None) -> Iterator[tuple[bytes | None, int]]:
    """The lines that begin in [start, stop), None in place of one that is too long, and their lengths."""
    at, kept = start, b""  # where `kept` begins
    if start:
        stream.seek(start - 1)
        passed, kept = _pass_line(stream, stop)  # one that began before
        at = start - 1 + passed
    while stop is None or at < stop:
        begin = 0
        while (end := kept.find(b"\n", begin)) >= 0:
            length = end + 1 - begin
            yield kept[begin : end + 1] if length <= LONGEST_RECORD else None, length
            begin = end + 1
            if stop is not None and at + begin >= stop:
                return
        kept, at = kept[begin:], at + begin
        if len(kept) > LONGEST_RECORD:
            length = len(kept)
            kept = b""
            passed, kept = _pass_line(stream, None)
            yield None, length + passed
            at += length + passed
            continue
        # read1: what lies before a break in compressed data comes out before the break is reported
        block = stream.read1(max(_BLOCK, len(kept)))  # type: ignore[attr-defined]
        if not block:
            if kept:
                yield kept, len(kept)
            return
        kept += block


def _pass_line(stream: BinaryIO, stop: int | None) -> tuple[int, bytes]:
    """Reads to the next line, or to `stop`: how many bytes were passed over, and what of the next was read with them.

    A file may be one hole of many GiB: the same memory is read into again and again.
    """
    block, passed = bytearray(_BLOCK), 0
    place = stream.tell() if stop is not None else 0
    while count := stream.readinto1(block):  # type: ignore[attr-defined]
        end = block.find(b"\n", 0, count)
        if end >= 0:
            return passed + end + 1, bytes(block[end + 1 : count])
        passed += count
        if stop is not None and place + passed >= stop:
            break
    return passed, b""


_SPACE = re.compile(r"[ \t\r\n]*")
_COMMA = re.compile(r"[ \t\r\n]*,[ \t\r\n]*")


class _Characters:
    """Decoded text with a place in it: `kept[at:]` is what comes next. Little more than a record of it is in memory."""

    def __init__(self, blocks: Iterator[str]):
        self._blocks, self.kept, self.at, self.ended, self.failure = blocks, "", 0, False, ""

    def ensure(self, ahead: int) -> None:
        """Reads until `ahead` characters lie ahead, or all there are."""
        while not self.ended and len(self.kept) - self.at < ahead:
            try:
                block = next(self._blocks, None)
            except (Truncated, UnicodeError) as error:
                self.failure = "is not UTF-8" if isinstance(error, UnicodeError) else str(error)
                block = None
            self.ended = block is None
            self.kept, self.at = self.kept[self.at :] + (block or ""), 0

    def skip(self, pattern: re.Pattern[str]) -> str | None:
        """Passes over `pattern` and returns it, if it is what comes next."""
        self.ensure(1 << 10)
        match = pattern.match(self.kept, self.at)
        if match is None:
            return None
        self.at = match.end()
        return match.group()

    @property
    def next(self) -> str:
        return self.kept[self.at : self.at + 1]

    def find_element(self, edge: str) -> int:
        """How far ahead the next element of the array begins, or -1.

        A separator with a line break and the same indentation only stands between elements of this array.
        """
        found = self.kept.find(edge + "{", self.at) if "\n" in edge else -1
        return found + len(edge) - self.at if found >= 0 else -1


def _json_array(file: BinaryIO, part: Part) -> Iterator[Item]:
    """Elements one after the other. Behind a broken one, reading goes on where lines show that the next begins."""
    text = _Characters(decoded_blocks(open_content(file, part.compression), part.encoding))
    decoder = json.JSONDecoder()
    number, edge = 0, ""
    text.skip(_SPACE)
    text.at += 1  # [
    text.skip(_SPACE)
    while text.next not in ("", "]"):
        number += 1
        where, ahead = {"record": number}, len(text.kept) - text.at
        while True:
            try:
                value, end = decoder.raw_decode(text.kept, text.at)
                break
            except (ValueError, RecursionError):
                if text.ended or ahead >= LONGEST_RECORD:
                    end = -1
                    break
                ahead = max(_BLOCK, 2 * ahead)  # so that a long record is not tried many times
                text.ensure(ahead)
        position = min(file.tell(), part.stop)
        if end >= 0:
            length, text.at = (end - text.at) * (part.compression is None), end
            yield _record(value, part.column, where, position, length)
            separator = text.skip(_COMMA)
            if separator is not None:
                edge = separator
                continue
            text.skip(_SPACE)
            if text.next in ("", "]"):
                break
            number += 1  # what follows belongs to no element
        length = text.find_element(edge)
        if length < 0:
            reason = text.failure or "is broken or cut off; nothing behind it can be read"
            rest = len(text.kept) - text.at + part.stop - position
            yield Lost(reason, {"record": number}, position, max(1, rest))
            return
        yield Lost("is not JSON", {"record": number}, position, length)
        text.at += length
    if text.next != "]":
        reason = text.failure or "is missing: the array does not end"
        yield Lost(reason, {"record": number + 1}, part.stop, max(1, part.stop - file.tell()))


def _record(value: Any, column: str | None, where: Where, position: int, length: int) -> Item:
    try:
        return Record(text_of(value, column), where, position)
    except Blank as error:
        return Lost(str(error), where, position, 0, 0)
    except ValueError as error:
        return Lost(str(error)[:200], where, position, length)


# Parquet and Arrow


def _parquet(path: Path, part: Part) -> Iterator[Item]:
    import pyarrow
    import pyarrow.parquet

    errors = (pyarrow.ArrowException, OSError, ValueError, MemoryError)
    size = os.stat(path).st_size
    try:
        # Without pre_buffer and with a buffer, a row group of any size is read a page at a time.
        file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BLOCK)
        groups, rows = file.num_row_groups, [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
    except errors as error:
        yield Lost(f"cannot be opened: {_one_line(error)}", {}, size, size)
        return
    for group in range(part.start, min(part.stop, groups)):
        done = 0
        try:
            for batch in file.iter_batches(ROWS, row_groups=[group], columns=[part.column], use_threads=False):
                position = size * group // groups
                yield from _rows(batch.column(0), {"row_group": group}, done, position)
                done += batch.num_rows
            if done < rows[group]:
                raise ValueError(f"holds {done} rows instead of {rows[group]}")
        except errors as error:
            where = {"row_group": group, "row": done}
            left = max(1, rows[group] - done)
            share = size // groups * left // max(1, rows[group])
            yield Lost(f"cannot be read: {_one_line(error)}", where, size * (group + 1) // groups, share, left)


def _arrow(path: Path, part: Part) -> Iterator[Item]:
    import pyarrow

    errors = (pyarrow.ArrowException, OSError, ValueError, MemoryError)
    size = os.stat(path).st_size
    with pyarrow.OSFile(str(path)) as source:
        number = part.start
        try:
            if part.kind == "arrow_file":
                schema = pyarrow.ipc.open_file(source).schema
            else:
                schema = pyarrow.ipc.open_stream(source).schema
                source.seek(0)
            options = pyarrow.ipc.IpcReadOptions(included_fields=[schema.get_field_index(part.column)])
            if part.kind == "arrow_file":
                reader = pyarrow.ipc.open_file(source, options=options)
            else:
                reader = pyarrow.ipc.open_stream(source, options=options)
        except errors as error:
            yield Lost(f"cannot be opened: {_one_line(error)}", {}, size, size)
            return
        total = reader.num_record_batches if part.kind == "arrow_file" else 0
        while part.kind == "arrow_stream" or number < part.stop:
            where = {"batch": number}
            try:
                batch = reader.get_batch(number) if total else reader.read_next_batch()
                column = _checked(batch.column(0))
            except StopIteration:
                return
            except errors as error:
                position = source.tell()
                lost = size // total if total else max(1, size - position)
                yield Lost(f"cannot be read: {_one_line(error)}", where, position, lost)
                if not total:
                    return  # what follows in a stream cannot be found
            else:
                yield from _rows(column, where, 0, source.tell())
            number += 1


def _checked(column: Any) -> Any:
    """The column, or its bytes where only their encoding is wrong. Offsets that point outside would crash Arrow."""
    import pyarrow

    try:
        column.validate(full=True)
    except pyarrow.ArrowInvalid:
        column = column.view(pyarrow.large_binary() if column.type == pyarrow.large_string() else pyarrow.binary())
        column.validate(full=True)
    return column


def _rows(column: Any, where: Where, first: int, position: int) -> Iterator[Item]:
    try:
        values = column.to_pylist()
    except (ValueError, OSError):  # one bad value must not cost the others
        values = []
        for number in range(len(column)):
            try:
                values.append(column[number].as_py())
            except (ValueError, OSError):
                values.append(b"\xff")  # no UTF-8
    for number, value in enumerate(values, first):
        place = {**where, "row": number}
        if isinstance(value, bytes):
            with suppress(UnicodeDecodeError):
                value = value.decode()
        if isinstance(value, str):
            yield _record(value, None, place, position, len(value))
        else:
            yield Lost("is null" if value is None else "is not UTF-8", place, position, 1)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:150] or type(error).__name__
