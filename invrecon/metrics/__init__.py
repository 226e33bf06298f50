"""Image quality, data fidelity, and their summaries."""

from invrecon.metrics.image import body_mask, masked_psnr, psnr, relative_residual, ssim
from invrecon.metrics.summary import (
    COLUMNS,
    METRICS,
    format_table,
    paired_difference,
    summarise,
    summarise_by,
)

__all__ = [
    "COLUMNS",
    "METRICS",
    "body_mask",
    "format_table",
    "masked_psnr",
    "paired_difference",
    "psnr",
    "relative_residual",
    "ssim",
    "summarise",
    "summarise_by",
]
