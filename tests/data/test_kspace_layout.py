"""K-space in another layout than ours is refused, and what a file did not measure is not taken for measured."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

from invrecon.data.fastmri_files import fastmri_header, write_fastmri
from invrecon.data.kspace import KSpace, calibration_scale, image_kspace, measured_scale
from invrecon.data.kspace_files import open_kspace
from invrecon.data.mri import random_phase
from invrecon.data.phantoms import ellipse_phantom
from invrecon.errors import InputError
from invrecon.operators.coils import simulated_maps
from invrecon.operators.fourier import complex_to_pairs, fft2c, ifft2c, pairs_to_complex
from invrecon.operators.noise import NoiseModel, RelativeGaussianNoise, SNRNoise
from invrecon.operators.sampling import EquispacedLines
from invrecon.rng import make_generator, make_generators
from tests.data.test_kspace import write_ismrmrd

SIZE, COILS = 32, 3


@pytest.fixture
def kspace() -> Tensor:
    """One slice, complex `(coils, H, W)`."""
    image = ellipse_phantom(SIZE, make_generator(0, "phantom"), disk_diameter=0.8)[0]
    maps = pairs_to_complex(simulated_maps(COILS, (SIZE, SIZE), make_generator(0, "coils")))
    return fft2c(maps * image)


def refuse(path: Path, match: str) -> None:
    with pytest.raises(InputError, match=match):
        open_kspace(path).read(0)


def test_axes_in_another_order_are_refused(tmp_path: Path, kspace: Tensor) -> None:
    np.save(tmp_path / "last.npy", kspace.permute(1, 2, 0).numpy())
    refuse(tmp_path / "last.npy", r"32 coils of 32 x 3\. Expected.*order")


def test_kspace_off_its_centre_is_refused(tmp_path: Path, kspace: Tensor) -> None:
    np.save(tmp_path / "shifted.npy", torch.fft.ifftshift(kspace, dim=(1, 2)).numpy())
    refuse(tmp_path / "shifted.npy", "strongest sample.*near the middle.*fftshift")


def test_a_slice_of_noise_has_no_centre_and_is_read(tmp_path: Path) -> None:
    noise = torch.randn(COILS, SIZE, SIZE, 2, generator=make_generator(0, "noise"))
    noise[:, 0, 0] *= 1.5
    np.save(tmp_path / "noise.npy", pairs_to_complex(noise).numpy())
    assert torch.equal(open_kspace(tmp_path / "noise.npy").read(0)[0], noise)


def test_images_are_no_kspace(tmp_path: Path, kspace: Tensor) -> None:
    images = ifft2c(kspace).to(torch.complex64)
    np.save(tmp_path / "images.npy", images.numpy())
    with h5py.File(tmp_path / "images.h5", "w") as file:
        file["data"] = images[None].numpy()
    for name in ("images.npy", "images.h5"):
        refuse(tmp_path / name, "no peak as k-space has at its centre: an image")


@pytest.mark.parametrize("name", ["plain", "fastmri"])
@pytest.mark.parametrize("coils", [1, COILS])
def test_images_that_are_called_kspace_are_told(name: str, coils: int, tmp_path: Path, kspace: Tensor) -> None:
    noise = 0.01 * pairs_to_complex(torch.randn(*kspace.shape, 2, generator=make_generator(0, "noise")))
    images, own = ((z[:coils] + noise[:coils]).to(torch.complex64)[None] for z in (ifft2c(kspace), kspace))
    lines = EquispacedLines(2, 0.2)((SIZE, SIZE), make_generator(0, "mask"))
    contents = {"images": images, "kspace": own, "noise": noise[None, :coils], "lines": own * lines}
    for label, values in contents.items():
        path = tmp_path / f"{label}.h5"
        if name == "fastmri":
            write_fastmri(path, complex_to_pairs(values))
        else:
            with h5py.File(path, "w") as file:
                file["kspace"] = values.numpy()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            file = open_kspace(path)
            file.read(0), file.read(0)
        assert [str(path) in str(w.message) for w in told] == ([True] if label == "images" else []), label


@pytest.mark.parametrize("what", ["mask", "group", "one coil"])
def test_what_a_file_without_a_header_cannot_say_is_refused(tmp_path: Path, kspace: Tensor, what: str) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        if what == "mask":
            file["kspace"], file["mask"] = kspace[None].numpy(), np.ones(SIZE)
        elif what == "one coil":
            file["kspace"] = kspace.numpy()
            file["reconstruction_esc"] = np.ones((COILS, SIZE, SIZE), np.float32)
        else:
            file.create_group("kspace")["a"] = kspace.numpy()
    with pytest.raises(InputError, match=r"states a mask|is a group|no dataset|target of one coil"):
        open_kspace(tmp_path / "a.h5").read(0)


def test_rows_that_were_not_measured_are_none_without_oversampling_either() -> None:
    """Of 32 rows the last 8 are missing; every other of them is left, and so the last 4 of 16."""

    class Oversampled(KSpace):
        def __init__(self) -> None:
            self.path = Path("a")
            self._finish((1, 1, SIZE, SIZE))
            self.shape = (1, 1, SIZE // 2, SIZE)

        def _read(self, index: int) -> tuple[np.ndarray, None]:
            values = np.ones((1, SIZE, SIZE), np.complex64)
            values[:, SIZE - 8 :] = 0
            return values, None

    kept = Oversampled().read(0)[1]
    assert kept[:12].all() and not kept[12:].any()


def test_samples_that_an_ismrmrd_readout_lacks_are_not_measured(tmp_path: Path, kspace: Tensor) -> None:
    path = write_ismrmrd(tmp_path / "a.h5", complex_to_pairs(kspace)[None])
    with h5py.File(path, "a") as file:
        data = file["dataset/data"][()]
        for n in range(1, len(data)):  # partial echo: the first 10 samples
            values = data[n]["data"].reshape(COILS, SIZE, 2)[:, 10:]
            data[n]["data"] = np.ascontiguousarray(values).reshape(-1)
            data[n]["head"]["number_of_samples"], data[n]["head"]["center_sample"] = SIZE - 10, SIZE // 2 - 10
        file["dataset/data"][...] = data
    y, kept = open_kspace(path).read(0)
    assert kept[10:].all() and not kept[:10].any()
    assert torch.allclose(pairs_to_complex(y)[:, 10:], kspace[:, 10:].to(torch.complex64))


def test_calibration_readouts_only_fill_what_was_not_imaged(tmp_path: Path, kspace: Tensor) -> None:
    """They may be of another contrast: here, of the opposite sign."""
    path = write_ismrmrd(tmp_path / "a.h5", complex_to_pairs(kspace)[None])
    with h5py.File(path, "a") as file:
        data = file["dataset/data"][()]
        extra = data[1 + SIZE // 2 - 4 : 1 + SIZE // 2 + 4].copy()
        imaged = np.delete(data, [1 + SIZE // 2 - 3])  # of one line there is the calibration alone
        for n in range(len(extra)):
            extra[n]["head"]["flags"] |= 1 << 19
            extra[n]["data"] = -extra[n]["data"]
        del file["dataset/data"]
        file["dataset/data"] = np.concatenate([imaged, extra])
    y, kept = open_kspace(path).read(0)
    expected = kspace.to(torch.complex64)
    expected[:, :, SIZE // 2 - 3] *= -1
    assert kept.all() and torch.allclose(pairs_to_complex(y), expected)


def test_a_readout_of_another_length_than_it_says_is_refused(tmp_path: Path, kspace: Tensor) -> None:
    path = write_ismrmrd(tmp_path / "a.h5", complex_to_pairs(kspace)[None])
    with h5py.File(path, "a") as file:
        data = file["dataset/data"][()]
        data[5]["data"] = data[5]["data"].reshape(COILS, SIZE, 2)[:, :-4].reshape(-1).copy()
        file["dataset/data"][...] = data
    refuse(path, rf"Readout 5 of .* has {COILS * (SIZE - 4)} samples, but its header says {COILS} coils of {SIZE}")


def test_readouts_acquired_backwards_are_refused(tmp_path: Path, kspace: Tensor) -> None:
    path = write_ismrmrd(tmp_path / "a.h5", complex_to_pairs(kspace)[None])
    with h5py.File(path, "a") as file:
        data = file["dataset/data"][()]
        data[3]["head"]["flags"] |= 1 << 21
        file["dataset/data"][...] = data
    refuse(path, "backwards")


@pytest.mark.parametrize("noise", [SNRNoise(30), RelativeGaussianNoise(0.01)])
def test_plain_air_is_measured_too(noise: NoiseModel) -> None:
    y = torch.stack([torch.zeros(8, 8), torch.rand(8, 8)])
    noisy, std = noise.sample(y, make_generators(0, ["air", "body"]))
    assert not noisy[0].any() and 0 < std[0] < 1e-3 * std[1]


@pytest.mark.parametrize(
    ("columns", "undersampled"),
    [
        (range(SIZE), False),
        (range(1, SIZE - 1), False),
        (range(2, SIZE - 1), False),
        (range(5, SIZE), True),
        ((5, 6, 7, 9), True),
    ],
)
def test_columns_that_only_pad_ismrmrd_were_not_left_out(
    tmp_path: Path, kspace: Tensor, columns: Sequence[int], undersampled: bool
) -> None:
    """A scan without gaps about its centre is complete; half of k-space is not."""
    patient = b"<subjectInformation><patientID>P7</patientID></subjectInformation>"
    header = fastmri_header((SIZE, SIZE), (SIZE, SIZE), (5.0, 1.0, 1.0))
    end = header.rindex(b"<encoding>")
    path = write_ismrmrd(
        tmp_path / "a.h5", complex_to_pairs(kspace)[None], columns, header[:end] + patient + header[end:]
    )
    file = open_kspace(path)
    assert file.states_mask == undersampled and file.patient == "P7"
    assert torch.equal(file.read(0)[1].any(0).nonzero()[:, 0], torch.tensor(list(columns)))


def test_the_scale_of_an_image_hardly_depends_on_the_mask() -> None:
    size = (128, 128)
    image = random_phase(ellipse_phantom(128, make_generator(3, "head"))[0], make_generator(0, "phase"))
    maps = simulated_maps(8, size, make_generator(0, "coils"))
    full, everything = image_kspace(image, maps), torch.ones(size, dtype=torch.bool)
    expected = calibration_scale(full, everything)
    assert measured_scale(full, everything, maps) == expected
    for acceleration, share in ((4, 0.16), (4, 0.08)):  # 20 and 10 lines of 24
        mask = EquispacedLines(acceleration, share)(size, make_generator(0, "mask"))
        y = full * mask[..., None]
        found = measured_scale(y, mask, maps)
        assert found == pytest.approx(expected, rel=0.06)
        assert abs(found - expected) < 0.5 * abs(calibration_scale(y, mask) - expected)
        assert measured_scale(5 * y, mask, maps) == pytest.approx(5 * found, rel=1e-4)
    with pytest.raises(InputError, match=r"centre of k-space \(ACS\)"):
        measured_scale(full, torch.arange(128).expand(size) < 40, maps)
