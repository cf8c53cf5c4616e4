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
from ava_fast.data.batches import Batch, Shards, sources_of
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
from ava_fast.stability.judge import Judge, Ruling, Trouble, Verdict
from ava_fast.stability.replay import dump

logger = logging.getLogger(__name__)
evaluation_logger = logging.getLogger(EVALUATION_LOG)


class Trainer:
    """One run on all ranks: `Trainer(config, …).run()`.

    `run_folder` is the run's place on disk, `shards` the prepared data. All ranks construct it together.
    """

    def __init__(
        self, config: Config, run_folder: Path, shards: Shards, weights: dict[str, torch.Tensor] | None = None
    ):
        self.config, self.shards = config, sources_of(shards)[0].folder
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
            document_attention=config.data.document_attention,
            prefetch=config.data.prefetch_batches,
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
        self.judge = Judge(config.stability)
        self.step = 0
        """Optimizer steps taken; a skipped batch is none."""
        self._trouble_from: int | None = None  # the position of the first batch that went wrong, until calm returns
        self.evaluated_at = self.saved_at = -1
        self.heldout = math.nan
        self._stop_signal = 0
        self._metrics: Metrics | None = None  # on rank 0, while it runs
        self._bar: StepBar | None = None
        self._eos_id = self.loader.batches.sources[0].eos_id if config.data.document_attention else None
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
                ruling, interrupted = self._step()
                if ruling.verdict is Verdict.STOP:
                    raise self._stopped(ruling)
                if ruling.verdict is Verdict.ROLL_BACK:
                    self._roll_back()
                elif ruling.apply and _due(self.step, config.evaluation.eval_steps):
                    self._evaluate()
                if interrupted or (ruling.apply and _due(self.step, config.checkpoint.save_steps)):
                    self.save()
                if interrupted:
                    name = signal.Signals(interrupted).name
                    raise Interrupted(f"{name}: saved at step {self.step}; go on with --resume latest")
            if self.evaluated_at != self.step:
                self._evaluate()
            if self.saved_at != self.step:
                self.save()

    def _step(self) -> tuple[Ruling, int]:
        """One optimizer step, or none, as the judge rules → the ruling, and the signal that asks to stop (or 0)."""
        training, engine = self.config.training, self.engine
        started_at, noise = time.perf_counter(), _generator_states()
        batches, positions, seen, errors = [], [], [], []
        engine.model.train()
        for _ in range(training.gradient_accumulation_steps):
            batch, error = self._read()
            batches.append(batch)
            positions.append(self.loader.position - training.batch_size)
            output = self._forward_backward(batch)
            seen.append(_figures(output))
            if error:
                errors.append(error)
                seen[-1][0] = math.nan  # which every rank will learn
        totals = self._over_ranks(torch.stack(seen).sum(0), output.requested.shape)
        (loss, balance_loss, z_loss), routing, requested_LE, interrupted = totals
        lr, ruling = learning_rate(self.step, training), Ruling(Verdict.SKIP, False, 1.0)

        def decide(grad_norm: float) -> float | None:
            nonlocal lr, ruling
            ruling = self.judge.rule(loss, grad_norm, can_roll_back=self.saved_at >= 0)
            lr *= ruling.factor
            return lr if ruling.apply else None

        result = engine.step(decide)
        if ruling.trouble is not None:
            if self._trouble_from is None:
                self._trouble_from = positions[0]
            own_losses = [figures[0].item() for figures in seen]
            culprits = self._culprits(ruling, batches, positions, own_losses, noise, errors)
            self._tell(ruling, loss, result.grad_norm, culprits)
            self._dump(batches, noise)
        elif self.judge.calm:
            self._trouble_from = None
        if not ruling.apply:
            _restore_generators(noise)  # the next batch is seen as if this one had never been
            return ruling, interrupted
        update_expert_biases(engine.model, requested_LE)
        self.step += 1
        seconds = time.perf_counter() - started_at
        tokens_per_step = training.batch_size * self.config.data.max_length * training.gradient_accumulation_steps
        rate = tokens_per_step / seconds
        self._show(
            {
                "kind": "step",
                "step": self.step,
                "loss": loss,
                "balance_loss": balance_loss,
                "z_loss": z_loss,
                **({"routing": routing} if len(requested_LE) else {}),
                "verdict": ruling.verdict.value,
                "learning_rate": lr,
                "grad_norm": result.grad_norm,
                "grad_norm_clipped": min(result.grad_norm, training.max_grad_norm or math.inf),
                "seconds": seconds,
                "tokens": self.step * tokens_per_step,
                "tokens_per_second": rate,
                "mfu": rate * self._flops / (self._peak * engine.world_size) if self._peak else None,
            }
        )
        return ruling, interrupted

    def _read(self) -> tuple[Batch, str | None]:
        """The next batch; or, where the data is damaged, one that takes its place, and what is wrong: the other ranks
        are on their way into a collective, and this one must be there."""
        try:
            return self.loader.next_batch(), None
        except UserError as error:
            rows = self.config.training.batch_size // self.engine.world_size
            nothing_BS = torch.zeros(rows, self.config.data.max_length, dtype=torch.int64)
            return (nothing_BS, nothing_BS), str(error)

    def _forward_backward(self, batch: Batch) -> Output:
        output: Output = self.engine(*(t.to(self.engine.device, non_blocking=True) for t in batch))
        self.engine.backward(output.objective / self.config.training.gradient_accumulation_steps)
        return output

    def _culprits(
        self,
        ruling: Ruling,
        batches: list[Batch],
        positions: list[int],
        losses: list[float],
        noise: dict[str, Any],
        errors: list[str],
    ) -> list[dict[str, Any]]:
        """What each rank knows of a bad step: the documents that it saw, its loss, and, if only the gradient is not
        finite, the parameters in which it is not, found by computing the step once more. Collective.

        Where the loss is not finite on some ranks, or a gradient, only those are listed.
        """
        names: list[str] = []
        if ruling.trouble is Trouble.GRADIENT:
            _restore_generators(noise)
            with self.engine.nonfinite_gradients() as names:
                for batch in batches:
                    self._forward_backward(batch)
            self.engine.step(lambda _: None)
        bad = [position for position, loss in zip(positions, losses, strict=True) if not math.isfinite(loss)]
        documents = {document for position in bad or positions for document in self.loader.documents(position)}
        own = {
            "rank": self.engine.rank,
            "loss": _number(sum(losses) / len(losses)),
            "parameters": names,
            "documents": sorted(documents),
            **({"errors": errors} if errors else {}),
        }
        everyone: list[dict[str, Any]] = [{}] * self.engine.world_size
        dist.all_gather_object(everyone, own)
        return [each for each in everyone if each["loss"] is None or each["parameters"]] or everyone

    def _tell(self, ruling: Ruling, loss: float, grad_norm: float, culprits: list[dict[str, Any]]) -> None:
        """Into metrics.jsonl and errors.log."""
        assert ruling.trouble is not None
        if self._metrics:
            self._metrics.write(
                {
                    "kind": "verdict",
                    "step": self.step,
                    "verdict": ruling.verdict.value,
                    "trouble": ruling.trouble.value,
                    "reason": ruling.reason,
                    "applied": ruling.apply,
                    "loss": _number(loss),
                    "grad_norm": _number(grad_norm),
                    "learning_rate_factor": ruling.factor,
                    "position": self.loader.position,
                    "culprits": culprits,
                    "counts": dict(self.judge.counts),
                }
            )
        logger.warning(f"after step {self.step}: {ruling.verdict.value}: {ruling.reason}; {_blame(culprits)}")
        if ruling.trouble is Trouble.GRADIENT and not any(each["parameters"] for each in culprits):
            logger.warning("the same step, computed again, has only finite gradients: suspect this machine's hardware")
        if ruling.verdict is Verdict.CUT:
            steps = self.config.stability.recovery_steps
            logger.warning(
                f"the learning rate is cut to {ruling.factor:g} of its schedule, and back in {steps} good steps"
            )

    def _dump(self, batches: list[Batch], noise: dict[str, Any]) -> None:
        """Keeps the batch for `ava-fast replay`, on every rank; a disk that refuses is no reason to end a run."""
        if self.judge.bad_steps > self.config.stability.dump_batches:
            return
        folder = self.run_folder / "bad_batches" / f"step_{self.step}_at_{self.loader.position}"
        error = _attempt(lambda: dump(folder, self.engine.rank, batches, noise["torch"]))
        if error:
            logger.warning(f"{folder}: the batch could not be written ({error})")

    def _roll_back(self) -> None:
        """To the last checkpoint that was saved in calm, or else the last; past the batches since trouble began."""
        stretch = (self._trouble_from or 0, self.loader.position)
        avoid, abandoned = [*self.loader.avoid, stretch], self.step
        choice: list[Path | str] = [""]
        if self.engine.rank == 0:
            choice = [_last_good(self.checkpoints)]
        dist.broadcast_object_list(choice, src=0)
        checkpoint = choice[0]
        if not isinstance(checkpoint, Path):
            raise TrainingError(f"step {self.step}: cannot roll back: {checkpoint}")
        judge = self.judge.state_dict()
        self.load(checkpoint)
        self.judge.load_state_dict(judge)
        self.loader.avoid, self._trouble_from = avoid, None
        error = _attempt(lambda: store.rewind(checkpoint)) if self.engine.rank == 0 else None
        if failure := self._failed_anywhere(error):
            raise TrainingError(f"{checkpoint}: rolled back to it, but its successors cannot be removed ({failure})")
        if self._metrics:
            self._unwatch()
            self._watch()
        logger.warning(
            f"rolled back from step {abandoned} to {checkpoint}; sequences {stretch[0]:,} to {stretch[1]:,} of the "
            "data order are skipped from now on"
        )

    def _evaluate(self) -> None:
        started_at = time.perf_counter()
        self.heldout = heldout_loss(self.engine, self.heldout_NS1, self.config.training.batch_size, self._eos_id)
        self.evaluated_at = self.step
        seconds = time.perf_counter() - started_at
        if self._metrics:
            self._metrics.write({"kind": "evaluation", "step": self.step, "loss": self.heldout, "seconds": seconds})
        evaluation_logger.info(f"step {self.step} | held-out loss {self.heldout:.4f} | {duration(seconds)}")

    def save(self, *, emergency: bool = False) -> None:
        """Writes `checkpoints/step_N`, on all ranks or, if one of them cannot, on none.

        `emergency`: not one to roll back to while there is another. Raises TrainingError if it could not be written;
        nothing half-written stays.
        """
        started_at, calm = time.perf_counter(), self.judge.calm and not emergency
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
                "stability": {
                    "calm": calm,
                    "judge": self.judge.state_dict(),
                    "trouble_from": self._trouble_from,
                },
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
        """Continues where `checkpoint` stood: weights, optimizer, step, data position, judge, random generators.

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
        self.judge.load_state_dict(manifest["stability"]["judge"])
        self._trouble_from = manifest["stability"]["trouble_from"]
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

    def _stopped(self, ruling: Ruling) -> TrainingError:
        """After an emergency checkpoint: what happened, and what to try."""
        self._trouble_from = None  # a run that a person resumes starts afresh, as the judge does
        try:
            self.save(emergency=True)
            saved = f"an emergency checkpoint is {self.checkpoints / f'step_{self.step}'}"
        except TrainingError as error:
            saved = f"no emergency checkpoint: {error}"
        training, stability = self.config.training, self.config.stability
        counts = ", ".join(f"{self.judge.counts[t.value]} × {t.value}" for t in Trouble if self.judge.counts[t.value])
        return TrainingError(
            f"stopped after step {self.step}: {ruling.reason}. In this run: {counts}. {saved}. Try a lower "
            f"training.learning_rate (now {training.learning_rate:g}), more training.warmup_steps, a lower "
            f"training.max_grad_norm (now {training.max_grad_norm:g}) or other data, then --resume latest; if the "
            "steps were healthy, a higher stability.deviations or stability.max_norm, or more stability.max_skips "
            f"(now {stability.max_skips}). docs/when-training-misbehaves.md says more"
        )

    def _safe(self) -> str:
        saved = store.list_checkpoints(self.checkpoints)
        return f"the newest checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """On rank 0, metrics.jsonl is open and the bar shown."""
        if self.engine.rank != 0:
            yield
            return
        self._watch()
        try:
            yield
        finally:
            self._unwatch()

    def _watch(self) -> None:
        self._metrics = Metrics(self.run_folder / "metrics.jsonl", self.step, self.judge.bad_steps)
        self._bar = StepBar(self.step, self.config.training.max_steps, enabled=self.config.logging.progress)

    def _unwatch(self) -> None:
        if self._metrics and self._bar:
            self._bar.close()
            self._metrics.close()
        self._bar = self._metrics = None

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


def _number(value: float) -> float | None:
    """None for what JSON has no number for."""
    return value if math.isfinite(value) else None


def _blame(culprits: list[dict[str, Any]]) -> str:
    """`rank 1: documents 3, 17; parameters a, b, … (9)`"""

    def some(values: list[Any]) -> str:
        return ", ".join(map(str, values[:5])) + (f", … ({len(values)})" if len(values) > 5 else "")

    return "; ".join(
        f"rank {each['rank']}: documents {some(each['documents'])}"
        + (f", parameters {some(each['parameters'])}" if each["parameters"] else "")
        + "".join(f", {error}" for error in each.get("errors", []))
        for each in culprits
    )


def _last_good(checkpoints: Path) -> Path | str:
    """The newest checkpoint that verifies, of those saved in calm if there are any; or why there is none."""
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


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _attempt(action: Callable[[], object]) -> str | None:
    """Runs it; a failure to write comes back as a line, so that the ranks can agree on it."""
    try:
        action()
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        return " ".join(str(error).split())
    return None
