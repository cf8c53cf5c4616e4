"""A checklist of a folder of text before it is prepared, or of a folder of shards after.

    for check in validate("my/texts"):
        print(check.ok, check.name, check.detail)

Of text, every file is looked at and a sample of each is read; nothing is written. Of shards, every byte is verified.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path

from ava_fast.data.assemble import format_of
from ava_fast.data.corpus import Corpus, File, Skipped, scan
from ava_fast.data.readers import Lost, Part, Record, divide, read
from ava_fast.data.shards import is_prepared, read_index
from ava_fast.errors import UserError

SAMPLED_RECORDS = 100
"""Of each file of records: from its first, its middle and its last part."""
BYTES_PER_TOKEN = 4.0
"""Of English text in a large vocabulary, for the estimate."""


@dataclass(frozen=True)
class Check:
    """One row of the table."""

    name: str
    ok: bool
    detail: str


def validate(folder: str | Path, text_column: str | None = None) -> list[Check]:
    """Every check that can be made, in the order of the table, up to the first without which others make no sense."""
    path = Path(folder)
    if not path.is_dir():
        return [Check("exists", False, f"{folder} is not a folder")]
    checks = [Check("exists", True, str(path.resolve()))]
    if is_prepared(path):
        return checks + _shards(path)
    try:
        corpus = scan(path, text_column)
    except UserError as error:
        return [*checks, Check("files", False, str(error))]
    return checks + _text(corpus)


def _text(corpus: Corpus) -> list[Check]:
    formats = Counter(format_of(file) for file in corpus.files)
    size, largest = sum(file.size for file in corpus.files), max(corpus.files, key=lambda file: file.size)
    damaged = [item for item in corpus.skipped if item.lost]
    others = len(corpus.skipped) - len(damaged)
    checks = [
        Check("files", not damaged, _list(f"{len(corpus.files):,} can be read", [_entry(item) for item in damaged])),
        Check("formats", True, ", ".join(f"{count:,} {name}" for name, count in sorted(formats.items()))),
        Check("sizes", True, f"{size / 1e6:,.1f} MB, the largest {largest.name} of {largest.size / 1e6:,.1f} MB"),
    ]  # fmt: skip
    if others:
        names = [_entry(item) for item in corpus.skipped if not item.lost]
        checks.append(Check("other files", True, _list(f"{others:,} are not data", names)))
    faults: list[str] = []
    copies: list[str] = []
    seen: dict[bytes, str] = {}
    characters = documents = 0
    for file in corpus.files:
        for record in _sample(file):
            if isinstance(record, Lost):
                if record.bytes or record.records:
                    place = " ".join(f"{key} {value}" for key, value in record.where.items())
                    faults.append(f"{file.name} {place}: {record.reason}")
                continue
            documents += 1
            characters += len(record.text)
            digest = blake2b(record.text.encode(), digest_size=16).digest()
            if digest in seen:
                copies.append(f"in {file.name} and {seen[digest]}")
            seen.setdefault(digest, file.name)
    columns = Counter(file.column for file in corpus.files if file.kind != "text")
    where = ", ".join(f"{name!r} in {count:,} files" for name, count in columns.items() if name)
    estimate = int(size * _text_share(corpus.files) / BYTES_PER_TOKEN)
    length = f"{characters // max(1, documents):,} characters a document"
    return [
        *checks,
        Check("samples", not faults, _list(f"{documents:,} documents read, {len(faults):,} places unreadable", faults)),
        Check("text", characters > 0, f"{where or 'plain text'}; {length}"),
        Check("tokens", True, f"about {estimate:,}, at {BYTES_PER_TOKEN:g} bytes each"),
        Check("duplicates", True, _list(f"{len(copies):,} of {documents:,} sampled documents are copies", copies)),
    ]  # fmt: skip


def _text_share(files: list[File]) -> float:
    """Bytes of text per byte of file: compression and columnar formats hold more, JSON's keys less; roughly."""
    total = sum(file.size for file in files)
    more = {"gzip": 3.0, "zstd": 3.0, None: 1.0}
    columnar = {"parquet": 2.0}
    return sum(file.size * more[file.compression] * columnar.get(file.kind, 1.0) for file in files) / max(1, total)


def _sample(file: File) -> Iterator[Record | Lost]:
    spans = divide(file.kind, file.path, file.size, file.compression, file.encoding)
    if file.kind == "text":
        spans, limit = spans[:1], 1
    else:
        spans = [spans[n] for n in sorted({0, len(spans) // 2, len(spans) - 1})] if spans else []
        limit = -(-SAMPLED_RECORDS // max(1, len(spans)))
    for start, stop in spans:
        part = Part(file.kind, start, stop, file.column, file.compression, file.encoding)
        for item in islice(read(file.path, part), limit):
            if isinstance(item, Record | Lost):
                yield item


def _entry(item: Skipped) -> str:
    return f"{item.path} {item.reason}"


def _list(first: str, examples: list[str]) -> str:
    if not examples:
        return first
    more = f" and {len(examples) - 3:,} more" if len(examples) > 3 else ""
    return f"{first}: {'; '.join(examples[:3])}{more}"


def _shards(folder: Path) -> list[Check]:
    try:
        index = read_index(folder)
    except UserError as error:
        return [Check("index", False, str(error))]
    total = index.train.tokens + index.validation.tokens
    checks = [Check("index", True, f"{total:,} tokens of {index.vocab_size:,} kinds, from {index.source}")]
    expected = {"tokenizer.json": index.tokenizer_sha256}
    for name, split in (("train", index.train), ("validation", index.validation)):
        expected |= {shard.file: shard.sha256 for shard in split.shards}
        if split.boundaries_sha256:
            expected[f"{name}/documents.bin"] = split.boundaries_sha256
    wrong = [name for name, sha256 in expected.items() if _sha256(folder / name) != sha256]
    checks.append(
        Check("hashes", not wrong, _list(f"{len(expected) - len(wrong)} of {len(expected)} files agree", wrong))
    )
    documents = index.train.documents + index.validation.documents
    rejected = sum(index.rejected.values())
    checks.append(Check("documents", True, f"{documents:,} kept, {rejected:,} left out by filters"))
    share = index.loss.share if index.loss else 0.0
    checks.append(Check("loss", True, f"{share:.2%} could not be read, {index.skipped:,} entries in skipped.jsonl"))
    return checks


def _sha256(file: Path) -> str | None:
    digest = hashlib.sha256()
    try:
        with file.open("rb") as data:
            while block := data.read(1 << 20):
                digest.update(block)
    except OSError:
        return None
    return digest.hexdigest()
