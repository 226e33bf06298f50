"""Draws from a Gaussian likelihood times a Gaussian round an image: the data step of posterior samplers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invrecon.errors import InputError
from invrecon.methods.base import per_sample
from invrecon.rng import randn

if TYPE_CHECKING:
    from invrecon.operators.base import LinearOperator

DataDraw = Callable[[Tensor, float, Sequence[torch.Generator]], Tensor]
"""Draws an image near `x0`, at a distance of about `r`, that fits the data: `(x0, r, generators) -> z`."""


class DataSampler(ABC):
    """Draws from `p(z) ~ exp(-||A z - y||^2 / (2 sigma_y^2) - ||z - x0||^2 / (2 r^2))`.

    The weight `r^2 / sigma_y^2` is at most `max_weight / ||A||^2`, all there is without noise: the data then count as
    having the noise `r ||A|| / sqrt(max_weight)`, which falls with `r`. Where the noise differs between rays, rows are
    weighted first.

    Args:
        max_weight: See above, dimensionless.
    """

    def __init__(self, max_weight: float) -> None:
        if not max_weight > 0:
            raise InputError(f"max_weight is {max_weight}, but it has to be above 0.")
        self.max_weight = float(max_weight)

    def __call__(self, operator: LinearOperator, y: Tensor) -> DataDraw:
        """Returns what draws for one measurement."""
        operator, y, std = operator.whiten(y)
        cap = self.max_weight / operator.norm() ** 2

        def draw(x0: Tensor, r: float, generators: Sequence[torch.Generator]) -> Tensor:
            gamma = x0.new_full(x0.shape[:1], cap)
            if std is not None:
                gamma = gamma.minimum((r / std.to(x0)) ** 2)
            return self.draw(operator, y, x0, r, gamma, generators)

        return draw

    @abstractmethod
    def draw(
        self,
        operator: LinearOperator,
        y: Tensor,
        x0: Tensor,
        r: float,
        gamma: Tensor,
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """Returns `z`, of density proportional to `exp(-(gamma ||A z - y||^2 + ||z - x0||^2) / (2 r^2))`.

        Args:
            operator: The physics, with homogeneous noise.
            y: Measurements.
            x0: Images `(B, *image_shape)`.
            r: Coupling to `x0`, in intensity units.
            gamma: Weight of the data `(B,)`.
            generators: One generator a sample.
        """


class ExactDataSampler(DataSampler):
    """Perturb and solve: one proximal map draws exactly, up to the tolerance of its conjugate gradients.

        z = argmin gamma ||A z - (y + r n_1 / sqrt(gamma))||^2 + ||z - (x0 + r n_2)||^2

    Two operator calls an iteration, and two.

    Source: Papandreou & Yuille, "Gaussian sampling by local perturbations", NeurIPS 2010, Sec. 3.

    Args:
        num_iterations: CG iterations.
        max_weight: Cap of the data's weight, in units of `1 / ||A||^2`.
    """

    def __init__(self, num_iterations: int = 20, max_weight: float = 1000.0) -> None:
        super().__init__(max_weight)
        if num_iterations < 1:
            raise InputError(f"The exact data step needs num_iterations >= 1, got {num_iterations}.")
        self.num_iterations = num_iterations

    def draw(
        self,
        operator: LinearOperator,
        y: Tensor,
        x0: Tensor,
        r: float,
        gamma: Tensor,
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """Returns `z`."""
        around = randn(x0.shape[1:], generators, x0).mul_(r).add_(x0)
        data = randn(y.shape[1:], generators, y).mul_(per_sample(r / gamma.sqrt(), y)).add_(y)
        return operator.prox(around, data, gamma, max_iter=self.num_iterations)


class LangevinDataSampler(DataSampler):
    """Unadjusted Langevin steps from `x0`.

        z <- z - h (gamma A^T (A z - y) + z - x0) + r sqrt(2 h) n,   h = step / (1 + gamma ||A||^2)

    in units of `r^2`: `step` is a share of the largest stable step's half. Directions that neither data nor `x0` hold
    tightly need about `(1 + gamma ||A||^2) / step` steps. Two operator calls a step, and one to begin.

    Args:
        num_steps: Langevin steps.
        step: Step in units of the inverse curvature, in (0, 2).
        max_weight: Cap of the data's weight, in units of `1 / ||A||^2`.
    """

    def __init__(self, num_steps: int = 100, step: float = 0.2, max_weight: float = 1000.0) -> None:
        super().__init__(max_weight)
        if num_steps < 1 or not 0 < step < 2:
            raise InputError(f"Langevin data steps need num_steps >= 1 and 0 < step < 2, got {num_steps} and {step}.")
        self.num_steps, self.step = num_steps, float(step)

    def draw(
        self,
        operator: LinearOperator,
        y: Tensor,
        x0: Tensor,
        r: float,
        gamma: Tensor,
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """Returns `z`."""
        h = self.step / (1 + gamma * operator.norm() ** 2)
        pull, weight, spread = per_sample(h, x0), per_sample(h * gamma, x0), per_sample(r * (2 * h).sqrt(), x0)
        target, z = operator.adjoint(y), x0.clone()
        drift, other = torch.empty_like(z), torch.empty_like(z)  # the operator's own images may be others', and stay
        for _ in range(self.num_steps):
            drift.copy_(operator.normal(z)).sub_(target).mul_(weight)
            z.sub_(drift.add_(other.copy_(z).sub_(x0).mul_(pull)))
            other = randn(x0.shape[1:], generators, x0, out=other)
            z.add_(other.mul_(spread))
        return z
