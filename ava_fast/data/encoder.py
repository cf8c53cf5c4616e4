"""Text → token ids, word by word: the tokens of `tokenizers`, several times as fast.

    encode = WordEncoder(tokenizer)
    encode(["def f():"])          # [[…]], the ids of tokenizer.encode_batch without special tokens

Byte-level BPE cuts text into words by one regular expression and never merges across them, and a few thousand words
make up most of any text. So each distinct word is tokenized once and looked up from then on. When an encoder is made,
the expression's cuts are compared with the tokenizer's own around every character below `VERIFIED`. A text with another
character, or one that is cut differently, goes to `tokenizers` whole, as all texts do for any other kind of tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any

import regex
from tokenizers import Tokenizer

WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
"""GPT-2's (Radford et al., 2019), as in the ByteLevel pre-tokenizer."""
ASCII_WORDS = re.compile(
    r"'(?:[stmd]|re|ve|ll)| ?(?:[A-Za-z]+|[0-9]+|[^\t-\r A-Za-z0-9]+)|[\t-\r ]+(?![^\t-\r ])|[\t-\r ]+"
)
"""The same for ASCII, twice as fast."""
VERIFIED = 0x3000
"""All alphabets; not Chinese, Japanese, Korean or emoji."""
KEPT_WORDS = 1 << 18
LONGEST_WORD = 64
MOST_DIFFERING = 200
"""A tokenizer that cuts more characters in another way does not use the expression."""


class WordEncoder:
    """Encodes texts as the tokenizer does with `encode_special_tokens`, adding nothing of its own."""

    def __init__(self, tokenizer: Tokenizer):
        # A document that writes about "<|endoftext|>" means the characters, not the end of itself.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        differing = cut_differently(tokenizer) if is_plain(tokenizer) else []
        self.by_words = is_plain(tokenizer) and len(differing) < MOST_DIFFERING and not any(map(str.isascii, differing))
        """Whether words are looked up at all."""
        avoided = "".join(map(regex.escape, differing))
        self._avoided = regex.compile(rf"[^\x00-\u2fff]|[{avoided}]" if avoided else r"[^\x00-\u2fff]")

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        if not self.by_words:
            return self._whole(texts)
        known = [n for n, text in enumerate(texts) if text.isascii() or self._avoided.search(text) is None]
        others = sorted(set(range(len(texts))) - set(known))
        words = [words_of(texts[number]) for number in known]
        distinct = set(chain.from_iterable(words))
        if len(self._known) > KEPT_WORDS:
            self._known.clear()
        missing = list(distinct.difference(self._known))
        self._known.update(zip(missing, self._whole(missing), strict=True))
        ids: list[list[int]] = [[]] * len(texts)
        look_up = self._known.__getitem__
        for number, text in zip(known, words, strict=True):
            ids[number] = list(chain.from_iterable(map(look_up, text)))
        for number, tokens in zip(others, self._whole([texts[number] for number in others]), strict=True):
            ids[number] = tokens
        for word in missing:  # long ones are rare, and would fill the memory
            if len(word) > LONGEST_WORD:
                del self._known[word]
        return ids

    def _whole(self, texts: Sequence[str]) -> list[list[int]]:
        return [item.ids for item in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def words_of(text: str) -> list[str]:
    """What is tokenized on its own, in order: together they are the text."""
    return ASCII_WORDS.findall(text) if text.isascii() else WORDS.findall(text)


def is_plain(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer is byte-level BPE that cuts text by GPT-2's expression and does nothing else to it."""
    tree: dict[str, Any] = json.loads(tokenizer.to_str())
    model, splitter = tree["model"], tree["pre_tokenizer"] or {}
    return (
        model["type"] == "BPE"
        and not model.get("dropout")
        and tree["normalizer"] is None
        and tree["truncation"] is None
        and splitter.get("type") == "ByteLevel"
        and bool(splitter.get("use_regex", True))
        and not splitter["add_prefix_space"]
        and all(token["special"] for token in tree["added_tokens"])
    )


def cut_differently(tokenizer: Tokenizer) -> list[str]:
    """Characters below `VERIFIED` around which `WORDS` cuts elsewhere than a plain tokenizer: those that only one of
    two versions of Unicode knows to be letters."""
    cut = tokenizer.pre_tokenizer.pre_tokenize_str

    def differs(characters: list[str]) -> bool:
        # The expression knows four classes: a character between two of each shows which one it is in.
        probe = "".join(f"a{c} 1{c}1 !{c}! a {c} a{c}{c}a  " for c in characters)
        return [end for _, (_, end) in cut(probe)] != list(accumulate(map(len, words_of(probe))))

    found: list[str] = []
    for start in range(0, VERIFIED, 64):
        block = list(map(chr, range(start, start + 64)))
        if differs(block):
            found += [character for character in block if differs([character])]
    return found
