"""`ava_fast.train`, with every batch that a rank is given written down before it is trained on.

    python recorded_run.py LOG --config …          # or under torchrun

A line of LOG.<process id> is [position, this rank's rows of S + 1 tokens].
"""

from __future__ import annotations

import json
import os
import sys

from ava_fast import train
from ava_fast.data.batches import Batch
from ava_fast.data.loader import TokenLoader

if __name__ == "__main__":
    log = open(f"{sys.argv[1]}.{os.getpid()}", "w")  # noqa: SIM115
    next_batch = TokenLoader.next_batch

    def recorded(self: TokenLoader) -> Batch:
        tokens_BS, labels_BS = batch = next_batch(self)
        rows = [[*tokens, labels[-1]] for tokens, labels in zip(tokens_BS.tolist(), labels_BS.tolist(), strict=True)]
        log.write(json.dumps([self.position - self.batches.batch_size, rows]) + "\n")
        log.flush()
        return batch

    TokenLoader.next_batch = recorded  # type: ignore[method-assign]
    code = train.main(sys.argv[2:])
    sys.stdout.flush()
    os._exit(code)
