"""What every volume is, whatever its format: slices whose headers are known and whose pixels are read on demand."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from invrecon.data.hdf5 import VoxelSize, brief, check_real
from invrecon.errors import InputError


class Volume(ABC):
    """A stack of slices whose headers are known and whose pixels are read on demand.

    Attributes:
        path: The file, or the folder of a DICOM series.
        shape: `(N, H, W)`: slices, rows, columns.
        voxel_mm: Voxel size `(z, y, x)` [mm], or None where the file does not say.
        units: Physical unit of what `read` returns, "HU" for CT.
        patients: One identity per slice, length `N`.
        source: Where the data came from, in the file's own words; may be empty.
    """

    path: Path
    shape: tuple[int, int, int]
    voxel_mm: VoxelSize | None = None
    units: str = "HU"
    source: str = ""
    patients: tuple[str, ...]

    @property
    def patient(self) -> str:
        """The volume's patient; where its slices belong to several, that of the first."""
        return self.patients[0]

    @property
    def stem(self) -> str:
        """The file's name without its suffixes."""
        return file_stem(self.path)

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, index: int) -> Tensor:
        """Returns slice `index` as `(H, W)` float32 in `units`.

        Raises:
            InputError: If the slice cannot be decoded, or has NaN or Inf voxels.
        """
        if not 0 <= index < len(self):
            raise InputError(f"{self.path} has no slice {index}: it has {len(self)}, numbered from 0.")
        try:
            pixels = torch.from_numpy(np.ascontiguousarray(self._read(index), dtype=np.float32))
        except InputError:
            raise
        except Exception as error:  # every decoder has exceptions of its own
            raise InputError(
                f"Slice {index} of {self.path} cannot be read ({brief(error)}): the file is damaged, "
                "truncated or packed in a way that is not understood; copy it again from its source."
            ) from error
        bad = int((~torch.isfinite(pixels)).sum())
        if bad:
            air = " (air is -1024 HU)" if self.units == "HU" else ""
            raise InputError(
                f"Slice {index} of {self.path} has {bad} NaN or Inf voxels of {pixels.numel()}, expected "
                f"finite {self.units} everywhere; replace them{air} or leave the slice out."
            )
        return pixels

    @abstractmethod
    def _read(self, index: int) -> np.ndarray:
        """Returns slice `index`, `(H, W)`, in physical values."""

    def _finish(self, dtype: np.dtype, patient: str = "") -> None:
        """Checks the header and settles whose slices these are; every reader's constructor ends here."""
        check_real(self.path, dtype)
        if min(self.shape) < 1 or min(self.shape[1:]) < 2:
            raise InputError(
                f"{self.path} holds an array of shape {self.shape}, expected (slices, rows, columns) with "
                "at least one slice of 2 x 2 pixels."
            )
        self.patients = _sidecar_patients(self.path, len(self)) or (patient or self.stem,) * len(self)


def file_stem(path: Path) -> str:
    """Returns a file's name without suffix ('.nii.gz' counts as one), or a folder's name."""
    return path.resolve().name if path.is_dir() else path.name[: len(path.name) - len(suffix_of(path))]


def is_hidden(path: Path, folder: Path) -> bool:
    """Says whether a path within a folder has a part that begins with a dot, as what tools leave behind has."""
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def suffix_of(path: Path) -> str:
    """Returns the suffix in lower case; '.nii.gz' is one."""
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else path.suffix.lower()


def _sidecar_patients(path: Path, num: int) -> tuple[str, ...] | None:
    """Reads `<stem>.patients.json`: a list with one entry per slice, `[where it came from, patient, ...]`."""
    sidecar = path.parent / f"{file_stem(path)}.patients.json"
    if not sidecar.is_file():
        return None
    try:
        entries = json.loads(sidecar.read_text())
        patients = tuple(str(entry[1]) for entry in entries)
    except (ValueError, TypeError, LookupError) as error:
        raise InputError(
            f"{sidecar} is not understood ({brief(error)}); expected a list of [source, patient] pairs, one per slice."
        ) from error
    if len(patients) != num:
        raise InputError(f"{sidecar} names {len(patients)} slices, but {path} has {num}; list one entry per slice.")
    return patients
