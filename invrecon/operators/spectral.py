"""Singular systems `A = U S V^T` without matrices, and the operators that have one."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from invrecon.errors import InputError
from invrecon.operators.base import LinearOperator, _per_sample


class Spectrum(ABC):
    r"""The singular system of an operator, matrix-free: `A = U S V^T`.

    `V` is square and orthogonal on images, `U` orthonormal on the range of `A`, and `S` padded with zeros for the null
    space, so every image has as many coefficients as entries: `A x = U (s * V^T x)`. Coefficients keep whatever order
    `V^T` gives them; `singular_values` has the same. A value of at most `eps max(H, W) max(s)`, eps that of the
    precision, is rounding: it counts as zero (the convention of numpy's `matrix_rank`).

    Attributes:
        singular_values: `s`, shape `(n,)`, non-negative, `n` the number of entries of an image.
        image_shape: Shape of one image.
        measurement_shape: Shape of one measurement.

    Args:
        singular_values: See above; its precision and device are those of the system.
        image_shape: See above.
        measurement_shape: See above.
    """

    def __init__(
        self, singular_values: Tensor, image_shape: tuple[int, ...], measurement_shape: tuple[int, ...]
    ) -> None:
        tolerance = torch.finfo(singular_values.dtype).eps * max(image_shape[1:]) * singular_values.amax()
        self.measured = singular_values > tolerance
        self.singular_values = singular_values * self.measured
        self.image_shape, self.measurement_shape = image_shape, measurement_shape

    @abstractmethod
    def to_spectrum(self, x: Tensor) -> Tensor:
        """Returns `V^T x`: `(B, *image_shape)` to `(B, n)`."""

    @abstractmethod
    def to_image(self, c: Tensor) -> Tensor:
        """Returns `V c`: `(B, n)` to `(B, *image_shape)`."""

    @abstractmethod
    def _project(self, y: Tensor) -> Tensor:
        """Returns `U^T y` `(B, n)`, anything where `S = 0`."""

    @abstractmethod
    def _expand(self, c: Tensor) -> Tensor:
        """Returns `U c`, for `c` `(B, n)` that vanish where `S = 0`."""

    def data_to_spectrum(self, y: Tensor) -> Tensor:
        """Returns `U^T y`, zero where `S = 0`: `(B, *measurement_shape)` to `(B, n)`."""
        return torch.where(self.measured, self._project(y), 0.0)

    def spectrum_to_data(self, c: Tensor) -> Tensor:
        """Returns `U c`, entries where `S = 0` ignored: `(B, n)` to `(B, *measurement_shape)`."""
        return self._expand(torch.where(self.measured, c, 0.0))


class SpectralOperator(LinearOperator):
    """An operator with a singular system, and so with its norm and its proximal map in closed form.

    The pseudo-inverse stays that of the base class, conjugate gradients: early stopping is what makes it bearable for
    a blur, where `V S^+ U^T` amplifies noise by up to `1 / (eps max(H, W))`.
    """

    def __init__(self, image_shape: tuple[int, ...], measurement_shape: tuple[int, ...]) -> None:
        super().__init__(image_shape, measurement_shape)
        self._systems: dict[tuple[torch.device, torch.dtype], Spectrum] = {}

    @abstractmethod
    def _singular_system(self, like: Tensor) -> Spectrum:
        """Returns the singular system with the precision and on the device of `like`."""

    def _system(self, like: Tensor) -> Spectrum:
        key = (like.device, like.dtype)
        if key not in self._systems:
            with torch.inference_mode(False), torch.no_grad():  # it outlives the mode it is first used in
                self._systems[key] = self._singular_system(torch.empty(0, device=like.device, dtype=like.dtype))
        return self._systems[key]

    def spectrum(self) -> Spectrum:
        """Returns the singular system of `A`, made once for each device and precision."""
        return self._system(self._anchor)

    def norm(self) -> float:
        """Returns `||A||_2`, the largest singular value."""
        if "norm" not in self._norm:
            self._norm["norm"] = float(self.spectrum().singular_values.amax())
        return self._norm["norm"]

    def prox(self, x: Tensor, y: Tensor, weight: float | Tensor, *, max_iter: int = 10, tol: float = 0.0) -> Tensor:
        r"""Returns `argmin_z weight/2 ||A z - y||^2 + 1/2 ||z - x||^2`, in closed form.

        `x + V (weight S / (1 + weight S^2)) U^T (y - A x)`; an infinite weight gives `x + A^+ (y - A x)`.

        Args:
            x: Images `(B, *image_shape)`.
            y: Measurements `(B, *measurement_shape)`.
            weight: Non-negative, a float or `(B,)`; its natural unit is `1 / norm()**2`.
            max_iter: Has no say here; solvers that iterate need it.
            tol: Likewise.
        """
        system = self._system(x)
        s = system.singular_values
        weight = _per_sample(torch.as_tensor(weight, dtype=x.dtype, device=x.device), s[None])
        # numerator and denominator divided by max(weight, 1), so that both limits are finite
        identity, data = 1 / weight.clamp(min=1.0), weight.clamp(max=1.0)
        gain = torch.where(system.measured, data * s / torch.where(system.measured, identity + data * s * s, 1.0), 0.0)
        return x + system.to_image(gain * system.data_to_spectrum(y - self(x)))


class Exact:
    """A constant kept in float64 (or complex128) and cast once for each device and precision it is used in.

    So an operator that turns to double precision is exact there: nothing was rounded to float32 before.

    Args:
        value: The constant.
    """

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self._casts: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def to(self, like: Tensor) -> Tensor:
        """Returns the constant with the precision and on the device of `like` (a real tensor)."""
        key = (like.device, like.dtype)
        if key not in self._casts:
            dtype = like.dtype.to_complex() if self.value.is_complex() else like.dtype
            with torch.inference_mode(False), torch.no_grad():  # it outlives the mode it is first used in
                self._casts[key] = self.value.to(like.device, dtype, copy=True)
        return self._casts[key]


def image_size(size: int | tuple[int, int], num_channels: int, name: str) -> tuple[int, int, int]:
    """Returns `(C, H, W)`.

    Args:
        size: Side of the image in pixels, or (H, W).
        num_channels: Channels of the image.
        name: The operator's, for the error.

    Raises:
        InputError: If one of the numbers is below 1.
    """
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    if min(height, width, num_channels) < 1:
        raise InputError(
            f"{name}: size and num_channels must be at least 1, got {height} x {width} pixels and {num_channels} "
            "channels; give the shape of the images."
        )
    return num_channels, height, width
