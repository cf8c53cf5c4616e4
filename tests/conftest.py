"""Fixtures for every folder of tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

# Triton reads this when it is first imported: without a GPU its kernels are tested in its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

# A file's tests stay on one of two workers, as their fixtures train models and compile kernels. The longest come first,
# so that the other worker does not wait for them at the end.
LONGEST = ("test_compatibility.py", "test_sm90.py", "test_train.py", "test_room.py", "test_elastic.py", "test_chaos.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """A run that is on its way out ignores signals, and what a test starts after it would inherit that."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def small_and_seeded() -> Iterator[None]:
    """For tiny tensors: a fixed seed, and one thread, as waking the others costs more than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
