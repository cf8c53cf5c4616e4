"""What a file is, from ten samples of its content; its name is never the reason.

    found = detect(Path("part-7"))          # Detected(kind="jsonl", column="text", confidence=1.0, reasons=[…])
    found.refused                           # None, or why the file is set aside

Parquet and Arrow say what they are in their first bytes. Everything else is told from ten samples spread over the file
(over its beginning, where it is compressed): each is a JSON record, UTF-8 text or neither, and the confidence is the
share that agrees with the verdict. The column with the text is judged by the same samples.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

Kind = Literal["text", "jsonl", "json", "parquet", "arrow_file", "arrow_stream"]
Compression = Literal["gzip", "zstd"]

SAMPLES = 10
SAMPLE_BYTES = 1 << 16
LONGEST_SAMPLE = 4 << 20
"""A sample's record may be this long; a longer one counts as no record."""
THRESHOLD = 0.7
"""Confidence below which a file is set aside."""
COLUMNS = ("text", "content")
"""Where the text of a record is looked for unless it is configured."""
# Names that promise text. Content decides; the name only tells damaged data from an image that lies beside it.
DATA_SUFFIXES = frozenset(
    {".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".feather", ".gz", ".zst", ".txt", ".md", ".text"}
)
_BOMS = [  # UTF-32's first: its mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
]
_ZSTD = b"\x28\xb5\x2f\xfd"
_LITTLE = 1 << 16
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")


@dataclass(frozen=True)
class Detected:
    """What a file is."""

    kind: Kind | None
    confidence: float
    reasons: list[str]
    column: str | None = None
    """Where a record's text is; None for text, and for JSON strings."""
    compression: Compression | None = None
    encoding: str = "utf-8-sig"
    refused: str | None = None
    """Why the file is set aside."""
    damaged: bool = False
    """A refused file was meant to be data, as far as its content and name tell: it counts as a loss."""


@dataclass
class _Sample:
    kind: str
    """record, string, text, binary, misencoded, none"""
    value: Any = None


class Truncated(Exception):
    """Compressed data end or break in the middle."""


class _Compressed(io.RawIOBase):
    """A compressed file as its content. Raises Truncated where that ends or breaks too early."""

    def __init__(self, file: BinaryIO, compression: Compression):
        self._stream: Any
        self._broken: Truncated | None = None
        self._is_gzip = compression == "gzip"
        if self._is_gzip:
            self._stream = gzip.GzipFile(fileobj=file)
        else:
            import pyarrow

            self._stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        filled = 0
        while filled < len(buffer) and self._broken is None:
            try:
                # Little at a time: a break takes with it what the same call has decompressed before.
                size = min(len(buffer) - filled, _LITTLE)
                data = self._stream.read1(size) if self._is_gzip else self._stream.read(size)
            except EOFError:
                self._broken = Truncated("the compressed data end too early")
            except (OSError, zlib.error, ValueError) as error:
                reason = " ".join((str(error).strip() or type(error).__name__).split())[:100]
                self._broken = Truncated(f"the compressed data are damaged: {reason}")
            else:
                if not data:
                    break
                buffer[filled : filled + len(data)] = data
                filled += len(data)
        if not filled and self._broken is not None:
            raise self._broken
        return filled


def open_content(file: BinaryIO, compression: Compression | None) -> BinaryIO:
    """The decompressed content of an open file."""
    if compression is None:
        return file
    return io.BufferedReader(_Compressed(file, compression), 1 << 20)


def detect(path: Path, text_column: str | None = None) -> Detected:
    """Reads ten samples of a file. Raises OSError where it cannot be read."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        return detect_open(file, size, path.suffix.lower() in DATA_SUFFIXES, text_column)


def by_pyarrow(head: bytes) -> bool:
    """Whether a file with these first twelve bytes is read by pyarrow: Parquet, Arrow, Zstandard."""
    return head[:4] in (b"PAR1", _ZSTD) or head[:6] == b"ARROW1" or _is_arrow_stream(head)


def detect_open(file: BinaryIO, size: int, promises_text: bool, text_column: str | None) -> Detected:
    """The same for an open file. `promises_text`: what its name says."""
    head = file.read(SAMPLE_BYTES)
    if head[:4] == b"PAR1" or head[:6] == b"ARROW1" or _is_arrow_stream(head):
        return _columnar(file, head, text_column)
    compression: Compression | None = None
    if head[:3] == b"\x1f\x8b\x08":
        compression = "gzip"
    elif head[:4] == _ZSTD:
        compression = "zstd"
    if compression is None:
        windows = _windows(file, head, size)
        tail = _tail(file, size)
    else:
        file.seek(0)
        try:
            content = _beginning(open_content(file, compression))
        except Truncated as error:
            return _refuse(compression, f"is {compression}, and {error}", damaged=True)
        if content[:4] in (b"PAR1", b"ARRO"):
            return _refuse(compression, f"is Parquet or Arrow inside {compression}; unpack it", damaged=True)
        head, tail = content[:SAMPLE_BYTES], b""
        windows = _windows(io.BytesIO(content), head, len(content))
    if not head.strip() and not any(window.strip() for window in windows):
        return _refuse(None, "is empty")
    for mark, encoding in _BOMS:
        if head.startswith(mark):
            return _marked(head, encoding, compression)
    if head.lstrip()[:1] == b"[" and compression is None:  # its first elements may be long
        file.seek(0)
        head = file.read(LONGEST_SAMPLE)
    elif compression is not None:
        head = content
    return _judge(head.removeprefix(codecs.BOM_UTF8), windows, tail, text_column, promises_text, compression)


def _refuse(compression: Compression | None, reason: str, damaged: bool = False) -> Detected:
    return Detected(None, 0.0, [reason], compression=compression, refused=reason, damaged=damaged)


def _is_arrow_stream(head: bytes) -> bool:
    """Continuation mark, then the length of a flatbuffer that begins within itself."""
    if head[:4] != b"\xff\xff\xff\xff" or len(head) < 12:
        return False
    length, root = int.from_bytes(head[4:8], "little"), int.from_bytes(head[8:12], "little")
    return 8 <= length < 1 << 28 and 4 <= root < length


def _columnar(file: BinaryIO, head: bytes, text_column: str | None) -> Detected:
    import pyarrow

    file.seek(0)
    source = pyarrow.PythonFile(file, "r")
    try:
        if head[:4] == b"PAR1":
            import pyarrow.parquet

            kind: Kind = "parquet"
            schema = pyarrow.parquet.ParquetFile(source).schema_arrow
        elif head[:6] == b"ARROW1":
            kind = "arrow_file"
            schema = pyarrow.ipc.open_file(source).schema
        else:
            kind = "arrow_stream"
            schema = pyarrow.ipc.open_stream(source).schema
        names = list(schema.names)  # which may not be UTF-8
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError, UnicodeDecodeError) as error:
        name = {b"PAR1": "Parquet", b"ARRO": "an Arrow file"}.get(head[:4], "an Arrow stream")
        reason = f"begins as {name} but is cut off or damaged: {' '.join(str(error).split())[:120]}"
        return _refuse(None, reason, damaged=True)

    def is_text(kind: Any) -> bool:
        if pyarrow.types.is_dictionary(kind):
            kind = kind.value_type
        return (
            pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind)
        )

    wanted = (text_column,) if text_column else COLUMNS
    for name in wanted:
        if names.count(name) == 1 and is_text(schema.field(name).type):
            return Detected(kind, 1.0, [f"its first bytes and schema say {kind}", f"column {name!r} holds text"], name)
    seen = ", ".join(f"{item.name}: {item.type}" for item in list(schema)[:12])
    return _refuse(None, _no_column(f"is {kind}", wanted, f"its columns are {seen[:200]}"), damaged=True)


def _no_column(what: str, wanted: tuple[str, ...], seen: str) -> str:
    return f"{what} without a text column ({' or '.join(map(repr, wanted))}); {seen}; name one as data.text_column"


def _beginning(stream: BinaryIO) -> bytes:
    """The first bytes of compressed content; what comes before a break is enough to know the kind."""
    content = b""
    try:
        while len(content) < LONGEST_SAMPLE:
            data = stream.read1(1 << 18)  # type: ignore[attr-defined]
            if not data:
                break
            content += data
    except Truncated:
        if not content:
            raise
        content = content[: content.rfind(b"\n") + 1] or content
    return content


def _windows(file: BinaryIO, head: bytes, size: int) -> list[bytes]:
    """Up to ten pieces of whole lines from places spread evenly over the file."""
    if size <= SAMPLES * SAMPLE_BYTES:
        file.seek(0)
        lines = file.read().splitlines(keepends=True)
        lines = [line for line in lines if line.strip()]
        count = min(SAMPLES, len(lines))
        return [lines[int(len(lines) * _spread(number) / count)] for number in range(count)]
    windows = [_first_line(head, file, 0, size)]
    for number in range(1, SAMPLES):
        windows.append(_line_after(file, int(size * _spread(number) / SAMPLES), size))
    return windows


def _spread(number: int) -> float:
    """A place between `number` and the next: at equal distances, lines that alternate would all be of one kind."""
    return number + number * 0.618034 % 1


def _line_after(file: BinaryIO, offset: int, size: int) -> bytes:
    """The first whole line after `offset`, or a piece of the line it lies in where that is very long."""
    file.seek(offset)
    piece = file.read(SAMPLE_BYTES)
    while (end := piece.find(b"\n")) < 0:
        more = file.read(len(piece))
        if not more or len(piece) >= LONGEST_SAMPLE:
            return piece
        piece += more
    return _first_line(piece[end + 1 :], file, offset + end + 1, size)


def _first_line(piece: bytes, file: BinaryIO, offset: int, size: int) -> bytes:
    piece = piece.lstrip(b"\r\n")
    end = piece.find(b"\n")
    if end >= 0:
        return piece[:end]
    file.seek(offset)
    piece = file.read(min(LONGEST_SAMPLE, size - offset)).lstrip(b"\r\n")
    end = piece.find(b"\n")
    return piece[:end] if end >= 0 else piece


def _tail(file: BinaryIO, size: int) -> bytes:
    file.seek(max(0, size - 256))
    return file.read(256).rstrip()


def _marked(head: bytes, encoding: str, compression: Compression | None) -> Detected:
    try:
        codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError as error:
        return _refuse(compression, f"begins with a mark of {encoding} but is not: byte {error.start}", damaged=True)
    return Detected("text", 1.0, [f"a byte order mark of {encoding}"], compression=compression, encoding=encoding)


def _sample(line: bytes) -> _Sample:
    if b"\0" in line:
        return _Sample("binary")
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(line)
    except UnicodeDecodeError as error:
        # a piece out of a very long line may begin in the middle of a character
        if error.start < 3 and len(line) > SAMPLE_BYTES // 2:
            return _sample(line[3:])
        return _Sample("misencoded")
    if len(_CONTROL.findall(line)) > max(3, len(line) // 10):
        return _Sample("binary")
    if text.lstrip()[:1] in ("{", '"'):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return _Sample("text")
        return _Sample("string" if isinstance(value, str) else "record", value)
    return _Sample("text")


def _judge(
    head: bytes,
    windows: list[bytes],
    tail: bytes,
    text_column: str | None,
    promises_text: bool,
    compression: Compression | None,
) -> Detected:
    samples = [_sample(window) for window in windows]
    counts = Counter(sample.kind for sample in samples)
    total = len(samples)
    words = {
        "record": "JSON objects",
        "string": "JSON strings",
        "text": "UTF-8 text",
        "binary": "binary",
        "misencoded": "not UTF-8",
    }
    reasons = [f"{counts[kind]} of {total} samples are {words[kind]}" for kind in words if counts[kind]]
    elements, whole = _array_elements(head)
    if elements is not None:
        reasons = [f"begins as a JSON array, its first {len(elements)} elements are well formed"]
        confidence = 1.0
        if not whole and not compression and not tail.endswith(b"]"):
            reasons.append("does not end in ]")
            confidence = 0.8
        return _with_column("json", confidence, reasons, elements, text_column, compression)
    if re.match(rb'\s*\[\s*\{\s*"[^"]*"\s*:', head):
        return _refuse(compression, "begins as a JSON array, but its first element cannot be read", damaged=True)
    if counts["record"] + counts["string"] > counts["text"]:
        records = [sample.value for sample in samples if sample.kind in ("record", "string")]
        return _with_column("jsonl", len(records) / total, reasons, records, text_column, compression)
    if counts["binary"] and counts["binary"] >= total * (1 - THRESHOLD):
        where = " NUL byte" if any(b"\0" in window for window in windows) else " lot of control characters"
        return _refuse(compression, f"is binary: it holds a{where}", damaged=promises_text or compression is not None)
    confidence = counts["text"] / total
    if head.lstrip()[:1] == b"{" and tail.endswith(b"}") and _is_json_object(head):
        return Detected(
            None, 0.5, [*reasons, "the whole is one JSON object"],
            compression=compression,
            refused="is one JSON object, which may be records or a program's settings (confidence 0.5); "
            "write its records one per line",
        )  # fmt: skip
    refused = None
    if confidence < THRESHOLD:
        kind = "UTF-8 text" if counts["misencoded"] else "text"
        refused = f"is not surely {kind} (confidence {confidence:.1f} of {THRESHOLD}): {'; '.join(reasons)}"
    return Detected(
        "text" if refused is None else None,
        confidence,
        reasons,
        compression=compression,
        refused=refused,
        # Text in another encoding holds no NUL; a picture has lines with and lines without.
        damaged=refused is not None and (promises_text or bool(counts["misencoded"] and not counts["binary"])),
    )


def _is_json_object(head: bytes) -> bool:
    """A string, a colon and a value follow the brace: JSON rather than a program."""
    return re.match(rb'\s*\{\s*(?:"(?:[^"\\]|\\.)*"\s*:|\}\s*$)', head) is not None


def _array_elements(head: bytes) -> tuple[list[Any] | None, bool]:
    """Up to ten first elements of a JSON array of objects or strings and whether it ended, or None."""
    if head.lstrip()[:1] != b"[":
        return None, False
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(head).lstrip()
    decoder, at = json.JSONDecoder(), 1
    elements: list[Any] = []
    while len(elements) < SAMPLES:
        at += len(text[at:]) - len(text[at:].lstrip())
        if text[at : at + 1] == "]":
            return elements or None, True
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            # one long element: as much of an array of records as a piece of it can be
            return (elements, False) if elements else (None, False)
        if not isinstance(value, (dict, str)):
            return None, False
        elements.append(value)
        at += len(text[at:]) - len(text[at:].lstrip())
        if text[at : at + 1] == ",":
            at += 1
        elif text[at : at + 1] != "]":
            return (elements, False) if at >= len(text) else (None, False)
    return elements, False


def _with_column(
    kind: Kind,
    confidence: float,
    reasons: list[str],
    records: list[Any],
    text_column: str | None,
    compression: Compression | None,
) -> Detected:
    """The verdict on JSON records, once their text column is found in enough of them."""

    def share(name: str) -> float:
        holds = sum(isinstance(record, dict) and isinstance(record.get(name), str) for record in records)
        return holds / len(records)

    wanted = (text_column,) if text_column else COLUMNS
    column = max(wanted, key=share)  # the first of equals
    strings = sum(isinstance(record, str) for record in records) / len(records)
    name = {"jsonl": "JSON lines", "json": "a JSON array"}[kind]
    if strings >= THRESHOLD:
        column_share, found = strings, None
    else:
        column_share, found = share(column), column
    confidence *= column_share if column_share < 1 else 1
    if not column_share:
        keys = dict.fromkeys(key for record in records if isinstance(record, dict) for key in record)
        seen = f"its keys are {', '.join(map(str, list(keys)[:12]))[:200] or 'none'}"
        return _refuse(compression, _no_column(f"is {name}", wanted, seen), damaged=True)
    what = "are text themselves" if found is None else f"hold text in {found!r}"
    reasons = [*reasons, f"{column_share:.0%} of the sampled records {what}"]
    refused = None
    if confidence < THRESHOLD:
        refused = f"is not surely {name} (confidence {confidence:.1f} of {THRESHOLD}): {'; '.join(reasons)}"
    return Detected(
        kind if refused is None else None,
        confidence,
        reasons,
        column=found,
        compression=compression,
        refused=refused,
        damaged=refused is not None,
    )


def decoded_blocks(stream: BinaryIO, encoding: str) -> Iterator[str]:
    """The text of a stream, up to a MiB at a time. Raises UnicodeDecodeError, or Truncated of compressed data."""
    decoder = codecs.getincrementaldecoder(encoding)()
    while data := stream.read1(1 << 20):  # type: ignore[attr-defined]
        yield decoder.decode(data)
    yield decoder.decode(b"", final=True)
