"""The report: numbers with their provenance or none, and pages that are what it would write."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bench import figures, report

ROOT = Path(__file__).parents[2]
PROVENANCE = {
    "date": "2026-01-31",
    "command": "python -m bench.something --runs 3",
    "commit": "1a2b3c4",
    "cpu": "A CPU",
    "threads": 2,
    "gpu": None,
    "versions": {"torch": "2.13.0", "triton": None},
    "python": "3.11.7",
}
TIMES = {"median_ms": 2.0, "q1_ms": 1.5, "q3_ms": 2.5}
SLOWER = {"median_ms": 3.0, "q1_ms": 2.5, "q3_ms": 4.0, "ratio": {"median": 1.5, "q1": 1.4, "q3": 1.6}}


def size_of(**size):
    return {
        "sizes": [
            {
                "size": size,
                "flops": 2e9,
                "bytes": 1e6,
                "contenders": {"ours": TIMES | {"tflops": 1.0}, "Liger": SLOWER | {"tflops": 0.7}, "plain": SLOWER},
            }
        ]
    }


@pytest.fixture
def here(tmp_path):
    """A repository with results of each kind."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    loss = size_of(T=1024, M=64, V=1000)
    contents = {
        "loss_cpu": loss,
        "loss_cuda": loss | {"gpu": "NVIDIA H200"},
        "gradients_cpu": {
            "elements": 10**6,
            "tensors": 4,
            "bytes": 4 * 10**6,
            "ratios": {"torch": {"median": 9.0, "q1": 8.0, "q3": 10.0}},
            "contenders": {"ours": TIMES, "torch": TIMES | {"median_ms": 18.0}},
        },
        "ceilings_cpu": {"matmul": TIMES | {"tflops": 2.0}, "copy": TIMES | {"gb_per_second": 20.0}},
        "resharding_cpu": {"stall": {"in the background": TIMES}},  # a suite that the report knows nothing of
    }
    (tmp_path / "results").mkdir()
    for name, content in contents.items():
        (tmp_path / "results" / f"{name}.json").write_text(json.dumps(PROVENANCE | content))
    return tmp_path


def run(here, *arguments, monkeypatch):
    monkeypatch.setattr("sys.argv", ["report", "--results", str(here / "results"), "--root", str(here), *arguments])
    return report.main()


def test_the_pages_are_what_the_report_writes(monkeypatch, capsys):
    """If this fails: python -m bench.report"""
    monkeypatch.setattr("sys.argv", ["report", "--check"])
    assert report.main() == 0, capsys.readouterr().err
    for device in ("cpu", "cuda"):
        for kind in ("ratios", "roofline"):
            name = report.picture(kind, device)
            assert (ROOT / "docs" / name).is_file() == (name in (ROOT / "docs" / "benchmarks.md").read_text()), name


def test_tables_pictures_and_what_was_never_run(here, monkeypatch):
    assert run(here, "--check", monkeypatch=monkeypatch) == 1
    assert run(here, monkeypatch=monkeypatch) == 0
    assert run(here, "--check", monkeypatch=monkeypatch) == 0
    page = (here / "docs" / "benchmarks.md").read_text()
    assert "| Routing | not measured yet | **never run** |" in page
    assert "| The loss over the vocabulary | 2026-01-31 | 2026-01-31 |" in page
    said = "`python -m bench.something --runs 3` on 2026-01-31, commit 1a2b3c4: A CPU, 2 threads; Python 3.11.7"
    assert said in page
    assert "commit 1a2b3c4: NVIDIA H200;" in page
    line = "| 1,024 tokens, width 64, 1,000 words | ours | 2.00 (1.50 – 2.50) | 1.00 TFLOP/s |  |"
    assert line in page
    assert "|  | Liger | 3.00 (2.50 – 4.00) | 0.7 TFLOP/s | 1.50× (1.40 – 1.60) |" in page
    assert "| 1 M elements in 4 tensors | ours | 2.00 (1.50 – 2.50) | 2.00 GB/s |  |" in page
    assert "| stall, in the background | ours | 2.00 (1.50 – 2.50) |" in page
    pictures = sorted(path.name for path in (here / "docs" / "images").iterdir())
    assert pictures == ["bench-ratios-cpu.png", "bench-ratios-gpu.png", "bench-roofline-cpu.png"]  # no ceiling of a GPU
    assert all((here / "docs" / "images" / name).read_bytes()[:4] == b"\x89PNG" for name in pictures)
    assert "bench-roofline-gpu" not in page


def test_readme_holds_the_gpus_rows_where_there_are_some(here, monkeypatch):
    assert run(here, monkeypatch=monkeypatch) == 0
    readme = (here / "README.md").read_text()
    row = "| The loss over the vocabulary | 1.50× | 1,024 tokens, width 64, 1,000 words | Liger |"
    assert f"{row} 1a2b3c4, NVIDIA H200 |" in readme
    assert readme.startswith("before\n")
    assert readme.endswith("after\n")
    assert "never" not in readme
    for path in (here / "results").glob("*_cuda.json"):
        path.unlink()
    assert run(here, monkeypatch=monkeypatch) == 0
    readme = (here / "README.md").read_text()
    assert "| torch | 1a2b3c4, A CPU, 2 threads |" in readme
    assert "| 9.00× |" in readme
    assert "Nothing here has run on a GPU yet." in readme


@pytest.mark.parametrize("missing", ["date", "command", "commit", "python", "cpu", "versions"])
def test_numbers_without_provenance_are_refused_and_nothing_is_written(here, monkeypatch, capsys, missing):
    path = here / "results" / "loss_cpu.json"
    contents = json.loads(path.read_text())
    del contents[missing]
    path.write_text(json.dumps(contents))
    assert run(here, monkeypatch=monkeypatch) == 2
    said = capsys.readouterr().err
    assert f"{path}: does not say {'cpu or gpu' if missing == 'cpu' else missing}" in said
    assert "measure it again" in said
    assert not list((here / "docs").iterdir())
    assert "old" in (here / "README.md").read_text()


def test_a_file_that_is_cut_short_or_a_readme_without_a_place_is_refused(here, monkeypatch, capsys):
    (here / "README.md").write_text("no place")
    assert run(here, monkeypatch=monkeypatch) == 2
    assert "README.md: has no <!-- bench.report -->" in capsys.readouterr().err
    path = here / "results" / "loss_cpu.json"
    path.write_text(path.read_text()[:50])
    assert run(here, monkeypatch=monkeypatch) == 2
    assert f"{path}: is no JSON" in capsys.readouterr().err


def test_the_fastest_peer_is_the_one_that_counts():
    def row(contender, ratio):
        return figures.Row("a size", contender, "", (1.0, 1.0, 1.0), None, (ratio,) * 3, None, None)

    rows = [row("ours, sorted", 0.5), row("slow", 3.0), row("fast", 1.2), row("copy", 0.1)]
    result = figures.Result("experts", "cpu", Path("experts_cpu.json"), PROVENANCE, rows)
    assert [found.contender for found in figures.nearest_peers(result)] == ["fast"]


def test_every_result_that_is_committed_can_be_read(tmp_path):
    for path in (ROOT / "bench" / "results").glob("*.json"):
        shutil.copy(path, tmp_path)
    assert {result.suite for result in figures.read_all(tmp_path)} >= {"experts", "routing", "training_step"}
