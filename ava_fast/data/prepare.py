"""From a folder of text to a folder of token shards, once per distinct input.

    folder = prepare(None, "outputs/data", vocab_size=1024)      # the standard library's source

The result lies in `<cache_dir>/<key>`, where the key is a hash of everything that determines it: the documents' names
and contents, the tokenizer, the held-out fraction, the format. Asking again finds it at once. Processes that prepare
the same input at the same time do the work twice and agree on one result; in a distributed run, let one rank call this.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import tokenizers
from tokenizers import Tokenizer
from tqdm import tqdm

from ava_fast.data.corpus import Corpus, Document, scan, split
from ava_fast.data.shards import FORMAT_VERSION, Piece, check_vocabulary, is_prepared, read_index, write_shards
from ava_fast.data.tokenizer import (
    cut,
    end_of_text_id,
    load_tokenizer,
    tokenizer_file,
    train_tokenizer,
    vocabulary_size,
)
from ava_fast.errors import UserError

BATCH_CHARACTERS = 4 << 20
"""Text per call of the tokenizer: enough for every core, little enough that the bar moves."""
BAR_DELAY_SECONDS = 2

logger = logging.getLogger(__name__)


def prepare(
    data_dir: str | Path | None,
    cache_dir: str | Path,
    *,
    vocab_size: int,
    tokenizer_name: str | Path | None = None,
    validation_fraction: float = 0.05,
    progress: bool = True,
) -> Path:
    """The folder of shards for `data_dir`: found in the cache, made now, or `data_dir` itself if it is one.

    `tokenizer_name` None trains a byte-level BPE of `vocab_size` tokens on the training documents; a given tokenizer
    must fit into `vocab_size`. `progress` shows bars with an ETA on stderr for what takes more than two seconds.
    Raises UserError naming the setting or file at fault.
    """
    if data_dir is not None and is_prepared(data_dir):
        index = read_index(data_dir)
        check_vocabulary(index.vocab_size, vocab_size)
        if (
            tokenizer_name is not None
            and _sha256(tokenizer_file(tokenizer_name).read_bytes()) != index.tokenizer_sha256
        ):
            raise UserError(
                f"data.tokenizer_name: {tokenizer_name} is not the tokenizer that {data_dir} was prepared with; "
                "leave it out, or give data.data_dir the text"
            )
        return Path(data_dir)
    given = None if tokenizer_name is None else _Encoder.load(tokenizer_name)
    if given is not None:
        check_vocabulary(given.vocab_size, vocab_size)
    corpus = scan(data_dir)
    folder = Path(cache_dir) / _key(corpus, given, vocab_size, validation_fraction)
    if is_prepared(folder):
        read_index(folder)
    else:
        logger.info("preparing %d documents: %s", len(corpus.documents), corpus.source)
        train, validation = split(corpus.documents, validation_fraction)
        encoder = given or _Encoder.train(train, vocab_size, progress)
        write_shards(
            folder,
            encoder.pieces(train, progress),
            encoder.pieces(validation, progress),
            tokenizer_json=encoder.json,
            vocab_size=encoder.vocab_size,
            eos_id=encoder.eos_id,
            source=corpus.source,
            skipped=corpus.skipped,
        )
    if corpus.skipped:
        logger.warning(
            "left out %d of %d files in %s: see %s",
            len(corpus.skipped),
            len(corpus.skipped) + len(corpus.documents),
            corpus.source,
            folder / "skipped.jsonl",
        )
    return folder


@dataclass(frozen=True)
class _Encoder:
    """A tokenizer, the bytes of its file and the id that ends a document."""

    tokenizer: Tokenizer
    json: bytes
    eos_id: int

    @classmethod
    def load(cls, path: str | Path) -> _Encoder:
        tokenizer = load_tokenizer(path)
        return cls(tokenizer, tokenizer_file(path).read_bytes(), end_of_text_id(tokenizer, path))

    @classmethod
    def train(cls, documents: list[Document], vocab_size: int, progress: bool) -> _Encoder:
        def texts() -> Iterator[str]:
            for document in documents:
                yield document.read()
                bar.update(document.size)

        with _bar(documents, "training tokenizer", progress) as bar:
            tokenizer = train_tokenizer(texts(), vocab_size)
        return cls(tokenizer, tokenizer.to_str(pretty=True).encode(), end_of_text_id(tokenizer))

    @property
    def vocab_size(self) -> int:
        return vocabulary_size(self.tokenizer)

    def pieces(self, documents: list[Document], progress: bool) -> Iterator[Piece]:
        # A document that writes about "<|endoftext|>" means the characters, not the end of itself.
        self.tokenizer.encode_special_tokens = True
        tokens = 0
        with _bar(documents, "tokenizing", progress) as bar:
            for batch in _batches(documents):
                encodings = self.tokenizer.encode_batch_fast([text for text, _ in batch], add_special_tokens=False)
                for (text, ends_document), encoding in zip(batch, encodings, strict=True):
                    yield Piece(encoding.ids, len(text.encode()), ends_document)
                    tokens += len(encoding)
                    bar.update(len(text.encode()))
                bar.set_postfix_str(f"{tokens / 1e6:.1f} M tokens", refresh=False)


def _batches(documents: list[Document]) -> Iterator[list[tuple[str, bool]]]:
    """About `BATCH_CHARACTERS` at a time: (text, whether a document ends with it)."""
    batch: list[tuple[str, bool]] = []
    characters = 0
    for document in documents:
        *texts, last = cut(document.read())
        for item in [*((text, False) for text in texts), (last, True)]:
            batch.append(item)
            characters += len(item[0])
            if characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def _bar(documents: list[Document], description: str, progress: bool) -> tqdm[NoReturn]:
    return tqdm(
        total=sum(document.size for document in documents),
        desc=description,
        unit="B",
        unit_scale=True,
        delay=BAR_DELAY_SECONDS,
        disable=None if progress else True,  # None: only on a terminal
    )


def _key(corpus: Corpus, given: _Encoder | None, vocab_size: int, validation_fraction: float) -> str:
    recipe = {
        "format_version": FORMAT_VERSION,
        "documents": [(document.name, document.sha256) for document in corpus.documents],
        "skipped": [(item.path, item.reason) for item in corpus.skipped],
        "tokenizer": (_sha256(given.json), given.eos_id) if given else (vocab_size, tokenizers.__version__),
        "validation_fraction": validation_fraction,
    }
    return _sha256(json.dumps(recipe).encode())[:16]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
