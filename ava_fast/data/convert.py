"""A file of any format that is read → Parquet with one column, `text`: in bounded memory, whole or not at all.

    converted = to_parquet(Path("data"), "part-7.jsonl.gz")     # Converted("part-7.jsonl.gz.parquet", rows=…)

Only what can be read without a loss is converted; of anything else the caller learns why, and it stays as it is for
`prepare`, which counts losses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from ava_fast.data.apart import Apart, Died
from ava_fast.data.corpus import File, Skipped, look
from ava_fast.data.readers import Lost, Part, Record, divide, read
from ava_fast.files import sync

GROUP_CHARACTERS = 16 << 20
"""Text in a row group, and in memory."""


class Converted(NamedTuple):
    """What lies beside the source now."""

    name: str
    rows: int
    size: int
    sha256: str


def to_parquet(
    root: Path, name: str, text_column: str | None = None, passed: Callable[[int], object] = lambda count: None
) -> Converted | str:
    """Writes `<name>.parquet` beside a file, or returns why that is as it should be.

    `passed` gets the bytes of the file that were read. Raises OSError where the disk refuses; nothing stays then.
    """
    with Apart() as apart:
        return _to_parquet(look(root, name, text_column, apart), passed, apart)


def _to_parquet(found: File | Skipped, passed: Callable[[int], object], apart: Apart) -> Converted | str:
    import pyarrow
    import pyarrow.parquet

    if isinstance(found, Skipped):
        return found.reason
    if found.kind == "parquet":
        return "is Parquet"
    target = found.path.with_name(f"{found.path.name}.parquet")
    part = target.with_name(f".{target.name}.part")
    schema = pyarrow.schema([("text", pyarrow.string())])
    rows = size = 0
    group: list[str] = []
    try:
        with pyarrow.parquet.ParquetWriter(part, schema, compression="zstd") as writer:
            for item in _records(found, passed, apart):
                if isinstance(item, Lost):
                    place = " ".join(f"{key} {value}" for key, value in item.where.items())
                    return f"{place} {item.reason}".strip()
                group.append(item.text)
                rows, size = rows + 1, size + len(item.text)
                if size >= GROUP_CHARACTERS:
                    writer.write_table(pyarrow.table({"text": group}, schema))
                    group, size = [], 0
            writer.write_table(pyarrow.table({"text": group}, schema))
        sync(part)
        digest = hashlib.sha256()
        with part.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        part.replace(target)
    except Died as error:
        return str(error)
    finally:
        part.unlink(missing_ok=True)
    return Converted(f"{found.name}.parquet", rows, target.stat().st_size, digest.hexdigest())


def _records(file: File, passed: Callable[[int], object], apart: Apart) -> Iterator[Record | Lost]:
    """All records, and what is lost. A record without text is neither."""
    at = 0
    for start, stop in divide(file.kind, file.path, file.size, file.compression, file.encoding):
        part = Part(file.kind, start, stop, file.column, file.compression, file.encoding)
        for item in apart.each(read, file.path, part) if file.by_pyarrow else read(file.path, part):
            if isinstance(item, Record) or (isinstance(item, Lost) and (item.bytes or item.records)):
                yield item
            if isinstance(item, Record | Lost) and item.position > at:
                passed(item.position - at)
                at = item.position
