"""Operators that act on columns and rows one after the other, `Y = L X R^T`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as nnf

from invrecon.operators.spectral import Exact, SpectralOperator, Spectrum

Boundary = Literal["zero", "reflect", "symmetric"]


class SeparableOperator(SpectralOperator):
    """`Y = L X R^T` in every channel; as a matrix, the Kronecker product of `L` and `R`.

    Two small singular value decompositions, made once at construction in double precision, are the whole singular
    system.

    Args:
        left: `L` `(M1, H)`, acts along columns; float64.
        right: `R` `(M2, W)`, acts along rows; float64.
        num_channels: Channels of the image.
    """

    def __init__(self, left: Tensor, right: Tensor, num_channels: int = 1) -> None:
        super().__init__((num_channels, left.shape[1], right.shape[1]), (num_channels, left.shape[0], right.shape[0]))
        self._left, self._right = Exact(left), Exact(right)
        self._factors = [[Exact(part) for part in _padded_svd(matrix)] for matrix in (left, right)]

    def forward(self, x: Tensor) -> Tensor:
        """Returns `L x R^T`, `(B, C, H, W)` to `(B, C, M1, M2)`."""
        self._check(x, self.image_shape, "images")
        return self._left.to(x) @ x @ self._right.to(x).mT

    def adjoint(self, y: Tensor) -> Tensor:
        """Returns `L^T y R`, `(B, C, M1, M2)` to `(B, C, H, W)`."""
        self._check(y, self.measurement_shape, "measurements")
        return self._left.to(y).mT @ y @ self._right.to(y)

    def _singular_system(self, like: Tensor) -> Spectrum:
        left, right = ([part.to(like) for part in factor] for factor in self._factors)
        return KroneckerSpectrum(left, right, self.image_shape, self.measurement_shape)


class KroneckerSpectrum(Spectrum):
    """`A = (U1 x U2) (S1 x S2) (V1 x V2)^T`: the singular values are all products of two small sets.

    Args:
        left: `U1` `(M1, H)`, `s1` `(H,)` and `V1` `(H, H)`, padded with zeros where the null space is.
        right: The same along rows.
        image_shape: `(C, H, W)`.
        measurement_shape: `(C, M1, M2)`.
    """

    def __init__(
        self,
        left: list[Tensor],
        right: list[Tensor],
        image_shape: tuple[int, ...],
        measurement_shape: tuple[int, ...],
    ) -> None:
        (self._u1, s1, self._v1), (self._u2, s2, self._v2) = left, right
        super().__init__((s1[:, None] * s2).flatten().repeat(image_shape[0]), image_shape, measurement_shape)

    def to_spectrum(self, x: Tensor) -> Tensor:
        """Returns `V1^T x V2`, flattened."""
        return (self._v1.mT @ x @ self._v2).flatten(1)

    def to_image(self, c: Tensor) -> Tensor:
        """Returns `V1 c V2^T`."""
        return self._v1 @ c.unflatten(1, self.image_shape) @ self._v2.mT

    def _project(self, y: Tensor) -> Tensor:
        return (self._u1.mT @ y @ self._u2).flatten(1)

    def _expand(self, c: Tensor) -> Tensor:
        return self._u1 @ c.unflatten(1, self.image_shape) @ self._u2.mT


def mirror(indices: Tensor, size: int, repeated: bool = False) -> Tensor:
    """Returns the pixels of `[0, size)` that are seen at any indices between two mirrors at an image's ends.

    Args:
        indices: Of any sign and size.
        size: Number of pixels.
        repeated: Whether the mirrors stand at the outer edges of the last pixels (which are so repeated), or in their
            middles.
    """
    period = max(2 * (size - 1 + repeated), 1)
    indices = indices % period
    return torch.minimum(indices, period - int(repeated) - indices)


def band_matrix(indices: Tensor, weights: Tensor, size: int, boundary: Boundary) -> Tensor:
    """Returns the `(M, size)` matrix that sums `weights` times the pixels at `indices`, row by row, in float64.

    Args:
        indices: Pixels `(M, K)`, some of them perhaps outside `[0, size)`.
        weights: `(M, K)`.
        size: Number of pixels.
        boundary: What lies outside: 'zero', 'reflect' (mirrored about the last pixel, which is not repeated) or
            'symmetric' (mirrored about its outer edge: it is repeated).
    """
    weights = weights.double()
    if boundary == "zero":
        weights = torch.where((indices >= 0) & (indices < size), weights, 0.0)
        indices = indices.clamp(0, size - 1)
    else:
        indices = mirror(indices, size, boundary == "symmetric")
    matrix = torch.zeros(len(indices), size, dtype=torch.float64)
    return matrix.scatter_add_(1, indices, weights)


def _padded_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `U (M, N)`, `s (N,)` and square `V (N, N)` of a matrix `(M, N)`, zeros for what has no image."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=True)
    missing = matrix.shape[1] - len(s)
    return nnf.pad(u[:, : len(s)], (0, missing)), nnf.pad(s, (0, missing)), vh.mT.contiguous()
