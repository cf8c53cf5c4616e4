"""Training is reproducible, text round-trips, foreign tokenizers are understood or refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from ava_fast.data import tokenizer as module
from ava_fast.data.tokenizer import cut, end_of_text_id, load_tokenizer, train_tokenizer, vocabulary_size
from ava_fast.errors import UserError

TEXTS = [Path(json.__file__).with_name(name).read_text() for name in ("decoder.py", "encoder.py", "__init__.py")]
TRAINED = train_tokenizer(TEXTS, 400)
TRAINED.encode_special_tokens = True


def test_training_again_in_another_process_gives_the_same_bytes() -> None:
    script = (
        "import json, pathlib; from ava_fast.data.tokenizer import train_tokenizer\n"
        "folder = pathlib.Path(json.__file__).parent\n"
        "texts = [(folder / name).read_text() for name in ('decoder.py', 'encoder.py', '__init__.py')]\n"
        "print(train_tokenizer(texts, 400).to_str())"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == TRAINED.to_str()
    assert train_tokenizer(TEXTS, 400).to_str() == TRAINED.to_str()
    assert train_tokenizer(TEXTS[:1], 400).to_str() != TRAINED.to_str()


def test_a_trained_tokenizer_has_the_size_asked_for_and_merges() -> None:
    assert vocabulary_size(TRAINED) == 400
    assert end_of_text_id(TRAINED) == TRAINED.token_to_id("<|endoftext|>") == 0
    assert len(TRAINED.encode(TEXTS[0]).ids) < 0.6 * len(TEXTS[0])


@given(st.text() | st.binary().map(lambda data: data.decode("utf-8", "replace")))
def test_any_text_round_trips(text: str) -> None:
    ids = TRAINED.encode(text).ids
    assert TRAINED.decode(ids, skip_special_tokens=False) == text
    assert 0 not in ids


WORDS = st.sampled_from(
    ["\n", "\n\n", "\n    ", "    ", " ", "\t", "\r\n", "\x85", "\u2028", "def", "'s", "1", ".", "é"]
)


@given(st.lists(WORDS, max_size=30).map("".join), st.integers(1, 8))
def test_the_tokens_of_the_pieces_are_those_of_the_whole(text: str, characters: int) -> None:
    original, module.PIECE_CHARACTERS = module.PIECE_CHARACTERS, characters
    try:
        pieces = list(cut(text))
    finally:
        module.PIECE_CHARACTERS = original
    assert "".join(pieces) == text
    assert [token for piece in pieces for token in TRAINED.encode(piece).ids] == TRAINED.encode(text).ids


def test_a_long_text_is_cut() -> None:
    text = "a line of text\n" * 100_000
    pieces = list(cut(text))
    assert "".join(pieces) == text
    assert len(pieces) > 3
    assert max(map(len, pieces)) < module.PIECE_CHARACTERS + 100


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    assert vocabulary_size(train_tokenizer(["x"], 257)) == 257
    with pytest.raises(UserError, match=r"model\.vocab_size: 256 is too small .* at least 257"):
        train_tokenizer(["x"], 256)


def test_a_file_or_its_folder_is_loaded_without_padding_and_truncation(tmp_path: Path) -> None:
    limited = Tokenizer.from_str(TRAINED.to_str())
    limited.enable_truncation(3)
    limited.enable_padding(length=50)
    limited.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        for text in ("short", TEXTS[0]):
            assert load_tokenizer(path).encode(text).ids == TRAINED.encode(text).ids


def test_what_is_not_a_tokenizer_is_refused(tmp_path: Path) -> None:
    message = r"data\.tokenizer_name: 'gpt2' is neither a tokenizer\.json nor a folder .* not downloaded"
    with pytest.raises(UserError, match=message):
        load_tokenizer("gpt2")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        load_tokenizer(tmp_path)


def foreign(folder: Path, special: list[str], config: str | None = None) -> tuple[Tokenizer, Path]:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(config)
    return tokenizer, folder


@pytest.mark.parametrize(
    ("special", "config", "token"),
    [
        (["<s>", "</s>"], None, "</s>"),
        (["<eos>", "<|endoftext|>"], None, "<|endoftext|>"),
        (["<|end_of_text|>"], "{}", "<|end_of_text|>"),
        (["<|endoftext|>", "<|im_end|>"], '{"eos_token": "<|im_end|>"}', "<|im_end|>"),
        (["</s>", "<fin>"], '{"eos_token": {"content": "<fin>"}}', "<fin>"),
    ],
)
def test_the_end_of_text_of_foreign_tokenizers(
    tmp_path: Path, special: list[str], config: str | None, token: str
) -> None:
    tokenizer, path = foreign(tmp_path, special, config)
    assert end_of_text_id(tokenizer, path) == tokenizer.token_to_id(token)


def test_a_tokenizer_without_an_end_of_text_is_refused(tmp_path: Path) -> None:
    tokenizer, path = foreign(tmp_path, ["<s>"], '{"eos_token": "<fin>"}')
    with pytest.raises(UserError, match=r"has no end-of-text token \(looked for <fin>, <\|endoftext\|>, "):
        end_of_text_id(tokenizer, path)
    (path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"tokenizer_config\.json is not a JSON object"):
        end_of_text_id(tokenizer, path)


def test_the_vocabulary_reaches_to_the_largest_id() -> None:
    assert vocabulary_size(Tokenizer(models.WordLevel({"a": 0, "b": 9}, unk_token="a"))) == 10
