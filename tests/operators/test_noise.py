"""Noise models: their statistics, what level they report, and that a case's noise is its own."""

from __future__ import annotations

import math

import pytest
import torch

from invrecon.errors import InputError
from invrecon.operators import GaussianNoise, NoNoise, RelativeGaussianNoise, TransmissionPoisson
from invrecon.rng import make_generators

MODELS = [NoNoise(), GaussianNoise(0.3), RelativeGaussianNoise(0.01), TransmissionPoisson(1e5)]
KEYS = ["a/0000", "a/0001", "b/0000"]


def clean() -> torch.Tensor:
    return torch.linspace(0, 8, 3 * 40 * 50).reshape(3, 1, 40, 50)


@pytest.mark.parametrize("model", MODELS, ids=lambda m: type(m).__name__)
def test_a_case_draws_the_same_noise_in_any_company(model):
    y = clean()
    together, std = model.sample(y, make_generators(1, KEYS))
    order = [2, 0, 1]
    permuted, _ = model.sample(y[order], make_generators(1, [KEYS[i] for i in order]))
    assert torch.equal(permuted, together[order])
    for i in range(3):
        alone, std_alone = model.sample(y[i : i + 1], make_generators(1, KEYS[i : i + 1]))
        assert torch.equal(alone[0], together[i])
        if std is not None:
            torch.testing.assert_close(std_alone[0], std[i])
    if not isinstance(model, NoNoise):
        assert not torch.equal(model.sample(y, make_generators(2, KEYS))[0], together)


def test_no_noise():
    y = clean()
    noisy, std = NoNoise().sample(y, [])
    assert noisy is y
    assert std is None


def test_gaussian():
    y = clean()
    noisy, std = GaussianNoise(0.3).sample(y, make_generators(0, KEYS))
    assert torch.equal(std, torch.full((3,), 0.3))
    assert float((noisy - y).std()) == pytest.approx(0.3, rel=0.03)
    assert abs(float((noisy - y).mean())) < 0.02


def test_relative_gaussian():
    y = clean()
    noisy, std = RelativeGaussianNoise(0.02).sample(y, make_generators(0, KEYS))
    true = 0.02 * y.flatten(1).mean(1)
    torch.testing.assert_close((noisy - y).flatten(1).std(1), true, rtol=0.05, atol=0)
    torch.testing.assert_close(std, true, rtol=0.01, atol=0)
    torch.testing.assert_close(std, 0.02 * noisy.abs().flatten(1).mean(1))  # from the measurement alone


def test_transmission_poisson():
    """At moderate attenuation: unbiased, of the reported level, and the level a function of the data."""
    model, length_mm = TransmissionPoisson(i0=1e5), torch.tensor([7.0, 9.0, 11.0])
    scale = (3 * 0.0195 * length_mm).reshape(3, 1, 1, 1)
    y = clean().clamp(max=5)
    noisy, std = model.sample(y, make_generators(0, KEYS), length_mm=length_mm)
    score = (noisy - y) / std
    assert abs(float(score.mean())) < 0.05
    assert float(score.std()) == pytest.approx(1, abs=0.03)
    counts = 1e5 * torch.exp(-scale * noisy)
    torch.testing.assert_close(std, 1 / (scale * counts.sqrt()), rtol=1e-3, atol=0)
    torch.testing.assert_close(counts, counts.round(), rtol=1e-4, atol=0)


def test_water_path_in_photons():
    """10 cm of water (intensity 1/3) lets exp(-0.0195 * 100) of the photons through."""
    y = torch.full((1, 1, 100, 100), 10 / 3)  # intensity times length, in units of 10 mm
    noisy, _ = TransmissionPoisson(i0=1e6).sample(y, make_generators(0, KEYS[:1]), length_mm=10.0)
    transmitted = float(torch.exp(-3 * 0.0195 * 10 * noisy).mean())
    assert transmitted == pytest.approx(math.exp(-1.95), rel=1e-3)


def test_photon_starvation_stays_finite():
    noisy, std = TransmissionPoisson(i0=10).sample(clean() * 100, make_generators(0, KEYS))
    assert noisy.isfinite().all()
    assert std.isfinite().all()
    assert float(noisy.max()) == pytest.approx(math.log(10) / (3 * 0.0195), rel=1e-5)


def test_bad_arguments():
    for build in (
        lambda: GaussianNoise(0.0),
        lambda: RelativeGaussianNoise(-1),
        lambda: TransmissionPoisson(math.inf),
    ):
        with pytest.raises(InputError, match="positive"):
            build()
    with pytest.raises(InputError, match="one generator a sample"):
        GaussianNoise(1.0).sample(clean(), make_generators(0, KEYS[:1]))
    with pytest.raises(InputError, match="length_mm"):
        TransmissionPoisson().sample(clean(), make_generators(0, KEYS), length_mm=0.0)
