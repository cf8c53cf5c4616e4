"""Tokens/s of a training step beside transformers' Mixtral: the same weights, batch, loop and optimizer.

    OMP_NUM_THREADS=2 python -m bench.training_step

A step is forward, backward, gradient clipping and fused AdamW, fp32, one process. transformers runs with each of its
expert implementations; the ratio is to the fastest. Contenders take turns, so that a machine whose speed drifts slows
all of them. Before timing, both models' losses on the same batch must agree.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from ava_fast.config import Config, load_config
from ava_fast.model.huggingface import export
from ava_fast.model.transformer import Transformer
from ava_fast.observe.throughput import flops_per_token
from bench import machine

# The demo's model; then 18 M parameters with few wide experts and with many narrow ones, as recent models have them, at
# 2,048 and 8,192 tokens a step; then 128 experts.
DEMO = {"vocab": 1024, "hidden": 128, "layers": 3, "heads": 4, "experts": 8, "top_k": 2, "width": 192, "length": 128}
WIDE = {"vocab": 8192, "hidden": 256, "layers": 4, "heads": 8, "experts": 8, "top_k": 2, "width": 512, "length": 256}
FINE = {**WIDE, "experts": 64, "top_k": 8, "width": 64}
MANY = {**WIDE, "experts": 128, "top_k": 8, "width": 64}
SIZES = {
    "demo": {**DEMO, "batch": 8},
    "wide_2k": {**WIDE, "batch": 8},
    "wide_8k": {**WIDE, "batch": 32},
    "fine_2k": {**FINE, "batch": 8},
    "fine_8k": {**FINE, "batch": 32},
    "many_8k": {**MANY, "batch": 32},
}
WARM_UP = 2
# Not batched_mm: it copies an expert's weights for every token, 4 GB at `wide`, and takes 20 times as long at `demo`.
THEIRS = ["eager", "grouped_mm"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Times a training step beside transformers' Mixtral.")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--size", action="append", choices=SIZES, help="repeatable; all if left out")
    options = parser.parse_args()
    for name in options.size or SIZES:
        size = SIZES[name]
        row = {"name": name, **size, **_compare(config_of(size), size["batch"], options.runs)}
        print(f"{name}: {row['ratio']:.2f}× {row['fastest_peer']}", flush=True)
        for contender, figures in row["contenders"].items():
            rate = figures["tokens_per_second"]
            print(f"  {contender:24} {figures['median_ms']:8.1f} ms  {rate:8,.0f} tok/s", flush=True)
        print(machine.write(f"training_step_cpu_{name}", {"precision": "fp32", "runs": options.runs, **row}))


def config_of(size: dict[str, int]) -> Config:
    settings = {
        "model.vocab_size": size["vocab"],
        "model.hidden_size": size["hidden"],
        "model.num_layers": size["layers"],
        "model.num_heads": size["heads"],
        "moe.num_experts": size["experts"],
        "moe.top_k": size["top_k"],
        "moe.intermediate_size": size["width"],
        "data.max_length": size["length"],
    }
    return load_config(None, [f"{key}={value}" for key, value in settings.items()])


def contenders(config: Config, batch: int) -> dict[str, tuple[Callable[[], object], Callable[[], None]]]:
    """By name, what selects an implementation, and a step. Raises where the two models' losses differ."""
    torch.manual_seed(0)
    length = config.data.max_length
    ours = Transformer(config)
    theirs = _mixtral(ours, config)
    tokens = torch.randint(config.model.vocab_size, (batch, length + 1))
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def our_loss() -> torch.Tensor:
        return ours(inputs, labels).objective

    def their_loss() -> torch.Tensor:
        return theirs(input_ids=inputs, shift_labels=labels, labels=labels, use_cache=False).loss

    torch.testing.assert_close(ours(inputs, labels).loss, their_loss().detach(), rtol=1e-5, atol=1e-5)
    our_step, their_step = _step(ours, our_loss), _step(theirs, their_loss)
    return {"ava-fast": (lambda: None, our_step)} | {
        f"transformers {name}": (functools.partial(theirs.set_experts_implementation, name), their_step)
        for name in THEIRS
    }


def _compare(config: Config, batch: int, runs: int) -> dict[str, Any]:
    known, tokens = contenders(config, batch), batch * config.data.max_length
    times: dict[str, list[float]] = {name: [] for name in known}
    for run in machine.turns(WARM_UP + runs, "training step"):
        for name, (select, step) in known.items():
            select()
            elapsed = machine.timed(step, "cpu")
            if run >= WARM_UP:
                times[name].append(elapsed)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    fastest = min((name for name in medians if name != "ava-fast"), key=lambda name: medians[name])
    pairs = machine.spread_of_ratios(times[fastest], times["ava-fast"])  # the two of a turn ran in the same seconds
    return {
        "parameters": sum(parameter.numel() for parameter in Transformer(config).parameters()),
        "flops": flops_per_token(config) * tokens,
        "contenders": {
            name: {**machine.spread(seconds), "tokens_per_second": tokens / statistics.median(seconds)}
            for name, seconds in times.items()
        },
        "fastest_peer": fastest,
        "ratio": pairs["median"],
        "pair_ratios": pairs,
    }


def _step(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model.train()

    def step() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _mixtral(model: Transformer, config: Config) -> Any:
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        export(dict(model.state_dict()), config, Path(folder) / "model", architecture="mixtral")
        return transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32)


if __name__ == "__main__":
    main()
