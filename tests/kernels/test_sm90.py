"""Every kernel compiles for an H200, at the shapes that the benchmarks time, without spilling registers, and the
experts' products with the instructions that they are written for; they compile for older GPUs too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHARED_MEMORY = {90: 227 * 1024, 80: 99 * 1024}  # the most that a program may have; sm_80's is that of sm_86 and sm_89


def compiled(folder: Path, architecture: int, cases: str = "") -> list[dict]:
    report = folder / f"sm{architecture}.json"
    environment = {
        key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "AVA_KERNELS_CACHE")
    }
    command = [sys.executable, "-m", "bench.sm90", "--json", report]
    command += ["--architecture", str(architecture), "--cases", cases]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=600)
    rows = json.loads(report.read_text())
    assert [row for row in rows if row["spills"]] == []
    assert [row for row in rows if row["registers"] * row["warps"] * 32 > 65536] == []
    assert [row for row in rows if row["shared"] > SHARED_MEMORY[architecture]] == []
    return rows


def test_kernels_compile_for_sm_90_without_spills(tmp_path):
    rows = compiled(tmp_path, 90)
    routing = {"_select", "serve", "_sum_columns", "_place", "_gradient", "_count_keys", "_order_keys"}
    moving = {"_take_rows", "_sum_rows", "_dot_rows"}
    experts = {"_up", "_rows", "_back", "_weights", "_invert", "_add_parts"}
    attention = {"_rotate", "_forward", "_dots", "_keys", "_queries"}
    assert {row["kernel"] for row in rows} == routing | moving | experts | attention
    assert [row for row in rows if row["serialized"]] == []
    products = [row for row in rows if row["kernel"] in ("_up", "_rows", "_back", "_weights")]
    assert len(products) == 6 * len({row["case"] for row in rows if row["case"].startswith("moe_mlp")})
    for row in products:
        if "fp32" in row["case"] or "unaligned" in row["case"]:  # exact products, and no descriptor can be made
            continue
        assert row["wgmma"] > 0, row
        assert row["tma"] > 0 or (row["kernel"] == "_back" and "odd" in row["case"]), row  # M is no multiple of BK
        assert (row["cp_async"] > 0) == (row["kernel"] != "_rows"), row  # what is gathered

    for row in rows:
        if row["kernel"] in ("_forward", "_keys", "_queries") and "fp32" not in row["case"]:
            assert row["wgmma"] > 0, row


def test_the_experts_products_compile_for_sm_80(tmp_path):
    rows = compiled(tmp_path, 80, "moe_mlp, |32768×2048")
    products = [row for row in rows if row["kernel"] in ("_up", "_rows", "_back", "_weights")]
    assert products
    assert not any(row["wgmma"] or row["tma"] for row in products)
    assert all(row["cp_async"] for row in products if "unaligned" not in row["case"])
