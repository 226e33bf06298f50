"""Complex images in results: magnitude and phase, the coils' maps, and the metrics of whole volumes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invrecon.data.fastmri_files import read_target
from invrecon.data.intensity import MAGNITUDE, Intensity
from invrecon.data.kspace import crop
from invrecon.metrics.mri import magnitude, phase, volume_metrics
from invrecon.report.sheet import Window

if TYPE_CHECKING:
    from invrecon.data.cases import CaseBatch
    from invrecon.report.store import Part, PredictionStore

PHASES = {"mean": "phase", "samples": "samples_phase"}


def is_complex(x: Tensor) -> bool:
    """Whether images `(B, C, H, W)` are real and imaginary parts."""
    return x.shape[1] == 2


def case_intensity(intensity: Intensity, scale: float) -> Intensity:
    """Returns the scale of one case: what its file holds is `scale` times what the data module says."""
    return Intensity(intensity.offset, intensity.scale * scale, intensity.units)


def as_magnitudes(arrays: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Returns complex images `(..., 2, H, W)` as magnitudes; with their phases [rad], where those are kept.

    The standard deviation of a complex image is the root of the sum of both parts' variances.
    """
    found: dict[str, Tensor | None] = {}
    for name, x in arrays.items():
        found[name] = None if x is None else magnitude(x)
        if name in PHASES and x is not None:
            found[PHASES[name]] = phase(x)
    return found


def stored_maps(batch: CaseBatch, b: int) -> Tensor | None:
    """Returns a case's coil maps, complex `(coils, H, W)`, on the grid of its image; None if there are none."""
    if batch.maps is None:
        return None
    maps = torch.view_as_complex(batch.maps[b].float().contiguous())
    matrix = (batch.geometry or {}).get("matrix")
    return maps if matrix is None else crop(maps, matrix)


def view(part: Part, intensity: Intensity) -> tuple[tuple[Window, ...] | None, Intensity]:
    """Returns the windows that a slice is shown in (None leaves the choice), and the scale of its PSNR.

    Of a complex image: from zero to the scale of the case, and to the largest value of its reference.
    """
    if intensity.units != MAGNITUDE.units:
        return None, intensity
    scale = float(part.row.get("scale", 1.0))
    peak = float(part.arrays["reference"].max()) if "reference" in part.arrays else scale
    return (Window("magnitude", 0.0, scale, units=intensity.units),), case_intensity(intensity, peak or scale)


def volume_rows(store: PredictionStore, earlier: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns fastMRI's metrics of each case, over the slices that were reconstructed, if all have a reference.

    Their data range is the largest value of these references; or what a file of fastMRI says of the reference of all of
    its slices (`max`), which is a root sum of squares where ours is the combination of coils by their maps. Where the
    file holds that root sum of squares, and coils were not mixed to whiten their noise, `nmse_stored`, `psnr_stored`
    and `ssim_stored` judge against it, as fastMRI's tables do.

    Args:
        store: Of the run.
        earlier: Case -> its row when volumes were last made: of slices in a volume there is no reference any more.
    """
    cases: dict[str, list[str]] = {}
    for name in store.ids():
        cases.setdefault(name.rsplit("/", 1)[0], []).append(name)
    rows = []
    for case, names in cases.items():
        if (row := _volume_row(store, case, names)) is not None:
            rows.append(row)
        elif int(earlier.get(case, {}).get("num_slices", 0)) == len(names):
            rows.append(dict(earlier[case]))
    return rows


def _volume_row(store: PredictionStore, case: str, names: Sequence[str]) -> dict[str, Any] | None:
    """Returns the metrics of one case over these slices; None if one of them lacks its reference."""
    targets, estimates, indices = [], [], []
    for name in names:
        part = store.read(name)  # with maps and samples: one at a time
        if "reference" not in part.arrays:
            return None
        targets.append(torch.from_numpy(part.arrays["reference"]))
        estimates.append(torch.from_numpy(part.arrays["mean"]))
        indices.append(part.index)
    target, estimate, maximum = torch.stack(targets), torch.stack(estimates), part.row.get("max")
    stored = read_target(Path(part.source), indices, maximum)
    if maximum is not None and not 0.1 < maximum / float(target.max()) < 10:
        warnings.warn(
            f"The attribute 'max' of {part.source} is {maximum:g}, and its images reach {float(target.max()):g}: the "
            "metrics of the volume take the latter.",
            stacklevel=2,
        )
        maximum = None
    row = {"case": case, "num_slices": len(names), "max": maximum or float(target.max())}
    row |= volume_metrics(target, estimate, maximum)
    if stored is not None and stored.shape == estimate.shape and stored.any() and stored.isfinite().all():
        row |= {f"{name}_stored": value for name, value in volume_metrics(stored, estimate, maximum).items()}
    return row
