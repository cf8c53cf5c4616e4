"""The search for tiles, on interpreted kernels: which of them are fast does not matter here, but what becomes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def tune(folder: Path, *options: str, interpreted: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "AVA_KERNELS_CACHE": str(folder), "TRITON_INTERPRET": "1"}
    environment.pop("AVA_KERNELS_BACKEND", None)
    if interpreted:
        environment["AVA_KERNELS_BACKEND"] = "triton"
    command = [sys.executable, "-m", "bench.tune", "experts", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_a_better_tile_is_kept_and_others_entries_stay(tmp_path):
    slow = [16, 16, 16, 4, 2, 8, 1]  # many small tiles: every candidate is faster in the interpreter
    entry = {"sm_90": {"up": {"2×128×32 float16": slow, "16 bit": slow}}}
    (tmp_path / "tiles.json").write_text(json.dumps(entry))
    result = tune(tmp_path, "--shapes", "8,128,32,2,1", "--dtype", "float16", "--runs", "2", "--budget", "0.1")
    assert result.returncode == 0, result.stderr
    assert "2×128×32 float16 up: " in result.stdout
    assert "0 failed" in result.stdout
    assert "WRONG" not in result.stdout
    table = json.loads((tmp_path / "tiles.json").read_text())
    assert table["sm_90"]["up"]["2×128×32 float16"] != slow
    assert table["sm_90"]["up"]["16 bit"] == slow
    assert [path.name for path in tmp_path.iterdir()] == ["tiles.json"]


def test_says_what_is_missing_without_a_gpu(tmp_path):
    result = tune(tmp_path, interpreted=False)
    assert result.returncode == 2
    assert result.stderr.strip() == "bench.tune needs a GPU, and torch finds none here"
    assert not list(tmp_path.iterdir())
