"""Every sampler against the closed-form posterior of a Gaussian prior.

The bands are regression bands round measured values. Read them as: variance of the samples over variance of
the true posterior, in the measured subspace and in the null space. 1 and 1 is a calibrated sampler; 0 and 1
is an estimator that draws the null space but returns the best fit where there are data.

`ProximalDiffusion` is made from the README's line for posterior samples, with the arguments that stand there. Two are
the toy's own: more samples, so that their variance is known, and no clipping, since its images are not in [0, 1]. Its
standard deviations, 0.45 to 1.2, are above those of a CT slice, so a first level that suffices here suffices there.
"""

import re
from pathlib import Path

import pytest
import torch
import yaml

import invrecon.methods
from invrecon.methods import (
    DDIM,
    DDSTransition,
    GeometricSchedule,
    KarrasSchedule,
    Langevin,
    PaDISNormalised,
    PaDISPaper,
    PaDISRepo,
    ProximalConditioning,
    ProximalDiffusion,
    Renoise,
    Sampler,
    UnconditionalSampler,
)
from invrecon.priors.analytic import GaussianMixturePrior
from tests.methods.toy import SHAPE, DenseOperator, generators, make_toy

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def recommended():
    """The arguments of `ProximalDiffusion` in the README's one line with a transition; parts by their names."""
    (line,) = re.findall(r"^invrecon .*ProximalDiffusion .*transition.*$", README, re.MULTILINE)
    given = re.findall(r"--model\.method\.(\w+)[= ](\S+)", line)
    return {name: yaml.safe_load(value) for name, value in given}


def fast(**knobs):
    given = {
        name: getattr(invrecon.methods, value)() if isinstance(value, str) else value
        for name, value in recommended().items()
    }
    return ProximalDiffusion(**{**given, "num_samples": 2000, "clip": None, **knobs})


def custom(schedule, conditioning, transition, num_samples=1000):
    return Sampler(schedule, conditioning, transition, num_samples=num_samples, clip=None)


CONSTANT = dict(max_weight=100.0, noise_factor=1e9)  # gamma = 1 / sigma_y^2 at every level, as DDS has it
CASES = {
    # name: (method, largest relative error of the mean, variance ratio measured, variance ratio in the null
    # space)
    "readme": (fast(), 0.12, (0.65, 0.95), (0.75, 1.0)),
    # Below the prior's spread the start decides: the null space keeps its image and has a fifth of the variance.
    "readme-but-warm": (fast(sigma_max=0.3), 0.7, (0.5, 0.8), (0.1, 0.3)),
    # The default trusts the data's noise, and so takes the measured directions for known.
    "readme-but-default-factor": (fast(noise_factor=5.0), 0.12, (0.1, 0.3), (0.75, 1.0)),
    "fast": (fast(transition=None), 0.03, (0.03, 0.2), (0.03, 0.2)),
    "fast-renoise": (fast(transition=Renoise()), 0.12, (0.3, 0.6), (0.33, 0.6)),
    "fast-renoise-100": (fast(num_levels=100, transition=Renoise()), 0.1, (0.35, 0.6), (0.35, 0.6)),
    "fast-renoise-factor-3": (fast(transition=Renoise(), noise_factor=3.0), 0.12, (0.1, 0.3), (0.33, 0.6)),
    "readme-20": (fast(num_levels=20), 0.12, (0.45, 0.75), (0.55, 0.85)),
    "fast-ddim-eta-0.85": (fast(transition=DDIM(0.85)), 0.13, (0.65, 0.95), (0.78, 1.05)),
    "fast-ddim-eta-0": (fast(transition=DDIM(0.0)), 0.16, (0.6, 0.95), (0.85, 1.15)),
    "dds-constant-weight": (
        custom(KarrasSchedule(100, 20, 0.002), ProximalConditioning(**CONSTANT), DDSTransition(0.85)),
        0.12,
        (0.0, 0.06),
        (0.6, 0.9),
    ),
    "langevin-proximal": (
        custom(GeometricSchedule(50, 20, 0.002, num_inner=5), ProximalConditioning(), Langevin(0.5), 400),
        0.15,
        (1.0, 1.45),
        (1.0, 1.45),
    ),
    "padis-paper": (PaDISPaper(50, zeta=0.1, num_samples=300, clip=None), 0.15, (0.0, 0.15), (0.85, 1.25)),
    "padis-repo": (PaDISRepo(50, zeta=0.3, num_samples=300, clip=None), 0.15, (0.0, 0.25), (0.8, 1.2)),
    "padis-normalised": (
        PaDISNormalised(50, zeta=1.0, num_samples=300, clip=None),
        0.1,
        (0.9, 1.45),
        (0.85, 1.25),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_against_the_closed_form(name):
    method, tolerance, measured_band, null_band = CASES[name]
    toy = make_toy()
    estimate = method(toy.y, toy.operator, toy.prior, generators=generators(1))
    error, measured, null = toy.ratios(estimate.samples)
    print(f"{name}: mean error {error:.3f}, variance ratio {measured:.3f} measured, {null:.3f} null space")
    assert error < tolerance
    assert measured_band[0] <= measured <= measured_band[1]
    assert null_band[0] <= null <= null_band[1]
    torch.testing.assert_close(estimate.samples.mean(dim=1), estimate.mean)
    torch.testing.assert_close(estimate.samples.std(dim=1), estimate.std)


@pytest.mark.parametrize(
    "method",
    [fast(), PaDISNormalised(50, zeta=1.0, num_samples=300, clip=None)],
    ids=["readme", "padis-normalised"],
)
def test_exact_data_are_met(method):
    # Without noise the measured part is fixed: no spread there, and the null space as the prior has it.
    toy = make_toy(noise_std=0)
    estimate = method(toy.y, toy.operator, toy.prior, generators=generators(1))
    fit = (toy.operator(estimate.samples[0]) - toy.y).norm(dim=-1) / toy.y.norm()
    flat = estimate.samples[0].flatten(1) @ toy.basis
    exact = (toy.basis.mT @ toy.covariance @ toy.basis).diagonal()[6:]
    null = float(flat.var(dim=0)[6:].sum() / exact.sum())
    error = float((estimate.mean.flatten() - toy.mean).norm() / toy.mean.norm())
    print(f"residual {float(fit.max()):.1e}, mean error {error:.3f}, null-space variance ratio {null:.3f}")
    assert fit.max() < 0.01
    assert error < 0.1
    assert 0.75 < null < 1.2


def test_the_docstring_recommends_what_the_readme_does():
    text = " ".join(ProximalDiffusion.__doc__.split())
    for name, value in recommended().items():
        assert name == "num_samples" or f"{name}={value}" in text


def test_unconditional_samples_have_the_prior_moments():
    toy = make_toy()
    for sampler, band in (
        (UnconditionalSampler(KarrasSchedule(150, 20, 0.002), DDIM(1.0), clip=None), (0.83, 1.07)),
        (UnconditionalSampler(GeometricSchedule(300, 10, 0.002), Langevin(0.5), clip=None), (0.9, 1.25)),
    ):
        x = sampler(None, toy.operator, toy.prior, generators=generators(400)).mean.double()
        ratio = float(x.flatten(1).var(dim=0).sum() / toy.prior.eigenvalues.sum())
        error = float((x.mean(dim=0) - toy.prior.mean).norm() / toy.prior.mean.norm())
        print(f"{type(sampler.transition).__name__}: mean error {error:.3f}, variance ratio {ratio:.3f}")
        assert error < 0.1
        assert band[0] < ratio < band[1]


def test_both_modes_of_a_mixture_are_visited():
    # Two modes that differ only in the null space: the data cannot tell them apart, so the weights remain.
    means = torch.zeros(2, *SHAPE, dtype=torch.float64)
    means[0, 0, 0, 0], means[1, 0, 0, 0] = -2.0, 2.0
    covariance = (0.1 * torch.eye(12, dtype=torch.float64)).expand(2, -1, -1)
    prior = GaussianMixturePrior(torch.tensor([0.25, 0.75], dtype=torch.float64), means, covariance)
    matrix = torch.eye(12, dtype=torch.float64)[1:]
    operator = DenseOperator(matrix, SHAPE, torch.tensor([0.1], dtype=torch.float64))
    y = 0.1 * torch.randn(1, 1, 1, 11, dtype=torch.float64)
    samples = fast(num_samples=600)(y, operator, prior, generators=generators(1)).samples[0, :, 0, 0, 0]
    share = float((samples > 0).double().mean())
    print(f"share of the heavier mode {share:.3f}, expected 0.75")
    assert 0.65 < share < 0.85
    assert (samples.abs() - 2).abs().mean() < 0.4
