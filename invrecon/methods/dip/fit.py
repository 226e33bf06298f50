"""A network fitted to one measurement: the loop that deep image priors share, and what they put into the network."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from invrecon.errors import InputError
from invrecon.methods.base import (
    Estimate,
    Method,
    Stats,
    check_complex_range,
    check_generators,
    check_measurement,
    check_range,
    relative_residual,
)
from invrecon.methods.counting import Counter, CountingPrior, count_calls
from invrecon.methods.dip.measurement import CaseData
from invrecon.methods.dip.network import DIPUNet, FittedNetwork
from invrecon.methods.dip.stopping import HeldOutStop, Monitor, Quantity, StoppingRule

if TYPE_CHECKING:
    from invrecon.operators.base import LinearOperator
    from invrecon.priors.base import Prior


@dataclass
class Iterate:
    """What an observer is shown of an iteration.

    Attributes:
        case: Number of the case in its batch.
        iteration: From 1.
        image: `f_theta(z)` or its running average, `(1, C, H, W)`, unclipped.
        misfit: `||A x - y||^2 / ||y||^2` of it, over the rows that the fit sees.
        value: What the stopping rule measured, NaN if nothing yet.
    """

    case: int
    iteration: int
    image: Tensor
    misfit: float
    value: float


Observer = Callable[[Iterate], None]


@dataclass
class Curve:
    """One number an iteration, of one case: what `Iterate` says, without the images.

    Attributes:
        misfit: Squared relative misfit of the rows that the fit sees.
        value: What the stopping rule measured.
        kept: The iteration whose image is the estimate, from 1.
        quantity: What `value` is, and in which unit it is shown; None if the rule measures nothing.
    """

    misfit: list[float] = field(default_factory=list)
    value: list[float] = field(default_factory=list)
    kept: int = 0
    quantity: Quantity | None = None


@dataclass
class FittedEstimate(Estimate):
    """An estimate that comes with the curves of its fit.

    Attributes:
        curves: One a case.
    """

    curves: list[Curve] = field(default_factory=list)


class NetworkInput(ABC):
    """What goes into the network, and so what the image is: `x = s f(z / s)` in the case's own unit `s`."""

    @property
    @abstractmethod
    def channels(self) -> int:
        """Channels of `z`."""

    @abstractmethod
    def image(self, network: nn.Module) -> Tensor:
        """Returns `x`, `(1, C, H, W)`; may draw."""

    def penalty(self, x: Tensor) -> Tensor | float:
        """Returns what is added to the misfit, in its units."""
        return 0.0

    def parameters(self) -> list[dict[str, Any]]:
        """Returns what is optimised beside the weights, as groups of the optimiser."""
        return []

    def prepare(self, iteration: int, network: nn.Module) -> None:  # noqa: B027 - most inputs stay as they are
        """Changes the input before iteration `iteration` (from 1), if it is time to."""


class NetworkFit(Method):
    r"""The network as the unknown: `x = f_theta(z)`, its weights fitted to one measurement by Adam.

    $$ \min_\theta\ \|A f_\theta(z) - y\|^2 / \|y\|^2 + \text{penalty} $$

    Rows are weighted by their noise (`operator.whiten`), and the image enters and leaves the network in units of the
    direct inverse's 99th percentile, so that a rescaled problem gives the rescaled image and settings carry over. The
    fit explains the noise in the end; `stop` says when to end, or which iterate to keep, without ever seeing the truth.

    Every case has weights, optimiser and draws of its own; cases are fitted one after the other.

    Args:
        network: What is fitted; `DIPUNet()` if None.
        num_iterations: Most steps of Adam.
        learning_rate: Of the weights.
        stop: Which iterate is the estimate; `HeldOutStop()` if None.
        averaging: Decay of the running average of outputs that is judged and returned; 0 takes the outputs themselves.
        clip: Range to which the estimate is clipped, or None. Complex images take no range without
            negative values.

    Raises:
        InputError: A knob out of range.
    """

    def __init__(
        self,
        network: FittedNetwork | None = None,
        num_iterations: int = 3000,
        learning_rate: float = 1e-3,
        stop: StoppingRule | None = None,
        averaging: float = 0.0,
        clip: tuple[float, float] | None = None,
    ) -> None:
        if num_iterations < 1 or not learning_rate > 0 or not 0 <= averaging < 1:
            raise InputError(
                f"{type(self).__name__} needs num_iterations >= 1, learning_rate > 0 and 0 <= averaging < 1, got "
                f"{num_iterations}, {learning_rate} and {averaging}."
            )
        check_range("clip", clip)
        self.network = DIPUNet() if network is None else network
        self.num_iterations, self.learning_rate = num_iterations, float(learning_rate)
        self.stop = HeldOutStop() if stop is None else stop
        self.averaging = float(averaging)
        self.clip = clip

    @abstractmethod
    def input(self, data: CaseData, prior: CountingPrior | None, generator: torch.Generator) -> NetworkInput:
        """Returns what goes into the network for one case.

        Args:
            data: The case, as the fit sees it.
            prior: The diffusion prior, for methods that need one.
            generator: The case's own.
        """

    def __call__(
        self,
        y: Tensor,
        operator: LinearOperator,
        prior: Prior | None = None,
        *,
        generators: Sequence[torch.Generator] | None = None,
        on_iterate: Observer | None = None,
    ) -> FittedEstimate:
        """Reconstructs a batch; see `Method.__call__`.

        Stats add, for every case, `num_iterations` that were run, `kept_iteration`, whose image is the estimate, and
        `data_misfit`, its `||A x - y||^2 / ||y||^2` over the rows that were fitted. The backward passes' applications
        of `A^T` are counted.

        Args:
            y: As in `Method.__call__`.
            operator: As in `Method.__call__`.
            prior: As in `Method.__call__`.
            generators: As in `Method.__call__`.
            on_iterate: Is shown every iterate, to compare it with a truth that the method must not know.
        """
        check_measurement(y, operator)
        check_complex_range(self, "clip", self.clip, operator)
        draws = check_generators(generators, len(y))
        images, curves = [], []
        spent: dict[str, list[float]] = {"num_evaluations": [], "num_operator_calls": []}
        for b, generator in enumerate(draws):
            evaluations, calls = Counter(), Counter()
            physics = count_calls(operator.select_cases(slice(b, b + 1), len(y)), calls)
            counted = None if prior is None else CountingPrior(prior, evaluations)
            data = CaseData(y[b : b + 1], physics, self.stop, generator)
            image, curve = self._fit(b, data, counted, generator, on_iterate)
            images.append(image if self.clip is None else image.clamp(*self.clip))
            curves.append(curve)
            spent["num_evaluations"].append(float(evaluations.num_calls))
            spent["num_operator_calls"].append(float(calls.num_calls + len(curve.misfit)))
        mean = torch.cat(images)
        stats: Stats = {
            **spent,
            "relative_residual": relative_residual(operator, mean, y),
            "num_iterations": [float(len(curve.misfit)) for curve in curves],
            "kept_iteration": [float(curve.kept) for curve in curves],
            "data_misfit": [curve.misfit[curve.kept - 1] for curve in curves],
        }
        return FittedEstimate(mean=mean, stats=stats, curves=curves)

    @torch.enable_grad()
    def _fit(
        self,
        case: int,
        data: CaseData,
        prior: CountingPrior | None,
        generator: torch.Generator,
        on_iterate: Observer | None,
    ) -> tuple[Tensor, Curve]:
        """Returns the preferred iterate of one case, and how the fit went."""
        monitor = self.stop.monitor(data)
        given = self.input(data, prior, generator)
        network = self.network.build(given.channels, data.operator.image_shape, generator, data.y)
        groups: list[dict[str, Any]] = [{"params": list(network.parameters())}, *given.parameters()]
        optimiser = torch.optim.Adam(groups, lr=self.learning_rate)
        curve = Curve(quantity=monitor.quantity)
        image = residual = None
        for iteration in range(1, self.num_iterations + 1):
            given.prepare(iteration, network)
            optimiser.zero_grad()
            x = given.image(network)
            difference = data.operator(x) - data.y
            misfit = data.misfit(difference)
            loss = misfit + given.penalty(x)
            # A is linear: what the average explains is the average of what the outputs explain.
            image = self._average(image, x, iteration)
            residual = self._average(residual, difference, iteration)
            over = self._judge(iteration, image, residual, monitor, curve, data)
            if not math.isfinite(curve.misfit[-1]):  # at hand already: a GPU is waited for at every number asked of it
                raise InputError(
                    f"{type(self).__name__} diverged: at iteration {iteration} of {self.num_iterations} the network "
                    f"gives NaN or Inf; lower learning_rate (it is {self.learning_rate:g})."
                )
            if on_iterate is not None:
                on_iterate(Iterate(case, iteration, image, curve.misfit[-1], monitor.value))
            if over:
                break
            loss.backward()
            optimiser.step()
        assert monitor.image is not None
        curve.kept = monitor.iteration
        return monitor.image, curve

    def _average(self, average: Tensor | None, new: Tensor, iteration: int) -> Tensor:
        """Returns the running average, whose first values weigh all alike."""
        if average is None or not self.averaging:
            return new.detach()
        return average.lerp(new.detach(), max(1 - self.averaging, 1 / iteration))

    @torch.no_grad()
    def _judge(
        self, iteration: int, image: Tensor, residual: Tensor, monitor: Monitor, curve: Curve, data: CaseData
    ) -> bool:
        over = monitor(iteration, image, residual)
        curve.misfit.append(float(data.misfit(residual)))
        curve.value.append(monitor.value)
        return over
