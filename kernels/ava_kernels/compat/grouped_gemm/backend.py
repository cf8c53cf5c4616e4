"""`gmm` with a transposed first operand as well, as grouped_gemm.backend has it."""

from __future__ import annotations

import torch
from torch import Tensor

from ava_kernels.experts.op import grouped_mm


def gmm(
    a: Tensor,
    b: Tensor,
    batch_sizes: Tensor,
    trans_a: bool = False,
    trans_b: bool = False,
    c: Tensor | None = None,
) -> Tensor:
    """`ops.gmm`, or with `trans_a` each expert's rows of a, transposed, times its rows of b.

    With `trans_a` a (N, M), b (N, P) → (E, M, P), 0 for an expert without rows. Into `c`, without a gradient, if that
    is given. Raises ValueError, naming the argument.
    """
    _check(a, b, batch_sizes, trans_a, trans_b)
    ends_E = batch_sizes.cumsum(0, dtype=torch.int32).to(a.device, non_blocking=True)
    out = grouped_mm(a.mT if trans_a else a, b.mT if trans_b else b, offs=ends_E)
    if c is None:
        return out
    if c.shape != out.shape or c.dtype != out.dtype:
        raise ValueError(
            f"c is {c.dtype} of shape {tuple(c.shape)}; the product is {out.dtype} of shape {tuple(out.shape)}"
        )
    with torch.no_grad():
        return c.copy_(out)


def _check(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_a: bool, trans_b: bool) -> None:
    if trans_a and trans_b:
        raise ValueError("trans_a and trans_b are both set: at most one operand can be transposed")
    if batch_sizes.dim() != 1 or batch_sizes.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"batch_sizes is {batch_sizes.dtype} of shape {tuple(batch_sizes.shape)}; it must be int64 or int32 (E,)"
        )
    E = len(batch_sizes)
    if a.dim() != 2 or not a.is_floating_point():
        raise ValueError(f"a is {a.dtype} of shape {tuple(a.shape)}; it must be floats (N, M)")
    N, M = a.shape
    if b.dtype != a.dtype or b.device != a.device:
        raise ValueError(f"b is {b.dtype} on {b.device}, a is {a.dtype} on {a.device}: they must be the same")
    if trans_a:
        fits, wanted = b.dim() == 2 and len(b) == N, f"({N}, P)"
    else:
        fits = b.dim() == 3 and len(b) == E and b.shape[2 if trans_b else 1] == M
        wanted = f"({E}, P, {M})" if trans_b else f"({E}, {M}, P)"
    if not fits:
        raise ValueError(
            f"b has the shape {tuple(b.shape)}; with a {tuple(a.shape)}, {E} batch_sizes, trans_a={trans_a} and "
            f"trans_b={trans_b} it must be {wanted}"
        )
    if batch_sizes.device.type == "cpu":
        sizes = batch_sizes.tolist()
        if min(sizes, default=0) < 0 or sum(sizes) != N:
            raise ValueError(f"batch_sizes is {sizes}; its sizes must be 0 or more and add up to the {N} rows of a")
    elif batch_sizes.device != a.device:
        raise ValueError(f"batch_sizes is on {batch_sizes.device}, a is on {a.device}: move it there, or to the CPU")
