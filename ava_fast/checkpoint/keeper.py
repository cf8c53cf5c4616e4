"""A run's checkpoints, on all ranks together: each is written by every rank or by none, and read by all.

    keeper = Keeper(run / "checkpoints", engine, config, shards / "tokenizer.json")
    keeper.save(step, state)
    state = keeper.load(checkpoint)                  # its manifest: `state` and what describes the run
    keeper.go_back(keeper.last_good(step), stretch) # those after it go, and the stretch of the data is avoided

Only what is in calm is rolled back to, while there is any.
"""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ava_fast.checkpoint import store
from ava_fast.checkpoint.generators import generator_states, restore_generators
from ava_fast.compatibility import model_differences
from ava_fast.config import Config
from ava_fast.engine import Engine
from ava_fast.errors import TrainingError, UserError
from ava_fast.observe.console import duration
from ava_fast.stability.failures import PAUSES, attempt, may_pass

logger = logging.getLogger(__name__)


class Keeper:
    """Every rank makes one and calls what is collective; the state that is kept is the same on all of them."""

    def __init__(self, folder: Path, engine: Engine, config: Config, tokenizer: Path):
        self.folder, self.engine, self.config, self.tokenizer = folder, engine, config, tokenizer
        self.saved_at = -1
        """The step of the last checkpoint that was written or read."""
        self.retries = 0
        """How often rank 0 has tried a save again; the trainer counts and clears it."""

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Writes `step_N`, on all ranks or, if one of them cannot, on none. Collective.

        `state` joins the manifest; in it, `stability.calm` says whether to roll back to this checkpoint rather than to
        another. What the network may have done is tried again.
        Raises TrainingError if it could not be written; nothing half-written stays.
        """
        started_at = time.perf_counter()
        folder = self.folder / f"step_{step}.tmp"
        for pause in (*PAUSES, None):
            failure = self._save(folder, step, state)
            if failure is None:
                break
            if pause is None or not may_pass(failure):
                raise TrainingError(
                    f"{folder.with_suffix('')}: the checkpoint could not be written ({failure}); {self.safe()}"
                )
            self.retries += self.engine.rank == 0
            logger.warning(f"{folder}: {failure}; tried again in {pause:g} s")
            time.sleep(pause)
        self.saved_at = step
        logger.info(f"step {step} | saved {folder.with_suffix('')} | {duration(time.perf_counter() - started_at)}")

    def _save(self, folder: Path, step: int, state: dict[str, Any]) -> str | None:
        """→ why it could not be written, the same on every rank."""
        error = None
        if self.engine.rank == 0:
            error = attempt(lambda: store.open_folder(self.folder, step))
        if not failed_anywhere(error):
            error = attempt(lambda: self._write(folder))
        if not failed_anywhere(error) and self.engine.rank == 0:
            contents = {
                "step": step,
                "world_size": self.engine.world_size,
                "config": self.config.model_dump(),
                **state,
            }
            error = attempt(lambda: store.commit(folder, contents, self.config.checkpoint.save_total_limit))
        failure = failed_anywhere(error)
        if failure and self.engine.rank == 0:
            store.discard(folder)
        return failure

    def _write(self, folder: Path) -> None:
        self.engine.save(folder / "engine")
        if self.engine.rank == 0:
            shutil.copyfile(self.tokenizer, folder / "tokenizer.json")
        torch.save(generator_states(), folder / f"rank_{self.engine.rank}.pt")

    def load(self, checkpoint: Path, *, optimizer: bool = True) -> dict[str, Any]:
        """Puts weights, optimizer and random generators back as `checkpoint` has them → its manifest. Collective.

        With `optimizer=False` AdamW starts anew. Raises UserError if the checkpoint is damaged, of another model or of
        another world size.
        """
        manifest = store.read_manifest(checkpoint)
        differences = model_differences(self.config, manifest["config"])
        if differences:
            raise UserError(f"{checkpoint}: is of another model: {'; '.join(differences)}; resume with its settings")
        self.engine.load(checkpoint / "engine", optimizer=optimizer)
        generators = checkpoint / f"rank_{self.engine.rank}.pt"
        if generators.is_file():  # a larger world has ranks that were never saved
            restore_generators(torch.load(generators, weights_only=False))
        self.saved_at = manifest["step"]
        return manifest

    def last_good(self, step: int) -> Path:
        """The newest checkpoint that verifies, of those saved in calm if there are any. Collective.

        Raises TrainingError where there is none.
        """
        choice: list[Path | str] = [_last_good(self.folder) if self.engine.rank == 0 else ""]
        dist.broadcast_object_list(choice, src=0)
        checkpoint = choice[0]
        if not isinstance(checkpoint, Path):
            raise TrainingError(f"step {step}: cannot roll back: {checkpoint}")
        return checkpoint

    def go_back(self, checkpoint: Path, stretch: tuple[int, int]) -> None:
        """Makes a checkpoint that was loaded the newest, and has resumed runs pass over `stretch`. Collective."""
        error = None
        if self.engine.rank == 0:
            error = attempt(lambda: store.avoid(self.folder, stretch))
            error = error or attempt(lambda: store.rewind(checkpoint))
        if failure := failed_anywhere(error):
            raise TrainingError(f"{checkpoint}: rolled back to it, but its folder cannot be written to ({failure})")

    def safe(self) -> str:
        """What is safe on disk, in words."""
        saved = store.list_checkpoints(self.folder)
        return f"the newest checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"


def failed_anywhere(error: str | None) -> str | None:
    """This rank's error, or another's, on every rank. Collective."""
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    return next((e for e in errors if e), None)


def _last_good(checkpoints: Path) -> Path | str:
    """Or why there is none."""
    newest, problem = None, "there is no checkpoint"
    for path in reversed(store.list_checkpoints(checkpoints)):
        try:
            calm = store.read_manifest(path)["stability"]["calm"]
        except UserError as error:
            problem = str(error)
            continue
        if calm:
            return path
        newest = newest or path
    return newest or problem
