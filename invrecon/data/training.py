"""Training data of priors: CT slices, and ellipses made on the fly, in patches or whole."""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.utils.data import DataLoader

from invrecon.data.augmentation import Augmentation
from invrecon.data.couches import AIR, draw_couch
from invrecon.data.intensity import Intensity
from invrecon.data.measurement import is_measurement
from invrecon.data.patches import FixedBatches, PatchBatch, PatchPlan, PatchSampler, PatchStream, batch_generator
from invrecon.data.phantoms import ellipse_phantom
from invrecon.data.volume import file_stem
from invrecon.data.volumes import check_hounsfield, find_volumes, read_volume
from invrecon.errors import InputError
from invrecon.priors.layouts import shift_law
from invrecon.rng import make_generator


class PriorTraining(lightning.LightningDataModule, ABC):
    """What all training data of priors share: patch sizes, budget, streams.

    Args:
        size: Side of the images in pixels.
        patch_sizes: Patch sides in pixels, largest first; `[size]` with `pad: 0` trains on whole images.
        probabilities: Of each patch size.
        pad: Width of the zero border in pixels; None is as far as the grid of the largest patches shifts
            (`shift_law`), none for whole images.
        pixels_per_batch: Pixels a step and process.
        batches_per_epoch: Steps between validations.
        validation_batches: Fixed batches in a validation.
        seed: Seed of order, places and noise.
        augmentation: Changes the training images at random; None shows them as they are.
    """

    def __init__(
        self,
        size: int,
        patch_sizes: list[int],
        probabilities: list[float],
        pad: int | None,
        pixels_per_batch: int,
        batches_per_epoch: int,
        validation_batches: int,
        seed: int,
        augmentation: Augmentation | None = None,
    ) -> None:
        super().__init__()
        lengths_agree = len(patch_sizes) == len(probabilities) > 0
        if not lengths_agree or min(probabilities) < 0 or not sum(probabilities):
            raise InputError(
                f"data.patch_sizes {patch_sizes} and data.probabilities {probabilities} must be lists of equal length, "
                "one non-negative probability a size and not all of them zero."
            )
        if min(patch_sizes) < 1 or size < 1:
            raise InputError(f"data.patch_sizes {patch_sizes} and data.size {size} must be at least 1.")
        if pad is None:
            pad = 0 if patch_sizes == [size] else shift_law(size, patch_sizes[0])[1]
        if batches_per_epoch < 1 or pixels_per_batch < 1 or pad < 0 or validation_batches < 0:
            raise InputError(
                f"data.batches_per_epoch {batches_per_epoch} and data.pixels_per_batch {pixels_per_batch} must be at "
                f"least 1, data.pad {pad} and data.validation_batches {validation_batches} at least 0."
            )
        if sorted(patch_sizes, reverse=True) != list(patch_sizes):
            raise InputError(
                f"data.patch_sizes are {patch_sizes}, expected the largest first: the prior reconstructs with that one."
            )
        if max(patch_sizes) > size + 2 * pad:
            raise InputError(
                f"data.patch_sizes {patch_sizes} do not fit the padded image of {size} + 2 x {pad} pixels; "
                "use smaller patches or a larger data.pad."
            )
        self.size, self.patch_sizes, self.probabilities, self.pad = size, patch_sizes, probabilities, pad
        self.pixels_per_batch, self.batches_per_epoch = pixels_per_batch, batches_per_epoch
        self.validation_batches, self.seed, self.augmentation = validation_batches, seed, augmentation
        self.intensity = Intensity()
        self.train_names: list[str] = []
        self._train: PatchSampler | None = None
        self._validation: PatchSampler | None = None

    @abstractmethod
    def load(self) -> tuple[Tensor, Tensor, Any]:
        """Returns training images, validation images `(N, C, H, W)` as stored, and their encoding to intensity."""

    @property
    def kind(self) -> str:
        """`whole` if every patch is the whole image, else `patch`."""
        return "whole" if self.patch_sizes == [self.size] and self.pad == 0 else "patch"

    def setup(self, stage: str | None = None) -> None:
        """Loads the images once and builds the samplers."""
        if self._train is not None:
            return
        train, validation, encode = self.load()
        if stage == "fit" and (self.trainer is None or self.trainer.is_global_zero):
            held_out = f"{len(validation):,} validate" if len(validation) else "none validates"
            print(f"{len(train):,} images of {', '.join(abridged(self.train_names))} are to be learned, {held_out}.")
        shared = (encode, self.patch_sizes, self.probabilities, self.pad, self.pixels_per_batch)
        self._train = PatchSampler(train, *shared, self.augmentation)
        self._validation = PatchSampler(validation, *shared, held_out=True)

    def on_after_batch_transfer(self, batch: PatchPlan, dataloader_idx: int) -> PatchBatch:
        """Cuts the patches, on the device that the plan was moved to."""
        sampler = self._validation if batch.held_out else self._train
        assert sampler is not None
        return sampler.cut(batch)

    def measure_sigma_data(self) -> float:
        """Returns the standard deviation of 16 batches of training patches of the largest size, intensity units."""
        assert self._train is not None
        generator = make_generator(0, "sigma_data")
        draws = [self._train.draw(generator, "", self.patch_sizes[0]).x.double() for _ in range(16)]
        return float(torch.cat([d.flatten() for d in draws]).std())

    @property
    def num_channels(self) -> int:
        """Channels of an image."""
        assert self._train is not None
        return self._train.images.shape[1]

    @property
    def num_images(self) -> int:
        """Images that are learned from."""
        assert self._train is not None
        return len(self._train.images)

    def validation_images(self) -> Tensor:
        """Returns the whole validation images as intensities, `(N, C, H, W)`."""
        assert self._validation is not None
        return self._validation.encode(self._validation.images)

    def _batches_seen(self) -> int:
        return self.trainer.global_step * self.trainer.accumulate_grad_batches if self.trainer else 0

    def batch_counts(self, key: str) -> tuple[int, int]:
        """Returns patches and pixels that all ranks see in the step of batch `key`: each draws a size of its own."""
        assert self._train is not None
        step, ranks = key.partition("/")[0], self.trainer.world_size if self.trainer else 1
        sizes = [self._train.draw_size(batch_generator(self.seed, f"{step}/{rank}")) for rank in range(ranks)]
        counts = [self._train.num_patches(size) for size in sizes]
        return sum(counts), sum(n * size**2 for n, size in zip(counts, sizes, strict=True))

    def train_dataloader(self) -> DataLoader:
        """Plans of batches as a function of (seed, rank, step)."""
        assert self._train is not None
        rank = self.trainer.global_rank if self.trainer else 0
        stream = PatchStream(self._train, self.seed, rank, self.batches_per_epoch, self._batches_seen)
        return DataLoader(stream, batch_size=None)

    def val_dataloader(self) -> DataLoader:
        """Plans of the same patches every time."""
        assert self._validation is not None
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return DataLoader(FixedBatches(self._validation, self.validation_batches, rank, ranks), batch_size=None)


def abridged(names: Sequence[str], most: int = 4) -> list[str]:
    """Returns the first names, and how many more there are."""
    return list(names) if len(names) <= most else [*names[: most - 1], f"{len(names) - most + 1} more"]


def distinct_names(files: Sequence[Path]) -> list[str]:
    """Returns the files' names, or, where two have the same, their paths from the folder that holds all of them."""
    names = [file.name for file in files]
    return names if len(set(names)) == len(names) else relative_names(files)


def relative_names(files: Sequence[Path]) -> list[str]:
    """Returns the files' paths from the folder that holds all of them."""
    root = Path(os.path.commonpath([file.resolve().parent for file in files]))
    return [file.resolve().relative_to(root).as_posix() for file in files]


def held_out_names(names: Sequence[str], validation: Sequence[str] | None, num_default: int, paths: object) -> set[str]:
    """Returns which of the names validate: those asked for, or the last `num_default`.

    Raises:
        InputError: One asked for is not there, or nothing is left to train on.
    """
    chosen = set(validation or names[-num_default:])
    if missing := sorted(chosen - set(names)):
        raise InputError(f"data.validation names {missing}, expected names of what is in data.paths, as {names[0]}.")
    if chosen >= set(names):
        raise InputError(
            f"Nothing is left to train on: data.paths {paths} hold {len(names)}, as {names[0]}, and validation takes "
            "all of it. Give several, of several patients."
        )
    return chosen


class CTTraining(PriorTraining):
    """CT slices in Hounsfield units from HDF5 volumes, held in memory as int16.

    Args:
        paths: HDF5 files or folders of them.
        validation: Names of files kept out of training for validation, of patients that are in no other file. By
            default the last tenth of the patients, or, of a single patient, the last tenth of the slices.
        dataset: HDF5 key of the volumes.
        size: Side of the slices in pixels; volumes of another size are refused (convert them first).
        patch_sizes: Patch sides in pixels, largest first; `[size]` with `pad: 0` trains on whole images.
        probabilities: Of each patch size.
        pad: Width of the zero border in pixels; None is as far as the grid of the largest patches shifts
            (`shift_law`), none for whole images.
        pixels_per_batch: Pixels a step and process.
        batches_per_epoch: Steps between validations.
        validation_batches: Fixed batches in a validation.
        seed: Seed of order, places and noise.
        licence: Licence of the data, for the prior's card.
        zooms: Every training slice is seen at each of these scales, shrunk towards the centre of a frame of air:
            scanners' fields of view differ, and a prior that has seen one pixel size only reconstructs another worse.
        couches: Share of these training images that get a random couch under the patient (`draw_couch`): a prior
            that has seen few takes another one for air.
        augmentation: Changes these images at random, each patch anew; None shows them as they are.
    """

    def __init__(
        self,
        paths: str | list[str],
        validation: list[str] | None = None,
        dataset: str = "data",
        size: int = 256,
        patch_sizes: list[int] = [56, 32, 16],  # noqa: B006
        probabilities: list[float] = [0.5, 0.3, 0.2],  # noqa: B006
        pad: int | None = None,
        pixels_per_batch: int = 100352,
        batches_per_epoch: int = 250,
        validation_batches: int = 8,
        seed: int = 0,
        licence: str = "not stated",
        zooms: list[float] = [1.0],  # noqa: B006
        couches: float = 0.0,
        augmentation: Augmentation | None = None,
    ) -> None:
        super().__init__(
            size, patch_sizes, probabilities, pad, pixels_per_batch, batches_per_epoch, validation_batches, seed,
            augmentation,
        )  # fmt: skip
        if not zooms or not all(0 < zoom <= 1 for zoom in zooms):
            raise InputError(f"data.zooms is {zooms}, expected a list of scales in (0, 1], such as [1.0, 0.7].")
        if not 0 <= couches <= 1:
            raise InputError(f"data.couches is {couches}, expected the share of slices that get one, from 0 to 1.")
        self.paths, self.validation, self.dataset, self.licence = paths, validation, dataset, licence
        self.zooms, self.couches = zooms, couches

    def load(self) -> tuple[Tensor, Tensor, Any]:
        """Reads every volume and splits off the validation images."""
        files = [file for file in find_volumes(self.paths) if not is_measurement(file)]
        names = distinct_names(files)
        missing = set(self.validation or []) - set(names)
        if missing or not files:
            raise InputError(
                f"data.validation names {sorted(missing)}, expected names among the volumes {names} of data.paths."
                if files
                else f"There is no CT volume in data.paths {self.paths}: only measurement files."
            )
        stacks, patients = zip(*(self._read(file) for file in files), strict=True)
        stems = [file_stem(file) for file in files]
        if len(set(stems)) < len(stems):  # `patient_01/ct.h5`: where no patient is stated, the folder tells
            folders = [name.rpartition("/")[0] or name for name in names]
            patients = tuple(
                [folder if patient in stems else patient for patient in who]
                for folder, who in zip(folders, patients, strict=True)
            )
        held_out = self._held_out(names, patients)
        train = [stack[~chosen] for stack, chosen in zip(stacks, held_out, strict=True)]
        validation = [stack[chosen] for stack, chosen in zip(stacks, held_out, strict=True)]
        self.train_names = [name for name, stack in zip(names, train, strict=True) if len(stack)]
        if not self.train_names:
            raise InputError(
                f"Nothing is left to train on: data.paths {self.paths} hold {names} and validation takes all of it."
            )
        slices = torch.cat(train)[:, None]
        images = torch.cat([zoom_out(slices, zoom) for zoom in self.zooms])
        for i in range(len(images)):
            generator = make_generator(self.seed, "couch", i)
            if torch.rand((), generator=generator) < self.couches:
                images[i] = draw_couch(images[i], generator)
        return images, torch.cat(validation)[:, None], self._encode

    def _held_out(self, names: list[str], patients: Sequence[Sequence[str]]) -> list[Tensor]:
        """Returns for each file which of its slices validate: no patient both trains and validates."""
        if self.validation:
            split: tuple[set[str], set[str]] = (set(), set())
            for name, who in zip(names, patients, strict=True):
                split[name in self.validation].update(who)
            if both := sorted(split[0] & split[1]):
                raise InputError(
                    f"data.validation {self.validation} holds patients that other files of data.paths train on "
                    f"({', '.join(both[:3])}); keep all files of a patient on one side."
                )
            return [torch.full((len(who),), name in self.validation) for name, who in zip(names, patients, strict=True)]
        order = list(dict.fromkeys(patient for who in patients for patient in who))
        chosen = set(order[-max(1, len(order) // 10) :])
        if len(order) > 1:
            return [torch.tensor([patient in chosen for patient in who]) for who in patients]
        lengths = [len(who) for who in patients]
        num = max(1, sum(lengths) // 10)
        warnings.warn(
            f"Training and validating on one patient, {order[0]}: the last {num} slices validate, but neighbouring "
            "slices are alike. Give several patients with data.paths.",
            stacklevel=4,
        )
        return list((torch.arange(sum(lengths)) >= sum(lengths) - num).split(lengths))

    def _read(self, file: Path) -> tuple[Tensor, Sequence[str]]:
        voxels, volume = read_volume(file, dataset=self.dataset)
        if tuple(voxels.shape[1:]) != (self.size, self.size):
            raise InputError(
                f"'{file}' has slices of {tuple(voxels.shape[1:])} pixels, expected ({self.size}, {self.size}); "
                f"convert it with `python -m invrecon.data.convert {file} OUT --size {self.size}` or set data.size."
            )
        stored = voxels.round().clamp(-(2**15), 2**15 - 1).short()
        check_hounsfield(file, float(voxels.min()), float(voxels.max()))
        return stored, volume.patients

    def _encode(self, values: Tensor) -> Tensor:
        return self.intensity.encode(values.float())


def zoom_out(images: Tensor, zoom: float) -> Tensor:
    """Returns images `(N, 1, H, W)` in HU, int16, shrunk by `zoom` (antialiased) in the middle of a frame of air."""
    H, W = images.shape[-2:]
    inner = (max(1, round(zoom * H)), max(1, round(zoom * W)))
    if inner == (H, W):
        return images
    top, left = (H - inner[0]) // 2, (W - inner[1]) // 2
    frame = torch.full_like(images, int(AIR))
    for i, image in enumerate(images):  # one at a time: a float copy of all of them would be large
        # Bicubic: a bilinear kernel, antialiased, would take away most of the scanner's noise.
        small = nnf.interpolate(image[None].float(), inner, mode="bicubic", antialias=True)[0]
        frame[i, :, top : top + inner[0], left : left + inner[1]] = small.round().short()
    return frame


class EllipseTraining(PriorTraining):
    """Random ellipse phantoms, made when training starts: no data set is needed.

    Args:
        num_phantoms: Training phantoms; as many as a sixteenth of them validate.
        disk_diameter: Diameter of the disk that holds the ellipses, as a fraction of the image's width.
        size: Side of the phantoms in pixels.
        patch_sizes: Patch sides in pixels, largest first; `[size]` with `pad: 0` trains on whole images.
        probabilities: Of each patch size.
        pad: Width of the zero border in pixels; None is as far as the grid of the largest patches shifts
            (`shift_law`), none for whole images.
        pixels_per_batch: Pixels a step and process.
        batches_per_epoch: Steps between validations.
        validation_batches: Fixed batches in a validation.
        seed: Seed of phantoms, order, places and noise.
    """

    licence = "none: synthetic"

    def __init__(
        self,
        num_phantoms: int = 2048,
        disk_diameter: float = 0.9,
        size: int = 256,
        patch_sizes: list[int] = [56, 32, 16],  # noqa: B006
        probabilities: list[float] = [0.5, 0.3, 0.2],  # noqa: B006
        pad: int | None = None,
        pixels_per_batch: int = 100352,
        batches_per_epoch: int = 250,
        validation_batches: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__(
            size, patch_sizes, probabilities, pad, pixels_per_batch, batches_per_epoch, validation_batches, seed
        )
        if num_phantoms < 1:
            raise InputError(f"data.num_phantoms is {num_phantoms}, but at least one image has to be learned from.")
        self.num_phantoms, self.disk_diameter = num_phantoms, disk_diameter

    def load(self) -> tuple[Tensor, Tensor, Any]:
        """Draws the phantoms, each a function of (seed, index)."""
        total = self.num_phantoms + max(1, self.num_phantoms // 16)
        make = (
            ellipse_phantom(self.size, make_generator(self.seed, "phantom", i), disk_diameter=self.disk_diameter)
            for i in range(total)
        )
        images = torch.stack([phantom.half() for phantom in make])
        self.train_names = [f"{self.num_phantoms} random ellipse phantoms, seed {self.seed}"]
        return images[: self.num_phantoms], images[self.num_phantoms :], _decode_half


def _decode_half(values: Tensor) -> Tensor:
    return values.float()
