"""When to stop, without ground truth: views held out of the measurement, and the discrepancy principle."""

from __future__ import annotations

import torch
from torch import Tensor

from invrecon.errors import InputError
from invrecon.operators.base import LinearOperator, WhitenedOperator
from invrecon.rng import make_generator


class HeldOutViews:
    """A few views that adaptation does not see, others at every check: cross-validation in the measurement.

    With `K = round(1 / fraction)`, at most the number of views, check `c` holds out every `K`-th view: evenly
    spread, never two in a row, and in `K` checks every view exactly once.

    Args:
        fraction: Share of the views held out at a time.
        patience: Checks whose loss is above the best before it is time to stop.

    Raises:
        InputError: A fraction outside (0, 0.5], or a patience below 1.
    """

    def __init__(self, fraction: float = 0.05, patience: int = 3) -> None:
        if not 0 < fraction <= 0.5:
            raise InputError(f"HeldOutViews: fraction is {fraction}, but it has to lie above 0 and be 0.5 at most.")
        self.fraction = float(fraction)
        self.patience = patience
        self.stopper()  # checks the patience

    def stopper(self) -> Stopper:
        """Returns a fresh rule with this patience."""
        return Stopper(self.patience)

    def mask(self, check: int, operator: LinearOperator, generator: torch.Generator) -> Tensor:
        """Returns which views check `check` holds out, `(num_views,)` of bool.

        Args:
            check: Number of the check, from 0.
            operator: The physics; views are axis -2 of its measurements.
            generator: Only its initial seed counts, which orders the checks: nothing is drawn from it.

        Raises:
            InputError: Fewer than two views.
        """
        shape = operator.measurement_shape
        num_views = shape[-2] if len(shape) > 1 else 1
        if num_views < 2:
            raise InputError(
                f"Holding out views takes at least two, but the measurements of {type(operator).__name__} have shape "
                f"{shape}, views on the last axis but one; stop by another rule."
            )
        num_groups = min(num_views, round(1 / self.fraction))
        order = torch.randperm(num_groups, generator=make_generator(generator.initial_seed(), "held-out views"))
        return (torch.arange(num_views) % num_groups == order[check % num_groups]).to(operator.device)


def without_views(operator: LinearOperator, y: Tensor, held_out: Tensor) -> tuple[LinearOperator, Tensor]:
    """Returns operator and measurement with the held-out views set to zero, `W A` and `W y`, noise level kept.

    Args:
        operator: `A`.
        y: Measurements `(B, *measurement_shape)`.
        held_out: `(num_views,)` of bool.
    """
    weights = (~held_out).to(y)[:, None]
    kept = WhitenedOperator(operator, weights)
    kept.noise_std = operator.noise_std
    return kept, weights * y


def held_out_loss(operator: LinearOperator, y: Tensor, x: Tensor, held_out: Tensor) -> Tensor:
    """Returns the mean square of `A x - y` over the held-out views, `(B,)`.

    Where the noise differs between rays, rows are weighted first (`operator.whiten`).

    Args:
        operator: The whole operator `A`.
        y: The whole measurements `(B, *measurement_shape)`.
        x: Images `(B, *image_shape)`.
        held_out: `(num_views,)` of bool.
    """
    operator, y, _ = operator.whiten(y)
    return (operator(x) - y)[..., held_out, :].square().flatten(1).mean(dim=1)


class Stopper:
    """Stops a falling curve once it has risen: after `patience` values above the best since the best.

    Attributes:
        best: Index of the smallest value so far, the first of equals.

    Args:
        patience: See above.

    Raises:
        InputError: A patience below 1.
    """

    def __init__(self, patience: int = 3) -> None:
        if patience < 1:
            raise InputError(f"patience is {patience}, but it has to be at least 1.")
        self.patience = patience
        self.best = 0
        self._least = float("inf")
        self._num_values = 0
        self._num_above = 0

    def update(self, loss: float) -> bool:
        """Takes the next value and returns whether to stop; a value that is not a number counts as a rise."""
        if loss < self._least:
            self.best, self._least, self._num_above = self._num_values, loss, 0
        elif loss != self._least:
            self._num_above += 1
        self._num_values += 1
        return self._num_above >= self.patience


class Discrepancy:
    r"""Stops when the data are explained as well as their noise permits.

    $$ \|A x - y\|^2 \le \tau\, m\, \sigma_y^2 $$

    Morozov, "On the solution of functional equations by the method of regularization", Soviet Math. Dokl. 7 (1966).
    Where the noise differs between rays, rows are weighted first (`operator.whiten`); `m` counts the rays that have a
    weight, so views that are held out do not count.

    Args:
        factor: `tau`; above 1 stops earlier.

    Raises:
        InputError: A factor that is not positive.
    """

    def __init__(self, factor: float = 1.0) -> None:
        if not factor > 0:
            raise InputError(f"Discrepancy: factor is {factor}, but it has to be above 0.")
        self.factor = float(factor)

    def __call__(self, operator: LinearOperator, y: Tensor, x: Tensor) -> Tensor:
        """Returns for every sample whether it has got there, `(B,)` of bool; never without noise.

        Args:
            operator: `A`, bound to these cases.
            y: Measurements `(B, *measurement_shape)`.
            x: Images `(B, *image_shape)`.
        """
        operator, y, std = operator.whiten(y)
        if std is None:
            return torch.zeros(len(y), dtype=torch.bool, device=y.device)
        misfit = (operator(x) - y).square().flatten(1).sum(dim=1)
        return misfit <= self.factor * _num_rays(operator, y) * std.square()


def _num_rays(operator: LinearOperator, y: Tensor) -> Tensor:
    """Returns how many rays of every sample have a weight, `(B,)`."""
    counts = torch.ones_like(y, dtype=torch.bool)
    while isinstance(operator, WhitenedOperator):
        counts = counts & (operator.weights > 0)
        operator = operator.operator
    return counts.flatten(1).sum(dim=1)
