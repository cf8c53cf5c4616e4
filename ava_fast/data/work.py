"""One process's share of preparing: a task's files → documents → tokens, saved a few MiB of text at a time.

    python -m ava_fast.data.work PLAN.json     # started by `pool`: task numbers on stdin, a line of JSON per batch back

A task is a list of parts of files, the same however many processes share the work. Each batch of it is written whole or
not at all, so that a killed run goes on with the first batch that is missing. The batches in the order of their names
are the result, whoever computed them.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from ava_fast.data.apart import Apart, Died
from ava_fast.data.corpus import File, unit_hash
from ava_fast.data.encoder import WordEncoder
from ava_fast.data.filters import PERMUTATIONS, load_hook, reject, signature
from ava_fast.data.readers import PART_BYTES, Lines, Lost, Part, Record, divide, read
from ava_fast.data.tokenizer import cut, load_tokenizer
from ava_fast.errors import UserError
from ava_fast.files import sync

if TYPE_CHECKING:  # the settings' models, which were checked before, take half of a worker's start
    from ava_fast.settings import FiltersConfig

BATCH_CHARACTERS = 4 << 20
"""Text per batch."""
CALL_CHARACTERS = 1 << 20
"""Text per call of the encoder: more is slower, for the memory it takes."""
BATCH_EVENTS = 10_000
TABLE = np.dtype([("unit", "<f8"), ("digest", "V16"), ("tokens", "<u8"), ("bytes", "<u8"), ("file", "<u4")])
"""A document in a batch: held out where `unit` is below the fraction; the hash of its text; its lengths; its file."""

Span = tuple[int, int, int]
"""A part of a file: its number, start, stop."""


class Document(NamedTuple):
    """A text that is kept so far."""

    text: str
    unit: float
    digest: bytes
    file: int


class Event(NamedTuple):
    """Something to report of a file, in the order of reading."""

    kind: str
    """lost, lines or rejected"""
    file: int
    where: dict[str, int]
    reason: str = ""
    bytes: int = 0
    records: int = 0
    sample: str = ""


@dataclass
class Batch:
    """A few MiB of documents, and what happened on the way to them."""

    documents: list[Document] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    read: int = 0
    """Bytes of the files that were passed over."""
    last: bool = False


@dataclass(frozen=True)
class Plan:
    """Everything that determines the batches."""

    files: list[File]
    tasks: list[list[Span]]
    filters: FiltersConfig
    heldout_share: float = 0.0
    """Share of the characters of the only document of the corpus that are held out; 0 where there are more."""

    def dump(self) -> dict[str, Any]:
        """As JSON, for `load`."""
        return {
            "files": [[*vars(file).values()] for file in self.files],
            "tasks": self.tasks,
            "filters": self.filters.model_dump(),
            "heldout_share": self.heldout_share,
        }  # fmt: skip

    @classmethod
    def load(cls, tree: dict[str, Any]) -> Plan:
        files = [File(name, Path(path), *rest) for name, path, *rest in tree["files"]]
        tasks = [[(number, start, stop) for number, start, stop in task] for task in tree["tasks"]]
        filters = cast("FiltersConfig", SimpleNamespace(**tree["filters"]))
        return cls(files, tasks, filters, tree["heldout_share"])


def make_plan(files: list[File], filters: FiltersConfig, heldout_share: float = 0.0) -> Plan:
    """Small text files share a task; every other part of a file is one."""
    tasks: list[list[Span]] = []
    small: list[Span] = []
    size = 0
    for number, file in enumerate(files):
        try:
            spans = divide(file.kind, file.path, file.size, file.compression, file.encoding)
        except (OSError, ValueError) as error:
            raise UserError(f"data.data_dir: {file.path} changed while it was being prepared: {error}") from None
        joins = len(spans) == 1 and file.is_one_document
        if small and (not joins or size + file.size > PART_BYTES):
            tasks.append(small)
            small, size = [], 0
        if joins:
            small.append((number, *spans[0]))
            size += file.size
        else:
            tasks.extend([(number, *span)] for span in spans)
    if small:
        tasks.append(small)
    return Plan(files, tasks, filters, heldout_share)


def batches(plan: Plan, task: list[Span], characters: int, apart: Apart | None = None) -> Iterator[Batch]:
    """A task's documents and events, in batches that depend on nothing else; the last one is marked.

    With `apart`, what pyarrow reads is read there.
    """
    hook, _ = load_hook(plan.filters.hook)
    batch, size = Batch(), 0
    for number, start, stop in task:
        file = plan.files[number]
        _check_unchanged(file)
        before = 0 if file.kind in ("parquet", "arrow_file") else start
        for item in _read(plan, number, start, stop, apart):
            if isinstance(item, Lines):
                batch.events.append(Event("lines", number, {"line": item.total}))
                continue
            batch.read, before = batch.read + max(0, item.position - before), max(before, item.position)
            if isinstance(item, Lost):
                _add_loss(batch.events, Event("lost", number, item.where, item.reason, item.bytes, item.records))
            else:
                reason = reject(plan.filters, item.text)
                if reason is None and hook is not None:
                    reason = _ask(hook, item.text, file, plan.filters.hook)
                if reason is None:
                    document = _document(file, number, start, item)
                    if plan.heldout_share:
                        document = document._replace(unit=2.0 - item.where["record"])
                    batch.documents.append(document)
                    size += len(item.text)
                else:
                    sample = " ".join(item.text[:400].split())[:80]
                    batch.events.append(Event("rejected", number, item.where, reason, sample=sample))
            if size >= characters or len(batch.events) >= BATCH_EVENTS:
                yield batch
                batch, size = Batch(), 0
    batch.last = True
    yield batch


def _read(plan: Plan, number: int, start: int, stop: int, apart: Apart | None) -> Iterator[Record | Lost | Lines]:
    file = plan.files[number]
    part = Part(file.kind, start, stop, file.column, file.compression, file.encoding)
    if plan.heldout_share:
        # The only document there is: its end is held out.
        text = file.read()
        edge = max(1, int(len(text) * (1 - plan.heldout_share)))
        yield Record(text[:edge], {"record": 1}, 0)
        yield Record(text[edge:], {"record": 2}, file.size)
    elif apart is None or not file.by_pyarrow:
        yield from read(file.path, part)
    else:
        try:
            yield from apart.each(read, file.path, part)
        except Died as error:
            yield Lost(str(error), {}, file.size, span_bytes(plan, (number, start, stop)))


def span_bytes(plan: Plan, span: Span) -> int:
    """How much of a file that is; of one that is divided by row groups or batches, its share of these."""
    number, start, stop = span
    file = plan.files[number]
    if file.kind not in ("parquet", "arrow_file"):
        return stop - start
    return (
        file.size
        * (stop - start)
        // sum(part[2] - part[1] for parts in plan.tasks for part in parts if part[0] == number)
    )


def _document(file: File, number: int, start: int, item: Record) -> Document:
    digest = blake2b(item.text.encode(), digest_size=16).digest()
    if file.kind != "text":
        # By content: a copy elsewhere is on the same side, and new records move no old ones.
        unit = int.from_bytes(digest[:6], "big") / 2**48
    elif start or item.where.get("record", 1) > 1:
        unit = unit_hash(f"{file.name}#{start}#{item.where.get('record', 1)}")
    else:
        unit = unit_hash(file.name)
    return Document(item.text, unit, digest, number)


def _ask(hook: Callable[[str], str | None], text: str, file: File, name: str | None) -> str | None:
    try:
        answer = hook(text)
    except Exception as error:
        raise UserError(
            f"filters.hook: {name} failed on a text of {file.path}: {type(error).__name__}: {error}"
        ) from error
    if answer is not None and not isinstance(answer, str):
        raise UserError(f"filters.hook: {name} gave a {type(answer).__name__}; it must give a reason, or None to keep")
    return answer and answer[:200]


def _add_loss(events: list[Event], event: Event) -> None:
    """Neighbours that are lost for the same reason become one entry."""
    last = events[-1] if events else None
    if last is not None and last.kind == "lost" and last.file == event.file and event.where and last.where:
        same = last.reason.partition(":")[0] == event.reason.partition(":")[0]
        *outer, (unit, number) = event.where.items()
        end = last.where.get("to", last.where.get(unit, -2))
        if same and end == number - 1 and all(last.where.get(key) == value for key, value in outer):
            where = {**last.where, "to": number}
            total = last.bytes + event.bytes, last.records + event.records
            events[-1] = last._replace(where=where, bytes=total[0], records=total[1])
            return
    events.append(event)


def _check_unchanged(file: File) -> None:
    try:
        status = file.path.stat()
    except OSError as error:
        raise UserError(f"data.data_dir: {file.path} cannot be read: {error.strerror}; prepare again") from None
    if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
        raise UserError(f"data.data_dir: {file.path} changed while the folder was being prepared; prepare again")


class Worker:
    """Computes batches of one plan into one folder."""

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        tokenizer: Tokenizer,
        dtype: str,
        characters: int = BATCH_CHARACTERS,
        apart: Apart | None = None,
    ):
        self._folder, self._plan, self._encoder, self._apart = folder, plan, WordEncoder(tokenizer), apart
        self._dtype, self._characters = np.dtype(dtype).newbyteorder("<"), characters

    def run(self, task: int, report: Callable[[dict[str, Any]], None]) -> None:
        """Completes a task: batches that are there already are read again but not computed."""
        found = batches(self._plan, self._plan.tasks[task], self._characters, self._apart)
        for number, batch in enumerate(found):
            path = batch_path(self._folder, task, number, batch.last)
            tokens = 0
            if not path.exists():
                tokens = self._save(path, batch)
            lost = [event for event in batch.events if event.kind == "lost"]
            report({
                "read": batch.read, "tokens": tokens, "lost": sum(event.bytes for event in lost), "last": batch.last
            })  # fmt: skip

    def _save(self, path: Path, batch: Batch) -> int:
        table = np.zeros(len(batch.documents), TABLE)
        for number, document in enumerate(batch.documents):
            size = len(document.text.encode())
            table[number] = (document.unit, document.digest, 0, size, document.file)
        tokens = [np.zeros(0, self._dtype)]
        for numbers, ids, counts in self._encode(batch.documents):
            np.add.at(table["tokens"], numbers, counts.astype(np.uint64))
            tokens.append(ids.astype(self._dtype))
        arrays = {"table": table, "tokens": np.concatenate(tokens)}
        if self._plan.filters.near_duplicates is not None:
            signatures = [signature(document.text) for document in batch.documents]
            arrays["signatures"] = np.array(signatures, np.uint32).reshape(-1, PERMUTATIONS)
        save_batch(path, batch.events, arrays)
        return len(arrays["tokens"])

    def _encode(
        self, documents: list[Document]
    ) -> Iterator[tuple[list[int], npt.NDArray[np.uint32], npt.NDArray[np.int64]]]:
        """(document of each next piece, the tokens of these pieces, how many of them are each piece's), in order."""
        numbers: list[int] = []
        pieces: list[str] = []
        size = 0
        for number, document in enumerate(documents):
            for piece in cut(document.text):
                numbers.append(number)
                pieces.append(piece)
                size += len(piece)
                if size >= CALL_CHARACTERS:
                    yield numbers, *self._encoder(pieces)
                    numbers, pieces, size = [], [], 0
        if pieces:
            yield numbers, *self._encoder(pieces)


def batch_path(folder: Path, task: int, number: int, last: bool) -> Path:
    """The file of a batch."""
    return folder / f"{task:08d}-{number:06d}{'.last' if last else ''}.npz"


def save_batch(path: Path, events: list[Event], arrays: dict[str, npt.NDArray[Any]]) -> None:
    """Writes a batch whole or not at all."""
    text = json.dumps([list(event) for event in events]).encode()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, events=np.frombuffer(text, np.uint8), **arrays)
    sync(temporary)
    temporary.rename(path)


def load_batch(path: Path) -> tuple[list[Event], npt.NDArray[Any], Callable[[str], npt.NDArray[Any]]]:
    """Its events and its table; `tokens` and `signatures` are read by the function that comes with them."""
    with np.load(path, allow_pickle=False) as arrays:
        events = [Event(*fields) for fields in json.loads(arrays["events"].tobytes())]
        table = arrays["table"] if "table" in arrays else np.zeros(0, TABLE)

    def array(name: str) -> npt.NDArray[Any]:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[name]

    return events, table, array


def finished_tasks(folder: Path) -> set[int]:
    """Tasks that have their last batch; every earlier one is there then."""
    return {int(name[:8]) for name in os.listdir(folder) if name.endswith(".last.npz") and not name.startswith(".")}


def write_lost(folder: Path, plan: Plan, task: int, reason: str) -> None:
    """The last batch of a task that no process survives."""
    number = 0
    while batch_path(folder, task, number, False).exists():
        number += 1
    events = []
    for span in plan.tasks[task]:
        events.append(Event("lost", span[0], {}, reason, span_bytes(plan, span), 1))
    save_batch(batch_path(folder, task, number, True), events, {})


def main() -> None:
    """A worker process."""
    tree = json.loads(Path(sys.argv[1]).read_bytes())
    plan = Plan.load(tree["plan"])
    worker = Worker(
        Path(tree["folder"]), plan, load_tokenizer(tree["tokenizer"]), tree["dtype"], tree["batch_characters"]
    )

    def report(line: dict[str, Any]) -> None:
        print(json.dumps(line), flush=True)

    for line in sys.stdin:
        try:
            worker.run(int(line), report)
        except UserError as error:
            report({"error": str(error)})
        except BrokenPipeError:  # nobody will use what is left of the task
            sys.exit(1)
        except OSError as error:
            report({"error": f"data.cache_dir: {error.filename or tree['folder']}: {error.strerror or error}"})


if __name__ == "__main__":
    main()
