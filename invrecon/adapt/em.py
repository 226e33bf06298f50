"""Expectation maximisation on one measurement: reconstruct, learn the reconstruction, repeat."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from invrecon.adapt.base import (
    Adaptation,
    Step,
    Trace,
    check_positive,
    private_generator,
    private_generators,
)
from invrecon.adapt.stopping import HeldOutViews, loss_on
from invrecon.adapt.trainable import AllWeights, Trainable, adapted_copy, movement, num_parameters
from invrecon.errors import InputError
from invrecon.methods.base import Estimate
from invrecon.methods.sampling import ProximalDiffusion, Sampler
from invrecon.methods.start import GivenStart
from invrecon.methods.stopping import mean_square, measured, restrict_to
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

    Source: the idea, for data sets of measurements, is that of Rozet et al., "Learning diffusion priors from
    observations by expectation maximization", NeurIPS 2024 (arXiv 2405.13712); on a single measurement, by patches and
    with estimates for samples it is ours. Numbers were chosen on two validation slices, with
    patches (`docs/adaptation.md`).

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
        steps: int = 70,
        learning_rate: float = 1e-3,
        num_pixels: int = 12544,
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
        seen, y_seen, kept, unseen, rule = operator, y, measured(operator, y), None, None
        if self.held_out is not None:
            # The same views in every round: each goes on from the last estimate, which must never have seen them.
            kept, unseen = self.held_out.split(0, operator, y, private_generator(generators, "views"))
            seen, y_seen = restrict_to(operator, y, kept)
            rule = self.held_out.stopper()
        learner = _Learner(self, prior, private_generator(generators, "learning"))
        trace = Trace(num_trainable=num_parameters(learner.averages), reason=f"all {self.rounds} rounds")
        watched, num_cases = len(y) // 2, len(y)
        images: dict[int, Tensor] = {}
        num_evaluations, best, risen = 0.0, learner.snapshot(), False
        for k in range(self.rounds + 1):
            if k:
                num_evaluations += learner.learn(torch.cat(list(images.values())), k)
            # The watched case is renewed in every round, the others of a pool in turn.
            for b in dict.fromkeys((watched, (watched + k) % num_cases)):
                one = slice(b, b + 1)
                part, own = seen.select_cases(one, num_cases), private_generators(generators[one], "round", k)
                estimate = self._expect(learner.adapted, sampler, part, y_seen[one], images.get(b), own)
                num_evaluations += cast(float, estimate.stats["num_evaluations"])
                images[b] = estimate.mean
            one = slice(watched, watched + 1)
            name, own_operator = f"round {k}" if k else "not adapted", operator.select_cases(one, num_cases)
            own_unseen = None if unseen is None else unseen[one]
            trace.steps.append(self._look(name, own_operator, y[one], images[watched], kept[one], own_unseen))
            if rule is None:
                continue
            risen = rule.update(cast(float, trace.steps[k].held_out_loss))
            if rule.best == k:
                best = learner.snapshot()
            if risen:
                break
        trace.stopped_at = len(trace.steps) - 1
        if rule is not None and rule.best < trace.stopped_at:
            end = f"had no new least in {rule.patience} rounds" if risen else "was least"
            trace.reason = f"the loss on views held out {end}"
            trace.stopped_at = rule.best
            learner.restore(best)
        trace.movement = movement(prior, learner.adapted)
        estimate = sampler(y, operator, learner.adapted, generators=generators)
        spent = cast(float, estimate.stats["num_evaluations"]) + num_evaluations / num_cases
        return replace(estimate, stats={**estimate.stats, "num_evaluations": spent}), trace

    @staticmethod
    @torch.no_grad()
    def _look(name: str, operator: LinearOperator, y: Tensor, x: Tensor, kept: Tensor, unseen: Tensor | None) -> Step:
        """Returns what the measurement says of the estimate `x`, and the estimate."""
        if unseen is None:
            residual, held_out = mean_square(operator(x) - y, kept), None
        else:
            residual, held_out = loss_on(operator, y, x, kept), float(loss_on(operator, y, x, unseen))
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


class _Learner:
    """A copy of the prior that takes the M-steps, and a second one with the average of its weights.

    Attributes:
        adapted: The prior of the averaged weights, which reconstructs.
        averages: Those of its parameters that adapt.

    Args:
        plan: The knobs.
        prior: The prior; unchanged.
        draws: Draws patches, noise levels and noise.
    """

    def __init__(self, plan: ExpectationMaximisation, prior: Prior, draws: torch.Generator) -> None:
        self.plan, self.draws = plan, draws
        self._learning, self._weights = adapted_copy(prior, plan.trainable)
        self.adapted, self.averages = adapted_copy(prior, plan.trainable)
        self._optimiser = torch.optim.Adam(self._weights, lr=plan.learning_rate, betas=(0.9, 0.99))

    def snapshot(self) -> list[Tensor]:
        """Returns the averaged weights, to be restored."""
        return [average.detach().clone() for average in self.averages]

    @torch.no_grad()
    def restore(self, snapshot: list[Tensor]) -> None:
        """Goes back to earlier averaged weights."""
        for average, value in zip(self.averages, snapshot, strict=True):
            average.copy_(value)

    def learn(self, x: Tensor, k: int) -> float:
        """Takes the steps of round `k` on patches of the estimates `x`, `(N, C, H, W)`.

        Returns:
            How many images' worth of pixels the network has seen.

        Raises:
            InputError: The gradient is not finite.
        """
        plan, learning = self.plan, self._learning
        assert isinstance(learning, PatchPrior | WholePrior)  # seen to by `adapt`
        low, high = math.log(plan.sigma_min), math.log(plan.sigma_max)
        num_seen, budget = 0, plan.steps * plan.num_pixels
        while num_seen < budget:  # a whole image may be more than a step's pixels: fewer steps, then, of equal cost
            clean, position = learning.draw(x, plan.num_pixels, self.draws)
            progress = (k - 1 + num_seen / budget) / plan.rounds
            num_seen += clean[:, 0].numel()
            n = len(clean)
            # One level from each of n equal bins: the same expectation, less variance.
            quantiles = (torch.randperm(n, generator=self.draws) + torch.rand(n, generator=self.draws)) / n
            sigma = (low + (high - low) * quantiles).exp().to(clean)
            noise = torch.randn(clean.shape, generator=self.draws).to(clean)
            with torch.enable_grad():
                loss = learning.denoiser.denoising_losses(clean, sigma, noise, position).mean()
                self._optimiser.zero_grad()
                loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self._weights, 1.0)
            if not torch.isfinite(norm):
                raise InputError(
                    f"Adaptation diverged in round {k}: the gradient is not finite. Lower "
                    f"adaptation.learning_rate, which is {plan.learning_rate}, or use model.precision 32."
                )
            for group in self._optimiser.param_groups:
                group["lr"] = plan.learning_rate * (1 - progress)
            self._optimiser.step()
            with torch.no_grad():
                for average, weight in zip(self.averages, self._weights, strict=True):
                    average.lerp_(weight, 1 - plan.ema)
        return num_seen / x[0, 0].numel()
