r"""Ellipse phantoms, made on the fly.

Coordinates are `(x, y)` with both in [-1, 1] across the image, x to the right along columns and y *upwards*
against rows. Pixel `(i, j)` of an `(H, W)` image is centred on
`x = (2 j + 1) / W - 1`, `y = 1 - (2 i + 1) / H`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from invrecon.errors import InputError


@dataclass(frozen=True)
class Ellipses:
    r"""A list of ellipses: `f(r) = sum_n value_n 1[|diag(1 / axes_n) R(angle_n)^T (r - centre_n)| <= 1]`.

    Attributes:
        centre: Centres `(x, y)`, shape `(N, 2)`.
        axes: Semi-axes, shape `(N, 2)`; positive.
        angle: Counter-clockwise angle of the first axis to +x, shape `(N,)` [rad].
        value: What each ellipse adds to the image inside it, shape `(N,)`.
    """

    centre: Tensor
    axes: Tensor
    angle: Tensor
    value: Tensor


def render_ellipses(size: int | tuple[int, int], ellipses: Ellipses, *, smooth: bool = True) -> Tensor:
    r"""Returns the sum of the ellipses on a pixel grid, shape `(1, H, W)`, float32.

    With `q(r) = |diag(1 / axes) R^T (r - centre)|^2`, a pixel is covered by the fraction
    `clip(1/2 - (q - 1) / (|grad q| h), 0, 1)`, where `(q - 1) / |grad q|` is the first-order signed distance
    to the edge and `h` the pixel's width: edges are anti-aliased over one pixel. `smooth=False` samples the
    indicator at pixel centres instead. Only the bounding box of each ellipse is visited.

    Args:
        size: `H = W`, or `(H, W)`.
        ellipses: What to draw.
        smooth: Anti-alias the edges.
    """
    height, width = (size, size) if isinstance(size, int) else size
    h = 2.0 / max(height, width)
    image = np.zeros((height, width))
    xs = (2 * np.arange(width) + 1) / width - 1
    ys = 1 - (2 * np.arange(height) + 1) / height
    fields = (ellipses.centre, ellipses.axes, ellipses.angle, ellipses.value)
    centre, axes, angle, value = (field.double().tolist() for field in fields)
    for (cx, cy), (a, b), phi, v in zip(centre, axes, angle, value, strict=True):
        c, s = math.cos(phi), math.sin(phi)
        reach_x = math.hypot(a * c, b * s) + h  # half the bounding box, and a pixel for the soft edge
        reach_y = math.hypot(a * s, b * c) + h
        j0, j1 = (
            max(0, math.floor((cx - reach_x + 1) * width / 2)),
            math.ceil((cx + reach_x + 1) * width / 2),
        )
        i0, i1 = (
            max(0, math.floor((1 - cy - reach_y) * height / 2)),
            math.ceil((1 - cy + reach_y) * height / 2),
        )
        if j1 <= j0 or i1 <= i0:
            continue
        x, y = xs[None, j0:j1] - cx, ys[i0:i1, None] - cy
        u, w = (c * x + s * y) / a, (c * y - s * x) / b
        q = u * u + w * w
        if smooth:
            slope = 2 * np.sqrt(np.square(u / a) + np.square(w / b)) + 1e-12
            # a needle thinner than a pixel cannot cover it: its share is bounded by its width
            cover = np.clip(0.5 - (q - 1) / (slope * h), 0, 1) * min(1.0, 2 * min(a, b) / h)
        else:
            cover = (q <= 1).astype(float)
        image[i0:i1, j0:j1] += v * cover
    return torch.from_numpy(image).float()[None]


def random_ellipses(
    generator: torch.Generator,
    *,
    mean_number: float = 100.0,
    max_number: int = 140,
    disk_diameter: float = 0.4745,
) -> Ellipses:
    """Draws ellipses that lie inside a centred disk.

    Their number is Poisson, capped; centres are uniform over the disk; semi-axes exponential with mean 0.2 of
    the disk's radius, shortened where the ellipse would leave the disk; angles uniform; contrasts uniform in
    [-0.4, 1]. The recipe of the ellipse training sets of the deep-image-prior and steerable-diffusion
    literature (Barbano et al., 2023), whose disk is 0.4745 of the image's width.

    Args:
        generator: Source of all draws.
        mean_number: Mean of the Poisson count.
        max_number: Upper bound of the count.
        disk_diameter: The disk's diameter as a fraction of the image's width; larger fills more of the image.

    Raises:
        InputError: If `disk_diameter` is not in (0, 1].
    """
    if not 0 < disk_diameter <= 1:
        raise InputError(f"disk_diameter is {disk_diameter}, expected a fraction of the image's width in (0, 1].")
    radius = disk_diameter  # the image is 2 wide, so the two numbers agree
    count = int(torch.poisson(torch.tensor(float(mean_number)), generator=generator))
    num = max(1, min(count, max_number))

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(num, generator=generator)

    distance, bearing = radius * uniform(0, 1).sqrt(), uniform(0, 2 * math.pi)
    axes = 0.2 * radius * torch.empty(num, 2).exponential_(generator=generator)
    axes = torch.minimum(axes, (radius - distance)[:, None]).clamp(min=1e-3)
    centre = torch.stack([distance * bearing.cos(), distance * bearing.sin()], dim=1)
    return Ellipses(centre, axes, uniform(0, math.pi), uniform(-0.4, 1.0))


def ellipse_phantom(
    size: int | tuple[int, int], generator: torch.Generator, *, disk_diameter: float = 0.4745
) -> Tensor:
    """Returns a random phantom with anti-aliased edges, shape `(1, H, W)`, float32 in [0, 1].

    The sum of `random_ellipses`, negative values set to 0 and, where overlaps exceed 1, divided by their
    maximum.

    Args:
        size: `H = W`, or `(H, W)`.
        generator: Source of all draws; equal states give equal phantoms.
        disk_diameter: See `random_ellipses`.
    """
    image = render_ellipses(size, random_ellipses(generator, disk_diameter=disk_diameter)).clamp(min=0)
    return image / image.amax().clamp(min=1.0)
