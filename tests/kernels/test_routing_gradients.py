"""Routing's losses and gradients against float64 formulas, in plain PyTorch and in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from ava_kernels import load_balancing_loss, route, router_z_loss
from hypothesis import given
from routing_oracle import asks
from routing_problems import FLOATS, LAYOUTS, backends, examples, problems, shares

pytestmark = [
    pytest.mark.usefixtures("small_and_seeded"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),  # of NaN and Inf
]


# --- Losses ---


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_losses_are_the_formulas(score):
    @examples(60)
    @given(problems())
    def holds(problem):
        logits = torch.where(problem.logits.isfinite(), problem.logits, 1.0).double()
        T, E = logits.shape
        routing = route(logits, problem.top_k, score=score, capacity=2)
        balance, z, z_of_routing = load_balancing_loss(routing), router_z_loss(logits), router_z_loss(routing)
        assert balance.shape == z.shape == z_of_routing.shape == ()
        rows = [[math.exp(x) for x in row] for row in logits.tolist()]
        if score == "softmax":
            probs = [[x / sum(row) for x in row] for row in rows]
        else:
            probs = [[x / (1 + x) for x in row] for row in rows]
        share = [count / max(T * problem.top_k, 1) for count in routing.requested.tolist()]
        mean = [sum(row[e] for row in probs) / max(T, 1) for e in range(E)]
        expected_z = sum(math.log(sum(row)) ** 2 for row in rows) / max(T, 1)
        assert balance.item() == pytest.approx(E * sum(f * p for f, p in zip(share, mean, strict=True)))
        assert z.item() == pytest.approx(expected_z)
        assert z_of_routing.item() == pytest.approx(expected_z)

    holds()


def test_balanced_routing_costs_one_or_a_tokens_sigmoids(backend):
    logits = torch.eye(4).repeat(3, 1) * 1e-4
    assert load_balancing_loss(route(logits, 1)).item() == pytest.approx(1.0, abs=1e-6)
    assert load_balancing_loss(route(logits, 1, score="sigmoid")).item() == pytest.approx(4 / 2, abs=1e-4)


def test_tokens_that_request_nothing_cost_nothing(backend):
    logits = torch.tensor([[1.0, 2.0], [math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]])
    routing = route(logits, 1)
    assert routing.expert.tolist() == [[1], [-1], [-1], [-1]]
    assert routing.dropped == 3
    alone = route(logits[:1], 1)
    assert router_z_loss(routing).item() == pytest.approx(router_z_loss(alone).item() / 4)
    assert not routing.probs[1:].any()
    assert router_z_loss(logits).isnan()  # the raw logits hide nothing


# --- Gradients ---

HOSTILE_ROWS = [
    [math.nan, 1.0, 0.0, 2.0, 0.5, 0.0],
    [math.inf, 1.0, 0.0, 2.0, 0.5, 0.0],
    [-math.inf] * 6,
    [-math.inf, 1.0, 0.25, -math.inf, -1.0, 2.0],
]
GRADIENT_OPTIONS = {
    "unlimited": {},
    "rerouted": {"capacity": 6},
    "dropped": {"capacity": 3, "overflow": "drop"},
    "bias_and_groups": {"capacity": 5, "expert_bias": torch.linspace(-0.3, 0.3, 6), "num_groups": 3, "group_top_k": 2},
    "nothing_kept": {"capacity": 0},
}


def formula(logits, routing, score, normalize, scale):
    """What `routing` should hold for these logits, differentiably, its experts and counts as they are."""
    alive_T1 = torch.tensor([asks(row) for row in logits.tolist()]).reshape(-1, 1)
    sane = torch.where(alive_T1, logits, 0.0)
    probs = torch.where(alive_T1, sane.softmax(-1) if score == "softmax" else sane.sigmoid(), 0.0)
    held = routing.expert.clamp(min=0).long()
    if normalize:
        weight = shares(sane.gather(1, held), routing.expert, score)
    else:
        weight = torch.where(routing.expert >= 0, probs.gather(1, held), 0.0)
    lse = torch.where(alive_T1[:, 0], sane.logsumexp(-1), 0.0)
    return dataclasses.replace(routing, weight=weight * scale, probs=probs, lse=lse, mean_prob=probs.mean(0))


def losses_of(routing):
    """A scalar for each differentiable output, each element weighted by its own number, and one for all together."""
    generator = torch.Generator().manual_seed(1)
    each = {}
    for name in FLOATS:
        output = getattr(routing, name)
        each[name] = (output * torch.randn(output.shape, generator=generator).to(output.dtype)).sum()
    each["load_balancing_loss"] = load_balancing_loss(routing)
    each["router_z_loss"] = router_z_loss(routing)
    each["all"] = sum(each.values())
    return each


def gradients(logits, make_routing, monkeypatch, backend):
    """Each loss's gradient, in float64. Only the backward pass is the backend's: the interpreter is slow."""
    monkeypatch.setenv("AVA_KERNELS_BACKEND", "torch")
    logits = logits.clone().requires_grad_()
    each = losses_of(make_routing(logits))
    monkeypatch.setenv("AVA_KERNELS_BACKEND", backend)
    return {name: torch.autograd.grad(loss, logits, retain_graph=True)[0].double() for name, loss in each.items()}


@backends(torch=GRADIENT_OPTIONS, triton=["dropped", "nothing_kept"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_gradients_are_the_formulas(monkeypatch, request, backend, case, score, normalize):
    if backend == "triton" and case == "dropped":
        request.getfixturevalue("small_blocks")
    logits = torch.cat([torch.randn(12, 6), torch.tensor(HOSTILE_ROWS)])
    weighing = {"score": score, "normalize": normalize, "scale": 1.5}

    def ours(x):
        return route(x, 3, **weighing, **GRADIENT_OPTIONS[case])

    def exactly(x):
        return formula(x, ours(x.detach()), **weighing)

    exact = gradients(logits.double(), exactly, monkeypatch, backend)
    double = gradients(logits.double(), ours, monkeypatch, backend)
    reference = gradients(logits, ours, monkeypatch, "torch")
    single = gradients(logits, ours, monkeypatch, backend)
    for name in exact:
        torch.testing.assert_close(double[name], exact[name], rtol=1e-11, atol=1e-13, msg=name)
        assert not single[name][12:15].any()
        # Kernels may be off as far as PyTorch itself is in float32, times a little for another order of adding.
        largest = exact[name].abs().max()
        allowed = 4 * (reference[name] - exact[name]).abs().max() + 4 * torch.finfo(torch.float32).eps * largest
        assert allowed <= 1e-5 * largest + 1e-30, name
        assert (single[name] - exact[name]).abs().max() <= allowed, name


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_strides_do_not_matter_to_the_gradient(backend, score):
    T, E, K = 7, 5, 2
    logits = torch.randn(T, E)
    strided = [torch.randn(T, 1).expand(T, K), torch.randn(E, T).T, torch.randn(1).expand(T), torch.randn(1).expand(E)]
    results = []
    for layout, upstream in ((LAYOUTS["rows"], [grad.contiguous() for grad in strided]), (LAYOUTS["columns"], strided)):
        x = layout(logits).requires_grad_()
        routing = route(x, K, score=score)
        results.append(torch.autograd.grad([getattr(routing, name) for name in FLOATS], x, upstream)[0])
    assert x.stride() == (1, T)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", GRADIENT_OPTIONS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_gradcheck(score, normalize, options):
    logits = torch.cat([torch.randn(3, 6), torch.tensor(HOSTILE_ROWS[:1])]).double().requires_grad_()

    def differentiable(x):
        routing = route(x, 2, score=score, normalize=normalize, scale=1.5, **GRADIENT_OPTIONS[options])
        return [*(getattr(routing, name) for name in FLOATS), load_balancing_loss(routing), router_z_loss(routing)]

    torch.autograd.gradcheck(differentiable, logits)


@pytest.mark.parametrize("scale", [2.5, 0.0])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_normalised_weights_of_scores_that_have_run_out_of_digits(backend, score, scale):
    """Alone they are 0 or have few digits left, and so have their gradients; beside each other they are numbers."""
    inf = math.inf
    rows = [
        [200.0, 199, 0, -1, -2, -3, -9],
        [201.0, 200, 0, -1, -2, -3, -9],
        [202.0, 201, 0, -1, -2, -3, -9],  # rejected twice, as the last two are
        [-130.0, -130, -inf, -130, -119, -118, -130],
        [-1001.0, -1002, -1003, -inf, -1000, -999, -1002],
        [5.0, -inf, -inf, -inf, -inf, -inf, -inf],
        [9.0, 8, -40, -41, -42, -43, -150],
    ]
    experts = [[0, 1], [0, 1], [2, 3], [5, 4], [5, 4], [2, 3], [6, -1]]
    logits = torch.tensor(rows).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    routing = route(logits, 2, score=score, capacity=2, scale=scale)
    assert routing.expert.tolist() == experts
    weight = scale * shares(exact.gather(1, routing.expert.clamp(min=0).long()), routing.expert, score)
    upstream = torch.randn(weight.shape)
    (routing.weight * upstream).sum().backward()
    (weight * upstream).sum().backward()
    torch.testing.assert_close(routing.weight.detach().double(), weight.detach(), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_nothing_comes_back_through_a_dropped_request(backend):
    logits = torch.tensor([[2.0, 1.0], [2.0, 1.0]]).requires_grad_()
    routing = route(logits, 2, capacity=1)
    assert routing.expert.tolist() == [[0, 1], [-1, -1]]
    (dlogits,) = torch.autograd.grad(routing.weight, logits, torch.tensor([[1.0, 0.0], [math.nan, math.inf]]))
    assert dlogits[0].abs().min() > 0.1
    assert not dlogits[1].any()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_extreme_logits_give_finite_gradients(backend, score):
    """Scores that underflow, are the smallest there are, or are all of it."""
    logits = torch.tensor([[-87.0, -88, -200, 3], [-100, -101, -103, -104], [300, -300, 0, 1e38], [-3e38, 0, 90, 3e38]])
    logits.requires_grad_()
    routing = route(logits, 2, score=score, capacity=2)
    assert all(getattr(routing, name).isfinite().all() for name in FLOATS)
    for name, loss in losses_of(routing).items():
        if name not in ("router_z_loss", "all"):  # a squared 3e38 is infinite
            assert torch.autograd.grad(loss, logits, retain_graph=True)[0].isfinite().all(), name
