"""The command for a GPU: steps that crash or hang are recorded, and without a GPU it says so."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import ceilings, figures, gpu, machine

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line():
    done = subprocess.run(
        ["make", "-s", "bench-gpu", f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True
    )
    assert "no NVIDIA GPU" in done.stderr.splitlines()[0]
    assert done.stdout == ""
    assert done.returncode == 2


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("print('fine')", "ok"),
        ("import sys; print('fine'); sys.exit(3)", "exit code 3"),
        ("import os; print('fine', flush=True); os.abort()", "exit code -6"),
        ("import time; print('fine', flush=True); time.sleep(60)", "killed after 2 s"),
    ],
)
def test_a_step_ends_as_it_ends(code, status):
    outcome = gpu.run_python(["-c", code], 2, "cpu", None)
    assert outcome["status"] == status
    assert outcome["output"][0] == "fine"


def test_a_step_that_is_killed_takes_its_children_along():
    child = "import time; time.sleep(5); print('still there', flush=True)"
    code = f"import subprocess, sys; print('fine', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    started_at = time.monotonic()
    outcome = gpu.run_python(["-c", code], 1, "cpu", None)
    assert outcome["output"] == ["fine"]  # read to its end: nobody holds the pipe any more
    assert time.monotonic() - started_at < 4


def test_a_group_that_crashes_is_a_wrong_case_and_what_it_had_done_counts(tmp_path, monkeypatch):
    """Killed when it prints its second line, by what Python imports on its own at the start."""
    (tmp_path / "sitecustomize.py").write_text(
        "import builtins, os\n"
        "show, shown = print, []\n"
        "def count(*words, **options):\n"
        "    shown.append(1)\n"
        "    os.abort() if len(shown) > 1 else show(*words, **options)\n"
        "builtins.print = count\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    session = gpu.Session("cpu", time.monotonic() + 60, tmp_path)
    cases = session.check(("rows", "float32"))
    assert [case["ok"] for case in cases] == [True, False]
    assert "exit code -6" in cases[1]["error"]
    written = json.loads((tmp_path / "gpu_cpu.json").read_text())
    assert written["cases"]["check rows float32"]["right"] == 1
    assert written["steps"]["check rows float32"]["status"] == "exit code -6"


def test_no_step_starts_when_time_is_up(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    session = gpu.Session("cpu", time.monotonic() + 1, tmp_path)
    assert session.step("late", ["-c", "print(1)"], 60)["status"] == "no time left"


def test_ceilings_of_a_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["ceilings", "--size", "256", "--floats", str(2**18)])
    ceilings.main()
    found = json.loads(next(tmp_path.glob("ceilings_*.json")).read_text())
    assert found["matmul"]["tflops"] == pytest.approx(2 * 256**3 / found["matmul"]["median_ms"] / 1e9)
    assert found["copy"]["gb_per_second"] == pytest.approx(2**21 / found["copy"]["median_ms"] / 1e6)


def attention_row(S: int, ours: float, peer: float) -> dict:
    """As bench.attention writes it; `peer` is as fast forward, and the one that counts backward."""
    size = {"B": 1, "S": S, "H_q": 16, "H_kv": 4, "D": 64, "mask": "causal"}
    times = {"ours, triton": (1.0, ours), "separate, triton": (0.1, 0.1), "cuDNN": (1.0, peer)}
    contenders = {
        name: {"forward": {"median_ms": forward}, "backward": {"median_ms": backward}}
        for name, (forward, backward) in times.items()
    }
    return {"size": size, "contenders": contenders}


def test_the_order_is_the_most_telling_first_and_a_step_that_fails_ends_nothing(tmp_path, monkeypatch):
    """Checks come before everything; tuning only where experts or attention are behind; what is left over goes on."""
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    rows = [
        {"size": [8, 4, 2, 1, 1], "ratios": {"grouped_mm": {"forward": {"median": 1.6}, "backward": {"median": 1.6}}}},
        {"size": [16, 4, 2, 1, 1], "ratios": {"liger": {"forward": {"median": 1.6}, "backward": {"median": 1.2}}}},
    ]
    (tmp_path / "experts_cuda.json").write_text(json.dumps({"sizes": rows}))
    rows = [
        attention_row(4096, ours=1.0, peer=1.1),
        attention_row(2048, ours=1.0, peer=0.98),
        attention_row(8192, ours=1.0, peer=0.98),  # at this length peers may be ahead by a tenth
        attention_row(16384, ours=1.0, peer=0.8),
    ]
    (tmp_path / "attention_cuda.json").write_text(json.dumps({"sizes": rows}))
    session = gpu.Session("cuda", time.monotonic() + 1000, tmp_path)
    done = []
    monkeypatch.setattr(session, "build_extension", lambda: None)
    monkeypatch.setattr(session, "is_hopper", lambda: True)
    monkeypatch.setattr(session, "check", lambda group: done.append(f"check {group[0]}") or [])

    def step(name, arguments, limit, echo=""):
        done.append(name)
        commands[name] = arguments
        limits.append(limit)
        session.result["steps"][name] = {"status": "exit code 1"}

    commands, limits = {}, []
    monkeypatch.setattr(session, "step", step)
    assert session.run() == 1
    after = ["ceilings", "experts", "attention", "routing", "gradients", "rotary", "norm", "loss"]
    tuned = ["experts' tiles", "experts, tuned", "hopper's tiles", "attention's tiles", "attention, tuned"]
    assert [name for name in done if "check" not in name] == [*after, *tuned, "training step"]
    assert "check" not in " ".join(done[done.index("ceilings") :])
    assert commands["experts' tiles"][-2:] == ["--shapes", "16,4,2,1,1"]
    shapes = ["1,2048,16,4,64,causal", "1,16384,16,4,64,causal"]
    for name, operation in (("attention's tiles", "attention"), ("hopper's tiles", "hopper")):
        assert commands[name][1:3] == ["bench.tune", operation]
        assert commands[name][-3:] == ["--shapes", *shapes]
    assert "--pin" in commands["attention"]
    assert "--pin" in commands["experts"]
    assert commands["attention, tuned"][-4:] == ["--size", shapes[0], "--size", shapes[1]]
    assert commands["experts, tuned"][-2:] == ["--size", "16,4,2,1,1"]
    assert limits[-1] == pytest.approx(1020, abs=20)  # nobody used any time
    (tmp_path / "experts_cuda.json").unlink()
    assert gpu.behind(tmp_path / "experts_cuda.json") == []


def test_the_steps_are_commands_that_work(tmp_path, monkeypatch, small_and_seeded):
    """On a CPU; the longest have tests of their own."""
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    session = gpu.Session("cpu", time.monotonic() + 600, tmp_path)
    for name in ("rotary", "norm", "loss", "routing"):
        _, module, *arguments = session.arguments(name, True)
        monkeypatch.setattr("sys.argv", [name, *arguments])
        importlib.import_module(module).main()
        (path,) = tmp_path.glob(f"{name}_*.json")
        rows = figures.read(path).rows
        assert {row.contender for row in rows} >= {"ours"}
        assert all(row.bytes for row in rows)
    assert session.arguments("attention's tiles", True) is None
