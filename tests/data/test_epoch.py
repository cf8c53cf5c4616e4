"""Every token of an epoch, counted over runs that were killed and went on with another number of ranks."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from corpus import write_config
from launch import TIMEOUT, only_run

from ava_fast.data.shards import Piece, TokenStream, read_index, write_shards
from ava_fast.observe.run import read_metrics

LENGTH, BATCH, EOS = 8, 4, 0


def start(config: Path, log: Path, ranks: int) -> subprocess.Popen[str]:
    script = str(Path(__file__).with_name("recorded_run.py"))
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"] if ranks > 1 else []
    return subprocess.Popen(
        [sys.executable, *torchrun, script, str(log), "--config", str(config), "--resume", "latest"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_after(step: int, process: subprocess.Popen[str], config: Path, log: Path) -> None:
    """SIGKILL to torchrun and every rank, in the midst of whatever they do."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        metrics = list(config.parent.glob("outputs/runs/*/metrics.jsonl"))
        if metrics and any(record.get("step", 0) >= step for record in read_metrics(metrics[0])):
            break
        time.sleep(0.005)
    ranks = [int(file.suffix[1:]) for file in log.parent.glob(f"{log.name}.*")]
    for number in {process.pid, *ranks}:
        os.kill(number, signal.SIGKILL)
    assert process.wait(TIMEOUT) == -signal.SIGKILL


def test_every_token_once_through_kills_and_other_numbers_of_ranks(tmp_path: Path) -> None:
    generator = random.Random(0)
    lengths = [generator.randint(1, 60) for _ in range(160)]
    documents = [Piece([generator.randint(1, 299) for _ in range(length)], length, True) for length in lengths]
    folder = tmp_path / "shards"
    write_shards(
        folder, documents, documents[:20], tokenizer_json=b"{}", vocab_size=300, eos_id=EOS, source="a test",
        skipped=[], shard_tokens=1000,
    )  # fmt: skip
    stream = TokenStream(folder, read_index(folder), "train")
    sequences = (len(stream) - 1) // LENGTH
    steps = -(-sequences // BATCH)
    config = write_config(
        tmp_path / "c.yaml", folder,
        data={"max_length": LENGTH},
        deepspeed={"zero_stage": 0},  # whose optimizer state any number of ranks can read
        training={"max_steps": steps, "batch_size": BATCH, "gradient_accumulation_steps": 1},
        checkpoint={"save_steps": 7},
        evaluation={"eval_steps": 0, "prompt": None, "ngram_baselines": False},
    )  # fmt: skip

    logs = [tmp_path / f"log{number}" for number in range(3)]
    kill_after(20, start(config, logs[0], 1), config, logs[0])
    kill_after(80, start(config, logs[1], 2), config, logs[1])
    last = start(config, logs[2], 1)
    said, _ = last.communicate(timeout=TIMEOUT)
    assert last.returncode == 0, said
    log = (only_run(config) / "logs" / "training.log").read_text()
    saved = [0, *map(int, re.findall(r"resuming after step (\d+) from", log))]

    read = [
        [[json.loads(line) for line in file.read_text().splitlines()] for file in tmp_path.glob(f"{log.name}.*")]
        for log in logs
    ]
    assert [len(ranks) for ranks in read] == [1, 2, 1]
    starts = [ranks[0][0][0] for ranks in read]
    assert starts == [BATCH * step for step in saved]
    assert 0 < starts[1] < starts[2] < sequences
    seen: Counter[tuple[int, ...]] = Counter()
    for ranks, stop in zip(read, [*starts[1:], sequences], strict=True):
        # What a killed run did after its last checkpoint is undone with it.
        kept = [{position: rows for position, rows in rank if position < stop} for rank in ranks]
        assert all(positions.keys() == kept[0].keys() for positions in kept)
        for position in kept[0]:
            rows = [row for rank in kept for row in rank[position]]
            assert len(rows) == BATCH
            seen.update(map(tuple, rows))
    surplus = steps * BATCH - sequences  # of the next epoch, in the last batch
    expected = Counter(
        tuple(stream.read(LENGTH * index, LENGTH * (index + 1) + 1).tolist()) for index in range(sequences)
    )
    assert not expected - seen
    assert (seen - expected).total() == surplus
