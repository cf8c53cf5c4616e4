"""Routing against plain Python, ties included."""

from __future__ import annotations

import math

import pytest
import torch
from ava_kernels import load_balancing_loss, route, router_z_loss
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("small_and_seeded")


@st.composite
def problems(draw):
    """Logits of few distinct values, so that most rows hold ties."""
    tokens, experts = draw(st.integers(0, 6)), draw(st.integers(1, 6))
    top_k = draw(st.integers(1, experts))
    row = st.lists(st.integers(-3, 3), min_size=experts, max_size=experts)
    rows = draw(st.lists(row, min_size=tokens, max_size=tokens))
    return [[value / 2 for value in row] for row in rows], experts, top_k


def scores_of(row, score):
    if score == "sigmoid":
        return [1 / (1 + math.exp(-logit)) for logit in row]
    return [math.exp(logit) / sum(map(math.exp, row)) for logit in row]


@settings(max_examples=150, deadline=None)
@given(problems(), st.sampled_from(["softmax", "sigmoid"]), st.booleans(), st.sampled_from([1.0, 2.5]))
def test_route_is_the_plain_algorithm(problem, score, normalize, scale):
    rows, experts, top_k = problem
    routing = route(torch.tensor(rows).reshape(-1, experts), top_k, score=score, normalize=normalize, scale=scale)
    chosen = [sorted(range(experts), key=lambda e, row=row: (-row[e], e))[:top_k] for row in rows]
    assert routing.expert.tolist() == chosen
    scores = [scores_of(row, score) for row in rows]
    torch.testing.assert_close(routing.probs, torch.tensor(scores).reshape(-1, experts))
    weights = [[scores[t][e] for e in choice] for t, choice in enumerate(chosen)]
    weights = [[scale * w / (sum(row) if normalize else 1) for w in row] for row in weights]
    torch.testing.assert_close(routing.weight, torch.tensor(weights).reshape(-1, top_k))

    entries = sorted((e, t, k) for t, choice in enumerate(chosen) for k, e in enumerate(choice))
    assert routing.token.tolist() == [t for _, t, _ in entries]
    assert routing.slot.tolist() == [k for _, _, k in entries]
    counts = [sum(e == expert for e, _, _ in entries) for expert in range(experts)]
    assert routing.requested.tolist() == counts
    assert routing.offsets.tolist() == [sum(counts[:e]) for e in range(experts + 1)]
    dtypes = [t.dtype for t in (routing.expert, routing.requested, routing.offsets, routing.token, routing.slot)]
    assert dtypes == [torch.int32] * 5


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from(["softmax", "sigmoid"]))
def test_losses_are_the_formulas(problem, score):
    rows, experts, top_k = problem
    logits = torch.tensor(rows, dtype=torch.float64).reshape(-1, experts)
    routing = route(logits, top_k, score=score)
    balance, z = load_balancing_loss(routing), router_z_loss(logits)
    assert balance.shape == z.shape == ()
    if not rows:
        assert balance == z == 0
        return
    share = [count / (len(rows) * top_k) for count in routing.requested.tolist()]
    mean = [sum(scores_of(row, score)[e] for row in rows) / len(rows) for e in range(experts)]
    assert balance.item() == pytest.approx(experts * sum(f * p for f, p in zip(share, mean, strict=True)))
    assert z.item() == pytest.approx(sum(math.log(sum(map(math.exp, row))) ** 2 for row in rows) / len(rows))


def test_balanced_routing_costs_one():
    logits = torch.eye(4).repeat(3, 1) * 1e-4
    assert load_balancing_loss(route(logits, 1)).item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
def test_gradients(score, normalize):
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

    def differentiable(x):
        routing = route(x, 2, score=score, normalize=normalize, scale=1.5)
        return routing.weight, routing.probs, load_balancing_loss(routing), router_z_loss(x)

    torch.autograd.gradcheck(differentiable, logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_scored_in_float32(dtype):
    logits = torch.randn(9, 6).to(dtype)
    low, full = route(logits, 2), route(logits.float(), 2)
    assert low.weight.dtype == low.probs.dtype == torch.float32
    assert torch.equal(low.weight, full.weight)
    assert torch.equal(low.expert, full.expert)
    assert router_z_loss(logits) == router_z_loss(logits.float())


def test_ranks_by_logits_where_scores_have_run_out_of_digits():
    logits = torch.tensor([[-300.0, 100.0, -200.0, 300.0]])
    assert route(logits, 4).expert.tolist() == [[3, 1, 2, 0]]
    assert route(logits, 4, score="sigmoid").expert.tolist() == [[3, 1, 2, 0]]


def test_sigmoid_scores_that_are_all_zero_give_no_nan():
    logits = torch.full((2, 3), -200.0, requires_grad=True)
    routing = route(logits, 2, score="sigmoid")
    routing.weight.sum().backward()
    assert not routing.weight.any()
    assert not logits.grad.any()


def test_ties_among_many_experts_go_to_the_lower_ones():
    logits = torch.randint(0, 3, (20, 128), generator=torch.Generator().manual_seed(0)).float()
    chosen = [sorted(range(128), key=lambda e, row=row: (-row[e], e))[:8] for row in logits.tolist()]
    assert route(logits, 8).expert.tolist() == chosen


@pytest.mark.parametrize("top_k", [0, 5, -1])
def test_refuses_a_top_k_that_cannot_be(top_k):
    with pytest.raises(ValueError, match=rf"top_k is {top_k}; it must lie between 1 and the number of experts \(4\)"):
        route(torch.zeros(3, 4), top_k)
