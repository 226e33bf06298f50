"""Plug-and-play: the prior's denoiser, at one fixed level, in place of a penalty's proximal map."""

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
from invrecon.methods.counting import Counter, CountingPrior, count_calls
from invrecon.methods.start import EstimateStart, Start
from invrecon.methods.stopping import PerSampleStop

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

    def level(self, iteration: int) -> float:
        """Returns the denoiser's level at an iteration, from 1."""
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
        v = self.start(y, physics, self.level(1), draws)
        weighted, data, std = physics.whiten(y)
        cap = torch.full(y.shape[:1], self.max_weight / weighted.norm() ** 2, dtype=y.dtype, device=y.device)
        end = PerSampleStop(v, self.tol)
        for iteration in range(1, self.num_iterations + 1):
            sigma = self.level(iteration)
            gamma = cap if std is None else cap.minimum((sigma / std.to(y)).square())
            denoise = partial(counted, sigma=sigma, generators=draws)
            fit = partial(weighted.prox, y=data, weight=gamma, max_iter=self.cg_iterations)
            before = v
            v, image = self.iterate(v, denoise, fit)
            step = norm_per_sample(v - before) / norm_per_sample(image).clamp(min=torch.finfo(image.dtype).tiny)
            if end(iteration, image, step if sigma == self.sigma else torch.full_like(step, torch.inf)):
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


class AnnealedPnPADMM(PnPADMM):
    r"""Plug-and-play ADMM whose denoiser begins at a high level and ends at a low one.

        sigma_i = sigma_max (sigma / sigma_max)^min(1, (i - 1) / (0.7 K))      at iteration i of K

    with the iteration of `PnPADMM` at the level `sigma_i`. High levels make large steps and mend what the start lacks,
    low ones leave fine structure: one fixed level either blurs or takes many more iterations. Where the data have
    noise, their weight is the likelihood's at each level, and low levels settle slowly: take a last level of 0.02. A
    sample may stop once the last level is reached.

    One evaluation an iteration (50), `2 + 2 k` operator calls for `k` CG iterations; no gradient through the network.
    Asks of the operator its proximal map (CG in general) and a direct inverse for the start, of the prior nothing but
    `D`.

    Source: Venkatakrishnan, Bouman & Wohlberg, GlobalSIP 2013 (the iteration); Zhang et al., "Plug-and-play image
    restoration with deep denoiser prior" (DPIR), IEEE TPAMI 44, 2022, Sec. 4.2 (levels that fall geometrically, there
    with half-quadratic splitting); see `PlugAndPlay` for what is common to all.

    Args:
        sigma: Last level of the denoiser, in intensity units.
        sigma_max: First level.
        num_iterations: Iterations, and so denoiser evaluations.
        cg_iterations: CG iterations of the proximal map.
        max_weight: Cap of `gamma ||A||^2`, dimensionless.
        tol: Relative step at which a sample stops at the last level; 0 runs all iterations.
        start: The first image; the clipped direct inverse if None.
        clip: Range to which the estimate is clipped at the end, or None.
    """

    def __init__(
        self,
        sigma: float = 0.005,
        sigma_max: float = 0.1,
        num_iterations: int = 50,
        cg_iterations: int = 20,
        max_weight: float = 1000.0,
        tol: float = 1e-4,
        start: Start | None = None,
        clip: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        super().__init__(sigma, num_iterations, cg_iterations, max_weight, tol, start, clip)
        if not sigma_max >= sigma:
            raise InputError(f"AnnealedPnPADMM needs sigma_max >= sigma, got {sigma_max} and {sigma}.")
        self.sigma_max = float(sigma_max)

    def level(self, iteration: int) -> float:
        """Returns the level at an iteration: it falls by a fixed ratio, and is the last one from 70 % on."""
        share = (iteration - 1) / (SETTLED * self.num_iterations)
        return self.sigma if share >= 1 else self.sigma_max * (self.sigma / self.sigma_max) ** share


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
