"""Batches of packed sequences from token shards, in an order that depends on the seed and nothing else.

    loader = TokenLoader(folder, max_length=128, batch_size=8, seed=0, rank=0, world_size=1)
    tokens_BS, labels_BS = loader.next_batch()
    state = loader.state_dict()        # the exact position, whatever the number of ranks

Which sequences a batch holds follows from its position (`Batches`) and does not depend on the world size, only which
rank gets them. So the position is all that there is to save, and batches can be read ahead.

B is sequences per rank, S is max_length.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ava_fast.data.batches import Batch, Batches, Order, Shards, open_sources, sources_of
from ava_fast.data.order import ORDER_VERSION, Mixture
from ava_fast.errors import UserError


class NamedOrder(Order, Protocol):
    """`identity` says in words what must be the same for a place to mean the same."""

    identity: str


class TokenLoader:
    """Endless batches of one split. Its memory does not grow with the split; the tokens stay on disk."""

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
        prefetch: int = 0,
        orders: Sequence[NamedOrder] | None = None,
    ):
        """`batch_size` counts sequences over all ranks. `prefetch` batches are read ahead by a thread, into page-locked
        memory where there is CUDA. `document_attention` adds cu_seqlens to each batch. `orders`: see Batches.

        Raises UserError as Batches does.
        """
        self.batches = Batches(
            shards,
            max_length=max_length,
            batch_size=batch_size,
            seed=seed,
            split=split,
            rank=rank,
            world_size=world_size,
            document_attention=document_attention,
            pin=prefetch > 0 and torch.cuda.is_available(),
            orders=orders,
        )
        self._order = "a shuffle" if orders is None else "; ".join(order.identity for order in orders)
        self._seed, self._max_length = seed, max_length
        self._ahead = _Ahead(self.batches, prefetch) if prefetch else None
        self.position = 0
        """Where the next batch starts: sequences handed out or passed over so far, over all ranks and epochs."""
        self.avoid: list[tuple[int, int]] = []
        """Stretches of positions, [start, stop), that no batch may touch: `next_batch` passes over them."""

    @property
    def sequences_per_epoch(self) -> int:
        """Sequences in the split, of all sources together."""
        return sum(map(len, self.batches.sources))

    @property
    def epoch(self) -> float:
        """Passes over the split so far. Sources of a mixture have epochs of their own: see `progress`."""
        return self.position / self.sequences_per_epoch

    def progress(self) -> list[tuple[int, float]]:
        """For each source, how many of its sequences lie before the position, and how many passes over it they are."""
        counts = self.batches.mixture.before(self.position)
        return [(count, count / len(source)) for count, source in zip(counts, self.batches.sources, strict=True)]

    def next_batch(self) -> Batch:
        """This rank's share of the next batch, on the CPU.

        Raises UserError naming a file that is damaged, and where; the next call goes on behind this batch.
        """
        for start, stop in sorted(self.avoid):
            if start < self.position + self.batches.batch_size and self.position < stop:
                self.position = stop
        position = self.position
        self.position += self.batches.batch_size  # even if reading fails: ranks stay at the same place
        return self._ahead.take(position) if self._ahead else self.batches.at(position)

    def documents(self, position: int) -> list[int]:
        """Which documents this rank's share of the batch at `position` touches: see `Batches.documents`."""
        return self.batches.documents(position)

    def close(self) -> None:
        """Ends the thread that reads ahead; `next_batch` then reads by itself."""
        if self._ahead:
            self._ahead.close()
            self._ahead = None

    def state_dict(self) -> dict[str, Any]:
        """The position and what to avoid, and what must be the same for it to mean the same."""
        return {
            "position": self.position,
            "avoid": [list(stretch) for stretch in self.avoid],
            "order_version": ORDER_VERSION,
            "seed": self._seed,
            "max_length": self._max_length,
            "order": self._order,
            "fingerprint": self.batches.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken, at any world size and batch size.

        Raises UserError naming what changed when the seed, the sequence length or the data are not those of `state`,
        or when a release with another order took it.
        """
        if (version := state.get("order_version", 1)) != ORDER_VERSION:
            raise UserError(
                f"cannot continue at the checkpoint's place in the data: it counts in order {version}, this release in "
                f"order {ORDER_VERSION}; go on with the release that saved it, or start anew from its weights"
            )
        now = self.state_dict()
        state = {"order": "a shuffle", **state}  # all there was, before the order was saved
        keys = {"seed": "training.seed", "max_length": "data.max_length", "order": "curriculum.difficulty"}
        changes = [f"{keys[name]} was {state[name]}, is {now[name]}" for name in keys if state[name] != now[name]]
        if state["fingerprint"] != now["fingerprint"]:
            folders = [str(source.folder) for source in self.batches.sources]
            where = f"{folders[0]} (data.data_dir)" if len(folders) == 1 else f"{', '.join(folders)} (data.sources)"
            also = "" if len(folders) == 1 else ", or their proportions"
            changes.append(f"the tokens in {where} are not the ones trained on{also}")
        if changes:
            raise UserError(f"cannot continue at the checkpoint's place in the data: {'; '.join(changes)}; set it back")
        self.position = state["position"]
        self.avoid = [(start, stop) for start, stop in state["avoid"]]


class _Ahead:
    """Reads batches before they are asked for, in one thread. What it has read is no part of any position: whoever
    asks for another batch than the next one gets that."""

    def __init__(self, batches: Batches, depth: int):
        self._batches, self._depth = batches, depth
        on_this_device: dict[str, Any] = {}
        if torch.cuda.is_available():  # else page-locking makes a context on the first device, in every rank
            on_this_device = {"initializer": torch.cuda.set_device, "initargs": (torch.cuda.current_device(),)}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches", **on_this_device)
        self._waiting: deque[tuple[int, Future[Batch]]] = deque()

    def take(self, position: int) -> Batch:
        """The batch at `position`, or the exception that reading it raised."""
        while self._waiting and self._waiting[0][0] != position:
            self._waiting.popleft()[1].cancel()
        step = self._batches.batch_size
        first = self._waiting[-1][0] + step if self._waiting else position
        for ahead in range(first, position + self._depth * step + 1, step):
            self._waiting.append((ahead, self._thread.submit(self._batches.at, ahead)))
        return self._waiting.popleft()[1].result()

    def close(self) -> None:
        self._waiting.clear()
        self._thread.shutdown(cancel_futures=True)


def heldout_sequences(
    shards: Shards,
    *,
    max_length: int,
    limit: int | None = None,
    split: str = "validation",
    rank: int = 0,
    world_size: int = 1,
) -> npt.NDArray[np.int64]:
    """This rank's share of `limit` sequences spread evenly over the split (None: all), as (n, max_length + 1) tokens.

    Of several sources, each gives its share of `limit` by weight, as far as it has that many. They are the same at
    every call. Shares differ by at most one sequence and may be empty; in rank order they add up to the whole. Raises
    UserError as TokenLoader does.
    """
    sources = open_sources(shards, split, max_length)
    wanted = list(map(len, sources))
    if limit:
        wanted = Mixture([source.weight for source in sources_of(shards)]).before(limit)
    chosen = [
        (source, place * len(source) // count)
        for source, count in zip(sources, map(min, wanted, map(len, sources)), strict=True)
        for place in range(count)
    ]
    rows = [
        chosen[place][0].read([chosen[place][1]])[0] for place in np.array_split(range(len(chosen)), world_size)[rank]
    ]
    return np.array(rows, np.int64).reshape(-1, max_length + 1)
