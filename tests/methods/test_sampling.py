"""What every sampler promises besides its numbers: independence, determinism, honest counts, clear errors."""

import warnings

import pytest
import torch

from invrecon.errors import InputError
from invrecon.methods import (
    DDIM,
    FBP,
    EstimateStart,
    GeometricSchedule,
    KarrasSchedule,
    Langevin,
    NoiseStart,
    NoisyEstimateStart,
    PaDISNormalised,
    PaDISPaper,
    PaDISRepo,
    ProximalConditioning,
    ProximalDiffusion,
    Renoise,
    Sampler,
    Unconditional,
    UnconditionalSampler,
    sample_prior,
)
from invrecon.operators import ParallelBeamCT
from invrecon.priors.analytic import GaussianPrior
from invrecon.rng import make_generators
from tests.methods.toy import SHAPE, generators, make_toy

METHODS = {
    "fast": ProximalDiffusion(8, 2.0, 0.01, clip=None),
    "padis-paper": PaDISPaper(4, 3, zeta=0.1, clip=None),
    "padis-repo": PaDISRepo(4, 3, clip=None),
    "padis-normalised": PaDISNormalised(4, 3, clip=None),
    "langevin": Sampler(GeometricSchedule(4, 2.0, 0.01, 3), ProximalConditioning(), Langevin(0.5), clip=None),
    "renoise": Sampler(KarrasSchedule(8, 2.0, 0.01), ProximalConditioning(), Renoise(), clip=None),
}


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


def several(num=4):
    toy = make_toy()
    y = toy.operator(toy.prior.sample(generators(num, seed=7)))
    toy.operator.noise_std = torch.linspace(0.05, 0.2, num, dtype=torch.float64)
    return toy, y + 0.1 * torch.randn_like(y)


def subset(toy, index):
    operator = toy.operator._shallow_copy()
    operator.noise_std = toy.operator.noise_std[index]
    return operator


KEYS = ["a/0001", "a/0002", "b/0001", "c/0001"]


@pytest.mark.parametrize("num_samples", [1, 3])
def test_a_case_does_not_depend_on_its_batch(method, num_samples):
    toy, y = several()
    method = copy_with(method, num_samples=num_samples)
    together = method(y, toy.operator, toy.prior, generators=make_generators(5, KEYS))
    order = [2, 0, 3, 1]
    permuted = method(y[order], subset(toy, order), toy.prior, generators=make_generators(5, [KEYS[k] for k in order]))
    torch.testing.assert_close(permuted.mean, together.mean[order], atol=1e-9, rtol=0)
    for k in range(4):
        alone = method(y[k : k + 1], subset(toy, [k]), toy.prior, generators=make_generators(5, [KEYS[k]]))
        torch.testing.assert_close(alone.mean[0], together.mean[k], atol=1e-9, rtol=0)
        if num_samples > 1:
            torch.testing.assert_close(alone.std[0], together.std[k], atol=1e-9, rtol=0)


def copy_with(method, **changes):
    import copy

    clone = copy.copy(method)
    for name, value in changes.items():
        setattr(clone, name, value)
    return clone


def test_the_seed_decides(method):
    toy, y = several()
    one, again, other = (
        method(y, toy.operator, toy.prior, generators=make_generators(seed, KEYS)).mean for seed in (0, 0, 1)
    )
    assert torch.equal(one, again)
    assert not torch.allclose(one, other)


def test_without_generators_a_fixed_seed_serves(method):
    toy, y = several()
    one, again = (method(y, toy.operator, toy.prior).mean for _ in range(2))
    assert torch.equal(one, again)


def test_samples_do_not_depend_on_the_chunk():
    toy, y = several()
    for chunk in (1, 2, 5, 9):
        method = ProximalDiffusion(8, 2.0, 0.01, clip=None, num_samples=5, samples_per_batch=chunk)
        estimate = method(y, toy.operator, toy.prior, generators=make_generators(5, KEYS))
        assert estimate.samples.shape == (4, 5, *SHAPE)
        assert estimate.stats["num_evaluations"] == 8
        if chunk == 1:
            reference = estimate
        torch.testing.assert_close(estimate.samples, reference.samples, atol=1e-9, rtol=0)


def test_a_single_sample_has_no_spread():
    toy, y = several()
    estimate = METHODS["fast"](y, toy.operator, toy.prior)
    assert estimate.samples is None and estimate.std is None
    assert estimate.mean.shape == (4, *SHAPE)


def test_evaluations_and_operator_calls_are_as_claimed():
    toy, y = several()

    class Tally(type(toy.prior)):
        evaluations = 0

        def forward(self, x, sigma, *, generators=None):
            Tally.evaluations += 1
            return super().forward(x, sigma, generators=generators)

    toy.prior.__class__ = Tally
    calls = []
    # Wired below the counters, to check them.
    plain_forward, plain_adjoint = toy.operator.forward, toy.operator.adjoint
    toy.operator.norm()
    toy.operator.forward = lambda x: (calls.append("A"), plain_forward(x))[1]
    toy.operator.adjoint = lambda y: (calls.append("AT"), plain_adjoint(y))[1]

    for method, evaluations, applications in (
        (ProximalDiffusion(50, start=NoiseStart(), clip=None), 50, 50 * (2 + 2 * 10)),
        (
            ProximalDiffusion(10, start=NoiseStart(), cg_iterations=4, num_samples=3, clip=None),
            10,
            10 * (2 + 2 * 4),
        ),
        (PaDISPaper(clip=None), 1000, 2000),
        (PaDISNormalised(20, 5, clip=None), 100, 200),
    ):
        Tally.evaluations = 0
        calls.clear()
        stats = method(y, toy.operator, toy.prior).stats
        assert stats["num_evaluations"] == evaluations == Tally.evaluations
        # One is for the residual reported. CG ends early where it has solved so small a system exactly.
        assert stats["num_operator_calls"] == len(calls) - 1 <= applications
        assert len(stats["relative_residual"]) == 4


def test_the_residual_is_that_of_the_mean():
    toy, y = several()
    estimate = ProximalDiffusion(8, 2.0, 0.01, num_samples=3)(y, toy.operator, toy.prior)
    expected = (toy.operator(estimate.mean) - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)
    assert estimate.stats["relative_residual"] == pytest.approx(expected.tolist())


def test_a_measurement_of_nothing_tells_nothing(method):
    """Leak test: what is not in `y` cannot be in the estimate. With `y = 0` it knows nothing of the truth."""
    toy = make_toy()
    num = 300
    truths = toy.prior.sample(generators(num, seed=3))
    y = torch.zeros(num, 1, 1, 6, dtype=torch.float64)
    estimates = method(y, toy.operator, toy.prior, generators=generators(num, seed=4)).mean
    pairs = torch.stack([(truths - truths.mean(0)).flatten(), (estimates - estimates.mean(0)).flatten()])
    assert abs(float(pairs.corrcoef()[0, 1])) < 4 / (num * 12) ** 0.5 * 2


def test_no_noise_is_the_limit_of_little_noise():
    estimates = []
    for noise_std in (0.0, 1e-7):
        toy = make_toy(noise_std)
        y = make_toy(0.0).y
        estimates.append(ProximalDiffusion(20, 2.0, 0.01, clip=None)(y, toy.operator, toy.prior).mean)
    torch.testing.assert_close(*estimates, atol=1e-9, rtol=0)


def test_a_known_image_is_returned():
    """A prior that knows the image, and data that agree: nothing is left to chance."""
    toy = make_toy(noise_std=0)
    truth = toy.truth

    class Certain(type(toy.prior)):
        def forward(self, x, sigma, *, generators=None):
            return truth.expand_as(x)

    toy.prior.__class__ = Certain
    estimate = ProximalDiffusion(10, clip=None)(toy.operator(truth), toy.operator, toy.prior)
    torch.testing.assert_close(estimate.mean, truth)


def test_samples_are_clipped_one_by_one():
    toy, y = several()
    estimate = ProximalDiffusion(8, 2.0, 0.01, clip=(-0.5, 0.5), num_samples=3)(y, toy.operator, toy.prior)
    assert estimate.samples.min() == -0.5 and estimate.samples.max() == 0.5


def test_starts():
    toy, y = several()
    draws = generators(4)
    assert float(NoiseStart()(y, toy.operator, 3.0, draws).std()) == pytest.approx(3.0, rel=0.4)
    direct = FBP(clip=(0.0, 1.0))(y, toy.operator).mean
    torch.testing.assert_close(EstimateStart()(y, toy.operator, 3.0, draws), direct)
    noise = NoisyEstimateStart(FBP(clip=None))(y, toy.operator, 0.1, draws) - toy.operator.baseline(y)
    assert float(noise.std()) == pytest.approx(0.1, rel=0.4)


def test_gradients_are_not_kept_and_work_without_grad_mode():
    toy, y = several()
    with torch.no_grad():
        estimate = PaDISNormalised(2, 2, clip=None)(y.requires_grad_(True), toy.operator, toy.prior)
    assert not estimate.mean.requires_grad


def test_unconditional_sampler_takes_no_measurement():
    toy = make_toy()
    sampler = UnconditionalSampler(KarrasSchedule(5, 10, 0.01), DDIM(), clip=None)
    estimate = sampler(None, toy.operator, toy.prior, generators=generators(3))
    assert estimate.mean.shape == (3, *SHAPE)
    assert estimate.stats["num_evaluations"] == 5
    x = sample_prior(toy.prior, SHAPE, generators(3), KarrasSchedule(5, 10, 0.01), DDIM())
    torch.testing.assert_close(x, estimate.mean)


def test_an_unconditional_reconstruction_ignores_the_data():
    toy, y = several()
    method = Sampler(KarrasSchedule(5, 10, 0.01), Unconditional(), DDIM(), clip=None)
    torch.testing.assert_close(method(y, toy.operator, toy.prior).mean, method(0 * y, toy.operator, toy.prior).mean)


def test_noise_levels_follow_their_cases_and_rays():
    # Several samples a case: every sample keeps its case's noise level, whatever the layout of `noise_std`.
    toy, y = several()
    per_case = toy.operator.noise_std
    estimates = []
    for std in (per_case, per_case.reshape(4, 1, 1, 1), per_case.reshape(4, 1, 1, 1).expand(4, 1, 1, 6)):
        toy.operator.noise_std = std
        method = ProximalDiffusion(8, 2.0, 0.01, clip=None, num_samples=3)
        estimates.append(method(y, toy.operator, toy.prior, generators=make_generators(5, KEYS)).samples)
    torch.testing.assert_close(estimates[1], estimates[0])
    torch.testing.assert_close(estimates[2], estimates[0])


def test_tomography_in_single_precision():
    """A real projector and a smooth Gaussian prior: better than FBP, and the same alone as in a batch."""
    size = 16
    grid = torch.cartesian_prod(torch.arange(size), torch.arange(size)).double()
    covariance = 0.04 * torch.exp(-torch.cdist(grid, grid).square() / 8) + 1e-6 * torch.eye(size**2)
    prior = GaussianPrior(torch.full((1, size, size), 0.5), covariance.float())
    operator = ParallelBeamCT(size=size, num_views=6, num_bins=32)
    x = prior.sample(generators(3))
    y = operator(x)
    method = ProximalDiffusion(clip=None)
    together = method(y, operator, prior, generators=make_generators(0, KEYS[:3])).mean
    error, direct = ((z - x).square().mean().sqrt() for z in (together, FBP(clip=None)(y, operator).mean))
    print(f"rms error: diffusion {float(error):.4f}, FBP {float(direct):.4f}")
    assert error < 0.6 * direct
    for k in range(3):
        alone = method(y[k : k + 1], operator, prior, generators=make_generators(0, [KEYS[k]])).mean
        assert torch.equal(alone[0], together[k])


def test_clear_errors():
    toy, y = several()
    with pytest.raises(InputError, match="needs a prior"):
        METHODS["fast"](y, toy.operator)
    with pytest.raises(InputError, match="needs a prior"):
        UnconditionalSampler()(None, toy.operator)
    with pytest.raises(InputError, match=r"shape \(4, 1, 1, 5\)"):
        METHODS["fast"](y[..., :5], toy.operator, toy.prior)
    with pytest.raises(InputError, match="generators"):
        METHODS["fast"](y, toy.operator, toy.prior, generators=generators(3))
    with pytest.raises(InputError, match="num_samples"):
        ProximalDiffusion(num_samples=0)
    with pytest.raises(InputError, match="samples_per_batch"):
        ProximalDiffusion(samples_per_batch=0)
    with pytest.raises(InputError, match="num_inner"):
        Sampler(GeometricSchedule(4, 2.0, 0.01, 3), ProximalConditioning(), DDIM())
    with pytest.raises(InputError, match="clip"):
        ProximalDiffusion(clip=(1.0, 0.0))


def test_noise_too_weak_to_hide_an_image_is_no_start_in_silence():
    toy = make_toy()
    with pytest.warns(UserWarning, match=r"first noise level of 0\.3.*sigma_max"):
        NoiseStart()(toy.y, toy.operator, 0.3, generators(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NoiseStart()(toy.y, toy.operator, 10.0, generators(1))
