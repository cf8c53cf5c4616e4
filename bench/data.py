"""Preparing text, beside what bounds it and what others use.

    python -m bench.data [--mb 40] [--runs 5]     # needs the extra `bench` for the peer `datasets`

Makes a JSONL file of that much Python source, of the running Python's own library and of what is installed beside it,
each file once (repeated text would flatter whoever remembers words), and a tokenizer of 32,000 tokens from a part of
it. Then times in turn, so that what else the machine does meets all alike:

- `tokenizers`' own encode_batch on the texts in memory, with a thread per core;
- the same in a process per core, one thread each: no start, no reading, nothing written;
- `ava-fast prepare` from the file to shards on the disk, in as many processes as it takes;
- `datasets` from the same file to its cache: load_dataset and, batched, in a process per core, map.

Ratios are medians over the rounds: of the time on the clock, and of the processors' time, of all processes together,
which says less of what the user waits for but hardly changes with what else runs on the machine.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import statistics
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ava_fast.data.prepare import prepare
from ava_fast.data.shards import read_index
from ava_fast.data.tokenizer import load_tokenizer, train_tokenizer
from ava_fast.settings import FiltersConfig
from bench import machine

VOCABULARY = 32_000
TRAINED_ON = 8 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=int, default=40, help="of text")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    cores = os.cpu_count() or 1
    importlib.import_module("datasets"), importlib.import_module("transformers")  # before any clock runs
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = _texts(options.mb * 10**6)
        size = sum(len(text.encode()) for text in texts)
        (folder / "texts").mkdir()
        with (folder / "texts" / "x.jsonl").open("w") as lines:
            lines.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        share = max(1, TRAINED_ON * len(texts) // size)
        train_tokenizer(texts[:share], VOCABULARY).save(str(folder / "tokenizer.json"))
        seconds: dict[str, list[float]] = {}
        processor_seconds: dict[str, list[float]] = {}
        for run in range(options.runs):
            for key, action in {
                "encode_batch, threads": lambda: _encode(folder, texts),
                "encode_batch, processes": lambda: _encode_in_processes(folder, texts, cores),
                "prepare": lambda run=run: _prepare(folder, run),
                "datasets.map": lambda run=run: _datasets_map(folder, run, cores),
            }.items():
                before, started_at = _processor_seconds(), time.perf_counter()
                spent = action() or (time.perf_counter() - started_at, _processor_seconds() - before)
                seconds.setdefault(key, []).append(spent[0])
                processor_seconds.setdefault(key, []).append(spent[1])
            print({key: round(size / values[-1] / 1e6, 2) for key, values in seconds.items()}, "MB/s", flush=True)
        ratios, processor_ratios = (
            {
                key: machine.spread_of_ratios(values, table["prepare"])
                for key, values in table.items()
                if key != "prepare"
            }
            for table in (seconds, processor_seconds)
        )
        result = {
            "text_mb": size / 1e6,
            "documents": len(texts),
            "processes": cores,
            "tokens": _tokens(folder),
            "mb_per_second": {key: size / 1e6 / statistics.median(values) for key, values in seconds.items()},
            "prepare_is_times_as_fast_as": ratios,
            "by_processor_time": processor_ratios,
            "seconds": seconds,
            "processor_seconds": processor_seconds,
        }
    for key, ratio in ratios.items():
        print(f"prepare: {ratio['median']:.2f} × {key}, {processor_ratios[key]['median']:.2f} × by processor time")
    print(machine.write("data_cpu", result))


def _texts(size: int) -> list[str]:
    """Distinct source files in an order that mixes packages, as many as make `size` bytes."""
    roots = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")}
    files = sorted({path.resolve() for root in roots for path in root.rglob("*.py")}, key=lambda path: _hash(str(path)))
    texts: dict[str, None] = {}
    for file in files:
        try:
            text = file.read_bytes().decode()
        except UnicodeDecodeError:
            continue
        if text.strip() and text not in texts:
            texts[text] = None
            size -= len(text.encode())
        if size <= 0:
            break
    return list(texts)


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _encode(folder: Path, texts: list[str]) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    _encode_all(load_tokenizer(folder), texts)


def _encode_all(tokenizer: Tokenizer, texts: list[str]) -> int:
    """Some 4 MB of text a call: larger batches are slower, for the memory they take."""
    batch: list[str] = []
    size = tokens = 0
    for number, text in enumerate(texts):
        batch.append(text)
        size += len(text)
        if size > 4 << 20 or number == len(texts) - 1:
            tokens += sum(len(item.ids) for item in tokenizer.encode_batch(batch, add_special_tokens=False))
            batch, size = [], 0
    return tokens


def _processor_seconds() -> float:
    """Of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def _encode_in_processes(folder: Path, texts: list[str], cores: int) -> tuple[float, float]:
    """Seconds, and the processors' seconds, without the processes' start."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    shares = [texts[number::cores] for number in range(cores)]
    context = multiprocessing.get_context("spawn")
    ready, spent = context.Barrier(cores + 1), context.Value("d", 0.0)
    processes = [context.Process(target=_one_process, args=(folder, share, ready, spent)) for share in shares]
    for process in processes:
        process.start()
    ready.wait()
    started_at = time.perf_counter()
    for process in processes:
        process.join()
    return time.perf_counter() - started_at, spent.value


def _one_process(folder: Path, texts: list[str], ready: Any, spent: Any) -> None:
    tokenizer = load_tokenizer(folder)
    ready.wait()
    before = time.process_time()
    _encode_all(tokenizer, texts)
    with spent.get_lock():
        spent.value += time.process_time() - before
    os._exit(0)


def _prepare(folder: Path, run: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    prepare(
        folder / "texts",
        folder / f"shards-{run}",
        vocab_size=VOCABULARY,
        tokenizer_name=folder,
        filters=FiltersConfig(),
        progress=False,
    )


def _tokens(folder: Path) -> int:
    index = read_index(next((folder / "shards-0").iterdir()))
    return index.train.tokens + index.validation.tokens


def _datasets_map(folder: Path, run: int, cores: int) -> None:
    import datasets
    from transformers import PreTrainedTokenizerFast

    datasets.disable_progress_bars()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as its documentation advises with several processes
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    data = datasets.load_dataset(
        "json", data_files=str(folder / "texts" / "x.jsonl"), split="train", cache_dir=str(folder / f"cache-{run}")
    )
    data.map(
        lambda rows: {"input_ids": tokenizer(rows["text"], add_special_tokens=False)["input_ids"]},
        batched=True,
        num_proc=cores,
        remove_columns=data.column_names,
    )


if __name__ == "__main__":
    main()
