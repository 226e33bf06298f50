"""Noise schedules: the ladder of noise levels that a sampler climbs down."""

from __future__ import annotations

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
