"""Tables of every published scaling against transformers' own and against their formulas in float64."""

from __future__ import annotations

import math
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from ava_kernels import rope_table, rotary

pytestmark = pytest.mark.usefixtures("small_and_seeded")

D = 32
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}
YARN = {"factor": 4.0, "original_max_position_embeddings": 256}
LONGROPE = {
    "factor": 8.0,
    "short_factor": [1 + 0.05 * i for i in range(D // 2)],
    "long_factor": [1 + 0.5 * i for i in range(D // 2)],
    "original_max_position_embeddings": 64,
}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic, short": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 512},
    "dynamic, long": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64},
    "yarn": {"rope_type": "yarn", **YARN},
    "yarn, attention factor": {"rope_type": "yarn", **YARN, "attention_factor": 1.3},
    "yarn, ramp": {"rope_type": "yarn", **YARN, "beta_fast": 8, "beta_slow": 2, "truncate": False},
    "yarn, mscale": {"rope_type": "yarn", **YARN, "mscale": 0.7, "mscale_all_dim": 1.2},
    "yarn, one mscale": {"rope_type": "yarn", **YARN, "mscale": 0.7},
    "yarn, turns of the first pair": {"rope_type": "yarn", **YARN, "original_max_position_embeddings": 40},
    "yarn, turns of the last pair": {
        "rope_type": "yarn",
        **YARN,
        "original_max_position_embeddings": 10**9,
        "beta_fast": 1e6,
    },
    "yarn, shorter": {"rope_type": "yarn", **YARN, "factor": 0.5},
    "llama3": {"rope_type": "llama3", **LLAMA3},
    "longrope, long": {"rope_type": "longrope", **LONGROPE},
    "longrope, short": {"rope_type": "longrope", **LONGROPE, "original_max_position_embeddings": 512},
    "longrope, attention factor": {"rope_type": "longrope", **LONGROPE, "attention_factor": 1.2},
    "longrope, shorter": {"rope_type": "longrope", **LONGROPE, "factor": 0.5},
}


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("name", SCALINGS)
def test_tables_are_transformers(name, theta):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling, length = SCALINGS[name], 300
    trained = scaling.get("original_max_position_embeddings", 64)
    config = transformers.LlamaConfig(
        hidden_size=D,
        num_attention_heads=1,
        max_position_embeddings=trained,
        rope_parameters={**scaling, "rope_theta": theta},
    )
    frequencies, size = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"), seq_len=length)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies.double()
    tables = rope_table(length, D, theta, scaling=scaling)
    again = rope_table(length, D, scaling=config.rope_parameters)  # as transformers keeps it, theta within
    for table, same, exact in zip(tables, again, (angles.cos() * size, angles.sin() * size), strict=True):
        assert table.dtype == torch.float32
        assert torch.equal(table, same)
        torch.testing.assert_close(table.double(), exact, rtol=0, atol=length * 2**-22)


def test_every_scaling_has_a_table_of_its_own():
    tables = [rope_table(300, D, scaling=scaling)[0] for scaling in SCALINGS.values()]
    same = [i for i, a in enumerate(tables) if any(torch.allclose(a, b, atol=1e-3) for b in tables[:i])]
    # Without a ratio of scales both mscales are moot.
    assert [list(SCALINGS)[i] for i in same] == ["yarn, one mscale"]


def test_ntk_stretches_the_slowest_pair_by_the_factor_and_leaves_the_fastest():
    cos, _ = rope_table(100, D, scaling={"rope_type": "ntk", "factor": 4.0})
    frequencies = 10000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angles = torch.arange(100, dtype=torch.float64)
    torch.testing.assert_close(cos[:, 0].double(), (angles * frequencies[0]).cos(), rtol=0, atol=1e-5)
    torch.testing.assert_close(cos[:, -1].double(), (angles * frequencies[-1] / 4).cos(), rtol=0, atol=1e-5)
    theta = 10000.0 * 4.0 ** (D / (D - 2))
    torch.testing.assert_close(cos, rope_table(100, D, theta)[0])


@pytest.mark.parametrize("scaling", [None, {}, {"rope_type": "default"}, {"rope_type": "default", "factor": None}])
def test_no_scaling(scaling):
    for table, plain in zip(rope_table(20, 8, scaling=scaling), rope_table(20, 8), strict=True):
        assert torch.equal(table, plain)


def test_the_old_name_of_the_type():
    old = rope_table(20, 8, scaling={"type": "linear", "factor": 2.0})
    new = rope_table(20, 8, scaling={"rope_type": "linear", "factor": 2.0})
    assert torch.equal(old[0], new[0])


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "proportional"}, r"rope_type is 'proportional'; it must be one of default, linear"),
        ({"rope_type": "linear"}, "has no factor"),
        ({"rope_type": "yarn", "factor": 2.0}, "has no original_max_position_embeddings"),
        (
            {"rope_type": "linear", "factor": 2.0, "fator": 1},
            "has 'fator', which it does not know; its keys are: factor",
        ),
        ({"rope_type": "linear", "factor": 0}, "factor is 0; it must be a positive number"),
        ({"rope_type": "linear", "factor": math.nan}, "factor is nan; it must be a positive number"),
        ({"rope_type": "linear", "factor": True}, "factor is True; it must be a positive number"),
        ({"rope_type": "linear", "factor": "2"}, "factor is '2'; it must be a positive number"),
        ({"rope_type": "yarn", **YARN, "truncate": 1}, "truncate is 1; it must be true or false"),
        ({"rope_type": "longrope", **LONGROPE, "long_factor": [1.0]}, "long_factor is .*; it must be 16 positive"),
        ({"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4.0}, "low_freq_factor is 4.0; it must be less than"),
    ],
)
def test_faults_are_named(scaling, message):
    with pytest.raises(ValueError, match=message):
        rope_table(8, D, scaling=scaling)


def test_two_features_cannot_be_stretched_unevenly():
    with pytest.raises(ValueError, match="'ntk', which needs a rotary_dim of at least 4"):
        rope_table(8, 2, scaling={"rope_type": "ntk", "factor": 2.0})


def test_is_found_where_the_rotation_is():
    assert rotary.rope_table is rope_table
