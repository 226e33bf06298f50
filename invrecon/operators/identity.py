"""The operator that measures the image itself: denoising, and the shape that unconditional samples have."""

from __future__ import annotations

from torch import Tensor

from invrecon.operators.base import LinearOperator


class Identity(LinearOperator):
    """`A = I`.

    Args:
        size: Side of the image in pixels, or (H, W).
        num_channels: Channels of the image.
        complex_images: Whether two channels are the parts of complex numbers.
    """

    def __init__(self, size: int | tuple[int, int] = 256, num_channels: int = 1, complex_images: bool = False) -> None:
        height, width = (size, size) if isinstance(size, int) else size
        super().__init__((num_channels, height, width), (num_channels, height, width))
        self.complex_images = complex_images

    def forward(self, x: Tensor) -> Tensor:
        """Returns `x`."""
        self._check(x, self.image_shape, "images")
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        """Returns `y`."""
        self._check(y, self.measurement_shape, "measurements")
        return y

    def norm(self) -> float:
        """Returns 1."""
        return 1.0

    def baseline(self, y: Tensor) -> Tensor:
        """Returns `y`."""
        return y
