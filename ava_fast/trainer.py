"""The training loop. `Trainer.run` reads like the flowchart of a run, `Trainer._step` like that of a step."""

from __future__ import annotations

import logging
import math
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ava_fast.checkpoint import store
from ava_fast.compatibility import model_differences
from ava_fast.config import Config
from ava_fast.data.loader import TokenLoader, heldout_sequences
from ava_fast.engine import Engine
from ava_fast.errors import Interrupted, TrainingError, UserError
from ava_fast.evaluate.heldout import heldout_loss
from ava_fast.model.moe import update_expert_biases
from ava_fast.model.transformer import Output, Transformer
from ava_fast.observe.console import StepBar, duration, step_line
from ava_fast.observe.run import EVALUATION_LOG, Metrics
from ava_fast.observe.throughput import flops_per_token, peak_flops
from ava_fast.schedule.learning_rate import learning_rate

logger = logging.getLogger(__name__)
evaluation_logger = logging.getLogger(EVALUATION_LOG)


class Trainer:
    """One run on all ranks: `Trainer(config, …).run()`.

    `run_folder` is the run's place on disk, `shards` the prepared data. All ranks construct it together.
    """

    def __init__(self, config: Config, run_folder: Path, shards: Path, weights: dict[str, torch.Tensor] | None = None):
        self.config, self.shards = config, shards
        self.run_folder, self.checkpoints = run_folder, run_folder / "checkpoints"
        rank, world_size = dist.get_rank(), dist.get_world_size()
        training = config.training
        self.loader = TokenLoader(
            shards,
            max_length=config.data.max_length,
            batch_size=training.batch_size,
            seed=training.seed,
            rank=rank,
            world_size=world_size,
        )
        self.heldout_NS1 = heldout_sequences(
            shards, max_length=config.data.max_length, limit=config.evaluation.max_sequences
        )
        seed_generators(training.seed)  # the same weights on every rank
        model = Transformer(config)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        if weights is not None:
            model.load_state_dict(weights)
        self.engine = Engine(model, config)
        seed_generators(training.seed + 1 + rank)  # different noise on each
        self.step = 0
        self.evaluated_at = self.saved_at = -1
        self.heldout = math.nan
        self._stop_signal = 0
        self._metrics: Metrics | None = None  # on rank 0, while it runs
        self._bar: StepBar | None = None
        self._flops = flops_per_token(config)
        self._peak = peak_flops(config, self.engine.device)

    def run(self) -> None:
        """Trains from the current step to `max_steps`, evaluates and saves at the end.

        Raises Interrupted after SIGTERM or SIGINT, with the finished steps saved, and TrainingError where training
        cannot go on.
        """
        config = self.config
        with self._watched(), self._signals_noted():
            while self.step < config.training.max_steps:
                record, interrupted = self._step()
                self._show(record)
                if _due(self.step, config.evaluation.eval_steps):
                    self._evaluate()
                if interrupted or _due(self.step, config.checkpoint.save_steps):
                    self.save()
                if interrupted:
                    name = signal.Signals(interrupted).name
                    raise Interrupted(f"{name}: saved at step {self.step}; go on with --resume latest")
            if self.evaluated_at != self.step:
                self._evaluate()
            if self.saved_at != self.step:
                self.save()

    def _step(self) -> tuple[dict[str, Any], int]:
        """One optimizer step → its record for metrics.jsonl, and the signal that asks to stop after it (or 0)."""
        training, engine = self.config.training, self.engine
        started_at = time.perf_counter()
        lr = learning_rate(self.step, training)
        seen = []
        engine.model.train()
        for _ in range(training.gradient_accumulation_steps):
            tokens_BS, labels_BS = (t.to(engine.device, non_blocking=True) for t in self.loader.next_batch())
            output = engine(tokens_BS, labels_BS)
            engine.backward(output.objective / training.gradient_accumulation_steps)
            seen.append(_figures(output))
        totals = self._over_ranks(torch.stack(seen).sum(0), output.requested.shape)
        (loss, balance_loss, z_loss), routing, requested_LE, interrupted = totals
        if not math.isfinite(loss):
            raise self._stopped(f"the loss is {loss}")
        result = engine.step(lr)
        if not result.applied:
            raise self._stopped(f"the gradient norm is {result.grad_norm}")
        update_expert_biases(engine.model, requested_LE)
        self.step += 1
        seconds = time.perf_counter() - started_at
        tokens_per_step = training.batch_size * self.config.data.max_length * training.gradient_accumulation_steps
        rate = tokens_per_step / seconds
        return {
            "kind": "step",
            "step": self.step,
            "loss": loss,
            "balance_loss": balance_loss,
            "z_loss": z_loss,
            **({"routing": routing} if len(requested_LE) else {}),
            "learning_rate": lr,
            "grad_norm": result.grad_norm,
            "grad_norm_clipped": min(result.grad_norm, training.max_grad_norm or math.inf),
            "seconds": seconds,
            "tokens": self.step * tokens_per_step,
            "tokens_per_second": rate,
            "mfu": rate * self._flops / (self._peak * engine.world_size) if self._peak else None,
        }, interrupted

    def _evaluate(self) -> None:
        started_at = time.perf_counter()
        self.heldout = heldout_loss(self.engine, self.heldout_NS1, self.config.training.batch_size)
        self.evaluated_at = self.step
        seconds = time.perf_counter() - started_at
        if self._metrics:
            self._metrics.write({"kind": "evaluation", "step": self.step, "loss": self.heldout, "seconds": seconds})
        evaluation_logger.info(f"step {self.step} | held-out loss {self.heldout:.4f} | {duration(seconds)}")

    def save(self) -> None:
        """Writes `checkpoints/step_N`, on all ranks or, if one of them cannot, on none.

        Raises TrainingError if it could not be written; nothing half-written stays.
        """
        started_at = time.perf_counter()
        folder = self.checkpoints / f"step_{self.step}.tmp"
        error = None
        if self.engine.rank == 0:
            error = _attempt(lambda: store.open_folder(self.checkpoints, self.step))
        if not self._failed_anywhere(error):
            error = _attempt(lambda: self._write(folder))
        if not self._failed_anywhere(error) and self.engine.rank == 0:
            contents = {
                "step": self.step,
                "world_size": self.engine.world_size,
                "config": self.config.model_dump(),
                "data": self.loader.state_dict(),
                "heldout_loss": None if math.isnan(self.heldout) else self.heldout,
                "heldout_step": self.evaluated_at,
            }
            error = _attempt(lambda: store.commit(folder, contents, self.config.checkpoint.save_total_limit))
        failure = self._failed_anywhere(error)
        if failure:
            if self.engine.rank == 0:
                store.discard(folder)
            raise TrainingError(
                f"{folder.with_suffix('')}: the checkpoint could not be written ({failure}); {self._safe()}"
            )
        self.saved_at = self.step
        logger.info(f"step {self.step} | saved {folder.with_suffix('')} | {duration(time.perf_counter() - started_at)}")

    def _write(self, folder: Path) -> None:
        self.engine.save(folder / "engine")
        if self.engine.rank == 0:
            shutil.copyfile(self.shards / "tokenizer.json", folder / "tokenizer.json")
        torch.save(_generator_states(), folder / f"rank_{self.engine.rank}.pt")

    def load(self, checkpoint: Path, *, optimizer: bool = True) -> None:
        """Continues where `checkpoint` stood: weights, optimizer, step, data position, random generators.

        With `optimizer=False` AdamW starts anew. Raises UserError if the checkpoint is damaged or of another model,
        data set or world size.
        """
        manifest = store.read_manifest(checkpoint)
        differences = model_differences(self.config, manifest["config"])
        if differences:
            raise UserError(f"{checkpoint}: is of another model: {'; '.join(differences)}; resume with its settings")
        self.loader.load_state_dict(manifest["data"])
        self.engine.load(checkpoint / "engine", optimizer=optimizer)
        generators = checkpoint / f"rank_{self.engine.rank}.pt"
        if generators.is_file():  # a larger world has ranks that were never saved
            _restore_generators(torch.load(generators, weights_only=False))
        self.step = self.saved_at = manifest["step"]
        self.evaluated_at = manifest["heldout_step"]
        if manifest["heldout_loss"] is not None:
            self.heldout = manifest["heldout_loss"]

    def _over_ranks(
        self, figures: torch.Tensor, shape: torch.Size
    ) -> tuple[list[float], dict[str, list[float]], torch.Tensor, int]:
        """`_figures` summed over a step's micro-batches, L MoE blocks and E experts → losses and routing figures, means
        over micro-batches and ranks, the requests (L, E) of all of them, and the signal that asks to stop (or 0).

        One all-reduce, and one wait for the device.
        """
        signal_number, (L, E) = self._stop_signal, shape
        shared = torch.cat((figures, figures.new_full((1,), signal_number)))
        dist.all_reduce(shared)
        sums, requested, signals_1 = shared.split((3 + 4 * L, L * E, 1))
        requested_LE = requested.view(L, E)
        utilisation_L = requested_LE.mean(1) / requested_LE.amax(1).clamp_min(1)
        passes = self.config.training.gradient_accumulation_steps * self.engine.world_size
        *means, signals = torch.cat((sums / passes, utilisation_L, signals_1)).tolist()
        names = ("balance_loss", "entropy", "rerouted", "dropped", "utilisation")
        by_block = (means[3 + i * L : 3 + (i + 1) * L] for i in range(len(names)))
        routing = {name: [round(value, 6) for value in values] for name, values in zip(names, by_block, strict=True)}
        # Any rank's signal stops all of them after the same step.
        return means[:3], routing, requested_LE, signal_number or (signal.SIGTERM if signals else 0)

    def _failed_anywhere(self, error: str | None) -> str | None:
        """This rank's error, or another's, on every rank."""
        errors: list[str | None] = [None] * self.engine.world_size
        dist.all_gather_object(errors, error)
        return next((e for e in errors if e), None)

    def _stopped(self, why: str) -> TrainingError:
        return TrainingError(f"step {self.step + 1} was not taken: {why}; {self._safe()}")

    def _safe(self) -> str:
        saved = store.list_checkpoints(self.checkpoints)
        return f"the newest checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """On rank 0, metrics.jsonl is open and the bar shown."""
        if self.engine.rank != 0:
            yield
            return
        self._metrics = Metrics(self.run_folder / "metrics.jsonl", self.step)
        self._bar = StepBar(self.step, self.config.training.max_steps, enabled=self.config.logging.progress)
        try:
            yield
        finally:
            self._bar.close()
            self._metrics.close()

    def _show(self, record: dict[str, Any]) -> None:
        if self._metrics is None or self._bar is None:
            return
        self._metrics.write(record)
        self._bar.advance(record["loss"])
        if self.step % self.config.logging.log_steps == 0 or self._bar.steps_done == 1:
            logger.info(step_line(record, self.config.training.max_steps, self._bar.eta()))

    @contextmanager
    def _signals_noted(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the run after its step instead of the process at once."""

        def note(number: int, frame: FrameType | None) -> None:
            self._stop_signal = number

        previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def seed_generators(seed: int) -> None:
    """python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _figures(output: Output) -> torch.Tensor:
    """What is added up over micro-batches and ranks, in one float64 vector: counts stay whole."""
    losses_3 = torch.stack((output.loss, output.balance_loss, output.z_loss))
    return torch.cat((losses_3, output.routing.flatten(), output.requested.flatten().double()))


def _generator_states() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _restore_generators(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _attempt(action: Callable[[], object]) -> str | None:
    """Runs it; a failure to write comes back as a line, so that the ranks can agree on it."""
    try:
        action()
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        return " ".join(str(error).split())
    return None
