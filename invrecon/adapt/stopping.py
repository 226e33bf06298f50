"""When to stop, without ground truth: views or rays held out of the measurement, and the discrepancy principle."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from invrecon.errors import InputError
from invrecon.methods.stopping import (
    PairedStopper,
    Stopper,
    check_held_out,
    discrepancy,
    imaged,
    in_parts,
    mean_square,
    measured,
    runs_of_rays,
    split,
)
from invrecon.operators.base import LinearOperator
from invrecon.rng import make_generator


class HeldOutViews:
    """A few views (or lines of k-space) unseen by adaptation, others at every check: cross-validation in `y`.

    With `K = round(1 / fraction)`, at most the number of lines (`lines_of`), check `c` holds out every `K`-th line:
    evenly spread, never two in a row, and in `K` checks every line exactly once.

    Args:
        fraction: Share of the lines held out at a time.
        patience: Checks in a row that are no better (of rounds: significantly worse) after which it is time to stop.

    Raises:
        InputError: A fraction outside (0, 0.5], or a patience below 1.
    """

    def __init__(self, fraction: float = 0.05, patience: int = 3) -> None:
        check_held_out(self, fraction, patience)
        self.fraction, self.patience = float(fraction), patience

    def stopper(self) -> Stopper:
        """Returns a fresh rule with this patience, for checks of other lines each."""
        return Stopper(self.patience)

    def paired_stopper(self) -> PairedStopper:
        """Returns a fresh rule with this patience, for checks of the same lines."""
        return PairedStopper(self.patience)

    def split(
        self, check: int, operator: LinearOperator, y: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Returns the rows of `y` that check `check`, from 0, keeps, and those that it holds out.

        Of the generator only the initial seed counts, which orders the checks: nothing is drawn from it.

        Raises:
            InputError: Fewer than two lines.
        """

        def choose(num_lines: int) -> Tensor:
            num_groups = min(num_lines, round(1 / self.fraction))
            order = torch.randperm(num_groups, generator=make_generator(generator.initial_seed(), "held-out views"))
            return torch.arange(int(order[check % num_groups]), num_lines, num_groups)

        return split(operator, measured(operator, y), choose)


class HeldOutRays(HeldOutViews):
    """A run of neighbouring rays of every view, unseen by adaptation, other runs at every check; lines of k-space.

    A view that is held out leaves a gap between its neighbours twice as wide as any other, in which an image may become
    worse while it becomes better everywhere else; and of few views it is one, which says little. Here each view lacks
    one of `K = round(1 / fraction)` runs of those of its rays that cross the image, views in a row other ones, so that
    no direction is missing anywhere but for the width of a run, and all of them are asked. In `K` checks every ray is
    held out exactly once. What is no sinogram is held out by whole lines, as by `HeldOutViews`.

    Args:
        fraction: Share of the rays held out at a time.
        patience: Checks in a row that are no better (of rounds: significantly worse) after which it is time to stop.

    Raises:
        InputError: A fraction outside (0, 0.5], or a patience below 1.
    """

    def split(
        self, check: int, operator: LinearOperator, y: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Returns the rows of `y` that check `check`, from 0, keeps, and those that it holds out; see `HeldOutViews`.

        Raises:
            InputError: No sinogram, and fewer than two lines.
        """
        runs = runs_of_rays(operator, round(1 / self.fraction))
        if runs is None:
            return super().split(check, operator, y, generator)
        num_runs = int(runs.max()) + 1
        order = torch.randperm(num_runs, generator=make_generator(generator.initial_seed(), "held-out rays"))
        chosen = order[(torch.arange(len(runs)) + check) % num_runs].to(runs)
        unseen, rows = runs == chosen[:, None], measured(operator, y)
        return rows & ~unseen, rows & unseen


def loss_on(operator: LinearOperator, y: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    """Returns the mean square of `A x - y` over these rows, `(B,)`, weighted by their noise (`operator.whiten`)."""
    operator, y, _ = operator.whiten(y)
    return mean_square(operator(x) - y, rows)


def held_out_loss(operator: LinearOperator, y: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    """Returns the same of rows that a reconstruction has not seen, weighed to stand for the error of `x` (`imaged`)."""
    operator, y, _ = operator.whiten(y)
    return mean_square(imaged(operator, rows * (operator(x) - y)), rows)


def held_out_losses(operator: LinearOperator, y: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    """Returns `held_out_loss` of one case in parts, `(n,)`, for a paired comparison (`PairedStopper`)."""
    weighted, data, _ = operator.whiten(y)
    return in_parts(weighted, imaged(weighted, rows * (weighted(x) - data))[0], rows[0])


class Discrepancy:
    r"""Stops when the data are explained as well as their noise permits.

    $$ \|A x - y\|^2 \le \tau\, m\, \sigma_y^2 $$

    over the `m` rows that were measured and have a weight (`discrepancy`): neither those held out nor k-space off its
    mask count. Where the noise differs between rows, they are weighted first (`operator.whiten`).

    Args:
        factor: `tau`; above 1 stops earlier.

    Raises:
        InputError: A factor that is not positive.
    """

    def __init__(self, factor: float = 1.0) -> None:
        if not factor > 0:
            raise InputError(f"Discrepancy: factor is {factor}, but it has to be above 0.")
        self.factor = float(factor)

    def check(self, operator: LinearOperator, y: Tensor) -> None:
        """Warns where no noise level is known: nothing would ever stop there."""
        if operator.whiten(y)[2] is None:
            warnings.warn(
                "The measurement's noise level is not known, so that adaptation.discrepancy stops nothing: state the "
                "noise (--model.noise, or noise_std of the file), or use adaptation.held_out.",
                stacklevel=3,
            )

    def __call__(self, operator: LinearOperator, y: Tensor, x: Tensor) -> Tensor:
        """Returns for every sample of `x` whether it has got there, `(B,)` of bool; never without noise."""
        operator, y, std = operator.whiten(y)
        if std is None:
            return torch.zeros(len(y), dtype=torch.bool, device=y.device)
        return discrepancy(operator(x) - y, measured(operator, y), std) <= self.factor
