"""Expectation maximisation on one measurement: reconstruct, learn the reconstruction, repeat."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invrecon.adapt.base import (
    Adaptation,
    Step,
    Trace,
    add_costs,
    check_positive,
    join,
    mean_cost,
    private_generator,
    private_generators,
)
from invrecon.adapt.losses import DataLoss
from invrecon.adapt.stopping import Discrepancy, HeldOutViews, held_out_losses, loss_on
from invrecon.adapt.trainable import AllWeights, Trainable, adapted_copy, movement, num_parameters
from invrecon.errors import InputError
from invrecon.methods.base import Estimate
from invrecon.methods.plugandplay import AnnealedPnPADMM
from invrecon.methods.sampling import Sampler
from invrecon.methods.start import GivenStart
from invrecon.methods.stopping import measured, restrict_to
from invrecon.priors.patch import PatchPrior, WholePrior
from invrecon.rng import Generators, randn

if TYPE_CHECKING:
    from invrecon.operators.base import LinearOperator
    from invrecon.priors.base import Prior

AT_ONCE = 4  # cases of a pool that are reconstructed together
MOST_TAUGHT = 4  # times the steps of one case that a round of many has


class ExpectationMaximisation(Adaptation):
    r"""Learns the prior of one patient from one measurement, starting from any prior.

        E:  x_r = E[x | y] or a sample of it, under the prior theta_{r-1}
        M:  theta_r: a few steps down  E_{p, sigma, n}  w(sigma) || D_theta(p + sigma n, sigma) - p ||^2

    over patches `p` of `x_r` at all places (whole images for a whole-image prior): one image is thousands of patches.
    The sampler's fast estimates, not its samples, serve as `x_r`: a chain's own noise would be learned too. Each round
    goes on from the last estimate at a modest noise level, so that it costs a third of a reconstruction. Pooled cases
    share what they teach, which is worth much more than what each learns alone: errors of one estimate are not those of
    the others, what they show of the anatomy is. Up to `teachers` of them, evenly spread, teach and are reconstructed
    anew in every round; the middle one is watched, and says when to stop.

    With `data_weight` the M-step descends the misfit of the watched case's denoised estimate besides,
    `data_weight || A D_theta(x_r + sigma n) - y ||^2 / || y ||^2`, at another evaluation of the whole image a step.

    Source: the idea, for data sets of measurements, is that of Rozet et al., "Learning diffusion priors from
    observations by expectation maximization", NeurIPS 2024 (arXiv 2405.13712); on a single measurement, by patches and
    with estimates for samples it is ours. Numbers were chosen on two validation slices, with
    patches (`docs/adaptation.md`).

    Args:
        rounds: E- and M-steps.
        steps: Steps of Adam in a round for each case that teaches, of four at most; fewer if the prior cannot draw as
            little as `num_pixels`.
        learning_rate: Its rate at the start; it falls linearly to zero over the rounds.
        num_pixels: Pixels a step.
        sigma_min: Lowest noise level that is learned, log-uniformly.
        sigma_max: Highest.
        ema: Decay of the average of the weights over steps that reconstructs and is kept; 0 takes the last weights.
        expectation: The sampler of the E-step; ten levels of `AnnealedPnPADMM` from 0.05 if None.
        trainable: What adapts; all weights by default.
        held_out: Rays or views that the rounds do not see, the same in all of them as each goes on from the last
            estimate. The last round is kept that does not predict them significantly worse than the best
            (`PairedStopper`). None runs all rounds on all of the measurement.
        data_weight: Of the misfit; 0 leaves it out.
        discrepancy: Ends the rounds once `||A x_r - y||^2` has come down to so many times what the noise explains; None
            does not ask.
        teachers: Most cases of a pool that teach: what pooling costs.

    Raises:
        InputError: A knob out of range.
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
        data_weight: float = 0.0,
        discrepancy: float | None = None,
        teachers: int = 16,
    ) -> None:
        check_positive(rounds=rounds, steps=steps, num_pixels=num_pixels, sigma_min=sigma_min, teachers=teachers)
        if not 0 <= learning_rate < math.inf or not sigma_min < sigma_max < math.inf or not 0 <= ema < 1:
            raise InputError(
                "ExpectationMaximisation needs learning_rate >= 0, sigma_min < sigma_max, all of them finite, and "
                f"0 <= ema < 1, got {learning_rate}, {sigma_min}, {sigma_max} and {ema}."
            )
        self.rounds, self.steps, self.learning_rate, self.num_pixels = rounds, steps, learning_rate, num_pixels
        self.sigma_min, self.sigma_max, self.ema = sigma_min, sigma_max, ema
        if not data_weight >= 0:
            raise InputError(f"ExpectationMaximisation: data_weight is {data_weight}, but it must not be negative.")
        self._chosen = expectation is not None  # what the user has chosen is taken as it is
        self.expectation = AnnealedPnPADMM(num_levels=10, sigma_max=0.05) if expectation is None else expectation
        self.trainable = AllWeights() if trainable is None else trainable
        self.held_out = held_out
        self.data_weight = float(data_weight)
        self.discrepancy = None if discrepancy is None else Discrepancy(discrepancy)
        self.teachers = teachers

    @property
    def highest_level(self) -> float:
        """That of the E-steps: what is learned is of their samples, at the levels of the M-steps."""
        return self.expectation.highest_level

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
            # The same rows in every round: each goes on from the last estimate, which must never have seen them.
            kept, unseen = self.held_out.split(0, operator, y, private_generator(generators, "views"))
            seen, y_seen = restrict_to(operator, y, kept)
            rule = self.held_out.paired_stopper()
        if self.discrepancy is not None:
            self.discrepancy.check(operator, y)
        learner = _Learner(self, prior, private_generator(generators, "learning"))
        num_cases = len(y)
        teachers = spread(num_cases, self.teachers)
        middle = len(teachers) // 2
        watched = teachers[middle]
        one, its = slice(watched, watched + 1), slice(middle, middle + 1)  # in the batch, and among those that teach
        trace = Trace(num_trainable=num_parameters(learner.averages), reason=f"all {self.rounds} rounds")
        trace.watched = watched if num_cases > 1 else None
        watched_operator, y_watched = operator.select_cases(one, num_cases), y[one]
        seen_watched, y_seen_watched = seen.select_cases(one, num_cases), y_seen[one]
        spent = {"num_evaluations": 0.0, "num_operator_calls": 0.0}
        best, over = learner.snapshot(), False
        images: Tensor | None = None
        for k in range(self.rounds + 1):
            if images is not None:
                spent["num_evaluations"] += learner.learn(images, k, seen_watched, y_seen_watched, images[its])
                spent["num_operator_calls"] += learner.num_operator_calls
            estimate = self._expect(learner.adapted, sampler, seen, y_seen, images, teachers, generators, k)
            for key in spent:
                spent[key] += len(teachers) * mean_cost(estimate, key)
            images = estimate.mean
            x = images[its]
            name = f"round {k}" if k else "not adapted"
            explained = float(loss_on(watched_operator, y_watched, x, kept[one]))
            trace.steps.append(Step(name, None, explained, image=x[0].cpu()))
            spent["num_operator_calls"] += 1 if unseen is None else 2
            if rule is not None and unseen is not None:
                losses = held_out_losses(watched_operator, y_watched, x, unseen[one])
                trace.steps[k].held_out_loss = float(losses.mean())
                over = rule.update(losses)
                if rule.best == k:
                    best = learner.snapshot()
            if over:
                break
            if self.discrepancy is not None and k < self.rounds:
                spent["num_operator_calls"] += 1
                if bool(self.discrepancy(seen_watched, y_seen_watched, x)):
                    trace.reason = "the data are explained as well as their noise permits"
                    break
        trace.stopped_at = len(trace.steps) - 1
        if rule is not None and rule.best < trace.stopped_at:
            trace.reason = "later rounds predict what was held out significantly worse"
            trace.stopped_at = rule.best
            learner.restore(best)
        trace.movement = movement(prior, learner.adapted)
        estimate = self._check_finite(sampler(y, operator, learner.adapted, generators=generators), trace.stopped_at)
        return add_costs(estimate, {key: value / num_cases for key, value in spent.items()}), trace

    def _expect(
        self,
        prior: Prior,
        sampler: Sampler,
        operator: LinearOperator,
        y: Tensor,
        x: Tensor | None,
        teachers: Sequence[int],
        generators: Generators,
        k: int,
    ) -> Estimate:
        """Returns estimates of the cases that teach: the first by the sampler itself, the next ones from the last, `x`.

        A few cases at a time, so that a pool takes no more memory than a batch.
        """
        expectation = sampler
        if x is not None:
            expectation = copy.copy(self.expectation)
            if operator.complex_images and not self._chosen:
                expectation.clip = None
        estimates = []
        for start in range(0, len(teachers), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            chosen = torch.tensor(teachers[part], device=y.device)
            if x is not None:
                expectation.start = GivenStart(x[part])
            own = private_generators([generators[b] for b in teachers[part]], "round", k)
            estimates.append(expectation(y[chosen], operator.select_cases(chosen, len(y)), prior, generators=own))
        return self._check_finite(join(estimates), k)

    def _check_finite(self, estimate: Estimate, k: int) -> Estimate:
        """Returns the estimate by what round `k` has learned.

        Raises:
            InputError: It holds NaN or Inf. That of no round at all is the sampler's own business.
        """
        if k and not torch.isfinite(estimate.mean).all():
            raise self._diverged(k, "the estimate")
        return estimate

    def _diverged(self, k: int, what: str) -> InputError:
        return InputError(
            f"Adaptation diverged in round {k}: {what} is not finite. Lower adaptation.learning_rate, which is "
            f"{self.learning_rate}, or use model.precision 32."
        )


def spread(num_cases: int, num: int) -> list[int]:
    """Returns the numbers of at most `num` cases, evenly spread over all of them."""
    num = min(num, num_cases)
    return [(2 * j + 1) * num_cases // (2 * num) for j in range(num)]


class _Learner:
    """A copy of the prior that takes the M-steps, and a second one with the average of its weights.

    Attributes:
        adapted: The prior of the averaged weights, which reconstructs.
        averages: Those of its parameters that adapt.
        num_operator_calls: Of the last round.

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
        self.num_operator_calls = 0

    def snapshot(self) -> list[Tensor]:
        """Returns the averaged weights, to be restored."""
        return [average.detach().clone() for average in self.averages]

    @torch.no_grad()
    def restore(self, snapshot: list[Tensor]) -> None:
        """Goes back to earlier averaged weights."""
        for average, value in zip(self.averages, snapshot, strict=True):
            average.copy_(value)

    def learn(self, x: Tensor, k: int, operator: LinearOperator, y: Tensor, estimate: Tensor) -> float:
        """Takes the steps of round `k`.

        Args:
            x: The estimates whose patches teach, `(N, C, H, W)`.
            k: From 1.
            operator: The physics of the watched case.
            y: Its measurement.
            estimate: Its estimate, `(1, C, H, W)`.

        Returns:
            How many images' worth of pixels the network has seen.

        Raises:
            InputError: The gradient is not finite.
        """
        plan, learning = self.plan, self._learning
        assert isinstance(learning, PatchPrior | WholePrior)  # seen to by `adapt`
        low, high = math.log(plan.sigma_min), math.log(plan.sigma_max)
        num_seen, self.num_operator_calls = 0, 0
        budget = plan.steps * plan.num_pixels * min(len(x), MOST_TAUGHT)
        num_images = 0
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
            if plan.data_weight:
                self._descend_misfit(operator, y, estimate, float(sigma[0]))
                num_images += 1
            norm = torch.nn.utils.clip_grad_norm_(self._weights, 1.0)
            if not torch.isfinite(norm):
                raise plan._diverged(k, "the gradient")
            for group in self._optimiser.param_groups:
                group["lr"] = plan.learning_rate * (1 - progress)
            self._optimiser.step()
            with torch.no_grad():
                for average, weight in zip(self.averages, self._weights, strict=True):
                    average.lerp_(weight, 1 - plan.ema)
        return num_seen / x[0, 0].numel() + num_images

    def _descend_misfit(self, operator: LinearOperator, y: Tensor, estimate: Tensor, sigma: float) -> None:
        """Adds the gradient of the weighted misfit at one noise level."""
        noisy = estimate + sigma * randn(estimate.shape[1:], [self.draws], estimate)
        whitened = operator.whiten(y)[1]
        weight = self.plan.data_weight / max(float(whitened.square().mean()), torch.finfo(torch.float32).tiny)
        self.num_operator_calls += 1
        self._learning.backpropagate(
            noisy, sigma, lambda denoised: weight * DataLoss().cotangent(denoised, operator, y), generators=[self.draws]
        )
