"""One case's measurement as a fit sees it: what counts, what is held out, and in which units."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invrecon.errors import InputError
from invrecon.methods.stopping import restrict_to
from invrecon.rng import make_generator

if TYPE_CHECKING:
    from invrecon.methods.dip.stopping import StoppingRule
    from invrecon.operators.base import LinearOperator


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
        baseline: Its direct inverse at the scale that fits best, `(1, *image_shape)`.
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
        self.seen, self.held_out = stop.split(operator, counts, make_generator(seed, "held-out lines"))
        self.y = torch.where(counts, y, 0.0)
        self.fitted_operator, self.fitted_y = restrict_to(self.operator, self.y, self.seen)
        self.fitted_operator.noise_std = std
        self.baseline = fit_scale(self.fitted_operator.baseline(self.fitted_y), self.fitted_operator, self.fitted_y)
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


def fit_scale(x: Tensor, operator: LinearOperator, y: Tensor) -> Tensor:
    """Returns `s x` that fits best, `s = argmin ||s A x - y||`: a direct inverse takes unseen rows for zero."""
    projected = operator(x)
    energy = projected.square().sum()
    return x * (projected * y).sum() / energy if energy > 0 else x


def check_image(x: Tensor, operator: LinearOperator, what: str) -> Tensor:
    """Returns `x`, or raises `InputError` unless it is one finite image of the operator."""
    if tuple(x.shape) != (1, *operator.image_shape) or not torch.isfinite(x).all():
        raise InputError(
            f"{what} has shape {tuple(x.shape)}, but one finite image (1, {', '.join(map(str, operator.image_shape))}) "
            "is expected: a GivenStart holds a single one, which serves every case."
        )
    return x
