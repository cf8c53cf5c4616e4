"""A rank's failure becomes every rank's: a side channel beside the collectives.

A rank that fails while the others wait for it in a collective cannot tell them there. It leaves a note in the store at
which the ranks met, and ends. With gloo its connections close, and the others' collective raises at once. With nccl it
does not: there every rank's watcher, which reads the store each second, aborts the communicators. A rank that has not
left a while after that is ended by its watcher, so none survives alone.

A rank that hangs leaves no note. Each watcher counts up a number in the store, which its neighbour in the ring of ranks
reads: of a process that has been stopped it stands still, and a neighbour on the same machine ends that process. Where
only the main thread hangs, its own watcher ends it after the time that its phase may take. What each rank was doing
goes to the run's logs.

    with Watch(config.distributed, run_folder) as watch:
        watch.enter("step")               # which may take distributed.timeout_step seconds
        watch.tell("out of memory")       # on one rank
        watch.note()                      # on the others: Note(rank=1, reason="out of memory", …)
"""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import psutil
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import ErrorType

from ava_fast.distributed import elastic, stuck
from ava_fast.errors import Interrupted
from ava_fast.settings import DistributedConfig

logger = logging.getLogger(__name__)

_KEY, _BEATS, _LEFT = "ava_fast/failed", "ava_fast/beats", "left"
_EVERY, _BEFORE_ABORT, _BEFORE_END = 1.0, 5.0, 60.0  # seconds
_PARENT = os.getppid()
_aborted = threading.Event()


def raise_if_aborted() -> None:
    """Raises dist.DistBackendError once this rank's communicators have been aborted: what a collective that was under
    way then gave is not to be used. Ask after waiting for the device."""
    if _aborted.is_set():
        raise dist.DistBackendError("another rank failed, so the communicators were aborted")


class Note(NamedTuple):
    """What the first rank that failed left."""

    rank: int
    reason: str
    at_fault: bool
    """Whether it failed over the batch, which is then not tried again."""
    hung: bool = False


class Peer(NamedTuple):
    """A rank's process, as one on the same machine finds it."""

    host: str
    pid: int
    created_at: float


class Watch:
    """While it is open, on every rank; they open and close it together. Collective."""

    def __init__(self, settings: DistributedConfig | None = None, run_folder: Path | None = None) -> None:
        self._settings, self._run_folder = settings or DistributedConfig(), run_folder
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._done = threading.Event()
        self._note: Note | None = None
        self._phase, self._entered_at = "start", time.monotonic()
        own = Peer(socket.gethostname(), os.getpid(), psutil.Process().create_time())
        self.peers = [own] * self._world_size
        self._store: Any = None
        if self._world_size > 1:
            store: Any = dist.distributed_c10d._get_default_store()
            self._store = store.clone()  # a connection of its own: its threads may wait there
            self._beat(0)
            dist.all_gather_object(self.peers, own)
        self._neighbour = (self._rank + 1) % self._world_size
        self._heard, self._heard_at = "", time.monotonic()  # of the neighbour
        self._answered_at = time.monotonic()  # by the store

    def __enter__(self) -> Watch:
        self._heard_at = self._answered_at = time.monotonic()
        if self._store is not None:
            threading.Thread(target=self._listen, daemon=True, name="listen").start()
        threading.Thread(target=self._look, daemon=True, name="watch").start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._done.set()
        if self._store is not None and self._note is None:
            try:
                self._beat(_LEFT)
            except (RuntimeError, ValueError):
                logger.debug("could not say that this rank leaves", exc_info=True)

    def enter(self, phase: str) -> None:
        """What this rank does from now on: start, step, evaluate or save, which may take `distributed.timeout_…`, or
        anything else, which may take any time."""
        self._phase, self._entered_at = phase, time.monotonic()

    def tell(self, reason: str, *, at_fault: bool = False) -> None:
        """Leaves a note for the others, unless there is one."""
        self._tell(Note(self._rank, reason, at_fault))

    def note(self, seconds: float = 0.0) -> Note | None:
        """What a rank left, if one did within `seconds`."""
        end = time.monotonic() + seconds
        while self._store is not None:
            try:
                if self._store.check([_KEY]):
                    return Note(*json.loads(self._store.get(_KEY)))
            except (RuntimeError, ValueError):
                return self._note or Note(0, "its process, or the one that started it, is gone", False, True)
            if time.monotonic() >= end:
                break
            time.sleep(0.05)
        return self._note

    def _tell(self, note: Note) -> None:
        self._note = self._note or note
        if self._store is not None:
            try:
                self._store.compare_set(_KEY, "", json.dumps(note))
            except (RuntimeError, ValueError):  # whoever holds the store is gone, and so are the others soon
                logger.debug("no note could be left", exc_info=True)

    def _beat(self, count: int | str) -> None:
        self._store.set(f"{_BEATS}/{self._rank}", str(count))

    def _listen(self) -> None:
        """All that may wait for the store."""
        count, neighbour = 0, f"{_BEATS}/{self._neighbour}"
        while not self._done.wait(_EVERY):
            count += 1
            try:
                self._beat(count)
                heard = self._store.get(neighbour).decode()
            except (RuntimeError, ValueError):
                heard = ""
            if heard == _LEFT or heard not in ("", self._heard):
                self._heard, self._heard_at = heard, time.monotonic()
            self._note = self.note()
            self._answered_at = time.monotonic()
            if self._note is not None:
                return

    def _look(self) -> None:
        """Whatever happens to the store."""
        looked_at = time.monotonic()
        while not self._done.wait(_EVERY):
            now = time.monotonic()
            if (stopped := now - looked_at - _EVERY) > 3:  # this process itself: it has heard of no one meanwhile
                self._heard_at, self._answered_at = now, now
                self._entered_at += stopped
            looked_at = now
            note = self._note or self._hung(now)
            if note is None:
                continue
            logger.error(f"rank {note.rank} failed: {note.reason}")
            if note.hung:  # asks the device about its collectives, which may hang as well
                _in_time(functools.partial(self._record, note), _BEFORE_ABORT)
            if note.rank == self._rank and note.hung:  # where it hangs it will not come back from
                self._end()
            if not self._done.wait(_BEFORE_ABORT) and dist.is_initialized() and dist.get_backend() == "nccl":
                _aborted.set()
                _in_time(dist.distributed_c10d._abort_process_group, 0)
            if not self._done.wait(_BEFORE_END):
                logger.error("this rank does not come back from where it waits for the failed one: it is ended")
                self._end()
            return

    def _hung(self, now: float) -> Note | None:
        """A note on a rank that hangs, left for the others; where it is a process of this machine, it is ended."""
        limit = self._settings.heartbeat_seconds
        if os.getppid() != _PARENT and elastic.started_by_torchrun():
            note = Note(self._rank, "the torchrun that started it is gone", False, True)
        elif self._store is not None and limit and now - self._answered_at > limit:
            note = Note(0, f"its store has not answered for {limit} s", False, True)
        elif self._store is not None and limit and now - self._heard_at > limit and self._heard != _LEFT:
            note = Note(self._neighbour, f"no sign of life for {limit} s", False, True)
        elif (most := getattr(self._settings, f"timeout_{self._phase}", None)) and now - self._entered_at > most:
            reason = f"in phase {self._phase} for more than distributed.timeout_{self._phase} ({most} s)"
            note = Note(self._rank, reason, False, True)
        elif trouble := _communicator_trouble():
            note = Note(self._rank, f"nccl reports {trouble}", False)
        else:
            return None
        if note.rank != self._rank:
            _kill(self.peers[note.rank])
        # In a thread of its own, as the store may be what hangs; the listener has the connection.
        telling = threading.Thread(target=self._tell, args=(note,), daemon=True)
        telling.start()
        telling.join(_EVERY)
        return note

    def _record(self, note: Note) -> None:
        if self._run_folder is None:
            return
        elastic.lost(self._run_folder, f"rank {note.rank} hung: {note.reason}")
        doing = f"phase {self._phase} for {time.monotonic() - self._entered_at:.1f} s"
        stuck.record(self._run_folder, self._rank, f"rank {note.rank}: {note.reason}", doing)

    def _end(self) -> None:
        logging.shutdown()
        os._exit(Interrupted.exit_code)


def _in_time(action: Callable[[], object], seconds: float) -> None:
    """Does it in a thread, which is left to itself after so long."""
    doing = threading.Thread(target=action, daemon=True)
    doing.start()
    doing.join(seconds)


def _communicator_trouble() -> str | None:
    """What nccl noticed by itself, such as a connection to another node that broke."""
    try:
        group = dist.group.WORLD
        if group is None or dist.get_backend() != "nccl":
            return None
        error = group._get_backend(torch.device("cuda")).get_error()
    except (RuntimeError, ValueError):  # the group has just been left
        return None
    return None if error == ErrorType.SUCCESS else error.name


def _kill(peer: Peer) -> None:
    """Ends a process of this machine; elsewhere its own torchrun does, once the others have left."""
    if peer.host != socket.gethostname():
        return
    try:
        if psutil.Process(peer.pid).create_time() == peer.created_at:
            os.kill(peer.pid, signal.SIGKILL)
    except (psutil.Error, OSError):
        logger.debug("a rank that hung could not be ended", exc_info=True)
