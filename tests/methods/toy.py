"""A problem with a closed-form posterior: a Gaussian prior, a dense operator, Gaussian noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from invrecon.operators.base import LinearOperator
from invrecon.priors.analytic import GaussianPrior

SHAPE = (1, 3, 4)


class DenseOperator(LinearOperator):
    """`y = M x` for flattened images."""

    def __init__(self, matrix: Tensor, image_shape: tuple[int, ...], noise_std: Tensor | None = None) -> None:
        super().__init__(image_shape, (1, 1, matrix.shape[0]))
        self.register_buffer("matrix", matrix)
        self._anchor = matrix.new_empty(0)
        self.noise_std = noise_std

    def forward(self, x: Tensor) -> Tensor:
        """Returns `M x`."""
        return (x.flatten(1) @ self.matrix.mT).reshape(x.shape[0], *self.measurement_shape)

    def adjoint(self, y: Tensor) -> Tensor:
        """Returns `M^T y`."""
        return (y.flatten(1) @ self.matrix).reshape(y.shape[0], *self.image_shape)


@dataclass
class Toy:
    """n = 12, m = 6, singular values 1 to 0.2, prior eigenvalues 0.2 to 1.5, sigma_y = 0.1."""

    operator: DenseOperator
    prior: GaussianPrior
    truth: Tensor  # (1, 1, 3, 4)
    y: Tensor  # (1, 1, 1, 6)
    mean: Tensor  # of the posterior, (12,)
    covariance: Tensor  # of the posterior, (12, 12)
    basis: Tensor  # right singular vectors: 6 measured, then 6 of the null space

    def ratios(self, samples: Tensor) -> tuple[float, float, float]:
        """Returns the mean's relative error, and sample over posterior variance, measured and null space."""
        flat = samples.reshape(-1, self.mean.numel())
        error = float((flat.mean(dim=0) - self.mean).norm() / self.mean.norm())
        sampled = (flat @ self.basis).var(dim=0)
        exact = (self.basis.mT @ self.covariance @ self.basis).diagonal()
        measured, null = (float(sampled[part].sum() / exact[part].sum()) for part in (slice(0, 6), slice(6, 12)))
        return error, measured, null


def make_toy(noise_std: float = 0.1, scale: float = 1.0, seed: int = 0) -> Toy:
    """Returns the problem; `scale` multiplies the operator (and the noise): a method must not notice."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n, m = 12, 6
    left, right, basis = (torch.linalg.qr(normal(k, k))[0] for k in (m, n, n))
    matrix = scale * left @ (torch.linspace(1, 0.2, m, dtype=torch.float64)[:, None] * right.mT[:m])
    covariance = basis @ torch.diag(torch.linspace(0.2, 1.5, n, dtype=torch.float64)) @ basis.mT
    prior = GaussianPrior(normal(*SHAPE), covariance)
    std = torch.tensor([scale * noise_std], dtype=torch.float64)
    operator = DenseOperator(matrix, SHAPE, std if noise_std else None)
    truth = prior.sample([generator])
    # A draw for which the data matter: the operator's image of the truth plus noise.
    y = operator(truth) + scale * noise_std * normal(1, 1, 1, m)
    variance = max(float(std), 1e-9 * scale) ** 2
    gain = covariance @ matrix.mT @ torch.linalg.inv(matrix @ covariance @ matrix.mT + variance * torch.eye(m))
    mu = prior.mean.flatten()
    mean = mu + gain @ (y.flatten() - matrix @ mu)
    return Toy(operator, prior, truth, y, mean, covariance - gain @ matrix @ covariance, right)


def generators(num: int, seed: int = 0) -> list[torch.Generator]:
    """Returns `num` differently seeded generators."""
    return [torch.Generator().manual_seed(1000 * seed + i) for i in range(num)]
