"""When to stop a fit that would go on to explain the noise: rules that know the measurement alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invrecon.errors import InputError
from invrecon.methods.stopping import Stopper, check_held_out, discrepancy, share_of_kspace, split

if TYPE_CHECKING:
    from invrecon.methods.dip.measurement import CaseData
    from invrecon.operators.base import LinearOperator


@dataclass(frozen=True)
class Quantity:
    """What a rule measures, for tables and figures.

    Attributes:
        name: Its key, such as `discrepancy`.
        label: What it is, in words.
        unit: What a value is divided by before it is shown.
        threshold: Where the rule stops, in the same unit as the shown value; None for a rule that seeks the least.
    """

    name: str
    label: str
    unit: float = 1.0
    threshold: float | None = None


class Monitor:
    """Watches one fit, and keeps the iterate that its rule prefers: the last, unless a rule knows better.

    Attributes:
        image: The preferred iterate so far, `(1, C, H, W)`.
        iteration: Its number, from 1; 0 before any.
        value: What the rule measured last, NaN before it could.
        quantity: What that is; None of a rule that measures nothing.
    """

    quantity: Quantity | None = None

    def __init__(self) -> None:
        self.image: Tensor | None = None
        self.iteration = 0
        self.value = float("nan")

    def __call__(self, iteration: int, x: Tensor, residual: Tensor) -> bool:
        """Takes in an iterate and returns whether to stop.

        Args:
            iteration: Its number, from 1.
            x: The image, `(1, C, H, W)`.
            residual: `A x - y` over all rows that count, held-out ones too.
        """
        self.image, self.iteration = x, iteration
        return False


class LeastValue(Monitor, ABC):
    """Prefers the iterate of the least value, and stops `patience` iterations after it."""

    def __init__(self, patience: int) -> None:
        super().__init__()
        self.stopper = Stopper(patience)

    @abstractmethod
    def measure(self, x: Tensor, residual: Tensor) -> float | None:
        """Returns the value of an iterate, None while there is none."""

    def __call__(self, iteration: int, x: Tensor, residual: Tensor) -> bool:
        """Takes in an iterate; see `Monitor.__call__`."""
        value = self.measure(x, residual)
        if value is not None:
            self.value = value
            self.stopper.update(value)
        if not self.stopper.waited:
            super().__call__(iteration, x, residual)
        return self.stopper.waited >= self.stopper.patience


class StoppingRule(ABC):
    """Says when a fit has explained the image and not yet the noise, from the measurement alone."""

    def split(self, operator: LinearOperator, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Returns the rows that the fit sees and those held out of it; by default none.

        Args:
            operator: The physics of one case.
            rows: Those that count, `(1, *measurement_shape)` of bool.
            generator: Draws what is held out.
        """
        return rows, torch.zeros_like(rows)

    @abstractmethod
    def monitor(self, data: CaseData) -> Monitor:
        """Returns what watches the fit to one case.

        Raises:
            InputError: The rule does not work with these data.
        """


class AllIterations(StoppingRule):
    """Never stops: the last iterate counts."""

    def monitor(self, data: CaseData) -> Monitor:
        """Returns what keeps the last iterate."""
        return Monitor()


class DiscrepancyStop(StoppingRule):
    r"""Stops at the first iterate that explains the data as well as their noise permits.

    $$ \|A x - y\|^2 \le \tau\, m\, \sigma_y^2 $$

    over the `m` rows that the fit sees (`discrepancy`). Data without noise are refused.

    Args:
        factor: `tau`; above 1 stops earlier.

    Raises:
        InputError: A factor that is not positive.
    """

    def __init__(self, factor: float = 1.0) -> None:
        if not factor > 0:
            raise InputError(f"DiscrepancyStop: factor is {factor}, but it has to be above 0.")
        self.factor = float(factor)

    def monitor(self, data: CaseData) -> Monitor:
        """Returns what compares the misfit with the noise."""
        if data.std is None:
            raise InputError(
                "DiscrepancyStop compares the misfit with the noise, but the measurement comes without noise_std: give "
                "its noise level, or stop by HeldOutStop."
            )
        return _DiscrepancyMonitor(self.factor, data.std, data.seen)


class _DiscrepancyMonitor(Monitor):
    def __init__(self, factor: float, std: float, seen: Tensor) -> None:
        super().__init__()
        self.factor, self.std, self.seen = factor, std, seen
        self.quantity = Quantity("discrepancy", "discrepancy, of fitted rows", threshold=factor)

    def __call__(self, iteration: int, x: Tensor, residual: Tensor) -> bool:
        self.value = float(discrepancy(residual, self.seen, self.std))
        super().__call__(iteration, x, residual)
        return self.value <= self.factor


class HeldOutStop(StoppingRule):
    r"""Cross-validation: prefers the iterate that best explains lines of the measurement that the fit does not see.

    $$ v = c\, \overline{|A x - y|^2}_{\mathrm{seen}} + (1 - c)\, \overline{|A x - y|^2}_{\mathrm{held\ out}} $$

    The lines (views of a sinogram, lines of k-space outside its fully sampled centre) are drawn once a case. They are
    no longer fitted, which costs a little of the image and is the price of knowing when to stop. `c` is the share of
    Cartesian k-space that the fit sees: its centre, which holds most of the image, is never held out, so that seen
    lines stand for themselves and those held out for all the others; `v` then estimates the error of the image. Of
    other measurements, whose lines all hold as much, the held-out ones alone count, `c = 0`. Shown is `v` over that of
    `x = 0`, a relative misfit like that of the fitted rows.

    Source: Yaman, Hosseini & Akcakaya, "Zero-shot self-supervised learning for MRI reconstruction", ICLR 2022, for
    single scans; the weight of seen lines is ours.

    Args:
        fraction: Share of the lines held out, at least one.
        patience: Iterations without a new least value after which it is time to stop.

    Raises:
        InputError: A fraction outside (0, 0.5], or a patience below 1.
    """

    def __init__(self, fraction: float = 0.1, patience: int = 500) -> None:
        check_held_out(self, fraction, patience)
        self.fraction, self.patience = float(fraction), patience

    def split(self, operator: LinearOperator, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Holds out the rows of a few lines, drawn at random; see `StoppingRule.split`."""
        return split(
            operator, rows, lambda n: torch.randperm(n, generator=generator)[: max(1, round(self.fraction * n))]
        )

    def monitor(self, data: CaseData) -> Monitor:
        """Returns what keeps the least held-out loss."""
        share = share_of_kspace(data.operator, data.seen)
        # Weights of rows, without an index of them, for which a GPU would have to be waited for.
        weights = share * data.seen / data.seen.sum() + (1 - share) * data.held_out / data.held_out.sum()
        monitor = _WeightedMonitor(self.patience, weights.to(data.y))
        energy = monitor.measure(data.y, data.y)  # the residual of no image is the measurement
        label = "all of k-space, by its held-out rows" if share else "held-out rows"
        monitor.quantity = Quantity("held_out_loss", label, unit=energy if energy > 0 else 1.0)
        return monitor


class _WeightedMonitor(LeastValue):
    """Watches the weighted sum of the squared residual."""

    def __init__(self, patience: int, weights: Tensor) -> None:
        super().__init__(patience)
        self.weights = weights

    def measure(self, x: Tensor, residual: Tensor) -> float:
        return float((self.weights * residual.square()).sum())


class WindowedVarianceStop(StoppingRule):
    r"""Prefers the iterate around which the image moves least.

    $$ V_t = \frac1W \sum_{w<W} \Big\|x_{t-w} - \frac1W \sum_{v<W} x_{t-v}\Big\|^2 $$

    A fit slows down between explaining the image and explaining the noise. Needs no noise level and holds nothing
    out, at the memory of `W` images; a heuristic, which a falling learning rate or averaging of iterates misleads.

    Source: Wang et al., "Early stopping for deep image prior", TMLR 2023, Alg. 1 (ES-WMV).

    Args:
        window: `W`, in iterations.
        patience: Iterations without a new least variance after which it is time to stop.

    Raises:
        InputError: A window below 2, or a patience below 1.
    """

    def __init__(self, window: int = 100, patience: int = 500) -> None:
        if window < 2 or patience < 1:
            raise InputError(f"WindowedVarianceStop needs window >= 2 and patience >= 1, got {window} and {patience}.")
        self.window, self.patience = window, patience

    def monitor(self, data: CaseData) -> Monitor:
        """Returns what keeps the least variance."""
        return WindowedVariance(self.window, self.patience)


class WindowedVariance(LeastValue):
    """Watches the running variance of the last images; see `WindowedVarianceStop`.

    Two running sums give it, in double precision, so that an iteration costs a few images and not a window of them.
    """

    def __init__(self, window: int, patience: int) -> None:
        super().__init__(patience)
        self.window = window
        self.quantity = Quantity("windowed_variance", f"variance of the last {window} images")
        self._images: deque[Tensor] = deque()
        self._sum: Tensor | float = 0.0
        self._squares = 0.0

    def measure(self, x: Tensor, residual: Tensor) -> float | None:
        """Returns `V_t`, None until there are `window` images."""
        self._images.append(x)
        new = x.double()
        self._sum = self._sum + new
        self._squares += float(new.square().sum())
        if len(self._images) > self.window:
            old = self._images.popleft().double()
            self._sum = self._sum - old
            self._squares -= float(old.square().sum())
        if len(self._images) < self.window:
            return None
        mean = self._sum / self.window
        return max(self._squares / self.window - float(mean.square().sum()), 0.0)
