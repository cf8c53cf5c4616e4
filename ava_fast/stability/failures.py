"""Errors that are not numbers: which kind an exception is, and what is tried again.

| kind | what it is | what follows |
|---|---|---|
| network | an error of a connection or a remote disk | reading and saving are tried again, with growing pauses |
| network | a collective that fails | every rank ends |
| memory | no room on the device or the host | the ladder of `room.py`; at its end a clean stop, with advice |
| data | a share of a batch that cannot be read | all ranks skip the batch |
| anything else | an exception in the model | all ranks skip the batch where they can agree, else every rank ends |
"""

from __future__ import annotations

import errno
import time
import traceback
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from ava_fast.config import Config

PAUSES = (0.5, 2.0, 8.0)
"""Seconds before each further try of what failed for a reason of the network."""
_TRANSIENT = {errno.EAGAIN, errno.EIO, errno.EPIPE, errno.ESTALE, errno.ETIMEDOUT}
_TRANSIENT |= {errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.ENOTCONN}
_TRANSIENT |= {errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETRESET, errno.ENETUNREACH}
# What gloo, the host's allocators and cuBLAS, which finds no room for its workspace, say in a plain RuntimeError.
_COLLECTIVE = ("connection closed by peer", "connection reset by peer", "gloo", "nccl", "timed out waiting")
_NO_ROOM = ("out of memory", "can't allocate memory", "cannot allocate memory", "status_alloc_failed")
RETRIED, MADE_ROOM = "network error, tried again", "step taken again in less memory"
"""What the judge's counts call it."""
_NETWORK = "network: "  # begins the line of such an error
Result = TypeVar("Result")


def is_out_of_memory(error: BaseException) -> bool:
    """On the device or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_ROOM)


def is_device_fault(error: BaseException) -> bool:
    """A GPU that is broken for this process, such as by an illegal access or an uncorrected memory error: no batch is
    to blame."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)


def is_network(error: BaseException) -> bool:
    """A connection or a remote disk that may be back in a moment, or a collective that another rank did not join."""
    if isinstance(error, OSError):
        return error.errno in _TRANSIENT or isinstance(error, (ConnectionError, TimeoutError))
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _COLLECTIVE)


def in_a_line(error: BaseException) -> str:
    """`ValueError: too long (model.py:12)`, the place being the innermost."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno})" if frames else ""
    words = " ".join(str(error).split())
    words = words if len(words) <= 300 else words[:297] + "…"
    return f"{type(error).__name__}: {words}{place}"


def attempt(action: Callable[[], object]) -> str | None:
    """Runs it; a failure to write comes back as a line, so that the ranks can agree on it."""
    try:
        action()
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        return (_NETWORK if is_network(error) else "") + " ".join(str(error).split())
    return None


def may_pass(line: str) -> bool:
    """Whether `attempt` gave this line for an error that may be gone at the next try."""
    return line.startswith(_NETWORK)


def retried(action: Callable[[], Result], pause: Callable[[float], None] = time.sleep) -> tuple[Result, int]:
    """Its result, and how often it was tried again after an error of the network. The last such error is raised."""
    for tries, seconds in enumerate(PAUSES):
        try:
            return action(), tries
        except OSError as error:
            if not is_network(error):
                raise
        pause(seconds)
    return action(), len(PAUSES)


def more_room(config: Config) -> str:
    """What to try where the memory does not suffice."""
    training = config.training
    tries = [
        f"half of training.batch_size (now {training.batch_size}) with twice training.gradient_accumulation_steps "
        f"(now {training.gradient_accumulation_steps}), which trains the same"
    ]
    if not config.memory.activation_checkpointing:
        tries.append("memory.activation_checkpointing=true")
    if config.deepspeed.zero_stage < 3:
        tries.append(f"deepspeed.zero_stage={config.deepspeed.zero_stage + 1} on more than one rank")
    return f"Try {', '.join(tries)} or a smaller data.max_length (now {config.data.max_length})"
