"""The judge against a plain oracle of the table in its docstring, over sequences that hypothesis draws."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ava_fast.config import Config
from ava_fast.settings import StabilityConfig
from ava_fast.stability.judge import Judge, Ruling, Trouble, Verdict

BAD = [math.nan, math.inf, -math.inf]
VALUES = st.one_of(
    st.floats(0.5, 2.0), st.floats(0.5, 2.0), st.floats(0.5, 2.0), st.floats(0, 1e9), st.sampled_from([*BAD, 1e6])
)
STEPS = st.lists(st.tuples(VALUES, VALUES, st.booleans()), max_size=60)
EMERGENCY_FACTOR = 0.3
SETTINGS = st.builds(
    lambda window, skips, **rest: StabilityConfig(window=window, max_skips=min(skips, window - 1), **rest),
    window=st.integers(2, 6),
    skips=st.integers(0, 4),
    deviations=st.sampled_from([None, 5.0, 50.0]),
    max_norm=st.sampled_from([None, 100.0]),
    recovery_steps=st.integers(1, 5),
    max_rollbacks=st.integers(0, 2),
)


def oracle(
    config: StabilityConfig, steps: list[tuple[float, float, bool]]
) -> list[tuple[str, bool, float, str | None]]:
    """The rules once more, over the whole history since the last fresh start instead of windows kept up to date."""
    rulings = []
    history: list[tuple[float, float, bool]] = []  # of steps since the count was last begun: loss, norm, bad
    cut, good_since, rollbacks = 1.0, 0, 0
    for loss, norm, can_roll_back in steps:
        healthy = [(a, b) for a, b, bad in history if not bad][-config.window :]
        trouble = None
        if not math.isfinite(loss):
            trouble = "loss not finite"
        elif not math.isfinite(norm):
            trouble = "gradient not finite"
        elif config.max_norm is not None and norm > config.max_norm:
            trouble = "gradient explosion"
        elif config.deviations is not None and len(healthy) == config.window:
            losses, norms = np.array(healthy).T
            for name, value, window, floor in (
                ("gradient explosion", norm, norms, 0.1 * abs(np.median(norms))),
                ("loss spike", loss, losses, max(0.02, 0.02 * abs(np.median(losses)))),
            ):
                deviation = 1.4826 * np.median(np.abs(window - np.median(window)))
                if value > np.median(window) + config.deviations * max(deviation, floor):
                    trouble = name
                    break
        history.append((loss, norm, trouble is not None))
        factor = 1.0 if good_since >= config.recovery_steps else cut + (1 - cut) * good_since / config.recovery_steps
        if trouble is None:
            rulings.append(("APPLY", True, factor, None))
            good_since += 1
            continue
        if sum(bad for _, _, bad in history[-config.window :]) <= config.max_skips:
            rulings.append(("SKIP", False, factor, trouble))
            continue
        history, recovered, good_since = [], cut == 1.0 or good_since >= config.recovery_steps, 0
        if recovered:
            cut = EMERGENCY_FACTOR
            rulings.append(("CUT", trouble in ("gradient explosion", "loss spike"), cut, trouble))
        elif can_roll_back and rollbacks < config.max_rollbacks:
            rollbacks += 1
            rulings.append(("ROLL_BACK", False, cut, trouble))
        else:
            cut, rollbacks = 1.0, 0
            rulings.append(("STOP", False, cut, trouble))
    return rulings


def rule(judge: Judge, steps: list[tuple[float, float, bool]]) -> list[Ruling]:
    return [judge.rule(loss, norm, can_roll_back=possible) for loss, norm, possible in steps]


def plain(ruling: Ruling) -> tuple[str, bool, float, str | None]:
    return ruling.verdict.value, ruling.apply, ruling.factor, ruling.trouble and ruling.trouble.value


@given(SETTINGS, STEPS)
def test_rulings_equal_the_oracle(config: StabilityConfig, steps: list[tuple[float, float, bool]]) -> None:
    rulings = rule(Judge(config, EMERGENCY_FACTOR), steps)
    for ruling, expected in zip(rulings, oracle(config, steps), strict=True):
        assert plain(ruling) == (*expected[:2], pytest.approx(expected[2], rel=1e-12), expected[3])
        assert (ruling.reason == "") == (ruling.trouble is None)
        assert 0 < ruling.factor <= 1


@given(SETTINGS, STEPS)
def test_only_healthy_values_enter_a_window_and_all_is_counted(
    config: StabilityConfig, steps: list[tuple[float, float, bool]]
) -> None:
    judge = Judge(config, EMERGENCY_FACTOR)
    rulings = rule(judge, steps)
    state = judge.state_dict()
    good = [(loss, norm) for (loss, norm, _), r in zip(steps, rulings, strict=True) if r.verdict is Verdict.APPLY]
    for name, place in (("losses", 0), ("norms", 1)):
        assert all(map(math.isfinite, state[name]))
        assert state[name] == [values[place] for values in good][len(good) - len(state[name]) :]
    bad = [r for r in rulings if r.trouble]
    assert judge.bad_steps == len(bad)
    for kind in Trouble:
        assert judge.counts[kind.value] == sum(r.trouble is kind for r in bad)
    for verdict in Verdict:
        assert judge.counts[verdict.value] == sum(r.verdict is verdict for r in bad)


@given(SETTINGS, STEPS, st.integers(0, 60))
def test_ranks_agree_and_a_saved_state_goes_on_as_if_never_interrupted(
    config: StabilityConfig, steps: list[tuple[float, float, bool]], at: int
) -> None:
    straight, interrupted, resumed = (
        Judge(config, EMERGENCY_FACTOR),
        Judge(config, EMERGENCY_FACTOR),
        Judge(config, EMERGENCY_FACTOR),
    )
    expected = rule(straight, steps)
    first = rule(interrupted, steps[:at])
    state: dict[str, Any] = json.loads(json.dumps(interrupted.state_dict(), allow_nan=False))
    resumed.load_state_dict(state)
    assert [*first, *rule(resumed, steps[at:])] == expected
    assert resumed.state_dict() == straight.state_dict()
    assert resumed.calm == straight.calm


def test_the_ladder() -> None:
    config = StabilityConfig(window=4, max_skips=1, recovery_steps=2, max_rollbacks=1)
    judge = Judge(config, 0.5)
    nan, fine, huge = (math.nan, 1.0, True), (3.0, 1.0, True), (3.0, 1e6, True)
    seen = [(r.verdict.value, r.apply, r.factor) for r in rule(judge, [fine] * 4 + [huge, huge])]
    assert seen == [("APPLY", True, 1.0)] * 4 + [("SKIP", False, 1.0), ("CUT", True, 0.5)]
    assert not judge.calm
    seen = [(r.verdict.value, r.apply, r.factor) for r in rule(judge, [fine, nan, nan, fine, nan, nan])]
    assert seen == [
        ("APPLY", True, 0.5),
        ("SKIP", False, 0.75),
        ("ROLL_BACK", False, 0.5),
        ("APPLY", True, 0.5),
        ("SKIP", False, 0.75),
        ("STOP", False, 1.0),
    ]
    seen = [(r.verdict.value, r.factor) for r in rule(judge, [nan, nan, fine, fine, fine])]
    assert seen == [("SKIP", 1.0), ("CUT", 0.5), ("APPLY", 0.5), ("APPLY", 0.75), ("APPLY", 1.0)]
    assert judge.calm


def test_defaults_leave_a_noisy_run_alone_and_catch_a_millionfold_gradient() -> None:
    generator = np.random.default_rng(0)
    judge = Judge(Config().stability)
    for step in range(3000):
        # A loss that falls from 8 to 2 nats and a norm whose logarithm has a standard deviation of 0.35, five times
        # larger and falling at the start.
        loss = 2 + 6 * math.exp(-step / 300) + 0.15 * generator.standard_normal()
        norm = (0.5 + 2 * math.exp(-step / 50)) * math.exp(0.35 * generator.standard_normal())
        ruling = judge.rule(loss, norm, can_roll_back=True)
        assert (ruling.verdict, ruling.factor) == (Verdict.APPLY, 1.0), (step, ruling.reason)
    assert judge.rule(2.0, 0.5e6, can_roll_back=True).trouble is Trouble.EXPLOSION
    spike = judge.rule(9.0, 0.5, can_roll_back=True)
    assert (spike.trouble, spike.verdict) == (Trouble.SPIKE, Verdict.SKIP)
    assert "the loss is 9, 2." in spike.reason or "the loss is 9, 1." in spike.reason
    assert "(2 bad of the last 64 steps)" in spike.reason
