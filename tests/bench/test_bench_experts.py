"""The experts' benchmark: contenders agree, a wrong one is not timed, one that crashes ends nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ava_kernels import tiles
from ava_kernels.experts.tiles import order_for

from bench import expert_peers, experts, machine

pytestmark = pytest.mark.usefixtures("small_and_seeded")

ROOT = Path(__file__).parents[2]
SIZE = experts.Size(48, 32, 16, 6, 2)


def rows():
    events = list(experts.run("cpu", [SIZE], 3, [], False, 60.0, slow=True))
    return [event["row"] for event in events if "row" in event]


def test_every_contender_is_right_and_timed():
    pytest.importorskip("transformers")
    even, zipf = rows()
    assert (even["routing"], zipf["routing"]) == ("even", "zipf")
    assert even["load"] == 1
    assert zipf["load"] > 1
    for row in (even, zipf):
        assert row["failed"] == {}
        assert row["contenders"].keys() == expert_peers.contenders("cpu", False).keys()
        for name, figures in row["contenders"].items():
            errors = figures["relative_errors"]
            assert errors.keys() == {"output", "dx", "dgate_up", "ddown", "dweight"}
            assert max(errors.values()) < 1e-5, name
            for direction, factor in (("forward", 6), ("backward", 12)):
                seconds = figures[direction]["median_ms"] / 1e3
                assert figures[direction]["tflops"] == pytest.approx(factor * 48 * 32 * 16 * 2 / seconds / 1e12)
        assert row["ratios"].keys() == row["contenders"].keys() - {"ours"}
        assert row["kept_floor"] == 4 * (48 * 32 + 48 * 2 * 32)


def test_peers_that_are_not_run_on_a_cpu_are_right_too():
    problem = expert_peers.make_problem(*SIZE, "zipf", "cpu", torch.bfloat16)
    errors = experts.errors_of(expert_peers.lean(problem), problem, experts.exact_results(problem))
    assert max(errors.values()) < experts.WRONG
    bound = expert_peers.bmm(problem)
    gradients = bound.backward(bound.forward(problem.x), [problem.x, *bound.leaves])
    assert [g.shape for g in gradients] == [leaf.shape for leaf in bound.leaves]


def test_what_is_wrong_or_raises_is_recorded_and_not_timed(monkeypatch):
    def wrong(problem):
        contender = expert_peers.composition(problem)
        forward = contender.forward
        contender.forward = lambda x: 1.1 * forward(x)
        return contender

    def missing(problem):
        raise ModuleNotFoundError("No module named 'nothing'")

    known = {"ours": expert_peers.ours, "wrong": wrong, "missing": missing}
    monkeypatch.setattr(experts, "contenders", lambda device, quick: known)
    for row in rows():
        assert row["contenders"].keys() == {"ours"}
        assert "relative errors {'output': '0.1'" in row["failed"]["wrong"]
        assert row["failed"]["missing"] == "ModuleNotFoundError: No module named 'nothing'"


def test_sizes_at_which_hoppers_kernels_are_faster_are_pinned(monkeypatch, tmp_path, capsys):
    """By both loads and directions together; where they failed once they are not."""

    def row(I, ours, hopper):
        contenders = {
            name: {"forward": {"median_ms": time}, "backward": {"median_ms": 2 * time}}
            for name, time in (("ours", ours), ("ours, hopper", hopper))
            if time
        }
        return {"size": [8, 16, I, 4, 2], "name": "", "routing": "even", "contenders": contenders}

    rows = [row(32, 1.0, 0.8), row(32, 1.0, 1.1), row(64, 1.0, 0.999), row(96, 1.0, 0.5), row(96, 1.0, None)]
    assert experts.better_on_hopper(rows) == ["4×16×32 bfloat16"]
    monkeypatch.setenv("AVA_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    monkeypatch.setattr(experts, "in_processes", lambda *_: iter([{"row": each} for each in rows[:1]]))
    monkeypatch.setattr(experts, "run", lambda *_: None)
    monkeypatch.setattr(experts, "_print", lambda row: None)
    monkeypatch.setattr(tiles, "generation", lambda device: "sm_90")
    monkeypatch.setattr("sys.argv", ["experts", "--device", "cuda", "--pin"])
    assert experts.main() == 0
    assert "4×16×32 bfloat16: hopper, triton" in capsys.readouterr().out
    assert order_for(torch.empty(0, dtype=torch.bfloat16), 4, 16, 32) == ["hopper", "triton"]
    assert order_for(torch.empty(0, dtype=torch.bfloat16), 4, 16, 64) == ["triton"]
    tiles.forget()


def test_a_crash_leaves_out_whom_it_belongs_to_and_the_rest_goes_on(tmp_path):
    """A package that kills the process when it is imported, in place of a peer."""
    (tmp_path / "transformers.py").write_text("import os\nos.abort()\n")
    paths = [str(tmp_path), str(ROOT), str(ROOT / "kernels")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "BENCH_RESULTS": str(tmp_path)}
    command = [sys.executable, "-m", "bench.experts", "--device", "cpu", "--runs", "3", "--processes", "--only-quick"]
    command += ["--size", SIZE.key()]
    output = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    result = json.loads((tmp_path / "experts_cpu.json").read_text())
    assert [name for name in result["left_out"] if "exit code -6" in result["left_out"][name]] == [
        "transformers grouped_mm",
        "transformers eager",
    ]
    assert [row["routing"] for row in result["sizes"]] == ["even", "zipf"]
    for row in result["sizes"]:
        assert row["contenders"].keys() == {"ours", "ours, sorted", "grouped_mm", "lean grouped_mm"}
    assert result["not_run"] == []
    assert "48 tokens" in output


@pytest.mark.parametrize(
    ("then", "ended"),
    [
        ("pass", []),
        ("import os; os.abort()", ["exit code -6"]),
        ("import sys; sys.exit('no such thing')", ["exit code 1: no such thing"]),
        ("import time; time.sleep(60)", ["no sign of life for 1 s"]),
    ],
)
def test_events_are_followed_to_any_end(tmp_path, then, ended):
    path = tmp_path / "events"
    path.touch()
    code = f"import sys; open(sys.argv[1], 'a').write('{{\"at\": 1}}\\n{{\"at\": 2}}\\n'); {then}"
    started_at = time.monotonic()
    events = list(experts.follow([sys.executable, "-c", code, str(path)], path, started_at + 60, 1.0))
    assert events[:2] == [{"at": 1}, {"at": 2}]
    assert [event["ended"][: len(ended[0])] for event in events[2:]] == ended
    assert time.monotonic() - started_at < 30


def test_the_deadline_is_kept(tmp_path):
    path = tmp_path / "events"
    path.touch()
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert list(experts.follow(command, path, time.monotonic() + 0.3, 60.0)) == []
