"""The grouped product against a loop over experts, in PyTorch and on the interpreted kernels."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from ava_kernels import grouped_mm
from ava_kernels.backend import is_known

pytestmark = pytest.mark.usefixtures("small_and_seeded")

ENDS = [0, 3, 3, 20, 20]


def grouped_loop(x, w):
    spans = list(zip([0, *ENDS[:-1]], ENDS, strict=True))
    if x.dim() == w.dim() == 3:
        return torch.stack([x[e] @ w[e] for e in range(len(x))])
    if x.dim() == 3:
        return torch.cat([x[e] @ w[:, start:end] for e, (start, end) in enumerate(spans)], dim=1)
    if w.dim() == 2:
        return torch.stack([x[:, start:end] @ w[start:end] for start, end in spans])
    return torch.cat([x[start:end] @ w[e] for e, (start, end) in enumerate(spans)])


def wide(t):
    """The same values, eight elements apart."""
    return t.repeat_interleave(8, dim=-1)[..., ::8]


def all_results(function, tensors, upstream):
    out = function(*tensors)
    return [out, *torch.autograd.grad(out, tensors, upstream)]


def offs_for(x, w):
    return None if x.dim() == w.dim() == 3 else torch.tensor(ENDS, dtype=torch.int32)


def ours(x, w):
    return grouped_mm(x, w, offs=offs_for(x, w))


LAYOUTS = {
    "aligned": (lambda: torch.randn(20, 24), lambda: torch.randn(5, 24, 40)),
    "unaligned": (lambda: torch.randn(20, 7), lambda: torch.randn(5, 7, 3)),
    "unaligned_result": (lambda: torch.randn(20, 16), lambda: torch.randn(5, 3, 16).mT),
    "transposed": (lambda: torch.randn(16, 20).T, lambda: torch.randn(5, 8, 16).mT),
    "strided": (lambda: wide(torch.randn(20, 16)), lambda: wide(torch.randn(5, 16, 8))),
    "one_column": (lambda: torch.randn(20, 1), lambda: torch.randn(5, 1, 16)),
    "one_row_broadcast": (lambda: torch.randn(1, 16).expand(20, 16), lambda: torch.randn(1, 16, 8).expand(5, 16, 8)),
    "contracted": (lambda: torch.randn(20, 16).T, lambda: torch.randn(20, 24)),
    "contracted_unaligned": (lambda: torch.randn(20, 5).T, lambda: torch.randn(20, 3)),
    "contracted_strided": (lambda: wide(torch.randn(16, 20)), lambda: wide(torch.randn(20, 24))),
    "by_columns": (lambda: torch.randn(5, 24, 16), lambda: torch.randn(16, 20)),
    "by_columns_unaligned": (lambda: torch.randn(5, 3, 7), lambda: torch.randn(7, 20)),
    "by_columns_transposed": (lambda: torch.randn(5, 16, 8).mT, lambda: torch.randn(20, 16).T),
    "batched": (lambda: torch.randn(5, 6, 16), lambda: torch.randn(5, 16, 8)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_is_the_loop_in_pytorch(monkeypatch, layout, dtype):
    monkeypatch.setenv("AVA_KERNELS_BACKEND", "torch")
    assert_is_the_loop(layout, dtype)


@pytest.mark.parametrize("product", ["portable", "hopper"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_is_the_loop_on_the_kernels(product, layout, dtype):
    assert_is_the_loop(layout, dtype)


def assert_is_the_loop(layout, dtype):
    x, w = (make() for make in LAYOUTS[layout])
    x, w = x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()
    upstream = torch.randn_like(grouped_loop(x, w))
    got = all_results(ours, [x, w], upstream)
    same = all_results(grouped_loop, [x, w], upstream)
    exact = all_results(grouped_loop, [t.detach().double().requires_grad_() for t in (x, w)], upstream.double())
    for mine, peer, truth in zip(got, same, exact, strict=True):
        assert mine.dtype == dtype
        assert mine.shape == truth.shape
        floor = (1e-15 if dtype == torch.float64 else 1e-6) * truth.norm()
        assert (mine - truth).norm() <= 4 * (peer - truth).norm() + floor


FORMS = {  # shapes of x and w
    "rows": ((20, 16), (5, 16, 8)),
    "sums": ((16, 20), (20, 24)),
    "columns": ((5, 24, 16), (16, 20)),
    "batched": ((5, 24, 16), (5, 16, 8)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shapes", FORMS.values(), ids=FORMS.keys())
def test_is_torchs_own(product, monkeypatch, shapes, dtype):
    """Shapes, strides and dtypes, and values to twice what each may round."""
    monkeypatch.setitem(globals(), "ENDS", [0, 3, 3, 24, 24])  # it takes whole 16 bytes alone
    shapes = (tuple(24 if n == 20 else n for n in shape) for shape in shapes)
    x, w = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    options = {"offs": offs_for(x, w), "bias": None, "out_dtype": dtype}
    got, same = (f(x, w, **options) for f in (grouped_mm, F.grouped_mm))
    assert (got.shape, got.dtype, got.stride()) == (same.shape, same.dtype, same.stride())
    upstream = torch.randn_like(same)
    got, same = ([out, *torch.autograd.grad(out, [x, w], upstream)] for out in (got, same))
    for mine, other in zip(got, same, strict=True):
        assert (mine - other).norm() <= 2 * torch.finfo(dtype).eps * other.norm()


@pytest.mark.parametrize(("columns", "dtype"), [(16, torch.float32), (7, torch.float32), (16, torch.float16)])
def test_rows_of_no_expert_are_zero(product, columns, dtype):
    x, w = torch.randn(50, columns).to(dtype), torch.randn(5, columns, 24).to(dtype)
    x[20:] = float("nan")
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory is NaN before it is written
    try:
        out = ours(x, w)
        contracted = ours(x.T, x.nan_to_num())
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(out[:20], grouped_loop(x[:20], w), rtol=1e-2, atol=1e-2)
    assert out.shape == (50, 24)
    assert not out[20:].any()
    torch.testing.assert_close(contracted, grouped_loop(x[:20].T, x[:20]), rtol=1e-2, atol=1e-2)
    by_columns = ours(w.mT, x.T)
    torch.testing.assert_close(by_columns[:, :20], grouped_loop(w.mT, x[:20].T), rtol=1e-2, atol=1e-2)
    assert by_columns.shape == (24, 50)
    assert not by_columns[:, 20:].any()


@pytest.mark.parametrize("shapes", [((8, 4), (5, 4, 3)), ((4, 8), (8, 3)), ((5, 3, 4), (4, 8)), ((5, 2, 4), (5, 4, 3))])
def test_is_differentiable_twice(monkeypatch, shapes):
    monkeypatch.setenv("AVA_KERNELS_BACKEND", "torch")
    monkeypatch.setitem(globals(), "ENDS", [0, 3, 3, 8, 8])
    x, w = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    torch.autograd.gradcheck(ours, (x, w))
    torch.autograd.gradgradcheck(ours, (x, w))


def test_a_sum_sends_an_expanded_gradient_back(product):
    for shapes in FORMS.values():
        x, w = (torch.randn(shape, requires_grad=True) for shape in shapes)
        got = torch.autograd.grad(ours(x, w).sum(), [x, w])
        for mine, truth in zip(got, torch.autograd.grad(grouped_loop(x, w).sum(), [x, w]), strict=True):
            torch.testing.assert_close(mine, truth)


@pytest.mark.parametrize(
    ("shapes", "shape"),
    [
        (((0, 16), (5, 16, 8)), (0, 8)),
        (((20, 16), (5, 16, 0)), (20, 0)),
        (((16, 0), (0, 8)), (5, 16, 8)),
        (((5, 16, 8), (8, 0)), (16, 0)),
        (((5, 16, 0), (0, 8)), (16, 8)),
        (((5, 16, 0), (5, 0, 8)), (5, 16, 8)),
    ],
)
def test_nothing_to_multiply(product, shapes, shape):
    x, w = (torch.randn(size, requires_grad=True) for size in shapes)
    out = grouped_mm(x, w, offs=None if x.dim() == w.dim() == 3 else torch.zeros(5, dtype=torch.int32))
    assert out.shape == shape
    assert not out.any()
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert w.grad.shape == w.shape
    assert not w.grad.any()


@pytest.mark.parametrize(("dtype", "columns", "expected"), [("float32", 8, 1), ("float64", 8, 0), ("bfloat16", 4, 0)])
def test_aligned_operands_reach_the_fast_product(monkeypatch, dtype, columns, expected):
    monkeypatch.setenv("AVA_KERNELS_BACKEND", "torch")
    calls = []
    fast = F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *args, **kwargs: calls.append(1) or fast(*args, **kwargs))
    ours(*(torch.randn(s, dtype=getattr(torch, dtype)) for s in ((20, columns), (5, columns, 8))))
    assert len(calls) == expected


def test_operators_are_registered_in_full(product):
    offs = torch.tensor(ENDS, dtype=torch.int32)
    x, w = (torch.randn(shape) for shape in FORMS["columns"])
    for operands in (*(map(torch.randn, FORMS[form]) for form in ("rows", "sums")), (w.mT, x.mT)):
        operands = [t.detach().requires_grad_() for t in operands]
        torch.library.opcheck(torch.ops.ava_kernels.grouped_mm, (*operands, offs))


@pytest.mark.parametrize("shapes", FORMS.values(), ids=FORMS.keys())
def test_compiles_as_a_whole_graph(product, shapes):
    eager = [torch.randn(shape, requires_grad=True) for shape in shapes]
    compiled = [t.detach().clone().requires_grad_() for t in eager]
    ours(*eager).sum().backward()
    offs = offs_for(*eager)
    run = torch.compile(lambda x, w: grouped_mm(x, w, offs=offs), fullgraph=True, backend="aot_eager")
    run(*compiled).sum().backward()
    for mine, other in zip(compiled, eager, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.parametrize(
    ("x", "w", "offs", "message"),
    [
        ((4, 8), (3, 7, 8), torch.zeros(3, dtype=torch.int32), r"x \(4, 8\) and w \(3, 7, 8\) do not fit"),
        ((4, 8), (8,), torch.zeros(3, dtype=torch.int32), r"x \(4, 8\) and w \(8,\) do not fit"),
        ((4, 8), (3, 8, 8), torch.zeros(3), r"offs is torch.float32 of shape \(3,\); it must be int32 \(3,\)"),
        ((4, 8), (3, 8, 8), torch.zeros(2, dtype=torch.int32), r"of shape \(2,\); it must be int32 \(3,\)"),
        ((3, 4, 8), (8, 8), torch.zeros(2, dtype=torch.int32), r"of shape \(2,\); it must be int32 \(3,\)"),
        ((3, 4, 8), (2, 8, 8), None, r"x \(3, 4, 8\) and w \(2, 8, 8\) do not fit"),
        ((2, 3, 4, 8), (8, 8), None, r"x \(2, 3, 4, 8\) and w \(8, 8\) do not fit"),
        ((3, 4, 8), (3, 8, 8), torch.zeros(3, dtype=torch.int32), r"offs is given; with x \(3, 4, 8\) .* must be None"),
        ((4, 8), (3, 8, 8), None, r"offs is None; with x \(4, 8\) and w \(3, 8, 8\) it must be int32 \(3,\)"),
        ((4, 8), (8, 8), None, r"offs is None; .* it must be int32 \(E,\)"),
        ((3, 4, 8), (8, 8), None, r"offs is None; .* it must be int32 \(3,\)"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(x, w, offs, message):
    with pytest.raises(ValueError, match=message):
        grouped_mm(torch.zeros(x), torch.zeros(w), offs=offs)


@pytest.mark.parametrize("ends", [[1, 0, 4], [0, 2, 5], [-1, 2, 4]])
@pytest.mark.parametrize("w", [(3, 8, 8), (4, 8)])
def test_ends_that_are_none_are_refused(ends, w):
    x = torch.zeros(4, 8) if len(w) == 3 else torch.zeros(8, 4)
    with pytest.raises(ValueError, match=rf"offs is {re.escape(str(ends))}; it must say where .* the last at most 4"):
        grouped_mm(x, torch.zeros(w), offs=torch.tensor(ends, dtype=torch.int32))


@pytest.mark.parametrize(("checks", "known"), [(None, False), ("0", False), ("1", True)])
def test_numbers_on_a_gpu_are_looked_at_where_that_is_asked_for(monkeypatch, checks, known):
    monkeypatch.delenv("AVA_KERNELS_CHECK", raising=False)
    if checks is not None:
        monkeypatch.setenv("AVA_KERNELS_CHECK", checks)
    assert is_known(SimpleNamespace(is_cpu=False, is_cuda=True)) == known  # there is no GPU to have them on
    assert is_known(torch.zeros(3))
    assert not is_known(torch.zeros(3, device="meta"))


def test_two_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"x is torch.float16 and w is torch.float32; both must be the same"):
        grouped_mm(torch.zeros(4, 8).half(), torch.zeros(3, 8, 8), offs=torch.zeros(3, dtype=torch.int32))


def test_what_torch_refuses_is_refused_by_name():
    x, w = torch.zeros(3, 4, 8), torch.zeros(3, 8, 8)
    with pytest.raises(ValueError, match="bias is given; it must be None"):
        grouped_mm(x, w, bias=torch.zeros(8))
    with pytest.raises(ValueError, match=r"out_dtype is torch.float16; it must be x's, torch.float32, or None"):
        grouped_mm(x, w, out_dtype=torch.float16)


@pytest.mark.parametrize("shapes", [((4, 8), (3, 8, 8)), ((0, 8), (3, 8, 8)), ((3, 0, 8), (3, 8, 8))])
def test_an_unknown_backend_is_refused_whatever_there_is_to_do(monkeypatch, shapes):
    monkeypatch.setenv("AVA_KERNELS_BACKEND", "cuda")
    x, w = map(torch.zeros, shapes)
    with pytest.raises(ValueError, match="AVA_KERNELS_BACKEND is 'cuda'; it must be triton or torch"):
        grouped_mm(x, w, offs=torch.zeros(3, dtype=torch.int32) if x.dim() == 2 else None)
