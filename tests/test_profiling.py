"""`ava-fast profile`: every millisecond of a step belongs to one part, on one rank and on two."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from corpus import write_config, write_corpus

from ava_fast import cli
from ava_fast.config import Config
from ava_fast.observe import trace

PARTS = {"attention", "routing", "experts", "loss", "optimizer", "communication", "data", "other", "host gaps"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "texts")


def only_profile(config: Path) -> Path:
    (folder,) = (config.parent / "outputs" / "profiles").iterdir()
    return folder


def checked(folder: Path, ranks: int, steps: int) -> list[dict]:
    files = {"parts.txt", "parts.json", "memory.json", "memory.png", *(f"rank_{r}.trace.json.gz" for r in range(ranks))}
    assert {path.name for path in folder.iterdir()} == files
    found = json.loads((folder / "parts.json").read_text())
    assert len(found) == ranks
    for rank in found:
        assert len(rank["steps"]) == steps
        assert rank["host"].keys() == PARTS
        assert sum(rank["host"].values()) == pytest.approx(sum(rank["steps"]) / steps, rel=1e-3)
    memory = json.loads((folder / "memory.json").read_text())
    assert len(memory["ms"]) == len(memory["bytes"]) > 100
    assert len(memory["steps"]) == steps
    assert max(memory["bytes"]) > 50_000
    assert (folder / "memory.png").read_bytes()[:4] == b"\x89PNG"
    return found


def test_one_process(tmp_path, corpus, capsys):
    config = write_config(tmp_path / "c.yaml", corpus, training={"max_steps": 2, "batch_size": 2})
    assert cli.main(["profile", "--config", str(config), "--steps", "2"]) == 0
    folder = only_profile(config)
    checked(folder, 1, 2)
    said = capsys.readouterr().out
    assert "step 2/2: " in said
    assert (folder / "parts.txt").read_text() in said
    assert f"{folder}: parts.txt" in said
    events = json.loads(gzip.decompress((folder / "rank_0.trace.json.gz").read_bytes()))["traceEvents"]
    ranges = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    # two blocks, two micro-batches, two steps
    assert [ranges.count(f"ava: {name}") for name in ("step", "attention", "experts", "loss")] == [2, 8, 8, 4]
    # What makes the gradients is found: the backward pass of the loss and of the experts lies outside every range.
    made_by = trace._parts_by_sequence(events)
    backward = {e["name"].split(": ")[1]: e["args"] for e in events if "evaluate_function: " in e["name"]}
    for node, part in {
        "_LinearCrossEntropyBackward": "loss",
        "GeneratedBackwardFor_ava_kernels_moe_mlp_defaultBackward": "experts",
        "GeneratedBackwardFor_ava_kernels_route_defaultBackward": "routing",
        "ScaledDotProductFlashAttentionForCpuBackward0": "attention",
        "EmbeddingBackward0": "other",
    }.items():
        assert made_by[backward[node]["Sequence number"]] == part


def test_two_ranks_that_compute_activations_twice(tmp_path, corpus):
    config = write_config(
        tmp_path / "c.yaml", corpus, deepspeed={"zero_stage": 2}, memory={"activation_checkpointing": True}
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "ava_fast.cli", "profile", "--config", str(config), "--steps", "1"]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    checked(only_profile(config), 2, 1)
    assert "rank 0            rank 1" in done.stdout


def test_what_cannot_be_profiled_is_refused(tmp_path, corpus, capsys):
    config = write_config(tmp_path / "c.yaml", corpus)
    assert cli.main(["profile", "--config", str(config), "--steps", "0"]) == 2
    assert capsys.readouterr().err == "--steps: is 0; give at least 1\n"
    missing = ["--override", "data.data_dir=/nonexistent"]
    assert cli.main(["profile", "--config", str(config), *missing]) == 2
    assert "preflight refused the run" in capsys.readouterr().err
    assert not (tmp_path / "outputs" / "profiles").exists()


# --- Traces, made by hand ---


def event(category, name, start, end, thread=1, **arguments):
    return {"cat": category, "name": name, "ts": start, "dur": end - start, "tid": thread, "args": arguments}


def operator(name, start, end, thread=1, **arguments):
    return event("cpu_op", name, start, end, thread, **arguments)


def node(start, end, sequence, thread=1):
    arguments = {"Sequence number": sequence, "Fwd thread id": 1}
    return operator("autograd::engine::evaluate_function: X", start, end, thread, **arguments)


def seen(sequence):
    return {"Sequence number": sequence, "Fwd thread id": 0}


def test_the_time_of_a_thread_is_divided():
    events = [
        event("user_annotation", "ava: step", 0, 1000),
        event("user_annotation", "ava: data", 0, 50),
        event("user_annotation", "ava: attention", 100, 200),
        operator("aten::view", 110, 120, **seen(7)),  # makes no node, so the next operator sees 7 too
        event("user_annotation", "ava: experts", 200, 300),
        operator("moe_mlp", 210, 290, **seen(7)),
        operator("aten::mm", 220, 230, **seen(8)),
        node(400, 500, 7),
        operator("c10d::allreduce_", 450, 470),
        event("user_annotation", "ava: optimizer", 600, 900),
        operator("aten::add", 620, 720),
        event("user_annotation", "gloo:all_reduce", 700, 800, thread=2),
        operator("aten::add", 910, 940),
        operator("aten::add", 1000, 1100),  # of no step
    ]
    found = trace.times_by_part(events)
    assert found["steps"] == [1.0]
    assert found["host"] == {
        "attention": 0.01,
        "experts": 0.08 + 0.08,  # forward, and backward without the collective in it
        "optimizer": 0.1,
        "communication": 0.02 + 0.08,  # waited for from 720 to 800
        "data": 0.05,
        "other": 0.03,
        "host gaps": 0.55,
    }
    assert sum(found["host"].values()) == pytest.approx(1)


def gpu_events():
    def launch(number, at, thread=1):
        return event("cuda_runtime", "cudaLaunchKernel", at, at + 1, thread, correlation=number)

    def kernel(number, name, start, end):
        return event("kernel", name, start, end, thread=7, correlation=number)

    shapes = {"Input Dims": [[100, 50], [50, 20]], "Input type": ["c10::BFloat16", "c10::BFloat16"]}
    return [
        event("user_annotation", "ava: step", 0, 1000),
        event("user_annotation", "ava: attention", 100, 200),
        operator("aten::mm", 110, 150, **seen(3), **shapes),
        launch(1, 120),
        event("user_annotation", "ava: experts", 200, 300),
        operator("ava_kernels::moe_mlp", 210, 290, **seen(4), **shapes),
        launch(2, 220),
        launch(3, 230),
        node(400, 500, 3, thread=2),  # autograd has a thread of its own
        launch(4, 410, thread=2),
        kernel(1, "gemm", 200, 300),
        kernel(2, "_up", 300, 500),
        kernel(3, "_grouped_mm", 450, 600),
        kernel(4, "gemm", 700, 750),
        kernel(5, "ncclDevKernel_AllReduce", 740, 800),
        kernel(6, "gemm", 1200, 1300),  # of no step
    ]


def test_the_time_of_a_gpu_is_its_kernels():
    found = trace.times_by_part(gpu_events())
    assert found["device"] == {
        "attention": 0.15,
        "experts": 0.35,
        "communication": 0.06,
        "host gaps": 0.5,  # busy from 200 to 600 and from 700 to 800
    }
    table = trace.table([found], cuda=True)
    assert "experts                0.35  35.0%" in table


def small_config():
    return Config.model_validate(
        {
            "model": {"vocab_size": 300, "hidden_size": 64, "num_layers": 1, "num_heads": 2},
            "moe": {"num_experts": 4, "top_k": 2, "intermediate_size": 32},
            "data": {"max_length": 128},
            "training": {"batch_size": 8},
        }
    )


def test_kernels_whose_arithmetic_is_known_exist():
    ours = ("experts.kernels", "attention.kernels")
    hopper = (
        "experts.hopper_kernels",
        "experts.hopper_weight_grad",
        "attention.hopper_forward",
        "attention.hopper_backward",
    )
    for prefix, modules in (("", ours), ("_hopper", hopper)):
        there = set().union(*(vars(importlib.import_module(f"ava_kernels.{module}")) for module in modules))
        assert {prefix + name for name in trace._own_flops(small_config(), 2)} <= there


def test_kernels_and_what_they_reach():
    events, peak = gpu_events(), {"flops": 1e12, "bytes": 1e9}
    events.append(event("kernel", "_hopper_down_backward", 900, 910, thread=7, correlation=7))
    rows = {row["kernel"]: row for row in trace.kernels(events, small_config(), 2, 1, peak)}
    gemm, up = rows["gemm"], rows["_up"]
    assert (gemm["part"], gemm["ms"], gemm["launches"]) == ("attention", 0.15, 2)
    # One of its launches has an operator: 2·100·50·20 FLOPs, 12,000 bytes of inputs, in 150 µs.
    assert gemm["roofline_share"] == round(12_000 / 150e-6 / 1e9, 4)
    # 4 of 8 sequences a rank, 512 tokens to 2 experts each: gate and up are 2·32 wide.
    assert up["roofline_share"] == round(2 * 512 * 2 * 64 * 64 / 200e-6 / 1e12, 4)
    assert rows["_hopper_down_backward"]["roofline_share"] == round(2 * 512 * 2 * 64 * 32 / 10e-6 / 1e12, 4)
    assert rows["ncclDevKernel_AllReduce"]["roofline_share"] is None
    assert "_up" in trace.kernel_table(list(rows.values()))
