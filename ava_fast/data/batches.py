"""The batch that starts at a position of the data order: a function of the position, with no state between calls.

    batches = Batches([Source(code, 0.7), Source(prose, 0.3)], max_length=128, batch_size=8, seed=0)
    tokens_BS, labels_BS = batches.at(4096)
    batches.documents(4096)

A split is one long stream of tokens; sequence i of it is tokens [i·S, i·S + S], so that documents follow each other
with the end of text between them and each token is predicted once per epoch. Every source is shuffled on its own, anew
in each of its epochs (`Shuffle`), and sources take turns in exact proportions (`Mixture`).

B is sequences per rank, S is max_length, T = B·S.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ava_fast.data.order import Mixture, Places, Shuffle
from ava_fast.data.shards import TokenStream, read_index
from ava_fast.errors import UserError

Batch = tuple[torch.Tensor, ...]
"""tokens_BS and labels_BS, int64, labels one token ahead; with document attention also cu_seqlens, int32."""


def cut(batch: Batch, start: int, stop: int) -> Batch:
    """Its rows from `start` to `stop`, as a batch."""
    tokens_BS, labels_BS, *documents = batch
    rows = tokens_BS[start:stop], labels_BS[start:stop]
    if not documents:
        return rows
    (cu_seqlens,), S = documents, tokens_BS.shape[1]  # every row's start is among them
    inside = (cu_seqlens >= start * S) & (cu_seqlens <= stop * S)
    return *rows, cu_seqlens[inside] - start * S


_BLOCK = 1024  # places whose order is worked out at once: one call takes 0.1 ms for 8 places, and 0.2 for 1,024


class Source(NamedTuple):
    """A folder of shards, and its share of all sequences in proportion to the other sources' weights."""

    folder: Path
    weight: float = 1.0


Shards = str | Path | Sequence[Source]
"""One folder, or several sources."""


class Order(Protocol):
    """Which row of a source comes at each place: a `Shuffle`, or what is passed in its place."""

    def at(self, places: Places) -> Places: ...


def sources_of(shards: Shards) -> list[Source]:
    """One folder as the only source."""
    return [Source(Path(shards))] if isinstance(shards, str | Path) else list(shards)


class Sequences:
    """A split, cut into non-overlapping sequences that share one token with the next."""

    def __init__(self, folder: str | Path, split: str, max_length: int):
        """Raises UserError when the split is too short for one sequence or the files are damaged."""
        index = read_index(folder)
        self.folder, self.max_length = folder, max_length
        self.fingerprint, self.tokenizer = index.fingerprint(split), index.tokenizer_sha256
        self.total_documents = index.split(split).documents
        self.eos_id = index.eos_id
        self._stream = TokenStream(folder, index, split)
        if len(self) < 1:
            raise UserError(
                f"data.max_length: {max_length} needs {max_length + 1:,} tokens, but the {split} split in {folder} "
                f"has {len(self._stream):,}; give a smaller data.max_length or more text"
            )

    def __len__(self) -> int:
        return max(0, len(self._stream) - 1) // self.max_length

    def read(self, indices: Sequence[int]) -> npt.NDArray[np.int64]:
        """The max_length + 1 tokens of each of these sequences."""
        return self._stream.read_rows([index * self.max_length for index in indices], self.max_length + 1)

    def documents(self, index: int) -> range:
        """The documents that the sequence's max_length + 1 tokens belong to, counted from 0."""
        start = index * self.max_length
        return range(self._stream.document(start), self._stream.document(start + self.max_length) + 1)


def open_sources(shards: Shards, split: str, max_length: int) -> list[Sequences]:
    """Every source's sequences. Raises UserError as Sequences does, or where sources differ in their tokenizer."""
    opened = [Sequences(source.folder, split, max_length) for source in sources_of(shards)]
    for other in opened[1:]:
        if other.tokenizer != opened[0].tokenizer:
            raise UserError(
                f"data.sources: {other.folder} was prepared with another tokenizer than {opened[0].folder}; prepare "
                "both with the same data.tokenizer_name"
            )
    return opened


class Batches:
    """`at(position)` is one rank's share of the `batch_size` sequences from `position` on."""

    def __init__(
        self,
        shards: Shards,
        *,
        max_length: int,
        batch_size: int,
        seed: int,
        split: str = "train",
        rank: int = 0,
        world_size: int = 1,
        document_attention: bool = False,
        pin: bool = False,
        orders: Sequence[Order] | None = None,
    ):
        """`batch_size` counts sequences over all ranks; `pin` puts them into page-locked memory. `orders`: of the
        sources, one each, in place of a shuffle.

        Raises UserError as `open_sources` does, or where the ranks cannot share a batch equally.
        """
        if batch_size % world_size:
            raise UserError(
                f"training.batch_size: {batch_size} cannot be shared out over {world_size} ranks; give a multiple"
            )
        self.sources = open_sources(shards, split, max_length)
        self.batch_size, self._rank, self._rows = batch_size, rank, batch_size // world_size
        self._document_attention, self._pin = document_attention, pin
        self.mixture = Mixture([source.weight for source in sources_of(shards)])
        self._orders = orders or [
            Shuffle(len(own), seed=seed, stream=number) for number, own in enumerate(self.sources)
        ]
        self._block: tuple[int, list[tuple[int, int]]] = (-1, [])

    @property
    def fingerprint(self) -> str:
        """Changes whenever some source's tokens do, or the proportions; not with where the folders lie."""
        if len(self.sources) == 1:
            return self.sources[0].fingerprint
        shares = zip(self.mixture.counts, self.sources, strict=True)
        return hashlib.sha256("\n".join(f"{count} {own.fingerprint}" for count, own in shares).encode()).hexdigest()

    def at(self, position: int) -> Batch:
        """See `Batch`. Raises UserError naming a file that is damaged, and where."""
        share = self.share(position)
        tokens_BS1 = np.empty((len(share), self.sources[0].max_length + 1), np.int64)
        for source in {source for source, _ in share}:
            rows = [row for row, (own, _) in enumerate(share) if own == source]
            tokens_BS1[rows] = self.sources[source].read([share[row][1] for row in rows])
        batch: Batch = tuple(torch.from_numpy(part.copy()) for part in (tokens_BS1[:, :-1], tokens_BS1[:, 1:]))
        if self._document_attention:
            batch = (*batch, document_offsets(batch[0], self.sources[0].eos_id))
        return tuple(tensor.pin_memory() for tensor in batch) if self._pin else batch

    def share(self, position: int) -> list[tuple[int, int]]:
        """This rank's sequences in the batch that starts at `position`: (source, sequence of its split)."""
        first = position + self._rank * self._rows
        return [self._at(place) for place in range(first, first + self._rows)]

    def documents(self, position: int) -> list[int]:
        """Which documents this rank's share of the batch touches: counted from 0, from source to source.

        The first call reads the split up to there. What cannot be counted, since a file before it has been cut short,
        is left out: whoever asks has ranks that wait for it.
        """
        found: set[int] = set()
        for source, index in self.share(position):
            before = sum(earlier.total_documents for earlier in self.sources[:source])
            with contextlib.suppress(UserError):
                found.update(before + document for document in self.sources[source].documents(index))
        return sorted(found)

    def _at(self, place: int) -> tuple[int, int]:
        number, row = divmod(place, _BLOCK)
        known, block = self._block
        if known != number:
            block = self._order(number)
            self._block = number, block
        return block[row]

    def _order(self, block: int) -> list[tuple[int, int]]:
        """(source, sequence) of each place of a block."""
        sources, numbers = self.mixture.at(np.arange(block * _BLOCK, (block + 1) * _BLOCK))
        indices = np.empty_like(numbers)
        for source, order in enumerate(self._orders):
            own = sources == source
            indices[own] = order.at(numbers[own])
        return list(zip(sources.tolist(), indices.tolist(), strict=True))


def document_offsets(tokens_BS: torch.Tensor, eos_id: int) -> torch.Tensor:
    """Where documents begin in the rows laid end to end, and T: int32, as attention takes it for `cu_seqlens`.

    A row's first token begins one, and so does what follows an end of text.
    """
    begins_BS = torch.ones_like(tokens_BS, dtype=torch.bool)
    begins_BS[:, 1:] = tokens_BS[:, :-1] == eos_id
    offsets = begins_BS.flatten().nonzero().flatten()
    return torch.cat((offsets, offsets.new_tensor([tokens_BS.numel()]))).int()
