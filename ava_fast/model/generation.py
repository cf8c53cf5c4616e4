"""Continues a sequence of tokens, one at a time, over cached keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from ava_fast.model.transformer import Transformer


@torch.no_grad()
def generate(
    model: Transformer,
    prompt: list[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    stop_token: int | None = None,
    generator: torch.Generator | None = None,
) -> list[int]:
    """Token ids that follow `prompt` (at least one id), at most `max_new_tokens`, ending before `stop_token`.

    `temperature` 0 takes the most likely token each time; above it samples from `generator`. Raises ValueError for an
    empty prompt.
    """
    if not prompt:
        raise ValueError("the prompt has no tokens; give at least one")
    was_training = model.training
    model.eval()
    tokens_BS = torch.tensor([prompt], device=model.embed.weight.device)
    past, continuation = None, []
    for _ in range(max_new_tokens):
        logits_BSV, past = model.logits(tokens_BS, past)
        token = _choose(logits_BSV[0, -1].float(), temperature, generator)
        if token == stop_token:
            break
        continuation.append(token)
        tokens_BS = tokens_BS.new_tensor([[token]])
    model.train(was_training)
    return continuation


def _choose(logits_V: Tensor, temperature: float, generator: torch.Generator | None) -> int:
    if temperature == 0.0:
        return int(logits_V.argmax())
    return int(torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator))
