"""Measurement files: sinograms with their geometry and noise level, and nothing of any reference.

The layout is HDF5 and documented in `docs/measurement-file.md`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invrecon.data.cases import Geometry, VoxelSize
from invrecon.data.hdf5 import (
    HDF5_SUFFIXES,
    check_real,
    list_datasets,
    open_hdf5,
    read_voxel_mm,
    text_of,
)
from invrecon.data.intensity import Intensity
from invrecon.data.volume import file_stem, suffix_of
from invrecon.errors import InputError

FORMAT = "invrecon-measurement"
VERSION = 1
LENGTHS = {
    "parallel": ("detector_length", "field_of_view"),
    "fan": ("detector_length", "field_of_view", "source_distance", "detector_distance"),
}


class Measurement:
    """An open measurement file, read one sinogram at a time.

    Attributes:
        path: The file.
        shape: `(N, views, bins)`.
        geometry: `type` ('parallel' or 'fan'), `angles` (a list) [rad], `num_bins`, and the lengths, in one
            unit: `detector_length`, `field_of_view` and, for a fan, `source_distance`, `detector_distance`.
        voxel_mm: Voxel size `(z, y, x)` of the image to reconstruct [mm], or None.
        patient: The patient's identity; the file's stem if it does not say.

    Raises:
        InputError: If the file is missing, damaged, incomplete, of another intensity scale, or if its
            sinograms do not fit its geometry.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with open_hdf5(self.path) as file:
            sinograms = _dataset(self.path, file, "sinograms")
            check_real(self.path, sinograms.dtype)
            if sinograms.ndim != 3 or 0 in sinograms.shape:
                raise InputError(
                    f"Dataset 'sinograms' of {self.path} has shape {sinograms.shape}, expected (slices, "
                    "views, bins); store one sinogram per slice."
                )
            self.shape = tuple(sinograms.shape)
            _check_version(self.path, file)
            self.geometry = _read_geometry(self.path, file, self.shape)
            _check_intensity(self.path, file)
            self.voxel_mm: VoxelSize | None = read_voxel_mm(self.path, dict(file.attrs))
            self.patient = text_of(file.attrs.get("patient", "")) or file_stem(self.path)
            if "noise_std" in file:
                _check_noise(self.path, _dataset(self.path, file, "noise_std"), self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def stem(self) -> str:
        """The file's name without its suffix."""
        return file_stem(self.path)

    def read(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Returns sinogram `index` `(1, views, bins)` and its noise's standard deviation.

        The latter is a scalar, `(1, views, bins)`, or None for noise-free data.

        Raises:
            InputError: If it cannot be read, or has NaN, Inf or a negative standard deviation.
        """
        if not 0 <= index < len(self):
            raise InputError(f"{self.path} has no sinogram {index}: it has {len(self)}, numbered from 0.")
        try:
            with open_hdf5(self.path) as file:
                values = np.asarray(file["sinograms"][index], dtype=np.float32)
                noise = None
                if "noise_std" in file:
                    stored = file["noise_std"]
                    noise = np.asarray(stored[()] if stored.ndim == 0 else stored[index], dtype=np.float32)
        except OSError as error:
            raise InputError(
                f"Sinogram {index} of {self.path} cannot be read: the file is damaged or truncated; copy it again."
            ) from error
        if not np.isfinite(values).all():
            raise InputError(
                f"Sinogram {index} of {self.path} has {int((~np.isfinite(values)).sum())} NaN or Inf values "
                f"of {values.size}, expected finite line integrals; replace them and give those rays a "
                "large noise_std."
            )
        if noise is None:
            return torch.from_numpy(values)[None], None
        if not (np.isfinite(noise) & (noise > 0)).all():
            raise InputError(
                f"'noise_std' of sinogram {index} in {self.path} has values that are zero, negative, NaN or Inf, "
                "expected standard deviations > 0; leave 'noise_std' out for noise-free data."
            )
        std = torch.as_tensor(noise)
        return torch.from_numpy(values)[None], std if std.ndim == 0 else std[None]


def open_measurement(path: str | Path) -> Measurement:
    """Opens and checks a measurement file without reading its sinograms; see `Measurement`."""
    return Measurement(path)


def is_measurement(path: str | Path) -> bool:
    """Tells a measurement file (an HDF5 of that format, or with a dataset 'sinograms') from a volume.

    A file that is missing or damaged is none; opening it will say what is wrong.
    """
    path = Path(path)
    if suffix_of(path) not in HDF5_SUFFIXES:
        return False
    try:
        with open_hdf5(path) as file:
            return text_of(file.attrs.get("format", "")) == FORMAT or "sinograms" in file
    except InputError:
        return False


def write_measurement(
    path: str | Path,
    sinograms: Tensor,
    geometry: Geometry,
    *,
    noise_std: float | Tensor | None = None,
    voxel_mm: VoxelSize | None = None,
    patient: str = "",
    source: str = "",
) -> None:
    """Writes a measurement file, whole or not at all.

    Args:
        path: Where.
        sinograms: `(N, views, bins)`, line integrals of intensity (see `Intensity`) in the geometry's unit of
            length.
        geometry: As in `Measurement`.
        noise_std: One number, one per sinogram `(N,)`, or one per ray `(N, views, bins)`; None for noise-free
            data.
        voxel_mm: Voxel size `(z, y, x)` of the image to reconstruct [mm].
        patient: The patient's identity.
        source: Where the data came from, in words.

    Raises:
        InputError: If the pieces do not fit each other, are not finite, or the file cannot be written.
    """
    from invrecon.files import atomic_h5

    path, values = Path(path), np.asarray(sinograms.detach().cpu().numpy(), dtype=np.float32)
    if values.ndim != 3 or 0 in values.shape:
        raise InputError(f"The sinograms for {path} have shape {values.shape}, expected (slices, views, bins).")
    if not np.isfinite(values).all():
        raise InputError(f"The sinograms for {path} have NaN or Inf values, expected finite line integrals.")
    checked = check_geometry(path, geometry, values.shape)
    noise = None if noise_std is None else np.asarray(torch.as_tensor(noise_std).cpu(), dtype=np.float32)
    if noise is not None:
        _check_noise(path, noise, values.shape)
        if not (np.isfinite(noise) & (noise > 0)).all():
            raise InputError(f"'noise_std' for {path} has values that are zero, negative, NaN or Inf, expected > 0.")
    intensity = Intensity()
    with atomic_h5(path) as file:
        file.attrs.update({"format": FORMAT, "version": VERSION, "source": source, "patient": patient})
        file.attrs.update({"intensity_offset": intensity.offset, "intensity_scale": intensity.scale})
        file.attrs["intensity_units"] = intensity.units
        if voxel_mm is not None:
            file.attrs["voxel_mm"] = voxel_mm[::-1]  # on disk (x, y, z), as in volumes
        chunks = (1, *values.shape[1:])
        file.create_dataset("sinograms", data=values, chunks=chunks, compression="gzip", shuffle=True)
        if noise is not None:
            packing = {"chunks": chunks, "compression": "gzip"} if noise.ndim == 3 else {}
            file.create_dataset("noise_std", data=noise, **packing)
        group = file.create_group("geometry")
        group.create_dataset("angles", data=np.asarray(checked["angles"], dtype=np.float64))
        group.attrs.update({key: value for key, value in checked.items() if key != "angles"})


def check_geometry(path: Path, geometry: Geometry, shape: tuple[int, ...]) -> Geometry:
    """Returns a complete, plain copy of a geometry that fits sinograms of `shape` `(N, views, bins)`.

    Raises:
        InputError: Naming the first entry that is missing, unknown, not finite, or at odds with `shape`.
    """
    kind = geometry.get("type")
    if kind not in LENGTHS:
        raise InputError(f"The geometry of {path} has type '{kind}', expected one of {', '.join(LENGTHS)}.")
    required = ("angles", "num_bins", *LENGTHS[kind])
    missing = [key for key in required if geometry.get(key) is None]
    if missing:
        raise InputError(f"The geometry of {path} lacks '{missing[0]}'; a {kind} beam needs {', '.join(required)}.")
    unknown = sorted(key for key in geometry if key not in ("type", *LENGTHS["fan"], "angles", "num_bins"))
    if unknown:
        raise InputError(f"The geometry of {path} has an unknown entry '{unknown[0]}'; expected {', '.join(required)}.")
    try:
        angles = np.asarray(geometry["angles"], dtype=np.float64)
        num_bins = float(geometry["num_bins"])
        lengths = {key: float(geometry[key]) for key in LENGTHS[kind]}
    except (TypeError, ValueError) as error:
        raise InputError(f"The geometry of {path} has an entry that is not a number ({error}).") from error
    if angles.ndim != 1 or not np.isfinite(angles).all():
        raise InputError(f"The 'angles' of {path} have shape {angles.shape}, expected (views,) finite numbers [rad].")
    if angles.size and np.abs(angles).max() > 4 * math.pi:
        raise InputError(
            f"The 'angles' of {path} reach {np.abs(angles).max():g}, expected radians within +-4 pi; divide "
            "degrees by 180 / pi."
        )
    if not num_bins.is_integer() or num_bins < 1:
        raise InputError(f"The geometry of {path} has 'num_bins' = {num_bins:g}, expected a whole number of bins.")
    num_bins = int(num_bins)
    if tuple(shape[1:]) != (angles.size, num_bins):
        raise InputError(
            f"The sinograms of {path} are {tuple(shape[1:])} (views, bins), but its geometry has "
            f"{angles.size} angles and {num_bins} bins; correct whichever is wrong."
        )
    for key, value in lengths.items():
        if not (math.isfinite(value) and (value > 0 or (value == 0 and key == "detector_distance"))):
            raise InputError(f"The geometry of {path} has '{key}' = {value}, expected a positive length.")
    corner = lengths["field_of_view"] / math.sqrt(2)
    if kind == "fan" and lengths["source_distance"] <= corner:
        raise InputError(
            f"The geometry of {path} has 'source_distance' = {lengths['source_distance']:g}, expected more than "
            f"{corner:g}: the source is outside the image, whose corners are that far from the centre."
        )
    return {"type": kind, "angles": angles.tolist(), "num_bins": num_bins, **lengths}


def _dataset(path: Path, file: Any, name: str) -> Any:
    if name not in file or not hasattr(file[name], "shape"):
        raise InputError(
            f"The measurement file {path} has no dataset '{name}'; it has "
            f"{', '.join(list_datasets(file)) or 'none'}; see docs/measurement-file.md for the layout."
        )
    return file[name]


def _read_geometry(path: Path, file: Any, shape: tuple[int, ...]) -> Geometry:
    group = file.get("geometry")
    if group is None or hasattr(group, "shape"):
        raise InputError(f"The measurement file {path} has no group 'geometry'; see docs/measurement-file.md.")
    entries: Geometry = {k: v.item() if getattr(v, "size", 0) == 1 else v for k, v in group.attrs.items()}
    entries["type"] = text_of(entries.get("type", ""))
    entries["angles"] = _dataset(path, file, "geometry/angles")[()]
    return check_geometry(path, entries, shape)


def _check_version(path: Path, file: Any) -> None:
    version = file.attrs.get("version", VERSION)
    if _number(version) not in range(1, VERSION + 1):
        raise InputError(
            f"The measurement file {path} is of version {version}, and this invrecon reads version {VERSION}: "
            "install a newer one, or write the file as docs/measurement-file.md says."
        )


def _number(value: Any) -> float | None:
    """Returns what an attribute or a dataset's value is as a number, or None if it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _check_intensity(path: Path, file: Any) -> None:
    ours = Intensity()
    for key, expected in (("intensity_offset", ours.offset), ("intensity_scale", ours.scale)):
        value = file.attrs.get(key)
        if value is None or _number(value) != expected:
            raise InputError(
                f"The measurement file {path} has '{key}' = {value}, expected {expected:g} ({ours.units}): "
                "its line integrals are on another intensity scale; rescale them as "
                "docs/measurement-file.md says."
            )


def _check_noise(path: Path, noise: Any, shape: tuple[int, ...]) -> None:
    if tuple(noise.shape) not in ((), tuple(shape[:1]), tuple(shape)):
        raise InputError(
            f"'noise_std' of {path} has shape {tuple(noise.shape)}, expected one number, one per sinogram "
            f"{shape[:1]}, or one per ray {tuple(shape)}."
        )
    if noise.dtype.kind not in "fiu":
        raise InputError(f"'noise_std' of {path} is of type {noise.dtype}, expected numbers.")
    if noise.ndim == 0 and not (math.isfinite(float(noise[()])) and float(noise[()]) > 0):
        raise InputError(
            f"'noise_std' of {path} is {float(noise[()])}, expected a standard deviation > 0; leave it out for "
            "noise-free data."
        )
