"""Colour images come as stored, whatever holds them, and train as a function of seed and name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from invrecon.data.images import ImageTraining, draw_crop, find_images, open_images, shrink
from invrecon.data.intensity import RGB
from invrecon.data.reconstruction import ImageData
from invrecon.errors import InputError
from invrecon.rng import make_generator

SIZE = 16


def photo(seed: int = 0, height: int = 20, width: int = 26) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five colour images and a file that is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(5):
        Image.fromarray(photo(i)).save(folder / f"{'edcba'[i]}.png")
    (folder / "README.txt").write_text("five images")
    return folder


def test_the_middle_square_comes_as_stored(folder: Path) -> None:
    data = ImageData(str(folder), size=20, batch_size=3)
    batches = list(data.test_dataloader())
    assert [len(batch) for batch in batches] == [3, 2]
    assert batches[0].id == ["photos/0000", "photos/0001", "photos/0002"]
    assert batches[0].patient == ["a", "b", "c"]  # sorted by name, each a unit of statistics
    stored = torch.from_numpy(photo(4)[:, 3:23]).movedim(-1, 0)
    assert batches[0].reference.shape == (3, 3, 20, 20)
    assert torch.equal(RGB.decode(batches[0].reference[0]).round(), stored.float())


def test_what_holds_the_images_does_not_matter(folder: Path, tmp_path: Path) -> None:
    images = np.stack([photo(i) for i in (4, 3, 2, 1, 0)])
    forms = {
        "last": images,
        "first": np.moveaxis(images, -1, 1),
        "deep": images.astype(np.uint16) * 257,
        "float": images.astype(np.float32) / 255,
    }
    expected = [open_images(folder, SIZE).read(i) for i in range(5)]
    for name, values in forms.items():
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["data"] = values
        stack = open_images(tmp_path / f"{name}.h5", SIZE)
        assert len(stack) == 5
        assert all(torch.equal(stack.read(i), expected[i]) for i in range(5)), name


def test_shrinking_keeps_a_constant_and_a_smooth_mean() -> None:
    constant = torch.full((3, 40, 40), 137, dtype=torch.uint8)
    assert torch.equal(shrink(constant, 16), constant[:, :16, :16])
    ramp = torch.arange(40).expand(3, 40, 40).byte() * 5
    assert shrink(ramp, 10).float().mean() == pytest.approx(ramp.float().mean(), abs=0.5)
    assert shrink(ramp, 40) is ramp
    stripes = (torch.arange(40) % 2 * 255).expand(3, 40, 40).byte()
    assert (shrink(stripes, 10)[..., 2:-2].float() - 127.5).abs().max() < 3  # antialiased: no moire


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_modes_that_mean_a_colour_are_understood(mode: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{'jpg' if mode == 'CMYK' else 'png'}"
    Image.new("RGB", (SIZE, SIZE), (204, 204, 204)).convert(mode).save(path)
    assert (open_images(path, SIZE).read(0) - 204).abs().max() <= 2


def test_a_photo_taken_upright_stands_upright(tmp_path: Path) -> None:
    image, exif = Image.fromarray(photo(0, SIZE, SIZE)), Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(tmp_path / "x.png", exif=exif)
    expected = torch.from_numpy(photo(0, SIZE, SIZE)).movedim(-1, 0).rot90(-1, (1, 2)).float()
    assert torch.equal(open_images(tmp_path / "x.png", SIZE).read(0), expected)


def transparent(path: Path) -> None:
    Image.new("RGBA", (SIZE, SIZE), (1, 2, 3, 100)).save(path)


def deep(path: Path) -> None:
    Image.fromarray(np.zeros((SIZE, SIZE), np.uint16)).save(path)


def truncated(path: Path) -> None:
    Image.fromarray(photo()).save(path)
    path.write_bytes(path.read_bytes()[:-400])


def text(path: Path) -> None:
    path.write_text("no image")


def small(path: Path) -> None:
    Image.fromarray(photo(0, SIZE - 1, 40)).save(path)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (transparent, "transparent"),
        (deep, "8 bits a channel"),
        (truncated, "cannot be decoded"),
        (text, "cannot be opened"),
        (small, "15 x 40 pixels, expected at least 16"),
    ],
)
def test_bad_images_are_refused_by_name(make: Callable[[Path], None], match: str, folder: Path) -> None:
    make(folder / "bad.png")
    with pytest.raises(InputError, match=match) as error:
        ImageData(str(folder), size=SIZE).setup()
    assert "bad.png" in str(error.value)


@pytest.mark.parametrize(
    "values",
    [np.zeros((2, 20, 20)), np.zeros((2, 20, 20, 4), np.uint8), np.zeros((2, 20, 20, 3), np.int64)],
    ids=["grey", "alpha", "int64"],
)
def test_stacks_of_another_kind_are_refused(values: np.ndarray, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["data"] = values
    with pytest.raises(InputError, match=r"x\.h5.*expected colour images"):
        ImageData(str(tmp_path / "x.h5"), size=SIZE).setup()


def test_floats_of_another_range_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["data"] = np.full((1, 20, 20, 3), 200.0)
    with pytest.raises(InputError, match=r"outside \[0, 1\]"):
        ImageData(str(tmp_path / "x.h5"), size=SIZE).setup()


def test_images_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"scene{i}").mkdir()
        Image.fromarray(photo(i)).save(tmp_path / f"scene{i}" / "image.png")
    (tmp_path / ".cache").mkdir()
    Image.fromarray(photo(4)).save(tmp_path / ".cache" / "image.png")
    assert [folder.name for folder in find_images([tmp_path])] == [f"scene{i}" for i in range(4)]
    small = {"size": SIZE, "patch_sizes": [8], "probabilities": [1.0], "pad": 0, "num_crops": 2}
    train, validation, _ = ImageTraining(str(tmp_path), **small).load()
    assert (len(train), len(validation)) == (6, 2)
    named = ImageTraining(str(tmp_path), **small, validation=["scene1/image"])
    assert len(named.load()[1]) == 2 and all("scene1" not in name for name in named.train_names)


def test_an_image_of_one_colour_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((SIZE, SIZE, 3), 9, np.uint8)).save(tmp_path / "blank.png")
    with pytest.raises(InputError, match=r"The image is constant in .*: slice 0 is 9 8 bit"):
        ImageData(str(tmp_path / "blank.png"), size=SIZE).setup()


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no colour image"):
        ImageData(str(tmp_path), size=SIZE).setup()


def tiny_training(path: Path, **options: object) -> ImageTraining:
    settings: dict[str, object] = {
        "size": SIZE, "patch_sizes": [8], "probabilities": [1.0], "pad": 4, "pixels_per_batch": 2048, "num_crops": 3,
    }  # fmt: skip
    data = ImageTraining(str(path), **{**settings, **options})  # type: ignore[arg-type]
    data.setup("fit")
    return data


def test_no_image_trains_and_validates(tmp_path: Path) -> None:
    for level in range(20):  # a level an image, so that crops can be told apart
        Image.new("RGB", (20, 24), (10 * level,) * 3).save(tmp_path / f"{level:02d}.png")
    data = tiny_training(tmp_path, validation=["03", "11"])
    train, validation, encode = data.load()
    assert validation.unique().tolist() == [30, 110]
    assert not set(train.unique().tolist()) & {30, 110}
    assert (train.shape, validation.shape) == ((54, 3, SIZE, SIZE), (6, 3, SIZE, SIZE))
    assert torch.equal(data.validation_images(), encode(validation)) and encode(validation).max() <= 1
    assert data.train_names == [f"{tmp_path.name} (18 images)"]
    assert tiny_training(tmp_path).load()[1].unique().tolist() == [180, 190]  # the last tenth by default


def test_the_crops_of_an_image_depend_on_seed_and_name_alone(folder: Path) -> None:
    before = tiny_training(folder, validation=["e"]).load()[0]
    (folder / "a.png").unlink()
    after = tiny_training(folder, validation=["e"]).load()[0]
    assert torch.equal(before[3:], after)
    assert not torch.equal(before, tiny_training(folder, validation=["e"], seed=1).load()[0][: len(before)])


def test_crops_are_mirrored_half_of_the_time() -> None:
    image = torch.from_numpy(photo(0, SIZE, SIZE)).movedim(-1, 0)
    crops = [draw_crop(image, SIZE, make_generator(0, i)) for i in range(100)]
    mirrored = sum(torch.equal(crop, image.flip(-1)) for crop in crops)
    assert sum(torch.equal(crop, image) for crop in crops) == 100 - mirrored
    assert 30 < mirrored < 70


def test_batches_of_colour_patches(folder: Path) -> None:
    data = tiny_training(folder)
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert batch.x.shape == (32, 3, 8, 8) and batch.position.shape == (32, 2, 8, 8)
    outside = (batch.position.abs() > 1).any(dim=1, keepdim=True).expand(batch.x.shape)
    assert outside.any() and not batch.x[outside].any()
    assert 0.4 < batch.x[~outside].mean() < 0.6  # uniform levels, over 255


@pytest.mark.parametrize(
    ("options", "match"), [({"validation": ["z"]}, "'z'"), ({"validation": list("abcde")}, "left")]
)
def test_a_split_that_cannot_be_made_is_refused(options: dict[str, object], match: str, folder: Path) -> None:
    with pytest.raises(InputError, match=match):
        tiny_training(folder, **options)
