"""Scans as scanners and archives store them: NIfTI, NRRD and DICOM series, in the radiological convention."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from invrecon.data.hdf5 import brief
from invrecon.data.volume import Volume
from invrecon.errors import InputError

_NRRD_SPACES = {  # signs that turn a space's coordinates into left, posterior, superior
    "right-anterior-superior": (-1.0, -1.0, 1.0),
    "ras": (-1.0, -1.0, 1.0),
    "left-anterior-superior": (1.0, -1.0, 1.0),
    "las": (1.0, -1.0, 1.0),
}


class _OrientedVolume(Volume):
    """A 3D array with axes in any order, turned slice by slice into the radiological convention."""

    def _orient(self, sizes: Sequence[int], directions: np.ndarray) -> None:
        """Finds which array axis is which.

        Args:
            sizes: The array's shape.
            directions: `(3, 3)`; column `k` is the step along array axis `k` in the patient's left,
                posterior, superior coordinates [mm].
        """
        left, free = np.abs(directions), {0, 1, 2}
        axes = []
        for world in (2, 1, 0):  # slices, rows, columns
            axis = max(free, key=lambda k, w=world: left[w, k])  # type: ignore[misc]
            free.discard(axis)
            axes.append(axis)
        self._axes = axes
        self._flip = [bool(directions[w, k] < 0) for w, k in zip((2, 1, 0), axes, strict=True)]
        self.shape = (int(sizes[axes[0]]), int(sizes[axes[1]]), int(sizes[axes[2]]))
        steps = [float(np.linalg.norm(directions[:, k])) for k in axes]
        self.voxel_mm = (steps[0], steps[1], steps[2]) if min(steps) > 0 else None

    def _take(self, array: Any, index: int) -> np.ndarray:
        if self._flip[0]:
            index = len(self) - 1 - index
        where: list[slice | int] = [slice(None)] * 3
        where[self._axes[0]] = index
        pixels = np.asarray(array[tuple(where)])
        if self._axes[1] > self._axes[2]:
            pixels = pixels.T
        return pixels[:: -1 if self._flip[1] else 1, :: -1 if self._flip[2] else 1]


class NiftiVolume(_OrientedVolume):
    """A 3D NIfTI file; its affine gives orientation and voxel size."""

    def __init__(self, path: Path) -> None:
        nibabel = _require("nibabel", "NIfTI")

        self.path = path
        try:
            image: Any = nibabel.load(path)
        except Exception as error:
            raise InputError(f"{path} is not a readable NIfTI file ({brief(error)}); convert it again.") from error
        to_lps = np.diag([-1.0, -1.0, 1.0])  # NIfTI counts right and anterior as positive
        self._orient(_three_axes(path, image.shape), to_lps @ np.asarray(image.affine, dtype=float)[:3, :3])
        self._pixels = _Squeezed(image.dataobj)
        self._finish(image.get_data_dtype())

    def _read(self, index: int) -> np.ndarray:
        return self._take(self._pixels, index)


class _Squeezed:
    """A view of a lazily read array without the unit axes that follow the third."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __getitem__(self, where: tuple) -> np.ndarray:
        return self._array[(*where, *[0] * (self._array.ndim - 3))]


class NRRDVolume(_OrientedVolume):
    """A 3D NRRD file; compressed, it has no random access, so the array is kept once a slice is read."""

    def __init__(self, path: Path) -> None:
        nrrd = _require("nrrd", "NRRD")

        self.path = path
        self._array: np.ndarray | None = None
        try:
            header = nrrd.read_header(str(path))
            sizes = _three_axes(path, header["sizes"])
            directions = header.get("space directions")
            if directions is None:
                directions = np.diag(np.abs(np.asarray(header.get("spacings", [1.0] * 3), dtype=float)[:3]))
                known = "spacings" in header
            else:
                directions, known = np.asarray(directions, dtype=float)[:3].T, True
            signs = _NRRD_SPACES.get(str(header.get("space", "")).lower(), (1.0, 1.0, 1.0))
            known_type = header["type"] != "block"  # all other types are real numbers
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"{path} is not a readable NRRD file ({brief(error)}); convert it again.") from error
        self._orient(sizes, np.diag(signs) @ directions)
        if not known:
            self.voxel_mm = None
        self._finish(np.dtype(np.float32 if known_type else np.void))

    def _read(self, index: int) -> np.ndarray:
        nrrd = _require("nrrd", "NRRD")

        if self._array is None:
            array, _ = nrrd.read(str(self.path))
            self._array = array.reshape(array.shape[:3])
        return self._take(self._array, index)


class DicomVolume(Volume):
    """One DICOM series in a folder, sorted along the slices' normal; values `slope * pixel + intercept`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        headers = {entry: _read_dicom(entry, pixels=False) for entry in sorted(path.iterdir()) if is_dicom(entry)}
        headers = {entry: header for entry, header in headers.items() if "Rows" in header and "Columns" in header}
        if not headers:
            raise InputError(f"The folder {path} holds no DICOM image; expected the slices of one series.")
        series = {str(header.get("SeriesInstanceUID", "")) for header in headers.values()}
        if len(series) > 1:
            raise InputError(
                f"The folder {path} mixes {len(series)} DICOM series, expected one; put each into a folder of its own."
            )
        sizes = {(int(header.Rows), int(header.Columns)) for header in headers.values()}
        if len(sizes) > 1:
            raise InputError(f"The slices in {path} differ in size ({sorted(sizes)}), expected one size.")
        for entry, header in headers.items():
            if int(header.get("SamplesPerPixel", 1)) != 1 or int(header.get("NumberOfFrames", 1)) != 1:
                raise InputError(f"{entry} is a colour or multi-frame image, expected single grey slices.")
        first = next(iter(headers.values()))
        place = _positions(list(headers.values()))
        ordered = sorted(zip(place, headers, strict=True))
        places = [where for where, _ in ordered]
        if len(set(places)) < len(places):
            raise InputError(
                f"Several slices in {path} share one position, as in a series over time, expected one 3D "
                "scan; put each time into a folder of its own."
            )
        self._files = [entry for _, entry in ordered]
        self.shape = (len(self._files), *sizes.pop())
        self.voxel_mm = _dicom_voxel(first, places)
        self._finish(np.dtype(np.float32), str(first.get("PatientID", "")))

    def _read(self, index: int) -> np.ndarray:
        header = _read_dicom(self._files[index], pixels=True)
        slope, intercept = float(header.get("RescaleSlope", 1)), float(header.get("RescaleIntercept", 0))
        return header.pixel_array.astype(np.float32) * slope + intercept


def is_dicom(path: Path) -> bool:
    """Tells whether a file is DICOM, by its preamble ('DICM' at byte 128) or its suffix '.dcm'."""
    if not path.is_file() or path.name.startswith(".") or path.name == "DICOMDIR":
        return False
    if path.suffix.lower() == ".dcm":
        return True
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def _read_dicom(path: Path, *, pixels: bool) -> Any:
    pydicom = _require("pydicom", "DICOM")

    try:
        return pydicom.dcmread(path, stop_before_pixels=not pixels)
    except Exception as error:
        raise InputError(f"{path} is not a readable DICOM file ({brief(error)}); copy it again.") from error


def _positions(headers: Sequence) -> list[float]:
    """Positions of the slices along the direction from feet to head (or their common normal) [mm]."""
    if all("ImagePositionPatient" in header and "ImageOrientationPatient" in header for header in headers):
        orientation = np.asarray(headers[0].ImageOrientationPatient, dtype=float)
        normal = np.cross(orientation[:3], orientation[3:])
        normal *= np.sign(normal[np.abs(normal).argmax()]) or 1.0
        return [float(normal @ np.asarray(header.ImagePositionPatient, dtype=float)) for header in headers]
    return [float(header.get("InstanceNumber", rank) or 0) for rank, header in enumerate(headers)]


def _dicom_voxel(header: Any, places: Sequence[float]) -> tuple[float, float, float] | None:
    if "PixelSpacing" not in header:
        return None
    rows, columns = (float(value) for value in header.PixelSpacing)
    gaps = np.diff(places) if "ImagePositionPatient" in header else np.zeros(0)
    between = float(np.median(gaps)) if gaps.size else float(header.get("SliceThickness", 0) or 0)
    return (between, rows, columns) if between > 0 else None


def _three_axes(path: Path, sizes: Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in sizes)
    if len(sizes) < 3 or any(size != 1 for size in sizes[3:]):
        raise InputError(f"{path} has shape {sizes}, expected three axes; save one 3D scan per file.")
    return sizes


def _require(module: str, format_name: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise InputError(
            f"Reading {format_name} needs the package '{module}', which is not installed; run `pip install "
            "'invrecon[io]'`."
        ) from error
