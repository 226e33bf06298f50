"""Which samples of Cartesian k-space are measured: lines as fastMRI draws them, and points in two dimensions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invrecon.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

Size = tuple[int, int]


class Sampling(ABC):
    """A random pattern of measured k-space: `(size, generator) -> mask (H, W)`, boolean, its centre at `(H//2, W//2)`.

    The mask is a function of the size and the state of the generator alone; one generator a case
    (`invrecon.rng.make_generator(seed, 'mask', case.id)`) gives a case the same mask in any batch and order.

    Args:
        acceleration: Samples of the whole grid divided by those measured.

    Raises:
        InputError: An acceleration below 1.
    """

    def __init__(self, acceleration: float) -> None:
        if not 1 <= acceleration < math.inf:
            raise InputError(
                f"{type(self).__name__}: acceleration is the grid's samples over the measured ones, at least 1, got "
                f"{acceleration}."
            )
        self.acceleration = float(acceleration)

    @abstractmethod
    def __call__(self, size: Size, generator: torch.Generator) -> Tensor:
        """Returns a mask `(H, W)`, boolean.

        Args:
            size: `(H, W)` of k-space.
            generator: The case's.

        Raises:
            InputError: The pattern does not fit k-space of this size.
        """


class LineSampling(Sampling):
    """Whole columns: the central ones (the ACS) and others outside, drawn by fastMRI's own functions.

    Source: Zbontar et al., fastMRI, arXiv 1811.08839, Sec. 6.3; the challenges use (4, 0.08) and (8, 0.04).

    Args:
        acceleration: Aimed at, the ACS included, a whole number; see `achieved_acceleration`.
        center_fraction: Share of the columns that the ACS takes.

    Raises:
        InputError: An acceleration that is no whole number, or an ACS that is more than what may be measured.
    """

    def __init__(self, acceleration: int = 4, center_fraction: float = 0.08) -> None:
        super().__init__(acceleration)
        if self.acceleration != round(self.acceleration):
            raise InputError(
                f"{type(self).__name__}: acceleration is {acceleration:g}, and patterns of lines have whole numbers; "
                "PolynomialSampling and PoissonDiscSampling take any."
            )
        if not 0 < center_fraction < 1 / acceleration:
            raise InputError(
                f"{type(self).__name__}: center_fraction must lie between 0 and 1 / acceleration = "
                f"{1 / acceleration:g}, got {center_fraction}; fastMRI takes 0.08 at 4 and 0.04 at 8."
            )
        self.center_fraction = float(center_fraction)

    def __call__(self, size: Size, generator: torch.Generator) -> Tensor:
        """Returns a mask `(H, W)` of whole columns."""
        height, width = _check_size(size, self)
        outer = width / self.acceleration - max(1, round(width * self.center_fraction))
        if outer < 0.5 or width * self.center_fraction < 0.5:
            raise InputError(
                f"{type(self).__name__}: {width} columns at acceleration {self.acceleration:g} and center_fraction "
                f"{self.center_fraction:g} leave no column inside or outside of the ACS; change one of the two."
            )
        seed = int(torch.randint(2**31, (1,), generator=generator))
        function = self._function()([self.center_fraction], [round(self.acceleration)])
        columns, _ = function((1, height, width, 2), seed=seed)
        return (columns.reshape(1, width) > 0).repeat(height, 1)

    @abstractmethod
    def _function(self) -> Callable[..., Any]:
        """Returns fastMRI's class."""


class RandomLines(LineSampling):
    """Each outer column with equal probability, so that the mean acceleration is that asked for: the knee challenge's.

    Args:
        acceleration: On average; the achieved one varies from mask to mask.
        center_fraction: As in `LineSampling`.
    """

    def _function(self) -> Callable[..., Any]:
        from fastmri.data.subsample import RandomMaskFunc

        return RandomMaskFunc


class EquispacedLines(LineSampling):
    """Outer columns at a regular distance from a random offset, so that the acceleration is that asked for.

    The brain challenge's (`equispaced_fraction`).

    Args:
        acceleration: To within two columns of the number that it stands for.
        center_fraction: As in `LineSampling`.
    """

    def _function(self) -> Callable[..., Any]:
        from fastmri.data.subsample import EquispacedMaskFractionFunc

        return EquispacedMaskFractionFunc


class MagicLines(LineSampling):
    """Regular columns whose offset differs between the halves of k-space, to gain from its conjugate symmetry.

    Source: Defazio, "Offset sampling improves deep learning based accelerated MRI", arXiv 1912.01101.

    Args:
        acceleration: The outer distance is rounded to whole columns, so the achieved one may be off by a quarter.
        center_fraction: As in `LineSampling`.
    """

    def _function(self) -> Callable[..., Any]:
        from fastmri.data.subsample import MagicMaskFractionFunc

        return MagicMaskFractionFunc


class PointSampling(Sampling):
    """Points in the plane of two phase encodings: a fully sampled central block, and others, to an exact number in all.

    `round(H W / acceleration)` samples are measured, those of the block (the ACS) included.

    Args:
        acceleration: See `Sampling`.
        acs: Side of the central block in samples, or (rows, columns); 0 for none.

    Raises:
        InputError: A block that is none.
    """

    def __init__(self, acceleration: float, acs: int | tuple[int, int]) -> None:
        super().__init__(acceleration)
        sides = (acs, acs) if isinstance(acs, int) else acs
        if not isinstance(sides, tuple | list) or len(sides) != 2 or not all(isinstance(side, int) for side in sides):
            raise InputError(f"{type(self).__name__}: acs is {acs}, expected a whole number or (rows, columns).")
        if min(sides) < 0:
            raise InputError(f"{type(self).__name__}: acs must not be negative, got {tuple(sides)}.")
        self.acs = (sides[0], sides[1])

    def __call__(self, size: Size, generator: torch.Generator) -> Tensor:
        """Returns a mask `(H, W)` of exactly `round(H W / acceleration)` samples."""
        height, width = _check_size(size, self)
        budget = round(height * width / self.acceleration)
        block = central_block((height, width), self.acs)
        num_acs = int(block.sum())
        if self.acs[0] > height or self.acs[1] > width or num_acs > budget or budget < 1:
            raise InputError(
                f"{type(self).__name__}: an ACS of {self.acs[0]} x {self.acs[1]} does not fit in the {budget} samples "
                f"that k-space of {height} x {width} has at acceleration {self.acceleration:g}; make it smaller."
            )
        return self._fill(block, budget - num_acs, generator)

    @abstractmethod
    def _fill(self, block: Tensor, num: int, generator: torch.Generator) -> Tensor:
        """Returns `block` and `num` samples more."""


class DensitySampling(PointSampling):
    """Independent points by a density of the distance from the centre, without replacement.

    The `num` largest of `log(u) / density` (Efraimidis & Spirakis, Inf. Process. Lett. 97 (2006), algorithm A).

    Args:
        acceleration: See `Sampling`.
        acs: As in `PointSampling`.
    """

    @abstractmethod
    def _density(self, radius: Tensor) -> Tensor:
        """Returns the relative density at radii, 1 at the middle of k-space's edges."""

    def _fill(self, block: Tensor, num: int, generator: torch.Generator) -> Tensor:
        uniform = torch.rand(block.shape, generator=generator, dtype=torch.float64)
        density = self._density(radii(block.shape[0], block.shape[1])).clamp(min=1e-9)  # corners come last
        keys = (uniform.log() / density).masked_fill(block, -math.inf).flatten()
        mask = block.flatten().clone()
        mask[keys.topk(num).indices] = True
        return mask.reshape(block.shape)


class PolynomialSampling(DensitySampling):
    """Points with density `(1 - r)^power`, `r = 1` at the middle of k-space's edges.

    Source: Lustig, Donoho & Pauly, "Sparse MRI", MRM 58 (2007), Sec. "Sampling".

    Args:
        acceleration: See `Sampling`.
        acs: Side of the central block, or (rows, columns).
        power: Larger is denser at the centre.
    """

    def __init__(self, acceleration: float = 8.0, acs: int | tuple[int, int] = 24, power: float = 3.0) -> None:
        super().__init__(acceleration, acs)
        if not 0 <= power < math.inf:
            raise InputError(f"{type(self).__name__}: power must not be negative, got {power}.")
        self.power = float(power)

    def _density(self, radius: Tensor) -> Tensor:
        return (1 - radius).clamp(min=0) ** self.power


class TwoPercentSampling(PolynomialSampling):
    """Two samples in a hundred: `PolynomialSampling` at acceleration 50 with a small central block.

    At 320 x 320 these are 2048 samples, 256 of them the block. (In one dimension, 2 % would be 6 columns.)

    Args:
        fraction: Of k-space that is measured; not an acceleration, which configs have for other patterns.
        acs: Side of the central block.
        power: Larger is denser at the centre.
    """

    def __init__(self, fraction: float = 0.02, acs: int | tuple[int, int] = 16, power: float = 3.5) -> None:
        if not 0 < fraction <= 1:
            raise InputError(f"{type(self).__name__}: fraction is {fraction}, expected a share of k-space in (0, 1].")
        super().__init__(1 / fraction, acs, power)


class GaussianSampling(DensitySampling):
    """Points with density `exp(-r^2 / (2 std^2))`, `r = 1` at the middle of k-space's edges.

    Args:
        acceleration: See `Sampling`.
        acs: Side of the central block, or (rows, columns).
        std: Width of the density.
    """

    def __init__(self, acceleration: float = 8.0, acs: int | tuple[int, int] = 24, std: float = 0.35) -> None:
        super().__init__(acceleration, acs)
        if not 0 < std < math.inf:
            raise InputError(f"{type(self).__name__}: std must be positive, got {std}.")
        self.std = float(std)

    def _density(self, radius: Tensor) -> Tensor:
        return torch.exp(-radius.square() / (2 * self.std**2))


class PoissonDiscSampling(PointSampling):
    """Points no closer to each other than a distance that grows from the centre: random, without clumps or large gaps.

    Grid points are visited in random order; one is taken if it lies in no disc of those taken before, of radius
    `scale (floor + r) u` samples, `u` uniform on [0.75, 1.25] (or the distances of the grid, 1, sqrt 2, 2, show as
    rings). The scale is the largest at which the number of points is reached (bisection), and the throwing stops there.

    Source: Bridson, SIGGRAPH 2007 (dart throwing); Vasanawala et al., IEEE ISBI 2011 (variable density in MRI).

    Args:
        acceleration: See `Sampling`.
        acs: Side of the central block, or (rows, columns).
        floor: Radius at the centre relative to its growth up to the middle of an edge; large values are uniform.
    """

    def __init__(self, acceleration: float = 8.0, acs: int | tuple[int, int] = 24, floor: float = 0.2) -> None:
        super().__init__(acceleration, acs)
        if not 0 < floor < math.inf:
            raise InputError(f"{type(self).__name__}: floor must be positive, got {floor}.")
        self.floor = float(floor)

    def _fill(self, block: Tensor, num: int, generator: torch.Generator) -> Tensor:
        import numpy as np

        height, width = block.shape
        order = torch.randperm(height * width, generator=generator).numpy()
        order = order[~block.flatten().numpy()[order]]
        dither = 0.75 + 0.5 * torch.rand(height, width, generator=generator, dtype=torch.float64)
        shape = ((self.floor + radii(height, width)) * dither).flatten().numpy()
        offset = np.arange(-max(height, width), max(height, width) + 1)

        def throw(scale: float) -> list[int]:
            blocked = np.zeros((height, width), dtype=bool)
            flat = blocked.reshape(-1)
            taken: list[int] = []
            for point in order:
                if flat[point]:
                    continue
                if len(taken) == num:
                    break
                taken.append(int(point))
                row, column = divmod(int(point), width)
                radius = scale * shape[point]
                reach = min(math.ceil(radius) - 1, max(height, width))
                if reach < 1:
                    continue
                near = offset[len(offset) // 2 - reach : len(offset) // 2 + reach + 1] ** 2
                disc = near[:, None] + near < radius**2
                top, left = max(row - reach, 0), max(column - reach, 0)
                window = blocked[top : row + reach + 1, left : column + reach + 1]
                window |= disc[top - row + reach :, left - column + reach :][: window.shape[0], : window.shape[1]]
            return taken

        # Random discs jam at 0.547 of the area, counted at half their radius: twice the scale of that is too much.
        high = 2 * math.sqrt(4 * 0.547 / math.pi * float((shape**-2.0).sum()) / max(num, 1))
        low, points = 0.0, throw(0.0)
        for _ in range(7):
            middle = (low + high) / 2
            trial = throw(middle)
            if len(trial) == num:
                low, points = middle, trial
            else:
                high = middle
        mask = block.flatten().clone()
        mask[points] = True
        return mask.reshape(block.shape)


def achieved_acceleration(mask: Tensor) -> Tensor:
    """Returns the grid's samples over the measured ones of masks `(..., H, W)`, shape `(...)`."""
    kept = (mask != 0).flatten(-2)
    return kept.shape[-1] / kept.sum(-1)


def calibration_region(mask: Tensor) -> tuple[slice, slice]:
    """Returns rows and columns of the largest fully sampled rectangle that grows from the centre of a mask `(H, W)`.

    A side at a time, each as long as its next line is measured; empty slices if the centre is not.
    """
    kept = mask != 0
    height, width = kept.shape
    row, column = height // 2, width // 2
    if not kept[row, column]:
        return slice(row, row), slice(column, column)
    top, bottom, left, right = row, row + 1, column, column + 1
    grown = True
    while grown:
        grown = False
        if top > 0 and kept[top - 1, left:right].all():
            top, grown = top - 1, True
        if left > 0 and kept[top:bottom, left - 1].all():
            left, grown = left - 1, True
        if bottom < height and kept[bottom, left:right].all():
            bottom, grown = bottom + 1, True
        if right < width and kept[top:bottom, right].all():
            right, grown = right + 1, True
    return slice(top, bottom), slice(left, right)


def central_block(size: Size, acs: Size) -> Tensor:
    """Returns a mask `(H, W)` of the central `acs` samples, with `(H//2, W//2)` at their own centre."""
    block = torch.zeros(size, dtype=torch.bool)
    top, left = (num // 2 - inner // 2 for num, inner in zip(size, acs, strict=True))
    block[max(top, 0) : max(top + acs[0], 0), max(left, 0) : max(left + acs[1], 0)] = True
    return block


def radii(height: int, width: int) -> Tensor:
    """Returns the distance from the centre of k-space, 1 at the middle of its edges: float64 `(H, W)`."""
    rows, columns = ((torch.arange(num, dtype=torch.float64) - num // 2) / max(num / 2, 1) for num in (height, width))
    return torch.hypot(rows[:, None], columns)


def _check_size(size: Size, sampling: Sampling) -> Size:
    height, width = size
    if height < 1 or width < 1:
        raise InputError(f"{type(sampling).__name__}: k-space must have at least one sample, got {height} x {width}.")
    return height, width
