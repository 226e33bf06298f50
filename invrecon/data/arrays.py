"""K-space as plain complex arrays: HDF5 datasets, npy files and BART's cfl files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from invrecon.data.hdf5 import HDF5_SUFFIXES, brief, open_hdf5, read_voxel_mm, text_of
from invrecon.data.kspace import KSpace, read_noise_covariance, read_noise_std
from invrecon.data.volume import suffix_of
from invrecon.errors import InputError


class ArrayFile(KSpace):
    """A complex array `(slices, coils, rows, columns)`, or of one slice `(coils, rows, columns)`.

    HDF5 (a dataset; attributes `voxel_mm`, `patient` and `noise_std`, a dataset `noise_covariance`), npy, or BART's cfl
    with its hdr, whose third dimension must have one entry.

    Args:
        path: The file.
        dataset: Name of the dataset, for HDF5.
    """

    def __init__(self, path: Path, dataset: str = "kspace") -> None:
        self.path, self.dataset, attrs = path, dataset, {}
        if suffix_of(path) in HDF5_SUFFIXES:
            with open_hdf5(path) as file:
                stored = file[dataset]
                if not hasattr(stored, "dtype"):
                    raise InputError(f"'{dataset}' of {path} is a group, expected a dataset of complex k-space.")
                if "mask" in file:
                    raise InputError(
                        f"{path} states a mask beside '{dataset}', which only files of fastMRI's format do: add "
                        "'ismrmrd_header', or set what was not measured to zero and leave the mask out."
                    )
                if "reconstruction_esc" in file and stored.ndim == 3:
                    raise InputError(
                        f"{path} has fastMRI's target of one coil, and no 'ismrmrd_header': its k-space of shape "
                        f"{stored.shape} would be read as {stored.shape[0]} coils of one slice. Add the header, or "
                        "save it as (slices, 1, rows, columns)."
                    )
                shape, dtype = stored.shape, stored.dtype
                attrs = {**file.attrs, **file[dataset].attrs}
                self.voxel_mm = read_voxel_mm(path, attrs)
                patient = text_of(file.attrs.get("patient", ""))
                self.noise_covariance = read_noise_covariance(path, file, shape[-3] if len(shape) > 2 else 0)
        else:
            array = self._open()
            shape, dtype, patient = array.shape, array.dtype, ""
        if dtype.kind != "c":
            raise InputError(
                f"{path} holds elements of type {dtype}, expected complex k-space: save it as complex64; magnitude "
                "images go into a dataset 'data' of an HDF5 file."
            )
        self.is_named = suffix_of(path) in HDF5_SUFFIXES and dataset == "kspace"
        self._stacked = len(shape) == 4
        self._finish(tuple(shape) if self._stacked else (1, *shape), patient)
        self.noise_std = read_noise_std(path, attrs, self.shape[1])

    def _open(self) -> np.ndarray:
        """Returns the array of an npy or cfl file, in the order of the axes of `ArrayFile`, not yet read."""
        if suffix_of(self.path) == ".cfl":
            return open_cfl(self.path)
        try:
            return np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{self.path} is not a readable npy file ({brief(error)}); save it again.") from error

    def _read(self, index: int) -> tuple[np.ndarray, None]:
        if suffix_of(self.path) in HDF5_SUFFIXES:
            with open_hdf5(self.path) as file:
                stored = file[self.dataset]
                return (stored[index] if self._stacked else stored[()]), None
        array = self._open()
        return np.asarray(array[index] if self._stacked else array), None


def open_cfl(path: Path) -> np.ndarray:
    """Returns a memory map of BART's cfl file as `(slices, coils, rows, columns)`.

    BART's dimensions are readout, two phase encodings, coils, ..., and slices in place 13; of the first three, two
    may have more than one entry.

    Raises:
        InputError: The header is missing, not understood, or of another size than the data.
    """
    header = path.with_suffix(".hdr")
    try:
        lines = header.read_text().splitlines()
        dims = [int(word) for word in lines[lines.index("# Dimensions") + 1].split()]
    except (OSError, ValueError, IndexError) as error:
        raise InputError(
            f"{header} is not a readable header of {path.name} ({brief(error)}); expected '# Dimensions' and a line of "
            "numbers, as BART writes them."
        ) from error
    dims += [1] * (16 - len(dims))
    while len(dims) > 16 and dims[-1] == 1:
        dims.pop()
    num = path.stat().st_size // 8 if path.is_file() else 0
    if num != np.prod(dims):
        raise InputError(
            f"{header} says {' x '.join(map(str, dims[:4]))} and so on, {np.prod(dims)} samples, but {path} holds "
            f"{num}: the header belongs to other data, or the data are truncated."
        )
    plane = [axis for axis in range(3) if dims[axis] > 1]
    others = [axis for axis in range(4, len(dims)) if dims[axis] > 1 and axis != 13]
    if len(plane) != 2 or others:
        raise InputError(
            f"{path} has the dimensions {dims}, expected one plane of k-space, coils and slices (dimension 13): "
            "transform a third dimension to images first, and save sets, maps or times apart."
        )
    array = np.memmap(path, dtype=np.complex64, mode="r", shape=tuple(dims), order="F")
    kept = [13, 3, *plane]
    return array.transpose(*kept, *(axis for axis in range(16) if axis not in kept)).reshape([dims[k] for k in kept])
