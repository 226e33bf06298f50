"""Transitions: from `(x, x0)` at noise level `sigma` to the state at `sigma_next`.

In sigma coordinates the state is `x = x0 + sigma n`. Every transition below takes the noise it finds in the
state from the *conditioned* estimate, `eps = (x - x0) / sigma` with `x0 ~ E[x0 | x, y]`: it is the reverse
diffusion of the posterior, whose denoiser is `x0`, not that of the prior.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from invrecon.errors import InputError
from invrecon.rng import randn


class Transition(ABC):
    """One update of the state.

    Attributes:
        stays_at_level: Whether the new state is at `sigma` still, so that a level can be visited repeatedly.
    """

    stays_at_level: bool = False

    @abstractmethod
    def __call__(
        self, x: Tensor, x0: Tensor, sigma: float, sigma_next: float, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Returns the next state; with `sigma_next = 0` no noise is added.

        Args:
            x: The state `(B, C, *spatial)`, at noise level `sigma`.
            x0: The conditioned estimate of the clean image, like `x`.
            sigma: The level of `x`.
            sigma_next: The next level, 0 at the end.
            generators: One generator a sample.
        """


def _check_eta(eta: float) -> float:
    if not 0 <= eta <= 1:
        raise InputError(f"eta is {eta}, but the share of fresh noise lies between 0 and 1.")
    return float(eta)


class DDIM(Transition):
    """DDIM in sigma coordinates, from deterministic (`eta = 0`) to ancestral DDPM (`eta = 1`).

        x' = x0 + sqrt(sigma'^2 - c^2) eps + c n,    c = eta (sigma' / sigma) sqrt(sigma^2 - sigma'^2)

    Source: Song, Meng & Ermon, "Denoising diffusion implicit models", ICLR 2021, Eq. 12 and 16, with
    `x_t = x / sqrt(1 + sigma^2)`.

    Args:
        eta: Share of fresh noise, in [0, 1].
    """

    def __init__(self, eta: float = 1.0) -> None:
        self.eta = _check_eta(eta)

    def __call__(
        self, x: Tensor, x0: Tensor, sigma: float, sigma_next: float, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Returns the state at `sigma_next`."""
        if sigma_next == 0:
            return x0
        fresh = self.eta * (sigma_next / sigma) * math.sqrt(max(sigma**2 - sigma_next**2, 0.0))
        kept = math.sqrt(max(sigma_next**2 - fresh**2, 0.0))
        x_next = x0 + (kept / sigma) * (x - x0)
        return x_next + fresh * randn(x.shape[1:], generators, x) if fresh else x_next


class DDSTransition(Transition):
    """The constant split of decomposed diffusion sampling, `x' = x0 + sigma' (sqrt(1 - eta^2) eps + eta n)`.

    Source: Chung, Lee & Ye, "Decomposed diffusion sampler for accelerating large-scale inverse problems" (DDS), ICLR
    2024, its DDIM step in sigma coordinates.

    Args:
        eta: Share of fresh noise, in [0, 1].
    """

    def __init__(self, eta: float = 0.85) -> None:
        self.eta = _check_eta(eta)

    def __call__(
        self, x: Tensor, x0: Tensor, sigma: float, sigma_next: float, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Returns the state at `sigma_next`."""
        if sigma_next == 0:
            return x0
        x_next = x0 + (sigma_next * math.sqrt(1 - self.eta**2) / sigma) * (x - x0)
        return x_next + sigma_next * self.eta * randn(x.shape[1:], generators, x) if self.eta else x_next


class Renoise(DDSTransition):
    """Fresh noise only, `x' = x0 + sigma' n` (Zhang et al., "DAPS", CVPR 2025, Alg. 1)."""

    def __init__(self) -> None:
        super().__init__(eta=1.0)


class Langevin(Transition):
    """One step of annealed Langevin dynamics with step `alpha = epsilon sigma^2`, staying at its level.

        x' = x + (alpha / 2) s + sqrt(alpha) z = x + (epsilon / 2) (x0 - x) + sqrt(epsilon) sigma z

    with the score `s = (x0 - x) / sigma^2`. At the last level (`sigma_next = 0`) the noise is left out. For a
    point prior the stationary variance is `sigma^2 / (1 - epsilon / 4)`: above what the denoiser is told, so
    prefer `epsilon <= 0.5`; it is stable below 4.

    Source: Song & Ermon, NeurIPS 2019, Alg. 1; the step rule of Hu et al., "Learning image priors through
    patch-based diffusion models for solving inverse problems" (PaDIS), NeurIPS 2024, Alg. 1.

    Args:
        epsilon: Step in units of `sigma^2`, in (0, 4).
    """

    stays_at_level = True

    def __init__(self, epsilon: float = 0.5) -> None:
        if not 0 < epsilon < 4:
            raise InputError(f"epsilon is {epsilon}, but Langevin steps are stable only between 0 and 4.")
        self.epsilon = float(epsilon)

    def __call__(
        self, x: Tensor, x0: Tensor, sigma: float, sigma_next: float, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Returns the state after one step at `sigma`."""
        x_next = x + (self.epsilon / 2) * (x0 - x)
        if sigma_next == 0:
            return x_next
        return x_next + math.sqrt(self.epsilon) * sigma * randn(x.shape[1:], generators, x)
