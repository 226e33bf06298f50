"""A fully convolutional U-Net for noise- and position-conditioned denoising."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from invrecon.errors import InputError


class NoiseEmbedding(nn.Module):
    """Sinusoidal features of the noise level through a two-layer perceptron (Vaswani et al. 2017; Ho et al. 2020).

    Args:
        num_features: Width of the embedding.
    """

    frequencies: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        half = num_features // 2
        # c_noise = ln(sigma)/4 spans about [-2, 1]: periods from 0.04 to 40 of it resolve every level.
        self.register_buffer("frequencies", 2 * math.pi * torch.logspace(-1.6, 1.4, half), persistent=False)
        self.mlp = nn.Sequential(
            nn.Linear(2 * half, num_features), nn.SiLU(), nn.Linear(num_features, num_features), nn.SiLU()
        )

    def forward(self, c_noise: Tensor) -> Tensor:
        """Maps `(B,)` to `(B, num_features)`."""
        phase = c_noise[:, None] * self.frequencies
        return self.mlp(torch.cat([phase.cos(), phase.sin()], dim=1))


def _zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


class GroupNorm(nn.GroupNorm):
    r"""Group normalisation and modulation as one affine map a channel.

    $$ y = (1 + a) (w (x - \mu_g) / \sqrt{v_g + \epsilon} + c) + b $$

    (Wu & He 2018, eq. 1 to 3; the modulation of Dhariwal & Nichol 2021.) Mean and variance of a group come from two
    sums, and everything else is folded into one multiplication and addition a pixel: several times faster on a CPU
    than `torch.nn.functional.group_norm` in bfloat16, which it equals up to rounding.

    Args:
        num_channels: Channels, in groups of at least four and at most 32 groups.
    """

    def __init__(self, num_channels: int) -> None:
        most = min(32, max(1, num_channels // 4))
        super().__init__(next(n for n in range(most, 0, -1) if num_channels % n == 0), num_channels)

    def forward(self, x: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        """Normalises `x` `(B, C, H, W)`; gains `a` and shifts `b` are `(B, C)`."""
        B, C = x.shape[:2]
        count = C // self.num_groups * x.shape[2:].numel()
        precise = torch.promote_types(x.dtype, torch.float32)
        first, second = (u.sum((2, 3), dtype=precise).reshape(B, self.num_groups, -1).sum(2) for u in (x, x * x))
        mean = first / count
        scale = ((second / count - mean**2).clamp(min=0) + self.eps).rsqrt()
        mean, scale = (u.repeat_interleave(C // self.num_groups, dim=1) for u in (mean, scale))
        gain = self.weight * scale
        shift = self.bias - mean * gain
        if a is not None and b is not None:
            gain, shift = (1 + a) * gain, (1 + a) * shift + b
        return torch.addcmul(shift.to(x.dtype)[:, :, None, None], x, gain.to(x.dtype)[:, :, None, None])


class ResidualBlock(nn.Module):
    r"""A residual block, modulated by the noise embedding.

    $$ y = (P x + C_2\,\mathrm{silu}((1+a) N C_1\,\mathrm{silu}(x) + b)) / \sqrt 2, \quad (a, b) = L e $$

    (He et al. 2016; adaptive normalisation of Dhariwal & Nichol 2021; the scale of Karras et al. 2022.) The usual
    second normalisation, before `C_1`, is left out: it is a fifth of the training time, and at equal time the block
    learns better without it.

    Args:
        in_channels: Channels of `x`.
        out_channels: Channels of `y`.
        num_features: Width of the embedding `e`.
        dropout: Probability of dropping a channel before the second convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, num_features: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.modulation = nn.Linear(num_features, 2 * out_channels)
        self.norm = GroupNorm(out_channels)
        self.dropout = nn.Dropout2d(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.project = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)
        # Zero residual branches: at the start every block is the (scaled) identity, which trains faster.
        _zero(self.conv2)
        _zero(self.modulation)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """Maps `(B, in_channels, H, W)` and `(B, num_features)` to `(B, out_channels, H, W)`."""
        h = self.conv1(nnf.silu(x))
        h = nnf.silu(self.norm(h, *self.modulation(e).chunk(2, dim=1)))
        return (self.project(x) + self.conv2(self.dropout(h))) * math.sqrt(0.5)


class SelfAttention(nn.Module):
    """Multi-head self-attention over the pixels of a feature map, with a residual connection.

    Args:
        num_channels: Channels of the map; 64 a head.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.num_heads = max(1, num_channels // 64)
        self.norm = GroupNorm(num_channels)
        self.qkv = nn.Conv2d(num_channels, 3 * num_channels, 1)
        self.project = nn.Conv2d(num_channels, num_channels, 1)
        _zero(self.project)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(B, C, H, W)` to the same shape."""
        B, C, H, W = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(B, 3, self.num_heads, -1, H * W).transpose(-1, -2).unbind(1)
        h = nnf.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())
        return (x + self.project(h.transpose(-1, -2).reshape(B, C, H, W))) * math.sqrt(0.5)


class UNet(nn.Module):
    """The network `F` of a denoiser: image and position channels in, image channels out, any size.

    One encoder and one decoder stage a level, joined by concatenation (Ronneberger et al. 2015); 2x2 means on the
    way down, nearest neighbours on the way up. Nothing in it depends on the size, so one set of weights serves
    patches and whole images alike; sides must be multiples of `stride`.

    Args:
        image_channels: Channels of the image: 1 for CT, 2 for complex images (real, imaginary), 3 for RGB.
        position_channels: Coordinates concatenated to the image; 0 for a position-free network.
        base_channels: Channels of the finest level.
        multipliers: Channels of each level in units of `base_channels`, finest first.
        num_blocks: Residual blocks per stage.
        attention: Whether self-attention stands between the two bottleneck blocks.
        dropout: Dropout inside the residual blocks.

    Raises:
        InputError: A size that no network has.
    """

    def __init__(
        self,
        image_channels: int = 1,
        position_channels: int = 2,
        base_channels: int = 32,
        multipliers: Sequence[int] = (1, 2, 3),
        num_blocks: int = 1,
        attention: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = {"image_channels": image_channels, "base_channels": base_channels, "num_blocks": num_blocks}
        if min(*sizes.values(), *multipliers) < 1 or not multipliers or position_channels < 0 or not 0 <= dropout < 1:
            raise InputError(
                "A network needs sizes and multipliers of at least 1, position_channels of at least 0 and "
                f"dropout in [0, 1); got {sizes}, {list(multipliers)}, {position_channels} and {dropout:g}."
            )
        self.config = {
            "image_channels": image_channels,
            "position_channels": position_channels,
            "base_channels": base_channels,
            "multipliers": list(multipliers),
            "num_blocks": num_blocks,
            "attention": attention,
            "dropout": dropout,
        }
        widths = [base_channels * m for m in multipliers]
        features = 4 * base_channels
        self.embedding = NoiseEmbedding(features)
        self.stem = nn.Conv2d(image_channels + position_channels, widths[0], 3, padding=1)

        def stage(channels_in: int, channels_out: int) -> nn.ModuleList:
            ins = [channels_in] + [channels_out] * (num_blocks - 1)
            return nn.ModuleList(ResidualBlock(c, channels_out, features, dropout) for c in ins)

        coarser = list(pairwise(widths))
        self.encoder = nn.ModuleList([stage(widths[0], widths[0])] + [stage(a, b) for a, b in coarser])
        self.bottleneck = nn.ModuleList(stage(widths[-1], widths[-1])[:1] + stage(widths[-1], widths[-1])[:1])
        self.attention = SelfAttention(widths[-1]) if attention else nn.Identity()
        # Channels are matched at the coarse side, before upsampling: four times cheaper than after it.
        self.narrow = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in coarser)
        self.decoder = nn.ModuleList(stage(2 * a, a) for a, _ in coarser)
        self.norm = GroupNorm(widths[0])
        self.head = nn.Conv2d(widths[0], image_channels, 3, padding=1)
        _zero(self.head)

    @property
    def stride(self) -> int:
        """The factor by which the coarsest level is reduced; image sides must be multiples of it."""
        return 2 ** len(self.narrow)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """Maps `(B, image + position channels, H, W)` and `(B,)` to `(B, image_channels, H, W)`."""
        e = self.embedding(c_noise)
        h = self.stem(x)
        skips = []
        for level, blocks in enumerate(self.encoder):
            if level:
                skips.append(h)
                h = nnf.avg_pool2d(h, 2)
            for block in blocks:  # type: ignore[attr-defined]
                h = block(h, e)
        first, second = self.bottleneck
        h = second(self.attention(first(h, e)), e)
        for narrow, blocks in zip(reversed(self.narrow), reversed(self.decoder), strict=True):
            h = nnf.interpolate(narrow(h), scale_factor=2.0, mode="nearest")
            h = torch.cat([h, skips.pop()], dim=1)
            for block in blocks:  # type: ignore[attr-defined]
                h = block(h, e)
        return self.head(nnf.silu(self.norm(h)))


class SmallUNet(UNet):
    """The network of the shipped priors: 1.2 M parameters, trained in hours on a few CPU cores.

    Args:
        image_channels: Channels of the image.
        position_channels: Coordinates concatenated to the image.
    """

    def __init__(self, image_channels: int = 1, position_channels: int = 2) -> None:
        super().__init__(image_channels, position_channels, base_channels=32, multipliers=(1, 2, 4))


class LargeUNet(UNet):
    """A network of the published widths and depth (PaDIS, NeurIPS 2024), for GPUs: 37 M of its about 60 M parameters.

    Args:
        image_channels: Channels of the image.
        position_channels: Coordinates concatenated to the image.
        dropout: Dropout inside the residual blocks.
    """

    def __init__(self, image_channels: int = 1, position_channels: int = 2, dropout: float = 0.05) -> None:
        super().__init__(image_channels, position_channels, 128, (1, 2, 2, 2), 4, True, dropout)
