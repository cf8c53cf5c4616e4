"""From batches (`work`) to shards: places, losses and rejections are added up, copies go, the sides are divided."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from ava_fast.data.corpus import Corpus, File, Skipped
from ava_fast.data.filters import PERMUTATIONS, near_copies
from ava_fast.data.shards import Loss, Piece, Source, write_shards
from ava_fast.data.work import TABLE, Event, Plan, load_batch
from ava_fast.errors import UserError

EXACT, NEAR = "a copy of an earlier document", "a near-copy of an earlier document"


@dataclass
class Tally:
    """What was lost and rejected, and where first."""

    loss: Loss
    lost_to: Counter[str] = field(default_factory=Counter)
    """Bytes by `path: reason`, for damage alone."""
    rejected: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By reason: lines of rejected.jsonl."""


def tally(work: Path, corpus: Corpus, plan: Plan | None) -> Tally:
    """Adds up the scan's losses and, with a plan, those of the batches in `work`."""
    lost, records, read = sum(item.lost for item in corpus.skipped), 0, 0
    counts = Tally(Loss(), Counter({f"{item.path}: {item.reason}": item.lost for item in corpus.skipped if item.lost}))
    for path in _batch_paths(work) if plan else []:
        events, table, _ = load_batch(path)
        read += len(table)
        for event in events:
            assert plan is not None
            name = plan.files[event.file].name
            if event.kind == "lost":
                lost, records = lost + event.bytes, records + event.records
                if event.bytes or event.records:
                    counts.lost_to[f"{name}: {event.reason}"] += event.bytes + event.records
            elif event.kind == "rejected":
                read += 1
                _reject(counts.rejected, event.reason, name, event.where, event.sample)
    counts.loss = Loss(
        bytes=lost,
        of_bytes=sum(file.size for file in corpus.files) + sum(item.lost for item in corpus.skipped),
        records=records,
        of_records=records + read,
    )
    return counts


def check_loss(counts: Tally, max_loss: float, source: str) -> None:
    """Raises UserError naming the worst where more than `max_loss` of the data cannot be read."""
    if counts.loss.share <= max_loss:
        return
    worst = "; ".join(place for place, _ in counts.lost_to.most_common(3))
    raise UserError(
        f"data.max_loss: {counts.loss.share:.2%} of {source} cannot be read, more than {max_loss:.2%}"
        f"{f': {worst}' if worst else ''}; mend or remove these, or raise data.max_loss (`ava-fast validate` shows all)"
    )


def assemble(
    folder: Path,
    work: Path,
    corpus: Corpus,
    plan: Plan,
    counts: Tally,
    validation_fraction: float,
    tokenizer: Tokenizer,
    *,
    tokenizer_json: bytes,
    vocab_size: int,
    eos_id: int,
) -> None:
    """Writes the shards of all batches in `work` and their ledgers.

    In memory are some 50 bytes a document; tokens and signatures stay on disk. Raises UserError where fewer than two
    documents are left.
    """
    paths = _batch_paths(work)
    tables = [load_batch(path)[1] for path in paths]
    edges = np.cumsum([0, *map(len, tables)])
    table = np.concatenate(tables) if tables else np.zeros(0, TABLE)
    del tables
    kept = np.ones(len(table), bool)
    if plan.filters.exact_duplicates and not plan.heldout_share:
        _, first = np.unique(table["digest"], return_index=True)
        kept[:] = False
        kept[first] = True
        _reject_copies(counts, EXACT, ~kept, paths, edges, table, plan, tokenizer)
    if plan.filters.near_duplicates is not None:
        signatures = _signatures(work / "signatures", paths, int(kept.sum()), edges, kept)
        left_out = np.zeros(len(table), bool)
        left_out[kept] = near_copies(signatures, plan.filters.near_duplicates)
        _reject_copies(counts, NEAR, left_out, paths, edges, table, plan, tokenizer)
        kept &= ~left_out
    heldout = _sides(table["unit"], kept, validation_fraction, corpus.source)
    formats: dict[str, Counter[str]] = {}
    for file in plan.files:
        formats.setdefault(file.source, Counter())[format_of(file)] += 1
    sources = [Source(name=name, files=dict(sorted(formats[name].items()))) for name in sorted(formats)]
    place = {source.name: number for number, source in enumerate(sources)}
    source_of = np.array([place[file.source] for file in plan.files])
    write_shards(
        folder,
        _pieces(paths, edges, table, kept & ~heldout, source_of),
        _pieces(paths, edges, table, kept & heldout, source_of),
        tokenizer_json=tokenizer_json,
        vocab_size=vocab_size,
        eos_id=eos_id,
        source=corpus.source,
        skipped=_skipped(paths, corpus, plan),
        rejected=counts.rejected.values(),
        sources=sources,
        loss=counts.loss,
    )


def format_of(file: File) -> str:
    """Its kind as people call it: `jsonl`, `text.gzip`."""
    return file.kind + (f".{file.compression}" if file.compression else "")


def _batch_paths(work: Path) -> list[Path]:
    return [work / name for name in sorted(os.listdir(work)) if name.endswith(".npz") and not name.startswith(".")]


def _sides(
    unit: npt.NDArray[np.float64], kept: npt.NDArray[np.bool_], validation_fraction: float, source: str
) -> npt.NDArray[np.bool_]:
    """Which documents are held out: as `corpus.split` does it, for documents of any kind."""
    heldout = np.zeros(len(unit), bool)
    candidates = np.flatnonzero(kept)
    if len(candidates) < 2:
        left = "one document is" if len(candidates) else "no document is"
        raise UserError(
            f"data.data_dir: {left} left of {source}, two are needed, one of them to hold out; "
            "give more text or filter less"
        )
    order = candidates[np.argsort(unit[candidates], kind="stable")]
    count = int((unit[candidates] < validation_fraction).sum())
    heldout[order[: min(max(count, 1), len(candidates) - 1)]] = True
    return heldout


def _pieces(
    paths: list[Path],
    edges: npt.NDArray[np.int64],
    table: npt.NDArray[Any],
    wanted: npt.NDArray[np.bool_],
    source_of: npt.NDArray[np.int64],
) -> Iterator[Piece]:
    for number, path in enumerate(paths):
        start, stop = int(edges[number]), int(edges[number + 1])
        if not wanted[start:stop].any():
            continue
        tokens = load_batch(path)[2]("tokens")
        ends = np.cumsum(table["tokens"][start:stop].astype(np.int64)).tolist()
        for index in np.flatnonzero(wanted[start:stop]).tolist():
            row = table[start + index]
            yield Piece(
                tokens[ends[index] - int(row["tokens"]) : ends[index]],
                int(row["bytes"]),
                True,
                int(source_of[row["file"]]),
            )


def _skipped(paths: list[Path], corpus: Corpus, plan: Plan) -> Iterator[Skipped]:
    """The ledger: first whole files, then places in files, their lines counted from the file's beginning."""
    yield from corpus.skipped
    before: Counter[int] = Counter()
    for path in paths:
        for event in load_batch(path)[0]:
            if event.kind == "lines":
                before[event.file] += event.where["line"]
            elif event.kind == "lost":
                yield Skipped(plan.files[event.file].name, event.reason, _absolute(event, before), event.bytes)


def _absolute(event: Event, before: Counter[int]) -> dict[str, int]:
    shift = before[event.file] if "line" in event.where else 0
    return {key: value + shift for key, value in event.where.items()}


def _reject(rejected: dict[str, dict[str, Any]], reason: str, name: str, where: dict[str, int], sample: str) -> None:
    entry = rejected.setdefault(reason, {"reason": reason, "count": 0, "path": name, **where, "text": sample})
    entry["count"] += 1


def _reject_copies(
    counts: Tally,
    reason: str,
    left_out: npt.NDArray[np.bool_],
    paths: list[Path],
    edges: npt.NDArray[np.int64],
    table: npt.NDArray[Any],
    plan: Plan,
    tokenizer: Tokenizer,
) -> None:
    if not left_out.any():
        return
    index = int(np.argmax(left_out))
    batch = int(np.searchsorted(edges, index, side="right")) - 1
    start = int(table["tokens"][int(edges[batch]) : index].sum())
    tokens = load_batch(paths[batch])[2]("tokens")[start : start + min(40, int(table["tokens"][index]))]
    text = " ".join(tokenizer.decode(tokens.tolist(), skip_special_tokens=False).split())[:80]
    name = plan.files[int(table["file"][index])].name
    counts.rejected[reason] = {"reason": reason, "count": int(left_out.sum()), "path": name, "text": text}


def _signatures(
    file: Path, paths: list[Path], documents: int, edges: npt.NDArray[np.int64], kept: npt.NDArray[np.bool_]
) -> npt.NDArray[np.uint32]:
    """The kept documents' signatures, memory-mapped: (documents, PERMUTATIONS)."""
    with file.open("wb") as target:
        for number, path in enumerate(paths):
            wanted = kept[int(edges[number]) : int(edges[number + 1])]
            if wanted.any():
                target.write(load_batch(path)[2]("signatures")[wanted].tobytes())
    if not documents:
        return np.zeros((0, PERMUTATIONS), np.uint32)
    return np.memmap(file, np.uint32, mode="r", shape=(documents, PERMUTATIONS))
