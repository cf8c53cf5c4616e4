"""The counting sort against Python's own sort, on both backends."""

from __future__ import annotations

import pytest
import torch
from ava_kernels.routing.op import counting_sort
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("small_and_seeded")
INTEGERS = [torch.int16, torch.int32, torch.int64]


@pytest.fixture
def small_blocks(monkeypatch):
    """Few keys and bins need many blocks."""
    kernels = pytest.importorskip("ava_kernels.routing.kernels")
    for name, size in {"PAIRS": 8, "COLUMNS": 4, "ROWS": 2}.items():
        monkeypatch.setattr(kernels, name, size)


def check(key, bins):
    keys = key.tolist()
    inside = [k if 0 <= k < bins else bins for k in keys]
    order, count = counting_sort(key, bins)
    assert order.tolist() == sorted(range(len(keys)), key=lambda i: inside[i])  # Python's sort is stable
    assert count.tolist() == [keys.count(b) for b in range(bins)]
    assert (order.dtype, count.dtype) == (torch.int32, torch.int32)
    none, alone = counting_sort(key, bins, counts_only=True)
    assert none.shape == (0,)
    assert torch.equal(alone, count)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keys=st.lists(st.integers(-2, 9), max_size=40), bins=st.integers(1, 9), dtype=st.sampled_from(INTEGERS))
def test_order_is_stable_and_what_is_in_no_bin_comes_last(backend, small_blocks, keys, bins, dtype):
    check(torch.tensor(keys, dtype=dtype), bins)


@pytest.mark.parametrize(("N", "bins"), [(1, 1), (1, 1024), (513, 1), (700, 1024), (1025, 128)])
def test_sizes_about_those_of_blocks(backend, N, bins):
    check(torch.randint(-1, bins + 1, (N,), dtype=torch.int32), bins)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_keys_at_the_ends_of_their_dtype_are_in_no_bin(backend, dtype):
    info = torch.iinfo(dtype)
    check(torch.tensor([info.max, 1, info.min, 0, -1, 1], dtype=dtype), 2)
    if dtype == torch.int64:
        check(torch.tensor([2**32 + 1, 1, -(2**32), 0]), 2)  # in a bin, were they cut to int32


def test_keys_may_lie_apart(backend):
    keys = torch.randint(0, 5, (20, 3))
    check(keys[:, 1], 5)
    check(keys[0].expand(7, 3)[:, 2], 5)


def test_operator_is_registered_in_full(backend):
    key = torch.randint(-1, 5, (20,))
    torch.library.opcheck(torch.ops.ava_kernels.counting_sort, (key, 4))
    torch.library.opcheck(torch.ops.ava_kernels.counting_sort, (key.short()[::2], 4, True))


def test_plain_torch_reads_nothing_from_a_device(monkeypatch):
    monkeypatch.setenv("AVA_KERNELS_BACKEND", "torch")
    key = torch.zeros(9, dtype=torch.int32, device="meta")  # there is nothing to read
    order, count = counting_sort._init_fn(key, 4)  # the function behind the operator, which would not run it
    assert (order.shape, count.shape) == ((9,), (4,))


@pytest.mark.parametrize(
    ("key", "bins", "message"),
    [
        (torch.zeros(3), 4, "key is torch.float32"),
        (torch.zeros(3, 1, dtype=torch.int32), 4, r"shape \(3, 1\)"),
        (torch.zeros(1, dtype=torch.int32).expand(2**31), 4, r"shape \(2147483648,\)"),
        (torch.zeros(3, dtype=torch.int32), 0, "bins is 0"),
        (torch.zeros(3, dtype=torch.int32), 1025, "bins is 1025"),
    ],
)
def test_refuses_what_it_cannot_sort(key, bins, message):
    with pytest.raises(ValueError, match=message):
        counting_sort(key, bins)
