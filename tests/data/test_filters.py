"""What is left out and why; near-copies are found and nothing else is."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from samples import text

from ava_fast.data.filters import bands, load_hook, longest_run, near_copies, reject, repetition, signature
from ava_fast.errors import UserError
from ava_fast.settings import FiltersConfig


def test_nothing_is_rejected_by_default() -> None:
    assert reject(FiltersConfig(), "") is None
    assert reject(FiltersConfig(), "buy " * 1000) is None


def test_each_filter_rejects_at_its_limit() -> None:
    assert reject(FiltersConfig(min_length=4), "  abc  ") == "shorter than 4 characters"
    assert reject(FiltersConfig(min_length=4), "abcd") is None
    repeats = FiltersConfig(max_consecutive_repeats=3)
    assert reject(repeats, "a buy buy buy b") is None
    assert reject(repeats, "a buy buy\nbuy buy b") == "one word or line more than 3 times in a row"
    assert reject(repeats, "one line\n\n" * 4) == "one word or line more than 3 times in a row"
    assert reject(FiltersConfig(max_repetition=0.4), "a b c d a b c d") is None  # one of five
    assert reject(FiltersConfig(max_repetition=0.1), "a b c d a b c d") == "repetition above 0.1"


def test_repeats_and_repetition_are_counted() -> None:
    assert longest_run("") == 0
    assert longest_run("a b a b") == 1
    assert longest_run("x y\nx y\nx y\nz") == 3
    assert repetition("a b c") == 0.0
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert repetition("w " * 104) == pytest.approx(100 / 101)


def test_a_hook_is_a_function_that_can_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hook_of_a_test.py").write_text(
        "def latin(text):\n    return None if text.isascii() else 'not latin'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    hook, version = load_hook("hook_of_a_test:latin")
    assert hook is not None
    assert (hook("a"), hook("日")) == (None, "not latin")
    assert len(version) == 64
    assert load_hook(None) == (None, "")
    for name in ("hook_of_a_test", "hook_of_a_test:missing", "no_such_module:f", "os:sep"):
        with pytest.raises(UserError, match=rf"filters\.hook: {name} cannot be used"):
            load_hook(name)


def test_near_copies_are_found_and_others_are_not() -> None:
    generator = random.Random(0)
    words = [[str(generator.randrange(3000)) for _ in range(300)] for _ in range(60)]
    changed = []
    for original in words[:20]:  # one word of 300: five of 296 runs differ
        copy = list(original)
        copy[generator.randrange(300)] = "changed"
        changed.append(copy)
    half = [original[:150] + [str(generator.randrange(3000)) for _ in range(150)] for original in words[20:40]]
    texts = [" ".join(item) for item in words + changed + half]
    signatures = np.stack([signature(item) for item in texts])
    copies = near_copies(signatures, 0.8)
    assert copies.tolist() == [False] * 60 + [True] * 20 + [False] * 20
    assert not near_copies(signatures[::-1].copy(), 0.8)[:20].any()
    assert near_copies(signatures, 0.2)[80:].all()


def test_what_shares_a_bucket_by_chance_is_compared() -> None:
    generator = np.random.default_rng(0)
    signatures = generator.integers(0, 2**32, (3, 128), np.uint32)
    signatures[1, :20] = signatures[0, :20]
    signatures[2, :110] = signatures[0, :110]
    assert near_copies(signatures, 0.8).tolist() == [False, False, True]


def test_a_signature_is_of_the_words_alone() -> None:
    assert (signature("One two, three four FIVE six") == signature("one  two three four five\nsix")).all()
    assert (signature("one two three four five six") != signature("one two three four five seven")).any()
    assert (signature(text(1)) == signature(text(1))).all()
    assert signature("").shape == (128,)


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8, 0.95])
def test_the_bands_catch_what_is_at_the_threshold(threshold: float) -> None:
    count, rows = bands(threshold)
    assert count * rows <= 128
    assert 1 - (1 - threshold**rows) ** count > 0.98
