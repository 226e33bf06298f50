"""Complex images: no range cuts their negative parts without a word, and penalties are of magnitudes."""

import inspect
import math

import pytest
import torch
from torch import Tensor

import invrecon.methods
from invrecon.data.mri import random_phase
from invrecon.data.phantoms import ellipse_phantom
from invrecon.errors import InputError
from invrecon.methods import (
    ADMMTV,
    DDIM,
    FBP,
    EstimateStart,
    GeometricSchedule,
    Method,
    NoiseStart,
    NoisyEstimateStart,
    PinvConditioning,
    PnPADMM,
    TotalVariation,
    Unconditional,
    WaveletL1,
)
from invrecon.methods.classical import total_variation
from invrecon.methods.wavelet import Wavelets
from invrecon.metrics.mri import magnitude
from invrecon.operators import CartesianMRI, FourierMask, Identity, LinearOperator, RandomLines, simulated_maps
from invrecon.rng import make_generator
from tests.methods.toy import generators

SIZE = 8
WIDE = (-4.0, 4.0)
RANGES = ("clip", "bounds")
REQUIRED = {
    "schedule": GeometricSchedule(2, 1.0, 0.1),
    "conditioning": Unconditional(),
    "guidance": Unconditional(),
    "transition": DDIM(1.0),
    "epsilon": 0.5,
    "start": NoiseStart(),
}


def has_range(value: object) -> bool:
    if not inspect.isclass(value) or not issubclass(value, Method) or inspect.isabstract(value):
        return False
    return any(name in inspect.signature(value).parameters for name in RANGES)


METHODS = [name for name, value in vars(invrecon.methods).items() if has_range(value)]


def make(name: str, limits: tuple[float, float] | None) -> Method:
    """Returns the method with its range set to `limits`."""
    kind = getattr(invrecon.methods, name)
    parameters = inspect.signature(kind).parameters
    given = {key: REQUIRED[key] for key, p in parameters.items() if p.default is p.empty}
    return kind(**given, **{key: limits for key in RANGES if key in parameters})


def mri(full: bool = False) -> CartesianMRI:
    """One coil, half of the columns (or all of them)."""
    columns = torch.arange(SIZE)
    mask = ((columns % 3 == 0) | ((columns - SIZE // 2).abs() < 2))[None]
    return CartesianMRI(SIZE, None if full else mask).double()


def image(seed: int = 0) -> Tensor:
    """Two complex images, `(2, 2, SIZE, SIZE)`, with parts of both signs."""
    return torch.randn(2, 2, SIZE, SIZE, generator=generators(1, seed)[0], dtype=torch.float64)


def turned(x: Tensor, phi: float, axis: int = 1) -> Tensor:
    """Returns `exp(i phi) x` of parts along `axis`."""
    re, im = x.unbind(axis)
    return torch.stack([math.cos(phi) * re - math.sin(phi) * im, math.sin(phi) * re + math.cos(phi) * im], axis)


def forbidden(*_: object, **__: object) -> Tensor:
    raise AssertionError("the denoiser was asked before the range was checked")


def test_all_kinds_of_methods_are_found():
    assert {"FBP", "SIRT", "DDS", "PnPADMM", "REDDiff", "DAPS", "DDRM", "UnconditionalSampler", "DIP"} <= set(METHODS)


@pytest.mark.parametrize("operator", [mri(), FourierMask(torch.ones(SIZE, SIZE)).double()], ids=["mri", "mask"])
@pytest.mark.parametrize("name", METHODS)
def test_a_range_without_negative_values_is_refused(name, operator):
    y = operator(image())
    kind = type(operator).__name__
    sentence = rf"^{name}: (clip|bounds) is \(0\.0, 1\.0\), but {kind} has complex images, .*: set \1 to [^.]*(\.|-4)"
    with pytest.raises(InputError, match=sentence):
        make(name, (0.0, 1.0))(y, operator, forbidden, generators=generators(2))


def test_a_range_about_zero_and_none_at_all_are_taken():
    operator = mri()
    y = operator(image())
    whole = FBP(clip=None)(y, operator).mean
    assert (whole < 0).any(1).any() and torch.equal(whole, operator.adjoint(y))
    assert torch.equal(FBP(clip=(-0.5, 0.5))(y, operator).mean, whole.clamp(-0.5, 0.5))
    with pytest.raises(InputError, match=r"FBP: clip is \(-1\.0, 0\.0\)"):
        FBP(clip=(-1.0, 0.0))(y, operator)


def test_two_channels_alone_make_no_complex_image():
    operator, x = Identity(SIZE, 2).double(), image()
    assert torch.equal(FBP()(x, operator).mean, x.clamp(0, 1))


@pytest.mark.parametrize(
    "operator",
    [
        2.0 * mri(),
        mri() @ Identity(SIZE, 2).double(),
        Identity(SIZE, 2).double() @ FourierMask(torch.ones(SIZE, SIZE)).double(),
    ],
    ids=["scaled", "outer", "inner"],
)
def test_what_is_made_of_such_an_operator_has_complex_images(operator: LinearOperator):
    assert operator.complex_images
    with pytest.raises(InputError, match="set clip to null"):
        FBP()(operator(image()), operator)


def test_weighted_rows_keep_images_complex():
    operator = mri()
    y = operator(image())
    operator.noise_std = 0.1 + torch.rand(y.shape, generator=generators(1)[0], dtype=y.dtype)
    assert operator.whiten(y)[0].complex_images


def test_starts_cut_nothing_silently():
    operator = mri()
    y, draws = operator(image()), generators(2)
    assert torch.equal(EstimateStart()(y, operator, 0.1, draws), operator.adjoint(y))
    for start in (EstimateStart(FBP()), NoisyEstimateStart(FBP())):
        with pytest.raises(InputError, match=r"FBP: clip is \(0\.0, 1\.0\).*set clip to null"):
            start(y, operator, 0.1, draws)


def test_conditionings_cut_nothing_silently():
    operator = mri()
    with pytest.raises(InputError, match=r"PinvConditioning: clip.*set clip to null"):
        PinvConditioning(clip=(0.0, 1.0))(forbidden, operator, operator(image()))


def test_without_a_range_negative_parts_survive():
    operator, x = mri(full=True), image()
    method = PnPADMM(num_iterations=3, clip=None)
    estimate = method(operator(x), operator, lambda x, sigma, generators=None: x, generators=generators(2)).mean
    torch.testing.assert_close(estimate, x)


# penalties


@pytest.mark.parametrize("phi", [0.7, 2.0, -1.3])
@pytest.mark.parametrize(
    "method",
    [
        TotalVariation(weight=0.1, num_iterations=60, tol=0.0, bounds=WIDE),
        ADMMTV(weight=0.1, num_iterations=30, tol=0.0, bounds=WIDE),
        WaveletL1(weight=0.1, num_iterations=30, num_scales=2, num_shifts=2, tol=0.0, clip=None),
    ],
    ids=lambda method: type(method).__name__,
)
def test_a_turn_of_the_phase_commutes_with_the_method(method, phi):
    operator = mri()
    y = operator(image())
    x = method(y, operator).mean
    assert (x - operator.adjoint(y)).abs().max() > 0.1  # the penalty tells
    torch.testing.assert_close(method(turned(y, phi, -1), operator).mean, turned(x, phi), atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", [TotalVariation, ADMMTV])
def test_total_variation_of_a_real_image_is_that_of_its_real_part(kind):
    method = kind(weight=0.2, num_iterations=300, tol=1e-4, bounds=WIDE)
    real = image()[:, :1]
    complex_x = torch.cat([real, torch.zeros_like(real)], dim=1)
    operator = mri(full=True)
    found = method(operator(complex_x), operator).mean
    alone = method(real, Identity(SIZE).double()).mean
    torch.testing.assert_close(found[:, :1], alone, atol=3e-2, rtol=0)
    assert found[:, 1].abs().max() < 1e-9 and (alone - real).abs().max() > 0.1


def test_both_solvers_find_one_complex_optimum():
    operator = mri(full=True)
    y = operator(image())
    pair = [
        kind(weight=0.1, num_iterations=1000, tol=1e-4, bounds=WIDE)(y, operator) for kind in (TotalVariation, ADMMTV)
    ]
    for estimate in pair:
        assert max(estimate.stats["relative_gap"]) <= 1e-4
    # The objective is strongly convex: ||x - x*||^2 / 2 <= gap.
    difference = (pair[0].mean - pair[1].mean).flatten(1).square().sum(1)
    assert (difference <= 8e-4 * y.flatten(1).square().sum(1) / 2).all()


def test_total_variation_joins_real_and_imaginary_parts():
    edge = torch.zeros(1, 2, 4, 4, dtype=torch.float64)
    edge[:, 0, :, 2:], edge[:, 1, :, 2:] = 3, 4
    assert total_variation(edge).item() == pytest.approx(4 * (3 + 4))
    assert total_variation(edge, complex_images=True).item() == pytest.approx(4 * 5)


def test_shrinkage_shortens_complex_coefficients():
    wavelets = Wavelets((SIZE, SIZE), 2, 2, image(), complex_images=True)
    x, threshold = image(), torch.tensor([0.3, 0.8], dtype=torch.float64)
    shrunk = wavelets(wavelets.shrink(x, threshold))
    c = torch.complex(*wavelets(x).unbind(1))
    expected = torch.polar((c.abs() - threshold[:, None, None]).clamp(min=0), c.angle())
    expected[:, :2, :2] = c[:, :2, :2]  # the coarsest scale bears no penalty
    torch.testing.assert_close(torch.complex(*shrunk.unbind(1)), expected)
    c[:, :2, :2] = 0
    torch.testing.assert_close(wavelets.detail_norm(x), c.abs().sum((1, 2)))


@pytest.mark.parametrize(
    "method",
    [
        TotalVariation(weight=0.1, num_iterations=25, tol=0.0),
        ADMMTV(weight=0.1, num_iterations=10, tol=0.0),
        WaveletL1(weight=0.1, num_iterations=10, num_scales=2, tol=0.0),
    ],
    ids=lambda method: type(method).__name__,
)
def test_colours_are_penalised_one_by_one(method):
    x = torch.rand(2, 3, SIZE, SIZE, generator=generators(1)[0], dtype=torch.float64)
    alone = [method(x[:, c : c + 1], Identity(SIZE).double()).mean for c in range(3)]
    together = method(x, Identity(SIZE, 3).double()).mean
    close = {"atol": 1e-2, "rtol": 0} if isinstance(method, WaveletL1 | ADMMTV) else {"atol": 1e-9, "rtol": 0}
    torch.testing.assert_close(together, torch.cat(alone, dim=1), **close)


def test_total_variation_has_steps_for_edges_of_complex_images() -> None:
    class StepsOfUnitImages(TotalVariation):
        complex_edge = 1.0

    size = 32
    x = random_phase(0.2 + ellipse_phantom(size, make_generator(0, "head"))[0], make_generator(0, "p"))[None]
    x = x / magnitude(x).flatten().quantile(0.99)  # the scale of measurements
    mask = RandomLines(2, 0.32)((size, size), make_generator(0, "mask"))
    operator = CartesianMRI(size, mask, simulated_maps(3, (size, size), make_generator(0, "coils")))
    y = operator(x)
    knobs = {"weight": 3e-3, "noise_weight": 0.0, "num_iterations": 300, "bounds": WIDE}
    own, other = (kind(**knobs)(y, operator) for kind in (TotalVariation, StepsOfUnitImages))
    assert own.stats["relative_gap"][0] <= 1e-3 and other.stats["relative_gap"][0] > 1e-2
    objectives = [
        (operator(e.mean) - y).square().sum() / 2 + 3e-3 * total_variation(e.mean, True) for e in (own, other)
    ]
    assert objectives[0] <= 1.001 * objectives[1]
