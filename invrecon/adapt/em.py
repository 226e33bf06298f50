"""Expectation maximisation on one measurement: reconstruct, learn the reconstruction, repeat."""

from __future__ import annotations

import copy
import math
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from invrecon.adapt.base import (
    Adaptation,
    Step,
    Trace,
    check_positive,
    private_generator,
    private_generators,
    select_cases,
)
from invrecon.adapt.stopping import HeldOutViews, Stopper, held_out_loss, without_views
from invrecon.adapt.trainable import AllWeights, Trainable, adapted_copy, movement, num_parameters
from invrecon.errors import InputError
from invrecon.methods.base import Estimate
from invrecon.methods.sampling import ProximalDiffusion, Sampler
from invrecon.methods.start import GivenStart
from invrecon.priors.base import broadcast
from invrecon.priors.patch import PatchPrior, WholePrior
from invrecon.rng import Generators

if TYPE_CHECKING:
    from invrecon.operators.base import LinearOperator
    from invrecon.priors.base import Prior


class ExpectationMaximisation(Adaptation):
    r"""Learns the prior of one patient from one measurement, starting from any prior.

        E:  x_r = E[x | y] or a sample of it, under the prior theta_{r-1}
        M:  theta_r: a few steps down  E_{p, sigma, n}  w(sigma) || D_theta(p + sigma n, sigma) - p ||^2

    over patches `p` of `x_r` at all places (whole images for a whole-image prior): one image is thousands of patches.
    The sampler's fast estimates, not its samples, serve as `x_r`: a chain's own noise would be learned too. Each round
    goes on from the last estimate at a modest noise level, so that it costs a third of a reconstruction. Pooled cases
    share what they teach: a round renews the middle one, which is watched, and one other, in turn, and learns from
    all that have had their turn, so that the cost hardly grows with their number.

    Source: for data sets of measurements, Rozet et al., "Learning diffusion priors from observations by expectation
    maximization", NeurIPS 2024, Alg. 1. On a single measurement, and with patches, there is none.

    Args:
        rounds: E- and M-steps.
        steps: Steps of Adam in a round; fewer if the prior cannot draw as little as `num_pixels`.
        learning_rate: Its rate at the start; it falls linearly to zero over the rounds.
        num_pixels: Pixels a step.
        sigma_min: Lowest noise level that is learned, log-uniformly.
        sigma_max: Highest.
        expectation: The sampler of the E-step.
        ema: Decay of the average of the weights over steps that reconstructs and is kept; 0 takes the last weights.
        trainable: What adapts; all weights by default.
        held_out: Views that the rounds do not see, and that say when to stop; None runs all rounds on all views.
    """

    def __init__(
        self,
        rounds: int = 8,
        steps: int = 40,
        learning_rate: float = 1.5e-3,
        num_pixels: int = 25088,
        sigma_min: float = 0.002,
        sigma_max: float = 0.1,
        ema: float = 0.95,
        expectation: Sampler | None = None,
        trainable: Trainable | None = None,
        held_out: HeldOutViews | None = None,
    ) -> None:
        check_positive(rounds=rounds, steps=steps, num_pixels=num_pixels, sigma_min=sigma_min)
        if learning_rate < 0 or not sigma_min < sigma_max or not 0 <= ema < 1:
            raise InputError(
                "ExpectationMaximisation needs learning_rate >= 0, sigma_min < sigma_max and 0 <= ema < 1, got "
                f"{learning_rate}, {sigma_min}, {sigma_max} and {ema}."
            )
        self.rounds, self.steps, self.learning_rate, self.num_pixels = rounds, steps, learning_rate, num_pixels
        self.sigma_min, self.sigma_max, self.ema = sigma_min, sigma_max, ema
        self.expectation = ProximalDiffusion(num_levels=10, sigma_max=0.05) if expectation is None else expectation
        self.trainable = AllWeights() if trainable is None else trainable
        self.held_out = held_out

    def adapt(
        self, y: Tensor, operator: LinearOperator, prior: Prior, sampler: Sampler, generators: Generators
    ) -> tuple[Estimate, Trace]:
        """Adapts, then reconstructs from all of the measurement; see `Adaptation.adapt`.

        Raises:
            InputError: The prior cannot say what to learn from an image, or the loss is not finite.
        """
        if not isinstance(prior, PatchPrior | WholePrior):
            raise InputError(
                f"{type(self).__name__} learns from images, which {type(prior).__name__} cannot: use a prior file "
                "(WholePrior or PatchPrior)."
            )
        seen, y_seen, unseen = operator, y, None
        if self.held_out is not None:
            # The same views in every round: each goes on from the last estimate, which must never have seen them.
            unseen = self.held_out.mask(0, operator, private_generator(generators, "views"))
            seen, y_seen = without_views(operator, y, unseen)
        # What learns, and the average of it that reconstructs.
        learner, weights = adapted_copy(prior, self.trainable)
        adapted, parameters = adapted_copy(prior, self.trainable)
        optimiser = torch.optim.Adam(weights, lr=self.learning_rate, betas=(0.9, 0.99))
        draws = private_generator(generators, "learning")
        trace = Trace(num_trainable=num_parameters(parameters), reason=f"all {self.rounds} rounds")
        stopper = Stopper(sys.maxsize) if self.held_out is None else self.held_out.stopper()
        best = [parameter.detach().clone() for parameter in parameters]
        watched, num_cases = len(y) // 2, len(y)
        images: dict[int, Tensor] = {}
        num_evaluations = 0.0
        for k in range(self.rounds + 1):
            if k:
                num_evaluations += self._maximise(
                    learner, optimiser, parameters, torch.cat(list(images.values())), k, draws
                )
            # The watched case is renewed in every round, the others of a pool in turn.
            for b in dict.fromkeys((watched, (watched + k) % num_cases)):
                one = slice(b, b + 1)
                part = select_cases(seen, one, num_cases)
                own = private_generators(generators[one], "round", k)
                estimate = self._expect(adapted, sampler, part, y_seen[one], images.get(b), own)
                num_evaluations += _evaluations(estimate)
                images[b] = estimate.mean
            one = slice(watched, watched + 1)
            name = f"round {k}" if k else "not adapted"
            step = self._look(name, select_cases(operator, one, num_cases), y[one], images[watched], unseen)
            trace.steps.append(step)
            stop = stopper.update(-k if step.held_out_loss is None else step.held_out_loss)
            if stopper.best == k:
                best = [parameter.detach().clone() for parameter in parameters]
            if stop:
                trace.reason = f"the loss on views held out rose {stopper.patience} rounds running"
                break
        if stopper.best < len(trace.steps) - 1 and "rose" not in trace.reason:
            trace.reason = "the loss on views held out was least"
        trace.stopped_at = stopper.best
        with torch.no_grad():
            for parameter, value in zip(parameters, best, strict=True):
                parameter.copy_(value)
        trace.movement = movement(prior, adapted)
        estimate = sampler(y, operator, adapted, generators=generators)
        spent = _evaluations(estimate) + num_evaluations / num_cases
        return replace(estimate, stats={**estimate.stats, "num_evaluations": spent}), trace

    @staticmethod
    @torch.no_grad()
    def _look(name: str, operator: LinearOperator, y: Tensor, x: Tensor, unseen: Tensor | None) -> Step:
        """Returns what the measurement says of the estimate `x`, and the estimate."""
        if unseen is None:
            residual, held_out = (operator(x) - y).square().mean(), None
        else:
            residual = held_out_loss(operator, y, x, ~unseen).mean()
            held_out = float(held_out_loss(operator, y, x, unseen).mean())
        return Step(name, None, float(residual), held_out, x[0].cpu())

    def _expect(
        self,
        prior: Prior,
        sampler: Sampler,
        operator: LinearOperator,
        y: Tensor,
        x: Tensor | None,
        generators: Generators,
    ) -> Estimate:
        """Returns the first estimate of a case by the sampler itself, the next ones from the last, `x`."""
        if x is None:
            return sampler(y, operator, prior, generators=generators)
        expectation = copy.copy(self.expectation)
        expectation.start = GivenStart(x)
        return expectation(y, operator, prior, generators=generators)

    def _maximise(
        self,
        prior: Prior,
        optimiser: torch.optim.Optimizer,
        averages: list[nn.Parameter],
        x: Tensor,
        k: int,
        draws: torch.Generator,
    ) -> float:
        """Takes the steps of round `k` on patches of the estimates `x`; returns how many images' worth they were."""
        assert isinstance(prior, PatchPrior | WholePrior)
        denoiser = prior.denoiser
        low, high = math.log(self.sigma_min), math.log(self.sigma_max)
        seen, budget = 0, self.steps * self.num_pixels
        while seen < budget:  # a whole image may be more than a step's pixels: fewer steps, then, of equal cost
            clean, position = prior.draw(x, self.num_pixels, draws)
            progress = (k - 1 + seen / budget) / self.rounds
            seen += clean[:, 0].numel()
            n = len(clean)
            # One level from each of n equal bins: the same expectation, less variance.
            quantiles = (torch.randperm(n, generator=draws) + torch.rand(n, generator=draws)) / n
            sigma = (low + (high - low) * quantiles).exp().to(clean)
            noise = torch.randn(clean.shape, generator=draws).to(clean)
            with torch.enable_grad():
                error = (denoiser(clean + broadcast(sigma, noise) * noise, sigma, position) - clean).square()
                loss = (denoiser.loss_weight(sigma) * error.mean(dim=(1, 2, 3))).mean()
                optimiser.zero_grad()
                loss.backward()
            group = optimiser.param_groups[0]
            weights = group["params"]
            group["lr"] = self.learning_rate * (1 - progress)
            norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
            if not torch.isfinite(norm):
                raise InputError(
                    f"Adaptation diverged in round {k}: the gradient is not finite. Lower "
                    f"adaptation.learning_rate, which is {self.learning_rate}, or use model.precision 32."
                )
            optimiser.step()
            with torch.no_grad():
                for average, weight in zip(averages, weights, strict=True):
                    average.lerp_(weight, 1 - self.ema)
        return seen / x[0, 0].numel()


def _evaluations(estimate: Estimate) -> float:
    value = estimate.stats["num_evaluations"]
    assert isinstance(value, float)
    return value
