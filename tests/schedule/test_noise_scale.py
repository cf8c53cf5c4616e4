"""The gradient noise scale: of gradients whose signal and noise are known."""

import pytest
import torch

from ava_fast.schedule.noise_scale import NoiseScale


def test_finds_the_ratio_of_noise_and_signal_that_gradients_were_made_with() -> None:
    generator = torch.Generator().manual_seed(0)
    signal_P, sigma, small, parts = torch.full((400,), 0.1), 0.5, 4, 8
    scale = NoiseScale(small, small * parts)
    assert scale.sequences is None
    for _ in range(200):
        noise_NP = sigma * small**-0.5 * torch.randn(parts, 400, generator=generator)
        gradients_NP = signal_P + noise_NP
        scale.update(gradients_NP.square().sum(1).mean().item(), gradients_NP.mean(0).square().sum().item())
    assert scale.sequences == pytest.approx(400 * sigma**2 / (400 * 0.1**2), rel=0.1)
    other = NoiseScale(small, small * parts)
    other.load_state_dict(scale.state_dict())
    assert other.sequences == scale.sequences


def test_two_equal_batches_say_nothing() -> None:
    with pytest.raises(ValueError, match="must be smaller"):
        NoiseScale(8, 8)


def test_noise_that_hides_the_signal_gives_no_number() -> None:
    scale = NoiseScale(1, 2)
    scale.update(4.0, 1.0)
    assert scale.sequences is None
