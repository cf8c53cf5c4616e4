"""Continuations against recomputing the whole sequence for every token."""

from __future__ import annotations

import pytest
import torch

from ava_fast.config import Config
from ava_fast.model.generation import generate
from ava_fast.model.transformer import Transformer

pytestmark = pytest.mark.usefixtures("small_and_seeded")

PROMPT = [3, 14, 15, 9]


def make(model=None, moe=None):
    shape = {"vocab_size": 41, "hidden_size": 24, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    experts = {"num_experts": 4, "intermediate_size": 10, "jitter": 0.5}
    config = Config.model_validate(
        {
            "model": shape | (model or {}),
            "moe": experts | (moe or {}),
            "data": {"max_length": 8},  # shorter than what is generated
        }
    )
    torch.manual_seed(4)
    built = Transformer(config)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    return built


@pytest.fixture
def model():
    return make()


@torch.no_grad()
def recomputed(model, prompt, count):
    model.eval()
    tokens = list(prompt)
    for _ in range(count):
        logits, _ = model.logits(torch.tensor([tokens]))
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_greedy_is_the_most_likely_token_each_time(model):
    seen = set()
    for prompt in ([3], [14, 15, 9], [2, 6, 5, 35, 8, 9, 7, 9, 32, 38]):
        expected = recomputed(model, prompt, 9)
        assert generate(model, prompt, 9) == expected
        seen.update(expected)
    assert len(seen) >= 4


def test_stops_before_the_stop_token(model):
    whole = generate(model, [14, 15, 9], 20)
    stop = max(set(whole), key=whole.index)  # the one that comes last for the first time
    assert whole.index(stop) > 0
    assert generate(model, [14, 15, 9], 20, stop_token=stop) == whole[: whole.index(stop)]


def test_greedy_ignores_router_noise_and_the_mode_is_restored(model):
    for training in (True, False):
        model.train(training)
        assert generate(model, PROMPT, 12) == generate(model, PROMPT, 12)
        assert model.training == training


def test_sampling_follows_the_softmax_at_a_temperature():
    model = make({"norm": "layernorm", "num_layers": 1}, {"num_experts": 0})
    with torch.no_grad():  # the same logits whatever came before: one long continuation is many draws
        model.norm.weight.zero_()
        model.norm.bias.normal_()
    logits = model.head.weight @ model.norm.bias
    expected = (logits / 0.5).softmax(-1)
    draws = generate(model, PROMPT, 600, temperature=0.5, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(torch.tensor(draws), minlength=41) / 600
    tolerance = 4 * (expected * (1 - expected) / 600).sqrt() + 2 / 600
    assert ((share - expected).abs() < tolerance).all()
    assert ((share - logits.softmax(-1)).abs() > tolerance).any()


def test_sampling_repeats_with_its_generator(model):
    first, second = (
        generate(model, PROMPT, 15, temperature=1.0, generator=torch.Generator().manual_seed(7)) for _ in range(2)
    )
    assert first == second
    assert first != generate(model, PROMPT, 15, temperature=1.0, generator=torch.Generator().manual_seed(8))


def test_no_tokens_asked_for_and_none_given(model):
    assert generate(model, PROMPT, 0) == []
    with pytest.raises(ValueError, match="the prompt has no tokens; give at least one"):
        generate(model, [], 3)
