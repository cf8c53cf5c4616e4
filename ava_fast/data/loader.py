"""Batches of packed sequences from token shards, in an order that depends on the seed and nothing else.

    loader = TokenLoader(folder, max_length=128, batch_size=8, seed=0, rank=0, world_size=1)
    tokens_BS, labels_BS = loader.next_batch()
    state = loader.state_dict()        # the exact position, whatever the number of ranks

A split is one long stream of tokens; sequence i is tokens [i·S, i·S + S], so that documents follow each other with the
end of text between them and each token is predicted once per epoch. Epoch e visits the sequences in the order of
`np.random.default_rng((seed, e)).permutation(n)`, and a batch is the next `batch_size` of epoch after epoch: which
sequences a batch holds does not depend on the world size, only which rank gets them.

B is sequences per rank, S is max_length.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ava_fast.data.shards import TokenStream, read_index
from ava_fast.errors import UserError


class TokenLoader:
    """Endless batches of one split. Its memory is one permutation of the epoch; the tokens stay on disk."""

    def __init__(
        self,
        folder: str | Path,
        *,
        max_length: int,
        batch_size: int,
        seed: int,
        split: str = "train",
        rank: int = 0,
        world_size: int = 1,
    ):
        """`batch_size` counts sequences over all ranks.

        Raises UserError when the split is too short for one sequence, the files are damaged, or the ranks cannot share
        a batch equally.
        """
        if batch_size % world_size:
            raise UserError(
                f"training.batch_size: {batch_size} cannot be shared out over {world_size} ranks; give a multiple"
            )
        self._sequences = _Sequences(folder, split, max_length)
        self._seed, self._rank, self._rows = seed, rank, batch_size // world_size
        self._batch_size = batch_size
        self._epoch, self._order = -1, np.empty(0, np.int64)
        self.position = 0
        """Where the next batch starts: sequences handed out or passed over so far, over all ranks and epochs."""
        self.avoid: list[tuple[int, int]] = []
        """Stretches of positions, [start, stop), that no batch may touch: `next_batch` passes over them."""

    @property
    def sequences_per_epoch(self) -> int:
        """Sequences in the split."""
        return len(self._sequences)

    @property
    def epoch(self) -> float:
        """Passes over the split so far."""
        return self.position / self.sequences_per_epoch

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's share of the next batch: tokens_BS and labels_BS, int64 on the CPU, labels one token ahead.

        Raises UserError naming a file that is damaged; the next call goes on behind this batch.
        """
        for start, stop in sorted(self.avoid):
            if start < self.position + self._batch_size and self.position < stop:
                self.position = stop
        indices = self.share(self.position)
        self.position += self._batch_size  # even if the next line fails: ranks stay at the same place
        sequences_BS1 = np.stack([self._sequences.read(index) for index in indices])
        return torch.from_numpy(sequences_BS1[:, :-1].copy()), torch.from_numpy(sequences_BS1[:, 1:].copy())

    def share(self, position: int) -> list[int]:
        """Which sequences of the split are this rank's in the batch that starts at `position`."""
        first = position + self._rank * self._rows
        return [self._index(first + row) for row in range(self._rows)]

    def documents(self, position: int) -> list[int]:
        """Which documents of the split, counted from 0, this rank's share of the batch at `position` touches.

        The first call reads the split up to there.
        """
        return sorted({document for index in self.share(position) for document in self._sequences.documents(index)})

    def state_dict(self) -> dict[str, Any]:
        """The position and what to avoid, and what must be the same for it to mean the same."""
        return {
            "position": self.position,
            "avoid": [list(stretch) for stretch in self.avoid],
            "seed": self._seed,
            "max_length": self._sequences.max_length,
            "fingerprint": self._sequences.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken, at any world size and batch size.

        Raises UserError naming what changed when the seed, the sequence length or the data are not those of `state`.
        """
        now = self.state_dict()
        keys = {"seed": "training.seed", "max_length": "data.max_length"}
        changes = [f"{keys[name]} was {state[name]}, is {now[name]}" for name in keys if state[name] != now[name]]
        if state["fingerprint"] != now["fingerprint"]:
            changes.append(f"the tokens in {self._sequences.folder} (data.data_dir) are not the ones trained on")
        if changes:
            raise UserError(f"cannot continue at the checkpoint's place in the data: {'; '.join(changes)}; set it back")
        self.position = state["position"]
        self.avoid = [(start, stop) for start, stop in state["avoid"]]

    def _index(self, position: int) -> int:
        """Which sequence the endless order has at `position`."""
        epoch, place = divmod(position, self.sequences_per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng((self._seed, epoch)).permutation(self.sequences_per_epoch)
        return int(self._order[place])


def heldout_sequences(
    folder: str | Path,
    *,
    max_length: int,
    limit: int | None = None,
    split: str = "validation",
    rank: int = 0,
    world_size: int = 1,
) -> npt.NDArray[np.int64]:
    """This rank's share of `limit` sequences spread evenly over the split (None: all), as (n, max_length + 1) tokens.

    They are the same at every call. Shares differ by at most one sequence and may be empty; in rank order they add up
    to the whole. Raises UserError as TokenLoader does.
    """
    sequences = _Sequences(folder, split, max_length)
    count = min(len(sequences), limit or len(sequences))
    chosen = np.arange(count) * len(sequences) // count
    share = np.array_split(chosen, world_size)[rank]
    return np.array([sequences.read(index) for index in share], np.int64).reshape(-1, max_length + 1)


class _Sequences:
    """A split, cut into non-overlapping sequences that share one token with the next."""

    def __init__(self, folder: str | Path, split: str, max_length: int):
        index = read_index(folder)
        self.folder, self.max_length = folder, max_length
        self.fingerprint = index.fingerprint(split)
        self._stream = TokenStream(folder, index, split)
        if len(self) < 1:
            raise UserError(
                f"data.max_length: {max_length} needs {max_length + 1:,} tokens, but the {split} split in {folder} "
                f"has {len(self._stream):,}; give a smaller data.max_length or more text"
            )

    def __len__(self) -> int:
        return max(0, len(self._stream) - 1) // self.max_length

    def read(self, index: int) -> npt.NDArray[np.int64]:
        """The max_length + 1 tokens of a sequence."""
        start = index * self.max_length
        return self._stream.read(start, start + self.max_length + 1)

    def documents(self, index: int) -> range:
        """The documents that the sequence's max_length + 1 tokens belong to, counted from 0."""
        start = index * self.max_length
        return range(self._stream.document(start), self._stream.document(start + self.max_length) + 1)
