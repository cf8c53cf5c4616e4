"""The rotation in Triton: one launch, which reads and writes every element once.

A program rotates a block of heads' rows; a row is one head of one token. In a head the rotated pairs are its first and
second half, or interleaved its even and odd elements.

Shape suffixes: R rows of a block, P pairs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 4096  # of a block


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, position: Tensor | None, interleaved: bool, conjugate: bool, out: Tensor
) -> None:
    """`reference.rotate` of x (B, S, H, D) into out, which may be x. position (B, S) int, or None for 0 … S-1."""
    cos, sin = (t if t.stride(1) == 1 else t.contiguous() for t in (cos, sin))
    B, S, H, D = x.shape
    pairs = cos.shape[1]
    P = triton.next_power_of_2(max(pairs, 1))
    rest = D - 2 * pairs if out.data_ptr() != x.data_ptr() else 0
    R = max(1, min(ELEMENTS // (2 * P), triton.next_power_of_2(B * S * H)))
    if not x.numel():
        return
    _rotate[(triton.cdiv(B * S * H, R),)](
        x,
        *x.stride(),
        cos,
        sin,
        cos.stride(0),
        sin.stride(0),
        position,
        *(position.stride() if position is not None else (0, 0)),
        out,
        *out.stride(),
        B * S * H,
        S,
        H,
        pairs,
        rest,
        INTERLEAVED=interleaved,
        CONJUGATE=conjugate,
        P=P,
        REST=triton.next_power_of_2(rest) if rest > 0 else 0,
        R=R,
    )


@triton.jit
def _rotate(
    x_ptr, x_stride_b, x_stride_s, x_stride_h, x_stride_d, cos_ptr, sin_ptr, cos_stride, sin_stride,
    position_ptr, position_stride_b, position_stride_s,
    out_ptr, out_stride_b, out_stride_s, out_stride_h, out_stride_d, rows, S, H, pairs, rest,
    INTERLEAVED: tl.constexpr, CONJUGATE: tl.constexpr, P: tl.constexpr, REST: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    row_R = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    there_R = row_R < rows
    token_R = row_R // H
    b_R, s_R, h_R = token_R // S, token_R % S, row_R % H
    x_R = x_ptr + b_R * x_stride_b + s_R * x_stride_s + h_R * x_stride_h
    out_R = out_ptr + b_R * out_stride_b + s_R * out_stride_s + h_R * out_stride_h
    position_R = s_R
    if position_ptr is not None:
        where_R = position_ptr + b_R * position_stride_b + s_R * position_stride_s
        position_R = tl.load(where_R, mask=there_R, other=0).to(tl.int64)
    pair_P = tl.arange(0, P)
    there_RP = there_R[:, None] & (pair_P < pairs)[None, :]
    cos_RP = tl.load(cos_ptr + position_R[:, None] * cos_stride + pair_P[None, :], mask=there_RP, other=1.0)
    sin_RP = tl.load(sin_ptr + position_R[:, None] * sin_stride + pair_P[None, :], mask=there_RP, other=0.0)
    cos_RP, sin_RP = cos_RP.to(tl.float32), sin_RP.to(tl.float32)
    if CONJUGATE:
        sin_RP = -sin_RP
    if INTERLEAVED:
        column_C = tl.arange(0, 2 * P)
        there_RC = there_R[:, None] & (column_C < 2 * pairs)[None, :]
        x_RC = tl.load(x_R[:, None] + column_C[None, :] * x_stride_d, mask=there_RC, other=0.0).to(tl.float32)
        first_RP, second_RP = tl.split(tl.reshape(x_RC, (R, P, 2)))
        rotated_RC = tl.reshape(
            tl.join(first_RP * cos_RP - second_RP * sin_RP, second_RP * cos_RP + first_RP * sin_RP), (R, 2 * P)
        )
        rotated_RC = rotated_RC.to(out_ptr.dtype.element_ty)
        tl.store(out_R[:, None] + column_C[None, :] * out_stride_d, rotated_RC, mask=there_RC)
    else:
        x_RP = x_R[:, None] + pair_P[None, :] * x_stride_d
        first_RP = tl.load(x_RP, mask=there_RP, other=0.0).to(tl.float32)
        second_RP = tl.load(x_RP + pairs * x_stride_d, mask=there_RP, other=0.0).to(tl.float32)
        out_RP = out_R[:, None] + pair_P[None, :] * out_stride_d
        dtype = out_ptr.dtype.element_ty
        tl.store(out_RP, (first_RP * cos_RP - second_RP * sin_RP).to(dtype), mask=there_RP)
        tl.store(out_RP + pairs * out_stride_d, (second_RP * cos_RP + first_RP * sin_RP).to(dtype), mask=there_RP)
    if REST > 0:
        column_C = tl.arange(0, REST)
        there_RC = there_R[:, None] & (column_C < rest)[None, :]
        at_C = 2 * pairs + column_C
        x_RC = tl.load(x_R[:, None] + at_C[None, :] * x_stride_d, mask=there_RC, other=0.0)
        tl.store(out_R[:, None] + at_C[None, :] * out_stride_d, x_RC, mask=there_RC)
