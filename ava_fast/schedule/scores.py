"""How difficult each row of the training data is, and the rankings made of that, kept beside the shards.

    orders = easy_first(config, shards)      # for TokenLoader; None without a difficulty curriculum. Collective

<shards>/difficulty/rarity_<hash>.bin    the rows, easiest first: a SHA-256 of the rest, then uint32 row numbers

The hash in the name is of what the ranking follows from: the split's tokens, the length of a row, the measure and the
reference model's weights. A file that does not agree with its own hash is made anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ava_fast.checkpoint.source import fingerprint, read_source
from ava_fast.config import Config, for_host
from ava_fast.data.batches import Sequences, Shards, open_sources, sources_of
from ava_fast.data.order import Mixture
from ava_fast.data.prepare import progress_bar
from ava_fast.data.shards import TokenStream, read_index
from ava_fast.distributed.rank_0 import on_rank_0
from ava_fast.errors import UserError
from ava_fast.files import sha256, write_whole
from ava_fast.model.transformer import Transformer
from ava_fast.schedule.difficulty import EasyFirst

logger = logging.getLogger(__name__)

VERSION = 1  # of the measures and the file
CHUNK_TOKENS = 2**20
CHUNK_LOGITS = 2**24
FRACTION_BITS = 24  # surprisals as whole numbers of 2⁻²⁴ nats, so that no order of summation matters


def easy_first(config: Config, shards: Shards) -> list[EasyFirst] | None:
    """An order for every source. Rank 0 makes the rankings that are missing. Collective.

    Raises UserError on every rank where a ranking cannot be made or written.
    """
    difficulty, training = config.curriculum.difficulty, config.training
    if difficulty.measure == "none":
        return None
    length = config.data.max_length
    files = on_rank_0(lambda: [_made(config, source) for source in open_sources(shards, "train", length)])
    shares = Mixture([source.weight for source in sources_of(shards)]).counts
    steps = difficulty.ratio * training.max_steps
    horizon = steps * training.batch_size * training.gradient_accumulation_steps
    orders = []
    for number, file in enumerate(files):
        ranking, digest = _read(file)
        how = "" if difficulty.mode == "order" else f", {difficulty.pacing} from {difficulty.start}"
        orders.append(
            EasyFirst(
                ranking,
                mode=difficulty.mode,
                pacing=difficulty.pacing,
                start=difficulty.start,
                horizon=round(horizon * shares[number] / sum(shares)),
                seed=training.seed,
                stream=number,
                identity=f"{difficulty.mode} by {difficulty.measure}{how}, ranking {digest[:12]}",
            )
        )
    return orders


def _made(config: Config, source: Sequences) -> Path:
    """The file of a source's ranking, made if it is not there whole."""
    measure, reference = config.curriculum.difficulty.measure, config.curriculum.difficulty.reference
    model = fingerprint(Path(reference)) if measure == "loss" and reference is not None else None
    origin = json.dumps([VERSION, source.fingerprint, source.max_length, measure, model]).encode()
    folder = Path(source.folder) / "difficulty"
    file = folder / f"{measure}_{hashlib.sha256(origin).hexdigest()[:16]}.bin"
    if file.is_file():
        try:
            _read(file)
            return file
        except UserError as error:
            logger.warning(f"{error}; it is made anew")
    ranking = np.argsort(scores(config, source), kind="stable").astype("<u4").tobytes()
    try:
        folder.mkdir(exist_ok=True)
        write_whole(file, hashlib.sha256(ranking).digest() + ranking)
    except OSError as error:
        raise UserError(
            f"curriculum.difficulty: cannot write {file}: {error.strerror}; the shards' folder keeps the ranking: make "
            "it writable, or copy the shards to where there is room"
        ) from None
    logger.info(f"{file}: {len(source):,} rows ranked by {measure}, kept for the next run")
    return file


def _read(file: Path) -> tuple[npt.NDArray[np.uint32], str]:
    """A ranking, mapped, and its hash. Raises UserError if it is damaged."""
    try:
        whole = np.memmap(file, np.uint8, mode="r")
    except (OSError, ValueError) as error:  # ValueError: it is empty
        raise UserError(f"{file}: cannot be read ({error}); delete it") from None
    digest = hashlib.sha256(whole[32:].data).digest()
    if whole[:32].tobytes() != digest or len(whole) % 4:
        raise UserError(f"{file}: is damaged, it does not agree with its own hash; delete it")
    return whole[32:].view("<u4"), digest.hex()


def scores(config: Config, source: Sequences) -> npt.NDArray[np.int64] | npt.NDArray[np.float64]:
    """(rows,): the sum, over a row's `max_length` tokens, of how difficult each is."""
    stream = TokenStream(source.folder, read_index(source.folder), "train")
    match config.curriculum.difficulty.measure:
        case "length":
            return _lengths(stream, len(source), source.max_length)
        case "rarity":
            return _surprisals(stream, len(source), source.max_length, config.logging.progress)
        case _:
            return _losses(config, source)


def _lengths(stream: TokenStream, rows: int, S: int) -> npt.NDArray[np.int64]:
    """Of a token: its document's tokens, the end of text among them. One pass over the split's tokens."""
    ends, before = [], 0
    for array in stream.arrays():
        for start in range(0, len(array), CHUNK_TOKENS):
            found = np.flatnonzero(array[start : start + CHUNK_TOKENS] == stream.eos_id)
            ends.append(found + (before + start + 1))
        before += len(array)
    edges = np.unique(np.concatenate([[0], *ends, [before]])).astype(np.int64)
    lengths = np.diff(edges)
    squares = np.concatenate([[0], np.cumsum(lengths**2)])  # sums over whole documents, a term for each token
    cuts = np.arange(rows + 1, dtype=np.int64) * S
    document = np.searchsorted(edges, cuts, side="right") - 1
    return np.diff(squares[document] + (cuts - edges[document]) * lengths[np.minimum(document, len(lengths) - 1)])


def _surprisals(stream: TokenStream, rows: int, S: int, progress: bool) -> npt.NDArray[np.int64]:
    """Of a token: −log of its share of the split. Two passes over the split's tokens."""
    counts: npt.NDArray[np.intp] = np.zeros(0, np.intp)
    with progress_bar(2 * len(stream), "rarity of rows", progress, "tokens") as bar:
        for array in stream.arrays():
            for start in range(0, len(array), CHUNK_TOKENS):
                part = array[start : start + CHUNK_TOKENS]
                found = np.bincount(part, minlength=len(counts))
                found[: len(counts)] += counts
                counts = found
                bar.update(len(part))
        nats = -np.log(np.maximum(counts, 1) / counts.sum())
        surprisal = np.round(nats * 2**FRACTION_BITS).astype(np.int64)
        sums = []
        for first, last in _chunks(rows, max(1, CHUNK_TOKENS // S)):
            sums.append(surprisal[stream.read(first * S, last * S)].reshape(-1, S).sum(1))
            bar.update((last - first) * S)
    return np.concatenate(sums)


@torch.inference_mode()
def _losses(config: Config, source: Sequences) -> npt.NDArray[np.float64]:
    """Of a token: its cross-entropy by the reference model, which sees the row up to it."""
    reference = Path(config.curriculum.difficulty.reference or "")
    weights, settings, tokenizer = read_source(reference)
    vocabulary = read_index(source.folder).vocab_size
    if settings.model.vocab_size < vocabulary or (tokenizer and sha256(tokenizer) != source.tokenizer):
        raise UserError(
            f"curriculum.difficulty.reference: {reference} was trained with another tokenizer than {source.folder} was "
            "prepared with; prepare the data with data.tokenizer_name set to the reference's"
        )
    model = Transformer(for_host(settings))
    model.load_state_dict(weights)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.eval().to(device)
    sums = np.empty(len(source))
    size = max(1, CHUNK_LOGITS // (source.max_length * settings.model.vocab_size))
    tokens = len(source) * source.max_length
    with progress_bar(tokens, "the reference's loss", config.logging.progress, "tokens") as bar:
        for first, last in _chunks(len(source), size):
            tokens_BS1 = torch.from_numpy(source.read(range(first, last))).to(device)
            logits_BSV, _ = model.logits(tokens_BS1[:, :-1])
            loss_BS = torch.nn.functional.cross_entropy(
                logits_BSV.float().transpose(1, 2), tokens_BS1[:, 1:], reduction="none"
            )
            sums[first:last] = loss_BS.double().sum(1).cpu().numpy()
            bar.update((last - first) * source.max_length)
    if not np.isfinite(sums).all():
        row = int(np.flatnonzero(~np.isfinite(sums))[0])
        raise UserError(f"curriculum.difficulty.reference: {reference} gives row {row} no finite loss; use another")
    return sums


def _chunks(rows: int, size: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + size, rows)) for first in range(0, rows, size))
