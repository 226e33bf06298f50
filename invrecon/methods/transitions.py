"""Transitions: from `(x, x0)` at noise level `sigma` to the state at `sigma_next`.

In sigma coordinates the state is `x = x0 + sigma n`. Every transition below takes the noise it finds in the
state from the *conditioned* estimate, `eps = (x - x0) / sigma` with `x0 ~ E[x0 | x, y]`: it is the reverse
diffusion of the posterior, whose denoiser is `x0`, not that of the prior. `PriorNoise` makes any of them do otherwise.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invrecon.errors import InputError
from invrecon.rng import randn

if TYPE_CHECKING:
    from invrecon.operators.base import LinearOperator

Denoised = Callable[[Tensor, float], Tensor]
"""What the prior alone makes of the state, `D(x, sigma)`."""


class Transition(ABC):
    """One update of the state.

    Attributes:
        stays_at_level: Whether the new state is at `sigma` still, so that a level can be visited repeatedly.
        estimates: What the images that it is given may estimate (see `Conditioning.estimate`).
    """

    stays_at_level: bool = False
    estimates: frozenset[str] = frozenset({"posterior", "prior"})
    _noise: Tensor | None = None  # what one run draws its noise into; none outside of a run, where nothing is kept

    def bind(self, denoised: Denoised, operator: LinearOperator, y: Tensor) -> Transition:
        """Returns the transition for one measurement: itself, unless it asks for more than the two images.

        Args:
            denoised: Gives the evaluation of the prior from which the estimate at hand was made.
            operator: The physics `A`, bound to these cases.
            y: Measurements `(B, *operator.measurement_shape)`.
        """
        return self

    @property
    def needs_measurement(self) -> bool:
        """Whether it makes no step before `bind`: only those that ask for more than images have their own."""
        return type(self).bind is not Transition.bind

    def begin(self) -> Transition:
        """Returns what takes the steps of one run: a copy that has taken none."""
        fresh = copy.copy(self)
        fresh._noise = torch.empty(0)
        return fresh

    def _draw_noise(self, x: Tensor, scale: float, generators: Sequence[torch.Generator]) -> Tensor:
        """Returns `scale n`, of the size of `x`; within a run the next call overwrites it."""
        noise = randn(x.shape[1:], generators, x, out=self._noise)
        if self._noise is not None:
            self._noise = noise
        return noise.mul_(scale)

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
        x_next = (x - x0).mul_(kept / sigma).add_(x0)
        return x_next.add_(self._draw_noise(x, fresh, generators)) if fresh else x_next


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
        x_next = (x - x0).mul_(sigma_next * math.sqrt(1 - self.eta**2) / sigma).add_(x0)
        return x_next.add_(self._draw_noise(x, sigma_next * self.eta, generators)) if self.eta else x_next


class Renoise(DDSTransition):
    """Fresh noise only, `x' = x0 + sigma' n` (Zhang et al., "DAPS", CVPR 2025, Alg. 1)."""

    def __init__(self) -> None:
        super().__init__(eta=1.0)


class AcceleratedRenoise(Transition):
    """Little fresh noise, and momentum: the transition of an estimator rather than of a sampler.

        x' = x0 + momentum (x0 - x0_before) + noise sigma' n

    With all the noise of the next level (`Renoise`) the state is `x0 + sigma' n`, and `x0` has an error of its own: the
    denoiser is told `sigma'` and sees more. Putting in less leaves room for that error, which towards the end is the
    larger part. What remains is a fixed-point iteration of denoiser and data step at a falling level, which heavy-ball
    momentum speeds up. The samples hardly spread: for posterior samples take `DDIM(1.0)`.

    Source: momentum from Polyak, "Some methods of speeding up the convergence of iteration methods", USSR Comput.
    Math. Math. Phys. 4 (1964), Eq. 9; the share of noise generalises the zeta of Zhu et al., DiffPIR, CVPR Workshops
    2023, Alg. 1, which keeps the rest of it. Both values were chosen on validation slices.

    Args:
        noise: Share of the next level's noise that is put in, in [0, 1].
        momentum: Weight of the last change of the estimate, in [0, 1).
    """

    def __init__(self, noise: float = 0.2, momentum: float = 0.7) -> None:
        if not 0 <= noise <= 1 or not 0 <= momentum < 1:
            raise InputError(
                f"AcceleratedRenoise needs 0 <= noise <= 1 and 0 <= momentum < 1, got {noise}, {momentum}."
            )
        self.noise, self.momentum = float(noise), float(momentum)
        self._before: Tensor | None = None

    def begin(self) -> AcceleratedRenoise:
        """Returns a copy that remembers nothing."""
        fresh = AcceleratedRenoise(self.noise, self.momentum)
        fresh._noise = torch.empty(0)
        return fresh

    def __call__(
        self, x: Tensor, x0: Tensor, sigma: float, sigma_next: float, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Returns the state at `sigma_next`."""
        before, self._before = self._before, x0
        if sigma_next == 0:
            return x0
        noise = self._draw_noise(x, self.noise * sigma_next, generators)
        return x0 + noise if before is None else (x0 - before).mul_(self.momentum).add_(x0).add_(noise)


class DouglasRachford(Transition):
    """The step of ADMM in the one state `v`, which holds image and dual variable: `v' = v + relaxation (x0 - D(v))`.

    Asks for the reflected data step, `x0 = prox(2 D(v) - v)` (`ReflectedConditioning`). At the end it returns the mean
    of the denoised images `D(v)` since the level last changed: at a fixed point they are `x0`, before it they hold less
    of the data's noise, and the mean evens out what a patch prior's grids leave.

    Source: Eckstein & Bertsekas, "On the Douglas-Rachford splitting method and the proximal point algorithm for maximal
    monotone operators", Math. Program. 55, 1992, Sec. 5 (relaxation, generalised ADMM).

    Args:
        relaxation: Length of a step, above 0 and below 2; 1 is plain ADMM.

    Raises:
        InputError: Another length.
    """

    estimates = frozenset({"reflection"})

    def __init__(self, relaxation: float = 1.0) -> None:
        if not 0 < relaxation < 2:
            raise InputError(f"relaxation is {relaxation}, but the step of ADMM converges above 0 and below 2.")
        self.relaxation = float(relaxation)
        self._denoised: Denoised | None = None
        self._level, self._num = math.nan, 0
        self._mean: Tensor | None = None

    def bind(self, denoised: Denoised, operator: LinearOperator, y: Tensor) -> DouglasRachford:
        """Returns a copy that knows the denoised state."""
        return self._fresh(denoised)

    def begin(self) -> DouglasRachford:
        """Returns a copy that has averaged nothing."""
        return self._fresh(self._denoised)

    def _fresh(self, denoised: Denoised | None) -> DouglasRachford:
        clone = DouglasRachford(self.relaxation)
        clone._denoised = denoised
        return clone

    def __call__(
        self, x: Tensor, x0: Tensor, sigma: float, sigma_next: float, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Returns the next state, or the mean of the denoised ones with `sigma_next = 0`."""
        assert self._denoised is not None, "a denoiser comes with bind()"
        denoised = self._denoised(x, sigma)
        if self._mean is None or sigma != self._level:
            self._level, self._num, self._mean = sigma, 1, denoised
        else:
            self._num += 1
            self._mean = (denoised - self._mean).div_(self._num).add_(self._mean)
        return self._mean if sigma_next == 0 else (x0 - denoised).mul_(self.relaxation).add_(x)


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
        noise: Share of the noise that is put in, in [0, 1]; below 1 it is an estimator rather than a sampler.
    """

    stays_at_level = True

    def __init__(self, epsilon: float = 0.5, noise: float = 1.0) -> None:
        if not 0 < epsilon < 4:
            raise InputError(f"epsilon is {epsilon}, but Langevin steps are stable only between 0 and 4.")
        if not 0 <= noise <= 1:
            raise InputError(f"noise is {noise}, but the share of a Langevin step's noise lies between 0 and 1.")
        self.epsilon, self.noise = float(epsilon), float(noise)

    def __call__(
        self, x: Tensor, x0: Tensor, sigma: float, sigma_next: float, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Returns the state after one step at `sigma`."""
        x_next = (x0 - x).mul_(self.epsilon / 2).add_(x)
        if sigma_next == 0:
            return x_next
        return x_next.add_(self._draw_noise(x, self.noise * math.sqrt(self.epsilon) * sigma, generators))


class ReverseSDE(Transition):
    """The Euler step of the reverse diffusion, in the variance.

        x' = x + (sigma^2 - sigma'^2) s + sqrt(sigma^2 - sigma'^2) n,    s = (x0 - x) / sigma^2

    It puts in `sigma / sigma'` times the noise of the ancestral step (`DDIM(1.0)`): right where the image's spread
    exceeds `sigma` by far, as the ancestral one is where it vanishes beside it.

    Source: Song et al., "Score-based generative modeling through stochastic differential equations", ICLR 2021,
    Alg. 2 (the predictor).
    """

    def __call__(
        self, x: Tensor, x0: Tensor, sigma: float, sigma_next: float, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Returns the state at `sigma_next`."""
        if sigma_next == 0:
            return x0
        released = max(sigma**2 - sigma_next**2, 0.0)
        x_next = (x0 - x).mul_(released / sigma**2).add_(x)
        return x_next.add_(self._draw_noise(x, math.sqrt(released), generators))


class DenoisedTransition(Transition):
    """Another transition, told besides what a denoiser makes of the state without the measurement.

    Args:
        transition: From one level to the next.
        denoise: `D(x, sigma)`; the evaluation from which the estimate was made if None.
    """

    def __init__(self, transition: Transition, denoise: Denoised | None = None) -> None:
        self.transition = transition
        self.denoise = denoise

    def bind(self, denoised: Denoised, operator: LinearOperator, y: Tensor) -> Transition:
        """Returns a copy that has a denoiser."""
        bound = self.transition.bind(denoised, operator, y)
        return type(self)(bound, denoised if self.denoise is None else self.denoise)

    def begin(self) -> Transition:
        """Returns what takes the steps of one run."""
        return type(self)(self.transition.begin(), self.denoise)

    def prior_estimate(self, x: Tensor, sigma: float) -> Tensor:
        """Returns `D(x, sigma)`."""
        assert self.denoise is not None, "a denoiser comes with bind()"
        return self.denoise(x, sigma)


class PriorNoise(DenoisedTransition):
    """Takes the noise in the state from the denoiser, and not from the conditioned estimate.

        eps = (x - D(x, sigma)) / sigma   in place of   (x - x0) / sigma

    as methods have it that are written around a noise-predicting network (DPS, DDNM, DDS and all that follow). It does
    so by handing on the state `x0 + sigma eps`. Of one inside another the outer counts.
    """

    def __init__(self, transition: Transition, denoise: Denoised | None = None) -> None:
        super().__init__(transition.transition if isinstance(transition, PriorNoise) else transition, denoise)

    def __call__(
        self, x: Tensor, x0: Tensor, sigma: float, sigma_next: float, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Returns the state at `sigma_next`."""
        if sigma_next > 0:
            x = (x - self.prior_estimate(x, sigma)).add_(x0)
        return self.transition(x, x0, sigma, sigma_next, generators)
