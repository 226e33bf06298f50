"""EDM preconditioning, loss weight and noise proposal (Karras et al., NeurIPS 2022, table 1 and section 5)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from invrecon.errors import InputError
from invrecon.precision import reduced_dtype
from invrecon.priors.base import broadcast, per_sample


class EDMDenoiser(nn.Module):
    r"""A denoiser whose network sees unit-variance inputs and targets at every noise level.

    $$ D(u, \sigma, p) = c_{skip} u + c_{out} F([c_{in} u, p], c_{noise}) $$

    with $c_{skip} = s^2/(\sigma^2+s^2)$, $c_{out} = \sigma s/\sqrt{\sigma^2+s^2}$, $c_{in} = 1/\sqrt{\sigma^2+s^2}$,
    $c_{noise} = \ln(\sigma)/4$ and $s$ the data's standard deviation (Karras et al. 2022, table 1).
    The position channels $p$ are concatenated unscaled, as many as the network takes (0 for one that knows no
    positions); $c_{skip}$ acts on the image alone.

    Args:
        network: `F(input, c_noise)`, from `image channels + position channels` to image channels.
        sigma_data: The data's standard deviation `s`, in intensity units.

    Attributes:
        image_channels: Channels of the images; None if the network does not say.
    """

    sigma_data: Tensor

    def __init__(self, network: nn.Module, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("sigma_data", torch.tensor(float(sigma_data)))
        config = getattr(network, "config", {})
        self.position_channels: int = config.get("position_channels", 2)
        self.image_channels: int | None = config.get("image_channels")
        self.precision = "32"  # of the network, see `invrecon.precision`

    def forward(self, u: Tensor, sigma: float | Tensor, position: Tensor) -> Tensor:
        """Returns `D(u, sigma, position)`, `(B, C, H, W)`, in the dtype of `u`.

        Args:
            u: Noisy images or patches, `(B, C, H, W)`.
            sigma: Noise standard deviation, a float or `(B,)`; positive.
            position: Coordinates of the pixels, `(B, 2, H, W)`, see `invrecon.priors.patch.coordinates`.
        """
        sigma = per_sample(sigma, u)
        s = self.sigma_data.to(u.dtype)
        variance = sigma**2 + s**2
        c_skip, c_out, c_in = s**2 / variance, sigma * s / variance.sqrt(), 1 / variance.sqrt()
        inputs = torch.cat([broadcast(c_in, u) * u, position[:, : self.position_channels].to(u.dtype)], dim=1)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        # Only the network runs in reduced precision: the state, the skip path and the operators stay as they are.
        dtype = reduced_dtype(self.precision, u.device)
        if dtype is None:
            F = self.network(inputs, sigma.log() / 4)
        else:
            with torch.autocast(u.device.type, dtype=dtype):
                F = self.network(inputs, sigma.log() / 4)
        return broadcast(c_skip, u) * u + broadcast(c_out, u) * F.to(u.dtype)

    def loss_weight(self, sigma: Tensor) -> Tensor:
        r"""Returns $w(\sigma) = (\sigma^2+s^2)/(\sigma s)^2$, `(B,)`: unit loss at every level before training."""
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2

    def denoising_losses(self, x: Tensor, sigma: Tensor, noise: Tensor, position: Tensor) -> Tensor:
        r"""Returns $w(\sigma) \| D(x + \sigma n, \sigma, p) - x \|^2$, a mean over pixels, of every image, `(B,)`.

        Denoising score matching (Vincent 2011) with the weight of Karras et al. 2022, table 1.

        Args:
            x: Clean images or patches, `(B, C, H, W)`.
            sigma: Noise standard deviations, `(B,)`.
            noise: `n`, standard normal, like `x`.
            position: Coordinates of the pixels, `(B, 2, H, W)`.
        """
        error = (self(x + broadcast(sigma, noise) * noise, sigma, position) - x).square().mean(dim=(1, 2, 3))
        return self.loss_weight(sigma) * error


class NoiseProposal:
    r"""A log-normal proposal for the training noise level, truncated to a range.

    $$ \ln \sigma \sim N(m, d^2), \quad \sigma_{min} \le \sigma \le \sigma_{max} $$

    EDM's own (m = -1.2, d = 1.2) almost never visits the levels below 0.03 where a sampler that starts from a
    measurement spends most of its evaluations. The default puts 13 % of the draws below 0.01, 11 % above 1, and
    still reaches the 10 at which unconditional sampling starts.

    Args:
        log_mean: `m`.
        log_std: `d`.
        sigma_min: Smallest level, in intensity units.
        sigma_max: Largest level, in intensity units.

    Raises:
        InputError: If the levels are not `0 < sigma_min < sigma_max`, or `d` is not positive.
    """

    def __init__(
        self,
        log_mean: float = -2.5,
        log_std: float = 2.0,
        sigma_min: float = 0.0015,
        sigma_max: float = 40.0,
    ) -> None:
        if not (0 < sigma_min < sigma_max and log_std > 0):
            raise InputError(
                f"The noise proposal needs 0 < sigma_min < sigma_max and log_std > 0; got sigma_min {sigma_min}, "
                f"sigma_max {sigma_max}, log_std {log_std}. Set them in model.proposal."
            )
        self.log_mean, self.log_std = log_mean, log_std
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def quantile(self, q: Tensor) -> Tensor:
        """Returns the `q`-quantiles of the truncated proposal (inverse-CDF sampling)."""
        low, high = (
            0.5 * (1 + math.erf((math.log(edge) - self.log_mean) / (self.log_std * math.sqrt(2))))
            for edge in (self.sigma_min, self.sigma_max)
        )
        normal = torch.special.ndtri((low + (high - low) * q.double()).clamp(1e-12, 1 - 1e-12))
        sigma = (self.log_mean + self.log_std * normal).exp()
        return sigma.clamp(self.sigma_min, self.sigma_max).to(q.dtype)

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        """Returns `num` stratified draws, `(num,)`: one from each of `num` equal-probability bins, shuffled.

        Stratifying lowers the variance of the loss between steps without changing its expectation.
        """
        jitter = torch.rand(num, generator=generator)
        order = torch.randperm(num, generator=generator)
        return self.quantile((order + jitter) / num)
