"""A run in which one rank fails, for torchrun: `failing_run.py WHAT RANK STEP --config …`.

WHAT: forward or backward raises in the second block, memory says there that there is none left, or the rank is killed,
stopped or hangs there. Once: not when torchrun has started it anew.
"""

import os
import signal
import sys
import time
from typing import Any

import torch

from ava_fast import train
from ava_fast.trainer import Trainer


def sabotage(trainer: Trainer, what: str, rank: int, step: int) -> None:
    """Makes `rank` fail in the midst of the first micro-batch after `step` steps, when what is saved in the background
    is on the disk, so that it does not depend on the disk where the run goes on."""

    def fail(*_: Any) -> None:
        anew = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if trainer.engine.rank == rank and trainer.step == step and not anew:
            await_checkpoint(trainer)
            if what == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            if what == "hung":
                time.sleep(600)
            if what == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            raise ValueError("no such luck")

    model = trainer.engine.model
    if what == "backward":
        model.get_parameter("blocks.1.mlp.down").register_hook(fail)
    else:
        model.get_submodule("blocks.1.mlp_norm").register_forward_pre_hook(fail)


def await_checkpoint(trainer: Trainer) -> None:
    saved, deadline = trainer.keeper.saved_at, time.monotonic() + 30
    while saved > 0 and not (trainer.checkpoints / f"step_{saved}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)


if __name__ == "__main__":
    what, rank, step = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    run = Trainer.run

    def sabotaged(trainer: Trainer, watch: Any) -> None:
        sabotage(trainer, what, rank, step)
        run(trainer, watch)

    Trainer.run = sabotaged  # type: ignore[method-assign]
    code = train.main(sys.argv[4:])
    sys.stdout.flush()
    os._exit(code)
