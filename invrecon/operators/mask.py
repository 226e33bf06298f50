"""Masks: some pixels (inpainting) or some spatial frequencies (single-coil MRI) are measured, the others are not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from invrecon.errors import InputError
from invrecon.operators.fourier import channels_to_complex, complex_to_channels, fft2c, ifft2c
from invrecon.operators.spectral import Exact, SpectralOperator, Spectrum, image_size
from invrecon.rng import make_generator

Mask = Sequence[Sequence[float]] | Tensor


class Inpainting(SpectralOperator):
    """`y = m x`, pixel by pixel: measurements are images with zeros where nothing was measured.

    What a measurement holds off the mask (noise, say) tells nothing and is ignored by the adjoint.

    Args:
        mask: `(H, W)`, non-zero where a pixel is measured, in all channels alike.
        num_channels: Channels of the image.

    Raises:
        InputError: A mask that is no matrix or measures nothing.
    """

    def __init__(self, mask: Mask, num_channels: int = 1) -> None:
        from scipy.ndimage import distance_transform_edt  # here, so that importing the package does not wait for it

        kept = _mask_matrix(mask, type(self).__name__)
        shape = image_size(tuple(kept.shape), num_channels, type(self).__name__)  # type: ignore[arg-type]
        super().__init__(shape, shape)
        self._mask = Exact(kept.double())
        nearest = distance_transform_edt(~kept.numpy(), return_distances=False, return_indices=True)
        rows, columns = torch.from_numpy(nearest).long()
        self._nearest = rows * shape[2] + columns

    def forward(self, x: Tensor) -> Tensor:
        """Returns `m x`, `(B, C, H, W)`."""
        self._check(x, self.image_shape, "images")
        return self._mask.to(x) * x

    def adjoint(self, y: Tensor) -> Tensor:
        """Returns `m y`, `(B, C, H, W)`."""
        self._check(y, self.measurement_shape, "measurements")
        return self._mask.to(y) * y

    def restrict(self, y: Tensor) -> Tensor:
        """Returns `y` with zeros off the mask."""
        return self._mask.to(y) * super().restrict(y)

    def baseline(self, y: Tensor) -> Tensor:
        """Returns `y` with each missing pixel filled by the nearest one that was measured."""
        return y.flatten(-2)[..., self._nearest.to(y.device)]

    def _singular_system(self, like: Tensor) -> Spectrum:
        return MaskSpectrum(self._mask.to(like), self.image_shape)


class BoxInpainting(Inpainting):
    """A rectangle of the image is missing.

    Source: the box of DPS (Chung et al., ICLR 2023) and DAPS (Zhang et al., CVPR 2025), 128 of 256 pixels; theirs is
    put at random, this one where it is told.

    Args:
        size: Side of the image in pixels, or (H, W).
        box: Side of the missing box in pixels, or (H, W).
        corner: Row and column of its first pixel; None centres it.
        num_channels: Channels of the image.

    Raises:
        InputError: A box that does not lie within the image, or covers all of it.
    """

    def __init__(
        self,
        size: int | tuple[int, int] = 256,
        box: int | tuple[int, int] = 128,
        corner: tuple[int, int] | None = None,
        num_channels: int = 1,
    ) -> None:
        _, height, width = image_size(size, num_channels, "BoxInpainting")
        rows, columns = (box, box) if isinstance(box, int) else tuple(box)
        top, left = ((height - rows) // 2, (width - columns) // 2) if corner is None else tuple(corner)
        if min(top, left) < 0 or min(rows, columns) < 1 or top + rows > height or left + columns > width:
            raise InputError(
                f"BoxInpainting: a box of {rows} x {columns} pixels at ({top}, {left}) does not lie within an image "
                f"of {height} x {width}; make it smaller or move it."
            )
        mask = torch.ones(height, width)
        mask[top : top + rows, left : left + columns] = 0
        super().__init__(mask, num_channels)


class RandomInpainting(Inpainting):
    """Pixels drawn at random are missing, exactly the fraction asked for, the same in all channels.

    Source: Zhang et al., DAPS, CVPR 2025 (70 % missing; the text of DPS has 92 %).

    Args:
        size: Side of the image in pixels, or (H, W).
        fraction: Share of the pixels that is missing.
        seed: Which pixels.
        num_channels: Channels of the image.

    Raises:
        InputError: A fraction outside [0, 1), or one that leaves no pixel.
    """

    def __init__(
        self,
        size: int | tuple[int, int] = 256,
        fraction: float = 0.7,
        seed: int = 0,
        num_channels: int = 1,
    ) -> None:
        _, height, width = image_size(size, num_channels, "RandomInpainting")
        if not 0 <= fraction < 1:
            raise InputError(
                f"RandomInpainting: fraction is the share of missing pixels, in [0, 1), got {fraction}; "
                "0.7 leaves 30 % of them."
            )
        mask = torch.ones(height * width)
        order = torch.randperm(height * width, generator=make_generator(seed, "RandomInpainting"))
        mask[order[: round(fraction * height * width)]] = 0
        super().__init__(mask.reshape(height, width), num_channels)


class FourierMask(SpectralOperator):
    """Single-coil MRI: `y = m F x`, with `F` the centred orthonormal Fourier transform of complex images.

    `F = shift fft2 ishift`: the image's centre, pixel `(H//2, W//2)`, is the origin, and so is that entry of k-space;
    right for odd sizes too. Real and imaginary parts are two real channels on both sides. Measurements are whole
    k-spaces with zeros where nothing was measured; what else they hold there is ignored by the adjoint.

    Args:
        mask: `(H, W)`, non-zero where k-space is measured, its centre at `(H//2, W//2)`.

    Raises:
        InputError: A mask that is no matrix or measures nothing.
    """

    complex_images = True
    baseline_name = "zero-filled"

    def __init__(self, mask: Mask) -> None:
        kept = _mask_matrix(mask, "FourierMask")
        super().__init__((2, *kept.shape), (2, *kept.shape))
        self._mask = Exact(kept.double())

    def forward(self, x: Tensor) -> Tensor:
        """Returns k-spaces `m F x`, `(B, 2, H, W)`."""
        self._check(x, self.image_shape, "images")
        return self._mask.to(x) * complex_to_channels(fft2c(channels_to_complex(x)))

    def adjoint(self, y: Tensor) -> Tensor:
        """Returns the images `F^H m y` of zero-filled k-spaces, `(B, 2, H, W)`."""
        self._check(y, self.measurement_shape, "measurements")
        return complex_to_channels(ifft2c(channels_to_complex(self._mask.to(y) * y)))

    def restrict(self, y: Tensor) -> Tensor:
        """Returns `y` with zeros off the mask."""
        return self._mask.to(y) * super().restrict(y)

    def baseline(self, y: Tensor) -> Tensor:
        """Returns the zero-filled reconstruction, which is also `A^+ y`."""
        return self.adjoint(y)

    def _singular_system(self, like: Tensor) -> Spectrum:
        return FourierSpectrum(self._mask.to(like), self.image_shape)


class MaskSpectrum(Spectrum):
    """A mask's singular system: `U = V = I`, and `S` is the mask.

    Args:
        mask: `(H, W)`, zeros and ones.
        image_shape: `(C, H, W)`.
    """

    def __init__(self, mask: Tensor, image_shape: tuple[int, ...]) -> None:
        super().__init__(mask.flatten().repeat(image_shape[0]), image_shape, image_shape)

    def to_spectrum(self, x: Tensor) -> Tensor:
        """Returns `x`, flattened."""
        return x.flatten(1)

    def to_image(self, c: Tensor) -> Tensor:
        """Returns the image of pixels `c`."""
        return c.unflatten(1, self.image_shape)

    def _project(self, y: Tensor) -> Tensor:
        return y.flatten(1)

    def _expand(self, c: Tensor) -> Tensor:
        return c.unflatten(1, self.measurement_shape)


class FourierSpectrum(MaskSpectrum):
    """A Fourier mask's singular system: `V^T = F` on real and imaginary parts, `U = I`, and `S` is the mask."""

    def to_spectrum(self, x: Tensor) -> Tensor:
        """Returns `F x`, flattened: all real parts, then all imaginary parts."""
        return complex_to_channels(fft2c(channels_to_complex(x))).flatten(1)

    def to_image(self, c: Tensor) -> Tensor:
        """Returns `F^H c`."""
        return complex_to_channels(ifft2c(channels_to_complex(c.unflatten(1, self.image_shape))))


def _mask_matrix(mask: Mask, name: str) -> Tensor:
    """Returns the mask as a boolean matrix on the CPU."""
    kept = torch.as_tensor(mask).detach().cpu() != 0
    if kept.ndim != 2 or not kept.any():
        raise InputError(
            f"{name}: the mask must be a matrix (H, W) with at least one non-zero entry, got shape "
            f"{tuple(kept.shape)} with {int(kept.sum())} of them."
        )
    return kept
