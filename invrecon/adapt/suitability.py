"""Whether a prior suits a measurement, from the measurement alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invrecon.adapt.base import private_generator, private_generators
from invrecon.adapt.stopping import HeldOutViews, held_out_loss, without_views
from invrecon.errors import InputError
from invrecon.methods.base import Method
from invrecon.methods.classical import TotalVariation
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
        suited: Whether the prior suits the measurement.
    """

    ratio: float
    suited: bool

    def __str__(self) -> str:
        words = "in distribution" if self.suited else "out of distribution"
        return f"{words} (held-out loss {self.ratio:.2f} of that of total variation)"


class SuitabilityTest:
    r"""Asks which predicts views that neither has seen better: the prior, or no prior at all.

        ratio = || A_h x_prior - y_h ||^2 / || A_h x_TV - y_h ||^2

    over held-out views `h`, both reconstructed from the other views. A prior of the right distribution knows more
    than total variation does; one that knows less is out of distribution for this case. No number has to be
    calibrated on other data: total variation takes the difficulty of the case, its noise and its geometry into account.

    Args:
        threshold: Ratio below which the prior counts as suited.
        held_out: The views.
        reference: The reconstruction without a prior.
    """

    def __init__(
        self, threshold: float = 0.7, held_out: HeldOutViews | None = None, reference: Method | None = None
    ) -> None:
        if not threshold > 0:
            raise InputError(f"SuitabilityTest: threshold is {threshold}, but it has to be above 0.")
        self.threshold = float(threshold)
        self.held_out = HeldOutViews(0.1) if held_out is None else held_out
        self.reference = TotalVariation(num_iterations=500) if reference is None else reference

    @torch.no_grad()
    def __call__(
        self, y: Tensor, operator: LinearOperator, prior: Prior, sampler: Sampler, generators: Generators
    ) -> Verdict:
        """Returns the verdict on cases taken together; draws from private generators alone."""
        unseen = self.held_out.mask(0, operator, private_generator(generators, "suitability"))
        seen, y_seen = without_views(operator, y, unseen)
        own = sampler(y_seen, seen, prior, generators=private_generators(generators, "suitability")).mean
        other = self.reference(y_seen, seen).mean
        ratio = float(held_out_loss(operator, y, own, unseen).sum() / held_out_loss(operator, y, other, unseen).sum())
        return Verdict(ratio, ratio < self.threshold)
