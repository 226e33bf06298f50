"""Random couches under the patients of training slices.

A prior learns its patients' anatomy from hundreds of slices, but the couch under them from as few as there are
scanners. Met with another couch, it takes it for air, and most of a reconstruction's error is then outside the
patient. So training slices are shown on couches of every kind.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from invrecon.data.intensity import Intensity
from invrecon.metrics.image import body_mask

AIR = -1000.0  # [HU]


def draw_couch(image: Tensor, generator: torch.Generator) -> Tensor:
    r"""Returns a slice with a random couch under the patient, shape `(1, H, W)`, in HU.

    A couch is one slab or two, each between two parabolas, a shell around light foam. With the distance `d` of a
    pixel's centre to the slab's nearest edge (positive inside, in pixels), the thickness `t` of the shell and
    `c(d) = clip(d + 1/2, 0, 1)`, it covers the share `c(d) - c(d - t)` of the pixel with shell and `c(d - t)` with
    foam. The slice keeps, outside the patient, the larger of its own values and those of the couch, and the patient
    as a whole. In half of the slices the couch ends at a circular field of view, as scanners cut it.

    Args:
        image: A slice in HU, `(1, H, W)`.
        generator: Source of all draws.
    """
    H, W = image.shape[-2:]
    body = body_mask(Intensity().encode(image[None].float()))[0]
    rows = body.any(dim=2).nonzero()
    bottom = float(rows[:, 1].max()) if len(rows) else H / 2

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    def log_uniform(low: float, high: float) -> float:
        return math.exp(uniform(math.log(low), math.log(high)))

    unit = W / 256  # the numbers below are pixels of slices 256 wide
    y, x = torch.arange(H)[:, None] + 0.0, torch.arange(W)[None] + 0.0
    couch = torch.full((H, W), AIR)
    centre, tilt = W / 2 + unit * uniform(-16, 16), uniform(-0.03, 0.03)
    top = bottom + unit * uniform(-5, 15)
    for _ in range(1 + (uniform(0, 1) < 0.5)):
        half_width, height = W * uniform(0.2, 0.7), unit * log_uniform(2, 40)
        sag = 0.0 if uniform(0, 1) < 0.4 else unit * uniform(0, 50)  # how far the ends rise above the middle
        shell, foam = uniform(-900, 100), uniform(-1000, -850)
        thickness = unit * log_uniform(0.6, 4)
        across = (x - centre) / half_width
        upper = top + tilt * (x - centre) - sag * across**2
        lower = upper + height + uniform(-0.5, 0.5) * sag * across**2
        d = torch.minimum(torch.minimum(y - upper, lower - y), half_width - (x - centre).abs())
        whole, inner = (d + 0.5).clamp(0, 1), (d - thickness + 0.5).clamp(0, 1)
        couch = torch.maximum(couch, AIR + (whole - inner) * (shell - AIR) + inner * (foam - AIR))
        top += height + unit * uniform(0, 30)
    if uniform(0, 1) < 0.5:
        inside = torch.hypot(x - (W - 1) / 2, y - (H - 1) / 2) < W / 2 * uniform(0.94, 1.0)
        couch = torch.where(inside, couch, AIR)
    return torch.where(body, image, torch.maximum(image.float(), couch).round().to(image.dtype))
