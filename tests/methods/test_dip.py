"""The network as the unknown: a linear network has a closed form, and no rule or case may see what it must not."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from invrecon.errors import InputError
from invrecon.methods.classical import FBP
from invrecon.methods.dip import (
    DIP,
    AllIterations,
    ASeqDIP,
    DIPUNet,
    DiscrepancyStop,
    FittedNetwork,
    HeldOutStop,
    Purification,
    ReferenceDIP,
    SelfGuidedDIP,
    UDiGDIP,
    WindowedVariance,
    WindowedVarianceStop,
)
from invrecon.methods.dip.measurement import CaseData
from invrecon.methods.start import EstimateStart, GivenStart, Start
from invrecon.methods.transitions import DDIM, Langevin
from invrecon.operators import CartesianMRI, Identity, LinearOperator, ParallelBeamCT
from invrecon.priors.analytic import GaussianPrior
from invrecon.priors.base import Prior
from invrecon.priors.edm import EDMDenoiser
from invrecon.priors.patch import PatchPrior, WholePrior
from invrecon.priors.unet import UNet
from tests.methods.toy import generators
from tests.priors.foreign import import_complex_prior

SIZE = 16
TINY = DIPUNet([4, 8])


class OneConvolution(FittedNetwork):
    """A linear network: `f(z) = k * z`."""

    def module(self, in_channels: int, out_channels: int) -> nn.Module:
        """Returns a 3 x 3 convolution."""
        return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)


class AsItIs(Start):
    """An image, without a draw."""

    def __init__(self, image: Tensor) -> None:
        self.image = image

    def __call__(self, *arguments: object) -> Tensor:
        """Returns it."""
        return self.image


def blob(num: int = 1, channels: int = 1) -> Tensor:
    axis = torch.linspace(-1, 1, SIZE, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    images = [(-((x - 0.2 * b) ** 2 + (y + 0.1 * c) ** 2) / 0.2).exp() for b in range(num) for c in range(channels)]
    return torch.stack(images).reshape(num, channels, SIZE, SIZE)


def ct(num_views: int = 10) -> LinearOperator:
    return ParallelBeamCT(SIZE, num_views=num_views, num_bins=20).double()


def mri(num: int = 1) -> CartesianMRI:
    """Two coils; every case with maps and a mask of columns of its own, among them the four in the centre."""
    columns, ramp = torch.arange(SIZE), torch.linspace(0.2, 0.9, SIZE).expand(SIZE, SIZE)
    operator, masks, maps = CartesianMRI(SIZE).double(), [], []
    for b in range(num):
        masks.append(((columns % 3 == b) | ((columns - 7.5).abs() < 2)).float()[None])
        first = ramp if b else ramp.mT
        coils = torch.stack([first, (1 - first**2).sqrt()])
        maps.append(torch.stack([0.8 * coils, 0.6 * coils], dim=-1).double() * (1 - 1e-6))
    operator._set_maps(torch.stack(maps))
    operator._set_mask(torch.stack(masks))
    return operator


def measured(operator: LinearOperator, x: Tensor, noise: float = 0.02, seed: int = 3) -> Tensor:
    clean = operator(x)
    draw = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed), dtype=clean.dtype)
    return clean + noise * draw * (operator(torch.randn_like(x)) != 0)  # none where nothing is measured


def case_data(y: Tensor, operator: LinearOperator, seed: int, stop: HeldOutStop | None = None) -> CaseData:
    return CaseData(y, operator, AllIterations() if stop is None else stop, torch.Generator().manual_seed(seed))


# what a fit sees


@pytest.mark.parametrize("fraction", [0.2, 0.5])
def test_the_first_image_is_as_bright_as_the_object_whatever_is_held_out(fraction: float) -> None:
    x, operator = blob(), ct(40)
    data = case_data(operator(x), operator, 1, HeldOutStop(fraction))
    assert float(data.held_out.sum() / (data.held_out | data.seen).sum()) == pytest.approx(fraction, abs=0.03)
    assert float(data.baseline.sum() / x.sum()) == pytest.approx(1, abs=0.08)
    residual = data.fitted_operator(data.baseline) - data.fitted_y
    assert float((residual * data.fitted_operator(data.baseline)).sum()) == pytest.approx(0, abs=1e-9), "least squares"


# the fit


@pytest.mark.parametrize("per_ray", [False, True])
def test_a_linear_network_finds_the_least_squares_image_of_its_range(per_ray: bool) -> None:
    operator, seed = ct(), 5
    y = measured(operator, blob(), noise=0.3)
    weights = torch.ones_like(y)
    if per_ray:
        operator.noise_std = torch.linspace(0.1, 0.5, 10, dtype=torch.float64)[:, None].expand(y.shape)
        weights = 0.1 / operator.noise_std
    method = DIP(1, OneConvolution(), num_iterations=200, learning_rate=0.1, stop=AllIterations())
    x = method(y, operator, generators=[torch.Generator().manual_seed(seed)]).mean

    z = torch.randn(1, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis = nnf.conv2d(z, torch.eye(9, dtype=torch.float64).reshape(9, 1, 3, 3), padding=1).movedim(1, 0)
    columns = (weights * operator(basis)).flatten(1).T
    kernel = torch.linalg.lstsq(columns, (weights * y).flatten()[:, None]).solution.flatten()
    expected = torch.einsum("k,kchw->chw", kernel, basis)[None]
    torch.testing.assert_close(x, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("weight", [0.05, 0.5])
def test_the_autoencoding_term_is_a_ridge_towards_the_input(weight: float) -> None:
    operator = ct()
    y = measured(operator, blob(), noise=0.3)
    z = torch.randn(1, 1, SIZE, SIZE, generator=generators(1)[0], dtype=torch.float64)
    method = ASeqDIP(weight, 1000, GivenStart(z, noise=0), OneConvolution(), 200, 0.1, AllIterations())
    x = method(y, operator, generators=generators(1)).mean
    basis = nnf.conv2d(z, torch.eye(9, dtype=torch.float64).reshape(9, 1, 3, 3), padding=1).movedim(1, 0)
    ridge = weight**0.5 * operator.norm()
    columns = torch.cat([operator(basis).flatten(1), ridge * basis.flatten(1)], dim=1).T
    kernel = torch.linalg.lstsq(columns, torch.cat([y.flatten(), ridge * z.flatten()])[:, None]).solution.flatten()
    expected = torch.einsum("k,kchw->chw", kernel, basis)[None]
    torch.testing.assert_close(x, expected, atol=1e-4, rtol=0)


def test_a_sequence_is_the_two_line_algorithm() -> None:
    operator, y = Identity((SIZE, SIZE)).double(), blob()
    seen: list[Tensor] = []
    method = ASeqDIP(0.7, 3, None, OneConvolution(), 7, 0.1, AllIterations())
    method(y, operator, generators=generators(1), on_iterate=lambda it: seen.append(it.image))

    data = case_data(y, operator, 0)
    network = OneConvolution().build(1, (1, SIZE, SIZE), generators(1)[0], y)
    optimiser, z = torch.optim.Adam(network.parameters(), lr=0.1), y
    for k in range(7):
        if k in (3, 6):
            z = (data.scale * network(z / data.scale)).detach()
        x = data.scale * network(z / data.scale)
        torch.testing.assert_close(seen[k], x.detach(), atol=1e-12, rtol=1e-12)
        loss = ((x - y).square().sum() + 0.7 * (x - z).square().sum()) / y.square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


@pytest.mark.parametrize("factor", [4.0, 0.125])
@pytest.mark.parametrize("method", [DIP, ASeqDIP, SelfGuidedDIP])
def test_units_do_not_matter(method: type, factor: float) -> None:
    operator, y = ct(), measured(ct(), blob())
    fit = method(network=TINY, num_iterations=6)
    x = fit(y, operator, generators=generators(1)).mean
    assert torch.equal(fit(factor * y, operator, generators=generators(1)).mean, factor * x)
    x, scaled = (fit(c * y, c * operator, generators=generators(1)).mean for c in (1.0, 2 * factor))
    torch.testing.assert_close(scaled, x, atol=1e-6, rtol=1e-6)


def test_the_average_explains_what_it_is_said_to() -> None:
    operator, y, outputs = ct(), measured(ct(), blob()), []
    fit = DIP(4, TINY, 15, 1e-2, AllIterations())
    fit(y, operator, generators=generators(1), on_iterate=lambda it: outputs.append(it.image))
    average, misfits = [], []
    fit.averaging = 0.9
    fit(
        y,
        operator,
        generators=generators(1),
        on_iterate=lambda it: (average.append(it.image), misfits.append(it.misfit)),
    )
    expected = outputs[0]
    for k, x in enumerate(outputs[1:], start=2):
        expected = expected + max(0.1, 1 / k) * (x - expected)
    torch.testing.assert_close(average[-1], expected)
    torch.testing.assert_close(average[9], torch.stack(outputs[:10]).mean(0))
    assert misfits[-1] == pytest.approx(float((operator(average[-1]) - y).square().sum() / y.square().sum()), rel=1e-9)


def test_a_learned_input_moves_and_guides_itself() -> None:
    operator, y = ct(), measured(ct(), blob())
    still = SelfGuidedDIP(weight=0.0, noise=0.0, input_learning_rate=1e-12, network=TINY, num_iterations=16)
    moving = SelfGuidedDIP(weight=0.0, noise=0.0, input_learning_rate=3e-2, network=TINY, num_iterations=16)
    a, b = (fit(y, operator, generators=generators(1)) for fit in (still, moving))
    assert b.curves[0].misfit[-1] < a.curves[0].misfit[-1]  # two unknowns explain more than one


def test_a_reference_is_what_the_network_starts_from() -> None:
    operator, truth = ct(), blob()
    y = measured(operator, truth)
    given = ReferenceDIP(GivenStart(truth, noise=0), TINY, 3)(y, operator, generators=generators(1)).mean
    asked = ReferenceDIP(EstimateStart(FBP(clip=None)), TINY, 3)(y, operator, generators=generators(1)).mean
    default = ReferenceDIP(None, TINY, 3)(y, operator, generators=generators(1)).mean
    first = case_data(y, operator, generators(1)[0].initial_seed(), HeldOutStop()).baseline
    again = ReferenceDIP(AsItIs(first), TINY, 3)(y, operator, generators=generators(1)).mean
    assert torch.equal(default, again) and torch.equal(default, asked)
    assert not torch.equal(given, asked)


# when to stop


def test_discrepancy_stops_at_the_first_iterate_that_explains_the_data() -> None:
    operator = Identity((SIZE, SIZE)).double()
    y = measured(operator, blob(), noise=0.1)
    operator.noise_std = torch.tensor([0.1], dtype=torch.float64)
    fit = DIP(8, DIPUNet([8, 8]), 400, 1e-2, DiscrepancyStop())
    estimate = fit(y, operator, generators=generators(1))
    value = estimate.curves[0].value
    assert len(value) < 400 and value[-1] <= 1 < min(value[:-1])
    assert value[-1] == pytest.approx(float((estimate.mean - y).square().mean()) / 0.1**2)
    assert value[-1] > 0.8  # no jump into the noise
    assert estimate.stats["kept_iteration"] == [len(value)]
    assert float((estimate.mean - blob()).square().mean()) < 0.5 * 0.1**2  # and it has denoised


def test_the_discrepancy_counts_only_what_was_measured() -> None:
    operator = mri()
    y = measured(operator, blob(1, 2), noise=0.05) + 7 * (operator(torch.randn(1, 2, SIZE, SIZE).double()) == 0)
    operator.noise_std = torch.tensor([0.05], dtype=torch.float64)
    data = case_data(y, operator, 0)
    assert int(data.seen.sum()) == int(operator.mask.sum()) * SIZE * 2 * 2  # rows, coils, real and imaginary
    monitor = DiscrepancyStop().monitor(data)
    monitor(1, blob(1, 2), operator(blob(1, 2)) - data.y)
    assert monitor.value == pytest.approx(1.0, abs=0.15)


def test_the_running_variance_is_that_of_its_definition() -> None:
    window, monitor = 7, WindowedVariance(7, patience=1000)
    images = 5 + torch.randn(60, 1, 1, 6, 6, generator=torch.Generator().manual_seed(0)).cumsum(0)
    least, kept = float("inf"), 0
    for t, x in enumerate(images, start=1):
        monitor(t, x, x)
        if t < window:
            assert monitor.value != monitor.value
            continue
        part = images[t - window : t].double()
        expected = float((part - part.mean(0)).square().flatten(1).sum(1).mean())
        assert monitor.value == pytest.approx(expected, rel=1e-9)
        if expected < least:
            least, kept = expected, t
    assert monitor.iteration == kept and torch.equal(monitor.image, images[kept - 1])


def test_patience_counts_from_the_least_value() -> None:
    monitor = WindowedVariance(2, patience=3)
    ends = [monitor(t, torch.full((1, 1, 1, 1), x), torch.zeros(1)) for t, x in enumerate([0.0, 4, 5, 7, 9, 12], 1)]
    assert ends == [False, False, False, False, False, True] and monitor.iteration == 3


@pytest.mark.parametrize("physics", ["ct", "mri"])
@pytest.mark.parametrize("method", [DIP, ReferenceDIP, SelfGuidedDIP, ASeqDIP])
def test_the_fit_never_sees_what_is_held_out(method: type, physics: str) -> None:
    operator, truth = (ct(), blob()) if physics == "ct" else (mri(), blob(1, 2))
    y, stop = measured(operator, truth), HeldOutStop(0.2, patience=100)
    data = case_data(y, operator, 4, stop)
    assert 0 < int(data.held_out.sum()) < int(data.seen.sum()) and not (data.held_out & data.seen).any()
    spoilt = torch.where(data.held_out, 50.0, y)
    runs = []
    for measurement in (y, spoilt):
        images: list[Tensor] = []
        fit = method(network=TINY, num_iterations=8, stop=stop)
        estimate = fit(
            measurement, operator, generators=generators(5)[4:], on_iterate=lambda it, to=images: to.append(it.image)
        )
        runs.append((images, estimate.curves[0]))
    # generators(5)[4] is seeded by 4
    assert all(torch.equal(a, b) for a, b in zip(runs[0][0], runs[1][0], strict=True))
    assert runs[0][1].misfit == runs[1][1].misfit and runs[0][1].value != runs[1][1].value


# one case at a time


@pytest.mark.parametrize("method", [DIP, SelfGuidedDIP, UDiGDIP])
def test_a_case_does_not_depend_on_its_batch(method: type) -> None:
    operator, truth = mri(2), blob(2, 2)
    operator.noise_std = torch.tensor([0.02, 0.05], dtype=torch.float64)
    y, prior = measured(operator, truth), gaussian(2)
    more = {"num_inner": 4, "purification": Purification(num_levels=2)} if method is UDiGDIP else {}
    fit = method(network=TINY, num_iterations=9, stop=DiscrepancyStop(), **more)
    both = fit(y, operator, prior, generators=generators(2))
    for b in range(2):
        own = mri(2)
        own._set_mask(operator.mask[b, 0][None])
        own._set_maps(operator.maps[b])
        own.noise_std = operator.noise_std[b : b + 1]
        alone = fit(y[b : b + 1], own, prior, generators=generators(2)[b : b + 1])
        assert torch.equal(alone.mean[0], both.mean[b])
        assert alone.curves[0] == both.curves[b]
        assert alone.stats["num_operator_calls"] == [both.stats["num_operator_calls"][b]]


def test_the_same_seed_gives_the_same_image_and_the_global_generator_is_left_alone() -> None:
    operator, y, prior = ct(), measured(ct(), blob()), gaussian(1)
    before = {name: value.clone() for name, value in prior.state_dict().items()}
    fit = UDiGDIP(Purification(num_levels=2), num_inner=3, network=TINY, num_iterations=8)
    state = torch.get_rng_state()
    a, b, c = (fit(y, operator, prior, generators=generators(1, seed)).mean for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert all(torch.equal(value, before[name]) for name, value in prior.state_dict().items())
    assert not a.requires_grad


def test_it_works_where_gradients_are_off() -> None:
    operator, y = ct(), measured(ct(), blob())
    fit = DIP(4, TINY, 20, 1e-2)
    with torch.no_grad():
        curve = fit(y, operator, generators=generators(1)).curves[0]
    assert curve.misfit[-1] < 0.5 * curve.misfit[0]


# purification


def gaussian(channels: int, variance: float = 0.04, mean: float = 0.3) -> GaussianPrior:
    n = channels * SIZE**2
    return GaussianPrior(
        torch.full((channels, SIZE, SIZE), mean, dtype=torch.float64), variance * torch.eye(n, dtype=torch.float64)
    )


@pytest.mark.parametrize("num_levels", [1, 4])
def test_purification_moves_towards_the_mean_by_the_known_factor(num_levels: int) -> None:
    # For N(mu, c I) a deterministic step is x' - mu = (g + (sigma'/sigma)(1 - g)) (x - mu), g = c / (c + sigma^2).
    variance, sigma, x = 0.04, 0.3, blob()
    purify = Purification(sigma_max=0.5, sigma_min=0.1, num_levels=num_levels, sigma_end=0.05, transition=DDIM(0.0))
    z = purify(x, sigma, gaussian(1, variance), generators(1))
    noise = torch.randn(1, SIZE, SIZE, generator=generators(1)[0], dtype=torch.float64)
    rho = torch.linspace(sigma ** (1 / 7), 0.05 ** (1 / 7), num_levels, dtype=torch.float64)
    levels, factor = [*(rho**7).tolist(), 0.0], 1.0
    for here, there in pairwise(levels):
        gain = variance / (variance + here**2)
        factor *= gain + there / here * (1 - gain)
    torch.testing.assert_close(z, 0.3 + factor * (x + sigma * noise - 0.3))
    assert factor < 0.8


def test_purification_levels_fall_and_are_counted() -> None:
    operator, y = ct(), measured(ct(), blob())
    purification = Purification(sigma_max=0.4, sigma_min=0.1, num_levels=3)
    assert purification.sigmas(3) == pytest.approx([0.4, 0.2, 0.1])
    fit = UDiGDIP(purification, num_inner=5, network=TINY, num_iterations=16, stop=AllIterations())
    estimate = fit(y, operator, gaussian(1), generators=generators(1))
    assert estimate.stats["num_evaluations"] == [9.0] and fit.num_evaluations == 9  # before iterations 6, 11 and 16


@pytest.mark.parametrize("kind", ["patch", "whole", "imported"])
def test_a_complex_network_prior_guides_multicoil_mri(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    denoiser = EDMDenoiser(UNet(image_channels=2, base_channels=8, multipliers=(1, 2)), sigma_data=0.3).double()
    prior: Prior = PatchPrior(denoiser, 8) if kind == "patch" else WholePrior(denoiser)
    prior = import_complex_prior(tmp_path).double() if kind == "imported" else prior
    before = {name: value.clone() for name, value in prior.state_dict().items()}
    operator = mri()
    y = measured(operator, blob(1, 2))
    fit = UDiGDIP(Purification(num_levels=2), num_inner=4, network=TINY, num_iterations=9)
    estimate = fit(y, operator, prior, generators=generators(1))
    assert estimate.mean.shape == (1, 2, SIZE, SIZE) and torch.isfinite(estimate.mean).all()
    assert estimate.stats["num_evaluations"] == [4.0]
    assert all(torch.equal(value, before[name]) for name, value in prior.state_dict().items())
    with pytest.raises(InputError, match="2 channels, the operator's have 1"):
        fit(measured(ct(), blob()), ct(), prior)


def test_the_prior_fills_in_what_was_not_measured() -> None:
    # Half of the pixels, a prior that knows the image to 0.01: the fit takes the rest from the prior.
    from invrecon.operators import RandomInpainting

    operator, truth = RandomInpainting(SIZE, 0.7).double(), blob()
    y = measured(operator, truth, noise=0.0)
    covariance = 1e-4 * torch.eye(SIZE**2, dtype=torch.float64)
    prior = GaussianPrior(truth[0], covariance)
    common = dict(network=DIPUNet([4, 8]), num_iterations=50, learning_rate=1e-2, stop=AllIterations())
    errors = []
    for method in (DIP(8, **common), UDiGDIP(Purification(num_levels=1), 1.0, 10, **common)):
        x = method(y, operator, prior, generators=generators(1)).mean
        errors.append(float((x - truth).square().mean()))
    assert errors[1] < 0.7 * errors[0]


# refusals


def test_refusals_say_what_to_do() -> None:
    operator, y = ct(), measured(ct(), blob())
    complex_y = measured(mri(), blob(1, 2))
    with pytest.raises(InputError, match="without noise_std"):
        DIP(network=TINY, stop=DiscrepancyStop())(y, operator)
    with pytest.raises(InputError, match="needs at least two of them, got 1"):
        DIP(network=TINY)(measured(ct(1), blob()), ct(1))
    with pytest.raises(InputError, match="set clip to null"):
        DIP(network=TINY, clip=(0.0, 1.0))(complex_y, mri())
    with pytest.raises(InputError, match="needs a prior"):
        UDiGDIP(network=TINY)(y, operator)
    with pytest.raises(InputError, match="2 channels"):
        UDiGDIP(network=TINY, num_inner=1, num_iterations=2)(y, operator, gaussian(2))
    with pytest.raises(InputError, match="one finite image"):
        ReferenceDIP(GivenStart(blob(2)), TINY)(y, operator)
    with pytest.raises(InputError, match="at least 32 pixels"):
        DIP(network=DIPUNet([4] * 5))(y, operator)
    with pytest.raises(InputError, match="lower learning_rate"):
        DIP(1, OneConvolution(init_std=1e200), num_iterations=3)(y, operator)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: DIP(num_iterations=0), "num_iterations >= 1"),
        (lambda: DIP(learning_rate=0.0), "learning_rate > 0"),
        (lambda: DIP(averaging=1.0), "averaging < 1"),
        (lambda: DIP(input_channels=0), "input_channels"),
        (lambda: DIPUNet([]), "at least one level"),
        (lambda: DIPUNet(init_std=0.0), "init_std"),
        (lambda: ASeqDIP(num_inner=0), "num_inner >= 1"),
        (lambda: SelfGuidedDIP(num_noises=0), "num_noises >= 1"),
        (lambda: HeldOutStop(0.6), "fraction <= 0.5"),
        (lambda: DiscrepancyStop(0.0), "above 0"),
        (lambda: WindowedVarianceStop(1), "window >= 2"),
        (lambda: Purification(sigma_max=0.1, sigma_min=0.2), "sigma_max"),
        (lambda: Purification(sigma_min=0.001), "sigma_end <= sigma_min"),
        (lambda: Purification(transition=Langevin()), "comes down"),
    ],
)
def test_knobs_out_of_range(make: object, match: str) -> None:
    with pytest.raises(InputError, match=match):
        make()  # type: ignore[operator]
