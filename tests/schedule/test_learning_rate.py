"""Schedules against torch's and transformers' own, their end points, and warmup."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from ava_fast.schedule.learning_rate import learning_rate, warmup_steps
from ava_fast.settings import TrainingConfig

SHAPES = ["cosine", "cosine_with_restarts", "linear", "polynomial", "onecycle", "sgdr", "wsd", "constant"]
FALLING = ["cosine", "linear", "polynomial", "onecycle", "wsd", "constant"]
WARMUPS = ["linear", "cosine", "polynomial", "exponential"]


def curve(**settings: Any) -> list[float]:
    training = TrainingConfig(**settings)
    return [learning_rate(step, training) for step in range(training.max_steps)]


def theirs(make: Callable[[torch.optim.Optimizer], Any], peak: float, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(float(scheduler.get_last_lr()[0]))
        optimizer.step()
        if len(rates) < steps:  # OneCycleLR refuses one step more
            scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("settings", "make"),
    [
        ({"lr_scheduler_type": "constant"}, transformers.get_constant_schedule_with_warmup),
        ({"lr_scheduler_type": "linear"}, partial(transformers.get_linear_schedule_with_warmup, num_training_steps=99)),
        ({"lr_scheduler_type": "cosine"}, partial(transformers.get_cosine_schedule_with_warmup, num_training_steps=99)),
        (
            {"lr_scheduler_type": "cosine", "lr_end": 0.03},
            partial(transformers.get_cosine_with_min_lr_schedule_with_warmup, num_training_steps=99, min_lr_rate=0.1),
        ),
        (
            {"lr_scheduler_type": "cosine_with_restarts", "num_cycles": 4},
            partial(
                transformers.get_cosine_with_hard_restarts_schedule_with_warmup, num_training_steps=99, num_cycles=4
            ),
        ),
        (
            {"lr_scheduler_type": "polynomial", "power": 2.5, "lr_end": 0.03},
            partial(
                transformers.get_polynomial_decay_schedule_with_warmup, num_training_steps=99, power=2.5, lr_end=0.03
            ),
        ),
        (
            {"lr_scheduler_type": "wsd", "decay_ratio": 0.3, "lr_end": 0.03},
            partial(
                transformers.get_wsd_schedule,
                num_training_steps=99,
                num_decay_steps=30,
                decay_type="linear",
                min_lr_ratio=0.1,
            ),
        ),
    ],
)
def test_equal_to_transformers_after_warmup(settings: dict[str, Any], make: Callable[..., Any]) -> None:
    # transformers spends its first step at rate 0 and would reach the end one step after the last: so one step on.
    reference = theirs(lambda optimizer: make(optimizer, num_warmup_steps=10), 0.3, 99)
    ours = curve(learning_rate=0.3, warmup_steps=10, max_steps=100, **settings)
    # Their last cycle of several ends at the start of one more, at rate 0.
    assert ours[10:99] == pytest.approx(reference[10:], abs=1e-12)
    assert ours[99] == pytest.approx(settings.get("lr_end", 0.3 if settings["lr_scheduler_type"] == "constant" else 0))
    if settings["lr_scheduler_type"] != "wsd":  # theirs begins its warmup at the end's rate
        assert ours[:9] == pytest.approx(reference[1:10])


@pytest.mark.parametrize(("steps", "warmup"), [(100, 30), (50, 2), (40, 39)])
def test_onecycle_is_torchs(steps: int, warmup: int) -> None:
    def make(optimizer: torch.optim.Optimizer) -> Any:
        return lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=0.3,
            total_steps=steps,
            pct_start=warmup / steps,
            cycle_momentum=False,
            final_div_factor=0.3 / 25 / 0.01,
        )

    ours = curve(lr_scheduler_type="onecycle", learning_rate=0.3, lr_end=0.01, warmup_steps=warmup, max_steps=steps)
    assert ours == pytest.approx(theirs(make, 0.3, steps), rel=1e-9)


@pytest.mark.parametrize(("first", "factor"), [(10, 2), (7, 1), (13, 3), (500, 2)])
def test_sgdr_is_torchs_warm_restarts(first: int, factor: int) -> None:
    def make(optimizer: torch.optim.Optimizer) -> Any:
        return lr_scheduler.CosineAnnealingWarmRestarts(optimizer, first, factor, eta_min=0.02)

    ours = curve(
        lr_scheduler_type="sgdr",
        learning_rate=0.3,
        lr_end=0.02,
        warmup_steps=5,
        max_steps=105,
        restart_steps=first,
        restart_factor=factor,
    )
    assert ours[5:] == pytest.approx(theirs(make, 0.3, 100), rel=1e-9)


@pytest.mark.parametrize("shape", ["cosine_with_restarts", "sgdr"])
def test_peaks_of_cycles_decay(shape: str) -> None:
    rates = curve(
        lr_scheduler_type=shape,
        learning_rate=1.0,
        warmup_steps=0,
        max_steps=81,
        num_cycles=4,
        restart_steps=20,
        restart_factor=1,
        cycle_decay=0.5,
        lr_end=0.2,
    )
    assert [rates[step] for step in (0, 20, 40, 60)] == pytest.approx([1.0, 0.5, 0.25, 0.2])


def test_wsd_is_flat_then_falls_over_the_last_fifth() -> None:
    rates = curve(lr_scheduler_type="wsd", learning_rate=1.0, lr_end=0.1, warmup_steps=5, max_steps=101)
    assert set(rates[5:80]) == {1.0}
    assert rates[90] == pytest.approx(1.0 - 0.9 * (1 - 10 / 20.2))
    assert rates[100] == 0.1


def test_warmup_is_given_or_a_share_of_the_run() -> None:
    assert warmup_steps(TrainingConfig(max_steps=1000)) == 30
    assert warmup_steps(TrainingConfig(max_steps=1000, warmup_steps=0)) == 0
    assert curve(max_steps=10, warmup_steps=4, learning_rate=1.0)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_warmup_has_the_shape_that_is_asked_for() -> None:
    def warmup(kind: str) -> list[float]:
        return curve(max_steps=10, warmup_steps=4, learning_rate=1.0, warmup_type=kind, warmup_power=3.0)[:4]

    assert warmup("cosine") == pytest.approx([0.5 * (1 - 0.5**0.5), 0.5, 0.5 * (1 + 0.5**0.5), 1.0])
    assert warmup("polynomial") == pytest.approx([1 / 64, 1 / 8, 27 / 64, 1.0])
    assert warmup("exponential") == pytest.approx([0.01**0.75, 0.1, 0.01**0.25, 1.0])


@given(
    shape=st.sampled_from(SHAPES),
    warmup_type=st.sampled_from(WARMUPS),
    max_steps=st.integers(1, 60),
    warmup=st.integers(0, 60),
    peak=st.floats(1e-6, 1.0),
    end_share=st.floats(0.0, 1.0),
    cycles=st.integers(1, 5),
    decay=st.floats(0.1, 1.0),
)
def test_rises_to_the_peak_and_stays_between_it_and_the_end(
    shape: str,
    warmup_type: str,
    max_steps: int,
    warmup: int,
    peak: float,
    end_share: float,
    cycles: int,
    decay: float,
) -> None:
    warmup, end = min(warmup, max_steps), peak * end_share
    rates = curve(
        lr_scheduler_type=shape,
        warmup_type=warmup_type,
        max_steps=max_steps,
        warmup_steps=warmup,
        learning_rate=peak,
        lr_end=end,
        num_cycles=cycles,
        restart_steps=3 * cycles,
        cycle_decay=decay,
    )
    assert all(0.0 < rate <= peak * (1 + 1e-12) for rate in rates[:warmup])
    assert rates[:warmup] == sorted(rates[:warmup])
    assert not warmup or rates[warmup - 1] == pytest.approx(peak)
    after = rates[warmup:]
    assert all(end - 1e-12 * peak <= rate <= peak * (1 + 1e-12) for rate in after)
    if shape in FALLING:
        assert all(later <= earlier + 1e-12 * peak for earlier, later in itertools.pairwise(after))
    if len(after) > 1:
        assert shape == "onecycle" or after[0] == pytest.approx(peak)
        if shape != "sgdr":
            assert after[-1] == pytest.approx(peak if shape == "constant" else end)
