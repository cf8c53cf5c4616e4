"""The training step's benchmark: contenders that agree, and one that fails ends nothing."""

from __future__ import annotations

import pytest

from bench import training_step

pytestmark = pytest.mark.usefixtures("small_and_seeded")
TINY = {"vocab": 64, "hidden": 16, "layers": 1, "heads": 2, "experts": 4, "top_k": 2, "width": 8, "length": 8}


def test_contenders_apart_and_one_that_fails(monkeypatch):
    builders = training_step.builders

    def failing(config, batch, load):
        raise MemoryError("no room")

    monkeypatch.setattr(training_step, "builders", lambda device: {"failing": failing} | builders(device))
    config = training_step.config_of(TINY)
    for load in ("balanced", "learned"):
        row = training_step.compare_apart(config, 2, 3, "cpu", load)
        assert row["failed"] == {"failing": "MemoryError: no room"}
        assert list(row["contenders"]) == ["ava-fast", "grouped_mm build", "transformers grouped_mm"]
        peer = row["contenders"][row["fastest_peer"]]
        assert row["ratio"] == peer["median_ms"] / row["contenders"]["ava-fast"]["median_ms"]
        for figures in row["contenders"].values():
            assert figures["tokens_per_second"] * figures["median_ms"] / 1e3 == pytest.approx(2 * 8)


def test_the_builds_compute_the_same_and_learned_routing_is_uneven():
    config = training_step.config_of({**TINY, "hidden": 64, "experts": 32, "top_k": 4, "length": 64})
    build = training_step.builders("cpu")
    objective, by_grouped_mm, theirs = (make(config, 4, "balanced")[1]().item() for make in build.values())
    heaviest = {}
    for load in ("balanced", "learned"):
        model, _ = build["ava-fast"](config, 4, load)
        output = model(*training_step._batch(config, 4, "cpu"))
        heaviest[load] = (output.requested.max() / output.requested.float().mean()).item()
        if load == "balanced":
            assert by_grouped_mm == pytest.approx(objective, rel=1e-6)
            assert theirs == pytest.approx(output.loss.item(), rel=1e-6)  # ours minimises the balance loss too
    assert heaviest["learned"] > 1.2 * heaviest["balanced"]
