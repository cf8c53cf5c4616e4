"""A checklist of a folder of text before it is prepared, or of a folder of shards after.

    for check in validate("my/texts"):
        print(check.ok, check.name, check.detail)

Of text, every file is looked at and a sample of each is read; nothing is written. Of shards, every byte is verified.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ava_fast.data.apart import Apart, Died
from ava_fast.data.assemble import format_of
from ava_fast.data.corpus import Corpus, File, Skipped, scan
from ava_fast.data.formats import detect
from ava_fast.data.prepare import progress_bar
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
    values: dict[str, Any] = field(default_factory=dict)
    """What `detail` says, for programs."""


def validate(folder: str | Path, text_column: str | None = None, progress: bool = False) -> list[Check]:
    """Every check that can be made, in the order of the table, up to the first without which others make no sense.

    `progress` shows bars on stderr for what takes more than two seconds.
    """
    path = Path(folder)
    if not path.is_dir():
        return [Check("exists", False, f"{folder} is not a folder")]
    checks = [Check("exists", True, str(path.resolve()))]
    if is_prepared(path):
        return checks + _shards(path, progress)
    try:
        corpus = scan(path, text_column, progress)
    except UserError as error:
        return [*checks, Check("files", False, str(error))]
    return checks + _text(corpus, progress)


def _text(corpus: Corpus, progress: bool) -> list[Check]:
    formats = Counter(format_of(file) for file in corpus.files)
    size, largest = sum(file.size for file in corpus.files), max(corpus.files, key=lambda file: file.size)
    damaged = [item for item in corpus.skipped if item.lost]
    others = [item for item in corpus.skipped if not item.lost]
    least = min(corpus.files, key=lambda file: file.confidence)
    checks = [
        Check(
            "files", not damaged, _list(f"{len(corpus.files):,} can be read", [_entry(item) for item in damaged]),
            {"readable": len(corpus.files), "damaged": [item.entry() for item in damaged]},
        ),
        Check(
            "formats", True, ", ".join(f"{count:,} {name}" for name, count in sorted(formats.items())),
            dict(sorted(formats.items())),
        ),
        Check("confidence", True, _confidence(least), {"least": least.confidence, "path": least.name}),
        Check(
            "sizes", True, f"{size / 1e6:,.1f} MB, the largest {largest.name} of {largest.size / 1e6:,.1f} MB",
            {"bytes": size, "largest": largest.name, "largest_bytes": largest.size},
        ),
    ]  # fmt: skip
    if others:
        detail = _list(f"{len(others):,} are not data", [_entry(item) for item in others])
        checks.append(Check("other files", True, detail, {"others": [item.entry() for item in others]}))
    faults: list[str] = []
    copies: list[str] = []
    seen: dict[bytes, str] = {}
    characters = documents = 0
    # None: only on a terminal
    bar = tqdm(corpus.files, "sampling", unit=" files", delay=2, disable=None if progress else True)
    with Apart() as apart:
        for file in bar:
            for record in _sample_apart(file, apart):
                if isinstance(record, Lost):
                    if record.bytes or record.records:
                        place = " ".join([file.name, *(f"{key} {value}" for key, value in record.where.items())])
                        faults.append(f"{place}: {record.reason}")
                    continue
                documents += 1
                characters += len(record.text)
                digest = blake2b(record.text.encode(), digest_size=16).digest()
                if digest in seen:
                    copies.append(f"in {file.name} and {seen[digest]}")
                seen.setdefault(digest, file.name)
    columns = Counter(file.column for file in corpus.files if file.column)
    where = ", ".join(f"{name!r} in {count:,} files" for name, count in columns.items())
    estimate = int(size * _text_share(corpus.files) / BYTES_PER_TOKEN)
    length = f"{characters // max(1, documents):,} characters a document"
    return [
        *checks,
        Check(
            "samples", not faults, _list(f"{documents:,} documents read, {len(faults):,} places unreadable", faults),
            {"documents": documents, "unreadable": len(faults), "first": faults[:100]},
        ),
        Check("text", characters > 0, f"{where or 'plain text'}; {length}", {"columns": columns}),
        Check("tokens", True, f"about {estimate:,}, at {BYTES_PER_TOKEN:g} bytes each", {"estimate": estimate}),
        Check(
            "duplicates", True, _list(f"{len(copies):,} of {documents:,} sampled documents are copies", copies),
            {"copies": len(copies), "of": documents},
        ),
    ]  # fmt: skip


def _confidence(least: File) -> str:
    """Of the file that is least surely what it is taken for, and why."""
    if least.confidence == 1:
        return "1.0 in every file"
    found = detect(least.path, least.column)
    return f"at least {least.confidence:.1f}, of {least.name}: {'; '.join(found.reasons)}"


def _text_share(files: list[File]) -> float:
    """Bytes of text per byte of file: compression and columnar formats hold more, JSON's keys less; roughly."""
    total = sum(file.size for file in files)
    more = {"gzip": 3.0, "zstd": 3.0, None: 1.0}
    columnar = {"parquet": 2.0}
    return sum(file.size * more[file.compression] * columnar.get(file.kind, 1.0) for file in files) / max(1, total)


def _sample_apart(file: File, apart: Apart) -> Iterator[Record | Lost]:
    """`_sample`, in a process of its own where pyarrow reads."""
    if not file.by_pyarrow:
        yield from _sample(file)
        return
    try:
        yield from apart.each(_sample, file)
    except Died as error:
        yield Lost(str(error), {}, file.size, file.size)


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


def _shards(folder: Path, progress: bool) -> list[Check]:
    try:
        index = read_index(folder)
    except UserError as error:
        return [Check("index", False, str(error))]
    total = index.train.tokens + index.validation.tokens
    expected = {"tokenizer.json": index.tokenizer_sha256}
    for name, split in (("train", index.train), ("validation", index.validation)):
        expected |= {shard.file: shard.sha256 for shard in split.shards}
        if split.boundaries_sha256:
            expected[f"{name}/documents.bin"] = split.boundaries_sha256
        if split.checks_sha256:
            expected[f"{name}/checks.bin"] = split.checks_sha256
    size = sum((folder / name).stat().st_size for name in expected if (folder / name).is_file())
    with progress_bar(size, "verifying", progress) as bar:
        wrong = [name for name, sha256 in expected.items() if _sha256(folder / name, bar.update) != sha256]
    documents = index.train.documents + index.validation.documents
    rejected = sum(index.rejected.values())
    share = index.loss.share if index.loss else 0.0
    return [
        Check(
            "index", True, f"{total:,} tokens of {index.vocab_size:,} kinds, from {index.source}",
            {"tokens": total, "vocab_size": index.vocab_size, "source": index.source},
        ),
        Check(
            "hashes", not wrong, _list(f"{len(expected) - len(wrong)} of {len(expected)} files agree", wrong),
            {"files": len(expected), "wrong": wrong},
        ),
        Check(
            "documents", True, f"{documents:,} kept, {rejected:,} left out by filters",
            {"kept": documents, "rejected": index.rejected},
        ),
        Check(
            "loss", True, f"{share:.2%} could not be read, {index.skipped:,} entries in skipped.jsonl",
            {"share": share, "entries": index.skipped},
        ),
    ]  # fmt: skip


def _sha256(file: Path, passed: Callable[[int], object]) -> str | None:
    digest = hashlib.sha256()
    try:
        with file.open("rb") as data:
            while block := data.read(1 << 20):
                digest.update(block)
                passed(len(block))
    except OSError:
        return None
    return digest.hexdigest()
