"""Centred orthonormal Fourier transforms, and complex numbers as pairs of real ones.

Images carry their real and imaginary parts as two channels, `(B, 2, H, W)`, so that networks take them; k-space has
them last, `(..., 2)`, so that a complex tensor and its measurement share memory (as in fastMRI).
"""

from __future__ import annotations

import torch
from torch import Tensor

_PLANE = (-2, -1)


def fft2c(z: Tensor) -> Tensor:
    r"""Returns the centred orthonormal transform of complex images over their last two dimensions.

        Z[k] = 1 / sqrt(HW)  sum_r z[r] exp(-2 pi i (k - c) . (r - c) / N),    c = (H // 2, W // 2)

    The origin of both sides is entry `(H // 2, W // 2)`, for odd sizes too: shift after, inverse shift before.

    Args:
        z: Complex, `(..., H, W)`.
    """
    return torch.fft.fftshift(torch.fft.fft2(torch.fft.ifftshift(z, dim=_PLANE), norm="ortho"), dim=_PLANE)


def ifft2c(z: Tensor) -> Tensor:
    """Returns the inverse of `fft2c`, which is also its adjoint: complex, `(..., H, W)`."""
    return torch.fft.fftshift(torch.fft.ifft2(torch.fft.ifftshift(z, dim=_PLANE), norm="ortho"), dim=_PLANE)


def channels_to_complex(x: Tensor) -> Tensor:
    """Returns complex images `(B, H, W)` of real and imaginary channels `(B, 2, H, W)`."""
    return torch.complex(x[:, 0], x[:, 1])


def complex_to_channels(z: Tensor) -> Tensor:
    """Returns real and imaginary channels `(B, 2, H, W)` of complex images `(B, H, W)`."""
    return torch.stack((z.real, z.imag), 1)


def pairs_to_complex(y: Tensor) -> Tensor:
    """Returns complex numbers `(...)` of pairs `(..., 2)`."""
    return torch.view_as_complex(y.contiguous())


def complex_to_pairs(z: Tensor) -> Tensor:
    """Returns pairs `(..., 2)` of complex numbers `(...)`."""
    return torch.view_as_real(z.resolve_conj())
