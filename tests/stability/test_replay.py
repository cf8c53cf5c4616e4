"""A dumped batch whose attention stays inside documents is computed again as it was."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from ava_fast.config import Config
from ava_fast.data.batches import document_offsets
from ava_fast.model.transformer import Transformer
from ava_fast.stability.replay import dump, replay

pytestmark = pytest.mark.usefixtures("small_and_seeded")


@pytest.mark.parametrize("inside", [False, True])
def test_documents_are_kept_apart_in_the_replay_and_in_single_sequences(inside: bool, tmp_path: Path) -> None:
    config = Config.model_validate({"model": {"vocab_size": 30, "hidden_size": 16, "initializer_range": 0.5}})
    model, folder = Transformer(config), tmp_path / "step_1_at_8"
    sequences_ABS1 = torch.randint(0, 6, (2, 3, 12))  # token 0 ends a document
    batches = []
    for tokens in sequences_ABS1:
        batch = (tokens[:, :-1], tokens[:, 1:])
        batches.append((*batch, document_offsets(batch[0], 0)) if inside else batch)
    with torch.no_grad():
        losses = [model(*batch).loss.item() for batch in batches]
        alone = []
        for batch in batches:
            for row in range(3):
                own = [part[row : row + 1] for part in batch[:2]]
                alone.append(model(*own, *([document_offsets(own[0], 0)] if inside else [])).loss.item())
    dump(folder, 0, batches, torch.get_rng_state())
    first, *worst = replay(folder, model.state_dict(), config, None)
    assert f"(by micro-batch {losses[0]:.4f}, {losses[1]:.4f})" in first
    told = [float(match[1]) for line in worst if (match := re.search(r"sequence \d: loss (\S+):", line))]
    assert told == pytest.approx(sorted(alone, reverse=True)[:5], abs=2e-4)
