"""Joseph's projector: line integrals through a pixel image as a sparse matrix, built ray by ray."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock

import torch
from torch import Tensor

from invrecon.errors import InputError
from invrecon.operators.sparse import SparseMatrix

_CHUNK = 2**20
"""Ray steps handled at once while building: bounds the memory of the temporaries."""

_CACHE_BYTES = 512 * 2**20
"""Matrices kept for operators of equal geometry; the newest is kept whatever its size."""


def joseph_matrix(
    origin: Tensor, direction: Tensor, size: tuple[int, int], pixel: float, dtype: torch.dtype
) -> SparseMatrix:
    r"""Returns the matrix of line integrals along rays `p + t e` through an `(H, W)` image.

    A ray steps through the pixel centres of its dominant axis and interpolates linearly along the other; each
    step stands for a length `pixel / |e_dominant|`. The image is zero outside. Joseph, IEEE TMI 1 (1982),
    192-196.

    The image is centred at the origin; x runs along columns, y runs up, so row 0 has the largest y.

    Args:
        origin: A point `(x, y)` on each ray, float64, shape `(R, 2)`.
        direction: Unit vectors, float64, shape `(R, 2)`.
        size: `(H, W)`.
        pixel: Side of the square pixels, in the unit of `origin`.
        dtype: Precision of the entries (their computation is in float64).

    Returns:
        The matrix, `(R, H * W)`.

    Raises:
        InputError: The matrix would have more than 2^31 - 1 entries.
    """
    height, width = size
    # Positions in pixel indices: column c, row r.
    col, row = origin[:, 0] / pixel + (width - 1) / 2, (height - 1) / 2 - origin[:, 1] / pixel
    d_col, d_row = direction[:, 0], -direction[:, 1]

    along_cols = d_col.abs() >= d_row.abs()  # the dominant axis of each ray

    def pick(if_cols: Tensor | int, if_rows: Tensor | int) -> Tensor:
        return torch.where(along_cols, if_cols, if_rows)[:, None]  # type: ignore[arg-type, call-overload]

    start, other = pick(col, row), pick(row, col)
    slope = pick(d_row / d_col, d_col / d_row)
    length = pixel / pick(d_col, d_row).abs()
    num_steps, num_other = pick(width, height), pick(height, width)
    step_stride, other_stride = pick(1, width), pick(width, 1)

    steps = torch.arange(max(size), device=origin.device)
    counts, cols, values = [], [], []
    for ray in torch.arange(len(origin), device=origin.device).split(max(1, _CHUNK // max(size))):
        position = other[ray] + (steps - start[ray]) * slope[ray]
        lower = position.floor()
        upper_weight = position - lower
        neighbour = torch.stack((lower, lower + 1), -1).long()
        weight = torch.stack((1 - upper_weight, upper_weight), -1) * length[ray, :, None]
        inside = (neighbour >= 0) & (neighbour < num_other[ray, :, None]) & (weight > 0)
        inside &= (steps < num_steps[ray])[..., None]
        index = (steps * step_stride[ray])[..., None] + neighbour * other_stride[ray, :, None]
        counts.append(inside.sum((1, 2)))
        cols.append(index[inside].to(torch.int32))
        values.append(weight[inside].to(dtype))
    crow = torch.cat([counts[0].new_zeros(1), *counts]).cumsum(0)
    if crow[-1] >= 2**31:
        raise InputError(
            f"The projection matrix of a {height} x {width} image and {len(origin)} rays has {int(crow[-1])} "
            "entries, more than 32-bit indices can address; use fewer views, bins or pixels."
        )
    return SparseMatrix(crow.to(torch.int32), torch.cat(cols), torch.cat(values), height * width)


def pixel_centres(size: tuple[int, int], pixel: float, device: torch.device) -> Tensor:
    """Returns the pixel centres `(x, y)` of an `(H, W)` image, row by row, float64 `(H * W, 2)`."""
    height, width = size
    x = (torch.arange(width, dtype=torch.float64, device=device) - (width - 1) / 2) * pixel
    y = ((height - 1) / 2 - torch.arange(height, dtype=torch.float64, device=device)) * pixel
    return torch.cartesian_prod(y, x).flip(-1)


class MatrixCache:
    """The matrices most recently used in this process, by geometry: operators of equal geometry share one.

    Args:
        max_bytes: Older matrices are let go when together they exceed this.
    """

    def __init__(self, max_bytes: int = _CACHE_BYTES) -> None:
        self.max_bytes = max_bytes
        self._matrices: OrderedDict[Hashable, SparseMatrix] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable, build: Callable[[], SparseMatrix]) -> SparseMatrix:
        """Returns the matrix of `key`, calling `build` if it is not there."""
        with self._lock:
            if key not in self._matrices:
                self._matrices[key] = build()
            self._matrices.move_to_end(key)
            while len(self._matrices) > 1 and self._num_bytes() > self.max_bytes:
                self._matrices.popitem(last=False)
            return self._matrices[key]

    def _num_bytes(self) -> int:
        return sum(matrix.num_bytes for matrix in self._matrices.values())


matrix_cache = MatrixCache()
