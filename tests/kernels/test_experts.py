"""The experts' MLP against a loop over tokens and experts in float64, in PyTorch and on the interpreted kernels."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from ava_kernels import moe_mlp, route
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("small_and_seeded")

SIZES = {  # T, E, K, M, I
    "odd": (13, 5, 3, 7, 3),
    "aligned": (24, 4, 2, 16, 8),
    "several_tiles": (32, 3, 2, 24, 24),  # rows, columns and depth of several tiles, the last ones partly filled
    "more_experts_than_choices": (2, 9, 2, 6, 5),
    "one_of_everything": (1, 1, 1, 1, 1),
    "every_expert": (6, 3, 3, 8, 4),
}
ACTIVATIONS = {
    "swiglu": lambda gate, up: F.silu(gate) * up,
    "geglu": lambda gate, up: F.gelu(gate) * up,
    "gelu": F.gelu,
    "relu2": lambda h: F.relu(h).square(),
}
GATED = ("swiglu", "geglu")


def routing_of(T, E, K, logits=None, dtype=torch.float32, **options):
    """A routing whose weights are a leaf, so that their gradient can be read."""
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(T)) if logits is None else logits
    routing = route(logits, K, **options)
    return dataclasses.replace(routing, weight=routing.weight.to(dtype).requires_grad_())


def inputs(T, E, M, I, dtype=torch.float64, activation="swiglu"):
    generator = torch.Generator().manual_seed(7)
    H = 2 * I if activation in GATED else I
    shapes = ((T, M), 1.0), ((E, H, M), M**-0.5), ((E, M, I), I**-0.5)
    return [(torch.randn(s, generator=generator).double() * std).to(dtype).requires_grad_() for s, std in shapes]


def by_token(x, gate_up, down, routing, weight, activation="swiglu"):
    """One product per token and expert, each in the dtype of its operands."""
    rows = []
    for token, experts in enumerate(routing.expert.tolist()):
        row = 0.0 * x[token]  # a token without an expert has a gradient too
        for choice, expert in enumerate(experts):
            if expert < 0:
                continue
            h = gate_up[expert] @ x[token]
            a = ACTIVATIONS[activation](*(h.chunk(2) if activation in GATED else [h]))
            row = row + weight[token, choice] * (down[expert] @ a)
        rows.append(row)
    return torch.stack(rows)


def all_results(function, tensors, upstream):
    out = function(*tensors)
    grads = torch.autograd.grad(out, tensors, upstream, allow_unused=True)  # the loop may reach an expert never
    return [out, *(torch.zeros_like(t) if g is None else g for t, g in zip(tensors, grads, strict=True))]


def ours(routing, activation="swiglu"):
    return lambda x, gate_up, down, weight: moe_mlp(
        x, gate_up, down, dataclasses.replace(routing, weight=weight), activation=activation
    )


def loop(routing, activation="swiglu"):
    return lambda x, gate_up, down, weight: by_token(x, gate_up, down, routing, weight, activation)


def assert_as_exact_as_the_loop(tensors, routing, activation="swiglu", upstream=None):
    """Output and all four gradients: their errors against float64 are at most four times those of a loop in their own
    precision."""
    upstream = torch.randn(tensors[0].shape).to(tensors[0].dtype) if upstream is None else upstream
    leaves = [t.detach().requires_grad_() for t in tensors]
    got = all_results(ours(routing, activation), leaves, upstream)
    same = all_results(loop(routing, activation), [t.to(upstream.dtype) for t in leaves], upstream)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    truth = all_results(loop(routing, activation), exact, upstream.double())
    for name, mine, other, true in zip(("out", "x", "gate_up", "down", "weight"), got, same, truth, strict=True):
        assert mine.shape == true.shape, name
        error, allowed = (mine.double() - true).norm(), 4 * (other.double() - true).norm()
        # A power of 2 is as exact as its rounded exponent: 24 units of the last place at a gate of 17, which counts
        # where nothing larger is beside it.
        assert error <= allowed + 3e-6 * true.norm() * (mine.dtype != torch.float64), (name, error, allowed)
    return got


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_output_and_all_four_gradients_are_the_loop(product, size, activation):
    T, E, K, M, I = SIZES[size]
    dtype = torch.float64 if product == "torch" else torch.float32
    routing = routing_of(T, E, K, dtype=dtype)
    tensors = [*inputs(T, E, M, I, dtype, activation), routing.weight]
    if dtype == torch.float32:
        assert_as_exact_as_the_loop(tensors, routing, activation)
        return
    upstream = torch.randn(T, M, dtype=dtype)
    results = (all_results(f(routing, activation), tensors, upstream) for f in (ours, loop))
    for got, truth in zip(*results, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", ["odd", "aligned", "several_tiles"])
def test_error_is_that_of_the_loop_in_the_same_precision(product, size, dtype):
    T, E, K, M, I = SIZES[size]
    routing = routing_of(T, E, K)
    got = assert_as_exact_as_the_loop([*inputs(T, E, M, I, dtype), routing.weight], routing)
    assert [t.dtype for t in got] == [dtype] * 4 + [torch.float32]


ROUTINGS = {
    "all to one": {"logits": torch.eye(4)[2].repeat(40, 1)},
    "skewed": {"logits": torch.randn(40, 4, generator=torch.Generator().manual_seed(1)) + torch.tensor([9.0, 4, 0, 0])},
    "dropped": {"capacity": 9, "overflow": "drop"},
    "rerouted and dropped": {"capacity": 18, "max_reroutes": 1},
    "nothing held": {"capacity": 0},
    "tokens without any": {"logits": torch.randn(40, 4, generator=torch.Generator().manual_seed(2)).index_fill(
        0, torch.tensor([0, 7, 39]), float("nan"))},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROUTINGS)
def test_uneven_routings_and_dropped_requests(product, kind):
    """Memory is filled with NaN before it is used, so that nothing may come from where no row is."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        routing = routing_of(40, 4, 1 if kind == "all to one" else 2, **ROUTINGS[kind])
        got = assert_as_exact_as_the_loop([*inputs(40, 4, 24, 24, torch.float32), routing.weight], routing)
    finally:
        torch.use_deterministic_algorithms(False)
    held = routing.offsets.diff() > 0
    for gradient in got[2:4]:  # exactly zero, not almost
        assert gradient[~held].eq(0).all()
    assert got[4][routing.expert < 0].eq(0).all()
    assert got[0][(routing.expert < 0).all(1)].eq(0).all()


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_size_and_routing(product, data):
    T, E, M, I = (data.draw(st.integers(1, top), label=name) for name, top in zip("TEMI", (24, 5, 20, 20), strict=True))
    K = data.draw(st.integers(1, min(E, 3)), label="K")
    activation = data.draw(st.sampled_from(list(ACTIVATIONS)), label="activation")
    capacity = data.draw(st.none() | st.integers(0, T), label="capacity")
    overflow = data.draw(st.sampled_from(["drop", "next_best"]), label="overflow")
    logits = torch.randn(T, E) + data.draw(st.sampled_from([0.0, 5.0]), label="skew") * torch.randn(E)
    routing = routing_of(T, E, K, logits, capacity=capacity, overflow=overflow)
    tensors = [*inputs(T, E, M, I, torch.float32, activation), routing.weight]
    assert_as_exact_as_the_loop(tensors, routing, activation)


def test_a_program_goes_through_many_small_or_few_large_tiles(product, monkeypatch, tmp_path):
    from tests.kernels.conftest import set_tiles

    routing = routing_of(40, 3, 2)
    tensors = [*inputs(40, 3, 40, 24, torch.float32), routing.weight]
    upstream, results = torch.randn(40, 40), []
    for tile in (
        [16, 16, 16, 4, 2, 1, 1],
        [32, 32, 16, 4, 2, 3, 2],
        [64, 16, 64, 4, 2, 8, 1],
        [16, 64, 32, 4, 2, 8, 9],
    ):
        set_tiles(monkeypatch, tmp_path, tile)
        results.append(all_results(ours(routing), tensors, upstream))
    for result in results[1:]:
        for got, other in zip(result, results[0], strict=True):
            torch.testing.assert_close(got, other)


@pytest.mark.parametrize("M", [7, 8])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_no_tokens(product, M, activation):
    routing = routing_of(0, 3, 2)
    x, gate_up, down = inputs(0, 3, M, 4, torch.float32, activation)
    out = moe_mlp(x, gate_up, down, routing, activation=activation)
    assert out.shape == (0, M)
    out.sum().backward()
    assert x.grad.shape == (0, M)
    assert all(t.grad is not None and not t.grad.any() for t in (gate_up, down))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_numerical_gradients(monkeypatch, activation):
    monkeypatch.setenv("AVA_KERNELS_BACKEND", "torch")
    routing = routing_of(3, 3, 2, dtype=torch.float64, capacity=2, overflow="drop")
    torch.autograd.gradcheck(ours(routing, activation), [*inputs(3, 3, 4, 2, activation=activation), routing.weight])


# --- Strides ---


def wide(t):
    """The same values, eight elements apart."""
    return t.repeat_interleave(8, dim=-1)[..., ::8]


def transposed(t):
    """The same values, rows and columns swapped in memory."""
    return t.mT.contiguous().mT


WEIGHTS = {
    "dense": (lambda t: t, lambda t: t),
    "transposed": (transposed, transposed),
    "one transposed": (lambda t: t, transposed),
    "experts innermost": (
        lambda t: t.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        lambda t: t.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    ),
    "wide": (wide, wide),
    "part of a larger one": (lambda t: F.pad(t, (0, 16))[..., :-16], lambda t: F.pad(t, (0, 0, 0, 8))[:, :-8]),
}


@pytest.mark.parametrize("size", ["odd", "several_tiles"])
@pytest.mark.parametrize("layout", WEIGHTS)
def test_strided_weights_give_what_dense_ones_give(product, layout, size):
    T, E, K, M, I = SIZES[size]
    routing = routing_of(T, E, K)
    x, gate_up, down = (t.detach() for t in inputs(T, E, M, I, torch.float32))
    weight, upstream = routing.weight.detach(), torch.randn(T, M)
    laid = [layer(t) for layer, t in zip(WEIGHTS[layout], (gate_up, down), strict=True)]
    got = all_results(ours(routing), [t.requires_grad_() for t in (x, *laid, weight)], upstream)
    plain = [t.detach().clone().requires_grad_() for t in (x, gate_up, down, weight)]
    for mine, other in zip(got, all_results(ours(routing), plain, upstream), strict=True):
        torch.testing.assert_close(mine, other)


def test_strided_activations_and_gradients(product):
    T, E, K, M, I = SIZES["aligned"]
    dtype = torch.bfloat16 if product == "torch" else torch.float32
    routing = routing_of(T, E, K)
    x, gate_up, down = (t.detach() for t in inputs(T, E, M, I, dtype))
    weight = routing.weight.detach()
    # What .sum() sends back, and broadcasting, and a slice.
    upstreams = [torch.ones(1, 1).expand(T, M), torch.randn(M).expand(T, M), torch.randn(T, 2 * M)[:, :M]]
    for layer, upstream in zip((transposed, wide, lambda t: F.pad(t, (0, 8))[:, :-8]), upstreams, strict=True):
        laid = [t.requires_grad_() for t in (layer(x), gate_up, down, wide(weight))]
        got = all_results(ours(routing), laid, upstream.to(dtype))
        plain = [t.detach().contiguous().requires_grad_() for t in (x, gate_up, down, weight)]
        for mine, other in zip(got, all_results(ours(routing), plain, upstream.to(dtype).contiguous()), strict=True):
            torch.testing.assert_close(mine, other)


def test_offsets_may_pass_31_bits(product):
    try:  # memory that is never touched costs nothing
        storage = torch.empty(2**32 + 2**20, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("no 8 GiB of address space")
    T, E, K, M, I = 3, 3, 2, 16, 8
    routing = routing_of(T, E, K)
    tensors = [t.detach() for t in inputs(T, E, M, I, torch.float16)]
    upstream, weight = torch.randn(T, M).half(), routing.weight.detach()
    # The last row, or the last expert, is 2³² elements behind the first; with 32 bits it would be where that is.
    far = []
    for place, (t, rows) in enumerate(zip(tensors, (M, M, I), strict=True)):
        strides = (2**31, 1) if t.dim() == 2 else (2**31, rows, 1)
        far.append(storage.as_strided(t.shape, strides, 4096 * place).copy_(t).requires_grad_())
    got = all_results(ours(routing), [*far, weight.clone().requires_grad_()], upstream)
    near = [t.clone().requires_grad_() for t in (*tensors, weight)]
    for mine, other in zip(got, all_results(ours(routing), near, upstream), strict=True):
        torch.testing.assert_close(mine, other)


def test_a_nan_stays_with_the_tokens_of_its_expert(product):
    """Also where a tile reaches over the end of an expert's rows into the next one's."""
    routing = routing_of(40, 3, 1)
    x, gate_up, down = (t.detach() for t in inputs(40, 3, 24, 12, torch.float32))
    upstream, weight = torch.randn(40, 24), routing.weight.detach()
    tensors = [x, gate_up, down, weight]
    clean = all_results(ours(routing), [t.clone().requires_grad_() for t in tensors], upstream)
    bad = routing.expert[:, 0] == 1
    tensors[0] = torch.where(bad[:, None], float("nan"), x)
    tensors[1:3] = (t.index_fill(0, torch.tensor([1]), float("inf")) for t in (gate_up, down))
    got = all_results(ours(routing), [t.requires_grad_() for t in tensors], upstream)
    healthy = torch.tensor([0, 2])
    for mine, other, rows in zip(got, clean, (~bad, ~bad, healthy, healthy, ~bad), strict=True):
        assert torch.equal(mine[rows], other[rows])
    assert got[0][bad].isnan().all()


# --- What is kept, what is needed, and where gradients go ---


@pytest.mark.parametrize(("activation", "H"), [("swiglu", 16), ("relu2", 8)])
def test_keeps_only_its_inputs_and_the_pre_activations(product, activation, H):
    T, E, K, M, I = SIZES["aligned"]
    routing = routing_of(T, E, K)
    x, gate_up, down = inputs(T, E, M, I, torch.float16, activation)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        moe_mlp(x, gate_up, down, routing, activation=activation)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    given_already = [gate_up, down, routing.weight, routing.token, routing.slot, routing.offsets]
    kept = sum(held.values()) - sum(held[t.untyped_storage().data_ptr()] for t in given_already)
    assert kept == 2 * T * M + 2 * T * K * H  # bytes


def test_any_subset_of_gradients(product):
    T, E, K, M, I = 9, 3, 2, 8, 4
    routing = routing_of(T, E, K)
    tensors = [t.detach() for t in (*inputs(T, E, M, I, torch.float32), routing.weight)]
    upstream = torch.randn(T, M)
    every = [t.clone().requires_grad_() for t in tensors]
    ours(routing)(*every).backward(upstream)
    for needs in itertools.product([True, False], repeat=4):
        if not any(needs):
            continue
        some = [t.clone().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
        ours(routing)(*some).backward(upstream)
        for t, other, need in zip(some, every, needs, strict=True):
            assert torch.equal(t.grad, other.grad) if need else t.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layer", [lambda t: t, transposed], ids=["dense", "transposed"])
def test_gradients_of_micro_batches_add_up_in_float32(product, layer, dtype):
    T, E, K, M, I = 12, 3, 2, 24, 8
    routing = routing_of(T, E, K, capacity=6, overflow="drop")
    x, gate_up, down = inputs(T, E, M, I, dtype)
    gate_up, down = (layer(t.detach()).requires_grad_() for t in (gate_up, down))
    sums = [layer(torch.full(t.shape, 0.5)) for t in (gate_up, down)]
    exact = [torch.full(t.shape, 0.5, dtype=torch.float64) for t in (gate_up, down)]
    for seed in range(2):
        upstream = torch.randn(T, M, generator=torch.Generator().manual_seed(seed)).to(dtype)
        out = moe_mlp(x, gate_up, down, routing, gradient_sums=tuple(sums))
        dx, dweight, *rest = torch.autograd.grad(
            out, [x, routing.weight, gate_up, down], upstream, allow_unused=True, retain_graph=True
        )
        assert rest == [None, None]
        plain = torch.autograd.grad(moe_mlp(x, gate_up, down, routing), [x, routing.weight, gate_up, down], upstream)
        assert torch.equal(dx, plain[0])
        assert torch.equal(dweight, plain[1])
        for total, gradient in zip(exact, plain[2:], strict=True):
            total += gradient
    for total, true in zip(sums, exact, strict=True):
        # Each addend above was rounded to dtype, the sums' were not.
        assert (total - true).norm() <= 4 * torch.finfo(dtype).eps * true.norm()
        if dtype == torch.float16:
            assert not torch.equal(total, total.half().float())


# --- Registration ---


def test_same_input_same_bits(product):
    T, E, K, M, I = SIZES["several_tiles"]
    routing = routing_of(T, E, K)
    tensors = [*inputs(T, E, M, I, torch.float32), routing.weight]
    upstream = torch.randn(T, M)
    first, second = (all_results(ours(routing), tensors, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_operators_are_registered_in_full(product, activation):
    T, E, K, M, I = 6, 3, 2, 8, 4
    routing = routing_of(T, E, K)
    x, gate_up, down = inputs(T, E, M, I, torch.float32, activation)
    pairs = routing.weight, routing.token, routing.slot, routing.offsets[1:]
    ops = torch.ops.ava_kernels
    torch.library.opcheck(ops.moe_mlp, (x, gate_up, down, *pairs, activation, None, None))
    no_grad = [t.detach() for t in (x, gate_up, transposed(down), *pairs)]
    torch.library.opcheck(ops.moe_mlp, (*no_grad, activation, None, None))
    _, h = ops.moe_mlp(*no_grad, activation, None, None)
    sums = [torch.zeros_like(t) for t in no_grad[1:3]]
    for needs, added in (([True] * 4, (None, None)), ([False, True, True, False], (None, None)), ([True] * 4, sums)):
        torch.library.opcheck(ops.moe_mlp_backward, (torch.randn(T, M), *no_grad, h, activation, needs, *added))


def test_compiles_as_a_whole_graph(product):
    T, E, K, M, I = SIZES["aligned"]
    logits = torch.randn(T, E)

    def block(x, gate_up, down):
        return moe_mlp(x * 2, gate_up, down, route(logits, K)).square().sum()

    eager, compiled = ([t.detach().requires_grad_() for t in inputs(T, E, M, I, torch.float32)] for _ in range(2))
    block(*eager).backward()
    torch.compile(block, fullgraph=True, backend="aot_eager")(*compiled).backward()
    for mine, other in zip(compiled, eager, strict=True):
        assert torch.equal(mine.grad, other.grad)


# --- Refusals ---


@pytest.mark.parametrize(
    ("x", "gate_up", "down"),
    [
        ((4, 7), (3, 6, 8), (3, 8, 3)),
        ((4, 8), (3, 5, 8), (3, 8, 2)),
        ((4, 8), (3, 6, 8), (3, 8, 4)),
        ((4, 8), (2, 6, 8), (2, 8, 3)),
        ((5, 8), (3, 6, 8), (3, 8, 3)),
        ((4, 8), (6, 8), (8, 3)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(x, gate_up, down):
    with pytest.raises(
        ValueError, match=r"a routing of 4 tokens over 3 experts do not fit: they must be \(T, M\), \(E, 2I"
    ):
        moe_mlp(torch.zeros(x), torch.zeros(gate_up), torch.zeros(down), routing_of(4, 3, 2))


def test_other_arguments_are_refused_by_name():
    routing = routing_of(4, 3, 2)
    x, gate_up, down = (t.detach() for t in inputs(4, 3, 8, 4, torch.float32))
    with pytest.raises(ValueError, match="routing is None; it must be a Routing, as route and routing_from make them"):
        moe_mlp(x, gate_up, down, None)
    with pytest.raises(ValueError, match="activation is 'tanh'; it must be one of swiglu, geglu, gelu, relu2"):
        moe_mlp(x, gate_up, down, routing, activation="tanh")
    with pytest.raises(ValueError, match=r"\(E, I, M\), \(E, M, I\), T and E for the activation relu2"):
        moe_mlp(x, gate_up, down, routing, activation="relu2")
    with pytest.raises(ValueError, match=r"gate_up torch.float16, down torch.float32; all three must be the same"):
        moe_mlp(x, gate_up.half(), down, routing)
    with pytest.raises(ValueError, match=r"gradient_sums: that of down is torch.float32 \(3, 8, 5\)"):
        moe_mlp(x, gate_up, down, routing, gradient_sums=(torch.zeros_like(gate_up), torch.zeros(3, 8, 5)))


@pytest.mark.parametrize("backend", [None, "triton"])
def test_triton_is_refused_where_it_cannot_run(monkeypatch, backend):
    """Whether the environment asks for it or the call."""
    routing, asked_by = routing_of(4, 3, 2), "backend is 'triton'"
    if backend is None:
        monkeypatch.setenv("AVA_KERNELS_BACKEND", "triton")
        asked_by = "AVA_KERNELS_BACKEND=triton"
    tensors = [t.detach() for t in inputs(4, 3, 8, 4, torch.float32)]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        RuntimeError, match=f"{asked_by}, but a tensor is on cpu: move it to a GPU, or set TRITON_INTER"
    ):
        moe_mlp(*tensors, routing, backend=backend)
    monkeypatch.setattr("ava_kernels.backend.HAS_TRITON", False)
    with pytest.raises(RuntimeError, match=f"{asked_by}, but triton is not installed"):
        moe_mlp(*tensors, routing, backend=backend)


@pytest.mark.parametrize("T", [4, 0])
def test_an_unknown_backend_is_refused_whatever_there_is_to_do(monkeypatch, T):
    routing = routing_of(T, 3, 2)
    monkeypatch.setenv("AVA_KERNELS_BACKEND", "cuda")
    with pytest.raises(ValueError, match="AVA_KERNELS_BACKEND is 'cuda'; it must be triton or torch"):
        moe_mlp(*inputs(T, 3, 8, 4, torch.float32), routing)


def test_autocast_chooses_the_dtype_as_it_does_for_products(product):
    routing = routing_of(6, 3, 2)
    x, gate_up, down = inputs(6, 3, 16, 8, torch.float32)
    with torch.autocast("cpu", dtype=torch.float16):
        out = moe_mlp(x, gate_up, down, routing)
        mixed = moe_mlp(x.half(), gate_up, down, routing)  # behind a product, beside weights in float32
        double = moe_mlp(x.double(), gate_up.double(), down.double(), routing)
    assert out.dtype == mixed.dtype == torch.float16
    assert torch.equal(out, moe_mlp(x.half(), gate_up.half(), down.half(), routing))
    assert torch.equal(out, mixed)
    assert double.dtype == torch.float64
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), [x, gate_up, down]))
