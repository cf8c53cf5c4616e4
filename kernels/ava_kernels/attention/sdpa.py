"""Attention as a rotation of its own and torch's fastest fused attention: the best there is where others' kernels are
faster than ours."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ava_kernels.rotary.op import apply_rotary

# On Hopper cuDNN's goes before FlashAttention 2, which torch would choose. It makes a plan for every new shape, which
# may take half a second; where a sequence grows token by token, each has a shape of its own.
OTHERS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
WHOLE = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, *OTHERS]
GROWING = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, *OTHERS]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    causal: bool,
    scale: float,
    interleaved: bool,
    position_ids: Tensor | None,
) -> Tensor:
    """`op.rope_attention` without windows, softcap, packing and lse. (B, S, H, D) all."""
    if cos is not None and sin is not None:
        q, k = (apply_rotary(t, cos, sin, interleaved=interleaved, position_ids=position_ids) for t in (q, k))
    S_q, S_k = q.shape[1], k.shape[1]
    options: dict[str, Any] = {}  # branches, as torch's attention refuses symbolic truths, which torch.compile has
    if q.shape[2] != k.shape[2]:
        options["enable_gqa"] = True
    if causal and S_q == S_k:
        options["is_causal"] = True
    elif causal and S_q > 1:  # torch's own causal mask is aligned to the top left
        options["attn_mask"] = torch.ones(S_q, S_k, dtype=torch.bool, device=q.device).tril(S_k - S_q)
    q_BHSD, k_BHSD, v_BHSD = (t.transpose(1, 2) for t in (q, k, v))
    with sdpa_kernel(WHOLE if S_q == S_k else GROWING, set_priority=True):
        return F.scaled_dot_product_attention(q_BHSD, k_BHSD, v_BHSD, scale=scale, **options).transpose(1, 2)
