"""What one core reads from token shards, and how long a loader takes to stand at any place of an epoch.

    OMP_NUM_THREADS=1 python -m bench.loader [--tokens 200]

Writes shards of that many million random tokens (uint16, documents of 20 to 4,000 tokens) into a temporary folder and
reads batches of 8,192 tokens in the shuffled order, on the calling thread alone, from the page cache: tokens a
second of the processor's time, so that a busy machine gives what a free core would, with and without the offsets that
keep attention inside documents. Then opens a loader and gives it a position, at the start, in the middle and after 10¹²
epochs, and takes the time until the first batch is there. With curricula: batches in an order from easy to hard, each
cut into sequences a quarter as long, in turn with plain ones.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ava_fast.data.loader import TokenLoader
from ava_fast.data.shards import Piece, write_shards
from ava_fast.schedule.difficulty import EasyFirst
from ava_fast.schedule.length import in_pieces
from bench import machine

LENGTHS = (128, 512, 2048, 8192)
BATCH_TOKENS, VOCABULARY, EOS = 8192, 50_000, 0
RUNS, BATCHES = 9, 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=200, help="millions")
    millions = parser.parse_args().tokens
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "shards"
        write_random(folder, millions * 10**6)
        for length in LENGTHS:
            rates = {name: _rates(folder, length, inside) for name, inside in (("plain", False), ("offsets", True))}
            ratios = _with_curricula(folder, length)
            ready = [_first_batch(folder, length, epochs) for epochs in (0.0, 0.5, 1e12)]
            results[str(length)] = {
                "million_tokens_per_second": {name: _quartiles(values) for name, values in rates.items()},
                "with_curricula_over_plain": _quartiles(ratios),
                "first_batch": {
                    name: machine.spread(seconds)
                    for name, seconds in zip(("start", "middle", "epoch_10^12"), ready, strict=True)
                },
            }
            speeds = ", ".join(f"{name} {statistics.median(values):.0f} M tokens/s" for name, values in rates.items())
            slowest = max(max(seconds) for seconds in ready)
            speeds += f", with curricula × {statistics.median(ratios):.3f}"
            print(f"S {length}: {speeds}; first batch within {1000 * slowest:.1f} ms", flush=True)
    print(machine.write("loader_cpu", {"tokens": millions * 10**6, "batch_tokens": BATCH_TOKENS, "lengths": results}))


def write_random(folder: Path, tokens: int) -> None:
    """Shards of that many random tokens."""
    write_shards(
        folder,
        _documents(tokens),
        _documents(10_000),
        tokenizer_json=b"{}",
        vocab_size=VOCABULARY,
        eos_id=EOS,
        source="random tokens",
        skipped=[],
    )


def _documents(tokens: int) -> Iterator[Piece]:
    generator = np.random.default_rng(0)
    while tokens > 0:
        length = int(generator.integers(20, 4000))
        yield Piece(generator.integers(1, VOCABULARY, length).tolist(), length, True)
        tokens -= length + 1


def _loader(folder: Path, length: int, inside: bool) -> TokenLoader:
    return TokenLoader(folder, max_length=length, batch_size=BATCH_TOKENS // length, seed=0, document_attention=inside)


def _rates(folder: Path, length: int, inside: bool) -> list[float]:
    loader, rates = _loader(folder, length, inside), []
    for run in range(RUNS + 1):
        started_at = time.process_time()
        for _ in range(BATCHES):
            loader.next_batch()
        if run:  # the first fills the page cache
            rates.append(BATCHES * BATCH_TOKENS / (time.process_time() - started_at) / 1e6)
    return rates


def _with_curricula(folder: Path, length: int) -> list[float]:
    """Tokens a second with curricula over those without, by pairs of runs."""
    plain = _loader(folder, length, False)
    ranking = np.random.default_rng(0).permutation(plain.sequences_per_epoch).astype(np.uint32)
    order = EasyFirst(ranking, mode="threshold", horizon=plain.sequences_per_epoch, seed=0)
    shared: dict[str, Any] = {"max_length": length, "batch_size": BATCH_TOKENS // length, "seed": 0}
    curricula, ratios = TokenLoader(folder, **shared, orders=[order]), []
    for run in range(RUNS + 1):
        seconds = []
        for loader in (plain, curricula):
            started_at = time.process_time()
            for _ in range(BATCHES):
                batch = loader.next_batch()
                if loader is curricula:
                    in_pieces(batch, length // 4)
            seconds.append(time.process_time() - started_at)
        if run:
            ratios.append(seconds[0] / seconds[1])
    return ratios


def _first_batch(folder: Path, length: int, epochs: float) -> list[float]:
    seconds = []
    for _ in range(RUNS):
        started_at = time.perf_counter()
        loader = _loader(folder, length, False)
        state = loader.state_dict()
        loader.load_state_dict({**state, "position": int(epochs * loader.sequences_per_epoch)})
        loader.next_batch()
        seconds.append(time.perf_counter() - started_at)
    return seconds


def _quartiles(values: list[float]) -> dict[str, float]:
    first, median, third = statistics.quantiles(values, n=4)
    return {"median": median, "q1": first, "q3": third}


if __name__ == "__main__":
    main()
