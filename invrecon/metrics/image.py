"""Metrics of one image against its reference, and of one image against its measurement.

Every function takes batches `(B, C, *S)` and returns one value per image, shape `(B,)`, computed in float64.
Both images are clipped to `[0, data_range]` first, so that nothing outside the displayable scale counts.
Conventions: identical images have a PSNR of `inf`; a NaN pixel makes that image's value NaN and no other's; a
metric over an empty region is NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from invrecon.errors import InputError

SSIM_WINDOW = 7


def psnr(x: Tensor, reference: Tensor, data_range: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio, `10 log10(data_range^2 / mean((x - reference)^2))`, in [dB].

    Args:
        x: Images `(B, C, *S)`.
        reference: Their references, same shape.
        data_range: The scale's length `L`; never taken from the images.

    Returns:
        `(B,)` in [dB]; `inf` where the two are identical.

    Raises:
        InputError: The shapes differ.
    """
    x, reference = _prepare(x, reference, data_range)
    mse = (x - reference).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(data_range**2 / mse)


def ssim(x: Tensor, reference: Tensor, data_range: float = 1.0) -> Tensor:
    """Structural similarity, averaged over the pixels whose whole window lies in the image.

    With `mu`, `v`, `c` the means, variances and covariance in a uniform window of 7 pixels a side, `n` of
    them (unbiased, i.e. times `n / (n - 1)`), `C1 = (0.01 L)^2` and `C2 = (0.03 L)^2`:

        SSIM = (2 mu_x mu_r + C1)(2 c + C2) / ((mu_x^2 + mu_r^2 + C1)(v_x + v_r + C2))

    Reference: Wang, Bovik, Sheikh, Simoncelli, IEEE TIP 13(4), 2004, eq. 13; window and bias as in the
    defaults of scikit-image's `structural_similarity`.

    Args:
        x: Images `(B, C, *S)` with one to three spatial dimensions.
        reference: Their references, same shape.
        data_range: The scale's length `L`.

    Returns:
        `(B,)`, at most 1.

    Raises:
        InputError: The shapes differ or a side is shorter than the window.
    """
    x, reference = _prepare(x, reference, data_range)
    if min(x.shape[2:]) < SSIM_WINDOW:
        raise InputError(
            f"SSIM needs images of at least {SSIM_WINDOW} pixels a side, got {tuple(x.shape[2:])}: "
            "reconstruct on a larger grid or leave SSIM out."
        )
    return similarity(x, reference, data_range)


def similarity(x: Tensor, reference: Tensor, data_range: float) -> Tensor:
    """Returns the SSIM of images `(B, C, *S)` as they are, neither cast nor clipped, `(B,)`; see `ssim`."""
    num_dims = x.ndim - 2
    average = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[num_dims]
    num_pixels = SSIM_WINDOW**num_dims
    unbiased = num_pixels / (num_pixels - 1)

    def window_mean(image: Tensor) -> Tensor:
        return average(image, SSIM_WINDOW, stride=1)

    mu_x, mu_r = window_mean(x), window_mean(reference)
    var_x = unbiased * (window_mean(x * x) - mu_x**2)
    var_r = unbiased * (window_mean(reference * reference) - mu_r**2)
    cov = unbiased * (window_mean(x * reference) - mu_x * mu_r)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    ratio = (2 * mu_x * mu_r + c1) * (2 * cov + c2) / ((mu_x**2 + mu_r**2 + c1) * (var_x + var_r + c2))
    return ratio.flatten(1).mean(dim=1)


def masked_psnr(x: Tensor, reference: Tensor, mask: Tensor, data_range: float = 1.0) -> Tensor:
    """PSNR over the pixels of `mask` alone, in [dB]; NaN where the mask is empty.

    Args:
        x: Images `(B, C, *S)`.
        reference: Their references, same shape.
        mask: Boolean, broadcastable to `x`, usually `body_mask(reference)`.
        data_range: The scale's length.

    Returns:
        `(B,)` in [dB].

    Raises:
        InputError: The shapes differ.
    """
    x, reference = _prepare(x, reference, data_range)
    mask = mask.expand(x.shape)
    squares = torch.where(mask, (x - reference).square(), 0.0).flatten(1).sum(dim=1)
    return 10 * torch.log10(data_range**2 * mask.flatten(1).sum(dim=1) / squares)


def body_mask(reference: Tensor, threshold: float = 0.2, opening: int = 2) -> Tensor:
    """The patient: the largest connected region above `threshold`, lungs filled, table left out.

    The table usually touches the skin, so the thresholded image is opened (`opening` pixels) before the
    largest region is chosen, and that region is grown back by as much inside the threshold. A slice is
    treated in its plane.

    Args:
        reference: Intensity `(B, C, *S)`; several channels are combined as their root sum of squares.
        threshold: 0.2 on the CT scale `(HU + 1000)/3000` is -400 HU, between lung and soft tissue.
        opening: Thickness [pixels] that separates table from patient, for images of about 256 pixels a side.

    Returns:
        Boolean `(B, 1, *S)`; all False where nothing exceeds the threshold.
    """
    import numpy as np
    from scipy import ndimage

    magnitude = reference.detach().float().square().sum(dim=1).sqrt().cpu().numpy()
    masks = []
    for image in magnitude:
        tissue = image > threshold
        # Thin structures carry no body; on tiny images the opening may erase everything, then tissue itself
        # counts. The border is padded so that a body cut by the field of view keeps its edge.
        padded = np.pad(tissue, opening, mode="edge") if opening else tissue
        core = ndimage.binary_opening(padded, iterations=opening) if opening else padded
        if opening:
            core = core[(slice(opening, -opening),) * core.ndim]
        core = core if core.any() else tissue
        labels, num_regions = ndimage.label(core)
        if num_regions == 0:
            masks.append(tissue)
            continue
        largest = labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])
        if opening:
            largest = ndimage.binary_dilation(largest, iterations=opening, mask=tissue)
        masks.append(ndimage.binary_fill_holes(largest))
    return torch.from_numpy(np.stack(masks)).unsqueeze(1).to(reference.device)


def relative_residual(operator: Callable[[Tensor], Tensor] | Any, x: Tensor, y: Tensor) -> Tensor:
    """How well an image explains its measurement: `||A x - y|| / ||y||`, per image.

    Args:
        operator: `A`, called on `x`.
        x: Images `(B, C, *S)`, not clipped.
        y: Measurements `(B, ...)`, real or complex.

    Returns:
        `(B,)`; NaN where `y` is zero.
    """
    residual = (operator(x) - y).flatten(1)
    return torch.linalg.vector_norm(residual, dim=1) / torch.linalg.vector_norm(y.flatten(1), dim=1)


def _prepare(x: Tensor, reference: Tensor, data_range: float) -> tuple[Tensor, Tensor]:
    """Checks the shapes, clips both to `[0, data_range]` and goes to float64."""
    if x.shape != reference.shape:
        raise InputError(
            f"A metric compares images of one shape, got {tuple(x.shape)} against a reference of "
            f"{tuple(reference.shape)}: reconstruct on the reference's grid."
        )
    if x.ndim < 3:
        raise InputError(f"A metric takes a batch of images (B, C, ...), got {tuple(x.shape)}: add the axes.")
    return x.detach().double().clamp(0, data_range), reference.detach().double().clamp(0, data_range)
