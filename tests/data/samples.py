"""Files of every format, whole and broken, for the tests of what reads them."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

WORDS = ["alpha", "beta", "gamma", "delta", "Größe", "日本", "foo()", "return", "x", "of", "the", "and"]


def text(number: int, words: int = 40) -> str:
    generator = random.Random(number)
    return f"document {number} " + " ".join(generator.choices(WORDS, k=words))


def jsonl(numbers: range, column: str = "text") -> bytes:
    return "".join(
        json.dumps({"id": n, column: text(n)}, ensure_ascii=bool(n % 2)) + "\n" for n in numbers
    ).encode()  # fmt: skip


def arrow_table(numbers: range, column: str = "text") -> pa.Table:
    return pa.table({"id": list(numbers), column: [text(n) for n in numbers]})


def parquet(numbers: range, column: str = "text", rows: int = 50) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(arrow_table(numbers, column), sink, row_group_size=rows)
    return sink.getvalue().to_pybytes()


def arrow(numbers: range, column: str = "text", stream: bool = False) -> bytes:
    sink, table = pa.BufferOutputStream(), arrow_table(numbers, column)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        for start in range(0, len(table), 50):  # slices would share their characters
            writer.write_table(arrow_table(numbers[start : start + 50], column))
    return sink.getvalue().to_pybytes()


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


MAKERS: dict[str, Callable[[range], bytes]] = {
    "jsonl": jsonl,
    "jsonl.gzip": lambda numbers: gzip.compress(jsonl(numbers), mtime=0),
    "jsonl.zstd": lambda numbers: zstd(jsonl(numbers)),
    "json": lambda numbers: json.dumps([{"text": text(n)} for n in numbers]).encode(),
    "json, a line each": lambda numbers: json.dumps([{"text": text(n)} for n in numbers], indent=1).encode(),
    "parquet": parquet,
    "arrow_file": arrow,
    "arrow_stream": lambda numbers: arrow(numbers, stream=True),
}
"""By format: a file of the documents `text(n)`; names do not say what they are."""


def write_all(folder: Path, documents: int = 120) -> dict[str, list[str]]:
    """A folder with each format once, in two sources; its texts by file."""
    texts = {}
    for place, (name, make) in enumerate(MAKERS.items()):
        numbers = range(1000 * place, 1000 * place + documents)
        path = folder / ("first" if place % 2 else "second") / f"part-{place}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make(numbers))
        texts[f"{path.parent.name}/{path.name}"] = [text(n) for n in numbers]
        assert name
    for number, name in enumerate(("notes.md", "first/code.py")):
        (folder / name).write_text(f"# {text(90_000 + number)}\n")
        texts[name] = [f"# {text(90_000 + number)}\n"]
    return texts
