"""Routings that tests draw: tied, skewed, with holes and with values that are no numbers."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

DECISIONS = ("expert", "requested", "offsets", "token", "slot", "rerouted", "dropped")
FLOATS = ("weight", "probs", "lse", "mean_prob")


def backends(**by_backend):
    """Parametrises `backend` and `case`: backends(torch=[…], triton=[…])."""
    pairs = [(name, case) for name, cases in by_backend.items() for case in cases]
    return pytest.mark.parametrize(("backend", "case"), pairs, indirect=["backend"])


def examples(count):
    return settings(max_examples=count, deadline=None, derandomize=True)


class Problem(NamedTuple):
    logits: torch.Tensor
    top_k: int
    options: dict


DTYPES = [torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]
TIED = st.sampled_from([-1.0, -0.0, 0.0, 0.5])
FREE = st.integers(-200, 200).map(lambda n: n / 32)
HOLED = st.sampled_from([-math.inf, -math.inf, -math.inf, -0.0, 0.0, 1.0])
POISONED = st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 0.0, 0.5, 1.0])
LAYOUTS = {
    "rows": lambda x: x,
    "columns": lambda x: x.T.contiguous().T,
    "every_other": lambda x: torch.stack([x, -x], dim=-1)[..., 0],
}


@st.composite
def problems(draw):
    """Mostly few distinct values and little capacity, so that ties and rejections are the rule."""
    tokens, experts = draw(st.sampled_from(range(13))), draw(st.sampled_from(range(1, 10)))
    top_k = draw(st.sampled_from(range(1, experts + 1)))
    ordinary = draw(st.sampled_from([TIED, FREE]))
    kinds = draw(st.lists(st.sampled_from([ordinary] * 6 + [HOLED, POISONED]), min_size=tokens, max_size=tokens))
    rows = [draw(st.lists(kind, min_size=experts, max_size=experts)) for kind in kinds]
    logits = torch.tensor(rows, dtype=draw(st.sampled_from(DTYPES))).reshape(tokens, experts)
    options = {
        "capacity": draw(st.sampled_from([None, 0, 1, 1, 2, 2, 3, 4, 6, 2**40])),
        "overflow": draw(st.sampled_from(["next_best"] * 4 + ["drop"])),
        "priority": draw(st.sampled_from(["choice", "probability"])),
        "score": draw(st.sampled_from(["softmax", "sigmoid"])),
        "normalize": draw(st.booleans()),
        "scale": draw(st.sampled_from([1.0, 2.5])),
    }
    if options["overflow"] == "next_best":
        options["max_reroutes"] = draw(st.sampled_from([None, None, 0, 1, 1, 2, 3, 2**40]))
    if draw(st.booleans()):
        bias = st.sampled_from([-0.5, 0.0, -0.0, 0.25, 0.1, math.nan, -math.inf, math.inf])
        bias_dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
        options["expert_bias"] = torch.tensor(draw(st.lists(bias, min_size=experts, max_size=experts))).to(bias_dtype)
    if draw(st.booleans()):
        groups = draw(st.sampled_from([g for g in range(1, experts + 1) if experts % g == 0]))
        size = experts // groups
        options |= {"num_groups": groups, "group_top_k": draw(st.integers(-(-top_k // size), groups))}
    return Problem(LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))](logits), top_k, options)


def shares(logits, expert, score):
    """The weights of these experts, −1 being none, whose scores add up to 1; differentiable, for float64 logits."""
    held = torch.where(expert >= 0, logits, -math.inf).clamp(min=-1e4)  # e^−10000 is 0 beside anything that is not
    log_score = held if score == "softmax" else torch.nn.functional.logsigmoid(held)
    return torch.where((held > -1e4).any(-1, keepdim=True), log_score.softmax(-1), 0.0)
