"""The product of two tiles, as all kernels in Triton make it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Whether kernels are interpreted: `triton.jit` asks the same where it decorates them.
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


def float32_is_exact() -> bool:
    """Whether float32 is multiplied as such, and not as TF32, by what torch was told; it refuses to answer in the words
    of one of its two ways to tell it after it was told in those of the other."""
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)  # since 2.9
    return torch.get_float32_matmul_precision() == "highest" if setting is None else setting != "tf32"


@triton.jit
def tile_dot(a, b, acc, PRECISION: tl.constexpr):
    """→ a (M, K) · b (K, N), added to acc (M, N) float32 unless that is None.

    Triton's interpreter keeps a bfloat16 as 16 bits of an integer, and multiplies the integers. In float32 a product of
    two of them is exact, as in a tensor core.
    """
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)
