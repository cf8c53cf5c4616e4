"""The experts' MLP and the grouped product against loops over tokens and experts in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from ava_kernels import grouped_mm, moe_mlp, route

pytestmark = pytest.mark.usefixtures("small_and_seeded")

SIZES = {  # T, E, K, M, I
    "odd": (13, 5, 3, 7, 3),
    "aligned": (24, 4, 2, 16, 8),
    "more_experts_than_choices": (2, 9, 2, 6, 5),
    "one_token": (1, 4, 2, 8, 4),
    "one_of_everything": (1, 1, 1, 1, 1),
    "every_expert": (6, 3, 3, 8, 4),
}


def routing_of(T, E, K, dtype=torch.float32, logits=None):
    """A routing whose weights are a leaf, so that their gradient can be read."""
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(T)) if logits is None else logits
    routing = route(logits, K)
    return dataclasses.replace(routing, weight=routing.weight.to(dtype).requires_grad_())


def inputs(T, E, M, I, dtype=torch.float64):  # noqa: E741 - the field's letter
    generator = torch.Generator().manual_seed(7)
    shapes = ((T, M), 1.0), ((E, 2 * I, M), M**-0.5), ((E, M, I), I**-0.5)
    return [(torch.randn(s, generator=generator).double() * std).to(dtype).requires_grad_() for s, std in shapes]


def by_token(x, gate_up, down, routing, weight):
    """One product per token and expert, each in the dtype of its operands."""
    rows = []
    for token, experts in enumerate(routing.expert.tolist()):
        row = torch.zeros_like(x[token])
        for choice, expert in enumerate(experts):
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            row = row + weight[token, choice] * (down[expert] @ (F.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


def all_results(function, tensors, upstream):
    out = function(*tensors)
    return [out, *torch.autograd.grad(out, tensors, upstream)]


def ours_and_exact(tensors, routing, upstream):
    def ours(x, gate_up, down, weight):
        return moe_mlp(x, gate_up, down, dataclasses.replace(routing, weight=weight))

    def loop(x, gate_up, down, weight):
        return by_token(x, gate_up, down, routing, weight)

    exact_tensors = [t.detach().double().requires_grad_() for t in tensors]
    return all_results(ours, tensors, upstream), all_results(loop, exact_tensors, upstream.double()), loop


@pytest.mark.parametrize("size", SIZES)
def test_output_and_all_four_gradients_are_the_loop(size):
    T, E, K, M, I = SIZES[size]  # noqa: E741
    routing = routing_of(T, E, K, torch.float64)
    upstream = torch.randn(T, M, dtype=torch.float64)
    ours, exact, _ = ours_and_exact([*inputs(T, E, M, I), routing.weight], routing, upstream)
    for got, truth in zip(ours, exact, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", ["odd", "aligned"])
def test_error_is_that_of_the_loop_in_the_same_precision(size, dtype):
    T, E, K, M, I = SIZES[size]  # noqa: E741
    routing = routing_of(T, E, K)
    tensors = [*inputs(T, E, M, I, dtype), routing.weight]
    upstream = torch.randn(T, M).to(dtype)
    ours, exact, loop = ours_and_exact(tensors, routing, upstream)
    peer = [t.detach().to(dtype).requires_grad_() for t in tensors]
    same = all_results(loop, peer, upstream)
    assert [t.dtype for t in ours] == [dtype] * 4 + [torch.float32]
    for got, other, truth in zip(ours, same, exact, strict=True):
        assert (got - truth).norm() <= 4 * (other - truth).norm()


@pytest.mark.parametrize("size", ["odd", "aligned"])
def test_all_tokens_to_one_expert_leave_the_others_without_gradient(size):
    T, E, _, M, I = SIZES[size]  # noqa: E741
    routing = routing_of(T, E, 1, torch.float64, logits=torch.eye(E)[2].repeat(T, 1))
    tensors = [*inputs(T, E, M, I), routing.weight]
    ours, exact, _ = ours_and_exact(tensors, routing, torch.randn(T, M, dtype=torch.float64))
    for got, truth in zip(ours, exact, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-11, atol=1e-12)
    for gradient in ours[2:4]:
        assert not gradient[[0, 1, *range(3, E)]].any()
        assert gradient[2].any()


@pytest.mark.parametrize("M", [7, 8])
def test_no_tokens(M):
    routing = routing_of(0, 3, 2)
    x, gate_up, down = inputs(0, 3, M, 4, torch.float32)
    out = moe_mlp(x, gate_up, down, routing)
    assert out.shape == (0, M)
    out.sum().backward()
    assert x.grad.shape == (0, M)
    assert all(t.grad is not None and not t.grad.any() for t in (gate_up, down))


def test_numerical_gradients():
    routing = routing_of(3, 3, 2, torch.float64)
    tensors = [*inputs(3, 3, 4, 2), routing.weight]
    torch.autograd.gradcheck(
        lambda x, gate_up, down, weight: moe_mlp(x, gate_up, down, dataclasses.replace(routing, weight=weight)), tensors
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", ["odd", "aligned"])
def test_strided_inputs_and_gradients(size, dtype):
    T, E, K, M, I = SIZES[size]  # noqa: E741
    routing = routing_of(T, E, K)
    x, gate_up, down = (t.detach() for t in inputs(T, E, M, I, dtype))
    weight = routing.weight.detach()
    upstream = torch.randn(M).to(dtype).expand(T, M)  # what .sum() and broadcasting send back
    strided = [x.T.contiguous().T, wide(gate_up), down.permute(2, 1, 0).contiguous().permute(2, 1, 0), wide(weight)]
    assert not any(t.is_contiguous() for t in strided)

    def ours(x, gate_up, down, weight):
        return moe_mlp(x, gate_up, down, dataclasses.replace(routing, weight=weight))

    got = all_results(ours, [t.requires_grad_() for t in strided], upstream)
    plain = [t.contiguous().requires_grad_() for t in (x, gate_up, down, weight)]
    for mine, other in zip(got, all_results(ours, plain, upstream.contiguous()), strict=True):
        torch.testing.assert_close(mine, other)


def wide(t):
    """The same values, eight elements apart."""
    return t.repeat_interleave(8, dim=-1)[..., ::8]


def test_keeps_only_its_inputs_and_the_pre_activations():
    T, E, K, M, I = SIZES["aligned"]  # noqa: E741
    routing = routing_of(T, E, K)
    x, gate_up, down = inputs(T, E, M, I, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        moe_mlp(x, gate_up, down, routing)
    known = {t.data_ptr() for t in (x, gate_up, down, routing.weight)}
    new = [t for t in saved if t.data_ptr() not in known]
    assert [t.shape for t in new if t.numel() > T * K] == [(T * K, 2 * I)]  # the others are one number per choice


def test_same_input_same_bits():
    T, E, K, M, I = SIZES["aligned"]  # noqa: E741
    routing = routing_of(T, E, K)
    tensors = inputs(T, E, M, I, torch.float32)
    upstream = torch.randn(T, M)
    first, second = (all_results(lambda *t: moe_mlp(*t, routing), tensors, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("x", "gate_up", "down"),
    [
        ((4, 7), (3, 6, 8), (3, 8, 3)),
        ((4, 8), (3, 5, 8), (3, 8, 2)),
        ((4, 8), (3, 6, 8), (3, 8, 4)),
        ((4, 8), (2, 6, 8), (2, 8, 3)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(x, gate_up, down):
    with pytest.raises(ValueError, match=r"do not fit: they must be \(T, M\), \(E, 2I, M\), \(E, M, I\) and E"):
        moe_mlp(torch.zeros(x), torch.zeros(gate_up), torch.zeros(down), routing_of(4, 3, 2))


ENDS = [0, 3, 3, 8, 8]


def grouped_loop(x, w):
    spans = list(zip([0, *ENDS[:-1]], ENDS, strict=True))
    if w.dim() == 2:
        return torch.stack([x[:, start:end] @ w[start:end] for start, end in spans])
    return torch.cat([x[start:end] @ w[e] for e, (start, end) in enumerate(spans)])


LAYOUTS = {
    "aligned": (lambda: torch.randn(8, 16), lambda: torch.randn(5, 16, 8)),
    "unaligned": (lambda: torch.randn(8, 7), lambda: torch.randn(5, 7, 3)),
    "unaligned_result": (lambda: torch.randn(8, 16), lambda: torch.randn(5, 3, 16).mT),
    "transposed": (lambda: torch.randn(16, 8).T, lambda: torch.randn(5, 8, 16).mT),
    "strided": (lambda: wide(torch.randn(8, 16)), lambda: wide(torch.randn(5, 16, 8))),
    "one_column": (lambda: torch.randn(8, 1), lambda: torch.randn(5, 1, 16)),
    "one_row_broadcast": (lambda: torch.randn(1, 16).expand(8, 16), lambda: torch.randn(1, 16, 8).expand(5, 16, 8)),
    "contracted": (lambda: torch.randn(8, 16).T, lambda: torch.randn(8, 24)),
    "contracted_unaligned": (lambda: torch.randn(8, 5).T, lambda: torch.randn(8, 3)),
    "contracted_strided": (lambda: wide(torch.randn(16, 8)), lambda: wide(torch.randn(8, 24))),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_grouped_product_is_the_loop(layout, dtype):
    x, w = (make() for make in LAYOUTS[layout])
    x, w = x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()
    upstream = torch.randn_like(grouped_loop(x, w))
    offs = torch.tensor(ENDS, dtype=torch.int32)
    ours = all_results(lambda x, w: grouped_mm(x, w, offs=offs), [x, w], upstream)
    same = all_results(grouped_loop, [x, w], upstream)
    exact = all_results(grouped_loop, [t.detach().double().requires_grad_() for t in (x, w)], upstream.double())
    for got, peer, truth in zip(ours, same, exact, strict=True):
        assert got.dtype == dtype
        assert got.shape == truth.shape
        assert (got - truth).norm() <= 4 * (peer - truth).norm() + 1e-14


@pytest.mark.parametrize(("dtype", "columns", "expected"), [("float32", 8, 1), ("float64", 8, 0), ("bfloat16", 4, 0)])
def test_aligned_operands_reach_the_fast_product(monkeypatch, dtype, columns, expected):
    calls = []
    fast = F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *args, **kwargs: calls.append(1) or fast(*args, **kwargs))
    x, w = (torch.randn(s, dtype=getattr(torch, dtype)) for s in ((8, columns), (5, columns, 8)))
    grouped_mm(x, w, offs=torch.tensor(ENDS, dtype=torch.int32))
    assert len(calls) == expected
