"""A published network as a denoiser of our images: its units, its coordinates, its preconditioning."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from invrecon.precision import reduced_dtype
from invrecon.priors.base import broadcast, per_sample
from invrecon.priors.edm import EDMDenoiser
from invrecon.priors.thirdparty.edm import DhariwalUNet, SongUNet
from invrecon.priors.thirdparty.guided_diffusion import GuidedDiffusionUNet
from invrecon.priors.thirdparty.preconditioning import PRECONDITIONINGS

FAMILIES: dict[str, type[nn.Module]] = {
    "guided-diffusion": GuidedDiffusionUNet,
    "song": SongUNet,
    "dhariwal": DhariwalUNet,
}


class ImportedDenoiser(EDMDenoiser):
    r"""`D(u, sigma, p)` of a network that lives in units of its own.

    $$ D(u, \sigma, p) = (D_{net}(v, a \sigma, k p) - b)/a, \quad v = a u + b, \quad
       D_{net} = c_{skip} v + c_{out} F([c_{in} v, k p], c_{noise}) $$

    exact for any affine change of units, since $v$ has noise of standard deviation $a \sigma$. Networks that
    learned a variance too give it after the image's channels, and it is left out.

    Args:
        network: `F`, with `out_channels` at least the image's.
        preconditioning: Gives the coefficients at a noise level in the network's units.
        position_channels: Coordinates that the network takes; 0 or 2.
        data_range: The network's values `(b, a + b)` for our 0 and 1.
        position_scale: `k`, the network's coordinate at the edge of our image.
        sigma_data: The data's standard deviation, in our units.
        image_channels: Channels of the images; None if not stated.

    Raises:
        ValueError: If the data range is empty.
    """

    def __init__(
        self,
        network: nn.Module,
        preconditioning: nn.Module,
        position_channels: int = 0,
        data_range: tuple[float, float] = (0.0, 1.0),
        position_scale: float = 1.0,
        sigma_data: float = 0.5,
        image_channels: int | None = None,
    ) -> None:
        super().__init__(network, sigma_data)
        self.image_channels = image_channels
        low, high = (float(edge) for edge in data_range)
        if not low < high:
            raise ValueError(f"the data range is {low} to {high}")
        self.preconditioning = preconditioning
        self.position_channels, self.position_scale = position_channels, float(position_scale)
        self.shift, self.scale = low, high - low

    def forward(self, u: Tensor, sigma: float | Tensor, position: Tensor) -> Tensor:
        """Returns `D(u, sigma, position)`, `(B, C, H, W)`, in the dtype of `u`.

        Args:
            u: Noisy images or patches, `(B, C, H, W)`.
            sigma: Noise standard deviation, a float or `(B,)`; positive.
            position: Coordinates of the pixels, `(B, 2, H, W)`; ignored by a network without positions.
        """
        v = self.scale * u + self.shift
        c_skip, c_out, c_in, c_noise = self.preconditioning(self.scale * per_sample(sigma, u))
        inputs = broadcast(c_in, v) * v
        if self.position_channels:
            inputs = torch.cat([inputs, self.position_scale * position.to(u.dtype)], dim=1)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        # Only the network runs in reduced precision: the state, the skip path and the operators stay as they are.
        dtype = reduced_dtype(self.precision, u.device)
        with nullcontext() if dtype is None else torch.autocast(u.device.type, dtype=dtype):
            F = self.network(inputs, c_noise)[:, : u.shape[1]]
        return (broadcast(c_skip, v) * v + broadcast(c_out, v) * F.to(u.dtype) - self.shift) / self.scale

    def loss_weight(self, sigma: Tensor) -> Tensor:
        r"""Returns $(a/c_{out})^2$, `(B,)`: the weight that makes it the loss of the network's own output."""
        return (self.scale / self.preconditioning(self.scale * sigma).c_out) ** 2


def build_denoiser(network: dict[str, Any], denoiser: dict[str, Any], sigma_data: float) -> ImportedDenoiser:
    """Returns an untrained denoiser of what a card states.

    Args:
        network: `family`, and the constructor arguments of its network.
        denoiser: `prediction` and the constructor arguments of its preconditioning under `settings`;
            `data_range` and `position_scale`.
        sigma_data: Standard deviation of the data in our units.

    Raises:
        ValueError, TypeError, KeyError: If no such denoiser can be built.
    """
    arguments = {key: value for key, value in network.items() if key != "family"}
    built = FAMILIES[network["family"]](**arguments)
    preconditioning = PRECONDITIONINGS[denoiser["prediction"]](**denoiser.get("settings", {}))
    return ImportedDenoiser(
        built,
        preconditioning,
        int(network.get("position_channels", 0)),
        denoiser.get("data_range", (0.0, 1.0)),
        denoiser.get("position_scale", 1.0),
        sigma_data,
        network.get("image_channels"),
    )
