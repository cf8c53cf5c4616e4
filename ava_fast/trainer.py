"""The training loop. `Trainer.run` reads like the flowchart of a run, `Trainer._step` like that of a step."""

from __future__ import annotations

import gc
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from ava_fast.checkpoint import store
from ava_fast.checkpoint.generators import generator_states, restore_generators, seed_generators
from ava_fast.checkpoint.keeper import Keeper
from ava_fast.compatibility import conflicts
from ava_fast.config import Config
from ava_fast.data.batches import Batch, Shards, cut, sources_of
from ava_fast.data.loader import TokenLoader, heldout_sequences
from ava_fast.distributed import elastic, pace, stuck
from ava_fast.distributed.health import Watch, raise_if_aborted
from ava_fast.engine import Engine, StepResult
from ava_fast.errors import Interrupted, LostRank, TrainingError, UserError
from ava_fast.evaluate.heldout import PROBE, heldout_loss, probe_loss
from ava_fast.model.moe import update_expert_biases
from ava_fast.model.transformer import Output, Transformer
from ava_fast.observe.console import duration
from ava_fast.observe.debug import CloseLook
from ava_fast.observe.progress import Progress
from ava_fast.observe.run import EVALUATION_LOG, number
from ava_fast.observe.throughput import flops_per_token, peak_flops
from ava_fast.parts import part
from ava_fast.schedule.adaptive import AdaptiveRate
from ava_fast.schedule.learning_rate import learning_rate
from ava_fast.schedule.length import in_pieces, sequence_length
from ava_fast.schedule.micro_batches import MicroBatches
from ava_fast.schedule.noise_scale import NoiseScale
from ava_fast.schedule.scores import easy_first
from ava_fast.stability import room, telling
from ava_fast.stability.failures import (
    MADE_ROOM,
    PAUSES,
    RETRIED,
    attempt,
    in_a_line,
    is_device_fault,
    is_network,
    is_out_of_memory,
    more_room,
    retried,
)
from ava_fast.stability.judge import FAILURES, Judge, Ruling, Trouble, Verdict
from ava_fast.stability.replay import dump
from ava_fast.stability.surgery import Surgery
from ava_fast.stability.utilisation import ADVISED, EMPTIED, SAVED, Utilisation, empty_cache

logger = logging.getLogger(__name__)
evaluation_logger = logging.getLogger(EVALUATION_LOG)


class Trainer:
    """One run on all ranks: `Trainer(config, …).run()`.

    `run_folder` is the run's place on disk, `shards` the prepared data. All ranks construct it together.
    """

    def __init__(
        self, config: Config, run_folder: Path, shards: Shards, weights: dict[str, torch.Tensor] | None = None
    ):
        rank, world_size = dist.get_rank(), dist.get_world_size()
        rows = config.training.batch_size // world_size
        config = room.kept(run_folder, config, rows)
        self.config, self.shards = config, sources_of(shards)[0].folder
        self.run_folder, self.checkpoints = run_folder, run_folder / "checkpoints"
        self._room = room.Room.of(config, rows)
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
            orders=easy_first(config, shards),
        )
        self.heldout_NS1 = heldout_sequences(
            shards, max_length=config.data.max_length, limit=config.evaluation.max_sequences
        )
        seed_generators(training.seed)  # the same weights on every rank
        model = Transformer(config)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        if weights is not None:
            model.load_state_dict(weights)
        self._build(model)
        seed_generators(training.seed + 1 + rank)  # different noise on each
        self.judge = Judge(config.stability, training.adaptive_lr.emergency_factor)
        self.adaptive = AdaptiveRate(training)
        self.rate: Callable[[int], float] = self.adaptive.rate
        """The learning rate of a step, counted from 0, before the judge's factor."""
        self.batch_sizes = MicroBatches(config)
        self.micro_batches = self.batch_sizes.at(0)
        """Of the step under way, or the last."""
        self.length = config.data.max_length
        """Of the sequences of the step under way, or the last: each row that the loader gives is cut into such."""
        self.noise_scale: NoiseScale | None = None
        if training.noise_scale_steps:
            per_step = training.batch_size * training.gradient_accumulation_steps
            self.noise_scale = NoiseScale(training.batch_size / world_size, per_step)
        self.step = 0
        """Optimizer steps taken; a skipped batch is none."""
        self.tokens = 0
        """What these steps have trained on."""
        self._trouble_from: int | None = None  # the position of the first batch that went wrong, until calm returns
        self.evaluated_at = -1
        self.heldout = self.loss = math.nan
        """The losses last seen: held-out, and of a step's micro-batches on all ranks; nats per token."""
        self._stop_signal = 0
        # Of this rank, in the step under way: what went wrong, in words, and the position of its batch.
        self._failures: list[tuple[Trouble, str, int]] = []
        self._lost_step = False  # the step under way cannot be taken
        routed = config.model.num_layers - config.model.num_dense_layers if config.moe.num_experts else 0
        self._routed = (routed, config.moe.num_experts if routed else 1)  # MoE blocks and experts
        self._surgery = Surgery(config)
        self._retries = 0  # since the last step, on this rank
        self._stretch: tuple[int, int] | None = None  # of positions, while their batches are computed
        self._leaving = False
        self._pace = pace.Pace(
            rank,
            world_size,
            config.distributed.straggler_ratio,
            config.logging.log_steps,
            cuda=self.engine.device.type == "cuda",
        )
        self._utilisation = Utilisation(rank, world_size, self.engine.device, config.memory.thresholds)
        self._save_early: bool | None = None  # None: not yet; False: no more
        self.restarted: dict[str, Any] | None = None
        """The record of the restart that this run goes on from; see distributed.elastic."""
        self._progress = Progress(config, run_folder, rank)
        self._eos_id = self.loader.batches.sources[0].eos_id if config.data.document_attention else None
        self._peak = peak_flops(config, self.engine.device)
        self._unshown = (0, 0, 0.0)  # steps, tokens and seconds since the last step record
        self._look = CloseLook(training)

    def _build(self, model: Transformer) -> None:
        self.engine = Engine(model, self.config)
        self.keeper = Keeper(self.checkpoints, self.engine, self.config, self.shards / "tokenizer.json")

    def run(self, watch: Watch | None = None) -> None:
        """Trains from the current step to `max_steps`, evaluates and saves at the end. `watch`: one that is open.

        Raises Interrupted after SIGTERM or SIGINT, with the finished steps saved, and TrainingError where training
        cannot go on: LostRank on every rank if one of them failed while others waited for it.
        """
        if watch is None:
            with Watch(self.config.distributed, self.run_folder) as watch:
                self.run(watch)
            return
        self._pace.hosts = [peer.host for peer in watch.peers]
        with (
            self._progress.open(self.step, self.judge.bad_steps),
            self._signals_noted(),
            self._look.at(self.engine.model),
        ):
            if self.restarted:
                self._progress.write(self.restarted)
            try:
                self._run(watch)
            except (TrainingError, Interrupted):
                raise
            except Exception as error:
                self._leaving = True
                logger.debug("this rank fails", exc_info=True)
                raise self._lost(error, watch) from error

    def _run(self, watch: Watch) -> None:
        config = self.config
        watch.enter("start")
        while self.step < config.training.max_steps:
            ruling, interrupted = self._step()
            if ruling.verdict is Verdict.STOP:
                raise self._stopped(ruling)
            if ruling.verdict is Verdict.ROLL_BACK:
                self._roll_back()
            elif ruling.apply and _due(self.step, config.evaluation.eval_steps):
                watch.enter("evaluate")
                self._evaluate()
            if interrupted or (ruling.apply and (_due(self.step, config.checkpoint.save_steps) or self._save_early)):
                watch.enter("save")
                self.save(wait=bool(interrupted or self._save_early))
                self._save_early = None if self._save_early is None else False
            if interrupted:
                name = signal.Signals(interrupted).name
                raise Interrupted(f"{name}: saved at step {self.step}; go on with --resume latest")
            watch.enter("step")
        if config.memory.thresholds:
            self._progress.write(self._utilisation.most().record(self.step))
        watch.enter("evaluate")
        if self.evaluated_at != self.step:
            self._evaluate()
        watch.enter("save")
        if self.keeper.saved_at != self.step:
            self.save(wait=True)
        self.keeper.settle()
        self._note_saves()

    def advance(self) -> tuple[Ruling, float]:
        """One step of a loop that is not `run` → the ruling, and the loss as a mean over ranks. Collective."""
        ruling, _ = self._step()
        while not ruling.apply and ruling.trouble is None:  # the same step again, in less memory
            ruling, _ = self._step()
        return ruling, self.loss

    def _step(self) -> tuple[Ruling, int]:
        """One optimizer step, or none, as the judge rules → the ruling, and the signal that asks to stop (or 0).

        Where the step did not fit into memory and there is a way that takes less, none is taken, and the loader and the
        generators are back where they were: the next call takes the same step.
        """
        training, engine = self.config.training, self.engine
        started_at, noise, start = time.perf_counter(), generator_states(), self.loader.position
        batches, positions, seen = [], [], []
        self._failures, self._lost_step = [], False
        self._surgery.begin()
        self.micro_batches, self.length = self.batch_sizes.at(self.step), sequence_length(self.step, self.config)
        sequences = training.batch_size * self.micro_batches
        engine.model.train()
        self._look.begin()
        for _ in range(self.micro_batches):
            with part("data"), self._pace:
                batches.append(self._read())
            positions.append(self.loader.position - training.batch_size)
            self._stretch = positions[0], max(positions[0] + sequences, self.loader.position)
            seen.append(self._compute(batches[-1]))
        totals = self._over_ranks(torch.stack(seen).sum(0))
        self._stretch = None
        (loss, balance_loss, z_loss, square), routing, requested_LE, failures, interrupted = totals
        if self._makes_room(failures, start, noise):
            return Ruling(Verdict.SKIP, False, 1.0), interrupted
        self.loss = loss
        lr = self.rate(self.step) * self.batch_sizes.rate_factor(self.micro_batches)
        ruling = Ruling(Verdict.SKIP, False, 1.0)

        def decide(grad_norm: float) -> float | None:
            nonlocal lr, ruling
            ruling = self.judge.rule(loss, grad_norm, can_roll_back=self.keeper.saved_at >= 0)
            lr *= ruling.factor
            return lr if ruling.apply else None

        if failures:
            engine.discard()
            ruling = self.judge.rule(math.nan, math.nan, can_roll_back=self.keeper.saved_at >= 0, failures=failures)
            result = StepResult(math.nan, 0, applied=False)
        else:
            self._surgery.operate(engine, self.step)
            result = engine.step(decide)
        if ruling.trouble is not None:
            if self._trouble_from is None:
                self._trouble_from = positions[0]
            own_losses = [figures[0].item() for figures in seen]
            own = self._own_view(ruling, batches, positions, own_losses, noise)
            self._tell(ruling, loss, result, telling.culprits(own, ruling.trouble))
            self._dump(batches, noise)
            self.adaptive.disturbed()
        elif self.judge.calm:
            self._trouble_from = None
        if not ruling.apply:
            restore_generators(noise)  # the next batch is seen as if this one had never been
            return ruling, interrupted
        self._surgery.applied()
        update_expert_biases(engine.model, requested_LE)
        scheduled, change, regrouped = learning_rate(self.step, training), None, None
        if ruling.trouble is None:
            change = self.adaptive.observe(self.step, loss, result.grad_norm)
            if self._measures_noise():
                assert self.noise_scale is not None
                parts = len(self._parts(batches[0]))
                self.noise_scale.update(square, result.grad_norm**2, big=sequences, parts=parts)
                regrouped = self.batch_sizes.observe(self.noise_scale.sequences)
        self.step += 1
        self._look.end()
        tokens = sequences * self.config.data.max_length
        self.tokens += tokens
        steps, unshown, seconds = self._unshown
        self._unshown = steps + 1, unshown + tokens, seconds + time.perf_counter() - started_at
        if training.mode == "fast" and not (interrupted or ruling.trouble or self._record_due()):
            return ruling, interrupted
        steps, tokens, seconds = self._unshown
        self._unshown, rate = (0, 0, 0.0), tokens / seconds
        curriculum, flops = self.config.curriculum, flops_per_token(self.config, self.length)
        self._progress.step(
            {
                "kind": "step",
                "step": self.step,
                "loss": loss,
                "balance_loss": balance_loss,
                "z_loss": z_loss,
                **({"routing": routing} if len(requested_LE) else {}),
                "verdict": ruling.verdict.value,
                "learning_rate": lr,
                **({"scheduled_rate": scheduled} if training.adaptive_lr.enabled else {}),
                **({"noise_scale": self.noise_scale.sequences} if self.noise_scale else {}),
                "grad_norm": result.grad_norm,
                "grad_norm_clipped": min(result.grad_norm, training.max_grad_norm or math.inf),
                **({"micro_batches": self.micro_batches} if curriculum.batch.shape != "constant" else {}),
                **({"sequence_length": self.length} if curriculum.length.shape != "constant" else {}),
                "seconds": seconds / steps,
                **({"steps": steps} if training.mode == "fast" else {}),
                "tokens": self.tokens,
                "tokens_per_second": rate,
                "mfu": rate * flops / (self._peak * engine.world_size) if self._peak else None,
            },
            self._pace,
        )
        if regrouped is not None:
            logger.info(f"step {self.step} | {regrouped}")
        if change is not None:
            record = {"kind": "rate", "step": self.step, "factor": change.factor, "reason": change.reason}
            self._progress.write(record)
            logger.info(f"step {self.step} | {change.reason}")
        return ruling, interrupted

    def _record_due(self) -> bool:
        """In `fast`: where a person or a resumed run would miss it."""
        config, last = self.config, self.step == self.config.training.max_steps
        every = (config.logging.log_steps, config.checkpoint.save_steps, config.evaluation.eval_steps)
        return last or any(_due(self.step, steps) for steps in every)

    def _measures_noise(self) -> bool:
        due = self.noise_scale is not None and self.step % self.config.training.noise_scale_steps == 0
        return due and self.micro_batches * self.engine.world_size > 1  # else there are no gradients of two sizes

    def _read(self) -> Batch:
        """The next batch; where it cannot be read, one that takes its place, as the other ranks are on their way into
        a collective and this one must be there. They learn of it in `_over_ranks`."""
        position = self.loader.position

        def read() -> Batch:
            self.loader.position = position
            return self.loader.next_batch()

        try:
            batch, retries = retried(read)
            self._retries += retries
            return batch
        except (UserError, OSError) as error:
            self._retries += len(PAUSES) if is_network(error) else 0
            self._failed(Trouble.DATA, str(error))
            rows = self.config.training.batch_size // self.engine.world_size
            nothing_BS = torch.zeros(rows, self.config.data.max_length, dtype=torch.int64)
            return nothing_BS, nothing_BS

    def _compute(self, batch: Batch) -> torch.Tensor:
        """Forward and backward → `_figures`.

        An exception is noted for all ranks to learn, as long as none waits for this one in a collective; else it is
        raised, and ends the run on every rank. Once it is known that the step is lost, nothing is computed.
        """
        engine, (L, E) = self.engine, self._routed
        figures = torch.zeros(4 + 4 * L + L * E, dtype=torch.float64, device=engine.device)
        for piece, share in self._parts(batch):
            if self._lost_step:
                return figures
            try:
                with self._pace if engine.collectives != "forward" else nullcontext():
                    output = self._forward(piece)
                    self._utilisation.look()
                    if engine.collectives == "step":
                        square = self._backward(output, share)
            except Exception as error:
                if engine.collectives == "forward" or is_device_fault(error):
                    raise
                logger.debug("an exception in the model", exc_info=True)
                self._failed(Trouble.MEMORY if is_out_of_memory(error) else Trouble.EXCEPTION, in_a_line(error))
                self._lost_step = True
            if engine.collectives == "backward":
                self._lost_step = not engine.all_agree(not self._lost_step)
            if self._lost_step:
                return figures
            if engine.collectives != "step":
                square = self._backward(output, share)
            figures += _figures(output, square, share)
        self._surgery.take(engine)
        return figures

    def _parts(self, batch: Batch) -> list[tuple[Batch, float]]:
        """A micro-batch in pieces of at most `memory.micro_batch` sequences, each with its share of it."""
        rows, most = len(batch[0]), self._room.micro_batch
        if rows <= most:
            return [(batch, 1.0)]
        return [(cut(batch, at, min(at + most, rows)), min(most, rows - at) / rows) for at in range(0, rows, most)]

    def _makes_room(self, failures: dict[Trouble, int], start: int, noise: dict[str, Any]) -> bool:
        """Whether the step is to be taken again in another way: as it did not fit, or to see how large a micro-batch
        does. Collective."""
        now, memory = self._room, self.config.memory
        if Trouble.MEMORY in failures and memory.on_out_of_memory == "ladder":
            then = self._next_rung()
            why = f"{Trouble.MEMORY.value} on {failures[Trouble.MEMORY]} rank(s) with {now}"
        elif now.searching and not failures:
            then, why = now.passed(), f"{now} are enough"
        else:
            return False
        if then is None:
            return False
        if not failures and then.micro_batch == now.micro_batch:  # found, and this very step has passed with it
            self._take(then, f"{why}, and stay")
            return False
        self.engine.discard()
        self.loader.position = start
        if (then.zero_stage, then.offload) != (now.zero_stage, now.offload):
            restore_generators(noise)
            self._rebuild(then)
        self._take(then, f"{why}; the same step again with {then}")
        restore_generators(noise)
        return True

    def _next_rung(self) -> room.Room | None:
        may_shard = not conflicts(room.with_room(self.config, replace(self._room, zero_stage=2, offload=False)))
        return self._room.more(self.engine.world_size, may_shard=may_shard)

    def _take(self, then: room.Room, said: str) -> None:
        """From now on steps are taken so."""
        self._room, self.config = then, room.with_room(self.config, then)
        model = self.engine.model
        assert isinstance(model, Transformer)
        model.recompute = then.recompute
        self.judge.counts[MADE_ROOM] += 1
        empty_cache(self.engine.device)
        self._keep(then)
        self._progress.write({"kind": "memory", "step": self.step, "reason": said, **asdict(then)})
        logger.warning(f"after step {self.step}: {said}")

    def _keep(self, then: room.Room) -> None:
        if self.engine.rank == 0 and (error := attempt(lambda: room.keep(self.run_folder, then))):
            logger.warning(f"{self.run_folder / room.FILE}: could not be written ({error})")

    def _rebuild(self, then: room.Room) -> None:
        """The same run, as it stands, in another ZeRO stage: through a checkpoint."""
        self.save(wait=True)
        self._note_saves()
        self.keeper.settle()
        checkpoint = self.checkpoints / f"step_{self.step}"
        self.engine.release()
        self.config = room.with_room(self.config, then)
        self._look.turn_to(None)
        device = self.engine.device
        del self.engine, self.keeper  # there is no room for two
        gc.collect()  # DeepSpeed's hooks and its optimizer hold each other: one pass leaves what a second one frees
        empty_cache(device)
        self._build(Transformer(self.config))
        self._look.turn_to(self.engine.model)
        self.load(checkpoint)

    def _failed(self, trouble: Trouble, line: str) -> None:
        self._failures.append((trouble, line, self.loader.position - self.config.training.batch_size))

    def _forward(self, batch: Batch) -> Output:
        pieces = in_pieces(batch, self.length)
        output: Output = self.engine(*(t.to(self.engine.device, non_blocking=True) for t in pieces))
        return output

    def _backward(self, output: Output, share: float) -> torch.Tensor:
        """Adds the gradient of a part that is `share` of its micro-batch → the squared norm of the part's own on this
        rank, 0-d; 0 where it is not asked for."""
        N = self.micro_batches
        objective = output.objective * share / N
        if not self._measures_noise():
            self.engine.backward(objective)
            return torch.zeros((), device=self.engine.device)
        with self.engine.squared_gradients() as squares:
            self.engine.backward(objective)
        return torch.stack(squares).sum() * (N / share) ** 2

    def _own_view(
        self,
        ruling: Ruling,
        batches: list[Batch],
        positions: list[int],
        losses: list[float],
        noise: dict[str, Any],
    ) -> telling.Culprit:
        """What this rank knows of a bad step: the documents that it saw, its loss, and, if only the gradient is not
        finite, the parameters in which it is not, found by computing the step once more. Collective."""
        names: list[str] = []
        if ruling.trouble is Trouble.GRADIENT:
            restore_generators(noise)
            with self.engine.nonfinite_gradients() as names:
                for piece, share in (each for batch in batches for each in self._parts(batch)):
                    self._backward(self._forward(piece), share)
            self.engine.step(lambda _: None)
        bad = [position for position, loss in zip(positions, losses, strict=True) if not math.isfinite(loss)]
        bad += [position for _, _, position in self._failures]
        documents = {document for position in bad or positions for document in self.loader.documents(position)}
        return {
            "rank": self.engine.rank,
            "loss": None if ruling.trouble in FAILURES else number(sum(losses) / len(losses)),
            "parameters": names,
            "documents": sorted(documents),
            **({"module": self._look.first} if self._look.first else {}),
            **({"errors": [line for _, line, _ in self._failures]} if self._failures else {}),
        }

    def _tell(self, ruling: Ruling, loss: float, result: StepResult, culprits: list[telling.Culprit]) -> None:
        """Into metrics.jsonl and errors.log."""
        position = self.loader.position
        self._progress.write(telling.record(ruling, self.judge, self.step, loss, result, position, culprits))
        for line in telling.lines(ruling, self.step, culprits, self.config.stability.recovery_steps):
            logger.warning(line)

    def _dump(self, batches: list[Batch], noise: dict[str, Any]) -> None:
        """Keeps the batch for `ava-fast replay`, on every rank; a disk that refuses is no reason to end a run."""
        if self.judge.bad_steps > self.config.stability.dump_batches:
            return
        folder = self.run_folder / "bad_batches" / f"step_{self.step}_at_{self.loader.position}"
        pieces = [in_pieces(batch, self.length) for batch in batches]
        error = attempt(lambda: dump(folder, self.engine.rank, pieces, noise["torch"]))
        if error:
            logger.warning(f"{folder}: the batch could not be written ({error})")

    def _roll_back(self) -> None:
        """To the last checkpoint that was saved in calm, or else the last; past the batches since trouble began."""
        stretch = (self._trouble_from or 0, self.loader.position)
        avoid, abandoned = [*self.loader.avoid, stretch], self.step
        judge = self.judge.state_dict()
        checkpoint = self.load(*self.keeper.good_ones(self.step))
        self.judge.load_state_dict(judge)
        self.loader.avoid, self._trouble_from = avoid, None
        self.keeper.go_back(checkpoint, stretch)
        self._progress.back_to(self.step, self.judge.bad_steps)
        logger.warning(
            f"rolled back from step {abandoned} to {checkpoint}; sequences {stretch[0]:,} to {stretch[1]:,} of the "
            "data order are skipped from now on"
        )

    def _evaluate(self) -> None:
        started_at = time.perf_counter()
        self.heldout = heldout_loss(self.engine, self.heldout_NS1, self.config.training.batch_size, self._eos_id)
        self.evaluated_at = self.step
        seconds = time.perf_counter() - started_at
        self._progress.write({"kind": "evaluation", "step": self.step, "loss": self.heldout, "seconds": seconds})
        evaluation_logger.info(f"step {self.step} | held-out loss {self.heldout:.4f} | {duration(seconds)}")

    def save(self, *, wait: bool = False, emergency: bool = False) -> None:
        """Begins to write `checkpoints/step_N`; with `wait` or `emergency` it is on the disk afterwards. `emergency`:
        not one to roll back to while there is another. Raises TrainingError if it or the last one cannot be written."""
        started_at = time.perf_counter()
        state = {
            "data": self.loader.state_dict(),
            "stability": {
                "calm": self.judge.calm and not emergency,
                "judge": self.judge.state_dict(),
                "trouble_from": self._trouble_from,
                "targets": self._surgery.state(),
            },
            "schedule": {
                "adaptive": self.adaptive.state_dict(),
                "noise_scale": self.noise_scale.state_dict() if self.noise_scale else None,
                "micro_batches": self.batch_sizes.count,
            },
            "tokens": self.tokens,
            "heldout_loss": number(self.heldout),
            "probe": self._probe(),
            "heldout_step": self.evaluated_at,
        }
        self.keeper.save(self.step, state, wait=wait or emergency, since=started_at)

    def _probe(self) -> dict[str, Any]:
        """A few held-out tokens and their loss, by which whoever loads the checkpoint sees that it has loaded well."""
        tokens = self.heldout_NS1[0, : PROBE + 1].tolist()
        return {"tokens": tokens, "loss": number(probe_loss(self.engine.model, tokens, self.engine.device))}

    def load(self, *checkpoints: Path, optimizer: bool = True) -> Path:
        """Continues where the first of `checkpoints` that verifies stood: weights, optimizer, step, data position,
        judge, random generators → which it was.

        With `optimizer=False` AdamW starts anew. Raises UserError if none verifies or it is of another model or data
        set.
        """
        checkpoint, state = self.keeper.load(checkpoints, optimizer=optimizer)
        self.loader.load_state_dict(state["data"])
        self.loader.avoid += [each for each in store.avoided(self.checkpoints) if each not in self.loader.avoid]
        if schedule := state.get("schedule"):
            self.adaptive.load_state_dict(schedule["adaptive"])
            if self.noise_scale and schedule["noise_scale"]:
                self.noise_scale.load_state_dict(schedule["noise_scale"])
            self.batch_sizes.load(schedule.get("micro_batches"))
        stability = state["stability"]
        self.judge.load_state_dict(stability["judge"])
        self._trouble_from = stability["trouble_from"]
        self._surgery.load(stability.get("targets", []))
        self.step, self.evaluated_at = state["step"], state["heldout_step"]
        if "tokens" in state:
            self.tokens = state["tokens"]
        else:  # from when every step had as many
            training = self.config.training
            per_step = training.batch_size * training.gradient_accumulation_steps * self.config.data.max_length
            self.tokens = self.step * per_step
        if state["heldout_loss"] is not None:
            self.heldout = state["heldout_loss"]
        return checkpoint

    def _over_ranks(
        self, figures: torch.Tensor
    ) -> tuple[list[float], dict[str, list[float]], torch.Tensor, dict[Trouble, int], int]:
        """`_figures` summed over a step's micro-batches, L MoE blocks and E experts → losses, squared gradient norm and
        routing figures, means over micro-batches and ranks, the requests (L, E) of all of them, on how many ranks what
        failed, and the signal that asks to stop (or 0).

        One all-reduce, and one wait for the device.
        """
        signal_number, (L, E) = self._stop_signal, self._routed
        own = {trouble for trouble, _, _ in self._failures}
        health = [signal_number, self.keeper.failure is not None, self._retries + self.keeper.retries]
        health += [trouble in own for trouble in FAILURES]
        paces_W, memory_W = self._pace.share(), self._utilisation.share()
        shared = torch.cat((figures, figures.new_tensor([*health, *paces_W, *memory_W])))
        with part("communication"):
            dist.all_reduce(shared)
        sums, requested, rest = shared.split((4 + 4 * L, L * E, len(health) + 2 * len(paces_W)))
        requested_LE = requested.view(L, E)
        utilisation_L = requested_LE.mean(1) / requested_LE.amax(1).clamp_min(1)
        passes = self.micro_batches * self.engine.world_size
        means = torch.cat((sums / passes, utilisation_L, rest)).tolist()
        raise_if_aborted()
        W = len(paces_W)
        self._pace.heard(means[-2 * W : -W])
        self._note_utilisation(means[-W:])
        signals, failed_saves, retries, *failed = means[-len(health) - 2 * W : -2 * W]
        if failed_saves:
            self.keeper.settle()
        self._count_retries(int(retries))
        self._note_saves()
        names = ("balance_loss", "entropy", "rerouted", "dropped", "utilisation")
        failures = {trouble: int(ranks) for trouble, ranks in zip(FAILURES, failed, strict=True) if ranks}
        by_block = (means[4 + i * L : 4 + (i + 1) * L] for i in range(len(names)))
        routing = {name: [round(value, 6) for value in values] for name, values in zip(names, by_block, strict=True)}
        # Any rank's signal stops all of them after the same step.
        interrupted = signal_number or (signal.SIGTERM if signals else 0)
        return means[:4], routing, requested_LE, failures, interrupted

    def _note_saves(self) -> None:
        """Those that have been finished since the last call."""
        while self.keeper.news:
            self._progress.write(self.keeper.news.pop(0))

    def _note_utilisation(self, shares: list[float]) -> None:
        """Of the memory, by every rank; what follows changes no number of the run."""
        change = self._utilisation.heard(shares)
        if change is None:
            return
        said = f"rank {change.rank} takes {change.share:.0%} of the memory that it may have"
        if change.reached(EMPTIED):
            empty_cache(self.engine.device)
            said += "; what the allocators kept unused is given back"
        if change.reached(SAVED) and self._save_early is None:
            self._save_early = True
            said += "; a checkpoint follows, ahead of its time"
        if change.reached(ADVISED):
            said += f". {more_room(self.config)}"
        self._progress.write(change.record(self.step))
        (logger.warning if change.level > change.before else logger.info)(f"after step {self.step}: {said}")

    def _count_retries(self, retries: int) -> None:
        """What all ranks together tried again since the last step."""
        self._retries = self.keeper.retries = 0
        if retries:
            self.judge.counts[RETRIED] += retries
            self._progress.write({"kind": "retry", "step": self.step, "retries": retries})
            logger.warning(f"after step {self.step}: {retries} × {RETRIED}")

    def _stopped(self, ruling: Ruling) -> TrainingError:
        """After an emergency checkpoint: what happened, and what to try."""
        self._trouble_from = None  # a run that a person resumes starts afresh, as the judge does
        try:
            self.save(emergency=True)
            saved = f"an emergency checkpoint is {self.checkpoints / f'step_{self.step}'}"
        except TrainingError as error:
            saved = f"no emergency checkpoint: {error}"
        return telling.stopped(ruling, self.judge, self.step, self.config, saved)

    def _lost(self, error: Exception, watch: Watch) -> Exception:
        """What to raise where this rank cannot go on and has not agreed on it with the others. They are told, or have
        told it; rank 0 notes the batch that an exception in the model came from, so that a resumed run passes it."""
        network, fault, stretch = is_network(error), is_device_fault(error), self._stretch
        note = watch.note(3.0 if network else 0.0)
        if note is None:
            reason = in_a_line(error)
            if "timed out" in str(error).lower():
                stuck.record(self.run_folder, self.engine.rank, in_a_line(error), f"step {self.step + 1}")
            if network:
                reason = f"a collective failed, as another rank has died or cannot be reached ({reason})"
            memory = is_out_of_memory(error)
            watch.tell(reason, at_fault=stretch is not None and not (network or memory or fault))
            note = watch.note()
            if isinstance(error, OSError) and not network:
                return error
        else:
            network = False
        assert note is not None
        if note.at_fault and stretch is not None and self.engine.rank == 0:
            attempt(lambda: store.avoid(self.checkpoints, stretch))
        elastic.lost(self.run_folder, f"rank {note.rank} failed: {note.reason}")
        advice = "Go on with"
        if "out of memory" in note.reason.lower():
            then = self._next_rung() if self.config.memory.on_out_of_memory == "ladder" else None
            if then is None:
                advice = f"{more_room(self.config)}, then"
            else:
                self._keep(then)
                advice = f"It goes on with {then}, by"
        return LostRank(
            f"stopped in step {self.step + 1}: rank {note.rank} failed: {note.reason}. {self.keeper.safe()}. "
            f"{advice} --resume latest",
            resumable=network or fault or note.hung,
        )

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
                # torchrun asks the other ranks to end as soon as one has: this one is about to, and says why first.
                signal.signal(number, signal.SIG_IGN if self._leaving else handler)


def _figures(output: Output, square: torch.Tensor, share: float) -> torch.Tensor:
    """What is added up over parts, micro-batches and ranks, in one float64 vector: counts stay whole."""
    losses_4 = torch.stack((output.loss, output.balance_loss, output.z_loss, square))
    means = torch.cat((losses_4, output.routing.flatten())).double() * share
    return torch.cat((means, output.requested.flatten().double()))


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
