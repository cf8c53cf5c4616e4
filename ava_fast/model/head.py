"""The output head: logits for generation, or the loss without ever holding all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Logits of one chunk: few enough to stay in a CPU's cache, enough rows to fill a GPU.
CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**27, "meta": 2**27}


class Head(nn.Linear):
    """x (…, M) → logits (…, V); with labels, → their mean cross-entropy."""

    def __init__(self, hidden_size: int, vocab_size: int):
        super().__init__(hidden_size, vocab_size, bias=False)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """labels int64, shaped as x without M; −100 is not scored. The loss is 0-d float32 (float64 for float64 x)."""
        if labels is None:
            return super().forward(x)
        wanted = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        return _LinearCrossEntropy.apply(x.flatten(0, -2), self.weight, labels.flatten(), wanted)


class _LinearCrossEntropy(torch.autograd.Function):
    """mean over t of logsumexp(W x_t) − (W x_t)[label_t], chunk by chunk, with both gradients on the way: the logits'
    gradient is known as soon as they are, so no chunk is computed twice or kept (the idea of Liger's fused linear
    cross-entropy, Hsu et al., 2024)."""

    @staticmethod
    def forward(ctx: Any, x_TM: Tensor, weight_VM: Tensor, labels_T: Tensor, wanted: bool) -> Tensor:
        dtype = torch.promote_types(x_TM.dtype, torch.float32)
        scored_T = labels_T >= 0
        scale = 1.0 / scored_T.sum().to(dtype)  # no scored label: 0 · inf = nan, as torch's cross_entropy
        loss = x_TM.new_zeros((), dtype=dtype)
        dx_TM = torch.empty_like(x_TM) if wanted else None
        dweight_VM = torch.zeros_like(weight_VM, dtype=dtype) if wanted else None
        rows = max(1, CHUNK_ELEMENTS[x_TM.device.type] // weight_VM.shape[0])
        for start in range(0, len(x_TM), rows):
            chunk = slice(start, start + rows)
            label_R1, scored_R1 = labels_T[chunk, None].clamp(min=0), scored_T[chunk, None]
            logits_RV = torch.mm(x_TM[chunk], weight_VM.mT).to(dtype)
            lse_R1 = logits_RV.logsumexp(-1, keepdim=True)
            loss += ((lse_R1 - logits_RV.gather(1, label_R1)) * scored_R1).sum()
            if dx_TM is not None and dweight_VM is not None:
                dlogits_RV = logits_RV.sub_(lse_R1).exp_()
                dlogits_RV.scatter_add_(1, label_R1, dlogits_RV.new_full((), -1.0).expand_as(label_R1))
                dlogits_RV = dlogits_RV.mul_(scale * scored_R1).to(x_TM.dtype)
                torch.mm(dlogits_RV, weight_VM, out=dx_TM[chunk])
                if dtype == x_TM.dtype:
                    dweight_VM.addmm_(dlogits_RV.mT, x_TM[chunk])
                else:
                    dweight_VM += torch.mm(dlogits_RV.mT, x_TM[chunk])
        if dx_TM is not None and dweight_VM is not None:
            ctx.save_for_backward(dx_TM, dweight_VM.to(weight_VM.dtype))
        return loss * scale

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dx_TM, dweight_VM = ctx.saved_tensors
        return dx_TM * dloss.to(dx_TM.dtype), dweight_VM * dloss.to(dweight_VM.dtype), None, None
