"""A rank's failure becomes every rank's: a side channel beside the collectives.

A rank that fails while the others wait for it in a collective cannot tell them there. It leaves a note in the store at
which the ranks met, and ends. With gloo its connections close, and the others' collective raises at once. With nccl it
does not: there every rank's watcher, which reads the store each second, aborts the communicators. A rank that has not
left a while after that is ended by its watcher, so none survives alone.

    with Watch() as watch:
        …
        watch.tell("out of memory")       # on one rank
        watch.note()                      # on the others: Note(rank=1, reason="out of memory")
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from types import TracebackType
from typing import Any, NamedTuple

import torch.distributed as dist

logger = logging.getLogger(__name__)

_KEY = "ava_fast/failed"
_EVERY, _BEFORE_ABORT, _BEFORE_END = 1.0, 5.0, 60.0  # seconds
EXIT_CODE = 3


class Note(NamedTuple):
    """What the first rank that failed left."""

    rank: int
    reason: str
    at_fault: bool
    """Whether it failed over the batch, which is then not tried again."""


class Watch:
    """While it is open, on every rank. In a world of one it does nothing."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._own: Note | None = None
        self._store: Any = None
        if dist.get_world_size() > 1:
            store: Any = dist.distributed_c10d._get_default_store()
            self._store = store.clone()  # a connection of its own: one cannot be shared between threads

    def __enter__(self) -> Watch:
        if self._store is not None:
            threading.Thread(target=self._look, daemon=True, name="watch").start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._done.set()

    def tell(self, reason: str, *, at_fault: bool = False) -> None:
        """Leaves a note for the others, unless there is one."""
        self._own = Note(dist.get_rank(), reason, at_fault)
        if self._store is not None:
            try:
                self._store.compare_set(_KEY, "", json.dumps(self._own))
            except (RuntimeError, ValueError):  # whoever holds the store is gone, and so are the others soon
                logger.debug("no note could be left", exc_info=True)

    def note(self, seconds: float = 0.0) -> Note | None:
        """What a rank left, if one did within `seconds`."""
        end = time.monotonic() + seconds
        while self._store is not None:
            try:
                if self._store.check([_KEY]):
                    return Note(*json.loads(self._store.get(_KEY)))
            except (RuntimeError, ValueError):
                return Note(0, "its process, or the one that started it, is gone", False)
            if time.monotonic() >= end:
                break
            time.sleep(0.05)
        return self._own

    def _look(self) -> None:
        while not self._done.wait(_EVERY):
            note = self.note()
            if note is None:
                continue
            logger.error(f"rank {note.rank} failed: {note.reason}")
            if not self._done.wait(_BEFORE_ABORT) and dist.get_backend() == "nccl":
                dist.distributed_c10d._abort_process_group()
            if not self._done.wait(_BEFORE_END):
                logger.error("this rank does not come back from where it waits for the failed one: it is ended")
                logging.shutdown()
                os._exit(EXIT_CODE)
            return
