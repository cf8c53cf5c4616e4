"""`ava-fast profile`: where the time and the memory of a training step go.

    ava-fast profile --config configs/demo.yaml --steps 5
    torchrun --nproc_per_node=2 -m ava_fast.cli profile --config configs/demo.yaml

Sets a run up as `ava_fast.train` does, takes steps on its data, and saves no checkpoint. Under
`outputs/profiles/profile_<time>/`:

    parts.txt parts.json          the table that is printed, of every rank
    kernels.json                  on a GPU: time, arithmetic and roofline share of each kernel
    memory.png memory.json        bytes allocated over the profiled steps, of rank 0
    rank_0.trace.json.gz …        torch's traces, for https://ui.perfetto.dev or chrome://tracing
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity

from ava_fast.config import Config
from ava_fast.distributed.rank_0 import on_rank_0
from ava_fast.errors import UserError
from ava_fast.observe import trace as traces
from ava_fast.observe.run import say
from ava_fast.parts import named, part
from ava_fast.train import preflight, prepare_data
from ava_fast.trainer import Trainer

WARM_UP = 3


def profile(config: Config, steps: int) -> Path:
    """Profiles `steps` steps after WARM_UP others on every rank, from within a process group; returns the folder."""
    rank = dist.get_rank()
    on_rank_0(lambda: preflight(config))
    shards = prepare_data(config)
    output = on_rank_0(lambda: _new_folder(Path(config.logging.output_dir)))
    trainer = Trainer(config, output, shards)
    if rank == 0:
        say(f"{WARM_UP} steps to warm up, then {steps} with the profiler, on {dist.get_world_size()} rank(s)")
    for _ in range(WARM_UP):
        trainer.advance()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would tell stderr when it starts and stops
    cuda = trainer.engine.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with named(), torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=True) as profiler:
        for number in range(steps):
            started_at = time.perf_counter()
            with part("step"):
                trainer.advance()
                if cuda:
                    torch.cuda.synchronize()  # its kernels belong to this step
            if rank == 0:
                say(f"step {number + 1}/{steps}: {1e3 * (time.perf_counter() - started_at):.1f} ms")
    trainer.loader.close()
    path = output / f"rank_{rank}.trace.json.gz"
    if rank == 0:
        say("writing and reading the trace")
    profiler.export_chrome_trace(str(path))
    trace = traces.read(path)
    own = traces.times_by_part(trace)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    if rank == 0:
        table = traces.table(everyone, cuda)
        (output / "parts.txt").write_text(table + "\n")
        (output / "parts.json").write_text(json.dumps(everyone, indent=1))
        say(table)
        if cuda:
            kernels = traces.kernels(trace, config, dist.get_world_size(), steps, ceilings(config))
            (output / "kernels.json").write_text(json.dumps(kernels, indent=1))
            say(traces.kernel_table(kernels))
        memory = traces.memory_timeline(trace, "cuda" if cuda else "cpu")
        (output / "memory.json").write_text(json.dumps(memory))
        if memory["bytes"]:
            traces.plot_memory(memory, output / "memory.png")
        say(f"{output}: parts.txt, memory.png, and traces for https://ui.perfetto.dev")
    return output


def ceilings(config: Config) -> dict[str, float]:
    """What this GPU multiplies in the run's precision, FLOP/s, and copies, bytes/s read and written."""
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    a, b = (torch.randn(4096, 4096, device="cuda", dtype=dtype) for _ in range(2))
    source = torch.randn(1 << 26, device="cuda")
    target = torch.empty_like(source)

    def seconds(action: Any) -> float:
        times = []
        for _ in range(12):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            action()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return sorted(times)[len(times) // 2]

    return {
        "flops": 2 * 4096**3 / seconds(lambda: a @ b),
        "bytes": 2 * source.numel() * 4 / seconds(lambda: target.copy_(source)),
    }


def _new_folder(output_dir: Path) -> Path:
    folder = output_dir / "profiles" / time.strftime("profile_%Y%m%d_%H%M%S")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be made ({error.strerror}); set logging.output_dir to a writable folder"
        ) from error
    return folder
