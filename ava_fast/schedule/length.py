"""Shorter sequences first: the length of a step's sequences, a pure function of the step, and the cut that makes them.

The loader's rows stay `data.max_length` tokens long. A step with length L sees each as max_length / L sequences, so it
has the same tokens, none is lost or seen twice, and the loader's position means what it always does. Attention and
positions begin anew in each piece (Li et al., 2022, "The Stability-Efficiency Dilemma", truncate rows instead).
"""

from __future__ import annotations

from functools import lru_cache

import torch

from ava_fast.config import Config
from ava_fast.data.batches import Batch


def sequence_length(step: int, config: Config) -> int:
    """Of optimizer step `step`, counted from 0: a divisor of `data.max_length`, the largest that the curve has
    reached; never less than that of the step before."""
    curriculum, whole = config.curriculum.length, config.data.max_length
    rising = curriculum.ratio * config.training.max_steps
    if curriculum.shape == "constant" or step >= rising:
        return whole
    progress, start = step / rising, curriculum.start
    match curriculum.shape:
        case "stages":
            assert curriculum.stages is not None
            return curriculum.stages[int(progress * len(curriculum.stages))]
        case "linear":
            reached = start + (whole - start) * progress
        case "exponential":
            reached = start * (whole / start) ** progress
    # 2¹⁰ by way of a logarithm may come out a little below 1024.
    return max(length for length in divisors(whole) if length <= reached * (1 + 1e-9))


@lru_cache
def divisors(whole: int) -> tuple[int, ...]:
    """In no particular order."""
    small = [number for number in range(1, int(whole**0.5) + 1) if whole % number == 0]
    return tuple({*small, *(whole // number for number in small)})


def in_pieces(batch: Batch, length: int) -> Batch:
    """A batch of rows (B, S) as one of (B·S/length, length), the same tokens in the same order; `length` divides S."""
    tokens_BS, labels_BS, *offsets = batch
    if tokens_BS.shape[1] == length:
        return batch
    pieces = (tokens_BS.view(-1, length), labels_BS.view(-1, length))
    if not offsets:
        return pieces
    begins = torch.arange(0, tokens_BS.numel() + 1, length, dtype=offsets[0].dtype, device=offsets[0].device)
    return (*pieces, torch.cat((offsets[0], begins)).unique())
