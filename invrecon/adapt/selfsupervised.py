"""Adaptation inside the sampling loop: at chosen levels the network first learns to explain the measurement."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from invrecon.adapt.base import Adaptation, Step, Trace, check_positive, private_generator, private_generators
from invrecon.adapt.losses import DataLoss, SelfSupervisedLoss
from invrecon.adapt.stopping import Discrepancy, HeldOutViews, held_out_loss, loss_on
from invrecon.adapt.trainable import AllWeights, Trainable, adapted_copy, movement, num_parameters
from invrecon.errors import InputError
from invrecon.methods.base import Estimate, check_generators
from invrecon.methods.counting import Counter, CountingPrior, count_calls
from invrecon.methods.sampling import repeat_cases
from invrecon.methods.stopping import measured, restrict_to
from invrecon.methods.transitions import Denoised, DenoisedTransition, PriorNoise
from invrecon.rng import Generators

if TYPE_CHECKING:
    from invrecon.methods.sampling import Sampler
    from invrecon.operators.base import LinearOperator
    from invrecon.priors.base import Cotangent, Prior


class Levels:
    """At which noise levels to adapt.

        sigma <= sigma_max   and   margin n <= i < n - margin n   and   (i mod every = 0  or  i >= n - num_last)

    for level `i` of `n`, counted from the noisiest.

    Args:
        every: Only every so many levels ...
        num_last: ... and so many at the end.
        margin: Share of the levels left out at either end.
        sigma_max: Noise level above which nothing adapts.

    Raises:
        InputError: A knob out of range.
    """

    def __init__(self, every: int = 1, num_last: int = 0, margin: float = 0.0, sigma_max: float = math.inf) -> None:
        if every < 1 or num_last < 0 or not 0 <= margin < 0.5 or not sigma_max > 0:
            raise InputError(
                f"Levels needs every >= 1, num_last >= 0, 0 <= margin < 0.5 and sigma_max > 0, got {every}, "
                f"{num_last}, {margin} and {sigma_max}."
            )
        self.every, self.num_last = every, num_last
        self.margin, self.sigma_max = float(margin), float(sigma_max)

    def chosen(self, sigmas: list[float]) -> list[int]:
        """Returns the indices of the levels that adapt, rising."""
        num = len(sigmas)
        skipped = math.ceil(self.margin * num - 1e-9)  # 0.07 * 100 is a little more than 7
        return [
            i
            for i, sigma in enumerate(sigmas)
            if sigma <= self.sigma_max
            and skipped <= i < num - skipped
            and (i % self.every == 0 or i >= num - self.num_last)
        ]


class DenoisedOutput(DenoisedTransition):
    """Ends with what the denoiser makes of the last state, before the last data step."""

    def __call__(self, x: Tensor, x0: Tensor, sigma: float, sigma_next: float, generators: Generators) -> Tensor:
        """Returns the state at `sigma_next`, and `D(x, sigma)` at the end."""
        if sigma_next == 0:
            return self.prior_estimate(x, sigma)
        return self.transition(x, x0, sigma, sigma_next, generators)


class SelfSupervised(Adaptation):
    r"""Adapts while it samples: before a level's evaluation, a few steps of Adam down a loss of the measurement alone.

    $$ \theta \leftarrow \theta - \mathrm{Adam}(\nabla_\theta L(D_\theta(x_t, \sigma_t); A, y)) $$

    Weights go on from level to level and are forgotten after the case. With a learning rate of 0 the result is that of
    `control(sampler)`, bit for bit: of the sampler alone, unless `noise_from` or `output` change its steps, which may
    gain or lose more than the adaptation. Several samples of a case share its adapter, and so have to run at once.

    Source: Barbano, Denker et al., "Steerable conditional diffusion", IEEE TMI 2025; Chung & Ye, "Deep diffusion image
    prior", ECCV 2024; Hu et al., "Test-time adaptation improves inverse problem solving with patch-based diffusion
    models", IEEE TCI 11 (2025). With what they chose: `SCD`, `DDIP`, `PatchSelfSupervision`, `WholeSelfSupervision`.

    Args:
        trainable: What adapts; all weights if None.
        loss: What is minimised; the plain misfit of the denoised image if None.
        learning_rate: Of Adam.
        steps: Steps a level.
        levels: When; at every level if None.
        keep_optimiser: Whether Adam's moments go on from level to level too, or start anew at each.
        weight_decay: Of AdamW; 0 is Adam.
        ema: If above 0, the sampler uses an exponential average of the weights over the steps, with this decay.
        held_out: Views that the loss does not see, others at every level. They are explained before a level's steps
            and after; the logarithms of the ratios add up to a curve, and once that stays above its least value the
            adaptation is over and the weights of the least value are used. None adapts to the end, on all views.
        discrepancy: Ends the adaptation once `||A D - y||^2` has come down to so many times what the noise explains;
            None does not ask.
        noise_from: Which noise the transition finds in the state: that of the conditioned `estimate`, as our samplers
            do, or of the prior alone, `adapted` or `unadapted`. The last costs another evaluation a level.
        output: The sampler's `estimate`, or what the prior `denoised` last, before the last data step.

    Raises:
        InputError: A knob out of range.
    """

    def __init__(
        self,
        trainable: Trainable | None = None,
        loss: SelfSupervisedLoss | None = None,
        learning_rate: float = 1e-5,
        steps: int = 5,
        levels: Levels | None = None,
        keep_optimiser: bool = True,
        weight_decay: float = 0.0,
        ema: float = 0.0,
        held_out: HeldOutViews | None = None,
        discrepancy: float | None = None,
        noise_from: Literal["estimate", "adapted", "unadapted"] = "estimate",
        output: Literal["estimate", "denoised"] = "estimate",
    ) -> None:
        check_positive(steps=steps)
        if not learning_rate >= 0 or not weight_decay >= 0 or not 0 <= ema < 1:
            raise InputError(
                f"{type(self).__name__} needs learning_rate >= 0, weight_decay >= 0 and 0 <= ema < 1, got "
                f"{learning_rate}, {weight_decay} and {ema}."
            )
        if noise_from not in ("estimate", "adapted", "unadapted") or output not in ("estimate", "denoised"):
            raise InputError(
                f"{type(self).__name__}: noise_from is '{noise_from}' and output '{output}', expected estimate, "
                "adapted or unadapted, and estimate or denoised."
            )
        self.trainable = AllWeights() if trainable is None else trainable
        self.loss = DataLoss() if loss is None else loss
        self.learning_rate, self.steps = float(learning_rate), steps
        self.levels = Levels() if levels is None else levels
        self.keep_optimiser, self.weight_decay = keep_optimiser, float(weight_decay)
        self.ema = float(ema)
        self.held_out = held_out
        self.discrepancy = None if discrepancy is None else Discrepancy(discrepancy)
        self.noise_from, self.output = noise_from, output

    def adapt(
        self, y: Tensor, operator: LinearOperator, prior: Prior, sampler: Sampler, generators: Generators
    ) -> tuple[Estimate, Trace]:
        """Reconstructs cases that share one adapter; see `Adaptation.adapt`.

        The updates' evaluations are counted with the sampler's, one with its gradient as one; so are their operator
        calls, but for the transposes that autograd takes.

        Raises:
            InputError: A sampler that cannot be adapted so, or an adaptation that diverged.
        """
        if sampler.samples_per_batch is not None and sampler.samples_per_batch < sampler.num_samples:
            raise InputError(
                f"{type(self).__name__} adapts to all samples of a case at once, but method.samples_per_batch is "
                f"{sampler.samples_per_batch} of {sampler.num_samples}: set it to null."
            )
        self.control(sampler)  # refuses what cannot be
        if self.discrepancy is not None:
            self.discrepancy.check(operator, y)
        order = private_generator(generators, "held-out views")
        adapting = AdaptingPrior(self, prior, y, operator, sampler.schedule.sigmas, order)
        sampler = self._steps_of(sampler, adapting.unadapted if self.noise_from == "unadapted" else None)
        estimate = sampler(y, operator, cast("Prior", adapting), generators=generators)
        for key, counter in (("num_evaluations", adapting.evaluations), ("num_operator_calls", adapting.calls)):
            estimate.stats[key] = cast(float, estimate.stats[key]) + counter.num_calls
        return estimate, adapting.finish()

    def control(self, sampler: Sampler) -> Sampler:
        """Returns what this adaptation of a sampler is without its updates: what its gain has to be measured against.

        Args:
            sampler: The method that reconstructs.

        Raises:
            InputError: A sampler that cannot be adapted so.
        """
        return self._steps_of(sampler, None)

    def _steps_of(self, sampler: Sampler, unadapted: Denoised | None) -> Sampler:
        """Returns the sampler with the noise and the output that were asked for.

        Args:
            sampler: The method that reconstructs; unchanged.
            unadapted: Where noise comes from; the evaluation from which an estimate was made if None.
        """
        if (self.noise_from, self.output) == ("estimate", "estimate"):
            return sampler
        if sampler.transition.stays_at_level:
            raise InputError(
                f"{type(sampler.transition).__name__} does not ask what noise the state holds: set noise_from and "
                "output to estimate, or take a transition such as DDIM."
            )
        if sampler.transition.estimates == {"reflection"}:  # the state is no estimate with noise that could be replaced
            raise InputError(
                f"The state of {type(sampler).__name__} is not an estimate plus noise, and {type(self).__name__} takes "
                "that noise from elsewhere: add --model.method=ProximalDiffusion, or take the recipe's own "
                "configuration (scd_ct.yaml, ddip_ct.yaml, patch_ss_ct.yaml, whole_ss_ct.yaml)."
            )
        sampler = copy.copy(sampler)
        if self.output == "denoised":
            sampler.transition = DenoisedOutput(sampler.transition)
        if self.noise_from != "estimate":
            sampler.transition = PriorNoise(sampler.transition, unadapted)
        return sampler

    def optimiser(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """Returns a fresh optimiser."""
        if self.weight_decay:
            return torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)
        return torch.optim.Adam(parameters, lr=self.learning_rate)


class AdaptingPrior:
    """A prior that, where its plan says so, first adapts to the measurement at the state that it is asked about.

    It adapts once a level, at the first evaluation there. What that draws (patch layouts) is a function of the chains'
    seeds and the level, and takes nothing from the sampler's streams.

    Args:
        plan: How to adapt.
        prior: The prior; unchanged.
        y: Measurements.
        operator: The physics, bound to these cases.
        sigmas: The sampler's noise levels.
        order: Its seed orders the held-out views.
    """

    def __init__(
        self,
        plan: SelfSupervised,
        prior: Prior,
        y: Tensor,
        operator: LinearOperator,
        sigmas: list[float],
        order: torch.Generator,
    ) -> None:
        self.plan, self.prior, self.y, self.operator = plan, prior, y, operator
        self.evaluations, self.calls = Counter(), Counter()  # of the updates
        # The optimiser moves `_trained`; the sampler sees `_sampled`, which is the same without averaging.
        self._trained, self._parameters = adapted_copy(prior, plan.trainable)
        self._sampled, self._weights = self._trained, self._parameters
        if plan.ema:
            self._sampled, self._weights = adapted_copy(prior, plan.trainable)
        self.trace = Trace(num_trainable=num_parameters(self._parameters))
        self._running = True
        self._sigmas, self._order = sigmas, order
        self._pending = plan.levels.chosen(sigmas)
        if not self._pending:
            raise InputError(
                f"{type(plan).__name__} adapts at none of the sampler's {len(sigmas)} levels, {sigmas[0]:.4g} to "
                f"{sigmas[-1]:.4g}: raise its sigma_max, lower its margin, or take more levels "
                "(--model.method.num_levels)."
            )
        last = len(self._pending) - 1
        self._pictured = {round(j * last / 7) for j in range(8)}  # the trace keeps at most 8 images
        self._optimiser: torch.optim.Optimizer | None = None
        self._stopper = None if plan.held_out is None else plan.held_out.stopper()
        self._curve = 0.0
        self._best = self._snapshot()
        if self._stopper is not None:
            self._stopper.update(self._curve)  # the weights before any adaptation compete as well
        self._twins: list[torch.Generator] | None = None

    def __call__(self, x: Tensor, sigma: float | Tensor, *, generators: Generators | None = None) -> Tensor:
        """Returns `D(x, sigma)`, adapted."""
        self._prepare(x, sigma, generators)
        return self._checked(self._sampled(x, sigma, generators=generators), sigma)

    def denoise_vjp(
        self, x: Tensor, sigma: float | Tensor, cotangent: Cotangent, *, generators: Generators | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns `D(x, sigma)`, adapted, and `J_D(x)^T cotangent(D(x, sigma))`."""
        self._prepare(x, sigma, generators)
        denoised, pulled = self._sampled.denoise_vjp(x, sigma, cotangent, generators=generators)
        return self._checked(denoised, sigma), pulled

    def unadapted(self, x: Tensor, sigma: float) -> Tensor:
        """Returns `D(x, sigma)` of the prior itself, seen through the same layout as the last evaluation."""
        return CountingPrior(self.prior, self.evaluations)(x, sigma, generators=self._twins)

    def finish(self) -> Trace:
        """Returns how the adapter came to be."""
        if self._running and self.trace.steps:
            self.trace.reason = "adapted at every chosen level"
        self.trace.movement = movement(self.prior, self._sampled)
        return self.trace

    def _snapshot(self) -> list[Tensor]:
        return [] if self._stopper is None else [weight.detach().clone() for weight in self._weights]

    def _prepare(self, x: Tensor, sigma: float | Tensor, generators: Generators | None) -> None:
        """Adapts if it is time to."""
        if self._running and self._pending and float(sigma) == self._sigmas[self._pending[0]]:
            level = self._pending.pop(0)
            self._adapt(level, x.detach(), float(sigma), check_generators(generators, len(x)))
        self._twins = None if generators is None else [generator.clone_state() for generator in generators]

    @torch.no_grad()
    def _adapt(self, level: int, x: Tensor, sigma: float, generators: Generators) -> None:
        """Takes the steps of one level, and judges them."""
        plan, steps = self.plan, self.trace.steps
        num_samples = len(x) // len(self.y)
        y = self.y.repeat_interleave(num_samples, dim=0)
        operator = count_calls(repeat_cases(self.operator, len(self.y), num_samples), self.calls)
        seen, y_seen, kept, unseen = operator, y, measured(operator, y), None
        if plan.held_out is not None:
            kept, unseen = plan.held_out.split(len(steps), operator, y, self._order)
            seen, y_seen = restrict_to(operator, y, kept)

        def explain() -> float | None:
            # The same state, views and layouts each time: the comparison is paired.
            if unseen is None:
                return None
            prior = CountingPrior(self._sampled, self.evaluations)
            denoised = prior(x, sigma, generators=private_generators(generators, "check", level))
            self._check_finite(denoised, sigma)
            return float(held_out_loss(operator, y, denoised, unseen).mean())

        before = explain()
        denoised = self._improve(level, x, sigma, generators, seen, y_seen)
        after = explain()
        explained = loss_on(operator, y, denoised, kept)
        image = denoised[0].cpu().clone() if len(steps) in self._pictured else None
        name = f"level {level + 1} of {len(self._sigmas)}"
        steps.append(Step(name, sigma, float(explained.mean()), after, image))
        self.trace.stopped_at = len(steps) - 1
        if self._running and before is not None and after is not None:
            self._judge(before, after)

    def _improve(
        self, level: int, x: Tensor, sigma: float, generators: Generators, operator: LinearOperator, y: Tensor
    ) -> Tensor:
        """Takes the optimiser's steps; returns `D(x, sigma)` before the last of them."""
        plan = self.plan
        prior = CountingPrior(self._trained, self.evaluations)
        draws = private_generators(generators, "steps", level)
        if self._optimiser is None or not plan.keep_optimiser:
            self._optimiser = plan.optimiser(self._parameters)

        scale = torch.ones((), device=x.device)

        def cotangent(denoised: Tensor) -> Tensor:
            # By a power of two, which rounds nothing, to about 1: small gradients would be zero in half precision.
            nonlocal scale
            gradient = plan.loss.cotangent(denoised, operator, y) / len(x)
            exponent = torch.frexp(gradient.abs().max()).exponent.clamp(-100, 100)
            scale = torch.ldexp(torch.ones_like(scale), -exponent)
            return gradient * scale

        for _ in range(plan.steps):
            self._optimiser.zero_grad()
            with parametrize.cached():  # low-rank corrections are multiplied out once a step, not once a chunk
                denoised = prior.backpropagate(x, sigma, cotangent, generators=draws)
            for parameter in self._parameters:
                if parameter.grad is not None:
                    parameter.grad /= scale
            self._check_finite(denoised, sigma)
            if plan.discrepancy is not None and bool(plan.discrepancy(operator, y, denoised).all()):
                self._running = False
                self.trace.reason = "the data are explained as well as their noise permits"
                break
            self._optimiser.step()
            if plan.ema:
                for average, weight in zip(self._weights, self._parameters, strict=True):
                    average.lerp_(weight, 1 - plan.ema)
        self._optimiser.zero_grad()
        return denoised

    def _judge(self, before: float, after: float) -> None:
        """Keeps the weights if held-out views were never explained better, and ends when they no longer are."""
        assert self._stopper is not None
        self._curve += math.log(max(after, 1e-30) / max(before, 1e-30))
        over = self._stopper.update(self._curve)
        best = self._stopper.best - 1  # 0 was before any adaptation
        if best == len(self.trace.steps) - 1:
            self._best = self._snapshot()
        if over:
            self._running = False
            for weight, kept in zip(self._weights, self._best, strict=True):
                weight.copy_(kept)
            self.trace.stopped_at = best
            since = "any adaptation" if best < 0 else self.trace.steps[best].name
            self.trace.reason = f"the held-out views were explained no better after {since}"

    def _checked(self, denoised: Tensor, sigma: float | Tensor) -> Tensor:
        """Returns `denoised`; what a prior gives that has not adapted yet is not the adaptation's business."""
        if self.trace.steps:
            self._check_finite(denoised, float(sigma))
        return denoised

    def _check_finite(self, denoised: Tensor, sigma: float) -> None:
        """Raises `InputError` if an adapted prior no longer gives numbers."""
        if not torch.isfinite(denoised).all():
            raise InputError(
                f"{type(self.plan).__name__} diverged: at noise level {sigma:.4g} the adapted prior gives NaN or Inf; "
                f"lower learning_rate (it is {self.plan.learning_rate:g}), or use precision 32."
            )
