"""The overlay on the schedule: against the rules told once more, in bounds, and resumed exactly."""

from __future__ import annotations

import json
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ava_fast.schedule.adaptive import AdaptiveRate
from ava_fast.schedule.learning_rate import learning_rate, warmup_steps
from ava_fast.settings import AdaptiveLrConfig, TrainingConfig

LOSSES = st.floats(0.5, 5.0)
NORMS = st.floats(0.01, 10.0)
STEPS = st.lists(st.tuples(LOSSES, NORMS, st.booleans()), min_size=1, max_size=60)
SETTINGS = st.builds(
    lambda patience, growth, fall, low, high, kind: TrainingConfig(
        max_steps=60,
        warmup_steps=5,
        learning_rate=1.0,
        lr_end=0.2,
        lr_scheduler_type=kind,
        adaptive_lr=AdaptiveLrConfig(
            enabled=True, plateau_patience=patience, growth_factor=growth, plateau_factor=fall, min_lr=low, max_lr=high
        ),
    ),
    patience=st.integers(2, 6),
    growth=st.sampled_from([1.15, 3.0]),
    fall=st.sampled_from([0.7, 0.1]),
    low=st.sampled_from([None, 0.3]),
    high=st.sampled_from([None, 1.2]),
    kind=st.sampled_from(["cosine", "constant", "cosine_with_restarts"]),
)


def play(adaptive: AdaptiveRate, steps: list[tuple[float, float, bool]], first: int = 0) -> list[float]:
    rates = []
    for step, (loss, norm, bad) in enumerate(steps, start=first):
        rates.append(adaptive.rate(step))
        if bad:
            adaptive.disturbed()
        else:
            adaptive.observe(step, loss, norm)
    return rates


def oracle(training: TrainingConfig, steps: list[tuple[float, float, bool]]) -> list[float]:
    config, warmup = training.adaptive_lr, warmup_steps(training)
    low, high = config.min_lr or 0.01, config.max_lr or 2.0
    factor, best, period, bad_seen, rates = 1.0, None, [], False, []
    for step, (loss, norm, bad) in enumerate(steps):
        base = learning_rate(step, training)
        adapted = base * factor
        rates.append(max(base, min(adapted, high)) if factor > 1 else min(base, max(adapted, low)))
        if bad:
            bad_seen = True
            continue
        if step < warmup:
            continue
        period.append((loss, norm))
        if len(period) < config.plateau_patience:
            continue
        losses, norms = zip(*period, strict=True)
        mean, middle = sum(losses) / len(losses), statistics.median(norms)
        spread = 1.4826 * statistics.median([abs(n - middle) for n in norms])
        if best is not None and not mean < best * (1 - config.min_improvement):
            factor *= config.plateau_factor if bad_seen or spread >= middle / 3 else config.growth_factor
            factor = max(min(1.0, low / base), min(factor, max(1.0, high / base)))
        best = mean if best is None else min(best, mean)
        period, bad_seen = [], False
    return rates


@given(SETTINGS, STEPS)
def test_rates_equal_the_oracle_and_stay_in_bounds(
    training: TrainingConfig, steps: list[tuple[float, float, bool]]
) -> None:
    rates = play(AdaptiveRate(training), steps)
    assert rates == pytest.approx(oracle(training, steps), rel=1e-12)
    low, high = training.adaptive_lr.min_lr or 0.01, training.adaptive_lr.max_lr or 2.0
    for step, rate in enumerate(rates):
        base = learning_rate(step, training)
        assert min(base, low) <= rate <= max(base, high)


@given(SETTINGS, STEPS, st.integers(0, 60))
def test_a_saved_state_goes_on_as_if_never_interrupted(
    training: TrainingConfig, steps: list[tuple[float, float, bool]], at: int
) -> None:
    straight, interrupted, resumed = (AdaptiveRate(training) for _ in range(3))
    expected = play(straight, steps)
    first = play(interrupted, steps[:at])
    resumed.load_state_dict(json.loads(json.dumps(interrupted.state_dict())))
    assert first + play(resumed, steps[at:], at) == expected
    assert resumed.state_dict() == straight.state_dict()


def test_a_plateau_raises_with_steady_gradients_and_lowers_with_unsteady_ones() -> None:
    training = TrainingConfig(
        learning_rate=1.0,
        warmup_steps=0,
        lr_scheduler_type="constant",
        adaptive_lr=AdaptiveLrConfig(enabled=True, plateau_patience=4),
    )
    steady, unsteady = AdaptiveRate(training), AdaptiveRate(training)
    play(steady, [(3.0, 1.0, False)] * 8)
    assert steady.rate(8) == pytest.approx(1.15)
    play(unsteady, [(3.0, norm, False) for norm in (1.0, 3.0, 0.2, 1.5)] * 2)
    assert unsteady.rate(8) == pytest.approx(0.7)
    falling = AdaptiveRate(training)
    play(falling, [(3.0 - 0.1 * step, 1.0, False) for step in range(12)])
    assert falling.rate(12) == 1.0


def test_switched_off_it_is_the_schedule() -> None:
    training = TrainingConfig(max_steps=50)
    rates = play(AdaptiveRate(training), [(3.0, 1.0, False)] * 50)
    assert rates == [learning_rate(step, training) for step in range(50)]
