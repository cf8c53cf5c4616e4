"""The mixture-of-experts block against plain formulas, one token at a time: routing, output, losses and figures."""

from __future__ import annotations

import math

import pytest
import torch
from ava_kernels.routing.op import MAX_EXPERTS, MAX_TOP_K

from ava_fast.config import Config, ConfigError, load_config
from ava_fast.model import moe as moe_module
from ava_fast.model.generation import generate
from ava_fast.model.moe import MoeBlock, update_expert_biases
from ava_fast.model.transformer import Transformer

pytestmark = pytest.mark.usefixtures("small_and_seeded")

T, M, E, K = 20, 8, 6, 2


def make_config(model=None, **moe):
    shape = {"vocab_size": 31, "hidden_size": M, "num_layers": 2, "num_heads": 2}
    experts = {"num_experts": E, "top_k": K, "intermediate_size": 5}
    return Config.model_validate({"model": shape | (model or {}), "moe": experts | moe, "data": {"max_length": 16}})


def randomise(module):
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5)
        for expert_bias in module.buffers():
            expert_bias.normal_(0.0, 0.3)
    return module


def make_block(**moe):
    return randomise(MoeBlock(make_config(**moe)))


def by_hand(block, x_TM, capacity):
    """Who asks whom, who is accepted, and what comes out, in loops over tokens → (output, figures by name)."""
    moe = block.config
    logits = (x_TM @ block.router.T).tolist()
    scores = [[1 / (1 + math.exp(-z)) for z in row] for row in logits]
    if moe.score == "softmax":
        scores = [[math.exp(z) / sum(map(math.exp, row)) for z in row] for row in logits]
    bias = [0.0] * E if block.expert_bias is None else block.expert_bias.tolist()
    wanted = []  # of each token, the experts that it may ask, best first
    for row in scores:
        value = [score + extra for score, extra in zip(row, bias, strict=True)]
        allowed = list(range(E))
        if moe.num_groups:
            size = E // moe.num_groups
            worth = [sum(sorted(value[g * size : (g + 1) * size])[-2:]) for g in range(moe.num_groups)]
            best = sorted(range(moe.num_groups), key=lambda g: -worth[g])[: moe.group_top_k]
            allowed = [e for e in allowed if e // size in best]
        wanted.append(sorted(allowed, key=lambda e: -value[e]))

    held = [[None] * K for _ in range(T)]
    asked, load = [K] * T, [0] * E
    pending = [(slot, token, wanted[token][slot]) for slot in range(K) for token in range(T)]
    requested = [sum(expert == e for _, _, expert in pending) for e in range(E)]
    rounds = 0 if moe.overflow == "drop" else E if moe.max_reroutes is None else moe.max_reroutes
    for _ in range(rounds + 1):
        order = sorted(pending)
        if moe.priority == "probability":
            order = sorted(order, key=lambda request: -scores[request[1]][request[2]])
        rejected = []
        for slot, token, expert in order:
            if load[expert] < capacity:
                held[token][slot] = expert
                load[expert] += 1
            else:
                rejected.append((token, slot))
        pending = []
        for token, slot in sorted(rejected):
            if asked[token] < len(wanted[token]):
                pending.append((slot, token, wanted[token][asked[token]]))
                asked[token] += 1

    out, rerouted = torch.zeros_like(x_TM), 0
    for token in range(T):
        kept = [e for e in held[token] if e is not None]
        total = sum(scores[token][e] for e in kept) if moe.normalize else 1.0
        for e in kept:
            gate, up = (block.gate_up[e] @ x_TM[token]).chunk(2)
            weight = moe.scale * scores[token][e] / total
            out[token] += weight * (block.down[e] @ (gate * gate.sigmoid() * up))
        rerouted += sum(e not in (None, wanted[token][slot]) for slot, e in enumerate(held[token]))
    normalised = [[score / sum(row) for score in row] for row in scores]
    entropy = sum(-p * math.log(p) for row in normalised for p in row) / T / math.log(E)
    share = [count / (T * K) for count in requested]
    return out, {
        "balance_loss": E * sum(share[e] * sum(row[e] for row in scores) / T for e in range(E)),
        "z_loss": sum(math.log(sum(map(math.exp, row))) ** 2 for row in logits) / T,
        "entropy": entropy,
        "rerouted": rerouted / (T * K),
        "dropped": sum(e is None for row in held for e in row) / (T * K),
        "requested": requested,
    }


OPTIONS = {
    "dropless": {},
    "next best": {"capacity_factor": 1.0},
    "drop": {"capacity_factor": 0.8, "overflow": "drop"},
    "best scores first": {"capacity_factor": 0.8, "priority": "probability"},
    "one reroute": {"capacity_factor": 0.8, "max_reroutes": 1},
    "weights as scored": {"capacity_factor": 0.8, "normalize": False, "scale": 1.5},
    "sigmoid": {"score": "sigmoid"},
    "bias": {"expert_bias_rate": 0.1},
    "groups": {"num_groups": 3, "group_top_k": 2},
    "as in DeepSeek-V3": {
        "score": "sigmoid",
        "scale": 2.5,
        "num_groups": 3,
        "group_top_k": 2,
        "expert_bias_rate": 0.1,
        "capacity_factor": 1.1,
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_output_losses_and_figures_equal_the_plain_formula(options):
    block, x_TM = make_block(**options), torch.randn(T, M)
    factor = options.get("capacity_factor")
    capacity = T if factor is None else math.ceil(factor * T * K / E)
    out, figures = by_hand(block, x_TM, capacity)
    result, routed = block(x_TM.view(4, 5, M))
    torch.testing.assert_close(result.view(T, M), out)
    for name, value in figures.items():
        got = getattr(routed, name)
        torch.testing.assert_close(got, torch.tensor(value, dtype=got.dtype), msg=name)
    assert (figures["rerouted"] > 0) == (factor is not None and options.get("overflow") != "drop")
    if factor is None or factor < 1.0:  # with room for exactly all, a token may still find no expert left
        assert (figures["dropped"] > 0) == (factor is not None)


def test_capacity_is_the_rounded_up_share_of_the_tokens_and_at_most_all_of_them(monkeypatch):
    seen, route = [], moe_module.route

    def seen_route(*args, **options):
        seen.append(options["capacity"])
        return route(*args, **options)

    monkeypatch.setattr(moe_module, "route", seen_route)
    for factor, tokens in ((1.0, 20), (1.25, 20), (1.25, 1), (1e300, 20), (None, 20)):
        make_block(capacity_factor=factor)(torch.randn(1, tokens, M))
    assert seen == [7, 9, 1, 20, None]  # 20·2/6 = 6.67, ·1.25 = 8.33
    seen.clear()
    block = make_block(capacity_factor=1.0, eval_capacity_factor=2.0).eval()
    block(torch.randn(1, 20, M))
    assert seen == [14]


def heldout(model, tokens, rows):
    """Mean loss over all rows, `rows` at a time."""
    with torch.no_grad():
        losses = [model(part[:, :-1], part[:, 1:]).loss * len(part) for part in tokens.split(rows)]
    return float(torch.stack(losses).sum() / len(tokens))


def test_evaluation_is_dropless_whatever_the_batch_unless_it_has_a_capacity_of_its_own():
    tokens = torch.randint(0, 31, (12, 9))
    torch.manual_seed(1)
    model = randomise(Transformer(make_config(capacity_factor=0.5)))
    packed_in_training = [heldout(model, tokens, rows) for rows in (1, 5, 12)]
    assert max(packed_in_training) - min(packed_in_training) > 1e-3
    model.eval()
    losses = [heldout(model, tokens, rows) for rows in (1, 5, 12)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    limited = Transformer(make_config(eval_capacity_factor=0.5)).eval()
    limited.load_state_dict(model.state_dict())
    assert abs(heldout(limited, tokens, 12) - losses[0]) > 1e-3

    plain = Transformer(make_config())
    plain.load_state_dict(model.state_dict())
    assert generate(model, [3, 1], 12) == generate(plain, [3, 1], 12)


def test_the_bias_is_saved_state_that_no_gradient_and_no_evaluation_moves():
    model = Transformer(make_config({"num_dense_layers": 1}, expert_bias_rate=0.1))
    assert "blocks.1.mlp.expert_bias" in model.state_dict()
    assert not any("bias" in name for name, _ in model.named_parameters())
    bias = model.blocks[1].mlp.expert_bias
    assert torch.equal(bias, torch.zeros(E))
    tokens = torch.randint(0, 31, (2, 9))
    model(tokens, tokens).objective.backward()
    heldout(model.eval(), tokens, 2)
    assert torch.equal(bias, torch.zeros(E))
    assert not any("expert_bias" in name for name in Transformer(make_config()).state_dict())


def test_the_bias_rises_where_requests_were_few_and_evens_them_out():
    model = randomise(Transformer(make_config(expert_bias_rate=0.01)))
    for bias in model.buffers():
        bias.zero_()
    requested_LE = torch.tensor([[10, 10, 4, 10, 10, 16], [0, 0, 0, 0, 0, 60]], dtype=torch.float64)
    update_expert_biases(model, requested_LE)
    first, second = (block.mlp.expert_bias for block in model.blocks)
    torch.testing.assert_close(first, torch.tensor([0, 0, 0.01, 0, 0, -0.01]))
    torch.testing.assert_close(second, torch.tensor([0.01] * 5 + [-0.01]))
    with pytest.raises(ValueError, match="shorter"):
        update_expert_biases(model, requested_LE[:1])

    tokens = torch.randint(0, 31, (16, 9))
    before = model(tokens, tokens).requested
    for _ in range(60):
        update_expert_biases(model, model(tokens, tokens).requested)
    after = model(tokens, tokens).requested
    mean = 16 * 9 * K / E
    assert (before.amax(1) > 1.3 * mean).all()
    assert (after.amax(1) < 1.1 * mean).all()
    update_expert_biases(Transformer(make_config()), requested_LE)  # without biases: nothing to do


def test_the_settings_refuse_what_the_router_cannot_do():
    for key, limit in (("num_experts", MAX_EXPERTS), ("top_k", MAX_TOP_K)):
        load_config(None, ["moe.num_experts=1024", f"moe.{key}={limit}"])
        with pytest.raises(ConfigError, match=f"moe.{key}: is not allowed"):
            load_config(None, ["moe.num_experts=1024", f"moe.{key}={limit + 1}"])
