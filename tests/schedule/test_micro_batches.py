"""Batch sizes by step and by the noise scale: within their bounds, and what they are at each step."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ava_fast.compatibility import world_size_conflicts
from ava_fast.config import Config, load_config
from ava_fast.schedule.micro_batches import MicroBatches


def of(shape: str, *overrides: str) -> Config:
    fixed = ["training.batch_size=8", "training.gradient_accumulation_steps=2", "training.noise_scale_steps=5"]
    return load_config(None, [*fixed, f"curriculum.batch.shape={shape}", *overrides])


def test_stages_hold_from_their_step_on() -> None:
    stages = "[{step: 3, micro_batches: 4}, {step: 5, micro_batches: 1}]"
    sizes = MicroBatches(of("stages", f"curriculum.batch.stages={stages}"))
    assert [sizes.at(step) for step in range(8)] == [2, 2, 2, 4, 4, 1, 1, 1]


def test_a_cycle_is_a_triangle() -> None:
    bounds = ["curriculum.batch.min_micro_batches=2", "curriculum.batch.max_micro_batches=6"]
    sizes = MicroBatches(of("cyclical", *bounds, "curriculum.batch.period=8"))
    assert [sizes.at(step) for step in range(17)] == [2, 3, 4, 5, 6, 5, 4, 3, 2, 3, 4, 5, 6, 5, 4, 3, 2]


def test_without_a_curriculum_it_is_the_setting() -> None:
    sizes = MicroBatches(of("constant"))
    assert sizes.observe(1000.0) is None
    assert {sizes.at(step) for step in range(5)} == {2}


def test_it_follows_the_noise_scale_by_at_most_a_factor_of_two() -> None:
    sizes = MicroBatches(of("noise_scale", "curriculum.batch.max_micro_batches=7"))
    seen = []
    for scale in (10.0, None, 44.0, 1e6, 1e6, 25.0, 0.0, 0.0):
        sizes.observe(scale)
        seen.append(sizes.at(0))
    # 10/8 → 1; unknown; 44/8 = 5.5 but at most twice; 4; the bound; 25/8 → 3, half of 7 is 3.5 → 4; 2; 1
    assert seen == [1, 1, 2, 4, 7, 4, 2, 1]


def test_what_changes_is_said() -> None:
    sizes = MicroBatches(of("noise_scale"))
    assert sizes.observe(16.0) is None
    said = sizes.observe(1234.0)
    assert said is not None
    assert "1,234 sequences" in said
    assert "4 micro-batches" in said


def test_the_rate_follows_the_root_of_the_batch_only_if_asked() -> None:
    assert MicroBatches(of("cyclical")).rate_factor(8) == 1.0
    scaled = MicroBatches(of("cyclical", "curriculum.batch.learning_rate=sqrt"))
    assert scaled.rate_factor(8) == 2.0
    assert scaled.rate_factor(2) == 1.0
    assert scaled.rate_factor(1) == pytest.approx(math.sqrt(0.5))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(0, 9), st.integers(2, 50), st.lists(st.floats(0, 1e9) | st.none(), max_size=20))
def test_bounds_hold_whatever_happens(least: int, more: int, period: int, scales: list[float | None]) -> None:
    bounds = [f"curriculum.batch.min_micro_batches={least}", f"curriculum.batch.max_micro_batches={least + more}"]
    cyclical = MicroBatches(of("cyclical", *bounds, f"curriculum.batch.period={period}"))
    seen = [cyclical.at(step) for step in range(3 * period)]
    assert min(seen) == least
    assert max(seen) <= least + more
    assert max(seen) == least + more or period % 2
    following = MicroBatches(of("noise_scale", *bounds))
    for scale in scales:
        following.observe(scale)
        assert least <= following.at(0) <= least + more


def test_one_rank_with_one_micro_batch_has_no_noise_scale_to_follow() -> None:
    config = of("noise_scale")
    assert [fault.key for fault in world_size_conflicts(config, 1)] == ["curriculum.batch.min_micro_batches"]
    assert world_size_conflicts(config, 2) == []
