"""Multi-head or grouped-query attention with rotary positions and optional query/key normalisation."""

from __future__ import annotations

import torch
from ava_kernels import apply_rotary, rope_attention
from torch import Tensor, nn

from ava_fast.config import Config
from ava_fast.model.norm import RMSNorm

KeyValues = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """x (B, S, M) → (B, S, M). The query, key and value projections are one matrix, in that order of rows."""

    def __init__(self, config: Config):
        super().__init__()
        model = config.model
        self.num_heads, self.num_kv_heads, self.head_dim = model.num_heads, config.num_kv_heads, config.head_dim
        chosen = config.training.attention_backend
        self.backend = None if chosen == "auto" else chosen
        rows = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv = nn.Linear(model.hidden_size, rows, bias=model.attention_bias)
        self.out = nn.Linear(self.num_heads * self.head_dim, model.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, model.norm_eps) if model.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, model.norm_eps) if model.qk_norm else None

    def forward(
        self,
        x_BSM: Tensor,
        cos: Tensor,
        sin: Tensor,
        past: KeyValues | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, KeyValues]:
        """cos, sin (S, D/2) of these S positions. `past` holds earlier keys and values (B, S_past, H_kv, D), rotated
        already; the second result is the same with this call's appended. `cu_seqlens` (see `Transformer.forward`) goes
        without `past`."""
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        q, k, v = self.qkv(x_BSM).unflatten(-1, (-1, self.head_dim)).split(heads, dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if cu_seqlens is not None:
            q_THD, k_THD, v_THD = (t.flatten(0, 1) for t in (q, k, v))
            attended_BSHD = rope_attention(
                q_THD, k_THD, v_THD, cos, sin, cu_seqlens=cu_seqlens, max_seqlen=x_BSM.shape[1], backend=self.backend
            ).view_as(q)
            present = (k, v)
        elif past is None:
            attended_BSHD = rope_attention(q, k, v, cos, sin, backend=self.backend)
            present = (k, v)
        else:
            q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
            present = (torch.cat((past[0], k), dim=1), torch.cat((past[1], v), dim=1))
            attended_BSHD = rope_attention(q, *present, backend=self.backend)
        return self.out(attended_BSHD.flatten(2)), present
