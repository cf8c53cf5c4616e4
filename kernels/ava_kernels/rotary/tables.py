"""Cosines and sines of every position, with the published ways to stretch them over longer contexts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Of each type, the keys that it needs and those that it may have besides.
KEYS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "ntk": ({"factor"}, set()),
    "dynamic": ({"factor", "original_max_position_embeddings"}, set()),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set()),
    "longrope": (
        {"factor", "short_factor", "long_factor", "original_max_position_embeddings"},
        {"attention_factor"},
    ),
}
# What transformers writes beside them: rotary_dim says the last already.
COMMON = {"type", "rope_type", "rope_theta", "partial_rotary_factor"}
LISTS = {"short_factor", "long_factor"}


def rope_table(
    length: int,
    rotary_dim: int,
    theta: float = 10000.0,
    device: torch.device | None = None,
    *,
    scaling: Mapping[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0 … length-1, each (length, rotary_dim / 2) float32.

    Pair i turns by position · theta^(-2i / rotary_dim). The angles are computed in float32, as the models do that
    weights are exchanged with. `scaling` is transformers' `rope_parameters` (`rope_scaling` before version 5); keys of
    value None count as absent, and its `rope_theta`, if there, replaces theta. With f the factor and n
    `original_max_position_embeddings`, its `rope_type` (or `type`) is one of

    - "linear": every frequency divided by f (Chen et al., 2023, "Extending context window … via positional
      interpolation").
    - "ntk": theta · f^(d/(d-2)), which stretches the slowest pair by f and leaves the fastest (bloc97, 2023,
      "NTK-aware scaled RoPE").
    - "dynamic": the same with f·length/n - (f - 1) for f, and nothing up to length n (emozilla, 2023). n is the length
      of training, `max_position_embeddings` in transformers' configurations.
    - "yarn": pairs that turn more than `beta_fast` (32) times in n positions stay, those below `beta_slow` (1) times
      are divided by f, a ramp between, whose ends are whole pairs if `truncate` (True). Both tables are multiplied by
      `attention_factor`, or m(1), or m(mscale) / m(mscale_all_dim), where m(a) = 0.1·a·ln f + 1 (Peng et al., 2023,
      "YaRN").
    - "llama3": wavelengths over n/low_freq_factor are divided by f, those below n/high_freq_factor stay, a ramp in the
      frequency between (Dubey et al., 2024, "The Llama 3 herd of models").
    - "longrope": pair i's frequency divided by `short_factor[i]`, or from length n + 1 on by `long_factor[i]`; both
      tables multiplied by `attention_factor`, or √(1 + ln f / ln n) (Ding et al., 2024, "LongRoPE").
    - "default": none of it.

    Raises ValueError, naming the key, for one that is missing, unknown or has an impossible value.
    """
    if rotary_dim <= 0 or rotary_dim % 2:
        raise ValueError(f"rotary_dim is {rotary_dim}; it must be even and positive, since the rotation turns pairs")
    if length < 0:
        raise ValueError(f"length is {length}; it must be 0 or more, the number of positions")
    if not 0 < theta < math.inf:
        raise ValueError(f"theta is {theta}; it must be a positive number")
    given = {key: value for key, value in (scaling or {}).items() if value is not None}
    kind = given.get("rope_type", given.get("type", "default"))
    _check(kind, given, rotary_dim)
    theta = given.get("rope_theta", theta)
    factor, trained = given.get("factor", 1.0), given.get("original_max_position_embeddings", 0)
    if kind == "dynamic":
        factor = factor * max(length, trained) / trained - (factor - 1)
    if kind in ("ntk", "dynamic"):
        theta = theta * factor ** (rotary_dim / (rotary_dim - 2))
    exponents = torch.arange(0, rotary_dim, 2, device=device, dtype=torch.float32) / rotary_dim
    frequencies, size = 1.0 / theta**exponents, 1.0
    if kind == "linear":
        frequencies = frequencies / factor
    elif kind == "yarn":
        kept = _yarn_kept(given, rotary_dim, theta).to(frequencies.device)
        frequencies = frequencies / factor * (1 - kept) + frequencies * kept
        size = _yarn_size(given)
    elif kind == "llama3":
        turns = trained * frequencies / (2 * math.pi)  # in the length of training
        low, high = given["low_freq_factor"], given["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies / factor * (1 - kept) + frequencies * kept
    elif kind == "longrope":
        factors = given["long_factor" if length > trained else "short_factor"]
        frequencies = 1.0 / (torch.tensor(factors, device=device, dtype=torch.float32) * theta**exponents)
        size = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
        size = given.get("attention_factor", size)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequencies)
    return angles.cos() * size, angles.sin() * size


def _yarn_kept(given: Mapping[str, Any], rotary_dim: int, theta: float) -> Tensor:
    """(pairs,): how much of its frequency each keeps, 1 for all."""

    def pair_that_turns(times: float) -> float:
        return rotary_dim * math.log(given["original_max_position_embeddings"] / (times * 2 * math.pi)) / (
            2 * math.log(theta)
        )  # fmt: skip

    first, last = pair_that_turns(given.get("beta_fast", 32)), pair_that_turns(given.get("beta_slow", 1))
    if given.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    pairs = torch.arange(rotary_dim // 2, dtype=torch.float32)
    return 1 - ((pairs - first) / (last - first or 0.001)).clamp(0, 1)


def _yarn_size(given: Mapping[str, Any]) -> float:
    def m(a: float) -> float:
        return 0.1 * a * math.log(given["factor"]) + 1.0 if given["factor"] > 1 else 1.0

    if "attention_factor" in given:
        return float(given["attention_factor"])
    both = given.get("mscale") and given.get("mscale_all_dim")
    return m(given["mscale"]) / m(given["mscale_all_dim"]) if both else m(1)


def _check(kind: Any, given: Mapping[str, Any], rotary_dim: int) -> None:
    if kind not in KEYS:
        raise ValueError(f"scaling's rope_type is {kind!r}; it must be one of {', '.join(KEYS)}")
    needed, allowed = KEYS[kind]
    for key in sorted(needed - given.keys()):
        raise ValueError(f"scaling of rope_type {kind!r} has no {key}, which it needs")
    for key in sorted(given.keys() - needed - allowed - COMMON):
        known = ", ".join(sorted(needed | allowed)) or "none"
        raise ValueError(f"scaling of rope_type {kind!r} has {key!r}, which it does not know; its keys are: {known}")
    for key in sorted(given.keys() & (needed | allowed)):
        value = given[key]
        if key in LISTS:
            if len(value) != rotary_dim // 2 or not min(value) > 0:
                raise ValueError(f"scaling's {key} is {value}; it must be {rotary_dim // 2} positive numbers")
        elif key == "truncate":
            if not isinstance(value, bool):
                raise ValueError(f"scaling's truncate is {value!r}; it must be true or false")
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not (value > 0 or key[:6] == "mscale"):
            raise ValueError(f"scaling's {key} is {value!r}; it must be a positive number")
    if kind in ("ntk", "dynamic") and rotary_dim == 2:
        raise ValueError(f"scaling's rope_type is {kind!r}, which needs a rotary_dim of at least 4; it is 2")
    if kind == "llama3" and given["low_freq_factor"] >= given["high_freq_factor"]:
        raise ValueError(
            f"scaling's low_freq_factor is {given['low_freq_factor']}; it must be less than high_freq_factor, "
            f"{given['high_freq_factor']}"
        )
