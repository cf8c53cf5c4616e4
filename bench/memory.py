"""`ava-fast memory plan`'s estimate beside what a process really takes, on a CPU.

python -m bench.memory

Every case trains two steps in a process of its own; what counts is its resident memory at the highest, less that before
the model was made.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.machine import write

SHAPE = ["model.hidden_size=384", "model.num_layers=6", "model.num_heads=6", "model.vocab_size=8192"]
SHAPE += ["moe.num_experts=8", "moe.intermediate_size=384", "data.max_length=512", "training.batch_size=8"]
# Every tensor of its own mapping, given back when it is freed: else what is measured is also glibc's gaps.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
CASES: dict[str, list[str]] = {
    "fp32, ZeRO-0": ["deepspeed.zero_stage=0"],
    "fp32, ZeRO-1": ["deepspeed.zero_stage=1"],
    "fp32, ZeRO-0, activation checkpointing": ["deepspeed.zero_stage=0", "memory.activation_checkpointing=true"],
    "fp32, ZeRO-0, micro-batches of 2": ["deepspeed.zero_stage=0", "memory.micro_batch=2"],
    "fp32, ZeRO-0, 2,048 tokens a row": ["deepspeed.zero_stage=0", "data.max_length=2048", "training.batch_size=4"],
    "fp32, ZeRO-2": ["deepspeed.zero_stage=2"],
    "bf16, ZeRO-0": ["deepspeed.zero_stage=0", "training.precision=bf16"],
    "bf16, ZeRO-1": ["deepspeed.zero_stage=1", "training.precision=bf16"],
    "bf16, ZeRO-2": ["deepspeed.zero_stage=2", "training.precision=bf16"],
}


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(CASES[sys.argv[1]])))
        return
    rows = {}
    for case in CASES:
        command = [sys.executable, "-m", "bench.memory", case]
        result = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **ALLOCATOR})
        row = rows[case] = json.loads(result.stdout.splitlines()[-1])
        print(
            f"{case:<42} estimate {row['estimate_mib']:7,.0f} MiB, taken {row['taken_mib']:7,.0f} MiB: "
            f"{100 * (row['estimate_mib'] / row['taken_mib'] - 1):+.0f} %",
            flush=True,
        )
    print(f"→ {write('memory_cpu', {'shape': SHAPE, 'cases': rows})}")


def measure(overrides: list[str]) -> dict[str, Any]:
    import torch

    from ava_fast.config import load_config
    from ava_fast.engine import Engine, init_distributed
    from ava_fast.model.transformer import Transformer
    from ava_fast.stability.plan import estimate

    config = load_config(None, [*SHAPE, *overrides])
    found = estimate(config, 1, gpu=False)
    init_distributed(config)
    Engine(torch.nn.Linear(2, 2, bias=False), config)  # what DeepSpeed and torch take for themselves
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = _status("VmRSS")
    engine = Engine(Transformer(config), config)
    rows = config.memory.micro_batch or config.training.batch_size
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        shape = (config.training.batch_size, config.data.max_length)
        tokens_BS = torch.randint(config.model.vocab_size, shape, generator=generator)
        for part in tokens_BS.split(rows):
            engine.backward(engine(part, part).objective)
        engine.step(lambda _: 1e-4)
    taken = _status("VmHWM") - before
    parts = {f"{name}_mib": value / 2**20 for name, value in found._asdict().items()}
    return {"estimate_mib": found.peak / 2**20, "taken_mib": taken / 2**20, **parts}


def _status(key: str) -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    main()
