"""Which sequence comes at which place of an endless order: a function of the place, with nothing to run through.

    order = Shuffle(n, seed=0)
    order.at(np.arange(1000, 1008))                    # eight sequences of 0 … n − 1; every n places hold each once
    mixture = Mixture([0.7, 0.2, 0.1])
    source_P, number_P = mixture.at(np.arange(8))      # the place's source, and how many of that source came before

Both take constant memory and constant time for any place, and give the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from heapq import heappop, heappush
from typing import Final

import numpy as np
import numpy.typing as npt

Places = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]

ORDER_VERSION: Final = 2
"""Counts the releases that changed what `Shuffle` or `Mixture` give: a position means nothing under another."""
LONGEST_CYCLE: Final = 100_000
"""Places after which a mixture repeats its sources, at most: its table has as many rows."""
ROUNDS: Final = 8


class Shuffle:
    """A pseudo-random permutation of 0 … n − 1 for every epoch; place p is in epoch p // n.

    An unbalanced Feistel network over a grid of just over n cells, in which what falls outside n is sent through again
    until it does not (Black & Rogaway, 2002, "Ciphers with arbitrary finite domains").
    """

    def __init__(self, n: int, *, seed: int, stream: int = 0):
        """`stream` tells apart permutations of one seed."""
        self._n = n
        self._rows = math.isqrt(n - 1) + 1
        self._columns = -(-n // self._rows)
        self._keys = np.random.SeedSequence((seed, stream)).generate_state(ROUNDS, np.uint64)

    def at(self, places: Places) -> Places:
        """Which of the n comes at each of these places ≥ 0."""
        epochs, values = np.divmod(places.astype(np.uint64), np.uint64(self._n))
        outside = np.arange(len(values))
        while len(outside):
            values[outside] = self._encrypted(values[outside], epochs[outside])
            outside = outside[values[outside] >= self._n]
        return values.astype(np.int64)

    def _encrypted(self, values: _Words, epochs: _Words) -> _Words:
        row, column = np.divmod(values, np.uint64(self._columns))
        for key in range(0, ROUNDS, 2):
            row = (row + self._noise(column, epochs, key)) % np.uint64(self._rows)
            column = (column + self._noise(row, epochs, key + 1)) % np.uint64(self._columns)
        return row * np.uint64(self._columns) + column

    def _noise(self, values: _Words, epochs: _Words, key: int) -> _Words:
        """32 bits that look random, so that a sum with a row or a column stays below 2⁶⁴."""
        return _mixed(values ^ _mixed(epochs + self._keys[key])) >> np.uint64(32)


class Mixture:
    """Sources in fixed proportions: of any first n places, a source of share w has more than n·w − 1 and fewer than
    n·w + 1.

    The shares are the weights as written in decimals, over their sum, so they have a common denominator P, and after P
    places everything repeats. Within them, item j of a source may come from place ⌊j/w⌋ on and must come before place
    ⌈(j+1)/w⌉, earliest deadline first, which is always possible (Baruah et al., 1996, "Proportionate progress").
    """

    def __init__(self, weights: Sequence[float]):
        """Raises ValueError if the mixture repeats after more than LONGEST_CYCLE places only."""
        self.counts = cycle(weights)
        """Places that each source has in a cycle."""
        length = sum(self.counts)
        if length > LONGEST_CYCLE:
            raise ValueError(
                f"weights {', '.join(map(str, weights))} repeat after {length:,} sequences, at most "
                f"{LONGEST_CYCLE:,} are allowed: give them fewer digits"
            )
        self._sources = np.array(_earliest_deadline_first(self.counts), np.int64)
        self._numbers = np.empty(length, np.int64)
        for source, count in enumerate(self.counts):
            self._numbers[self._sources == source] = np.arange(count)

    def at(self, places: Places) -> tuple[Places, Places]:
        """The source at each of these places, and how many places before it have that source."""
        cycles, rows = np.divmod(places, len(self._sources))
        sources = self._sources[rows]
        return sources, cycles * np.array(self.counts)[sources] + self._numbers[rows]

    def before(self, place: int) -> list[int]:
        """How many of the places before `place` each source has."""
        cycles, row = divmod(place, len(self._sources))
        part = np.bincount(self._sources[:row], minlength=len(self.counts))
        return [cycles * count + int(own) for count, own in zip(self.counts, part, strict=True)]


def cycle(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers in the same proportions as positive weights, taken as they are written in decimals."""
    exact = [Fraction(repr(float(weight))) for weight in weights]
    denominator = math.lcm(*(weight.denominator for weight in exact))
    numerators = [int(weight * denominator) for weight in exact]
    divisor = math.gcd(*numerators)
    return [numerator // divisor for numerator in numerators]


def _earliest_deadline_first(counts: list[int]) -> list[int]:
    """A source for each of sum(counts) places; see `Mixture`."""
    length = sum(counts)
    released: list[list[tuple[int, int, int]]] = [[] for _ in range(length)]  # place → (deadline, source, item)
    for source, count in enumerate(counts):
        for item in range(count):
            released[item * length // count].append((-(-(item + 1) * length // count), source, item))
    waiting: list[tuple[int, int, int]] = []
    order = []
    for items in released:
        for new in items:
            heappush(waiting, new)
        order.append(heappop(waiting)[1])
    return order


def _mixed(words: _Words) -> _Words:
    """A bijection of 64-bit words that spreads every bit over all (Steele et al., 2014, "SplitMix")."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
