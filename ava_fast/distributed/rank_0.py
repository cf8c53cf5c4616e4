"""What rank 0 does alone while the others wait, and whether all ranks see what it wrote.

    shards = on_rank_0(lambda: prepare(...))   # its result, or its UserError, on every rank
    wait_for_all()                             # a barrier that rank 0 may be hours late for
    see_the_same(run_folder)                   # raises UserError on every rank where one of them does not

A collective gives up after `distributed.timeout_seconds`; a corpus may take hours to prepare. So the others wait in a
gloo group of its own, whose patience is a month. Where rank 0 dies its connections close, and they raise at once.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from ava_fast.errors import UserError

_PATIENCE = timedelta(days=30)
_group: dist.ProcessGroup | None = None
Result = TypeVar("Result")


def open_group() -> None:
    """Collective, once the default group is there."""
    global _group
    _group = dist.new_group(backend="gloo", timeout=_PATIENCE) if dist.get_world_size() > 1 else None


def close_group() -> None:
    """Before the default group is left, which closes this one too."""
    global _group
    _group = None


def on_rank_0(action: Callable[[], Result]) -> Result:
    """Its result, or its UserError, on every rank. Collective."""
    outcome: list[Result | UserError | None] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [action()]
        except UserError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0, group=_group)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]  # type: ignore[return-value]


def wait_for_all() -> None:
    """Collective."""
    dist.barrier(group=_group)


def see_the_same(folder: Path) -> None:
    """Raises UserError on every rank, which names the hosts, if a rank does not see what rank 0 writes into the folder:
    a disk of its own where a shared one is needed. Collective."""
    world_size = dist.get_world_size()
    if world_size == 1:
        return
    name = on_rank_0(lambda: _mark(folder))
    hosts: list[str | None] = [None] * world_size
    dist.all_gather_object(hosts, None if (folder / name).is_file() else socket.gethostname(), group=_group)
    if dist.get_rank() == 0:
        (folder / name).unlink(missing_ok=True)
    blind = sorted({host for host in hosts if host})
    if blind:
        raise UserError(
            f"{folder}: is not the same folder on every node: {', '.join(blind)} cannot see what rank 0 writes there; "
            "set logging.output_dir to a disk that the nodes share"
        )


def _mark(folder: Path) -> str:
    name = f".seen_by_all_{secrets.token_hex(8)}"
    try:
        (folder / name).touch()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to: {error.strerror}") from None
    return name
