"""Conditionings: wrappers that turn the prior's denoiser `E[x0 | x]` into an estimate of `E[x0 | x, y]`.

A conditioning holds only its knobs; called with a prior, an operator and a measurement it returns a denoiser
with the prior's signature, so the sampling loop cannot tell the two apart. Weights and steps are in units of
`1 / ||A||^2` where their source permits, so that no constant is tuned again for another geometry.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from invrecon.errors import InputError
from invrecon.methods.base import norm_per_sample, per_sample
from invrecon.methods.transitions import PriorNoise, Transition

if TYPE_CHECKING:
    from invrecon.methods.schedule import Schedule
    from invrecon.operators.base import LinearOperator
    from invrecon.priors.base import Cotangent


class Denoiser(Protocol):
    """Anything with the signature of a denoiser."""

    def __call__(
        self, x: Tensor, sigma: float | Tensor, *, generators: Sequence[torch.Generator] | None = None
    ) -> Tensor:
        """Returns an estimate of the clean image."""


class DifferentiableDenoiser(Denoiser, Protocol):
    """A denoiser that also gives its vector-Jacobian product."""

    def denoise_vjp(
        self,
        x: Tensor,
        sigma: float | Tensor,
        cotangent: Cotangent,
        *,
        generators: Sequence[torch.Generator] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns `D(x, sigma)` and `J_D(x)^T cotangent(D(x, sigma))`."""


StrengthAt = Callable[[Tensor, "float | Tensor"], "float | Tensor"]
"""The weight of a gradient, given a state and its level."""


class Conditioning(ABC):
    """Binds a prior to a measurement.

    Attributes:
        num_evaluations: Evaluations of the prior for one of the conditional denoiser.
        estimate: What it gives: an estimate of the "posterior", of the "prior" alone, or a "reflection" (the data's
            proximal map of a reflected state), after which other transitions stand.
    """

    num_evaluations: int = 1
    estimate: str = "posterior"

    def along(self, schedule: Schedule, transition: Transition) -> Conditioning:
        """Returns the conditioning for a run over these levels: itself, unless its weights depend on the step.

        Args:
            schedule: The levels that will be visited.
            transition: What leads from one to the next.
        """
        return self

    @abstractmethod
    def __call__(self, prior: DifferentiableDenoiser, operator: LinearOperator, y: Tensor) -> Denoiser:
        """Returns the conditional denoiser, an estimate of `E[x0 | x, y]`.

        Args:
            prior: The denoiser `D`.
            operator: The physics `A`, bound to these cases.
            y: Measurements `(B, *operator.measurement_shape)`.
        """


class Unconditional(Conditioning):
    """Ignores the measurement: `E[x0 | x]`."""

    estimate = "prior"

    def __call__(self, prior: DifferentiableDenoiser, operator: LinearOperator | None, y: Tensor | None) -> Denoiser:
        """Returns the prior itself."""
        return prior


class ProximalConditioning(Conditioning):
    """Pulls the denoised image towards the data by a few conjugate-gradient iterations.

        x0 = argmin_z 1/2 ||z - D||^2 + gamma/2 ||A z - y||^2,   i.e.  (I + gamma A^T A) x0 = D + gamma A^T y
        gamma = min(noise_factor sigma^2 / sigma_y^2, max_weight / ||A||^2)

    This is `E[x0 | x, y]` if `p(x0 | x) = N(D, noise_factor sigma^2 I)`. Without noise only the cap is left:
    the system stays well conditioned and CG, started at `D`, moves only where the data speak. Where the noise
    differs between rays, rows are weighted first (`operator.whiten`). No gradient goes through the network.

    Source: Chung, Lee & Ye, DDS, ICLR 2024 (CG data step, constant gamma); Zhu et al., "Denoising diffusion models
    for plug-and-play image restoration" (DiffPIR), CVPR Workshops 2023, Eq. 13 (the weight `sigma^2 / sigma_y^2`).

    Args:
        num_iterations: CG iterations.
        max_weight: Cap of `gamma ||A||^2`, dimensionless.
        noise_factor: Assumed variance of `x0` given `x`, in units of `sigma^2`. Below 1 it trusts the prior more.
    """

    def __init__(self, num_iterations: int = 10, max_weight: float = 1000.0, noise_factor: float = 1.0) -> None:
        if num_iterations < 1 or not max_weight > 0 or not noise_factor > 0:
            raise InputError(
                "Proximal conditioning needs num_iterations >= 1, max_weight > 0 and noise_factor > 0, got "
                f"{num_iterations}, {max_weight} and {noise_factor}."
            )
        self.num_iterations = num_iterations
        self.max_weight = float(max_weight)
        self.noise_factor = float(noise_factor)

    def __call__(self, prior: DifferentiableDenoiser, operator: LinearOperator, y: Tensor) -> Denoiser:
        """Returns `prox o D`."""
        operator, y, std = operator.whiten(y)
        norm = operator.norm()

        def conditional(
            x: Tensor, sigma: float | Tensor, *, generators: Sequence[torch.Generator] | None = None
        ) -> Tensor:
            point = self.anchor(x, prior(x, sigma, generators=generators))
            return operator.prox(point, y, self.weight(sigma, std, norm, x), max_iter=self.num_iterations)

        return conditional

    def anchor(self, x: Tensor, denoised: Tensor) -> Tensor:
        """Returns the image that is pulled towards the data: the denoised one."""
        return denoised

    def weight(self, sigma: float | Tensor, std: Tensor | None, norm: float, like: Tensor) -> Tensor:
        """Returns `gamma` of every sample, `(B,)`.

        Args:
            sigma: The level.
            std: `sigma_y`, `(B,)`; None without noise.
            norm: `||A||`.
            like: Samples, for number, dtype and device.
        """
        cap = self.max_weight / norm**2
        if std is None:
            return torch.full(like.shape[:1], cap, dtype=like.dtype, device=like.device)
        return (self.noise_factor * (sigma / std.to(like)) ** 2).clamp(max=cap).expand(like.shape[0])


class ReflectedConditioning(ProximalConditioning):
    """Pulls the reflection of the state at the denoised image towards the data, `x0 = prox(2 D - x)`.

    With `DouglasRachford` for a transition this is ADMM: the state is image and scaled dual variable in one.

    Source: Eckstein & Bertsekas, "On the Douglas-Rachford splitting method and the proximal point algorithm for maximal
    monotone operators", Math. Program. 55, 1992; Venkatakrishnan, Bouman & Wohlberg, GlobalSIP 2013, for the denoiser
    in place of a proximal map. Weight and CG are those of `ProximalConditioning`.
    """

    estimate = "reflection"

    def anchor(self, x: Tensor, denoised: Tensor) -> Tensor:
        """Returns `2 D - x`."""
        return 2 * denoised - x


class DPSConditioning(Conditioning):
    """Diffusion posterior sampling: a gradient through the denoiser.

        x0 = D(x) - strength grad_x L(D(x)),   grad_x L = J_D(x)^T A^T w(r),   r = A D(x) - y

    By Tweedie's formula `E[x0 | x, y] = D + sigma^2 grad log p(y | x)`. Under Langevin steps of size
    `epsilon sigma^2`, `strength = 2 zeta / epsilon` moves the state by `-zeta grad_x L` beside the prior's
    step. The subclasses say what `L` is. The gradient is the prior's exact vector-Jacobian product: the loop
    holds no graph.

    Source: Chung et al., "Diffusion posterior sampling for general noisy inverse problems", ICLR 2023, Alg.
        1.

    Args:
        strength: Weight of the gradient.
    """

    def __init__(self, strength: float) -> None:
        if not strength > 0:
            raise InputError(f"The strength of a guidance is {strength}, but it has to be above 0.")
        self.strength = float(strength)

    @abstractmethod
    def weigh(self, residual: Tensor, operator: LinearOperator) -> Tensor:
        """Returns `w(r)`, the gradient of the misfit with respect to `A D`, shaped like `residual`."""

    def __call__(self, prior: DifferentiableDenoiser, operator: LinearOperator, y: Tensor) -> Denoiser:
        """Returns the guided denoiser."""
        return self._guide(prior, operator, y, lambda x, sigma: self.strength)

    def _guide(
        self, prior: DifferentiableDenoiser, operator: LinearOperator, y: Tensor, strength_at: StrengthAt
    ) -> Denoiser:
        def cotangent(denoised: Tensor) -> Tensor:
            return operator.adjoint(self.weigh(operator(denoised) - y, operator))

        def conditional(
            x: Tensor, sigma: float | Tensor, *, generators: Sequence[torch.Generator] | None = None
        ) -> Tensor:
            denoised, gradient = prior.denoise_vjp(x, sigma, cotangent, generators=generators)
            return denoised - strength_at(x, sigma) * gradient

        return conditional


class NormGuidance(DPSConditioning):
    """`L = ||r||`, not squared, as DPS and the code released with PaDIS have it: `w(r) = r / ||r||`.

    The step's length does not shrink with the residual, so the data term ends in a two-cycle whose residual
    is proportional to `||A||^2`: it never fits better than that.
    """

    def weigh(self, residual: Tensor, operator: LinearOperator) -> Tensor:
        """Returns `r / ||r||`, per sample."""
        length = norm_per_sample(residual).clamp(min=torch.finfo(residual.dtype).tiny)
        return residual / per_sample(length, residual)


class ScaledNormGuidance(NormGuidance):
    """`L = ||r|| / ||A||`: DPS's step for an operator of unit norm, whatever its scale, `w(r) = r / (||A|| ||r||)`.

    The two-cycle is left at a distance of the strength's size (Euclidean, over the whole image).
    """

    def weigh(self, residual: Tensor, operator: LinearOperator) -> Tensor:
        """Returns `r / (||A|| ||r||)`, per sample."""
        return super().weigh(residual, operator) / operator.norm()


class SquaredNormGuidance(NormGuidance):
    """`grad ||r||^2 / ||r||`, as the PaDIS paper has it: `w(r) = 2 r / ||r||`, twice the code's step."""

    def weigh(self, residual: Tensor, operator: LinearOperator) -> Tensor:
        """Returns `2 r / ||r||`, per sample."""
        return 2 * super().weigh(residual, operator)


class NormalisedGuidance(DPSConditioning):
    """`L = ||r||^2 / (2 ||A||^2)`, but never more than the negative log-likelihood where there is noise.

        x0 = D - min(strength / ||A||^2, sigma^2 / sigma_y^2) J_D(x)^T A^T r

    Free of the geometry's scale, and it does not stall. The second weight is that of Tweedie's formula with the
    likelihood `p(y | D)`: as the level falls the data lose weight against the prior, and their noise is not fitted.
    Where the noise differs between rays, rows are weighted first (`operator.whiten`).

    Under a transition that adds all of `x0 - D` to the state (`PriorNoise`) the second weight is
    `(sigma^2 - sigma'^2) / sigma_y^2`, so that the steps of all levels add up as they should.

    Args:
        strength: Weight of the gradient, in units of `1 / ||A||^2`.
    """

    def __init__(self, strength: float) -> None:
        super().__init__(strength)
        self._released: dict[float, float] | None = None  # `sigma^2 - sigma'^2` by level; None is `sigma^2`

    def along(self, schedule: Schedule, transition: Transition) -> NormalisedGuidance:
        """Returns the guidance for a run over these levels."""
        if not isinstance(transition, PriorNoise):
            return self
        clone = copy.copy(self)
        clone._released = {sigma: sigma**2 - after**2 for sigma, after in schedule.steps()}
        return clone

    def __call__(self, prior: DifferentiableDenoiser, operator: LinearOperator, y: Tensor) -> Denoiser:
        """Returns the guided denoiser."""
        operator, y, std = operator.whiten(y)
        if std is None:
            return super().__call__(prior, operator, y)
        noise, squared_norm = std, operator.norm() ** 2

        def strength_at(x: Tensor, sigma: float | Tensor) -> Tensor:
            variance = sigma**2 if self._released is None else self._released[float(sigma)]
            likelihood = variance * squared_norm / noise.to(x) ** 2
            return per_sample(likelihood.clamp(max=self.strength).expand(x.shape[0]), x)

        return self._guide(prior, operator, y, strength_at)

    def weigh(self, residual: Tensor, operator: LinearOperator) -> Tensor:
        """Returns `r / ||A||^2`."""
        return residual / operator.norm() ** 2
