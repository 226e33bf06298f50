"""Volumes of slices on disk, read one slice at a time: HDF5, NIfTI, NRRD and folders of DICOM.

Whatever the format, slices come in physical values (CT: Hounsfield units) in the radiological convention:
rows run from anterior to posterior, columns from the patient's right to left, slice numbers from feet to
head. HDF5 carries no orientation and is taken as stored.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from invrecon.data.hdf5 import (
    HDF5_SUFFIXES,
    list_datasets,
    open_hdf5,
    read_voxel_mm,
    text_of,
)
from invrecon.data.intensity import Intensity
from invrecon.data.scans import DicomVolume, NiftiVolume, NRRDVolume, is_dicom
from invrecon.data.volume import Volume, suffix_of
from invrecon.errors import InputError

SUFFIXES = (*HDF5_SUFFIXES, ".nii", ".nii.gz", ".nrrd")


class HDF5Volume(Volume):
    """An HDF5 dataset, slice first; attributes `source`, `units`, `patient`, `voxel_mm` (x, y, z)."""

    def __init__(self, path: Path, dataset: str) -> None:
        import h5py

        self.path, self.dataset = path, dataset
        with open_hdf5(path) as file:
            data = file.get(dataset)
            if not isinstance(data, h5py.Dataset):
                raise InputError(
                    f"{path} has no dataset '{dataset}'; it has "
                    f"{', '.join(list_datasets(file)) or 'none at all'}. Name the one to read with "
                    "dataset=..., or the file is not a volume."
                )
            if data.ndim != 3:
                raise InputError(
                    f"Dataset '{dataset}' of {path} has shape {data.shape}, expected three axes (slices, "
                    "rows, columns); reshape it and save it again."
                )
            attrs = {**file.attrs, **data.attrs}
            self.shape = tuple(data.shape)
            self.units = text_of(attrs.get("units", self.units))
            self.source = text_of(attrs.get("source", ""))
            self.voxel_mm = read_voxel_mm(path, attrs)
            self._finish(data.dtype, text_of(attrs.get("patient", "")))

    def _read(self, index: int) -> np.ndarray:
        with open_hdf5(self.path) as file:  # opened anew each time: no handle to share between workers
            return file[self.dataset][index]


def open_volume(path: str | Path, *, dataset: str = "data", units: str = "HU") -> Volume:
    """Opens a volume without reading its pixels.

    Args:
        path: An HDF5, NIfTI or NRRD file, or a folder with one DICOM series.
        dataset: The name of the dataset, for HDF5.
        units: The unit that the file must be in.

    Raises:
        InputError: If it is missing, damaged, of an unknown kind, complex, empty or in other units.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist; check the path.")

    volume: Volume
    if path.is_dir():
        volume = DicomVolume(path)
    elif suffix_of(path) in HDF5_SUFFIXES:
        volume = HDF5Volume(path, dataset)
    elif suffix_of(path) in (".nii", ".nii.gz"):
        volume = NiftiVolume(path)
    elif suffix_of(path) == ".nrrd":
        volume = NRRDVolume(path)
    else:
        raise InputError(
            f"{path} is not of a kind that can be read: expected {', '.join(SUFFIXES)} or a folder of DICOM "
            "files; save the array as HDF5 (dataset 'data', slices first, in HU)."
        )
    if volume.units != units:
        raise InputError(
            f"{path} is in units '{volume.units}', expected '{units}'; rescale it and set its attribute 'units'."
        )
    return volume


def read_volume(path: str | Path, *, dataset: str = "data", units: str = "HU") -> tuple[Tensor, Volume]:
    """Reads a volume whole, for training: `(values (N, H, W) float32, its Volume)`.

    Raises:
        InputError: As `open_volume` and `Volume.read`; also if every slice is constant.
    """
    volume = open_volume(path, dataset=dataset, units=units)
    values = torch.empty(volume.shape)
    for index in range(len(volume)):
        values[index] = volume.read(index)
    if bool((values.amax(dim=(1, 2)) == values.amin(dim=(1, 2))).all()):
        raise _constant_error(volume, range(len(volume)))
    return values, volume


def check_pixels(volume: Volume, indices: Sequence[int], intensity: Intensity | None = None) -> None:
    """Reads the slices one by one and refuses what no reconstruction could use, before hours are spent on it.

    Single slices of plain air are fine; a selection of nothing but constant slices is not.

    Args:
        volume: The volume.
        indices: The selected slices.
        intensity: The scale they will be used on; constant is judged after its clipping.

    Raises:
        InputError: If a slice cannot be read, has NaN or Inf, or if all of them are constant.
    """
    intensity = intensity or Intensity()
    varies, low, high = False, math.inf, -math.inf
    for index in indices:
        values = volume.read(index)
        low, high = min(low, float(values.amin())), max(high, float(values.amax()))
        x = intensity.encode(values)
        varies = varies or bool(x.amax() > x.amin())
    if not varies:
        raise _constant_error(volume, indices)
    if intensity.units == "HU":
        check_hounsfield(volume.path, low, high)


def check_hounsfield(path: Path, low: float, high: float) -> None:
    """Looks whether values are Hounsfield units, by their range alone; warns where air is missing.

    Raises:
        InputError: They are fractions, or attenuation.
    """
    if max(abs(low), abs(high)) <= 5:
        raise InputError(
            f"The values of '{path}' lie between {low:.4g} and {high:.4g}, expected Hounsfield units, air at -1000 and "
            "water at 0: convert them."
        )
    if low > -500:
        warnings.warn(
            f"'{path}' has no value below -500 HU, and so no air: if its values carry an offset, such as 1024, take it "
            "off.",
            stacklevel=3,
        )


def find_volumes(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """Lists the volumes that `paths` name, folders searched recursively and sorted.

    A folder that holds DICOM files is itself a volume.

    Raises:
        InputError: If a path does not exist, or nothing readable is found in a folder.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    if not paths:
        raise InputError("No data path is given; name one or more files or folders (--data.paths).")
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_dir():
            inside = _search(path)
            if not inside:
                raise InputError(
                    f"The folder {path} holds no readable volume; expected files {', '.join(SUFFIXES)} or DICOM."
                )
            found.update(dict.fromkeys(inside))
        elif path.exists():
            found[path] = None
        else:
            raise InputError(f"{path} does not exist; check the path.")
    return list(found)


def parse_slices(text: str | None, num: int, *, name: str = "the volume") -> list[int]:
    """Parses a selection of slices: '3', '1,4,9', '10:90:5' (as Python's `range`), ':' or '5:'.

    Args:
        text: The selection; None is all.
        num: The number of slices there are.
        name: What is selected from, for messages.

    Raises:
        InputError: If it is not understood, names a slice twice, or is empty or out of range.
    """
    if text is None:
        return list(range(num))
    indices: list[int] = []
    for part in str(text).split(","):
        for index in _parse_part(part, num, text):
            if not 0 <= index < num:
                raise InputError(f"The slices '{text}' ask for slice {index}, but {name} has only 0 to {num - 1}.")
            indices.append(index)
    if not indices:
        raise InputError(f"The slices '{text}' select nothing of {name}, which has slices 0 to {num - 1}.")
    if len(set(indices)) < len(indices):
        raise InputError(f"The slices '{text}' name a slice more than once; name each once.")
    return indices


def _parse_part(part: str, num: int, text: str) -> range:
    """Parses one number or `start:stop:step` of a selection."""
    words = part.split(":")
    try:
        if len(words) == 1:
            return range(int(part), int(part) + 1)
        start, stop, step = (
            int(word) if word.strip() else default
            for word, default in zip([*words, "", ""][: max(3, len(words))], (0, num, 1), strict=True)
        )
        return range(start, stop, step)
    except ValueError as error:
        raise InputError(
            f"The slices '{text}' are not understood; expected something like '3', '1,4,9' or '10:90:5' "
            "(start:stop:step, the stop excluded)."
        ) from error


def _search(folder: Path) -> list[Path]:

    here = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in here if entry.is_file()]
    found = [entry for entry in files if suffix_of(entry) in SUFFIXES]
    if any(is_dicom(entry) for entry in files if entry not in found):
        found.append(folder)
    for entry in here:
        if entry.is_dir():
            found += _search(entry)
    return found


def _constant_error(volume: Volume, indices: Sequence[int]) -> InputError:
    value = float(volume.read(indices[0]).flatten()[0])
    what = f"slice {indices[0]} is" if len(indices) == 1 else f"all {len(indices)} slices from {indices[0]} on are"
    return InputError(
        f"The image is constant in {volume.path}: {what} {value:g} {volume.units} (or outside the scale) "
        f"everywhere, so there is nothing to reconstruct; check that the data are in {volume.units} and "
        "select other slices."
    )
