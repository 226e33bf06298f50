"""Super-resolution: images measured on a coarser grid."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as nnf

from invrecon.errors import InputError
from invrecon.operators.separable import SeparableOperator, band_matrix
from invrecon.operators.spectral import SpectralOperator, Spectrum, image_size


class BlockDownsample(SpectralOperator):
    """The mean of each `factor x factor` block: `A A^T = I / factor^2`.

    Source: average pooling in DDRM (Kawar et al., NeurIPS 2022). We hold factor 4, with noise of standard deviation
    0.01, to be the super-resolution task of PaDIS (Hu et al., NeurIPS 2024); its released code has none.

    Args:
        size: Side of the image in pixels, or (H, W); multiples of `factor`.
        factor: Side of a block in pixels.
        num_channels: Channels of the image.

    Raises:
        InputError: A size or factor below 1, or a size that is not a multiple of the factor.
    """

    def __init__(self, size: int | tuple[int, int] = 256, factor: int = 4, num_channels: int = 1) -> None:
        shape = image_size(size, num_channels, "BlockDownsample")
        _require_factor(factor, "BlockDownsample")
        if shape[1] % factor or shape[2] % factor:
            raise InputError(
                f"BlockDownsample: {shape[1]} x {shape[2]} pixels are no whole number of {factor} x {factor} blocks; "
                "crop the images, or use BicubicDownsample, which takes any size."
            )
        super().__init__(shape, (num_channels, shape[1] // factor, shape[2] // factor))
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Returns the means, `(B, C, H / factor, W / factor)`."""
        self._check(x, self.image_shape, "images")
        return _blocks(x, self.factor).mean(-1)

    def adjoint(self, y: Tensor) -> Tensor:
        """Returns each mean over `factor^2`, on all pixels of its block, `(B, C, H, W)`."""
        self._check(y, self.measurement_shape, "measurements")
        return self.baseline(y) / self.factor**2

    def baseline(self, y: Tensor) -> Tensor:
        """Returns each mean on all pixels of its block (nearest-neighbour upsampling), which is also `A^+ y`."""
        return y.repeat_interleave(self.factor, -2).repeat_interleave(self.factor, -1)

    def _singular_system(self, like: Tensor) -> Spectrum:
        return BlockSpectrum(self.factor, self.image_shape, self.measurement_shape, like)


class BlockSpectrum(Spectrum):
    r"""Block means: in each block a Householder reflection `Q` turns `(1, ..., 1) / k` into the first unit vector.

    `V` applies `Q = I - 2 v v^T`, symmetric and its own inverse, to the `k^2` pixels of every block. The first
    coefficient is `k` times the mean, hence `S = 1 / k` there; the others are the null space. Golub and Van Loan,
    Matrix Computations, Section 5.1.

    Args:
        factor: `k`.
        image_shape: `(C, H, W)`.
        measurement_shape: `(C, H / k, W / k)`.
        like: Gives precision and device.
    """

    def __init__(
        self, factor: int, image_shape: tuple[int, ...], measurement_shape: tuple[int, ...], like: Tensor
    ) -> None:
        self._factor = factor
        v = torch.full((factor**2,), 1 / factor, dtype=torch.float64)
        v[0] -= 1.0  # q - e: reflecting at the plane between them swaps them; for factor 1 they are the same
        self._v = (v / v.norm().clamp(min=1e-300)).to(like)
        values = like.new_zeros(*measurement_shape, factor**2)
        values[..., 0] = 1 / factor
        super().__init__(values.flatten(), image_shape, measurement_shape)

    def to_spectrum(self, x: Tensor) -> Tensor:
        """Returns `Q` times each block, `(B, C, h, w, k^2)` flattened."""
        return self._reflect(_blocks(x, self._factor)).flatten(1)

    def to_image(self, c: Tensor) -> Tensor:
        """Returns the blocks `Q c`, put in their places."""
        k = self._factor
        blocks = self._reflect(c.unflatten(1, (*self.measurement_shape, k * k)))
        return blocks.unflatten(-1, (k, k)).transpose(-3, -2).flatten(-2).flatten(-3, -2)

    def _project(self, y: Tensor) -> Tensor:
        return nnf.pad(y[..., None], (0, self._factor**2 - 1)).flatten(1)

    def _expand(self, c: Tensor) -> Tensor:
        return c.unflatten(1, (*self.measurement_shape, -1))[..., 0]

    def _reflect(self, blocks: Tensor) -> Tensor:
        return blocks - 2 * (blocks @ self._v)[..., None] * self._v


class BicubicDownsample(SeparableOperator):
    """Antialiased bicubic downsampling: `y[i] = sum_j k((u_i - j) / f) x[j] / sum`, `u_i = (i + 1/2) f - 1/2`.

    `k` is the cubic convolution kernel with `a = -1/2`, stretched by the factor `f`, so that it is also the low-pass
    filter; outside the image its mirror image is seen, the last pixel repeated. The convention of MATLAB's `imresize`
    and of the resizer in the code of DPS and DAPS. `ceil(size / f)` pixels are left.

    Source: Keys, "Cubic convolution interpolation for digital image processing", IEEE TASSP 29 (1981), Eq. 15.

    Args:
        size: Side of the image in pixels, or (H, W).
        factor: Ratio of the pixel sizes.
        num_channels: Channels of the image.

    Raises:
        InputError: A size or factor below 1.
    """

    def __init__(self, size: int | tuple[int, int] = 256, factor: int = 4, num_channels: int = 1) -> None:
        num_channels, height, width = image_size(size, num_channels, "BicubicDownsample")
        _require_factor(factor, "BicubicDownsample")
        super().__init__(_bicubic_matrix(height, factor), _bicubic_matrix(width, factor), num_channels)
        self.factor = factor

    def baseline(self, y: Tensor) -> Tensor:
        """Returns the bicubic interpolation of `y`, `(B, C, H, W)`."""
        # By the factor, and not to the size, of which it may be no divisor: pixels stay where they are.
        x = nnf.interpolate(y, scale_factor=float(self.factor), mode="bicubic", align_corners=False)
        return x[..., : self.image_shape[1], : self.image_shape[2]]


def _blocks(x: Tensor, factor: int) -> Tensor:
    """Returns the pixels of each block in the last dimension, `(B, C, H / k, W / k, k^2)`."""
    tiles = x.unflatten(-1, (-1, factor)).unflatten(-3, (-1, factor))
    return tiles.transpose(-3, -2).flatten(-2)


def _bicubic_matrix(size: int, factor: int) -> Tensor:
    """Returns the `(ceil(size / factor), size)` matrix of antialiased bicubic downsampling."""
    centres = (torch.arange(-(-size // factor), dtype=torch.float64)[:, None] + 0.5) * factor - 0.5
    indices = (centres - 2 * factor).ceil().long() + torch.arange(4 * factor + 1)
    d = ((centres - indices) / factor).abs()
    near = (1.5 * d - 2.5) * d**2 + 1
    far = ((2.5 - 0.5 * d) * d - 4) * d + 2
    weights = torch.where(d <= 1, near, torch.where(d < 2, far, 0.0))
    return band_matrix(indices, weights / weights.sum(1, keepdim=True), size, "symmetric")


def _require_factor(factor: int, name: str) -> None:
    if factor < 1:
        raise InputError(f"{name}: factor must be at least 1, got {factor}; it is how many pixels become one.")
