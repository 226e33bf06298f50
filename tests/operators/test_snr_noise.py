"""Noise at a signal-to-noise ratio: its level over what was measured, and nothing elsewhere."""

from __future__ import annotations

import math

import pytest
import torch

from invrecon.errors import InputError
from invrecon.operators.noise import SNRNoise
from invrecon.rng import make_generators


@pytest.mark.parametrize("snr", [0.0, 20.0, 40.0])
def test_the_ratio_is_that_of_powers_over_measured_samples(snr: float) -> None:
    y = torch.randn(2, 3, 64, 64, 2) * torch.tensor([1.0, 50.0]).reshape(2, 1, 1, 1, 1)
    mask = torch.rand(64, 64) < 0.3
    y = y * mask[..., None]
    noisy, std = SNRNoise(snr).sample(y, make_generators(0, ["a", "b"]))
    noise = (noisy - y)[:, :, mask]
    power = y[:, :, mask].square().flatten(1).mean(1)
    measured = 10 * (power / noise.square().flatten(1).mean(1)).log10()
    assert torch.allclose(measured, torch.full((2,), snr), atol=0.2)
    assert torch.allclose(std, (power / 10 ** (snr / 10)).sqrt(), rtol=0.02)
    assert (noisy[:, :, ~mask] == 0).all()
    real, imaginary = noise[..., 0].std(), noise[..., 1].std()
    assert real == pytest.approx(float(imaginary), rel=0.05)


def test_the_level_is_a_function_of_what_was_measured_with_its_noise() -> None:
    y = torch.randn(1, 1, 8, 8, 2)
    noisy, std = SNRNoise(10.0).sample(y, make_generators(0, ["a"]))
    assert std.item() == pytest.approx(math.sqrt(noisy.square().mean().item() / 11))


def test_a_case_has_its_own_noise_in_any_batch() -> None:
    y = torch.randn(3, 2, 4, 4, 2)
    together, std = SNRNoise().sample(y, make_generators(0, ["a", "b", "c"]))
    alone, level = SNRNoise().sample(y[1:2], make_generators(0, ["b"]))
    assert torch.equal(together[1:2], alone) and torch.equal(std[1:2], level)


def test_an_infinite_ratio_is_refused() -> None:
    with pytest.raises(InputError, match="NoNoise"):
        SNRNoise(math.inf)
