"""Metrics of magnitudes: those of volumes agree with fastMRI's own, those of slices with the plain ones."""

from __future__ import annotations

import fastmri.evaluate
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from invrecon.errors import InputError
from invrecon.metrics.image import psnr, ssim
from invrecon.metrics.mri import magnitude, phase, relative_magnitudes, volume_metrics


@given(
    seed=st.integers(0, 99),
    shape=st.tuples(st.integers(1, 3), st.integers(7, 15), st.integers(7, 15)),
    error=st.sampled_from([0.01, 0.3, 2.0]),
    power=st.sampled_from([-5, 0, 3]),
)
def test_a_volume_is_judged_as_fastmri_judges_it(
    seed: int, shape: tuple[int, int, int], error: float, power: int
) -> None:
    rng = np.random.default_rng(seed)
    target = 10.0**power * rng.random(shape)
    estimate = np.abs(target + error * 10.0**power * rng.standard_normal(shape))  # above the data range, too
    ours = volume_metrics(torch.from_numpy(target), torch.from_numpy(estimate))
    assert ours["nmse"] == pytest.approx(float(fastmri.evaluate.nmse(target, estimate)), rel=1e-6)
    assert ours["psnr"] == pytest.approx(float(fastmri.evaluate.psnr(target, estimate)), abs=1e-6)
    assert ours["ssim"] == pytest.approx(float(fastmri.evaluate.ssim(target, estimate)[0]), abs=1e-6)
    known = volume_metrics(torch.from_numpy(target), torch.from_numpy(estimate), 2 * target.max())
    theirs = fastmri.evaluate.ssim(target, estimate, 2 * target.max())[0]
    assert known["ssim"] == pytest.approx(float(theirs), abs=1e-6)
    assert known["psnr"] == pytest.approx(ours["psnr"] + 20 * np.log10(2))


def test_magnitude_and_phase_are_those_of_complex_numbers() -> None:
    x = torch.randn(2, 3, 2, 4, 5)
    z = torch.complex(x[:, :, 0], x[:, :, 1])
    assert torch.allclose(magnitude(x)[:, :, 0], z.abs()) and torch.allclose(phase(x)[:, :, 0], z.angle())


def test_slices_are_judged_by_magnitude_on_the_scale_of_their_reference() -> None:
    reference = torch.randn(2, 2, 9, 9) * torch.tensor([1.0, 100.0]).reshape(2, 1, 1, 1)
    real, imaginary = reference.unbind(1)
    turned = torch.stack([0.6 * real - 0.8 * imaginary, 0.8 * real + 0.6 * imaginary], 1)  # by a phase
    one, other = relative_magnitudes(turned, reference)
    assert torch.allclose(one, other, atol=1e-6) and torch.allclose(other.flatten(1).amax(1), torch.ones(2))
    x = reference + 0.1 * torch.randn_like(reference)
    values = psnr(*relative_magnitudes(x, reference))
    for b in range(2):  # a function of the slice alone, in any units
        pair = relative_magnitudes(7 * x[b : b + 1], 7 * reference[b : b + 1])
        assert torch.allclose(psnr(*pair), values[b : b + 1])
        assert torch.allclose(ssim(*pair), ssim(*relative_magnitudes(x, reference))[b : b + 1])


@pytest.mark.parametrize("shapes", [((2, 9, 9), (2, 9, 8)), ((9, 9), (9, 9)), ((1, 6, 9), (1, 6, 9))])
def test_volumes_that_do_not_fit_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(InputError, match=r"magnitudes \(N, H, W\)"):
        volume_metrics(torch.ones(shapes[0]), torch.ones(shapes[1]))


def test_an_empty_target_is_refused() -> None:
    with pytest.raises(InputError, match="zero throughout"):
        volume_metrics(torch.zeros(1, 9, 9), torch.ones(1, 9, 9))
