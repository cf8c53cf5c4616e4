"""The experts' products for Hopper, every group of warps as a thread on this CPU, against a loop over the experts."""

from __future__ import annotations

import dataclasses

import gluon_on_cpu
import pytest
import torch
import torch.nn.functional as F
from ava_kernels import moe_mlp, route

pytest.importorskip("triton")
from ava_kernels.experts import hopper

pytestmark = pytest.mark.usefixtures("triton_backend", "on_this_cpu")


@pytest.fixture
def on_this_cpu(monkeypatch):
    monkeypatch.setattr(hopper, "runs_on", lambda x: True)
    torch.manual_seed(0)
    with gluon_on_cpu.emulated():
        yield


def routing_of(T, E, K, logits=None, **options):
    routing = route(torch.randn(T, E) if logits is None else logits, K, **options)
    return dataclasses.replace(routing, weight=routing.weight.detach().requires_grad_())


def inputs(T, E, M, I, dtype=torch.float16):
    shapes = ((T, M), 1.0), ((E, 2 * I, M), M**-0.5), ((E, M, I), I**-0.5)
    return [(torch.randn(shape) * size).to(dtype).requires_grad_() for shape, size in shapes]


def loop(x, gate_up, down, weight, routing, activation):
    """One expert after the other, in the dtype of its tensors."""
    out = torch.zeros_like(x)
    act = {"swiglu": F.silu, "geglu": F.gelu}[activation]
    for expert in range(len(gate_up)):
        token, slot = (routing.expert == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ gate_up[expert].T).chunk(2, dim=1)
        y = (act(gate) * up) @ down[expert].T
        out = out.index_add(0, token, (y * weight[token, slot][:, None]).to(x.dtype))
    return out


def all_of(function, tensors, dout):
    out = function(*tensors)
    return [out, *torch.autograd.grad(out, tensors, dout)]


def assert_right(routing, tensors, activation="swiglu", **options):
    """Errors against float64 are at most twice those of the loop in the same precision."""
    dout = torch.randn(tensors[0].shape).to(tensors[0].dtype)

    def ours(x, gate_up, down, weight):
        given = dataclasses.replace(routing, weight=weight)
        return moe_mlp(x, gate_up, down, given, activation=activation, backend="hopper", **options)

    leaves = [*tensors, routing.weight]
    got = all_of(ours, leaves, dout)
    same = all_of(lambda *t: loop(*t, routing, activation), leaves, dout)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    true = all_of(lambda *t: loop(*t, routing, activation), doubles, dout.double())
    for name, mine, other, exact in zip(("out", "x", "gate_up", "down", "weight"), got, same, true, strict=True):
        assert mine.shape == exact.shape, name
        error, allowed = (mine.double() - exact).norm(), 2 * (other.double() - exact).norm()
        assert error <= allowed + 2e-6 * exact.norm(), (name, error, allowed)
    return got


@pytest.mark.parametrize("activation", ["swiglu", "geglu"])
@pytest.mark.parametrize(
    ("T", "E", "K", "M", "I"),
    [
        (200, 3, 2, 128, 136),
        (130, 5, 3, 200, 72),  # no multiple of what a step multiplies, nor of a tile
        (3, 4, 2, 8, 8),
        (300, 2, 1, 64, 264),
        (1, 1, 1, 72, 40),
    ],
)
def test_output_and_gradients_are_the_loop(T, E, K, M, I, activation):
    assert_right(routing_of(T, E, K), inputs(T, E, M, I), activation)
