"""The experts' products for Hopper, every warp group as a thread on this CPU, against a loop over the experts."""

from __future__ import annotations

import dataclasses
import json
from contextlib import contextmanager

import gluon_on_cpu
import pytest
import torch
import torch.nn.functional as F
from ava_kernels import moe_mlp, route, tiles
from torch._subclasses import FakeTensorMode

pytest.importorskip("triton")
from ava_kernels.experts import hopper, hopper_kernels, hopper_weight_grad, op

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


@pytest.mark.parametrize("activation", ["gelu", "relu2"])
def test_activations_without_a_gate_are_the_other_kernels(activation):
    x, gate_up, down = inputs(30, 3, 64, 40)
    gate_up = gate_up.detach()[:, :40].contiguous().requires_grad_()
    routing = routing_of(30, 3, 2)
    results = [
        all_of(
            lambda *t, backend=backend: moe_mlp(*t, routing, activation=activation, backend=backend),
            [x, gate_up, down],
            torch.ones_like(x),
        )
        for backend in ("hopper", "triton")
    ]
    for ours, theirs in zip(*results, strict=True):  # the last product is Hopper's, in another order
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def logits_of(T, E, favourites):
    """Every token's first choices are these experts."""
    logits = torch.randn(T, E)
    logits[:, favourites] += 20.0
    return logits


def test_empty_experts_and_one_that_takes_all():
    for favourites in ([2], [0], [4], [1, 3]):
        K = len(favourites)
        assert_right(routing_of(150, 5, K, logits_of(150, 5, favourites)), inputs(150, 5, 72, 40))


@pytest.mark.parametrize("options", [{"capacity": 20, "overflow": "drop"}, {"capacity": 40}, {"capacity": 0}])
def test_dropped_and_rerouted_choices(options):
    """Rows of nobody hold NaN, as memory that is not written may."""
    routing = routing_of(140, 4, 2, logits_of(140, 4, [1]), **options)
    with filled_with_nan():
        results = assert_right(routing, inputs(140, 4, 64, 72))
    assert all(t.isfinite().all() for t in results)


@contextmanager
def filled_with_nan():
    original = torch.Tensor.new_empty

    def new_empty(self, *shape, **options):
        t = original(self, *shape, **options)
        return t.fill_(float("nan")) if t.is_floating_point() else t

    torch.Tensor.new_empty = new_empty
    try:
        yield
    finally:
        torch.Tensor.new_empty = original


def test_a_nan_stays_with_its_expert():
    routing = routing_of(200, 3, 1)
    x, gate_up, down = inputs(200, 3, 72, 40)
    with torch.no_grad():
        gate_up[1], down[1] = float("nan"), float("inf")
    out = moe_mlp(x, gate_up, down, routing, backend="hopper")
    dx, dgate_up, ddown, dweight = torch.autograd.grad(out.sum(), (x, gate_up, down, routing.weight))
    others = routing.expert[:, 0] != 1
    assert 0 < others.sum() < 200
    for t in (out, dx, dweight):
        assert t[others].isfinite().all()
        assert not t[~others].isfinite().all()
    for t in (dgate_up, ddown):
        assert t[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.mT.contiguous().mT,  # what is summed over does not lie side by side
        lambda t: torch.cat((t, t), dim=-1)[..., : t.shape[-1]],  # rows further apart
        lambda t: torch.cat((t, t[..., :3]), dim=-1)[..., : t.shape[-1]],  # rows that TMA cannot begin at
        lambda t: t.permute(1, 2, 0).contiguous().permute(2, 0, 1),  # no side lies side by side
        lambda t: t.flip(0),
    ],
)
def test_strided_weights(view):
    routing = routing_of(70, 3, 2)
    x, gate_up, down = inputs(70, 3, 72, 40)
    strided = [view(t.detach()).requires_grad_() for t in (gate_up, down)]
    assert_right(routing, [x.detach().t().contiguous().t().requires_grad_(), *strided])


@pytest.mark.parametrize(("M", "I"), [(70, 40), (72, 36), (7, 5)])
def test_sizes_that_are_no_multiple_of_8_are_the_other_kernels(M, I):
    assert_right(routing_of(50, 3, 2), inputs(50, 3, M, I))


def test_gradients_are_added_to_sums():
    routing = routing_of(60, 3, 2)
    x, gate_up, down = inputs(60, 3, 64, 40)
    sums = [torch.ones(t.shape) for t in (gate_up, down)]
    out = moe_mlp(x, gate_up, down, routing, gradient_sums=tuple(sums), backend="hopper")
    out.sum().backward()
    plain = torch.autograd.grad(moe_mlp(x, gate_up, down, routing, backend="hopper").sum(), (gate_up, down))
    for total, gradient in zip(sums, plain, strict=True):
        torch.testing.assert_close(total - 1, gradient.float(), rtol=1e-2, atol=1e-2)


def test_any_gradient_alone():
    routing = routing_of(40, 3, 2)
    tensors = [*inputs(40, 3, 64, 40), routing.weight]

    def run(leaves):
        given = dataclasses.replace(routing, weight=leaves[3])
        return moe_mlp(*leaves[:3], given, backend="hopper").float().square().sum()

    every = torch.autograd.grad(run(tensors), tensors)
    for index in range(4):
        leaves = [t.detach().requires_grad_(i == index) for i, t in enumerate(tensors)]
        (alone,) = torch.autograd.grad(run(leaves), [leaves[index]])
        assert torch.equal(alone, every[index])


def test_same_input_gives_same_bits():
    routing, tensors, results = routing_of(300, 4, 2), inputs(300, 4, 128, 136), []
    for seed in (1, 2):  # other orders of what may happen in any
        with gluon_on_cpu.emulated(seed):
            ours = all_of(lambda *t: moe_mlp(*t, routing, backend="hopper"), tensors, torch.ones_like(tensors[0]))
            results.append(ours)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_offsets_beyond_31_bits():
    routing = routing_of(20, 2, 1)
    x, gate_up, down = inputs(20, 2, 64, 40)
    try:  # memory that is never touched costs nothing
        far = torch.empty(19 * 2**27 + 64, dtype=x.dtype)
    except RuntimeError:
        pytest.skip("no 5 GiB of address space")
    far = far.as_strided(x.shape, (2**27, 1)).copy_(x.detach()).requires_grad_()
    assert_right(routing, [far, gate_up, down])


def test_what_it_does_not_take(monkeypatch):
    x, gate_up, down = inputs(10, 2, 64, 40)
    routing = routing_of(10, 2, 1)
    with pytest.raises(ValueError, match=r"which is for float16 and bfloat16.*torch.float32 on cpu"):
        moe_mlp(x.float(), gate_up.float(), down.float(), routing, backend="hopper")
    with pytest.raises(ValueError, match="backend is 'cutlass'; it must be 'triton', 'hopper' or 'torch', or None"):
        moe_mlp(x, gate_up, down, routing, backend="cutlass")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="on cpu: take backend='triton'"):
        moe_mlp(x, gate_up, down, routing, backend="hopper")


@pytest.mark.parametrize(
    ("dtype", "shape", "expected"),
    [
        (torch.bfloat16, (8, 64, 40), "hopper"),
        (torch.bfloat16, (8, 64, 48), "triton"),  # "any"
        (torch.float32, (8, 64, 40), "triton"),  # which the first of its list does not take
    ],
)
def test_a_table_says_whose_kernels_are_taken(monkeypatch, tmp_path, dtype, shape, expected):
    table = {"8×64×40 bfloat16": ["hopper", "triton"], "8×64×40 float32": ["hopper"], "any": ["triton"]}
    (tmp_path / "tiles.json").write_text(json.dumps({"sm_90": {"moe_mlp": table}}))
    monkeypatch.setenv("AVA_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(tiles, "capability", lambda device: (9, 0))
    tiles.forget()
    with FakeTensorMode():
        x, down = (torch.empty(size, dtype=dtype, device="cuda") for size in ((10, shape[1]), shape))
        assert op._choose(x, down) == expected
        monkeypatch.setenv("AVA_KERNELS_CACHE", str(tmp_path / "none"))
        tiles.forget()
        assert op._choose(x, down) == "triton"  # what ships
    tiles.forget()


FAULTS = {
    "copies are told of too early": (
        hopper_kernels._gather_producer,
        "async_copy.wait_group(late)",
        "async_copy.wait_group(late + 1)",
    ),
    "copies are not fenced": (
        hopper_kernels._gather_producer,
        "                hopper.fence_async_shared()\n                if",
        "                if",
    ),
    "the last copies are not told of": (
        hopper_kernels._gather_producer,
        "gl.maximum(step - late, 0)",
        "step - late + 1",
    ),
    "a stage is given back too early": (
        hopper_kernels._multiply,
        "mbarrier.arrive(empty.index((step - 1) % STAGES))\n        step",
        "mbarrier.arrive(empty.index(step % STAGES))\n        step",
    ),
    "a phase that is off by one": (
        hopper_kernels._producer,
        "mbarrier.wait(empty.index(stage), phase ^ 1)",
        "mbarrier.wait(empty.index(stage), phase)",
    ),
    "bytes that are not expected": (
        hopper_kernels._gather_producer,
        "HALVES * w.block_type.nbytes",
        "w.block_type.nbytes // 2",
    ),
    "sums' copies are told of too early": (
        hopper_weight_grad._weight_grad_producer,
        "async_copy.wait_group(late)",
        "async_copy.wait_group(late + 1)",
    ),
    "a sum's left side is not cleared": (
        hopper_weight_grad._weight_grad_consumer,
        "clear_behind(left_LB, end - at)",
        "pass",
    ),
    "a sum's right side is not cleared": (
        hopper_weight_grad._weight_grad_consumer,
        "clear_behind(right_LC2, end - at)",
        "pass",
    ),
    "rows of the next expert": (hopper_kernels._place, "row_B < end", "row_B <= end"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_show(monkeypatch, fault):
    """Of the emulation itself: a kernel with one line changed is found out."""
    monkeypatch.setattr(gluon_on_cpu, "PATIENCE", 1.0)
    gluon_on_cpu.with_fault(monkeypatch, *FAULTS[fault])
    routing = routing_of(300, 4, 2, capacity=100, overflow="drop")

    def often_enough():
        for _ in range(20):
            with filled_with_nan():
                assert_right(routing, inputs(300, 4, 200, 392))

    with pytest.raises((AssertionError, IndexError)):
        often_enough()
