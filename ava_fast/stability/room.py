"""What a run does when the memory does not suffice: it climbs a ladder, all ranks together, and takes the step again.

1. Activation checkpointing: keep only each block's input.
2. A smaller micro-batch: the largest with which the step passes, found by halving what is left between one that passed
   and one that did not. A rank's share of a batch is then taken in several passes; the batch of a step stays.
3. ZeRO-2, on more than one rank: optimizer states and gradients are shared out.
4. The optimizer on the host: fp32 weights, their gradients and moments leave the device. (Where that is the host itself
   nothing is gained, and the rung after it is soon reached.)
5. None is left: the run stops, with an emergency checkpoint and advice.

What was found is kept in the run's folder, so that a resumed run begins with it.

    room = Room.of(config, rows=4, world_size=2)
    room = room.after(passed=False)       # None: no rung is left
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ava_fast.config import Config
from ava_fast.errors import UserError
from ava_fast.files import write_whole

FILE = "memory.json"


@dataclass(frozen=True)
class Room:
    """How a step is taken, and what is known of other ways."""

    recompute: bool
    """Activation checkpointing."""
    micro_batch: int
    """Sequences of a rank in one forward pass, at most."""
    zero_stage: int
    offload: bool = False
    """The optimizer on the host."""
    least_failed: int | None = None
    """The smallest micro-batch that did not pass, while one that does is looked for."""
    most_passed: int = 0
    """The largest that did."""

    @classmethod
    def of(cls, config: Config, rows: int) -> Room:
        """As a configuration has it; `rows`: a rank's share of a batch."""
        memory = config.memory
        micro_batch = min(rows, memory.micro_batch or rows)
        return cls(memory.activation_checkpointing, micro_batch, config.deepspeed.zero_stage, memory.offload_optimizer)

    @property
    def searching(self) -> bool:
        """Whether a step that passes is to be taken again with a larger micro-batch."""
        return self.least_failed is not None

    def more(self, world_size: int, *, may_shard: bool) -> Room | None:
        """The next rung after a step that did not pass on some rank, or None. `may_shard`: ZeRO-2 is possible, which
        offloading needs too."""
        if not self.recompute:
            return replace(self, recompute=True)
        failed = self.micro_batch
        if failed > 1:
            return replace(self, micro_batch=(self.most_passed + failed) // 2 or 1, least_failed=failed)._settled()
        if not may_shard or self.zero_stage > 2 or self.offload:
            return None
        return Room(True, 1, 2, offload=self.zero_stage == 2 or world_size == 1)

    def passed(self) -> Room:
        """After a step that passed while `searching`: the next micro-batch to try, or the one that stays."""
        assert self.least_failed is not None
        tried = replace(self, most_passed=self.micro_batch)
        return replace(tried, micro_batch=(self.micro_batch + self.least_failed) // 2)._settled()

    def _settled(self) -> Room:
        """Done searching once nothing lies between what passed and what did not."""
        assert self.least_failed is not None
        if self.most_passed and self.least_failed - self.most_passed == 1:
            return Room(self.recompute, self.most_passed, self.zero_stage, self.offload)
        return self

    def __str__(self) -> str:
        parts = ["activation checkpointing"] if self.recompute else []
        parts += [f"micro-batches of {self.micro_batch}", f"ZeRO-{self.zero_stage}"]
        return ", ".join([*parts, *(["the optimizer on the host"] if self.offload else [])])


def with_room(config: Config, room: Room) -> Config:
    """The configuration that would have begun so."""
    memory = config.memory.model_copy(
        update={
            "activation_checkpointing": room.recompute,
            "micro_batch": room.micro_batch,
            "offload_optimizer": room.offload,
        }
    )
    deepspeed = config.deepspeed.model_copy(update={"zero_stage": room.zero_stage})
    return config.model_copy(update={"memory": memory, "deepspeed": deepspeed})


def keep(folder: Path, room: Room) -> None:
    """Raises OSError if it cannot be written."""
    write_whole(folder / FILE, json.dumps(asdict(room)).encode())


def kept(folder: Path, config: Config, rows: int) -> Config:
    """`config` with what a run in `folder` has found, as far as it takes less memory.

    Raises UserError if that cannot be read.
    """
    path = folder / FILE
    if config.memory.on_out_of_memory == "stop" or not path.is_file():
        return config
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        room = Room(found["recompute"], found["micro_batch"], found["zero_stage"], found.get("offload", False))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it to begin with the configuration's own") from None
    own = Room.of(config, rows)
    zero_stage = max(own.zero_stage, room.zero_stage)
    return with_room(
        config,
        Room(
            own.recompute or room.recompute,
            min(own.micro_batch, room.micro_batch),
            zero_stage,
            (own.offload or room.offload) and zero_stage == 2,  # with 3, weights are shared out instead
        ),
    )
