"""How a network was fitted to each case, in the words of an adaptation: the same tables, figures and page show both."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from invrecon.adapt.base import Step, Trace
from invrecon.methods.dip import Curve, FittedEstimate, Iterate, NetworkFit, Quantity

MAX_STEPS = 120  # of a curve that may have thousands
FITTED = Quantity("data_loss", "fitted rows")
HELD_OUT = "held_out_loss"  # which a step has a field for
PSNR = Quantity("psnr", "PSNR [dB], not used by the rule")
WATCHED = 5  # iterations between those whose PSNR is found


@dataclass
class FitStep(Step):
    """One iteration of a fit.

    Attributes:
        values: What else was measured, by the names of the trace's `curves`; None where it was not.
    """

    values: dict[str, float | None] = field(default_factory=dict)


@dataclass
class FitTrace(Trace):
    """How a network was fitted.

    Attributes:
        curves: What the numbers of its steps are. Losses are relative: the mean square of `A x - y` over that of `y`.
    """

    curves: list[Quantity] = field(default_factory=list)


class TruthWatch:
    """Judges some of the iterates by the truth, which the fit and its rule do not know: an observer of a fit.

    Attributes:
        psnr: By case and iteration [dB].

    Args:
        judge: Gives the PSNR of an image `(1, C, H, W)` of a case of the batch.
    """

    def __init__(self, judge: Callable[[int, Tensor], float]) -> None:
        self.judge = judge
        self.psnr: dict[int, dict[int, float]] = {}

    def __call__(self, iterate: Iterate) -> None:
        """Judges every `WATCHED`-th iterate, from the first on."""
        if (iterate.iteration - 1) % WATCHED == 0:
            self.psnr.setdefault(iterate.case, {})[iterate.iteration] = self.judge(iterate.case, iterate.image)


def fit_traces(
    estimate: FittedEstimate, method: NetworkFit, psnr: Mapping[int, Mapping[int, float]] | None = None
) -> list[Trace]:
    """Returns the curves of a fit as traces, one a case: misfit, what the rule measured, the iteration that was kept.

    Args:
        estimate: What the method returned.
        method: What was fitted, and how it was to stop.
        psnr: How good iterates were, as of `TruthWatch`; None where there is no truth.
    """
    rule = type(method.stop).__name__
    return [_trace(curve, rule, None if psnr is None else psnr[b]) for b, curve in enumerate(estimate.curves)]


def _trace(curve: Curve, rule: str, psnr: Mapping[int, float] | None) -> FitTrace:
    num, every = len(curve.misfit), 1 if psnr is None else WATCHED
    spread = {round(k * (num - 1) / (MAX_STEPS - 1)) // every * every for k in range(MAX_STEPS)}
    chosen = sorted(spread | {curve.kept - 1, num - 1})
    steps = [FitStep(f"iteration {i + 1}", None, curve.misfit[i]) for i in chosen]
    curves = [FITTED]
    if curve.quantity is not None:
        curves.append(curve.quantity)
        for step, i in zip(steps, chosen, strict=True):
            value = curve.value[i] / curve.quantity.unit if math.isfinite(curve.value[i]) else None
            if curve.quantity.name == HELD_OUT:
                step.held_out_loss = value
            else:
                step.values[curve.quantity.name] = value
    if psnr is not None:
        curves.append(PSNR)
        for step, i in zip(steps, chosen, strict=True):
            step.values[PSNR.name] = psnr.get(i + 1)
    reason = f"of {num} iterations, by {rule}"
    return FitTrace([*steps], stopped_at=chosen.index(curve.kept - 1), reason=reason, curves=curves)
