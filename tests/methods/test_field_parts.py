"""The pieces of the methods of the field, each against its closed form."""

import math

import numpy as np
import pytest
import torch

from invrecon.adapt.selfsupervised import PriorNoise as PriorNoiseOfAdaptation
from invrecon.errors import InputError
from invrecon.methods import (
    DDIM,
    DDNM,
    DDNMFBP,
    DDRM,
    DPS,
    DDNMPlus,
    DDSTransition,
    DiffPIR,
    DirectConditioning,
    DirectInverseConditioning,
    ExactDataSampler,
    FloorSchedule,
    KrylovConditioning,
    Langevin,
    LangevinDataSampler,
    LangevinDirect,
    PaDISCorrection,
    PairedSchedule,
    PiGDMConditioning,
    PinvConditioning,
    PredictorCorrector,
    PriorDraw,
    PriorNoise,
    REDDiff,
    ReverseSDE,
    ScaledNormGuidance,
    SpectralTransition,
    StandardCorrection,
    VPSchedule,
)
from invrecon.operators import BlockDownsample, ParallelBeamCT, RandomInpainting
from invrecon.priors.analytic import GaussianPrior
from invrecon.rng import randn
from tests.methods.test_field import spectral
from tests.methods.toy import SHAPE, generators, make_toy

NUM = 4000


def states(num=5):
    return torch.randn(num, *SHAPE, dtype=torch.float64)


def repeated(toy, num=5):
    return toy.y.expand(num, -1, -1, -1)


# Schedules


def test_vp_levels_are_even_in_time():
    schedule = VPSchedule(1000, 152.0, 0.01, unit=1.0)
    sigmas = np.array(schedule.sigmas)
    # Times from 1 down in steps of 1/1000: sigma(1) = 152, sigma(1/2) = 3.5.
    time = (np.sqrt(0.01 + 39.8 * np.log1p(sigmas**2)) - 0.1) / 19.9
    assert np.ptp(np.diff(time)) < 1e-9 and (np.diff(sigmas) < 0).all()
    assert sigmas[[0, -1]] == pytest.approx([152.0, 0.01])
    assert VPSchedule(10, 76.0, 0.005).sigmas == pytest.approx([s / 2 for s in VPSchedule(10, 152, 0.01, 1).sigmas])


def test_floor_schedule():
    sigmas = FloorSchedule(5, 10.0, 2.0, ratio=0.5).sigmas
    assert sigmas == pytest.approx([10.0, 5.0, 2.5, 2.0, 2.0])


def test_paired_schedule_visits_each_level_twice():
    schedule = PairedSchedule(3, 4.0, 1.0)
    steps = list(schedule.steps())
    assert len(steps) == len(schedule) == 5
    assert [s for step in steps for s in step] == pytest.approx([4, 2, 2, 2, 2, 1, 1, 1, 1, 0])


# Transitions


def test_reverse_sde_has_the_mean_of_the_ancestral_step_and_more_noise():
    x, x0 = states(NUM), torch.zeros(NUM, *SHAPE, dtype=torch.float64)
    still = torch.zeros_like(x)
    step = ReverseSDE()(still, x0, 1.0, 0.6, generators(NUM))
    assert float(step.std()) == pytest.approx(0.8, rel=0.02)
    torch.testing.assert_close(ReverseSDE()(x, x0, 1.0, 0.6, generators(NUM)) - step, 0.36 * x)


def test_langevin_with_less_noise():
    still = torch.zeros(NUM, *SHAPE, dtype=torch.float64)
    step = Langevin(0.25, noise=0.5)(still, still, 2.0, 1.0, generators(NUM))
    assert float(step.std()) == pytest.approx(0.5, rel=0.02)


def test_noise_of_the_prior_replaces_that_of_the_estimate():
    toy, x, x0 = make_toy(), states(), states()
    denoised = toy.prior(x, 0.5)
    step = PriorNoise(DDIM(0.0)).bind(lambda x, sigma: denoised, toy.operator, toy.y).begin()
    expected = x0 + 0.2 / 0.5 * (x - denoised)
    torch.testing.assert_close(step(x, x0, 0.5, 0.2, generators(5)), expected)
    torch.testing.assert_close(step(x, x0, 0.5, 0.0, generators(5)), x0)
    # A noise that was chosen stays chosen, and counts once.
    other = PriorNoiseOfAdaptation(PriorNoise(DDIM(0.0)), lambda x, sigma: torch.zeros_like(x))
    other = other.bind(lambda x, sigma: denoised, toy.operator, toy.y).begin()
    torch.testing.assert_close(other(x, x0, 0.5, 0.2, generators(5)), x0 + 0.4 * x)


@pytest.mark.parametrize(("correction", "power"), [(StandardCorrection, 2), (PaDISCorrection, 1)])
def test_the_corrector_follows_its_rule(correction, power):
    toy, x = make_toy(noise_std=0), states()
    x0, zeta, snr, sigma = toy.prior(x, 0.5), 1.0, 0.16, 0.5
    step = correction(snr, zeta).bind(None, toy.operator, repeated(toy))
    noise = randn(SHAPE, generators(5), x)
    score = (x0 - x) / sigma**2
    e = 2 * (snr * noise.flatten(1).norm(dim=1) / score.flatten(1).norm(dim=1)) ** power  # 2 r, not 2 r^2, if linear
    e = e.reshape(-1, 1, 1, 1)
    moved = x + e * score + (2 * e).sqrt() * noise
    moved = moved + zeta / toy.operator.norm() ** 2 * toy.operator.adjoint(toy.y - toy.operator(moved))
    torch.testing.assert_close(step(x, x0, sigma, sigma, generators(5)), moved)


# Conditionings


def solve(toy, denoised, gamma):
    a = toy.operator.matrix
    rhs = denoised.flatten(1) + gamma * (toy.y.flatten() @ a)
    return torch.linalg.solve(torch.eye(12) + gamma * a.mT @ a, rhs.mT).mT.reshape(denoised.shape)


def test_krylov_weight():
    toy, x = make_toy(), states()
    for sigma in (0.05, 2.0):
        x0 = KrylovConditioning(12, prior_std=0.3)(toy.prior, toy.operator, repeated(toy))(x, sigma)
        torch.testing.assert_close(x0, solve(toy, toy.prior(x, sigma), 9.0), rtol=1e-6, atol=1e-8)
    clean = make_toy(noise_std=0)
    x0 = KrylovConditioning(12)(clean.prior, clean.operator, repeated(clean))(x, 0.3)
    torch.testing.assert_close(clean.operator(x0), repeated(clean))


def test_pseudo_inverse_takes_the_range_from_the_data_and_nothing_else():
    toy, x = make_toy(noise_std=0), states()
    null = toy.basis[:, 6:]
    for conditioning in (PinvConditioning(12), DirectInverseConditioning(clip=None)):
        x0 = conditioning(toy.prior, toy.operator, repeated(toy))(x, 0.3)
        torch.testing.assert_close(toy.operator(x0), repeated(toy))
        torch.testing.assert_close(x0.flatten(1) @ null, toy.prior(x, 0.3).flatten(1) @ null)


def test_pseudo_inverse_fades_below_the_noise():
    toy, x, pinv = make_toy(), states(), PinvConditioning(12)
    clean = make_toy(noise_std=0)
    clean.y = toy.y
    for sigma, factor in ((0.5, 1.0), (0.02, 0.2 * toy.operator.norm())):
        full = pinv(clean.prior, clean.operator, repeated(toy))(x, sigma)
        denoised = toy.prior(x, sigma)
        x0 = pinv(toy.prior, toy.operator, repeated(toy))(x, sigma)
        torch.testing.assert_close(x0, denoised + factor * (full - denoised))


def test_pigdm_solves_its_system():
    toy, x, sigma, prior_std = make_toy(), states(), 0.4, 0.8
    a = toy.operator.matrix
    r2 = sigma**2 * prior_std**2 / (sigma**2 + prior_std**2)
    denoised = toy.prior(x, sigma)
    residual = toy.y.flatten() - denoised.flatten(1) @ a.mT
    v = torch.linalg.solve(a @ a.mT + 0.01 / r2 * torch.eye(6, dtype=torch.float64), residual.mT).mT @ a
    expected = denoised + toy.prior.shrink(v.reshape(x.shape), sigma)
    guided = PiGDMConditioning(12, prior_std)(toy.prior, toy.operator, repeated(toy))(x, sigma)
    torch.testing.assert_close(guided, expected, rtol=1e-6, atol=1e-8)


def test_direct_conditioning_is_the_posterior_score_for_small_steps():
    toy, x, sigma, epsilon = make_toy(), states(), 0.3, 1e-6
    likelihood = toy.operator.adjoint(repeated(toy) - toy.operator(x)) / 0.1**2
    x0 = DirectConditioning(1.0, epsilon)(toy.prior, toy.operator, repeated(toy))(x, sigma)
    torch.testing.assert_close((x0 - toy.prior(x, sigma)) / sigma**2, likelihood, rtol=1e-4, atol=1e-6)


def test_scaled_norm_guidance_has_the_length_of_its_strength():
    toy = make_toy(noise_std=0, scale=37.0)
    residual = states(4)[..., :2].reshape(4, 1, 1, 6)
    weighed = ScaledNormGuidance(1.0).weigh(residual, toy.operator)
    torch.testing.assert_close(weighed.flatten(1).norm(dim=1), torch.full((4,), 1 / toy.operator.norm()).double())


# Draws


@pytest.mark.parametrize(
    "sampler", [ExactDataSampler(12), LangevinDataSampler(400, step=0.1)], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("noise_std", [0.0, 0.1])
def test_data_draws_have_the_moments_of_their_gaussian(sampler, noise_std):
    num, r = 600, 0.2
    toy = make_toy(noise_std)
    sampler.max_weight = 5.0 if noise_std == 0 else 1000.0
    gamma = min(r**2 / noise_std**2 if noise_std else math.inf, sampler.max_weight / toy.operator.norm() ** 2)
    x0 = states(1).expand(num, -1, -1, -1)
    z = sampler(toy.operator, toy.y.expand(num, -1, -1, -1))(x0, r, generators(num)).flatten(1)
    a = toy.operator.matrix
    covariance = r**2 * torch.linalg.inv(torch.eye(12) + gamma * a.mT @ a)
    mean = solve(toy, x0[:1], gamma).flatten()
    spread = covariance.diagonal().sqrt()
    ratio = ((z @ toy.basis).var(dim=0) / (toy.basis.mT @ covariance @ toy.basis).diagonal()).reshape(2, 6).mean(dim=1)
    shift = float(((z.mean(dim=0) - mean) / spread * num**0.5).abs().max())
    print(f"variance ratios {ratio.tolist()}, largest shift {shift:.1f} standard errors")
    assert shift < 4
    assert ratio == pytest.approx([1.0, 1.0], abs=0.12)


def test_draws_of_the_prior_have_its_spread():
    # p(x0 | x) for a Gaussian prior: covariance C sigma^2 / (C + sigma^2).
    toy, sigma, num = make_toy(), 0.3, 600
    x = states(1).expand(num, -1, -1, -1)
    x0 = PriorDraw(20)(toy.prior, None, None)(x, sigma, generators=generators(num)).flatten(1)
    spectrum = toy.prior.eigenvalues
    expected = spectrum * sigma**2 / (spectrum + sigma**2)
    ratio = float((x0 @ toy.prior.eigenvectors).var(dim=0).sum() / expected.sum())
    print(f"variance ratio {ratio:.3f}")
    assert ratio == pytest.approx(1.0, abs=0.15)
    assert (x0.mean(dim=0) - toy.prior(x[:1], sigma).flatten()).abs().max() < 0.06


# Spectral methods


def test_ddrm_and_ddnm_plus_are_one_where_there_is_noise():
    toy = make_toy()
    ddrm, ddnm = DDRM(20, clip=None), DDNMPlus(20, clip=None)
    ddrm.start = ddnm.start
    one, other = (m(toy.y, spectral(toy.operator), toy.prior, generators=generators(1)).mean for m in (ddrm, ddnm))
    torch.testing.assert_close(one, other)


def test_too_noisy_data_count_as_not_measured():
    toy, x = make_toy(), states()
    toy.operator.noise_std = torch.tensor([1e6], dtype=torch.float64)
    step = SpectralTransition(10.0, eta=0.5).bind(None, spectral(toy.operator), repeated(toy))
    x0 = toy.prior(x, 1.0)
    expected = DDSTransition(0.5)(x, x0, 1.0, 0.4, generators(5))
    moved = step(x, x0, 1.0, 0.4, generators(5))
    # The same up to the basis in which noise is drawn.
    noise = 0.2 * randn((12,), generators(5), x)
    rotated = spectral(toy.operator).spectrum().to_image(noise)
    torch.testing.assert_close(moved - rotated, expected - noise.reshape(x.shape))


@pytest.mark.parametrize("make", [lambda: RandomInpainting(16, 0.5), lambda: BlockDownsample(16, 2)])
@pytest.mark.parametrize("method", [DDRM(clip=None), DDNMPlus(clip=None), DDNM(clip=None), DiffPIR(clip=None)])
def test_restoration_beats_the_baseline_in_single_precision(make, method):
    prior, operator = smooth(16), make()
    x = prior.sample(generators(3))
    y = operator(x)
    estimate = method(y, operator, prior, generators=generators(3))
    error, direct = ((z - x).square().mean().sqrt() for z in (estimate.mean, operator.baseline(y)))
    print(f"{type(method).__name__} on {type(operator).__name__}: {float(error):.4f}, direct {float(direct):.4f}")
    assert error < 0.95 * direct
    assert max(estimate.stats["relative_residual"]) < 1e-4


def smooth(size):
    grid = torch.cartesian_prod(torch.arange(size), torch.arange(size)).double()
    covariance = 0.04 * torch.exp(-torch.cdist(grid, grid).square() / 8) + 1e-6 * torch.eye(size**2)
    return GaussianPrior(torch.full((1, size, size), 0.5), covariance.float())


def test_filtered_back_projection_serves_as_pseudo_inverse():
    prior, operator = smooth(16), ParallelBeamCT(size=16, num_views=12, num_bins=32)
    x = prior.sample(generators(2))
    y = operator(x)
    estimate = DDNMFBP(200, epsilon=0.5)(y, operator, prior, generators=generators(2))
    error, direct = ((z - x).square().mean().sqrt() for z in (estimate.mean, operator.baseline(y).clamp(0, 1)))
    print(f"rms error {float(error):.4f}, FBP {float(direct):.4f}")
    assert error < 0.8 * direct


def test_constants_out_of_range_are_refused():
    for make in (
        lambda: KrylovConditioning(0),
        lambda: PinvConditioning(0),
        lambda: PiGDMConditioning(prior_std=0),
        lambda: DiffPIR(zeta=1.5),
        lambda: DDRM(eta=2.0),
        lambda: DPS(zeta=0),
        lambda: ExactDataSampler(0),
        lambda: LangevinDataSampler(step=2.5),
        lambda: PriorDraw(0),
        lambda: LangevinDirect(zeta=2.5),
        lambda: PredictorCorrector(snr=0),
        lambda: REDDiff(weight=0),
        lambda: FloorSchedule(5, 1.0, 0.1, ratio=1.0),
        lambda: VPSchedule(5, 1.0, 0.1, unit=0),
        lambda: Langevin(0.5, noise=2.0),
    ):
        with pytest.raises(InputError):
            make()
