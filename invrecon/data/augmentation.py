"""Random changes of training images: mirrored, turned, scaled, with another contrast, sharpness and grain.

A prior that is to reconstruct patients it has never seen learns from few. Each patch that it is shown is therefore one
of an image as another patient, position on the table, reconstruction kernel or dose would have given it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from invrecon.errors import InputError


class Changes(NamedTuple):
    """What is done to each of `n` patches.

    Attributes:
        turn: Linear maps `(n, 2, 2)` from the changed image to the original, on (column, row) from the centre.
        shift: Where the centre comes from, `(n, 2)`, as a fraction of the image's half width.
        gamma: Exponent of the magnitude, `(n,)`.
        gain: Factor of the intensity, `(n,)`.
        blur: Share of a binomial blur that is mixed in, `(n,)`; negative sharpens.
        grain: Standard deviation of the added noise, intensity units, `(n,)`, zero for none.
        correlation: Share of the noise that is blurred, `(n,)`.
        seed: What the noise is a function of.
    """

    turn: Tensor
    shift: Tensor
    gamma: Tensor
    gain: Tensor
    blur: Tensor
    grain: Tensor
    correlation: Tensor
    seed: int


class Augmentation:
    r"""Shows every training patch as part of a randomly changed image.

    $$ x'(p) = x(c + R(p - c) + t), \quad x'' = g\, x' |x'|^{\gamma - 1}, \quad
       x''' = x'' + a (B x'' - x'') + s\, n $$

    with a rotation, scaling and mirroring `R` about the image's centre `c`, the 3 x 3 binomial blur `B`, and noise
    `n` of unit variance, more or less blurred by `B`. Images are interpolated bicubically. Positions are those in the
    changed image. What is not complex is clipped to [0, 1] at the end.

    Args:
        flip: Probability of a mirror image, left to right.
        warp: Probability of a rotation, scaling, shift, other contrast and other brightness.
        rotation: Largest angle [degrees].
        scale: Largest factor by which a side grows or shrinks; both sides alike but for a fifth of it.
        shift: Largest shift, as a fraction of the image's half width.
        gamma: Largest exponent of the magnitude, or its inverse; 1 changes no contrast.
        gain: Largest factor by which intensities grow or shrink, where their scale is known roughly; 1 changes none.
        texture: Probability of another sharpness and grain.
        sharpness: Largest share of the blur that is taken away; up to all of it is added.
        grain: Largest standard deviation of the noise, intensity units; log-uniform from a twentieth of it.

    Raises:
        InputError: A probability outside [0, 1], or a knob below its neutral value.
    """

    def __init__(
        self,
        flip: float = 0.5,
        warp: float = 0.6,
        rotation: float = 12.0,
        scale: float = 1.25,
        shift: float = 0.1,
        gamma: float = 1.0,
        gain: float = 1.0,
        texture: float = 0.3,
        sharpness: float = 0.4,
        grain: float = 0.02,
    ) -> None:
        for name, value in {"flip": flip, "warp": warp, "texture": texture}.items():
            if not 0 <= value <= 1:
                raise InputError(f"Augmentation: {name} is {value}, expected a probability from 0 to 1.")
        least = {"rotation": 0.0, "scale": 1.0, "shift": 0.0, "gamma": 1.0, "gain": 1.0, "sharpness": 0.0, "grain": 0.0}
        self.flip, self.warp, self.texture = flip, warp, texture
        self.rotation, self.scale, self.shift, self.gamma, self.gain = rotation, scale, shift, gamma, gain
        self.sharpness, self.grain = sharpness, grain
        for name, low in least.items():
            if not low <= getattr(self, name) < math.inf:
                raise InputError(f"Augmentation: {name} is {getattr(self, name)}, expected a number of at least {low}.")

    def draw(self, num: int, generator: torch.Generator) -> Changes:
        """Returns the changes of `num` patches."""

        def uniform(low: float = 0.0, high: float = 1.0) -> Tensor:
            return low + (high - low) * torch.rand(num, generator=generator)

        mirrored, warped, textured = uniform() < self.flip, uniform() < self.warp, uniform() < self.texture
        angle = torch.where(warped, math.radians(self.rotation) * uniform(-1, 1), 0.0)
        common, own = (math.log(self.scale) * uniform(-1, 1) for _ in range(2))
        width, height = (torch.where(warped, 0.9 * common + sign * 0.1 * own, 0.0).exp() for sign in (-1, 1))
        shift = torch.where(warped[:, None], self.shift * torch.stack([uniform(-1, 1), uniform(-1, 1)], 1), 0.0)
        cos, sin, handed = angle.cos(), angle.sin(), 1 - 2.0 * mirrored
        turn = torch.stack([handed * cos / width, -handed * sin / height, sin / width, cos / height], 1)
        gamma = torch.where(warped, math.log(self.gamma) * uniform(-1, 1), 0.0).exp()
        blur = torch.where(textured, uniform(-self.sharpness, 1), 0.0)
        grain = torch.where(textured, self.grain * (-uniform(0, math.log(20))).exp(), 0.0)
        seed = int(torch.randint(2**62, (), generator=generator))
        correlation = uniform()
        gain = torch.where(warped, math.log(self.gain) * uniform(-1, 1), 0.0).exp()
        return Changes(turn.view(-1, 2, 2), shift, gamma, gain, blur, grain, correlation, seed)


def changed_patches(
    images: Tensor,
    encode: Callable[[Tensor], Tensor],
    place: tuple[Tensor, Tensor, Tensor],
    size: int,
    changes: Changes,
) -> Tensor:
    """Returns patches `(n, C, size, size)` of changed images, zero where there is no image, intensity units.

    Args:
        images: `(N, C, H, W)`, as stored.
        encode: Maps stored values to intensities.
        place: Index of the image, first row and first column of each patch, `(n,)` each; they may leave the image.
        size: Side of the patches.
        changes: What is done to each, on the device of the images.
    """
    index, top, left = place
    H, W = images.shape[-2:]
    span = torch.arange(-1, size + 1, device=images.device)  # a pixel more on each side, for the blur
    rows, columns = ((2 * (start[:, None] + span) + 1) / n - 1 for start, n in ((top, H), (left, W)))
    shape = (len(index), size + 2, size + 2)
    target = torch.stack([columns[:, None, :].expand(shape), rows[:, :, None].expand(shape)], dim=-1)
    source = torch.einsum("nij,nrcj->nrci", changes.turn, target) + changes.shift[:, None, None, :]
    # A few at a time: each takes a copy of its image.
    parts = zip(index.split(64), source.split(64), strict=True)
    x = encode(torch.cat([interpolate(images[i].float(), grid) for i, grid in parts]))
    if (changes.gamma != 1).any():
        magnitude = x.square().sum(1, keepdim=True).sqrt().clamp(min=1e-4)
        x = x * magnitude ** (changes.gamma[:, None, None, None] - 1)
    x = changes.gain[:, None, None, None] * x
    inside = ((source.abs() <= 1).all(-1) & (target.abs() <= 1).all(-1))[:, None]
    x = x + changes.blur[:, None, None, None] * (binomial(x) - x)
    generator = torch.Generator(x.device).manual_seed(changes.seed)
    n = torch.randn(x.shape, generator=generator, device=x.device)
    share = changes.correlation[:, None, None, None]
    # Sums of squares of the taps: 1 for white noise, 9/64 for blurred, 1/4 for their product.
    std = ((1 - share) ** 2 + share * (1 - share) / 2 + share**2 * 9 / 64).sqrt()
    x = x + changes.grain[:, None, None, None] * (n + share * (binomial(n) - n)) / std
    if x.shape[1] != 2:  # complex images have no range
        x = x.clamp(0, 1)
    return (x * inside)[:, :, 1:-1, 1:-1]


def interpolate(images: Tensor, grid: Tensor) -> Tensor:
    """Returns images `(n, C, H, W)` at coordinates `(n, P, Q, 2)` by bicubic interpolation, their edges repeated."""
    return nnf.grid_sample(images, grid, mode="bicubic", padding_mode="border", align_corners=False)


def binomial(x: Tensor) -> Tensor:
    """Returns images `(n, C, H, W)` blurred by the 3 x 3 binomial kernel, their edges repeated."""
    taps = x.new_tensor([1.0, 2.0, 1.0]) / 4
    kernel = (taps[:, None] * taps)[None, None].repeat(x.shape[1], 1, 1, 1)
    return nnf.conv2d(nnf.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=x.shape[1])
