"""Image quality, data fidelity, and their summaries."""

from invrecon.metrics.image import body_mask, masked_psnr, psnr, relative_residual, ssim
from invrecon.metrics.mri import volume_metrics
from invrecon.metrics.seams import SeamScan, find_seams, scan_seams, seam_statistic
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
    "SeamScan",
    "body_mask",
    "find_seams",
    "format_table",
    "masked_psnr",
    "paired_difference",
    "psnr",
    "relative_residual",
    "scan_seams",
    "seam_statistic",
    "ssim",
    "summarise",
    "summarise_by",
    "volume_metrics",
]
