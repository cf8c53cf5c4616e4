"""The permutation is one, whatever its size; sources keep to their shares after every place, against plain counting."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ava_fast.data.order import LONGEST_CYCLE, Mixture, Shuffle, cycle


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**32 - 1), st.integers(0, 2**40))
def test_every_epoch_holds_everything_once(n: int, seed: int, epoch: int) -> None:
    assert sorted(Shuffle(n, seed=seed).at(np.arange(n) + epoch * n).tolist()) == list(range(n))


@settings(max_examples=50, deadline=None)
@given(st.integers(2**40, 2**53), st.integers(0, 9), st.data())
def test_huge_ranges_have_no_collisions_and_places_do_not_depend_on_their_neighbours(
    n: int, seed: int, data: st.DataObject
) -> None:
    first, shuffle = data.draw(st.integers(0, n - 100)), Shuffle(n, seed=seed)
    together = shuffle.at(np.arange(first, first + 100)).tolist()
    assert len(set(together)) == 100
    assert all(0 <= index < n for index in together)
    assert together[7:9] == shuffle.at(np.array([first + 7, first + 8])).tolist()


def test_the_order_is_pinned() -> None:
    """A position in a checkpoint means this order: whoever changes it raises ORDER_VERSION."""
    assert Shuffle(10, seed=0).at(np.arange(20)).tolist() == PINNED
    assert Shuffle(10**12, seed=7, stream=1).at(np.array([0, 10**15])).tolist() == PINNED_FAR
    assert Mixture([0.5, 0.3, 0.2]).at(np.arange(10))[0].tolist() == PINNED_SOURCES


def test_all_orders_come_up_about_as_often() -> None:
    orders = Counter(map(tuple, Shuffle(4, seed=1).at(np.arange(4 * 24_000)).reshape(-1, 4).tolist()))
    assert len(orders) == 24
    assert max(abs(count - 1000) for count in orders.values()) < 250


def test_neighbours_are_scattered_evenly() -> None:
    n = 100_000
    order = Shuffle(n, seed=5).at(np.arange(n))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    # The first thousand places, in twenty equal parts of the range: chi-squared with 19 degrees of freedom.
    counts = np.bincount(order[:1000] * 20 // n, minlength=20)
    assert ((counts - 50) ** 2 / 50).sum() < 45


PINNED = [4, 0, 6, 9, 8, 5, 2, 3, 7, 1, 9, 2, 4, 0, 5, 6, 1, 3, 7, 8]
PINNED_FAR = [44435965877, 943429599130]
PINNED_SOURCES = [0, 1, 0, 2, 0, 1, 0, 1, 0, 2]

weights = st.lists(st.integers(1, 400).map(lambda hundredths: hundredths / 100), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(weights)
def test_after_every_place_each_source_is_within_one_of_its_share(chosen: list[float]) -> None:
    mixture, length = Mixture(chosen), sum(cycle(chosen))
    assume(length < 20_000)
    sources, numbers = mixture.at(np.arange(2 * length + 3))
    total, seen = sum(Fraction(str(weight)) for weight in chosen), np.zeros((len(chosen),), np.int64)
    shares = [Fraction(str(weight)) / total for weight in chosen]
    counts = np.eye(len(chosen), dtype=np.int64)[sources].cumsum(0)
    for source, share in enumerate(shares):
        away = np.arange(1, len(counts) + 1) * share.numerator - counts[:, source] * share.denominator
        assert np.abs(away).max() < share.denominator
        assert counts[length - 1, source] == share * length
        assert numbers[sources == source].tolist() == list(range(counts[-1, source]))
    for place in (0, 1, length, len(counts)):
        assert mixture.before(place) == (counts[place - 1] if place else seen).tolist()


def test_weights_count_as_they_are_written() -> None:
    assert cycle([0.1, 0.2]) == [1, 2]
    assert cycle([3, 1.5]) == [2, 1]
    assert cycle([1e-3, 1]) == [1, 1000]
    Mixture([1, LONGEST_CYCLE - 1])
    with pytest.raises(ValueError, match=r"weights 0\.3333333, 1 repeat after 13,333,333 sequences, at most 100,000"):
        Mixture([0.3333333, 1])
