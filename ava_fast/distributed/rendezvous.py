"""Where the ranks of one start meet: a part of torchrun's store that no earlier start has written to, and a network
interface by which the other nodes reach this one.

torchrun's agent holds one store for all starts of its workers. What an earlier start left there, addresses above all,
torch (2.13) reads after a restart as if it were of this one, and waits for ever for processes that are gone. Nothing
that torchrun tells its workers names a start: each agent counts its own restarts, a node that joins counts for none. So
rank 0 makes a name up, and each of the others asks for it with a word of its own that only a living rank 0 answers.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
import time
from datetime import timedelta

import psutil
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

_POLL = 0.01  # seconds
_ELSEWHERE = "192.0.2.1"  # RFC 5737: nobody's, so the way to it is the default route


def is_shared() -> bool:
    """Whether the store that torchrun's environment names outlives its workers."""
    return "WORLD_SIZE" in os.environ and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def name_interface() -> None:
    """Tells gloo by which network interface the other nodes reach this one, unless the user has or there are none.

    Left alone, gloo takes the address that this host's name has. On many systems, Debian and a pod on its host's
    network among them, that is the loopback's, and the other nodes then look for this one at home.
    """
    alone = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    if alone or "GLOO_SOCKET_IFNAME" in os.environ or not _is_loopback(socket.gethostname()):
        return
    # Where rank 0 is, the name under which it is reached may be the loopback's too.
    master = os.environ.get("MASTER_ADDR", "")
    towards = _ELSEWHERE if _is_loopback(master) else master
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((towards, 9))  # sends nothing: the system only chooses a way
        except OSError:  # there is none, or only for IPv6
            return
        own = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if own in (each.address for each in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = name


def _is_loopback(host: str) -> bool:
    """Whether the first of its addresses is, which is the one that gloo takes, or it has none."""
    try:
        return ipaddress.ip_address(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]).is_loopback
    except OSError:
        return True


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
