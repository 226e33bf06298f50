"""PaDIS: diffusion posterior sampling with Langevin dynamics, in its three published readings.

Hu, Song, Xu, Shen & Fessler, "Learning image priors through patch-based diffusion models for solving inverse
problems", NeurIPS 2024, Alg. 1. At every level, `num_inner` times:

    x <- x - (data step) + (alpha / 2) (D(x, sigma) - x) / sigma^2 + sqrt(alpha) z,    alpha = epsilon sigma^2

with the score taken before the data step, and no noise at the last level. In the terms of this package it is
the triple (schedule, DPS guidance, Langevin), 1000 evaluations, each with a gradient through the network. The
readings differ in the data step. One deliberate difference to the original: the state has the image's size;
its zero border, which the original carries along, is drawn afresh by the patch prior at every evaluation.
"""

from __future__ import annotations

from invrecon.methods.conditioning import (
    DPSConditioning,
    NormalisedGuidance,
    NormGuidance,
    SquaredNormGuidance,
)
from invrecon.methods.sampling import Sampler
from invrecon.methods.schedule import GeometricSchedule, KarrasSchedule, Schedule
from invrecon.methods.start import EstimateStart, NoiseStart, Start
from invrecon.methods.transitions import Langevin


class PaDIS(Sampler):
    """DPS with Langevin dynamics; the presets below choose the schedule, the data step and the start.

        x <- x - zeta grad_x L(A D(x, sigma) - y) + (epsilon / 2) (D(x, sigma) - x) + sqrt(epsilon) sigma z

    with the misfit `L` of the guidance and both steps from one evaluation; no noise at the last level.

    `num_levels * num_inner` evaluations, each with a gradient through the network, two operator calls each. Asks of the
    operator its adjoint, of the prior a vector-Jacobian product.

    Source: Hu et al., PaDIS, NeurIPS 2024, Alg. 1.

    Args:
        schedule: Noise levels, with their inner updates.
        guidance: The data step, of strength `2 zeta / epsilon`.
        epsilon: Langevin step in units of `sigma^2`.
        start: The first state.
        num_samples: Samples a case.
        samples_per_batch: How many samples of each case run at once; all if None.
        clip: Range to which samples are clipped at the end, or None.
    """

    needs_gradient = True

    def __init__(
        self,
        schedule: Schedule,
        guidance: DPSConditioning,
        epsilon: float,
        start: Start,
        num_samples: int = 1,
        samples_per_batch: int | None = None,
        clip: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        super().__init__(schedule, guidance, Langevin(epsilon), start, num_samples, samples_per_batch, clip)


class PaDISPaper(PaDIS):
    """As the paper writes it: data step `(zeta / ||r||) grad_x ||r||^2`, geometric levels, noise start.

        x <- x - (zeta / ||r||) grad_x ||r||^2 + (epsilon / 2) (D - x) + sqrt(epsilon) sigma z,   r = A D(x, sigma) - y

    1000 evaluations (100 levels, 10 updates each), each with a gradient through the network, two operator calls each.
    Asks of the operator its adjoint, of the prior a vector-Jacobian product.

    Source: Hu et al., PaDIS, NeurIPS 2024, Alg. 1.

    Args:
        num_levels: Noise levels.
        num_inner: Updates a level.
        sigma_max: First noise level.
        sigma_min: Last noise level; the paper takes 0.003 for 8 views.
        zeta: Data step. It depends on the operator's scale: tune it for another geometry.
        epsilon: Langevin step in units of `sigma^2`.
        num_samples: Samples a case.
        samples_per_batch: How many samples of each case run at once; all if None.
        clip: Range to which samples are clipped at the end, or None.
    """

    def __init__(
        self,
        num_levels: int = 100,
        num_inner: int = 10,
        sigma_max: float = 10.0,
        sigma_min: float = 0.002,
        zeta: float = 0.3,
        epsilon: float = 1.0,
        num_samples: int = 1,
        samples_per_batch: int | None = None,
        clip: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        super().__init__(
            GeometricSchedule(num_levels, sigma_max, sigma_min, num_inner),
            SquaredNormGuidance(2 * zeta / epsilon),
            epsilon,
            NoiseStart(),
            num_samples,
            samples_per_batch,
            clip,
        )


class PaDISRepo(PaDIS):
    """As the released code runs: data step `zeta grad_x ||r||` (half the paper's), Karras levels, FBP start.

        x <- x - zeta grad_x ||r|| + (epsilon / 2) (D - x) + sqrt(epsilon) sigma z,   r = A D(x, sigma) - y

    1000 evaluations (100 levels, 10 updates each), each with a gradient through the network, two operator calls each.
    Asks of the operator its adjoint and a direct inverse for the start, of the prior a vector-Jacobian product.

    Source: the code released with Hu et al., PaDIS, NeurIPS 2024, where it differs from Alg. 1.

    Args:
        num_levels: Noise levels.
        num_inner: Updates a level.
        sigma_max: First noise level.
        sigma_min: Last noise level.
        zeta: Data step. It depends on the operator's scale: tune it for another geometry.
        epsilon: Langevin step in units of `sigma^2`.
        num_samples: Samples a case.
        samples_per_batch: How many samples of each case run at once; all if None.
        clip: Range to which samples are clipped at the end, or None.
    """

    def __init__(
        self,
        num_levels: int = 100,
        num_inner: int = 10,
        sigma_max: float = 10.0,
        sigma_min: float = 0.003,
        zeta: float = 0.3,
        epsilon: float = 0.5,
        num_samples: int = 1,
        samples_per_batch: int | None = None,
        clip: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        super().__init__(
            KarrasSchedule(num_levels, sigma_max, sigma_min, num_inner=num_inner),
            NormGuidance(2 * zeta / epsilon),
            epsilon,
            EstimateStart(),
            num_samples,
            samples_per_batch,
            clip,
        )


class PaDISNormalised(PaDIS):
    """With the data step `w grad_x ||r||^2 / 2`: no constant depends on the geometry, and noise is not fitted.

        x <- x - w grad_x ||r||^2 / 2 + (epsilon / 2) (D - x) + sqrt(epsilon) sigma z
        r = A D(x, sigma) - y,   w = min(zeta / ||A||^2, epsilon sigma^2 / (2 sigma_y^2))

    The second weight is the Langevin step down the negative log-likelihood, where data have noise.

    1000 evaluations (100 levels, 10 updates each), each with a gradient through the network, two operator calls each.
    Asks of the operator its adjoint, of the prior a vector-Jacobian product.

    Source: Hu et al., PaDIS, NeurIPS 2024, Alg. 1; the operator-normalised step with `epsilon = 0.5` is an independent
    reproduction's.

    Args:
        num_levels: Noise levels.
        num_inner: Updates a level.
        sigma_max: First noise level.
        sigma_min: Last noise level.
        zeta: Data step, dimensionless, below 2: along the operator's leading direction an update multiplies
            the error by `1 - epsilon (1 - j) / 2 - zeta j^2`, where the denoiser's gain `j` tends to 1 at low
            noise. (4 to 4.25 have been reported with other projectors; with ours they diverge.)
        epsilon: Langevin step in units of `sigma^2`.
        num_samples: Samples a case.
        samples_per_batch: How many samples of each case run at once; all if None.
        clip: Range to which samples are clipped at the end, or None.
    """

    def __init__(
        self,
        num_levels: int = 100,
        num_inner: int = 10,
        sigma_max: float = 10.0,
        sigma_min: float = 0.002,
        zeta: float = 1.9,
        epsilon: float = 0.5,
        num_samples: int = 1,
        samples_per_batch: int | None = None,
        clip: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        super().__init__(
            GeometricSchedule(num_levels, sigma_max, sigma_min, num_inner),
            NormalisedGuidance(2 * zeta / epsilon),
            epsilon,
            NoiseStart(),
            num_samples,
            samples_per_batch,
            clip,
        )
