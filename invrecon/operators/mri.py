"""Magnetic resonance imaging: coil sensitivities, then Fourier samples of every coil's image."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from invrecon.errors import InputError
from invrecon.operators.base import LinearOperator, _per_sample
from invrecon.operators.fourier import (
    channels_to_complex,
    complex_to_channels,
    complex_to_pairs,
    fft2c,
    ifft2c,
    pairs_to_complex,
)
from invrecon.operators.mask import FourierSpectrum, Mask
from invrecon.operators.spectral import Spectrum, image_size

if TYPE_CHECKING:
    from invrecon.data import Case, CaseBatch

T = TypeVar("T", bound="MRI")


class MRI(LinearOperator):
    """`y_c = E (s_c x)`: each coil `c` weighs the image by its sensitivity, then all are encoded alike.

    Images are `(B, 2, H, W)`, real and imaginary channels; measurements are `(B, coils, ..., 2)`, real and imaginary
    parts last. `noise_std` is the standard deviation of each of the two parts. A subclass defines the encoding `E`.

    Maps are normalised, `sum_c |s_c|^2 <= 1` in every pixel (0 outside of the object), so that `||A|| <= ||E||`
    whatever the coils: this bound is what `norm` returns, the same number whatever cases share the batch. Without maps
    there is one coil, of sensitivity 1.

    What differs from case to case arrives by `bind`: the case's `maps`, `(coils, H, W, 2)`, one set a case in a batch.
    A batch of `k` times as many images is taken as `k` samples of each case in a row.

    Args:
        size: Side of the image in pixels, or (H, W).
        encoding_shape: Shape of one coil's samples.
        maps: Sensitivities `(coils, H, W, 2)`, shared by all samples, or `(B, coils, H, W, 2)`.

    Raises:
        InputError: Maps that do not fit the image, have no coil, are not finite or not normalised.
    """

    complex_images = True
    baseline_name = "zero-filled"
    maps: Tensor | None

    def __init__(self, size: int | tuple[int, int], encoding_shape: tuple[int, ...], maps: Tensor | None) -> None:
        image_shape = image_size(size, 2, type(self).__name__)
        super().__init__(image_shape, (1, *encoding_shape, 2))
        self.register_buffer("maps", None, persistent=False)
        if maps is not None:
            self._set_maps(maps)

    @abstractmethod
    def _encode(self, z: Tensor) -> Tensor:
        """Returns `E z`: complex, `(B, coils, H, W)` to `(B, coils, *encoding_shape)`."""

    @abstractmethod
    def _decode(self, y: Tensor) -> Tensor:
        """Returns `E^H y`: complex, `(B, coils, *encoding_shape)` to `(B, coils, H, W)`."""

    @property
    def num_coils(self) -> int:
        """Number of receive coils."""
        return self.measurement_shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """Returns k-space `E S x`, `(B, coils, ..., 2)`, of images `(B, 2, H, W)`."""
        self._check(x, self.image_shape, "images")
        z = channels_to_complex(x)[:, None]
        if self.maps is not None:
            z = times_per_case(z, pairs_to_complex(self.maps))
        return complex_to_pairs(self._encode(z))

    def adjoint(self, y: Tensor) -> Tensor:
        """Returns images `sum_c conj(s_c) E^H y_c`, `(B, 2, H, W)`, of k-space `(B, coils, ..., 2)`."""
        self._check(y, self.measurement_shape, "k-space")
        return complex_to_channels(self._combine(self._decode(pairs_to_complex(y))))

    def bind(self: T, case: Case | CaseBatch) -> T:
        """Returns a copy with the case's maps and noise level.

        Raises:
            InputError: Its maps do not fit, its k-space has another number of coils, or holds NaN or Inf.
        """
        bound = super().bind(case)
        if case.maps is not None:
            bound._set_maps(case.maps.to(self.device, self.dtype))
        if case.measurement is not None:
            bound._check_kspace(case)
        return bound

    def select_cases(self: T, chosen: slice | Tensor, num_cases: int) -> T:
        """Returns the physics of some cases, with their maps; see `LinearOperator.select_cases`."""
        clone = super().select_cases(chosen, num_cases)
        if self.maps is not None and len(self.maps) == num_cases > 1:
            clone.maps = self.maps[chosen]
        return clone

    def _set_maps(self, maps: Tensor) -> None:
        self.maps = check_maps(maps, self.image_shape[1:])
        self.measurement_shape = (self.maps.shape[1], *self.measurement_shape[1:])

    def _combine(self, z: Tensor) -> Tensor:
        """Returns `S^H z`: complex, `(B, coils, H, W)` to `(B, H, W)`."""
        if self.maps is None:
            return z[:, 0]
        return times_per_case(z, pairs_to_complex(self.maps).conj()).sum(1)

    def _check_kspace(self, case: Case | CaseBatch) -> None:
        assert case.measurement is not None
        names = case.id if isinstance(case.id, str) else ", ".join(case.id)
        rank = len(self.measurement_shape)
        shape = tuple(case.measurement.shape[-rank:])
        if shape != self.measurement_shape or case.measurement.ndim < rank:
            wants = "no maps came with it, so one coil is expected" if self.maps is None else "its maps ask for"
            raise InputError(
                f"The k-space of {names} has shape {tuple(case.measurement.shape)}, but {wants} "
                f"{self.measurement_shape} (coils, ..., real and imaginary): give maps of as many coils and pixels, "
                "estimated from this k-space (ESPIRiT, LowResolutionMaps)."
            )
        if not torch.isfinite(case.measurement).all():
            count = int((~torch.isfinite(case.measurement)).sum())
            raise InputError(
                f"The k-space of {names} has {count} NaN or Inf values of {case.measurement.numel()}, expected finite "
                "ones: set those samples to zero and leave them out of the mask."
            )


class CartesianMRI(MRI):
    """Cartesian MRI with one or many coils: `y_c = m F (s_c x)`, `F` the centred orthonormal Fourier transform.

    K-space is `(B, coils, H, W, 2)`, its centre at `(H // 2, W // 2)`, with zeros where nothing was measured; what else
    a measurement holds there is ignored by the adjoint. One coil without maps has its proximal map, pseudo-inverse and
    singular system in closed form, because `A A^T` is the mask; several take conjugate gradients.

    A bound case brings its `maps`, and its `mask` of shape `(H, W)` or, for whole columns, `(1, W)`; a measured one
    also its size.

    Source: Pruessmann et al., "SENSE", MRM 42 (1999), Eqs. 1 to 4, for the model.

    Args:
        size: Side of the image in pixels, or (H, W).
        mask: `(H, W)`, or `(1, W)` for whole columns: non-zero where k-space is measured; everywhere if None.
        maps: Coil sensitivities `(coils, H, W, 2)`; one coil of sensitivity 1 if None.

    Raises:
        InputError: A mask that does not fit the image, or measures nothing; maps as in `MRI`.
    """

    mask: Tensor | None

    def __init__(self, size: int | tuple[int, int] = 256, mask: Mask | None = None, maps: Tensor | None = None) -> None:
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        super().__init__((height, width), (height, width), maps)
        self.register_buffer("mask", None, persistent=False)
        if mask is not None:
            self._set_mask(torch.as_tensor(mask))

    def norm(self) -> float:
        """Returns 1: `||A||` for one coil, an upper bound for several with normalised maps."""
        return 1.0

    def pinv(self, y: Tensor, *, max_iter: int = 50, tol: float = 1e-6) -> Tensor:
        """Returns `A^+ y`: the zero-filled image for one coil, CG-SENSE for several; see `LinearOperator.pinv`."""
        return self.adjoint(y) if self.maps is None else super().pinv(y, max_iter=max_iter, tol=tol)

    def prox(self, x: Tensor, y: Tensor, weight: float | Tensor, *, max_iter: int = 10, tol: float = 0.0) -> Tensor:
        """Returns `argmin_z weight/2 ||A z - y||^2 + 1/2 ||z - x||^2`; see `LinearOperator.prox`.

        One coil has `x + weight / (1 + weight) A^T (y - A x)`, as `A A^T` is a projection.
        """
        if self.maps is not None:
            return super().prox(x, y, weight, max_iter=max_iter, tol=tol)
        weight = _per_sample(torch.as_tensor(weight, dtype=x.dtype, device=x.device), x)
        identity, data = 1 / weight.clamp(min=1.0), weight.clamp(max=1.0)  # divided by max(weight, 1): inf is fine
        return x + data / (identity + data) * self.adjoint(y - self(x))

    def spectrum(self) -> Spectrum:
        """Returns the singular system of one coil: `V^T = F`, and `S` is the mask.

        Raises:
            InputError: There are coil maps, or cases with masks of their own in one batch.
        """
        if self.maps is not None:
            return super().spectrum()
        mask = self._anchor.new_ones(1, *self.image_shape[1:]) if self.mask is None else self.mask[:, 0]
        if not (mask == mask[:1]).all():
            raise InputError(
                "Spectral methods such as DDRM and DDNM+ take one mask for all cases of a batch, these have masks of "
                "their own: set data.batch_size to 1, or use ProximalDiffusion."
            )
        return KSpaceSpectrum(mask[0].expand(self.image_shape[1:]), self.image_shape)

    def baseline(self, y: Tensor) -> Tensor:
        """Returns the zero-filled image, coils combined: `A^T y`."""
        return self.adjoint(y)

    def select_cases(self: C, chosen: slice | Tensor, num_cases: int) -> C:
        """Returns the physics of some cases, with their maps and masks; see `LinearOperator.select_cases`."""
        clone = super().select_cases(chosen, num_cases)
        if self.mask is not None and len(self.mask) == num_cases > 1:
            clone.mask = self.mask[chosen]
        return clone

    def restrict(self, y: Tensor) -> Tensor:
        """Returns `y` with zeros off the mask (simulated noise, say, falls there too)."""
        y = super().restrict(y)
        return y if self.mask is None else times_per_case(y, self.mask[..., None])

    def bind(self: C, case: Case | CaseBatch) -> C:
        """Returns a copy with the case's maps, mask and noise level, of the size of its k-space if it has one.

        Raises:
            InputError: As in `MRI.bind`, or the mask does not fit.
        """
        resized = self
        if case.measurement is not None and case.measurement.ndim >= 4:
            size = tuple(case.measurement.shape[-3:-1])
            if size != self.image_shape[1:]:
                resized = type(self)(size).to(self.device, self.dtype)  # type: ignore[arg-type]
        bound = super(CartesianMRI, resized).bind(case)
        if case.mask is not None:
            bound._set_mask(case.mask)
        return bound

    def _set_mask(self, mask: Tensor) -> None:
        self.mask = check_mask(mask, self.image_shape[1:]).to(self.device, self.dtype)

    def _encode(self, z: Tensor) -> Tensor:
        y = fft2c(z)
        return y if self.mask is None else times_per_case(y, self.mask)

    def _decode(self, y: Tensor) -> Tensor:
        return ifft2c(y if self.mask is None else times_per_case(y, self.mask))


C = TypeVar("C", bound=CartesianMRI)


class KSpaceSpectrum(FourierSpectrum):
    """A Fourier mask's singular system with measurements `(1, H, W, 2)`: `U` moves real and imaginary parts last."""

    def __init__(self, mask: Tensor, image_shape: tuple[int, ...]) -> None:
        super().__init__(mask, image_shape)
        self.measurement_shape = (1, *image_shape[1:], 2)

    def _project(self, y: Tensor) -> Tensor:
        return y[:, 0].movedim(-1, 1).flatten(1)

    def _expand(self, c: Tensor) -> Tensor:
        return c.unflatten(1, self.image_shape).movedim(1, -1)[:, None]


def times_per_case(z: Tensor, factor: Tensor) -> Tensor:
    """Returns `z`, sample by sample, times the factor of its case.

    Args:
        z: `(k cases, ...)`, `k` samples of each case in a row.
        factor: `(cases, ...)`; a single one serves all.

    Raises:
        InputError: A number of samples that is no multiple of the number of cases.
    """
    if len(factor) == 1:
        return z * factor
    if len(z) % len(factor):
        raise InputError(
            f"A batch of {len(z)} does not divide among {len(factor)} cases with maps or masks of their own; bind the "
            "operator to these cases."
        )
    return (z.unflatten(0, (len(factor), -1)) * factor[:, None]).flatten(0, 1)


def check_maps(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """Returns maps as `(cases, coils, H, W, 2)`.

    Raises:
        InputError: They do not fit images of `size`, have no coil, are not finite or not normalised.
    """
    shape = tuple(maps.shape)
    if maps.ndim not in (4, 5) or shape[-3:] != (*size, 2) or maps.is_complex():
        raise InputError(
            f"Coil maps of shape {shape} ({maps.dtype}) do not fit images of {size[0]} x {size[1]} pixels: expected "
            f"real (coils, {size[0]}, {size[1]}, 2), real and imaginary parts last."
        )
    if shape[-4] < 1:
        raise InputError(f"Coil maps of shape {shape} have zero coils; give at least one, or none at all (maps null).")
    if not torch.isfinite(maps).all():
        raise InputError(f"Coil maps of shape {shape} hold NaN or Inf; set those pixels to zero.")
    largest = float(maps.square().sum((-4, -1)).amax())
    if largest > 1 + 2e-3:  # room for half precision on disk
        raise InputError(
            f"Coil maps reach sum_c |s_c|^2 = {largest:.4g}, expected at most 1: divide them by their root sum of "
            "squares (normalise_maps), which moves that factor into the image."
        )
    return maps if maps.ndim == 5 else maps[None]


def check_mask(mask: Tensor, size: tuple[int, ...]) -> Tensor:
    """Returns a mask of zeros and ones as `(cases, 1, H or 1, W)`, float32.

    Raises:
        InputError: It does not fit k-space of `size`, is not finite, or measures nothing.
    """
    height, width = size
    shape = tuple(mask.shape)
    if mask.ndim not in (2, 3) or shape[-1] != width or shape[-2] not in (1, height):
        raise InputError(
            f"A mask of shape {shape} does not fit k-space of {height} x {width} samples: expected ({height}, "
            f"{width}), or (1, {width}) for whole columns."
        )
    if mask.is_floating_point() and not torch.isfinite(mask).all():
        raise InputError(f"The mask of shape {shape} holds NaN or Inf; it should be zero or one.")
    kept = mask != 0
    if math.prod(shape) == 0 or not kept.flatten(-2).any(-1).all():
        raise InputError(f"The mask of shape {shape} measures nothing: at least one entry must be non-zero.")
    return (kept if mask.ndim == 3 else kept[None])[:, None].float()
