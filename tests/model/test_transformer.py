"""What the decoder promises: causality, equal logits with a cache, exact recomputation, its losses and its options."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from ava_kernels import rope_attention

from ava_fast.config import Config
from ava_fast.model import moe
from ava_fast.model.moe import DenseMlp, MoeBlock
from ava_fast.model.transformer import Transformer

pytestmark = pytest.mark.usefixtures("small_and_seeded")


def make(model=None, moe=None, checkpointing=False, max_length=32, seed=0, training=None):
    """A small model whose every matrix and norm is random, at a scale where mistakes show."""
    shape = {"vocab_size": 37, "hidden_size": 24, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
    experts = {"num_experts": 5, "top_k": 2, "intermediate_size": 10}
    config = Config.model_validate(
        {
            "model": shape | {"intermediate_size": 30} | (model or {}),
            "moe": experts | (moe or {}),
            "memory": {"activation_checkpointing": checkpointing},
            "data": {"max_length": max_length},
            "training": training or {},
        }
    )
    torch.manual_seed(seed)
    built = Transformer(config)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
        for expert_bias in built.buffers():
            expert_bias.normal_(0.0, 0.1)
    return built


def batch(rows=3, length=11, seed=1):
    tokens = torch.randint(0, 37, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


OPTIONS = {
    "plain": ({}, {}),
    "everything": (
        {"qk_norm": True, "attention_bias": True, "num_dense_layers": 1, "tie_embeddings": True},
        {"shared_experts": 2, "shared_expert_gate": True, "normalize": False},
    ),
    "layernorm": ({"norm": "layernorm"}, {"shared_experts": 1}),
    "groups": ({}, {"num_experts": 6, "score": "sigmoid", "num_groups": 3, "group_top_k": 2, "expert_bias_rate": 0.1}),
    "dense": ({}, {"num_experts": 0}),
}


@pytest.mark.parametrize("options", OPTIONS)
@torch.no_grad()
def test_future_tokens_do_not_change_the_past(options):
    model, (tokens, _) = make(*OPTIONS[options]), batch()
    before, _ = model.logits(tokens)
    tokens[:, 6] = (tokens[:, 6] + 1) % 37
    after, _ = model.logits(tokens)
    torch.testing.assert_close(after[:, :6], before[:, :6], rtol=0, atol=1e-5)
    assert ((after - before)[:, 6:].abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("options", OPTIONS)
@torch.no_grad()
def test_cached_logits_equal_full_logits(options):
    model, (tokens, _) = make(*OPTIONS[options], max_length=8), batch()  # positions outgrow max_length
    past, pieces = None, []
    for piece in tokens.split([4, 1, 3, 1, 2], dim=1):
        logits, past = model.logits(piece, past)
        pieces.append(logits)
    full, _ = model.logits(tokens)
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, rtol=0, atol=1e-5)
    assert past[0][0].shape == (3, 11, 2, 6)


@pytest.mark.parametrize("options", OPTIONS)
def test_forward_and_logits_agree_and_padding_is_not_scored(options):
    model, (tokens, labels) = make(*OPTIONS[options]), batch()
    labels[0, 3:] = -100
    labels[2, 0] = -100
    logits, _ = model.logits(tokens)
    kept = labels != -100
    by_hand = -logits.log_softmax(-1)[kept].gather(1, labels[kept][:, None]).mean()
    torch.testing.assert_close(model(tokens, labels).loss, by_hand)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_documents_train_as_each_alone(checkpointing):
    # Without what mixes tokens on purpose: the losses of the router are means over all of them.
    model = make(moe={"aux_loss_weight": 0.0, "z_loss_weight": 0.0}, checkpointing=checkpointing)
    tokens, labels = batch()
    offsets = [0, 4, 11, 22, 23, 31, 33]
    packed = model(tokens, labels, torch.tensor(offsets, dtype=torch.int32)).objective
    gradients = torch.autograd.grad(packed, list(model.parameters()))
    total = 0.0
    for start, end in pairwise(offsets):
        own = (t.flatten()[None, start:end] for t in (tokens, labels))
        total = total + model(*own).objective * (end - start) / 33
    torch.testing.assert_close(packed, total)
    for got, expected in zip(gradients, torch.autograd.grad(total, list(model.parameters())), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert abs(packed - model(tokens, labels).objective) > 1e-3


@pytest.mark.parametrize("name", ["sdpa", "triton", "torch"])
def test_the_attention_that_is_asked_for_computes(name, monkeypatch):
    from ava_fast.model import attention

    asked = []

    def noted(*args, backend, **named):
        asked.append(backend)
        return rope_attention(*args, backend=backend, **named)

    expected, model = make(), make(training={"attention_backend": name})
    tokens_BS, labels_BS = batch()
    monkeypatch.setattr(attention, "rope_attention", noted)
    loss = model(tokens_BS, labels_BS).loss
    _, past = model.logits(tokens_BS[:, :-1])
    model.logits(tokens_BS[:, -1:], past)
    assert asked == [name] * 9  # of three blocks each time
    torch.testing.assert_close(loss, expected(tokens_BS, labels_BS).loss)


def losses_and_gradients(model, seed=5):
    torch.manual_seed(seed)
    output = model(*batch())
    output.objective.backward()
    return [*output, *(parameter.grad for parameter in model.parameters())]


CAPACITY = ({}, {"capacity_factor": 0.8, "priority": "probability", "max_reroutes": 1})  # not causal


@pytest.mark.parametrize("options", [*OPTIONS.values(), CAPACITY], ids=[*OPTIONS, "capacity"])
@pytest.mark.parametrize("jitter", [0.0, 0.2])
def test_activation_checkpointing_changes_no_bit_and_counts_requests_once(options, jitter):
    model, experts = options
    kept, recomputed = (make(model, experts | {"jitter": jitter}, checkpointing) for checkpointing in (False, True))
    assert_same_bits(losses_and_gradients(kept), losses_and_gradients(recomputed))


def assert_same_bits(one, other):
    assert len(one) == len(other)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_activation_checkpointing_keeps_only_block_inputs():
    def bytes_kept(checkpointing):
        model, kept = make(checkpointing=checkpointing), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
            model(*batch())
        return sum(kept)

    assert bytes_kept(True) < bytes_kept(False) / 3


def test_tied_embeddings_are_one_parameter():
    model = make({"tie_embeddings": True})
    assert model.head.weight is model.embed.weight
    assert "head.weight" not in dict(model.named_parameters())
    model(*batch()).objective.backward()
    free = make()
    free.load_state_dict(model.state_dict())
    free(*batch()).objective.backward()
    torch.testing.assert_close(model.embed.weight.grad, free.embed.weight.grad + free.head.weight.grad)


class Seen:
    """What reaches `route` and `moe_mlp` in the MoE block."""

    def __init__(self, monkeypatch):
        self.logits, self.expert_inputs, self.routings = [], [], []
        route, moe_mlp = moe.route, moe.moe_mlp

        def seen_route(logits, *args, **kwargs):
            self.logits.append(logits)
            self.routings.append(route(logits, *args, **kwargs))
            return self.routings[-1]

        def seen_moe_mlp(x, *args):
            self.expert_inputs.append(x)
            return moe_mlp(x, *args)

        monkeypatch.setattr(moe, "route", seen_route)
        monkeypatch.setattr(moe, "moe_mlp", seen_moe_mlp)


def test_jitter_is_uniform_around_one_on_the_routers_input_in_training_alone(monkeypatch):
    seen = Seen(monkeypatch)
    model = make(moe={"num_experts": 24, "jitter": 0.25})  # as many experts as features: an identity router shows x
    block = model.blocks[0].mlp
    with torch.no_grad():
        block.router.copy_(torch.eye(24))
    x = torch.randn(4, 50, 24)
    block(x)
    noise = seen.logits[0] / x.flatten(0, 1)
    assert 0.75 - 1e-6 <= noise.min() < 0.76
    assert 1.24 < noise.max() <= 1.25 + 1e-6
    assert abs(noise.mean() - 1) < 0.01
    assert torch.equal(seen.expert_inputs[0], x.flatten(0, 1))
    block.eval()
    block(x)
    torch.testing.assert_close(seen.logits[1], x.flatten(0, 1), rtol=0, atol=0)


def test_router_works_in_float32_inside_a_bf16_model(monkeypatch):
    seen = Seen(monkeypatch)
    model = make().to(torch.bfloat16)
    output = model(*batch())
    assert [t.dtype for t in output] == [torch.float32] * 5 + [torch.int32]
    assert all(logits.dtype == torch.float32 for logits in seen.logits)
    assert all(routing.weight.dtype == torch.float32 for routing in seen.routings)
    x, router = seen.expert_inputs[0], model.blocks[0].mlp.router
    assert x.dtype == torch.bfloat16
    exact = F.linear(x.double(), router.double())
    assert (seen.logits[0] - exact).abs().max() < 1e-5
    output.objective.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_positions_keep_float32_angles_in_a_bf16_model():
    model = make().to(torch.bfloat16)
    model(*batch())
    assert {table.dtype for table in model._rope} == {torch.float32}


def test_objective_adds_the_weighted_router_losses(monkeypatch):
    seen = Seen(monkeypatch)
    model = make(moe={"aux_loss_weight": 0.3, "z_loss_weight": 0.07})
    output = model(*batch())
    balance, z = [], []
    for logits in seen.logits:
        probabilities = logits.exp() / logits.exp().sum(-1, keepdim=True)
        chosen = torch.zeros_like(logits).scatter_(1, logits.topk(2).indices, 1.0)
        share = chosen.sum(0) / chosen.sum()
        balance.append(5 * (share * probabilities.mean(0)).sum())
        z.append((logits.exp().sum(-1).log() ** 2).mean())
    assert len(balance) == 3
    torch.testing.assert_close(output.balance_loss, sum(balance) / 3)
    torch.testing.assert_close(output.z_loss, sum(z) / 3)
    torch.testing.assert_close(output.objective, output.loss + 0.3 * sum(balance) / 3 + 0.07 * sum(z) / 3)
    assert output.objective.requires_grad
    assert not any(t.requires_grad for t in output[1:])


def test_router_losses_reach_the_router_and_nothing_else_of_the_block():
    model = make()
    block = model.blocks[0].mlp
    _, routed = block(torch.randn(2, 5, 24))
    (routed.balance_loss + routed.z_loss).backward()
    assert block.router.grad.any()
    assert block.gate_up.grad is None
    assert block.down.grad is None


def test_first_layers_can_be_dense(monkeypatch):
    seen = Seen(monkeypatch)
    model = make({"num_dense_layers": 2})
    assert [type(block.mlp) for block in model.blocks] == [DenseMlp, DenseMlp, MoeBlock]
    assert model.blocks[0].mlp.down.weight.shape == (24, 30)
    output = model(*batch())
    assert len(seen.logits) == 1
    torch.testing.assert_close(output.z_loss, seen.logits[0].logsumexp(-1).square().mean())


def test_no_experts_make_a_dense_model():
    model = make(moe={"num_experts": 0})
    assert all(isinstance(block.mlp, DenseMlp) for block in model.blocks)
    output = model(*batch())
    assert output.balance_loss == output.z_loss == 0
    assert output.routing.numel() == output.requested.numel() == 0
    assert output.objective == output.loss
    output.objective.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_dense_mlp_is_swiglu():
    mlp = DenseMlp(6, 4)
    x = torch.randn(3, 6)
    gate, up = mlp.gate_up.weight[:4] @ x.T, mlp.gate_up.weight[4:] @ x.T
    by_hand = (mlp.down.weight @ (gate * gate.sigmoid() * up)).T
    torch.testing.assert_close(mlp(x), by_hand)


@pytest.mark.parametrize("gated", [False, True])
def test_shared_experts_see_every_token(monkeypatch, gated):
    seen = Seen(monkeypatch)
    model = make(moe={"shared_experts": 2, "shared_expert_gate": gated})
    block = model.blocks[0].mlp
    assert block.shared.down.weight.shape == (24, 20)
    x = torch.randn(2, 5, 24)
    out, _ = block(x)
    routed = moe.moe_mlp(x.flatten(0, 1), block.gate_up, block.down, seen.routings[0])
    shared = block.shared(x.flatten(0, 1))
    if gated:
        shared = shared / (1 + (-x.flatten(0, 1) @ block.shared_gate.weight.T).exp())
    torch.testing.assert_close(out, (routed + shared).view_as(x))


@pytest.mark.parametrize(("norm", "invariant"), [("layernorm", True), ("rmsnorm", False)])
@torch.no_grad()
def test_layernorm_removes_the_mean_and_rmsnorm_does_not(norm, invariant):
    model, (tokens, _) = make({"norm": norm}), batch()
    before, _ = model.logits(tokens)
    model.embed.weight += 3.0
    after, _ = model.logits(tokens)
    assert ((after - before).abs().max() < 1e-4) == invariant


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_norm_eps_is_used(norm):
    model = make({"norm": norm, "norm_eps": 0.5, "qk_norm": True})
    norms = [m for m in model.modules() if isinstance(m, torch.nn.RMSNorm | torch.nn.LayerNorm)]
    assert len(norms) == 3 * 4 + 1
    assert {m.eps for m in norms} == {0.5}


def test_initial_weights_have_the_documented_scale():
    config = Config.model_validate({"model": {"hidden_size": 64, "num_layers": 8, "initializer_range": 0.1}})
    torch.manual_seed(0)
    for name, parameter in Transformer(config).named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all()
        else:
            into_residual = "out.weight" in name or "down" in name
            expected = 0.1 / math.sqrt(16) if into_residual else 0.1
            assert parameter.std().item() == pytest.approx(expected, rel=0.1), name


def test_same_seed_same_model():
    config = Config()
    torch.manual_seed(3)
    one = Transformer(config).state_dict()
    torch.manual_seed(3)
    other = Transformer(config).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
