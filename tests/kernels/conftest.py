"""Which implementation of an operation a test runs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from ava_kernels import tiles
from ava_kernels.experts import reference
from ava_kernels.experts.tiles import KERNELS

try:
    import quick_interpreter
except ImportError:  # no Triton: its tests are skipped
    quick_interpreter = None
else:
    quick_interpreter.install()


@pytest.fixture(autouse=True)
def own_order(request: pytest.FixtureRequest) -> None:
    """Programs of kernels run in an order that depends on the test alone, not on what ran before it."""
    if quick_interpreter:
        quick_interpreter.ORDER.seed(request.node.nodeid)


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


@pytest.fixture(params=["torch", "torch, one by one", "portable", "hopper"])
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """How the experts' products are made: by PyTorch, of all experts at once or one by one, by Triton with pointers, by
    Triton with tensor descriptors too; in tiles so small that small tensors have many."""
    if request.param.startswith("torch"):
        monkeypatch.setenv("AVA_KERNELS_BACKEND", "torch")
        if request.param != "torch":
            monkeypatch.setattr(reference, "SMALL", -1)
        yield "torch"
        return
    request.getfixturevalue("triton_backend")
    monkeypatch.setattr(tiles, "NEWEST", (8, 0) if request.param == "portable" else (9, 0))
    set_tiles(monkeypatch, tmp_path, [16, 16, 16, 4, 2, 2, 1])
    yield request.param
    forget_tiles()


@pytest.fixture
def small_blocks(triton_backend: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Routing's kernels cut everything into blocks so small that few tokens and experts need many."""
    import triton.language as tl
    from ava_kernels.routing import kernels, rounds

    for name, size in {"TOKENS": 4, "PAIRS": 8, "ROUND_TOKENS": 4, "ELEMENTS": 16, "COLUMNS": 4, "ROWS": 2}.items():
        monkeypatch.setattr(kernels, name, size)
    monkeypatch.setattr(rounds, "SPAN", tl.constexpr(4))


def set_tiles(monkeypatch: pytest.MonkeyPatch, folder: Path, tile: list[int]) -> None:
    entries = {f"{bits} bit{odd}": tile for bits in (16, 32) for odd in ("", ", odd", ", unaligned")}
    table = {generation: dict.fromkeys(KERNELS, entries) for generation in ("sm_80", "sm_90")}
    (folder / "tiles.json").write_text(json.dumps(table))
    monkeypatch.setenv("AVA_KERNELS_CACHE", str(folder))
    forget_tiles()


def forget_tiles() -> None:
    tiles.forget()
    tiles.capability.cache_clear()
