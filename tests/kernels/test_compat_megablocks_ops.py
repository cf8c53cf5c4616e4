"""MegaBlocks' operations against loops over pairs and experts, most of them in float64.

Our kernels take no float64: their own tests are test_rows.py and test_counting_sort.py. Here they run where the type
allows, to show that the operations call them with the right arguments.
"""

from __future__ import annotations

import math

import pytest
import torch
from ava_kernels.compat.megablocks import ops
from ava_kernels.experts import rows as rows_module
from ava_kernels.routing import op as routing_op
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.usefixtures("small_and_seeded")
exact = {"rtol": 1e-10, "atol": 1e-12}


def metadata(experts, E):
    """Of a list of expert ids by pair: the same tensors as MegaBlocks makes of it."""
    top_expert = torch.tensor(experts, dtype=torch.int32)
    bin_ids, indices = ops.sort(top_expert, max(math.ceil(math.log2(E)), 1))
    return indices, bin_ids, ops.inclusive_cumsum(ops.histogram(top_expert, E), 0)


def by_expert(experts, E):
    """→ each expert's pairs, in order."""
    return [[pair for pair, expert in enumerate(experts) if expert == e] for e in range(E)]


def stacked(rows, H):
    return torch.stack(rows) if rows else torch.zeros(0, H, dtype=torch.float64)


def loop_gather(x, experts, E, K):
    return stacked([x[pair // K] for bin in by_expert(experts, E) for pair in bin], x.shape[1])


def loop_scatter(y, experts, E, K, weights):
    """y holds the rows of all pairs, by expert."""
    order = [pair for bin in by_expert(experts, E) for pair in bin]
    out = [torch.zeros(y.shape[1], dtype=y.dtype) for _ in range(len(experts) // K)]
    for row, pair in enumerate(order):
        out[pair // K] = out[pair // K] + (1.0 if weights is None else weights[pair]) * y[row]
    return stacked(out, y.shape[1])


def loop_binned_gather(x, experts, E, K, size):
    zero = torch.zeros(x.shape[1], dtype=x.dtype)
    bins = [[x[p // K] for p in bin[:size]] + [zero] * (size - len(bin)) for bin in by_expert(experts, E)]
    return stacked([row for bin in bins for row in bin], x.shape[1]).view(E, size, x.shape[1])


def loop_binned_scatter(y, experts, E, K, weights):
    out = [torch.zeros(y.shape[2], dtype=y.dtype) for _ in range(len(experts) // K)]
    for e, bin in enumerate(by_expert(experts, E)):
        for place, pair in enumerate(bin[: y.shape[1]]):
            out[pair // K] = out[pair // K] + (1.0 if weights is None else weights[pair]) * y[e, place]
    return stacked(out, y.shape[2])


@st.composite
def assignments(draw):
    """→ experts by pair, E, K: any number of tokens, also 0; often with empty experts, or one that has all."""
    T, K, E = draw(st.integers(0, 7)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    used = draw(st.integers(1, E))
    return draw(st.lists(st.integers(0, used - 1), min_size=T * K, max_size=T * K)), E, K


def same_with_gradients(ours, loop, leaves):
    got, truth = ours(*leaves), loop(*leaves)
    assert got.dtype == leaves[0].dtype
    torch.testing.assert_close(got, truth, **exact)
    upstream = torch.randn_like(got)
    wanted = [leaf for leaf in leaves if leaf is not None]
    if got.grad_fn is None or truth.grad_fn is None or not got.numel():
        return
    gradients = torch.autograd.grad(got, wanted, upstream, allow_unused=True)
    for a, b, leaf in zip(
        gradients, torch.autograd.grad(truth, wanted, upstream, allow_unused=True), wanted, strict=True
    ):
        torch.testing.assert_close(a, torch.zeros_like(leaf) if b is None else b, **exact)


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(problem=assignments(), size=st.integers(0, 6), weighted=st.booleans(), H=st.integers(1, 3))
def test_all_four_moves_and_their_gradients_are_the_loops(problem, size, weighted, H):
    experts, E, K = problem
    N = len(experts)
    indices, bin_ids, bins = metadata(experts, E)
    weights = leaf(N) if weighted else None

    same_with_gradients(
        lambda x: ops.gather(x, indices, bin_ids, bins, K), lambda x: loop_gather(x, experts, E, K), [leaf(N // K, H)]
    )
    same_with_gradients(
        lambda y, w: ops.scatter(y, indices, bin_ids, w, bins, K),
        lambda y, w: loop_scatter(y, experts, E, K, w),
        [leaf(N, H), weights],
    )
    same_with_gradients(
        lambda x: ops.binned_gather(x, indices, bins, size, K),
        lambda x: loop_binned_gather(x, experts, E, K, size),
        [leaf(N // K, H)],
    )
    same_with_gradients(
        lambda y, w: ops.binned_scatter(y, indices, w, bins, K),
        lambda y, w: loop_binned_scatter(y, experts, E, K, w),
        [leaf(E, size, H), weights],
    )


def test_gradients_by_finite_differences():
    experts, E, K = [2, 0, 2, 1, 2, 2, 0, 2], 4, 2  # expert 3 is idle, expert 2 overflows its bin of 3
    indices, bin_ids, bins = metadata(experts, E)
    check = torch.autograd.gradcheck
    assert check(lambda x: ops.gather(x, indices, bin_ids, bins, K), leaf(4, 3))
    assert check(lambda y, w: ops.scatter(y, indices, bin_ids, w, bins, K), (leaf(8, 3), leaf(8)))
    assert check(lambda x: ops.binned_gather(x, indices, bins, 3, K), leaf(4, 3))
    assert check(lambda y, w: ops.binned_scatter(y, indices, w, bins, K), (leaf(4, 3, 3), leaf(8)))


per_backend = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@per_backend
@given(
    rows=st.lists(st.lists(st.integers(-3, 9), min_size=5, max_size=5), min_size=1, max_size=3),
    max_val=st.integers(1, 8),
    dtype=st.sampled_from([torch.int16, torch.int32, torch.int64]),
)
def test_histogram_counts_each_row_and_leaves_out_what_is_out_of_range(backend, rows, max_val, dtype):
    expected = torch.tensor([[row.count(v) for v in range(max_val)] for row in rows], dtype=torch.int32)
    assert_identical(ops.histogram(torch.tensor(rows, dtype=dtype), max_val), expected)
    assert_identical(ops.histogram(torch.tensor(rows[0], dtype=dtype), max_val), expected[0])


@per_backend
@given(
    values=st.lists(st.integers(-40, 40), max_size=12),
    end_bit=st.one_of(st.none(), st.integers(1, 16)),
    dtype=st.sampled_from([torch.int16, torch.int32, torch.int64]),
)
def test_sort_is_stable_and_looks_at_the_low_bits_alone(backend, values, end_bit, dtype):
    everything = end_bit is None or end_bit == torch.iinfo(dtype).bits  # then the sign counts too
    key = (lambda v: v) if everything else (lambda v: v % 2**end_bit)
    order = sorted(range(len(values)), key=lambda i: key(values[i]))
    got, where = ops.sort(torch.tensor(values, dtype=dtype), end_bit)
    assert_identical(where, torch.tensor(order, dtype=dtype))
    assert_identical(got, torch.tensor([values[i] for i in order], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_sums_run_along_a_dimension_and_keep_the_dtype(dtype):
    x = torch.tensor([[3, 0, 2], [1, 5, 1]], dtype=dtype)
    assert_identical(ops.inclusive_cumsum(x, 1), torch.tensor([[3, 3, 5], [1, 6, 7]], dtype=dtype))
    assert_identical(ops.exclusive_cumsum(x, 1), torch.tensor([[0, 3, 3], [0, 1, 6]], dtype=dtype))
    assert_identical(ops.inclusive_cumsum(x, 0), torch.tensor([[3, 0, 2], [4, 5, 3]], dtype=dtype))
    assert_identical(ops.inclusive_cumsum(x[0], 0), torch.tensor([3, 3, 5], dtype=dtype))
    assert_identical(ops.exclusive_cumsum(x[0, :1], 0), torch.tensor([0], dtype=dtype))


def assert_identical(got, expected):
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert torch.equal(got, expected)


def test_more_bins_than_kernels_sort_are_torchs(backend):
    x = torch.tensor([1024, 5, 3000, 2**20 + 5, 1024], dtype=torch.int32)
    for end_bit, order in {10: [0, 4, 1, 3, 2], 11: [1, 3, 2, 0, 4]}.items():
        assert_identical(ops.sort(x, end_bit)[1], torch.tensor(order, dtype=torch.int32))
    for bins in (0, 1024, 1025, 3001):
        count = ops.histogram(x, bins)
        assert count.shape == (bins,)
        assert {value: n for value, n in enumerate(count.tolist()) if n} == {
            value: n for value, n in {5: 1, 1024: 2, 3000: 1}.items() if value < bins
        }


def test_integers_may_be_of_any_width(backend):
    experts, E, K = [1, 0, 1, 2, 0, 1], 3, 2
    indices, bin_ids, bins = metadata(experts, E)
    x, weights = torch.randn(3, 2), torch.rand(6)
    rows, binned = ops.gather(x, indices, bin_ids, bins, K), ops.binned_gather(x, indices, bins, 2, K)
    for dtype in (torch.int16, torch.int64):
        i, b, e = (t.to(dtype) for t in (indices, bin_ids, bins))
        assert torch.equal(ops.gather(x, i, b, e, K), rows)
        assert torch.equal(ops.binned_gather(x, i, e, 2, K), binned)
        assert torch.equal(
            ops.scatter(rows, i, b, weights, e, K), ops.scatter(rows, indices, bin_ids, weights, bins, K)
        )
        assert torch.equal(
            ops.binned_scatter(binned, i, weights, e, K), ops.binned_scatter(binned, indices, weights, bins, K)
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once_at_the_end(backend, dtype):
    T, K, E, H = 64, 8, 8, 16
    # Half a unit in the last digit; a whole one where Triton's interpreter cuts off digits. Adding in these dtypes is
    # many times as far off.
    cut_off = backend == "triton" and dtype == torch.bfloat16
    near = torch.finfo(dtype).eps * (1.0 if cut_off else 0.5)
    indices, bin_ids, bins = metadata(torch.randint(0, E, (T * K,)).tolist(), E)
    rows, weights = torch.randn(T * K, H).to(dtype), torch.rand(T * K)
    truth = loop_by_inverse(rows.double(), indices, weights.double(), K)
    out = ops.scatter(rows, indices, bin_ids, weights, bins, K)
    assert out.dtype == dtype
    assert ((out.double() - truth).abs() <= truth.abs() * near + 1e-5).all()

    x = torch.randn(T, H).to(dtype).requires_grad_()
    upstream = torch.randn(T * K, H).to(dtype)
    ops.gather(x, indices, bin_ids, bins, K).backward(upstream)
    truth = loop_by_inverse(upstream.double(), indices, torch.ones(T * K).double(), K)
    assert ((x.grad.double() - truth).abs() <= truth.abs() * near + 1e-5).all()


def loop_by_inverse(rows, indices, weights, K):
    by_pair = torch.empty_like(rows)
    by_pair[indices.long()] = rows
    return (by_pair * weights[:, None]).view(-1, K, rows.shape[1]).sum(1)


@pytest.mark.parametrize("size", [2, 5])
def test_moves_and_gradients_agree_with_float64_on_every_backend(backend, size):
    experts, E, K = [2, 0, 2, 1, 2, 2, 0, 2, 2, 1], 4, 2
    indices, bin_ids, bins = metadata(experts, E)
    for move, leaves in (
        (lambda x: ops.gather(x, indices, bin_ids, bins, K), [(5, 3)]),
        (lambda y: ops.scatter(y, indices, bin_ids, None, bins, K), [(10, 3)]),
        (lambda y, w: ops.scatter(y, indices, bin_ids, w, bins, K), [(10, 3), (10,)]),
        (lambda x: ops.binned_gather(x, indices, bins, size, K), [(5, 3)]),
        (lambda y, w: ops.binned_scatter(y, indices, w, bins, K), [(E, size, 3), (10,)]),
    ):
        exact_leaves = [leaf(*shape) for shape in leaves]
        float_leaves = [t.detach().float().requires_grad_() for t in exact_leaves]
        truth, got = move(*exact_leaves), move(*float_leaves)
        upstream = torch.randn_like(truth)
        torch.testing.assert_close(got, truth.float(), rtol=1e-6, atol=1e-6)
        expected = torch.autograd.grad(truth, exact_leaves, upstream)
        for a, b in zip(torch.autograd.grad(got, float_leaves, upstream.float()), expected, strict=True):
            torch.testing.assert_close(a, b.float(), rtol=1e-6, atol=1e-6)


def test_what_bins_leave_out_is_never_read(backend):
    experts, E, K = [0, 0, 0, 1], 2, 1
    indices, _, bins = metadata(experts, E)
    y = torch.randn(E, 2, 3)
    y[1, 1] = math.nan  # expert 1 has one pair, so its second row is nobody's
    weights = torch.ones(4, requires_grad=True)  # pair 2 is one too many for expert 0
    y.requires_grad_()
    out = ops.binned_scatter(y, indices, weights, bins, K)
    assert out[2].tolist() == [0.0] * 3
    assert out.isfinite().all()
    out.sum().backward()
    assert y.grad[1, 1].tolist() == [0.0] * 3
    assert weights.grad[2] == 0.0
    assert y.grad.isfinite().all()
    assert weights.grad.isfinite().all()


OURS = {name: getattr(rows_module, name)._init_fn for name in ("take_rows", "sum_rows", "dot_rows")}
OURS["counting_sort"] = routing_op.counting_sort._init_fn


class Recorder(TorchDispatchMode):
    """Names of the operations that add floats in an order that a GPU leaves open, or read the device."""

    UNORDERED = ("index_add", "index_put", "scatter_add", "scatter_reduce", "embedding_dense_backward", "_index_put")
    READS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero")

    def __init__(self, reads=READS):
        super().__init__()
        self.reads, self.found = reads, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in OURS:  # on a CPU they may look at values; their own tests show that they do not elsewhere
            with Recorder(reads=()) as inside:
                out = OURS[name](*args, **(kwargs or {}))
            self.found += inside.found
            return out
        floats = any(isinstance(a, torch.Tensor) and a.is_floating_point() for a in args)
        if name in self.reads or (floats and name.startswith(self.UNORDERED)):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_no_operation_adds_in_an_open_order_or_reads_the_device():
    experts, E, K = [2, 0, 2, 1, 2, 2, 0, 2], 4, 2
    x, weights = torch.randn(4, 3, requires_grad=True), torch.rand(8, requires_grad=True)
    with Recorder() as recorder:
        indices, bin_ids, bins = metadata(experts, E)
        rows = ops.gather(x, indices, bin_ids, bins, K)
        out = ops.scatter(rows, indices, bin_ids, weights, bins, K)
        binned = ops.binned_gather(x, indices, bins, 3, K)
        out = out + ops.binned_scatter(binned, indices, weights, bins, K)
        out.sum().backward()
        assert not recorder.found
        x[indices.long() // K].sum().item()  # and the recorder would have seen it
        x[indices.long() // K].sum().backward()
    assert "_local_scalar_dense" in recorder.found
    assert any("index_put" in name for name in recorder.found)


GOOD = {"x": torch.zeros(2, 3), "i": torch.arange(4), "b": torch.tensor([2, 4]), "w": torch.ones(4)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, i, b, w: ops.histogram(x, 3), "x is torch.float32 of shape"),
        (lambda x, i, b, w: ops.histogram(i.view(1, 2, 2), 3), r"\(1, 2, 2\)"),
        (lambda x, i, b, w: ops.sort(i.view(2, 2)), r"shape \(2, 2\)"),
        (lambda x, i, b, w: ops.sort(i, 65), "end_bit is 65"),
        (lambda x, i, b, w: ops.sort(i.int(), 0), "end_bit is 0"),
        (lambda x, i, b, w: ops.sort(torch.zeros(2**15 + 1, dtype=torch.int16)), "32769 elements"),
        (lambda x, i, b, w: ops.inclusive_cumsum(x, 0), "x is torch.float32"),
        (lambda x, i, b, w: ops.gather(x, i, i, b, 3), "top_k \\(3\\)"),
        (lambda x, i, b, w: ops.gather(x, i, i, b, 1), "2 tokens of top_k 1"),
        (lambda x, i, b, w: ops.gather(x[0], i, i, b, 2), "x is torch.float32 of shape"),
        (lambda x, i, b, w: ops.gather(x, x, i, b, 2), "indices is torch.float32"),
        (lambda x, i, b, w: ops.scatter(x, i, i, w, b, 2), "x has 2 rows"),
        (lambda x, i, b, w: ops.scatter(x, i[:2], i[:2], w, b, 2), "weights has the shape"),
        (lambda x, i, b, w: ops.binned_gather(x, i, b, -1, 2), "bin_size is -1"),
        (lambda x, i, b, w: ops.binned_gather(x, i, b[None], 1, 2), "bins has the shape"),
        (lambda x, i, b, w: ops.binned_scatter(x, i, w, b, 2), "3 dimensions"),
        (lambda x, i, b, w: ops.binned_scatter(x[:1, None], i, w, b, 2), "x has 1 bins"),
    ],
)
def test_operations_refuse_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call(**GOOD)
