"""Which implementation of an operation a test runs."""

from __future__ import annotations

import os

import pytest


@pytest.fixture
def triton_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton kernels, in the interpreter."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton was told not to interpret")
    monkeypatch.setenv("AVA_KERNELS_BACKEND", "triton")


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """PyTorch, then the Triton kernels."""
    if request.param == "triton":
        request.getfixturevalue("triton_backend")
    monkeypatch.setenv("AVA_KERNELS_BACKEND", request.param)
    return request.param
