"""Cases of MRI: what the method is told comes from the measurement; what it is judged by, from the whole k-space."""

from __future__ import annotations

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

from invrecon.data.cases import Case, collate_cases
from invrecon.data.fastmri_files import write_fastmri
from invrecon.data.intensity import MAGNITUDE
from invrecon.data.kspace import calibration_scale, image_kspace, measured_scale
from invrecon.data.mri import MRIData, MRITraining, find_mri, fit, magnitude_of, open_magnitudes, random_phase
from invrecon.data.phantoms import ellipse_phantom
from invrecon.errors import InputError
from invrecon.metrics.mri import magnitude
from invrecon.operators.coils import ESPIRiT, LowResolutionMaps, noise_covariance, simulated_maps
from invrecon.operators.fourier import pairs_to_complex
from invrecon.operators.mri import CartesianMRI
from invrecon.operators.sampling import EquispacedLines, PolynomialSampling, RandomLines, achieved_acceleration, radii
from invrecon.rng import make_generator

SIZE, COILS, UNIT = 48, 4, 1e-4  # fastMRI's values are as small
SAMPLING = EquispacedLines(2, 0.3)
SMALL = {"patch_sizes": [8], "probabilities": [1.0], "pad": 4, "pixels_per_batch": 256}


def head(index: int = 0, size: int = SIZE) -> Tensor:
    """A magnitude that fills much of the image."""
    rows, columns = torch.meshgrid(*(torch.linspace(-1, 1, size),) * 2, indexing="ij")
    inside = (rows**2 + (1.2 * columns) ** 2 < 0.7).float()
    return UNIT * inside * (1 + ellipse_phantom(size, make_generator(index, "head"))[0])


@pytest.fixture(scope="module")
def truth() -> tuple[Tensor, Tensor]:
    images = torch.stack([random_phase(head(i), make_generator(i, "phase")) for i in range(3)])
    return images, simulated_maps(COILS, (SIZE, SIZE), make_generator(0, "coils"))


@pytest.fixture(scope="module")
def folder(truth: tuple[Tensor, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    images, maps = truth
    folder = tmp_path_factory.mktemp("kspace")
    kspace = torch.stack([image_kspace(image, maps) for image in images])
    kspace = kspace + 1e-3 * UNIT * torch.randn(kspace.shape, generator=torch.Generator().manual_seed(0))
    write_fastmri(folder / "many.h5", kspace, patient="p", voxel_mm=(3.0, 2.0, 2.0))
    single = torch.stack([image_kspace(image) for image in images])
    write_fastmri(folder / "one.h5", single + 1e-9)
    mask = SAMPLING((SIZE, SIZE), make_generator(0))[0]
    write_fastmri(folder / "scanned.h5", kspace, mask=mask, matrix=(SIZE, SIZE - 8))
    return folder


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("magnitudes")
    for name, first in {"a": 0, "b": 4}.items():
        slices = torch.stack([head(first + i, 40) for i in range(3)] + [torch.zeros(40, 40)]) / UNIT * 1000
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["data"] = slices.round().short().numpy()
    return folder


def cases(data: MRIData) -> list:
    return list(data.test_dataloader())


def test_measured_kspace_is_undersampled_and_judged_by_all_of_it(folder: Path, truth: tuple[Tensor, Tensor]) -> None:
    data = MRIData(str(folder / "many.h5"), sampling=SAMPLING)
    assert data.intensity == MAGNITUDE
    batches = cases(data)
    assert [batch.id for batch in batches] == [["many/0000"], ["many/0001"], ["many/0002"]]
    batch, image = batches[1], truth[0][1]
    assert batch.patient == ["p"] and batch.voxel_mm == [(3.0, 2.0, 2.0)]
    assert batch.measurement.shape == (1, COILS, SIZE, SIZE, 2) and batch.maps.shape == (1, COILS, SIZE, SIZE, 2)
    off = ~batch.mask[0]
    assert (batch.measurement[0][:, off] == 0).all() and (batch.measurement[0][:, ~off] != 0).any()
    assert achieved_acceleration(batch.mask).item() == pytest.approx(2, rel=0.1)
    scale = batch.scale[0]
    inside = batch.maps[0].square().sum((0, -1)) > 0.5
    difference = magnitude(batch.reference[0] * scale)[0] - magnitude(image)[0]
    assert inside[magnitude(image)[0] > 0.5 * UNIT].float().mean() > 0.99
    assert difference[inside].abs().max() < 0.05 * UNIT
    bound = CartesianMRI(SIZE).bind(batch)
    assert torch.allclose(bound.restrict(batch.measurement), batch.measurement)
    residual = (bound(batch.reference) - batch.measurement).norm() / batch.measurement.norm()
    assert residual < 0.03  # maps from the ACS explain the coils' data


def test_one_coil_has_no_maps_and_its_image_is_exact(folder: Path, truth: tuple[Tensor, Tensor]) -> None:
    batch = cases(MRIData(str(folder / "one.h5"), slices="1", sampling=SAMPLING))[0]
    assert batch.maps is None and batch.measurement.shape == (1, 1, SIZE, SIZE, 2) and batch.noise_std.shape == (1,)
    assert torch.allclose(batch.reference[0] * batch.scale[0], truth[0][1], atol=1e-3 * UNIT)


def test_the_scale_is_not_told_by_what_was_not_measured(folder: Path, tmp_path: Path) -> None:
    data = MRIData(str(folder / "many.h5"), slices="0", sampling=SAMPLING)
    batch = cases(data)[0]
    with h5py.File(folder / "many.h5") as file:
        kspace = file["kspace"][()]
    changed = np.where(batch.mask[0].numpy(), kspace, 100 * kspace)
    write_fastmri(tmp_path / "many.h5", torch.view_as_real(torch.from_numpy(changed)))
    other = cases(MRIData(str(tmp_path / "many.h5"), slices="0", sampling=SAMPLING))[0]
    for name in ("measurement", "noise_std", "maps", "mask"):
        assert torch.equal(getattr(batch, name), getattr(other, name))
    assert batch.scale == other.scale and not torch.equal(batch.reference, other.reference)


def test_a_scanner_s_own_mask_holds_and_leaves_no_reference(folder: Path) -> None:
    data = MRIData(str(folder / "scanned.h5"), sampling=RandomLines(4, 0.1), maps=LowResolutionMaps())
    with pytest.warns(UserWarning, match=r"scanned\.h5 is undersampled .*acceleration 2\.0.*sampling is not applied"):
        batch = cases(data)[0]
    with h5py.File(folder / "scanned.h5") as file:
        assert torch.equal(batch.mask[0], torch.from_numpy(file["mask"][()]).expand(SIZE, SIZE))
    assert batch.reference is None and batch.geometry["matrix"] == (SIZE, SIZE - 8)


def test_measured_noise_is_estimated_unless_the_file_states_it(truth: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    images, maps = truth
    kspace = torch.stack([image_kspace(image, maps) for image in images[:2]])
    level = 0.1 * UNIT  # the sharp edges of so coarse an image alone give 0.03
    path = tmp_path / "many.h5"
    write_fastmri(path, kspace + level * torch.randn(kspace.shape, generator=torch.Generator().manual_seed(1)))
    batch = cases(MRIData(str(path), sampling=SAMPLING, batch_size=2))[0]
    assert batch.noise_std.shape == (2, COILS, 1, 1, 1)
    estimate = batch.noise_std[:, :, 0, 0, 0] * torch.tensor(batch.scale)[:, None]
    assert torch.allclose(estimate, torch.tensor(level), rtol=0.15)
    whitened, y, std = CartesianMRI(SIZE).bind(batch).whiten(batch.measurement)
    assert torch.equal(std, batch.noise_std.amin((1, 2, 3, 4))) and y.shape == batch.measurement.shape
    assert whitened.norm() == 1

    assert cases(MRIData(str(path), sampling=SAMPLING, estimate_noise=False))[0].noise_std is None
    with h5py.File(path, "r+") as file:
        file.attrs["noise_std"] = 5e-3 * UNIT
    for estimate_too in (True, False):
        stated = cases(MRIData(str(path), sampling=SAMPLING, estimate_noise=estimate_too))[0]
        assert stated.noise_std.shape == (1,)
        assert float(stated.noise_std) * stated.scale[0] == pytest.approx(5e-3 * UNIT, rel=1e-5)


def noisy_scan(path: Path, mixing: Tensor, maps: Tensor, level: float) -> Path:
    """A file that states the covariance of its coils' noise, `level^2 mixing mixing^H` a real component."""
    white = level * torch.randn(COILS, SIZE, SIZE, 2, generator=torch.Generator().manual_seed(5))
    noise = torch.einsum("cd,dhw->chw", mixing, pairs_to_complex(white))
    clean = pairs_to_complex(image_kspace(random_phase(head(), make_generator(0, "phase")), maps))
    with h5py.File(path, "w") as file:
        file["kspace"] = (clean + noise).numpy()[None]
        file["noise_covariance"] = (level**2 * mixing @ mixing.mH).numpy()
    return path


def test_a_stated_maximum_is_that_of_coils_as_they_were(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "many.h5", tmp_path / "many.h5")
    with h5py.File(tmp_path / "many.h5", "r+") as file:
        file["noise_covariance"] = np.diag(1e-9 * (1.0 + np.arange(COILS)))
        largest = float(file.attrs["max"])
    for on, expected in ((False, pytest.approx(largest)), (True, None)):  # those of mixed coils have another
        assert whole_case(MRIData(str(tmp_path / "many.h5"), sampling=SAMPLING, prewhiten=on)).maximum == expected


def whole_case(data: MRIData) -> Case:
    """Returns the first case of the first file."""
    data.setup()
    assert data._first is not None
    return data._first


def test_coils_whose_noise_is_known_are_whitened(truth: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    mixing = torch.eye(COILS, dtype=torch.complex64)
    mixing[1, 0], mixing[2, 2], mixing[3, 1] = 0.9j, 3.0, 0.7
    path = noisy_scan(tmp_path / "a.h5", mixing, truth[1], 0.2 * UNIT)
    case, raw = (whole_case(MRIData(str(path), sampling=SAMPLING, prewhiten=on)) for on in (True, False))
    std = float(case.noise_std) * case.scale
    energy, own = (float(found.measurement.norm()) * found.scale for found in (case, raw))
    assert energy == pytest.approx(own, rel=0.1), "in the file's own units"
    far = (case.mask != 0) & (radii(SIZE, SIZE) > 0.95)
    seen = noise_covariance(case.measurement[:, far] * case.scale / std)
    other = noise_covariance(raw.measurement[:, far] * raw.scale / std)
    identity = torch.view_as_real(torch.eye(COILS, dtype=torch.complex64))
    assert float((seen - identity).abs().max()) < 0.45 < 1 < float((other - identity).abs().max())
    assert raw.noise_std.numel() == COILS, "estimated coil by coil"
    fainter = noisy_scan(tmp_path / "b.h5", mixing, 0.1 * truth[1], 0.2 * UNIT)
    other_std = whole_case(MRIData(str(fainter), sampling=SAMPLING))
    assert float(other_std.noise_std) * other_std.scale == pytest.approx(std), "whatever the coils see"
    quiet = noisy_scan(tmp_path / "c.h5", mixing, truth[1], 0.02 * UNIT)
    for on in (True, False):  # judged in units of their own, the whitened one by the whitened whole
        found = whole_case(MRIData(str(quiet), sampling=SAMPLING, prewhiten=on))
        image = CartesianMRI(SIZE, maps=found.maps).adjoint(found.measurement[None])[0]
        assert float((image - found.reference).norm() / found.reference.norm()) < 0.2


def test_where_maps_fail_the_reference_does_not(folder: Path) -> None:
    class Half(LowResolutionMaps):
        """Fails in the left half where a part was measured."""

        def __call__(self, kspace: Tensor, mask: Tensor | None = None) -> Tensor:
            maps = super().__call__(kspace, mask)
            if bool((kspace == 0).any()):
                maps[:, :, : SIZE // 2] = 0
            return maps

    path = str(folder / "many.h5")
    found, sound = (whole_case(MRIData(path, sampling=SAMPLING, maps=m)) for m in (Half(), LowResolutionMaps()))
    one, other = (case.scale * case.reference for case in (found, sound))
    assert not found.maps[:, :, : SIZE // 2].any()
    torch.testing.assert_close(one.norm(dim=0), other.norm(dim=0))  # magnitudes: what is missed counts
    right = (..., slice(SIZE // 2, None))
    torch.testing.assert_close(one[right], other[right])  # and its phase is the image's


def test_maps_that_are_zero_within_the_image_are_told(folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    path = str(folder / "many.h5")
    whole_case(MRIData(path, sampling=SAMPLING, maps=LowResolutionMaps(crop=0.05)))
    assert not [w for w in recwarn if "energy of the calibration" in str(w.message)]
    with pytest.warns(UserWarning, match=r"LowResolutionMaps are zero where \d+% of the energy"):
        whole_case(MRIData(path, sampling=SAMPLING, maps=LowResolutionMaps(crop=0.7)))


@pytest.mark.parametrize(
    ("covariance", "message"),
    [
        (np.eye(COILS + 1), r"shape \(5, 5\), expected a finite Hermitian matrix \(4, 4\)"),
        (np.triu(np.ones((COILS, COILS))), "expected a finite Hermitian"),
        (np.full((COILS, COILS), np.nan), "expected a finite Hermitian"),
        (np.ones((COILS, COILS)), "not positive definite"),
    ],
)
def test_a_covariance_that_is_none_is_named(
    covariance: np.ndarray, message: str, truth: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    path = noisy_scan(tmp_path / "a.h5", torch.eye(COILS, dtype=torch.complex64), truth[1], 0.01 * UNIT)
    with h5py.File(path, "r+") as file:
        del file["noise_covariance"]
        file["noise_covariance"] = covariance
    with pytest.raises(InputError, match=message):
        MRIData(str(path), sampling=SAMPLING).setup()


def test_without_sampling_everything_is_measured(folder: Path) -> None:
    batch = cases(MRIData(str(folder / "many.h5"), slices="0"))[0]
    assert batch.mask.all() and batch.reference is not None


def test_a_case_is_the_same_alone_in_a_batch_and_in_any_order(folder: Path, volumes: Path) -> None:
    for path in (folder / "many.h5", volumes / "a.h5"):
        settings = {"size": SIZE, "sampling": PolynomialSampling(3.0, 12), "num_coils": 2, "maps": ESPIRiT(4)}
        together = cases(MRIData(str(path), slices="0,1,2", batch_size=3, **settings))[0]
        alone = cases(MRIData(str(path), slices="2,1", **settings))[1]
        for name in ("reference", "measurement", "noise_std", "maps", "mask"):
            one, other = getattr(together, name), getattr(alone, name)
            assert (one is None and other is None) or torch.equal(one[1:2], other), name
        assert together.scale[1] == alone.scale[0]
        masks = together.mask
        assert not torch.equal(masks[0], masks[1])  # each its own
        other = cases(MRIData(str(path), slices="1", seed=1, **settings))[0]
        assert not torch.equal(other.mask, alone.mask)


def test_a_magnitude_volume_gets_phase_coils_and_a_scale_of_its_measurement(volumes: Path) -> None:
    data = MRIData(str(volumes / "a.h5"), size=SIZE, sampling=SAMPLING, num_coils=3)
    batch = cases(data)[1]
    assert batch.measurement is None and batch.maps.shape == (1, 3, SIZE, SIZE, 2)
    assert torch.allclose(batch.maps.square().sum((1, -1)), torch.ones(1, SIZE, SIZE), atol=1e-5)
    with h5py.File(volumes / "a.h5") as file:
        stored = torch.from_numpy(file["data"][1]).float()
    assert torch.allclose(magnitude(batch.reference)[0, 0] * batch.scale[0], fit(stored, SIZE), rtol=1e-4, atol=0.1)
    phase = torch.atan2(batch.reference[0, 1], batch.reference[0, 0])[stored.shape[0] // 2]
    assert phase[magnitude(batch.reference)[0, 0, stored.shape[0] // 2] > 0.1].std() > 0.01
    y = CartesianMRI(SIZE).bind(batch)(batch.reference)
    assert measured_scale(y[0], batch.mask[0], batch.maps[0]) == pytest.approx(1.0, rel=1e-3)


def test_slices_of_air_are_cases_too(volumes: Path) -> None:
    batch = cases(MRIData(str(volumes / "a.h5"), slices="2,3", size=SIZE, sampling=SAMPLING, num_coils=1))[1]
    assert batch.scale == [1.0] and not batch.reference.any()


def test_nifti_volumes_are_magnitudes(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    values = torch.stack([head(i, 40) for i in range(2)]) / UNIT
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])  # rows and columns as stored
    nibabel.save(nibabel.Nifti1Image(values.permute(2, 1, 0).numpy(), affine), tmp_path / "a.nii.gz")
    batch = cases(MRIData(str(tmp_path), slices="1", size=SIZE, sampling=SAMPLING, num_coils=2))[0]
    image = magnitude(batch.reference)[0, 0] * batch.scale[0]
    assert torch.allclose(image, fit(values[1], SIZE), atol=1e-3)


@pytest.mark.parametrize(("shape", "size"), [((5, 8), 6), ((9, 4), 7), ((6, 6), 6), ((3, 3), 8)])
def test_images_are_cropped_and_padded_about_their_centre(shape: tuple[int, int], size: int) -> None:
    image = torch.zeros(shape)
    image[shape[0] // 2, shape[1] // 2] = 1
    out = fit(image + 0.1, size)
    assert out.shape == (size, size) and out.argmax() == (size // 2) * size + size // 2


def test_a_folder_holds_kspace_and_volumes(folder: Path, volumes: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((1, 4, 4), np.complex64))
    assert [path.name for path in find_mri([tmp_path])] == ["x.npy"]
    assert {path.name for path in find_mri([folder, volumes])} == {"many.h5", "one.h5", "scanned.h5", "a.h5", "b.h5"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no readable volume"):
        find_mri([tmp_path / "empty"])


def test_kspace_without_its_centre_is_refused_before_anything_is_done(folder: Path, tmp_path: Path) -> None:
    with h5py.File(folder / "many.h5") as file:
        kspace = torch.view_as_real(torch.from_numpy(file["kspace"][()]))
    mask = torch.ones(SIZE)
    mask[SIZE // 2 - 2 : SIZE // 2 + 3] = 0
    for name, y in (("many", kspace), ("one", kspace[:, :1])):
        write_fastmri(tmp_path / f"{name}.h5", y, mask=mask)
        with pytest.raises(InputError, match=rf"{name}.h5, slice 0: .*\(ACS\)"):
            MRIData(str(tmp_path / f"{name}.h5")).setup()


def test_two_files_of_one_name_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "many.h5").write_bytes((folder / "many.h5").read_bytes())
    with pytest.raises(InputError, match="the same name"):
        MRIData([str(folder / "many.h5"), str(tmp_path / "many.h5")]).setup()


def test_rounding_in_a_slice_of_air_is_no_phase(tmp_path: Path) -> None:
    """What resampling leaves below zero is small beside the volume, not beside its own slice."""
    values = torch.stack([torch.zeros(40, 40), head(0, 40) / UNIT * 1000]).numpy()
    values[0, 3, 3] = -1e-6
    with h5py.File(tmp_path / "head.h5", "w") as file:
        file["data"] = values
    assert not magnitude_of(open_magnitudes(tmp_path / "head.h5"), 0).any()
    MRIData(str(tmp_path / "head.h5"), size=SIZE, sampling=SAMPLING).setup()
    with pytest.raises(InputError, match=r"no signal in .*head\.h5: slice 0 is zero throughout"):
        MRIData(str(tmp_path / "head.h5"), slices="0", size=SIZE, sampling=SAMPLING).setup()


def test_no_patient_of_mri_both_trains_and_validates(tmp_path: Path) -> None:
    for name, patient in {"a": "P1", "b": "P2", "c": "P2"}.items():
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["data"] = (head(0, 40)[None] / UNIT * 1000).numpy()
            file.attrs["patient"] = patient
    data = MRITraining(str(tmp_path), size=SIZE, **SMALL)
    data.load()
    assert data.train_names == ["a.h5"]
    with pytest.raises(InputError, match=r"patients of b\.h5, too"):
        MRITraining(str(tmp_path), size=SIZE, **SMALL, validation=["c.h5"]).load()
    (tmp_path / "a.h5").unlink()
    with pytest.warns(UserWarning, match="Training and validating on one patient"):
        MRITraining(str(tmp_path), size=SIZE, **SMALL).load()


def test_a_ct_volume_is_no_magnitude(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "ct.h5", "w") as file:
        file["data"] = np.full((1, 40, 40), -1000, np.int16)
    volume = open_magnitudes(tmp_path / "ct.h5")
    with pytest.raises(InputError, match="expected magnitudes"):
        magnitude_of(volume, 0)


def test_training_slices_are_magnitudes_with_smooth_phases(volumes: Path) -> None:
    data = MRITraining(str(volumes), size=SIZE, num_phases=2, **SMALL)
    train, validation, encode = data.load()
    assert train.shape == (6, 2, SIZE, SIZE) and validation.shape == (6, 2, SIZE, SIZE)  # slices of air are left out
    assert data.train_names == ["a.h5"]
    x = encode(train)
    assert x.dtype == torch.float32 and torch.allclose(magnitude(x[0]), magnitude(x[1]), atol=2e-2)
    assert (x[0] - x[1]).abs().max() > 0.1  # phases of their own
    for image in x:
        assert calibration_scale(image_kspace(image), torch.ones(SIZE, SIZE)) == pytest.approx(1, rel=1e-2)
    again = MRITraining(str(volumes), size=SIZE, num_phases=2, **SMALL).load()[0]
    assert torch.equal(train, again)
    data.setup()
    patch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert patch.x.shape[1:] == (2, 8, 8) and patch.x.min() < 0
    assert data.measure_sigma_data() > 0.05


def test_measurements_are_on_the_scale_of_the_training_slices(volumes: Path) -> None:
    x = MRITraining(str(volumes), validation=["b.h5"], size=SIZE, num_phases=1, **SMALL).load()[0].float()
    for index in range(3):
        batch = cases(MRIData(str(volumes / "a.h5"), slices=str(index), size=SIZE, sampling=SAMPLING, num_coils=4))[0]
        ratio = magnitude(batch.reference)[0].norm() / magnitude(x[index]).norm()
        assert ratio == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"validation": ["c.h5"]}, "data.validation names"),
        ({"validation": ["a.h5", "b.h5"]}, "Nothing is left to train on"),
        ({"num_phases": 0}, "num_phases"),
    ],
)
def test_training_says_what_is_wrong(arguments: dict, message: str, volumes: Path) -> None:
    with pytest.raises(InputError, match=message):
        MRITraining(str(volumes), size=SIZE, **SMALL, **arguments).load()


def test_batches_carry_maps_masks_and_scales(folder: Path) -> None:
    data = MRIData(str(folder / "many.h5"), sampling=SAMPLING)
    data.setup()
    assert data._files is not None
    file, _ = data._files[0]
    batch = collate_cases([data.load(file, 0), data.load(file, 2)])
    assert batch.maps is not None and batch.mask is not None and len(batch.scale) == 2
    moved = batch.to("meta")
    assert moved.maps is not None and moved.maps.device.type == moved.mask.device.type == "meta"
