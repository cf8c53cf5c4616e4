"""The grouped product against a loop over experts, in PyTorch and on the interpreted kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ava_kernels import grouped_mm

pytestmark = pytest.mark.usefixtures("small_and_seeded")

ENDS = [0, 3, 3, 20, 20]


def grouped_loop(x, w):
    spans = list(zip([0, *ENDS[:-1]], ENDS, strict=True))
    if w.dim() == 2:
        return torch.stack([x[:, start:end] @ w[start:end] for start, end in spans])
    return torch.cat([x[start:end] @ w[e] for e, (start, end) in enumerate(spans)])


def wide(t):
    """The same values, eight elements apart."""
    return t.repeat_interleave(8, dim=-1)[..., ::8]


def all_results(function, tensors, upstream):
    out = function(*tensors)
    return [out, *torch.autograd.grad(out, tensors, upstream)]


def ours(x, w):
    return grouped_mm(x, w, offs=torch.tensor(ENDS, dtype=torch.int32))


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


@pytest.mark.parametrize("shapes", [((8, 16), (5, 16, 8)), ((16, 8), (8, 24))])
def test_is_differentiable_twice(monkeypatch, shapes):
    monkeypatch.setenv("AVA_KERNELS_BACKEND", "torch")
    monkeypatch.setattr("tests.kernels.test_grouped_mm.ENDS", [0, 3, 3, 8, 8])
    x, w = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    torch.autograd.gradcheck(ours, (x, w))
    torch.autograd.gradgradcheck(ours, (x, w))


def test_a_sum_sends_an_expanded_gradient_back(product):
    x, w = torch.randn(20, 16, requires_grad=True), torch.randn(5, 16, 8, requires_grad=True)
    got = torch.autograd.grad(ours(x, w).sum(), [x, w])
    for mine, truth in zip(got, torch.autograd.grad(grouped_loop(x, w).sum(), [x, w]), strict=True):
        torch.testing.assert_close(mine, truth)


@pytest.mark.parametrize("shapes", [((0, 16), (5, 16, 8)), ((20, 16), (5, 16, 0)), ((16, 0), (0, 8))])
def test_nothing_to_multiply(product, shapes):
    x, w = (torch.randn(shape, requires_grad=True) for shape in shapes)
    out = grouped_mm(x, w, offs=torch.zeros(5, dtype=torch.int32))
    assert out.shape == ((len(x), w.shape[2]) if w.dim() == 3 else (5, 16, 8))
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
    for x, w in (((20, 16), (5, 16, 8)), ((16, 20), (20, 24))):
        operands = [torch.randn(shape, requires_grad=True) for shape in (x, w)]
        torch.library.opcheck(torch.ops.ava_kernels.grouped_mm, (*operands, offs))


def test_compiles_as_a_whole_graph(product):
    eager, compiled = ([torch.randn(20, 16), torch.randn(5, 16, 8)] for _ in range(2))
    for mine, other in zip(compiled, eager, strict=True):
        mine.copy_(other)
    pairs = [[t.requires_grad_() for t in tensors] for tensors in (eager, compiled)]
    ours(*pairs[0]).sum().backward()
    offs = torch.tensor(ENDS, dtype=torch.int32)
    torch.compile(lambda x, w: grouped_mm(x, w, offs=offs), fullgraph=True, backend="aot_eager")(
        *pairs[1]
    ).sum().backward()
    for mine, other in zip(compiled, eager, strict=True):
        assert torch.equal(mine.grad, other.grad)


@pytest.mark.parametrize(
    ("x", "w", "offs", "message"),
    [
        ((4, 8), (3, 7, 8), torch.zeros(3, dtype=torch.int32), r"x \(4, 8\) and w \(3, 7, 8\) do not fit"),
        ((4, 8), (8,), torch.zeros(3, dtype=torch.int32), r"x \(4, 8\) and w \(8,\) do not fit"),
        ((4, 8), (3, 8, 8), torch.zeros(3), r"offs is torch.float32 of shape \(3,\); it must be int32 \(3,\)"),
        ((4, 8), (3, 8, 8), torch.zeros(2, dtype=torch.int32), r"of shape \(2,\); it must be int32 \(3,\)"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(x, w, offs, message):
    with pytest.raises(ValueError, match=message):
        grouped_mm(torch.zeros(x), torch.zeros(w), offs=offs)


def test_two_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"x is torch.float16 and w is torch.float32; both must be the same"):
        grouped_mm(torch.zeros(4, 8).half(), torch.zeros(3, 8, 8), offs=torch.zeros(3, dtype=torch.int32))
