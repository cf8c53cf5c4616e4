"""Files of text below a folder, or below the running Python's standard library, each with what it is.

    corpus = scan("my/texts")          # None: the standard library's source, without its tests
    corpus.files[0].kind, corpus.files[0].column

Every file is looked at once to learn what it is (see `formats`) and what identifies its content, so that the same files
give the same result wherever they lie. What is not text is listed with the reason, never just dropped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import platform
import stat
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ava_fast.data.apart import Apart, Died
from ava_fast.data.formats import DATA_SUFFIXES, SAMPLES, Compression, Detected, Kind, by_pyarrow, detect_open
from ava_fast.data.readers import LONGEST_TEXT, divide
from ava_fast.errors import UserError

HASHED_BYTES = 64 << 20
"""Larger files are identified by their size, their time and ten samples instead of all their content."""
# What an installed Python keeps beside its own library's source. pydoc_data is the language reference as one generated
# document, 6 % of the text; encodings is 12 %, mostly character tables that are near-copies of each other, so that a
# model would have seen what is held out.
NOT_LIBRARY = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "encodings", "__pycache__"}
)


@dataclass(frozen=True)
class File:
    """A file that can be read, or the characters [start, stop) of one of plain text."""

    name: str
    """Path relative to the corpus, with forward slashes."""
    path: Path
    sha256: str
    """Of the whole file, or of what identifies a large one."""
    size: int
    """Bytes; of plain text in UTF-8, that text's."""
    mtime_ns: int = 0
    kind: Kind = "text"
    column: str | None = None
    compression: Compression | None = None
    encoding: str = "utf-8-sig"
    start: int = 0
    stop: int | None = None
    confidence: float = 1.0
    """In `kind` and `column`: see `formats`."""

    @property
    def source(self) -> str:
        """The folder directly below the corpus that it lies in; `.` for none."""
        folder, slash, _ = self.name.partition("/")
        return folder if slash else "."

    @property
    def is_one_document(self) -> bool:
        """It is plain text, short enough to stay whole."""
        return self.kind == "text" and self.compression is None and self.size <= LONGEST_TEXT

    @property
    def by_pyarrow(self) -> bool:
        """Its reader is not Python's own."""
        return self.kind in ("parquet", "arrow_file", "arrow_stream") or self.compression == "zstd"

    def read(self) -> str:
        """The text of a file that is one document. Raises UserError if it is no longer what `scan` saw."""
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise UserError(
                f"data.data_dir: {self.path} cannot be read: {error.strerror}, though it was read before; prepare again"
            ) from None
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise UserError(f"data.data_dir: {self.path} changed while the folder was being prepared; prepare again")
        return data.decode(self.encoding)[self.start : self.stop]


@dataclass(frozen=True)
class Skipped:
    """Something below the folder that is not read, and why; a line of `skipped.jsonl`."""

    path: str
    reason: str
    where: dict[str, int] = field(default_factory=dict)
    """The place in the file: line, record, or row_group and row; `to` where several in a row are the same."""
    lost: int = 0
    """Bytes of data that should have been readable."""

    def entry(self) -> dict[str, Any]:
        """Path, place and reason."""
        return {"path": self.path, **self.where, "reason": self.reason}


@dataclass(frozen=True)
class Corpus:
    """What `scan` found, ordered by name."""

    source: str
    files: list[File]
    skipped: list[Skipped]


def scan(data_dir: str | Path | None, text_column: str | None = None, progress: bool = False) -> Corpus:
    """Every file with text below `data_dir`; None: the standard library's source. What is hidden is left out.

    Raises UserError when the folder is missing or holds no text.
    """
    if data_dir is None:
        root = Path(sysconfig.get_path("stdlib"))
        names, skipped = _walk(root, NOT_LIBRARY)
        names = [name for name in names if name.endswith(".py") and (root / name).stat().st_size]
        source = f"source of the Python {platform.python_version()} standard library"
    else:
        root = Path(data_dir)
        # An unset shell variable gives "", which Path would take for the working directory.
        if not str(data_dir) or not root.is_dir():
            problem = "is a file; give the folder that holds it" if root.is_file() else "is not a folder"
            raise UserError(f"data.data_dir: '{data_dir}' {problem}")
        names, skipped = _walk(root)
        source = str(root.resolve())
    from tqdm import tqdm  # the workers, who import this module too, start sooner without

    files = []
    # None: only on a terminal
    bar = tqdm(names, "looking at files", unit=" files", delay=2, disable=None if progress else True)
    with Apart() as apart:
        for name in bar:
            found = look(root, name, text_column, apart)
            if isinstance(found, Skipped):
                skipped.append(found)
            else:
                files.append(found)
    skipped.sort(key=lambda item: item.path)
    if not files:
        seen = f"skipped {len(skipped)}, such as {skipped[0].path}: {skipped[0].reason}" if skipped else "it is empty"
        raise UserError(f"data.data_dir: '{root}' holds no readable text ({seen}); see docs/data.md for what is read")
    return Corpus(source, files, skipped)


def look(root: Path, name: str, text_column: str | None, apart: Apart | None = None) -> File | Skipped:
    """What one file is. With `apart`, one that pyarrow has to read is looked at there."""
    path = root / name
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            return Skipped(name, "is not a regular file")
        with path.open("rb") as file:
            # A small file is read once, for its kind, its hash and whether all of it is text.
            data = file.read() if status.st_size <= LONGEST_TEXT else None
            if apart is not None and by_pyarrow((file.peek(1) if data is None else data)[:12]):
                try:
                    (answer,) = apart.each(_look_and_divide, root, name, text_column)
                except Died as error:
                    return Skipped(name, str(error), lost=status.st_size)
                return answer
            content: BinaryIO = file if data is None else io.BytesIO(data)
            promises_text = path.suffix.lower() in DATA_SUFFIXES
            found = detect_open(content, status.st_size, promises_text, text_column)
            identity = hashlib.sha256(data).hexdigest() if data is not None else _identity(file, status)
    except OSError as error:
        return Skipped(name, f"cannot be read: {error.strerror}", lost=1)
    reason, damaged = found.refused, found.damaged
    if data is not None and found.compression is None and found.encoding == "utf-8-sig":
        reason, damaged = _whole_text(data, found, promises_text)
    if reason is not None:
        return Skipped(name, reason, lost=status.st_size if damaged else 0)
    assert found.kind is not None
    return File(
        name,
        path,
        identity,
        status.st_size,
        status.st_mtime_ns,
        found.kind,
        found.column,
        found.compression,
        found.encoding,
        confidence=found.confidence,
    )


def _look_and_divide(root: Path, name: str, text_column: str | None) -> Iterator[File | Skipped]:
    """`look`, and what reads the same file next, in whatever process: where that crashes, it is to be here."""
    found = look(root, name, text_column)
    if isinstance(found, File):
        with suppress(OSError, ValueError):
            divide(found.kind, found.path, found.size, found.compression, found.encoding)
    yield found


def _whole_text(data: bytes, found: Detected, promises_text: bool) -> tuple[str | None, bool]:
    """Why a file that was read whole is set aside, and whether that is damage, where its samples say plain text."""
    if found.kind not in ("text", None) or (found.kind is None and "UTF-8" not in str(found.refused)):
        return found.refused, found.damaged
    if b"\0" in data:
        return "is binary: it holds a NUL byte", promises_text
    try:
        data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return f"is not UTF-8 text: byte {error.start}", True
    return found.refused, found.damaged


def _identity(file: BinaryIO, status: os.stat_result) -> str:
    """SHA-256 of a file's content, or of what changes with a large one's."""
    digest = hashlib.sha256()
    if status.st_size <= HASHED_BYTES:
        file.seek(0)
        while block := file.read(1 << 20):
            digest.update(block)
    else:
        digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
        for number in range(SAMPLES + 1):
            file.seek(max(0, (status.st_size - (1 << 16)) * number // SAMPLES))
            digest.update(file.read(1 << 16))
    return digest.hexdigest()


def split(documents: list[File], validation_fraction: float) -> tuple[list[File], list[File]]:
    """(train, validation), both non-empty. A document's side depends on its name alone, so new files move no old ones.

    A document is held out when the hash of its name, as a number in [0, 1), is below `validation_fraction`. If that
    leaves a side empty, the document whose hash is nearest to the threshold changes sides. A single document is cut:
    its last `validation_fraction` of characters is held out.
    """
    if len(documents) == 1:
        (document,) = documents
        text = document.read()
        cut = max(1, int(len(text) * (1 - validation_fraction)))
        size = len(text[:cut].encode())
        head = dataclasses.replace(document, size=size, stop=cut)
        tail = dataclasses.replace(document, size=document.size - size, start=cut)
        return [head], [tail]
    by_hash = sorted(documents, key=lambda document: (unit_hash(document.name), document.name))
    held_out = sum(unit_hash(document.name) < validation_fraction for document in documents)
    held_out = min(max(held_out, 1), len(documents) - 1)
    validation = {document.name for document in by_hash[:held_out]}
    return (
        [document for document in documents if document.name not in validation],
        [document for document in documents if document.name in validation],
    )


def unit_hash(name: str) -> float:
    """A hash of a name, as a number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:6], "big") / 2**48


def _walk(root: Path, exclude: frozenset[str] = frozenset()) -> tuple[list[str], list[Skipped]]:
    """Names of all files below `root`, sorted, and the folders that could not be entered."""
    names, skipped = [], []

    def refuse(folder: str, reason: str) -> None:
        skipped.append(Skipped(Path(folder).relative_to(root).as_posix(), reason))

    def refuse_unreadable(error: OSError) -> None:
        refuse(error.filename, f"cannot be listed: {error.strerror}")

    for folder, subfolders, files in os.walk(root, onerror=refuse_unreadable):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in exclude]
        for name in subfolders:
            if os.path.islink(os.path.join(folder, name)):
                refuse(os.path.join(folder, name), "is a link to a folder, which is not followed")
        relative = Path(folder).relative_to(root)
        names += [(relative / name).as_posix() for name in files if not name.startswith(".")]
    return sorted(names), skipped
