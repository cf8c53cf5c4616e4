"""The commands that work on data: prepare, tokenizer, validate, download."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ava_fast.errors import Interrupted, UserError
from ava_fast.settings import FiltersConfig


def add_data_commands(commands: Any) -> None:
    """Adds them to the subparsers of `ava-fast`; each gets `command`, the function that runs it."""
    command = commands.add_parser("prepare", help="turn a folder of text into token shards")
    command.add_argument("--data-dir", help="the folder; the Python standard library's source if left out")
    command.add_argument("--output", required=True, help="the shards go to a folder in here, named by their content")
    command.add_argument("--vocab-size", type=int, default=32000)
    command.add_argument("--tokenizer", help="a tokenizer.json, or a folder with one; trained if left out")
    command.add_argument("--validation-fraction", type=float, default=0.05)
    command.add_argument("--text-column", help="where a record has its text; `text` or `content` if left out")
    command.add_argument("--max-loss", type=_fraction, default=0.01, help="share that may be unreadable (0.01)")
    command.add_argument("--min-length", type=int, default=0, metavar="CHARACTERS")
    command.add_argument("--max-repetition", type=_fraction, help="share of a document's four-word runs seen before")
    command.add_argument("--max-consecutive-repeats", type=int, help="of one word or line")
    command.add_argument("--keep-duplicates", action="store_true", help="keep exact copies of documents")
    command.add_argument("--near-duplicates", type=_fraction, metavar="JACCARD", help="leave out such near-copies: 0.8")
    command.add_argument("--hook", metavar="MODULE:FUNCTION", help="gets a text, returns why to leave it out or None")
    command.add_argument("--processes", type=int, help="one per core if left out")
    command.set_defaults(command=_prepare)

    command = commands.add_parser("tokenizer", help="train a tokenizer, or check one")
    actions = command.add_subparsers(required=True, metavar="action")
    action = actions.add_parser("train", help="a byte-level BPE from a folder of text")
    action.add_argument("--data-dir", help="the folder; the Python standard library's source if left out")
    action.add_argument("--output", required=True, help="the folder that tokenizer.json goes to")
    action.add_argument("--vocab-size", type=int, default=65536)
    action.add_argument("--min-frequency", type=int, default=2, help="occurrences that a new token needs")
    action.add_argument("--special-token", action="append", default=[], help="beside <|endoftext|>; repeatable")
    action.add_argument("--validation-fraction", type=_fraction, default=0.05, help="held out by prepare: not seen")
    action.add_argument("--text-column", help="as of prepare")
    action.set_defaults(command=_tokenizer_train)
    action = actions.add_parser("check", help="does any text come back from its tokens?")
    action.add_argument("tokenizer", help="a tokenizer.json, or a folder with one")
    action.set_defaults(command=_tokenizer_check)

    command = commands.add_parser("validate", help="look at a folder of text, or verify one of shards")
    command.add_argument("folder")
    command.add_argument("--text-column", help="as of prepare")
    command.add_argument("--json", action="store_true", help="the same as JSON")
    command.set_defaults(command=_validate)

    command = commands.add_parser("download", help="fetch an openly licensed corpus from the Hugging Face hub")
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--dataset", help="a name from the curated list, or owner/name on the hub")
    what.add_argument("--manifest", help="a YAML file in the form of ava_fast/data/manifest.yaml: everything in it")
    what.add_argument("--list", action="store_true", help="show the curated list")
    command.add_argument("--output", default="data", help="each corpus goes to a folder in here")
    command.add_argument("--max-files", type=int, help="the first so many of each corpus")
    command.add_argument("--text-column", help="as of prepare; becomes `text`")
    command.add_argument("--as-is", action="store_true", help="keep files that are no Parquet, with all their columns")
    command.set_defaults(command=_download)


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _filters(options: argparse.Namespace) -> FiltersConfig:
    from pydantic import ValidationError

    try:
        return FiltersConfig(
            min_length=options.min_length,
            max_repetition=options.max_repetition,
            max_consecutive_repeats=options.max_consecutive_repeats,
            exact_duplicates=not options.keep_duplicates,
            near_duplicates=options.near_duplicates,
            hook=options.hook,
        )
    except ValidationError as error:
        detail = error.errors()[0]
        option = "--" + str(detail["loc"][0]).replace("_", "-")
        raise UserError(f"{option}: {detail['input']} cannot be: {detail['msg'].lower()}") from None


@contextmanager
def _resumable() -> Iterator[None]:
    """Ctrl-C says that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("interrupted; the same command goes on from here") from None


def _prepare(options: argparse.Namespace) -> int:
    from ava_fast.data.prepare import prepare
    from ava_fast.data.shards import read_index

    if options.processes is not None and options.processes < 1:
        raise UserError(f"--processes: {options.processes} is too few; give at least 1")
    with _resumable():
        folder = prepare(
            options.data_dir,
            options.output,
            vocab_size=options.vocab_size,
            tokenizer_name=options.tokenizer,
            validation_fraction=options.validation_fraction,
            text_column=options.text_column,
            filters=_filters(options),
            max_loss=options.max_loss,
            processes=options.processes,
        )
    for line in summary(folder):
        print(line)
    index = read_index(folder)
    print(f"{index.train.tokens:,} training tokens in {index.train.documents:,} documents")
    print(f"{index.validation.tokens:,} held-out tokens in {index.validation.documents:,} documents")
    print(f"train on it with --data-dir {folder}")
    return 0


def summary(folder: Path) -> list[str]:
    """Lines: each source's files, documents and tokens; what was rejected and what could not be read, with samples."""
    from ava_fast.data.shards import read_index

    index = read_index(folder)
    rows: list[tuple[str, ...]] = [("source", "files", "documents", "MB", "tokens")]
    for source in index.sources:
        files = ", ".join(f"{count:,} {kind}" for kind, count in source.files.items())
        rows.append((source.name, files, f"{source.documents:,}", f"{source.bytes / 1e6:,.1f}", f"{source.tokens:,}"))
    lines = table(rows)
    for entry in _ledger(folder / "rejected.jsonl"):
        place = _place(entry)
        lines.append(f"left out {entry['count']:,}: {entry['reason']}, such as {place}: {entry['text']!r}")
    reasons: Counter[tuple[str, ...]] = Counter()
    first: dict[tuple[str, ...], str] = {}
    for entry in _ledger(folder / "skipped.jsonl"):
        reason = (entry["reason"].partition(":")[0], *(key for key in entry if key != "to"))
        reasons[reason] += 1
        first.setdefault(reason, f"{_place(entry)} {entry['reason']}")
    lines += [f"not read, {count:,} ×: {first[reason]}" for reason, count in reasons.most_common()]
    if reasons:
        share = index.loss.share if index.loss else 0
        lines.append(f"{share:.2%} of the data is lost; every place is in {folder / 'skipped.jsonl'}")
    return lines


def _ledger(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def _place(entry: dict[str, Any]) -> str:
    """`a.jsonl line 3`."""
    numbers = {key: value for key, value in entry.items() if isinstance(value, int) and key != "count"}
    words = [f"{key.replace('_', ' ')} {value:,}" for key, value in numbers.items()]
    return " ".join([entry["path"], *words])


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """Aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _tokenizer_train(options: argparse.Namespace) -> int:
    from ava_fast.data.corpus import scan
    from ava_fast.data.prepare import progress_bar, training_texts
    from ava_fast.data.tokenizer import round_trip_fault, train_tokenizer, vocabulary_size
    from ava_fast.data.work import make_plan
    from ava_fast.files import write_whole

    corpus = scan(options.data_dir, options.text_column, progress=True)
    plan = make_plan(corpus.files, FiltersConfig())
    with progress_bar(sum(file.size for file in corpus.files), "training tokenizer", True) as bar:
        tokenizer = train_tokenizer(
            training_texts(plan, options.validation_fraction, bar.update),
            options.vocab_size,
            min_frequency=options.min_frequency,
            special_tokens=options.special_token,
        )
    fault = round_trip_fault(tokenizer)
    if fault is not None:
        raise UserError(f"--special-token: {fault!r} does not come back from its tokens; choose others")
    folder = Path(options.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    except OSError as error:
        raise UserError(f"--output: {folder} cannot be written: {error.strerror}") from None
    print(f"{folder / 'tokenizer.json'}: {vocabulary_size(tokenizer):,} tokens; --tokenizer {folder} uses it")
    return 0


def _tokenizer_check(options: argparse.Namespace) -> int:
    from ava_fast.data.tokenizer import end_of_text_id, load_tokenizer, round_trip_fault, vocabulary_size

    tokenizer = load_tokenizer(options.tokenizer)
    end = end_of_text_id(tokenizer, options.tokenizer)
    print(f"{vocabulary_size(tokenizer):,} tokens, documents end with {tokenizer.id_to_token(end)} ({end})")
    fault = round_trip_fault(tokenizer)
    if fault is not None:
        raise UserError(f"{options.tokenizer}: {fault!r} does not come back from its tokens; others may not either")
    print("200 texts of random characters and bytes came back from their tokens")
    return 0


def _validate(options: argparse.Namespace) -> int:
    from ava_fast.data.validate import validate

    checks = validate(options.folder, options.text_column, progress=True)
    good = all(check.ok for check in checks)
    if options.json:
        print(json.dumps({"ok": good, "checks": [vars(check) for check in checks]}, indent=1))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            print(f"{'ok    ' if check.ok else 'FAILED'}  {check.name:<{width}}  {check.detail}")
    return 0 if good else UserError.exit_code


def _download(options: argparse.Namespace) -> int:
    from ava_fast.data.download import CURATED, download, read_manifest

    if options.list:
        rows: list[tuple[str, ...]] = [
            (entry.name, entry.repository, entry.license) for entry in read_manifest(CURATED)
        ]
        for line in table([("name", "repository", "license"), *rows]):
            print(line)
        print("each says so of itself: read https://huggingface.co/datasets/<repository> before you train on it")
        return 0
    with _resumable():
        folders = download(
            options.dataset,
            options.manifest,
            Path(options.output),
            options.max_files,
            options.text_column,
            options.as_is,
        )
    for folder in folders:
        record = json.loads((folder / ".download.json").read_bytes())
        page = f"https://huggingface.co/datasets/{record['repository']}"
        print(f"{folder}: {len(record['files']):,} files at {record['revision'][:12]}")
        converted = [file["parquet"] for file in record["files"].values() if "parquet" in file]
        if converted:
            rows = sum(file["rows"] for file in converted)
            print(
                f"{len(converted):,} of them became Parquet, {rows:,} texts without other columns; --as-is keeps these"
            )
        print(f"license {record['license']}, as it says of itself: read {page} before you train on it")
        print(f"prepare it with: ava-fast prepare --data-dir {folder} --output shards")
    return 0
