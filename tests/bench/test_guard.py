"""The guard: what is planted is caught, and noise alone is not."""

from __future__ import annotations

import json
import math
import random
import shutil
import statistics
import time
from pathlib import Path

import pytest
import torch

from bench import guard, instructions, machine, pairs

ROOT = Path(__file__).parents[2]
PAIRS = list(pairs.PAIRS)


@pytest.fixture
def baselines(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "BASELINES", tmp_path / "baselines")
    return tmp_path / "baselines"


# --- Ratios on a CPU ---


@pytest.fixture
def product(monkeypatch):
    """The only pair: a product beside itself; how often ours is computed is what the test plants."""
    ours = {"times": 1}
    a = torch.randn(300, 300)

    def prepare():
        yield (lambda: [a @ a for _ in range(ours["times"])]), (lambda: a @ a)

    monkeypatch.setattr(pairs, "PAIRS", {"product / product": prepare})
    return ours


def test_a_planted_slowdown_is_caught_and_equal_speed_is_not(baselines, product, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["guard", "cpu", "--record"])
    assert guard.main() == 0
    recorded = json.loads((baselines / "cpu.json").read_text())
    assert recorded["ratios"]["product / product"]["ratio"] == pytest.approx(1, abs=0.3)
    assert recorded["provenance"]["commit"] == machine.commit()
    monkeypatch.setattr("sys.argv", ["guard", "cpu"])
    assert guard.main() == 0
    product["times"] = 3
    assert guard.main() == 1
    assert "FAILED product / product: " in capsys.readouterr().out


def noisy(ratio: float, generator: random.Random):
    """Measurements as on a busy machine: a level of its own each time, 5 %, and 15 % between turns."""

    def measure():
        level = ratio * math.exp(generator.gauss(0, 0.05))
        first, median, third = statistics.quantiles([level * math.exp(generator.gauss(0, 0.15)) for _ in range(15)])
        return first, median, third

    return measure


def test_noise_alone_does_not_fail_and_a_slowdown_in_the_noise_does():
    generator = random.Random(0)
    assert [guard.judge("x", 1.5, 0.2, noisy(1.5, generator))[1] for _ in range(1000)] == [None] * 1000
    assert all(guard.judge("x", 1.5, 0.2, noisy(1.5 / 1.6, generator))[1] for _ in range(1000))


def test_a_low_measurement_is_taken_again_before_it_fails():
    values = iter([0.5, 0.9])
    note, fault = guard.judge("x", 1.0, 0.2, lambda: (0.4, next(values), 1.0))
    assert fault is None
    assert "measured 2 times" in note
    values = iter([0.5, 0.6, 0.7])
    _, fault = guard.judge("x", 1.0, 0.2, lambda: (0.4, next(values), 1.0))
    assert fault == "x: 0.50, 0.60, 0.70× in 3 measurements, where 1.00 − 20% is allowed"


def test_every_pair_has_a_baseline_and_every_baseline_a_pair(baselines, product):
    baselines.mkdir()
    (baselines / "cpu.json").write_text(json.dumps({"ratios": {}}))
    (fault,) = guard.cpu(ROOT).faults
    assert fault == "product / product: is in only one of bench/pairs.py and bench/baselines/cpu.json"
    assert list(json.loads((ROOT / "bench" / "baselines" / "cpu.json").read_text())["ratios"]) == PAIRS


def test_time_that_others_take_does_not_count(monkeypatch):
    """Ours waits, as where another process has the core."""
    a = torch.randn(300, 300)

    def prepare():
        yield (lambda: (time.sleep(0.01), a @ a)), (lambda: a @ a)

    monkeypatch.setattr(pairs, "PAIRS", {"waiting": prepare})
    assert guard.ratio_of("waiting")[1] == pytest.approx(1, abs=0.5)  # 0.1 by the clock


# --- Instructions ---


needs_valgrind = pytest.mark.skipif(
    not (shutil.which("valgrind") and shutil.which("g++")), reason="valgrind and g++ count instructions"
)


@needs_valgrind
def test_a_planted_loop_is_counted(tmp_path):
    for folder in ("csrc", "bench/callgrind"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    lanes = tmp_path / "csrc" / "grad_stats_lanes.h"
    loop = "for (int64_t i = 0; i < whole; i += 16) add_sixteen(sums, x + i);"
    assert loop in lanes.read_text()
    planted = (
        loop + "\n  Sums more{};\n  " + loop.replace("sums", "more") + "\n  sums.squares[0] += 0 * more.squares[0];"
    )
    lanes.write_text(lanes.read_text().replace(loop, planted))
    before, after = (instructions.count_extension(root, "float32,") for root in (ROOT, tmp_path))
    _, faults = guard.instruction_faults(after, before)
    assert [fault.split(":")[0] for fault in faults] == sorted(before)
    assert len(before) == 2


@needs_valgrind
def test_a_planted_pass_of_the_loader_is_counted(tmp_path):
    """Rows that are read twice, beside the recorded count; where that is of other tools, beside one taken here."""
    for folder in ("ava_fast", "bench"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    batches = tmp_path / "ava_fast" / "data" / "batches.py"
    reading = "self.sources[source].read([share[row][1] for row in rows])"
    assert reading in batches.read_text()
    batches.write_text(batches.read_text().replace(reading, f"{reading}\n            {reading}"))
    recorded = json.loads((guard.BASELINES / "instructions.json").read_text())["groups"]["loader"]
    tools = instructions.GROUPS["loader"].tools()
    same = all(recorded[tool] == version for tool, version in tools.items())
    before = recorded["counts"] if same else instructions.count_loader()
    _, faults = guard.instruction_faults(instructions.count_loader(tmp_path), before)
    (fault,) = faults
    assert fault.startswith("loader, a batch: +")


def test_two_percent_more_instructions_are_allowed_and_no_more():
    assert guard.instruction_faults({"a": 102, "b": 50}, {"a": 100, "b": 100})[1] == []
    assert guard.instruction_faults({"a": 103}, {"a": 100})[1] == ["a: +3.0% instructions, +2% is allowed"]
    assert "is counted here or in the baseline alone" in guard.instruction_faults({}, {"a": 100})[1][0]


def test_another_compiler_is_not_compared(baselines, monkeypatch):
    baselines.mkdir()
    groups = {"one": instructions.Group(lambda: {"compiler": "new"}, lambda: pytest.fail("counted"))}
    monkeypatch.setattr(instructions, "GROUPS", groups)
    monkeypatch.setattr(guard, "_counting", lambda: instructions)
    old = {"groups": {"one": {"compiler": "old", "counts": {"a": 1}}}}
    (baselines / "instructions.json").write_text(json.dumps(old))
    outcome = guard.instructions(ROOT)
    assert outcome == (0, ["one: not compared: the baseline is of compiler old, here new"], [])


# --- Shares of a GPU's ceilings: made up, as there is no GPU to measure ---


def results_of_a_gpu(folder: Path, tflops: float, milliseconds: float, gpu: str = "NVIDIA H200") -> Path:
    folder.mkdir(exist_ok=True)
    figures = {"median_ms": milliseconds}
    contents = {
        "ceilings": {"matmul": {"tflops": 100.0}, "copy": {"gb_per_second": 1000.0}},
        "experts": {
            "sizes": [
                {
                    "size": [8, 4, 2, 1, 1],
                    "routing": "even",
                    "contenders": {
                        "ours": {"forward": {"tflops": tflops}, "backward": {"tflops": 60.0}},
                        "liger": {"forward": {"tflops": 90.0}, "backward": {"tflops": 90.0}},
                    },
                }
            ]
        },
        "gradients": {"bytes": 10**9, "contenders": {"ours": figures, "ours, clip": figures, "torch": figures}},
    }
    for name, content in contents.items():
        (folder / f"{name}_cuda.json").write_text(json.dumps({"gpu": gpu, **content}))
    return folder


def test_a_share_of_the_ceiling_that_falls_is_caught(tmp_path, baselines, capsys, monkeypatch):
    before = results_of_a_gpu(tmp_path / "before", 50.0, 2.0)
    device, shares = guard.shares(before)
    assert device == "NVIDIA H200"
    assert shares == {
        "experts, 8,4,2,1,1 even, ours, forward": 0.5,
        "experts, 8,4,2,1,1 even, ours, backward": 0.6,
        "gradients, ours": 0.5,  # 10⁹ bytes in 2 ms, of 1,000 GB/s
    }
    with pytest.raises(guard.Incomparable, match=r"h200.json; --record writes one"):
        guard.gpu(before)
    assert guard.record("gpu", before) == baselines / "h200.json"
    assert guard.gpu(before) == (3, [], [])
    assert guard.gpu(results_of_a_gpu(tmp_path / "noise", 48.0, 2.1)).faults == []
    slower = guard.gpu(results_of_a_gpu(tmp_path / "slower", 45.0, 2.0)).faults
    assert slower == ["experts, 8,4,2,1,1 even, ours, forward: 45.0% of the ceiling, 50.0% − 7% is allowed"]
    assert len(guard.gpu(results_of_a_gpu(tmp_path / "both", 45.0, 2.3)).faults) == 2
    with pytest.raises(guard.Incomparable, match=r"a100-40gb.json"):
        guard.gpu(results_of_a_gpu(tmp_path / "other", 45.0, 2.3, "NVIDIA A100 40GB"))
    (before / "experts_cuda.json").unlink()
    assert guard.gpu(before).notes[0].startswith("2 of the baseline were not measured")


def test_exit_codes_and_what_cannot_be_compared(tmp_path, baselines, capsys, monkeypatch):
    def run(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["guard", *arguments])
        return guard.main()

    results = str(results_of_a_gpu(tmp_path / "results", 50.0, 2.0))
    assert run("gpu", "--results", results) == 2
    assert "gpu: not compared: there is no " in capsys.readouterr().out
    assert run("gpu", "--record", "--results", results) == 0
    assert run("gpu", "--results", results) == 0
    slower = str(results_of_a_gpu(tmp_path / "slower", 40.0, 2.0))
    assert run("gpu", "--results", slower) == 1
    assert "gpu: 3 compared, 1 failed" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run("gppu")
    assert "gppu is no part of the guard; there are cpu, sm90, instructions, gpu" in capsys.readouterr().err
