"""The experts' MLP and its gradients in plain PyTorch, by grouped matrix products over expert-sorted rows.

Forward, for row n that token t sends to its choice k at expert e:
    h = W1_e x_t        a = silu(h_gate) · h_up        y_n = W2_e a        out_t = Σ_k weight_tk · y_n
Kept for backward are x and h alone: a is recomputed, and y is never needed, as
    d weight_tk = ⟨W2_eᵀ dout_t, a⟩.
(The scheme is that of Guo et al., 2025, "SonicMoE".)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rows_of_choices(token: Tensor, slot: Tensor, top_k: int) -> Tensor:
    """(T, K) → where each choice stands among the expert-sorted rows: the inverse of (token, slot)."""
    rows = torch.empty_like(token)
    rows[token * top_k + slot] = torch.arange(token.numel(), device=token.device)
    return rows.view(-1, top_k)


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
    x_TM: Tensor,
    gate_up_E2IM: Tensor,
    down_EMI: Tensor,
    weight_TK: Tensor,
    token_N: Tensor,
    rows_TK: Tensor,
    ends_E: Tensor,
) -> tuple[Tensor, Tensor]:
    """→ out (T, M) and h (N, 2I), which backward needs."""
    h_N2I = grouped_mm(x_TM[token_N], gate_up_E2IM.mT, ends_E)
    gate_NI, up_NI = h_N2I.chunk(2, dim=-1)
    y_NM = grouped_mm(F.silu(gate_NI).mul_(up_NI), down_EMI.mT, ends_E)
    out_TM = torch.bmm(weight_TK.to(y_NM.dtype)[:, None, :], y_NM[rows_TK])[:, 0]
    return out_TM, h_N2I


def backward(
    dout_TM: Tensor,
    x_TM: Tensor,
    gate_up_E2IM: Tensor,
    down_EMI: Tensor,
    weight_TK: Tensor,
    token_N: Tensor,
    rows_TK: Tensor,
    ends_E: Tensor,
    h_N2I: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """→ gradients of x, gate_up, down and weight."""
    weight_N = torch.empty_like(weight_TK).view(-1)
    weight_N[rows_TK.view(-1)] = weight_TK.reshape(-1)
    weight_N1 = weight_N[:, None].to(h_N2I.dtype)

    dout_NM = dout_TM[token_N]
    gate_NI, up_NI = h_N2I.chunk(2, dim=-1)
    sigmoid_NI = gate_NI.sigmoid()
    silu_NI = gate_NI * sigmoid_NI
    a_NI = silu_NI * up_NI
    da_NI = grouped_mm(dout_NM, down_EMI, ends_E)  # before the token's weight
    dweight_N = torch.linalg.vecdot(da_NI, a_NI).to(weight_TK.dtype)
    da_NI.mul_(weight_N1)

    ddown_EMI = grouped_mm(dout_NM.mT, a_NI.mul_(weight_N1), ends_E)
    dh_N2I = torch.empty_like(h_N2I)
    dgate_NI, dup_NI = dh_N2I.chunk(2, dim=-1)
    torch.mul(da_NI, silu_NI, out=dup_NI)
    # d silu(g)/dg = σ(g) · (1 + g · (1 − σ(g))) = σ(g) + silu(g) · (1 − σ(g))
    torch.addcmul(sigmoid_NI, silu_NI, 1 - sigmoid_NI, out=dgate_NI).mul_(up_NI).mul_(da_NI)
    dgate_up_E2IM = grouped_mm(dh_N2I.mT, x_TM[token_N], ends_E)
    dx_NM = grouped_mm(dh_N2I, gate_up_E2IM, ends_E)
    dx_TM = dx_NM[rows_TK].sum(1)
    return dx_TM, dgate_up_E2IM, ddown_EMI, dweight_N[rows_TK]
