"""RED-diff: the posterior's mode by stochastic optimisation, an engine of its own."""

from __future__ import annotations

from collections.abc import Sequence
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
    per_sample,
    relative_residual,
)
from invrecon.methods.counting import Counter, CountingPrior, count_calls
from invrecon.methods.schedule import VPSchedule
from invrecon.methods.start import EstimateStart, Start
from invrecon.rng import randn

if TYPE_CHECKING:
    from invrecon.operators.base import LinearOperator
    from invrecon.priors.base import Prior


class REDDiff(Method):
    """Regularisation by denoising diffusion: one step of Adam a noise level, from the noisiest down.

        x = mu + sigma n,    g = gamma A^T (A mu - y) + weight (mu - D(x, sigma)),    mu <- mu - Adam(g)
        gamma = min(1 / ||A||^2, sigma^2 / sigma_y^2)

    The second term is the published `w(sigma) (eps_theta - eps)` with the weight `w = weight sigma`, the inverse root
    of the signal-to-noise ratio. Adam does not see a common factor of both: what counts is their ratio, which the
    division by `||A||^2` makes one for all operators. Data with noise count by their likelihood as soon as that is
    less: with `weight = 1` both gradients are then those of the posterior, with a quarter the data count as if their
    noise had half its standard deviation. Where the noise differs between rays, rows are weighted first.

    One evaluation a level (1000), two operator calls; no gradient through the network. Asks of the operator its
    adjoint and a direct inverse for the start, of the prior nothing but `D`. An estimator: one image, no samples.

    Source: Mardani, Song, Kautz & Vahdat, "A variational perspective on solving inverse problems with diffusion
    models", ICLR 2024, Eq. 10 and Alg. 1, published with 1000 steps, `weight = 0.25`, Adam with decays of 0.9 and 0.99
    and a learning rate of 0.1 on images in [-1, 1].

    Args:
        num_levels: Noise levels, and so denoiser evaluations.
        sigma_max: First noise level, in intensity units.
        sigma_min: Last noise level.
        weight: Of the prior, relative to that of the data.
        learning_rate: Of Adam, in intensity units.
        start: The first image; the clipped direct inverse if None.
        clip: Range to which the estimate is clipped at the end, or None.
    """

    needs_prior = True
    decays = (0.9, 0.99)

    def __init__(
        self,
        num_levels: int = 1000,
        sigma_max: float = 10.0,
        sigma_min: float = 0.002,
        weight: float = 0.25,
        learning_rate: float = 0.05,
        start: Start | None = None,
        clip: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        if not weight > 0 or not learning_rate > 0:
            raise InputError(f"REDDiff needs weight and learning_rate above 0, got {weight} and {learning_rate}.")
        check_range("clip", clip)
        self.schedule = VPSchedule(num_levels, sigma_max, sigma_min)
        self.weight, self.learning_rate = float(weight), float(learning_rate)
        self.start = EstimateStart() if start is None else start
        self.clip = clip

    @property
    def num_evaluations(self) -> int:
        """Denoiser evaluations: one a level."""
        return len(self.schedule)

    @torch.no_grad()
    def __call__(
        self,
        y: Tensor,
        operator: LinearOperator,
        prior: Prior | None = None,
        *,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Estimate:
        """Reconstructs a batch; see `Method.__call__`."""
        evaluations, calls = Counter(), Counter()
        denoise = CountingPrior(check_prior(self, prior), evaluations)
        check_measurement(y, operator)
        check_complex_range(self, "clip", self.clip, operator)
        draws = check_generators(generators, y.shape[0])
        physics = count_calls(operator, calls)
        mu = self.start(y, physics, self.schedule.sigma_max, draws).clone()
        weighted, data, std = physics.whiten(y)
        most = mu.new_full(mu.shape[:1], 1 / weighted.norm() ** 2)
        adam = torch.optim.Adam([mu], lr=self.learning_rate, betas=self.decays)  # each pixel by itself
        for sigma in self.schedule.sigmas:
            denoised = denoise(randn(mu.shape[1:], draws, mu).mul_(sigma).add_(mu), sigma, generators=draws)
            gamma = most if std is None else most.minimum((sigma / std.to(mu)) ** 2)
            misfit = weighted.adjoint(weighted(mu) - data)
            mu.grad = (mu - denoised).mul_(self.weight).add_(per_sample(gamma, mu) * misfit)
            adam.step()
        mean = mu.detach() if self.clip is None else mu.detach().clamp(*self.clip)
        return Estimate(
            mean=mean,
            stats={
                "num_evaluations": float(evaluations.num_calls),
                "num_operator_calls": float(calls.num_calls),
                "relative_residual": relative_residual(operator, mean, y),
            },
        )
