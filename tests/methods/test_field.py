"""The methods of the field against posteriors in closed form, and what every method with a prior promises.

A method enters by being a file of `invrecon/methods`: any class that needs a prior and can be made without arguments.
It is held to `ORDINARY`, unless a line in `BANDS` says what is known of it.
"""

import inspect
from dataclasses import dataclass, field

import pytest
import torch

import invrecon.methods
from invrecon.discovery import needs_arguments
from invrecon.errors import InputError
from invrecon.methods import Method, NoiseStart, UnconditionalSampler
from invrecon.methods.dip import NetworkFit
from invrecon.operators.spectral import Spectrum
from invrecon.priors.analytic import GaussianMixturePrior, GaussianPrior
from invrecon.rng import make_generators
from tests.methods.toy import SHAPE, DenseOperator, generators, make_toy

NUM = 200  # samples; the standard error of a variance ratio is about 0.07


class DenseSpectrum(Spectrum):
    """The singular value decomposition of a matrix."""

    def __init__(self, matrix, image_shape, measurement_shape):
        self.left, values, self.right = torch.linalg.svd(matrix)
        padded = values.new_zeros(matrix.shape[1])
        padded[: len(values)] = values
        super().__init__(padded, image_shape, measurement_shape)

    def to_spectrum(self, x):
        # One product a sample: the rounding, too, does not depend on the batch.
        return torch.bmm(self.right.expand(len(x), -1, -1), x.flatten(1)[..., None])[..., 0]

    def to_image(self, c):
        basis = self.right.mT.expand(len(c), -1, -1)
        return torch.bmm(basis, c[..., None]).reshape(-1, *self.image_shape)

    def _project(self, y):
        c = torch.bmm(self.left.mT.expand(len(y), -1, -1), y.flatten(1)[..., None])[..., 0]
        return torch.nn.functional.pad(c, (0, len(self.singular_values) - c.shape[1]))

    def _expand(self, c):
        return (c[:, : len(self.left)] @ self.left.mT).reshape(-1, *self.measurement_shape)


class SpectralDense(DenseOperator):
    def spectrum(self):
        return DenseSpectrum(self.matrix, self.image_shape, self.measurement_shape)


def spectral(operator):
    return SpectralDense(operator.matrix, operator.image_shape, operator.noise_std)


@dataclass
class Band:
    """What is expected of a method on the Gaussian toy.

    Where a reference is given, it is that of another implementation on a problem of the same kind (12 unknowns, 6 data,
    the same spectra); the other numbers lie round what was measured, with the reason beside them.

    Attributes:
        error: Largest relative error of the mean.
        measured: Range of the variance of the samples over that of the posterior, in the measured subspace.
        null: The same in the null space.
        exact: Largest relative residual where data have no noise.
        knobs: Arguments that keep the run short.
        scale_free: Whether the defaults carry over to an operator of another scale.
    """

    error: float
    measured: tuple[float, float]
    null: tuple[float, float]
    exact: float = 0.01
    knobs: dict = field(default_factory=dict)
    scale_free: bool = True


CLOSE = dict(num_levels=60, sigma_min=0.1)  # a floor low enough for this prior, reached after 44 iterations
BANDS = {
    # Reference (20 and 100 levels): error .19 and .12, variances .31 and .11 measured, .64 and .74 in the null space.
    "DDRM": Band(0.2, (0.2, 0.45), (0.55, 0.9)),
    "DDNMPlus": Band(0.15, (0.08, 0.3), (0.65, 0.95)),
    # Reference for prox with r = sigma: .086, .72, .75, with more fresh noise (zeta = .85^2, here .25).
    "DiffPIR": Band(0.12, (0.65, 1.05), (0.75, 1.1)),
    # Reference with prior_std = 1, the prior's own: .20, .04, .77. An image known to .1 trusts the data less.
    "DDS": Band(0.2, (0.5, 0.9), (0.55, 0.9)),
    # Without a weight for each singular value the data, noise and all, fix the measured subspace.
    "DDNM": Band(0.12, (0.0, 0.05), (0.6, 0.95)),
    # Half of the Langevin noise: a quarter of the variance, and what D and the last levels add.
    "VEDDNM": Band(0.12, (0.0, 0.08), (0.2, 0.55), knobs=dict(num_levels=200, epsilon=0.5)),
    "DDNMFBP": Band(0.12, (0.0, 0.08), (0.2, 0.55), knobs=dict(num_levels=200, epsilon=0.5)),
    # Reference for eta = 1: .013, .49, .49.
    "PiGDM": Band(0.08, (0.35, 0.65), (0.35, 0.65)),
    # Reference for zeta of .03 to .3: error .18 to .28, variances .04 to .41 and .93 to 1.07. The two-cycle is left at
    # a distance of zeta / 2 or so, which is the residual without noise.
    "DPS": Band(0.2, (0.0, 0.41), (0.85, 1.2), exact=0.15, knobs=dict(num_levels=300)),
    # Gradient steps: the small singular values converge slowly, hence the residual without noise. That the state may
    # come from other images than D is left out of the likelihood, which is so too narrow at high levels.
    "DPSNormalised": Band(0.12, (0.4, 0.8), (0.85, 1.2), exact=0.04, knobs=dict(num_levels=300)),
    # Reference (200 levels, exact step): .067, 1.03, 1.6 to 1.7: too much spread in the null space.
    "DAPSExact": Band(0.12, (0.8, 1.25), (1.25, 1.9), knobs=dict(num_levels=50)),
    # A few Langevin steps do not reach all of the null space, which so keeps the spread of the flow's end.
    "DAPS": Band(0.12, (0.8, 1.45), (1.1, 1.8), knobs=dict(num_levels=50, num_steps=30, step=0.5)),
    # Reference with exact draws of the prior: .020, 1.00, 1.02. Ten Euler steps of the reverse SDE add to the spread.
    "PnPDM": Band(0.12, (0.85, 1.25), (0.85, 1.25), knobs=CLOSE),
    # Langevin steps with epsilon = .5 overdisperse by up to 1 / (1 - .5 / 4) = 1.14; half the levels add to it.
    "LangevinDirect": Band(0.12, (0.9, 1.45), (0.9, 1.4), knobs=dict(num_levels=50, num_inner=8)),
    # The corrector's step follows from ||s||, which for a prior of full rank does not grow as 1 / sigma: here it is
    # about 2 r^2 times the prior's variance at all low levels, and warms the state. On images it is 2 r^2 sigma^2.
    "PredictorCorrector": Band(0.2, (1.5, 4.5), (1.0, 1.8), exact=0.25),
    # Linear in the ratio, it is larger still.
    "PaDISPredictorCorrector": Band(0.4, (3.5, 12.0), (1.0, 2.0), exact=0.5),
    # One image however often it is drawn: what is left is Adam's jitter.
    "REDDiff": Band(0.12, (0.0, 0.1), (0.0, 0.2), exact=0.04, knobs=dict(num_levels=300)),
    # See test_posterior.py for these, at their full length and with other transitions. Two of them have steps in the
    # units of the operator, and residuals that do not shrink below them.
    "ProximalDiffusion": Band(0.06, (0.0, 0.2), (0.03, 0.2), knobs=dict(sigma_max=20.0, start=NoiseStart())),
    "PaDISPaper": Band(0.2, (0.0, 0.5), (0.85, 1.4), 0.4, dict(num_levels=50, num_inner=5), scale_free=False),
    "PaDISRepo": Band(0.2, (0.0, 0.25), (0.85, 1.5), 0.2, dict(num_levels=50, num_inner=5), scale_free=False),
    # As LangevinDirect.
    "PaDISNormalised": Band(0.1, (0.9, 1.45), (0.85, 1.4), knobs=dict(num_levels=50, num_inner=5)),
    # A fixed point, and so no spread: the posterior's mean at any level, and a high one is fast here.
    "PnPADMM": Band(0.01, (0.0, 0.01), (0.0, 0.01), knobs=dict(sigma=1.0)),
    "AnnealedPnPADMM": Band(
        *(0.01, (0.0, 0.01), (0.0, 0.01)),
        knobs=dict(sigma_min=1.0, sigma_max=2.0, num_levels=100, noise_factor=1.0),
    ),
    # The same of a prior that is blurred by sigma.
    "RED": Band(0.05, (0.0, 0.01), (0.0, 0.01), knobs=dict(sigma=0.3)),
}
# What any method owes, with its defaults. The prior's mean alone has an error of .49, the pseudo-inverse alone of .54:
# a method that uses both halves that. Estimates may have no spread, samples not twice the posterior's variance. (Of the
# methods above two are worse, and they say why.) Data without noise are met to a tenth.
ORDINARY = Band(0.24, (0.0, 2.0), (0.0, 2.0), exact=0.1)


def is_entrant(value):
    if not inspect.isclass(value) or inspect.isabstract(value):
        return False
    return issubclass(value, Method) and value.needs_prior and not needs_arguments(value)


# Of these one does not look at the data, and others fit networks, to which twelve pixels are no image (test_dip.py).
NOT_OF_THE_TOY = (UnconditionalSampler, NetworkFit)
ENTRANTS = {
    name: value
    for name in invrecon.methods.__all__
    if is_entrant(value := getattr(invrecon.methods, name)) and not issubclass(value, NOT_OF_THE_TOY)
}
SMALL = dict(num_levels=3, num_inner=2, num_ode=2, num_steps=3, num_prior=2, num_iterations=3)
"""Knobs that make a run of any method tiny, where it has them."""


def make(cls, **knobs):
    known = inspect.signature(cls).parameters
    return cls(**{name: value for name, value in {"clip": None, **knobs}.items() if name in known})


def small(cls):
    return make(cls, **SMALL)


def draw(cls, y, operator, prior, **knobs):
    """`NUM` results of a method for one measurement: its samples, or its estimates with different seeds."""
    if "num_samples" in inspect.signature(cls).parameters:
        method = make(cls, num_samples=NUM, **knobs)
        return method(y, operator, prior, generators=generators(1)).samples[0]
    return make(cls, **knobs)(y.expand(NUM, *y.shape[1:]), operator, prior, generators=generators(NUM)).mean


@pytest.fixture(params=ENTRANTS)
def entrant(request):
    return ENTRANTS[request.param]


def band_of(name):
    return BANDS.get(name, ORDINARY)


def test_bands_are_of_methods_that_there_are():
    assert not set(BANDS) - set(ENTRANTS)


def test_neither_prior_nor_data_alone_are_enough():
    toy = make_toy()
    mean = toy.prior.mean.expand(2, *SHAPE)
    inverse = toy.operator.pinv(toy.y).expand(2, *SHAPE)
    for estimate in (mean, inverse):
        assert toy.ratios(estimate)[0] > 2 * ORDINARY.error


@pytest.mark.parametrize("name", ENTRANTS)
def test_against_the_closed_form(name):
    band, toy = band_of(name), make_toy()
    samples = draw(ENTRANTS[name], toy.y, spectral(toy.operator), toy.prior, **band.knobs)
    error, measured, null = toy.ratios(samples)
    print(f"{name}: mean error {error:.3f}, variance ratio {measured:.3f} measured, {null:.3f} null space")
    assert error < band.error
    assert band.measured[0] <= measured <= band.measured[1]
    assert band.null[0] <= null <= band.null[1]


@pytest.mark.parametrize("name", ENTRANTS)
def test_exact_data_are_met(name):
    band, toy = band_of(name), make_toy(noise_std=0)
    operator = spectral(toy.operator)
    knobs = {"num_samples": 20, **band.knobs}
    estimate = make(ENTRANTS[name], **knobs)(toy.y, operator, toy.prior, generators=generators(1))
    samples = estimate.mean if estimate.samples is None else estimate.samples[0]
    residual = (operator(samples) - toy.y).flatten(1).norm(dim=1) / toy.y.norm()
    print(f"{name}: largest relative residual {float(residual.max()):.1e}")
    assert samples.isfinite().all()
    assert residual.max() < band.exact


@pytest.mark.parametrize(
    ("name", "most", "knobs"),
    [
        ("DPSNormalised", 0.15, {}),
        ("PaDISNormalised", 0.15, {}),
        ("REDDiff", 0.35, {}),
        ("REDDiff", 0.15, {"weight": 1}),
    ],
)
def test_noise_as_large_as_the_data_is_not_fitted(name, most, knobs):
    """Steps down the data's misfit count by its likelihood: fitted to the end, the mean would be off by its length."""
    toy = make_toy(noise_std=1.0)
    samples = draw(ENTRANTS[name], toy.y, toy.operator, toy.prior, **band_of(name).knobs, **knobs)
    error = toy.ratios(samples)[0]
    print(f"{name}: mean error {error:.3f}")
    assert error < most


def test_a_guidance_follows_the_levels_that_are_run():
    toy = make_toy(noise_std=0.5)
    made, changed = (make(ENTRANTS["DPSNormalised"], num_levels=20, sigma_max=sigma) for sigma in (5.0, 10.0))
    changed.schedule.sigma_max = 5.0
    results = [method(toy.y, toy.operator, toy.prior, generators=generators(1)).mean for method in (made, changed)]
    assert torch.equal(*results)


SAMPLERS = [name for name, cls in ENTRANTS.items() if cls.samples_posterior]


@pytest.mark.parametrize("name", SAMPLERS)
def test_modes_are_visited_by_their_weight(name):
    """Two modes; the data, of which one entry sees them dimly, turn prior odds of 1 to 3 into even ones."""
    means = torch.zeros(2, *SHAPE, dtype=torch.float64)
    means[0, 0, 0, 0], means[1, 0, 0, 0] = 2.0, -2.0
    covariance = (0.1 * torch.eye(12, dtype=torch.float64)).expand(2, -1, -1)
    weights = torch.tensor([0.25, 0.75], dtype=torch.float64)
    prior = GaussianMixturePrior(weights, means, covariance)
    matrix = 0.3 * torch.eye(12, dtype=torch.float64)[:6]
    matrix[0, 0] = 0.1
    operator = SpectralDense(matrix, SHAPE, torch.tensor([0.2], dtype=torch.float64))
    y = torch.tensor([0.1126, 0.1, -0.3, 0.2, 0.0, -0.1], dtype=torch.float64).reshape(1, 1, 1, 6)
    evidence = torch.stack(
        [
            weight.log()
            + torch.distributions.MultivariateNormal(
                matrix @ mean.flatten(), matrix @ spread @ matrix.mT + 0.04 * torch.eye(6, dtype=torch.float64)
            ).log_prob(y.flatten())
            for weight, mean, spread in zip(weights, means, covariance)
        ]
    ).softmax(dim=0)
    pixel = draw(ENTRANTS[name], y, operator, prior, **band_of(name).knobs)[:, 0, 0, 0]
    share = float((pixel > 0).double().mean())
    print(f"{name}: share of the lighter mode {share:.3f}, expected {float(evidence[0]):.3f}")
    assert float(evidence[0]) == pytest.approx(0.5, abs=0.01)
    assert share == pytest.approx(float(evidence[0]), abs=0.11)  # three standard errors
    assert (pixel.abs() - 2).abs().mean() < 0.5


def three_cases():
    toy = make_toy()
    y = toy.operator(toy.prior.sample(generators(3, seed=7)))
    y = y + 0.1 * torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype)
    return toy, y, torch.tensor([0.05, 0.1, 0.2], dtype=torch.float64)


def test_a_case_does_not_depend_on_its_batch(entrant):
    toy, y, std = three_cases()
    keys, order = ["a", "b", "c"], [2, 0, 1]

    def run(index):
        operator = SpectralDense(toy.operator.matrix, SHAPE, std[index])
        return small(entrant)(y[index], operator, toy.prior, generators=make_generators(5, [keys[k] for k in index]))

    together = run([0, 1, 2]).mean
    torch.testing.assert_close(run(order).mean, together[order], atol=1e-9, rtol=0)
    for k in range(3):
        torch.testing.assert_close(run([k]).mean, together[[k]], atol=1e-9, rtol=0)


def test_evaluations_are_as_declared(entrant):
    toy = make_toy()
    tally = {"evaluations": 0, "gradients": 0}

    class Tallying(GaussianPrior):
        def forward(self, x, sigma, *, generators=None):
            tally["evaluations"] += 1
            return super().forward(x, sigma, generators=generators)

        def denoise_vjp(self, x, sigma, cotangent, *, generators=None):
            tally["gradients"] += 1
            return super().denoise_vjp(x, sigma, cotangent, generators=generators)

    toy.prior.__class__ = Tallying
    method = small(entrant)
    estimate = method(toy.y, spectral(toy.operator), toy.prior, generators=generators(1))
    assert estimate.stats["num_evaluations"] == tally["evaluations"] == method.num_evaluations > 0
    assert tally["gradients"] == (tally["evaluations"] if entrant.needs_gradient else 0)


@pytest.mark.parametrize("noise_std", [0.0, 0.1])
def test_the_scale_of_the_operator_does_not_matter(entrant, noise_std):
    if not band_of(entrant.__name__).scale_free:
        pytest.skip("published in the units of one operator")
    outcomes = []
    for scale in (1.0, 37.0):
        toy = make_toy(noise_std, scale)
        method = small(entrant)
        outcomes.append(method(toy.y, spectral(toy.operator), toy.prior, generators=generators(1)).mean)
    torch.testing.assert_close(*outcomes, rtol=1e-5, atol=1e-7)


def test_noise_may_differ_between_rays(entrant):
    toy = make_toy()
    rays = DenseOperator(toy.operator.matrix, SHAPE, toy.operator.noise_std.expand(1, 1, 1, 6))
    if entrant.needs_spectrum:
        rays = spectral(rays)
        with pytest.raises(InputError, match="one noise level"):
            small(entrant)(toy.y, rays, toy.prior)
        return
    one, other = (small(entrant)(toy.y, operator, toy.prior).mean for operator in (toy.operator, rays))
    torch.testing.assert_close(one, other)


def test_what_is_missing_is_named(entrant):
    toy = make_toy()
    with pytest.raises(InputError, match="needs a prior"):
        small(entrant)(toy.y, spectral(toy.operator))
    if entrant.needs_spectrum:
        with pytest.raises(InputError, match=r"DenseOperator has none.*use ProximalDiffusion"):
            small(entrant)(toy.y, toy.operator, toy.prior)


def test_samples_of_a_case_are_spread_over_chunks_as_over_one():
    toy = make_toy()
    for cls in ENTRANTS.values():
        if "samples_per_batch" not in inspect.signature(cls).parameters:
            continue
        runs = [
            make(cls, **SMALL, num_samples=3, samples_per_batch=chunk)(toy.y, spectral(toy.operator), toy.prior)
            for chunk in (None, 2)
        ]
        torch.testing.assert_close(runs[0].samples, runs[1].samples, atol=1e-9, rtol=0)
