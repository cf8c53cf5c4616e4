"""RMSNorm with its own backward pass, against the formula in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ava_fast.model import norm
from ava_fast.model.norm import RMSNorm, rms_norm

EPS = 1e-5


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """So that few rows are many chunks, the last one smaller."""
    monkeypatch.setattr(norm, "CHUNK", 100)
    torch.manual_seed(0)


def written_out(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def results(function, x, weight, dy):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = function(x, weight)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), dy)]


def ours(x, weight):
    return rms_norm(x, weight, EPS)


@pytest.mark.parametrize("shape", [(3, 17, 24), (40, 7), (1, 250), (5, 3, 2, 8), (0, 6), (9, 1)])
@pytest.mark.parametrize("size", [1.0, 1e-4, 1e6])  # among them rows that eps matters to
def test_output_and_gradients_are_the_formula(shape, size):
    x, dy, weight = size * torch.randn(shape), torch.randn(shape), torch.randn(shape[-1])
    exact = results(written_out, x.double(), weight.double(), dy.double())
    other = results(lambda x, w: F.rms_norm(x, w.shape, w, EPS), x, weight, dy)
    for found, true, torchs in zip(results(ours, x, weight, dy), exact, other, strict=True):
        assert found.shape == true.shape
        allowed = 2 * (torchs - true).norm() + 1e-6 * true.norm()
        assert (found - true).norm() <= allowed


def test_strided_tensors():
    x, dy = torch.randn(24, 5, 30).transpose(0, 2), torch.randn(1, 5, 24).expand(30, 5, 24)
    weight = torch.randn(48)[::2]
    exact = results(written_out, x.double(), weight.double(), dy.double())
    for found, true in zip(results(ours, x, weight, dy), exact, strict=True):
        torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=1e-5)


def test_gradcheck():
    x, weight = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 6, 8), (8,)))
    assert torch.autograd.gradcheck(ours, (x, weight))


def test_a_second_derivative_is_refused():
    x, weight = torch.randn(3, 4, requires_grad=True), torch.ones(4, requires_grad=True)
    (dx,) = torch.autograd.grad(ours(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_it_keeps_x_and_a_number_a_row():
    kept = []
    x, weight = torch.randn(50, 64, requires_grad=True), torch.ones(64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours(x, weight)
    assert sorted(t.numel() for t in kept) == [50, 64, 50 * 64]
    assert any(t.data_ptr() == x.data_ptr() for t in kept)


def test_same_input_gives_same_bits():
    x, weight, dy = torch.randn(33, 64), torch.randn(64), torch.randn(33, 64)
    first, second = results(ours, x, weight, dy), results(ours, x, weight, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_torchs(dtype):
    x, weight = torch.randn(5, 32).to(dtype), torch.randn(32).to(dtype)
    assert torch.equal(ours(x, weight), F.rms_norm(x, (32,), weight, EPS))


def test_the_module_is_torchs_but_for_its_backward_pass():
    module, other = RMSNorm(24, EPS), torch.nn.RMSNorm(24, EPS)
    other.load_state_dict(module.state_dict())
    x = torch.randn(3, 24)
    torch.testing.assert_close(module(x), other(x))
    assert type(module(x).grad_fn).__name__ == "_RMSNormBackward"
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), other(x))
    assert module.to("meta")(x.to("meta")).shape == x.shape
