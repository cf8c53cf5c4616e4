"""Unigram and bigram models: the loss that a language model must beat to have learned more than counting.

    stream = TokenStream(folder, index, "train")
    baselines = ngram_baselines(stream.arrays(), heldout_sequences(folder, max_length=128), index.vocab_size)
    baselines.bigram     # nats per token, on the very tokens that the model predicts in evaluation

Both are counted on the training tokens and scored on predicting token t of a held-out sequence from token t − 1. The
bigram's one parameter is tuned on the held-out tokens themselves, which flatters the baseline and never the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

ALPHAS = tuple(2.0**exponent for exponent in range(-4, 17))
"""What the weight of the unigram in the bigram is chosen from, in occurrences of the previous token."""
CHUNK_TOKENS = 1 << 22
"""Tokens counted at a time: 32 MiB of pair codes."""


@dataclass(frozen=True)
class Baselines:
    """Mean negative log-likelihood in nats per held-out token."""

    unigram: float
    """p(b) = (c(b) + 1) / (N + V)."""
    bigram: float
    """p(b | a) = (c(a, b) + α·p(b)) / (c(a) + α)."""
    alpha: float
    """The one of `ALPHAS` that suits the held-out tokens best."""


def ngram_baselines(
    train: Sequence[npt.NDArray[Any]], heldout_NS1: npt.NDArray[np.int64], vocab_size: int
) -> Baselines:
    """Counts `train`, consecutive arrays of token ids that form one stream, and scores the held-out sequences.

    `heldout_NS1` has N ≥ 1 sequences of S + 1 tokens, of which the last S are predicted. Memory is bounded by the
    held-out pairs and one chunk of the stream: there is no V × V table.
    """
    pairs, occurrences = np.unique(_pair_codes(heldout_NS1[:, :-1], heldout_NS1[:, 1:], vocab_size), return_counts=True)
    previous, following = np.divmod(pairs, vocab_size)
    unigram_counts = np.zeros(vocab_size, np.int64)
    context_counts = np.zeros(vocab_size, np.int64)
    pair_counts = np.zeros(len(pairs), np.int64)
    last: npt.NDArray[np.int64] = np.empty(0, np.int64)
    for chunk in _chunks(train):
        unigram_counts += np.bincount(chunk, minlength=vocab_size)
        chunk = np.concatenate([last, chunk])  # with the pair that spans two chunks, and in int64
        context_counts += np.bincount(chunk[:-1], minlength=vocab_size)
        codes = np.sort(_pair_codes(chunk[:-1], chunk[1:], vocab_size))
        pair_counts += np.searchsorted(codes, pairs, side="right") - np.searchsorted(codes, pairs, side="left")
        last = chunk[-1:]

    p_unigram = ((unigram_counts + 1) / (unigram_counts.sum() + vocab_size))[following]

    def nats_per_token(p: npt.NDArray[np.float64]) -> float:
        return float(-(occurrences * np.log(p)).sum() / occurrences.sum())

    bigram, alpha = min(
        (nats_per_token((pair_counts + alpha * p_unigram) / (context_counts[previous] + alpha)), alpha)
        for alpha in ALPHAS
    )
    return Baselines(nats_per_token(p_unigram), bigram, alpha)


def _pair_codes(
    previous: npt.NDArray[np.int64], following: npt.NDArray[np.int64], vocab_size: int
) -> npt.NDArray[np.int64]:
    return (previous * vocab_size + following).ravel()


def _chunks(arrays: Sequence[npt.NDArray[Any]]) -> Iterable[npt.NDArray[Any]]:
    for array in arrays:
        for start in range(0, len(array), CHUNK_TOKENS):
            yield array[start : start + CHUNK_TOKENS]
