"""How much memory a configuration takes on a rank, and which device has it: `ava-fast memory plan --config F`.

| part | what it is |
|---|---|
| states | weights, fp32 masters, AdamW's moments, in the ZeRO stage's shares; what lies on the host is not counted |
| gradients | fp32, likewise; where a step is one pass they come as the activations go |
| activations | what one forward pass of a micro-batch keeps for backward |
| working | what comes and goes beside it: the head's logits or a block's gradients |

Activations are counted, not estimated: the model runs on meta tensors, which have shapes and no memory, with the
operators that would run, and whatever autograd keeps is added up.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ava_fast.config import Config
from ava_fast.model.head import CHUNK_ELEMENTS
from ava_fast.model.transformer import Transformer
from ava_fast.stability.room import Room, with_room

GIB, MIB = 2**30, 2**20
DEVICES = {  # GiB that the driver shows
    "RTX 4090, L4 (24 GB)": 22.5,
    "A100 (40 GB)": 39.4,
    "L40S (48 GB)": 44.4,
    "A100, H100 (80 GB)": 79.1,
    "H200 (141 GB)": 139.8,
    "B200 (192 GB)": 178.0,
}
RESERVE = 0.08  # of a device: its context, NCCL's buffers, and what the allocator cannot use in its gaps


class Estimate(NamedTuple):
    """Bytes on one rank."""

    states: int
    gradients: int
    activations: int
    working: int
    peak: int


def estimate(config: Config, world_size: int, *, gpu: bool = True) -> Estimate:
    """Of a training step. Without triton, attention counts as if its scores were kept, which is too much."""
    rows = config.training.batch_size // world_size
    rows = min(rows, config.memory.micro_batch or rows)
    bf16 = config.training.precision == "bf16"
    with _fused_operators(), torch.device("meta"):
        model = Transformer(config).to(torch.bfloat16 if bf16 else torch.float32)
        tokens_BS = torch.zeros(rows, config.data.max_length, dtype=torch.int64)
        model.recompute = False
        whole = _kept(model, tokens_BS)
        model.recompute = True
        inputs = _kept(model, tokens_BS)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    block = (whole - inputs) // max(1, config.model.num_layers)
    recompute = config.memory.activation_checkpointing
    activations = inputs + block if recompute else whole
    # A block's backward holds the gradients of what it works on: about as much again as the block keeps.
    working = max(_head_bytes(config, rows, gpu), block)
    gradients = _gradient_bytes(parameters, config, world_size, gpu)
    states = state_bytes(parameters, config, world_size, gpu=gpu) - gradients
    passes = config.training.gradient_accumulation_steps * -(-config.training.batch_size // (world_size * rows))
    # A bf16 run adds gradients up in fp32 buffers that stay; in fp32 the first pass brings them.
    begun = states + activations + working + (gradients if passes > 1 or bf16 else 0)
    return Estimate(states, gradients, activations, working, max(begun, states + gradients + working))


def state_bytes(parameters: int, config: Config, world_size: int, *, gpu: bool) -> int:
    """Bytes on one rank of weights, fp32 gradients, fp32 masters and AdamW's moments; on a GPU, without the host's."""
    stage, offload = config.deepspeed.zero_stage, config.memory.offload_optimizer
    bf16 = config.training.precision == "bf16"
    weights = (2 if bf16 else 4) * parameters // (world_size if stage == 3 else 1)
    masters = 4 * parameters if bf16 or stage > 0 else 0  # ZeRO keeps a flat fp32 copy in either precision
    optimizer = (masters + 8 * parameters) // (world_size if stage >= 1 else 1)
    if offload and gpu:
        optimizer = 0
    elif offload:  # the host has DeepSpeed's flat gradient and a copy of the weights' share on their way as well
        optimizer += (4 + (2 if bf16 else 4)) * parameters // world_size
    return weights + _gradient_bytes(parameters, config, world_size, gpu) + optimizer


def _gradient_bytes(parameters: int, config: Config, world_size: int, gpu: bool) -> int:
    """fp32. With the optimizer on the host DeepSpeed adds them up there, but in bf16 on the device."""
    if gpu and config.memory.offload_optimizer and config.training.precision != "bf16":
        return 0
    return 4 * parameters // (world_size if config.deepspeed.zero_stage >= 2 else 1)


def plan(config: Config, world_size: int) -> list[str]:
    """The table: the configuration, then what takes ever less, and what of it each device can hold."""
    rows = config.training.batch_size // world_size
    ways, now = [], Room.of(config, rows)
    while True:
        ways.append((str(now), estimate(with_room(config, now), world_size)))
        then = now.more(world_size, may_shard=True)
        if then is None:
            break
        now = then
    if world_size > 1 and now.zero_stage < 3:
        last = Room(recompute=True, micro_batch=1, zero_stage=3)
        ways.append((str(last), estimate(with_room(config, last), world_size)))
    less = (way for way in ways[1:] if way[1].peak < ways[0][1].peak)  # a step in passes keeps gradients between them
    ways[1:] = sorted(less, key=lambda way: -way[1].peak)
    width = max(len(name) for name, _ in ways)
    unit, size = ("GiB", GIB) if ways[0][1].peak >= GIB else ("MiB", MIB)
    lines = [f"{unit + ' on each of ' + str(world_size):<{width}}  states  gradients  activations  working    peak"]
    for name, found in ways:
        states, gradients, activations, working, peak = (value / size for value in found)
        lines.append(
            f"{name:<{width}}  {states:6.2f}  {gradients:9.2f}  {activations:11.2f}  {working:7.2f}  {peak:6.2f}"
        )
    lines.append("")
    for device, room in DEVICES.items():
        fits = next((name for name, found in ways if found.peak <= room * (1 - RESERVE) * GIB), None)
        lines.append(f"{device:<{width}}  {fits or 'none of these; more ranks, or a smaller model'}")
    return lines


def _head_bytes(config: Config, rows: int, gpu: bool) -> int:
    """A chunk's logits in float32 with their exponentials, the gradients of its input and of its weight."""
    tokens, (V, M) = rows * config.data.max_length, (config.model.vocab_size, config.model.hidden_size)
    chunk = min(tokens * V, CHUNK_ELEMENTS["cuda" if gpu else "cpu"])
    return 3 * 4 * chunk + 4 * tokens * M + 2 * 4 * V * M


def _kept(model: nn.Module, tokens_BS: Tensor) -> int:
    """Bytes that autograd keeps of one forward pass, without the weights; a storage counts once."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    seen: dict[int, Any] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = storage  # held, or its number would be given again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(tokens_BS, tokens_BS)
    del output
    return sum(storage.nbytes() for storage in seen.values())


@contextlib.contextmanager
def _fused_operators() -> Iterator[None]:
    """On meta tensors torch's own attention is the one that keeps its scores, which no device runs."""
    name = "AVA_KERNELS_BACKEND"
    before = os.environ.get(name)
    os.environ[name] = "triton" if importlib.util.find_spec("triton") else "torch"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
