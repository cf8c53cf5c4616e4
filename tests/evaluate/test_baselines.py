"""The baselines against dictionaries and loops, and their size and speed on a large vocabulary."""

from __future__ import annotations

import itertools
import math
import time
import tracemalloc
from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest

from ava_fast.evaluate import baselines as module
from ava_fast.evaluate.baselines import ALPHAS, Baselines, ngram_baselines


def brute_force(train: list[int], heldout: list[list[int]], vocab_size: int) -> Baselines:
    counts, contexts = Counter(train), Counter(train[:-1])
    pairs = Counter(itertools.pairwise(train))
    predictions = [(a, b) for row in heldout for a, b in itertools.pairwise(row)]

    def unigram(b: int) -> float:
        return (counts[b] + 1) / (len(train) + vocab_size)

    def bigram(alpha: float) -> float:
        return -sum(math.log((pairs[a, b] + alpha * unigram(b)) / (contexts[a] + alpha)) for a, b in predictions) / len(
            predictions
        )

    alpha = min(ALPHAS, key=bigram)
    return Baselines(-sum(math.log(unigram(b)) for _, b in predictions) / len(predictions), bigram(alpha), alpha)


@pytest.mark.parametrize("vocab_size", [5, 40, 65_536])
@pytest.mark.parametrize("cuts", [[], [1, 2, 700], [0, 1500]])
def test_equals_counting_with_dictionaries(vocab_size: int, cuts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_TOKENS", 97)
    random = np.random.default_rng(vocab_size)
    words = random.choice(vocab_size, 30)
    train = np.concatenate([np.sort(random.choice(words, 20)) for _ in range(100)]).astype(np.uint16)
    heldout = np.stack([np.sort(random.choice(words, 20)) for _ in range(10)])
    heldout[0, 5] = vocab_size - 1
    expected = brute_force(train.tolist(), heldout.tolist(), vocab_size)
    actual = ngram_baselines(np.split(train, cuts), heldout, vocab_size)
    assert actual.alpha == expected.alpha
    assert (actual.unigram, actual.bigram) == pytest.approx((expected.unigram, expected.bigram), rel=1e-12)


def test_uniform_tokens_cost_the_logarithm_of_the_vocabulary() -> None:
    random = np.random.default_rng(0)
    result = ngram_baselines([random.integers(0, 64, 200_000)], random.integers(0, 64, (50, 101)), 64)
    assert result.unigram == pytest.approx(math.log(64), abs=0.01)
    assert result.bigram == pytest.approx(math.log(64), abs=0.01)


def test_a_chain_costs_the_bigram_nothing() -> None:
    chain: npt.NDArray[np.int64] = np.arange(50_000) % 50
    result = ngram_baselines([chain], chain[:400].reshape(4, 100), 50)
    assert result.unigram == pytest.approx(math.log(50), abs=0.01)
    assert result.bigram < 0.001


def test_a_large_vocabulary_takes_little_time_and_memory() -> None:
    random = np.random.default_rng(0)
    train = (65_000 * random.random(3_800_000) ** 3).astype(np.uint16)
    heldout = (65_000 * random.random((512, 129)) ** 3).astype(np.int64)
    tracemalloc.start()
    start = time.perf_counter()
    ngram_baselines([train], heldout, 65_536)
    seconds, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 10  # about 0.5 on an idle machine
    assert peak < 300 * 2**20  # a V × V table of even one byte would be 4 GiB
