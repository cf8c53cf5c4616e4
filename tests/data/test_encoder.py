"""The ids of words that are looked up are those of the tokenizer, for any text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers, pre_tokenizers

import ava_fast.data.encoder as module
from ava_fast.data.encoder import VERIFIED, WordEncoder, cut_differently, is_plain
from ava_fast.data.tokenizer import train_tokenizer

SOURCE = Path(json.__file__).with_name("decoder.py").read_text()
TRAINED = train_tokenizer([SOURCE, "größe 日本 ελληνικά русский 'tis it's we'll <|endoftext|> " + "1½2 " * 500], 600)
ENCODER = WordEncoder(TRAINED)


def theirs(texts: list[str]) -> list[list[int]]:
    return [item.ids for item in TRAINED.encode_batch(texts, add_special_tokens=False)]


def test_words_are_looked_up_for_a_trained_tokenizer() -> None:
    assert ENCODER.by_words
    assert ENCODER([SOURCE, ""]) == theirs([SOURCE, ""])
    assert ENCODER([SOURCE]) == theirs([SOURCE]), "now from memory"


PIECES = st.sampled_from(
    [
        *(" ", "  ", "\n", "\r\n", "\t", "\x1f", "\x85", "\u2028", "\xa0", "'s", "'ll", "'", "it's", "_", "-", "\0"),
        *("a", "Z", "é", "e\u0301", "я", "١", "½", "²", "12", "ʰ", "ⅷ", "\u200d", "<|endoftext|>"),
        *("日本", "😀", "\u3000", "\U0001d400"),
    ]
)
ALPHABETS = st.characters(max_codepoint=VERIFIED - 1, exclude_categories=["Cs"])
TEXTS = st.text() | st.text(ALPHABETS) | st.text(st.characters(max_codepoint=127)) | st.lists(PIECES).map("".join)


@settings(deadline=None, max_examples=300)
@given(st.lists(TEXTS, max_size=4))
def test_any_text_has_the_tokenizers_tokens(texts: list[str]) -> None:
    assert ENCODER(texts) == theirs(texts)


def test_every_character_has_the_tokenizers_tokens_in_every_neighbourhood() -> None:
    texts = [
        f"x{chr(c)}{chr(c)} {chr(c)}7{chr(c)}?{chr(c)}\n{chr(c)}" for c in range(0x4000) if not 0xD800 <= c < 0xE000
    ]
    assert ENCODER(texts) == theirs(texts)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_WORDS", 50)
    encoder = WordEncoder(TRAINED)
    texts = [SOURCE[start : start + 500] for start in range(0, len(SOURCE), 500)]
    texts.insert(3, "y" * 10_000)
    for text in texts:
        assert encoder([text]) == theirs([text])
        assert len(encoder._known) < 50 + 200
        assert max(map(len, encoder._known), default=0) <= module.LONGEST_WORD


def test_other_tokenizers_are_used_as_they_are() -> None:
    def changed() -> Tokenizer:
        return Tokenizer.from_str(TRAINED.to_str())

    others = [changed() for _ in range(5)]
    others[0].normalizer = normalizers.NFC()
    others[1].pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    others[2].pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    others[3].add_tokens(["def "])
    others[4].pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for other in others:
        assert not is_plain(other)
        text = "e\u0301 def f12(): it's " + SOURCE[:500]
        assert WordEncoder(other)([text]) == [other.encode(text, add_special_tokens=False).ids]


def test_characters_that_are_cut_differently_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(cut_differently(TRAINED)) < 50, "what a version of Unicode adds below U+3000"
    pattern = module.WORDS.pattern
    half = pattern.replace(r"?\p{N}+", r"?(?:(?!½)\p{N})+").replace(r"[^\s\p{L}\p{N}]+", r"(?:½|[^\s\p{L}\p{N}])+")
    monkeypatch.setattr(module, "WORDS", module.regex.compile(half))
    assert "½" in cut_differently(TRAINED)
    encoder = WordEncoder(TRAINED)
    assert encoder.by_words
    texts = ["1½2 12 ½½", "plain 12"]
    assert encoder(texts) == theirs(texts)
    monkeypatch.setattr(module, "WORDS", module.regex.compile(pattern.replace(r"\p{L}", r"[\p{L}\p{M}]")))
    assert not WordEncoder(TRAINED).by_words
    assert VERIFIED == 0x3000
