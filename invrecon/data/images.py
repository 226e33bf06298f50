"""Natural colour images: PNG and JPEG files, folders of them and HDF5 stacks, and priors' training on them.

Values are levels of 8 bit, 0 to 255, as stored: no gamma is undone, so that noise and metrics are those of the
literature.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

from invrecon.data.augmentation import Augmentation
from invrecon.data.hdf5 import HDF5_SUFFIXES, brief, list_datasets, open_hdf5, text_of
from invrecon.data.intensity import RGB
from invrecon.data.training import PriorTraining, held_out_names, relative_names
from invrecon.data.volume import Volume, is_hidden, suffix_of
from invrecon.errors import InputError
from invrecon.rng import make_generator

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
FLAT = ("1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr")  # Pillow's modes of 8 bits a channel


class ImageStack(Volume):
    """Colour images, `read` as `(3, size, size)`: of each the middle square, reduced to the size.

    Args:
        path: Where they are.
        size: Side in pixels.
    """

    units = RGB.units

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size

    @abstractmethod
    def pixels(self, index: int) -> np.ndarray:
        """Returns image `index` as stored, `(3, H, W)` uint8."""

    def _read(self, index: int) -> np.ndarray:
        image = torch.from_numpy(self.pixels(index))
        H, W = image.shape[-2:]
        side = min(H, W)
        top, left = (H - side) // 2, (W - side) // 2
        return shrink(image[:, top : top + side, left : left + side], self.size).numpy()

    def _check_size(self, shape: tuple[int, int], name: str) -> None:
        if min(shape) < self.size:
            raise InputError(
                f"{name} has {shape[0]} x {shape[1]} pixels, expected at least {self.size} x {self.size}: set "
                "data.size, or leave it out."
            )


class ImageFolder(ImageStack):
    """The PNG and JPEG files of a folder, sorted by name, or one such file; every image is a patient of its own."""

    def __init__(self, path: Path, size: int) -> None:
        super().__init__(path, size)
        self.files = image_files(path) if path.is_dir() else [path]
        for file in self.files:
            with _open_image(file) as image:
                self._check_size((image.height, image.width), str(file))
        self.shape = (len(self.files), size, size)
        self._finish(np.dtype(np.uint8))
        self.patients = tuple(file.stem for file in self.files)

    def pixels(self, index: int) -> np.ndarray:
        """Returns image `index` as stored, upright, `(3, H, W)` uint8."""
        from PIL import ImageOps

        file = self.files[index]
        with _open_image(file) as image:
            try:
                pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGBA"))
            except (OSError, ValueError, SyntaxError) as error:
                raise InputError(
                    f"{file} cannot be decoded ({brief(error)}): copy it again from its source."
                ) from error
        if pixels[..., 3].min() < 255:
            raise InputError(f"{file} is transparent in places: put it on a background and save it without alpha.")
        return np.moveaxis(pixels[..., :3], -1, 0).copy()


class HDF5Images(ImageStack):
    """An HDF5 dataset `(N, H, W, 3)` or `(N, 3, H, W)`: uint8, uint16 of full range, or float in [0, 1]."""

    def __init__(self, path: Path, size: int, dataset: str) -> None:
        import h5py

        super().__init__(path, size)
        self.dataset = dataset
        with open_hdf5(path) as file:
            data = file.get(dataset)
            if not isinstance(data, h5py.Dataset):
                raise InputError(
                    f"{path} has no dataset '{dataset}'; it has {', '.join(list_datasets(file)) or 'none at all'}. "
                    "Name the one to read with data.dataset."
                )
            if data.ndim != 4 or 3 not in (data.shape[1], data.shape[3]) or data.dtype not in ("u1", "u2", "f4", "f8"):
                raise InputError(
                    f"Dataset '{dataset}' of {path} is {data.dtype} of shape {data.shape}, expected colour images "
                    "(N, H, W, 3) or (N, 3, H, W), as uint8, uint16 or floats in [0, 1]; save them as such."
                )
            self.channels_last = data.shape[3] == 3
            self._check_size(
                data.shape[1:3] if self.channels_last else data.shape[2:], f"Dataset '{dataset}' of {path}"
            )
            attrs = {**file.attrs, **data.attrs}
            self.source = text_of(attrs.get("source", ""))
            self.shape = (data.shape[0], size, size)
            self._finish(data.dtype, text_of(attrs.get("patient", "")))

    def pixels(self, index: int) -> np.ndarray:
        """Returns image `index`, `(3, H, W)` uint8."""
        with open_hdf5(self.path) as file:
            values = file[self.dataset][index]
        values = np.moveaxis(values, -1, 0) if self.channels_last else values
        if values.dtype.kind == "f":
            if not ((values >= 0) & (values <= 1)).all():
                raise InputError(
                    f"Image {index} of {self.path} has floats outside [0, 1] or NaN, expected intensities from 0 to 1: "
                    "rescale them, or save them as uint8."
                )
            values = 255 * values
        elif values.dtype == np.uint16:
            values = values / 257
        return np.ascontiguousarray(np.rint(values), dtype=np.uint8)


def shrink(image: Tensor, size: int) -> Tensor:
    """Returns a square image `(3, S, S)` uint8 as `(3, size, size)` uint8: antialiased bicubic, itself if it fits."""
    if image.shape[-1] == size:
        return image
    small = nnf.interpolate(image[None].float(), (size, size), mode="bicubic", antialias=True, align_corners=False)
    return small[0].round().clamp(0, 255).byte()


def open_images(path: Path, size: int, *, dataset: str = "data") -> ImageStack:
    """Opens an image, a folder of images or an HDF5 stack without decoding any.

    Raises:
        InputError: If it is damaged, of another kind, or smaller than `size`.
    """
    if path.is_dir() or suffix_of(path) in IMAGE_SUFFIXES:
        return ImageFolder(path, size)
    if suffix_of(path) in HDF5_SUFFIXES:
        return HDF5Images(path, size, dataset)
    raise InputError(
        f"{path} is not of a kind that can be read: expected colour images as {', '.join(IMAGE_SUFFIXES)}, a folder "
        f"of them, or HDF5 ({HDF5_SUFFIXES[0]})."
    )


def image_files(folder: Path) -> list[Path]:
    """Lists the images in a folder itself, sorted by name."""
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    return [entry for entry in entries if entry.is_file() and suffix_of(entry) in IMAGE_SUFFIXES]


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Lists the stacks that `paths` name: files as they are; of folders, searched recursively, those with images.

    Raises:
        InputError: If a path does not exist, or a folder holds no image.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if not path.exists():
            raise InputError(f"{path} does not exist; check data.paths.")
        if not path.is_dir():
            found[path] = None
            continue
        entries = sorted(entry for entry in path.rglob("*") if not is_hidden(entry, path))
        inside = [folder for folder in [path, *entries] if folder.is_dir() and image_files(folder)]
        inside += [file for file in entries if file.is_file() and suffix_of(file) in HDF5_SUFFIXES]
        if not inside:
            raise InputError(
                f"The folder {path} holds no colour image; expected {', '.join(IMAGE_SUFFIXES)} or HDF5 files."
            )
        found.update(dict.fromkeys(inside))
    return list(found)


def _open_image(file: Path) -> Image:
    """Opens an image's header.

    Raises:
        InputError: If it is damaged, or not of 8 bits a channel.
    """
    from PIL import Image as Pillow

    try:
        image = Pillow.open(file)
    except (OSError, ValueError, SyntaxError, Pillow.DecompressionBombError) as error:
        raise InputError(
            f"{file} cannot be opened as an image ({brief(error)}): copy it again from its source."
        ) from error
    if image.mode not in FLAT:
        image.close()
        raise InputError(
            f"{file} has pixels of mode {image.mode}, expected 8 bits a channel: save it as 8 bit RGB, or put the "
            "images into HDF5 as uint16 or floats."
        )
    return image


class ImageTraining(PriorTraining):
    """Random square crops of natural colour images, held in memory as uint8.

    Each image gives `num_crops` squares, drawn once: of a side between `size` and the image's shorter one, at a random
    place, reduced to `size`, every second one mirrored. Patches are then cut out of these.

    Args:
        paths: PNG, JPEG or HDF5 files, or folders of them.
        validation: Names (without suffix) of images kept out of training for validation; by default the last tenth.
        dataset: HDF5 key of stacks.
        num_crops: Crops an image.
        size: Side of the crops in pixels.
        patch_sizes: Patch sides in pixels, largest first; `[size]` with `pad: 0` trains on whole crops.
        probabilities: Of each patch size.
        pad: Width of the zero border in pixels; None is as far as the grid of the largest patches shifts
            (`shift_law`), none for whole crops.
        pixels_per_batch: Pixels a step and process.
        batches_per_epoch: Steps between validations.
        validation_batches: Fixed batches in a validation.
        seed: Seed of crops, order, places and noise.
        licence: Licence of the data, for the prior's card.
        augmentation: Changes the training images at random, each patch anew; None shows them as they are.
    """

    def __init__(
        self,
        paths: str | list[str],
        validation: list[str] | None = None,
        dataset: str = "data",
        num_crops: int = 8,
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
        if num_crops < 1:
            raise InputError(f"data.num_crops is {num_crops}, expected at least 1.")
        self.paths, self.validation, self.dataset = paths, validation, dataset
        self.num_crops, self.licence = num_crops, licence
        self.intensity = RGB

    def load(self) -> tuple[Tensor, Tensor, Any]:
        """Reads every image, splits off the validation images and draws the crops."""
        paths = [self.paths] if isinstance(self.paths, str) else self.paths
        stacks = [open_images(path, self.size, dataset=self.dataset) for path in find_images(list(map(Path, paths)))]
        images = [(stack, index) for stack in stacks for index in range(len(stack))]
        names = [_name(*image) for image in images]
        if len(set(names)) < len(names):  # `scene_01/image.png`: the folder tells them apart
            names = relative_names([_folder(stack) / name for (stack, _), name in zip(images, names, strict=True)])
        places = [(stack, index, name) for (stack, index), name in zip(images, names, strict=True)]
        held_out = held_out_names(names, self.validation, max(1, len(names) // 10), self.paths)
        crops: dict[bool, list[Tensor]] = {True: [], False: []}
        for stack, index, name in places:
            image = torch.from_numpy(stack.pixels(index))
            generators = (make_generator(self.seed, "crop", name, i) for i in range(self.num_crops))
            crops[name in held_out] += [draw_crop(image, self.size, generator) for generator in generators]
        trained = [sum(name not in held_out for other, _, name in places if other is stack) for stack in stacks]
        self.train_names = [f"{stack.stem} ({n} images)" for stack, n in zip(stacks, trained, strict=True) if n]
        return torch.stack(crops[False]), torch.stack(crops[True]), _to_intensity


def draw_crop(image: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Returns a random square of an image `(3, H, W)` uint8, reduced to `(3, size, size)`, half of them mirrored."""
    H, W = image.shape[-2:]

    def upto(high: int) -> int:
        return int(torch.randint(high + 1, (), generator=generator))

    side = size + upto(min(H, W) - size)
    top, left = upto(H - side), upto(W - side)
    crop = shrink(image[:, top : top + side, left : left + side], size)
    return crop.flip(-1) if upto(1) else crop


def _to_intensity(values: Tensor) -> Tensor:
    return RGB.encode(values.float())


def _folder(stack: ImageStack) -> Path:
    return stack.path if isinstance(stack, ImageFolder) else stack.path.parent


def _name(stack: ImageStack, index: int) -> str:
    return stack.patients[index] if isinstance(stack, ImageFolder) else f"{stack.stem}/{index:04d}"
