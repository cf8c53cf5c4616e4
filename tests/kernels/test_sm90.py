"""Every kernel compiles for an H200, at the shapes that the benchmarks time, without spilling registers, and the
experts' products with the instructions that they are written for; they compile for older GPUs too."""

from __future__ import annotations

import copy
import json

import pytest

from bench import guard, machine

# The most that a program may have; sm_80's is that of sm_86 and sm_89.
SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}
# What has tiles of its own there.
ELSEWHERE = "32768×2048, |moe_mlp, unaligned|attention (64, causal, 64/8$|128, packed|256)"


RECORDED = json.loads((guard.BASELINES / "sm90.json").read_text())
IS_RECORDED = RECORDED["triton"] == machine.installed("triton")


def compiled(architecture: int, cases: str = "") -> list[dict]:
    rows = guard.compiled(architecture, cases)
    assert not IS_RECORDED or [row for row in rows if row["spills"]] == []  # tiles were chosen with that Triton
    assert [row for row in rows if row["registers"] * row["warps"] * 32 > 65536] == []
    assert [row for row in rows if row["shared"] > SHARED_MEMORY[architecture]] == []
    return rows


@pytest.fixture(scope="module")
def for_sm_90() -> list[dict]:
    return compiled(90)


def baseline() -> dict:
    if not IS_RECORDED:
        pytest.skip(f"the baseline is of triton {RECORDED['triton']}")
    return copy.deepcopy(RECORDED)


def test_no_kernel_compiles_to_more_than_its_baseline(for_sm_90):
    assert guard.sm90_faults(for_sm_90, baseline()) == []


@pytest.mark.parametrize(
    ("field", "change", "said"),
    [
        ("spills", 4, "spills 4, allowed are 0"),
        ("shared", 16, "shared"),
        ("registers", 9, "registers"),
        ("instructions", 1000, "instructions"),
        ("wgmma", -1, "wgmma instructions"),
        ("tma", -1, "tma instructions"),
        ("cp_async", -1, "cp_async instructions"),
    ],
)
def test_the_guard_sees_one_kernel_compile_to_more(for_sm_90, field, change, said):
    at = next(i for i, row in enumerate(for_sm_90) if row["kernel"] == "_up" and row["tma"] and row["cp_async"])
    worse = [{**row, field: row[field] + change} if i == at else row for i, row in enumerate(for_sm_90)]
    (fault,) = guard.sm90_faults(worse, baseline())
    assert fault.startswith(f"{for_sm_90[at]['case']}, _up: ")
    assert said in fault
    assert guard.sm90_faults(for_sm_90[1:], baseline())[0].endswith("record the baseline anew if that is meant")


def test_the_guard_sees_a_tile_that_spills(tmp_path):
    """Compiled, not made up: four warps have too few registers for these accumulators."""
    case = "moe_mlp 32768×2048, 64/8 of 1024"
    (tmp_path / "tiles.json").write_text(json.dumps({"sm_90": {"weight_grad": {"16 bit": [128, 256, 32, 4, 3, 8, 1]}}}))
    rows = guard.compiled(90, f"^{case}$", tmp_path)
    recorded = baseline()
    recorded["kernels"] = {case: recorded["kernels"][case]}
    faults = guard.sm90_faults(rows, recorded)
    assert faults
    assert all(", _weight_grad" in fault for fault in faults)
    assert any("spills" in fault for fault in faults)


GATHERING = ("_hopper_up", "_hopper_down_backward", "_hopper_weight_grad")


def test_kernels_compile_for_sm_90_without_spills(for_sm_90):
    rows = for_sm_90
    routing = {"_select", "serve", "_sum_columns", "_place", "_gradient", "_count_keys", "_order_keys"}
    moving = {"_take_rows", "_sum_rows", "_dot_rows"}
    experts = {"_up", "_grouped_mm", "_down_backward", "_weight_grad", "_invert", "_add_parts"}
    attention = {"_rotate", "_forward", "_delta", "_dkdv", "_dq"}
    hopper = {"_hopper_forward", "_hopper_dkdv", "_hopper_dq", "_hopper_grouped_mm", *GATHERING}
    assert {row["kernel"] for row in rows} == routing | moving | experts | attention | hopper
    assert [row for row in rows if row["serialized"]] == []
    products = [row for row in rows if row["kernel"] in ("_up", "_grouped_mm", "_down_backward", "_weight_grad")]
    cases = {row["case"] for row in rows if row["case"].startswith("moe_mlp")}
    on_hopper = {case for case in cases if "hopper" in case}
    assert len(products) == 6 * len(cases - on_hopper)
    assert len([row for row in rows if row["kernel"] in hopper and row["case"] in on_hopper]) == 6 * len(on_hopper)
    for row in products:
        if "fp32" in row["case"] or "unaligned" in row["case"]:  # exact products, and no descriptor can be made
            continue
        assert row["wgmma"] > 0, row
        assert row["tma"] > 0 or (row["kernel"] == "_down_backward" and "odd" in row["case"]), (
            row
        )  # M is no multiple of BK
        assert (row["cp_async"] > 0) == (row["kernel"] != "_grouped_mm"), row  # what is gathered

    for row in rows:
        if row["kernel"] in ("_forward", "_dkdv", "_dq") and "fp32" not in row["case"]:
            assert row["wgmma"] > 0, row
        if row["kernel"] in hopper:
            assert row["wgmma"] > 0, row
            assert row["tma"] > 0, row
            assert (row["cp_async"] > 0) == (row["kernel"] in GATHERING), row  # what is gathered


@pytest.mark.parametrize("architecture", [80, 120])
def test_products_and_attention_compile_for_other_gpus(architecture):
    rows = compiled(architecture, ELSEWHERE)
    assert {"_up", "_grouped_mm", "_down_backward", "_weight_grad", "_forward", "_dkdv", "_dq"} <= {
        row["kernel"] for row in rows
    }
    products = [row for row in rows if row["kernel"] in ("_up", "_grouped_mm", "_down_backward", "_weight_grad")]
    assert not any(row["wgmma"] for row in products)
    aligned = [row for row in products if "unaligned" not in row["case"]]
    if architecture == 80:
        assert not any(row["tma"] for row in products)
        assert all(row["cp_async"] for row in aligned)
    else:
        assert all(row["tma"] or row["cp_async"] for row in aligned)
