"""Methods that bring the denoised image back to the data, with no gradient through the network: DDS, DiffPIR, DDNM.

All are one evaluation a level. Published settings are for images in [-1, 1]; noise levels here are for [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invrecon.errors import InputError
from invrecon.methods.base import check_complex_range, check_range, per_sample
from invrecon.methods.conditioning import Conditioning, Denoiser, DifferentiableDenoiser, ProximalConditioning
from invrecon.methods.sampling import Sampler
from invrecon.methods.schedule import GeometricSchedule, VPSchedule
from invrecon.methods.start import Start
from invrecon.methods.transitions import DDSTransition, Langevin, PriorNoise

if TYPE_CHECKING:
    from invrecon.operators.base import LinearOperator


class KrylovConditioning(Conditioning):
    """A few conjugate-gradient iterations from the denoised image, with a weight that no noise level changes.

        without noise:  CG on A^T A x0 = A^T y, from D
        with noise:     (I + gamma A^T A) x0 = D + gamma A^T y
                        gamma = min(prior_std^2 / sigma_y^2, max_weight / ||A||^2)

    `gamma` is the one of the true likelihood if the denoised image is off by `prior_std`. Where the noise differs
    between rays, rows are weighted first.

    Source: Chung, Lee & Ye, "Decomposed diffusion sampler for accelerating large-scale inverse problems" (DDS), ICLR
    2024, Alg. 2 and 3.

    Args:
        num_iterations: CG iterations.
        prior_std: Error of the denoised image, in intensity units.
        max_weight: Cap of `gamma ||A||^2`, dimensionless.
    """

    def __init__(self, num_iterations: int = 5, prior_std: float = 0.1, max_weight: float = 1000.0) -> None:
        if num_iterations < 1 or not prior_std > 0 or not max_weight > 0:
            raise InputError(
                "Krylov conditioning needs num_iterations >= 1, prior_std > 0 and max_weight > 0, got "
                f"{num_iterations}, {prior_std} and {max_weight}."
            )
        self.num_iterations = num_iterations
        self.prior_std, self.max_weight = float(prior_std), float(max_weight)

    def __call__(self, prior: DifferentiableDenoiser, operator: LinearOperator, y: Tensor) -> Denoiser:
        """Returns `CG o D`."""
        operator, y, std = operator.whiten(y)
        gamma = None if std is None else (self.prior_std / std) ** 2
        if gamma is not None:
            gamma = gamma.clamp(max=self.max_weight / operator.norm() ** 2)

        def conditional(
            x: Tensor, sigma: float | Tensor, *, generators: Sequence[torch.Generator] | None = None
        ) -> Tensor:
            denoised = prior(x, sigma, generators=generators)
            if gamma is None:
                return denoised + operator.pinv(y - operator(denoised), max_iter=self.num_iterations, tol=0.0)
            return operator.prox(denoised, y, gamma, max_iter=self.num_iterations)

        return conditional


class PinvConditioning(Conditioning):
    """Takes the range from the data and the null space from the prior.

        x0 = D + lambda A^+ (y - A D),    lambda = min(1, sigma ||A|| / sigma_y)

    `A^+` is a few CG iterations, which also keep it from amplifying noise. Without noise `lambda = 1`. With noise
    the correction fades as the level falls below that of the noise, by one factor for all singular values, as if they
    were equal, and the noise that it brings is not taken off the transition's: where noise is comparable to the data
    take `DDNMPlus`, which does both, singular value by singular value.

    Source: Wang, Yu & Zhang, "Zero-shot image restoration using denoising diffusion null-space model" (DDNM), ICLR
    2023, Eq. 13; `lambda` is a simplification of its Eq. 17 to 19.

    Args:
        num_iterations: CG iterations of the pseudo-inverse.
        clip: Range to which the estimate is clipped, or None.
    """

    def __init__(self, num_iterations: int = 10, clip: tuple[float, float] | None = None) -> None:
        if num_iterations < 1:
            raise InputError(f"The pseudo-inverse needs num_iterations >= 1, got {num_iterations}.")
        check_range("clip", clip)
        self.num_iterations = num_iterations
        self.clip = clip

    def correction(self, operator: LinearOperator, y: Tensor) -> Callable[[Tensor], Tensor]:
        """Returns `D -> A^+ (y - A D)`."""
        return lambda denoised: operator.pinv(y - operator(denoised), max_iter=self.num_iterations, tol=0.0)

    def __call__(self, prior: DifferentiableDenoiser, operator: LinearOperator, y: Tensor) -> Denoiser:
        """Returns the projected denoiser."""
        check_complex_range(self, "clip", self.clip, operator)
        operator, y, std = operator.whiten(y)
        level = None if std is None else std / operator.norm()
        correct = self.correction(operator, y)

        def conditional(
            x: Tensor, sigma: float | Tensor, *, generators: Sequence[torch.Generator] | None = None
        ) -> Tensor:
            denoised = prior(x, sigma, generators=generators)
            correction = correct(denoised)
            if level is not None:
                correction = per_sample((sigma / level).clamp(max=1.0).to(x), x) * correction
            projected = denoised + correction
            return projected if self.clip is None else projected.clamp(*self.clip)

        return conditional


class DirectInverseConditioning(PinvConditioning):
    """As `PinvConditioning`, with the field's direct inverse `B` (for CT filtered back-projection) for `A^+`.

        x0 = clip(D + lambda (clip(B y) - clip(B A D)))

    `B` is no exact right inverse, `A B != I`: without the clips the correction may grow from level to level.

    Source: the VE-DDNM of Hu et al., PaDIS, NeurIPS 2024, Alg. A.3; the clips are what independent reproductions of it
    needed to stay finite.

    Args:
        clip: Range to which both terms and the estimate are clipped, or None.
    """

    def __init__(self, clip: tuple[float, float] | None = (0.0, 1.0)) -> None:
        super().__init__(num_iterations=1, clip=clip)

    def correction(self, operator: LinearOperator, y: Tensor) -> Callable[[Tensor], Tensor]:
        """Returns `D -> B y - B A D`, each clipped."""

        def invert(data: Tensor) -> Tensor:
            x = operator.baseline(data)
            return x if self.clip is None else x.clamp(*self.clip)

        measured = invert(y)
        return lambda denoised: measured - invert(operator(denoised))


class DDS(Sampler):
    """Decomposed diffusion sampling: few CG iterations a level, DDIM with a constant split of the noise.

        x0 = CG(D(x, sigma)),    x' = x0 + sigma' (sqrt(1 - eta^2) eps + eta n),   eps = (x - D) / sigma

    It aims at the MAP: its samples hardly spread where there are data. One evaluation a level (50), `2 + 2 k` operator
    calls for `k` CG iterations. Asks of the operator its adjoint, of the prior nothing but `D`.

    Source: Chung, Lee & Ye, ICLR 2024, Alg. 2 (without noise) and 3 (with), published with 50 levels, 5 iterations and
    `eta = 0.85`. Their `gamma` (1) belongs to their operators' scale: see `KrylovConditioning`.

    Args:
        num_levels: Noise levels, and so denoiser evaluations.
        sigma_max: First noise level, in intensity units.
        sigma_min: Last noise level.
        cg_iterations: CG iterations a level.
        prior_std: Assumed error of the denoised image where data are noisy, in intensity units.
        max_weight: Cap of the data's weight, in units of `1 / ||A||^2`.
        eta: Share of fresh noise, in [0, 1].
        start: The first state; pure noise if None.
        num_samples: Samples a case.
        samples_per_batch: How many samples of each case run at once; all if None.
        clip: Range to which samples are clipped at the end, or None.
    """

    def __init__(
        self,
        num_levels: int = 50,
        sigma_max: float = 10.0,
        sigma_min: float = 0.002,
        cg_iterations: int = 5,
        prior_std: float = 0.1,
        max_weight: float = 1000.0,
        eta: float = 0.85,
        start: Start | None = None,
        num_samples: int = 1,
        samples_per_batch: int | None = None,
        clip: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        super().__init__(
            VPSchedule(num_levels, sigma_max, sigma_min),
            KrylovConditioning(cg_iterations, prior_std, max_weight),
            PriorNoise(DDSTransition(eta)),
            start,
            num_samples,
            samples_per_batch,
            clip,
        )


class DiffPIR(Sampler):
    """Half-quadratic splitting with the denoiser: a proximal step a level, most of the found noise put back.

        x0 = argmin_z ||A z - y||^2 / (2 sigma_y^2) + lambda ||z - D||^2 / (2 sigma^2)
        x' = x0 + sigma' (sqrt(1 - zeta) eps + sqrt(zeta) n),   eps = (x - x0) / sigma

    One evaluation a level (100), `2 + 2 k` operator calls for `k` CG iterations. Asks of the operator its adjoint, of
    the prior nothing but `D`.

    Source: Zhu et al., "Denoising diffusion models for plug-and-play image restoration", CVPR Workshops 2023, Alg. 1
    and Eq. 13, published with `lambda` of 1 to 15 and `zeta` of 0.1 (blur), 0.25 (super-resolution) and 1 (inpainting).
    `lambda = 1` is the true likelihood if `x0` given the state has the variance `sigma^2`.

    Args:
        num_levels: Noise levels, and so denoiser evaluations.
        sigma_max: First noise level, in intensity units.
        sigma_min: Last noise level.
        weight: `lambda`; above 1 trusts the prior more.
        zeta: Share of the noise's variance that is fresh, in [0, 1].
        cg_iterations: CG iterations of the proximal step.
        max_weight: Cap of the data's weight, in units of `1 / ||A||^2`; all there is without noise.
        start: The first state; pure noise if None.
        num_samples: Samples a case.
        samples_per_batch: How many samples of each case run at once; all if None.
        clip: Range to which samples are clipped at the end, or None.
    """

    def __init__(
        self,
        num_levels: int = 100,
        sigma_max: float = 10.0,
        sigma_min: float = 0.002,
        weight: float = 1.0,
        zeta: float = 0.25,
        cg_iterations: int = 10,
        max_weight: float = 1000.0,
        start: Start | None = None,
        num_samples: int = 1,
        samples_per_batch: int | None = None,
        clip: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        if not weight > 0 or not 0 <= zeta <= 1:
            raise InputError(f"DiffPIR needs weight > 0 and 0 <= zeta <= 1, got {weight} and {zeta}.")
        super().__init__(
            VPSchedule(num_levels, sigma_max, sigma_min),
            ProximalConditioning(cg_iterations, max_weight, noise_factor=1 / weight),
            DDSTransition(zeta**0.5),
            start,
            num_samples,
            samples_per_batch,
            clip,
        )


class DDNM(Sampler):
    """Denoising diffusion null-space model: the range from the data, the null space from the prior.

        x0 = D + lambda A^+ (y - A D),    x' = x0 + sigma' (sqrt(1 - eta^2) eps + eta n),   eps = (x - D) / sigma

    Made for exact data; for noisy ones see `PinvConditioning` on `lambda`, and `DDNMPlus` where the operator has a
    spectrum. One evaluation a level (100), `2 + 2 k` operator calls for `k` CG iterations. Asks of the operator its
    adjoint, of the prior nothing but `D`.

    Source: Wang, Yu & Zhang, ICLR 2023, Alg. 1, published with 100 levels and `eta = 0.85`; there `A^+` is exact.

    Args:
        num_levels: Noise levels, and so denoiser evaluations.
        sigma_max: First noise level, in intensity units.
        sigma_min: Last noise level.
        cg_iterations: CG iterations of the pseudo-inverse.
        eta: Share of fresh noise, in [0, 1].
        start: The first state; pure noise if None.
        num_samples: Samples a case.
        samples_per_batch: How many samples of each case run at once; all if None.
        clip: Range to which samples are clipped at the end, or None.
    """

    def __init__(
        self,
        num_levels: int = 100,
        sigma_max: float = 10.0,
        sigma_min: float = 0.002,
        cg_iterations: int = 10,
        eta: float = 0.85,
        start: Start | None = None,
        num_samples: int = 1,
        samples_per_batch: int | None = None,
        clip: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        super().__init__(
            VPSchedule(num_levels, sigma_max, sigma_min),
            PinvConditioning(cg_iterations),
            PriorNoise(DDSTransition(eta)),
            start,
            num_samples,
            samples_per_batch,
            clip,
        )


class VEDDNM(Sampler):
    """DDNM's estimate under Langevin dynamics with half their noise.

        x0 = D + lambda A^+ (y - A D),    x <- x + (epsilon / 2) (x0 - x) + noise sqrt(epsilon) sigma z

    1000 evaluations, one a level, `2 + 2 k` operator calls each for `k` CG iterations. Asks of the operator its
    adjoint, of the prior nothing but `D`. An estimator: half the noise means less than half the spread.

    Source: Hu et al., PaDIS, NeurIPS 2024, Alg. A.3 (there with filtered back-projection, see `DDNMFBP`); a tenth of
    its step and half its noise are an independent reproduction's choice.

    Args:
        num_levels: Noise levels.
        num_inner: Updates a level.
        sigma_max: First noise level, in intensity units.
        sigma_min: Last noise level.
        epsilon: Langevin step in units of `sigma^2`.
        noise: Share of the Langevin noise that is put in, in [0, 1].
        conditioning: The pseudo-inverse; 10 CG iterations if None.
        start: The first state; pure noise if None.
        num_samples: Samples a case.
        samples_per_batch: How many samples of each case run at once; all if None.
        clip: Range to which samples are clipped at the end, or None.
    """

    def __init__(
        self,
        num_levels: int = 1000,
        num_inner: int = 1,
        sigma_max: float = 10.0,
        sigma_min: float = 0.002,
        epsilon: float = 0.1,
        noise: float = 0.5,
        conditioning: PinvConditioning | None = None,
        start: Start | None = None,
        num_samples: int = 1,
        samples_per_batch: int | None = None,
        clip: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        super().__init__(
            GeometricSchedule(num_levels, sigma_max, sigma_min, num_inner),
            PinvConditioning() if conditioning is None else conditioning,
            Langevin(epsilon, noise),
            start,
            num_samples,
            samples_per_batch,
            clip,
        )


class DDNMFBP(VEDDNM):
    """VE-DDNM with filtered back-projection for the pseudo-inverse: `VEDDNM` with `DirectInverseConditioning`.

        x0 = clip(D + lambda (clip(B y) - clip(B A D)))
        x <- x + (epsilon / 2) (x0 - x) + noise sqrt(epsilon) sigma z

    1000 evaluations, one operator call and a filtered back-projection each; no gradient through the network. Asks of
    the operator a direct inverse, of the prior nothing but `D`. Where the operator has no direct inverse of its own,
    its baseline (conjugate gradients) serves.

    Source: see `DirectInverseConditioning` and `VEDDNM`.

    Args:
        num_levels: Noise levels.
        num_inner: Updates a level.
        sigma_max: First noise level, in intensity units.
        sigma_min: Last noise level.
        epsilon: Langevin step in units of `sigma^2`.
        noise: Share of the Langevin noise that is put in, in [0, 1].
        start: The first state; pure noise if None.
        num_samples: Samples a case.
        samples_per_batch: How many samples of each case run at once; all if None.
        clip: Range of the image: of the back-projections, the estimate at every level and the samples; or None.
    """

    def __init__(
        self,
        num_levels: int = 1000,
        num_inner: int = 1,
        sigma_max: float = 10.0,
        sigma_min: float = 0.002,
        epsilon: float = 0.1,
        noise: float = 0.5,
        start: Start | None = None,
        num_samples: int = 1,
        samples_per_batch: int | None = None,
        clip: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        super().__init__(
            num_levels,
            num_inner,
            sigma_max,
            sigma_min,
            epsilon,
            noise,
            DirectInverseConditioning(clip),
            start,
            num_samples,
            samples_per_batch,
            clip,
        )
