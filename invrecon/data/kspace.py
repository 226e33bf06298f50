"""K-space on disk: fastMRI and ISMRMRD files, plain complex arrays (HDF5, npy, cfl), and a writer of fastMRI's format.

Whatever the format, a slice is read as `(coils, H, W, 2)`, readout along the rows, centred at `(H // 2, W // 2)` under
the orthonormal transform of `invrecon.operators.fourier`. Oversampling of the readout is removed on the way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from invrecon.data.hdf5 import HDF5_SUFFIXES, VoxelSize, brief, list_datasets, open_hdf5, text_of
from invrecon.data.intensity import Intensity
from invrecon.data.volume import file_stem, suffix_of
from invrecon.errors import InputError
from invrecon.operators.fourier import complex_to_pairs, fft2c, ifft2c, pairs_to_complex
from invrecon.operators.sampling import calibration_region, central_block, radii

if TYPE_CHECKING:
    from fastmri.data import SliceDataset

MAGNITUDE = Intensity(offset=0.0, scale=1.0, units="a.u.")  # of complex images; each case brings a scale of its own
ARRAY_SUFFIXES = (".npy", ".cfl")
RAW_SUFFIX = ".mrd"  # of ISMRMRD, which is HDF5
Matrix = tuple[int, int]


class KSpace(ABC):
    """An open file of k-space, read one slice at a time.

    Attributes:
        path: The file.
        shape: `(N, coils, H, W)` as read.
        matrix: Size of the image that is asked for, cut from the middle of what k-space gives; None is all of it.
        states_mask: Whether the file says what was measured: it then was undersampled by the scanner.
        voxel_mm: Voxel size `(z, y, x)` [mm], or None.
        noise_std: Standard deviation of real and imaginary parts that the file states, `()` or `(coils,)`, or None.
        patient: The patient's identity; the file's stem if it does not say.
    """

    path: Path
    shape: tuple[int, int, int, int]
    matrix: Matrix | None = None
    states_mask: bool = False
    voxel_mm: VoxelSize | None = None
    noise_std: Tensor | None = None
    patient: str

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def stem(self) -> str:
        """The file's name without its suffix."""
        return file_stem(self.path)

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns the k-space of a slice `(coils, H, W, 2)`, float32, and what was measured of it, `(H, W)` boolean.

        Raises:
            InputError: It cannot be read, holds NaN or Inf, or nothing was measured.
        """
        if not 0 <= index < len(self):
            raise InputError(f"{self.path} has no slice {index}: it has {len(self)}, numbered from 0.")
        try:
            values, mask = self._read(index)
            z = torch.from_numpy(np.array(values, dtype=np.complex64))
        except InputError:
            raise
        except Exception as error:  # every decoder has exceptions of its own
            raise InputError(
                f"Slice {index} of {self.path} cannot be read ({brief(error)}): the file is damaged or truncated; copy "
                "it again from its source."
            ) from error
        bad = int((~torch.isfinite(torch.view_as_real(z))).any(-1).sum())
        if bad:
            raise InputError(
                f"The k-space of slice {index} in {self.path} has {bad} NaN or Inf samples of {z.numel()}, expected "
                "finite ones: set them to zero and leave them out of the mask."
            )
        kept = (z != 0).any(0)
        if mask is not None:  # columns that only pad k-space are zero
            kept = torch.from_numpy(mask) & kept.any(0).expand(z.shape[1:])
        if not kept.any() or not z.any():
            raise InputError(f"The k-space of slice {index} in {self.path} is zero throughout; leave the slice out.")
        z, kept = crop_readout(z * kept, self.shape[2]), kept[: self.shape[2]]
        return complex_to_pairs(z), kept.clone()

    @abstractmethod
    def _read(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns slice `index` as stored, complex `(coils, H', W)`, and the mask `(1, W)` that the file states."""

    def _finish(self, shape: tuple[int, ...], patient: str = "") -> None:
        """Checks the shape; every reader's constructor ends here."""
        if len(shape) != 4 or 0 in shape:
            what = "zero coils" if len(shape) == 4 and shape[1] == 0 else f"the shape {shape}"
            raise InputError(
                f"The k-space of {self.path} has {what}, expected (slices, coils, rows, columns) with at least one of "
                "each; see that the file was written to the end."
            )
        self.shape = (shape[0], shape[1], shape[2], shape[3])
        self.patient = patient or self.stem


class FastMRIFile(KSpace):
    """A file of the fastMRI data set, knee or brain, one or many coils, read by fastmri's own `SliceDataset`.

    The ISMRMRD header gives the encoded matrix, which must be that of the data, and the image asked for.

    Source: Zbontar et al., fastMRI, arXiv 1811.08839, Sec. 4; a mask is stated in files of the test and challenge sets.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_hdf5(path) as file:
            stored = file["kspace"]
            if stored.dtype.kind != "c" or stored.ndim not in (3, 4):
                raise InputError(
                    f"'kspace' of {path} is {stored.dtype} of shape {stored.shape}, expected complex (slices, coils, "
                    "rows, columns), or (slices, rows, columns) for one coil."
                )
            shape = stored.shape if stored.ndim == 4 else (stored.shape[0], 1, *stored.shape[1:])
            self.states_mask = "mask" in file
            mask_shape = file["mask"].shape if self.states_mask else (shape[3],)
            if tuple(mask_shape) != (shape[3],):
                raise InputError(
                    f"The mask of {path} has shape {tuple(mask_shape)}, but its k-space has {shape[3]} columns: "
                    f"expected ({shape[3]},), an entry a column."
                )
            header = file["ismrmrd_header"][()]
            self.noise_std = read_noise_std(path, {**file.attrs, **stored.attrs}, shape[1])
        self._finish(shape)
        try:
            self.metadata, _ = fastmri_slices()._retrieve_metadata(path)
            field = header_values(header, "encodedSpace", "fieldOfView_mm")
        except Exception as error:
            raise InputError(
                f"The ISMRMRD header of {path} is not understood ({brief(error)}); expected XML with encodedSpace, "
                "reconSpace and encodingLimits, as fastMRI's files have it."
            ) from error
        encoded, asked = self.metadata["encoding_size"], self.metadata["recon_size"]
        check_matrix(path, encoded[:2], shape[2:])
        height, width = min(asked[0], shape[2]), min(asked[1], shape[3])
        self.shape = (shape[0], shape[1], height, shape[3])
        self.matrix = (height, width)
        self.voxel_mm = (field[2] / encoded[2], field[0] / encoded[0], field[1] / encoded[1])
        self.patient = text_of(self.metadata.get("patient_id", "")) or self.stem

    def _read(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        dataset = fastmri_slices()
        dataset.raw_samples = [(self.path, index, self.metadata)]
        kspace, mask, *_ = dataset[0]
        return kspace if kspace.ndim == 3 else kspace[None], None if mask is None else mask.reshape(1, -1) > 0


def open_kspace(path: Path, dataset: str = "data") -> KSpace:
    """Opens a file of k-space without reading it.

    Args:
        path: An HDF5 (fastMRI, ISMRMRD or a complex array), npy or cfl file.
        dataset: HDF5 key of a complex array that is not called `kspace`.

    Raises:
        InputError: It is missing, damaged, no k-space, or its header contradicts its data.
    """
    from invrecon.data.arrays import ArrayFile
    from invrecon.data.ismrmrd import ISMRMRDFile, is_ismrmrd

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
    """Tells k-space from magnitude volumes; a file that is damaged or missing is none."""
    from invrecon.data.ismrmrd import is_ismrmrd

    if suffix_of(path) in (*ARRAY_SUFFIXES, ".hdr"):
        return True
    if path.is_dir() or suffix_of(path) not in (*HDF5_SUFFIXES, RAW_SUFFIX):
        return False
    try:
        with open_hdf5(path) as file:
            array = file.get(dataset)
            return is_ismrmrd(file) or "kspace" in file or getattr(getattr(array, "dtype", None), "kind", "") == "c"
    except InputError:
        return False


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
    return x, y, z


def check_matrix(path: Path, encoded: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Raises InputError unless the header's encoded matrix is that of the data, `(rows, columns)`."""
    if tuple(encoded) != tuple(shape):
        raise InputError(
            f"The header of {path} says that k-space has {encoded[0]} x {encoded[1]} samples, but it has "
            f"{shape[0]} x {shape[1]}: the header belongs to other data, or the data were cropped; correct either."
        )


def crop_readout(z: Tensor, num: int) -> Tensor:
    """Returns complex k-space `(..., H, W)` of the image's middle `num` rows: removes oversampling of the readout."""
    H = z.shape[-2]
    if num == H:
        return z
    if num > H:
        raise InputError(f"The middle {num} rows were asked for of k-space with {H}.")

    def transform(values: Tensor, function: Any) -> Tensor:
        return torch.fft.fftshift(function(torch.fft.ifftshift(values, dim=-2), dim=-2, norm="ortho"), dim=-2)

    return transform(crop(transform(z, torch.fft.ifft), (num, z.shape[-1])), torch.fft.fft)


def crop(x: Tensor, matrix: Matrix) -> Tensor:
    """Returns the middle of images `(..., H, W)`: what a scan was asked for, of what its k-space gives."""
    top, left = (num // 2 - inner // 2 for num, inner in zip(x.shape[-2:], matrix, strict=True))
    return x[..., top : top + matrix[0], left : left + matrix[1]]


def is_block(mask: Tensor) -> bool:
    """Whether a mask `(H, W)` is a full rectangle: k-space was fully sampled, up to zero-padding."""
    kept = mask.nonzero()
    (top, left), (bottom, right) = kept.amin(0).tolist(), kept.amax(0).tolist()
    return bool(mask[top : bottom + 1, left : right + 1].all())


def calibration_scale(kspace: Tensor, mask: Tensor, max_acs: int = 24) -> float:
    """Returns the 99th percentile of the root sum of squares of the images of the calibration region (ACS).

    The scale on which priors see complex images: it needs nothing but the measurement.

    Source: PaDIS-MRI, arXiv 2509.21531, which takes the central 20 x 20 samples.

    Args:
        kspace: `(coils, H, W, 2)`.
        mask: `(H, W)`.
        max_acs: Larger regions are cut to this side.

    Raises:
        InputError: The centre of k-space was not measured.
    """
    rows, columns = calibration_region(mask)
    acs = (min(rows.stop - rows.start, max_acs), min(columns.stop - columns.start, max_acs))
    if min(acs) < 2:
        raise InputError(
            f"This mask has {acs[0]} x {acs[1]} samples at the centre of k-space (ACS), and at least 2 x 2 are needed "
            "to find the scale of the image: sample the centre, or see that the k-space is centred."
        )
    block = central_block((mask.shape[0], mask.shape[1]), acs) & (mask != 0)
    images = ifft2c(pairs_to_complex(kspace) * block.to(kspace.device))
    return float(images.abs().square().sum(0).sqrt().flatten().quantile(0.99))


def read_noise_std(path: Path, attrs: dict[str, Any], num_coils: int) -> Tensor | None:
    """Reads the attribute `noise_std`, one number or one a coil, in units of k-space; None if there is none.

    Raises:
        InputError: It is of another shape, or not positive.
    """
    if "noise_std" not in attrs:
        return None
    values = np.asarray(attrs["noise_std"])
    right = values.shape in ((), (num_coils,)) and values.dtype.kind in "fiu"
    if not right or not (np.isfinite(values) & (values > 0)).all():
        raise InputError(
            f"The attribute 'noise_std' of {path} is {values}, expected a positive standard deviation of real and "
            f"imaginary parts, one number or one for each of {num_coils} coils; leave it out if it is not known."
        )
    return torch.from_numpy(values.astype(np.float32))


def estimate_noise(kspace: Tensor, mask: Tensor) -> Tensor:
    r"""Returns the noise's standard deviation of real and imaginary parts, `(coils,)`, from the highest frequencies.

        sigma_c = median(|Re y_c|, |Im y_c|) / 0.6745

    over the 5 % of the measured samples that are farthest from the centre, at least 300; what is zero was not measured.
    There the object has hardly any signal, and the median does not see the few samples where it has. On coarse grids
    some is left, so this is an upper bound; k-space that was filtered after the scan has less noise there than
    elsewhere. A coil without signal counts as the noisiest of the others.

    Source: Donoho & Johnstone, "Ideal spatial adaptation by wavelet shrinkage", Biometrika 81 (1994), for the median.

    Args:
        kspace: `(coils, H, W, 2)`.
        mask: What was measured, `(H, W)`.
    """
    distance = radii(mask.shape[0], mask.shape[1])
    measured = (mask != 0) & (kspace != 0).any(-1).any(0)
    num = min(max(300, round(0.05 * int(measured.sum()))), int(measured.sum()))
    far = measured & (distance >= distance[measured].topk(num).values[-1])
    std = kspace[:, far].abs().flatten(1).median(dim=1).values / 0.6745
    return torch.where(std > 0, std, std.amax())


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
    from invrecon.files import atomic_h5

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


def image_kspace(images: Tensor, maps: Tensor | None = None) -> Tensor:
    """Returns the fully sampled k-space `(coils, H, W, 2)` of an image `(2, H, W)` seen by coils of these maps."""
    z = torch.complex(images[0], images[1])[None]
    return complex_to_pairs(fft2c(z if maps is None else z * pairs_to_complex(maps)))
