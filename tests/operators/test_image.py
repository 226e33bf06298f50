"""Image restoration: blur, downsampling and masks against the battery, formulas and other people's code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage, signal
from torch.nn import functional as nnf

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
    MotionBlur,
    RandomInpainting,
    UniformBlur,
)
from invrecon.operators.blur import motion_kernel
from invrecon.rng import make_generator
from tests.operators.battery import CHECKS, dot_product_mismatch, images, measurements, relative_error

KERNEL = torch.rand(4, 3, generator=torch.Generator().manual_seed(0)) / 6
MASK = torch.rand(7, 5, generator=torch.Generator().manual_seed(1)) > 0.5

MAKERS = {
    "uniform": lambda: UniformBlur(size=8, kernel_size=3),
    "uniform-rgb": lambda: UniformBlur(size=(7, 6), kernel_size=3, num_channels=3),
    "uniform-even": lambda: UniformBlur(size=7, kernel_size=2),
    "uniform-wide": lambda: UniformBlur(size=(5, 6), kernel_size=9),
    "uniform-reflect": lambda: UniformBlur(size=(7, 6), kernel_size=3, boundary="reflect"),
    "uniform-pixel": lambda: UniformBlur(size=1, kernel_size=3, boundary="reflect"),
    "gaussian": lambda: GaussianBlur(size=(9, 8), kernel_size=5, std=0.7, num_channels=2),
    "blur": lambda: Blur(KERNEL, size=(7, 8), num_channels=2),
    "blur-wide": lambda: Blur(torch.eye(9) / 9 + torch.rand(9, 9) / 81, size=(4, 5)),
    "blur-reflect": lambda: Blur(KERNEL, size=(7, 6), num_channels=2, boundary="reflect"),
    "blur-reflect-wide": lambda: Blur(torch.rand(9, 8) / 72, size=(4, 5), boundary="reflect"),
    "motion": lambda: MotionBlur(size=(9, 8), kernel_size=7, num_channels=3),
    "motion-pixel": lambda: MotionBlur(size=1, kernel_size=5, boundary="reflect"),
    "circular": lambda: CircularBlur(KERNEL, size=(7, 8), num_channels=3),
    "circular-even": lambda: CircularBlur(KERNEL, size=6),
    "circular-wrapped": lambda: CircularBlur(torch.eye(9) / 9 + 0.1, size=(4, 5)),
    "circular-singular": lambda: CircularBlur([[0.5, 0.5]], size=(5, 6)),
    "block": lambda: BlockDownsample(size=(8, 12), factor=4),
    "block-rgb": lambda: BlockDownsample(size=(6, 3), factor=3, num_channels=3),
    "block-identity": lambda: BlockDownsample(size=4, factor=1),
    "bicubic": lambda: BicubicDownsample(size=(8, 12), factor=4),
    "bicubic-odd": lambda: BicubicDownsample(size=(11, 7), factor=2, num_channels=3),
    "bicubic-tiny": lambda: BicubicDownsample(size=(2, 5), factor=4),
    "inpainting": lambda: Inpainting(MASK, num_channels=2),
    "box": lambda: BoxInpainting(size=(9, 8), box=4),
    "random": lambda: RandomInpainting(size=(7, 9), fraction=0.6, num_channels=3),
    "fourier": lambda: FourierMask(MASK),
    "fourier-even": lambda: FourierMask(torch.eye(6) + torch.ones(6, 1) * (torch.arange(6) == 3)),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_battery(make, check):
    check(make)


sizes = st.tuples(st.integers(1, 12), st.integers(1, 12))


@given(sizes, st.integers(1, 9), st.integers(1, 3), st.sampled_from(["zero", "reflect"]))
def test_separable_blurs_are_exact_for_any_size(size, kernel_size, num_channels, boundary):
    operator = UniformBlur(size, kernel_size, num_channels, boundary)
    assert dot_product_mismatch(operator.double()) < 1e-12
    assert float(operator(torch.ones_like(images(operator))).amax()) <= 1 + 1e-12


@given(sizes, sizes, st.sampled_from([Blur, CircularBlur]))
def test_general_blurs_are_exact_for_any_size(size, kernel_size, kind):
    operator = kind(torch.rand(kernel_size), size).double()
    assert dot_product_mismatch(operator) < 1e-12


@given(sizes, st.integers(1, 5))
def test_bicubic_is_exact_and_keeps_constants_for_any_size(size, factor):
    operator = BicubicDownsample(size, factor).double()
    assert dot_product_mismatch(operator) < 1e-12
    assert operator.measurement_shape == (1, math.ceil(size[0] / factor), math.ceil(size[1] / factor))
    ones = torch.ones(1, *operator.image_shape, dtype=torch.float64)
    torch.testing.assert_close(operator(ones), torch.ones(1, *operator.measurement_shape, dtype=torch.float64))


# Against other people's code and formulas -------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 3), (4, 3), (9, 11)])
def test_blurs_convolve(shape):
    kernel = torch.rand(shape, dtype=torch.float64)
    zero, circular = Blur(kernel, (8, 9)).double(), CircularBlur(kernel, (8, 9)).double()
    x = images(zero, 1)
    full = signal.convolve2d(x[0, 0], kernel)
    expected = full[shape[0] // 2 :, shape[1] // 2 :][:8, :9]  # the centre of the kernel is at K // 2
    np.testing.assert_allclose(zero(x)[0, 0], expected, atol=1e-12)
    if max(shape) < 8:
        expected = ndimage.convolve(x[0, 0].numpy(), kernel.numpy(), mode="wrap", origin=0)
        np.testing.assert_allclose(circular(x)[0, 0], expected, atol=1e-12)


@pytest.mark.parametrize(("boundary", "mode"), [("zero", "constant"), ("reflect", "mirror")])
def test_named_blurs_are_scipy_filters(boundary, mode):
    operator = UniformBlur((20, 23), 9, 3, boundary).double()
    x = images(operator, 1)
    expected = ndimage.uniform_filter(x[0].numpy(), (0, 9, 9), mode=mode)
    np.testing.assert_allclose(operator(x)[0], expected, atol=1e-12)
    operator = GaussianBlur((20, 23), 13, 2.0, 1, boundary).double()
    x = images(operator, 1)
    expected = ndimage.gaussian_filter(x[0, 0].numpy(), 2.0, mode=mode, radius=6)
    np.testing.assert_allclose(operator(x)[0, 0], expected, atol=1e-12)


@pytest.mark.parametrize("boundary", ["zero", "reflect"])
@pytest.mark.parametrize("side", [5, 4, 23])
def test_separable_and_general_blur_agree(side, boundary):
    separable = UniformBlur((9, 8), side, boundary=boundary).double()
    general = Blur(torch.full((side, side), side**-2.0, dtype=torch.float64), (9, 8), boundary=boundary).double()
    x = images(separable)
    torch.testing.assert_close(separable(x), general(x))


@pytest.mark.parametrize("kernel_size", [1, 2, 15, 61])
def test_motion_is_a_path(kernel_size):
    """It lasts as long everywhere, stays inside, and straight it is a line of half the kernel's side."""
    places = torch.arange(kernel_size, dtype=torch.float64)
    for intensity in (0.0, 0.5, 1.0):
        kernels = [motion_kernel(kernel_size, intensity, make_generator(seed, "path")) for seed in range(20)]
        for kernel in kernels:
            assert kernel.shape == (kernel_size, kernel_size) and float(kernel.min()) >= 0
            assert float(kernel.sum()) == pytest.approx(1, abs=1e-12)
            centre = [float((kernel.sum(axis) * places).sum()) for axis in (1, 0)]
            assert centre == pytest.approx([kernel_size // 2] * 2, abs=0.3)
        if intensity == 0 and kernel_size > 9:
            spreads = [sum(float((k.sum(a) * (places - kernel_size // 2) ** 2).sum()) for a in (1, 0)) for k in kernels]
            assert spreads == pytest.approx([(kernel_size / 2) ** 2 / 12] * 20, rel=0.1)
    if kernel_size > 9:
        assert not torch.equal(*kernels[:2])


def test_the_seed_is_the_path():
    x = images(MotionBlur(16))
    assert torch.equal(MotionBlur(16, seed=3)(x), MotionBlur(16, seed=3)(x))
    assert not torch.allclose(MotionBlur(16, seed=3)(x), MotionBlur(16, seed=4)(x))


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_bicubic_is_torchs_inside(factor):
    """The borders differ: torch cuts the kernel off, we mirror the image."""
    operator = BicubicDownsample((12 * factor, 10 * factor), factor).double()
    x = images(operator)
    expected = nnf.interpolate(x, scale_factor=1 / factor, mode="bicubic", antialias=True)
    torch.testing.assert_close(operator(x)[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2])


def test_block_means_are_average_pooling():
    operator = BlockDownsample((8, 12), 4, 3).double()
    x = images(operator)
    torch.testing.assert_close(operator(x), nnf.avg_pool2d(x, 4))
    y = measurements(operator)
    torch.testing.assert_close(operator(operator.baseline(y)), y)
    torch.testing.assert_close(operator.pinv(y), operator.baseline(y))


def test_fourier_mask_is_the_centred_transform_of_odd_and_even_sizes():
    for height, width in [(5, 8), (6, 7)]:
        operator = FourierMask(torch.ones(height, width)).double()
        delta = torch.zeros(1, 2, height, width, dtype=torch.float64)
        delta[0, 0, height // 2, width // 2] = 1  # the centre of the image: k-space is constant and real
        flat = torch.zeros_like(delta)
        flat[0, 0] = (height * width) ** -0.5
        torch.testing.assert_close(operator(delta), flat)
        torch.testing.assert_close(operator(flat), delta)  # and the other way: the mean is at the centre


# Baselines and masks ----------------------------------------------------------------------------------------


def test_baselines_are_images():
    smooth = torch.linspace(0, 1, 16).outer(torch.linspace(1, 2, 16)).expand(2, 3, 16, 16)
    for operator in (
        UniformBlur(16, 3, 3, "reflect"),
        Blur([[0.5, 0.5]], 16, 3),
        CircularBlur([[1.0]], 16, 3),
        BlockDownsample(16, 4, 3),
        BicubicDownsample(16, 4, 3),
        BoxInpainting(16, 4, num_channels=3),
        RandomInpainting(16, 0.5, num_channels=3),
    ):
        estimate = operator.baseline(operator(smooth))
        assert estimate.shape == smooth.shape
        assert relative_error(estimate, smooth) < 0.2, type(operator).__name__


def test_missing_pixels_take_the_nearest():
    operator = Inpainting([[1, 0, 0, 1], [1, 0, 0, 1]])
    y = torch.tensor([[[[1.0, 9.0, 9.0, 2.0], [3.0, 9.0, 9.0, 4.0]]]])  # what is off the mask is not looked at
    assert operator.baseline(y).tolist() == [[[[1.0, 1.0, 2.0, 2.0], [3.0, 3.0, 4.0, 4.0]]]]


def missing(operator: LinearOperator) -> torch.Tensor:
    return operator(torch.ones(1, *operator.image_shape))[0, 0] == 0


def test_masks_are_what_they_say():
    holes = missing(BoxInpainting(10, (2, 4)))
    assert holes.sum() == 8 and holes[4:6, 3:7].all()
    assert missing(BoxInpainting(10, 3, (0, 7)))[:3, 7:].all()
    assert missing(RandomInpainting(10, 0.7)).sum() == 70
    assert torch.equal(missing(RandomInpainting(10, 0.7, seed=3)), missing(RandomInpainting(10, 0.7, seed=3)))
    assert not torch.equal(missing(RandomInpainting(10, 0.7, seed=3)), missing(RandomInpainting(10, 0.7, seed=4)))
    assert not missing(RandomInpainting(10, 0.0)).any()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: UniformBlur(0), "at least 1"),
        (lambda: UniformBlur(8, num_channels=0), "at least 1"),
        (lambda: UniformBlur(8, 0), "kernel_size"),
        (lambda: UniformBlur(8, boundary="wrap"), "boundary"),
        (lambda: GaussianBlur(8, 3, 0.0), "std"),
        (lambda: Blur([1.0, 2.0], 8), "matrix"),
        (lambda: Blur([[1.0, 2.0], [3.0]], 8), "the kernel is no matrix"),
        (lambda: Blur([[1.0]], 8, boundary="wrap"), "boundary"),
        (lambda: MotionBlur(8, intensity=1.5), "intensity"),
        (lambda: CircularBlur([[math.nan]], 8), "finite"),
        (lambda: BlockDownsample(10, 4), "BicubicDownsample"),
        (lambda: BlockDownsample(8, 0), "factor"),
        (lambda: BicubicDownsample(8, 0), "factor"),
        (lambda: Inpainting(torch.zeros(3, 3)), "non-zero"),
        (lambda: FourierMask(torch.ones(3)), "matrix"),
        (lambda: BoxInpainting(8, 9), "within"),
        (lambda: BoxInpainting(8, 8), "non-zero"),
        (lambda: BoxInpainting(8, 4, (5, 0)), "within"),
        (lambda: RandomInpainting(8, 1.0), "fraction"),
    ],
)
def test_errors_say_what_to_do(make, match):
    with pytest.raises(InputError, match=match):
        make()


@pytest.mark.parametrize("size", [252, 253, 254, 255])
def test_bicubic_interpolation_stays_where_the_pixels_are(size):
    """The direct inverse of a ramp is the ramp, to a quarter of a pixel, whether or not the factor divides the size."""
    operator = BicubicDownsample(size=size, factor=4)
    ramp = (torch.arange(size) / size).expand(1, 1, size, size)
    error = (operator.baseline(operator(ramp)) - ramp)[..., 16:-16, 16:-16]
    assert operator.baseline(operator(ramp)).shape == ramp.shape
    assert size * error.abs().max() < 0.25
