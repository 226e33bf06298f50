"""When to stop, from the measurement alone: what was measured, what is held out of it, what its noise permits.

A row is an entry of a measurement: what one row of `A` gives. `rows` are those meant, of bool, with the shape of `y`,
`(B, *measurement_shape)`. Rows are held out by whole lines, views of a sinogram or lines of k-space.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from invrecon.errors import InputError
from invrecon.methods.base import Stats, per_sample
from invrecon.operators.base import LinearOperator, WhitenedOperator
from invrecon.operators.ct import CT
from invrecon.operators.mri import MRI, CartesianMRI


class PerSampleStop:
    """Watches an iteration on a batch; whatever shares the batch, a sample's result is its own.

    Attributes:
        result: Every sample at its stop; at the last watched iteration, if it has not stopped.
        measure: What was compared with the tolerance, `(B,)`.
        iterations: The iteration at which each sample stopped, `(B,)`.
        done: Which samples have stopped, `(B,)`.

    Args:
        x: Images `(B, C, *S)`, the result before any iteration.
        tol: A sample stops when its measure is at most `tol`; 0 never stops one that still moves.
    """

    def __init__(self, x: Tensor, tol: float) -> None:
        self.tol = tol
        self.result = x
        self.measure = x.new_full(x.shape[:1], torch.inf, dtype=torch.float64)
        self.iterations = torch.zeros(x.shape[:1], dtype=torch.int64, device=x.device)
        self.done = torch.zeros(x.shape[:1], dtype=torch.bool, device=x.device)

    def __call__(self, iteration: int, x: Tensor, measure: Tensor) -> bool:
        """Takes in an iterate and returns whether all samples have stopped.

        Args:
            iteration: Its number, from 1.
            x: The iterate, `(B, C, *S)`.
            measure: Its distance from the goal, `(B,)`, in the terms of `tol`.
        """
        self.result = torch.where(per_sample(self.done, x), self.result, x)
        self.measure = torch.where(self.done, self.measure, measure.double())
        self.iterations = torch.where(self.done, self.iterations, iteration)
        self.done = self.done | (self.measure <= self.tol)
        return bool(self.done.all())

    def stats(self, name: str) -> Stats:
        """Returns `num_iterations` and the last measure, under its name, of every sample."""
        return {"num_iterations": self.iterations.tolist(), name: self.measure.tolist()}


class Stopper:
    """Stops a falling curve once `patience` values in a row, at least 1, have brought no new least one.

    Attributes:
        best: Index of the least value so far, the first of equals.
        waited: Values since then.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.best, self.waited = 0, 0
        self._least, self._num_values = float("inf"), 0

    def update(self, value: float) -> bool:
        """Takes the next value and returns whether to stop; what is not a number is no new least."""
        self.waited += 1
        if value < self._least:
            self.best, self.waited, self._least = self._num_values, 0, value
        self._num_values += 1
        return self.waited >= self.patience


class PairedStopper:
    r"""Prefers the last step that is not significantly worse than the best one; stops `patience` steps after it.

    $$ d = \log l_k - \log l_{least}, \qquad \text{worse if}\quad \bar d > 1.645\, \mathrm{std}(d) / \sqrt n $$

    over the `n` parts of a step's loss, the same rows at every step: a paired test of one side at 5 %, of logarithms,
    as a few rays along an edge have most of the loss and would hide what the others say. Where the parts cannot tell
    two steps apart the later one is kept: what asks has reasons to go on.

    Attributes:
        best: Index of the preferred step so far.
        waited: Steps since then.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.best, self.waited = 0, 0
        self._losses: list[Tensor] = []

    def update(self, loss: Tensor) -> bool:
        """Takes the parts `(n,)` of the next step's loss and returns whether to stop; NaN or Inf is worse than all."""
        self._losses.append(loss.double().cpu().clamp(min=torch.finfo(torch.float32).tiny).log())
        means = torch.stack(self._losses).mean(1).nan_to_num(torch.inf, torch.inf, torch.inf)
        least = self._losses[int(means.argmin())]
        fit = [k for k, own in enumerate(self._losses) if means[k] < torch.inf and not _worse(own, least)]
        self.best = max(fit, default=0)
        self.waited = len(self._losses) - 1 - self.best
        return self.waited >= self.patience


def _worse(loss: Tensor, least: Tensor) -> bool:
    d = loss - least
    error = d.std() / len(d) ** 0.5 if len(d) > 1 else 0.0
    return bool(d.mean() > 1.645 * error)


def check_held_out(owner: object, fraction: float, patience: int) -> None:
    """Raises `InputError` unless a rule holds out at most half of the lines and has some patience."""
    if not 0 < fraction <= 0.5 or patience < 1:
        raise InputError(
            f"{type(owner).__name__} needs 0 < fraction <= 0.5 and patience >= 1, got {fraction} and {patience}."
        )


def measured(operator: LinearOperator, y: Tensor) -> Tensor:
    """Returns the rows that were measured: all but those off the mask of k-space, and those of weight 0."""
    return operator.restrict(torch.ones_like(y)) != 0


def split(operator: LinearOperator, rows: Tensor, choose: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
    """Parts rows into those kept and those held out, by whole lines of every case.

    Args:
        operator: `A`, bound to these cases.
        rows: What was measured.
        choose: Gives the numbers of the lines to hold out, from their count.

    Raises:
        InputError: Fewer than two lines.
    """
    lines = lines_of(operator, rows)
    num_lines = [int(own.max()) + 1 for own in lines]
    if min(num_lines) < 2:
        raise InputError(
            "Holding out a part of the measurement (views of a sinogram, lines of k-space outside its centre) needs at "
            f"least two of them, got {min(num_lines)}: stop by another rule, such as the discrepancy principle."
        )
    held_out = torch.stack([torch.isin(own, choose(num).to(own)) for own, num in zip(lines, num_lines, strict=True)])
    return rows & ~held_out, rows & held_out


def restrict_to(operator: LinearOperator, y: Tensor, rows: Tensor) -> tuple[LinearOperator, Tensor]:
    """Returns operator and measurement with all other rows set to zero, `W A` and `W y`, noise level kept."""
    weights = rows.to(y)
    if (weights == weights[:1]).all():
        weights = weights[:1]  # what all cases share serves any number of samples of each
    restricted = WhitenedOperator(operator, weights)
    restricted.noise_std = operator.noise_std
    return restricted, weights * y


def mean_square(residual: Tensor, rows: Tensor) -> Tensor:
    """Returns the mean square of `A x - y` over these rows, `(B,)`."""
    return torch.stack([own[chosen].square().mean() for own, chosen in zip(residual, rows, strict=True)])


def imaged(operator: LinearOperator, residual: Tensor) -> Tensor:
    r"""Returns a residual whose mean square over views stands for the error of the image, and not of its projections.

    A projection blurs: the residual of a view has the image's error divided by the frequency (Fourier's slices), and by
    slow changes alone, which the eye does not see, one image may predict unseen views worse than another that is worse.
    The energy of an image is an integral over directions of `|f| |P(f)|^2` (Parseval in polar coordinates), so
    residuals of CT are filtered along the detector by

    $$ h(f) = \sqrt{|f| / \overline{|f|}} $$

    which leaves the mean square of white noise as it is. Exact for parallel beams, near it for a fan. K-space is the
    image's own transform, and stays; so does everything else.

    Args:
        operator: `A`, or `W A`.
        residual: `A x - y`, `(B, *measurement_shape)`.
    """
    if not isinstance(_unweighted(operator), CT):
        return residual
    n = residual.shape[-1]
    ramp = torch.fft.fftfreq(n, dtype=residual.dtype, device=residual.device).abs()
    transfer = (ramp / ramp.mean()).sqrt() if n > 1 else torch.ones_like(ramp)
    return torch.fft.ifft(transfer * torch.fft.fft(residual)).real


def discrepancy(residual: Tensor, rows: Tensor, std: Tensor | float) -> Tensor:
    r"""Returns `||A x - y||^2 / (m sigma_y^2)` over these `m` rows, `(B,)` of float64: about 1 at the truth.

    Source: Morozov, "On the solution of functional equations by the method of regularization", Soviet Math. Dokl. 7
    (1966), for stopping where it has come down to 1.

    Args:
        residual: `A x - y`, rows weighted so that their noise is alike (`operator.whiten`).
        rows: Those that count.
        std: `sigma_y`, one number or `(B,)`.
    """
    misfit = torch.where(rows, residual, 0.0).square().flatten(1).sum(dim=1).double()
    return misfit / (torch.as_tensor(std, dtype=misfit.dtype).to(misfit) ** 2 * rows.flatten(1).sum(dim=1))


def lines_of(operator: LinearOperator, rows: Tensor) -> Tensor:
    """Returns the line of every row, numbered from 0 in every case; -1 for rows that cannot be held out.

    A line is a view of a sinogram (an entry of axis -2), a column of Cartesian k-space sampled in whole columns, else
    a point of it, or a readout of another trajectory; in k-space of all coils at once. The fully sampled centre of
    Cartesian k-space, the largest square (or run of columns) around it, is in no line: its few samples hold most of the
    image, which nothing without one of them could know. Of a scan that is complete, or nearly, the centre is 8 % of
    the side, 4 to 24 lines.
    """
    operator = _unweighted(operator)
    return torch.stack([_lines_of_case(operator, own).expand(own.shape) for own in rows])


def in_parts(operator: LinearOperator, residual: Tensor, rows: Tensor) -> Tensor:
    """Returns the mean squares of the lines among these rows of one case, `(n,)`, for paired tests.

    Of fewer than eight lines, each counts as sixteen runs of neighbours.

    Args:
        operator: `A`, bound to this case.
        residual: `A x - y`, `(*measurement_shape)`.
        rows: Those that count.
    """
    values = residual[rows].square()
    lines = lines_of(operator, rows[None])[0][rows].unique(return_inverse=True)[1]
    num_lines = int(lines.max()) + 1
    if num_lines < 8:
        return torch.stack([part.mean() for part in values.tensor_split(min(len(values), 16 * num_lines))])
    sums = values.new_zeros(num_lines).index_add(0, lines, values)
    return sums / torch.bincount(lines, minlength=num_lines)


def runs_of_rays(operator: LinearOperator, num_runs: int) -> Tensor | None:
    """Returns which run of its view's rays each row of a sinogram is in, `(views, bins)`; None of anything else.

    Runs have equally many of the rays that cross the image, and are numbered along the detector from 0; -1 for the
    rays beside it. There are fewer runs where a view has fewer rays.
    """
    operator = _unweighted(operator)
    if not isinstance(operator, CT):
        return None
    crossing = operator(torch.ones(1, *operator.image_shape, dtype=operator.dtype, device=operator.device))[0, 0] > 0
    num = crossing.sum(1, keepdim=True)
    num_runs = max(2, min(num_runs, int(num.min())))
    return torch.where(crossing, (crossing.cumsum(1) - 1) * num_runs // num.clamp(min=1), -1)


def share_of_kspace(operator: LinearOperator, rows: Tensor) -> float:
    """Returns how much of all Cartesian k-space these rows of one case are; 0 of any other measurement."""
    return float(rows.float().mean()) if isinstance(_unweighted(operator), CartesianMRI) else 0.0


def _unweighted(operator: LinearOperator) -> LinearOperator:
    while isinstance(operator, WhitenedOperator):
        operator = operator.operator
    return operator


def _lines_of_case(operator: LinearOperator, rows: Tensor) -> Tensor:
    """Returns the lines of one case, of rows `(*measurement_shape)`, to be broadcast."""
    if isinstance(operator, MRI):
        sampled = rows.any(-1).any(0)  # (H, W), or (readouts, samples)
        if not isinstance(operator, CartesianMRI):
            return _number(sampled.any(-1))[:, None, None]
        if torch.equal(sampled, sampled.any(0).expand_as(sampled)):
            return _number(_without_centre(sampled.any(0)))[:, None]
        return _number(_without_centre(sampled))[..., None]
    return _number(rows.movedim(-2, 0).flatten(1).any(1))[:, None] if rows.ndim > 1 else _number(rows)


def _number(lines: Tensor) -> Tensor:
    """Numbers the true entries from 0; the others are -1."""
    numbers = torch.full(lines.shape, -1, device=lines.device)
    numbers[lines] = torch.arange(int(lines.sum()), device=lines.device)
    return numbers


def _without_centre(sampled: Tensor) -> Tensor:
    """Returns `sampled` without its largest centred square (run, in one dimension) that is sampled throughout.

    Where that is more than half of k-space, or all that was sampled, it is no centre but the scan: a part of it stays.
    """
    size, side = min(sampled.shape), 0
    while side < size and sampled[_centre(sampled.shape, side + 1)].all():
        side += 1
    rest = _cleared(sampled, side)
    if 2 * side > size or not rest.any():
        rest = _cleared(sampled, min(max(4, round(0.08 * size)), 24, side // 2))
    return rest


def _centre(shape: tuple[int, ...], side: int) -> tuple[slice, ...]:
    return tuple(slice(n // 2 - side // 2, n // 2 - side // 2 + side) for n in shape)


def _cleared(sampled: Tensor, side: int) -> Tensor:
    rest = sampled.clone()
    rest[_centre(sampled.shape, side)] = False
    return rest
