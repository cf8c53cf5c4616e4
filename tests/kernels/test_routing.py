"""Routing against plain Python one request at a time, its scores and gradients against float64 formulas.

Every backend is held to the same: plain PyTorch, and the Triton kernels in Triton's interpreter.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from ava_kernels import Routing, load_balancing_loss, route, router_z_loss, update_expert_bias
from ava_kernels import backend as backend_module
from hypothesis import given
from hypothesis import strategies as st
from routing_oracle import asks, decide
from routing_problems import DECISIONS, FLOATS, Problem, backends, examples, problems, shares

pytestmark = [
    pytest.mark.usefixtures("small_and_seeded"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),  # of NaN and Inf
]


def fields(routing):
    return {field.name: getattr(routing, field.name) for field in dataclasses.fields(routing)}


# --- Decisions ---


def expected_decision(problem, probs):
    """The oracle's, from the implementation's own probabilities."""
    options = {name: problem.options[name] for name in problem.options if name not in ("score", "normalize", "scale")}
    number = np.float64 if probs.dtype == torch.float64 else np.float32
    if "expert_bias" in options:
        options["expert_bias"] = options["expert_bias"].tolist()
    return decide(
        problem.logits.tolist(), probs.tolist(), problem.logits.shape[1], problem.top_k, number=number, **options
    )


def check_decision(routing, problem):
    expected = expected_decision(problem, routing.probs)
    for name in DECISIONS:
        assert getattr(routing, name).tolist() == getattr(expected, name), name
    assert {getattr(routing, name).dtype for name in DECISIONS[:5]} == {torch.int32}
    assert routing.rerouted.dtype == routing.dropped.dtype == torch.int64
    T, E = problem.logits.shape
    assert routing.expert.shape == (T, problem.top_k)
    assert routing.offsets.shape == (E + 1,)


def check_numbers(routing, problem):
    """Probabilities, lse and normalised weights of the logits, other weights and mean of the probabilities, in
    float64."""
    logits, options = problem.logits, problem.options
    T = len(logits)
    numbers = torch.float64 if logits.dtype == torch.float64 else torch.float32
    assert {getattr(routing, name).dtype for name in FLOATS} == {numbers}
    alive_T1 = torch.tensor([asks(row) for row in logits.tolist()], dtype=torch.bool).reshape(T, 1)
    sane = torch.where(alive_T1, logits.double(), 0.0)
    probs = alive_T1 * (sane.softmax(-1) if options.get("score", "softmax") == "softmax" else sane.sigmoid())
    own, held = routing.probs.double(), routing.expert.clamp(min=0).long()
    if options.get("normalize", True):
        weight = shares(sane.gather(1, held), routing.expert, options.get("score", "softmax"))
    else:
        weight = own.gather(1, held) * (routing.expert >= 0)
    expected = {
        "probs": probs,
        "lse": alive_T1[:, 0] * sane.logsumexp(-1),
        "weight": weight * options.get("scale", 1.0),
        "mean_prob": own.sum(0) / max(T, 1),
    }
    precision = 1e-13 if numbers == torch.float64 else 2e-6
    for name, value in expected.items():
        absolute = precision if name == "lse" else 0.0  # log(1) can cancel
        torch.testing.assert_close(getattr(routing, name).double(), value, rtol=precision, atol=absolute, msg=name)


def test_decisions_and_numbers_are_the_oracles(backend):
    @examples(250 if backend == "torch" else 8)
    @given(problems())
    def holds(problem):
        routing = route(problem.logits, problem.top_k, **problem.options)
        check_decision(routing, problem)
        check_numbers(routing, problem)

    holds()


def large(T, E, K, seed=0, skew=1.5, dtype=torch.float32, **options):
    """Random tokens that prefer some experts, so that capacity binds."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(T, E, generator=generator) + skew * torch.randn(E, generator=generator)
    return Problem(logits.to(dtype), K, options)


CASES = {
    "large": large(200, 64, 8, capacity=25),  # exactly as much room as requests
    "large_probability": large(200, 64, 8, capacity=28, priority="probability"),
    "large_biased_groups": large(
        200, 64, 8, capacity=30, score="sigmoid", num_groups=8, group_top_k=3, scale=2.5,
        expert_bias=torch.linspace(-0.2, 0.2, 64),
    ),
    "large_few_reroutes": large(200, 64, 8, capacity=20, max_reroutes=2),
    "large_drop": large(200, 64, 8, capacity=20, overflow="drop"),
    "ties_among_many": Problem(large(60, 128, 8).logits.round(), 8, {"capacity": 5}),
    "no_power_of_two": large(37, 23, 5, capacity=9, dtype=torch.bfloat16),
    "all_alike": Problem(torch.tensor([0.0, 2.0, 1.0, 3.0, -1.0]).expand(30, 5), 2, {"capacity": 12}),
    "all_alike_and_exactly_full": Problem(torch.tensor([0.0, 2.0, 1.0, 3.0]).expand(8, 4), 3, {"capacity": 6}),
    "all_equal": Problem(torch.zeros(20, 4), 3, {"capacity": 15, "priority": "probability"}),
    "every_expert": large(30, 8, 8, capacity=20),
    "most_experts_and_choices": large(3, 1024, 32, capacity=1),
    "one_of_everything": large(1, 1, 1, capacity=1),
    "no_tokens": large(0, 5, 2, capacity=3),
    "no_room": large(9, 5, 2, capacity=0),
    "many_tokens": large(1100, 3, 1, capacity=400),
    "many_tokens_probability": large(2100, 2, 1, capacity=1090, priority="probability"),
    "two_blocks_unlimited": large(70, 20, 2),
    "wide": large(2, 70, 9, capacity=1),
    "one_reroute": large(9, 5, 2, skew=4.0, capacity=4, max_reroutes=1),
    "two_reroutes": large(9, 5, 2, skew=4.0, capacity=4, max_reroutes=2),
    "groups_without_bias": large(9, 12, 3, capacity=4, num_groups=4, group_top_k=2),
    "groups_of_one": large(9, 5, 2, capacity=4, num_groups=5, group_top_k=3, expert_bias=torch.linspace(0.1, 0, 5)),
    "groups_of_two_equals": Problem(  # worth twice their score, more than a better one with a worse
        torch.tensor([[2.0, 0.5, -9.0, 1.6, 1.6, -9.0]]), 2, {"num_groups": 2, "group_top_k": 1}
    ),
    "groups_shut": Problem(  # a group with an open expert is worth more than one without
        torch.zeros(3, 4), 1, {"num_groups": 2, "group_top_k": 1, "expert_bias": torch.tensor([-math.inf] * 3 + [0.0])}
    ),
}  # fmt: skip


IN_THE_INTERPRETER = [  # which is slow; `small_blocks` is how it comes to many blocks
    "all_alike", "all_alike_and_exactly_full", "all_equal", "every_expert", "one_of_everything", "no_tokens", "no_room",
    "two_blocks_unlimited", "wide", "one_reroute", "two_reroutes",
    "groups_without_bias", "groups_of_one", "groups_of_two_equals", "groups_shut",
]  # fmt: skip


@backends(torch=CASES, triton=IN_THE_INTERPRETER)
def test_larger_cases_are_the_oracles(backend, case):
    problem = CASES[case]
    routing = route(problem.logits, problem.top_k, **problem.options)
    check_decision(routing, problem)
    check_numbers(routing, problem)


def test_overflow_goes_to_the_next_best_by_hand():
    # Everybody wants 0, then 1, 2, 3. Tokens 0 and 1 get it; the others' first slots take 2, their best unasked one.
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0]).expand(4, 4)
    routing = route(logits, 2, capacity=2)
    assert routing.expert.tolist() == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert routing.requested.tolist() == [4, 4, 0, 0]
    assert routing.offsets.tolist() == [0, 2, 4, 6, 8]
    assert routing.token.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    assert routing.slot.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert (routing.rerouted, routing.dropped) == (4, 0)
    dropping = route(logits, 2, capacity=2, overflow="drop")
    assert dropping.expert.tolist() == [[0, 1], [0, 1], [-1, -1], [-1, -1]]
    assert dropping.token.tolist() == [0, 1, 0, 1, 2, 2, 3, 3]
    assert dropping.slot.tolist() == [0, 0, 1, 1, 0, 1, 0, 1]
    assert (dropping.rerouted, dropping.dropped) == (0, 4)


def test_priority_decides_who_stays():
    logits = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0]])
    assert route(logits, 1, capacity=1, overflow="drop").expert.tolist() == [[0], [-1], [-1]]
    by_score = route(logits, 1, capacity=1, overflow="drop", priority="probability")
    assert by_score.expert.tolist() == [[-1], [0], [-1]]


def test_bias_chooses_but_does_not_weigh(backend):
    logits, bias = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([1.0, 0.0, math.nan], requires_grad=True)
    routing = route(logits.requires_grad_(), 2, expert_bias=bias, normalize=False)
    assert routing.expert.tolist() == [[0, 1]]
    assert torch.equal(routing.weight, routing.probs[:, :2])
    routing.weight.sum().backward()
    assert bias.grad is None


def test_ranks_by_logits_where_scores_have_run_out_of_digits(backend):
    logits = torch.tensor([[-300.0, 100.0, -200.0, 300.0]])
    assert route(logits, 4).expert.tolist() == [[3, 1, 2, 0]]
    assert route(logits, 4, score="sigmoid").expert.tolist() == [[3, 1, 2, 0]]


@pytest.mark.parametrize(("dtype", "score"), [(torch.bfloat16, "softmax"), (torch.float16, "sigmoid")])
def test_low_precision_logits_route_as_their_float32_values(backend, dtype, score):
    low = torch.randn(6, 4).to(dtype).requires_grad_()
    full = low.detach().float().requires_grad_()
    options = {"capacity": 4, "score": score, "priority": "probability", "expert_bias": torch.randn(4) / 10}
    of_low, of_full = route(low, 2, **options), route(full, 2, **options)
    for name, value in fields(of_full).items():
        assert torch.equal(getattr(of_low, name), value), name
    assert router_z_loss(low) == router_z_loss(full)
    for routing in (of_low, of_full):
        (routing.weight.square().sum() + routing.probs.square().sum() + router_z_loss(routing)).backward()
    assert torch.equal(low.grad, full.grad.to(dtype))


def test_same_input_same_bits():  # the interpreter runs one program after another: there it says nothing
    problem = large(20, 8, 3, capacity=8)
    results = []
    for _ in range(2):
        logits = problem.logits.clone().requires_grad_()
        routing = route(logits, problem.top_k, **problem.options)
        loss = routing.weight.square().sum() + load_balancing_loss(routing) + router_z_loss(routing)
        results.append([*fields(routing).values(), *torch.autograd.grad(loss, logits)])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


# The scores are so far apart that their last bits decide nothing, or all alike.
SPREAD = torch.linspace(-3, 3, 66)[torch.randperm(66, generator=torch.Generator().manual_seed(0))].reshape(11, 6)
SETTLED = {
    "unlimited": Problem(SPREAD, 3, {}),
    "capacity": Problem(SPREAD, 3, {"capacity": 5, "max_reroutes": 1}),
    "everything": Problem(
        SPREAD,
        3,
        {
            "capacity": 4,
            "priority": "probability",
            "score": "sigmoid",
            "expert_bias": torch.linspace(0.1, -0.2, 6),
            "num_groups": 3,
            "group_top_k": 2,
            "scale": 2.5,
        },
    ),
    "equals": Problem(torch.zeros(11, 3), 2, {"capacity": 7, "priority": "probability", "max_reroutes": 1}),
}


@pytest.mark.parametrize("name", SETTLED)
def test_kernels_and_reference_agree(monkeypatch, small_blocks, name):
    problem = SETTLED[name]
    kernels = route(problem.logits, problem.top_k, **problem.options)
    check_decision(kernels, problem)
    monkeypatch.setenv("AVA_KERNELS_BACKEND", "torch")
    reference = route(problem.logits, problem.top_k, **problem.options)
    for field in DECISIONS:
        assert torch.equal(getattr(kernels, field), getattr(reference, field)), field
    for field in FLOATS:
        torch.testing.assert_close(getattr(kernels, field), getattr(reference, field), rtol=1e-6, atol=1e-7, msg=field)


def test_the_kernels_run_where_asked(monkeypatch, triton_backend):
    """Otherwise every comparison above would compare the reference with itself."""
    from ava_kernels.routing import kernels

    class RanError(Exception):
        pass

    def ran(*_):
        raise RanError

    monkeypatch.setattr(kernels, "forward", ran)
    with pytest.raises(RanError):
        route(torch.zeros(3, 4), 1)


# --- What holds for every routing ---


@st.composite
def crowds(draw):
    tokens, experts = draw(st.integers(1, 64)), draw(st.sampled_from([4, 8, 12, 16]))
    top_k = draw(st.integers(1, min(experts, 6)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    skew = draw(st.sampled_from([0.0, 1.0, 4.0]))
    logits = torch.randn(tokens, experts, generator=generator) + skew * torch.randn(experts, generator=generator)
    if draw(st.booleans()):
        logits = logits.round()
    room = draw(st.sampled_from([0.5, 1.0, 1.25]))
    options = {
        "capacity": math.ceil(room * tokens * top_k / experts),
        "priority": draw(st.sampled_from(["choice", "probability"])),
    }
    if draw(st.booleans()):
        options["expert_bias"] = torch.randn(experts, generator=generator) / 4
    if draw(st.booleans()):
        options |= {"num_groups": 4, "group_top_k": draw(st.integers(-(-top_k // (experts // 4)), 4))}
    return Problem(logits, top_k, options)


def test_invariants():
    @examples(200)
    @given(crowds(), st.none() | st.integers(0, 4))
    def holds(problem, max_reroutes):
        logits, top_k, options = problem
        T, E = logits.shape
        capacity = options["capacity"]
        routing = route(logits, top_k, max_reroutes=max_reroutes, **options)
        expert = routing.expert.tolist()
        held = [[e for e in row if e >= 0] for row in expert]
        load = [sum(row.count(e) for row in held) for e in range(E)]
        assert max(load) <= capacity
        assert all(len(set(row)) == len(row) for row in held)

        offsets, pairs = routing.offsets.tolist(), list(zip(routing.token.tolist(), routing.slot.tolist(), strict=True))
        assert [end - start for start, end in itertools.pairwise(offsets)] == load
        assert sorted(pairs) == [(t, k) for t in range(T) for k in range(top_k)]
        for e in range(E):
            part = pairs[offsets[e] : offsets[e + 1]]
            assert part == sorted(part)
            assert all(expert[t][k] == e for t, k in part)
        assert all(expert[t][k] == -1 for t, k in pairs[offsets[-1] :])
        assert routing.dropped == T * top_k - offsets[-1]
        assert routing.requested.sum() == T * top_k

        if max_reroutes is None:
            # An expert never lets go, so one that has room at the end has rejected nobody: a token whose request was
            # dropped had asked all of its candidates, and those that it does not hold are full.
            candidates = E * options.get("group_top_k", 1) // options.get("num_groups", 1)
            may_ask = route(logits, candidates, **(options | {"capacity": None})).expert.tolist()
            for row, allowed in zip(held, may_ask, strict=True):
                assert set(row) <= set(allowed)
                if len(row) < top_k:
                    assert all(load[e] == capacity for e in set(allowed) - set(row))
            if capacity >= T:
                assert routing.dropped == routing.rerouted == 0
        wished = route(logits, top_k, **(options | {"capacity": None})).expert
        with_room = torch.tensor([load[e] < capacity for e in range(E)])
        assert torch.equal(routing.expert[with_room[wished]], wished[with_room[wished]])
        assert routing.rerouted == ((routing.expert != wished) & (routing.expert >= 0)).sum()

        expected = torch.tensor([1.0 if row else 0.0 for row in held])
        torch.testing.assert_close(routing.weight.sum(-1), expected, rtol=1e-5, atol=1e-6)
        assert not routing.weight[routing.expert < 0].any()

    holds()


# --- As a torch operation ---


ROUTE_ARGUMENTS = [
    # expert_bias, top_k, capacity, max_reroutes, by_probability, sigmoid, normalize, num_groups, group_top_k, scale
    (None, 2, None, 0, False, False, True, 1, 1, 1.0),
    (torch.tensor([0.1, 0.0, -0.1, 0.2]), 3, 4, 4, False, True, False, 1, 1, 2.5),
    (torch.tensor([0.1, 0.0, -0.1, 0.2]), 2, 2, 1, True, True, True, 2, 1, 1.0),
]


@backends(torch=itertools.product([0, 1, 7], range(len(ROUTE_ARGUMENTS))), triton=[(0, 1), (2, 2)])
def test_opcheck_route(backend, case):
    T, which = case
    logits, arguments = torch.randn(T, 4), ROUTE_ARGUMENTS[which]
    torch.library.opcheck(torch.ops.ava_kernels.route.default, (logits, *arguments))
    torch.library.opcheck(torch.ops.ava_kernels.route.default, (logits.requires_grad_(), *arguments))


@backends(torch=[0, 1, 7], triton=[0, 3])
@pytest.mark.parametrize(
    ("sigmoid", "normalize", "given_grads"),
    [
        (True, True, (True, True, True, True)),
        (False, True, (True, False, False, False)),
        (False, False, (True, True, True, False)),
        (False, True, (False, True, True, False)),
    ],
)
def test_opcheck_route_backward(backend, case, sigmoid, normalize, given_grads):
    logits = torch.randn(case, 4)
    routing = route(logits, 2, score="sigmoid" if sigmoid else "softmax", normalize=normalize)
    routing = dataclasses.replace(routing, expert=routing.expert.masked_fill(routing.expert == 0, -1))
    outputs = [getattr(routing, name) for name in FLOATS]
    grads = [torch.randn_like(out) if wanted else None for out, wanted in zip(outputs, given_grads, strict=True)]
    kept = (logits if sigmoid else None, routing.probs, routing.lse, routing.expert)
    arguments = (*kept, routing.weight if normalize else None, *grads, sigmoid, normalize, 1.5)
    torch.library.opcheck(torch.ops.ava_kernels.route_backward.default, arguments)


@backends(torch=["softmax", "sigmoid"], triton=["softmax"])
def test_compiles_whole_and_equal(backend, case):
    def step(logits, bias):
        routing = route(logits, 2, capacity=(len(logits) + 1) // 3, score=case, expert_bias=bias)
        loss = routing.weight.square().sum() + load_balancing_loss(routing) + 0.1 * router_z_loss(routing)
        return loss + 0.1 * router_z_loss(logits), *fields(routing).values()

    compiled_step = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=case == "sigmoid")
    for tokens in (11,) if case == "softmax" else (11, 14):
        results = []
        for function in (step, compiled_step):
            logits = torch.randn(tokens, 6, generator=torch.Generator().manual_seed(3), requires_grad=True)
            outputs = function(logits, torch.linspace(-0.1, 0.1, 6))
            outputs[0].backward()
            results.append((*outputs, logits.grad))
        for eager, compiled in zip(*results, strict=True):
            torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-7)


def test_shapes_follow_from_shapes(backend):
    """Fake tensors, which have no values, go through the operation and the losses."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        routing = route(torch.empty(9, 8, dtype=torch.bfloat16), 3, capacity=2)
        loss = load_balancing_loss(routing) + router_z_loss(routing)
    real = route(torch.zeros(9, 8, dtype=torch.bfloat16), 3, capacity=2)
    for name, value in fields(real).items():
        fake = getattr(routing, name)
        assert (fake.shape, fake.dtype, fake.stride()) == (value.shape, value.dtype, value.stride()), name
    assert loss.shape == ()


# --- Refusals ---


@pytest.mark.parametrize(
    ("logits", "options", "message"),
    [
        (torch.zeros(4), {}, r"logits are torch.float32 of shape \(4,\); they must be floats \(T, E\)"),
        (torch.zeros(3, 4, dtype=torch.int64), {}, r"logits are torch.int64 of shape \(3, 4\); they must be floats"),
        (torch.zeros(3, 0), {}, "logits has 0 columns; the number of experts must lie between 1 and 1024"),
        (torch.zeros(3, 1025), {}, "logits has 1025 columns; the number of experts must lie between 1 and 1024"),
        (torch.zeros(3, 4), {"top_k": 0}, r"top_k is 0; it must lie between 1 and the number of experts \(4\)"),
        (torch.zeros(3, 4), {"top_k": 5}, r"top_k is 5; it must lie between 1 and the number of experts \(4\)"),
        (torch.zeros(3, 4), {"top_k": -1}, r"top_k is -1; it must lie between 1 and the number of experts \(4\)"),
        (torch.zeros(3, 64), {"top_k": 33}, "top_k is 33; it must lie between 1 and 32"),
        (
            torch.empty(2**30, 2, device="meta"),
            {"top_k": 2},
            "1073741824 tokens times top_k 2 are 2³¹ requests or more; route fewer tokens at a time",
        ),
        (torch.zeros(3, 4), {"capacity": -1}, "capacity is -1; it must be 0 or more, or None for no limit"),
        (torch.zeros(3, 4), {"max_reroutes": -2}, "max_reroutes is -2; it must be 0 or more, or None for no limit"),
        (
            torch.zeros(3, 4),
            {"expert_bias": torch.zeros(3)},
            r"expert_bias is torch.float32 of shape \(3,\); it must be floats \(4,\)",
        ),
        (
            torch.zeros(3, 4),
            {"expert_bias": torch.zeros(4, dtype=torch.int32)},
            r"expert_bias is torch.int32 of shape \(4,\); it must be floats \(4,\)",
        ),
        (
            torch.zeros(3, 4),
            {"expert_bias": torch.zeros(4, device="meta")},
            "expert_bias is on meta, logits are on cpu: move one of them",
        ),
        (torch.zeros(3, 4), {"num_groups": 2}, "num_groups and group_top_k go together: give both, or neither"),
        (torch.zeros(3, 4), {"group_top_k": 2}, "num_groups and group_top_k go together: give both, or neither"),
        (
            torch.zeros(3, 4),
            {"num_groups": 3, "group_top_k": 1},
            r"num_groups is 3; it must divide the number of experts \(4\)",
        ),
        (torch.zeros(3, 4), {"num_groups": 0, "group_top_k": 1}, "num_groups is 0; it must divide"),
        (
            torch.zeros(3, 4),
            {"num_groups": 2, "group_top_k": 3},
            r"group_top_k is 3; it must lie between 1 and num_groups \(2\)",
        ),
        (torch.zeros(3, 4), {"num_groups": 2, "group_top_k": 0}, "group_top_k is 0; it must lie between 1"),
        (
            torch.zeros(3, 4),
            {"num_groups": 2, "group_top_k": 1, "top_k": 3},
            "top_k is 3, but 1 of 2 groups hold only 2 experts: raise group_top_k or lower top_k",
        ),
        (torch.zeros(3, 4), {"overflow": "wrap"}, "overflow is 'wrap'; it must be 'next_best' or 'drop'"),
        (torch.zeros(3, 4), {"priority": "age"}, "priority is 'age'; it must be 'choice' or 'probability'"),
        (torch.zeros(3, 4), {"score": "relu"}, "score is 'relu'; it must be 'softmax' or 'sigmoid'"),
        (
            torch.zeros(3, 4),
            {"overflow": "drop", "max_reroutes": 3},
            "max_reroutes is 3, but overflow is 'drop', which reroutes nothing: it must be None or 0, or overflow",
        ),
        (torch.zeros(3, 4), {"top_k": 1.0}, "top_k is 1.0; it must be an integer$"),
        (torch.zeros(3, 4), {"top_k": True}, "top_k is True; it must be an integer"),
        (torch.zeros(3, 4), {"top_k": "1"}, "top_k is '1'; it must be an integer"),
        (
            torch.zeros(3, 4),
            {"capacity": 1.25},
            "capacity is 1.25; it must be an integer or None; round a capacity factor times the even load",
        ),
        (torch.zeros(3, 4), {"max_reroutes": 1.5}, "max_reroutes is 1.5; it must be an integer or None"),
        (
            torch.zeros(3, 4),
            {"num_groups": 2.0, "group_top_k": 1},
            "num_groups is 2.0; it must be an integer or None",
        ),
        (
            torch.zeros(3, 4),
            {"num_groups": 2, "group_top_k": 1.0},
            "group_top_k is 1.0; it must be an integer or None",
        ),
        (torch.zeros(3, 4), {"scale": math.nan}, "scale is nan; it must be finite"),
        (torch.zeros(3, 4), {"scale": -math.inf}, "scale is -inf; it must be finite"),
    ],
)
def test_refuses_naming_the_argument(logits, options, message):
    with pytest.raises(ValueError, match=message):
        route(logits, **({"top_k": 1} | options))


def test_no_reroutes_go_with_dropping_and_numpys_integers_are_integers():
    logits = torch.zeros(3, 4)
    dropping = route(logits, np.int64(1), capacity=np.int32(1), overflow="drop", max_reroutes=0)
    assert torch.equal(dropping.expert, route(logits, 1, capacity=1, max_reroutes=0).expert)


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda: load_balancing_loss(torch.zeros(3, 4)), "routing is a Tensor; it must be a Routing"),
        (lambda: router_z_loss(torch.zeros(4)), r"logits are torch.float32 of shape \(4,\); they must be floats"),
        (lambda: router_z_loss(torch.zeros(2, 3, 4)), r"logits are torch.float32 of shape \(2, 3, 4\); they must be"),
        (lambda: router_z_loss(torch.zeros(3, 4).int()), r"logits are torch.int32 of shape \(3, 4\); they must be"),
        (
            lambda: update_expert_bias(torch.zeros(4, dtype=torch.int64), torch.ones(4), 0.1),
            r"bias is torch.int64 of shape \(4,\); it must be floats \(E,\)",
        ),
    ],
)
def test_losses_and_bias_refuse_naming_the_argument(refused, message):
    with pytest.raises(ValueError, match=message):
        refused()


def test_the_environment_chooses_the_backend(monkeypatch):
    single, double = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    monkeypatch.delenv("AVA_KERNELS_BACKEND", raising=False)
    assert not backend_module.runs_on_triton(single)
    monkeypatch.setenv("AVA_KERNELS_BACKEND", "torch")
    assert not backend_module.runs_on_triton(single)
    monkeypatch.setenv("AVA_KERNELS_BACKEND", "triton")
    monkeypatch.setattr(backend_module, "HAS_TRITON", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend_module.runs_on_triton(single)
    assert not backend_module.runs_on_triton(double)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="a tensor is on cpu: move it to a GPU, or set TRITON_INTERPRET=1"):
        route(torch.zeros(3, 4), 1)
    monkeypatch.setattr(backend_module, "HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        route(torch.zeros(3, 4), 1)
    monkeypatch.setenv("AVA_KERNELS_BACKEND", "cuda")
    with pytest.raises(ValueError, match="AVA_KERNELS_BACKEND is 'cuda'; it must be triton or torch, or not be set"):
        route(torch.zeros(3, 4), 1)


# --- The expert bias ---


def test_bias_moves_towards_an_even_load_in_place():
    bias = torch.tensor([0.5, 0.0, -1.0, 0.25])
    counts = torch.tensor([5, 3, 3, 1], dtype=torch.int32)  # the mean is 3
    returned = update_expert_bias(bias, counts, 0.125)
    assert returned is bias
    assert bias.tolist() == [0.375, 0.0, -1.0, 0.375]

    logits = torch.tensor([[2.0, 1.0, 0.0]] * 3)
    routing = route(logits, 1, capacity=1)  # counted before capacity
    assert update_expert_bias(torch.zeros(3), routing, 0.5).tolist() == [-0.5, 0.5, 0.5]
    parameter = torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)
    assert update_expert_bias(parameter, routing.requested, 0.5).tolist() == [-0.5, 0.5, 0.5]


def test_bias_counts_that_would_round_still_move():
    counts = torch.tensor([2**24, 2**24 + 1], dtype=torch.int32)  # alike in float32
    assert update_expert_bias(torch.zeros(2), counts, 1.0).tolist() == [1.0, -1.0]
    crowded = torch.zeros(1024, dtype=torch.int32)
    crowded[0] = 2**22  # times the number of experts passes 2³¹
    assert update_expert_bias(torch.zeros(1024), crowded, 1.0).tolist() == [-1.0] + [1.0] * 1023


def test_bias_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"bias has the shape \(3,\); the routing has 4 experts"):
        update_expert_bias(torch.zeros(3), route(torch.zeros(2, 4), 1), 0.1)


def test_bias_evens_the_load_of_a_skewed_router():
    generator = torch.Generator().manual_seed(0)
    skew, bias = torch.linspace(-1.5, 1.5, 8), torch.zeros(8)

    def busiest(steps):
        """The busiest expert's requests over this many steps, 1 at an even load."""
        requested_E = torch.zeros(8)
        for _ in range(steps):
            routing = route(torch.randn(256, 8, generator=generator) + skew, 2, score="sigmoid", expert_bias=bias)
            update_expert_bias(bias, routing, 0.01)
            requested_E += routing.requested
        return (requested_E.max() / requested_E.mean()).item()

    assert busiest(1) > 2.2
    busiest(150)
    assert busiest(20) < 1.1


def test_a_routing_is_frozen():
    routing = route(torch.zeros(2, 3), 1)
    assert isinstance(routing, Routing)
    with pytest.raises(dataclasses.FrozenInstanceError):
        routing.expert = None
