"""Preparing text, beside what bounds it and what others use.

    python -m bench.data                       # needs the extra `bench` for the peer `datasets`

Makes a JSONL file of the standard library's source, repeated with other names, trains a tokenizer of 32,000 tokens, and
times in turn: `tokenizers`' own encode_batch on all texts, in memory, with a thread per core; `ava-fast prepare` from
the file to shards on the disk; and `datasets`' batched map from the same file to its cache, with a process per core.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from ava_fast.config import FiltersConfig
from ava_fast.data.corpus import scan
from ava_fast.data.prepare import prepare
from ava_fast.data.shards import read_index
from ava_fast.data.tokenizer import load_tokenizer, train_tokenizer
from bench import machine

RUNS = 3
COPIES = int(os.environ.get("BENCH_DATA_COPIES", "16"))
VOCABULARY = 32_000


def main() -> None:
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = _write(folder / "texts" / "x.jsonl")
        size = sum(len(text.encode()) for text in texts)
        train_tokenizer(texts[: len(texts) // COPIES], VOCABULARY).save(str(folder / "tokenizer.json"))
        seconds: dict[str, list[float]] = {"encode_batch": [], "prepare": [], "datasets.map": []}
        for run in range(RUNS):
            seconds["encode_batch"].append(machine.timed(lambda: _encode(folder, texts), "cpu"))
            seconds["prepare"].append(machine.timed(lambda run=run: _prepare(folder, run, cores), "cpu"))
            seconds["datasets.map"].append(_datasets_map(folder, run, cores))
            print({key: round(size / values[-1] / 1e6, 2) for key, values in seconds.items()}, "MB/s", flush=True)
        medians = {key: statistics.median(values) for key, values in seconds.items()}
        result = {
            "text_mb": size / 1e6,
            "documents": len(texts),
            "processes": cores,
            "tokens": _tokens(folder),
            "mb_per_second": {key: size / 1e6 / value for key, value in medians.items()},
            "of_encode_batch": medians["encode_batch"] / medians["prepare"],
            "times_datasets_map": medians["datasets.map"] / medians["prepare"],
            "seconds": seconds,
        }
    print(f"{result['of_encode_batch']:.0%} of encode_batch, {result['times_datasets_map']:.2f} × datasets.map")
    print(machine.write("data_cpu", result))


def _write(file: Path) -> list[str]:
    file.parent.mkdir()
    texts = [f"# copy {copy}\n{item.read()}" for copy in range(COPIES) for item in scan(None).files]
    with file.open("w") as lines:
        for text in texts:
            lines.write(json.dumps({"text": text}) + "\n")
    return texts


def _encode(folder: Path, texts: list[str]) -> None:
    """A MiB of text a call and core: larger batches are slower, for the memory they take."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    tokenizer = load_tokenizer(folder)
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size > 4 << 20:
            tokenizer.encode_batch(batch, add_special_tokens=False)
            batch, size = [], 0
    tokenizer.encode_batch(batch, add_special_tokens=False)


def _prepare(folder: Path, run: int, cores: int) -> None:
    prepare(
        folder / "texts",
        folder / f"shards-{run}",
        vocab_size=VOCABULARY,
        tokenizer_name=folder,
        filters=FiltersConfig(),
        processes=cores,
        progress=False,
    )


def _tokens(folder: Path) -> int:
    index = read_index(next((folder / "shards-0").iterdir()))
    return index.train.tokens + index.validation.tokens


def _datasets_map(folder: Path, run: int, cores: int) -> float:
    import datasets
    from transformers import PreTrainedTokenizerFast

    datasets.disable_progress_bars()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as its documentation advises with several processes
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    started_at = time.perf_counter()
    data = datasets.load_dataset(
        "json", data_files=str(folder / "texts" / "x.jsonl"), split="train", cache_dir=str(folder / f"cache-{run}")
    )
    data.map(
        lambda rows: {"input_ids": tokenizer(rows["text"], add_special_tokens=False)["input_ids"]},
        batched=True,
        num_proc=cores,
        remove_columns=data.column_names,
    )
    return time.perf_counter() - started_at


if __name__ == "__main__":
    main()
