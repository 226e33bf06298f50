"""Networks whose weights are the unknown: made anew for every measurement, from that case's own generator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import pairwise

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from invrecon.errors import InputError


class FittedNetwork(ABC):
    """Makes the network `f_theta` that is fitted to one measurement.

    A subclass says what the network is, without buffers; its weights are drawn here: matrices and kernels from
    `N(0, init_std^2)`, gains 1, offsets 0. Nothing comes from torch's global generator.

    Args:
        init_std: Standard deviation of the first weights.

    Raises:
        InputError: It is not positive.
    """

    def __init__(self, init_std: float = 0.02) -> None:
        if not init_std > 0:
            raise InputError(f"{type(self).__name__}: init_std is {init_std}, but it has to be above 0.")
        self.init_std = float(init_std)

    @property
    def min_size(self) -> int:
        """The smallest side of an image that it takes, in pixels."""
        return 1

    @abstractmethod
    def module(self, in_channels: int, out_channels: int) -> nn.Module:
        """Returns the network, `(B, in_channels, H, W)` to `(B, out_channels, H, W)`; its weights do not matter."""

    def build(
        self, in_channels: int, image_shape: tuple[int, ...], generator: torch.Generator, like: Tensor
    ) -> nn.Module:
        """Returns a fresh network for images of this shape.

        Args:
            in_channels: Channels of its input.
            image_shape: Shape of its output, `(C, H, W)`.
            generator: Gives the weights.
            like: Gives dtype and device.

        Raises:
            InputError: An image that is no two-dimensional one, or too small.
        """
        if len(image_shape) != 3 or min(image_shape[1:]) < self.min_size:
            raise InputError(
                f"{type(self).__name__} makes images (channels, H, W) of at least {self.min_size} pixels a side, got "
                f"{tuple(image_shape)}: use fewer levels, or a method without a network for this operator."
            )
        with torch.device("meta"):  # torch's own initialisation would draw from the global generator
            network = self.module(in_channels, image_shape[0])
        network = network.to_empty(device=like.device).to(like.dtype)
        with torch.no_grad():
            for part in network.modules():
                for name, weight in part.named_parameters(recurse=False):
                    if weight.ndim > 1:
                        draw = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
                        weight.copy_(self.init_std * draw)
                    else:
                        weight.fill_(1.0 if name == "weight" else 0.0)
        return network


class DIPUNet(FittedNetwork):
    """The U-Net of the deep-image-prior family: pairs of 3 x 3 convolutions, pooled by maxima, raised bilinearly.

    Normalisation is a channel's own over the image, which batch normalisation is for a batch of one. The output is
    linear in the last features. Any size goes: what is raised takes the size of the level it joins.

    Source: Ulyanov, Vedaldi & Lempitsky, "Deep image prior", CVPR 2018, for the idea; Liang, Bell, Qu, Wang &
    Ravishankar, "Analysis of deep image prior and exploiting self-guidance for image reconstruction", arXiv
    2402.04097, for this network, with widths 64, 128, 256 and 256.

    Args:
        widths: Channels of the levels, finest first.
        init_std: Standard deviation of the first weights.

    Raises:
        InputError: No widths, or one below 1.
    """

    def __init__(self, widths: list[int] | None = None, init_std: float = 0.02) -> None:
        super().__init__(init_std)
        self.widths = [32, 64, 128, 128] if widths is None else list(widths)
        if not self.widths or min(self.widths) < 1:
            raise InputError(
                f"DIPUNet: widths is {self.widths}, but it needs at least one level, of 1 channel or more."
            )

    @property
    def min_size(self) -> int:
        """A side that leaves two pixels at the coarsest level."""
        return 2 ** len(self.widths)

    def module(self, in_channels: int, out_channels: int) -> nn.Module:
        """Returns the network."""
        return _UNet(in_channels, out_channels, self.widths)


class _UNet(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, widths: list[int]) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(_pair(a, b) for a, b in pairwise([in_channels, *widths]))
        self.decoder = nn.ModuleList(_pair(a + b, a) for a, b in pairwise(widths))
        self.head = nn.Conv2d(widths[0], out_channels, 1)

    def forward(self, z: Tensor) -> Tensor:
        levels = []
        for level, block in enumerate(self.encoder):
            z = block(nnf.max_pool2d(z, 2) if level else z)
            levels.append(z)
        z = levels.pop()
        for block in reversed(self.decoder):
            finer = levels.pop()
            raised = nnf.interpolate(z, size=finer.shape[-2:], mode="bilinear", align_corners=False)
            z = block(torch.cat([finer, raised], dim=1))
        return self.head(z)


def _pair(in_channels: int, out_channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (in_channels, out_channels):
        # The normalisation takes out the convolution's offset.
        layers += [nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)]
        layers += [nn.InstanceNorm2d(out_channels, affine=True), nn.ReLU()]
    return nn.Sequential(*layers)
