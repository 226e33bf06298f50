"""DDRM and DDNM+: conditioning and renoising at once, in the basis of the operator's singular vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invrecon.errors import InputError
from invrecon.methods.conditioning import Unconditional
from invrecon.methods.sampling import Sampler
from invrecon.methods.schedule import VPSchedule
from invrecon.methods.start import NoiseStart, Start
from invrecon.methods.transitions import Denoised, Transition
from invrecon.operators.base import WhitenedOperator
from invrecon.rng import randn

if TYPE_CHECKING:
    from invrecon.operators.base import LinearOperator
    from invrecon.operators.spectral import Spectrum


@dataclass
class SpectralData:
    """A measurement in the basis of the operator's singular vectors: `y_i = x_i + tau_i n`, where it is measured.

    Attributes:
        spectrum: The singular system `A = U S V^T`.
        estimate: `y_i = (U^T y)_i / s_i`, `(B, n)`, 0 where nothing is measured.
        noise: `tau_i = sigma_y / s_i`, `(B, n)`, infinite where nothing is measured.
    """

    spectrum: Spectrum
    estimate: Tensor
    noise: Tensor

    @classmethod
    def measure(cls, operator: LinearOperator, y: Tensor, threshold: float) -> SpectralData:
        """Returns what `y` says.

        Args:
            operator: The physics; it has to have a spectrum, and one noise level a sample.
            y: Measurements.
            threshold: Singular values at most this share of the largest count as zero.

        Raises:
            InputError: The operator has no spectrum, or the noise differs between rays.
        """
        weighted, y, std = operator.whiten(y)
        if isinstance(weighted, WhitenedOperator):
            raise InputError(
                "DDRM and DDNM+ need one noise level for all entries of a measurement, but noise_std differs between "
                "them: use ProximalDiffusion or DiffPIR, which weight each by its own."
            )
        spectrum = operator.spectrum()
        values = spectrum.singular_values.to(y)
        measured = values > threshold * values.amax()
        inverse = torch.where(measured, 1 / torch.where(measured, values, 1.0), 0.0)
        level = y.new_zeros(y.shape[0]) if std is None else std.to(y)
        noise = torch.where(measured, level[:, None] * inverse, math.inf)
        return cls(spectrum, inverse * spectrum.data_to_spectrum(y), noise)


class SpectralStart(Start):
    """The measurement with noise up to the level where there is one, pure noise elsewhere.

        x_i ~ N(y_i, sigma^2 - tau_i^2)   where tau_i <= sigma,   N(0, sigma^2) elsewhere

    Source: Kawar et al., DDRM, NeurIPS 2022, Eq. 7.

    Args:
        threshold: Singular values at most this share of the largest count as zero.
    """

    def __init__(self, threshold: float = 1e-3) -> None:
        self.threshold = float(threshold)

    def __call__(
        self, y: Tensor, operator: LinearOperator, sigma: float, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Returns the state at `sigma`."""
        data = SpectralData.measure(operator, y, self.threshold)
        usable = data.noise <= sigma
        spread = torch.where(usable, (sigma**2 - data.noise.square()).clamp(min=0).sqrt(), sigma)
        noise = randn(spread.shape[1:], generators, spread)
        return data.spectrum.to_image(torch.where(usable, data.estimate, 0.0) + spread * noise)


class SpectralTransition(Transition):
    """DDRM's step: every component of the state is told of its datum as far as that is less noisy.

    With `d = V^T D`, and `tau_i` the noise of the datum `y_i`, per component

        not measured:      x' = d + sqrt(1 - eta^2) (sigma' / sigma) (x - d) + eta sigma' n
        sigma' < tau_i:    x' = d + sqrt(1 - eta^2) (sigma' / tau_i) (y_i - d) + eta sigma' n
        sigma' >= tau_i:   x' = (1 - eta_b) d + eta_b y_i + sqrt(sigma'^2 - eta_b^2 tau_i^2) n

    Data noisier than the level at which the transition begins (`tau_i > sigma_max`) count as not measured. It stands
    after `Unconditional`: the estimate that it takes is `D`.

    Source: Kawar, Elad, Ermon & Song, "Denoising diffusion restoration models" (DDRM), NeurIPS 2022, Eq. 8.

    Args:
        sigma_max: The level of the first state.
        eta: Share of fresh noise where data say less than the state, in [0, 1].
        eta_b: Share of the datum where it says more, in [0, 1].
        threshold: Singular values at most this share of the largest count as zero.
    """

    estimates = frozenset({"prior"})

    def __init__(self, sigma_max: float, eta: float = 0.85, eta_b: float = 1.0, threshold: float = 1e-3) -> None:
        if not 0 <= eta <= 1 or not 0 <= eta_b <= 1 or not 0 <= threshold < 1:
            raise InputError(
                f"{type(self).__name__} needs eta and eta_b in [0, 1] and a threshold in [0, 1), got {eta}, {eta_b} "
                f"and {threshold}."
            )
        self.sigma_max = float(sigma_max)
        self.eta, self.eta_b, self.threshold = float(eta), float(eta_b), float(threshold)
        self._data: SpectralData | None = None

    def bind(self, denoised: Denoised, operator: LinearOperator, y: Tensor) -> Transition:
        """Returns a copy that knows the measurement.

        Raises:
            InputError: The operator has no spectrum, or the noise differs between rays.
        """
        bound = type(self)(self.sigma_max, self.eta, self.eta_b, self.threshold)
        bound._data = SpectralData.measure(operator, y, self.threshold)
        return bound

    def told(self, d: Tensor, own: Tensor, data: SpectralData, sigma_next: float) -> tuple[Tensor, Tensor]:
        """Returns mean and standard deviation where the datum is less noisy than the next level.

        Args:
            d: Spectrum of the denoised image.
            own: Spectrum of the noise found in the state, of unit variance.
            data: The measurement.
            sigma_next: The next level.
        """
        spread = (sigma_next**2 - (self.eta_b * data.noise).square()).clamp(min=0).sqrt()
        return d + self.eta_b * (data.estimate - d), spread

    def __call__(
        self, x: Tensor, x0: Tensor, sigma: float, sigma_next: float, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Returns the state at `sigma_next`."""
        data = self._data
        assert data is not None, "a measurement comes with bind()"
        d = data.spectrum.to_spectrum(x0)
        own = (data.spectrum.to_spectrum(x) - d) / sigma
        informed = data.noise <= sigma_next
        found = torch.where(informed | (data.noise > self.sigma_max), own, (data.estimate - d) / data.noise)
        told, told_spread = self.told(d, own, data, sigma_next)
        mean = torch.where(informed, told, d + math.sqrt(1 - self.eta**2) * sigma_next * found)
        if sigma_next > 0:
            spread = torch.where(informed, told_spread, self.eta * sigma_next)
            mean = randn(d.shape[1:], generators, d).mul_(spread).add_(mean)
        return data.spectrum.to_image(mean)


class DDNMPlusTransition(SpectralTransition):
    """DDNM+'s step: DDRM's for `eta_b = 1`, but where data are exact, with the state's own noise as in the null space.

        tau_i = 0:   x' = y_i + sqrt(1 - eta^2) (sigma' / sigma) (x - d) + eta sigma' n

    Its shrinkage of the correction, `lambda_i = s_i sigma' sqrt(1 - eta^2) / sigma_y`, is DDRM's second case.

    Source: Wang, Yu & Zhang, DDNM, ICLR 2023, Sec. 3.3 and Eq. 17 to 19.

    Args:
        sigma_max: The level of the first state.
        eta: Share of fresh noise, in [0, 1].
        eta_b: Always 1.
        threshold: Singular values at most this share of the largest count as zero.
    """

    def told(self, d: Tensor, own: Tensor, data: SpectralData, sigma_next: float) -> tuple[Tensor, Tensor]:
        """Returns mean and standard deviation where the datum is less noisy than the next level."""
        mean, spread = super().told(d, own, data, sigma_next)
        exact = data.noise == 0
        mean = torch.where(exact, mean + math.sqrt(1 - self.eta**2) * sigma_next * own, mean)
        return mean, torch.where(exact, self.eta * sigma_next, spread)


class DDRM(Sampler):
    """Denoising diffusion restoration models: `SpectralTransition` from a start at the data.

    One evaluation a level (20), three products with singular vectors, no operator calls. Asks of the operator its
    `spectrum()` and of the noise to be the same for all entries; of the prior nothing but `D`. Close to a MAP
    estimate, the more so the more levels: no posterior sampler.

    Source: Kawar, Elad, Ermon & Song, NeurIPS 2022, Eq. 7 and 8, published with 20 levels, `eta = 0.85`, `eta_b = 1`.

    Args:
        num_levels: Noise levels, and so denoiser evaluations.
        sigma_max: First noise level, in intensity units.
        sigma_min: Last noise level.
        eta: Share of fresh noise where data say less than the state, in [0, 1].
        eta_b: Share of the datum where it says more, in [0, 1].
        threshold: Singular values at most this share of the largest count as zero.
        num_samples: Samples a case.
        samples_per_batch: How many samples of each case run at once; all if None.
        clip: Range to which samples are clipped at the end, or None.
    """

    needs_spectrum = True

    def __init__(
        self,
        num_levels: int = 20,
        sigma_max: float = 10.0,
        sigma_min: float = 0.002,
        eta: float = 0.85,
        eta_b: float = 1.0,
        threshold: float = 1e-3,
        num_samples: int = 1,
        samples_per_batch: int | None = None,
        clip: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        super().__init__(
            VPSchedule(num_levels, sigma_max, sigma_min),
            Unconditional(),
            SpectralTransition(sigma_max, eta, eta_b, threshold),
            SpectralStart(threshold),
            num_samples,
            samples_per_batch,
            clip,
        )


class DDNMPlus(Sampler):
    """DDNM for noisy data, one weight a singular value: `DDNMPlusTransition` from pure noise.

    One evaluation a level (100), three products with singular vectors, no operator calls. Asks of the operator its
    `spectrum()` and of the noise to be the same for all entries; of the prior nothing but `D`. Close to a MAP
    estimate: no posterior sampler. With noise it is `DDRM` but for the start.

    Source: Wang, Yu & Zhang, ICLR 2023, Sec. 3.3, published with 100 levels and `eta = 0.85`.

    Args:
        num_levels: Noise levels, and so denoiser evaluations.
        sigma_max: First noise level, in intensity units.
        sigma_min: Last noise level.
        eta: Share of fresh noise, in [0, 1].
        threshold: Singular values at most this share of the largest count as zero.
        num_samples: Samples a case.
        samples_per_batch: How many samples of each case run at once; all if None.
        clip: Range to which samples are clipped at the end, or None.
    """

    needs_spectrum = True

    def __init__(
        self,
        num_levels: int = 100,
        sigma_max: float = 10.0,
        sigma_min: float = 0.002,
        eta: float = 0.85,
        threshold: float = 1e-3,
        num_samples: int = 1,
        samples_per_batch: int | None = None,
        clip: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        super().__init__(
            VPSchedule(num_levels, sigma_max, sigma_min),
            Unconditional(),
            DDNMPlusTransition(sigma_max, eta, threshold=threshold),
            NoiseStart(),
            num_samples,
            samples_per_batch,
            clip,
        )
