"""The product of two tiles, as all kernels in Triton make it."""

from __future__ import annotations

import triton
import triton.language as tl

# Whether kernels are interpreted: `triton.jit` asks the same where it decorates them.
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def tile_dot(a, b, acc, PRECISION: tl.constexpr):
    """→ a (M, K) · b (K, N), added to acc (M, N) float32 unless that is None.

    Triton's interpreter keeps a bfloat16 as 16 bits of an integer, and multiplies the integers. In float32 a product of
    two of them is exact, as in a tensor core.
    """
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)
