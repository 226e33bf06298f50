import pytest
import torch

from invrecon.errors import InputError
from invrecon.priors.analytic import GaussianMixturePrior, GaussianPrior
from invrecon.priors.base import Prior
from tests.methods.toy import SHAPE, generators, make_toy

MIXTURE = dict(
    weights=torch.tensor([0.3, 0.7], dtype=torch.float64),
    means=torch.tensor([-1.0, 0.8], dtype=torch.float64).reshape(2, 1, 1, 1),
    covariances=torch.tensor([0.04, 0.25], dtype=torch.float64).reshape(2, 1, 1),
)


def test_gaussian_denoiser_is_the_posterior_mean():
    prior = make_toy().prior
    covariance = prior.eigenvectors @ torch.diag(prior.eigenvalues) @ prior.eigenvectors.mT
    x = torch.randn(5, *SHAPE, dtype=torch.float64)
    sigma = torch.tensor([0.01, 0.1, 0.5, 1.0, 10.0], dtype=torch.float64)
    for k in range(5):
        inverse = torch.linalg.inv(covariance + sigma[k] ** 2 * torch.eye(12))
        expected = prior.mean.flatten() + covariance @ inverse @ (x[k] - prior.mean).flatten()
        torch.testing.assert_close(prior(x, sigma)[k].flatten(), expected)


def test_gaussian_denoiser_without_noise_is_the_identity_even_where_flat():
    prior = GaussianPrior(torch.zeros(1, 1, 2), torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    x = torch.randn(3, 1, 1, 2)
    torch.testing.assert_close(prior(x, 0.0), x)


def test_samples_have_the_prior_moments():
    prior = make_toy().prior
    x = prior.sample(generators(20000)).flatten(1)
    covariance = prior.eigenvectors @ torch.diag(prior.eigenvalues) @ prior.eigenvectors.mT
    assert (x.mean(dim=0) - prior.mean.flatten()).abs().max() < 0.04
    assert (x.mT.cov() - covariance).abs().max() < 0.06


def test_mixture_denoiser_against_numerical_integration():
    prior = GaussianMixturePrior(**MIXTURE)
    grid = torch.linspace(-6, 6, 20001, dtype=torch.float64)
    density = sum(
        w * torch.exp(-((grid - m) ** 2) / (2 * c)) / c.sqrt()
        for w, m, c in zip(
            MIXTURE["weights"], MIXTURE["means"].flatten(), MIXTURE["covariances"].flatten(), strict=True
        )
    )
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    for sigma in (0.1, 0.5, 2.0):
        posterior = density * torch.exp(-((x[:, None] - grid) ** 2) / (2 * sigma**2))
        expected = (posterior * grid).sum(dim=1) / posterior.sum(dim=1)
        torch.testing.assert_close(prior(x.reshape(-1, 1, 1, 1), sigma).flatten(), expected, rtol=1e-8, atol=1e-8)


def test_a_mixture_of_one_is_the_gaussian():
    prior = make_toy().prior
    covariance = prior.eigenvectors @ torch.diag(prior.eigenvalues) @ prior.eigenvectors.mT
    mixture = GaussianMixturePrior(torch.ones(1), prior.mean[None], covariance[None])
    x = torch.randn(3, *SHAPE, dtype=torch.float64)
    torch.testing.assert_close(mixture(x, 0.3), prior(x, 0.3))


@pytest.mark.parametrize("make", [lambda: make_toy().prior, lambda: GaussianMixturePrior(**MIXTURE)])
def test_vjp_is_that_of_autograd_and_of_finite_differences(make):
    prior = make()
    shape = SHAPE if isinstance(prior, GaussianPrior) else (1, 1, 1)
    x, v, u = (torch.randn(4, *shape, dtype=torch.float64) for _ in range(3))
    with torch.no_grad():
        x0, product = prior.denoise_vjp(x, 0.4, lambda x0: v + 0 * x0)
    reference, expected = Prior.denoise_vjp(prior, x, 0.4, lambda x0: v)
    torch.testing.assert_close(x0, reference)
    torch.testing.assert_close(product, expected)
    step = 1e-5
    slope = ((prior(x + step * u, 0.4) - prior(x - step * u, 0.4)) * v).sum() / (2 * step)
    torch.testing.assert_close((product * u).sum(), slope, rtol=1e-6, atol=1e-8)
    assert not product.requires_grad


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="covariance"):
        GaussianPrior(torch.zeros(1, 2, 2), torch.eye(3))
    with pytest.raises(InputError, match="semi-definite"):
        GaussianPrior(torch.zeros(1, 1, 2), torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
    with pytest.raises(InputError, match="weights"):
        GaussianMixturePrior(torch.ones(3), MIXTURE["means"], MIXTURE["covariances"])
