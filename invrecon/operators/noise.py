"""Measurement noise: how a clean measurement becomes a noisy one, and what its level is then known to be."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from invrecon.errors import InputError
from invrecon.operators.base import LinearOperator
from invrecon.operators.ct import CT
from invrecon.operators.mask import FourierMask
from invrecon.operators.mri import MRI
from invrecon.rng import randn


class NoiseModel(ABC):
    """A random map from clean to noisy measurements, `y -> y'`.

    The standard deviation it reports is computed from `y'` alone, never from the clean `y`: a reconstruction
    gets to know nothing that a scanner would not tell.
    """

    @abstractmethod
    def sample(
        self, y: Tensor, generators: Sequence[torch.Generator], *, length_mm: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        """Draws noisy measurements, each sample from its own generator.

        Args:
            y: Clean measurements `(B, ...)`; for CT, intensity times the operator's unit of length.
            generators: One CPU generator a sample.
            length_mm: Millimetres in one unit of the operator's length, a number or `(B,)`: `pixel_mm /
                operator.pixel`, 1 where the operator is in mm. Only physical models use it.

        Returns:
            `y'`, shape and dtype of `y`, and its noise's standard deviation: `(B,)`, the shape of `y` (one a
            ray), or None when there is no noise.

        Raises:
            InputError: A number of generators other than the number of samples.
        """

    def check(self, operator: LinearOperator) -> None:  # noqa: B027 - most noise goes with all operators
        """Raises `InputError` unless the noise is one of what `operator` measures."""


class NoNoise(NoiseModel):
    """Clean measurements, as in most published tables: `y' = y`."""

    def sample(
        self, y: Tensor, generators: Sequence[torch.Generator], *, length_mm: float | Tensor = 1.0
    ) -> tuple[Tensor, None]:
        """Returns `y` and None."""
        return y, None


class GaussianNoise(NoiseModel):
    """White Gaussian noise of absolute level: `y' = y + std n`.

    Args:
        std: Standard deviation in the units of `y`.
    """

    def __init__(self, std: float) -> None:
        self.std = _positive(std, "GaussianNoise: std")

    def sample(
        self, y: Tensor, generators: Sequence[torch.Generator], *, length_mm: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Returns `y + std n` and `std`, `(B,)`."""
        _check_generators(y, generators)
        return y + self.std * randn(y.shape[1:], generators, like=y), y.new_full((len(y),), self.std)


class RelativeGaussianNoise(NoiseModel):
    """White Gaussian noise relative to each sample's signal: `y' = y + level mean|y| n`.

    Barbano, Denker et al., Steerable conditional diffusion, IEEE TMI 2025, use level 0.01. The level reported
    is `level mean|y'|`; the two means agree to a fraction of a per cent. In the mean of k-space the samples that were
    not measured count as zeros, so that the level falls with the acceleration: `SNRNoise` has one that does not.

    Args:
        level: Standard deviation divided by the mean absolute value of the array of measurements.
    """

    def __init__(self, level: float = 0.01) -> None:
        self.level = _positive(level, "RelativeGaussianNoise: level")

    def sample(
        self, y: Tensor, generators: Sequence[torch.Generator], *, length_mm: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Returns `y + level mean|y| n` and `level mean|y'|`, `(B,)`."""
        _check_generators(y, generators)
        std = self.level * _mean_abs(y)
        noisy = y + std.reshape(-1, *(1,) * (y.ndim - 1)) * randn(y.shape[1:], generators, like=y)
        return noisy, _positive_level(self.level * _mean_abs(noisy))


class SNRNoise(NoiseModel):
    r"""White Gaussian noise at a signal-to-noise ratio over what was measured, as in MRI.

        y' = y + std n   where y != 0,   std^2 = mean(y^2 : y != 0) / 10^(snr / 10)

    Entries that are exactly zero were not measured (k-space off the mask) and stay zero. Real and imaginary parts are
    entries of their own, so `std` is that of each of them. The level reported is that of `y'`,
    `std'^2 = mean(y'^2) / (10^(snr / 10) + 1)`, which agrees with `std` to a fraction of a per cent.

    Args:
        snr: Power of signal over that of noise [dB].
    """

    def __init__(self, snr: float = 30.0) -> None:
        if not math.isfinite(snr):
            raise InputError(f"SNRNoise: snr must be a finite number of decibels, got {snr}; use NoNoise for none.")
        self.snr = float(snr)

    def check(self, operator: LinearOperator) -> None:
        """Raises `InputError` unless k-space is measured, whose zeros are what was not."""
        if not isinstance(operator, MRI | FourierMask):
            raise InputError(
                "SNRNoise leaves out what was not measured, and knows it by its zeros, as k-space has them off its "
                f"mask; those of {type(operator).__name__} are measured: take RelativeGaussianNoise or GaussianNoise "
                "for model.noise."
            )

    def sample(
        self, y: Tensor, generators: Sequence[torch.Generator], *, length_mm: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Returns `y + std n` where `y` is not zero, and the level of `y'`, `(B,)`."""
        _check_generators(y, generators)
        measured = (y != 0).to(y)
        count = measured.flatten(1).sum(1).clamp(min=1)
        ratio = 10 ** (self.snr / 10)
        std = (y.square().flatten(1).sum(1) / count / ratio).sqrt()
        noise = std.reshape(-1, *(1,) * (y.ndim - 1)) * randn(y.shape[1:], generators, like=y)
        noisy = y + measured * noise
        return noisy, _positive_level((noisy.square().flatten(1).sum(1) / count / (ratio + 1)).sqrt())


def _positive_level(std: Tensor) -> Tensor:
    """Returns levels with a tiny one for samples without signal: nothing was measured of plain air, and exactly so."""
    return torch.where(std > 0, std, torch.full_like(std, 1e-6))


class TransmissionPoisson(NoiseModel):
    r"""Photon noise of a transmission scan, log-transformed back to line integrals of intensity.

    With intensity `x = (HU + 1000) / 3000` the attenuation is `mu = 3 mu_water x` [1/mm], so a clean `y = A
    x` stands for the optical thickness `p = s y`, `s = 3 mu_water length_mm`, and

        counts ~ max(Poisson(I0 exp(-p)), 1),   y' = -ln(counts / I0) / s,   std = 1 / (s sqrt(counts)).

    The level is the delta method's for a Poisson logarithm: Sauer and Bouman, IEEE TSP 41 (1993), 534-548,
    whose weights are the counts.

    Args:
        i0: Photons per ray without an object.
        attenuation_per_mm: `mu_water` [1/mm]; 0.0195 is water at about 66 keV.
        hu_scale: HU in one unit of intensity divided by 1000 (3 for `x = (HU + 1000) / 3000`).
    """

    def __init__(self, i0: float = 1e5, attenuation_per_mm: float = 0.0195, hu_scale: float = 3.0) -> None:
        self.i0 = _positive(i0, "TransmissionPoisson: i0")
        self.attenuation_per_mm = _positive(attenuation_per_mm, "TransmissionPoisson: attenuation_per_mm")
        self.hu_scale = _positive(hu_scale, "TransmissionPoisson: hu_scale")

    def check(self, operator: LinearOperator) -> None:
        """Raises `InputError` unless line integrals are measured."""
        if not isinstance(operator, CT):
            raise InputError(
                f"TransmissionPoisson is the noise of photons along rays, and {type(operator).__name__} measures no "
                "line integrals: take another model.noise, as GaussianNoise."
            )

    def sample(
        self, y: Tensor, generators: Sequence[torch.Generator], *, length_mm: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Returns log-transformed counts and one standard deviation a ray, both with the shape of `y`."""
        _check_generators(y, generators)
        length = torch.as_tensor(length_mm, dtype=torch.float64, device="cpu")
        if not (length > 0).all() or not length.isfinite().all():
            raise InputError(f"TransmissionPoisson: length_mm must be a positive length, got {length_mm}.")
        scale = self.hu_scale * self.attenuation_per_mm * length.reshape(-1, *(1,) * (y.ndim - 1))
        rate = self.i0 * torch.exp(-scale * y.detach().to("cpu", torch.float64))
        draws = [torch.poisson(r, generator=g) for r, g in zip(rate, generators, strict=True)]
        counts = torch.stack(draws).clamp(min=1) if draws else rate
        noisy, std = -torch.log(counts / self.i0) / scale, 1 / (scale * counts.sqrt())
        return noisy.to(y), std.to(y)


def _positive(value: float, name: str) -> float:
    if not 0 < value < math.inf:
        raise InputError(f"{name} must be positive and finite, got {value}.")
    return float(value)


def _check_generators(y: Tensor, generators: Sequence[torch.Generator]) -> None:
    if len(generators) != len(y):
        raise InputError(f"Noise needs one generator a sample: got {len(generators)} for {len(y)} samples.")


def _mean_abs(y: Tensor) -> Tensor:
    return y.abs().flatten(1).mean(1)
