"""`gmm`, as grouped_gemm.ops has it."""

from __future__ import annotations

from torch import Tensor

from ava_kernels.compat.grouped_gemm import backend


def gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
    """Expert e's rows of a, which follow those of expert e−1, times b[e].

    a (N, M), b (E, M, P), or (E, P, M) with `trans_b`, of one float dtype; batch_sizes (E,) int32 or int64, N in all →
    (N, P). Differentiable in a and b. `batch_sizes` is checked on the CPU; on a GPU it is not, and rows beyond its sum
    are 0. Raises ValueError, naming the argument.
    """
    return backend.gmm(a, b, batch_sizes, trans_b=trans_b)
