"""Owns DeepSpeed: process group, optimizer, precision, ZeRO stage, gradient norm, checkpoint. No other file knows it.

    init_distributed(config)
    engine = Engine(model, config)
    for micro_batch in micro_batches:
        loss = engine(**micro_batch)
        engine.backward(loss / len(micro_batches))
    result = engine.step(lambda grad_norm: 3e-4)     # one optimizer step, or none: result.applied

The caller owns the accumulation loop. Gradients are summed over `backward` calls, in fp32 in every stage, and averaged
over ranks. Every parameter must receive a gradient (zeros count) in every backward pass on every rank: collectives
pair up by order, so experts that a rank leaves unused must be slices of a fused tensor. With bf16 the fp32 masters
start from the bf16-rounded weights.

tests/test_deepspeed_conformance.py pins each behaviour of DeepSpeed that this file relies on.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from ava_kernels import GradStats, clip_, clip_coefficient, grad_stats
from torch import Tensor, nn

from ava_fast.checkpoint.shards import MASTER, MOMENTS, OTHER, Shards, write_shard
from ava_fast.config import Config
from ava_fast.distributed.health import raise_if_aborted
from ava_fast.distributed.rank_0 import close_group, open_group
from ava_fast.distributed.rendezvous import is_shared, meet, name_interface
from ava_fast.errors import UserError
from ava_fast.parts import part


def init_distributed(config: Config) -> None:
    """Joins the process group that torchrun's environment describes; without torchrun, makes a world of one.

    nccl where there is CUDA, gloo elsewhere. A collective longer than `distributed.timeout_seconds` fails.
    """
    timeout = timedelta(seconds=config.distributed.timeout_seconds)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "500")  # the last collectives, for `distributed.stuck`
    device = _own_gpu(config) if backend == "nccl" else None
    if "WORLD_SIZE" in os.environ:
        name_interface()
    if is_shared():
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = meet(rank, world_size, timeout)
        dist.init_process_group(
            backend, timeout=timeout, store=store, rank=rank, world_size=world_size, device_id=device
        )
    elif "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timeout, device_id=device)
    else:
        own: Any = dist.HashStore()  # type: ignore[attr-defined]  # public, but torch's stubs do not re-export it
        dist.init_process_group(backend, timeout=timeout, store=own, rank=0, world_size=1, device_id=device)
    _import_deepspeed().init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout)
    open_group()


def _own_gpu(config: Config) -> torch.device:
    """This rank's, made the current one; and what must be said to CUDA and nccl before they start, where the user has
    not."""
    local_rank, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local_rank >= there:
        raise UserError(
            f"LOCAL_RANK is {local_rank}, but this process sees {there} GPU(s); start as many ranks as there are "
            "(--nproc_per_node), and leave it to torchrun which rank takes which: no CUDA_VISIBLE_DEVICES of its own"
        )
    # `health.Watch` ends what hangs with a word and a code; torch's watchdog would end the process without either.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    os.environ.setdefault("TORCH_NCCL_RETHROW_CUDA_ERRORS", "0")
    # Pieces of all sizes come and go: sequences grow, the ladder changes micro-batches.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if config.training.mode == "debug":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    if config.memory.offload_optimizer and os.environ.get("OMP_NUM_THREADS") == "1":
        # torchrun's default. AdamW on the host wants the cores; it has no sum whose order threads could change.
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def close_distributed(*, alone: bool = False) -> None:
    """Leaves the process group; afterwards this process may join another. `alone`: the other ranks may not be on their
    way out. nccl would wait for them, so its group is left to end with the process."""
    close_group()
    if dist.is_initialized() and not (alone and dist.get_backend() == "nccl"):
        _import_deepspeed().comm.destroy_process_group()


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    grad_norm: float
    """Global L2 norm of the averaged, accumulated gradient before clipping; inf or nan where it was not finite."""
    nonfinite: int
    """How many values of that gradient were NaN or infinite."""
    applied: bool
    """False: the gradient was not finite or not wanted, and weights, moments and step counts are as they were."""


class State(NamedTuple):
    """What a rank has to save, as `checkpoint.shards.write_shard` takes it."""

    tensors: dict[str, Tensor]
    starts: dict[str, int]
    """Where each stretch of a parameter starts in it."""
    description: dict[str, Any]


class Engine:
    """A model under AdamW and ZeRO. Call the engine itself for a forward pass that `backward` follows."""

    rank: int
    world_size: int
    device: torch.device
    collectives: Literal["step", "backward", "forward"]
    """Where ranks first wait for each other in a step: from there on, none may fail alone."""
    model: nn.Module
    """The module inside, for everything that has no backward pass: train(), eval(), evaluation, generation."""
    before_update: Callable[[], None] | None
    """Called on the way to the next update of weights and moments, and then forgotten."""

    def __init__(self, model: nn.Module, config: Config):
        """Takes `model` (fp32, the same on every rank) over: moves it to this rank's device, casts and shards it.

        Needs `init_distributed`. Modules whose class has `z3_leaf = True` are fetched whole under ZeRO-3; the
        input of such a module must require a gradient.
        """
        deepspeed = _import_deepspeed()
        self._config = config
        self._stage = config.deepspeed.zero_stage
        self.collectives = ("step", "step", "backward", "forward")[self._stage]
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # Matrices first: the order of the optimizer's groups is the order in which `_master` finds the weights.
        self._groups = [[p for p in trainable if p.ndim >= 2], [p for p in trainable if p.ndim < 2]]
        self._optimizer = self._adamw()
        if self._stage == 3:
            leaves = {type(module) for module in model.modules() if getattr(type(module), "z3_leaf", False)}
            if leaves:
                deepspeed.utils.set_z3_leaf_modules(model, list(leaves))
        elements = sum(parameter.numel() for parameter in trainable)
        with _silence():
            self._engine = deepspeed.initialize(
                model=model, optimizer=self._optimizer, config=_deepspeed_config(config, elements)
            )[0]
        self._decide: Callable[[float], float | None] | None = None  # while a step is under way
        self._decided, self._passes = False, 0
        self._stats: GradStats | None = None
        self._norm, self._nonfinite = math.nan, 0
        self._lr: float | None = None
        self.before_update = None
        self._optimizer.register_step_pre_hook(self._before_adamw)
        self._on_host: list[Tensor] = []  # this rank's share of the gradient, by parameter group, where AdamW is there
        self._own_norm(trainable)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        # nccl knows no tensors on the host. Only the stages with `collectives` in backward alone have to ask.
        self._hosts = dist.new_group(backend="gloo") if self._stage == 2 and dist.get_backend() == "nccl" else None
        self.device = torch.device(self._engine.device)
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass."""
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Adds one micro-batch's gradient. `loss`: 0-d, already divided by the number of micro-batches."""
        self._engine.backward(loss)
        self._passes += 1

    def step(self, decide: Callable[[float], float | None]) -> StepResult:
        """Averages the accumulated gradient over ranks, clips it and takes one AdamW step, or none.

        `decide` is called once, with the global norm before clipping (inf or nan where it is not finite), and gives the
        learning rate, or None to drop the gradient. It must decide the same on every rank. A gradient that is not
        finite is dropped whatever it says.
        """
        self._decide, self._decided, self._stats, self._lr, self._passes = decide, False, None, None, 0
        try:
            with part("optimizer"):
                self._engine.step()
            if not self._decided:  # DeepSpeed was told that it is not finite and has not asked AdamW
                decide(self._norm)
        finally:
            self._decide = None
            if self._on_host:
                self._ready_host()
        return StepResult(self._norm, self._nonfinite, self._lr is not None and self._engine.was_step_applied())

    def take_gradient(self) -> list[Tensor]:
        """What `backward` has added on this rank since the last step, in fp32, parameter by parameter; nothing of it
        stays. Stage 0 only: elsewhere no rank holds a whole gradient."""
        assert self._stage == 0
        parameters = [parameter for group in self._groups for parameter in group]
        gradients = [torch.zeros_like(p, dtype=torch.float32) if p.grad is None else p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        return gradients

    def set_gradient(self, gradients: list[Tensor]) -> None:
        """Puts in its place what every rank has made, the same on all, of what `take_gradient` gave."""
        for parameter, gradient in zip((p for group in self._groups for p in group), gradients, strict=True):
            parameter.grad = gradient

    def average(self, gradients: list[Tensor]) -> list[Tensor]:
        """Their mean over ranks. Collective."""
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        parts = flat.div_(self.world_size).split([gradient.numel() for gradient in gradients])
        return [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]

    def discard(self) -> None:
        """Forgets what `backward` has added since the last step. Every rank calls it.

        In stages 0 and 1 the ranks need not have made the same passes, and one may have failed in the midst of one. In
        2 and 3 they have, as these reduce gradients in `backward`.
        """
        if self._stage >= 2:
            if self._passes:
                self.step(lambda _: None)
            return
        self._passes, wrapper = 0, self._engine.optimizer
        if hasattr(wrapper, "clear_hp_grads"):  # bf16 in stage 1, where fp32 gradients lie apart
            wrapper.clear_hp_grads()
            wrapper.clear_lp_grads(set_to_none=True)
        else:
            wrapper.zero_grad(set_to_none=True)

    def all_agree(self, well: bool) -> bool:
        """Whether it is well on every rank. Collective, between the hosts: the device is not waited for."""
        flag = torch.tensor(float(not well))
        dist.all_reduce(flag, group=self._hosts)
        return not flag.item()

    @contextlib.contextmanager
    def nonfinite_gradients(self) -> Iterator[list[str]]:
        """Collects, while `backward` runs, the names of parameters whose gradient on this rank, before any reduction,
        is not finite: in the order of the backward pass, so that the first is nearest to the cause. It waits for the
        device at every parameter: for finding a fault, not for training."""
        found: list[str] = []

        def look(name: str, gradient: Tensor) -> None:
            if name not in found and not gradient.isfinite().all():
                found.append(name)

        hooks = [
            parameter.register_hook(functools.partial(look, name))
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        ]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def squared_gradients(self) -> Iterator[list[Tensor]]:
        """Collects, while `backward` runs, the squared norm of every parameter's gradient on this rank, before any
        reduction: 0-d, float32. One more pass over the gradient."""
        squares: list[Tensor] = []

        def look(gradient: Tensor) -> None:
            squares.append(torch.linalg.vector_norm(gradient, dtype=torch.float32).square())

        hooks = [parameter.register_hook(look) for parameter in self.model.parameters() if parameter.requires_grad]
        try:
            yield squares
        finally:
            for hook in hooks:
                hook.remove()

    def state(self) -> State:
        """What this rank has to save of weights, fp32 masters and moments. The tensors are the live ones: they change
        with the next update, before which `before_update` is called. Collective in stage 3."""
        tensors, starts, steps = dict[str, Tensor](), dict[str, int](), dict[int, int]()
        for name, start, master, offset, length in self._fragments(self.world_size):
            starts[name] = start
            moments = self._optimizer.state.get(master, {})
            if id(master) not in steps:  # a look at the device, and many fragments share a master
                steps[id(master)] = int(moments.get("step", 0))
            for kind, tensor in ((MASTER, master), *((kind, moments.get(kind)) for kind in MOMENTS)):
                if tensor is not None:
                    tensors[f"{kind}/{name}"] = tensor.detach().view(-1).narrow(0, offset, length)
        assert len(set(steps.values())) <= 1, "AdamW's parameters have taken different numbers of steps"
        others = self._others()
        if self.rank == 0:
            tensors |= {f"{OTHER}/{name}": tensor.detach().view(-1) for name, tensor in others.items()}
        description = {
            "zero_stage": self._stage,
            "precision": self._config.training.precision,
            "world_size": self.world_size,
            "adam_step": max(steps.values(), default=0),
            "parameters": {name: list(_shape(parameter)) for name, parameter in self._trainable()},
            "others": {name: list(tensor.shape) for name, tensor in others.items()},
            "tied": self._tied(),
        }
        return State(tensors, starts, description)

    def save(self, folder: Path) -> None:
        """Writes `state` under `folder`, every rank its share. Collective.

        Raises OSError on the ranks that could not write, and only there: the caller tells the others.
        """
        state = self.state()
        try:
            write_shard(folder, self.rank, {key: value.cpu() for key, value in state.tensors.items()}, *state[1:])
        finally:
            dist.barrier()

    @torch.no_grad()
    def load(self, folder: Path, *, optimizer: bool = True) -> None:
        """Restores what `save` wrote, in whatever stage, precision and world size that was. Collective.

        With `optimizer=False` only the weights; AdamW starts anew. Raises UserError if `folder` holds no checkpoint or
        one of another model.
        """
        saved = Shards(folder)
        shapes = {name: list(_shape(parameter)) for name, parameter in self._trainable()}
        own = shapes.keys() | self._others().keys() | self._tied().keys()
        if different := saved.names() ^ own:
            raise UserError(f"{folder}: holds another model's weights, only one of the two has {min(different)}")
        for name, shape in shapes.items():
            if saved.shapes[name] != shape:
                raise UserError(f"{folder}: holds another model's weights: {name} is {saved.shapes[name]}, not {shape}")
        step = saved.description["adam_step"] if optimizer else 0
        if step == 0:
            self._optimizer.state.clear()
        for name, start, master, offset, length in self._fragments(1):
            master.detach().view(-1).narrow(0, offset, length).copy_(saved.read(MASTER, name, start, length))
            if step == 0:
                continue
            state = self._optimizer.state[master]
            state["step"] = torch.tensor(float(step), device=master.device)
            for kind in MOMENTS:
                moment = state.setdefault(kind, torch.zeros_like(master, memory_format=torch.preserve_format))
                moment.view(-1).narrow(0, offset, length).copy_(saved.read(kind, name, start, length))
        gathered = _import_deepspeed().zero.GatheredParameters
        for _, parameter in self._trainable():
            master = self._master(parameter)  # from the ranks that have read it: no byte is read twice
            with gathered([parameter], modifier_rank=0):
                parameter.copy_(master)
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if name in saved.description["others"]:
                with gathered([tensor] if isinstance(tensor, nn.Parameter) else [], modifier_rank=0):
                    tensor.copy_(saved.other(name))

    def gather_weights(self) -> dict[str, Tensor] | None:
        """On rank 0 the whole state dict, fp32 (the masters, with bf16) on the CPU; elsewhere None. Collective.

        Names are the module's own; tied parameters appear under each name and share memory.
        """
        weights: dict[str, Tensor] = {}
        first_name: dict[int, str] = {}  # of each tensor, by id
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if id(tensor) in first_name:
                weights[name] = weights[first_name[id(tensor)]]
                continue
            first_name[id(tensor)] = name
            full = self._master(tensor) if isinstance(tensor, nn.Parameter) else tensor
            weights[name] = _fp32_on_cpu(full) if self.rank == 0 else torch.empty(0)
        return weights if self.rank == 0 else None

    def release(self) -> None:
        """Ends DeepSpeed's hooks. The engine is of no use afterwards; another may take its place."""
        self._engine.destroy()

    def close(self) -> None:
        """`release`, and the end of the process group."""
        self.release()
        close_distributed()

    def _adamw(self) -> torch.optim.AdamW:
        # fused: equal to foreach up to fp32 rounding, and faster on the CPU too: 6.8 against 17.7 ms for 4 M elements
        # on one thread. The rate is 0 until the first step, because DeepSpeed may step while it sets itself up.
        training = self._config.training
        return torch.optim.AdamW(
            [
                {"params": group, "weight_decay": weight_decay}
                for group, weight_decay in zip(self._groups, (training.weight_decay, 0.0), strict=True)
            ],
            lr=0.0,
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_eps,
            fused=True,
        )

    def _own_norm(self, trainable: list[nn.Parameter]) -> None:
        """Puts `_measure` in the place of DeepSpeed's own passes over the gradient, which read it three to five times.

        Its optimizers find the norm, ask whether it is finite, and clip, each in its own way; here they are given what
        `_measure` found, as 0 or NaN, and no clipping to do. Stage 0 needs more: with fp32 a NaN reaches the weights;
        with bf16 gradients accumulate in bf16, Adam's step count starts at 1, one bias correction late, and the norm
        cannot be replaced but with the whole step. So gradients get fp32 buffers and Adam's state starts empty.
        """
        optimizer = self._engine.optimizer
        if self._stage == 0:
            self._optimizer.state.clear()
            for parameter in trainable:
                parameter.grad_dtype = torch.float32
            if self._config.training.precision == "bf16":
                optimizer.step = functools.partial(self._step_stage_0_bf16, optimizer)
        elif self._stage == 3:
            optimizer._get_norm_groups = lambda: [self._measure(_averaged(optimizer))]
            optimizer.unscale_and_clip_grads = lambda *_: None
        elif self._config.memory.offload_optimizer:
            self._on_host = [master.grad for master in optimizer.single_partition_of_fp32_groups]
            optimizer.check_overflow = optimizer.set_norm_for_param_grad_in_gpu = lambda *_, **__: None
            optimizer.update_offload_overflow_tracker = lambda _: None
            optimizer.scaled_global_norm = lambda: self._measure(self._on_host)
        elif self._config.training.precision == "bf16" and self._stage == 1:
            # Every rank holds the whole gradient; it measures the share that it updates.
            shares = optimizer.fp32_groups_gradient_flat_partition
            optimizer.get_grads_for_norm = lambda: ([self._measure(shares)], {})
        else:
            optimizer.check_overflow = lambda **_: None
            optimizer.scaled_global_norm = lambda: self._measure(_averaged(optimizer))

    def _ready_host(self) -> None:
        """After a step with AdamW on the host, taken or not: DeepSpeed writes the next gradient into these tensors; and
        after one that was not finite it would add the next, in bf16, to what there was."""
        zero = self._engine.optimizer
        for master, gradient in zip(zero.single_partition_of_fp32_groups, self._on_host, strict=True):
            master.grad = gradient
        zero.averaged_gradients = dict.fromkeys(zero.averaged_gradients)

    @torch.no_grad()
    def _step_stage_0_bf16(self, wrapper: Any) -> None:
        """What DeepSpeed's FP16_UnfusedOptimizer.step does, without its overflow check, its norm and its scaling."""
        pairs = [
            (master, parameter)
            for masters, parameters in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True)
            for master, parameter in zip(masters, parameters, strict=True)
        ]
        for master, parameter in pairs:
            master.grad = parameter.grad
        self._optimizer.step()
        for master, parameter in pairs:
            master.grad = None
            parameter.copy_(master)

    @torch.no_grad()
    def _measure(self, gradients: list[Tensor]) -> Tensor:
        """Takes the statistics of the averaged gradient: `gradients` are all of it in stage 0, elsewhere this rank's
        share, of which padding is 0. One pass over them, one all-reduce of two numbers, one wait for the device.

        Gives DeepSpeed all that it has to know: 0 where the norm is finite, else NaN.
        """
        stats = grad_stats(gradients)
        found = torch.stack((stats.norm.double().square(), stats.nonfinite.double())).to(self.device)
        if self._stage > 0:
            dist.all_reduce(found)
        norm = found[0].sqrt()
        self._norm, nonfinite = torch.stack((norm, found[1])).tolist()
        raise_if_aborted()
        self._nonfinite = int(nonfinite)
        self._stats = replace(stats, norm=norm.to(stats.norm.device))
        return torch.tensor(0.0 if math.isfinite(self._norm) else math.nan, device=self.device)

    def _before_adamw(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """The last word before an update. ZeRO calls AdamW once per group, after it has asked for the norm."""
        if self._decide is None:  # DeepSpeed steps at rate 0 while it sets itself up
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not self._decided:
            if self._stage == 0:
                self._measure(gradients)
            lr = self._decide(self._norm)
            self._lr, self._decided = lr if math.isfinite(self._norm) else None, True
        if self._lr is None:
            for parameter in parameters:
                parameter.grad = None  # AdamW passes over a parameter without a gradient, moments and step count too
            return
        if self.before_update is not None:
            self.before_update()
            self.before_update = None
        if self._config.training.max_grad_norm > 0:
            assert self._stats is not None
            clip_(gradients, clip_coefficient(self._stats, self._config.training.max_grad_norm))
        for group in optimizer.param_groups:
            group["lr"] = self._lr

    def _master(self, parameter: nn.Parameter) -> Tensor:
        """The whole fp32 value that AdamW updates. Collective, unless in stage 0."""
        if self._stage > 0:
            return _import_deepspeed().utils.safe_get_full_fp32_param(parameter)
        own = [p for group in self._groups for p in group]
        masters = [p for group in self._optimizer.param_groups for p in group["params"]]
        return next(master for p, master in zip(own, masters, strict=True) if p is parameter)

    def _trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad)

    def _others(self) -> dict[str, Tensor]:
        """Buffers that are saved, and frozen parameters, whole. Collective in stage 3, if there are any."""
        trainable = {id(parameter) for _, parameter in self.model.named_parameters() if parameter.requires_grad}
        others = {n: t for n, t in self.model.state_dict(keep_vars=True).items() if id(t) not in trainable}
        frozen = [tensor for tensor in others.values() if isinstance(tensor, nn.Parameter)]
        if self._stage < 3 or not frozen:
            return others
        with _import_deepspeed().zero.GatheredParameters(frozen):
            return {name: tensor.detach().clone() for name, tensor in others.items()}

    def _tied(self) -> dict[str, str]:
        """Further names of parameters → their first."""
        first = {id(parameter): name for name, parameter in self.model.named_parameters()}
        state = self.model.state_dict(keep_vars=True).items()
        return {name: first[id(tensor)] for name, tensor in state if first.get(id(tensor), name) != name}

    def _fragments(self, shares: int) -> Iterator[tuple[str, int, Tensor, int, int]]:
        """Which stretches this rank updates: the parameter's name, where in it (flattened) the stretch starts, the
        tensor that AdamW updates, where in that it starts, and its length. In stage 0 every rank updates everything:
        then one of `shares` equal parts, or of 1 all."""
        zero, names = self._engine.optimizer, {id(parameter): name for name, parameter in self._trainable()}
        own: list[Any] = [parameter for group in self._groups for parameter in group]
        if self._stage == 0:
            masters = [p for group in self._optimizer.param_groups for p in group["params"]]
            for parameter, master in zip(own, masters, strict=True):
                start, end = (master.numel() * (self.rank % shares + i) // shares for i in (0, 1))
                yield names[id(parameter)], start, master, start, end - start
        elif self._stage == 3:
            for parameter in own:
                group, offset, length = zero.grad_position[zero.get_param_id(parameter)]
                start = length * self.rank
                length = max(0, min(length, parameter.ds_numel - start))  # the last ranks' are padded
                yield names[id(parameter)], start, zero.fp32_partitioned_groups_flat[group], offset, length
        else:
            masters = [p for group in self._optimizer.param_groups for p in group["params"]]
            for parameter in own:
                mapping = parameter._hp_mapping  # none where the rank has nothing of it
                if mapping is not None:
                    within, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
                    master = masters[mapping.param_group_index]
                    yield names[id(parameter)], within.start, master, flat.start, within.numel


def _averaged(zero: Any) -> list[Tensor]:
    """This rank's share of the averaged gradient, which ZeRO keeps by parameter group."""
    return [gradient for group in zero.averaged_gradients.values() for gradient in group]


def _shape(parameter: nn.Parameter) -> torch.Size:
    """Under ZeRO-3 too, where the parameter itself is empty."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _fp32_on_cpu(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().to("cpu", copy=True)
    return tensor.float() if tensor.is_floating_point() else tensor


def _deepspeed_config(config: Config, elements: int) -> dict[str, Any]:
    """DeepSpeed's own settings. `elements`: of the model, above which a bucket would only waste memory."""
    stage, bf16 = config.deepspeed.zero_stage, config.training.precision == "bf16"
    bucket = min(config.deepspeed.bucket_elements, elements)
    bucket += bucket % 2  # DeepSpeed wants it even
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # only scales its sample counter
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # the reduction and the step happen in step(), however many backwards
        "gradient_clipping": 0.0,  # _before_adamw clips
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # else it synchronises the device in every forward and step
        "communication_data_type": "fp32",
        "bf16": {"enabled": bf16},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket,
        },
    }
    if config.memory.offload_optimizer:
        pinned = torch.cuda.is_available()
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
        settings["zero_force_ds_cpu_optimizer"] = False  # torch's fused AdamW needs no compiler, and is the same rule
    if stage > 0:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """DeepSpeed prints memory tables and progress from every rank, past any logger."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _import_deepspeed() -> ModuleType:
    """DeepSpeed, imported only when needed: it takes a second, and decides on its device then."""
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # its calls, not ours
    # Asked for the first time, this table probes compilers, and then a shared-memory collective is built with one.
    # None of its operators is used here.
    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed
