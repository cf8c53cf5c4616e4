"""Tokens/s of a training step beside transformers' Mixtral: the same weights, batch, loop and optimizer.

    OMP_NUM_THREADS=2 python -m bench.training_step

A step is forward, backward, gradient clipping and fused AdamW, fp32, one process. transformers runs with each of its
expert implementations; the ratio is to the fastest. Contenders take turns, so that a machine whose speed drifts slows
all of them. Before timing, both models' losses on the same batch must agree.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from ava_fast.config import Config, load_config
from ava_fast.model.huggingface import export
from ava_fast.model.transformer import Transformer
from bench import machine

# name → (batch, sequence, overrides)
SIZES: dict[str, tuple[int, int, list[str]]] = {
    "demo (1.0 M, 8 experts of 192, K 2)": (
        8,
        128,
        ["model.vocab_size=1024", "model.hidden_size=128", "model.num_layers=3", "model.num_heads=4"]
        + ["moe.num_experts=8", "moe.top_k=2", "moe.intermediate_size=192"],
    ),
    "18 M, 8 experts of 512, K 2": (
        8,
        256,
        ["model.vocab_size=8192", "model.hidden_size=256", "model.num_layers=4", "model.num_heads=8"]
        + ["moe.num_experts=8", "moe.top_k=2", "moe.intermediate_size=512"],
    ),
    "18 M, 64 experts of 64, K 8": (
        8,
        256,
        ["model.vocab_size=8192", "model.hidden_size=256", "model.num_layers=4", "model.num_heads=8"]
        + ["moe.num_experts=64", "moe.top_k=8", "moe.intermediate_size=64"],
    ),
}
THEIRS = ["eager", "batched_mm", "grouped_mm"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Times a training step beside transformers' Mixtral.")
    parser.add_argument("--runs", type=int, default=20)
    runs = parser.parse_args().runs
    rows = []
    for name, (batch, length, overrides) in SIZES.items():
        config = load_config(None, [*overrides, f"data.max_length={length}"])
        rows.append({"size": name, "batch": batch, "sequence": length, **_compare(config, batch, length, runs)})
        row = rows[-1]
        print(f"{name}: {row['ratio']:.2f}× {row['fastest_peer']}", flush=True)
        for contender, figures in row["contenders"].items():
            print(f"  {contender:24} {figures['median_ms']:8.1f} ms  {figures['tokens_per_second']:8,.0f} tok/s", flush=True)
    print(machine.write("training_step_cpu", {"precision": "fp32", "runs": runs, "sizes": rows}))


def _compare(config: Config, batch: int, length: int, runs: int) -> dict[str, Any]:
    torch.manual_seed(0)
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
    contenders = {"ava-fast": (lambda: None, our_step)}
    for implementation in THEIRS:
        if implementation == "batched_mm" and config.moe.num_experts * config.moe.top_k > 64:
            continue  # it copies an expert's weights per token: minutes a step
        contenders[f"transformers {implementation}"] = (
            lambda name=implementation: theirs.set_experts_implementation(name),
            their_step,
        )
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(runs + 2):
        for name, (prepare, step) in contenders.items():
            prepare()
            started_at = time.perf_counter()
            step()
            if turn >= 2:  # two warm-up turns
                times[name].append(time.perf_counter() - started_at)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    fastest = min((name for name in medians if name != "ava-fast"), key=lambda name: medians[name])
    return {
        "parameters": sum(parameter.numel() for parameter in ours.parameters()),
        "contenders": {
            name: {**machine.spread(seconds), "tokens_per_second": batch * length / statistics.median(seconds)}
            for name, seconds in times.items()
        },
        "fastest_peer": fastest,
        # Pair by pair: the two of a turn ran in the same seconds.
        "ratio": statistics.median(b / a for a, b in zip(times["ava-fast"], times[fastest], strict=True)),
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
    with tempfile.TemporaryDirectory() as folder:
        export(dict(model.state_dict()), config, Path(folder) / "model", architecture="mixtral")
        return transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32)


if __name__ == "__main__":
    main()
