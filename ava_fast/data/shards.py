"""Token shards: flat little-endian files of token ids, each document followed by the end-of-text id.

    <folder>/index.json            what is in the folder (`Index`); written last
    <folder>/tokenizer.json
    <folder>/train/00000.bin …     uint16 if the vocabulary has at most 65,536 tokens, else uint32
    <folder>/validation/00000.bin …
    <folder>/train/documents.bin   where each document ends and which source it is from (`DOCUMENT`)
    <folder>/train/checks.bin      CRC-32 of every `CHECKED_BYTES` of each shard, little-endian
    <folder>/skipped.jsonl         what was not read, one {"path", …, "reason"} per line
    <folder>/rejected.jsonl        what the filters left out: each reason, how often, and the first document of it

    index = read_index(folder)
    stream = TokenStream(folder, index, "train")
    stream.read(0, 1000)

A folder is written under a temporary name beside its own, synced, and renamed: it is there whole or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import secrets
import shutil
import struct
import weakref
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError

from ava_fast.data.corpus import Skipped
from ava_fast.errors import UserError
from ava_fast.files import sync, write_synced
from ava_fast.settings import Count, Positive, Section

FORMAT_VERSION: Final = 1
SHARD_TOKENS = 64 * 2**20
CHECKED_BYTES = 1024
"""What is read is verified in pieces of this size; their checks take 0.4 % of the shards' size."""
COUNTED_TOKENS = 1 << 20
"""At a time, where ends of text are counted."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


DOCUMENT = np.dtype([("end", "<u8"), ("bytes", "<u4"), ("source", "<u4")])
"""A document in `documents.bin`: the split's tokens up to and with its end, its UTF-8, which of `sources`."""


class Shard(Section):
    """One token file."""

    file: Annotated[str, Field(pattern=r"^(train|validation)/\d{5,}\.bin$")]
    tokens: Positive
    sha256: Sha256


class SplitIndex(Section):
    """One split's files, in the order in which their tokens follow each other."""

    documents: Count
    bytes: Count
    """Of the documents' UTF-8: loss per token · tokens / bytes is comparable between tokenizers."""
    tokens: Count
    """Counting one end of text per document."""
    shards: list[Shard]
    boundaries_sha256: Sha256 | None = None
    """Of `documents.bin`. None: the folder is from before there was one."""
    checks_sha256: Sha256 | None = None
    """Of `checks.bin`. None: the folder is from before there was one, and damage shows only in impossible tokens."""


class Source(Section):
    """A folder directly below the data, or `.` for the files beside these, and what was kept of it."""

    name: str
    files: dict[str, Count]
    """By format."""
    documents: Count = 0
    bytes: Count = 0
    tokens: Count = 0


class Loss(Section):
    """How much of the data could not be read."""

    bytes: Count = 0
    of_bytes: Count = 0
    records: Count = 0
    of_records: Count = 0

    @property
    def share(self) -> float:
        """The larger of the two shares."""
        return max(self.bytes / max(1, self.of_bytes), self.records / max(1, self.of_records))


class Index(Section):
    """`index.json`."""

    format_version: Literal[1]
    dtype: Literal["uint16", "uint32"]
    vocab_size: Annotated[int, Field(ge=1, le=2**31)]
    eos_id: Count
    tokenizer_sha256: Sha256
    source: str
    """Where the documents came from."""
    skipped: Count
    """What was not read; `skipped.jsonl` says why, a line each."""
    train: SplitIndex
    validation: SplitIndex
    sources: list[Source] = Field(default_factory=list)
    rejected: dict[str, Count] = Field(default_factory=dict)
    """Documents that the filters left out, by reason; `rejected.jsonl` shows one of each."""
    loss: Loss | None = None

    def split(self, name: str) -> SplitIndex:
        """`train` or `validation`."""
        return {"train": self.train, "validation": self.validation}[name]

    def fingerprint(self, split: str) -> str:
        """Changes whenever the split's tokens do, and only then; not with where the folder lies."""
        content = [self.dtype, *(shard.sha256 for shard in self.split(split).shards)]
        return hashlib.sha256("\n".join(content).encode()).hexdigest()


class Piece(NamedTuple):
    """Tokens of a document, or of a part of a long one."""

    tokens: Sequence[int] | npt.NDArray[Any]
    bytes: int
    ends_document: bool
    source: int = 0


def write_shards(
    folder: Path,
    train: Iterable[Piece],
    validation: Iterable[Piece],
    *,
    tokenizer_json: bytes,
    vocab_size: int,
    eos_id: int,
    source: str,
    skipped: Iterable[Skipped],
    rejected: Iterable[dict[str, Any]] = (),
    sources: list[Source] | None = None,
    loss: Loss | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> None:
    """Writes `folder` from both splits' pieces, whose token ids are below `vocab_size`.

    `rejected` holds lines of `rejected.jsonl`; `sources` are completed with what the pieces add up to.

    If another process finished the same folder first, its result stays. Raises UserError when the disk is full or
    refuses; what was written by then is removed.
    """
    dtype: Literal["uint16", "uint32"] = "uint16" if vocab_size <= 2**16 else "uint32"
    temporary = folder.with_name(f".{folder.name}.tmp-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        write_synced(temporary / "tokenizer.json", tokenizer_json)
        entries = _write_lines(temporary / "skipped.jsonl", (item.entry() for item in skipped))
        rejected = list(rejected)
        _write_lines(temporary / "rejected.jsonl", rejected)
        totals = np.zeros((len(sources or [0]), 3), np.int64)
        writing = (dtype, eos_id, shard_tokens, totals)
        train_index = _write_split(temporary / "train", train, *writing)
        validation_index = _write_split(temporary / "validation", validation, *writing)
        index = Index(
            format_version=FORMAT_VERSION,
            dtype=dtype,
            vocab_size=vocab_size,
            eos_id=eos_id,
            tokenizer_sha256=hashlib.sha256(tokenizer_json).hexdigest(),
            source=os.fsencode(source).decode(errors="replace"),
            skipped=entries,
            train=train_index,
            validation=validation_index,
            sources=[
                source.model_copy(update=dict(zip(("documents", "bytes", "tokens"), counts, strict=True)))
                for source, counts in zip(sources or [], totals.tolist(), strict=False)
            ],
            rejected={entry["reason"]: entry["count"] for entry in rejected},
            loss=loss,
        )
        write_synced(temporary / "index.json", (index.model_dump_json(indent=1) + "\n").encode())
        sync(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / "index.json").is_file():
                raise
        sync(folder.parent)
    except OSError as error:
        raise UserError(
            f"data.cache_dir: cannot write {folder}: {error.strerror}; free some space or set data.cache_dir elsewhere"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_index(folder: str | Path) -> Index:
    """The index, once every shard and its checks have been found to be as long as it says.

    Raises UserError naming the file that is missing, malformed, of another format version, or of the wrong size.
    """
    file = Path(folder) / "index.json"
    try:
        tree: Any = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"data.data_dir: {file} cannot be read: {error.strerror}; prepare the data again") from None
    except ValueError:
        raise UserError(f"data.data_dir: {file} is not JSON; delete {folder} and prepare the data again") from None
    version = tree.get("format_version") if isinstance(tree, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(
            f"data.data_dir: {file} has format_version {version}, this version reads {FORMAT_VERSION}; "
            "prepare the data again"
        )
    try:
        index = Index.model_validate(tree)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(
            f"data.data_dir: {file} is damaged at {where}; delete {folder} and prepare the data again"
        ) from None
    for name in ("train", "validation"):
        split = index.split(name)
        for shard in split.shards:
            _check_size(Path(folder) / shard.file, shard.tokens * np.dtype(index.dtype).itemsize)
        if split.checks_sha256 is not None:
            checks = sum(_pieces(shard.tokens * np.dtype(index.dtype).itemsize) for shard in split.shards)
            _check_size(Path(folder) / name / "checks.bin", checks * 4)
    return index


def is_prepared(folder: str | Path) -> bool:
    """Whether `write_shards` made this folder, as opposed to a folder of text."""
    return all((Path(folder) / name).is_file() for name in ("index.json", "tokenizer.json"))


def check_vocabulary(vocab_size: int, model_vocab_size: int, key: str = "model.vocab_size") -> None:
    """Raises UserError when the data's tokenizer (`Index.vocab_size`) has more ids than the model has embeddings."""
    if vocab_size > model_vocab_size:
        raise UserError(f"{key}: {model_vocab_size} is too small for the data's tokenizer; give at least {vocab_size}")


class TokenStream:
    """A split's tokens as one long array on the disk. `len(stream)` counts them.

    They are read through the page cache rather than a memory map, at the same speed: where a file has been cut short
    or its disk fails, a map would kill the process, and a read says so. Every byte is verified before it is used. An
    open file outlives its removal or replacement.
    """

    def __init__(self, folder: str | Path, index: Index, split: str):
        """Raises UserError naming a file that cannot be opened."""
        own = index.split(split)
        self._dtype = np.dtype(index.dtype).newbyteorder("<")
        self.eos_id = index.eos_id
        self._vocab_size = index.vocab_size
        self._sizes = [shard.tokens * self._dtype.itemsize for shard in own.shards]
        self._ends = np.cumsum([shard.tokens for shard in own.shards], dtype=np.int64).tolist()
        self._first_piece = np.cumsum([0, *map(_pieces, self._sizes)]).tolist()
        self._documents_in: dict[int, int] = {}  # shard → ends of text in it, once they were counted
        checks = Path(folder) / split / "checks.bin" if own.checks_sha256 is not None else None
        with ExitStack() as opened:
            self._files = [opened.enter_context(_open(Path(folder) / shard.file)) for shard in own.shards]
            self._checks = opened.enter_context(_open(checks)) if checks is not None else None
            self.close = opened.pop_all().close
        weakref.finalize(self, self.close)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def arrays(self) -> list[npt.NDArray[Any]]:
        """Each shard's tokens, read-only and memory-mapped, for one pass over all of them. Nothing is verified.

        Raises UserError naming a file that has become shorter; one that does so later kills the process.
        """
        try:
            for file, size in zip(self._files, self._sizes, strict=True):
                _check_length(file, size)
            return [np.memmap(file.name, self._dtype, mode="r") for file in self._files]
        except OSError as error:
            raise UserError(f"data.data_dir: {error.filename} cannot be mapped: {error.strerror}") from None

    def document(self, position: int) -> int:
        """Which document the token at `position` belongs to, counted from 0; its end of text is its last token.

        Counts the ends of text before it, a shard at a time, and remembers each whole shard's.
        """
        shard = bisect_right(self._ends, position)
        for earlier in range(shard):
            if earlier not in self._documents_in:
                self._documents_in[earlier] = self._count_ends(earlier, self._ends[earlier] - self._start(earlier))
        whole = sum(self._documents_in[earlier] for earlier in range(shard))
        return whole + self._count_ends(shard, position - self._start(shard))

    def read(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Tokens [start, stop), across files. Raises as `read_rows` does."""
        return self.read_rows([start], stop - start)[0]

    def read_rows(self, starts: Sequence[int], length: int) -> npt.NDArray[np.int64]:
        """The `length` tokens from each of `starts` on, across files, as (len(starts), length).

        Raises UserError naming a file that cannot be read, is damaged, or has become shorter, and where.
        """
        rows = np.empty((len(starts), length), np.int64)
        for row, start in zip(rows, starts, strict=True):
            shard = bisect_right(self._ends, start)
            while len(row):
                first = start - self._start(shard)
                part = self._tokens(shard, first, min(first + len(row), self._ends[shard] - self._start(shard)))
                row[: len(part)] = part
                row, start, shard = row[len(part) :], start + len(part), shard + 1
        if rows.size and rows.max() >= self._vocab_size:
            self._name_damage(rows, starts)
        return rows

    def _start(self, shard: int) -> int:
        return self._ends[shard - 1] if shard else 0

    def _tokens(self, shard: int, first: int, stop: int) -> npt.NDArray[Any]:
        """Tokens [first, stop) of a shard, verified where there are checks."""
        size = self._dtype.itemsize
        if self._checks is None:
            return np.frombuffer(self._bytes(shard, first * size, stop * size), self._dtype)
        start = first * size // CHECKED_BYTES
        end = _pieces(stop * size)
        data = self._bytes(shard, start * CHECKED_BYTES, min(end * CHECKED_BYTES, self._sizes[shard]))
        place = self._first_piece[shard]
        checks = _pread(self._checks, 4 * (place + start), 4 * (end - start))
        if (found := _crcs(data)) != checks:
            wrong = start + next(n for n in range(end - start) if found[4 * n : 4 * n + 4] != checks[4 * n : 4 * n + 4])
            raise UserError(
                f"data.data_dir: {self._files[shard].name} or the checks.bin beside it is damaged: bytes "
                f"{wrong * CHECKED_BYTES:,} to {min((wrong + 1) * CHECKED_BYTES, self._sizes[shard]):,} are not what "
                "was written; delete its folder and prepare the data again"
            )
        return np.frombuffer(data, self._dtype, stop - first, first * size - start * CHECKED_BYTES)

    def _bytes(self, shard: int, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a shard's file."""
        data = _pread(self._files[shard], start, stop - start)
        if len(data) < stop - start:
            _check_length(self._files[shard], self._sizes[shard])
            data += _pread(self._files[shard], start + len(data), stop - start - len(data))  # a signal came
        return data

    def _count_ends(self, shard: int, stop: int) -> int:
        size = self._dtype.itemsize
        blocks = (
            self._bytes(shard, start * size, min(start + COUNTED_TOKENS, stop) * size)
            for start in range(0, stop, COUNTED_TOKENS)
        )
        return sum(int(np.count_nonzero(np.frombuffer(block, self._dtype) == self.eos_id)) for block in blocks)

    def _name_damage(self, rows: npt.NDArray[np.int64], starts: Sequence[int]) -> NoReturn:
        row, column = np.argwhere(rows >= self._vocab_size)[0].tolist()
        position = starts[row] + column
        shard = bisect_right(self._ends, position)
        offset = (position - self._start(shard)) * self._dtype.itemsize
        raise UserError(
            f"data.data_dir: {self._files[shard].name} holds token {rows[row, column]} but the vocabulary has "
            f"{self._vocab_size} (at byte {offset}); the file is damaged: delete its folder and prepare the data again"
        )


def _pieces(size: int) -> int:
    """How many checks that many bytes have."""
    return -(-size // CHECKED_BYTES)


def _crcs(data: bytes) -> bytes:
    """The checks of bytes whose first is at the beginning of a piece."""
    view = memoryview(data)
    crcs = [zlib.crc32(view[start : start + CHECKED_BYTES]) for start in range(0, len(data), CHECKED_BYTES)]
    return struct.pack(f"<{len(crcs)}I", *crcs)


def _pread(file: FileIO, start: int, size: int) -> bytes:
    try:
        return os.pread(file.fileno(), size, start)
    except OSError as error:
        raise UserError(
            f"data.data_dir: {file.name} cannot be read at byte {start:,}: {error.strerror}; copy its folder to "
            "another disk, or prepare the data again"
        ) from None


def _check_length(file: FileIO, needed: int) -> None:
    if (size := os.fstat(file.fileno()).st_size) < needed:
        raise UserError(
            f"data.data_dir: {file.name} has been cut to {size:,} of {needed:,} bytes since this run opened it; "
            "prepare the data again"
        )


def _open(path: Path) -> FileIO:
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        if error.errno == errno.EMFILE:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            if soft < hard:  # a file stays open for each shard
                resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
                return _open(path)
        raise UserError(f"data.data_dir: {path} cannot be opened: {error.strerror}; prepare the data again") from None


def _write_lines(file: Path, entries: Iterable[dict[str, Any]]) -> int:
    count = 0
    with file.open("w", encoding="ascii") as lines:
        for entry in entries:
            lines.write(json.dumps(entry) + "\n")
            count += 1
    sync(file)
    return count


def _write_split(
    folder: Path,
    pieces: Iterable[Piece],
    dtype: str,
    eos_id: int,
    shard_tokens: int,
    totals: npt.NDArray[np.int64],
) -> SplitIndex:
    """Adds each source's documents, bytes and tokens to `totals`, (sources, 3)."""
    folder.mkdir()
    shards: list[Shard] = []
    boundaries, checked, unchecked = hashlib.sha256(), hashlib.sha256(), b""
    kind = np.dtype(dtype).newbyteorder("<")
    filled = documents = size = written = document_bytes = document_tokens = 0
    hashed, shard = hashlib.sha256(), None

    def check(data: bytes, whole: int) -> None:
        """Writes the checks of the first `whole` bytes, and keeps the others."""
        nonlocal unchecked
        crcs, unchecked = _crcs(data[:whole]), data[whole:]
        checks.write(crcs)
        checked.update(crcs)

    def close() -> None:
        nonlocal filled, shard, hashed
        check(unchecked, CHECKED_BYTES)
        if shard is not None:
            shard.close()
            sync(Path(shard.name))
            name = f"{folder.name}/{Path(shard.name).name}"
            shards.append(Shard(file=name, tokens=filled, sha256=hashed.hexdigest()))
        filled, hashed, shard = 0, hashlib.sha256(), None

    with (folder / "documents.bin").open("wb") as table, (folder / "checks.bin").open("wb") as checks:
        try:
            for piece in pieces:
                tokens = np.asarray(piece.tokens, kind)
                if piece.ends_document:
                    tokens = np.append(tokens, np.asarray(eos_id, kind))
                size, written = size + piece.bytes, written + len(tokens)
                document_bytes, document_tokens = document_bytes + piece.bytes, document_tokens + len(tokens)
                if piece.ends_document:
                    documents += 1
                    row = np.array([(written, min(document_bytes, 2**32 - 1), piece.source)], DOCUMENT).tobytes()
                    table.write(row)
                    boundaries.update(row)
                    totals[piece.source] += (1, document_bytes, document_tokens)
                    document_bytes = document_tokens = 0
                while len(tokens):
                    if shard is None:
                        shard = (folder / f"{len(shards):05d}.bin").open("wb", buffering=1 << 20)
                    part, tokens = tokens[: shard_tokens - filled], tokens[shard_tokens - filled :]
                    data = part.tobytes()
                    shard.write(data)
                    hashed.update(data)
                    unchecked += data
                    check(unchecked, len(unchecked) // CHECKED_BYTES * CHECKED_BYTES)
                    filled += len(part)
                    if filled == shard_tokens:
                        close()
            close()
        finally:
            if shard is not None:
                shard.close()
    sync(folder / "documents.bin")
    sync(folder / "checks.bin")
    sync(folder)
    return SplitIndex(
        documents=documents,
        bytes=size,
        tokens=written,
        shards=shards,
        boundaries_sha256=boundaries.hexdigest(),
        checks_sha256=checked.hexdigest(),
    )


def _check_size(file: Path, size: int) -> None:
    actual = file.stat().st_size if file.is_file() else None
    if actual != size:
        found = "is missing" if actual is None else f"holds {actual:,} bytes"
        raise UserError(
            f"data.data_dir: {file} {found} where the index says {size:,}; delete its folder and prepare the data again"
        )
