"""The memory plan: what it counts against what autograd keeps, and the table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from corpus import write_config

from ava_fast import cli
from ava_fast.config import load_config
from ava_fast.model.transformer import Transformer
from ava_fast.stability.plan import estimate


def kept(config: Path, overrides: list[str]) -> int:
    """Bytes that a real forward pass keeps, with the kernels in Triton's interpreter."""
    settings = load_config(config, [*overrides, "training.attention_backend=triton"])
    model = Transformer(settings)
    tokens = torch.zeros(4, 32, dtype=torch.int64)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, tuple[int, torch.Tensor]] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(tokens, tokens)
    return sum(size for size, _ in seen.values())


def test_activations_are_what_a_pass_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVA_KERNELS_BACKEND", "triton")
    config = write_config(tmp_path / "c.yaml", tmp_path)
    found = estimate(load_config(config), 1)
    assert found.activations == pytest.approx(kept(config, []), rel=0.02)
    half = estimate(load_config(config, ["memory.micro_batch=2"]), 1)
    assert half.activations == pytest.approx(found.activations / 2, rel=0.1)
    less = estimate(load_config(config, ["memory.activation_checkpointing=true"]), 1)
    assert less.activations < found.activations
    assert less.peak < found.peak
    shared = estimate(load_config(config, ["deepspeed.zero_stage=3"]), 4)
    assert shared.states < estimate(load_config(config, ["deepspeed.zero_stage=0"]), 4).states / 2


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(write_config(tmp_path / "c.yaml", tmp_path))
    large = [
        "model.hidden_size=8192",
        "model.num_heads=64",
        "model.num_layers=32",
        "moe.intermediate_size=4096",
        "moe.num_experts=8",
    ]
    overrides = [f"--override={setting}" for setting in [*large, "training.precision=bf16"]]
    assert cli.main(["memory", "plan", "--config", config, "--world-size", "4", *overrides]) == 0
    lines = capsys.readouterr().out.splitlines()
    ways = [line for line in lines if "ZeRO-" in line and "GB" not in line]
    peaks = [float(line.split()[-1]) for line in ways]
    assert any("ZeRO-3" in way for way in ways)
    assert any("the optimizer on the host" in way for way in ways)
    assert peaks == sorted(peaks, reverse=True)
    assert "none of these" in next(line for line in lines if line.startswith("RTX 4090"))
    assert lines[0].startswith("GiB")
    # A small model's in MiB; and no way that takes more than the configuration.
    assert cli.main(["memory", "plan", "--config", config, "--world-size", "4"]) == 0
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.startswith("MiB on each of 4")
    peaks = [float(line.split()[-1]) for line in lines[: lines.index("")]]
    assert peaks[0] > max(peaks[1:]) > 0.1
    assert cli.main(["memory", "plan", "--config", config, "--world-size", "3"]) == 2
    assert "training.batch_size" in capsys.readouterr().err
