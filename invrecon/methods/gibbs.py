"""Methods that draw from the posterior of the data and a Gaussian, in turn with the prior: DAPS and PnP-DM."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invrecon.errors import InputError
from invrecon.methods.conditioning import Conditioning, Denoiser, DifferentiableDenoiser
from invrecon.methods.draws import DataDraw, DataSampler, ExactDataSampler, LangevinDataSampler
from invrecon.methods.sampling import Sampler
from invrecon.methods.schedule import FloorSchedule, KarrasSchedule
from invrecon.methods.start import Start
from invrecon.methods.transitions import DDIM, Denoised, Renoise, ReverseSDE, Transition

if TYPE_CHECKING:
    from invrecon.operators.base import LinearOperator


def descend(
    x: Tensor,
    prior: Denoiser,
    sigma: float,
    num_steps: int,
    sigma_min: float,
    transition: Transition,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Takes `x` from level `sigma` to a clean image by the prior alone, in `num_steps` evaluations on Karras levels.

    Args:
        x: The state, `(B, C, *spatial)`.
        prior: The denoiser.
        sigma: The level of `x`.
        num_steps: Evaluations.
        sigma_min: The last level; `sigma / 3` where that is smaller.
        transition: From level to level.
        generators: One generator a sample.
    """
    levels = KarrasSchedule(num_steps, sigma, min(sigma_min, sigma / 3)).sigmas
    levels = [sigma, *levels[1:], 0.0]  # the first to the last bit: adaptation recognises its levels by their value
    for level, following in pairwise(levels):
        x = transition(x, prior(x, level, generators=generators), level, following, generators)
    return x


class DecoupledConditioning(Conditioning):
    """An image of the prior by the probability flow, then one near it that fits the data.

        x_hat = flow(x, sigma -> 0)
        x0 ~ exp(-||A x0 - y||^2 / (2 sigma_y^2) - ||x0 - x_hat||^2 / (2 r^2)),   r = sigma

    Source: Zhang et al., "Improving diffusion inverse problem solving with decoupled noise annealing" (DAPS), CVPR
    2025, Alg. 1, lines 3 and 4 to 7.

    Args:
        data: Draws the second.
        num_steps: Euler steps of the flow, and so evaluations.
        sigma_min: Last level of the flow, in intensity units.
    """

    def __init__(self, data: DataSampler, num_steps: int = 5, sigma_min: float = 0.002) -> None:
        if num_steps < 1 or not sigma_min > 0:
            raise InputError(f"The flow needs num_steps >= 1 and sigma_min > 0, got {num_steps} and {sigma_min}.")
        self.data = data
        self.num_evaluations = num_steps
        self.sigma_min = float(sigma_min)
        self._euler = DDIM(eta=0.0)

    def __call__(self, prior: DifferentiableDenoiser, operator: LinearOperator, y: Tensor) -> Denoiser:
        """Returns what draws `x0`."""
        draw = self.data(operator, y)

        def conditional(
            x: Tensor, sigma: float | Tensor, *, generators: Sequence[torch.Generator] | None = None
        ) -> Tensor:
            assert generators is not None, "draws need generators"
            level = float(sigma)
            x = descend(x, prior, level, self.num_evaluations, self.sigma_min, self._euler, generators)
            return draw(x, level, generators)

        return conditional


class PriorDraw(Conditioning):
    """A draw of the image given the state alone, `x0 ~ p(x0 | x)`, by reverse diffusion from the state's level.

    Source: Wu et al., PnP-DM, NeurIPS 2024, Alg. 2 (the prior step).

    Args:
        num_steps: Evaluations.
        sigma_min: Last level, in intensity units.
        transition: From level to level; `ReverseSDE` if None, whose noise is right where the image varies by more than
            `sigma`, as it does at the couplings at which a Gibbs sampler ends.
    """

    estimate = "prior"

    def __init__(self, num_steps: int = 10, sigma_min: float = 0.002, transition: Transition | None = None) -> None:
        if num_steps < 1 or not sigma_min > 0:
            raise InputError(f"Prior draws need num_steps >= 1 and sigma_min > 0, got {num_steps} and {sigma_min}.")
        self.num_evaluations = num_steps
        self.sigma_min = float(sigma_min)
        self.transition = ReverseSDE() if transition is None else transition

    def __call__(self, prior: DifferentiableDenoiser, operator: LinearOperator | None, y: Tensor | None) -> Denoiser:
        """Returns what draws `x0`."""

        def conditional(
            x: Tensor, sigma: float | Tensor, *, generators: Sequence[torch.Generator] | None = None
        ) -> Tensor:
            assert generators is not None, "draws need generators"
            step = self.transition.begin()
            return descend(x, prior, float(sigma), self.num_evaluations, self.sigma_min, step, generators)

        return conditional


class LikelihoodDraw(Transition):
    """A draw near the estimate that fits the data, with the next level for the coupling (at the end with the last).

        x' ~ exp(-||A x' - y||^2 / (2 sigma_y^2) - ||x' - x0||^2 / (2 sigma'^2))

    Source: Wu et al., PnP-DM, NeurIPS 2024, Alg. 1 (the likelihood step).

    Args:
        data: Draws.
    """

    estimates = frozenset({"prior"})

    def __init__(self, data: DataSampler) -> None:
        self.data = data
        self._draw: DataDraw | None = None

    def bind(self, denoised: Denoised, operator: LinearOperator, y: Tensor) -> Transition:
        """Returns a copy that knows the measurement."""
        bound = LikelihoodDraw(self.data)
        bound._draw = self.data(operator, y)
        return bound

    def __call__(
        self, x: Tensor, x0: Tensor, sigma: float, sigma_next: float, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Returns the state at `sigma_next`."""
        assert self._draw is not None, "a measurement comes with bind()"
        return self._draw(x0, sigma_next or sigma, generators)


class DAPS(Sampler):
    """Decoupled annealing posterior sampling: flow, Langevin steps on the data, all noise of the next level anew.

        x_hat = flow(x, sigma -> 0),    x0 ~ p(x0 | x_hat, y) by Langevin steps,    x' = x0 + sigma' n

    `num_levels * num_ode` evaluations (1000), `1 + 2 num_steps` operator calls a level. Asks of the operator its
    adjoint, of the prior nothing but `D`. It claims posterior samples; their spread is too large in the null space, and
    where Langevin steps are too few to reach it.

    Source: Zhang et al., CVPR 2025, Alg. 1, published with 200 levels of Karras, 5 Euler steps, 100 Langevin steps;
    their levels 100 to 0.1 are for images in [-1, 1] and end above ours, because what they return still holds the
    spread of the last. Here the noise level in the data step is that of the data, and the Langevin step in units of
    the inverse curvature.

    Args:
        num_levels: Noise levels.
        sigma_max: First noise level, in intensity units.
        sigma_min: Last noise level; the samples' null space holds that much noise.
        num_ode: Euler steps of the flow a level.
        num_steps: Langevin steps a level.
        step: Langevin step in units of the inverse curvature, in (0, 2).
        max_weight: Cap of the data's weight, in units of `1 / ||A||^2`; all there is without noise.
        start: The first state; pure noise if None.
        num_samples: Samples a case.
        samples_per_batch: How many samples of each case run at once; all if None.
        clip: Range to which samples are clipped at the end, or None.
    """

    samples_posterior = True

    def __init__(
        self,
        num_levels: int = 200,
        sigma_max: float = 10.0,
        sigma_min: float = 0.005,
        num_ode: int = 5,
        num_steps: int = 100,
        step: float = 0.2,
        max_weight: float = 1000.0,
        start: Start | None = None,
        num_samples: int = 1,
        samples_per_batch: int | None = None,
        clip: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        super().__init__(
            KarrasSchedule(num_levels, sigma_max, sigma_min),
            DecoupledConditioning(LangevinDataSampler(num_steps, step, max_weight), num_ode),
            Renoise(),
            start,
            num_samples,
            samples_per_batch,
            clip,
        )


class DAPSExact(Sampler):
    """`DAPS` with an exact draw in place of the Langevin steps: `ExactDataSampler`.

        x_hat = flow(x, sigma -> 0),    x0 ~ p(x0 | x_hat, y) by perturb and solve,    x' = x0 + sigma' n

    `num_levels * num_ode` evaluations (1000), `2 + 2 k` operator calls a level for `k` CG iterations. Asks of the
    operator its adjoint, of the prior nothing but `D`.

    Source: Zhang et al., CVPR 2025, Alg. 1; perturb-and-solve from Papandreou & Yuille, NeurIPS 2010.

    Args:
        num_levels: Noise levels.
        sigma_max: First noise level, in intensity units.
        sigma_min: Last noise level; the samples' null space holds that much noise.
        num_ode: Euler steps of the flow a level.
        cg_iterations: CG iterations of a draw.
        max_weight: Cap of the data's weight, in units of `1 / ||A||^2`; all there is without noise.
        start: The first state; pure noise if None.
        num_samples: Samples a case.
        samples_per_batch: How many samples of each case run at once; all if None.
        clip: Range to which samples are clipped at the end, or None.
    """

    samples_posterior = True

    def __init__(
        self,
        num_levels: int = 200,
        sigma_max: float = 10.0,
        sigma_min: float = 0.005,
        num_ode: int = 5,
        cg_iterations: int = 20,
        max_weight: float = 1000.0,
        start: Start | None = None,
        num_samples: int = 1,
        samples_per_batch: int | None = None,
        clip: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        super().__init__(
            KarrasSchedule(num_levels, sigma_max, sigma_min),
            DecoupledConditioning(ExactDataSampler(cg_iterations, max_weight), num_ode),
            Renoise(),
            start,
            num_samples,
            samples_per_batch,
            clip,
        )


class PnPDM(Sampler):
    """Plug-and-play diffusion, a split Gibbs sampler: exact draws of the likelihood in turn with draws of the prior.

        x ~ p(x) exp(-||x - z||^2 / (2 rho^2))                                  reverse diffusion from level rho, at z
        z ~ exp(-||A z - y||^2 / (2 sigma_y^2) - ||z - x||^2 / (2 rho^2))       perturb and solve

    It returns `z`: at a finite coupling the spread of `x` is wrong where there are data, that of `z` is not; in the
    null space `z` holds noise of the last coupling. `num_levels * num_prior` evaluations (1000), `2 + 2 k` operator
    calls a level for `k` CG iterations. Asks of the operator its adjoint, of the prior nothing but `D`.

    Source: Wu et al., "Principled probabilistic imaging using diffusion models as plug-and-play priors", NeurIPS 2024,
    Alg. 1, published with 100 iterations, couplings falling by 0.9 from 10 to 0.3, on images in [-1, 1]; our floor is
    lower because `z` is what is returned.

    Args:
        num_levels: Iterations, and so couplings.
        sigma_max: First coupling, in intensity units.
        sigma_min: Floor of the couplings; the samples' null space holds that much noise.
        ratio: From one coupling to the next.
        num_prior: Evaluations of a draw of the prior.
        cg_iterations: CG iterations of a draw of the likelihood.
        max_weight: Cap of the data's weight, in units of `1 / ||A||^2`; all there is without noise.
        start: The first state; pure noise if None.
        num_samples: Samples a case.
        samples_per_batch: How many samples of each case run at once; all if None.
        clip: Range to which samples are clipped at the end, or None.
    """

    samples_posterior = True

    def __init__(
        self,
        num_levels: int = 100,
        sigma_max: float = 10.0,
        sigma_min: float = 0.01,
        ratio: float = 0.9,
        num_prior: int = 10,
        cg_iterations: int = 20,
        max_weight: float = 1000.0,
        start: Start | None = None,
        num_samples: int = 1,
        samples_per_batch: int | None = None,
        clip: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        super().__init__(
            FloorSchedule(num_levels, sigma_max, sigma_min, ratio),
            PriorDraw(num_prior),
            LikelihoodDraw(ExactDataSampler(cg_iterations, max_weight)),
            start,
            num_samples,
            samples_per_batch,
            clip,
        )
