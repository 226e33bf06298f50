"""Whether a prior suits a measurement, from the measurement alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invrecon.adapt.base import check_positive, mean_cost, private_generator, private_generators
from invrecon.adapt.em import ExpectationMaximisation
from invrecon.adapt.stopping import HeldOutViews, held_out_loss
from invrecon.methods.base import Estimate, Method
from invrecon.methods.classical import TotalVariation
from invrecon.methods.stopping import restrict_to
from invrecon.rng import Generators

if TYPE_CHECKING:
    from invrecon.methods.sampling import Sampler
    from invrecon.operators.base import LinearOperator
    from invrecon.priors.base import Prior


@dataclass(frozen=True)
class Verdict:
    """What the test found.

    Attributes:
        ratio: Loss on held-out views of the prior's reconstruction over that of the reconstruction without a prior.
        learning: What is left of that loss after a few rounds of learning from the measurement; None if not asked.
        suited: Whether the prior suits the measurement.
        stats: What the test has spent: `num_evaluations` and `num_operator_calls` a case.
    """

    ratio: float
    learning: float | None
    suited: bool
    stats: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        words = "in distribution" if self.suited else "out of distribution"
        learnt = "" if self.learning is None else f", {self.learning:.2f} times that after learning"
        return f"{words} (held-out loss {self.ratio:.2f} of that of total variation{learnt})"


class SuitabilityTest:
    r"""Asks views that a reconstruction has not seen whether its prior knows what can be known.

        l(x)     = || A_h x - y_h ||^2 / m - sigma_y^2
        ratio    = l(x_prior) / l(x_TV)
        learning = l(x_adapted) / l(x_prior)

    over `m` held-out rows `h`, weighed to stand for the image's error (`held_out_loss`), everything reconstructed
    and learned from the other views. A prior is out of distribution for this case if it predicts unseen views
    hardly better than no prior at all (total variation), or if a few rounds of expectation maximisation on the
    measurement predict them better still. Nothing has to be calibrated on other data: difficulty and geometry of
    the case are in numerator and denominator alike, and the noise of the held-out rows, which nothing could
    predict, is taken off both where its level is known. What is left is no less than its standard error,
    `sigma_y^2 sqrt(2 / m)` for white noise; a prior that comes down to that suits, as far as can be seen. With few
    views it is one view that decides, so a verdict on a single slice can be wrong.

    Args:
        threshold: Ratio from which the prior is unsuited.
        gain: Share of the loss to which learning has to bring it down for the prior to be unsuited.
        held_out: The views.
        reference: The reconstruction without a prior; total variation if None, between 0 and 1 for real images.
        learner: What learns; two rounds if None. It is not asked where the ratio has already decided.

    Raises:
        InputError: A limit that is not positive.
    """

    def __init__(
        self,
        threshold: float = 0.7,
        gain: float = 0.9,
        held_out: HeldOutViews | None = None,
        reference: Method | None = None,
        learner: ExpectationMaximisation | None = None,
    ) -> None:
        check_positive(threshold=threshold, gain=gain)
        self.threshold, self.gain = float(threshold), float(gain)
        self.held_out = HeldOutViews() if held_out is None else held_out
        self.reference = reference
        self.learner = ExpectationMaximisation(rounds=2) if learner is None else learner

    @torch.no_grad()
    def __call__(
        self, y: Tensor, operator: LinearOperator, prior: Prior, sampler: Sampler, generators: Generators
    ) -> Verdict:
        """Returns the verdict on cases taken together; draws from private generators alone."""
        kept, unseen = self.held_out.split(0, operator, y, private_generator(generators, "suitability"))
        seen, y_seen = restrict_to(operator, y, kept)
        std = operator.whiten(y)[2]
        noise = 0.0 if std is None else float(std.double().square().mean())
        floor = max(noise * math.sqrt(2 / int(unseen.sum())), torch.finfo(torch.float32).tiny)
        spent = {"num_evaluations": 0.0, "num_operator_calls": 0.0}

        def loss(estimate: Estimate) -> float:
            for key in spent:
                spent[key] += mean_cost(estimate, key)
            return max(float(held_out_loss(operator, y, estimate.mean, unseen).double().mean()) - noise, floor)

        private = private_generators(generators, "suitability")
        before = loss(sampler(y_seen, seen, prior, generators=private))
        bounds = (-4.0, 4.0) if operator.complex_images else (0.0, 1.0)
        reference = TotalVariation(num_iterations=500, bounds=bounds) if self.reference is None else self.reference
        ratio = before / loss(reference(y_seen, seen))
        if noise and before == floor:
            return Verdict(ratio, None, True, spent)
        if ratio >= self.threshold:
            return Verdict(ratio, None, False, spent)
        private = private_generators(generators, "suitability")
        learnt, _ = self.learner.adapt(y_seen, seen, prior, sampler, private)
        learning = loss(learnt) / before
        return Verdict(ratio, learning, learning > self.gain, spent)
