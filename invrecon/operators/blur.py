"""Blur: convolution with a kernel that is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor

from invrecon.errors import InputError
from invrecon.operators.base import LinearOperator
from invrecon.operators.separable import Boundary, SeparableOperator, band_matrix, mirror
from invrecon.operators.spectral import Exact, SpectralOperator, Spectrum, image_size
from invrecon.rng import make_generator

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
    """Convolution with any kernel: `y[i] = sum_j k[j] x[i - j + K//2]`, pixels outside zero unless reflected.

    By fast Fourier transforms on a grid wide enough that nothing wraps round. There is no singular system in closed
    form; `CircularBlur` has one.

    Args:
        kernel: `(K, L)`, used as it is: it should sum to 1.
        size: Side of the image in pixels, or (H, W).
        num_channels: Channels of the image, blurred alike.
        boundary: 'zero' or 'reflect' (mirrored about the last pixel).

    Raises:
        InputError: A kernel that is not a matrix of finite numbers, a size below 1 or an unknown boundary.
    """

    def __init__(
        self,
        kernel: Kernel,
        size: int | tuple[int, int] = 256,
        num_channels: int = 1,
        boundary: Literal["zero", "reflect"] = "zero",
    ) -> None:
        shape = image_size(size, num_channels, type(self).__name__)
        if boundary not in ("zero", "reflect"):
            raise InputError(f"{type(self).__name__}: the boundary must be 'zero' or 'reflect', got '{boundary}'.")
        super().__init__(shape, shape)
        matrix = _kernel_matrix(kernel, type(self).__name__)
        self._margin = (matrix.shape[0] // 2, matrix.shape[1] // 2)
        # Mirrors show as much of the image on each side as the kernel reaches.
        self._sides = 2 if boundary == "reflect" else 1
        self._grid = tuple(n + self._sides * margin for n, margin in zip(shape[1:], self._margin, strict=True))
        self._transfer = Exact(_transfer(matrix, self._grid))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the blurred images, `(B, C, H, W)`."""
        self._check(x, self.image_shape, "images")
        if self._sides == 1:
            return self._crop(self._filter(x, self._transfer.to(x)), (0, 0))
        for axis, index in self._mirrored(x.device):
            x = x.index_select(axis, index)
        return self._crop(self._filter(x, self._transfer.to(x)), self._margin)

    def adjoint(self, y: Tensor) -> Tensor:
        """Returns the correlation with the kernel, `(B, C, H, W)`; what fell on a mirror comes back."""
        self._check(y, self.measurement_shape, "measurements")
        transfer = self._transfer.to(y).conj()
        if self._sides == 1:
            return self._crop(self._filter(y, transfer), (0, 0))
        above, left = self._margin  # as much as below and on the right
        x = self._filter(nnf.pad(y, (left, left, above, above)), transfer)
        for axis, index in self._mirrored(y.device):
            shape = list(x.shape)
            shape[axis] = self.image_shape[axis]
            x = x.new_zeros(shape).index_add(axis, index, x)
        return x

    def baseline(self, y: Tensor) -> Tensor:
        """Returns `y`."""
        return y

    def _filter(self, x: Tensor, transfer: Tensor) -> Tensor:
        """Returns the convolution on the whole grid."""
        return torch.fft.irfft2(torch.fft.rfft2(x, s=self._grid) * transfer, s=self._grid)

    def _crop(self, x: Tensor, start: tuple[int, int]) -> Tensor:
        _, height, width = self.image_shape
        return x[..., start[0] : start[0] + height, start[1] : start[1] + width]

    def _mirrored(self, device: torch.device) -> Iterator[tuple[int, Tensor]]:
        """Yields the image's axes with the pixels that the grid shows along them."""
        for axis in (-2, -1):
            index = torch.arange(self._grid[axis], device=device) - self._margin[axis]
            yield axis, mirror(index, self.image_shape[axis])


class MotionBlur(Blur):
    """Convolution with the path of a camera that was not held still, drawn at random: `kernel_size` pixels a side.

    The camera walks a path of `kernel_size / 2` pixels at constant speed, its direction a random walk of its own;
    the kernel is the time that it spent over each pixel, its mean in the middle.

    Source: Boracchi & Foi, "Modeling the performance of image restoration from motion blur", IEEE TIP 21 (2012), for
    paths of random direction; Chung et al., DPS, ICLR 2023, Section 4 (61 pixels, intensity 0.5), whose kernels are
    those of another generator and so not these.

    Args:
        size: Side of the image in pixels, or (H, W).
        kernel_size: Side of the kernel in pixels.
        intensity: How much the path turns: 0 is a straight line, 1 a scrawl.
        num_channels: Channels of the image, blurred alike.
        boundary: 'zero' or 'reflect' (mirrored about the last pixel).
        seed: Of the path.

    Raises:
        InputError: A size below 1, an intensity outside of [0, 1], or an unknown boundary.
    """

    def __init__(
        self,
        size: int | tuple[int, int] = 256,
        kernel_size: int = 61,
        intensity: float = 0.5,
        num_channels: int = 1,
        boundary: Literal["zero", "reflect"] = "zero",
        seed: int = 0,
    ) -> None:
        _require_kernel(
            kernel_size >= 1 and 0 <= intensity <= 1,
            "MotionBlur: kernel_size must be at least 1 and intensity lie between 0 and 1, got "
            f"{kernel_size} and {intensity}.",
        )
        generator = make_generator(seed, "MotionBlur")
        super().__init__(motion_kernel(kernel_size, intensity, generator), size, num_channels, boundary)


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


def motion_kernel(kernel_size: int, intensity: float, generator: torch.Generator) -> Tensor:
    """Returns a random path's kernel `(kernel_size, kernel_size)`, summing to 1; see `MotionBlur`."""
    num = 16 * kernel_size
    turns = torch.randn(num, generator=generator, dtype=torch.float64) * (2 * math.pi * intensity / math.sqrt(num))
    turns[0] = 2 * math.pi * torch.rand((), generator=generator, dtype=torch.float64)  # the first direction
    angle = turns.cumsum(0)
    path = torch.stack((angle.sin(), angle.cos()), 1).cumsum(0) * (kernel_size / 2 / num)
    place = (path - path.mean(0) + kernel_size // 2).clamp(0, kernel_size - 1)
    corner = place.floor()
    kernel = torch.zeros(kernel_size * kernel_size, dtype=torch.float64)
    for offset in ((0, 0), (0, 1), (1, 0), (1, 1)):  # each moment is shared by the four pixels around it
        pixel = corner + torch.tensor(offset, dtype=torch.float64)
        share = (1 - (place - pixel).abs()).clamp(min=0).prod(1)
        row, column = pixel.clamp(max=kernel_size - 1).long().unbind(1)
        kernel.index_add_(0, row * kernel_size + column, share)
    return (kernel / kernel.sum()).reshape(kernel_size, kernel_size)


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
    try:
        matrix = torch.as_tensor(kernel, dtype=torch.float64).detach().cpu()
    except (ValueError, TypeError) as error:
        raise InputError(f"{name}: the kernel is no matrix (K, L) of numbers ({error}).") from None
    _require_kernel(
        matrix.ndim == 2 and matrix.numel() > 0 and bool(matrix.isfinite().all()),
        f"{name}: the kernel must be a matrix (K, L) of finite numbers, got shape {tuple(matrix.shape)}.",
    )
    return matrix


def _require_kernel(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)
