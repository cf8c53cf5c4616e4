"""Runs a function on N gloo ranks, each a process of its own with torchrun's environment.

    def work(rank_argument):            # top level, so that a child process can import it
        init_distributed(config)
        ...
        return value                    # anything that pickles

    value_of_rank_0, value_of_rank_1 = run_on_ranks(work, 2, rank_argument)

The ranks meet at a store that this process holds, so no port is guessed and no two runs can collide. They are forked
from a server that has imported the engine and done nothing else, which spares each the four seconds that this takes.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch.distributed import TCPStore

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["ava_fast.trainer"])


def run_on_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Calls `fn(*args)` on every rank; returns the results in rank order.

    Raises RuntimeError with the traceback of the first rank that failed, and TimeoutError after `timeout` seconds;
    in both cases no process is left behind.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout))
    ranks, pipes = [], []
    try:
        for rank in range(world_size):
            receiver, sender = FORKS.Pipe(duplex=False)
            environment = {**os.environ, **_environment(rank, world_size, store.port)}
            process = FORKS.Process(target=_rank_main, args=(sender, environment, fn, args))
            process.start()
            sender.close()
            ranks.append(process)
            pipes.append(receiver)
        results = _collect(pipes, time.monotonic() + timeout)
        for process in ranks:
            process.join(timeout=10.0)
        return results
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = [rank for rank in range(len(pipes)) if rank not in results]
            raise TimeoutError(f"no answer in time from ranks {missing}")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                succeeded, payload = pipes[rank].recv()
            except EOFError:
                raise RuntimeError(f"rank {rank} died without a word") from None
            if not succeeded:
                raise RuntimeError(f"rank {rank} failed:\n{payload}")
            results[rank] = pickle.loads(payload)
    return [results[rank] for rank in range(len(pipes))]


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # every rank is a client of the store above
    }


def _rank_main(sender: Connection, environment: dict[str, str], fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)  # ranks share the machine's cores, and one thread gives one order of summation
    os.environ.clear()  # the server's is from when it began
    os.environ.update(environment)
    try:
        # Pickled here, as plain bytes: a queue would pass tensors as handles that die with this process.
        answer = (True, pickle.dumps(fn(*args)))
    except BaseException:
        answer = (False, traceback.format_exc())
    sender.send(answer)
    sender.close()
    if not answer[0]:
        os._exit(1)  # a peer may sit in a collective that this rank will never join
