"""The experts' MLP and its gradients in plain PyTorch, expert by expert, so that what one needs stays in the cache.

Forward, for row n that token t sends to its choice k at expert e:
    h = W1_e x_t        a = silu(h_gate) · h_up        y_n = W2_e a        out_t = Σ_k weight_tk · y_n
Kept for backward are x and h alone: a is recomputed, and y is never needed, as
    d weight_tk = ⟨W2_eᵀ dout_t, a⟩.
(The scheme is that of Guo et al., 2025, "SonicMoE".)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def _has_aligned_rows(t: Tensor) -> bool:
    """Whether one of the last two dimensions is contiguous and the other's stride is whole 16 bytes."""
    (rows, columns), (row_stride, column_stride) = t.shape[-2:], t.stride()[-2:]
    if row_stride == 1 and column_stride >= max(1, rows):
        return column_stride * t.element_size() % 16 == 0
    return column_stride == 1 and row_stride >= max(1, columns) and row_stride * t.element_size() % 16 == 0


def grouped_mm(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    """`torch.nn.functional.grouped_mm` for every float dtype, size and stride: torch's own takes neither float64 nor
    rows that are no multiple of 16 bytes long. That slow path reads `offs` on the host."""
    aligned = _has_aligned_rows(x) and _has_aligned_rows(w) and w.shape[-1] * w.element_size() % 16 == 0
    if aligned and x.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return F.grouped_mm(x, w, offs=offs)
    ends = offs.tolist()
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    if w.dim() == 2:
        return torch.stack([x[:, start:end] @ w[start:end] for start, end in spans])
    return torch.cat([x[start:end] @ w[e] for e, (start, end) in enumerate(spans)])


def forward(
    x_TM: Tensor, gate_up_E2IM: Tensor, down_EMI: Tensor, weight_N: Tensor, token_N: Tensor, ends_E: Tensor
) -> tuple[Tensor, Tensor]:
    """→ out (T, M) and h (N, 2I), which backward needs. Everything else is no larger than one expert's rows."""
    out_TM = x_TM.new_zeros(x_TM.shape, dtype=_sum_dtype(x_TM))
    h_N2I = x_TM.new_empty(len(token_N), gate_up_E2IM.shape[1])
    for expert, rows in _rows_by_expert(ends_E):
        token_R = token_N[rows]
        h_R2I = torch.mm(x_TM.index_select(0, token_R), gate_up_E2IM[expert].mT, out=h_N2I[rows])
        gate_RI, up_RI = h_R2I.chunk(2, dim=-1)
        y_RM = torch.mm(F.silu(gate_RI).mul_(up_RI), down_EMI[expert].mT).to(out_TM.dtype)
        # A token is at an expert once, so the order of the sum is the order of the experts.
        out_TM.index_add_(0, token_R, y_RM.mul_(weight_N[rows, None]))
    return out_TM.to(x_TM.dtype), h_N2I


def backward(
    dout_TM: Tensor,
    x_TM: Tensor,
    gate_up_E2IM: Tensor,
    down_EMI: Tensor,
    weight_N: Tensor,
    token_N: Tensor,
    ends_E: Tensor,
    h_N2I: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """→ gradients of x, gate_up, down and weight_N."""
    dx_TM = x_TM.new_zeros(x_TM.shape, dtype=_sum_dtype(x_TM))
    dgate_up_E2IM, ddown_EMI = torch.empty_like(gate_up_E2IM), torch.empty_like(down_EMI)
    dweight_N = torch.zeros_like(weight_N)  # zero for dropped pairs, which come last
    idle_E = ends_E.diff(prepend=ends_E.new_zeros(1)) == 0
    dgate_up_E2IM[idle_E] = 0.0
    ddown_EMI[idle_E] = 0.0
    for expert, rows in _rows_by_expert(ends_E):
        token_R, weight_R1 = token_N[rows], weight_N[rows, None].to(x_TM.dtype)
        dout_RM = dout_TM.index_select(0, token_R)
        gate_RI, up_RI = h_N2I[rows].chunk(2, dim=-1)
        silu_RI = F.silu(gate_RI)
        a_RI = silu_RI * up_RI
        da_RI = torch.mm(dout_RM, down_EMI[expert])  # before the token's weight
        dweight_N[rows] = torch.linalg.vecdot(da_RI, a_RI).to(dweight_N.dtype)
        torch.mm(dout_RM.mT, a_RI.mul_(weight_R1), out=ddown_EMI[expert])
        da_RI.mul_(weight_R1)
        dh_R2I = torch.empty_like(h_N2I[rows])
        dgate_RI, dup_RI = dh_R2I.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(da_RI * up_RI, gate_RI, grad_input=dgate_RI)
        torch.mul(da_RI, silu_RI, out=dup_RI)
        torch.mm(dh_R2I.mT, x_TM.index_select(0, token_R), out=dgate_up_E2IM[expert])
        dx_TM.index_add_(0, token_R, torch.mm(dh_R2I, gate_up_E2IM[expert]).to(dx_TM.dtype))
    return dx_TM.to(x_TM.dtype), dgate_up_E2IM, ddown_EMI, dweight_N


def _rows_by_expert(ends_E: Tensor) -> Iterator[tuple[int, slice]]:
    """Every expert that has tokens, with its slice of the expert-sorted rows. Reads `ends_E` on the host."""
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end


def _sum_dtype(x: Tensor) -> torch.dtype:
    """A token's K terms are added in at least float32."""
    return torch.promote_types(x.dtype, torch.float32)
