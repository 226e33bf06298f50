"""How a network was fitted to each case, in the words of an adaptation: the same tables, figures and page show both."""

from __future__ import annotations

import math

from invrecon.adapt.base import Step, Trace
from invrecon.methods.dip import FittedEstimate, HeldOutStop, NetworkFit

MAX_STEPS = 120  # of a curve that may have thousands


def fit_traces(estimate: FittedEstimate, method: NetworkFit) -> list[Trace]:
    """Returns the curves of a fit as traces, one a case: misfit, loss on held-out data, the iteration that was kept.

    Args:
        estimate: What the method returned.
        method: What was fitted, and how it was to stop.
    """
    traces = []
    for curve in estimate.curves:
        num = len(curve.misfit)
        shown = {round(k * (num - 1) / (MAX_STEPS - 1)) for k in range(MAX_STEPS)} | {curve.kept - 1}
        chosen = sorted(shown)
        held_out = curve.value if isinstance(method.stop, HeldOutStop) else [math.nan] * num
        steps = [
            Step(f"iteration {i + 1}", None, curve.misfit[i], held_out[i] if math.isfinite(held_out[i]) else None)
            for i in chosen
        ]
        reason = f"of {num} iterations, by {type(method.stop).__name__}"
        traces.append(Trace(steps, stopped_at=chosen.index(curve.kept - 1), reason=reason))
    return traces
