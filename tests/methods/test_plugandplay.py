"""Plug-and-play ADMM and RED: for a Gaussian prior the denoiser is linear, and both fixed points are known."""

from itertools import pairwise

import pytest
import torch

from invrecon.errors import InputError
from invrecon.methods import (
    DDIM,
    FBP,
    RED,
    AnnealedPnPADMM,
    DouglasRachford,
    EstimateStart,
    ExactDataSampler,
    GivenStart,
    KarrasSchedule,
    LikelihoodDraw,
    PnPADMM,
    PriorNoise,
    ProximalDiffusion,
    ReflectedConditioning,
    Sampler,
    SpectralTransition,
    StandardCorrection,
    UnconditionalSampler,
)
from invrecon.priors.analytic import GaussianPrior
from invrecon.priors.base import Prior
from invrecon.rng import make_generators, randn
from tests.methods.toy import SHAPE, DenseOperator, generators, make_toy

LONG = dict(num_levels=200, sigma_max=2.0, sigma_min=0.5, cg_iterations=30, clip=None)
CONVERGED = dict(num_iterations=3000, cg_iterations=30, tol=1e-9, clip=None)


def covariance_of(prior):
    return prior.eigenvectors @ torch.diag(prior.eigenvalues) @ prior.eigenvectors.mT


def posterior_mean(toy, covariance, precision):
    """`argmin precision ||A x - y||^2 + (x - mu)^T C^{-1} (x - mu)`."""
    matrix, mu = toy.operator.matrix, toy.prior.mean.flatten()
    right = precision * matrix.mT @ (toy.y.flatten() - matrix @ mu)
    return mu + torch.linalg.solve(precision * matrix.mT @ matrix + torch.linalg.inv(covariance), right)


@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_admm_finds_the_posterior_mean_whatever_the_level(sigma):
    # D = prox of sigma^2 phi, so sigma drops out: sigma^2 C^{-1} (x - mu) = sigma^2 / sigma_y^2 A^T (y - A x).
    toy = make_toy()
    x = PnPADMM(sigma, **CONVERGED)(toy.y, toy.operator, toy.prior).mean
    torch.testing.assert_close(x.flatten(), toy.mean, atol=1e-6, rtol=0)


def test_levels_that_fall_end_at_the_same_fixed_point():
    toy = make_toy()
    x = AnnealedPnPADMM(**LONG, noise_factor=1.0)(toy.y, toy.operator, toy.prior).mean
    torch.testing.assert_close(x.flatten(), toy.mean, atol=2e-4, rtol=0)


def test_the_noise_factor_weighs_the_data():
    toy, factor = make_toy(), 4.0
    x = AnnealedPnPADMM(**LONG, noise_factor=factor)(toy.y, toy.operator, toy.prior).mean
    expected = posterior_mean(toy, covariance_of(toy.prior), factor / 0.1**2)
    torch.testing.assert_close(x.flatten(), expected, atol=2e-4, rtol=0)
    assert (x.flatten() - toy.mean).norm() > 2e-3


def test_relaxation_reaches_the_fixed_point_sooner():
    toy = make_toy()
    knobs = dict(sigma_min=0.5, sigma_max=2.0, num_levels=20, cg_iterations=30, noise_factor=1.0, clip=None)
    errors = [
        (AnnealedPnPADMM(relaxation=r, **knobs)(toy.y, toy.operator, toy.prior).mean.flatten() - toy.mean).norm()
        for r in (1.0, 1.8)
    ]
    assert errors[1] < 0.7 * errors[0]


def test_levels_fall_geometrically_and_then_stay():
    levels = AnnealedPnPADMM(10, 0.16, 0.01).schedule.sigmas
    assert levels[0] == 0.16 and levels[7:] == pytest.approx([0.01] * 3, rel=1e-12)
    assert len(set(levels[7:])) <= 2, "what is at one level is averaged"
    ratios = [b / a for a, b in pairwise(levels[:8])]
    assert ratios == pytest.approx([16 ** (-1 / 7)] * 7)
    assert set(AnnealedPnPADMM(5, 0.1, 0.1).schedule.sigmas) == {0.1}
    with pytest.raises(InputError, match="sigma_max"):
        AnnealedPnPADMM(sigma_max=0.05, sigma_min=0.1)


@pytest.mark.parametrize("relaxation", [0.0, 2.0])
def test_steps_that_do_not_converge_are_refused(relaxation):
    with pytest.raises(InputError, match="above 0 and below 2"):
        AnnealedPnPADMM(relaxation=relaxation)


def test_it_is_admm_and_the_mean_of_its_last_denoised_images():
    toy, num = make_toy(), 9
    method = AnnealedPnPADMM(num, 1.0, 0.3, 30, noise_factor=1.0, relaxation=1.0, clip=None)
    found = method(toy.y, toy.operator, toy.prior).mean
    v, images = EstimateStart(FBP())(toy.y, toy.operator, 1.0, []), []
    for sigma in method.schedule.sigmas:
        z = toy.prior(v, sigma)
        v = v - z + toy.operator.prox(2 * z - v, toy.y, (sigma / 0.1) ** 2, max_iter=30)
        images.append(z)
    levels = method.schedule.sigmas
    last = [z for z, sigma in zip(images, levels) if sigma == levels[-1]]
    assert 1 < len(last) < num
    torch.testing.assert_close(found, sum(last) / len(last), atol=1e-9, rtol=0)


RECONSTRUCTING = [
    DouglasRachford(),
    SpectralTransition(10.0),
    StandardCorrection(0.16, 0.5),
    LikelihoodDraw(ExactDataSampler()),
]


@pytest.mark.parametrize("transition", [*RECONSTRUCTING, PriorNoise(DDIM())], ids=lambda t: type(t).__name__)
def test_a_prior_alone_has_no_data_to_step_to(transition):
    with pytest.raises(InputError, match="without data"):
        UnconditionalSampler(KarrasSchedule(4, 10.0, 0.01), transition)


@pytest.mark.parametrize("transition", RECONSTRUCTING, ids=lambda t: type(t).__name__)
def test_a_step_of_another_estimate_is_refused(transition):
    # The data would count twice, or, for ADMM, the reflection would be missing.
    with pytest.raises(InputError, match=f"{type(transition).__name__} stands after"):
        ProximalDiffusion(transition=transition)


@pytest.mark.parametrize("transition", [DDIM(), PriorNoise(DDIM())])
def test_a_reflection_is_no_estimate_to_diffuse_from(transition):
    with pytest.raises(InputError, match="DDIM stands after ProximalConditioning or Unconditional"):
        Sampler(KarrasSchedule(4, 1.0, 0.01), ReflectedConditioning(), transition)


@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_red_finds_the_posterior_mean_of_the_blurred_prior(sigma):
    # (x - D(x)) / sigma^2 = (C + sigma^2 I)^{-1} (x - mu).
    toy = make_toy()
    x = RED(sigma, **CONVERGED)(toy.y, toy.operator, toy.prior).mean
    blurred = covariance_of(toy.prior) + sigma**2 * torch.eye(12)
    torch.testing.assert_close(x.flatten(), posterior_mean(toy, blurred, 1 / 0.1**2), atol=1e-6, rtol=0)
    assert (x.flatten() - toy.mean).norm() > 1e-3  # the two fixed points do differ


@pytest.mark.parametrize("scale", [1.0, 37.0])
def test_without_noise_the_cap_is_the_weight(scale):
    toy, sigma, cap = make_toy(noise_std=0, scale=scale), 0.5, 20.0
    gamma = cap / toy.operator.norm() ** 2
    covariance = covariance_of(toy.prior)
    for method, spread in ((PnPADMM, covariance), (RED, covariance + sigma**2 * torch.eye(12))):
        x = method(sigma, max_weight=cap, **CONVERGED)(toy.y, toy.operator, toy.prior).mean
        expected = posterior_mean(toy, spread, gamma / sigma**2)
        torch.testing.assert_close(x.flatten(), expected, atol=1e-6, rtol=0)


def test_admm_is_the_three_line_algorithm():
    toy, sigma, num = make_toy(), 0.4, 5
    x = PnPADMM(sigma, num_iterations=num, cg_iterations=30, clip=None)(toy.y, toy.operator, toy.prior).mean
    z, u = EstimateStart(FBP())(toy.y, toy.operator, sigma, []), torch.zeros(1, *SHAPE, dtype=torch.float64)
    z = toy.prior(z, sigma)  # the state starts at x + u, whose image z is
    u = EstimateStart(FBP())(toy.y, toy.operator, sigma, []) - z
    for _ in range(num):
        other = toy.operator.prox(z - u, toy.y, (sigma / 0.1) ** 2, max_iter=30)
        z = toy.prior(other + u, sigma)
        u = u + other - z
    torch.testing.assert_close(x, other, atol=1e-9, rtol=0)


@pytest.mark.parametrize("method", [PnPADMM, RED])
def test_noise_of_each_ray_counts(method):
    toy = make_toy()
    std = torch.linspace(0.05, 0.5, 6, dtype=torch.float64).reshape(1, 1, 1, 6)
    operator = DenseOperator(toy.operator.matrix, SHAPE, std)
    x = method(0.5, **CONVERGED)(toy.y, operator, toy.prior).mean.flatten()
    spread = covariance_of(toy.prior) + (0.25 * torch.eye(12) if method is RED else 0)
    matrix, mu, precision = toy.operator.matrix, toy.prior.mean.flatten(), std.flatten() ** -2
    normal = matrix.mT @ (precision[:, None] * matrix) + torch.linalg.inv(spread)
    expected = mu + torch.linalg.solve(normal, matrix.mT @ (precision * (toy.y.flatten() - matrix @ mu)))
    torch.testing.assert_close(x, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", [PnPADMM, RED])
def test_samples_stop_one_by_one(method):
    toy = make_toy()
    y = torch.cat([toy.y, 0.01 * toy.y, -3 * toy.y])
    std = torch.tensor([0.05, 0.1, 0.5], dtype=torch.float64)
    engine = method(0.5, num_iterations=200, tol=1e-3)

    def run(index):
        return engine(y[index], DenseOperator(toy.operator.matrix, SHAPE, std[index]), toy.prior)

    together = run([0, 1, 2])
    iterations = together.stats["num_iterations"]
    assert len(set(iterations)) > 1 and max(iterations) < 200
    assert max(together.stats["relative_step"]) <= 1e-3
    assert together.stats["num_evaluations"] == max(iterations) <= engine.num_evaluations
    for k in range(3):
        alone = run([k])
        assert alone.stats["num_iterations"] == [iterations[k]]
        torch.testing.assert_close(alone.mean[0], together.mean[k], atol=1e-9, rtol=0)
    torch.testing.assert_close(run([2, 0, 1]).mean, together.mean[[2, 0, 1]], atol=1e-9, rtol=0)


class Drawing(Prior):
    """A denoiser with randomness of its own, as a patch prior's shifts."""

    def __init__(self, prior):
        super().__init__()
        self.prior = prior

    def forward(self, x, sigma, *, generators=None):
        return self.prior(x, sigma) + 0.1 * randn(x.shape[1:], generators, x)


@pytest.mark.parametrize("method", [PnPADMM, AnnealedPnPADMM, RED])
def test_draws_belong_to_the_case(method):
    toy = make_toy()
    knob = {"num_levels" if method is AnnealedPnPADMM else "num_iterations": 4}
    y, keys, engine = torch.cat([toy.y, 2 * toy.y]), ["a", "b"], method(**knob)

    def run(index):
        draws = make_generators(1, [keys[k] for k in index])
        return engine(y[index], toy.operator, Drawing(toy.prior), generators=draws).mean

    together = run([0, 1])
    assert torch.equal(together, run([0, 1]))
    torch.testing.assert_close(run([1])[0], together[1], atol=1e-9, rtol=0)
    assert not torch.allclose(engine(y, toy.operator, Drawing(toy.prior), generators=generators(2)).mean, together)


@pytest.mark.parametrize("solves", [1, 4])
@pytest.mark.parametrize("method", [PnPADMM, RED])
def test_costs_are_counted(method, solves):
    toy, calls, evaluations = make_toy(), [], []

    class Watched(DenseOperator):
        def forward(self, x):
            calls.append("A")
            return super().forward(x)

        def adjoint(self, y):
            calls.append("A^T")
            return super().adjoint(y)

    def prior(x, sigma, *, generators=None):
        evaluations.append(sigma)
        return toy.prior(x, sigma)

    operator = Watched(toy.operator.matrix, SHAPE, toy.operator.noise_std)
    operator.norm()
    calls.clear()
    start = GivenStart(torch.zeros(1, *SHAPE, dtype=torch.float64), noise=0)
    engine = method(0.3, num_iterations=3, cg_iterations=solves, tol=0.0, start=start)
    estimate = engine(toy.y, operator, prior)
    # Each iteration: A and A^T for the right side, A^T A a CG iteration (of at most 6 for 6 rays); one A at the end
    # for the residual that is reported.
    assert estimate.stats["num_operator_calls"] == len(calls) - 1 == 3 * (2 + 2 * solves)
    assert calls.count("A") == 3 * (1 + solves) + 1
    assert evaluations == [0.3] * 3 and estimate.stats["num_evaluations"] == engine.num_evaluations == 3
    residual = float((toy.operator(estimate.mean) - toy.y).norm() / toy.y.norm())
    assert estimate.stats["relative_residual"] == pytest.approx([residual])
    assert method.needs_prior and not method.needs_gradient and not method.samples_posterior


@pytest.mark.parametrize("method", [PnPADMM, RED])
def test_what_cannot_work_is_refused(method):
    toy = make_toy()
    with pytest.raises(InputError, match="needs a prior"):
        method()(toy.y, toy.operator)
    with pytest.raises(InputError, match="measurement"):
        method()(toy.y[..., :5], toy.operator, toy.prior)
    for knobs in (
        dict(sigma=0.0),
        dict(max_weight=0.0),
        dict(tol=-1.0),
        dict(num_iterations=0),
        dict(cg_iterations=0),
        dict(clip=(1.0, 0.0)),
    ):
        with pytest.raises(InputError):
            method(**knobs)


def test_the_prior_is_not_trained():
    toy = make_toy()
    prior = GaussianPrior(toy.prior.mean.clone().requires_grad_(True), covariance_of(toy.prior))
    assert not PnPADMM(num_iterations=2)(toy.y, toy.operator, prior).mean.requires_grad
