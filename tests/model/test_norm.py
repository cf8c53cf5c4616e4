"""RMSNorm with its own backward pass, against the formula in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ava_fast.model import norm
from ava_fast.model.norm import RMSNorm, rms_norm

EPS = 1e-5


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    """So that few rows are many chunks, the last one smaller."""
    monkeypatch.setattr(norm, "SMALL", 0)
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


@pytest.mark.parametrize("shape", [(3, 17, 24), (40, 7), (1, 250), (5, 3, 2, 8), (0, 6), (9, 1), (24,)])
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


@pytest.mark.parametrize("device", ["cpu", "meta"])  # the memory plan counts on meta what a run will keep
def test_it_keeps_x_and_a_number_a_row(device):
    kept = []
    x, weight = (torch.ones(shape, device=device, requires_grad=True) for shape in ((50, 64), (64,)))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours(x, weight)
    assert sorted(t.numel() for t in kept) == [50, 64, 50 * 64]
    assert any(t.data_ptr() == x.data_ptr() for t in kept)


def test_same_input_gives_same_bits():
    x, weight, dy = torch.randn(33, 64), torch.randn(64), torch.randn(33, 64)
    first, second = results(ours, x, weight, dy), results(ours, x, weight, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_few_elements_are_torchs(monkeypatch):
    monkeypatch.setattr(norm, "SMALL", 3 * 24)
    weight = torch.ones(24, requires_grad=True)
    kinds = [type(ours(torch.randn(rows, 24), weight).grad_fn).__name__ for rows in (3, 4)]
    assert kinds == [type(F.rms_norm(torch.randn(3, 24), (24,), weight).grad_fn).__name__, "_RMSNormBackward"]


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_float32", ["neither", "x", "weight"])  # weight: as under autocast
def test_16_bits_are_torchs(dtype, in_float32):
    x = torch.randn(5, 32).to(torch.float32 if in_float32 == "x" else dtype)
    weight = torch.randn(32).to(torch.float32 if in_float32 == "weight" else dtype)
    found, true = ours(x, weight), F.rms_norm(x, (32,), weight, EPS)
    assert found.dtype == true.dtype
    assert torch.equal(found, true)


def test_autocast_rounds_nothing():
    x, weight, dy = torch.randn(33, 64), torch.randn(64), torch.randn(33, 64)
    plain = results(ours, x, weight, dy)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(ours, x, weight, dy)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_checkpointing_gives_the_same_bits():
    x, weight, dy = torch.randn(33, 64), torch.randn(64), torch.randn(33, 64)
    found = results(lambda *args: checkpoint(ours, *args, use_reentrant=False), x, weight, dy)
    assert all(torch.equal(a, b) for a, b in zip(found, results(ours, x, weight, dy), strict=True))


def test_what_is_compiled_is_torchs():
    graphs = []

    def keep(graph, example):
        graphs.append(graph)
        return graph

    torch.compile(ours, backend=keep, fullgraph=True)(torch.randn(3, 24, requires_grad=True), torch.ones(24))
    assert torch.rms_norm in [node.target for node in graphs[0].graph.nodes]


def test_the_module_is_torchs_but_for_its_backward_pass():
    module, other = RMSNorm(24, EPS), torch.nn.RMSNorm(24, EPS)
    other.load_state_dict(module.state_dict())
    x = torch.randn(3, 24)
    torch.testing.assert_close(module(x), other(x))
    assert type(module(x).grad_fn).__name__ == "_RMSNormBackward"
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), other(x))
    assert module.to("meta")(x.to("meta")).shape == x.shape
