"""Bad batches on disk, and what one process finds when it computes one again.

<run>/bad_batches/step_9_at_80/rank_0.pt …    9 steps were taken before it; it ends at position 80 of the data order

    for line in replay(folder, weights, config, tokenizer):
        print(line)
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from ava_fast.config import Config, for_host
from ava_fast.data.batches import Batch
from ava_fast.errors import UserError
from ava_fast.model.transformer import Transformer

SHOWN = 5  # names and sequences per rank


def dump(folder: Path, rank: int, batches: list[Batch], noise: Tensor) -> None:
    """Writes one rank's share of a step: its micro-batches and torch's CPU generator before them. Raises OSError or
    RuntimeError where it cannot."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens_ABS, labels_ABS = (torch.stack([batch[part] for batch in batches]).cpu() for part in (0, 1))
    offsets = [batch[2] if len(batch) > 2 else None for batch in batches]
    saved = {"tokens": tokens_ABS, "labels": labels_ABS, "cu_seqlens": offsets, "noise": noise}
    torch.save(saved, folder / f"rank_{rank}.pt")


def step_of(folder: Path) -> int:
    """How many steps were taken before the batch in `folder`. Raises UserError if `dump` has not named it."""
    try:
        name, step, at, position = folder.name.split("_")
        if (name, at) == ("step", "at") and position.isdigit() and list(folder.glob("rank_*.pt")):
            return int(step)
    except ValueError:
        pass
    raise UserError(f"{folder}: holds no bad batch; name a folder in a run's bad_batches, such as step_9_at_80")


def replay(folder: Path, weights: dict[str, Tensor], config: Config, tokenizer: Tokenizer | None) -> Iterator[str]:
    """Computes each rank's share again, forward and backward, on this process's CPU; yields lines that say what was
    found: losses, the gradient norm, parameters whose gradient is not finite (nearest to the cause first) and the
    sequences with the largest losses, each computed alone."""
    step_of(folder)
    model = Transformer(for_host(config))
    model.load_state_dict(weights)
    found: list[str] = []

    def look(name: str, gradient: Tensor) -> None:
        if name not in found and not gradient.isfinite().all():
            found.append(name)

    for name, parameter in model.named_parameters():
        if config.training.precision == "bf16":
            parameter.data = parameter.data.bfloat16()
            parameter.grad_dtype = torch.float32
        parameter.register_hook(partial(look, name))
    for file in sorted(folder.glob("rank_*.pt"), key=lambda path: int(path.stem.removeprefix("rank_"))):
        saved = torch.load(file, weights_only=True)
        found.clear()
        model.train()
        model.zero_grad()
        torch.set_rng_state(saved["noise"])
        losses = []
        for batch in zip(saved["tokens"], saved["labels"], saved["cu_seqlens"], strict=True):
            output = model(*batch)
            (output.objective / len(saved["tokens"])).backward()
            losses.append(output.loss.item())
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()
        each = ", ".join(f"{loss:.4f}" for loss in losses)
        mean = sum(losses) / len(losses)
        yield f"{file.stem.replace('_', ' ')}: loss {mean:.4f} (by micro-batch {each}), gradient norm {norm:.4g}"
        if found:
            more = f", … ({len(found)})" if len(found) > SHOWN else ""
            yield f"  gradient not finite in {', '.join(found[:SHOWN])}{more}"
        yield from _worst(model, saved, tokenizer)


@torch.no_grad()
def _worst(model: Transformer, saved: dict[str, Any], tokenizer: Tokenizer | None) -> Iterator[str]:
    model.eval()
    alone = []
    batches = zip(saved["tokens"], saved["labels"], saved["cu_seqlens"], strict=True)
    for micro_batch, (tokens_BS, labels_BS, offsets) in enumerate(batches):
        for row in range(len(tokens_BS)):
            start, end = row * tokens_BS.shape[1], (row + 1) * tokens_BS.shape[1]
            own = None if offsets is None else offsets[(offsets >= start) & (offsets <= end)] - start
            loss = model(tokens_BS[row : row + 1], labels_BS[row : row + 1], own).loss.item()
            alone.append((loss if loss == loss else float("inf"), loss, micro_batch, row))
    for _, loss, micro_batch, row in sorted(alone, reverse=True)[:SHOWN]:
        tokens = saved["tokens"][micro_batch][row].tolist()
        text = repr(tokenizer.decode(tokens)) if tokenizer is not None else str(tokens)
        text = text if len(text) < 90 else text[:87] + "…"
        yield f"  micro-batch {micro_batch} sequence {row}: loss {loss:.4f}: {text}"
