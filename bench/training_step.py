"""Tokens/s of a training step beside transformers' Mixtral: the same weights, batch, loop and optimizer.

    OMP_NUM_THREADS=2 python -m bench.training_step      # on the GPU where there is one

A step is forward, backward, gradient clipping and fused AdamW, in one process, float32 on a CPU and bfloat16 on a GPU.
transformers runs with each of its expert implementations; the ratio is to the fastest. Before timing, both models'
losses on the same batch must agree.

On a CPU contenders take turns, so that a machine whose speed drifts slows all of them. On a GPU there is no room for
all models at once: each is built, timed and freed, one that fails is recorded with the reason, and ratios are of
medians. There "grouped_mm build" is our model with the experts by torch's F.grouped_mm, and Liger's kernels are put
into transformers' model where they are installed; each size runs as its router is initialised (`balanced`), and with
routers that prefer some experts, as learned ones do (`learned`).
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers

from ava_fast.config import Config, load_config
from ava_fast.model import moe
from ava_fast.model.huggingface import export
from ava_fast.model.transformer import Transformer
from ava_fast.observe.throughput import flops_per_token, peak_flops
from bench import expert_peers, machine

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
OLMOE = {
    "vocab": 50304, "hidden": 2048, "layers": 16, "heads": 16, "experts": 64, "top_k": 8, "width": 1024, "length": 4096
}  # fmt: skip
MEDIUM = {**OLMOE, "hidden": 1536, "heads": 12, "experts": 32, "top_k": 4, "width": 768}  # about 500 M active
GPU_SIZES = {"medium": {**MEDIUM, "batch": 4}, "olmoe": {**OLMOE, "batch": 2}}
WARM_UP = 2
# Not batched_mm: it copies an expert's weights for every token, 4 GB at `wide`, and takes 20 times as long at `demo`.
THEIRS = ["eager", "grouped_mm"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Times a training step beside transformers' Mixtral.")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--size", action="append", choices=[*SIZES, *GPU_SIZES], help="repeatable; the device's if not")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="minutes; fewer runs, on a GPU fewer sizes, if they need it"
    )
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.budget
    if torch.cuda.is_available():
        for name in options.size or GPU_SIZES:
            size = {**SIZES, **GPU_SIZES}[name]
            for load in ("balanced", "learned"):
                if time.monotonic() > deadline:
                    print(f"{name}, {load}: not begun, the time is up")
                    continue
                # In a process of its own, as Liger changes transformers' modules for good.
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as own:
                    asked = config_of(size, "bf16"), size["batch"], options.runs, "cuda", load
                    row = own.submit(compare_apart, *asked).result()
                result = {"precision": "bf16", "runs": options.runs, "name": name, "routing": load, **size, **row}
                print(machine.write(f"training_step_cuda_{name}_{load}", result), flush=True)
        return
    names = options.size or list(SIZES)
    for number, name in enumerate(names):
        size, allotted = SIZES[name], (deadline - time.monotonic()) / (len(names) - number)
        row = {"name": name, **size, **_compare(config_of(size), size["batch"], options.runs, allotted)}
        print(f"{name}: {row['ratio']:.2f}× {row['fastest_peer']}", flush=True)
        for contender, figures in row["contenders"].items():
            rate = figures["tokens_per_second"]
            print(f"  {contender:24} {figures['median_ms']:8.1f} ms  {rate:8,.0f} tok/s", flush=True)
        print(machine.write(f"training_step_cpu_{name}", {"precision": "fp32", **row}))


def config_of(size: dict[str, int], precision: str = "fp32") -> Config:
    settings: dict[str, Any] = {
        "training.precision": precision,
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
    ours = Transformer(config)
    theirs = _mixtral(ours, config)
    inputs, labels = _batch(config, batch, "cpu")

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


def _compare(config: Config, batch: int, runs: int, allotted: float) -> dict[str, Any]:
    known, tokens = contenders(config, batch), batch * config.data.max_length
    times: dict[str, list[float]] = {name: [] for name in known}
    for run in machine.turns(WARM_UP + runs, "training step", allotted):
        for name, (select, step) in known.items():
            select()
            elapsed = machine.timed(step, "cpu")
            if run >= WARM_UP:
                times[name].append(elapsed)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    fastest = min((name for name in medians if name != "ava-fast"), key=lambda name: medians[name])
    pairs = machine.spread_of_ratios(times[fastest], times["ava-fast"])  # the two of a turn ran in the same seconds
    return {
        "runs": len(times["ava-fast"]),
        "parameters": sum(parameter.numel() for parameter in Transformer(config).parameters()),
        "flops": flops_per_token(config, config.data.max_length) * tokens,
        "contenders": {
            name: {**machine.spread(seconds), "tokens_per_second": tokens / statistics.median(seconds)}
            for name, seconds in times.items()
        },
        "fastest_peer": fastest,
        "ratio": pairs["median"],
        "pair_ratios": pairs,
    }


# --- On a GPU, one after the other ---


def compare_apart(config: Config, batch: int, runs: int, device: str, load: str) -> dict[str, Any]:
    """Figures of every contender that can be built and run, and why others cannot."""
    peak, tokens = peak_flops(config, torch.device(device)), batch * config.data.max_length
    flops = flops_per_token(config, config.data.max_length) * tokens
    figures: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    parameters = 0
    for name, build in builders(device).items():
        try:
            model, loss = build(config, batch, load)
            parameters = sum(parameter.numel() for parameter in model.parameters())
            step = _step(model, loss)
            seconds = machine.alternate({name: step}, device, runs, WARM_UP, name)[name]
            median = statistics.median(seconds)
            figures[name] = {**machine.spread(seconds), "tokens_per_second": tokens / median}
            figures[name] |= {"mfu": flops / median / peak} if peak else {}
            figures[name] |= {"peak_memory": torch.cuda.max_memory_allocated()} if device == "cuda" else {}
            print(f"{name}: {tokens / median:,.0f} tokens/s", flush=True)
        except Exception as error:  # not installed, or no memory for it: the others are measured all the same
            failed[name] = f"{type(error).__name__}: {str(error)[:300]}"
            print(f"{name}: {failed[name].splitlines()[0]}", flush=True)
        model = loss = step = None  # type: ignore[assignment]  # free their memory
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    if "ava-fast" not in figures:
        raise SystemExit(f"ours did not run: {failed['ava-fast']}")
    peers = [name for name in figures if name != "ava-fast"]
    fastest = min(peers, key=lambda name: figures[name]["median_ms"], default="ava-fast")
    ratio = figures[fastest]["median_ms"] / figures["ava-fast"]["median_ms"]
    return {
        "parameters": parameters,
        "flops": flops,
        "contenders": figures,
        "failed": failed,
        "fastest_peer": fastest,
        "ratio": ratio,
    }


Built = tuple[torch.nn.Module, Callable[[], torch.Tensor]]


def builders(device: str) -> dict[str, Callable[[Config, int, str], Built]]:
    """By name, what builds a model and its loss on a batch."""

    def ours(config: Config, batch: int, load: str) -> Built:
        torch.manual_seed(0)
        dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
        model = Transformer(config).to(device, dtype)
        if load == "learned":
            _prefer_some(model)
        inputs, labels = _batch(config, batch, device)
        return model, lambda: model(inputs, labels).objective

    def grouped_mm(config: Config, batch: int, load: str) -> Built:
        model, loss = ours(config, batch, load)

        def with_composition() -> torch.Tensor:
            with mock.patch.object(moe, "moe_mlp", _experts_by_grouped_mm):
                return loss()

        return model, with_composition

    def theirs(config: Config, batch: int, load: str, liger: bool = False) -> Built:
        if liger:
            importlib.import_module("liger_kernel.transformers").apply_liger_kernel_to_mixtral()
        mine, _ = ours(config, batch, load)
        model = _mixtral(mine.to("cpu", torch.float32), config).to(device, next(mine.parameters()).dtype)
        model.set_experts_implementation("grouped_mm")
        inputs, labels = _batch(config, batch, device)
        return model, lambda: model(input_ids=inputs, shift_labels=labels, labels=labels, use_cache=False).loss

    known = {"ava-fast": ours, "grouped_mm build": grouped_mm, "transformers grouped_mm": theirs}
    return known | ({"transformers, Liger": functools.partial(theirs, liger=True)} if device == "cuda" else {})


@torch.no_grad()
def _prefer_some(model: Transformer) -> None:
    """All tokens get a direction in common, and every router has an opinion on it: all ask the same experts more."""
    embedding = model.embed.weight
    embedding += 0.3 * embedding.std() * torch.randn_like(embedding[0])


def _experts_by_grouped_mm(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, routing: Any) -> torch.Tensor:
    return expert_peers.by_grouped_mm(x, gate_up, down, routing.expert, routing.weight)


def _batch(config: Config, batch: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.model.vocab_size, (batch, config.data.max_length + 1), generator=generator).to(device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


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
