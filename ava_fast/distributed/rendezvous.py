"""Where the ranks of one start meet: a part of torchrun's store that no earlier start has written to.

torchrun's agent holds one store for all starts of its workers. What an earlier start left there, addresses above all,
torch (2.13) reads after a restart as if it were of this one, and waits for ever for processes that are gone. Nothing
that torchrun tells its workers names a start: each agent counts its own restarts, a node that joins counts for none. So
rank 0 makes a name up, and each of the others asks for it with a word of its own that only a living rank 0 answers.
"""

from __future__ import annotations

import os
import secrets
import time
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

_POLL = 0.01  # seconds


def is_shared() -> bool:
    """Whether the store that torchrun's environment names outlives its workers."""
    return "WORLD_SIZE" in os.environ and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def connect(timeout: timedelta) -> Store:
    """A connection to that store as a whole. Raises dist.DistError if it does not answer."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)


def meet(rank: int, world_size: int, timeout: timedelta) -> Store:
    """A store that the ranks of this start have for themselves. Collective.

    Raises dist.DistError if one of them does not come within `timeout`.
    """
    store = connect(timeout)
    if rank == 0:
        # By which the watchdogs of nccl call each other: an earlier start's would end this one after minutes.
        store.delete_key("exception_dump")
        name = secrets.token_hex(8)
        _welcome(store, name, set(range(1, world_size)), time.monotonic() + timeout.total_seconds())
    else:
        word = secrets.token_hex(8)
        store.set(f"ava_fast/asks/{rank}", word)
        name = store.get(f"ava_fast/answer/{word}").decode()
        store.set(f"ava_fast/here/{name}/{rank}", "")
    return PrefixStore(f"ava_fast/start/{name}", store)


def _welcome(store: Store, name: str, missing: set[int], deadline: float) -> None:
    """Answers each rank; the word of one that is gone is answered too, in vain, until its successor overwrites it."""
    answered = set()
    while missing:
        for rank in sorted(missing):
            if store.check([f"ava_fast/here/{name}/{rank}"]):
                missing.discard(rank)
            elif store.check([f"ava_fast/asks/{rank}"]):
                word = store.get(f"ava_fast/asks/{rank}").decode()
                if word not in answered:
                    answered.add(word)
                    store.set(f"ava_fast/answer/{word}", name)
        if missing and time.monotonic() > deadline:
            raise dist.DistError(f"ranks {', '.join(map(str, sorted(missing)))} have not come to the rendezvous")
        time.sleep(_POLL if missing else 0)
