"""What the tests of kernels change in Triton's interpreter: an overflow ends a kernel; functions call each other;
programs run in any order."""

from __future__ import annotations

import os

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from quick_interpreter import ORDER  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton was told not to interpret")


@triton.jit
def _combined(a, b, KIND: tl.constexpr):
    if KIND == "add":
        c = a + b
    elif KIND == "sub":
        c = a - b
    else:
        c = a * b
    return c


@triton.jit
def _combine(a_ptr, b_ptr, out_ptr, KIND: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, _combined(tl.load(a_ptr + at), tl.load(b_ptr + at), KIND))


@pytest.mark.parametrize(
    ("kind", "a", "b", "result"),
    [
        ("add", 2**31 - 2, 1, 2**31 - 1),
        ("add", 2**31 - 1, 1, None),
        ("sub", -(2**31), 1, None),
        ("mul", 2**16, 2**15, None),
        ("mul", -(2**16), 2**15, -(2**31)),
    ],
)
def test_an_int32_that_overflows_ends_the_kernel(kind, a, b, result):
    numbers = [torch.tensor([0, n, 0, 1], dtype=torch.int32) for n in (a, b)]
    out = torch.zeros(4, dtype=torch.int32)
    if result is None:
        with pytest.raises(Exception, match=f"int32 overflow detected for operation {kind}"):
            _combine[(1,)](*numbers, out, KIND=kind, N=4)
        return
    _combine[(1,)](*numbers, out, KIND=kind, N=4)
    assert out[1] == result


@triton.jit
def _count(next_ptr, seen_ptr):
    at = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
    tl.store(seen_ptr + at, tl.load(next_ptr))
    tl.store(next_ptr, tl.load(next_ptr) + 1)


def test_programs_run_once_each_in_an_order_of_the_launch():
    def order() -> list[int]:
        seen = torch.full((2 * 3 * 4,), -1, dtype=torch.int32)
        _count[(2, 3, 4)](torch.zeros(1, dtype=torch.int32), seen)
        return seen.tolist()

    ORDER.seed(1)
    first, second = order(), order()
    assert sorted(first) == sorted(second) == list(range(24))
    assert first != second != list(range(24))
    ORDER.seed(1)
    assert order() == first
