"""A run under torchrun that says what it reads, for bench/chaos_elastic.py: `-m bench.chaos_worker --config …`.

Into $CHAOS_SEEN, a folder, each process writes a file of lines, one per batch that it takes: its rank, the time at
which its ranks started together, the batch's position and a hash of each of its sequences. Each batch takes longer by
the seconds in the file $CHAOS_PAUSE, so that there is time to disturb the run.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ava_fast import train
from ava_fast.data.batches import Batch
from ava_fast.data.loader import TokenLoader


def hashes(batch: Batch) -> list[str]:
    """Of its sequences, one each."""
    return [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:16] for row in batch[0]]


class Notes:
    """Takes the place of `TokenLoader.next_batch`."""

    def __init__(self, folder: Path, pause: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"{time.time():.3f}_{os.getpid()}.jsonl").open("w", buffering=1)
        self._pause, self._next_batch, self._started_at = pause, TokenLoader.next_batch, 0.0

    def next_batch(self, loader: TokenLoader) -> Batch:
        if not self._started_at:
            agreed: list[Any] = [time.time()]
            dist.broadcast_object_list(agreed, src=0)
            self._started_at = agreed[0]
        began_at = time.monotonic()
        while time.monotonic() - began_at < float(self._pause.read_text()):
            time.sleep(0.05)
        batch = self._next_batch(loader)
        line = {
            "rank": dist.get_rank(),
            "pid": os.getpid(),
            "start": self._started_at,
            "position": loader.position - loader.batches.batch_size,
            "rows": hashes(batch),
        }
        self._file.write(json.dumps(line) + "\n")
        return batch


if __name__ == "__main__":
    notes = Notes(Path(os.environ["CHAOS_SEEN"]), Path(os.environ["CHAOS_PAUSE"]))
    TokenLoader.next_batch = lambda loader: notes.next_batch(loader)  # type: ignore[method-assign]
    code = train.main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)
