"""The U-Net of guided diffusion, under the tensor names of its published weights.

Ho et al. (NeurIPS 2020) with the changes of Nichol & Dhariwal (ICML 2021) and Dhariwal & Nichol (NeurIPS 2021). The
published files call their tensors `input_blocks.i.j`, `middle_block.k`, `output_blocks.i.j`, `out.k`, `time_embed.k`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from invrecon.priors.thirdparty.layers import SinusoidalEmbedding, attend, count_heads

NUM_GROUPS = 32
RESAMPLINGS = ("conv", "block", "plain")


class ResBlock(nn.Module):
    r"""A residual block, modulated by the embedding, that may halve or double the resolution.

    $$ y = P R x + C_2\,\mathrm{silu}((1 + a) N_2 h + b), \quad h = C_1 R\,\mathrm{silu}(N_1 x), \quad (a, b) = L e $$

    with `R` a 2x2 mean, nearest neighbours or nothing; without scale and shift, `N_2 (h + L e)` instead
    (Dhariwal & Nichol 2021, section 3).

    Args:
        in_channels: Channels of `x`.
        out_channels: Channels of `y`.
        num_features: Width of `e`.
        scale_shift: Whether the embedding scales and shifts; else it is added.
        resample: `down`, `up` or `none`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, num_features: int, scale_shift: bool, resample: str = "none"
    ) -> None:
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nn.Sequential(
            nn.GroupNorm(NUM_GROUPS, in_channels), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        )
        width = 2 * out_channels if scale_shift else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(num_features, width))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(NUM_GROUPS, out_channels),
            nn.SiLU(),
            nn.Identity(),  # where training dropped out
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """Maps `(B, in_channels, H, W)` and `(B, num_features)` to `(B, out_channels, H', W')`."""
        norm, silu, conv = self.in_layers
        h = conv(resampled(silu(norm(x)), self.resample))
        x = resampled(x, self.resample)
        modulation = self.emb_layers(e)[:, :, None, None]
        norm, *rest = self.out_layers
        if self.scale_shift:
            a, b = modulation.chunk(2, dim=1)
            h = norm(h) * (1 + a) + b
        else:
            h = norm(h + modulation)
        for layer in rest:
            h = layer(h)
        return self.skip_connection(x) + h


def resampled(x: Tensor, how: str) -> Tensor:
    """Returns `x` at half the resolution (2x2 means), at twice (nearest neighbours), or as it is."""
    if how == "down":
        return nnf.avg_pool2d(x, 2)
    return nnf.interpolate(x, scale_factor=2.0, mode="nearest") if how == "up" else x


class AttentionBlock(nn.Module):
    """Multi-head self-attention over pixels, with a residual connection.

    Args:
        num_channels: Channels of the map.
        num_heads: Heads.
        new_order: Whether the 3 C channels are all queries, all keys, all values; else each head has its own
            (query, key, value). The tensors' shapes are the same.
    """

    def __init__(self, num_channels: int, num_heads: int, new_order: bool) -> None:
        super().__init__()
        self.num_heads, self.new_order = num_heads, new_order
        self.norm = nn.GroupNorm(NUM_GROUPS, num_channels)
        self.qkv = nn.Conv1d(num_channels, 3 * num_channels, 1)
        self.proj_out = nn.Conv1d(num_channels, num_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(B, C, H, W)` to the same shape."""
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x).reshape(B, C, H * W))
        if self.new_order:
            q, k, v = qkv.reshape(B, 3, self.num_heads, -1, H * W).unbind(1)
        else:
            q, k, v = qkv.reshape(B, self.num_heads, 3, -1, H * W).unbind(2)
        return x + self.proj_out(attend(q, k, v).reshape(B, C, H * W)).reshape(B, C, H, W)


class Downsample(nn.Module):
    """A strided 3x3 convolution, or 2x2 means.

    Args:
        num_channels: Channels of the map.
        learned: Whether by a convolution.
    """

    def __init__(self, num_channels: int, learned: bool) -> None:
        super().__init__()
        self.op = nn.Conv2d(num_channels, num_channels, 3, stride=2, padding=1) if learned else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """Halves the resolution."""
        return self.op(x)


class Upsample(nn.Module):
    """Nearest neighbours, and a 3x3 convolution if it is learned.

    Args:
        num_channels: Channels of the map.
        learned: Whether a convolution follows.
    """

    def __init__(self, num_channels: int, learned: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(num_channels, num_channels, 3, padding=1) if learned else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Doubles the resolution."""
        return self.conv(resampled(x, "up"))


class Stage(nn.Sequential):
    """Layers in a row, of which the residual blocks see the embedding."""

    def forward(self, x: Tensor, e: Tensor) -> Tensor:  # type: ignore[override]
        """Maps `(B, C, H, W)` and `(B, num_features)`."""
        for layer in self:
            x = layer(x, e) if isinstance(layer, ResBlock) else layer(x)
        return x


class GuidedDiffusionUNet(nn.Module):
    """The network of guided diffusion and its descendants, `F(x_t, t)`.

    Nothing in it depends on the image's size.

    Args:
        image_channels: Channels of the image.
        out_channels: Channels of the output: the image's, or twice as many where the variance was learned too.
        position_channels: Coordinates concatenated to the image; 0 in every published network.
        base_channels: Width of the timestep embedding's sinusoids, and unit of the multipliers.
        stem_channels: Channels after the first convolution.
        multipliers: Channels of each level in units of `base_channels`, finest first.
        num_blocks: Residual blocks per level of the encoder; the decoder has one more.
        attention_levels: Levels with attention, 0 the finest.
        scale_shift: Whether the embedding scales and shifts the normalised maps; else it is added.
        resample: Between levels: `conv` (learned), `block` (a residual block that resamples) or `plain`.
        num_heads: Attention heads, where `head_channels` does not say.
        head_channels: Channels of an attention head.
        new_attention_order: See `AttentionBlock`.

    Raises:
        ValueError: If no such network can be built.
    """

    def __init__(
        self,
        image_channels: int,
        out_channels: int,
        base_channels: int,
        stem_channels: int,
        multipliers: Sequence[float],
        num_blocks: int,
        attention_levels: Sequence[int],
        scale_shift: bool,
        resample: str,
        num_heads: int = 1,
        head_channels: int | None = None,
        new_attention_order: bool = False,
        position_channels: int = 0,
    ) -> None:
        super().__init__()
        if resample not in RESAMPLINGS:
            raise ValueError(f"resample is '{resample}', expected one of {', '.join(RESAMPLINGS)}")
        widths = [round(m * base_channels) for m in multipliers]
        features, last = 4 * base_channels, len(widths) - 1
        self.num_levels = len(widths)
        self.frequencies = SinusoidalEmbedding(base_channels)
        self.time_embed = nn.Sequential(nn.Linear(base_channels, features), nn.SiLU(), nn.Linear(features, features))

        def block(channels_in: int, channels_out: int, how: str = "none") -> ResBlock:
            return ResBlock(channels_in, channels_out, features, scale_shift, how)

        def attention(channels: int) -> AttentionBlock:
            return AttentionBlock(channels, count_heads(channels, num_heads, head_channels), new_attention_order)

        def stage(channels_in: int, level: int) -> list[nn.Module]:
            blocks: list[nn.Module] = [block(channels_in, widths[level])]
            return [*blocks, attention(widths[level])] if level in attention_levels else blocks

        channels = stem_channels
        skips = [channels]
        self.input_blocks = nn.ModuleList(
            [Stage(nn.Conv2d(image_channels + position_channels, channels, 3, padding=1))]
        )
        for level, width in enumerate(widths):
            for _ in range(num_blocks):
                self.input_blocks.append(Stage(*stage(channels, level)))
                channels = width
                skips.append(channels)
            if level < last:
                down = block(width, width, "down") if resample == "block" else Downsample(width, resample == "conv")
                self.input_blocks.append(Stage(down))
                skips.append(channels)
        self.middle_block = Stage(block(channels, channels), attention(channels), block(channels, channels))
        self.output_blocks = nn.ModuleList()
        for level in range(last, -1, -1):
            width = widths[level]
            for i in range(num_blocks + 1):
                layers = stage(channels + skips.pop(), level)
                channels = width
                if level and i == num_blocks:
                    up = block(width, width, "up") if resample == "block" else Upsample(width, resample == "conv")
                    layers.append(up)
                self.output_blocks.append(Stage(*layers))
        self.out = nn.Sequential(
            nn.GroupNorm(NUM_GROUPS, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )

    @property
    def stride(self) -> int:
        """The factor by which the coarsest level is reduced; image sides must be multiples of it."""
        return 2 ** (self.num_levels - 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Maps `(B, C, H, W)` and timesteps `(B,)` to `(B, out_channels, H, W)`."""
        e = self.time_embed(self.frequencies(t))
        skips = []
        for stage in self.input_blocks:
            x = stage(x, e)
            skips.append(x)
        x = self.middle_block(x, e)
        for stage in self.output_blocks:
            x = stage(torch.cat([x, skips.pop()], dim=1), e)
        return self.out(x)
