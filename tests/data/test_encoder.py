"""The ids of words that are looked up are those of the tokenizer, for any text."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers, pre_tokenizers

import ava_fast.data.encoder as module
from ava_fast.data.encoder import WordEncoder, cut_by, is_plain
from ava_fast.data.tokenizer import train_tokenizer

SOURCE = Path(json.__file__).with_name("decoder.py").read_text()
TRAINED = train_tokenizer([SOURCE, "größe 日本 ελληνικά русский 'tis it's we'll <|endoftext|> " + "1½2 " * 500], 600)
ENCODER = WordEncoder(TRAINED)


def ours(texts: list[str], encoder: WordEncoder = ENCODER) -> list[list[int]]:
    tokens, counts = encoder(texts)
    assert len(counts) == len(texts)
    assert len(tokens) == counts.sum()
    return [part.tolist() for part in np.split(tokens, np.cumsum(counts)[:-1])]


def theirs(texts: list[str]) -> list[list[int]]:
    return [item.ids for item in TRAINED.encode_batch(texts, add_special_tokens=False)]


def test_words_are_looked_up_for_a_trained_tokenizer() -> None:
    encoder = WordEncoder(TRAINED)
    assert encoder.by_words
    assert ours([SOURCE, ""], encoder) == theirs([SOURCE, ""])
    assert len(encoder._known) > 300
    assert ours([SOURCE], encoder) == theirs([SOURCE])
    encoder._tokens = np.full_like(encoder._tokens, 7)
    assert set(ours([SOURCE], encoder)[0]) == {7}, "from memory"


PIECES = st.sampled_from(
    [
        *(" ", "  ", "\n", "\r\n", "\t", "\x1f", "\x85", "\u2028", "\xa0", "'s", "'ll", "'", "it's", "_", "-", "\0"),
        *("a", "Z", "é", "e\u0301", "я", "١", "½", "²", "12", "ʰ", "ⅷ", "\u200d", "<|endoftext|>"),
        *("日本", "😀", "\u3000", "\U0001d400", "'re", "'ve", "'m", "'L", "l", "e", "S"),
    ]
)
ALPHABETS = st.characters(max_codepoint=0x2FFF, exclude_categories=["Cs"])
TEXTS = st.text() | st.text(ALPHABETS) | st.text(st.characters(max_codepoint=127)) | st.lists(PIECES).map("".join)


@settings(deadline=None, max_examples=300)
@given(st.lists(TEXTS, min_size=1, max_size=4))
def test_any_text_has_the_tokenizers_tokens(texts: list[str]) -> None:
    assert ours(texts) == theirs(texts)


def test_every_character_has_the_tokenizers_tokens_in_every_neighbourhood() -> None:
    planes = [(0, 0x3400), (0xA000, 0xA800), (0xF900, 0x10500), (0x1D400, 0x1D800), (0x1F300, 0x1F700)]
    texts = [
        f"x{chr(c)}{chr(c)} {chr(c)}7{chr(c)}?{chr(c)}\n{chr(c)}" for first, last in planes for c in range(first, last)
    ]
    assert ours(texts) == theirs(texts)


def test_texts_do_not_reach_into_each_other() -> None:
    texts = ["a", "b", " ", "c\n", "d'", "s", "'", "ve", "'v", "e1", "2", "", "", " ", " ", "é", " ", "", "'l", "l", ""]
    assert ours(texts) == theirs(texts)
    data, starts, _ = ENCODER._cut(texts)
    words = [data[start:stop].decode() for start, stop in pairwise(starts.tolist())]
    assert words == [word for text in texts for word in cut_by(TRAINED, text)], "also where no token shows it"


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_WORDS", 50)
    encoder = WordEncoder(TRAINED)
    texts = [SOURCE[start : start + 500] for start in range(0, len(SOURCE), 500)]
    texts.insert(3, "y" * 10_000 + " yes")
    for text in texts:
        assert ours([text], encoder) == theirs([text])
        assert len(encoder._edges) - 1 == len(encoder._known) < 50 + 200
        assert len(encoder._tokens) < 5 * 250
        assert max(map(len, encoder._known), default=0) <= module.LONGEST_WORD


def test_texts_that_hardly_repeat_a_word_are_left_to_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FEW_WORDS", 20)
    encoder = WordEncoder(TRAINED)
    texts = ["".join(f" word{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(400)), "日本"]
    assert ours(texts, encoder) == theirs(texts)
    assert not encoder._known
    assert ours([texts[0] * 5], encoder) == theirs([texts[0] * 5])
    assert len(encoder._known) == 400


def test_other_tokenizers_are_used_as_they_are() -> None:
    def changed() -> Tokenizer:
        return Tokenizer.from_str(TRAINED.to_str())

    others = [changed() for _ in range(6)]
    others[0].normalizer = normalizers.NFC()
    others[1].pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    others[2].pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    others[3].add_tokens(["def "])
    others[4].pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    others[5].enable_truncation(10)
    for other in others:
        assert not is_plain(other)
        text = "e\u0301 def f12(): it's " + SOURCE[:500]
        assert ours([text], WordEncoder(other)) == [other.encode(text, add_special_tokens=False).ids]


def test_a_tokenizer_with_another_expression_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_endings(codes: npt.NDArray[Any], *others: Any) -> npt.NDArray[np.bool_]:
        return word_starts(np.where(codes == ord("'"), ord("?"), codes), *others)

    word_starts = module.word_starts
    monkeypatch.setattr(module, "word_starts", without_endings)
    encoder = WordEncoder(TRAINED)
    assert not encoder.by_words
    assert ours(["it's"], encoder) == theirs(["it's"])
