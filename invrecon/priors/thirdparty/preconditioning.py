r"""How a published network's output becomes a denoiser, `D = c_skip x + c_out F(c_in x, c_noise)`.

Each class is one row of Karras et al. (NeurIPS 2022), table 1, or one target of a discrete diffusion
(Ho et al. 2020; Salimans & Ho 2022) written in the coordinates $x = x_0 + \sigma n$:
with $\bar\alpha = 1/(1+\sigma^2)$, the network's own state is $x_t = \sqrt{\bar\alpha}\,x$.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

MAX_STEPS = 100_000


class Coefficients(NamedTuple):
    """`c_skip`, `c_out`, `c_in` and `c_noise` of a batch of noise levels, `(B,)` each."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


class EDM(nn.Module):
    r"""EDM: $c_{skip} = s^2/(\sigma^2+s^2)$, $c_{out} = \sigma s\,c_{in}$, $c_{noise} = \ln(\sigma)/4$.

    Args:
        sigma_data: `s`, the data's standard deviation in the network's units.
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.s = float(sigma_data)
        self.sigma_range = (0.002, 80.0)

    def forward(self, sigma: Tensor) -> Coefficients:
        """Returns the coefficients at `sigma` `(B,)`."""
        variance = sigma**2 + self.s**2
        return Coefficients(
            self.s**2 / variance, sigma * self.s / variance.sqrt(), 1 / variance.sqrt(), sigma.log() / 4
        )


class VE(nn.Module):
    r"""Variance exploding: $c_{skip} = c_{in} = 1$, $c_{out} = \sigma$, $c_{noise} = \ln(\sigma/2)$."""

    sigma_range = (0.02, 100.0)

    def forward(self, sigma: Tensor) -> Coefficients:
        """Returns the coefficients at `sigma` `(B,)`."""
        one = torch.ones_like(sigma)
        return Coefficients(one, sigma, one, (sigma / 2).log())


class ContinuousVP(nn.Module):
    r"""Variance preserving in continuous time, an eps-network.

    $$ \sigma(t)^2 = e^{\beta_d t^2 / 2 + \beta_{min} t} - 1, \quad c_{noise} = (M - 1)\,t(\sigma) $$

    Args:
        beta_d: Extent of the schedule.
        beta_min: Its slope at 0.
        num_steps: `M`.
    """

    def __init__(self, beta_d: float = 19.9, beta_min: float = 0.1, num_steps: int = 1000) -> None:
        super().__init__()
        self.beta_d, self.beta_min, self.num_steps = float(beta_d), float(beta_min), num_steps
        low, high = (math.sqrt(math.expm1(beta_d * t**2 / 2 + beta_min * t)) for t in (1e-5, 1.0))
        self.sigma_range = (low, high)

    def forward(self, sigma: Tensor) -> Coefficients:
        """Returns the coefficients at `sigma` `(B,)`."""
        exponent = torch.log1p(sigma.double() ** 2)
        t = ((self.beta_min**2 + 2 * self.beta_d * exponent).sqrt() - self.beta_min) / self.beta_d
        c_noise = ((self.num_steps - 1) * t).to(sigma.dtype)
        return Coefficients(torch.ones_like(sigma), -sigma, (1 + sigma**2).rsqrt(), c_noise)


class Discrete(nn.Module):
    r"""A diffusion in `T` steps, whose network sees the (fractional) timestep of the noise level.

    $$ \sigma_i^2 = (1 - \bar\alpha_i)/\bar\alpha_i, \quad \bar\alpha_i = \prod_{j \le i} (1 - \beta_j) $$

    with betas of the linear schedule, $10^{-4}$ to $0.02$ in units of $1000/T$ (Ho et al. 2020), or the cosine
    schedule (Nichol & Dhariwal 2021, eq. 17). The timestep of a level between two is interpolated in
    $\ln\sigma$, which the sinusoidal embedding takes as it is; or the nearest. Beyond the schedule's ends the
    network sees its first or last step, while the other coefficients stay those of $\sigma$ itself, so that
    `D -> x` as $\sigma \to 0$ and the input keeps its scale.

    Args:
        schedule: `linear` or `cosine`.
        num_steps: `T`.
        nearest: Whether to take the nearest step instead of interpolating.
        rescale: Whether the network was given steps in units of `T/1000`.

    Raises:
        ValueError: If there is no such schedule.
    """

    levels: Tensor

    def __init__(
        self, schedule: str = "linear", num_steps: int = 1000, nearest: bool = False, rescale: bool = False
    ) -> None:
        super().__init__()
        if schedule not in ("linear", "cosine") or not 2 <= num_steps <= MAX_STEPS:
            raise ValueError(
                f"schedule '{schedule}' of {num_steps} steps, expected linear or cosine of 2 to {MAX_STEPS}"
            )
        if schedule == "linear":
            unit = 1000 / num_steps
            betas = torch.linspace(unit * 1e-4, min(unit * 0.02, 0.999), num_steps, dtype=torch.float64)
        else:
            time = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
            kept = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - kept[1:] / kept[:-1]).clamp(max=0.999)
        kept = torch.cumprod(1 - betas, 0)
        self.register_buffer("levels", ((1 - kept) / kept).sqrt(), persistent=False)
        self.nearest, self.unit = nearest, 1000 / num_steps if rescale else 1.0

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The first and the last level."""
        return float(self.levels[0]), float(self.levels[-1])

    def step(self, sigma: Tensor) -> Tensor:
        """Returns the timestep of noise levels `(B,)`, between 0 and `T - 1`."""
        levels = self.levels.double()
        wanted = sigma.double().clamp(levels[0], levels[-1])
        above = torch.searchsorted(levels, wanted).clamp(1, len(levels) - 1)
        low, high = levels[above - 1], levels[above]
        if self.nearest:
            return torch.where(wanted - low <= high - wanted, above - 1, above).to(sigma.dtype)
        return (above - 1 + (wanted / low).log() / (high / low).log()).to(sigma.dtype)

    def forward(self, sigma: Tensor) -> Coefficients:
        """Returns the coefficients of an eps-network, `D = x - sigma F`, at `sigma` `(B,)`."""
        c_in = (1 + sigma**2).rsqrt()
        return Coefficients(torch.ones_like(sigma), -sigma, c_in, self.unit * self.step(sigma))


class DiscreteV(Discrete):
    r"""The same of a v-network: $x_0 = \sqrt{\bar\alpha}\,x_t - \sqrt{1-\bar\alpha}\,F$."""

    def forward(self, sigma: Tensor) -> Coefficients:
        """Returns the coefficients at `sigma` `(B,)`."""
        _, _, c_in, c_noise = super().forward(sigma)
        return Coefficients(c_in**2, -sigma * c_in, c_in, c_noise)


class DiscreteX0(Discrete):
    """The same of a network that predicts the clean image itself, `D = F`."""

    def forward(self, sigma: Tensor) -> Coefficients:
        """Returns the coefficients at `sigma` `(B,)`."""
        _, _, c_in, c_noise = super().forward(sigma)
        return Coefficients(torch.zeros_like(sigma), torch.ones_like(sigma), c_in, c_noise)


PRECONDITIONINGS: dict[str, type[nn.Module]] = {
    "edm": EDM,
    "ve": VE,
    "vp": ContinuousVP,
    "eps": Discrete,
    "v": DiscreteV,
    "x0": DiscreteX0,
}
