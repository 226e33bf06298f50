"""The small parts of the published networks: embeddings of a number, attention between pixels, resampling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn


class SinusoidalEmbedding(nn.Module):
    r"""Cosines, then sines, of a number at geometric frequencies.

    $$ \omega_j = 10000^{-j / n}, \quad j = 0 \dots K/2 - 1 $$

    with `n = K/2`, or `n = K/2 - 1` so that the lowest frequency is `1/10000` itself (Vaswani et al. 2017;
    Ho et al. 2020).

    Args:
        num_features: `K`.
        endpoint: Whether the lowest frequency is 1/10000.
    """

    frequencies: Tensor

    def __init__(self, num_features: int, endpoint: bool = False) -> None:
        super().__init__()
        half = num_features // 2
        exponents = torch.arange(half, dtype=torch.float64) / max(half - endpoint, 1)
        # Timesteps reach 1000: float32 frequencies, made in float64, keep the phase to 1e-4 rad.
        self.register_buffer("frequencies", (10000.0**-exponents).float(), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        """Maps `(B,)` to `(B, num_features)`."""
        phase = t[:, None] * self.frequencies
        return torch.cat([phase.cos(), phase.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """Cosines, then sines, at random frequencies that belong to the weights (Tancik et al. 2020; NCSN++).

    Args:
        num_features: Width of the embedding.
    """

    freqs: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.zeros(num_features // 2))

    def forward(self, t: Tensor) -> Tensor:
        """Maps `(B,)` to `(B, num_features)`."""
        phase = 2 * math.pi * t[:, None] * self.freqs
        return torch.cat([phase.cos(), phase.sin()], dim=1)


def count_heads(num_channels: int, num_heads: int, head_channels: int | None) -> int:
    """Returns the attention heads of a layer: of `head_channels` each where that is given, else `num_heads`.

    Raises:
        ValueError: If the channels cannot be shared out.
    """
    num = num_heads if head_channels is None else num_channels // head_channels
    if num < 1 or num_channels % num:
        raise ValueError(f"{num_channels} channels cannot be {num} heads of {head_channels or 'equal'} channels")
    return num


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    r"""Returns $\mathrm{softmax}(q^T k / \sqrt d)\,v$ for `(B, heads, d, pixels)` each."""
    q, k, v = (u.transpose(-1, -2).contiguous() for u in (q, k, v))
    return nnf.scaled_dot_product_attention(q, k, v).transpose(-1, -2)


class Resample(nn.Module):
    """A separable filter with every second pixel kept, or its transpose, which keeps the mean.

    Args:
        taps: The filter along one axis; any scale.
        how: `down` or `up`.

    Raises:
        ValueError: If there are no taps.
    """

    kernel: Tensor

    def __init__(self, taps: Sequence[float], how: str) -> None:
        super().__init__()
        if not 1 <= len(taps) <= 16:
            raise ValueError(f"the resampling filter has {len(taps)} taps, expected 1 to 16")
        f = torch.tensor([float(tap) for tap in taps])
        self.register_buffer("kernel", torch.outer(f, f) / f.sum() ** 2, persistent=False)
        self.how = how

    def forward(self, x: Tensor, pad: int | None = None) -> Tensor:
        """Maps `(B, C, H, W)` to half or twice the size; `pad` zeros around it, by default what that takes."""
        C = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(C, 1, -1, -1)
        pad = (kernel.shape[-1] - 1) // 2 if pad is None else pad
        if self.how == "up":
            return nnf.conv_transpose2d(x, 4 * kernel, stride=2, padding=pad, groups=C)
        return nnf.conv2d(x, kernel, stride=2, padding=pad, groups=C)


class ResampledConv(nn.Conv2d):
    """A convolution, after resampling if any.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Odd side of the kernel.
        resample: What comes first.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, resample: Resample | None = None) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(B, in_channels, H, W)` to `(B, out_channels, H', W')`."""
        return super().forward(x if self.resample is None else self.resample(x))


class FilteredConv(nn.Conv2d):
    """A convolution at full resolution, filtered and halved after it; the filter's margin is convolved as well.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        taps: The filter along one axis.
    """

    def __init__(self, in_channels: int, out_channels: int, taps: Sequence[float]) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1 + (len(taps) - 1) // 2)
        self.resample = Resample(taps, "down")

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(B, in_channels, H, W)` to `(B, out_channels, H/2, W/2)`."""
        return self.resample(super().forward(x), pad=0)
