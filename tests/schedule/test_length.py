"""Lengths that divide the row, never fall and end at the whole; and a cut that loses and repeats nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ava_fast.config import Config, ConfigError, load_config
from ava_fast.data.batches import document_offsets
from ava_fast.schedule.length import divisors, in_pieces, sequence_length

EOS = 0


def of(shape: str, steps: int = 100, whole: int = 1024, **more: object) -> Config:
    overrides = [f"curriculum.length.{key}={value}" for key, value in more.items()]
    fixed = [f"training.max_steps={steps}", f"data.max_length={whole}", f"curriculum.length.shape={shape}"]
    return load_config(None, [*fixed, *overrides])


def changes(config: Config) -> list[tuple[int, int]]:
    """(step, length) wherever it changes."""
    lengths = [sequence_length(step, config) for step in range(config.training.max_steps)]
    return [(step, length) for step, length in enumerate(lengths) if step == 0 or lengths[step - 1] != length]


def test_stages_take_equal_parts() -> None:
    config = of("stages", stages="[128, 256, 512]", ratio=0.75)
    assert changes(config) == [(0, 128), (25, 256), (50, 512), (75, 1024)]


def test_linear_and_exponential_reach_each_length_when_the_curve_does() -> None:
    # 128 + 896·p is 256 at p = 1/7 and 512 at 3/7; 128·8^p is 256 at 1/3 and 512 at 2/3.
    assert changes(of("linear", 140, start=128, ratio=0.5)) == [(0, 128), (10, 256), (30, 512), (70, 1024)]
    assert changes(of("exponential", 120, start=128, ratio=0.5)) == [(0, 128), (20, 256), (40, 512), (60, 1024)]


def test_without_a_curriculum_rows_stay_whole() -> None:
    assert changes(of("constant")) == [(0, 1024)]
    assert changes(of("linear", start=128, ratio=0.0)) == [(0, 1024)]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 720), st.integers(1, 200), st.floats(0, 1), st.sampled_from(["linear", "exponential"]), st.data())
def test_lengths_divide_the_row_never_fall_and_end_whole(
    whole: int, steps: int, ratio: float, shape: str, data: st.DataObject
) -> None:
    start = data.draw(st.sampled_from([each for each in divisors(whole) if each >= 2]))
    config = of(shape, steps, whole, start=start, ratio=ratio)
    lengths = [sequence_length(step, config) for step in range(steps + 1)]
    assert lengths == sorted(lengths)
    assert lengths[0] == (start if ratio * steps > 0 else whole)
    assert lengths[-1] == whole
    assert all(whole % length == 0 for length in lengths)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.sampled_from([2, 12, 16, 30]), st.booleans(), st.data())
def test_pieces_are_the_same_tokens_in_the_same_order(
    rows: int, whole: int, documents: bool, data: st.DataObject
) -> None:
    length = data.draw(st.sampled_from([each for each in divisors(whole) if each >= 2]))
    stream = torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=rows * whole + 1, max_size=rows * whole + 1)))
    tokens, labels = stream[:-1].view(rows, whole), stream[1:].view(rows, whole)
    batch = (tokens, labels, document_offsets(tokens, EOS)) if documents else (tokens, labels)
    pieces = in_pieces(batch, length)
    assert pieces[0].shape == pieces[1].shape == (rows * whole // length, length)
    assert torch.equal(pieces[0].flatten(), tokens.flatten())
    assert torch.equal(pieces[1].flatten(), labels.flatten())
    if documents:
        assert torch.equal(pieces[2], document_offsets(pieces[0], EOS))
        assert pieces[2].dtype == torch.int32


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["curriculum.length.shape=linear", "curriculum.length.start=48"], "curriculum.length.start"),
        (["curriculum.length.shape=stages"], "curriculum.length.stages"),
        (["curriculum.length.stages=[64]"], "curriculum.length.stages"),
        (["curriculum.length.shape=stages", "curriculum.length.stages=[64, 32]"], "curriculum.length.stages"),
        (["curriculum.length.shape=stages", "curriculum.length.stages=[48]"], "curriculum.length.stages"),
        (["curriculum.batch.shape=stages"], "curriculum.batch.stages"),
        (
            [
                "curriculum.batch.shape=stages",
                "curriculum.batch.stages=[{step: 9, micro_batches: 2}, {step: 9, micro_batches: 3}]",
            ],
            "curriculum.batch.stages",
        ),
        (["curriculum.batch.stages=[{step: 9, micro_batches: 2}]"], "curriculum.batch.stages"),
        (["curriculum.batch.shape=cyclical", "curriculum.batch.min_micro_batches=9"], "curriculum.batch.min_micro"),
        (["curriculum.batch.shape=noise_scale"], "curriculum.batch.shape"),
        (
            [
                "curriculum.batch.shape=cyclical",
                "stability.gradient_surgery=pcgrad",
                "deepspeed.zero_stage=0",
                "training.gradient_accumulation_steps=2",
            ],
            "curriculum.batch.shape",
        ),
        (["curriculum.difficulty.measure=loss"], "curriculum.difficulty.reference"),
        (["curriculum.difficulty.reference=x"], "curriculum.difficulty.reference"),
        (["training.mode=debug", "training.compile=true"], "training.mode"),
        (["training.detect_anomaly=true"], "training.detect_anomaly"),
    ],
)
def test_what_cannot_be_is_refused_with_its_key_and_what_is_allowed(overrides: list[str], key: str) -> None:
    with pytest.raises(ConfigError, match="1 fault") as refused:
        load_config(None, ["data.max_length=128", *overrides])
    assert str(refused.value.faults[0]).startswith(key)
    assert "allowed: " in str(refused.value.faults[0])
