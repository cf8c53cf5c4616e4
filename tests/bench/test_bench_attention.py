"""The attention benchmark: who is wrong, fails or crashes is left out, and the rest is timed."""

from __future__ import annotations

import json

import pytest
import torch
from ava_kernels import tiles
from ava_kernels.attention.tiles import order_for

from bench import attention, machine

pytestmark = pytest.mark.usefixtures("small_and_seeded")
SIZE = attention.Size(2, 32, 4, 2, 16, "causal")


def row_of(size, without=()):
    *_, last = attention.run("cpu", size, 3, list(without))
    return last["row"]


@pytest.mark.parametrize("mask", ["causal", "full", "packed"])
def test_all_contenders_compute_the_same(mask):
    row = row_of(SIZE._replace(mask=mask))
    assert row["failed"] == {}
    assert len(row["contenders"]) == 2
    for figures in row["contenders"].values():
        assert figures["relative_errors"].keys() == {"output", "dq", "dk", "dv"}
        assert max(figures["relative_errors"].values()) < 1e-5
    # 4·H·D for each pair, half where causal: documents of 4, 8 and 20 in the packed rows
    pairs = {"causal": 32**2 / 2, "full": 32**2, "packed": (4**2 + 8**2 + 20**2) / 2}[mask]
    forward = row["contenders"]["ours"]["forward"]
    assert forward["tflops"] * forward["median_ms"] * 1e9 == pytest.approx(2 * 4 * 4 * 16 * pairs)


def test_what_was_measured_is_chosen_by_from_then_on(monkeypatch, tmp_path, capsys):
    """Of every problem the faster over all its sizes, forward and backward together, and nobody who failed at one."""

    def row(S, D, mask, **milliseconds):
        size = {"B": 1, "S": S, "H_q": 1, "H_kv": 1, "D": D, "mask": mask}
        return {
            "size": size,
            "contenders": {
                name: {"forward": {"median_ms": forward}, "backward": {"median_ms": backward}}
                for name, (forward, backward) in milliseconds.items()
            },
        }

    ours = {f"ours, {name}": (1.0, 3.0) for name in ("triton", "hopper", "sdpa")} | {"cuDNN": (0.1, 0.1)}
    rows = [
        row(32, 128, "causal", **ours | {"ours, hopper": (2.0, 1.0), "separate, triton": (0.1, 0.1)}),
        row(64, 100, "causal", **ours | {"ours, hopper": (2.0, 2.1), "ours, sdpa": (1.0, 3.2)}),
        row(32, 64, "packed", **{"ours, triton": (1.0, 1.0), "ours, hopper": (1.0, 1.1)}),
        row(64, 64, "packed", **{"ours, triton": (1.0, 1.0)}),
    ]
    expected = {"16 bit, 128, causal": ["hopper", "triton", "sdpa"], "16 bit, 64, packed": ["triton"]}
    assert attention.orders(rows, 2) == expected
    monkeypatch.setenv("AVA_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    monkeypatch.setattr(attention, "events_of", lambda options, size, *_: [{"row": rows.pop(0)}])
    monkeypatch.setattr(attention, "_print", lambda row: None)
    monkeypatch.setattr("sys.argv", ["attention", "--device", "cuda", "--pin", *["--size", "1,8,1,1,8,causal"] * 4])
    monkeypatch.setattr(tiles, "generation", lambda device: "sm_90")
    assert attention.main() == 0
    assert "16 bit, 128, causal: hopper, triton, sdpa" in capsys.readouterr().out
    assert json.loads((tmp_path / "tiles.json").read_text()) == {"sm_90": {"attention": expected}}
    for problem, order in expected.items():
        assert list(order_for(torch.device("cuda"), problem)) == order
    assert order_for(torch.device("cuda"), "16 bit, 64, full") == ("sdpa", "triton")
    tiles.forget()


def test_a_wrong_or_failing_contender_is_not_timed(monkeypatch):
    contenders = attention.contenders

    def with_bad_ones(device, mask):
        ours = attention.ours
        return contenders(device, mask) | {
            "wrong": lambda q, k, v, *rest: ours(q, k, 1.1 * v, *rest),
            "failing": lambda *_: torch.zeros(1).view(2),
        }

    monkeypatch.setattr(attention, "contenders", with_bad_ones)
    row = row_of(SIZE, ["plain rotation, SDPA"])
    assert list(row["contenders"]) == ["ours"]
    assert "wrong: relative errors" in row["failed"]["wrong"]
    assert "RuntimeError" in row["failed"]["failing"]
    assert row["failed"]["plain rotation, SDPA"] == "left out before"


def test_a_crash_leaves_its_contender_out_and_the_size_is_begun_again(monkeypatch, tmp_path, capsys):
    """A peer's everywhere, ours at that size."""
    seen = []

    def crashing(options, size, without, deadline):
        seen.append(list(without))
        for name in ("peer", "ours, triton"):
            if not {name, f"{name}@{size.key()}"} & set(without):
                yield {"ended": "exit code -11", "at": name}
                return
        yield {"row": row_of(size), "at": None}

    monkeypatch.setattr(attention, "events_of", crashing)
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    other = SIZE._replace(S=16)
    arguments = ["attention", "--device", "cpu", "--size", SIZE.key(), "--size", other.key(), "--runs", "3"]
    monkeypatch.setattr("sys.argv", arguments)
    assert attention.main() == 0
    assert len(seen) == 5
    result = json.loads((tmp_path / "attention_cpu.json").read_text())
    assert result["left_out"] == dict.fromkeys(
        ["peer", f"ours, triton@{SIZE.key()}", f"ours, triton@{other.key()}"], "exit code -11"
    )
    assert [row["size"]["S"] for row in result["sizes"]] == [32, 16]
    assert result["not_run"] == []
