"""Metrics of complex images: on magnitudes, a slice at a time, and as the fastMRI challenges have them."""

from __future__ import annotations

import torch
from torch import Tensor

from invrecon.errors import InputError
from invrecon.metrics.image import SSIM_WINDOW, similarity


def magnitude(x: Tensor) -> Tensor:
    """Returns `|x|`, `(..., 1, H, W)`, of real and imaginary channels `(..., 2, H, W)`."""
    return torch.linalg.vector_norm(x, dim=-3, keepdim=True)


def phase(x: Tensor) -> Tensor:
    """Returns `arg x` [rad], `(..., 1, H, W)`, of real and imaginary channels `(..., 2, H, W)`."""
    return torch.atan2(x[..., 1:, :, :], x[..., :1, :, :])


def relative_magnitudes(x: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the magnitudes of both, `(B, 1, H, W)`, each divided by the largest of its reference.

    `psnr` and `ssim` of these have the largest value of the slice's reference as their data range, to which the
    reconstruction is clipped (the protocol of InverseBench, which says nothing about a volume: see `volume_metrics`).
    """
    truth = magnitude(reference)
    peak = truth.flatten(1).amax(1).clamp(min=torch.finfo(truth.dtype).tiny).reshape(-1, 1, 1, 1)
    return magnitude(x) / peak, truth / peak


def volume_metrics(target: Tensor, estimate: Tensor, maximum: float | None = None) -> dict[str, float]:
    r"""NMSE, PSNR and SSIM of a whole volume, as of the fastMRI challenges.

        NMSE = ||v - t||^2 / ||t||^2,   PSNR = 10 log10(max(t)^2 / mean((v - t)^2))

    and SSIM with a uniform window of 7 x 7 pixels, `k1 = 0.01`, `k2 = 0.03` and the data range `max(t)`, averaged over
    the slices. Nothing is clipped, and all slices share one data range: the numbers are higher than slice by slice.

    Source: Zbontar et al., fastMRI, arXiv 1811.08839, Sec. 5; `fastmri.evaluate`.

    Args:
        target: Magnitudes `t`, `(N, H, W)`.
        estimate: Magnitudes `v`, the same shape.
        maximum: The data range; that of `target` if None (an attribute `max` of the file may know more slices).

    Returns:
        `nmse`, `psnr` [dB] and `ssim`.

    Raises:
        InputError: The shapes differ, or the target is zero throughout.
    """
    if target.shape != estimate.shape or target.ndim != 3 or min(target.shape[1:]) < SSIM_WINDOW:
        raise InputError(
            f"A volume's metrics compare magnitudes (N, H, W) of at least {SSIM_WINDOW} pixels a side, got "
            f"{tuple(target.shape)} and {tuple(estimate.shape)}: crop both to one matrix."
        )
    t, v = target.detach().double(), estimate.detach().double()
    largest = float(t.amax()) if maximum is None else float(maximum)
    if not largest > 0:
        raise InputError("The target of a volume's metrics is zero throughout: there is no scale to compare on.")
    mse = (v - t).square()
    return {
        "nmse": float(mse.sum() / t.square().sum()),
        "psnr": float(10 * torch.log10(largest**2 / mse.mean())),
        "ssim": float(similarity(v[:, None], t[:, None], largest).mean()),
    }
