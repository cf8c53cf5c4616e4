"""A run's checkpoints, on all ranks together: each is written by every rank or by none, and read by all.

    keeper = Keeper(run / "checkpoints", engine, config, shards / "tokenizer.json")
    keeper.save(step, state)                        # returns at once; written while training goes on
    keeper.settle()                                 # until it is on the disk
    manifest = keeper.load(store.candidates(run))   # of the first that verifies
    keeper.go_back(checkpoint, stretch)             # those after it go, and the stretch of the data is avoided

A save's tensors are copied to the host while the next step's passes run, and written by a thread. The ranks' threads
have a process group of their own, over which they agree on success before rank 0 commits.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from ava_fast.checkpoint import store
from ava_fast.checkpoint.generators import generator_states, packed, restore_generators, unpacked
from ava_fast.checkpoint.remote import Uploader
from ava_fast.checkpoint.shards import write_shard
from ava_fast.checkpoint.snapshot import Snapshot
from ava_fast.compatibility import model_differences
from ava_fast.config import Config
from ava_fast.engine import Engine, State
from ava_fast.errors import TrainingError, UserError
from ava_fast.files import write_hashed
from ava_fast.observe.console import duration
from ava_fast.stability.failures import PAUSES, Result, attempt, in_a_line, may_pass

logger = logging.getLogger(__name__)

_PATIENCE = timedelta(hours=6)
"""How long a rank that has written waits for another that still does. One that died ends the wait at once."""


class Keeper:
    """Every rank makes one and calls what is collective; the state that is kept is the same on all of them."""

    def __init__(self, folder: Path, engine: Engine, config: Config, tokenizer: Path):
        self.folder, self.engine, self.config, self.tokenizer = folder, engine, config, tokenizer
        self.saved_at = -1
        """The step of the last checkpoint that was begun or read."""
        self.failure: str | None = None
        """Why the last save came to nothing; every rank has it by the time that it settles."""
        self.retries = 0
        """How often rank 0 has tried a save again; the trainer counts and clears it."""
        self.news: list[dict[str, Any]] = []
        """On rank 0, records of saves that are done, for the trainer to write and clear."""
        self._uploader, self._rotating = None, threading.Lock()
        if engine.rank == 0 and config.checkpoint.remote is not None:
            self._uploader = Uploader(
                f"{config.checkpoint.remote.rstrip('/')}/{folder.parent.name}", folder, self._rotate
            )
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self._thread: threading.Thread | None = None
        self._buffers: dict[str, Tensor] = {}

    def save(self, step: int, state: dict[str, Any], *, wait: bool = False, since: float | None = None) -> bool:
        """Begins to write `step_N`, or with `wait` (or without `checkpoint.asynchronous`) writes it. Collective.

        `state` joins the manifest; in it, `stability.calm` says whether to roll back to this checkpoint rather than to
        another. `since`: when training began to wait for it. What the network may have done is tried again. → False if
        it was left out, as the last one is still being written.

        Raises TrainingError if this or the last one could not be written, on all ranks; nothing half-written stays.
        """
        started_at, checkpoint = since or time.perf_counter(), self.config.checkpoint
        if not wait and checkpoint.when_busy == "skip" and failed_anywhere("busy" if self._busy() else None):
            logger.warning(f"step {step}: not saved, as the last checkpoint is still being written")
            return False
        self.settle()
        shard = self.engine.state()
        contents = {
            "step": step,
            "world_size": self.engine.world_size,
            "saved_at": round(time.time(), 3),
            "config": self.config.model_dump(),
            **state,
        }
        record: dict[str, Any] = {"kind": "checkpoint", "step": step, "asynchronous": False}
        save = _Save(step, json.dumps(contents), shard, packed(generator_states()), record)
        self.saved_at = step
        if wait or not checkpoint.asynchronous:
            self._write(save, lambda: {key: tensor.cpu() for key, tensor in shard.tensors.items()})
            record["stall_seconds"] = time.perf_counter() - started_at
            self.settle()
            return True
        snapshot = Snapshot(shard.tensors, self._buffers)

        def hold() -> None:
            record["stall_seconds"] += snapshot.wait()

        self.engine.before_update = hold
        self._thread = threading.Thread(target=self._write, args=(save, snapshot.copy), daemon=True, name="checkpoint")
        self._thread.start()
        record |= {"asynchronous": True, "stall_seconds": time.perf_counter() - started_at}
        return True

    def settle(self) -> None:
        """Waits for the save that is under way. Raises TrainingError if it, or one before it, has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise TrainingError(f"{failure}; {self.safe()}")

    def uploaded(self) -> None:
        """Waits, on rank 0, for what is being uploaded."""
        if self._uploader is not None:
            self._uploader.finish()

    def _write(self, save: _Save, take: Callable[[], dict[str, Tensor]]) -> None:
        """All of a save after its tensors are known; `take` gives them on the host. What fails is left in `failure`."""
        try:
            started_at = time.perf_counter()
            tensors, error = attempted(take)
            failure = self._anywhere(error)
            for pause in (*PAUSES, None):
                failure = failure or self._try(save, tensors or {})
                if failure is None or pause is None or not may_pass(failure):
                    break
                self.retries += self.engine.rank == 0
                logger.warning(f"{self.folder / f'step_{save.step}'}: {failure}; tried again in {pause:g} s")
                time.sleep(pause)
                failure = None
        except Exception as error:  # of the collectives: another rank is gone
            logger.debug("the save fails", exc_info=True)
            failure = in_a_line(error)
        final = self.folder / f"step_{save.step}"
        if failure is not None:
            self.failure = f"{final}: the checkpoint could not be written ({failure})"
            return
        save.record["write_seconds"] = time.perf_counter() - started_at
        if self.engine.rank == 0:
            self.news.append(save.record)
        logger.info(f"step {save.step} | saved {final} | {duration(save.record['write_seconds'])}")

    def _try(self, save: _Save, tensors: dict[str, Tensor]) -> str | None:
        """→ why it could not be written, the same on every rank."""
        folder, error = self.folder / f"step_{save.step}.tmp", None
        if self.engine.rank == 0:
            error = attempt(lambda: store.open_folder(self.folder, save.step))
        failure = self._anywhere(error)
        if failure is None:
            files, error = attempted(lambda: self._write_own(folder, save, tensors))
            everyone: list[tuple[store.Files | None, str | None]] = [(None, None)] * self.engine.world_size
            dist.all_gather_object(everyone, (files, error), self._group)
            failure = next((error for _, error in everyone if error), None)
        if failure is None:
            if self.engine.rank == 0:
                written = {name: file for files, _ in everyone for name, file in sorted((files or {}).items())}
                save.record["bytes"] = sum(file["bytes"] for file in written.values())
                error = attempt(lambda: self._commit(folder, save, written))
            failure = self._anywhere(error)
        if failure and self.engine.rank == 0:
            store.discard(folder)
        return failure

    def _write_own(self, folder: Path, save: _Save, tensors: dict[str, Tensor]) -> store.Files:
        """This rank's files."""
        rank, shard = self.engine.rank, save.shard
        files = write_shard(folder / "engine", rank, tensors, shard.starts, shard.description)
        files = {f"engine/{name}": file for name, file in files.items()}
        files[f"rank_{rank}.json"] = write_hashed(folder / f"rank_{rank}.json", [save.noise])
        if rank == 0:
            files["tokenizer.json"] = write_hashed(folder / "tokenizer.json", [self.tokenizer.read_bytes()])
        return files

    def _commit(self, folder: Path, save: _Save, files: store.Files) -> None:
        final = store.commit(folder, json.loads(save.contents), files)
        self._rotate()
        if self._uploader is not None:
            self._uploader.offer(final)

    def _rotate(self) -> None:
        limits = self.config.checkpoint
        with self._rotating:
            store.rotate(self.folder, newest=limits.save_total_limit, every=limits.keep_every, best=limits.keep_best)

    def load(self, checkpoints: Sequence[Path], *, optimizer: bool = True) -> tuple[Path, dict[str, Any]]:
        """Puts weights, optimizer and random generators back as the first of `checkpoints` that verifies has them →
        which, and its manifest. Collective.

        With `optimizer=False` AdamW starts anew. Each that is refused is logged with its reason. Raises UserError if
        none verifies, or the first that does is of another model.
        """
        self.settle()
        refused = []
        for checkpoint in checkpoints:
            with store.reading(checkpoint):
                manifest, error = self._verified(checkpoint)
                refusal = failed_anywhere(error)
                if refusal is None:
                    self._load(checkpoint, manifest, optimizer)
                    return checkpoint, manifest
            refused.append(refusal)
            if len(checkpoints) > 1:
                logger.warning(f"{refusal}; the next one is tried")
        raise UserError(f"{'; '.join(refused)}; resume from another one with --resume PATH")

    def _verified(self, checkpoint: Path) -> tuple[dict[str, Any], str | None]:
        """The manifest, and what is wrong with this rank's share of the files: each is read by one rank."""
        try:
            manifest = store.peek(checkpoint)
            names = sorted(manifest["files"])[self.engine.rank :: self.engine.world_size]
            store.verify(checkpoint, {name: manifest["files"][name] for name in names})
        except UserError as error:
            return {}, str(error)
        return manifest, None

    def _load(self, checkpoint: Path, manifest: dict[str, Any], optimizer: bool) -> None:
        differences = model_differences(self.config, manifest["config"])
        if differences:
            raise UserError(f"{checkpoint}: is of another model: {'; '.join(differences)}; resume with its settings")
        self.engine.load(checkpoint / "engine", optimizer=optimizer)
        generators = checkpoint / f"rank_{self.engine.rank}.json"
        if generators.is_file():  # a larger world has ranks that were never saved
            restore_generators(unpacked(generators.read_bytes()))
        self.saved_at = manifest["step"]

    def good_ones(self, step: int) -> list[Path]:
        """Those to roll back to, the best choice first: saved in calm, then others, newest first. Collective.

        Raises TrainingError where there is none.
        """
        self.settle()
        choice: list[list[Path]] = [[]]
        if self.engine.rank == 0:
            saved = store.list_checkpoints(self.folder)[::-1]
            choice = [sorted(saved, key=lambda path: not _calm(path))]
        dist.broadcast_object_list(choice, src=0)
        if not choice[0]:
            raise TrainingError(f"step {step}: cannot roll back: there is no checkpoint")
        return choice[0]

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

    def _busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _anywhere(self, error: str | None) -> str | None:
        return failed_anywhere(error, self._group)


class _Save(NamedTuple):
    """What a save has to write, as it was when it was asked for."""

    step: int
    contents: str
    shard: State
    noise: bytes
    record: dict[str, Any]


def failed_anywhere(error: str | None, group: dist.ProcessGroup | None = None) -> str | None:
    """This rank's error, or another's, on every rank. Collective."""
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error, group)
    return next((e for e in errors if e), None)


def attempted(action: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """What it gives, or, as `attempt` says it, why it could not write."""
    results: list[Result] = []
    error = attempt(lambda: results.append(action()))
    return (results[0] if results else None), error


def _calm(checkpoint: Path) -> bool:
    try:
        return store.peek(checkpoint)["stability"]["calm"]
    except UserError:
        return False
