"""torch's own grouped product by its own names."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from ava_kernels.compat.grouped_mm import grouped_mm

pytestmark = pytest.mark.usefixtures("small_and_seeded")

ends = torch.tensor([3, 3, 8], dtype=torch.int32)
FORMS = {  # shapes of the operands, and offs
    "rows": ((8, 16), (3, 16, 4), ends),
    "sums": ((16, 8), (8, 4), ends),
    "columns": ((3, 4, 16), (16, 8), ends),
    "batched": ((3, 4, 16), (3, 16, 8), None),
}


@pytest.mark.parametrize(("a", "b", "offs"), FORMS.values(), ids=FORMS.keys())
def test_is_torchs_own_with_gradients(a, b, offs):
    tensors = {name: torch.randn(shape, requires_grad=True) for name, shape in (("mat_a", a), ("mat_b", b))}
    results = []
    for function in (grouped_mm, F.grouped_mm):
        out = function(**tensors, offs=offs, bias=None, out_dtype=torch.float32)
        upstream = torch.ones_like(out).cumsum(-1).sin()
        results.append([out, *torch.autograd.grad(out, list(tensors.values()), upstream)])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other)


def test_has_torchs_parameters():
    ours, theirs = (inspect.signature(f).parameters.values() for f in (grouped_mm, F.grouped_mm))
    assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs]


def test_takes_what_torch_does_not():
    a, b = torch.randn(8, 7, dtype=torch.float64, requires_grad=True), torch.randn(3, 7, 5, dtype=torch.float64)
    out = grouped_mm(a, b, offs=ends - 1)
    assert not out[7:].any()
    out.sum().backward()
    torch.testing.assert_close(a.grad[:2], b[0].sum(1).expand(2, 7))
    with pytest.raises(ValueError, match="bias is given"):
        grouped_mm(a, b, offs=ends, bias=torch.zeros(5))
