"""Schedules against transformers' own, their end points, and warmup."""

import itertools

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from ava_fast.config import TrainingConfig
from ava_fast.schedule.learning_rate import learning_rate, warmup_steps

SHAPES = ["cosine", "linear", "wsd", "constant"]


def curve(**settings: object) -> list[float]:
    training = TrainingConfig(**settings)  # type: ignore[arg-type]
    return [learning_rate(step, training) for step in range(training.max_steps)]


@pytest.mark.parametrize(
    ("shape", "theirs"),
    [
        ("linear", transformers.get_linear_schedule_with_warmup),
        ("cosine", transformers.get_cosine_schedule_with_warmup),
    ],
)
def test_equal_to_transformers_after_warmup(shape: str, theirs: object) -> None:
    # transformers spends its first step at rate 0 and would reach the end one step after the last: so one step on.
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler = theirs(optimizer, 10, 99)  # type: ignore[operator]
    reference = []
    for _ in range(100):
        reference.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    ours = curve(lr_scheduler_type=shape, learning_rate=0.3, warmup_steps=10, max_steps=100)
    assert ours[10:] == pytest.approx(reference[10:], abs=1e-12)
    assert ours[:9] == pytest.approx(reference[1:10])


def test_wsd_is_flat_then_falls_over_the_last_fifth() -> None:
    rates = curve(lr_scheduler_type="wsd", learning_rate=1.0, lr_end=0.1, warmup_steps=5, max_steps=101)
    assert set(rates[5:80]) == {1.0}
    assert rates[90] == pytest.approx(1.0 - 0.9 * (1 - 10 / 20.2))
    assert rates[100] == 0.1


def test_warmup_is_given_or_a_share_of_the_run() -> None:
    assert warmup_steps(TrainingConfig(max_steps=1000)) == 30
    assert warmup_steps(TrainingConfig(max_steps=1000, warmup_steps=0)) == 0
    assert curve(max_steps=10, warmup_steps=4, learning_rate=1.0)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


@given(
    shape=st.sampled_from(SHAPES),
    max_steps=st.integers(1, 60),
    warmup=st.integers(0, 60),
    peak=st.floats(1e-6, 1.0),
    end_share=st.floats(0.0, 1.0),
)
def test_rises_to_the_peak_then_never_again(
    shape: str, max_steps: int, warmup: int, peak: float, end_share: float
) -> None:
    warmup, end = min(warmup, max_steps), peak * end_share
    rates = curve(lr_scheduler_type=shape, max_steps=max_steps, warmup_steps=warmup, learning_rate=peak, lr_end=end)
    assert all(0.0 <= rate <= peak * (1 + 1e-12) for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    after = rates[warmup:]
    assert all(later <= earlier + 1e-12 * peak for earlier, later in itertools.pairwise(after))
    if len(after) > 1:
        assert after[0] == pytest.approx(peak)
        assert after[-1] == pytest.approx(peak if shape == "constant" else end)
