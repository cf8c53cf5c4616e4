"""The held-out loss of a model whose attention stays inside documents is measured that way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from corpus import write_config, write_corpus

from ava_fast.config import load_config
from ava_fast.data.batches import document_offsets
from ava_fast.data.prepare import prepare
from ava_fast.data.shards import read_index
from ava_fast.engine import close_distributed, init_distributed
from ava_fast.trainer import Trainer


def test_documents_are_kept_apart_if_training_does(tmp_path: Path) -> None:
    text = write_corpus(tmp_path / "text", documents=60, words=20)
    file = write_config(tmp_path / "c.yaml", text, data={"validation_fraction": 0.4})
    config = load_config(file, ["data.document_attention=true", "model.initializer_range=0.3"])
    shards = prepare(text, config.data.cache_dir, vocab_size=300, validation_fraction=0.4)
    init_distributed(config)
    try:
        trainer = Trainer(config, tmp_path, shards)
        trainer._evaluate()
        sequences_NS1 = torch.from_numpy(trainer.heldout_NS1)
        tokens, labels = sequences_NS1[:, :-1], sequences_NS1[:, 1:]
        offsets = document_offsets(tokens, read_index(shards).eos_id)
        assert len(offsets) > len(tokens) + 1
        model = trainer.engine.model.eval()
        with torch.no_grad():
            inside, across = model(tokens, labels, offsets).loss, model(tokens, labels).loss
    finally:
        close_distributed()
    assert trainer.heldout == pytest.approx(inside.item(), rel=1e-5)
    assert abs(across.item() - trainer.heldout) > 1e-3
