"""Filtered back-projection: absolute scale, accuracy, redundancy over any arc."""

from __future__ import annotations

import math

import pytest
import torch

from invrecon.errors import InputError
from invrecon.operators import FanBeamCT, LimitedAngleCT, ParallelBeamCT
from invrecon.operators.fbp import angular_cells, ramp_filter, redundancy_weights
from tests.operators.test_ct import analytic_sinogram, ellipse_image

SHORT_SCAN = math.pi + 2 * math.atan(0.5)


def disc(size: int, radius: float, centre: tuple[float, float] = (2.0, -3.0)) -> torch.Tensor:
    """Distance-smoothed disc of value 0.5 in a field of view of 40."""
    axis = ((torch.arange(size, dtype=torch.float64) + 0.5) / size - 0.5) * 40
    distance = torch.hypot(axis[None] - centre[0], -axis[:, None] - centre[1])
    return 0.5 * ((radius - distance) / (40 / size) + 0.5).clamp(0, 1).float()[None, None]


@pytest.mark.parametrize(
    "operator",
    [
        ParallelBeamCT(64, 100, 128),
        ParallelBeamCT(64, 120, 128, arc=2 * math.pi),
        ParallelBeamCT(64, 120, 128, arc=1.5 * math.pi),
        FanBeamCT(64, 120, 128, arc=2 * math.pi),
        FanBeamCT(64, 120, 128, arc=1.5 * math.pi),
        FanBeamCT(64, 120, 128, arc=SHORT_SCAN),
    ],
    ids=lambda op: f"{type(op).__name__}-{op.angles[-1]:.1f}",
)
def test_a_disc_keeps_its_value(operator):
    x = disc(64, 9.0)
    image = operator.fbp(operator(x), frequency_scaling=0.9)
    inside, outside = disc(64, 7.5) == 0.5, disc(64, 10.5) == 0
    reached = torch.hypot(*torch.meshgrid(*[torch.linspace(-20, 20, 64)] * 2, indexing="ij")) < 16
    assert float(image[inside].mean()) == pytest.approx(0.5, rel=2e-3)
    assert float(image[inside].std()) < 2e-3
    assert float(image[outside & reached].abs().mean()) < 2e-3


@pytest.mark.parametrize("operator", [ParallelBeamCT(96, 150, 192), FanBeamCT(96, 180, 192, arc=2 * math.pi)])
def test_ellipses_from_their_analytic_sinogram(operator):
    x = ellipse_image(96)
    error = (operator.fbp(analytic_sinogram(operator), "ramp", 1.0) - x)[..., 16:-16, 12:-12]
    assert float(error.square().mean().sqrt()) < 0.02
    assert abs(float(error.mean())) < 1e-3


def test_hann_smooths_more_with_a_lower_cut_off():
    operator = ParallelBeamCT(64, 60, 128)
    y = operator(disc(64, 9.0))
    total_variation = [float(operator.fbp(y, "hann", scaling).diff().abs().sum()) for scaling in (1.0, 0.6, 0.3)]
    assert total_variation == sorted(total_variation, reverse=True)


def test_baseline_is_the_published_fbp():
    for operator, scaling in ((ParallelBeamCT(32, 20, 64), 0.9), (FanBeamCT(32, 20, 64), 0.3)):
        y = operator(disc(32, 9.0))
        assert torch.equal(operator.baseline(y), operator.fbp(y, "hann", scaling))


def test_batches_odd_sizes_and_gradients():
    operator = LimitedAngleCT((17, 12), num_views=9, num_bins=31)
    y = torch.randn(3, *operator.measurement_shape).requires_grad_()
    image = operator.fbp(y)
    assert image.shape == (3, 1, 17, 12)
    torch.testing.assert_close(image[1:2], operator.fbp(y[1:2]), rtol=1e-4, atol=1e-5)
    image.sum().backward()
    assert y.grad.isfinite().all()
    assert ParallelBeamCT(1, 1, 1).baseline(torch.ones(1, 1, 1, 1)).isfinite().all()


def test_ramp_response_is_the_ramp():
    """An impulse comes back as the band-limited kernel; its spectrum is |f| up to the end effects."""
    impulse = torch.zeros(257, dtype=torch.float64)
    impulse[128] = 1.0
    filtered = ramp_filter(impulse, 0.5, "ramp", 1.0)
    assert float(filtered[128]) == pytest.approx(0.5 / (4 * 0.25))
    assert float(filtered[129]) == pytest.approx(-0.5 / (math.pi * 0.5) ** 2)
    assert float(filtered[130]) == pytest.approx(0, abs=1e-12)


def test_angular_cells():
    uniform = (torch.arange(8, dtype=torch.float64) + 0.5) * math.pi / 8
    torch.testing.assert_close(angular_cells(uniform, math.pi), torch.full_like(uniform, math.pi / 8))
    limited = uniform * 2 / 3
    torch.testing.assert_close(angular_cells(limited, math.pi), torch.full_like(uniform, math.pi / 12))
    shuffled = torch.tensor([3.0, 0.2, 1.0, 2.1], dtype=torch.float64)
    cells = angular_cells(shuffled, math.pi)
    assert float(cells.sum()) == pytest.approx(math.pi)
    assert float(cells[2]) == pytest.approx((2.1 - 0.2) / 2)
    twice = torch.cat((uniform, uniform + math.pi))
    assert float(angular_cells(twice, math.pi).sum()) == pytest.approx(math.pi)


@pytest.mark.parametrize("arc", [SHORT_SCAN, 1.3 * math.pi, 1.7 * math.pi, 2 * math.pi])
def test_redundant_rays_count_once(arc):
    """The weights of a line's two measurements add to one, wherever both exist."""
    num_views = 720
    step = arc / num_views
    angles = (torch.arange(num_views, dtype=torch.float64) + 0.5) * step
    gamma = torch.tensor([-0.3, 0.0, 0.2], dtype=torch.float64)
    weights = redundancy_weights(angles, gamma)
    for i, g in enumerate(gamma):
        opposite = (angles + math.pi - 2 * g).remainder(2 * math.pi)
        index = (opposite / step - 0.5).round().long()
        both = (index >= 0) & (index < num_views) & ((opposite / step - 0.5 - index).abs() <= 0.5)
        mirrored = redundancy_weights(angles, -gamma)[:, i]
        total = weights[:, i] + torch.where(both, mirrored[index.clamp(0, num_views - 1)], 0.0)
        interior = (opposite > 2 * step) & (opposite < arc - 2 * step)
        assert (total[interior & both] - 1).abs().max() < 0.05
        assert (weights[:, i][~both] - 1).abs().max() < 1e-9 if (~both).any() else True


def test_bad_options():
    operator = ParallelBeamCT(8, 4, 12)
    y = operator(torch.zeros(1, 1, 8, 8))
    with pytest.raises(InputError, match="window 'hamming'"):
        operator.fbp(y, "hamming")
    with pytest.raises(InputError, match="frequency scaling"):
        operator.fbp(y, frequency_scaling=0.0)
    with pytest.raises(InputError, match="sinograms of shape"):
        operator.fbp(y[..., :-1])
