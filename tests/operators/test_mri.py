"""Cartesian MRI: the centred transform, one and several coils, closed forms, what a case brings, errors."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from invrecon.data.cases import CaseBatch
from invrecon.errors import InputError
from invrecon.operators import FourierMask, LinearOperator
from invrecon.operators.coils import simulated_maps
from invrecon.operators.fourier import (
    channels_to_complex,
    complex_to_channels,
    complex_to_pairs,
    fft2c,
    ifft2c,
    pairs_to_complex,
)
from invrecon.operators.mri import CartesianMRI
from tests.operators.battery import (
    CHECKS,
    check_norm,
    dense,
    dot_product_mismatch,
    images,
    measurements,
    relative_error,
)


def mask(height: int, width: int, seed: int = 1):
    return torch.rand(height, width, generator=torch.Generator().manual_seed(seed)) > 0.4


def maps(num_coils: int, height: int, width: int, seed: int = 0):
    return simulated_maps(num_coils, (height, width), torch.Generator().manual_seed(seed))


ONE_COIL = {
    "full": lambda: CartesianMRI((6, 4)),
    "masked": lambda: CartesianMRI((6, 8), mask(6, 8)),
    "odd": lambda: CartesianMRI((7, 5), mask(7, 5)),
    "lines": lambda: CartesianMRI((5, 6), [[1, 0, 0, 1, 1, 0]]),
    "pixel": lambda: CartesianMRI(1),
}
COILS = {
    "coils": lambda: CartesianMRI((6, 8), mask(6, 8), maps(3, 6, 8)),
    "coils-odd": lambda: CartesianMRI((7, 5), mask(7, 5), maps(4, 7, 5)),
    "coils-full": lambda: CartesianMRI((5, 4), maps=maps(2, 5, 4)),
    "one-map": lambda: CartesianMRI((5, 6), mask(5, 6), maps(1, 5, 6)),
    "coils-pixel": lambda: CartesianMRI(1, maps=maps(4, 1, 1)),
    "weak-maps": lambda: CartesianMRI((4, 4), mask(4, 4), 0.5 * maps(2, 4, 4)),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("make", ONE_COIL.values(), ids=ONE_COIL.keys())
def test_battery_of_one_coil(make, check):
    check(make)


@pytest.mark.parametrize("check", [check for check in CHECKS if check is not check_norm])
@pytest.mark.parametrize("make", COILS.values(), ids=COILS.keys())
def test_battery_of_coils(make, check):
    check(make)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 4))
def test_the_pair_is_exact_for_any_size(height, width, num_coils):
    sensitivities = maps(num_coils, height, width) if num_coils else None
    kept = mask(height, width) | (torch.arange(height * width) == 0).reshape(height, width)
    operator = CartesianMRI((height, width), kept, sensitivities)
    assert dot_product_mismatch(operator) < 1e-5
    assert dot_product_mismatch(operator.double()) < 1e-12


# The transform ----------------------------------------------------------------------------------------------


def centred_dft(n: int):
    index = torch.arange(n, dtype=torch.float64) - n // 2
    return torch.exp(-2j * math.pi * index[:, None] * index / n) / math.sqrt(n)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (4, 6), (5, 7), (8, 3), (1, 9)])
def test_the_transform_is_the_centred_dft_matrix(height, width):
    z = torch.randn(2, height, width, dtype=torch.complex128)
    expected = centred_dft(height) @ z @ centred_dft(width).T
    assert relative_error(torch.view_as_real(fft2c(z)), torch.view_as_real(expected)) < 1e-14
    assert relative_error(torch.view_as_real(ifft2c(expected)), torch.view_as_real(z)) < 1e-14


def test_a_point_at_the_centre_is_flat_in_k_space_for_odd_and_even_sizes():
    for height, width in ((4, 6), (5, 7), (8, 3)):
        x = torch.zeros(1, 2, height, width)
        x[0, 0, height // 2, width // 2] = 1
        y = CartesianMRI((height, width))(x)
        assert torch.allclose(y[..., 0], torch.tensor(1 / math.sqrt(height * width)), atol=1e-6)
        assert float(y[..., 1].abs().amax()) < 1e-6


def test_complex_numbers_survive_both_layouts():
    z = torch.randn(3, 4, 5, dtype=torch.complex64)
    assert torch.equal(channels_to_complex(complex_to_channels(z)), z)
    assert torch.equal(pairs_to_complex(complex_to_pairs(z.conj())), z.conj())


# Coils ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", COILS.values(), ids=COILS.keys())
def test_normalised_maps_never_amplify(make):
    operator = make().double()
    largest = float(torch.linalg.matrix_norm(dense(operator), ord=2))
    assert largest <= operator.norm() + 1e-6  # float32 maps are normalised to 1e-7
    if operator.mask is None and float(operator.maps.square().sum((-4, -1)).amin()) > 0.99:
        assert largest == pytest.approx(operator.norm(), rel=1e-6)


def test_sense_without_undersampling_is_the_coil_combination():
    sensitivities = maps(4, 9, 8)
    sensitivities[:, :2] = 0  # nothing is known outside of the object
    operator = CartesianMRI((9, 8), maps=sensitivities).double()
    kspace = measurements(operator, 2)  # of no image at all: the fit is by least squares
    coil_images = ifft2c(pairs_to_complex(kspace))
    combined = (pairs_to_complex(sensitivities.double()).conj() * coil_images).sum(1)
    found = operator.pinv(kspace, tol=1e-12)
    assert relative_error(found, complex_to_channels(combined)) < 1e-6


def test_coils_see_what_one_coil_cannot():
    """Twofold undersampling folds the image in one coil, and four coils unfold it."""
    lines = torch.zeros(1, 8)
    lines[0, ::2] = 1
    sensitivities = maps(4, 6, 8)
    many = CartesianMRI((6, 8), lines, sensitivities).double()
    one = CartesianMRI((6, 8), lines).double()
    x = images(many, 1)
    assert relative_error(many.pinv(many(x), max_iter=500, tol=1e-12), x) < 1e-6
    assert relative_error(one.pinv(one(x)), x) > 0.3


def test_one_coil_is_the_fourier_mask():
    kept = mask(7, 6)
    ours, theirs = CartesianMRI((7, 6), kept).double(), FourierMask(kept).double()
    x = images(ours)
    assert relative_error(ours(x)[:, 0].movedim(-1, 1), theirs(x)) < 1e-14


def test_the_closed_forms_of_one_coil_are_those_of_conjugate_gradients():
    operator = CartesianMRI((7, 6), mask(7, 6)).double()
    x, y = images(operator), measurements(operator)
    for weight in (0.3, 40.0, torch.tensor([0.0, 1.0, 7.0], dtype=torch.float64)):
        solved = LinearOperator.prox(operator, x, y, weight, max_iter=50, tol=1e-14)
        assert relative_error(operator.prox(x, y, weight), solved) < 1e-12
    assert relative_error(operator.pinv(y), LinearOperator.pinv(operator, y, max_iter=50, tol=1e-14)) < 1e-12


def test_the_spectrum_of_one_coil_is_its_singular_system():
    operator = CartesianMRI((7, 6), mask(7, 6)).double()
    system = operator.spectrum()
    x, y = images(operator), measurements(operator)
    coefficients = system.to_spectrum(x)
    assert relative_error(coefficients.norm(), x.norm()) < 1e-14
    assert relative_error(system.to_image(coefficients), x) < 1e-14
    assert relative_error(system.spectrum_to_data(system.singular_values * coefficients), operator(x)) < 1e-14
    assert (
        relative_error(system.to_image(system.singular_values * system.data_to_spectrum(y)), operator.adjoint(y))
        < 1e-14
    )
    with pytest.raises(InputError, match="singular values"):
        CartesianMRI((7, 6), maps=maps(2, 7, 6)).spectrum()


# What a case brings -----------------------------------------------------------------------------------------


def case(**values):
    fields = {"id": ["a", "b"], "measurement": None, "noise_std": None, "geometry": None, "maps": None, "mask": None}
    return SimpleNamespace(**{**fields, **values})


def test_every_case_has_its_own_maps_and_mask():
    sensitivities = torch.stack([maps(3, 5, 6, seed) for seed in (0, 1)])
    masks = torch.stack([mask(5, 6, seed) for seed in (2, 3)])
    operator = CartesianMRI((5, 6))
    bound = operator.bind(case(maps=sensitivities, mask=masks, noise_std=torch.tensor([0.1, 0.2])))
    singles = [CartesianMRI((5, 6), m, s) for m, s in zip(masks, sensitivities, strict=True)]
    x, y = images(bound, 2), measurements(bound, 2)
    assert torch.equal(bound.noise_std, torch.tensor([0.1, 0.2]))
    for b, single in enumerate(singles):
        assert relative_error(bound(x)[b], single(x[b : b + 1])[0]) < 1e-6
        assert relative_error(bound.adjoint(y)[b], single.adjoint(y[b : b + 1])[0]) < 1e-6
        assert relative_error(bound.prox(x, y, 2.0)[b], single.prox(x[b : b + 1], y[b : b + 1], 2.0)[0]) < 1e-5
    assert operator.measurement_shape == (1, 5, 6, 2), "binding must not change its original"


def test_several_samples_of_each_case_share_its_maps():
    sensitivities = torch.stack([maps(3, 5, 6, seed) for seed in (0, 1)])
    bound = CartesianMRI((5, 6)).bind(case(maps=sensitivities))
    x = images(bound, 2)
    assert torch.equal(bound(x.repeat_interleave(3, 0)), bound(x).repeat_interleave(3, 0))
    with pytest.raises(InputError, match="does not divide"):
        bound(images(bound, 3))


def test_a_measured_case_brings_its_size():
    sensitivities = maps(3, 9, 7)
    kspace = torch.randn(3, 9, 7, 2)
    bound = CartesianMRI(256).bind(case(id="a", maps=sensitivities, measurement=kspace, mask=torch.ones(1, 7)))
    assert bound.image_shape == (2, 9, 7)
    assert bound.adjoint(kspace[None]).shape == (1, 2, 9, 7)


def test_simulated_noise_is_kept_where_something_was_measured():
    kept = mask(5, 6)
    operator = CartesianMRI((5, 6), kept, maps(2, 5, 6))
    y = measurements(operator)
    inside = operator.restrict(y)
    assert torch.equal(operator.adjoint(inside), operator.adjoint(y))
    assert not inside[:, :, ~kept].any()
    assert torch.equal(inside[:, :, kept], y[:, :, kept])


def test_cases_with_masks_of_their_own_have_no_common_spectrum():
    bound = CartesianMRI((5, 6)).bind(case(mask=torch.stack([mask(5, 6, 2), mask(5, 6, 3)])))
    with pytest.raises(InputError, match="batch_size"):
        bound.spectrum()


NAN = torch.full((2, 5, 6, 2), math.nan)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CartesianMRI(0), "at least 1"),
        (lambda: CartesianMRI((5, 6), torch.ones(5, 7)), "mask of shape"),
        (lambda: CartesianMRI((5, 6), torch.ones(1, 5)), "mask of shape"),
        (lambda: CartesianMRI((5, 6), torch.zeros(5, 6)), "measures nothing"),
        (lambda: CartesianMRI((5, 6), torch.full((5, 6), math.nan)), "NaN"),
        (lambda: CartesianMRI((5, 6), maps=torch.zeros(0, 5, 6, 2)), "zero coils"),
        (lambda: CartesianMRI((5, 6), maps=torch.zeros(3, 6, 5, 2)), "do not fit"),
        (lambda: CartesianMRI((5, 6), maps=torch.zeros(3, 5, 6, dtype=torch.complex64)), "do not fit"),
        (lambda: CartesianMRI((5, 6), maps=NAN), "NaN"),
        (lambda: CartesianMRI((5, 6), maps=2 * maps(2, 5, 6)), "root sum of squares"),
        (lambda: CartesianMRI((5, 6)).bind(case(measurement=NAN[:1], id="scan/0003")), "scan/0003.*NaN"),
        (lambda: CartesianMRI((5, 6)).bind(case(measurement=torch.ones(2, 5, 6, 2))), "no maps.*ESPIRiT"),
        (lambda: CartesianMRI((5, 6)).bind(case(measurement=torch.ones(2, 5, 6, 2), maps=maps(3, 5, 6))), "3, 5, 6"),
        (lambda: CartesianMRI((5, 6)).bind(case(mask=torch.ones(2, 5, 9))), "mask of shape"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("whitened", [False, True])
def test_some_cases_of_a_batch_keep_what_is_theirs(whitened: bool):
    generator = torch.Generator().manual_seed(0)
    maps = torch.stack([simulated_maps(2, (6, 5), torch.Generator().manual_seed(i)) for i in range(3)])
    mask = torch.rand(3, 6, 5, generator=generator) < 0.6
    each_row = 0.1 + torch.rand(3, 2, 6, 5, 2, generator=generator)
    batch = CaseBatch(
        *(list("abc"), ["p"] * 3, ["f"] * 3, [0, 1, 2]),
        measurement=torch.randn(3, 2, 6, 5, 2, generator=generator),
        maps=maps,
        mask=mask,
        noise_std=each_row if whitened else torch.tensor([0.1, 0.2, 0.3]),
    )
    operator, x = CartesianMRI((6, 5)).bind(batch), torch.randn(3, 2, 6, 5, generator=generator)
    part = operator.select_cases(slice(1, 2), 3)
    assert torch.equal(part.noise_std, operator.noise_std[1:2])
    if whitened:
        (operator, *_), (part, *_) = operator.whiten(batch.measurement), part.whiten(batch.measurement[1:2])
        assert torch.equal(operator.select_cases(slice(1, 2), 3)(x[1:2]), operator(x)[1:2])
    assert torch.equal(part(x[1:2]), operator(x)[1:2])
    assert torch.equal(operator(x), operator.select_cases(slice(0, 3), 3)(x))
