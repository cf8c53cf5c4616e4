"""A pre-norm decoder: attention and a mixture of experts (or a dense MLP) in every block.

    model = Transformer(config)
    output = model(tokens_BS, labels_BS)
    output.objective.backward()

Shape suffixes: B batch, S sequence, M model dim, H heads, D head dim, V vocabulary, T = B·S tokens, E experts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from ava_kernels import rope_table
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ava_fast.config import Config
from ava_fast.model.attention import Attention, KeyValues
from ava_fast.model.head import Head
from ava_fast.model.moe import DenseMlp, MoeBlock, Routed
from ava_fast.model.norm import RMSNorm
from ava_fast.parts import part


class Output(NamedTuple):
    """Losses are 0-d float32, in nats per token; the router's two are means over the mixture-of-experts blocks.

    `routing` and `requested` say more about each of these L blocks; they may be added over micro-batches and ranks.
    """

    objective: Tensor  # what training minimises: loss + weighted balance and z-losses
    loss: Tensor  # cross-entropy of the next token
    balance_loss: Tensor
    z_loss: Tensor
    routing: Tensor  # (4, L) float32: balance loss, entropy, rerouted and dropped share, as in `Routed`
    requested: Tensor  # (L, E) int32: requests that named each expert, before capacity


class Transformer(nn.Module):
    """The decoder that a configuration describes, with freshly initialised weights from torch's global generator."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        model = config.model
        self.embed = nn.Embedding(model.vocab_size, model.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(model.num_layers))
        self.norm = _norm(config)
        self.head = Head(model.hidden_size, model.vocab_size)
        self.recompute = config.memory.activation_checkpointing
        """Activation checkpointing, which may be switched at any time."""
        self._rope: tuple[Tensor, Tensor] | None = None
        # Only what trains and evaluates: a generation's growing past would be compiled again and again.
        self._run = torch.compile(_without_cache) if config.training.compile else _without_cache
        self._initialise()
        if model.tie_embeddings:
            self.head.weight = self.embed.weight

    def forward(self, tokens_BS: Tensor, labels_BS: Tensor, cu_seqlens: Tensor | None = None) -> Output:
        """tokens, labels int64; a label of −100 is not scored. With `cu_seqlens`, int32 offsets from 0 to B·S at which
        documents begin in the rows laid end to end, every row's start among them, no token sees another document, and
        positions count from its start."""
        x_BSM = self.embed(tokens_BS)
        cos, sin = self._rope_rows(0, tokens_BS.shape[1], x_BSM.device)
        routed: list[Routed] = []
        recompute = self.recompute and torch.is_grad_enabled()
        for block in self.blocks:
            if recompute:
                # What the recomputation returns goes nowhere: requests are counted once.
                x_BSM, block_routed = checkpoint(self._run, block, x_BSM, cos, sin, cu_seqlens, use_reentrant=False)
            else:
                x_BSM, block_routed = self._run(block, x_BSM, cos, sin, cu_seqlens)
            if block_routed is not None:
                routed.append(block_routed)
        with part("loss"):
            loss = self.head(self.norm(x_BSM), labels_BS)
        if not routed:
            nothing = loss.new_zeros(())
            return Output(loss, loss.detach(), nothing, nothing, loss.new_zeros(4, 0), loss.new_zeros(0, 1).int())
        balance_L, z_L, entropy_L, rerouted_L, dropped_L, requested_LE = map(torch.stack, zip(*routed, strict=True))
        balance_loss, z_loss, moe = balance_L.mean(), z_L.mean(), self.config.moe
        objective = loss + moe.aux_loss_weight * balance_loss + moe.z_loss_weight * z_loss
        routing_4L = torch.stack((balance_L.detach(), entropy_L, rerouted_L, dropped_L))
        return Output(objective, loss.detach(), balance_loss.detach(), z_loss.detach(), routing_4L, requested_LE)

    def logits(self, tokens_BS: Tensor, past: list[KeyValues] | None = None) -> tuple[Tensor, list[KeyValues]]:
        """→ logits (B, S, V) and every block's keys and values so far: the next call's `past`, with the next tokens."""
        x_BSM = self.embed(tokens_BS)
        start = past[0][0].shape[1] if past else 0
        cos, sin = self._rope_rows(start, tokens_BS.shape[1], x_BSM.device)
        if past is None:
            heads, width = self.config.num_kv_heads, self.config.head_dim
            nothing = x_BSM.new_empty(tokens_BS.shape[0], 0, heads, width)
            past = [(nothing, nothing)] * len(self.blocks)
        present = []
        for block, block_past in zip(self.blocks, past, strict=True):
            x_BSM, _, key_values = block(x_BSM, cos, sin, block_past)
            present.append(key_values)
        return self.head(self.norm(x_BSM)), present

    def _rope_rows(self, start: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        # Not a buffer: casting the module to bf16 would round the angles.
        end = start + count
        if self._rope is None or self._rope[0].shape[0] < end or self._rope[0].device != device:
            length = max(end, self.config.data.max_length)
            self._rope = rope_table(length, self.config.head_dim, self.config.model.rope_theta, device)
        return self._rope[0][start:end], self._rope[1][start:end]

    @torch.no_grad()
    def _initialise(self) -> None:
        std = self.config.model.initializer_range
        residual_std = std / math.sqrt(2 * self.config.model.num_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                into_residual = name.endswith(("attention.out.weight", "down", "down.weight"))
                parameter.normal_(0.0, residual_std if into_residual else std)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.fill_(1.0)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        dense = config.moe.num_experts == 0 or layer < config.model.num_dense_layers
        self.attention_norm = _norm(config)
        self.attention = Attention(config)
        self.mlp_norm = _norm(config)
        self.mlp = DenseMlp(config.model.hidden_size, config.model.intermediate_size) if dense else MoeBlock(config)

    def forward(
        self,
        x_BSM: Tensor,
        cos: Tensor,
        sin: Tensor,
        past: KeyValues | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Routed | None, KeyValues]:
        """→ x (B, S, M), what there is to say of the routing (None in a dense block), keys and values."""
        with part("attention"):
            attended_BSM, present = self.attention(self.attention_norm(x_BSM), cos, sin, past, cu_seqlens)
        x_BSM = x_BSM + attended_BSM
        if isinstance(self.mlp, MoeBlock):
            mlp_BSM, routed = self.mlp(self.mlp_norm(x_BSM))
            return x_BSM + mlp_BSM, routed, present
        with part("mlp"):
            return x_BSM + self.mlp(self.mlp_norm(x_BSM)), None, present


def _without_cache(
    block: nn.Module, x_BSM: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Routed | None]:
    x_BSM, routed, _ = block(x_BSM, cos, sin, None, cu_seqlens)
    return x_BSM, routed


def _norm(config: Config) -> nn.Module:
    norm = RMSNorm if config.model.norm == "rmsnorm" else nn.LayerNorm
    return norm(config.model.hidden_size, eps=config.model.norm_eps)
