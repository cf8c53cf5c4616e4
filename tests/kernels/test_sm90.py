"""Every kernel compiles for an H200, at the shapes that the benchmarks time, without spilling registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHARED_MEMORY = 227 * 1024  # the most that a program may have on sm_90


def test_kernels_compile_for_sm_90_without_spills(tmp_path):
    report = tmp_path / "sm90.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.sm90", "--json", report]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=600)
    rows = json.loads(report.read_text())
    routing = {"_select", "serve", "_sum_columns", "_place", "_gradient", "_count_keys", "_order_keys"}
    assert {row["kernel"] for row in rows} == routing | {"_take_rows", "_sum_rows", "_dot_rows"}
    assert [row for row in rows if row["spills"]] == []
    assert [row for row in rows if row["registers"] * row["warps"] * 32 > 65536] == []
    assert [row for row in rows if row["shared"] > SHARED_MEMORY] == []
