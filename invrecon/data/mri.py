"""Cases of MRI for `test` and `predict`, from k-space or simulated from magnitude volumes, and priors' training."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invrecon.data.augmentation import Augmentation
from invrecon.data.cases import Case
from invrecon.data.hdf5 import HDF5_SUFFIXES, open_hdf5, text_of
from invrecon.data.intensity import MAGNITUDE
from invrecon.data.kspace import (
    UNDERSAMPLED,
    KSpace,
    calibration_scale,
    estimate_noise,
    image_kspace,
    measured_scale,
)
from invrecon.data.kspace_files import ARRAY_SUFFIXES, RAW_SUFFIX, is_kspace, open_kspace
from invrecon.data.reconstruction import ReconstructionData, case_id, resolve_paths
from invrecon.data.training import PriorTraining, distinct_names, held_out_names
from invrecon.data.volume import Volume, is_hidden, suffix_of
from invrecon.data.volumes import find_volumes, open_volume
from invrecon.errors import InputError
from invrecon.operators.coils import (
    CoilMaps,
    ESPIRiT,
    aligned_maps,
    prewhiten,
    simulated_maps,
    smooth_phase,
    with_phase,
)
from invrecon.operators.mri import CartesianMRI
from invrecon.operators.sampling import Sampling, achieved_acceleration
from invrecon.rng import make_generator

LEAST_SIGNAL = 0.1  # of a training slice's scale, relative to the largest of its volume: the others are air


class MRIData(ReconstructionData):
    """Slices of k-space, or of magnitude volumes whose k-space will be simulated, with their maps, masks and scales.

    K-space that was fully sampled is undersampled by `sampling`, each case by a mask of its own, and its reference is
    the combination of coils of all that was measured, `sum_c conj(s_c) F^H y_c`; where the scanner undersampled, or
    left out one side of k-space, its mask holds and there is no reference. Maps are estimated from the calibration
    region (ACS) that is left. A magnitude volume gets a smooth random phase and simulated coils, whose maps the
    reconstruction is told. Every draw is a function of (seed, case).

    Images are divided by the 99th percentile of what the centre of k-space shows, found by least squares from what was
    measured, each case by its own (`measured_scale`): nothing that the scanner does not tell is used. Of magnitude
    volumes it is that of a noise-free measurement by `sampling`, also where the operator then measures along a
    trajectory. Results are written in the file's own units. The noise of measured k-space is what the file states
    (attribute `noise_std`, or the covariance of the coils), or is estimated from the highest frequencies, coil by coil.

    Args:
        paths: fastMRI, ISMRMRD, HDF5, npy or cfl files of k-space, HDF5, NIfTI or NRRD files of magnitude images,
            folders of DICOM; or folders of these.
        slices: Selection applied to each file: '3', '1,4,9' or '10:90:5' (end excluded); None is all.
        size: Side of simulated images in pixels; volumes are cropped or zero-padded to it. K-space keeps its own size.
        sampling: What is measured of fully sampled k-space; all of it if None.
        maps: Estimates coil sensitivities of measured k-space; ESPIRiT with kernels of 4 samples if None, for which ten
            columns of calibration are enough (with 6, a part of the body is lost).
        num_coils: Coils that see a magnitude volume; 1 is of sensitivity 1.
        seed: Of masks, phases and simulated coils.
        batch_size: Cases reconstructed at once.
        num_workers: Processes that read ahead and estimate maps.
        dataset: HDF5 key of volumes and of complex arrays that are not called `kspace`.
        estimate_noise: Whether to estimate the noise of files that do not state it; they count as noise-free if not.
        prewhiten: Whether coils are mixed so that their noise is uncorrelated and alike, where the file states its
            covariance (a dataset `noise_covariance`, or the noise readouts of ISMRMRD); if not, that is left unread.
    """

    def __init__(
        self,
        paths: list[str] | str,
        slices: str | None = None,
        size: int = 256,
        sampling: Sampling | None = None,
        maps: CoilMaps | None = None,
        num_coils: int = 8,
        seed: int = 0,
        batch_size: int = 1,
        num_workers: int = 0,
        dataset: str = "data",
        estimate_noise: bool = True,
        prewhiten: bool = True,
    ) -> None:
        super().__init__(paths, slices, size, batch_size, num_workers, dataset)
        if num_coils < 1:
            raise InputError(f"data.num_coils is {num_coils}, expected at least 1.")
        self.estimate_noise, self.prewhiten = estimate_noise, prewhiten
        self.sampling, self.maps, self.num_coils, self.seed = sampling, maps or ESPIRiT(kernel_size=4), num_coils, seed
        self.intensity = MAGNITUDE
        self._first: Case | None = None  # the first of the first file, which is often the only one
        self._unjudged = ""  # the first file that has no reference, and why

    def setup(self, stage: str | None = None) -> None:
        """As of every reconstruction; `predict` is told that only a part of complete k-space is used.

        Raises:
            InputError: Also if a slice of k-space has no reference to be tested against.
        """
        super().setup(stage)
        if stage == "test" and self._unjudged:
            raise InputError(
                f"{self._unjudged}: a measurement without a reference, so there is nothing to test against; use "
                "`invrecon predict`, or leave it out by data.paths or data.slices."
            )
        first = self._first
        if stage == "predict" and self.sampling is not None and first is not None and first.measurement is not None:
            assert first.mask is not None
            if first.reference is not None:  # what a scanner undersampled has none
                warnings.warn(
                    f"{first.source} is complete, and {first.mask.float().mean():.0%} of its k-space is used, as "
                    "data.sampling asks; `--data.sampling null` reconstructs from all of it.",
                    stacklevel=2,
                )

    def _check(self, file: Any, indices: list[int]) -> None:
        """Reads the selected slices and makes the first case, whose maps and mask may fail, too."""
        lacking, signal = [], isinstance(file, KSpace)
        for index in indices:
            values = file.read(index)
            signal = signal or bool((values > 0).any())
            if isinstance(file, KSpace) and (what := file.lacking(index, values[1])):
                lacking.append((what, values[1]))
        if not signal:
            slices = f"slice {indices[0]} is" if len(indices) == 1 else f"all {len(indices)} slices asked for are"
            raise InputError(f"There is no signal in {file.path}: {slices} zero throughout. Select others.")
        if lacking:
            what, mask = lacking[0]
            self._unjudged = self._unjudged or f"{file.path} is {what}"
            self._tell(file.path, what, f"{len(lacking)} of {len(indices)} slices", mask)
        first = self._make(file, indices[0])
        self._first = self._first or first

    def _tell(self, path: Path, what: str, slices: str, mask: Tensor) -> None:
        """Warns that the scanner's own mask holds, if something else may be expected."""
        known = f"{path} is {what} ({slices}, acceleration {float(achieved_acceleration(mask)):.2f}), so "
        if self.sampling is not None:
            warnings.warn(
                f"{known}it has no reference and data.sampling is not applied to it: set `--data.sampling null`, or "
                "give complete k-space.",
                stacklevel=2,
            )
        elif what != UNDERSAMPLED:
            warnings.warn(f"{known}it can be reconstructed, but has no reference to be judged by.", stacklevel=2)

    def load(self, file: Any, index: int) -> Case:
        """Reads one case, and estimates its maps or simulates what it lacks."""
        known = self._first
        return known if known is not None and known.id == case_id(file.path, index) else self._make(file, index)

    def _make(self, file: Any, index: int) -> Case:
        name = case_id(file.path, index)
        try:
            return self._measured(file, index, name) if isinstance(file, KSpace) else self._imaged(file, index, name)
        except InputError as error:
            if str(file.path) in str(error):
                raise
            raise InputError(f"{file.path}, slice {index}: {error}") from None

    def _measured(self, file: KSpace, index: int, name: str) -> Case:
        full, mask = file.read(index)
        std, covariance = file.noise_std, file.noise_covariance if self.prewhiten else None
        if covariance is not None:
            try:
                white = prewhiten(full, covariance)
            except InputError as error:
                raise InputError(f"{str(error).rstrip('.')}; or set data.prewhiten to false.") from None
            std = covariance.diagonal()[0].median().sqrt()  # of a typical coil: images keep the file's units, all alike
            full = std * white
        complete, measured = not file.lacking(index, mask), mask
        if complete:
            mask = mask & self._draw_mask(mask, name)
        y = full * mask[..., None]
        maps = self.maps(y, mask) if file.shape[1] > 1 else None
        scale = measured_scale(y, mask, maps)
        if not 0 < scale < math.inf:
            raise InputError(
                f"The image has a scale of {scale:g}, too far from 1 for single precision: rescale k-space."
            )
        if std is None and self.estimate_noise:
            std = estimate_noise(y, mask)
        if std is not None:
            std = std.squeeze() / scale if std.numel() == 1 else std.reshape(-1, 1, 1, 1) / scale
        reference = None
        if complete:
            # By maps of all of it: where those of the measurement fail, and are zero, the image has to be missed.
            own = maps
            if maps is not None and not torch.equal(mask, measured):
                own = aligned_maps(maps, self.maps(full, measured))
            reference = CartesianMRI((mask.shape[0], mask.shape[1]), maps=own).adjoint(full[None])[0] / scale
        return Case(
            id=name,
            patient=file.patient,
            source=str(file.path),
            index=index,
            reference=reference,
            measurement=y / scale,
            noise_std=std,
            geometry=None if file.matrix is None else {"type": "cartesian", "matrix": file.matrix},
            voxel_mm=file.voxel_mm,
            maps=maps,
            mask=mask,
            scale=scale,
            maximum=file.maximum if covariance is None else None,  # coils that were mixed have another one
        )

    def _imaged(self, file: Volume, index: int, name: str) -> Case:
        x = random_phase(fit(magnitude_of(file, index), self.size), make_generator(self.seed, "phase", name))
        size = (self.size, self.size)
        maps = None
        if self.num_coils > 1:
            maps = simulated_maps(self.num_coils, size, make_generator(self.seed, "coils", name))
        mask = self._draw_mask(torch.ones(size, dtype=torch.bool), name)
        y = image_kspace(x, maps) * mask[..., None]
        scale = measured_scale(y, mask, maps) or 1.0  # of a slice of plain air
        return Case(
            id=name,
            patient=file.patients[index],
            source=str(file.path),
            index=index,
            reference=x / scale,
            voxel_mm=file.voxel_mm,
            maps=maps,
            mask=mask,
            scale=scale,
        )

    def _draw_mask(self, like: Tensor, name: str) -> Tensor:
        if self.sampling is None:
            return torch.ones_like(like)
        return self.sampling((like.shape[0], like.shape[1]), make_generator(self.seed, "mask", name))

    def _find(self) -> list[Path]:
        return find_mri(resolve_paths(self.paths))

    def _open(self, path: Path) -> Any:
        return open_kspace(path, self.dataset) if is_kspace(path, self.dataset) else open_magnitudes(path, self.dataset)


class MRITraining(PriorTraining):
    """Complex slices: magnitude volumes, each slice with random smooth phases, held in memory as half floats.

    A slice is divided by the 99th percentile of the image of its central k-space, as measurements are; slices with
    hardly any signal are left out.

    Args:
        paths: HDF5 (dataset, slices first), NIfTI or NRRD files, DICOM folders, or folders of these.
        validation: Names of files kept out of training for validation; by default the last file.
        dataset: HDF5 key of the volumes.
        num_phases: Random phases that a slice is seen with.
        size: Side of the images in pixels; slices are cropped or zero-padded to it.
        patch_sizes: Patch sides in pixels, largest first; `[size]` with `pad: 0` trains on whole images.
        probabilities: Of each patch size.
        pad: Width of the zero border in pixels; None is as far as the grid of the largest patches shifts
            (`shift_law`), none for whole images.
        pixels_per_batch: Pixels a step and process.
        batches_per_epoch: Steps between validations.
        validation_batches: Fixed batches in a validation.
        seed: Seed of phases, order, places and noise.
        licence: Licence of the data, for the prior's card.
        augmentation: Changes the training images at random, each patch anew; None shows them as they are.
    """

    def __init__(
        self,
        paths: list[str] | str,
        validation: list[str] | None = None,
        dataset: str = "data",
        num_phases: int = 4,
        size: int = 256,
        patch_sizes: list[int] = [56, 32, 16],  # noqa: B006
        probabilities: list[float] = [0.5, 0.3, 0.2],  # noqa: B006
        pad: int | None = None,
        pixels_per_batch: int = 100352,
        batches_per_epoch: int = 250,
        validation_batches: int = 8,
        seed: int = 0,
        licence: str = "not stated",
        augmentation: Augmentation | None = None,
    ) -> None:
        super().__init__(
            size, patch_sizes, probabilities, pad, pixels_per_batch, batches_per_epoch, validation_batches, seed,
            augmentation,
        )  # fmt: skip
        if num_phases < 1:
            raise InputError(f"data.num_phases is {num_phases}, expected at least 1.")
        self.paths, self.validation, self.dataset = paths, validation, dataset
        self.num_phases, self.licence = num_phases, licence
        self.intensity = MAGNITUDE

    def load(self) -> tuple[Tensor, Tensor, Any]:
        """Reads every volume, splits off the validation images and draws the phases."""
        files = find_volumes(resolve_paths(self.paths))
        names = distinct_names(files)
        held_out = self._held_out(names, [set(open_magnitudes(path, self.dataset).patients) for path in files])
        images: dict[bool, list[Tensor]] = {True: [], False: []}
        for name, path in zip(names, files, strict=True):
            images[name in held_out].append(self._read(path))
        self.train_names = [name for name in names if name not in held_out]
        return torch.cat(images[False]), torch.cat(images[True]), Tensor.float

    def _held_out(self, names: list[str], patients: list[set[str]]) -> set[str]:
        """Returns which files validate, all of a patient: those asked for, or the last patient's."""
        held_out = held_out_names(names, self.validation, 1, self.paths)
        theirs = set().union(*(who for name, who in zip(names, patients, strict=True) if name in held_out))
        shared = {name for name, who in zip(names, patients, strict=True) if who & theirs} - held_out
        if self.validation and shared:
            raise InputError(
                f"data.validation {self.validation} holds patients of {', '.join(sorted(shared)[:3])}, too, on which "
                "data.paths train: keep all files of a patient on one side."
            )
        if shared | held_out == set(names) and shared:
            warnings.warn(
                f"Training and validating on one patient: {', '.join(sorted(held_out))} validates, but scans of a "
                "patient are alike. Give several patients with data.paths.",
                stacklevel=4,
            )
            return held_out
        return held_out | shared

    def _read(self, path: Path) -> Tensor:
        """Returns the slices of a volume that have signal, `(num_phases N, 2, size, size)`, half."""
        volume = open_magnitudes(path, self.dataset)
        slices = [fit(magnitude_of(volume, index), self.size) for index in range(len(volume))]
        everything = torch.ones(self.size, self.size, dtype=torch.bool)
        images, scales = [], []
        for index, magnitude in enumerate(slices):
            for k in range(self.num_phases):
                x = random_phase(magnitude, make_generator(self.seed, "phase", volume.stem, index, k))
                scales.append(calibration_scale(image_kspace(x), everything))
                images.append((x / (scales[-1] or 1.0)).half())
        chosen = [x for x, scale in zip(images, scales, strict=True) if scale > LEAST_SIGNAL * max(scales)]
        if not chosen:
            raise InputError(f"{path} is zero throughout, so there is nothing to learn from it; leave it out.")
        return torch.stack(chosen)


def open_magnitudes(path: Path, dataset: str = "data") -> Volume:
    """Opens a volume of magnitudes, in whatever units it says it is.

    Raises:
        InputError: As `open_volume`.
    """
    units = "HU"  # what readers say of files that say nothing
    if not path.is_dir() and suffix_of(path) in HDF5_SUFFIXES:
        with open_hdf5(path) as file:
            attrs = {**file.attrs, **(file[dataset].attrs if dataset in file else {})}
            units = text_of(attrs.get("units", units))
    return open_volume(path, dataset=dataset, units=units)


def magnitude_of(volume: Volume, index: int) -> Tensor:
    """Returns slice `index` of a volume of magnitudes, `(H, W)`.

    Raises:
        InputError: It has large negative values, as CT and phase images have.
    """
    values = volume.read(index)
    low, high = float(values.amin()), float(values.amax())
    # Resampling leaves a few small ones, which are cut; small beside the volume, as a slice may be of air.
    if low < -0.1 * max(high, 0) and low < -0.1 * max(float(volume.read(i).amax()) for i in range(len(volume))):
        raise InputError(
            f"Slice {index} of {volume.path} reaches from {low:g} to {high:g}, expected magnitudes >= 0: is it CT or a "
            "phase image?"
        )
    return values.clamp(min=0)


def random_phase(magnitude: Tensor, generator: torch.Generator) -> Tensor:
    """Returns a complex image `(2, H, W)` of a magnitude `(H, W)` and a smooth random phase."""
    return with_phase(magnitude, smooth_phase((magnitude.shape[0], magnitude.shape[1]), generator))


def fit(image: Tensor, size: int) -> Tensor:
    """Returns the middle `(size, size)` of an image `(H, W)`, zero-padded where it is smaller."""
    H, W = image.shape
    out = image.new_zeros(size, size)
    rows, columns = min(H, size), min(W, size)
    top, left = H // 2 - rows // 2, W // 2 - columns // 2
    to_top, to_left = size // 2 - rows // 2, size // 2 - columns // 2
    out[to_top : to_top + rows, to_left : to_left + columns] = image[top : top + rows, left : left + columns]
    return out


def find_mri(paths: list[Path]) -> list[Path]:
    """Lists the files that `paths` name; folders are searched for k-space and volumes.

    Raises:
        InputError: If a folder holds neither.
    """
    found: dict[Path, None] = {}
    for path in paths:
        arrays = []
        if path.is_dir():
            arrays = sorted(file for file in path.rglob("*") if suffix_of(file) in (*ARRAY_SUFFIXES, RAW_SUFFIX))
            arrays = [file for file in arrays if not is_hidden(file, path)]
        found.update(dict.fromkeys(arrays))
        try:
            found.update(dict.fromkeys(find_volumes(path)))
        except InputError:
            if not arrays:
                raise
    return list(found)
