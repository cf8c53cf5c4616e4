"""From a folder of text to a folder of token shards, once per distinct input.

    folder = prepare(None, "outputs/data", vocab_size=1024)      # the standard library's source

The result lies in `<cache_dir>/<key>`, where the key is a hash of everything that determines it: the files' names and
contents, the tokenizer, the filters, the held-out fraction, the format. Asking again finds it at once. What is finished
of an interrupted run lies in `<cache_dir>/.<key>.work` and is not computed again. Processes that prepare the same input
at the same time wait for the first; in a distributed run, let one rank call this.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import tokenizers
from tokenizers import Tokenizer
from tqdm import tqdm

from ava_fast.data import pool
from ava_fast.data.apart import Apart
from ava_fast.data.assemble import Tally, assemble, check_loss, tally
from ava_fast.data.corpus import Corpus, scan, split
from ava_fast.data.filters import load_hook, near_duplicates_library
from ava_fast.data.shards import FORMAT_VERSION, check_vocabulary, is_prepared, read_index
from ava_fast.data.tokenizer import (
    end_of_text_id,
    load_tokenizer,
    tokenizer_file,
    train_tokenizer,
    vocabulary_size,
)
from ava_fast.data.work import BATCH_CHARACTERS, Plan, Worker, batches, finished_tasks, make_plan, write_lost
from ava_fast.errors import UserError
from ava_fast.files import write_whole
from ava_fast.settings import FiltersConfig

PROCESS_BYTES = 8 << 20
"""Text that makes another process worth its start."""
TRAINING_BYTES = 1 << 30
"""Of files, from which a tokenizer is trained; where there are more, of tasks spread evenly over them."""
BAR_DELAY_SECONDS = 2

logger = logging.getLogger(__name__)


def prepare(
    data_dir: str | Path | None,
    cache_dir: str | Path,
    *,
    vocab_size: int,
    tokenizer_name: str | Path | None = None,
    validation_fraction: float = 0.05,
    text_column: str | None = None,
    filters: FiltersConfig | None = None,
    max_loss: float = 0.01,
    processes: int | None = None,
    progress: bool = True,
) -> Path:
    """The folder of shards for `data_dir`: found in the cache, made now, or `data_dir` itself if it is one.

    `tokenizer_name` None trains a byte-level BPE of `vocab_size` tokens on the training documents; a given tokenizer
    must fit into `vocab_size`. `filters` do not apply to the standard library's source, which is always the same.
    `processes` None: one per core, fewer for little text; the result is the same for any number. `progress` shows bars
    with an ETA on stderr for what takes more than two seconds.
    Raises UserError naming the setting or file at fault, or what was lost where that is a larger share than `max_loss`.
    """
    if data_dir is not None and is_prepared(data_dir):
        index = read_index(data_dir)
        check_vocabulary(index.vocab_size, vocab_size)
        if (
            tokenizer_name is not None
            and _sha256(tokenizer_file(tokenizer_name).read_bytes()) != index.tokenizer_sha256
        ):
            raise UserError(
                f"data.tokenizer_name: {tokenizer_name} is not the tokenizer that {data_dir} was prepared with; "
                "leave it out, or give data.data_dir the text"
            )
        return Path(data_dir)
    given = None if tokenizer_name is None else _Encoder.load(tokenizer_name)
    if given is not None:
        check_vocabulary(given.vocab_size, vocab_size)
    filters = filters or FiltersConfig()
    if data_dir is None:
        filters = FiltersConfig(exact_duplicates=False)
    if filters.near_duplicates is not None:
        near_duplicates_library()
    corpus = scan(data_dir, text_column, progress)
    key = _key(corpus, given, vocab_size, validation_fraction, filters, text_column)
    folder = Path(cache_dir) / key
    try:
        if not is_prepared(folder):
            with _work_folder(folder.with_name(f".{key}.work"), folder) as work:
                if work is not None:
                    _make(
                        folder,
                        work,
                        corpus,
                        given,
                        vocab_size,
                        validation_fraction,
                        filters,
                        max_loss,
                        processes,
                        progress,
                    )
    except OSError as error:
        raise UserError(
            f"data.cache_dir: cannot write {folder}: {error.strerror}; free some space or set data.cache_dir elsewhere"
        ) from error
    index = read_index(folder)
    if index.loss is not None:
        check_loss(Tally(index.loss), max_loss, f"{corpus.source}, see {folder / 'skipped.jsonl'}")
    if index.skipped:
        logger.warning("left out %d places in %s: see %s", index.skipped, corpus.source, folder / "skipped.jsonl")
    return folder


def _make(
    folder: Path,
    work: Path,
    corpus: Corpus,
    given: _Encoder | None,
    vocab_size: int,
    validation_fraction: float,
    filters: FiltersConfig,
    max_loss: float,
    processes: int | None,
    progress: bool,
) -> None:
    check_loss(tally(work, corpus, None), max_loss, corpus.source)
    only = len(corpus.files) == 1 and corpus.files[0].is_one_document
    plan = make_plan(corpus.files, filters, validation_fraction if only else 0.0)
    logger.info("preparing %d files: %s", len(corpus.files), corpus.source)
    encoder = given or _Encoder.trained(plan, work / "tokenizer.json", vocab_size, validation_fraction, progress)
    write_whole(work / "tokenizer.json", encoder.json)
    _tokenize(work, corpus, plan, encoder, max_loss, processes, progress)
    counts = tally(work, corpus, plan)
    check_loss(counts, max_loss, corpus.source)
    assemble(
        folder,
        work,
        corpus,
        plan,
        counts,
        validation_fraction,
        encoder.tokenizer,
        tokenizer_json=encoder.json,
        vocab_size=encoder.vocab_size,
        eos_id=encoder.eos_id,
    )


def _tokenize(
    work: Path, corpus: Corpus, plan: Plan, encoder: _Encoder, max_loss: float, processes: int | None, progress: bool
) -> None:
    """Computes the batches that `work` has not, or as many as show that too much is lost."""
    dtype = "uint16" if encoder.vocab_size <= 2**16 else "uint32"
    done = finished_tasks(work)
    missing = [task for task in range(len(plan.tasks)) if task not in done]
    if done:
        logger.info("%d of %d parts are there from an earlier run", len(done), len(plan.tasks))
    readable = sum(file.size for file in corpus.files)
    already = sum(item.lost for item in corpus.skipped)
    allowed = max_loss * (readable + already) - already
    lost = tokens = 0
    with progress_bar(readable * len(missing) // max(1, len(plan.tasks)), "tokenizing", progress) as bar:

        def report(message: dict[str, Any]) -> None:
            nonlocal lost, tokens
            lost, tokens = lost + message["lost"], tokens + message["tokens"]
            bar.set_postfix_str(
                f"{tokens / 1e6:.1f} M tokens, {tokens / max(bar.format_dict['elapsed'], 1e-3):,.0f} tokens/s",
                refresh=False,
            )
            bar.update(message["read"])
            if lost > allowed:
                raise _TooMuchLost

        if processes is None:
            processes = min(os.cpu_count() or 1, readable // PROCESS_BYTES)
        try:
            if processes > 1 and len(missing) > 1:
                tree = {
                    "plan": plan.dump(),
                    "folder": str(work),
                    "tokenizer": str(work / "tokenizer.json"),
                    "dtype": dtype,
                    "batch_characters": BATCH_CHARACTERS,
                }
                write_whole(work / "plan.json", json.dumps(tree, default=str).encode())
                pool.run_tasks(
                    work / "plan.json",
                    missing,
                    processes,
                    report,
                    lambda task, reason: write_lost(work, plan, task, reason),
                )
            else:
                with Apart() as apart:
                    worker = Worker(work, plan, encoder.tokenizer, dtype, BATCH_CHARACTERS, apart)
                    for task in missing:
                        worker.run(task, report)
        except _TooMuchLost:
            pass  # the batches that are there say what


class _TooMuchLost(Exception):
    """There is no need to read on."""


@contextmanager
def _work_folder(work: Path, folder: Path) -> Iterator[Path | None]:
    """The folder of an unfinished run, for one process at a time; None where another finished `folder` meanwhile.

    It goes when `folder` is there and when the input is refused, and stays for a later run otherwise.
    """
    made = [parent for parent in work.parents if not parent.exists()]
    while True:
        work.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.open(work / "lock", os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:  # another process has just removed it
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if is_prepared(folder):
                shutil.rmtree(work, ignore_errors=True)
                yield None
                return
            if not (work / "lock").exists() or not os.path.samestat(os.fstat(lock), (work / "lock").stat()):
                continue  # that run was refused, and took the folder with it
            try:
                yield work
            except UserError as error:
                if not str(error).startswith("data.cache_dir"):
                    shutil.rmtree(work, ignore_errors=True)
                    with suppress(OSError):  # something else is in there by now
                        for parent in made:
                            parent.rmdir()
                raise
            shutil.rmtree(work, ignore_errors=True)
            return
        finally:
            os.close(lock)


@dataclass(frozen=True)
class _Encoder:
    """A tokenizer, the bytes of its file and the id that ends a document."""

    tokenizer: Tokenizer
    json: bytes
    eos_id: int

    @classmethod
    def load(cls, path: str | Path) -> _Encoder:
        tokenizer = load_tokenizer(path)
        return cls(tokenizer, tokenizer_file(path).read_bytes(), end_of_text_id(tokenizer, path))

    @classmethod
    def trained(cls, plan: Plan, saved: Path, vocab_size: int, validation_fraction: float, progress: bool) -> _Encoder:
        """Trained on the documents that are not held out, or as an interrupted run did."""
        if saved.exists():
            return cls.load(saved)
        size = sum(file.size for file in plan.files)
        with progress_bar(min(size, TRAINING_BYTES), "training tokenizer", progress) as bar:
            tokenizer = train_tokenizer(training_texts(plan, validation_fraction, bar.update), vocab_size)
        return cls(tokenizer, tokenizer.to_str(pretty=True).encode(), end_of_text_id(tokenizer))

    @property
    def vocab_size(self) -> int:
        return vocabulary_size(self.tokenizer)


def training_texts(plan: Plan, validation_fraction: float, passed: Callable[[int], object]) -> Iterator[str]:
    """The texts that a tokenizer is trained on: the same at every call; `passed` gets the bytes that were read.

    Of more than TRAINING_BYTES, every so many tasks.
    """
    stride = -(-sum(file.size for file in plan.files) // TRAINING_BYTES)
    heldout: set[int] | None = None
    if validation_fraction and len(plan.files) > 1 and all(file.is_one_document for file in plan.files):
        names = {file.name for file in split(plan.files, validation_fraction)[1]}
        heldout = {number for number, file in enumerate(plan.files) if file.name in names}
    with Apart() as apart:
        for task in plan.tasks[::stride]:
            for batch in batches(plan, task, BATCH_CHARACTERS, apart):
                for document in batch.documents:
                    if heldout is None:
                        is_heldout = document.unit < validation_fraction
                    else:
                        is_heldout = document.file in heldout
                    if not is_heldout:
                        yield document.text
                passed(batch.read)


def progress_bar(total: int, description: str, progress: bool, unit: str = "B") -> tqdm[NoReturn]:
    """Bytes, or what `unit` says, a second and ETA on stderr, for what takes more than two seconds, on a terminal."""
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        unit_scale=True,
        delay=BAR_DELAY_SECONDS,
        disable=None if progress else True,  # None: only on a terminal
    )


def _key(
    corpus: Corpus,
    given: _Encoder | None,
    vocab_size: int,
    validation_fraction: float,
    filters: FiltersConfig,
    text_column: str | None,
) -> str:
    recipe = {
        "format_version": FORMAT_VERSION,
        "documents": [(file.name, file.sha256, file.kind, file.column) for file in corpus.files],
        "skipped": [(item.path, item.reason) for item in corpus.skipped],
        "tokenizer": (_sha256(given.json), given.eos_id) if given else (vocab_size, tokenizers.__version__),
        "validation_fraction": validation_fraction,
        "text_column": text_column,
        "filters": filters.model_dump(),
        "hook": load_hook(filters.hook)[1],
        "minhash": None if filters.near_duplicates is None else version("rensa"),
    }
    return _sha256(json.dumps(recipe).encode())[:16]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
