"""Filtered back-projection of parallel-beam and flat-detector fan-beam sinograms."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as nnf

from invrecon.errors import InputError

WINDOWS: dict[str, Callable[[Tensor], Tensor]] = {
    "ramp": torch.ones_like,
    "hann": lambda f: 0.5 + 0.5 * torch.cos(math.pi * f),
}
"""Apodisation of the ramp as a function of the frequency divided by the cut-off."""

_TAPER = math.radians(10)
"""Smooth ends of a fan-beam arc, over which redundant rays fade in; Noo et al. (2002) use 10 degrees."""

Locate = Callable[[int], tuple[Tensor, Tensor]]
"""Gives, for a view, each pixel's position on the detector in bins and its weight, float64 `(P,)` each."""


def parallel_fbp(
    sinogram: Tensor, angles: Tensor, pixels: Tensor, bin_width: float, window: str, frequency_scaling: float
) -> Tensor:
    """Returns the FBP of parallel-beam sinograms at the pixels given (Kak and Slaney, 1988, section 3.3).

    Args:
        sinogram: `(N, views, bins)`.
        angles: View angles [rad], float64 `(views,)`.
        pixels: Centres `(x, y)`, float64 `(P, 2)`.
        bin_width: Width of a detector cell.
        window: See `ramp_filter`.
        frequency_scaling: See `ramp_filter`.

    Returns:
        Shape `(N, P)`.
    """
    cells = angular_cells(angles, math.pi)
    filtered = ramp_filter(sinogram, bin_width, window, frequency_scaling) * cells[:, None].to(sinogram.dtype)
    centre = (sinogram.shape[-1] - 1) / 2

    def locate(view: int) -> tuple[Tensor, Tensor]:
        axis = torch.stack((angles[view].cos(), angles[view].sin()))
        return pixels @ axis / bin_width + centre, torch.ones_like(pixels[:, 0])

    return backproject(filtered, locate)


def fan_fbp(
    sinogram: Tensor,
    angles: Tensor,
    pixels: Tensor,
    bin_width: float,
    source_distance: float,
    window: str,
    frequency_scaling: float,
) -> Tensor:
    """Returns the FBP of flat-detector fan-beam sinograms (Kak and Slaney, 1988, section 3.4.2).

    Lines measured twice count once, over any arc (`redundancy_weights`).

    Args:
        sinogram: `(N, views, bins)`.
        angles: View angles [rad], float64 `(views,)`.
        pixels: Centres `(x, y)`, float64 `(P, 2)`.
        bin_width: Width of a cell on the virtual detector through the centre of rotation.
        source_distance: From the source to the centre of rotation.
        window: See `ramp_filter`.
        frequency_scaling: See `ramp_filter`.

    Returns:
        Shape `(N, P)`.
    """
    num_bins = sinogram.shape[-1]
    centre = (num_bins - 1) / 2
    s = (torch.arange(num_bins, dtype=angles.dtype, device=angles.device) - centre) * bin_width
    cosine = source_distance / (source_distance**2 + s**2).sqrt()
    once = redundancy_weights(angles, torch.atan(s / source_distance))
    weight = cosine * once * angular_cells(angles, 2 * math.pi)[:, None]
    filtered = ramp_filter(sinogram * weight.to(sinogram.dtype), bin_width, window, frequency_scaling)

    def locate(view: int) -> tuple[Tensor, Tensor]:
        cos, sin = angles[view].cos(), angles[view].sin()
        lateral = pixels @ torch.stack((cos, sin))
        depth = 1 + pixels @ torch.stack((-sin, cos)) / source_distance
        return lateral / depth / bin_width + centre, depth**-2

    return backproject(filtered, locate)


def ramp_filter(sinogram: Tensor, bin_width: float, window: str, frequency_scaling: float) -> Tensor:
    """Filters the last axis with the band-limited ramp, apodised: `q = p * h`.

    `h(0) = 1/(4 d^2)`, `h(n) = -1/(pi n d)^2` for odd n, else 0 (Kak and Slaney, 1988, Eq. 3.61), sampled in
    space and zero-padded: sampling |f| itself would bias the mean. The window is cut off at
    `frequency_scaling` times the Nyquist frequency.

    Args:
        sinogram: `(..., bins)`.
        bin_width: `d`, in the unit of length.
        window: A key of `WINDOWS`.
        frequency_scaling: In (0, 1].

    Raises:
        InputError: Unknown window, or a scaling outside (0, 1].
    """
    if window not in WINDOWS:
        raise InputError(f"Unknown FBP window {window!r}: choose one of {', '.join(WINDOWS)}.")
    if not 0 < frequency_scaling <= 1:
        raise InputError(f"The FBP frequency scaling must lie in (0, 1], got {frequency_scaling:g}.")
    num_bins = sinogram.shape[-1]
    length = 2 ** math.ceil(math.log2(max(2 * num_bins, 64)))
    n = torch.arange(length, device=sinogram.device, dtype=torch.float64)
    n = torch.minimum(n, length - n)
    kernel = torch.where(n % 2 == 1, -1 / (math.pi * n.clamp(min=1) * bin_width) ** 2, 0.0)
    kernel[0] = 1 / (4 * bin_width**2)
    frequency = torch.arange(length // 2 + 1, device=sinogram.device, dtype=torch.float64) / (length // 2)
    relative = frequency / frequency_scaling
    response = torch.fft.rfft(kernel).real * WINDOWS[window](relative) * (relative <= 1)
    response = (bin_width * response).to(sinogram.dtype)
    spectrum = torch.fft.rfft(sinogram, n=length) * response
    return torch.fft.irfft(spectrum, n=length)[..., :num_bins]


def backproject(filtered: Tensor, locate: Locate) -> Tensor:
    """Returns `sum_j w_j(pixel) q_j(u_j(pixel))`, with linear interpolation along the detector, zero off it.

    Driven by pixels, because the transposed projector would print the raster of its rays on the image.

    Args:
        filtered: `q`, `(N, views, bins)`.
        locate: Where the pixels lie on the detector, view by view.

    Returns:
        Shape `(N, P)`.
    """
    _, num_views, num_bins = filtered.shape
    padded = nnf.pad(filtered, (1, 1)).permute(1, 2, 0).contiguous()  # (views, bins + 2, N)
    image = filtered.new_zeros(())
    for view in range(num_views):
        position, weight = locate(view)
        position = (position + 1).clamp(0, num_bins + 1)
        lower = position.floor().clamp(max=num_bins)
        fraction = (position - lower).to(filtered.dtype)[:, None]
        row, index = padded[view], lower.long()
        values = torch.lerp(row.index_select(0, index), row.index_select(0, index + 1), fraction)
        image = image + values * weight.to(filtered.dtype)[:, None]
    return image.t()


def angular_cells(angles: Tensor, period: float) -> Tensor:
    """Returns the angle each view stands for, in radians: half the gaps to its two neighbours on the circle.

    A gap far wider than the others (over three times their median) is the unmeasured part of a limited arc;
    its two ends then count as if the sampling went on.

    Args:
        angles: [rad], any order, float64 `(V,)`.
        period: The circle: pi for parallel beams (opposite views are equal), 2 pi for fans.
    """
    order = torch.argsort(angles.remainder(period))
    gaps = _gaps(angles, period)
    gaps = torch.where(gaps > 3 * _typical(gaps), _typical(gaps), gaps)
    cells = torch.empty_like(angles)
    cells[order] = (gaps + gaps.roll(1)) / 2
    return cells


def redundancy_weights(angles: Tensor, fan_angles: Tensor) -> Tensor:
    """Returns the weights that count each line once, when an arc of fan views measures some of them twice.

    `w(theta, gamma) = c(theta) / (c(theta) + c(theta + pi - 2 gamma))`, with `c` one on the measured arc,
    zero off it and smooth at its ends: Noo, Defrise, Clackdoyle and Kudo, PMB 47 (2002), 2525-2546.

    Args:
        angles: View angles `theta` [rad], `(V,)`.
        fan_angles: Ray angles `gamma` from the central ray [rad], `(bins,)`.

    Returns:
        Shape `(V, bins)`.
    """
    period = 2 * math.pi
    gaps = _gaps(angles, period)
    typical, widest = _typical(gaps), gaps.max()
    if widest <= 3 * typical:  # a full turn: every line is measured twice
        return torch.full((len(angles), len(fan_angles)), 0.5, dtype=angles.dtype, device=angles.device)
    after = (int(gaps.argmax()) + 1) % len(angles)
    start = angles.remainder(period).sort().values[after] - typical / 2
    span = period - widest + typical
    taper = (span / 2).clamp(max=_TAPER)

    def measured(theta: Tensor) -> Tensor:
        along = (theta - start).remainder(period)
        edge = torch.minimum(along, span - along).clamp(min=0)
        return torch.sin(math.pi / 2 * (edge / taper).clamp(max=1)) ** 2

    own = measured(angles)[:, None]
    opposite = measured(angles[:, None] + math.pi - 2 * fan_angles)
    return own / (own + opposite).clamp(min=torch.finfo(own.dtype).tiny)


def _gaps(angles: Tensor, period: float) -> Tensor:
    """Distances from each angle to the next on the circle, in sorted order."""
    ordered = angles.remainder(period).sort().values
    return torch.cat((ordered.diff(), ordered[:1] + period - ordered[-1:]))


def _typical(gaps: Tensor) -> Tensor:
    """Median gap, leaving out views taken twice."""
    distinct = gaps[gaps > 1e-6]
    return distinct.median() if len(distinct) else gaps.max()
