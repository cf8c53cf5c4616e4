"""Loss on the held-out sequences, shared out over the ranks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn

from ava_fast.data.batches import document_offsets
from ava_fast.engine import Engine

PROBE = 16
"""Tokens that a checkpoint records its loss on: few, as training waits for it."""


@torch.no_grad()
def probe_loss(model: nn.Module, tokens: list[int], device: torch.device) -> float:
    """Loss of one sequence, all of one document as far as attention knows. Collective where the model is sharded."""
    was_training = model.training
    model.eval()
    tokens_1S = torch.tensor([tokens], device=device)
    loss = model(tokens_1S[:, :-1], tokens_1S[:, 1:]).loss
    model.train(was_training)
    return float(loss)


@torch.no_grad()
def heldout_loss(
    engine: Engine, sequences_NS1: npt.NDArray[np.int64], batch_size: int, eos_id: int | None = None
) -> float:
    """Mean cross-entropy, nats per predicted token, of N sequences of S+1 tokens, given whole to every rank.

    Collective. Each pass takes `batch_size` sequences over all ranks. Every rank makes the same number of passes, as
    ZeRO-3 gathers parameters in each; rows past the end are scored by nobody. The result does not depend on the
    number of ranks beyond rounding. With `eos_id`, the token that ends a document, attention stays inside documents.
    """
    model, rows = engine.model, batch_size // engine.world_size
    total_2 = torch.zeros(2, dtype=torch.float64, device=engine.device)  # summed loss, scored tokens
    was_training = model.training
    model.eval()
    for start in range(0, len(sequences_NS1), batch_size):
        first = start + engine.rank * rows
        mine = torch.from_numpy(sequences_NS1[first : first + rows]).to(engine.device)
        scored = mine[:, 1:].numel()
        if scored == 0:
            mine = torch.from_numpy(sequences_NS1[:1]).to(engine.device)
        offsets = None if eos_id is None else document_offsets(mine[:, :-1], eos_id)
        loss = model(mine[:, :-1], mine[:, 1:], offsets).loss
        if scored:
            total_2 += torch.stack((loss.double() * scored, loss.new_tensor(scored, dtype=torch.float64)))
    model.train(was_training)
    dist.all_reduce(total_2)
    return float(total_2[0] / total_2[1])
