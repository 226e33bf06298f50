"""Plug-and-play: the prior's denoiser, at one level or at levels that fall, in place of a penalty's proximal map."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invrecon.errors import InputError
from invrecon.methods.base import (
    Estimate,
    Method,
    check_complex_range,
    check_generators,
    check_measurement,
    check_prior,
    check_range,
    norm_per_sample,
    relative_residual,
)
from invrecon.methods.conditioning import ReflectedConditioning
from invrecon.methods.counting import Counter, CountingPrior, count_calls
from invrecon.methods.sampling import Sampler
from invrecon.methods.schedule import FloorSchedule
from invrecon.methods.start import EstimateStart, Start
from invrecon.methods.stopping import PerSampleStop
from invrecon.methods.transitions import DouglasRachford

if TYPE_CHECKING:
    from invrecon.operators.base import LinearOperator
    from invrecon.priors.base import Prior

Map = Callable[[Tensor], Tensor]
SETTLED = 0.7  # share of the iterations after which levels that fall have come to the last one


class PlugAndPlay(Method):
    """Iterates a map made of the denoiser and the data's proximal map to its fixed point.

        fit(v) = argmin_x gamma/2 ||A x - y||^2 + 1/2 ||x - v||^2
        gamma = min(sigma^2 / sigma_y^2, max_weight / ||A||^2)

    `gamma` is the one of the true likelihood for a denoiser of noise of variance `sigma^2`; without noise only the cap
    is left. Where the noise differs between rays, rows are weighted first. A sample stops when an iteration moves it
    by less than `tol` of its norm; a prior that draws (a patch prior's shifts) keeps moving and uses all iterations.

    One evaluation an iteration. Asks of the operator its proximal map (CG in general) and a direct inverse for the
    start, of the prior nothing but `D`, and takes no gradient through the network. An estimator: one image, no samples.

    Args:
        sigma: Level of the denoiser, in intensity units; a lower one takes more iterations.
        num_iterations: Most iterations, and so denoiser evaluations.
        cg_iterations: CG iterations of the proximal map.
        max_weight: Cap of `gamma ||A||^2`, dimensionless.
        tol: Relative step at which a sample stops; 0 runs all iterations.
        start: The first image; the clipped direct inverse if None.
        clip: Range to which the estimate is clipped at the end, or None.
    """

    needs_prior = True

    def __init__(
        self,
        sigma: float = 0.02,
        num_iterations: int = 100,
        cg_iterations: int = 20,
        max_weight: float = 1000.0,
        tol: float = 1e-4,
        start: Start | None = None,
        clip: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        name = type(self).__name__
        if not sigma > 0 or not max_weight > 0 or tol < 0:
            raise InputError(
                f"{name} needs sigma > 0, max_weight > 0 and tol >= 0, got {sigma}, {max_weight} and {tol}."
            )
        if num_iterations < 1 or cg_iterations < 1:
            raise InputError(
                f"{name} needs num_iterations >= 1 and cg_iterations >= 1, got {num_iterations} and {cg_iterations}."
            )
        check_range("clip", clip)
        self.sigma, self.max_weight, self.tol = float(sigma), float(max_weight), float(tol)
        self.num_iterations, self.cg_iterations = num_iterations, cg_iterations
        self.start = EstimateStart() if start is None else start
        self.clip = clip

    @property
    def num_evaluations(self) -> int:
        """Most denoiser evaluations: one an iteration."""
        return self.num_iterations

    @property
    def highest_level(self) -> float:
        """The one level of its denoiser."""
        return self.sigma

    @abstractmethod
    def iterate(self, v: Tensor, denoise: Map, fit: Map) -> tuple[Tensor, Tensor]:
        """Returns the next state and the image, which agree with the data as far as they are trusted.

        Args:
            v: The state, `(B, C, *S)`; its fixed point is sought.
            denoise: `x -> D(x, sigma)`.
            fit: The data's proximal map.
        """

    @torch.no_grad()
    def __call__(
        self,
        y: Tensor,
        operator: LinearOperator,
        prior: Prior | None = None,
        *,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Estimate:
        """Reconstructs a batch; see `Method.__call__`.

        Stats add `num_iterations` and `relative_step`, at which each sample stopped.
        """
        evaluations, calls = Counter(), Counter()
        counted = CountingPrior(check_prior(self, prior), evaluations)
        check_measurement(y, operator)
        check_complex_range(self, "clip", self.clip, operator)
        draws = check_generators(generators, y.shape[0])
        physics = count_calls(operator, calls)
        v = self.start(y, physics, self.sigma, draws)
        weighted, data, std = physics.whiten(y)
        cap = torch.full(y.shape[:1], self.max_weight / weighted.norm() ** 2, dtype=y.dtype, device=y.device)
        gamma = cap if std is None else cap.minimum((self.sigma / std.to(y)).square())
        denoise = partial(counted, sigma=self.sigma, generators=draws)
        fit = partial(weighted.prox, y=data, weight=gamma, max_iter=self.cg_iterations)
        end = PerSampleStop(v, self.tol)
        for iteration in range(1, self.num_iterations + 1):
            before = v
            v, image = self.iterate(v, denoise, fit)
            step = norm_per_sample(v - before) / norm_per_sample(image).clamp(min=torch.finfo(image.dtype).tiny)
            if end(iteration, image, step):
                break
        mean = end.result if self.clip is None else end.result.clamp(*self.clip)
        return Estimate(
            mean=mean,
            stats={
                "num_evaluations": float(evaluations.num_calls),
                "num_operator_calls": float(calls.num_calls),
                "relative_residual": relative_residual(operator, mean, y),
                **end.stats("relative_step"),
            },
        )


class PnPADMM(PlugAndPlay):
    """Plug-and-play ADMM: the denoiser takes the place of the prior's proximal map.

        x = fit(z - u),   z = D(x + u, sigma),   u <- u + x - z

    written for the one state `v = x + u`: `x = fit(2 D(v) - v)`, `v <- v + x - D(v)` (Douglas-Rachford), so that the
    step is the primal residual `x - z`. If `D` is the proximal map of `sigma^2 phi`, the fixed point minimises
    `||A x - y||^2 / (2 sigma_y^2) + phi(x)`. For a Gaussian prior that is the posterior's mean, whatever `sigma`, which
    then only sets the pace.

    One evaluation an iteration (at most 100), `2 + 2 k` operator calls for `k` CG iterations; no gradient through the
    network. Asks of the operator its proximal map (CG in general) and a direct inverse for the start, of the prior
    nothing but `D`.

    Source: Venkatakrishnan, Bouman & Wohlberg, "Plug-and-play priors for model based reconstruction", GlobalSIP 2013;
    see `PlugAndPlay` for what is common to all.
    """

    def iterate(self, v: Tensor, denoise: Map, fit: Map) -> tuple[Tensor, Tensor]:
        """Returns `v + x - D(v)` and `x = fit(2 D(v) - v)`."""
        z = denoise(v)
        x = fit(2 * z - v)
        return v + x - z, x


class AnnealedPnPADMM(Sampler):
    r"""Plug-and-play ADMM whose denoiser's level falls: the best estimate of an image in few evaluations.

        z = D(v, sigma_i),   x = fit(2 z - v),   v <- v + relaxation (x - z)           at iteration i of K
        sigma_i = max(sigma_max (sigma_min / sigma_max)^((i - 1) / (0.7 K)), sigma_min)
        fit(v) = argmin_x gamma/2 ||A x - y||^2 + 1/2 ||x - v||^2,   gamma of `ProximalConditioning`

    In the terms of the sampling loop: `ReflectedConditioning` and `DouglasRachford` on a `FloorSchedule`. Denoising and
    data step in turn (`ProximalDiffusion`) have a bias that vanishes only with the level; here `x = z` at a fixed
    point. High levels make large steps and mend what the start lacks, low ones leave fine structure. The result is the
    mean of the denoised images at the last level; they hold less noise of the data than `x`.

    If `D` is the proximal map of `sigma^2 phi`, the fixed point minimises `noise_factor ||A x - y||^2 / (2 sigma_y^2) +
    phi(x)`. For a Gaussian prior and a factor of 1 that is the posterior's mean; for a learned prior somewhat more
    weight of the data is better.

    No noise is put in: samples differ by a patch prior's shifts alone. For samples and their `std` take
    `ProximalDiffusion` with the arguments that it states for them.

    One evaluation a level (32), `2 + 2 k` operator calls for `k` CG iterations; no gradient through the network. Asks
    of the operator its proximal map (CG in general) and a direct inverse for the start, of the prior nothing but `D`.

    Source: Venkatakrishnan, Bouman & Wohlberg, "Plug-and-play priors for model based reconstruction", GlobalSIP 2013
    (the iteration); Eckstein & Bertsekas, "On the Douglas-Rachford splitting method and the proximal point algorithm
    for maximal monotone operators", Math. Program. 55, 1992 (relaxation); Zhang et al., "Plug-and-play image
    restoration with deep denoiser prior" (DPIR), IEEE TPAMI 44, 2022, Sec. 4.2 (levels that fall geometrically, there
    with half-quadratic splitting).

    Args:
        num_levels: Iterations, and so denoiser evaluations; the last 30 % stay at `sigma_min`.
        sigma_max: First level of the denoiser, in intensity units. It has to exceed the start's error: 0.1 is twice
            that of filtered back-projection from 20 views; from fewer than ten take 0.3.
        sigma_min: Last level.
        cg_iterations: CG iterations of the data step.
        max_weight: Cap of the data step's weight, in units of `1 / ||A||^2`.
        noise_factor: Weight of the data where they have noise, in units of the likelihood's.
        relaxation: Length of a step, above 0 and below 2; 1 is plain ADMM.
        start: The first image; the clipped direct inverse if None.
        num_samples: Runs a case.
        samples_per_batch: How many runs of each case go at once; all if None.
        clip: Range to which estimates are clipped at the end, or None.
    """

    def __init__(
        self,
        num_levels: int = 32,
        sigma_max: float = 0.1,
        sigma_min: float = 0.005,
        cg_iterations: int = 10,
        max_weight: float = 1000.0,
        noise_factor: float = 2.0,
        relaxation: float = 1.8,
        start: Start | None = None,
        num_samples: int = 1,
        samples_per_batch: int | None = None,
        clip: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        fall = sigma_min / sigma_max if 0 < sigma_min < sigma_max else 0.5  # without a fall any ratio is at the floor
        super().__init__(
            schedule=FloorSchedule(num_levels, sigma_max, sigma_min, fall ** (1 / (SETTLED * max(num_levels, 1)))),
            conditioning=ReflectedConditioning(cg_iterations, max_weight, noise_factor),
            transition=DouglasRachford(relaxation),
            start=EstimateStart() if start is None else start,
            num_samples=num_samples,
            samples_per_batch=samples_per_batch,
            clip=clip,
        )


class RED(PlugAndPlay):
    """Regularisation by denoising, in its fixed-point form.

        A^T (A x - y) / sigma_y^2 + (x - D(x, sigma)) / sigma^2 = 0     by     x <- fit(D(x, sigma))

    The second term is minus the score at the level `sigma` (Tweedie), so the fixed point is the most probable image if
    the prior's images are blurred by noise of that level: for a Gaussian prior of covariance `C` the posterior's mean
    under `C + sigma^2 I`. A high level blurs, a low one takes many iterations.

    One evaluation an iteration (at most 100), `2 + 2 k` operator calls for `k` CG iterations; no gradient through the
    network. Asks of the operator its proximal map (CG in general) and a direct inverse for the start, of the prior
    nothing but `D`.

    Source: Romano, Elad & Milanfar, "The little engine that could: regularization by denoising (RED)", SIAM J. Imaging
    Sci. 10 (2017), the fixed-point strategy; Reehorst & Schniter, "Regularization by denoising: clarifications and
    new interpretations", IEEE Trans. Comput. Imaging 5 (2019), for the score. The weight, published as a
    free `lambda`, is `1 / sigma^2` here; see `PlugAndPlay` for what is common to all.
    """

    def iterate(self, v: Tensor, denoise: Map, fit: Map) -> tuple[Tensor, Tensor]:
        """Returns `fit(D(v))`, which is both."""
        x = fit(denoise(v))
        return x, x
