"""grouped_gemm's names over our grouped product: one matmul for each expert's rows, whatever their number.

    from ava_kernels.compat.grouped_gemm import backend, ops       # was: from grouped_gemm import backend, ops

    y = ops.gmm(x, w, batch_sizes)                    # x (N, M), w (E, M, P), batch_sizes (E,) → (N, P)
    y = ops.gmm(x, w, batch_sizes, trans_b=True)      # w (E, P, M)
    dw = backend.gmm(x, dy, batch_sizes, trans_a=True)  # x (N, M), dy (N, P) → (E, M, P)

The signatures are those of grouped_gemm 0.3.0 (Gale), which need not be installed.

What differs:
- Every float dtype, on the CPU too, of any strides; grouped_gemm takes contiguous bfloat16 on a GPU.
- `batch_sizes` may be int32 or int64, on the CPU or where `a` is, for any number of experts, all of them idle too.
- `backend.gmm` has a gradient, unless it writes into a given `c`.
"""

from ava_kernels.compat.grouped_gemm import backend, ops
from ava_kernels.compat.grouped_gemm.ops import gmm

__all__ = ["backend", "gmm", "ops"]
