"""A Routing made of a choice equals the one that `route` made of the logits, on both backends."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from ava_kernels import load_balancing_loss, moe_mlp, route, router_z_loss, routing_from, update_expert_bias

pytestmark = [
    pytest.mark.usefixtures("small_and_seeded"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),  # of Inf
]

SHAPES = [(40, 7, 3), (1, 1, 1), (0, 4, 2), (9, 5, 5), (20, 130, 4)]  # T, E, K
NEUTRAL = ("probs", "lse", "mean_prob", "rerouted")


@pytest.mark.parametrize(("T", "E", "K"), SHAPES)
@pytest.mark.parametrize("capacity", [None, 2])
def test_equals_the_routing_that_made_the_choice(backend, T, E, K, capacity):
    routed = route(torch.randn(T, E), K, capacity=capacity, overflow="drop")
    for dtype in (torch.int16, torch.int32, torch.int64):
        made = routing_from(routed.expert.to(dtype), routed.weight, E)
        for field in dataclasses.fields(routed):
            ours, theirs = getattr(made, field.name), getattr(routed, field.name)
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), field.name
            if field.name in NEUTRAL:
                assert not ours.any()
            elif field.name == "requested":
                assert torch.equal(ours, routed.offsets.diff())  # what a full expert rejected is not in the choice
            else:
                assert torch.equal(ours, theirs), field.name


def test_numbers_outside_the_experts_are_dropped(backend):
    expert = torch.tensor([[2, -1], [3, 0], [2**32 + 1, -(2**40)]])
    weight = torch.tensor([[0.5, torch.nan], [7.0, 0.25], [1.0, 1.0]], requires_grad=True)
    made = routing_from(expert, weight, 3)
    assert made.expert.tolist() == [[2, -1], [-1, 0], [-1, -1]]
    assert made.weight.tolist() == [[0.5, 0.0], [0.0, 0.25], [0.0, 0.0]]
    assert made.offsets.tolist() == [0, 1, 1, 2]
    assert list(zip(made.token.tolist(), made.slot.tolist(), strict=True))[:2] == [(1, 1), (0, 0)]
    assert made.dropped == 4
    made.weight.sum().backward()
    assert weight.grad.tolist() == [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("given", "kept"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_weights_have_the_dtype_of_a_routing_and_their_gradient_its_own(given, kept):
    weight = torch.rand(6, 2).to(given).requires_grad_()
    made = routing_from(torch.randint(0, 4, (6, 2)), weight, 4)
    assert made.weight.dtype == made.probs.dtype == made.lse.dtype == made.mean_prob.dtype == kept
    made.weight.square().sum().backward()
    assert weight.grad.dtype == given
    torch.testing.assert_close(weight.grad, 2 * weight.detach())


def test_serves_every_operation_that_takes_a_routing():
    T, E, K, M, I = 12, 5, 2, 8, 4
    routed = route(torch.randn(T, E, dtype=torch.float64), K)
    made = routing_from(routed.expert, routed.weight, E)
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in ((T, M), (E, 2 * I, M), (E, M, I))]
    assert torch.equal(moe_mlp(*tensors, made), moe_mlp(*tensors, routed))
    assert load_balancing_loss(made) == router_z_loss(made) == 0
    assert torch.equal(update_expert_bias(torch.zeros(E), made, 0.1), update_expert_bias(torch.zeros(E), routed, 0.1))


def test_compiles_whole():
    expert, weight = torch.randint(-1, 4, (6, 2)), torch.rand(6, 2)
    compiled = torch.compile(lambda e, w: routing_from(e, w, 4), fullgraph=True, backend="aot_eager")(expert, weight)
    for name, value in vars(routing_from(expert, weight, 4)).items():
        assert torch.equal(getattr(compiled, name), value)


@pytest.mark.parametrize(
    ("named", "expert", "weight", "num_experts"),
    [
        ("expert is torch.float32", torch.rand(3, 2), torch.rand(3, 2), 4),
        ("expert is torch.int64 of shape .6,", torch.zeros(6, dtype=torch.int64), torch.rand(3, 2), 4),
        ("weight is torch.int64", torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2, dtype=torch.int64), 4),
        ("weight has the shape", torch.zeros(3, 2, dtype=torch.int64), torch.rand(3, 1), 4),
        ("weight has .* meta", torch.zeros(3, 2, dtype=torch.int64), torch.rand(3, 2, device="meta"), 4),
        ("expert has 0 columns", torch.zeros(3, 0, dtype=torch.int64), torch.rand(3, 0), 4),
        ("expert has 33 columns", torch.zeros(3, 33, dtype=torch.int64), torch.rand(3, 33), 40),
        ("num_experts is 0", torch.zeros(3, 2, dtype=torch.int64), torch.rand(3, 2), 0),
        ("num_experts is 1025", torch.zeros(3, 2, dtype=torch.int64), torch.rand(3, 2), 1025),
    ],
)
def test_errors_name_the_argument(named, expert, weight, num_experts):
    with pytest.raises(ValueError, match=named):
        routing_from(expert, weight, num_experts)
