"""torch's grouped product under its own names, over ours.

    from ava_kernels.compat.grouped_mm import grouped_mm     # was: from torch.nn.functional import grouped_mm

    y = grouped_mm(x, w, offs=ends)                          # x (N, M), w (E, M, P), ends (E,) int32 → (N, P)

The signature is that of torch 2.13.

What differs:
- Every float dtype, float64 too, of any strides and sizes; torch takes rows of whole 16 bytes.
- What no expert has is 0; torch leaves there what was in memory.
- The gradient of a sum, which is expanded, is taken too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ava_kernels.experts import op


def grouped_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    *,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`ava_kernels.grouped_mm`, which describes the four forms; its x is `mat_a` and its w `mat_b`.

    `bias` and another `out_dtype` than mat_a's are refused, as torch refuses them. Raises ValueError, naming the
    argument as `ava_kernels.grouped_mm` calls it.
    """
    return op.grouped_mm(mat_a, mat_b, offs=offs, bias=bias, out_dtype=out_dtype)
