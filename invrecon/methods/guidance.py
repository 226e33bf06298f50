"""Methods guided by a gradient through the network: DPS and PiGDM.

PaDIS, which is DPS under Langevin steps, has a module of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invrecon.errors import InputError
from invrecon.methods.base import per_sample
from invrecon.methods.conditioning import (
    Conditioning,
    Denoiser,
    DifferentiableDenoiser,
    NormalisedGuidance,
    ScaledNormGuidance,
)
from invrecon.methods.sampling import Sampler
from invrecon.methods.schedule import VPSchedule
from invrecon.methods.start import Start
from invrecon.methods.transitions import DDIM, DDSTransition, PriorNoise
from invrecon.operators.base import conjugate_gradient

if TYPE_CHECKING:
    from invrecon.operators.base import LinearOperator


class PiGDMConditioning(Conditioning):
    """Pseudo-inverse guidance: the gradient of a likelihood that knows how far off the denoised image may be.

        x0 = D + J_D(x)^T A^T (A A^T + c I)^{-1} (y - A D),   c = max(sigma_y^2 / r^2, ||A||^2 / max_weight)
        r^2 = sigma^2 prior_std^2 / (sigma^2 + prior_std^2)

    `r^2` is the variance of the image given the state if pixels have the variance `prior_std^2` each. The system is
    solved in the space of the measurements by conjugate gradients; the prior's vector-Jacobian product is exact. Where
    the noise differs between rays, rows are weighted first.

    Source: Song, Vahdat, Mardani & Kautz, "Pseudoinverse-guided diffusion models for inverse problems", ICLR 2023,
    Eq. 7 and Alg. 1, where `prior_std = 1` for images in [-1, 1].

    Args:
        num_iterations: CG iterations.
        prior_std: Standard deviation of the images, in intensity units.
        max_weight: Cap of `||A||^2 / c`; all there is without noise.
    """

    def __init__(self, num_iterations: int = 10, prior_std: float = 0.5, max_weight: float = 1000.0) -> None:
        if num_iterations < 1 or not prior_std > 0 or not max_weight > 0:
            raise InputError(
                "PiGDM needs num_iterations >= 1, prior_std > 0 and max_weight > 0, got "
                f"{num_iterations}, {prior_std} and {max_weight}."
            )
        self.num_iterations = num_iterations
        self.prior_std, self.max_weight = float(prior_std), float(max_weight)

    def __call__(self, prior: DifferentiableDenoiser, operator: LinearOperator, y: Tensor) -> Denoiser:
        """Returns the guided denoiser."""
        operator, y, std = operator.whiten(y)
        least = operator.norm() ** 2 / self.max_weight

        def conditional(
            x: Tensor, sigma: float | Tensor, *, generators: Sequence[torch.Generator] | None = None
        ) -> Tensor:
            c = x.new_full(x.shape[:1], least)
            if std is not None:
                precision = 1 / torch.as_tensor(sigma).to(x) ** 2 + 1 / self.prior_std**2
                c = c.maximum(std.to(x) ** 2 * precision)
            weight = per_sample(c, y)

            def cotangent(denoised: Tensor) -> Tensor:
                def apply(v: Tensor) -> Tensor:
                    return operator(operator.adjoint(v)) + weight * v

                residual = y - operator(denoised)
                return operator.adjoint(conjugate_gradient(apply, residual, max_iter=self.num_iterations, tol=0.0))

            denoised, step = prior.denoise_vjp(x, sigma, cotangent, generators=generators)
            return denoised + step

        return conditional


class DPS(Sampler):
    """Diffusion posterior sampling: the ancestral step, moved down the gradient of the residual's norm.

        x' = DDPM(x, D(x, sigma)) - (zeta / ||A||) grad_x ||A D(x, sigma) - y||

    The division by `||A||` makes a step for an operator of unit norm, as the published ones are, one for all; the
    length of the step does not shrink with the residual, so the image stays about `zeta` (Euclidean, all pixels) from
    the data. 1000 evaluations, each with a gradient through the network, two operator calls each. Asks of the operator
    its adjoint, of the prior a vector-Jacobian product. No posterior sampler: `zeta` decides how far the data count.

    Source: Chung, Kim, McCann, Klasky & Ye, "Diffusion posterior sampling for general noisy inverse problems", ICLR
    2023, Alg. 1, published with 1000 DDPM steps and `zeta` of 0.3 (blur, super-resolution) to 1 on images in [-1, 1],
    which is half as much on [0, 1], and variance-preserving states. In our coordinates the
    latter are `x / sqrt(1 + sigma^2)`: at low noise, where data act, the difference vanishes.

    Args:
        num_levels: Noise levels, and so denoiser evaluations.
        sigma_max: First noise level, in intensity units.
        sigma_min: Last noise level.
        zeta: Length of the data step, an image's Euclidean norm.
        start: The first state; pure noise if None.
        num_samples: Samples a case.
        samples_per_batch: How many samples of each case run at once; all if None.
        clip: Range to which samples are clipped at the end, or None.
    """

    needs_gradient = True

    def __init__(
        self,
        num_levels: int = 1000,
        sigma_max: float = 10.0,
        sigma_min: float = 0.002,
        zeta: float = 0.15,
        start: Start | None = None,
        num_samples: int = 1,
        samples_per_batch: int | None = None,
        clip: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        super().__init__(
            VPSchedule(num_levels, sigma_max, sigma_min),
            ScaledNormGuidance(zeta),
            PriorNoise(DDIM(eta=1.0)),
            start,
            num_samples,
            samples_per_batch,
            clip,
        )


class DPSNormalised(Sampler):
    """DPS with a data step that shrinks with the residual: no constant depends on operator or image size.

        x' = DDPM(x, D(x, sigma)) - w grad_x ||A D(x, sigma) - y||^2 / 2
        w = min(zeta / ||A||^2, (sigma^2 - sigma'^2) / sigma_y^2)

    The second weight is the reverse diffusion's step down the negative log-likelihood: data with noise are not fitted
    to the end. 1000 evaluations, each with a gradient through the network, two operator calls each. Asks of the
    operator its adjoint, of the prior a vector-Jacobian product. No posterior sampler: `D` stands for all images that
    the state may come from, and where data are exact they fix what they measure.

    Source: Chung et al., ICLR 2023, Eq. 16 and Alg. 1, with the squared norm and the step in units of `1 / ||A||^2`.

    Args:
        num_levels: Noise levels, and so denoiser evaluations.
        sigma_max: First noise level, in intensity units.
        sigma_min: Last noise level.
        zeta: Data step, dimensionless, below 2.
        start: The first state; pure noise if None.
        num_samples: Samples a case.
        samples_per_batch: How many samples of each case run at once; all if None.
        clip: Range to which samples are clipped at the end, or None.
    """

    needs_gradient = True

    def __init__(
        self,
        num_levels: int = 1000,
        sigma_max: float = 10.0,
        sigma_min: float = 0.002,
        zeta: float = 1.0,
        start: Start | None = None,
        num_samples: int = 1,
        samples_per_batch: int | None = None,
        clip: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        super().__init__(
            VPSchedule(num_levels, sigma_max, sigma_min),
            NormalisedGuidance(zeta),
            PriorNoise(DDIM(eta=1.0)),
            start,
            num_samples,
            samples_per_batch,
            clip,
        )


class PiGDM(Sampler):
    """Pseudo-inverse guidance between DDIM steps with a constant split of the noise.

        x' = D + g + sigma' (sqrt(1 - eta^2) eps + eta n),   eps = (x - D) / sigma,   g as in `PiGDMConditioning`

    100 evaluations, each with a gradient through the network; `2 + 2 k` operator calls for `k` CG iterations. Asks of
    the operator its adjoint, of the prior a vector-Jacobian product. Low `eta` gives estimates close to the MAP;
    `eta = 1` the posterior mean within a few percent and half the posterior's variance.

    Source: Song, Vahdat, Mardani & Kautz, ICLR 2023, Alg. 1, published with 100 steps and `eta = 1`.

    Args:
        num_levels: Noise levels, and so denoiser evaluations.
        sigma_max: First noise level, in intensity units.
        sigma_min: Last noise level.
        eta: Share of fresh noise, in [0, 1].
        cg_iterations: CG iterations of the guidance.
        prior_std: Standard deviation of the images, in intensity units.
        max_weight: Cap of the data's weight, in units of `1 / ||A||^2`; all there is without noise.
        start: The first state; pure noise if None.
        num_samples: Samples a case.
        samples_per_batch: How many samples of each case run at once; all if None.
        clip: Range to which samples are clipped at the end, or None.
    """

    needs_gradient = True

    def __init__(
        self,
        num_levels: int = 100,
        sigma_max: float = 10.0,
        sigma_min: float = 0.002,
        eta: float = 1.0,
        cg_iterations: int = 10,
        prior_std: float = 0.5,
        max_weight: float = 1000.0,
        start: Start | None = None,
        num_samples: int = 1,
        samples_per_batch: int | None = None,
        clip: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        super().__init__(
            VPSchedule(num_levels, sigma_max, sigma_min),
            PiGDMConditioning(cg_iterations, prior_std, max_weight),
            PriorNoise(DDSTransition(eta)),
            start,
            num_samples,
            samples_per_batch,
            clip,
        )
