"""Byte-level BPE: trained from text in seconds, or loaded from a `tokenizer.json`.

    tokenizer = train_tokenizer(texts, vocab_size=1024)      # a tokenizers.Tokenizer
    tokenizer = load_tokenizer("outputs/data/3f…")           # the file, or a folder that holds it
    tokenizer.decode(tokenizer.encode("def f():").ids)

The same texts give the same bytes of `tokenizer.to_str()`. Any text round-trips: every byte is in the vocabulary.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ava_fast.errors import UserError

END_OF_TEXT = "<|endoftext|>"
# What tokenizers that come without a tokenizer_config.json call their end of document.
KNOWN_END_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|end▁of▁sentence|>", "[EOS]")
SMALLEST_VOCABULARY = 257
"""256 bytes and the end of text."""
PIECE_CHARACTERS = 1 << 18
_LINE_END = re.compile(r"(?<=\S)\n(?=\S)")


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, min_frequency: int = 0, special_tokens: Sequence[str] = ()
) -> Tokenizer:
    """A byte-level BPE of `vocab_size` tokens, or fewer if the texts hold no more pairs that occur `min_frequency`
    times; `<|endoftext|>` has id 0, `special_tokens` the ids behind it.

    Raises UserError when `vocab_size` is below 257 and the special tokens.
    """
    if vocab_size < SMALLEST_VOCABULARY + len(special_tokens):
        raise UserError(
            f"model.vocab_size: {vocab_size} is too small for a byte-level tokenizer; "
            f"give at least {SMALLEST_VOCABULARY + len(special_tokens)} (256 bytes and "
            f"{', '.join([END_OF_TEXT, *special_tokens])})"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[END_OF_TEXT, *special_tokens],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in cut(text)), trainer)
    return tokenizer


def tokenizer_file(path: str | Path) -> Path:
    """`path` itself, or the `tokenizer.json` in it. Raises UserError when there is none."""
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(
            f"data.tokenizer_name: '{path}' is neither a tokenizer.json nor a folder that holds one; "
            "names on a model hub are not downloaded"
        )
    return file


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer that neither pads nor truncates. Raises UserError when there is none or it cannot be read."""
    file = tokenizer_file(path)
    try:
        tokenizer = Tokenizer.from_str(file.read_bytes().decode())
    except Exception as error:  # the library raises a bare Exception for what is not a tokenizer
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"data.tokenizer_name: {file} cannot be read as a tokenizer: {reason}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id: the rows an embedding needs, also where ids have gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def end_of_text_id(tokenizer: Tokenizer, path: str | Path | None = None) -> int:
    """The id that ends a document: the first of the known names that the tokenizer has.

    With the `path` that it was loaded from, the `eos_token` of a tokenizer_config.json beside it goes first.
    Raises UserError when there is none.
    """
    names: tuple[str, ...] = KNOWN_END_OF_TEXT
    if path is not None:
        names = (*_configured_end_of_text(tokenizer_file(path).with_name("tokenizer_config.json")), *names)
    for name in names:
        token_id = tokenizer.token_to_id(name)
        if token_id is not None:
            return int(token_id)
    raise UserError(
        f"data.tokenizer_name: {path} has no end-of-text token (looked for {', '.join(names)}); "
        'add one, and name it in a tokenizer_config.json beside the file: {"eos_token": "…"}'
    )


def _configured_end_of_text(file: Path) -> tuple[str, ...]:
    if not file.is_file():
        return ()
    try:
        token = json.loads(file.read_bytes()).get("eos_token")
    except (ValueError, AttributeError):
        raise UserError(f"data.tokenizer_name: {file} is not a JSON object") from None
    content = token.get("content") if isinstance(token, dict) else token  # an AddedToken is written as a mapping
    return (content,) if isinstance(content, str) else ()


def round_trip_fault(tokenizer: Tokenizer, samples: int = 200) -> str | None:
    """A text that does not come back from its tokens, or None: of random characters and of random bytes, the same ones
    at every call."""
    generator = random.Random(0)
    planes = [(0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    encoding_specials, tokenizer.encode_special_tokens = tokenizer.encode_special_tokens, True
    try:
        for number in range(samples):
            length = generator.randint(1, 64)
            if number % 2:
                text = generator.randbytes(length).decode("utf-8", "replace")
            else:
                text = "".join(chr(generator.randint(*generator.choice(planes))) for _ in range(length))
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            if tokenizer.decode(ids, skip_special_tokens=False) != text:
                return text
    finally:
        tokenizer.encode_special_tokens = encoding_specials
    return None


def cut(text: str) -> Iterator[str]:
    """`text` in pieces of at least `PIECE_CHARACTERS`: a huge file is tokenized in parallel and in little memory.

    A cut follows a single newline between two visible characters, where byte-level BPE never merges: the pieces'
    tokens are those of the whole. Other kinds of tokenizer may differ in the token beside a cut.
    """
    start = 0
    while match := _LINE_END.search(text, start + PIECE_CHARACTERS):
        yield text[start : match.end()]
        start = match.end()
    yield text[start:]
