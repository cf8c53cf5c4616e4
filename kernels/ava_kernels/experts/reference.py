"""The experts' MLP and its gradients in plain PyTorch, expert by expert, so that what one needs stays in the cache; or,
where what all of them need does, all at once.

Forward, for row n that token t sends to its choice k at expert e:
    h = W1_e x_t        a = act(h_gate) · h_up, or act(h)        y_n = W2_e a        out_t = Σ_k weight_tk · y_n
Kept for backward are x and h alone: a is recomputed, and y is never needed, as
    d weight_tk = ⟨W2_eᵀ dout_t, a⟩.
(The scheme is that of Guo et al., 2025, "SonicMoE".)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

GATED = ("swiglu", "geglu")
ACTIVATIONS = (*GATED, "gelu", "relu2")
SMALL = 20 * 2**20  # bytes of h that are computed at once (`python -m bench.experts`)


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
        out = F.grouped_mm(x, w, offs=offs)
    elif w.dim() == 3:
        out = x.new_empty(len(x), w.shape[2])
        for expert, rows in _rows_by_expert(offs):
            torch.mm(x[rows], w[expert], out=out[rows])
    else:
        out = x.new_zeros(len(offs), x.shape[0], w.shape[1])
        for expert, rows in _rows_by_expert(offs):
            torch.mm(x[:, rows], w[rows], out=out[expert])
    if w.dim() == 3 and not (out.is_cpu and offs[-1] == len(out)):  # looking is free on a CPU alone
        out.masked_fill_((torch.arange(len(out), device=out.device) >= offs[-1])[:, None], 0.0)
    return out


def forward(
    x_TM: Tensor,
    gate_up_EHM: Tensor,
    down_EMI: Tensor,
    weight_TK: Tensor,
    token_N: Tensor,
    slot_N: Tensor,
    ends_E: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """→ out (T, M) and h (N, H), which backward needs. Everything else is no larger than one expert's rows, unless all
    are small.

    H is 2I for gated activations, otherwise I.
    """
    out_TM = x_TM.new_zeros(x_TM.shape, dtype=_sum_dtype(x_TM))
    h_NH = x_TM.new_empty(len(token_N), gate_up_EHM.shape[1])
    weight_N = weight_TK[token_N, slot_N]
    for experts, rows in _shares(ends_E, h_NH):
        token_R = token_N[rows]
        x_RM = x_TM.index_select(0, token_R)
        if isinstance(experts, int):
            h_RH = torch.mm(x_RM, gate_up_EHM[experts].mT, out=h_NH[rows])
        else:
            h_RH = h_NH = grouped_mm(x_RM, gate_up_EHM.mT, ends_E)
        y_RM = _product(_activate(h_RH, activation), down_EMI[experts].mT, ends_E).to(out_TM.dtype)
        if isinstance(experts, int):  # a token is at an expert once: the order of the sum is the order of the experts
            out_TM.index_add_(0, token_R, y_RM.mul_(weight_N[rows, None]))
        else:
            out_TM = _sum_by_token(y_RM, token_N, slot_N, weight_TK)
    return out_TM.to(x_TM.dtype), h_NH


def backward(
    dout_TM: Tensor,
    x_TM: Tensor,
    gate_up_EHM: Tensor,
    down_EMI: Tensor,
    weight_TK: Tensor,
    token_N: Tensor,
    slot_N: Tensor,
    ends_E: Tensor,
    h_NH: Tensor,
    activation: str,
    needs: list[bool],
    gate_up_sum_EHM: Tensor | None,
    down_sum_EMI: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """→ gradients of x, gate_up, down and weight (T, K), None for those that are not needed.

    With sums given, the gradients of the weights are added to them.
    """
    needs_x, needs_gate_up, needs_down, needs_weight = needs
    dx_TM = x_TM.new_zeros(x_TM.shape, dtype=_sum_dtype(x_TM)) if needs_x else None
    dgate_up_EHM = _gradient(gate_up_EHM, gate_up_sum_EHM, ends_E) if needs_gate_up else None
    ddown_EMI = _gradient(down_EMI, down_sum_EMI, ends_E) if needs_down else None
    weight_N = weight_TK[token_N, slot_N]
    dweight_N = torch.zeros_like(weight_N)  # zero for dropped pairs, which come last
    for experts, rows in _shares(ends_E, h_NH):
        token_R, weight_R1 = token_N[rows], weight_N[rows, None].to(x_TM.dtype)
        dout_RM = dout_TM.index_select(0, token_R)
        h_RH = h_NH[rows]
        da_RI = _product(dout_RM, down_EMI[experts], ends_E)  # before the token's weight
        if needs_down or needs_weight:
            a_RI = _activate(h_RH, activation)
            dweight_N[rows] = torch.linalg.vecdot(da_RI, a_RI).to(dweight_N.dtype)
            if ddown_EMI is not None:
                a_RI.mul_(weight_R1)
                ddown_EMI = _contract(dout_RM, a_RI, ends_E, ddown_EMI, experts, down_sum_EMI is not None)
        if not (needs_x or needs_gate_up):
            continue
        dh_RH = _activate_backward(da_RI.mul_(weight_R1), h_RH, activation)
        if dgate_up_EHM is not None:
            x_RM = x_TM.index_select(0, token_R)
            dgate_up_EHM = _contract(dh_RH, x_RM, ends_E, dgate_up_EHM, experts, gate_up_sum_EHM is not None)
        if dx_TM is not None:
            dx_RM = _product(dh_RH, gate_up_EHM[experts], ends_E).to(dx_TM.dtype)
            if isinstance(experts, int):
                dx_TM.index_add_(0, token_R, dx_RM)
            else:
                dx_TM = _sum_by_token(dx_RM, token_N, slot_N, torch.ones_like(weight_TK))
    dweight_TK = torch.zeros_like(weight_TK)
    dweight_TK[token_N, slot_N] = dweight_N
    return (
        None if dx_TM is None else dx_TM.to(x_TM.dtype),
        dgate_up_EHM,
        ddown_EMI,
        dweight_TK if needs_weight else None,
    )


def _activate(h_RH: Tensor, activation: str) -> Tensor:
    """→ a (R, I), a tensor of its own."""
    if activation == "gelu":
        return F.gelu(h_RH)
    if activation == "relu2":
        return F.relu(h_RH).square_()
    gate_RI, up_RI = h_RH.chunk(2, dim=-1)
    return (F.silu(gate_RI) if activation == "swiglu" else F.gelu(gate_RI)).mul_(up_RI)


def _activate_backward(da_RI: Tensor, h_RH: Tensor, activation: str) -> Tensor:
    """→ dh (R, H)."""
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(da_RI, h_RH)
    if activation == "relu2":
        return F.relu(h_RH).mul_(da_RI).mul_(2.0)
    dh_RH = torch.empty_like(h_RH)
    (gate_RI, up_RI), (dgate_RI, dup_RI) = h_RH.chunk(2, dim=-1), dh_RH.chunk(2, dim=-1)
    if activation == "swiglu":
        torch.ops.aten.silu_backward.grad_input(da_RI * up_RI, gate_RI, grad_input=dgate_RI)
        torch.mul(da_RI, F.silu(gate_RI), out=dup_RI)
    else:
        torch.ops.aten.gelu_backward.grad_input(da_RI * up_RI, gate_RI, grad_input=dgate_RI)
        torch.mul(da_RI, F.gelu(gate_RI), out=dup_RI)
    return dh_RH


def _gradient(weight: Tensor, total: Tensor | None, ends_E: Tensor) -> Tensor:
    """Where a weight's gradient goes: every expert that has rows is still to be written."""
    if total is not None:
        return total
    gradient = torch.empty_like(weight)
    gradient[ends_E.diff(prepend=ends_E.new_zeros(1)) == 0] = 0.0
    return gradient


def _product(x_RL: Tensor, w: Tensor, ends_E: Tensor) -> Tensor:
    """Rows of one expert times its weight (L, P), or all rows times (E, L, P), 0 for those of no expert."""
    return torch.mm(x_RL, w) if w.dim() == 2 else grouped_mm(x_RL, w, ends_E)


def _sum_by_token(y_NM: Tensor, token_N: Tensor, slot_N: Tensor, weight_TK: Tensor) -> Tensor:
    """→ (T, M): each token's weighted rows of y, added in the order of its slots."""
    row_TK = torch.empty_like(weight_TK, dtype=torch.int64)
    row_TK[token_N, slot_N] = torch.arange(len(token_N), device=token_N.device)
    return F.embedding_bag(row_TK, y_NM, mode="sum", per_sample_weights=weight_TK.to(y_NM.dtype))


def _contract(x_RM: Tensor, y_RP: Tensor, ends_E: Tensor, out_EMP: Tensor, experts: int | slice, add: bool) -> Tensor:
    """→ out, its share of these experts set to, or increased by, x (R, M)ᵀ y (R, P) over each one's rows."""
    if isinstance(experts, int):
        if add:
            out_EMP[experts] += x_RM.mT @ y_RP
        else:
            torch.mm(x_RM.mT, y_RP, out=out_EMP[experts])
        return out_EMP
    product_EMP = grouped_mm(x_RM.mT, y_RP, ends_E)
    if add:
        return out_EMP.add_(product_EMP)
    return product_EMP if product_EMP.stride() == out_EMP.stride() else out_EMP.copy_(product_EMP)


def _shares(ends_E: Tensor, h_NH: Tensor) -> Iterator[tuple[int | slice, slice]]:
    """The experts that are computed together, one by one or all, and their rows."""
    if h_NH.is_cpu and h_NH.dtype == torch.float32 and h_NH.nbytes <= SMALL:
        yield slice(None), slice(None)
    else:
        yield from _rows_by_expert(ends_E)


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
