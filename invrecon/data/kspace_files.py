"""Opens k-space of any format: fastMRI, ISMRMRD, plain complex arrays in HDF5, npy or cfl files."""

from __future__ import annotations

from pathlib import Path

from invrecon.data.arrays import ArrayFile
from invrecon.data.fastmri_files import FastMRIFile
from invrecon.data.hdf5 import HDF5_SUFFIXES, list_datasets, open_hdf5
from invrecon.data.ismrmrd import ISMRMRDFile, is_ismrmrd
from invrecon.data.kspace import KSpace
from invrecon.data.volume import suffix_of
from invrecon.errors import InputError

ARRAY_SUFFIXES = (".npy", ".cfl")
RAW_SUFFIX = ".mrd"  # of ISMRMRD, which is HDF5


def open_kspace(path: Path, dataset: str = "data") -> KSpace:
    """Opens a file of k-space without reading it.

    Args:
        path: An HDF5 (fastMRI, ISMRMRD or a complex array), npy or cfl file.
        dataset: HDF5 key of a complex array that is not called `kspace`.

    Raises:
        InputError: It is missing, damaged, no k-space, or its header contradicts its data.
    """
    if suffix_of(path) == ".hdr":
        path = path.with_suffix(".cfl")
    if suffix_of(path) in ARRAY_SUFFIXES:
        return ArrayFile(path)
    with open_hdf5(path) as file:
        if is_ismrmrd(file):
            kind = "ismrmrd"
        elif "kspace" in file:
            kind = "fastmri" if "ismrmrd_header" in file else "kspace"
        elif dataset in file:
            kind = dataset
        else:
            raise InputError(
                f"{path} has neither 'kspace' nor '{dataset}'; it has {', '.join(list_datasets(file)) or 'nothing'}. "
                "Name the dataset with data.dataset."
            )
    if kind == "ismrmrd":
        return ISMRMRDFile(path)
    return FastMRIFile(path) if kind == "fastmri" else ArrayFile(path, kind)


def is_kspace(path: Path, dataset: str = "data") -> bool:
    """Tells k-space from magnitude volumes, by the name if it says so; any other that is damaged or missing is none."""
    if suffix_of(path) in (*ARRAY_SUFFIXES, ".hdr"):
        return True
    if path.is_dir() or suffix_of(path) not in (*HDF5_SUFFIXES, RAW_SUFFIX):
        return False
    try:
        with open_hdf5(path) as file:
            array = file.get(dataset)
            return is_ismrmrd(file) or "kspace" in file or getattr(getattr(array, "dtype", None), "kind", "") == "c"
    except InputError:
        return suffix_of(path) == RAW_SUFFIX  # of which opening says what is wrong
