"""Moving rows, on both backends, against loops over pairs; the kernels against plain torch, bit by bit."""

from __future__ import annotations

import math

import pytest
import torch
from ava_kernels.experts import rows as rows_module
from ava_kernels.experts.rows import dot_rows, sum_rows, take_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("small_and_seeded")


@pytest.fixture
def small_blocks(monkeypatch):
    """Few rows and columns need many blocks."""
    kernels = pytest.importorskip("ava_kernels.experts.row_kernels")
    for name, size in {"COLUMNS": 4, "ELEMENTS": 8}.items():
        monkeypatch.setattr(kernels, name, size)


# --- Values ---


def loop_take(x, pair, K, weight):
    out = torch.zeros(len(pair), x.shape[1], dtype=torch.float64)
    for r, p in enumerate(pair.tolist()):
        if 0 <= p < len(x) * K:
            out[r] = (1.0 if weight is None else weight[p].double()) * x[p // K].double()
    return out


def loop_sum(x, row, weight):
    out = torch.zeros(len(row), x.shape[1], dtype=torch.float64)
    for t, row_K in enumerate(row.tolist()):
        for k, r in enumerate(row_K):
            if 0 <= r < len(x):
                out[t] += (1.0 if weight is None else weight[t, k].double()) * x[r].double()
    return out


def loop_dot(x, row, y):
    out = torch.zeros(row.shape, dtype=torch.float64)
    for t, row_K in enumerate(row.tolist()):
        for k, r in enumerate(row_K):
            if 0 <= r < len(x):
                out[t, k] = x[r].double() @ y[t].double()
    return out


@st.composite
def problems(draw):
    """→ T, R, H, pair (R,), row (T, K): some of either are out of range, and some occur twice or never."""
    T, R, K, H = (draw(st.integers(low, high)) for low, high in ((0, 6), (0, 9), (1, 3), (1, 9)))
    integer = draw(st.sampled_from([torch.int32, torch.int64]))
    pair = draw(st.lists(st.integers(-1, T * K), min_size=R, max_size=R))
    row = draw(st.lists(st.integers(-1, R), min_size=T * K, max_size=T * K))
    return T, R, H, torch.tensor(pair, dtype=integer), torch.tensor(row, dtype=integer).view(T, K)


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def check(got, truth, dtype, exact=False):
    """A sum of few terms of size 1 in float32 or more, rounded to its dtype; exact: nothing but a copy."""
    assert got.dtype == dtype
    digits = torch.finfo(dtype).eps
    tolerance = 0 if exact else 16 * min(digits, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(got.double(), truth, rtol=0 if exact else digits, atol=tolerance)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problem=problems(), dtype=st.sampled_from(DTYPES), weighted=st.booleans())
def test_all_three_are_the_loops(backend, small_blocks, problem, dtype, weighted):
    T, R, H, pair, row = problem
    K = row.shape[1]
    tokens, rows = torch.randn(T, H).to(dtype), torch.randn(R, H).to(dtype)
    weight = torch.randn(T, K, dtype=torch.promote_types(dtype, torch.float32)) if weighted else None
    flat = None if weight is None else weight.flatten()
    check(take_rows(tokens, pair, K, flat), loop_take(tokens, pair, K, flat), dtype, exact=not weighted)
    check(sum_rows(rows, row, weight), loop_sum(rows, row, weight), dtype)
    check(dot_rows(rows, row, tokens), loop_dot(rows, row, tokens), torch.promote_types(dtype, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("H", [1, 512, 515])  # a block has at most 512 columns
def test_kernels_give_the_bits_of_plain_torch(triton_backend, monkeypatch, dtype, H):
    T, K, R = 17, 3, 40
    tokens, rows = torch.randn(T, H).to(dtype), torch.randn(R, H).to(dtype)
    pair, row = torch.randint(-1, T * K + 1, (R,)), torch.randint(-1, R + 1, (T, K))
    taken, added = take_rows(tokens, pair, K), sum_rows(rows, row)
    monkeypatch.setenv("AVA_KERNELS_BACKEND", "torch")
    assert torch.equal(taken, take_rows(tokens, pair, K))
    if dtype != torch.bfloat16:  # the interpreter cuts its digits off where a GPU rounds
        assert torch.equal(added, sum_rows(rows, row))


def test_sums_are_in_float32_and_in_the_order_of_choices(backend):
    x = torch.tensor([2.0**12, 1.0, -(2.0**12), 2.0**-24], dtype=torch.float16)[:, None]  # float16 has 11 digits,
    assert sum_rows(x, torch.tensor([[0, 1, 2]])).item() == 1.0
    assert sum_rows(x, torch.tensor([[1, 1]]), torch.tensor([[2.0**12 + 1, -(2.0**12)]])).item() == 1.0
    assert take_rows(x, torch.tensor([3]), 1, torch.tensor([0.0, 0.0, 0.0, 2.0**20])).item() == 2.0**-4  # and 5 bits
    assert dot_rows(x, torch.tensor([[0]]), torch.tensor([[2.0**12]], dtype=torch.float16)).item() == 2.0**24
    x = torch.tensor([[2.0**24], [1.0], [-(2.0**24)]])  # float32 has 24
    assert sum_rows(x, torch.tensor([[0, 1, 2], [0, 2, 1], [1, 0, 2]])).flatten().tolist() == [0.0, 1.0, 0.0]


def test_what_is_out_of_range_is_never_read(backend):
    x, y = torch.full((3, 5), math.nan), torch.randn(3, 5)
    x[1] = 1.0
    weight = torch.tensor([math.nan, math.nan, 2.0, math.nan, math.nan, math.nan])
    taken = take_rows(x, torch.tensor([6, 2, -1, 7]), 2, weight)
    assert taken.tolist() == [[0.0] * 5, [2.0] * 5, [0.0] * 5, [0.0] * 5]
    row = torch.tensor([[3, 3], [1, -1], [4, 3]])
    assert sum_rows(x, row, weight.view(3, 2)).tolist() == [[0.0] * 5, [2.0] * 5, [0.0] * 5]
    y[0] = y[2] = math.nan
    dots = dot_rows(x, row, y)
    torch.testing.assert_close(dots[1, 0], y[1].sum())
    assert dots.flatten().tolist()[:2] + dots.flatten().tolist()[3:] == [0.0] * 5


@pytest.mark.parametrize(("T", "R"), [(0, 0), (0, 4), (3, 0)])
def test_nothing_to_move(backend, T, R):
    pair, row = torch.full((R,), 2 * T), torch.full((T, 2), R)
    weight, x = torch.ones(T, 2), torch.randn(T, 5)
    assert torch.equal(take_rows(x, pair, 2, weight.flatten()), torch.zeros(R, 5))
    assert torch.equal(sum_rows(torch.randn(R, 5), row, weight), torch.zeros(T, 5))
    assert torch.equal(dot_rows(torch.randn(R, 5), row, x), torch.zeros(T, 2))
    assert torch.equal(dot_rows(torch.randn(R, 0), row, x[:, :0]), torch.zeros(T, 2))
    assert sum_rows(torch.randn(R, 0), row).shape == (T, 0)


# --- Layouts ---

LAYOUTS = {
    "rows apart": lambda: torch.randn(6, 2, 5)[:, 1],
    "part of rows": lambda: torch.randn(6, 9)[:, 2:7],
    "columns": lambda: torch.randn(5, 6).T,
    "one row": lambda: torch.randn(5).expand(6, 5),
    "one number": lambda: torch.randn(()).expand(6, 5),
    "backwards": lambda: torch.randn(6, 5).flip(0)[::2].expand(3, 5),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout):
    x = LAYOUTS[layout]()
    T, K, dense = len(x), 2, x.clone(memory_format=torch.contiguous_format)
    index = torch.randint(0, T + 1, (T, 2 * K), dtype=torch.int32)[:, ::2]
    weight = torch.randn(T, 3, K)[:, 1]
    pair = torch.randint(0, T * K, (9, 2))[:, 1]
    assert torch.equal(take_rows(x, pair, K), take_rows(dense, pair.clone(), K))
    flat = torch.randn(T * K, 2)[:, 0]
    assert torch.equal(take_rows(x, pair, K, flat), take_rows(dense, pair, K, flat.clone()))
    assert torch.equal(sum_rows(x, index, weight), sum_rows(dense, index.clone(), weight.clone()))
    assert torch.equal(dot_rows(x, index, x), dot_rows(dense, index.clone(), dense))


def test_offsets_may_pass_31_bits(backend):
    try:  # memory that is never touched costs nothing
        storage = torch.empty(2**32 + 8, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("no 8 GiB of address space")
    # Row 2 is 2^31 elements behind row 0; with 32 bits it would be as far before it.
    x = storage.as_strided((3, 5), (2**30, 1), 2**31)
    x.copy_(torch.arange(15).view(3, 5))
    pair, row = torch.tensor([5, 0], dtype=torch.int32), torch.tensor([[2, 2], [0, 2], [3, 3]], dtype=torch.int32)
    assert torch.equal(take_rows(x, pair, 2), x[[2, 0]])
    assert torch.equal(sum_rows(x, row), torch.stack([2 * x[2], x[0] + x[2], 0 * x[0]]))
    expected = loop_dot(x, row, x).float()
    assert torch.equal(dot_rows(x, row, x.contiguous()), expected)
    assert torch.equal(dot_rows(x.contiguous(), torch.full((3, 1), 2), x)[2], (x[2].float() @ x[2].float())[None])


# --- Registration ---


def test_the_same_input_gives_the_same_bits(backend):
    x, row = torch.randn(40, 130).bfloat16(), torch.randint(0, 41, (40, 5))
    weight, pair = torch.randn(40, 5), torch.randint(0, 201, (90,))
    for call in (
        lambda: take_rows(x, pair, 5, weight.flatten()),
        lambda: sum_rows(x, row, weight),
        lambda: dot_rows(x, row, x),
    ):
        assert torch.equal(call(), call())


def test_operators_are_registered_in_full(backend):
    x, row, weight = torch.randn(4, 5).half(), torch.randint(0, 5, (4, 2)), torch.randn(4, 2)
    ops = torch.ops.ava_kernels
    torch.library.opcheck(ops.take_rows, (x, torch.randint(0, 9, (6,)), 2, weight.flatten()))
    torch.library.opcheck(ops.take_rows, (x.T, torch.randint(0, 11, (6,)), 2))
    torch.library.opcheck(ops.sum_rows, (x, row, weight))
    torch.library.opcheck(ops.sum_rows, (x[:, ::2], row.int()))
    torch.library.opcheck(ops.dot_rows, (x, row, x))


def test_plain_torch_reads_nothing_from_a_device(monkeypatch):
    monkeypatch.setenv("AVA_KERNELS_BACKEND", "torch")
    # There is nothing to read in meta tensors. The functions are called behind the operators, which would not run them.
    x, row = torch.empty(4, 5, device="meta"), torch.zeros(4, 2, dtype=torch.int64, device="meta")
    weight = torch.empty(4, 2, device="meta")
    assert rows_module.take_rows._init_fn(x, row.flatten(), 2, weight.flatten()).shape == (8, 5)
    assert rows_module.sum_rows._init_fn(x, row, weight).shape == (4, 5)
    assert rows_module.dot_rows._init_fn(x, row, x).shape == (4, 2)
