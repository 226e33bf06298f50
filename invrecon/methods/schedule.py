"""Noise schedules: the ladder of noise levels that a sampler climbs down."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from invrecon.errors import InputError


class Schedule(ABC):
    """A ladder `sigma_0 > ... > sigma_{K-1} > 0`, in units of the image's intensity.

    Args:
        num_levels: Number of levels `K` (>= 1; a single level is `sigma_max`).
        sigma_max: First and largest noise level.
        sigma_min: Last and smallest noise level.
        num_inner: Updates at each level. More than one asks for a transition that stays at its level
            (Langevin).

    Raises:
        InputError: Not `0 < sigma_min <= sigma_max`, or a count below 1.
    """

    def __init__(self, num_levels: int, sigma_max: float, sigma_min: float, num_inner: int = 1) -> None:
        if num_levels < 1 or num_inner < 1:
            raise InputError(
                f"A schedule needs at least one level and one update a level, got num_levels={num_levels} "
                f"and num_inner={num_inner}."
            )
        if not 0 < sigma_min <= sigma_max < float("inf"):
            raise InputError(
                f"A schedule runs from sigma_max down to sigma_min > 0, got sigma_max={sigma_max} and "
                f"sigma_min={sigma_min}."
            )
        self.num_levels = num_levels
        self.sigma_max = float(sigma_max)
        self.sigma_min = float(sigma_min)
        self.num_inner = num_inner

    @abstractmethod
    def interpolate(self, t: np.ndarray) -> np.ndarray:
        """Returns `sigma(t)` for `t` in [0, 1], from `sigma_max` at 0 to `sigma_min` at 1."""

    @property
    def sigmas(self) -> list[float]:
        """The `num_levels` noise levels, falling."""
        return [float(sigma) for sigma in self.interpolate(np.linspace(0.0, 1.0, self.num_levels))]

    def steps(self) -> Iterator[tuple[float, float]]:
        """Yields `(sigma, sigma_next)` for every update; `sigma_next = 0` at the last level."""
        sigmas = [*self.sigmas, 0.0]
        for sigma, sigma_next in pairwise(sigmas):
            for _ in range(self.num_inner):
                yield sigma, sigma_next

    def __len__(self) -> int:
        return self.num_levels * self.num_inner


class KarrasSchedule(Schedule):
    """Levels evenly spaced in `sigma^(1/rho)`.

        sigma(t) = (sigma_max^(1/rho) + t (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho

    Source: Karras et al., "Elucidating the design space of diffusion-based generative models", NeurIPS 2022,
        Eq. 5.

    Args:
        num_levels: Number of levels.
        sigma_max: First and largest noise level.
        sigma_min: Last and smallest noise level.
        rho: Larger spends more levels at low noise.
        num_inner: Updates at each level.
    """

    def __init__(
        self, num_levels: int, sigma_max: float, sigma_min: float, rho: float = 7.0, num_inner: int = 1
    ) -> None:
        super().__init__(num_levels, sigma_max, sigma_min, num_inner)
        if not rho > 0:
            raise InputError(f"rho is {rho}, but it has to be above 0.")
        self.rho = float(rho)

    def interpolate(self, t: np.ndarray) -> np.ndarray:
        """Returns `sigma(t)`."""
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return (high + t * (low - high)) ** self.rho


class GeometricSchedule(Schedule):
    """Levels in a constant ratio, `sigma(t) = sigma_max (sigma_min / sigma_max)^t`.

    Source: Song & Ermon, "Generative modeling by estimating gradients of the data distribution", NeurIPS
        2019,
    Sec. 4.1.
    """

    def interpolate(self, t: np.ndarray) -> np.ndarray:
        """Returns `sigma(t)`."""
        return self.sigma_max * (self.sigma_min / self.sigma_max) ** t


class FloorSchedule(Schedule):
    """Levels in a constant ratio down to a floor, where they stay: `sigma_k = max(ratio^k sigma_max, sigma_min)`.

    Source: Wu et al., "Principled probabilistic imaging using diffusion models as plug-and-play priors" (PnP-DM),
    NeurIPS 2024, annealing of the coupling.

    Args:
        num_levels: Number of levels, those at the floor included.
        sigma_max: First and largest level.
        sigma_min: The floor.
        ratio: From one level to the next, in (0, 1).
    """

    def __init__(self, num_levels: int, sigma_max: float, sigma_min: float, ratio: float = 0.9) -> None:
        super().__init__(num_levels, sigma_max, sigma_min)
        if not 0 < ratio < 1:
            raise InputError(f"ratio is {ratio}, but levels that fall have one between 0 and 1.")
        self.ratio = float(ratio)

    def interpolate(self, t: np.ndarray) -> np.ndarray:
        """Returns `sigma(t)`."""
        return np.maximum(self.sigma_max * self.ratio ** (t * (self.num_levels - 1)), self.sigma_min)


class VPSchedule(Schedule):
    """Levels evenly spaced in the time of a variance-preserving diffusion, as DDPM's thousand steps are.

        sigma(t) = unit sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1),    beta_min = 0.1, beta_d = 19.9

    Of the times in [0, 1] it takes those from `sigma_max` to `sigma_min`.

    Source: Song et al., ICLR 2021, Eq. 33; its inverse from Karras et al., NeurIPS 2022, Tab. 1.

    Args:
        num_levels: Number of levels.
        sigma_max: First and largest noise level.
        sigma_min: Last and smallest noise level.
        unit: Half the width of the images' range: 0.5 for images in [0, 1], where published schedules, made for
            images in [-1, 1], have 1.
    """

    beta_min, beta_d = 0.1, 19.9

    def __init__(self, num_levels: int, sigma_max: float, sigma_min: float, unit: float = 0.5) -> None:
        super().__init__(num_levels, sigma_max, sigma_min)
        if not unit > 0:
            raise InputError(f"unit is {unit}, but it has to be above 0.")
        self.unit = float(unit)

    def interpolate(self, t: np.ndarray) -> np.ndarray:
        """Returns `sigma(t)`."""
        first, last = self._time(self.sigma_max), self._time(self.sigma_min)
        time = first + t * (last - first)
        return self.unit * np.sqrt(np.expm1(self.beta_d * time**2 / 2 + self.beta_min * time))

    def _time(self, sigma: float) -> float:
        log = math.log1p((sigma / self.unit) ** 2)
        return (math.sqrt(self.beta_min**2 + 2 * self.beta_d * log) - self.beta_min) / self.beta_d


class PairedSchedule(GeometricSchedule):
    """Geometric levels, each new one visited twice: `(sigma_0, sigma_1), (sigma_1, sigma_1), (sigma_1, sigma_2), ...`.

    For a predictor, which goes to the next level, and a corrector, which stays (`sigma_next = sigma`).
    """

    def steps(self) -> Iterator[tuple[float, float]]:
        """Yields `(sigma, sigma_next)` for every update, 0 at the last."""
        sigmas = self.sigmas
        for sigma, sigma_next in pairwise(sigmas):
            yield sigma, sigma_next
            yield sigma_next, sigma_next
        yield sigmas[-1], 0.0

    def __len__(self) -> int:
        return 2 * self.num_levels - 1
