"""Which documents are kept: pure functions of one document's text, and signatures that show near-duplicates.

filters = FiltersConfig(min_length=200, max_consecutive_repeats=20)
reject(filters, "buy " * 500)         # "one word or line more than 20 times in a row"
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ava_fast.errors import UserError

if TYPE_CHECKING:
    from ava_fast.settings import FiltersConfig

PERMUTATIONS = 128
NGRAM = 4
"""Words whose repetition is counted."""
SHINGLE = 5
"""Words that near-duplicates share."""
_WORD = re.compile(r"\w+")
_WHITE = re.compile(r"\S+")

Hook = Callable[[str], str | None]


def reject(filters: FiltersConfig, text: str) -> str | None:
    """Why a document is left out, in words that are the same for many, or None. Says nothing of duplicates."""
    if len(text.strip()) < filters.min_length:
        return f"shorter than {filters.min_length:,} characters"
    if filters.max_consecutive_repeats is not None and longest_run(text) > filters.max_consecutive_repeats:
        return f"one word or line more than {filters.max_consecutive_repeats:,} times in a row"
    if filters.max_repetition is not None and repetition(text) > filters.max_repetition:
        return f"repetition above {filters.max_repetition:g}"
    return None


def longest_run(text: str) -> int:
    """The most times that the same word, or the same line with something in it, follows itself; 0 without any."""
    words = groupby(match.group() for match in _WHITE.finditer(text))
    lines = groupby(line for line in map(str.strip, text.splitlines()) if line)
    return max((sum(1 for _ in run) for runs in (words, lines) for _, run in runs), default=0)


def repetition(text: str) -> float:
    """Share of the text's runs of `NGRAM` words that occurred in it before; 0 for a text of fewer words."""
    words = _WHITE.findall(text)
    count = len(words) - NGRAM + 1
    if count < 1:
        return 0.0
    return 1 - len(set(zip(*(words[start:] for start in range(NGRAM)), strict=False))) / count


def load_hook(name: str | None) -> tuple[Hook | None, str]:
    """The function that `module:function` names and a hash of its module's source. Raises UserError.

    A module in the working directory is found whatever command is running.
    """
    if name is None:
        return None, ""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    module_name, colon, attribute = name.partition(":")
    try:
        if not colon:
            raise ValueError("is not module:function")
        module = importlib.import_module(module_name)
        hook = getattr(module, attribute)
        if not callable(hook):
            raise ValueError("is not a function")
        source = inspect.getsource(module)
    except (ImportError, AttributeError, ValueError, OSError, TypeError) as error:
        raise UserError(
            f"filters.hook: {name} cannot be used: {error}; give module:function, the module in this "
            "folder or installed"
        ) from None
    return hook, hashlib.sha256(source.encode()).hexdigest()


def signature(text: str) -> npt.NDArray[np.uint32]:
    """MinHash (Broder, 1997) of the text's five-word runs: (PERMUTATIONS,) uint32, the same on every machine."""
    rensa = near_duplicates_library()
    words = _WORD.findall(text.lower())
    shingles = {" ".join(words[start : start + SHINGLE]) for start in range(max(1, len(words) - SHINGLE + 1))}
    minhash = rensa.RMinHash(num_perm=PERMUTATIONS, seed=1)
    minhash.update(sorted(shingles))
    return np.array(minhash.digest(), np.uint32)


def near_duplicates_library() -> Any:
    """rensa. Raises UserError where it is not installed."""
    try:
        import rensa
    except ImportError:
        raise UserError("filters.near_duplicates: needs rensa: pip install 'ava-fast[near-duplicates]'") from None
    return rensa


def bands(threshold: float) -> tuple[int, int]:
    """(bands, rows) of PERMUTATIONS, so that a pair at `threshold` is compared with a probability above 0.98 or,
    where that asks too much, as often as PERMUTATIONS bands of one row allow."""
    for rows in range(PERMUTATIONS, 0, -1):
        count = PERMUTATIONS // rows
        if 1 - (1 - threshold**rows) ** count > 0.98:
            return count, rows
    return PERMUTATIONS, 1


def near_copies(signatures: npt.NDArray[np.uint32], threshold: float) -> npt.NDArray[np.bool_]:
    """Which rows are near-duplicates of an earlier row; `signatures` is (documents, PERMUTATIONS).

    Each row is compared with the first row of every bucket it falls into, band by band: memory is a few numbers a
    document, whatever the signatures take on disk.
    """
    copies = np.zeros(len(signatures), bool)
    count, rows = bands(threshold)
    for band in range(count):
        key = np.ascontiguousarray(signatures[:, band * rows : (band + 1) * rows]).view(f"V{4 * rows}")[:, 0]
        _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
        anchor = first[inverse]
        for start in range(0, len(anchor), 1 << 16):
            stretch = np.arange(start, min(start + (1 << 16), len(anchor)))
            later = stretch[(anchor[stretch] < stretch) & ~copies[stretch]]
            alike = (signatures[later] == signatures[anchor[later]]).mean(axis=1) >= threshold
            copies[later[alike]] = True
    return copies
