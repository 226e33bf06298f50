"""The networks of EDM, under the tensor names of their published weights: `SongUNet` and `DhariwalUNet`.

Karras et al. (NeurIPS 2022, appendix F.2) rebuilt DDPM++ and NCSN++ (Song et al., ICLR 2021) and ADM (Dhariwal &
Nichol, NeurIPS 2021). The published files call their tensors `enc.<R>x<R>_<block>`, `dec.<R>x<R>_<block>`,
`map_layer<k>`, with `R` the nominal resolution of the level. PaDIS's patch networks are SongUNets too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from invrecon.priors.thirdparty.layers import (
    FilteredConv,
    FourierEmbedding,
    Resample,
    ResampledConv,
    SinusoidalEmbedding,
    attend,
    count_heads,
)

ENCODERS = ("standard", "skip", "residual")
DECODERS = ("standard", "skip")
EMBEDDINGS = ("positional", "fourier")


def group_norm(num_channels: int, eps: float) -> nn.GroupNorm:
    """Returns a normalisation of at most 32 groups of at least four channels."""
    return nn.GroupNorm(min(32, max(1, num_channels // 4)), num_channels, eps)


class UNetBlock(nn.Module):
    r"""A residual block, modulated by the embedding, with attention after it where asked.

    $$ y = s (P R x + C_2\,\mathrm{silu}(m(N_1 h, e))), \quad h = C_1 R\,\mathrm{silu}(N_0 x) $$

    where `m` adds `L e` before the normalisation, or (`adaptive`) scales and shifts after it; then
    `s (y + A y)` (Karras et al. 2022, table 7 and figure 8).

    Args:
        in_channels: Channels of `x`.
        out_channels: Channels of `y`.
        num_features: Width of `e`.
        num_heads: Attention heads; 0 for none.
        how: `down`, `up` or `none`.
        taps: Resampling filter along one axis.
        adaptive: Whether the embedding scales and shifts; else it is added.
        project: Whether the skip path has a 1x1 convolution wherever the block resamples.
        scale: `s`.
        eps: Of the normalisations.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_features: int,
        num_heads: int,
        how: str,
        taps: Sequence[float],
        adaptive: bool,
        project: bool,
        scale: float,
        eps: float,
    ) -> None:
        super().__init__()
        self.adaptive, self.scale, self.num_heads = adaptive, scale, num_heads

        def resample() -> Resample | None:
            return None if how == "none" else Resample(taps, how)

        self.norm0 = group_norm(in_channels, eps)
        self.conv0 = ResampledConv(in_channels, out_channels, 3, resample())
        self.affine = nn.Linear(num_features, out_channels * (2 if adaptive else 1))
        self.norm1 = group_norm(out_channels, eps)
        self.conv1 = ResampledConv(out_channels, out_channels, 3)
        self.skip: nn.Module = resample() or nn.Identity()
        if in_channels != out_channels or (how != "none" and project):
            self.skip = ResampledConv(in_channels, out_channels, 1, resample())
        if num_heads:
            self.norm2 = group_norm(out_channels, eps)
            self.qkv = nn.Conv2d(out_channels, 3 * out_channels, 1)
            self.proj = nn.Conv2d(out_channels, out_channels, 1)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """Maps `(B, in_channels, H, W)` and `(B, num_features)` to `(B, out_channels, H', W')`."""
        h = self.conv0(nnf.silu(self.norm0(x)))
        modulation = self.affine(e)[:, :, None, None]
        if self.adaptive:
            a, b = modulation.chunk(2, dim=1)
            h = b + self.norm1(h) * (1 + a)
        else:
            h = self.norm1(h + modulation)
        y = self.scale * (self.skip(x) + self.conv1(nnf.silu(h)))
        return self.scale * (y + self.attention(y)) if self.num_heads else y

    def attention(self, x: Tensor) -> Tensor:
        """Returns the attention between the pixels of `x`; query, key and value of a channel are neighbours."""
        B, C, H, W = x.shape
        q, k, v = self.qkv(self.norm2(x)).reshape(B, self.num_heads, -1, 3, H * W).unbind(3)
        return self.proj(attend(q, k, v).reshape(B, C, H, W))


class _Trunk(nn.Module):
    """What both networks share: an encoder and a decoder, level by level, under the published names.

    Args:
        resolution: Nominal image side.
        stem: Channels of the input and of the first convolution.
        widths: Channels of each level, finest first.
        num_blocks: Residual blocks per level of the encoder; the decoder has one more.
        attention_levels: Levels with attention; the coarsest always has one in the decoder.
        last_only: Whether only the last block of a level of the decoder has it.
        block: Builds a block of (channels in, channels out, `down`/`up`/`none`, whether with attention).
    """

    def __init__(
        self,
        resolution: int,
        stem: tuple[int, int],
        widths: Sequence[int],
        num_blocks: int,
        attention_levels: Sequence[int],
        last_only: bool,
        block: Callable[[int, int, str, bool], UNetBlock],
    ) -> None:
        super().__init__()
        self.names = [f"{resolution >> level}x{resolution >> level}" for level in range(len(widths))]
        self.num_blocks = num_blocks
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        self.enc[f"{self.names[0]}_conv"] = ResampledConv(*stem, 3)
        channels = stem[1]
        skips = [channels]
        for level, (name, width) in enumerate(zip(self.names, widths, strict=True)):
            if level:
                self.enc[f"{name}_down"] = block(channels, channels, "down", False)
                skips.append(channels)
            for i in range(num_blocks):
                self.enc[f"{name}_block{i}"] = block(channels, width, "none", level in attention_levels)
                channels = width
                skips.append(channels)
        self.dec[f"{self.names[-1]}_in0"] = block(channels, channels, "none", True)
        self.dec[f"{self.names[-1]}_in1"] = block(channels, channels, "none", False)
        for level, (name, width) in reversed(list(enumerate(zip(self.names, widths, strict=True)))):
            if name != self.names[-1]:
                self.dec[f"{name}_up"] = block(channels, channels, "up", False)
            for i in range(num_blocks + 1):
                attention = level in attention_levels and (i == num_blocks or not last_only)
                self.dec[f"{name}_block{i}"] = block(channels + skips.pop(), width, "none", attention)
                channels = width

    @property
    def stride(self) -> int:
        """The factor by which the coarsest level is reduced; image sides must be multiples of it."""
        return 2 ** (len(self.names) - 1)

    def merge(self, name: str, x: Tensor, pyramid: Tensor) -> tuple[Tensor, Tensor]:
        """Lets a pyramid of the input into the map of a level that was just reached: here nothing."""
        return x, pyramid

    def levels(self, x: Tensor, e: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yields name and map of each level of the decoder, coarsest first, for an input and its embedding."""
        pyramid, skips = x, []
        for name in self.names:
            if name == self.names[0]:
                x = self.enc[f"{name}_conv"](x)
            else:
                x, pyramid = self.merge(name, self.enc[f"{name}_down"](x, e), pyramid)
            skips.append(x)
            for i in range(self.num_blocks):
                x = self.enc[f"{name}_block{i}"](x, e)
                skips.append(x)
        x = self.dec[f"{self.names[-1]}_in1"](self.dec[f"{self.names[-1]}_in0"](x, e), e)
        for name in reversed(self.names):
            if name != self.names[-1]:
                x = self.dec[f"{name}_up"](x, e)
            for i in range(self.num_blocks + 1):
                x = self.dec[f"{name}_block{i}"](torch.cat([x, skips.pop()], dim=1), e)
            yield name, x


class SongUNet(_Trunk):
    """DDPM++ (`ddpmpp`), NCSN++ (`ncsnpp`), and everything between, `F(x, c_noise)`.

    Args:
        image_channels: Channels of the image.
        out_channels: Channels of the output.
        resolution: Nominal image side, after which the published tensors are named; any size is accepted.
        base_channels: Channels of the first convolution and unit of the multipliers.
        multipliers: Channels of each level in units of `base_channels`, finest first.
        num_blocks: Residual blocks per level of the encoder; the decoder has one more.
        attention_levels: Levels with attention, 0 the finest; the coarsest always has one in the decoder.
        embedding: `positional` or `fourier`.
        noise_channels: Width of the embedding's sinusoids.
        num_features: Width of the embedding.
        encoder: `standard`, or a pyramid of the input that is added: `skip`, `residual`.
        decoder: `standard`, or a pyramid of outputs that are added: `skip`.
        taps: Resampling filter along one axis.
        num_heads: Attention heads, where `head_channels` does not say.
        head_channels: Channels of an attention head.
        position_channels: Coordinates concatenated to the image.

    Raises:
        ValueError: If no such network can be built.
    """

    def __init__(
        self,
        image_channels: int,
        out_channels: int,
        resolution: int,
        base_channels: int,
        multipliers: Sequence[float],
        num_blocks: int,
        attention_levels: Sequence[int],
        embedding: str,
        noise_channels: int,
        num_features: int,
        encoder: str,
        decoder: str,
        taps: Sequence[float],
        num_heads: int = 1,
        head_channels: int | None = None,
        position_channels: int = 0,
    ) -> None:
        if encoder not in ENCODERS or decoder not in DECODERS or embedding not in EMBEDDINGS:
            raise ValueError(f"encoder '{encoder}', decoder '{decoder}', embedding '{embedding}' are not known")

        def block(channels_in: int, channels: int, how: str, attention: bool) -> UNetBlock:
            heads = count_heads(channels, num_heads, head_channels) if attention else 0
            return UNetBlock(
                channels_in, channels, num_features, heads, how, taps,
                adaptive=False, project=True, scale=math.sqrt(0.5), eps=1e-6,
            )  # fmt: skip

        inputs, widths = image_channels + position_channels, [round(m * base_channels) for m in multipliers]
        super().__init__(
            resolution, (inputs, base_channels), widths, num_blocks, attention_levels, last_only=True, block=block
        )
        self.encoder, self.decoder = encoder, decoder
        fourier = embedding == "fourier"
        self.map_noise = FourierEmbedding(noise_channels) if fourier else SinusoidalEmbedding(noise_channels, True)
        self.map_layer0 = nn.Linear(noise_channels, num_features)
        self.map_layer1 = nn.Linear(num_features, num_features)
        aux = inputs
        for name, channels in zip(self.names[1:], widths, strict=False):
            if encoder == "skip":
                self.enc[f"{name}_aux_down"] = Resample(taps, "down")
                self.enc[f"{name}_aux_skip"] = ResampledConv(inputs, channels, 1)
            elif encoder == "residual":
                self.enc[f"{name}_aux_residual"] = FilteredConv(aux, channels, taps)
                aux = channels
        for name, channels in zip(self.names, widths, strict=True):
            if decoder == "skip" or name == self.names[0]:
                if decoder == "skip" and name != self.names[-1]:
                    self.dec[f"{name}_aux_up"] = Resample(taps, "up")
                self.dec[f"{name}_aux_norm"] = group_norm(channels, 1e-6)
                self.dec[f"{name}_aux_conv"] = ResampledConv(channels, out_channels, 3)

    def merge(self, name: str, x: Tensor, pyramid: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the input's pyramid to the map of a level, and takes it one level down."""
        if self.encoder == "skip":
            pyramid = self.enc[f"{name}_aux_down"](pyramid)
            x = x + self.enc[f"{name}_aux_skip"](pyramid)
        elif self.encoder == "residual":
            x = pyramid = math.sqrt(0.5) * (x + self.enc[f"{name}_aux_residual"](pyramid))
        return x, pyramid

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """Maps `(B, C, H, W)` and `(B,)` to `(B, out_channels, H, W)`."""
        cos, sin = self.map_noise(c_noise).chunk(2, dim=1)
        e = nnf.silu(self.map_layer0(torch.cat([sin, cos], dim=1)))
        e = nnf.silu(self.map_layer1(e))
        out: Tensor | None = None
        for name, h in self.levels(x, e):
            if self.decoder == "skip" or name == self.names[0]:
                here = self.dec[f"{name}_aux_conv"](nnf.silu(self.dec[f"{name}_aux_norm"](h)))
                out = here if out is None else here + self.dec[f"{name}_aux_up"](out)
        assert out is not None
        return out


class DhariwalUNet(_Trunk):
    """ADM in EDM's form, `F(x, c_noise)`.

    Args:
        image_channels: Channels of the image.
        out_channels: Channels of the output.
        resolution: Nominal image side, after which the published tensors are named; any size is accepted.
        base_channels: Width of the embedding's sinusoids and unit of the multipliers.
        multipliers: Channels of each level in units of `base_channels`, finest first.
        num_blocks: Residual blocks per level of the encoder; the decoder has one more.
        attention_levels: Levels with attention, 0 the finest; the coarsest always has one in the decoder.
        num_features: Width of the embedding.
        taps: Resampling filter along one axis.
        num_heads: Attention heads, where `head_channels` does not say.
        head_channels: Channels of an attention head.
        position_channels: Coordinates concatenated to the image.

    Raises:
        ValueError: If no such network can be built.
    """

    def __init__(
        self,
        image_channels: int,
        out_channels: int,
        resolution: int,
        base_channels: int,
        multipliers: Sequence[float],
        num_blocks: int,
        attention_levels: Sequence[int],
        num_features: int,
        taps: Sequence[float],
        num_heads: int = 1,
        head_channels: int | None = None,
        position_channels: int = 0,
    ) -> None:
        def block(channels_in: int, channels: int, how: str, attention: bool) -> UNetBlock:
            # Maps narrower than one head have no attention, whatever the level.
            wide = head_channels is None or channels >= head_channels
            heads = count_heads(channels, num_heads, head_channels) if attention and wide else 0
            return UNetBlock(
                channels_in, channels, num_features, heads, how, taps,
                adaptive=True, project=False, scale=1.0, eps=1e-5,
            )  # fmt: skip

        inputs, widths = image_channels + position_channels, [round(m * base_channels) for m in multipliers]
        super().__init__(
            resolution, (inputs, widths[0]), widths, num_blocks, attention_levels, last_only=False, block=block
        )
        self.map_noise = SinusoidalEmbedding(base_channels)
        self.map_layer0 = nn.Linear(base_channels, num_features)
        self.map_layer1 = nn.Linear(num_features, num_features)
        self.out_norm = group_norm(widths[0], 1e-5)
        self.out_conv = ResampledConv(widths[0], out_channels, 3)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """Maps `(B, C, H, W)` and `(B,)` to `(B, out_channels, H, W)`."""
        e = nnf.silu(self.map_layer1(nnf.silu(self.map_layer0(self.map_noise(c_noise)))))
        for _, h in self.levels(x, e):
            x = h
        return self.out_conv(nnf.silu(self.out_norm(x)))
