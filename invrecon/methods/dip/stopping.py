"""When to stop a fit that would go on to explain the noise: rules that know the measurement alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invrecon.errors import InputError

if TYPE_CHECKING:
    from invrecon.methods.dip.measurement import CaseData


class Monitor(ABC):
    """Watches one fit, and keeps the iterate that its rule prefers.

    Attributes:
        image: The preferred iterate so far, `(1, C, H, W)`.
        iteration: Its number, from 1; 0 before any.
        value: What the rule measured last, NaN before it could.
    """

    def __init__(self) -> None:
        self.image: Tensor | None = None
        self.iteration = 0
        self.value = float("nan")

    @abstractmethod
    def __call__(self, iteration: int, x: Tensor, residual: Tensor) -> bool:
        """Takes in an iterate and returns whether to stop.

        Args:
            iteration: Its number, from 1.
            x: The image, `(1, C, H, W)`.
            residual: `A x - y` over all rows that count, held-out ones too.
        """

    def keep(self, iteration: int, x: Tensor) -> None:
        """Makes this iterate the preferred one."""
        self.image, self.iteration = x, iteration


class LeastValue(Monitor):
    """Prefers the iterate of the least value, and stops `patience` iterations after it."""

    def __init__(self, patience: int) -> None:
        super().__init__()
        self.patience = patience
        self.least = float("inf")

    @abstractmethod
    def measure(self, x: Tensor, residual: Tensor) -> float | None:
        """Returns the value of an iterate, None while there is none."""

    def __call__(self, iteration: int, x: Tensor, residual: Tensor) -> bool:
        """Takes in an iterate; see `Monitor.__call__`."""
        value = self.measure(x, residual)
        if value is None:
            self.keep(iteration, x)
            return False
        self.value = value
        if value < self.least:
            self.least = value
            self.keep(iteration, x)
        return iteration - self.iteration >= self.patience


class StoppingRule(ABC):
    """Says when a fit has explained the image and not yet the noise, from the measurement alone."""

    def held_out(self, lines: Tensor, generator: torch.Generator) -> Tensor:
        """Returns which rows the fit must not see, of bool, shape of `lines`; by default none.

        Args:
            lines: The line of every row, -1 for those that cannot be held out.
            generator: Draws them.
        """
        return torch.zeros_like(lines, dtype=torch.bool)

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
        return _LastMonitor()


class _LastMonitor(Monitor):
    def __call__(self, iteration: int, x: Tensor, residual: Tensor) -> bool:
        self.keep(iteration, x)
        return False


class DiscrepancyStop(StoppingRule):
    r"""Stops at the first iterate that explains the data as well as their noise permits.

    $$ \|A x - y\|^2 \le \tau\, m\, \sigma_y^2 $$

    over the `m` rows that count, weighted by their noise. Data without noise are refused.

    Source: Morozov, "On the solution of functional equations by the method of regularization", Soviet Math. Dokl. 7
    (1966).

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
        self.factor, self.seen = factor, seen
        self.expected = std**2 * int(seen.sum())

    def __call__(self, iteration: int, x: Tensor, residual: Tensor) -> bool:
        self.value = float(torch.where(self.seen, residual, 0.0).square().sum()) / self.expected
        self.keep(iteration, x)
        return self.value <= self.factor


class HeldOutStop(StoppingRule):
    """Cross-validation: prefers the iterate that best explains lines of the measurement that the fit does not see.

    The lines (views of a sinogram, lines of k-space outside its fully sampled centre) are drawn once a case. They are
    no longer fitted, which costs a little of the image and is the price of knowing when to stop.

    Source: Yaman, Hosseini & Akcakaya, "Zero-shot self-supervised learning for MRI reconstruction", ICLR 2022, for
    single scans.

    Args:
        fraction: Share of the lines held out, at least one.
        patience: Iterations without a new least value after which it is time to stop.

    Raises:
        InputError: A fraction outside (0, 0.5], or a patience below 1.
    """

    def __init__(self, fraction: float = 0.1, patience: int = 500) -> None:
        if not 0 < fraction <= 0.5 or patience < 1:
            raise InputError(f"HeldOutStop needs 0 < fraction <= 0.5 and patience >= 1, got {fraction} and {patience}.")
        self.fraction, self.patience = float(fraction), patience

    def held_out(self, lines: Tensor, generator: torch.Generator) -> Tensor:
        """Returns the rows of a few lines, drawn at random; see `StoppingRule.held_out`.

        Raises:
            InputError: Fewer than two lines.
        """
        num_lines = int(lines.max()) + 1
        if num_lines < 2:
            raise InputError(
                f"HeldOutStop parts the measurement into lines (views, lines of k-space) and needs at least two, got "
                f"{num_lines}: stop by DiscrepancyStop or WindowedVarianceStop."
            )
        drawn = torch.randperm(num_lines, generator=generator)[: max(1, round(self.fraction * num_lines))]
        return torch.isin(lines, drawn.to(lines.device))

    def monitor(self, data: CaseData) -> Monitor:
        """Returns what keeps the least held-out loss."""
        return _HeldOutMonitor(self.patience, data.held_out)


class _HeldOutMonitor(LeastValue):
    """Watches the mean square of the held-out residual."""

    def __init__(self, patience: int, held_out: Tensor) -> None:
        super().__init__(patience)
        self.held_out = held_out

    def measure(self, x: Tensor, residual: Tensor) -> float:
        return float(residual[self.held_out].square().mean())


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
