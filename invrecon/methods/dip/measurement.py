"""One case's measurement as a fit sees it: what counts, what is held out, and in which units."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invrecon.errors import InputError
from invrecon.operators.base import LinearOperator, WhitenedOperator
from invrecon.operators.mri import MRI, CartesianMRI
from invrecon.rng import make_generator

if TYPE_CHECKING:
    from invrecon.methods.dip.stopping import StoppingRule


class CaseData:
    """The measurement of one case, its rows weighted by their noise and parted into seen and held-out ones.

    Rows of `A` that are zero (k-space that was not sampled, rays that miss the image) count nowhere. Nothing that is
    made of the measurement here knows the held-out rows, but for `y` itself.

    Attributes:
        operator: `A`, rows weighted (`operator.whiten`).
        y: What it measured, `(1, *measurement_shape)`, 0 in rows that do not count.
        std: Standard deviation of its noise, or None.
        seen: Rows that the fit sees, of bool, shape of `y`.
        held_out: Rows that count but are held out.
        fitted_operator: `A` without the rows that are not seen.
        fitted_y: What it measured.
        baseline: Its direct inverse, `(1, *image_shape)`.
        scale: 99th percentile of its magnitude: the image's unit for the network.

    Args:
        y: Measurement `(1, *measurement_shape)`.
        operator: The physics of this case.
        stop: Says what is held out.
        generator: Only its initial seed counts: nothing is drawn from it.
    """

    def __init__(self, y: Tensor, operator: LinearOperator, stop: StoppingRule, generator: torch.Generator) -> None:
        self.operator, y, std = operator.whiten(y)
        self.std = None if std is None else float(std)
        seed = generator.initial_seed()
        # A row that is zero gives exactly zero of any image, and any other does so with probability 0.
        probe = torch.randn(1, *operator.image_shape, generator=make_generator(seed, "probe"), dtype=y.dtype)
        counts = self.operator(probe.to(y.device)) != 0
        held_out = stop.held_out(lines_of(operator, counts), make_generator(seed, "held-out lines"))
        self.seen, self.held_out = counts & ~held_out, counts & held_out
        self.y = torch.where(counts, y, 0.0)
        weights = self.seen.to(y)
        self.fitted_operator = WhitenedOperator(self.operator, weights)
        self.fitted_operator.noise_std = std
        self.fitted_y = weights * self.y
        self.baseline = self.fitted_operator.baseline(self.fitted_y)
        magnitude = self.baseline.norm(dim=1).flatten()
        scale = float(magnitude.kthvalue(max(1, round(0.99 * magnitude.numel()))).values)
        self.scale = scale if scale > 0 else 1.0
        energy = float(self.fitted_y.square().sum())
        self._unit = energy if energy > 0 else 1.0
        self._gain = self.operator.norm() ** 2

    def misfit(self, residual: Tensor) -> Tensor:
        """Returns `||A x - y||^2 / ||y||^2` over the rows that are seen.

        Args:
            residual: `A x - y`, over all rows.
        """
        return torch.where(self.seen, residual, 0.0).square().sum() / self._unit

    def distance(self, difference: Tensor) -> Tensor:
        """Returns `||A||^2 ||x - z||^2 / ||y||^2`: an image's distance in units of the misfit.

        Args:
            difference: `x - z`.
        """
        return self._gain * difference.square().sum() / self._unit


def lines_of(operator: LinearOperator, counts: Tensor) -> Tensor:
    """Numbers the lines of a measurement from 0: what is held out together.

    A line is a view of a sinogram (an entry of axis -2), a column of Cartesian k-space sampled in whole columns, else
    a point of it, or a readout of another trajectory; in k-space of all coils at once. The fully sampled centre of
    Cartesian k-space, the largest square (or run of columns) around it, is in no line if there is anything else: its
    few samples hold most of the image, which a fit without one of them could not know.

    Args:
        operator: The physics `A`.
        counts: Rows that count, `(1, *measurement_shape)` of bool.

    Returns:
        The line of every row, broadcastable to `counts`; -1 for rows of none.
    """
    if isinstance(operator, MRI):
        sampled = counts.any(-1).any(1)[0]  # (H, W), or (readouts, samples)
        if not isinstance(operator, CartesianMRI):
            return _number(sampled.any(-1))[:, None, None]
        if torch.equal(sampled, sampled.any(0).expand_as(sampled)):
            return _number(_without_centre(sampled.any(0)))[:, None]
        return _number(_without_centre(sampled))[..., None]
    lines = counts.movedim(-2, 0).flatten(1).any(1) if counts.ndim > 2 else counts[0]
    return _number(lines)[:, None] if counts.ndim > 2 else _number(lines)


def _number(lines: Tensor) -> Tensor:
    """Numbers the true entries from 0; the others are -1."""
    numbers = torch.full(lines.shape, -1, device=lines.device)
    numbers[lines] = torch.arange(int(lines.sum()), device=lines.device)
    return numbers


def _without_centre(sampled: Tensor) -> Tensor:
    """Returns `sampled` without its largest centred square (run, in one dimension) that is sampled throughout."""
    block: tuple[slice, ...] = ()
    for side in range(1, min(sampled.shape) + 1):
        larger = tuple(slice(n // 2 - side // 2, n // 2 - side // 2 + side) for n in sampled.shape)
        if not sampled[larger].all():
            break
        block = larger
    rest = sampled.clone()
    if block:
        rest[block] = False
    return rest if rest.any() else sampled


def check_image(x: Tensor, operator: LinearOperator, what: str) -> Tensor:
    """Returns `x`, or raises `InputError` unless it is one finite image of the operator."""
    if tuple(x.shape) != (1, *operator.image_shape) or not torch.isfinite(x).all():
        raise InputError(
            f"{what} has shape {tuple(x.shape)}, but one finite image (1, {', '.join(map(str, operator.image_shape))}) "
            "is expected: a GivenStart holds a single one, which serves every case."
        )
    return x
