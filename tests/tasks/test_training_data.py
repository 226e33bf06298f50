"""Training data: a function of (seed, rank, step) alone, cut where its positions say, split by patient."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from invrecon.data.augmentation import Augmentation
from invrecon.data.couches import draw_couch
from invrecon.data.patches import PatchBatch, PatchStream, fits
from invrecon.data.training import CTTraining, EllipseTraining, zoom_out
from invrecon.errors import InputError
from invrecon.rng import make_generator
from tests.tasks.tiny import make_data


def equal_batches(a: PatchBatch, b: PatchBatch) -> bool:
    return torch.equal(a.x, b.x) and torch.equal(a.position, b.position) and a.key == b.key


def test_batches_are_a_function_of_seed_rank_and_step_alone() -> None:
    data = make_data()
    data.setup()
    cut = data._train.cut
    stream = lambda seed, rank, start: [*map(cut, PatchStream(data._train, seed, rank, 5, lambda: start))]  # noqa: E731
    epoch = stream(0, 0, 5)
    assert len(epoch) == 5
    assert all(map(equal_batches, epoch[3:], stream(0, 0, 8)))  # resumed in the middle of an epoch
    assert len(stream(0, 0, 8)) == 2
    for other in (stream(1, 0, 5), stream(0, 1, 5), stream(0, 0, 10)):
        assert not any(a.x.shape == b.x.shape and torch.equal(a.x, b.x) for a, b in zip(epoch, other))
    assert len({batch.key for rank in (0, 1) for start in (0, 5) for batch in stream(0, rank, start)}) == 20


def test_patches_are_cut_from_the_padded_image_at_their_positions() -> None:
    data = make_data()
    data.setup()
    sampler = data._train
    assert sampler is not None
    sizes = set()
    for seed in range(12):
        x, position, _ = sampler.draw(make_generator(seed), "")
        p = x.shape[-1]
        sizes.add(p)
        assert len(x) == 512 // p**2 and x.shape[1:] == (1, p, p) and position.shape == (len(x), 2, p, p)
        column, row = ((position.double() + 1) * 16 - 1).div(2).round().long().unbind(1)
        inside = (column >= 0) & (column < 16) & (row >= 0) & (row < 16)
        assert not x[:, 0][~inside].any() and int(row.min()) >= -4 and int(row.max()) <= 19
        images = sampler.images.float()[:, 0]
        for patch, i, j, seen in zip(x[:, 0], row, column, inside):
            values = images[:, i.clamp(0, 15), j.clamp(0, 15)]  # in every image, at the patch's place
            assert bool(((values - patch).abs() * seen).amax(dim=(1, 2)).min() == 0)
    assert sizes == {8, 4}


def test_patch_sizes_are_drawn_by_their_probabilities() -> None:
    data = make_data(probabilities=[0.25, 0.75])
    data.setup()
    sizes = [data._train.draw(make_generator(i), "").x.shape[-1] for i in range(600)]
    assert sizes.count(8) / 600 == pytest.approx(0.25, abs=0.06)


def test_sigma_data_is_measured() -> None:
    data = make_data()
    data.setup()
    measured = data.measure_sigma_data()
    assert measured == data.measure_sigma_data()
    padded = torch.nn.functional.pad(data._train.images.float(), (4, 4, 4, 4))
    windows = padded.unfold(2, 8, 1).unfold(3, 8, 1)  # every patch that can be drawn
    assert measured == pytest.approx(float(windows.std()), rel=0.1)


@pytest.fixture
def scans(tmp_path: Path) -> Callable[..., Path]:
    """Writes a folder of CT volumes; each patient's slices hold the patient's number in HU."""

    def write(**files: list[int]) -> Path:
        for name, patients in files.items():
            values = np.stack([np.full((8, 8), 10 * p) + np.eye(8) for p in patients])
            with h5py.File(tmp_path / f"{name}.h5", "w") as file:
                file["data"] = values.astype(np.int16)
            entries = [[f"{i}.dcm", f"patient {p}"] for i, p in enumerate(patients)]
            (tmp_path / f"{name}.patients.json").write_text(json.dumps(entries))
        return tmp_path

    return write


def split_of(folder: Path, **settings: Any) -> tuple[CTTraining, list[int], list[int]]:
    data = CTTraining(str(folder), size=8, patch_sizes=[4], probabilities=[1.0], pad=0, **settings)
    train, validation, encode = data.load()
    assert float(encode(train).min()) >= 0 and float(encode(train).max()) <= 1
    return data, *([int(image[0, 0, 1]) // 10 for image in images] for images in (train, validation))


def test_patches_of_all_ranks_are_counted() -> None:
    data = make_data()
    data.setup()
    data.trainer = SimpleNamespace(world_size=3, global_step=0)  # type: ignore[assignment]
    streams = [PatchStream(data._train, data.seed, rank, 20, lambda: 0) for rank in range(3)]
    counted = []
    for plans in zip(*streams, strict=True):
        batches = [data._train.cut(plan).x for plan in plans]
        expected = (sum(map(len, batches)), sum(x[:, 0].numel() for x in batches))
        assert {data.batch_counts(plan.key) for plan in plans} == {expected}, "the same on every rank"
        counted.append(expected[0])
    assert len(set(counted)) > 1, "ranks draw sizes of their own"


def test_phantoms_are_needed_to_learn_from_any() -> None:
    with pytest.raises(InputError, match="num_phantoms is 0"):
        EllipseTraining(num_phantoms=0)


def test_no_patient_both_trains_and_validates(scans: Callable[..., Path]) -> None:
    folder = scans(a=[1, 1, 2], b=[3, 4, 4], c=[4, 5, 4])
    data, train, validation = split_of(folder)
    assert (train, validation) == ([1, 1, 2, 3, 4, 4, 4, 4], [5])
    assert data.train_names == ["a.h5", "b.h5", "c.h5"]
    _, train, validation = split_of(folder, validation=["a.h5"])
    assert (train, validation) == ([3, 4, 4, 4, 5, 4], [1, 1, 2])
    with pytest.raises(InputError, match=r"patient 4.*one side"):
        split_of(folder, validation=["c.h5"])
    with pytest.raises(InputError, match=r"\['d.h5'\].*a\.h5"):
        split_of(folder, validation=["d.h5"])
    with pytest.raises(InputError, match="Nothing is left to train on"):
        split_of(folder, validation=["a.h5", "b.h5", "c.h5"])


def test_the_folder_is_the_patient_of_scans_that_share_their_names(tmp_path: Path) -> None:
    """`patient_01/arterial.h5` and `patient_01/venous.h5` are of one patient where the files state none."""
    for number in range(1, 5):
        (tmp_path / f"patient_{number}").mkdir()
        for phase in ("arterial", "venous"):
            with h5py.File(tmp_path / f"patient_{number}" / f"{phase}.h5", "w") as file:
                file["data"] = (10 * number + np.eye(8)[None]).astype(np.int16)
    _, train, validation = split_of(tmp_path)
    assert (train, validation) == ([1, 1, 2, 2, 3, 3], [4, 4])
    both = ["patient_2/arterial.h5", "patient_2/venous.h5"]
    assert split_of(tmp_path, validation=both)[2] == [2, 2]
    with pytest.raises(InputError, match=r"patient_2.*on one side"):
        split_of(tmp_path, validation=both[:1])


def test_a_single_patient_is_split_by_slices_with_a_warning(scans: Callable[..., Path]) -> None:
    folder = scans(a=[1] * 12, b=[1] * 8)
    with pytest.warns(UserWarning, match="neighbouring"):
        _, train, validation = split_of(folder)
    assert (len(train), len(validation)) == (18, 2)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"patch_sizes": [8], "probabilities": [0.5, 0.5]}, "equal length"),
        ({"probabilities": [0.0, 0.0]}, "not all of them zero"),
        ({"probabilities": [1.5, -0.5]}, "non-negative"),
        ({"patch_sizes": [32, 4]}, "do not fit"),
        ({"batches_per_epoch": 0}, "batches_per_epoch"),
        ({"pad": -1}, "pad"),
        ({"patch_sizes": [8, 0]}, "at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=word):
        make_data(**settings)


@pytest.mark.parametrize(
    ("size", "patch_sizes", "pad"), [(256, [56, 32], 24), (512, [64], 64), (512, [56], 48), (16, [16], 0)]
)
def test_the_border_is_as_wide_as_the_grid_shifts(size: int, patch_sizes: list[int], pad: int) -> None:
    shares = [1.0] * len(patch_sizes)
    assert make_data(size=size, patch_sizes=patch_sizes, probabilities=shares, pad=None).pad == pad


def test_slices_of_another_size_are_refused(scans: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"\(8, 8\) pixels, expected \(16, 16\)"):
        CTTraining(str(scans(a=[1, 2])), size=16, patch_sizes=[4], probabilities=[1.0], pad=0).load()


def test_zooming_out_shrinks_the_patient_in_a_frame_of_air() -> None:
    grid = torch.linspace(-1, 1, 33)
    disk = (grid[:, None] ** 2 + grid**2 < 0.8**2)[None, None]
    images = torch.where(disk, 500, -1000).short()
    assert zoom_out(images, 1.0) is images
    small = zoom_out(images, 0.5)
    assert small.shape == images.shape and small.dtype == torch.int16
    area = (small.float() + 1000).sum() / (images.float() + 1000).sum()
    assert abs(float(area) / (16 / 33) ** 2 - 1) < 0.02  # mass goes with the square of the scale
    assert (small[..., :7, :] == -1000).all() and int(small[0, 0, 16, 16]) == 500


def test_every_zoom_of_every_slice_is_trained_on(scans: Callable[..., Path]) -> None:
    folder = scans(a=[1, 2], b=[3, 4], c=[5])
    frame = {"size": 8, "patch_sizes": [4], "probabilities": [1.0], "pad": 0}
    one = CTTraining(str(folder), ["c.h5"], **frame).load()
    two = CTTraining(str(folder), ["c.h5"], zooms=[1.0, 0.6], **frame).load()
    assert len(two[0]) == 2 * len(one[0]) == 8
    assert torch.equal(two[0][:4], one[0]) and torch.equal(two[1], one[1])
    for zooms in ([], [0.0], [1.2]):
        with pytest.raises(InputError, match="zooms"):
            CTTraining(str(folder), zooms=zooms)


def patient(side: int = 64) -> torch.Tensor:
    """A disk of water in air, in HU."""
    grid = torch.linspace(-1, 1, side)
    return torch.where(grid[:, None] ** 2 + grid**2 < 0.5**2, 0, -1000).short()[None]


def test_a_couch_lies_under_the_patient_and_leaves_him_as_he_is() -> None:
    image = patient()
    drawn = torch.stack([draw_couch(image, make_generator(0, i)) for i in range(40)])
    assert drawn.dtype == image.dtype
    assert torch.equal(drawn[:, image > -1000], image[image > -1000].expand(40, -1))
    changed = drawn != image
    share = changed.flatten(1).float().mean(dim=1)
    assert (share > 0).float().mean() > 0.9 and share.max() < 0.6
    rows = torch.arange(64.0)[:, None].expand(64, 64)
    middle = changed[..., 31:33] & (rows > 32)[:, 31:33]
    assert all(float(rows[:, 31:33][c[0]].min()) >= 46 for c in middle if c.any())  # the patient ends at row 48
    assert drawn.max() <= 100 and drawn.min() >= -1000


def test_couches_of_every_width_fill_thin_shells_by_their_share_of_a_pixel() -> None:
    # Twice the resolution, the same couch: its mass, in the units of the image, stays.
    coarse, fine = patient(64), patient(256)
    for i in range(10):
        mass = [
            float((draw_couch(image, make_generator(1, i)).float() - image).sum()) / image.numel()
            for image in (coarse, fine)
        ]
        assert abs(mass[0] - mass[1]) < 0.15 * mass[1] + 1


def test_a_share_of_the_training_images_gets_a_couch_and_no_validation_image(scans: Callable[..., Path]) -> None:
    folder = scans(a=[-90] * 40, c=[-91])  # no tissue: nobody lies on the couch
    frame = {"size": 8, "patch_sizes": [4], "probabilities": [1.0], "pad": 0}
    none, half, again, all_ = (
        CTTraining(str(folder), ["c.h5"], couches=share, **frame).load() for share in (0.0, 0.5, 0.5, 1.0)
    )
    assert torch.equal(half[0], again[0])
    changed = [(x[0] != none[0]).flatten(1).any(dim=1).sum() for x in (half, all_)]
    assert 0 < changed[0] < changed[1] <= 40
    assert all(torch.equal(x[1], none[1]) for x in (half, all_))
    with pytest.raises(InputError, match="couches"):
        CTTraining(str(folder), couches=1.5)


def test_augmentation_mirrors_the_training_images_and_not_those_that_validate() -> None:
    plain, mirrored = make_data(), make_data()
    mirrored.augmentation = Augmentation(flip=1.0, warp=0.0, texture=0.0)
    for data in (plain, mirrored):
        data.setup()
    own = [[data.on_after_batch_transfer(plan, 0) for plan in data.val_dataloader()] for data in (plain, mirrored)]
    assert all(map(equal_batches, *own))
    plan = next(iter(mirrored.train_dataloader()))
    changed = mirrored.on_after_batch_transfer(plan, 0)
    size, side = plan.patch_size, mirrored.size
    opposite = plan._replace(left=side - size - plan.left, changes=None)
    assert torch.allclose(changed.x, plain.on_after_batch_transfer(opposite, 0).x.flip(-1), atol=1e-4)
    assert torch.equal(changed.position, plain.on_after_batch_transfer(plan._replace(changes=None), 0).position)


def test_images_that_would_fill_a_gpu_stay_in_the_memory_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    images, gpu = torch.zeros(10), torch.device("cuda")
    for free, expected in ((4 * images.nbytes, True), (4 * images.nbytes - 1, False)):
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda device, free=free: (free, 10 * free))
        assert fits(images, gpu) is expected
    assert fits(images, torch.device("cpu"))
    data = make_data()
    data.augmentation = Augmentation()
    data.setup()
    plan = next(iter(data.train_dataloader()))
    moved = plan.to(torch.device("cpu"))  # what is cut there is what would be cut here
    assert equal_batches(data._train.cut(moved), data._train.cut(plan)) and moved.changes.seed == plan.changes.seed
