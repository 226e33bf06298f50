"""Singular systems: orthogonal, true to the operator, and equal to what dense linear algebra finds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from invrecon.errors import InputError
from invrecon.operators import (
    BicubicDownsample,
    BlockDownsample,
    Blur,
    BoxInpainting,
    CircularBlur,
    FourierMask,
    GaussianBlur,
    Inpainting,
    LinearOperator,
    ParallelBeamCT,
    RandomInpainting,
    SpectralOperator,
    UniformBlur,
)
from tests.operators.battery import dense, images, measurements, relative_error
from tests.operators.test_image import KERNEL, MAKERS, MASK

SPECTRAL = {
    **{name: make for name, make in MAKERS.items() if isinstance(make(), SpectralOperator)},
    "gaussian-heavy": lambda: GaussianBlur(8, 13, 3.0, 1, "reflect"),  # most singular values are rounding
}


@pytest.fixture(params=SPECTRAL.values(), ids=SPECTRAL.keys())
def operator(request) -> SpectralOperator:
    return request.param().double()


def coefficients(operator: LinearOperator) -> torch.Tensor:
    size = torch.Size(operator.image_shape).numel()
    return torch.randn(3, size, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(operator.dtype)


def test_v_is_orthogonal(operator):
    spectrum, x, c = operator.spectrum(), images(operator), coefficients(operator)
    assert spectrum.to_spectrum(x).shape == c.shape
    assert relative_error(spectrum.to_image(spectrum.to_spectrum(x)), x) < 1e-12
    assert relative_error(spectrum.to_spectrum(spectrum.to_image(c)), c) < 1e-12
    mixed = (spectrum.to_spectrum(x) * c).sum(1) - (x * spectrum.to_image(c)).flatten(1).sum(1)
    assert float(mixed.abs().max()) < 1e-11  # V^T is the transpose of V, not only its inverse


def test_the_system_is_the_operator(operator):
    spectrum, x, y = operator.spectrum(), images(operator), measurements(operator)
    s = spectrum.singular_values
    assert s.shape == coefficients(operator)[0].shape and (s >= 0).all()
    assert relative_error(spectrum.spectrum_to_data(s * spectrum.to_spectrum(x)), operator(x)) < 1e-12
    assert relative_error(spectrum.to_image(s * spectrum.data_to_spectrum(y)), operator.adjoint(y)) < 1e-12


def test_u_is_orthonormal_on_the_range(operator):
    spectrum, c, y = operator.spectrum(), coefficients(operator), measurements(operator)
    kept = torch.where(spectrum.singular_values > 0, c, 0.0)
    data = spectrum.spectrum_to_data(c)
    assert torch.equal(data, spectrum.spectrum_to_data(kept))  # what S = 0 loses is ignored
    assert relative_error(spectrum.data_to_spectrum(data), kept) < 1e-12
    assert not spectrum.data_to_spectrum(y)[:, spectrum.singular_values == 0].any()
    mixed = (spectrum.data_to_spectrum(y) * c).sum(1) - (y * data).flatten(1).sum(1)
    assert float(mixed.abs().max()) < 1e-11


def test_singular_values_are_those_of_the_matrix(operator):
    expected = torch.linalg.svdvals(dense(operator))
    found = operator.spectrum().singular_values.sort(descending=True).values
    size = max(len(expected), len(found))
    expected, found = (torch.nn.functional.pad(s, (0, size - len(s))) for s in (expected, found))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert operator.norm() == pytest.approx(float(expected.max()), rel=1e-12)


@pytest.mark.parametrize(
    "name", [name for name in SPECTRAL if name != "gaussian-heavy"]
)  # whose 1 / s CG cannot follow
def test_pinv_by_the_spectrum_is_that_by_cg(name):
    operator = SPECTRAL[name]().double()
    spectrum, y = operator.spectrum(), operator(images(operator))
    s = spectrum.singular_values
    inverse = torch.where(s > 0, 1 / s.clamp(min=1e-300), 0.0)
    direct = spectrum.to_image(inverse * spectrum.data_to_spectrum(y))
    assert relative_error(operator.pinv(y, max_iter=3000, tol=1e-14), direct) < 1e-6


def test_prox_is_that_by_cg(operator):
    """In closed form, with a weight for each sample, zero among them."""
    x, y = images(operator, 4), measurements(operator, 4)
    weight = torch.tensor([0.0, 0.1, 3.0, 500.0], dtype=torch.float64) / operator.norm() ** 2
    direct = operator.prox(x, y, weight)
    by_cg = LinearOperator.prox(operator, x, y, weight, max_iter=2000, tol=1e-13)
    assert relative_error(direct, by_cg) < 1e-8
    for i in range(4):
        alone = operator.prox(x[i : i + 1], y[i : i + 1], weight[i : i + 1])
        torch.testing.assert_close(alone, direct[i : i + 1])
    torch.testing.assert_close(operator.prox(x, y, 0.3), operator.prox(x, y, torch.full((4,), 0.3)))


def test_single_precision_is_as_good_as_it_can_be(operator):
    single = operator.float()
    spectrum, x = single.spectrum(), images(single)
    assert spectrum.singular_values.dtype == torch.float32
    through = spectrum.spectrum_to_data(spectrum.singular_values * spectrum.to_spectrum(x))
    assert relative_error(through, single(x)) < 2e-5
    y = measurements(single)
    direct, by_cg = single.prox(x, y, 2.0), LinearOperator.prox(single, x, y, 2.0, max_iter=50, tol=1e-7)
    assert relative_error(direct, by_cg) < 1e-5


def test_rounding_counts_as_zero():
    operator = GaussianBlur(32, 31, 3.0)
    s = operator.spectrum().singular_values
    assert float(s[s > 0].min()) > 32 * torch.finfo(torch.float32).eps * float(s.max())
    assert int((s == 0).sum()) > int((operator.double().spectrum().singular_values == 0).sum())
    assert operator.spectrum() is operator.spectrum(), "made once"


@given(st.tuples(st.integers(1, 4), st.integers(1, 4)), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**20))
def test_any_size_has_an_orthogonal_system(blocks, factor, num_channels, seed):
    size = (blocks[0] * factor, blocks[1] * factor)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(size, generator=generator) < 0.5
    mask[0, 0] = True
    kernel = torch.rand(blocks, generator=generator)
    for operator in (
        BlockDownsample(size, factor, num_channels),
        BicubicDownsample(size, factor, num_channels),
        UniformBlur(size, factor, num_channels),
        CircularBlur(kernel, size, num_channels),
        Inpainting(mask, num_channels),
        FourierMask(mask),
    ):
        operator = operator.double()
        spectrum, x = operator.spectrum(), images(operator, 2, seed)
        c = spectrum.to_spectrum(x)
        assert relative_error(c.norm(dim=1), x.flatten(1).norm(dim=1)) < 1e-12
        assert relative_error(spectrum.to_image(c), x) < 1e-12
        assert relative_error(spectrum.spectrum_to_data(spectrum.singular_values * c), operator(x)) < 1e-10


def test_a_projection_keeps_what_was_measured():
    for operator in (BoxInpainting(8, 3), RandomInpainting(8, 0.5), BlockDownsample(8, 2), FourierMask(MASK)):
        x, y = images(operator), operator(images(operator, seed=9))
        z = operator.prox(x, y, float("inf"))
        assert relative_error(operator(z), y) < 1e-5
        assert relative_error(operator.prox(z, y, 5.0), z) < 1e-5


def test_what_has_no_singular_system_says_what_to_use():
    for operator in (ParallelBeamCT(8), Blur(KERNEL, 8)):
        with pytest.raises(InputError, match=rf"{type(operator).__name__} has none.*DiffPIR"):
            operator.spectrum()


def test_the_system_is_differentiable_and_outlives_inference_mode():
    operator = UniformBlur(6, 3)
    with torch.inference_mode():
        operator.prox(images(operator), measurements(operator), 1.0)
    x = images(operator).requires_grad_()
    (gradient,) = torch.autograd.grad(operator.prox(x, measurements(operator), 1.0).square().sum(), x)
    assert gradient.isfinite().all() and gradient.any()
