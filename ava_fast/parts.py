"""Names the parts of a training step for the profiler.

    with part("attention"):
        ...

While no profiler runs, a part costs a function call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

PREFIX = "ava: "  # of a part's name in a trace
_NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
_named = False


def part(name: str) -> contextlib.AbstractContextManager[object]:
    """A range of the step under way that a trace shows under this name, and `observe.trace` adds up. What computes its
    gradient is found by autograd's own numbers and needs no range."""
    return torch.profiler.record_function(PREFIX + name) if _named else _NOTHING


@contextlib.contextmanager
def named() -> Iterator[None]:
    """Within it, parts have names."""
    global _named
    _named = True
    try:
        yield
    finally:
        _named = False
