"""Non-Cartesian MRI: accuracy against the direct transform, the exact pair, density compensation, errors."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from invrecon.errors import InputError
from invrecon.operators.coils import simulated_maps
from invrecon.operators.fourier import channels_to_complex, pairs_to_complex
from invrecon.operators.mri import CartesianMRI
from invrecon.operators.nufft import NonCartesianMRI, RadialMRI, SpiralMRI, radial_trajectory, spiral_trajectory
from tests.operators.battery import (
    CHECKS,
    check_norm,
    dense,
    dot_product_mismatch,
    images,
    relative_error,
)


def maps(num_coils: int, height: int, width: int, seed: int = 0):
    return simulated_maps(num_coils, (height, width), torch.Generator().manual_seed(seed))


def random_trajectory(num_shots: int, num_readout: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_shots, num_readout, 2, generator=generator, dtype=torch.float64) - 0.5


MAKERS = {
    "radial": lambda: RadialMRI(6, 5),
    "radial-odd": lambda: RadialMRI((7, 5), 6, 11, golden=False),
    "spiral": lambda: SpiralMRI((5, 6), 2, 40, 1.5),
    "scattered": lambda: NonCartesianMRI((4, 5), random_trajectory(2, 9)),
    "pixel": lambda: RadialMRI(1, 2),
    "coils": lambda: RadialMRI((6, 5), 3, maps=maps(3, 6, 5)),
    "one-map": lambda: SpiralMRI(5, 2, 20, 1.0, maps=maps(1, 5, 5)),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", MAKERS)
def test_battery(name, check):
    if check is check_norm and name == "coils":
        pytest.skip("an upper bound, tested below")
    check(MAKERS[name])


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(0, 3))
def test_the_pair_is_exact_for_any_size(height, width, num_shots, num_coils):
    sensitivities = maps(num_coils, height, width) if num_coils else None
    operator = NonCartesianMRI((height, width), random_trajectory(num_shots, 7), sensitivities)
    assert dot_product_mismatch(operator) < 1e-5
    assert dot_product_mismatch(operator.double()) < 1e-12


def direct(x, trajectory):
    """The non-uniform transform by its definition, `(shots, readout)` complex."""
    height, width = x.shape[-2:]
    rows, columns = (torch.arange(n, dtype=torch.float64) - n // 2 for n in (height, width))
    left = torch.exp(-2j * math.pi * trajectory[..., :1].double() * rows)
    right = torch.exp(-2j * math.pi * trajectory[..., 1:].double() * columns)
    z = channels_to_complex(x.double())[0]
    return torch.einsum("srh,hw,srw->sr", left, z, right) / math.sqrt(height * width)


def error(operator, x):
    expected = torch.view_as_real(direct(x, operator.trajectory))
    return relative_error(operator(x)[0, 0], expected)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (24, 24), (17, 32), (64, 45)])
@pytest.mark.parametrize("double", [False, True])
def test_the_nufft_is_the_direct_transform(height, width, double):
    for trajectory in (radial_trajectory(7, 40), spiral_trajectory(3, 100, 4.0), random_trajectory(5, 60)):
        operator = NonCartesianMRI((height, width), trajectory)
        operator = operator.double() if double else operator
        assert error(operator, images(operator, 1)) < 1e-5
        point = torch.zeros_like(images(operator, 1))
        for corner in ((0, 0), (0, width - 1), (height - 1, width // 2)):  # where the kernel is worst
            point.zero_()[0, 0, corner[0], corner[1]] = 1
            assert error(operator, point) < 1e-5


def test_derivatives_forward_and_over_a_batch():
    operator = RadialMRI((7, 5), 6, maps=maps(2, 7, 5)).double()
    x, y = images(operator), torch.randn(3, *operator.measurement_shape, dtype=torch.float64)
    for function, at, direction in ((operator, x, images(operator, seed=4)), (operator.adjoint, y, y.flip(0))):
        value, slope = torch.func.jvp(function, (at,), (direction,))
        assert relative_error(value, function(at)) < 1e-14 and relative_error(slope, function(direction)) < 1e-14
        mapped = torch.func.vmap(lambda z, function=function: function(z[None])[0])(at)
        assert relative_error(mapped, function(at)) < 1e-14


def test_samples_on_the_grid_are_cartesian():
    for height, width in ((6, 8), (7, 5)):
        rows, columns = ((torch.arange(n, dtype=torch.float64) - n // 2) / n for n in (height, width))
        trajectory = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)
        sensitivities = maps(3, height, width)
        ours = NonCartesianMRI((height, width), trajectory, sensitivities).double()
        x = images(ours)
        assert relative_error(ours(x), CartesianMRI((height, width), maps=sensitivities).double()(x)) < 1e-5


def test_half_a_cycle_per_pixel_is_the_same_on_either_side():
    edge = NonCartesianMRI((6, 8), torch.tensor([[[0.5, 0.25], [-0.5, 0.25]]]))
    y = pairs_to_complex(edge(images(edge)))
    assert torch.allclose(y[..., 0], y[..., 1], atol=1e-5)


def test_the_norm_bounds_any_normalised_coils():
    sensitivities = maps(3, 6, 5)
    coils, one = RadialMRI((6, 5), 3, maps=sensitivities).double(), RadialMRI((6, 5), 3).double()
    largest = float(torch.linalg.matrix_norm(dense(coils), ord=2))
    assert largest <= coils.norm() * (1 + 1e-6)
    assert coils.norm() == one.norm()


def test_density_compensation_covers_k_space():
    """The weights are the areas of k-space that samples stand for: all together, the disc's."""
    for operator in (RadialMRI(32, 51), SpiralMRI(32, 4, 400, 4.0)):
        weights = operator.density_compensation()
        assert float(weights.sum()) == pytest.approx(math.pi / 4 * 32**2, rel=0.05)
    radial = RadialMRI(32, 51, golden=False)
    ramp = radial.trajectory.norm(dim=-1) * 32 * math.pi / 51 / 2
    middle = slice(40, 60)  # away from centre and edge the weights are the ramp's, up to their own ripple
    ratio = radial.density_compensation().double()[:, middle] / ramp[:, middle]
    assert float(ratio.mean()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    "make",
    [lambda m: RadialMRI(32, 51, maps=m), lambda m: SpiralMRI(32, 4, 400, 4.0, maps=m)],
    ids=["radial", "spiral"],
)
def test_gridding_gives_the_image_back(make):
    row, column = ((torch.arange(32) - 16.0) / 5 for _ in range(2))
    x = torch.exp(-(row[:, None] ** 2) - column**2 / 1.5)
    x = torch.stack((x, 0.5 * x.roll(3, 0)))[None]  # smooth, so that the disc of k-space holds all of it
    for sensitivities in (None, maps(4, 32, 32)):
        operator = make(sensitivities)
        assert relative_error(operator.baseline(operator(x)), x) < 0.05
        assert relative_error(operator.pinv(operator(x), max_iter=30), x) < 1e-3


def case(**values):
    fields = {"id": "a", "measurement": None, "noise_std": None, "geometry": None, "maps": None, "mask": None}
    return SimpleNamespace(**{**fields, **values})


def test_a_case_brings_trajectory_and_maps():
    trajectory, sensitivities = random_trajectory(2, 9), maps(3, 5, 6)
    bound = RadialMRI((5, 6), 3).bind(
        case(geometry={"trajectory": trajectory.tolist()}, maps=sensitivities, noise_std=torch.tensor(0.1))
    )
    expected = NonCartesianMRI((5, 6), trajectory, sensitivities)
    x = images(expected)
    assert bound.measurement_shape == (3, 2, 9, 2)
    assert relative_error(bound(x), expected(x)) < 1e-6
    assert torch.equal(bound.noise_std, torch.tensor(0.1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NonCartesianMRI(8, torch.zeros(5, 2)), "trajectory of shape"),
        (lambda: NonCartesianMRI(8, torch.zeros(1, 0, 2)), "trajectory of shape"),
        (lambda: NonCartesianMRI(8, torch.full((1, 1, 2), 4.0)), "cycles/pixel"),
        (lambda: NonCartesianMRI(8, torch.full((1, 1, 2), math.nan)), "cycles/pixel"),
        (lambda: RadialMRI(8, 0), "num_spokes"),
        (lambda: SpiralMRI(8, turns=0.0), "turns"),
        (lambda: RadialMRI(8, 3, maps=torch.zeros(0, 8, 8, 2)), "zero coils"),
        (lambda: RadialMRI(8, 3).bind(case(measurement=torch.ones(1, 4, 16, 2))), "has shape"),
        (lambda: RadialMRI(8, 3).bind(case(measurement=torch.full((1, 3, 16, 2), math.nan))), "NaN"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(InputError, match=message):
        make()
