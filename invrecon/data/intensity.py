"""The scale on which priors and operators see an image, and the way back to physical units."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from invrecon.errors import InputError


@dataclass(frozen=True)
class Intensity:
    """An affine, clipped intensity scale: `x = clip((u - offset) / scale, 0, 1)`.

    The default is the project's CT scale, `x = clip((HU + 1000) / 3000, 0, 1)`: air is 0, water 1/3 and
    dense bone (2000 HU) 1. It travels with every prior and measurement file, and a mismatch is refused.

    Attributes:
        offset: The value `u` that maps to 0, in `units`.
        scale: The width of the range that maps to [0, 1], in `units`.
        units: The physical unit of `u`.

    Raises:
        InputError: If `scale` is not positive.
    """

    offset: float = -1000.0
    scale: float = 3000.0
    units: str = "HU"

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise InputError(f"The intensity scale is {self.scale}, expected a positive number.")

    def encode(self, values: Tensor) -> Tensor:
        """Returns `x = clip((values - offset) / scale, 0, 1)`."""
        return ((values - self.offset) / self.scale).clamp(0.0, 1.0)

    def decode(self, x: Tensor) -> Tensor:
        """Returns `offset + scale * x` in `units`; the inverse of `encode` where that did not clip."""
        return self.offset + self.scale * x


HOUNSFIELD = Intensity()
RGB = Intensity(offset=0.0, scale=255.0, units="8 bit")  # natural images
MAGNITUDE = Intensity(offset=0.0, scale=1.0, units="a.u.")  # of complex images; each case brings a scale of its own
