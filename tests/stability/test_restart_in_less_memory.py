"""Under ZeRO-3 ranks cannot agree in the midst of a pass: out of memory ends them, and torchrun's next start climbs."""

from __future__ import annotations

import json
from pathlib import Path

from corpus import write_config, write_corpus
from distributed import run_on_ranks
from launch import only_run, records
from test_lost_rank import STEPS, settings, torchrun

from ava_fast.checkpoint import store
from ava_fast.data.prepare import prepare
from ava_fast.engine import close_distributed, init_distributed
from ava_fast.stability import room
from ava_fast.trainer import Trainer


def train(file: str, shards: str, root: Path) -> None:
    """Runs on every rank: configured so from the start, and not."""
    config = settings(file)
    init_distributed(config)
    for rows in (1, 2):
        memory, folder = config.memory.model_copy(update={"micro_batch": rows}), root / str(rows)
        folder.mkdir(exist_ok=True)
        Trainer(config.model_copy(update={"memory": memory}), folder, Path(shards)).run()
    close_distributed()


def test_a_run_that_torchrun_starts_anew_begins_with_the_next_rung(tmp_path: Path) -> None:
    # Two sequences of a rank in a pass, kept by their inputs alone: what is left to try is one.
    recompute = {"activation_checkpointing": True}
    file = write_config(tmp_path / "c.yaml", write_corpus(tmp_path / "text"), memory=recompute)
    code, output = torchrun(file, "memory", "1", "0", stage=3, restarts=1)
    assert code == 0, output
    run = only_run(file)
    said = "It goes on with activation checkpointing, micro-batches of 1, ZeRO-3, by --resume latest"
    assert said in (run / "logs" / "errors.log").read_text()
    assert json.loads((run / room.FILE).read_text())["micro_batch"] == 1
    (restart,) = records(run, "restart")
    assert "rank 1 failed: OutOfMemoryError: CUDA out of memory" in restart["reason"]
    assert store.avoided(run / "checkpoints") == []  # there was nothing wrong with the batch

    data = settings(file).data
    shards = str(prepare(data.data_dir, data.cache_dir, vocab_size=settings(file).model.vocab_size))
    run_on_ranks(train, 2, str(file), shards, tmp_path)
    steps = records(run, "step")
    assert len(steps) == STEPS
    assert steps == records(tmp_path / "1", "step")
    assert steps != records(tmp_path / "2", "step")  # the rung shows
