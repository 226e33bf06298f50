"""K-space files: what we write is what fastmri reads, every format gives the same arrays, and bad files say why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from fastmri.data import SliceDataset
from torch import Tensor

from invrecon.data.fastmri_files import fastmri_header, write_fastmri
from invrecon.data.kspace import (
    calibration_scale,
    crop,
    crop_readout,
    estimate_noise,
    image_kspace,
    is_block,
    measured_scale,
)
from invrecon.data.kspace_files import is_kspace, open_kspace
from invrecon.data.mri import random_phase
from invrecon.data.phantoms import ellipse_phantom
from invrecon.errors import InputError
from invrecon.operators.coils import simulated_maps
from invrecon.operators.fourier import complex_to_pairs, fft2c, ifft2c, pairs_to_complex
from invrecon.operators.sampling import EquispacedLines, PolynomialSampling
from invrecon.rng import make_generator
from tests.data.kspace import COILS, H, N, W, write_ismrmrd


@pytest.mark.parametrize("coils", [1, COILS])
@pytest.mark.parametrize("matrix", [None, (16, 10)])
def test_fastmri_reads_what_we_write_to_the_same_arrays_as_we_do(
    tmp_path: Path, kspace: Tensor, coils: int, matrix: tuple[int, int] | None
) -> None:
    path = tmp_path / "folder" / "file.h5"
    write_fastmri(path, kspace[:, :coils], matrix=matrix, patient="p", acquisition="AXT2")
    theirs = SliceDataset(path.parent, "multicoil" if coils > 1 else "singlecoil")
    ours = open_kspace(path)
    assert len(theirs) == len(ours) == N and ours.patient == "p"
    for index in range(N):
        values, mask, target, attrs, name, number = theirs[index]
        y, kept = ours.read(index)
        assert mask is None and kept.all() and (name, number) == ("file.h5", index)
        assert np.array_equal(values if coils > 1 else values[None], pairs_to_complex(y).numpy())
        assert torch.equal(y, kspace[index, :coils])
        images = crop(ifft2c(pairs_to_complex(y)), matrix or (H, W))
        assert np.allclose(target, images.abs().square().sum(0).sqrt(), rtol=1e-5)
        assert attrs["recon_size"][:2] == ours.matrix == (matrix or (H, W))
        assert attrs["encoding_size"] == (H, W, 1) and (attrs["padding_left"], attrs["padding_right"]) == (0, W)
        assert attrs["acquisition"] == "AXT2"
    assert ours.metadata["max"] == pytest.approx(max(float(theirs[i][2].max()) for i in range(N)))
    assert ours.voxel_mm == (5.0, 1.0, 1.0)


def test_a_file_of_the_test_set_has_a_mask_and_no_reference(tmp_path: Path, kspace: Tensor) -> None:
    mask = torch.arange(W) % 2 == 0
    write_fastmri(tmp_path / "a.h5", kspace, mask=mask)
    _, theirs, target, *_ = SliceDataset(tmp_path, "multicoil")[1]
    file = open_kspace(tmp_path / "a.h5")
    y, kept = file.read(1)
    assert target is None and file.states_mask
    assert torch.equal(kept, mask.expand(H, W)) and np.array_equal(theirs, mask.numpy())
    assert torch.equal(y, kspace[1] * mask[:, None])


def test_columns_that_pad_kspace_were_not_measured(tmp_path: Path, kspace: Tensor) -> None:
    kspace[..., :3, :] = 0
    write_fastmri(tmp_path / "a.h5", kspace)
    _, kept = open_kspace(tmp_path / "a.h5").read(0)
    assert not kept[:, :3].any() and kept[:, 3:].all() and is_block(kept)
    kept[:, 7] = False
    assert not is_block(kept)


@pytest.mark.parametrize(("num", "rows"), [(16, 8), (16, 9), (15, 7), (15, 10)])
def test_readout_oversampling_is_removed_exactly(num: int, rows: int) -> None:
    z = torch.randn(2, num, 6, dtype=torch.complex128)
    assert torch.allclose(ifft2c(crop_readout(z, rows)), crop(ifft2c(z), (rows, 6)), atol=1e-12)


def test_an_oversampled_file_gives_the_image_that_was_asked_for(tmp_path: Path, kspace: Tensor) -> None:
    write_fastmri(tmp_path / "a.h5", kspace, matrix=(8, 10))
    file = open_kspace(tmp_path / "a.h5")
    y, kept = file.read(0)
    assert file.shape == (N, COILS, 8, W) and file.matrix == (8, 10) and kept.shape == (8, W)
    image, whole = (ifft2c(pairs_to_complex(k)) for k in (y, kspace[0]))
    assert torch.allclose(crop(image, (8, 10)), crop(whole, (8, 10)), atol=1e-5)


def write_cfl(path: Path, kspace: Tensor, dims: list[int] | None = None) -> Path:
    """BART's own order: readout, phase encoding, 1, coils, ..., slices in place 13; the first runs fastest."""
    values = pairs_to_complex(kspace).permute(2, 3, 1, 0).numpy()
    dims = dims or [kspace.shape[2], kspace.shape[3], 1, kspace.shape[1], *[1] * 9, kspace.shape[0], 1, 1]
    path.with_suffix(".hdr").write_text("# Dimensions\n" + " ".join(map(str, dims)) + "\n")
    path.write_bytes(values.astype(np.complex64).tobytes(order="F"))
    return path


def write_npy(path: Path, kspace: Tensor) -> Path:
    np.save(path, pairs_to_complex(kspace).numpy())
    return path


def write_hdf5(path: Path, kspace: Tensor) -> Path:
    with h5py.File(path, "w") as file:
        file["data"] = pairs_to_complex(kspace).numpy()
    return path


def write_ours(path: Path, kspace: Tensor) -> Path:
    write_fastmri(path, kspace)
    return path


WRITERS = {"a.npy": write_npy, "a.h5": write_hdf5, "a.cfl": write_cfl, "b.mrd": write_ismrmrd, "c.h5": write_ours}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_arrays(name: str, tmp_path: Path, kspace: Tensor) -> None:
    path = WRITERS[name](tmp_path / name, kspace)
    file = open_kspace(path)
    assert is_kspace(path) and file.shape == (N, COILS, H, W) and file.stem == name[0]
    for index in range(N):
        y, kept = file.read(index)
        assert torch.equal(y, kspace[index]) and kept.all()
    with pytest.raises(InputError, match="has no slice 2"):
        file.read(2)


def test_a_single_slice_needs_no_axis_of_slices(tmp_path: Path, kspace: Tensor) -> None:
    np.save(tmp_path / "a.npy", pairs_to_complex(kspace[0]).numpy())
    assert torch.equal(open_kspace(tmp_path / "a.npy").read(0)[0], kspace[0])
    dims = [1, H, W, COILS]  # as BART keeps a slice of a volume, its readout transformed
    write_cfl(tmp_path / "b.cfl", kspace[:1], dims)
    assert torch.equal(open_kspace(tmp_path / "b.hdr").read(0)[0], kspace[0])


def test_the_scale_is_that_of_the_calibration_region_alone() -> None:
    image = torch.zeros(2, 32, 32)
    image[0] = 3.0  # constant: all of its k-space is the centre
    y, mask = image_kspace(image), torch.zeros(32, 32, dtype=torch.bool)
    mask[:, 12:20] = True
    assert calibration_scale(y, mask) == pytest.approx(3.0, rel=1e-5)
    other = y.clone()
    other[:, :, :12] = 1e3 * torch.randn(1, 32, 12, 2)  # outside the region: of no account
    other[:, :3] = 1e3
    assert calibration_scale(other, mask) == pytest.approx(3.0, rel=1e-5)
    assert calibration_scale(5 * y, mask) == pytest.approx(15.0, rel=1e-5)
    with pytest.raises(InputError, match=r"centre of k-space \(ACS\)"):
        calibration_scale(y, ~mask)


@pytest.mark.parametrize("unit", [1e-25, 1e25])
def test_the_scale_is_found_in_any_unit(unit: float) -> None:
    """Squares of either unit are beyond float32."""
    image = random_phase(ellipse_phantom(32, make_generator(0, "phantom"))[0], make_generator(0, "phase"))
    y, mask = image_kspace(image), torch.ones(32, 32, dtype=torch.bool)
    mask[:, ::3] = False
    mask[:, 12:20] = True
    y = y * mask[..., None]
    assert measured_scale(unit * y, mask) == pytest.approx(unit * measured_scale(y, mask), rel=1e-3)


def test_image_kspace_is_the_forward_model() -> None:
    image, maps = torch.randn(2, 5, 6), torch.randn(3, 5, 6, 2)
    expected = fft2c(pairs_to_complex(maps) * torch.complex(image[0], image[1]))
    assert torch.allclose(image_kspace(image, maps), complex_to_pairs(expected), atol=1e-6)


def change(path: Path, action: Callable[[h5py.File], None]) -> None:
    with h5py.File(path, "r+") as file:
        action(file)


def replace_header(file: h5py.File, header: object) -> None:
    del file["ismrmrd_header"]
    file["ismrmrd_header"] = header


def replace_kspace(file: h5py.File, shape: tuple[int, ...], dtype: str = "c8") -> None:
    del file["kspace"]
    file["kspace"] = np.ones(shape, dtype)


def mask_of_width(width: int) -> Callable[[h5py.File], None]:
    return lambda file: file.create_dataset("mask", data=np.ones(width, bool)) and None


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (mask_of_width(W - 1), rf"mask of .* has shape \({W - 1},\), but its k-space has {W} columns"),
        (lambda f: replace_kspace(f, (N, 0, H, W)), "zero coils"),
        (lambda f: replace_kspace(f, (N, COILS, H, W), "f4"), "float32 .*expected complex"),
        (lambda f: replace_kspace(f, (N, COILS, H, W + 2)), rf"says that k-space has {H} x {W} .* has {H} x {W + 2}"),
        (lambda f: replace_header(f, b"<no xml"), "header of .* is not understood"),
        (lambda f: replace_header(f, b"<a/>"), "header of .* is not understood"),
        (lambda f: f.create_group("mask") and None, "'mask' of .* is a group"),
        (lambda f: replace_header(f, fastmri_header((H, W), (0, W), (5.0, 1.0, 1.0))), "have to be positive"),
        (lambda f: replace_header(f, fastmri_header((H, W), (H, W), (5.0, 0.0, 1.0))), "has to be positive"),
    ],
)
def test_a_bad_file_says_what_is_wrong(
    action: Callable[[h5py.File], None], message: str, tmp_path: Path, kspace: Tensor
) -> None:
    write_fastmri(tmp_path / "a.h5", kspace)
    change(tmp_path / "a.h5", action)
    with pytest.raises(InputError, match=message):
        open_kspace(tmp_path / "a.h5")


def test_samples_that_are_no_numbers_are_counted(tmp_path: Path, kspace: Tensor) -> None:
    kspace[1, 0, 2, 3, 0] = torch.nan
    np.save(tmp_path / "a.npy", pairs_to_complex(kspace).numpy())
    with pytest.raises(InputError, match=r"slice 1 in .* has 1 NaN or Inf samples"):
        open_kspace(tmp_path / "a.npy").read(1)
    open_kspace(tmp_path / "a.npy").read(0)


def test_empty_kspace_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((1, H, W), np.complex64))
    with pytest.raises(InputError, match="zero throughout"):
        open_kspace(tmp_path / "a.npy").read(0)


def test_a_truncated_file_is_refused(tmp_path: Path, kspace: Tensor) -> None:
    write_fastmri(tmp_path / "a.h5", kspace)
    whole = (tmp_path / "a.h5").read_bytes()
    (tmp_path / "a.h5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="truncated"):
        open_kspace(tmp_path / "a.h5")
    cfl = write_cfl(tmp_path / "b.cfl", kspace)
    cfl.write_bytes(cfl.read_bytes()[:-8])
    with pytest.raises(InputError, match="truncated"):
        open_kspace(cfl)
    np.save(tmp_path / "c.npy", np.ones((2, 3, 4)))
    with pytest.raises(InputError, match="expected complex"):
        open_kspace(tmp_path / "c.npy")
    (tmp_path / "c.npy").write_bytes(b"no")
    with pytest.raises(InputError, match="not a readable npy"):
        open_kspace(tmp_path / "c.npy")


def test_bart_dimensions_that_are_no_slices_are_refused(tmp_path: Path, kspace: Tensor) -> None:
    with pytest.raises(InputError, match="one plane of k-space"):
        open_kspace(write_cfl(tmp_path / "a.cfl", kspace, [H, W, N, COILS]))
    (tmp_path / "a.hdr").write_text("nothing")
    with pytest.raises(InputError, match="not a readable header"):
        open_kspace(tmp_path / "a.cfl")


def test_bart_headers_may_have_more_ones(tmp_path: Path, kspace: Tensor) -> None:
    dims = [H, W, 1, COILS, *[1] * 9, N, *[1] * 5]
    assert torch.equal(open_kspace(write_cfl(tmp_path / "a.cfl", kspace, dims)).read(1)[0], kspace[1])
    with pytest.raises(InputError, match="one plane of k-space"):
        open_kspace(write_cfl(tmp_path / "b.cfl", kspace, [H, W, 1, COILS, *[1] * 13, N]))


def test_many_coils_of_a_small_image_are_read_where_the_format_says_what_is_what(tmp_path: Path) -> None:
    kspace = torch.randn(1, 9, 8, 8, 2)
    write_fastmri(tmp_path / "a.h5", kspace)
    assert open_kspace(tmp_path / "a.h5").shape == (1, 9, 8, 8)
    with pytest.raises(InputError, match=r"9 coils of 8 x 8.*bring the axes"):
        open_kspace(write_npy(tmp_path / "a.npy", kspace))


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((N, 0, H, W, 2), {}, "expected"),
        ((N, H, W, 2), {}, "expected"),
        ((N, 1, H, W, 2), {"mask": torch.ones(3)}, "an entry a column"),
        ((N, 1, H, W, 2), {"matrix": (H + 1, W)}, "17 x 14 pixels"),
    ],
)
def test_what_cannot_be_written_is_refused(
    shape: tuple[int, ...], arguments: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        write_fastmri(tmp_path / "a.h5", torch.zeros(shape), **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sampled", ["all", "lines", "points"])
def test_the_noise_of_every_coil_is_found(sampled: str) -> None:
    size, levels = (160, 128), torch.tensor([1.0, 2.0, 3.5, 1.5])
    generator = make_generator(0, "noise")
    head = 0.3 + ellipse_phantom(160, generator)[0, :, 16:-16]
    clean = image_kspace(random_phase(head, generator), simulated_maps(4, size, generator))
    noisy = clean + 0.01 * levels[:, None, None, None] * torch.randn(clean.shape, generator=generator)
    mask = torch.ones(size, dtype=torch.bool)
    if sampled == "lines":
        mask = EquispacedLines(4, 0.08)(size, generator)
    elif sampled == "points":
        mask = PolynomialSampling(3.0, 16)(size, generator)
    estimate = estimate_noise(noisy * mask[..., None], mask)
    ratio = estimate / (0.01 * levels)
    assert ratio.min() > 0.9 and ratio.max() < (1.25 if sampled == "points" else 1.1)  # few points lie far out
    assert torch.allclose(estimate_noise(1e-4 * noisy, mask), 1e-4 * estimate_noise(noisy, mask))


def test_a_coil_without_signal_counts_as_the_noisiest() -> None:
    kspace = torch.randn(3, 40, 40, 2, generator=torch.Generator().manual_seed(0))
    kspace = kspace * torch.tensor([1.0, 0.0, 4.0])[:, None, None, None]
    estimate = estimate_noise(kspace, torch.ones(40, 40))
    assert estimate[1] == estimate[2] == pytest.approx(4, rel=0.1)


def test_what_was_not_measured_says_nothing_of_the_noise() -> None:
    kspace = torch.randn(2, 64, 64, 2, generator=torch.Generator().manual_seed(0))
    grid = (torch.arange(64) - 32) / 32
    kspace = kspace * (torch.hypot(grid[:, None], grid) < 1)[..., None]  # elliptical scanning: no corners
    assert torch.allclose(estimate_noise(kspace, torch.ones(64, 64)), torch.ones(2), rtol=0.1)


@pytest.mark.parametrize("stated", [2.0, [1.0, 2.0, 4.0]])
def test_noise_that_a_file_states_is_read(stated: Any, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "k.h5", "w") as file:
        file["kspace"] = np.ones((2, 3, 8, 8), np.complex64)
        file["kspace"].attrs["noise_std"] = stated
    assert torch.equal(open_kspace(tmp_path / "k.h5").noise_std, torch.tensor(stated))


@pytest.mark.parametrize("stated", [0.0, -1.0, [1.0, 2.0], "low", float("nan")])
def test_noise_that_is_none_is_refused(stated: Any, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "k.h5", "w") as file:
        file["kspace"] = np.ones((2, 3, 8, 8), np.complex64)
        file.attrs["noise_std"] = stated
    with pytest.raises(InputError, match=r"'noise_std' of .*k\.h5 is .*3 coils"):
        open_kspace(tmp_path / "k.h5")
