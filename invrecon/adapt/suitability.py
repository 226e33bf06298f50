"""Whether a prior suits a measurement, from the measurement alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invrecon.adapt.base import check_positive, private_generator, private_generators
from invrecon.adapt.em import ExpectationMaximisation
from invrecon.adapt.stopping import HeldOutViews, loss_on
from invrecon.methods.base import Method
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
    """

    ratio: float
    learning: float | None
    suited: bool

    def __str__(self) -> str:
        words = "in distribution" if self.suited else "out of distribution"
        learnt = "" if self.learning is None else f", {self.learning:.2f} times that after learning"
        return f"{words} (held-out loss {self.ratio:.2f} of that of total variation{learnt})"


class SuitabilityTest:
    r"""Asks views that a reconstruction has not seen whether its prior knows what can be known.

        ratio    = || A_h x_prior - y_h ||^2 / || A_h x_TV - y_h ||^2
        learning = || A_h x_adapted - y_h ||^2 / || A_h x_prior - y_h ||^2

    over held-out views `h`, everything reconstructed and learned from the other views. A prior is out of distribution
    for this case if it predicts unseen views hardly better than no prior at all (total variation), or if a few rounds
    of expectation maximisation on the measurement predict them better still. Nothing has to be calibrated on other
    data: difficulty, noise and geometry of the case are in numerator and denominator alike. With few views it is one
    view that decides, so a verdict on a single slice can be wrong.

    Args:
        threshold: Ratio from which the prior is unsuited.
        gain: Share of the loss to which learning has to bring it down for the prior to be unsuited.
        held_out: The views.
        reference: The reconstruction without a prior.
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
        self.reference = TotalVariation(num_iterations=500) if reference is None else reference
        self.learner = ExpectationMaximisation(rounds=2) if learner is None else learner

    @torch.no_grad()
    def __call__(
        self, y: Tensor, operator: LinearOperator, prior: Prior, sampler: Sampler, generators: Generators
    ) -> Verdict:
        """Returns the verdict on cases taken together; draws from private generators alone."""
        kept, unseen = self.held_out.split(0, operator, y, private_generator(generators, "suitability"))
        seen, y_seen = restrict_to(operator, y, kept)

        def loss(x: Tensor) -> float:
            return float(loss_on(operator, y, x, unseen).sum())

        private = private_generators(generators, "suitability")
        before = loss(sampler(y_seen, seen, prior, generators=private).mean)
        ratio = before / loss(self.reference(y_seen, seen).mean)
        if ratio >= self.threshold:
            return Verdict(ratio, None, False)
        private = private_generators(generators, "suitability")
        learnt, _ = self.learner.adapt(y_seen, seen, prior, sampler, private)
        learning = loss(learnt.mean) / before
        return Verdict(ratio, learning, learning > self.gain)
