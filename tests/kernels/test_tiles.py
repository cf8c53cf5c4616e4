"""Which tile a product is cut into: what the table says, and what somebody's own file says before it."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from ava_kernels import tiles
from ava_kernels.attention import tiles as attention
from ava_kernels.experts.tiles import KERNELS, Tile, tile_for


@pytest.fixture(autouse=True)
def read_anew(monkeypatch, tmp_path):
    monkeypatch.setenv("AVA_KERNELS_CACHE", str(tmp_path))
    tiles.forget()
    tiles.capability.cache_clear()
    yield
    tiles.forget()
    tiles.capability.cache_clear()


def tile(kernel="up", dtype=torch.bfloat16, E=64, M=2048, I=1024):
    return tile_for(kernel, torch.empty(0, dtype=dtype), E, M, I)


def own(folder, table):
    (folder / "tiles.json").write_text(table if isinstance(table, str) else json.dumps(table))
    tiles.forget()


def test_the_shipped_table_has_a_tile_for_every_kernel_dtype_and_generation(monkeypatch):
    for generation in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(tiles, "NEWEST", generation)
        tiles.capability.cache_clear()
        for kernel in KERNELS:
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                for M, I in ((2048, 1024), (1000, 504), (1001, 3)):
                    found = tile(kernel, dtype, M=M, I=I)
                    assert all(size & (size - 1) == 0 and size >= 16 for size in found[:3])
        for kernel, dtype, D in itertools.product(attention.KERNELS, (torch.float32, torch.float16), (1, 40, 128, 256)):
            found = attention.tile_for(kernel, torch.empty(0, D, dtype=dtype), -1, 0)
            assert all(size & (size - 1) == 0 and size >= 16 for size in found[:2])
    monkeypatch.setattr(tiles, "NEWEST", (9, 0))
    tiles.capability.cache_clear()
    for kernel, D, softcap in itertools.product(attention.HOPPER, (8, 40, 64, 128), (0.0, 5.0)):
        found = attention.ring_for(kernel, torch.empty(0, D, dtype=torch.float16), softcap)
        assert found.rows & (found.rows - 1) == 0
        assert found.stages > 1


def test_a_newer_generation_goes_before_an_older_one(monkeypatch):
    newer = tile()
    monkeypatch.setattr(tiles, "NEWEST", (8, 0))
    tiles.capability.cache_clear()
    assert tile() != newer


def test_ones_own_file_goes_first_and_a_pinned_problem_before_all_others(tmp_path):
    shipped = tile()
    pinned, general, odd = ([16 * n, 16, 16, 4, 2, 8, 1] for n in (1, 2, 4))
    own(
        tmp_path,
        {"sm_90": {"up": {"64×2048×1024 bfloat16": pinned, "16 bit": general, "16 bit, odd": odd}}, "sm_100": {}},
    )
    assert tile() == Tile(*pinned)
    assert tile(E=32) == Tile(*general)
    assert tile(I=1000) == Tile(*odd)
    assert tile("grouped_mm") != Tile(*general)  # the table's
    own(tmp_path, {"sm_80": {"up": {"16 bit": general}}})  # in a folder that machines with other GPUs share
    assert tile() == shipped
    own(tmp_path, {})
    assert tile() == shipped


def test_attention_has_tiles_by_head_and_mask(tmp_path):
    def tile(kernel, D, window, dtype=torch.bfloat16):
        return attention.tile_for(kernel, torch.empty(0, D, dtype=dtype), *window)

    causal, full, windowed = (-1, 0), (-1, -1), (64, 0)
    shipped = tile("dkdv", 128, causal)
    every, masked, wide = [16, 16, 4, 1], [32, 16, 4, 1], [16, 32, 4, 1]
    own(
        tmp_path,
        {"sm_90": {"dkdv": {"16 bit, 128": every, "16 bit, 128, causal": masked, "16 bit, 256, window": wide}}},
    )
    assert tile("dkdv", 100, causal) == attention.Tile(*masked)
    assert tile("dkdv", 100, full) == tile("dkdv", 65, windowed, torch.float16) == attention.Tile(*every)
    assert tile("dkdv", 200, windowed) == attention.Tile(*wide)
    assert tile("dkdv", 128, causal, torch.float32) not in (attention.Tile(*every), attention.Tile(*masked))
    assert tile("dq", 128, causal) != attention.Tile(*masked)  # the table's
    own(tmp_path, {})
    assert tile("dkdv", 128, causal) == shipped


def test_rings_of_hopper_by_head_and_softcap(tmp_path):
    every, capped = [128, 2], [64, 3]
    own(tmp_path, {"sm_90": {"hopper_dkdv": {"16 bit, 128": every, "16 bit, 128, softcap": capped}}})
    q = torch.empty(0, 100, dtype=torch.bfloat16)
    assert attention.ring_for("hopper_dkdv", q, 0.0) == attention.Ring(*every)
    assert attention.ring_for("hopper_dkdv", q, 5.0) == attention.Ring(*capped)
    assert attention.ring_for("hopper_dq", q, 0.0) != attention.Ring(*every)  # the table's


@pytest.mark.parametrize("text", ["{", "[]", '{"sm_90": {"up": {"16 bit": [1, 2]}}}', '{"sm_90": {"up": 3}}'])
def test_a_file_that_is_no_table_is_named(tmp_path, text):
    own(tmp_path, text)
    with pytest.raises(ValueError, match=r"tiles.json: is no table of tiles .* delete it"):
        tile()
