"""Fixtures for every folder of tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Triton reads this when it is first imported: without a GPU its kernels are tested in its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch


@pytest.fixture
def small_and_seeded() -> Iterator[None]:
    """For tiny tensors: a fixed seed, and one thread, as waking the others costs more than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
