"""Self-supervised losses: how well a denoised image, or what a data step makes of it, explains the measurement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from invrecon.errors import InputError
from invrecon.methods.classical import gradient
from invrecon.operators.base import LinearOperator


class SelfSupervisedLoss(ABC):
    """A loss of the denoised image that needs the measurement alone; a plain object that holds only its knobs."""

    @abstractmethod
    def __call__(self, denoised: Tensor, operator: LinearOperator, y: Tensor) -> Tensor:
        """Returns the loss of every sample, `(B,)`, differentiable in `denoised`.

        Args:
            denoised: `D(x, sigma)`, `(B, *operator.image_shape)`.
            operator: The physics `A`, bound to these cases.
            y: Measurements `(B, *operator.measurement_shape)`.
        """

    def cotangent(self, denoised: Tensor, operator: LinearOperator, y: Tensor) -> Tensor:
        """Returns the gradient of every sample's loss with respect to `denoised`, by autograd; no graph stays."""
        with torch.enable_grad():
            leaf = denoised.detach().requires_grad_(True)
            return torch.autograd.grad(self(leaf, operator, y).sum(), leaf)[0]


class DataLoss(SelfSupervisedLoss):
    r"""The misfit of the denoised image itself.

    $$ L(D) = \frac{1}{m} \|A D - y\|^2 + w\, TV(D) $$

    A mean over the measurement, a sum over the image. Where the noise differs between rays, rows are weighted first
    (`operator.whiten`).

    Source: Hu, Song, Fessler & Shen, "Test-time adaptation improves inverse problem solving with patch-based diffusion
    models", IEEE TCI 11 (2025), with `D` assembled from patches.

    Args:
        tv_weight: `w`.

    Raises:
        InputError: A negative weight.
    """

    def __init__(self, tv_weight: float = 0.0) -> None:
        if not tv_weight >= 0:
            raise InputError(f"{type(self).__name__}: tv_weight is {tv_weight}, but it must not be negative.")
        self.tv_weight = float(tv_weight)

    def __call__(self, denoised: Tensor, operator: LinearOperator, y: Tensor) -> Tensor:
        """Returns the loss of every sample, `(B,)`."""
        operator, y, _ = operator.whiten(y)
        return self._misfit(denoised, operator, y)

    def _misfit(self, x: Tensor, operator: LinearOperator, y: Tensor) -> Tensor:
        misfit = (operator(x) - y).square().flatten(1).mean(dim=1)
        return misfit + self.tv_weight * _total_variation(x) if self.tv_weight else misfit


class ProximalDataLoss(DataLoss):
    r"""The misfit that a data step leaves.

    $$ L(D) = \frac{1}{m} \|A z - y\|^2 + w\, TV(z), \quad z = (I + \gamma A^T A)^{-1} (D + \gamma A^T y), \quad
       \gamma = weight / \|A\|^2 $$

    with `z` by a few conjugate-gradient iterations from `D`, through which the gradient is unrolled. What the data step
    mends by itself counts little: the signal is in what it cannot.

    Source: Barbano, Denker et al., "Steerable conditional diffusion", IEEE TMI 2025 (3 iterations, TV); Chung & Ye,
    "Deep diffusion image prior", ECCV 2024 (5 iterations).

    Args:
        num_iterations: CG iterations.
        weight: `gamma ||A||^2`, dimensionless. The default is the cap of the samplers' own data step.
        tv_weight: `w`.

    Raises:
        InputError: No iteration, or a weight out of range.
    """

    def __init__(self, num_iterations: int = 5, weight: float = 1000.0, tv_weight: float = 0.0) -> None:
        super().__init__(tv_weight)
        if num_iterations < 1 or not weight > 0:
            raise InputError(
                f"{type(self).__name__} needs num_iterations >= 1 and weight > 0, got {num_iterations} and {weight}."
            )
        self.num_iterations = num_iterations
        self.weight = float(weight)

    def __call__(self, denoised: Tensor, operator: LinearOperator, y: Tensor) -> Tensor:
        """Returns the loss of every sample, `(B,)`."""
        operator, y, _ = operator.whiten(y)
        return self._misfit(self._prox(denoised, operator, y), operator, y)

    def _prox(self, denoised: Tensor, operator: LinearOperator, y: Tensor) -> Tensor:
        return operator.prox(denoised, y, self.weight / operator.norm() ** 2, max_iter=self.num_iterations)


class ImplicitProximalDataLoss(ProximalDataLoss):
    r"""The same loss with the gradient of the exact data step, by one more CG solve instead of a graph through CG.

    $$ \nabla_D L = (I + \gamma A^T A)^{-1} \nabla_z L $$

    since `z` is linear in `D` and its matrix symmetric (implicit differentiation of the normal equations). Exact
    once CG has converged; after few iterations it differs from the gradient of what was computed.
    """

    def _prox(self, denoised: Tensor, operator: LinearOperator, y: Tensor) -> Tensor:
        return _ImplicitProx.apply(denoised, operator, y, self.weight / operator.norm() ** 2, self.num_iterations)


class _ImplicitProx(torch.autograd.Function):
    """`D -> prox(D)`, whose derivative is taken to be that of the exact solution."""

    @staticmethod
    def forward(
        ctx: Any, denoised: Tensor, operator: LinearOperator, y: Tensor, gamma: float, num_iterations: int
    ) -> Tensor:
        ctx.operator, ctx.zero, ctx.gamma, ctx.num_iterations = operator, torch.zeros_like(y), gamma, num_iterations
        return operator.prox(denoised, y, gamma, max_iter=num_iterations)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None, None, None, None]:
        # With y = 0 the proximal map is the matrix (I + gamma A^T A)^{-1} itself.
        return ctx.operator.prox(v, ctx.zero, ctx.gamma, max_iter=ctx.num_iterations), None, None, None, None


def _total_variation(x: Tensor) -> Tensor:
    """Returns the isotropic total variation `(B,)`, with subgradient 0 where the image is constant."""
    return torch.linalg.vector_norm(gradient(x), dim=0).flatten(1).sum(dim=1)
