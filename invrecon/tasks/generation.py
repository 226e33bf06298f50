"""What can be said of unconditional samples, which have no reference: whether they show the grid of their patches."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from invrecon.metrics.seams import find_seams, seam_statistic
from invrecon.priors.base import Prior
from invrecon.priors.layouts import FixedLayout
from invrecon.priors.mirror import MirroredPrior
from invrecon.priors.patch import PatchPrior


class Grid(NamedTuple):
    """Where the seams of a patch prior would be.

    Attributes:
        size: Pixels from seam to seam.
        offset: A row and a column at which a patch begins.
    """

    size: int
    offset: tuple[int, int]


def seam_grid(prior: Prior | None, shape: tuple[int, int]) -> Grid | None:
    """Returns the grid of a prior's patches in images `shape`, or None where there is none.

    A layout that moves has none of its own: it is judged at that of its patches which is centred on the image.
    """
    prior = prior.prior if isinstance(prior, MirroredPrior) else prior
    if not isinstance(prior, PatchPrior):
        return None
    layout, size = prior.layout, prior.patch_size
    if not isinstance(layout, FixedLayout):
        rows, columns = (-(-num % size // 2) for num in shape)
    else:
        starts = [layout.grid(num, size) for num in shape]
        if min(len(axis) for axis in starts) < 2:
            return None
        margin = (size - int(layout.window(size).count_nonzero())) // 2  # what is cut off at each side of a patch
        rows, columns = (axis[0] + margin for axis in starts)
        size = starts[0][1] - starts[0][0]
    return Grid(size, (rows, columns)) if 2 <= size < min(shape) else None


def seam_columns(images: Tensor, prior: Prior | None) -> dict[str, list[float]]:
    """Returns what `metrics.csv` says of samples `(B, C, H, W)`: nothing where the prior has no patches.

    `seams` is the seam statistic of the prior's grid, `contrast` its largest value over all offsets of a grid over the
    median (see `metrics.seams`).
    """
    grid = seam_grid(prior, (images.shape[-2], images.shape[-1]))
    if grid is None:
        return {}
    seams, scan = seam_statistic(images, grid.size, grid.offset), find_seams(images, grid.size)
    return {"seams": seams.tolist(), "contrast": scan.contrast.tolist()}
