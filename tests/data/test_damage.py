"""Two ranks train while a shard is spoilt, cut short or removed: neither waits for the other for ever, and what can
still be read is trained on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from corpus import write_config
from distributed import run_on_ranks

from ava_fast.config import load_config
from ava_fast.data.shards import Piece, write_shards
from ava_fast.engine import close_distributed, init_distributed
from ava_fast.observe.run import read_metrics
from ava_fast.trainer import Trainer

LENGTH, SHARD, SEQUENCES = 32, 4096, 640  # five shards, the second of 128 sequences
STEPS, BEFORE, BATCH, AHEAD = 16, 3, 4, 2
KINDS = ["flipped", "cut", "removed"]


def spoil(file: Path, kind: str) -> None:
    """What happens under way."""
    if kind == "flipped":
        with file.open("r+b") as opened:
            opened.seek(2000)
            opened.write(np.full(1000, 299, "<u2").tobytes())  # possible tokens: only the checks tell
    elif kind == "cut":
        os.truncate(file, 100)
    else:
        file.unlink()


def train(file: str, root: Path) -> dict[str, dict[str, Any]]:
    """Runs on every rank of two."""
    init_distributed(load_config(file))
    seen = {}
    for kind in KINDS:
        folder = root / kind
        trainer = Trainer(load_config(file, [f"data.data_dir={folder / 'shards'}"]), folder, folder / "shards")
        for _ in range(BEFORE):
            trainer._step()
        dist.barrier()
        if dist.get_rank() == 0:
            spoil(folder / "shards" / "train" / "00001.bin", kind)
        dist.barrier()
        trainer.run()
        shares = [trainer.loader.batches.share(place) for place in range(0, trainer.loader.position, BATCH)]
        touching = [any(index * LENGTH < 2 * SHARD and (index + 1) * LENGTH >= SHARD for _, index in s) for s in shares]
        seen[kind] = {"touching": touching, "position": trainer.loader.position, "step": trainer.step}
    close_distributed()
    return seen


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, generator = tmp_path_factory.mktemp("damage"), np.random.default_rng(0)
    pieces = [Piece(generator.integers(1, 300, 99).tolist(), 99, True) for _ in range(SEQUENCES * LENGTH // 100 + 1)]
    for kind in KINDS:
        write_shards(
            root / kind / "shards", pieces, pieces[:8], tokenizer_json=b"{}", vocab_size=300, eos_id=0,
            source="a test", skipped=[], shard_tokens=SHARD,
        )  # fmt: skip
    return root


@pytest.fixture(scope="module")
def ranks(root: Path) -> list[dict[str, dict[str, Any]]]:
    file = write_config(
        root / "c.yaml", root,
        training={"max_steps": STEPS, "batch_size": BATCH, "gradient_accumulation_steps": 1},
        stability={"window": 64, "max_skips": 63, "dump_batches": 0},
        checkpoint={"save_steps": 0},
        data={"prefetch_batches": AHEAD},
        evaluation={"eval_steps": 0, "prompt": None},
    )  # fmt: skip
    return run_on_ranks(train, 2, str(file), root)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_go_on_together_past_what_cannot_be_read(
    kind: str, root: Path, ranks: list[dict[str, dict[str, Any]]]
) -> None:
    first, second = (rank[kind] for rank in ranks)
    assert first["position"] == second["position"]
    assert first["step"] == second["step"] == STEPS
    records = read_metrics(root / kind / "metrics.jsonl")
    verdicts = [record for record in records if record["kind"] == "verdict"]
    assert first["position"] == BATCH * (STEPS + len(verdicts))
    if kind == "removed":  # an open file outlives its name
        assert not verdicts
        return
    says = " or the checks.bin beside it is damaged" if kind == "flipped" else " has been cut to 100 of 8,192 bytes"
    assert all(f"00001.bin{says}" in error for v in verdicts for c in v["culprits"] for error in c["errors"])
    failed = {(v["position"] // BATCH - 1, c["rank"]) for v in verdicts for c in v["culprits"]}
    touching = {
        (batch, number)
        for number, rank in enumerate((first, second))
        for batch, touches in enumerate(rank["touching"])
        if touches and batch >= BEFORE
    }
    assert failed
    assert failed <= touching
    if kind == "cut":  # the batches that had been read ahead were whole
        assert {(batch, rank) for batch, rank in touching if batch >= BEFORE + AHEAD} <= failed
