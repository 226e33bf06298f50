"""Priors whose denoiser has a closed form: what every sampler is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from invrecon.errors import InputError
from invrecon.priors.base import Cotangent, Prior, broadcast, per_sample
from invrecon.rng import Generators, randn


class GaussianPrior(Prior):
    """A Gaussian, `x0 ~ N(mu, C)`.

        D(x, sigma) = mu + C (C + sigma^2 I)^{-1} (x - mu)

    Dense: for images of up to a few thousand pixels. The Jacobian of `D` is symmetric, so it is its own
        adjoint.

    Args:
        mean: `mu`, one image `(C, *S)`.
        covariance: `C`, symmetric and positive semi-definite, `(n, n)` with `n = C * prod(S)` (row-major).

    Raises:
        InputError: Shapes do not fit, or the covariance is not symmetric positive semi-definite.
    """

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        super().__init__()
        n = mean.numel()
        if covariance.shape != (n, n):
            raise InputError(f"The covariance has shape {tuple(covariance.shape)}, but {n} pixels ask for ({n}, {n}).")
        eigenvalues, eigenvectors = torch.linalg.eigh(covariance.double())
        scale = float(eigenvalues.abs().max())
        tolerance = 1e-5 * scale
        if not torch.allclose(covariance, covariance.mT, atol=tolerance) or eigenvalues.min() < -tolerance:
            raise InputError("The covariance is not symmetric positive semi-definite.")
        self.register_buffer("mean", mean)
        self.register_buffer("eigenvalues", eigenvalues.clamp(min=0).to(mean.dtype))
        self.register_buffer("eigenvectors", eigenvectors.to(mean.dtype))

    mean: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor

    def shrink(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """Returns `C (C + sigma^2 I)^{-1} x`, the Jacobian of `D` applied to `x` `(B, C, *S)`."""
        variance = per_sample(sigma, x)[:, None].square()
        gain = self.eigenvalues / (self.eigenvalues + variance)
        gain = torch.where(variance > 0, gain, torch.ones_like(gain))
        # One product a sample: the rounding, too, does not depend on the batch.
        basis = self.eigenvectors.expand(x.shape[0], -1, -1)
        spectrum = gain[:, None] * torch.bmm(x.flatten(1)[:, None], basis)
        return torch.bmm(spectrum, basis.mT).reshape(x.shape)

    def forward(self, x: Tensor, sigma: float | Tensor, *, generators: Generators | None = None) -> Tensor:
        """Returns `D(x, sigma)`, exactly."""
        return self.mean + self.shrink(x - self.mean, sigma)

    def denoise_vjp(
        self, x: Tensor, sigma: float | Tensor, cotangent: Cotangent, *, generators: Generators | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns `D(x, sigma)` and `J^T cotangent(D)`, in closed form."""
        x0 = self(x, sigma)
        return x0, self.shrink(cotangent(x0), sigma)

    def sample(self, generators: Generators) -> Tensor:
        """Returns one image per generator, `(B, C, *S)`."""
        white = randn(self.mean.shape, generators, self.mean).flatten(1)
        deviation = (white * self.eigenvalues.sqrt()) @ self.eigenvectors.mT
        return self.mean + deviation.reshape(-1, *self.mean.shape)


class GaussianMixturePrior(Prior):
    """A mixture of Gaussians, `x0 ~ sum_k w_k N(mu_k, C_k)`.

        D(x, sigma) = sum_k r_k(x) D_k(x, sigma),   r_k(x) proportional to w_k N(x; mu_k, C_k + sigma^2 I)

    with the denoisers `D_k` of the components. Its vector-Jacobian product is that of `Prior`, by autograd.

    Args:
        weights: `w_k > 0`, `(K,)`; scaled to sum to 1.
        means: `mu_k`, `(K, C, *S)`.
        covariances: `C_k`, `(K, n, n)`.

    Raises:
        InputError: Shapes do not fit, or a weight is not positive.
    """

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor) -> None:
        super().__init__()
        if weights.ndim != 1 or not len(weights) == len(means) == len(covariances) or not (weights > 0).all():
            raise InputError(
                "A mixture needs as many positive weights as means and covariances, got "
                f"{tuple(weights.shape)}, {tuple(means.shape)} and {tuple(covariances.shape)}."
            )
        self.register_buffer("weights", weights / weights.sum())
        self.components = torch.nn.ModuleList(
            GaussianPrior(mean, covariance) for mean, covariance in zip(means, covariances, strict=True)
        )

    weights: Tensor

    def responsibilities(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """Returns `r_k(x)`, the probability of every component given the noisy image, `(B, K)`."""
        variance = per_sample(sigma, x)[:, None].square()
        logits = []
        for weight, component in zip(self.weights, self.components, strict=True):
            assert isinstance(component, GaussianPrior)
            spectrum = component.eigenvalues + variance
            white = (x - component.mean).flatten(1) @ component.eigenvectors
            logits.append(weight.log() - 0.5 * (white.square() / spectrum + spectrum.log()).sum(dim=1))
        return torch.stack(logits, dim=1).softmax(dim=1)

    def forward(self, x: Tensor, sigma: float | Tensor, *, generators: Generators | None = None) -> Tensor:
        """Returns `D(x, sigma)`, exactly."""
        share = self.responsibilities(x, sigma)
        parts = [broadcast(share[:, k], x) * component(x, sigma) for k, component in enumerate(self.components)]
        return torch.stack(parts).sum(dim=0)
