import pytest
import torch

from invrecon.errors import InputError
from invrecon.methods import (
    NormalisedGuidance,
    NormGuidance,
    ProximalConditioning,
    SquaredNormGuidance,
    Unconditional,
)
from tests.methods.toy import SHAPE, DenseOperator, make_toy


def states(num=5):
    return torch.randn(num, *SHAPE, dtype=torch.float64)


def repeated(toy, num=5):
    return toy.y.expand(num, -1, -1, -1)


def solve(toy, x0, gamma):
    """The proximal map by a dense solve."""
    a = toy.operator.matrix
    rhs = x0.flatten(1) + gamma * (toy.y.flatten() @ a)
    return torch.linalg.solve(torch.eye(12) + gamma * a.mT @ a, rhs.mT).mT.reshape(x0.shape)


@pytest.mark.parametrize("sigma", [0.05, 0.3, 2.0, 50.0])
def test_proximal_weight_with_noise(sigma):
    toy, x = make_toy(), states()
    conditional = ProximalConditioning(num_iterations=12)(toy.prior, toy.operator, repeated(toy))
    gamma = min(sigma**2 / 0.1**2, 1000 / toy.operator.norm() ** 2)
    torch.testing.assert_close(conditional(x, sigma), solve(toy, toy.prior(x, sigma), gamma), rtol=1e-6, atol=1e-8)


def test_proximal_weight_without_noise_is_the_cap():
    toy, x = make_toy(noise_std=0), states()
    conditional = ProximalConditioning(num_iterations=12, max_weight=50)(toy.prior, toy.operator, repeated(toy))
    expected = solve(toy, toy.prior(x, 0.2), 50 / toy.operator.norm() ** 2)
    torch.testing.assert_close(conditional(x, 0.2), expected, rtol=1e-6, atol=1e-8)


def test_vanishing_noise_tends_to_no_noise():
    toy, clean, x = make_toy(noise_std=1e-7), make_toy(noise_std=0), states()
    make = ProximalConditioning()
    noisy = make(toy.prior, toy.operator, repeated(toy))(x, 0.2)
    torch.testing.assert_close(noisy, make(toy.prior, clean.operator, repeated(toy))(x, 0.2))


def test_huge_noise_leaves_the_prior():
    toy, x = make_toy(), states()
    toy.operator.noise_std = torch.tensor([1e6], dtype=torch.float64)
    conditional = ProximalConditioning()(toy.prior, toy.operator, repeated(toy))
    torch.testing.assert_close(conditional(x, 0.2), toy.prior(x, 0.2))


def test_rays_count_by_their_precision():
    toy, x, sigma = make_toy(), states(), 0.1
    std = torch.tensor([0.1, 0.2, 0.4, 0.1, 0.3, torch.inf], dtype=torch.float64)
    toy.operator.noise_std = std.reshape(1, 1, 1, 6)
    conditional = ProximalConditioning(num_iterations=12)(toy.prior, toy.operator, repeated(toy))
    a, precision = toy.operator.matrix, torch.diag(sigma**2 / std**2)
    rhs = toy.prior(x, sigma).flatten(1) + toy.y.flatten() @ precision @ a
    expected = torch.linalg.solve(torch.eye(12) + a.mT @ precision @ a, rhs.mT).mT.reshape(x.shape)
    torch.testing.assert_close(conditional(x, sigma), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("noise_std", [0.0, 0.1])
@pytest.mark.parametrize(
    "conditioning", [ProximalConditioning(), NormalisedGuidance(2.0)], ids=lambda c: type(c).__name__
)
def test_the_scale_of_the_operator_does_not_matter(conditioning, noise_std):
    x = states()
    outcomes = []
    for scale in (1.0, 37.0):
        toy = make_toy(noise_std, scale)
        outcomes.append(conditioning(toy.prior, toy.operator, repeated(toy))(x, 0.3))
    torch.testing.assert_close(*outcomes, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("conditioning", "misfit"),
    [
        (NormGuidance(0.7), lambda r, norm: r.norm(dim=1)),
        (SquaredNormGuidance(0.7), lambda r, norm: r.square().sum(dim=1) / r.norm(dim=1).detach()),
        (NormalisedGuidance(0.7), lambda r, norm: r.square().sum(dim=1) / (2 * norm**2)),
    ],
    ids=["norm", "squared", "normalised"],
)
def test_guidance_is_the_gradient_through_the_denoiser(conditioning, misfit):
    toy, x = make_toy(), states()
    y = repeated(toy)
    inside = x.clone().requires_grad_(True)
    residual = (toy.operator(toy.prior(inside, 0.3)) - y).flatten(1)
    (slope,) = torch.autograd.grad(misfit(residual, toy.operator.norm()).sum(), inside)
    guided = conditioning(toy.prior, toy.operator, y)(x, 0.3)
    torch.testing.assert_close(guided, toy.prior(x, 0.3) - 0.7 * slope, rtol=1e-6, atol=1e-8)
    assert not guided.requires_grad


def test_norm_guidance_survives_a_perfect_fit():
    toy = make_toy(noise_std=0)
    x = states(1)
    y = toy.operator(toy.prior(x, 0.3))
    guided = NormGuidance(0.7)(toy.prior, toy.operator, y)(x, 0.3)
    assert guided.isfinite().all()


def test_unconditional_is_the_prior():
    toy = make_toy()
    assert Unconditional()(toy.prior, None, None) is toy.prior


def test_bad_weights_are_refused():
    for make in (
        lambda: ProximalConditioning(num_iterations=0),
        lambda: ProximalConditioning(max_weight=0),
        lambda: ProximalConditioning(noise_factor=-1),
        lambda: NormGuidance(0),
    ):
        with pytest.raises(InputError):
            make()


@pytest.mark.parametrize(
    ("guidance", "cycle"), [(NormGuidance, 1.0), (SquaredNormGuidance, 2.0), (NormalisedGuidance, 0.0)]
)
def test_residual_normalised_steps_stall(guidance, cycle):
    """The data term alone: a step `c r / ||r||` ends in a two-cycle of mean residual `c ||A||^2 / 2`."""
    zeta = 0.05
    # One direction leads, as in CT.
    spectrum = torch.tensor([1.0, 0.3, 0.25, 0.2, 0.15, 0.1], dtype=torch.float64)
    left, right = (torch.linalg.qr(torch.randn(k, k, dtype=torch.float64))[0] for k in (6, 12))
    operator = DenseOperator(left @ (spectrum[:, None] * right[:6]), SHAPE)
    y = operator(torch.randn(1, *SHAPE, dtype=torch.float64))

    class Identity:
        def denoise_vjp(self, x, sigma, cotangent, *, generators=None):
            return x, cotangent(x)

    strength = zeta if cycle else 1.0
    step = guidance(strength)(Identity(), operator, y)
    x, residuals = torch.zeros(1, *SHAPE, dtype=torch.float64), []
    for _ in range(3000):
        x = step(x, 0.0)
        residuals.append(float((operator(x) - y).norm()))
    residual = (residuals[-1] + residuals[-2]) / 2
    floor = cycle * zeta * operator.norm() ** 2 / 2
    print(f"{guidance.__name__}: residual {residual:.2e}, predicted floor {floor:.2e}")
    assert residual == pytest.approx(floor, rel=0.02, abs=1e-8)
