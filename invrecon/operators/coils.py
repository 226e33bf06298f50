"""Receive coils: sensitivity maps estimated from calibration data or simulated, and pre-whitening of their noise."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as nnf

from invrecon.errors import InputError
from invrecon.operators.fourier import complex_to_pairs, ifft2c, pairs_to_complex
from invrecon.operators.sampling import calibration_region

Size = tuple[int, int]
LEAST_ACS = 4  # side of the calibration region
# Share of the calibration image's energy that may lie where the maps are zero: good maps of a measured head leave out
# up to 0.011, maps of 6 x 6 samples 0.98.
MOST_LOST = 0.1


class CoilMaps(ABC):
    """Estimates coil sensitivities from the fully sampled centre of k-space: `(k-space, mask) -> maps`.

    Maps are normalised, `sum_c |s_c|^2 = 1`, or 0 where there is no object. Their common phase is free and is chosen
    such that the combination of coils that receives most of the signal is real and positive: the image keeps the rest.

    Args:
        max_acs: Calibration regions are cut to this side [samples]: maps are smooth, and more costs time.

    Raises:
        InputError: A side below 1.
    """

    def __init__(self, max_acs: int = 24) -> None:
        if max_acs < 1:
            raise InputError(f"{type(self).__name__}: max_acs must be at least 1, got {max_acs}.")
        self.max_acs = max_acs

    def __call__(self, kspace: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns maps `(coils, H, W, 2)`.

        Args:
            kspace: `(coils, H, W, 2)`; only its calibration region is used.
            mask: `(H, W)` or `(1, W)`, what was measured; taken from the non-zero samples of k-space if None.

        Raises:
            InputError: K-space of another shape, without coils, with NaN or Inf, or without a calibration region.
        """
        z = _complex_kspace(kspace)
        size = (z.shape[1], z.shape[2])
        kept = (z != 0).any(0) if mask is None else torch.as_tensor(mask) != 0
        if kept.ndim != 2 or kept.shape[-1] != size[1] or kept.shape[-2] not in (1, size[0]):
            raise InputError(
                f"A mask of shape {tuple(kept.shape)} does not fit k-space of {size[0]} x {size[1]} samples: expected "
                f"({size[0]}, {size[1]}), or (1, {size[1]}) for whole columns."
            )
        rows, columns = calibration_region(kept.expand(size))
        acs = (rows.stop - rows.start, columns.stop - columns.start)
        if min(acs) < min(LEAST_ACS, *size):
            raise InputError(
                f"{type(self).__name__} needs at least the central {LEAST_ACS} x {LEAST_ACS} samples of k-space (ACS), "
                f"this mask has {acs[0]} x {acs[1]} of them: sample the centre, or see that the k-space is centred."
            )
        rows, columns = _central(rows, self.max_acs), _central(columns, self.max_acs)
        if not z[:, rows, columns].any():
            raise InputError(
                "The calibration region (ACS) of the k-space is zero throughout, so there is nothing to estimate coil "
                "maps from: see that the k-space is centred."
            )
        maps = self._estimate(z, rows, columns)
        centre = torch.zeros_like(z)
        centre[:, rows, columns] = z[:, rows, columns]
        energy = ifft2c(centre).abs().square().sum(0)
        lost = float(energy[~maps.any(0)].sum() / energy.sum())
        if lost > MOST_LOST:
            warnings.warn(
                f"The maps of {type(self).__name__} are zero where {lost:.0%} of the energy of the calibration image "
                "is, and so will the image be: lower kernel_size or crop, or measure more of the centre of k-space.",
                stacklevel=2,
            )
        return complex_to_pairs(maps)

    @abstractmethod
    def _estimate(self, z: Tensor, rows: slice, columns: slice) -> Tensor:
        """Returns complex maps `(coils, H, W)` of complex k-space, from its `rows` and `columns`."""


def aligned_maps(maps: Tensor, others: Tensor) -> Tensor:
    """Returns other maps `(coils, H, W, 2)` of the same coils with the common phase that `maps` have, where they do.

    Images combined by either then have one phase: `others` times `conj(p) / |p|`, `p = sum_c others_c conj(maps_c)`.
    """
    z, w = pairs_to_complex(others), pairs_to_complex(maps)
    return complex_to_pairs(z * torch.exp(-1j * (z * w.conj()).sum(0).angle()))


class ESPIRiT(CoilMaps):
    r"""Sensitivities as eigenvectors of the projection onto the signal space of calibration patches.

    Patches of `k x k` samples of all coils, slid over the ACS, span a space of low rank; `P` projects onto it. K-space
    is unchanged by projecting every patch and averaging: a convolution, so pixel by pixel a `coils x coils` matrix

        G(r) = 1 / k^2  sum_m [sum_{j - l = m} P_{jl}] exp(2 pi i m . r / N),    G(r) s(r) = lambda(r) s(r)

    with `lambda = 1` where there is signal. The eigenvector of the largest eigenvalue is the map; where it falls below
    `crop` the map is 0. Of calibration regions below `k + 2` samples there are too few patches: maps are then
    `LowResolutionMaps`, with a warning.

    Source: Uecker et al., "ESPIRiT", MRM 71 (2014), 990-1001, Eqs. 5 to 17.

    Args:
        kernel_size: `k`, side of the patches in samples.
        threshold: Singular values of the calibration matrix below this share of the largest one are noise.
        crop: Smallest eigenvalue of a pixel with signal; 0 gives maps everywhere.
        max_acs: As in `CoilMaps`.

    Raises:
        InputError: A size or threshold out of range.
    """

    def __init__(self, kernel_size: int = 6, threshold: float = 0.02, crop: float = 0.9, max_acs: int = 24) -> None:
        if not 1 <= kernel_size <= max_acs - 2:
            raise InputError(
                f"ESPIRiT needs 1 <= kernel_size <= max_acs - 2, got {kernel_size} and {max_acs}; 6 and 24 are common."
            )
        if not 0 < threshold < 1 or not 0 <= crop < 1:
            raise InputError(f"ESPIRiT: threshold must lie in (0, 1) and crop in [0, 1), got {threshold} and {crop}.")
        super().__init__(max_acs)
        self.kernel_size, self.threshold, self.crop = kernel_size, float(threshold), float(crop)

    def _estimate(self, z: Tensor, rows: slice, columns: slice) -> Tensor:
        _, *size = z.shape
        acs = z[:, rows, columns]
        least = self.kernel_size + 2
        if min(acs.shape[1:]) < min(least, *size):
            warnings.warn(
                f"ESPIRiT with kernels of {self.kernel_size} needs the central {least} x {least} samples of k-space "
                f"(ACS), this mask has {acs.shape[1]} x {acs.shape[2]} of them: coil maps are LowResolutionMaps, which "
                "are blurred at edges. Sample more of the centre, or lower kernel_size.",
                stacklevel=3,
            )
            return LowResolutionMaps(min(self.crop, 0.05), self.max_acs)._estimate(z, rows, columns)
        values, vectors = torch.linalg.eigh(self._matrices(self._projection(acs), size).to(z.dtype))
        maps = _fix_phase(vectors[..., -1].movedim(-1, 0), acs)
        return maps * (values[..., -1] >= self.crop)

    def _projection(self, acs: Tensor) -> Tensor:
        """Returns `P`, `(coils, k^2, coils, k^2)`, complex128: onto the span of the calibration patches."""
        k, num_coils = self.kernel_size, len(acs)
        kernel = (min(k, acs.shape[1]), min(k, acs.shape[2]))
        patches = acs.to(torch.complex128).unfold(1, kernel[0], 1).unfold(2, kernel[1], 1)
        patches = patches.permute(0, 3, 4, 1, 2).reshape(num_coils * kernel[0] * kernel[1], -1)
        values, vectors = torch.linalg.eigh(patches @ patches.mH)  # squared singular values, in rising order
        signal = vectors[:, values > self.threshold**2 * values[-1]]
        return (signal @ signal.mH).reshape(num_coils, *kernel, num_coils, *kernel)

    def _matrices(self, projection: Tensor, size: list[int]) -> Tensor:
        """Returns `G`, `(H, W, coils, coils)`, Hermitian."""
        num_coils, k_rows, k_columns = projection.shape[:3]
        taps = projection.permute(0, 3, 1, 2, 4, 5).reshape(num_coils**2, -1)  # (c d, j l)
        index = []
        for num, axis in ((k_rows, 0), (k_columns, 1)):
            j = torch.arange(num, device=taps.device)
            index.append((j[:, None] - j + size[axis] // 2) % size[axis])
        flat = index[0][:, None, :, None] * size[1] + index[1][None, :, None, :]
        grid = taps.new_zeros(num_coils**2, size[0] * size[1]).index_add_(1, flat.flatten(), taps)
        matrices = ifft2c(grid.reshape(-1, *size)) * (math.sqrt(math.prod(size)) / (k_rows * k_columns))
        return matrices.movedim(0, -1).unflatten(-1, (num_coils, num_coils))


class LowResolutionMaps(CoilMaps):
    """Images of the calibration region, divided by their root sum of squares: needs little data, blurs at edges.

    The region is tapered by a Hann window against ringing.

    Source: Pruessmann et al., "SENSE", MRM 42 (1999), Sec. "Sensitivity maps"; McKenzie et al., MRM 47 (2002).

    Args:
        crop: Pixels whose root sum of squares is below this share of the largest have map 0.
        max_acs: As in `CoilMaps`.
    """

    def __init__(self, crop: float = 0.05, max_acs: int = 24) -> None:
        super().__init__(max_acs)
        _check_crop(self, crop)
        self.crop = float(crop)

    def _estimate(self, z: Tensor, rows: slice, columns: slice) -> Tensor:
        images = _low_resolution_images(z, rows, columns)
        strength = images.abs().square().sum(0).sqrt()
        maps = images / strength.clamp(min=torch.finfo(strength.dtype).tiny)
        return _fix_phase(maps, z[:, rows, columns]) * (strength >= self.crop * strength.amax())


class WalshMaps(CoilMaps):
    """The dominant eigenvector of the coils' covariance around each pixel, in images of the calibration region.

    Source: Walsh, Gmitro & Marcellin, MRM 43 (2000), 682-690, Eq. 14 with white noise (pre-whiten first).

    Args:
        block: Side of the neighbourhood in pixels, odd.
        crop: As in `LowResolutionMaps`.
        max_acs: As in `CoilMaps`.
    """

    def __init__(self, block: int = 7, crop: float = 0.05, max_acs: int = 24) -> None:
        super().__init__(max_acs)
        if block < 1 or block % 2 == 0:
            raise InputError(f"WalshMaps: block must be odd and at least 1, got {block}.")
        _check_crop(self, crop)
        self.block, self.crop = block, float(crop)

    def _estimate(self, z: Tensor, rows: slice, columns: slice) -> Tensor:
        images = _low_resolution_images(z, rows, columns)
        outer = (images[:, None] * images[None].conj()).flatten(0, 1)
        pooled = (
            nnf.avg_pool2d(part[None], self.block, 1, self.block // 2, count_include_pad=False)[0]
            for part in (outer.real, outer.imag)
        )
        covariance = torch.complex(*pooled).movedim(0, -1).unflatten(-1, (len(z), len(z)))
        _, vectors = torch.linalg.eigh(covariance)
        strength = images.abs().square().sum(0).sqrt()
        maps = _fix_phase(vectors[..., -1].movedim(-1, 0), z[:, rows, columns])
        return maps * (strength >= self.crop * strength.amax())


def normalise_maps(maps: Tensor) -> Tensor:
    """Returns maps `(..., coils, H, W, 2)` divided by their root sum of squares, 0 where all coils are."""
    strength = maps.square().sum((-4, -1), keepdim=True).sqrt()
    return torch.where(strength > 0, maps / strength, torch.zeros_like(maps))


def simulated_maps(num_coils: int, size: Size, generator: torch.Generator, radius: float = 1.75) -> Tensor:
    """Returns normalised smooth maps `(coils, H, W, 2)` of loops around the image, as those of a birdcage.

        s_c(r) ~ exp(i angle(r - r_c)) / |r - r_c|^2

    with the loops `r_c` evenly on a ring, turned and shifted at random, each with a random phase.

    Args:
        num_coils: Number of coils.
        size: `(H, W)`.
        generator: The case's.
        radius: Of the ring, in units of half the image's sides; its corners are at sqrt 2.

    Raises:
        InputError: No coil, or a ring that runs through the image.
    """
    if num_coils < 1:
        raise InputError(f"Simulated coils: num_coils must be at least 1, got {num_coils}.")
    if not 1.45 <= radius < math.inf:
        raise InputError(f"Simulated coils: radius must be at least 1.45 to lie outside of the image, got {radius}.")
    draws = torch.rand(3, num_coils, generator=generator, dtype=torch.float64)
    angle = 2 * math.pi * (torch.arange(num_coils) + draws[0, 0] + 0.3 * (draws[1] - 0.5)) / num_coils
    rows, columns = unit_coordinates(size)
    z = torch.complex(columns.expand(size), rows.expand(size)) - torch.polar(
        torch.full_like(angle, radius), angle
    ).reshape(-1, 1, 1)
    phases = torch.polar(torch.ones_like(angle), 2 * math.pi * draws[2]).reshape(-1, 1, 1)
    return normalise_maps(complex_to_pairs(phases * z / z.abs() ** 3)).float()


def smooth_phase(size: Size, generator: torch.Generator, strength: float = math.pi / 2) -> Tensor:
    """Returns a smooth random phase `(H, W)` [rad]: a constant, and a random sum of low-order Legendre polynomials.

    Args:
        size: `(H, W)`.
        generator: The case's.
        strength: Standard deviation of each of the polynomials' weights [rad].
    """
    rows, columns = unit_coordinates(size)
    constant = 2 * math.pi * torch.rand((), generator=generator, dtype=torch.float64)
    weights = strength * torch.randn(5, generator=generator, dtype=torch.float64)
    terms = (rows, columns, rows * columns, (3 * rows**2 - 1) / 2, (3 * columns**2 - 1) / 2)
    phase = constant + sum(w * term for w, term in zip(weights, terms, strict=True))
    return phase.expand(size).float()


def with_phase(magnitude: Tensor, phase: Tensor) -> Tensor:
    """Returns images `(..., 2, H, W)` of magnitudes and phases [rad] `(..., H, W)`."""
    return torch.stack((magnitude * phase.cos(), magnitude * phase.sin()), -3)


def noise_covariance(noise: Tensor) -> Tensor:
    """Returns `E[n n^H] / 2`, `(coils, coils, 2)`, of samples `(coils, ..., 2)` measured without signal.

    The diagonal is the variance of each real component of a coil's noise.

    Raises:
        InputError: Fewer samples than coils, or NaN or Inf.
    """
    samples = pairs_to_complex(noise).flatten(1)
    if samples.shape[1] < len(samples) or len(samples) < 1 or not torch.isfinite(noise).all():
        raise InputError(
            f"Noise samples of shape {tuple(noise.shape)}: expected finite (coils, ..., 2), more samples than coils; "
            "measure longer, or drop the samples that are not finite."
        )
    samples = samples.to(torch.complex128)
    return complex_to_pairs(samples @ samples.mH / (2 * samples.shape[1])).to(noise.dtype)


def prewhiten(kspace: Tensor, covariance: Tensor) -> Tensor:
    """Returns `L^-1 y` over the coils, `L L^H` the covariance: uncorrelated noise of standard deviation 1.

    Source: Pruessmann et al., MRM 46 (2001), Eqs. 16 to 18.

    Args:
        kspace: `(..., coils, H, W, 2)`.
        covariance: `(coils, coils, 2)`, per real component (`noise_covariance`).

    Raises:
        InputError: A covariance that does not fit, or is not positive definite.
    """
    num_coils = kspace.shape[-4] if kspace.ndim >= 4 else -1
    if tuple(covariance.shape) != (num_coils, num_coils, 2):
        raise InputError(
            f"A noise covariance of shape {tuple(covariance.shape)} does not fit k-space of shape "
            f"{tuple(kspace.shape)}: expected (coils, coils, 2) and (..., coils, H, W, 2)."
        )
    factor, failed = torch.linalg.cholesky_ex(pairs_to_complex(covariance).to(torch.complex128))
    if failed or not torch.isfinite(torch.view_as_real(factor)).all():
        raise InputError(
            f"The noise covariance of {num_coils} coils is not positive definite: measure more noise samples, or leave "
            "out coils that are copies of others."
        )
    whitener = torch.linalg.inv(factor).to(kspace.dtype.to_complex())
    return complex_to_pairs(torch.einsum("cd,...dhw->...chw", whitener, pairs_to_complex(kspace)))


def unit_coordinates(size: Size) -> tuple[Tensor, Tensor]:
    """Returns rows `(H, 1)` and columns `(1, W)`: 0 at the image's centre, +-1 at its edges, float64."""
    rows, columns = ((2 * torch.arange(num, dtype=torch.float64) + 1) / num - 1 for num in size)
    return rows[:, None], columns[None]


def _complex_kspace(kspace: Tensor) -> Tensor:
    shape = tuple(kspace.shape)
    if kspace.ndim != 4 or shape[-1] != 2 or kspace.is_complex():
        raise InputError(
            f"K-space of shape {shape} ({kspace.dtype}) was given, expected one slice, real (coils, H, W, 2) with real "
            "and imaginary parts last."
        )
    if 0 in shape:
        raise InputError(f"K-space of shape {shape} has zero coils or samples; see that the file holds this slice.")
    if not torch.isfinite(kspace).all():
        raise InputError(
            f"K-space of shape {shape} holds {int((~torch.isfinite(kspace)).sum())} NaN or Inf values; set those "
            "samples to zero and leave them out of the mask."
        )
    return pairs_to_complex(kspace)


def _low_resolution_images(z: Tensor, rows: slice, columns: slice) -> Tensor:
    """Returns complex images `(coils, H, W)` of the calibration region, Hann-tapered about the centre of k-space."""
    tapers = []
    for region, num in ((rows, z.shape[1]), (columns, z.shape[2])):
        distance = (torch.arange(num, device=z.device, dtype=z.real.dtype) - num // 2).abs()
        half = min(num // 2 - region.start, region.stop - 1 - num // 2) + 1
        tapers.append(torch.cos(math.pi / 2 * (distance / half).clamp(max=1)).square())
    return ifft2c(z * (tapers[0][:, None] * tapers[1]))


def _fix_phase(maps: Tensor, acs: Tensor) -> Tensor:
    """Returns maps `(coils, H, W)` turned in each pixel so that the ACS's principal combination of them is positive."""
    samples = acs.flatten(1).to(torch.complex128)
    _, vectors = torch.linalg.eigh(samples @ samples.mH)
    reference = (vectors[:, -1].conj().to(maps.dtype)[:, None, None] * maps).sum(0)
    return maps * torch.polar(torch.ones_like(reference.real), -reference.angle())


def _central(region: slice, most: int) -> slice:
    """Returns the middle of a region, at most `most` long."""
    length = region.stop - region.start
    start = region.start + max(0, (length - most) // 2)
    return slice(start, start + min(length, most))


def _check_crop(maps: CoilMaps, crop: float) -> None:
    if not 0 <= crop < 1:
        raise InputError(f"{type(maps).__name__}: crop must lie in [0, 1), got {crop}.")
