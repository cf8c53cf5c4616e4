"""grouped_gemm's names against a loop over experts, on every dtype's own rounding."""

from __future__ import annotations

import pytest
import torch
from ava_kernels.compat import grouped_gemm
from ava_kernels.compat.grouped_gemm import backend, ops

pytestmark = pytest.mark.usefixtures("small_and_seeded")

SIZES = {  # rows by expert
    "skewed": [5, 1, 9, 2],
    "idle_experts": [0, 6, 0, 0, 3, 0],
    "one_has_all": [0, 8],
    "alone": [4],
    "no_rows": [0, 0, 0],
}
WIDTHS = [(16, 8), (7, 3)]  # M, P
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def loop(a, b, sizes, trans_a=False, trans_b=False):
    """One product for each expert, idle or not."""
    starts = [sum(sizes[:e]) for e in range(len(sizes))]
    rows = [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    if trans_a:
        return torch.stack([a[r].mT @ b[r] for r in rows])
    return torch.cat([a[r] @ (b[e].mT if trans_b else b[e]) for e, r in enumerate(rows)])


def leaves(sizes, M, P, trans_a, trans_b, dtype):
    shape = (sum(sizes), P) if trans_a else (len(sizes), P, M) if trans_b else (len(sizes), M, P)
    return [torch.randn(s).to(dtype).requires_grad_() for s in ((sum(sizes), M), shape)]


def results(function, tensors, expanded):
    out = function(*tensors)
    upstream = torch.ones_like(out[..., :1]).expand_as(out) if expanded else torch.ones_like(out).cumsum(-1).sin()
    return [out.detach(), *torch.autograd.grad(out, tensors, upstream)]


def check(function, tensors, sizes, expanded=False, **transposed):
    ours = results(function, tensors, expanded)
    exact = results(
        lambda a, b: loop(a, b, sizes, **transposed), [t.detach().double().requires_grad_() for t in tensors], expanded
    )
    peer = results(lambda a, b: loop(a, b, sizes, **transposed), tensors, expanded)
    for got, truth, same in zip(ours, exact, peer, strict=True):
        assert (got.shape, got.dtype) == (same.shape, same.dtype)
        rounding = torch.finfo(got.dtype).eps * truth.norm()
        assert (got - truth).norm() <= 4 * ((same - truth).norm() + rounding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "P"), WIDTHS)
@pytest.mark.parametrize("trans_b", [False, True])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_gmm_and_its_gradients_are_the_loop(sizes, trans_b, M, P, dtype):
    tensors = leaves(sizes, M, P, False, trans_b, dtype)
    check(
        lambda a, b: ops.gmm(a, b, torch.tensor(sizes), trans_b),
        tensors,
        sizes,
        expanded=sizes == SIZES["skewed"],  # as the gradient of a sum is
        trans_b=trans_b,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "P"), WIDTHS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_first_operand_transposed(sizes, M, P, dtype):
    tensors = leaves(sizes, M, P, True, False, dtype)
    check(lambda a, b: backend.gmm(a, b, torch.tensor(sizes), trans_a=True), tensors, sizes, trans_a=True)


def test_names_signatures_and_int32_sizes_are_taken():
    assert grouped_gemm.ops is ops
    assert grouped_gemm.backend is backend
    a, b = torch.randn(7, 8), torch.randn(2, 8, 4)
    truth = loop(a, b, [3, 4])
    for sizes in (torch.tensor([3, 4]), torch.tensor([3, 4], dtype=torch.int32)):
        for out in (
            grouped_gemm.gmm(a, b, sizes),
            ops.gmm(a, b, batch_sizes=sizes, trans_b=False),
            backend.gmm(a, b, sizes, False, False, None),
        ):
            torch.testing.assert_close(out, truth)


def test_writes_into_what_is_given():
    a, b, c = torch.randn(7, 8, requires_grad=True), torch.randn(2, 8, 4), torch.empty(7, 4)
    assert backend.gmm(a, b, torch.tensor([3, 4]), c=c) is c
    torch.testing.assert_close(c, loop(a, b, [3, 4]).detach())
    with pytest.raises(ValueError, match=r"c is torch.float32 of shape \(6, 4\)"):
        backend.gmm(a, b, torch.tensor([3, 4]), c=torch.empty(6, 4))


a, b, sizes = torch.zeros(7, 8), torch.zeros(2, 8, 4), torch.tensor([3, 4])


@pytest.mark.parametrize(
    ("named", "arguments", "options"),
    [
        ("trans_a and trans_b", (a, b, sizes), {"trans_a": True, "trans_b": True}),
        ("batch_sizes is torch.float32", (a, b, sizes.float()), {}),
        (r"batch_sizes is torch.int64 of shape \(1, 2\)", (a, b, sizes[None]), {}),
        (r"batch_sizes is \[3, 3\].*7 rows", (a, b, torch.tensor([3, 3])), {}),
        (r"batch_sizes is \[-1, 8\]", (a, b, torch.tensor([-1, 8])), {}),
        ("batch_sizes is on meta", (a, b, sizes.to("meta")), {}),
        ("a is torch.int64", (a.long(), b, sizes), {}),
        (r"a is torch.float32 of shape \(7, 8, 1\)", (a[..., None], b, sizes), {}),
        ("b is torch.float64", (a, b.double(), sizes), {}),
        (r"b has the shape \(2, 8, 4\).*\(2, P, 8\)", (a, b, sizes), {"trans_b": True}),
        (r"b has the shape \(2, 8, 4\).*\(3, 8, P\)", (a, b, torch.tensor([3, 4, 0])), {}),
        (r"b has the shape \(2, 8, 4\).*\(7, P\)", (a, b, sizes), {"trans_a": True}),
    ],
)
def test_errors_name_the_argument(named, arguments, options):
    with pytest.raises(ValueError, match=named):
        backend.gmm(*arguments, **options)
