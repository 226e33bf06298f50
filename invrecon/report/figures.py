"""Figures of reconstructions: dark panels, CT windows, signed errors, a zoom, a scale bar.

Images are `(H, W)` (or `(1, H, W)`) in physical units, CT in [HU], or in colour `(3, H, W)`. PSNR labels are
computed as in `metrics`, on the intensity scale `(u - offset) / scale` clipped to [0, 1]. matplotlib is imported
when a figure is drawn, and no display is needed.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from invrecon.data.intensity import HOUNSFIELD, MAGNITUDE, Intensity
from invrecon.metrics.image import body_mask, psnr
from invrecon.report.sheet import INSET, Sheet, Window, grey

Image = Tensor | np.ndarray


LUNG = Window("lung", -1350.0, 150.0)
SOFT_TISSUE = Window("soft tissue", -160.0, 240.0)

ERROR_LIMITS = (10, 20, 30, 50, 75, 100, 150, 200, 300, 500, 1000)
ZOOM = 0.2  # side of the zoomed square, as a share of the image


def choose_windows(image: Image, intensity: Intensity = HOUNSFIELD) -> tuple[Window, ...]:
    """The windows a radiologist would pick: lung first where there is lung, soft tissue always; [HU].

    Lung is there when a sixteenth of the body lies between -950 and -500 HU. An image in other units is shown on its
    whole scale, in a window that bears the units' name.
    """
    if intensity.units != HOUNSFIELD.units:
        low = intensity.offset
        return (Window(intensity.units or "full scale", low, low + intensity.scale, units=""),)
    array = torch.from_numpy(as_array(image))
    inside = array[body_mask((array[None, None] + 1000) / 3000)[0, 0]]
    lung = ((inside > -950) & (inside < -500)).float().mean().item()  # NaN, so no lung, where there is no body
    return (LUNG, SOFT_TISSUE) if lung > 1 / 16 else (SOFT_TISSUE,)


def case_figure(
    path: str | os.PathLike[str],
    images: Mapping[str, Image],
    *,
    reference: Image | None = None,
    std: Image | None = None,
    residual: Image | None = None,
    phase: Image | None = None,
    title: str = "",
    subtitle: str = "",
    voxel_mm: Sequence[float] | None = None,
    windows: Sequence[Window] | None = None,
    intensity: Intensity = HOUNSFIELD,
) -> Path:
    """One slice: the reference and every method's image, a row a window, then signed errors.

    The standard deviation of samples stands last, above the absolute error on its own scale. Without a
    reference there are no errors and no PSNR; the residual sinogram shows how well the measurement is met.

    Args:
        path: PNG, written atomically.
        images: Label -> image, in the order of columns; the last is the reconstruction the figure is about.
        reference: The truth.
        std: Standard deviation of the posterior samples.
        residual: `A x - y` of the last image, `(views, bins)`.
        phase: Phase of the last image, of which `images` then hold magnitudes [rad].
        title: Such as the case's id.
        subtitle: Such as the measurement and the method.
        voxel_mm: Voxel size (z, y, x) in [mm]; the last gives the scale bar.
        windows: Display windows; by default `choose_windows`.
        intensity: Units of the images, and the scale of the PSNR.

    Returns:
        `path`.
    """
    arrays = {name: as_array(image) for name, image in images.items()}
    truth = None if reference is None else as_array(reference)
    guide = next(reversed(arrays.values())) if truth is None else truth
    windows = choose_windows(guide, intensity) if windows is None else tuple(windows)
    columns = ([] if truth is None else ["Reference"]) + list(arrays)
    extras = [("Std. deviation", std)] if std is not None else []
    extras += [("Residual sinogram", residual)] if residual is not None else []
    extras += [("Phase", phase)] if phase is not None else []
    stacked = truth is None and len(windows) == len(extras) == 2
    num_rows = len(windows) + (truth is not None)
    sheet = Sheet(num_rows, len(columns) + (1 if stacked else len(extras)), guide.shape[:2], title, subtitle)
    sheet.titles([*columns, *(name for name, _ in (extras[:1] if stacked else extras))])
    labels = _psnr_labels(arrays, truth, intensity.offset, intensity.scale)
    for row, window in enumerate(windows):
        box = _zoom_box(guide, window)
        sheet.row_label(row, window.name, window_range(window))
        shown = arrays if truth is None else {"Reference": truth, **arrays}
        for column, (name, array) in enumerate(shown.items()):
            axes = sheet.panel(row, column, array, window, box)
            if row == 0 and name in labels:
                sheet.label(axes, *labels[name])
            if column == 0:
                sheet.scale_bar(axes, voxel_mm)
    units = windows[0].units
    if truth is not None:
        limit = _error_limit([[array - truth for array in arrays.values()]], units)
        sheet.errors(num_rows - 1, arrays, truth, limit, units)
    for index, (name, extra) in enumerate(extras):
        array, signed = grey(as_array(extra)), name.startswith("Residual")
        row, column = (index, len(columns)) if stacked else (0, len(columns) + index)
        if name == "Phase":
            mappable = sheet.map(row, column, array, -math.pi, math.pi, signed=False, cyclic=True)
            sheet.colour_bar(mappable, row + (num_rows > 1), column, "phase [rad]", inside=num_rows == 1)
            continue
        top = float(np.percentile(np.abs(array), 99.5)) or 1.0
        mappable = sheet.map(row, column, array, -top if signed else 0.0, top, signed)
        unit = "residual sinogram, A x - y" if signed else f"standard deviation [{intensity.units}]"
        free = not stacked and num_rows > 1 + (truth is not None and not signed)
        sheet.colour_bar(mappable, row + free, column, unit, inside=not free)
        if truth is not None and not signed:  # where the samples differ should be where the mean is wrong
            error = grey(np.abs(next(reversed(arrays.values())) - truth))
            axes = sheet.map(num_rows - 1, column, error, 0.0, top, signed=False).axes
            sheet.label(axes, "|error|, same scale", False)
    return sheet.save(path)


def comparison_figure(
    path: str | os.PathLike[str],
    images: Mapping[str, Mapping[str, Image]],
    reference: Image,
    *,
    title: str = "",
    subtitle: str = "",
    voxel_mm: Sequence[float] | None = None,
    window: Window | None = None,
    intensity: Intensity = HOUNSFIELD,
) -> Path:
    """Settings against methods: for each setting, such as '20 views', a row of images and one of errors.

    Args:
        path: PNG, written atomically.
        images: Setting -> method -> image; every setting has the same methods.
        reference: The truth they share.
        title: What is compared.
        subtitle: On what.
        voxel_mm: Voxel size (z, y, x) in [mm].
        window: Display window; by default the first of `choose_windows`.
        intensity: Units of the images, and the scale of the PSNR.

    Returns:
        `path`.
    """
    truth = as_array(reference)
    settings = {name: {m: as_array(image) for m, image in row.items()} for name, row in images.items()}
    window = window or choose_windows(truth, intensity)[0]
    methods = list(next(iter(settings.values())))
    sheet = Sheet(2 * len(settings), 1 + len(methods), truth.shape[:2], title, subtitle)
    sheet.titles(["Reference", *methods])
    box = _zoom_box(truth, window)
    limit = _error_limit([[array - truth for array in arrays.values()] for arrays in settings.values()], window.units)
    for index, (setting, arrays) in enumerate(settings.items()):
        labels = _psnr_labels(arrays, truth, intensity.offset, intensity.scale)
        sheet.row_label(2 * index, setting, f"{window.name}, {window_range(window)}")
        axes = sheet.panel(2 * index, 0, truth, window, box)
        sheet.scale_bar(axes, voxel_mm)
        for column, name in enumerate(methods, start=1):
            axes = sheet.panel(2 * index, column, arrays[name], window, box)
            sheet.label(axes, *labels[name])
        sheet.errors(2 * index + 1, arrays, truth, limit, window.units)
    return sheet.save(path)


def image_png(image: Image, window: Window | None = None) -> bytes:
    """The bare image as PNG bytes in its window, pixel for pixel: for the page's comparator."""
    from matplotlib import image as writer

    array = as_array(image)
    window = window or choose_windows(array)[0]
    buffer = io.BytesIO()
    writer.imsave(buffer, window.colours(array), cmap="gray", vmin=window.low, vmax=window.high, format="png")
    return buffer.getvalue()


def as_array(image: Image) -> np.ndarray:
    """As a float32 array `(H, W)`, without a leading axis of one, or in colour `(H, W, 3)`."""
    array = image.detach().cpu().float().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    array = np.asarray(array, dtype=np.float32)
    return np.moveaxis(array, 0, -1) if array.ndim == 3 and len(array) == 3 else array.reshape(array.shape[-2:])


def _psnr_labels(
    arrays: Mapping[str, np.ndarray], truth: np.ndarray | None, offset: float, scale: float
) -> dict[str, tuple[str, bool]]:
    """`'38.02 dB'` for each image, and whether it is the best of several."""
    if truth is None:
        return {}

    def encode(array: np.ndarray) -> Tensor:
        return (torch.from_numpy(array)[None, None] - offset) / scale

    values = {name: psnr(encode(array), encode(truth)).item() for name, array in arrays.items()}
    best = max(values.values())
    return {name: (f"{v:.2f} dB", v == best and len(values) > 1) for name, v in values.items()}


def _error_limit(settings: Sequence[Sequence[np.ndarray]], units: str = "") -> float:
    """A round limit, one for all: in every setting it shows the best image whole; worse ones may saturate."""
    spread = max(min(float(np.percentile(np.abs(grey(error)), 99.5)) for error in errors) for errors in settings)
    if units == MAGNITUDE.units:  # of any size: fastMRI's are of 1e-4
        power = 10.0 ** math.floor(math.log10(spread)) if spread > 0 else 1.0
        return next(power * step for step in (1, 2, 5, 10) if power * step >= 0.999 * spread)
    return float(next((limit for limit in ERROR_LIMITS if limit >= spread), ERROR_LIMITS[-1]))


def _zoom_box(image: np.ndarray, window: Window) -> tuple[int, int, int]:
    """Top, left and side of the square with most edges inside the window, in the middle of the image."""
    image = grey(image)
    size = int(ZOOM * min(image.shape))
    if size < 8:
        return 0, 0, 0
    clipped = np.clip(image, window.low, window.high)
    energy = torch.from_numpy(sum(np.abs(g) for g in np.gradient(clipped)))[None, None]
    # Square root: many fine edges count for more than one bone.
    density = torch.nn.functional.avg_pool2d(energy.sqrt(), size, stride=1)[0, 0].numpy()
    rows, columns = np.indices(density.shape)
    middle = np.hypot(rows / density.shape[0] - 0.5, columns / density.shape[1] - 0.5) < 0.3
    edge = (1 - INSET) * np.array(image.shape) - size - 1  # beyond it the square would reach under its own inset
    density = density * (middle & ((rows < edge[0]) | (columns < edge[1])))
    top, left = np.unravel_index(int(np.argmax(density)), density.shape)
    return int(top), int(left), size


def window_range(window: Window) -> str:
    """The window's range in words."""
    return f"{window.low:.4g} … {window.high:.4g} {window.units}".rstrip()
