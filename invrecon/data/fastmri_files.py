"""Files of the fastMRI data set, and files like them: read by fastmri's own reader, written whole or not at all.

Source: Zbontar et al., fastMRI, arXiv 1811.08839, Sec. 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from invrecon.data.hdf5 import VoxelSize, brief, open_hdf5, text_of
from invrecon.data.kspace import (
    UNDERSAMPLED,
    KSpace,
    Matrix,
    block_of,
    crop,
    is_full,
    read_noise_covariance,
    read_noise_std,
)
from invrecon.errors import InputError
from invrecon.files import atomic_h5
from invrecon.operators.fourier import ifft2c, pairs_to_complex

if TYPE_CHECKING:
    from fastmri.data import SliceDataset

LEAST_FILLED = 0.8  # of a block without a mask: more zeros are no rounding, but samples that someone left out


class FastMRIFile(KSpace):
    """A file of the fastMRI data set, knee or brain, one or many coils, read by fastmri's own `SliceDataset`.

    The ISMRMRD header gives the encoded matrix, which must be that of the data, and the image asked for.
    A mask is stated in files of the test and challenge sets; without one, the format says that all was measured between
    columns that pad k-space, on one side or both, and its targets are made of just that.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_hdf5(path) as file:
            stored = file["kspace"]
            if not hasattr(stored, "dtype"):
                raise InputError(f"'kspace' of {path} is a group, expected a dataset of complex k-space.")
            if stored.dtype.kind != "c" or stored.ndim not in (3, 4):
                raise InputError(
                    f"'kspace' of {path} is {stored.dtype} of shape {stored.shape}, expected complex (slices, coils, "
                    "rows, columns), or (slices, rows, columns) for one coil."
                )
            shape = stored.shape if stored.ndim == 4 else (stored.shape[0], 1, *stored.shape[1:])
            for name in {"mask", "ismrmrd_header"} & set(file):
                if not hasattr(file[name], "dtype"):
                    raise InputError(f"'{name}' of {path} is a group, expected a dataset.")
            self.states_mask = "mask" in file
            mask_shape = file["mask"].shape if self.states_mask else (shape[3],)
            if tuple(mask_shape) != (shape[3],):
                raise InputError(
                    f"The mask of {path} has shape {tuple(mask_shape)}, but its k-space has {shape[3]} columns: "
                    f"expected ({shape[3]},), an entry a column."
                )
            if self.states_mask and file["mask"].dtype.kind not in "biuf":
                raise InputError(
                    f"The mask of {path} holds elements of type {file['mask'].dtype}, expected 0 and 1 as booleans, "
                    "integers or floats: save it as such."
                )
            header = file["ismrmrd_header"][()]
            self.noise_std = read_noise_std(path, {**file.attrs, **stored.attrs}, shape[1])
            self.noise_covariance = read_noise_covariance(path, file, shape[1])
            self.maximum = stated_maximum(file)
        self._finish(shape)
        try:
            self.metadata, _ = fastmri_slices()._retrieve_metadata(path)
            field = header_values(header, "encodedSpace", "fieldOfView_mm")
            encoded, asked = self.metadata["encoding_size"], self.metadata["recon_size"]
            if min(*encoded, *asked, *field) <= 0:
                raise ValueError(f"matrix {encoded}, {asked} and field of view {field} have to be positive")
            self.voxel_mm = (field[2] / encoded[2], field[0] / encoded[0], field[1] / encoded[1])
        except Exception as error:
            raise InputError(
                f"The ISMRMRD header of {path} is not understood ({brief(error)}); expected XML with encodedSpace, "
                "reconSpace and encodingLimits, as fastMRI's files have it."
            ) from error
        check_cartesian(path, header)
        check_matrix(path, encoded[:2], shape[2:])
        height, width = min(asked[0], shape[2]), min(asked[1], shape[3])
        self.shape = (shape[0], shape[1], height, shape[3])
        self.matrix = (height, width)
        self.patient = text_of(self.metadata.get("patient_id", "")) or self.stem

    def lacking(self, index: int, mask: Tensor) -> str:
        """As of any k-space, but padded on one side it has a reference, too."""
        return UNDERSAMPLED if self.states_mask or not is_full(mask) else ""

    def _sampled(self, support: Tensor) -> Tensor:
        block = support[place := block_of(support)]
        if not (block.any(0).all() and block.any(1).all()) or float(block.float().mean()) < LEAST_FILLED:
            return super()._sampled(support)
        filled = torch.zeros_like(support)
        filled[place] = True
        return filled

    def _read(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        dataset = fastmri_slices()
        dataset.raw_samples = [(self.path, index, self.metadata)]
        kspace, mask, *_ = dataset[0]
        if mask is not None and not np.isfinite(mask).all():
            raise InputError(f"The mask of {self.path} holds NaN or Inf, expected 0 and 1, an entry a column.")
        return kspace if kspace.ndim == 3 else kspace[None], None if mask is None else mask.reshape(1, -1) > 0


def fastmri_slices() -> SliceDataset:
    """Returns fastmri's `SliceDataset` without files: its own constructor reads all headers of a folder."""
    from fastmri.data import SliceDataset

    class OneFile(SliceDataset):
        def __init__(self) -> None:
            self.transform, self.recons_key = None, "reconstruction_rss"
            self.raw_samples: list[Any] = []

    return OneFile()


def header_values(header: bytes | str, space: str, entry: str) -> tuple[float, float, float]:
    """Returns `x, y, z` of an entry (`matrixSize`, `fieldOfView_mm`) of the header's encoded or reconstructed space."""
    from xml.etree import ElementTree

    from fastmri.data.mri_data import et_query

    root = ElementTree.fromstring(header)
    x, y, z = (float(et_query(root, ["encoding", space, entry, axis])) for axis in "xyz")
    if not all(0 < value < float("inf") for value in (x, y, z)):
        raise ValueError(f"{space}/{entry} is {x:g} x {y:g} x {z:g}, and has to be positive")
    return x, y, z


def header_entry(header: bytes | str, path: Sequence[str], default: str) -> str:
    """Returns an entry of the header by its path; the default if it is not stated."""
    from xml.etree import ElementTree

    from fastmri.data.mri_data import et_query

    try:
        return str(et_query(ElementTree.fromstring(header), path))
    except RuntimeError:
        return default


def check_cartesian(path: Path, header: bytes | str) -> None:
    """Raises InputError if the header says that the readouts are no lines of a Cartesian grid."""
    trajectory = header_entry(header, ["encoding", "trajectory"], "cartesian").strip().lower()
    if trajectory != "cartesian":
        raise InputError(
            f"The header of {path} says that its trajectory is '{trajectory}', expected 'cartesian': readouts of "
            "others are no lines of k-space. Grid or correct them first, or correct the header."
        )


def check_matrix(path: Path, encoded: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Raises InputError unless the header's encoded matrix is that of the data, `(rows, columns)`."""
    if tuple(encoded) != tuple(shape):
        raise InputError(
            f"The header of {path} says that k-space has {encoded[0]} x {encoded[1]} samples, but it has "
            f"{shape[0]} x {shape[1]}: the header belongs to other data, or the data were cropped; correct either."
        )


def stated_maximum(file: Any) -> float | None:
    """Returns the largest value of the target that an open file states in `max`; None if it does not, or nonsense."""
    largest = np.asarray(file.attrs.get("max", 0.0))
    sound = largest.shape == () and largest.dtype.kind in "fiu" and np.isfinite(largest) and largest > 0
    return float(largest) if sound else None


def read_target(path: Path, indices: Sequence[int], maximum: float | None) -> Tensor | None:
    """Returns the reconstruction that a file of fastMRI states, `(N, H, W)`: what fastMRI's tables judge against.

    It is the root sum of squares of the coils' images, of one coil `reconstruction_esc`. Coils that were mixed, so that
    their noise is alike, have another, of other units and shading: then there is nothing to judge against.

    Args:
        path: The file, or another, of which None is returned.
        indices: Slices.
        maximum: The case's largest value; a case has none though the file states one, or the covariance that coils are
            mixed by, where they were mixed.
    """
    try:
        with open_hdf5(path) as file:
            if maximum is None and (stated_maximum(file) is not None or "noise_covariance" in file):
                return None
            stored = file.get("reconstruction_rss", file.get("reconstruction_esc"))
            if stored is None or getattr(stored, "ndim", 0) != 3 or stored.dtype.kind != "f":
                return None
            return torch.from_numpy(np.stack([stored[index] for index in indices]))
    except (InputError, OSError, ValueError):  # no such file any more, fewer slices: there is nothing to judge against
        return None


def write_fastmri(
    path: str | Path,
    kspace: Tensor,
    *,
    mask: Tensor | None = None,
    matrix: Matrix | None = None,
    voxel_mm: VoxelSize = (5.0, 1.0, 1.0),
    acquisition: str = "AXT1",
    patient: str = "",
) -> None:
    """Writes a file of fastMRI's format, whole or not at all.

    Args:
        path: Where.
        kspace: `(N, coils, H, W, 2)`; of one coil it is stored as single-coil data are.
        mask: Columns that were measured, `(W,)`; the others are set to zero and there is no reference, as in fastMRI's
            test sets. All are measured if None, and the reference is the root sum of squares.
        matrix: Size of the reference, cut from the middle of the image; all of it if None.
        voxel_mm: Voxel size `(z, y, x)` [mm].
        acquisition: fastMRI's name of the contrast.
        patient: The patient's identity.

    Raises:
        InputError: The pieces do not fit each other, or the file cannot be written.
    """
    if kspace.ndim != 5 or kspace.shape[-1] != 2 or 0 in kspace.shape:
        raise InputError(f"The k-space for {path} has shape {tuple(kspace.shape)}, expected (slices, coils, H, W, 2).")
    _, num_coils, H, W, _ = kspace.shape
    if mask is not None and tuple(mask.shape) != (W,):
        raise InputError(f"The mask for {path} has shape {tuple(mask.shape)}, expected ({W},), an entry a column.")
    height, width = (H, W) if matrix is None else matrix
    if not (1 <= height <= H and 1 <= width <= W):
        raise InputError(f"The reference for {path} is to have {height} x {width} pixels, the image has {H} x {W}.")
    z = pairs_to_complex(kspace.detach().cpu().float())
    z = z if mask is None else z * (mask != 0)
    with atomic_h5(path) as file:
        file.create_dataset("kspace", data=(z if num_coils > 1 else z[:, 0]).numpy())
        file.create_dataset("ismrmrd_header", data=fastmri_header((H, W), (height, width), voxel_mm))
        file.attrs.update({"acquisition": acquisition, "patient_id": patient})
        if mask is not None:
            file.create_dataset("mask", data=(mask != 0).numpy())
            return
        images = crop(ifft2c(z).abs().square().sum(1).sqrt(), (height, width)).numpy()
        file.create_dataset("reconstruction_rss" if num_coils > 1 else "reconstruction_esc", data=images)
        file.attrs.update({"max": images.max(), "norm": np.linalg.norm(images)})


def fastmri_header(encoded: Matrix, asked: Matrix, voxel_mm: VoxelSize) -> bytes:
    """Returns the part of an ISMRMRD header that fastMRI's readers ask for."""

    def space(name: str, matrix: Matrix) -> str:
        sizes = {"x": matrix[0], "y": matrix[1], "z": 1}
        lengths = {"x": matrix[0] * voxel_mm[1], "y": matrix[1] * voxel_mm[2], "z": voxel_mm[0]}
        parts = (("matrixSize", sizes), ("fieldOfView_mm", lengths))
        inner = "".join(f"<{k}>{''.join(f'<{a}>{v}</{a}>' for a, v in d.items())}</{k}>" for k, d in parts)
        return f"<{name}>{inner}</{name}>"

    limits = f"<minimum>0</minimum><maximum>{encoded[1] - 1}</maximum><center>{encoded[1] // 2}</center>"
    return (
        '<?xml version="1.0"?><ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD"><encoding>'
        f"{space('encodedSpace', encoded)}{space('reconSpace', asked)}<encodingLimits><kspace_encoding_step_1>"
        f"{limits}</kspace_encoding_step_1></encodingLimits><trajectory>cartesian</trajectory></encoding>"
        "</ismrmrdHeader>"
    ).encode()
