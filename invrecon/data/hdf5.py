"""Reading HDF5 with errors that people understand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from invrecon.errors import InputError

VoxelSize = tuple[float, float, float]
HDF5_SUFFIXES = (".h5", ".hdf5", ".hdf")


def open_hdf5(path: Path) -> Any:
    """Opens an HDF5 file for reading.

    Raises:
        InputError: If it is missing, truncated or not HDF5.
    """
    import h5py

    if not path.is_file():
        raise InputError(f"{path} does not exist; check the path.")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        reason = "it is truncated" if "truncated" in str(error) else "it is not HDF5, or damaged"
        if isinstance(error, PermissionError):
            reason = "you may not read it"
        raise InputError(
            f"{path} ({path.stat().st_size} bytes) cannot be opened: {reason}; copy or convert it again."
        ) from error


def list_datasets(file: Any) -> list[str]:
    """Lists the datasets of an open HDF5 file with their shapes, for messages."""
    names: list[str] = []
    file.visititems(lambda name, item: names.append(f"'{name}' {item.shape}") if hasattr(item, "shape") else None)
    return names


def read_voxel_mm(path: Path, attrs: dict[str, Any]) -> VoxelSize | None:
    """Reads the attribute `voxel_mm` as `(z, y, x)` [mm]; absent or empty is None.

    It is stored `(x, y, z)`, unless `voxel_mm_axes` says "z, y, x", as in results of ours.
    """
    values = np.atleast_1d(np.asarray(attrs.get("voxel_mm", [])))
    if values.size == 0:
        return None
    if values.shape != (3,) or values.dtype.kind not in "fiu" or not (np.isfinite(values) & (values > 0)).all():
        raise InputError(f"The attribute 'voxel_mm' of {path} is {values}, expected three positive lengths (x, y, z).")
    first, second, third = (float(v) for v in values)
    if text_of(attrs.get("voxel_mm_axes", "")).startswith("z"):
        return first, second, third
    return third, second, first


def check_real(path: Path, dtype: np.dtype) -> None:
    """Refuses complex, boolean, text, compound and pickled arrays.

    Raises:
        InputError: If `dtype` is not a real number.
    """
    if dtype.kind == "c":
        raise InputError(f"{path} holds complex numbers ({dtype}), expected real values; save the real part.")
    if dtype.kind not in "fiu":
        raise InputError(f"{path} holds elements of type {dtype}, expected integers or floats; save it as such.")


def text_of(value: object) -> str:
    """Returns an HDF5 attribute, bytes or text, as text."""
    return value.decode() if isinstance(value, bytes) else str(value)


def brief(error: BaseException) -> str:
    """Returns the first line of an error's message, without its full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".") or type(error).__name__
