"""Text → token ids, word by word: the tokens of `tokenizers`, several times as fast.

    encode = WordEncoder(tokenizer)
    tokens, counts = encode(["def f():", "x"])      # all ids in one array, and how many of them each text has

Byte-level BPE cuts text into words by one regular expression and never merges across them, and a few thousand words
make up most of any text. So numpy cuts, Arrow numbers the distinct words, and each of these is tokenized once and
looked up from then on. To which class of the expression a character belongs is asked of the tokenizer itself when the
character is first met. Tokenizers of any other kind get the texts whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, count, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow
from tokenizers import Tokenizer, models, pre_tokenizers

LETTER, NUMBER, OTHER, SPACE, UNSEEN = range(5)
"""The classes of GPT-2's expression (Radford et al., 2019), as in the ByteLevel pre-tokenizer:
's|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"""
KEPT_WORDS = 1 << 18
LONGEST_WORD = 64
"""Bytes of a word that is remembered; longer ones are rare, and would fill the memory."""
FEW_WORDS = 10_000
"""A call with more new words than these, and than a quarter of all, is left to the tokenizer: it gains nothing else.
So it is with Chinese, which has no spaces."""
EXAMPLE = "it's 'tis 'S we'll 'llx''s\n'd  I've12½'m 're\n\n \tthey're'vex?? '' 's'r  "
"""A tokenizer that cuts this in another way gets its texts whole."""


class WordEncoder:
    """Encodes texts as the tokenizer does with `encode_special_tokens`, adding nothing of its own."""

    def __init__(self, tokenizer: Tokenizer):
        # A document that writes about "<|endoftext|>" means the characters, not the end of itself.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self._of_words = Tokenizer(tokenizer.model)
        self._of_words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._classes = np.full(0x110000, UNSEEN, np.uint8)
        self._forget()
        self.by_words = is_plain(tokenizer) and self.words_of(EXAMPLE) == cut_by(tokenizer, EXAMPLE)
        """Whether words are looked up at all."""

    def __call__(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """(the tokens of all texts, how many of them are each text's)."""
        if not self.by_words:
            return tokenize(self._tokenizer, texts)
        data, starts, first_words = self._cut(texts)
        buffers = [None, pyarrow.py_buffer(starts), pyarrow.py_buffer(data)]
        words = pyarrow.Array.from_buffers(pyarrow.binary(), len(starts) - 1, buffers).dictionary_encode()
        distinct = words.dictionary.to_pylist()
        if len(self._known) > KEPT_WORDS:
            self._forget()
        missing = [word for word in distinct if word not in self._known]
        if len(missing) > max(FEW_WORDS, len(words) // 4):
            return tokenize(self._tokenizer, texts)
        rows, tokens, edges = self._look_up(distinct, missing)
        rows = rows[np.from_dlpack(words.indices)]  # to_numpy would import pandas
        lengths = np.diff(edges)[rows]
        ends = np.concatenate([[0], np.cumsum(lengths)])
        places = np.arange(ends[-1]) + np.repeat(edges[rows] - ends[:-1], lengths)
        return tokens[places], np.diff(ends[first_words])

    def words_of(self, text: str) -> list[str]:
        """What is tokenized on its own, in order: together they are the text."""
        data, starts, _ = self._cut([text])
        return [data[start:stop].decode() for start, stop in pairwise(starts.tolist())]

    def _cut(self, texts: Sequence[str]) -> tuple[bytes, npt.NDArray[np.int32], npt.NDArray[np.intp]]:
        """(all texts as UTF-8, where in it words begin and the last one ends, which word each text begins with and
        how many there are)."""
        joined = "".join(texts)
        data = joined.encode()
        codes: npt.NDArray[Any]
        if joined.isascii():
            codes = np.frombuffer(data, np.uint8)
        else:
            codes = np.frombuffer(joined.encode("utf-32-le"), "<u4")
        edges = np.cumsum([0, *map(len, texts)])
        starts = np.flatnonzero(word_starts(codes, self._classes_of(codes), edges))
        first_words = np.searchsorted(starts, edges)
        if codes.itemsize == 1:
            return data, starts.astype(np.int32), first_words
        sizes = np.ones(len(codes) + 1, np.uint8)
        sizes[0] = 0
        for least in (0x80, 0x800, 0x10000):
            sizes[1:] += codes >= least
        return data, np.cumsum(sizes, dtype=np.int32)[starts], first_words

    def _classes_of(self, codes: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        classes = self._classes[codes]
        if (unseen := classes == UNSEEN).any():
            new = np.unique(codes[unseen])
            self._classes[new] = character_classes(self._tokenizer, "".join(map(chr, new.tolist())))
            classes = self._classes[codes]
        return classes

    def _forget(self) -> None:
        self._known: dict[bytes, int] = {}  # word → its row
        self._tokens: npt.NDArray[np.uint32] = np.zeros(0, np.uint32)
        self._edges: npt.NDArray[np.int64] = np.zeros(1, np.int64)

    def _look_up(
        self, words: list[bytes], missing: list[bytes]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """(row of each word, tokens of all rows, where in these each row begins and the last one ends)."""
        missing.sort(key=lambda word: len(word) > LONGEST_WORD)
        new, counts = tokenize(self._of_words, [word.decode() for word in missing])
        tokens = np.concatenate([self._tokens, new])
        edges = np.concatenate([self._edges, self._edges[-1] + np.cumsum(counts)])
        self._known.update(zip(missing, count(len(self._known)), strict=False))
        rows = np.fromiter(map(self._known.__getitem__, words), np.int64, len(words))
        while missing and len(missing[-1]) > LONGEST_WORD:
            del self._known[missing.pop()]
        kept = len(self._known)
        self._tokens, self._edges = tokens[: edges[kept]], edges[: kept + 1]
        return rows, tokens, edges


def word_starts(
    codes: npt.NDArray[Any], classes: npt.NDArray[np.uint8], edges: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Where GPT-2's expression cuts texts that lie one behind the other: (characters + 1,), True where a word begins
    and at the end. `edges` are the texts' beginnings and the last one's end."""
    starts = np.zeros(len(codes) + 1, bool)
    starts[1:-1] = classes[1:] != classes[:-1]
    ends_text = np.zeros(len(codes) + 1, bool)
    ends_text[edges] = starts[edges] = True
    # The last of some white space goes with the word behind it if it is a space, and is a word of its own if not.
    is_space = classes == SPACE
    behind_space = is_space[:-1] & ~is_space[1:] & ~ends_text[1:-1]
    starts[:-2] |= behind_space
    starts[1:-1] &= ~(behind_space & (codes[:-1] == ord(" ")))
    # An apostrophe between words may begin one of the endings; a letter may follow these.
    alone = (codes[:-1] == ord("'")) & starts[:-2] & starts[1:-1] & ~ends_text[1:-1] & (classes[1:] == LETTER)
    places = np.flatnonzero(alone)
    first, second = codes[places + 1], codes[np.minimum(places + 2, len(codes) - 1)]
    pairs = [(first == ord(a)) & (second == ord(b)) for a, b in ("re", "ve", "ll")]
    long = np.any(pairs, axis=0) & ~ends_text[places + 2]
    short = np.isin(first, list(b"stmd"))
    starts[places[short | long] + 1] = False
    starts[places[short] + 2] = starts[places[long] + 3] = True
    return starts


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    """(the tokens of all texts, how many of them are each text's), as the tokenizer itself finds them."""
    ids = [item.ids for item in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    return np.fromiter(chain.from_iterable(ids), np.uint32), np.fromiter(map(len, ids), np.int64)


def character_classes(tokenizer: Tokenizer, characters: str) -> npt.NDArray[np.uint8]:
    """Which class of the expression each character is in, as a plain tokenizer cuts beside it: (characters,)."""
    probe = "".join(f"a{character}1{character}!{character} " for character in characters)
    ends = {end for _, (_, end) in tokenizer.pre_tokenizer.pre_tokenize_str(probe)}
    # Of one class with what stands before it: no cut.
    found = [
        next((kind for kind, place in ((LETTER, 1), (NUMBER, 3), (OTHER, 5)) if start + place not in ends), SPACE)
        for start in range(0, len(probe), 7)
    ]
    return np.array(found, np.uint8)


def cut_by(tokenizer: Tokenizer, text: str) -> list[str]:
    """The words into which a tokenizer's own pre-tokenizer cuts a text."""
    return [text[start:end] for _, (start, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def is_plain(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer is byte-level BPE that cuts text by GPT-2's expression and does nothing else to it."""
    model, splitter = tokenizer.model, tokenizer.pre_tokenizer
    return (
        isinstance(model, models.BPE)
        and not model.dropout
        and tokenizer.normalizer is None
        and tokenizer.truncation is None
        and isinstance(splitter, pre_tokenizers.ByteLevel)
        and splitter.use_regex
        and not splitter.add_prefix_space
        and all(token.special for token in tokenizer.get_added_tokens_decoder().values())
    )
