"""K-space of a slice, whatever file it comes from: what was measured, its scale, its noise, its image.

A slice is read as `(coils, H, W, 2)`, readout along the rows, centred at `(H // 2, W // 2)` under
the orthonormal transform of `invrecon.operators.fourier`. Oversampling of the readout is removed on the way.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from invrecon.data.hdf5 import VoxelSize, brief
from invrecon.data.volume import file_stem
from invrecon.errors import InputError
from invrecon.operators.fourier import complex_to_pairs, fft2c, ifft2c, pairs_to_complex
from invrecon.operators.mri import CartesianMRI
from invrecon.operators.sampling import calibration_region, central_block, radii

Matrix = tuple[int, int]
LEAST_FILLED = 0.98  # of what a complete scan measured: rounding makes a few samples exactly zero
OFF_CENTRE = 2  # samples that the middle of complete k-space may be away from that of the grid, doubled
UNDERSAMPLED = "undersampled by the scanner"


class KSpace(ABC):
    """An open file of k-space, read one slice at a time.

    Attributes:
        path: The file.
        shape: `(N, coils, H, W)` as read.
        matrix: Size of the image that is asked for, cut from the middle of what k-space gives; None is all of it.
        states_mask: Whether the file says that not all was measured: it then was undersampled by the scanner.
        is_named: Whether the file says that it is k-space; another complex array may be images.
        voxel_mm: Voxel size `(z, y, x)` [mm], or None.
        noise_std: Standard deviation of real and imaginary parts that the file states, `()` or `(coils,)`, or None.
        noise_covariance: Covariance of the coils' noise that the file states, `(coils, coils, 2)` per real component
            (`invrecon.operators.noise_covariance`), or None.
        maximum: Largest value of the reference in all slices (the root sum of squares of fully sampled coils), as
            fastMRI's files state it in `max`; None if the file does not.
        patient: The patient's identity; the file's stem if it does not say.
    """

    path: Path
    shape: tuple[int, int, int, int]
    matrix: Matrix | None = None
    states_mask: bool = False
    is_named: bool = True
    voxel_mm: VoxelSize | None = None
    noise_std: Tensor | None = None
    noise_covariance: Tensor | None = None
    maximum: float | None = None
    patient: str
    _warned: bool = False  # that it looks like images

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
        elif kept.any():
            kept = self._sampled(kept)
        if not kept.any() or not z.any():
            raise InputError(f"The k-space of slice {index} in {self.path} is zero throughout; leave the slice out.")
        _check_centred(z * kept, f"slice {index} in {self.path}")
        if not self.is_named and _looks_like_image(z):
            raise InputError(
                f"Slice {index} in {self.path} is smooth and has no peak as k-space has at its centre: an image? "
                "Give its magnitude, or, if it is k-space, an HDF5 file with a dataset 'kspace'."
            )
        if self.is_named and not self._warned and _turns_into_kspace(z * kept):
            self._warned = True
            warnings.warn(
                f"Slice {index} in {self.path} looks like images of coils: its own transform has a peak as k-space "
                "has, and it has none. Expected is k-space, the image's transform; give magnitude images as a dataset "
                "'data'.",
                stacklevel=2,
            )
        # Without oversampling rows lie further apart in k-space: one in H / n is left.
        rows = (torch.arange(self.shape[2]) - self.shape[2] // 2) * z.shape[1] / self.shape[2] + z.shape[1] // 2
        z, kept = crop_readout(z * kept, self.shape[2]), kept[rows.round().long().clamp(0, z.shape[1] - 1)]
        return complex_to_pairs(z), kept.clone()

    def lacking(self, index: int, mask: Tensor) -> str:
        """Returns what a slice is that has no reference, as in 'the file is ...'; nothing if it is complete.

        Args:
            index: The slice.
            mask: What was measured of it, as `read` returns it.
        """
        return UNDERSAMPLED if self.states_mask or not is_full(mask) else one_sided(mask)

    def _sampled(self, support: Tensor) -> Tensor:
        """Returns what was measured, by the samples `(H, W)` that are not zero, where the file states no mask."""
        return fill_zeros(support)

    @abstractmethod
    def _read(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns slice `index` as stored, complex `(coils, H', W)`, and the mask that the file states.

        The mask is `(1, W)` or `(H', W)`; None if there is none.
        """

    def _finish(self, shape: tuple[int, ...], patient: str = "") -> None:
        """Checks the shape; every reader's constructor ends here."""
        if len(shape) != 4 or 0 in shape:
            what = "zero coils" if len(shape) == 4 and shape[1] == 0 else f"the shape {shape}"
            raise InputError(
                f"The k-space of {self.path} has {what}, expected (slices, coils, rows, columns) with at least one of "
                "each; see that the file was written to the end."
            )
        if not self.is_named and shape[1] > min(shape[2:]):
            raise InputError(
                f"The k-space of {self.path} has the shape {shape}: {shape[1]} coils of {shape[2]} x {shape[3]}. "
                "Expected is (slices, coils, rows, columns); bring the axes into that order."
            )
        self.shape = (shape[0], shape[1], shape[2], shape[3])
        self.patient = patient or self.stem


def _check_centred(z: Tensor, what: str) -> None:
    """Raises `InputError` if what is strong in complex k-space `(coils, H, W)` is at its borders: then it is none."""
    power = z.abs().square().sum(0)
    H, W = power.shape
    inner = power[H // 4 : H - H // 4, W // 4 : W - W // 4]
    if min(H, W) >= 8 and float(power.max()) > 100 * float(power.mean()) and float(inner.max()) < float(power.max()):
        row, column = divmod(int(power.argmax()), W)
        raise InputError(
            f"The strongest sample of {what} is in row {row} and column {column} of {H} x {W}, expected near the "
            "middle: k-space comes with its centre in the middle (fftshift), with axes in the order (slices, coils, "
            "rows, columns), and not as images."
        )


def _looks_like_image(z: Tensor) -> bool:
    """Tells images from k-space `(coils, H, W)`, which has a peak, and from noise, whose neighbours are not alike."""
    magnitude = z.abs().square().sum(0).sqrt()
    peaked = float(magnitude.max()) ** 2 > 30 * float(magnitude.square().mean())
    if peaked or min(magnitude.shape) < 8:
        return False
    neighbours = torch.stack([magnitude[:, 1:].flatten(), magnitude[:, :-1].flatten()])
    return float(torch.corrcoef(neighbours)[0, 1]) > 0.7


def _turns_into_kspace(z: Tensor) -> bool:
    """Whether the transform of `(coils, H, W)` is concentrated as k-space is, and it itself is not: it holds images.

    Of k-space nearly all energy lies about its largest sample; of an image, in no such block. Noise has none in either.
    K-space of one strength throughout, that of a point, is told apart from a uniform image by nothing, and is left.
    """
    magnitude = z.abs().square().sum(0).sqrt()
    magnitude = magnitude[magnitude > 0]
    if len(magnitude) < 2 or float(magnitude.std()) < 0.1 * float(magnitude.mean()):
        return False
    shares = []
    for values in (z, fft2c(z)):
        power = values.abs().square().sum(0)
        H, W = power.shape
        if min(H, W) < 16 or not power.any():
            return False
        row, column = divmod(int(power.argmax()), W)
        block = power.roll((H // 2 - row, W // 2 - column), dims=(0, 1))
        near = block[H // 2 - H // 16 : H // 2 + H // 16 + 1, W // 2 - W // 16 : W // 2 + W // 16 + 1]
        shares.append(float(near.sum() / power.sum()))
    return shares[1] > 0.5 and shares[0] < 0.25


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
    return bool(mask[block_of(mask)].all())


def block_of(mask: Tensor) -> tuple[slice, slice]:
    """Returns rows and columns of the smallest rectangle that holds all of a mask `(H, W)`, which has samples."""
    kept = mask.nonzero()
    (top, left), (bottom, right) = kept.amin(0).tolist(), kept.amax(0).tolist()
    return slice(top, bottom + 1), slice(left, right + 1)


def is_full(mask: Tensor, least: float = LEAST_FILLED) -> bool:
    """Whether a mask `(H, W)` is a rectangle, an ellipse or a shape between them, without gaps but for a few samples.

    Args:
        mask: With at least one sample.
        least: Share of the shape, and of the ellipse inscribed in its rectangle, that has to be there.
    """
    block = mask[block_of(mask)]
    if not (block.any(0).all() and block.any(1).all()):  # a line was left out, and may be one of hundreds
        return False
    rows, columns = ((torch.arange(n) - (n - 1) / 2) / max((n - 1) / 2, 0.5) for n in block.shape)
    ellipse = rows[:, None] ** 2 + columns**2 <= 1 + 1e-6
    shape = _without_gaps(block)
    return float(block[ellipse].float().mean()) >= least and int(block.sum()) >= least * int(shape.sum())


def fill_zeros(support: Tensor) -> Tensor:
    """Returns what was measured, by the samples `(H, W)` that are not zero: of full k-space single zeros were, too."""
    if not is_full(support):
        return support
    place, filled = block_of(support), support.clone()
    block = support[place]
    filled[place] = _without_gaps(block)
    if float(block.float().mean()) >= LEAST_FILLED:  # a rectangle, whose border may have zeros as well
        share = avg_pool2d(block[None].float(), 3, stride=1, padding=1, count_include_pad=False)[0]
        filled[place] |= share > 0.6  # most of the neighbours are there
    return filled


def _without_gaps(mask: Tensor) -> Tensor:
    """Returns a mask with what lies between two of its samples both in its row and in its column."""
    whole = torch.ones_like(mask)
    for dim in (0, 1):
        before = mask.int().cummax(dim).values
        after = mask.flip(dim).int().cummax(dim).values.flip(dim)
        whole &= (before & after) > 0
    return whole


def one_sided(mask: Tensor) -> str:
    """Says that a mask `(H, W)` is partial Fourier, which rows or columns it has; nothing if it is centred.

    What is missing at both ends alike only pads k-space, and leaves the image's phase as it is.
    """
    for name, kept in (("rows", mask.any(1)), ("columns", mask.any(0))):
        first, last = (int(kept.nonzero()[end]) for end in (0, -1))
        if abs(first + last - (len(kept) - 1)) > OFF_CENTRE:
            return f"partial Fourier, with {name} {first} to {last} of 0 to {len(kept) - 1}"
    return ""


def calibration_scale(kspace: Tensor, mask: Tensor, max_acs: int = 24) -> float:
    """Returns the 99th percentile of the root sum of squares of the images of the calibration region (ACS).

    Of fully sampled k-space, the scale on which priors see complex images; a mask with a narrower centre gives less of
    the image, and less of its scale (`measured_scale`).

    Source: PaDIS-MRI, arXiv 2509.21531, which takes the central 20 x 20 samples.

    Args:
        kspace: `(coils, H, W, 2)`.
        mask: `(H, W)`.
        max_acs: Larger regions are cut to this side.

    Raises:
        InputError: The centre of k-space was not measured.
    """
    largest = float(kspace.abs().amax()) or 1.0  # squares of very small or large units leave the range of float32
    rows, columns = calibration_region(mask)
    acs = (min(rows.stop - rows.start, max_acs), min(columns.stop - columns.start, max_acs))
    if min(acs) < 2:
        raise InputError(
            f"This mask has {acs[0]} x {acs[1]} samples at the centre of k-space (ACS), and at least 2 x 2 are needed "
            "to find the scale of the image: sample the centre, or see that the k-space is centred."
        )
    block = central_block((mask.shape[0], mask.shape[1]), acs) & (mask != 0)
    images = ifft2c(pairs_to_complex(kspace / largest) * block.to(kspace.device))
    return largest * float(images.abs().square().sum(0).sqrt().flatten().quantile(0.99))


def measured_scale(kspace: Tensor, mask: Tensor, maps: Tensor | None = None) -> float:
    r"""Returns the scale of an image from undersampled k-space: that of its reconstruction by least squares.

        x* = argmin_x  || M F S x - y ||^2 + lam || x ||^2,  of which `calibration_scale` takes the centre of k-space

    by 20 iterations of CG from zero, `lam = 1e-3` (SENSE). By the calibration region alone the scale would depend on
    the mask: an eighth of k-space has 24 x 10 samples there where training has 24 x 24, and reads 0.7 to 0.9 of
    training's scale, this 0.83 to 0.98 (three slices of a training volume; above 1, at times by far, where so few
    samples make no good maps). Nothing but the measurement is needed.

    Source: of SENSE, Pruessmann et al., MRM 46 (2001); the scale from it is ours.

    Args:
        kspace: `(coils, H, W, 2)`, zero where nothing was measured.
        mask: `(H, W)`.
        maps: `(coils, H, W, 2)`; None for one coil of sensitivity 1.

    Raises:
        InputError: As `calibration_scale`.
    """
    scale = calibration_scale(kspace, mask)
    if bool((mask != 0).all()) or not scale:
        return scale
    operator = CartesianMRI((mask.shape[0], mask.shape[1]), mask=mask, maps=maps)
    x = operator.prox(kspace.new_zeros(1, *operator.image_shape), kspace[None], weight=1e3, max_iter=20, tol=1e-4)
    return calibration_scale(image_kspace(x[0]), torch.ones_like(mask))


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


def read_noise_covariance(path: Path, file: Any, num_coils: int) -> Tensor | None:
    """Reads the dataset `noise_covariance` of an open HDF5 file, complex `(coils, coils)`; None if there is none.

    Raises:
        InputError: It is of another shape, or no covariance.
    """
    if "noise_covariance" not in file:
        return None
    values = np.asarray(file["noise_covariance"])
    right = values.shape == (num_coils, num_coils) and values.dtype.kind in "fiuc" and np.isfinite(values).all()
    if not right or not np.allclose(values, values.conj().T, rtol=1e-3, atol=1e-6 * np.abs(values).max(initial=0)):
        raise InputError(
            f"'noise_covariance' of {path} is {values.dtype} of shape {values.shape}, expected a finite Hermitian "
            f"matrix ({num_coils}, {num_coils}), an entry for each pair of coils, per real component; leave it out if "
            "it is not known."
        )
    return complex_to_pairs(torch.from_numpy(values.astype(np.complex64)))


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


def image_kspace(images: Tensor, maps: Tensor | None = None) -> Tensor:
    """Returns the fully sampled k-space `(coils, H, W, 2)` of an image `(2, H, W)` seen by coils of these maps."""
    z = torch.complex(images[0], images[1])[None]
    return complex_to_pairs(fft2c(z if maps is None else z * pairs_to_complex(maps)))
