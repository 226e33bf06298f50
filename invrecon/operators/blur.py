"""Blur: convolution with a kernel that is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from invrecon.errors import InputError
from invrecon.operators.base import LinearOperator
from invrecon.operators.separable import Boundary, SeparableOperator, band_matrix
from invrecon.operators.spectral import Exact, SpectralOperator, Spectrum, image_size

Kernel = Sequence[Sequence[float]] | Tensor


class _SeparableBlur(SeparableOperator):
    """`y = (k k^T) * x` for taps `k`, at the image's own size."""

    def __init__(self, size: int | tuple[int, int], taps: Tensor, num_channels: int, boundary: Boundary) -> None:
        num_channels, height, width = image_size(size, num_channels, type(self).__name__)
        if boundary not in ("zero", "reflect"):
            raise InputError(f"{type(self).__name__}: the boundary must be 'zero' or 'reflect', got '{boundary}'.")
        super().__init__(_toeplitz(taps, height, boundary), _toeplitz(taps, width, boundary), num_channels)

    def baseline(self, y: Tensor) -> Tensor:
        """Returns `y`."""
        return y


class UniformBlur(_SeparableBlur):
    """The mean of `kernel_size x kernel_size` neighbours: deblurring has 9, heavy deblurring 17.

    `y[i, j] = K^-2 sum over |d|, |e| <= K/2 of x[i - d, j - e]`, pixels outside zero unless reflected.

    The sizes are those we hold to be behind the deblurring tasks of PaDIS (Hu et al., NeurIPS 2024, arXiv 2406.02462),
    with noise of standard deviation 0.01; the code released with it has neither them nor a boundary.

    Args:
        size: Side of the image in pixels, or (H, W).
        kernel_size: Side of the kernel in pixels.
        num_channels: Channels of the image, blurred alike.
        boundary: 'zero' or 'reflect' (mirrored about the last pixel).

    Raises:
        InputError: A size below 1 or an unknown boundary.
    """

    def __init__(
        self,
        size: int | tuple[int, int] = 256,
        kernel_size: int = 9,
        num_channels: int = 1,
        boundary: Literal["zero", "reflect"] = "zero",
    ) -> None:
        _require_kernel(kernel_size >= 1, f"UniformBlur: kernel_size must be at least 1, got {kernel_size}.")
        taps = torch.full((kernel_size,), 1 / kernel_size, dtype=torch.float64)
        super().__init__(size, taps, num_channels, boundary)


class GaussianBlur(_SeparableBlur):
    """Convolution with `exp(-(d^2 + e^2) / (2 std^2))`, cut to `kernel_size` pixels and summing to 1.

    Source: Chung et al., DPS, ICLR 2023, Section 4 (61 pixels, std 3.0); their code reflects at the boundary.

    Args:
        size: Side of the image in pixels, or (H, W).
        kernel_size: Side of the kernel in pixels.
        std: Standard deviation [pixels].
        num_channels: Channels of the image, blurred alike.
        boundary: 'zero' or 'reflect' (mirrored about the last pixel).

    Raises:
        InputError: A size below 1, a std that is not positive, or an unknown boundary.
    """

    def __init__(
        self,
        size: int | tuple[int, int] = 256,
        kernel_size: int = 61,
        std: float = 3.0,
        num_channels: int = 1,
        boundary: Literal["zero", "reflect"] = "zero",
    ) -> None:
        _require_kernel(
            kernel_size >= 1 and std > 0,
            f"GaussianBlur: kernel_size must be at least 1 and std positive, got {kernel_size} and {std}.",
        )
        offsets = torch.arange(kernel_size, dtype=torch.float64) - kernel_size // 2
        taps = torch.exp(-0.5 * (offsets / std) ** 2)
        super().__init__(size, taps / taps.sum(), num_channels, boundary)


class Blur(LinearOperator):
    """Convolution with any kernel, pixels outside the image zero: `y[i] = sum_j k[j] x[i - j + K//2]`.

    By fast Fourier transforms on a grid wide enough that nothing wraps round. There is no singular system in closed
    form; `CircularBlur` has one.

    Args:
        kernel: `(K, L)`, used as it is: it should sum to 1.
        size: Side of the image in pixels, or (H, W).
        num_channels: Channels of the image, blurred alike.

    Raises:
        InputError: A kernel that is not a matrix of finite numbers, or a size below 1.
    """

    def __init__(self, kernel: Kernel, size: int | tuple[int, int] = 256, num_channels: int = 1) -> None:
        shape = image_size(size, num_channels, type(self).__name__)
        super().__init__(shape, shape)
        matrix = _kernel_matrix(kernel, type(self).__name__)
        rows, columns = matrix.shape
        self._grid = (shape[1] + rows // 2, shape[2] + columns // 2)
        self._transfer = Exact(_transfer(matrix, self._grid))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the blurred images, `(B, C, H, W)`."""
        self._check(x, self.image_shape, "images")
        return self._filter(x, self._transfer.to(x))

    def adjoint(self, y: Tensor) -> Tensor:
        """Returns the correlation with the kernel, `(B, C, H, W)`."""
        self._check(y, self.measurement_shape, "measurements")
        return self._filter(y, self._transfer.to(y).conj())

    def baseline(self, y: Tensor) -> Tensor:
        """Returns `y`."""
        return y

    def _filter(self, x: Tensor, transfer: Tensor) -> Tensor:
        _, height, width = self.image_shape
        wide = torch.fft.irfft2(torch.fft.rfft2(x, s=self._grid) * transfer, s=self._grid)
        return wide[..., :height, :width]


class CircularBlur(SpectralOperator):
    """Convolution with any kernel on a torus: what leaves on one side enters on the other.

    `y = F^-1 (k_hat F x)`; everything is in closed form. A kernel larger than the image wraps round.

    Args:
        kernel: `(K, L)`, centred at `(K//2, L//2)` and used as it is: it should sum to 1.
        size: Side of the image in pixels, or (H, W).
        num_channels: Channels of the image, blurred alike.

    Raises:
        InputError: A kernel that is not a matrix of finite numbers, or a size below 1.
    """

    def __init__(self, kernel: Kernel, size: int | tuple[int, int] = 256, num_channels: int = 1) -> None:
        shape = image_size(size, num_channels, type(self).__name__)
        super().__init__(shape, shape)
        self._full = _transfer(_kernel_matrix(kernel, type(self).__name__), shape[1:], torch.fft.fft2)
        self._transfer = Exact(self._full[:, : shape[2] // 2 + 1].clone())

    def forward(self, x: Tensor) -> Tensor:
        """Returns the blurred images, `(B, C, H, W)`."""
        self._check(x, self.image_shape, "images")
        return torch.fft.irfft2(torch.fft.rfft2(x) * self._transfer.to(x), s=self.image_shape[1:])

    def adjoint(self, y: Tensor) -> Tensor:
        """Returns the correlation with the kernel, `(B, C, H, W)`."""
        self._check(y, self.measurement_shape, "measurements")
        return torch.fft.irfft2(torch.fft.rfft2(y) * self._transfer.to(y).conj(), s=self.image_shape[1:])

    def baseline(self, y: Tensor) -> Tensor:
        """Returns `y`."""
        return y

    def _singular_system(self, like: Tensor) -> Spectrum:
        return CircularSpectrum(self._full, self.image_shape, like)


class CircularSpectrum(Spectrum):
    r"""Circular convolution in a real basis: `V` is the Hartley transform, `S = |k_hat|`, the phase belongs to `U`.

    `V^T x = Re F x - Im F x`, with `F` orthonormal: real, symmetric, its own inverse. A frequency and its negative have
    equal `|k_hat|` and conjugate phases `p = k_hat / |k_hat|`, so `P = F^-1 p F` is a rotation of real images and
    `A = (P V) S V^T`. Bracewell, "Discrete Hartley transform", J. Opt. Soc. Am. 73 (1983).

    Args:
        transfer: `k_hat` `(H, W)`, complex128.
        image_shape: `(C, H, W)`.
        like: Gives precision and device.
    """

    def __init__(self, transfer: Tensor, image_shape: tuple[int, ...], like: Tensor) -> None:
        magnitude = transfer.abs()
        phase = torch.where(magnitude > 0, transfer / magnitude.clamp(min=1e-300), 1.0)
        self._phase = phase.to(like.device, like.dtype.to_complex())
        values = magnitude.to(like).flatten().repeat(image_shape[0])
        super().__init__(values, image_shape, image_shape)

    def to_spectrum(self, x: Tensor) -> Tensor:
        """Returns the Hartley transform, flattened."""
        return _hartley(torch.fft.fft2(x, norm="ortho")).flatten(1)

    def to_image(self, c: Tensor) -> Tensor:
        """Returns the Hartley transform, which is its own inverse."""
        return _hartley(torch.fft.fft2(c.unflatten(1, self.image_shape), norm="ortho"))

    def _project(self, y: Tensor) -> Tensor:
        return _hartley(torch.fft.fft2(y, norm="ortho") * self._phase.conj()).flatten(1)

    def _expand(self, c: Tensor) -> Tensor:
        return torch.fft.ifft2(torch.fft.fft2(self.to_image(c)) * self._phase).real


def _hartley(frequencies: Tensor) -> Tensor:
    return frequencies.real - frequencies.imag


def _toeplitz(taps: Tensor, size: int, boundary: Boundary) -> Tensor:
    """Returns the `(size, size)` matrix of `y[i] = sum_j taps[j] x[i - j + K//2]`."""
    offsets = len(taps) // 2 - torch.arange(len(taps))
    indices = torch.arange(size)[:, None] + offsets
    return band_matrix(indices, taps.expand(size, -1), size, boundary)


def _transfer(kernel: Tensor, grid: tuple[int, ...], fft: Callable[[Tensor], Tensor] = torch.fft.rfft2) -> Tensor:
    """Returns the transform of the kernel laid on a periodic grid, its centre at the origin."""
    rows, columns = kernel.shape
    i = (torch.arange(rows) - rows // 2) % grid[0]
    j = (torch.arange(columns) - columns // 2) % grid[1]
    laid = torch.zeros(grid[0] * grid[1], dtype=torch.float64)
    laid.index_add_(0, (i[:, None] * grid[1] + j).flatten(), kernel.flatten())
    return fft(laid.reshape(grid[0], grid[1]))


def _kernel_matrix(kernel: Kernel, name: str) -> Tensor:
    matrix = torch.as_tensor(kernel, dtype=torch.float64).detach().cpu()
    _require_kernel(
        matrix.ndim == 2 and matrix.numel() > 0 and bool(matrix.isfinite().all()),
        f"{name}: the kernel must be a matrix (K, L) of finite numbers, got shape {tuple(matrix.shape)}.",
    )
    return matrix


def _require_kernel(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)
