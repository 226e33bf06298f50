"""Whether a scan is complete: single zeros and an elliptical shutter leave it so, missing lines and sides do not."""

from __future__ import annotations

import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

from invrecon.data.cases import Case
from invrecon.data.fastmri_files import write_fastmri
from invrecon.data.kspace import fill_zeros, image_kspace, is_full, one_sided
from invrecon.data.kspace_files import open_kspace
from invrecon.data.mri import MRIData, random_phase
from invrecon.data.phantoms import ellipse_phantom
from invrecon.errors import InputError
from invrecon.operators.coils import LowResolutionMaps, simulated_maps
from invrecon.operators.fourier import complex_to_pairs, pairs_to_complex
from invrecon.operators.sampling import (
    EquispacedLines,
    GaussianSampling,
    MagicLines,
    PoissonDiscSampling,
    PolynomialSampling,
    RandomLines,
    TwoPercentSampling,
    radii,
)
from invrecon.rng import make_generator

SIZE, COILS = 48, 3
SAMPLING = EquispacedLines(2, 0.3)


@pytest.fixture
def kspace() -> Tensor:
    """One noisy slice, `(1, COILS, SIZE, SIZE, 2)`."""
    image = random_phase(0.2 + ellipse_phantom(SIZE, make_generator(0, "head"))[0], make_generator(0, "phase"))
    clean = image_kspace(image, simulated_maps(COILS, (SIZE, SIZE), make_generator(0, "coils")))[None]
    return clean + 1e-3 * torch.randn(clean.shape, generator=make_generator(0, "noise"))


def save(path: Path, kspace: Tensor) -> Path:
    """A file of fastMRI, npy, or plain HDF5, by its name."""
    if path.suffix == ".npy":
        np.save(path, pairs_to_complex(kspace).numpy())
    elif path.stem == "fastmri":
        write_fastmri(path, kspace)
    else:
        with h5py.File(path, "w") as file:
            file["kspace"] = pairs_to_complex(kspace).numpy()
    return path


def first_case(path: Path, **settings: object) -> Case:
    data = MRIData(str(path), maps=LowResolutionMaps(), **settings)  # type: ignore[arg-type]
    data.setup()
    assert data._first is not None
    return data._first


FORMATS = ("a.npy", "plain.h5", "fastmri.h5")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("place", [(0, 0), (0, 20), (20, 47), (31, 9)])
def test_one_zero_leaves_a_scan_complete(name: str, place: tuple[int, int], tmp_path: Path, kspace: Tensor) -> None:
    kspace[:, :, place[0], place[1]] = 0
    path = save(tmp_path / name, kspace)
    assert open_kspace(path).read(0)[1].all(), "a zero was measured like any other sample"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case = first_case(path, sampling=SAMPLING)
    assert case.reference is not None and case.mask is not None and 0.4 < float(case.mask.float().mean()) < 0.6


@pytest.mark.parametrize("name", FORMATS)
def test_rounded_numbers_leave_a_scan_complete(name: str, tmp_path: Path, kspace: Tensor) -> None:
    step = 1.2e-2 if name == "fastmri.h5" else 7e-3  # such a format says itself that nothing was left out
    rounded = step * (kspace / step).round()
    share = float((rounded != 0).any(-1).any(1).float().mean())
    assert 0.9 < share < 0.98 if name == "fastmri.h5" else 0.98 < share < 0.999
    file = open_kspace(save(tmp_path / name, rounded))
    mask = file.read(0)[1]
    assert not file.lacking(0, mask) and float(mask.float().mean()) > 0.995


@pytest.mark.parametrize("name", ["a.npy", "plain.h5"])
def test_an_elliptical_scan_is_complete_within_its_ellipse(name: str, tmp_path: Path, kspace: Tensor) -> None:
    shutter = radii(SIZE, SIZE) < 1
    kspace = kspace * shutter[..., None]
    kspace[:, :, 20, 31] = 0
    case = first_case(save(tmp_path / name, kspace), sampling=SAMPLING)
    assert case.reference is not None and case.mask is not None
    assert not case.mask[~shutter].any(), "what is outside was not measured"
    assert 0.4 < float(case.mask[shutter].float().mean()) < 0.7
    everything = first_case(tmp_path / name)
    assert everything.mask is not None and torch.equal(everything.mask, shutter)


@pytest.mark.parametrize("rows", [1, 15, 16, 47, 180])
@pytest.mark.parametrize("columns", [13, 64])
def test_shapes_between_ellipse_and_rectangle_are_full(rows: int, columns: int) -> None:
    grid = torch.meshgrid(
        *(torch.linspace(-1, 1, n) if n > 1 else torch.zeros(1) for n in (rows, columns)), indexing="ij"
    )
    for power in (2, 3, 8, 60):
        shape = torch.zeros(rows + 4, columns + 6, dtype=torch.bool)
        shape[2:-2, 3:-3] = grid[0].abs() ** power + grid[1].abs() ** power <= 1 + 1e-6
        assert is_full(shape) and not one_sided(shape)
        outside = ~shape & (torch.arange(columns + 6) < 8)
        assert power == 60 or not fill_zeros(shape)[outside].any()


@pytest.mark.parametrize("size", [(40, 36), (320, 320), (256, 181)])
def test_an_undersampled_mask_is_never_full(size: tuple[int, int]) -> None:
    acs = (8, 10)
    lines = (RandomLines, EquispacedLines, MagicLines)
    patterns = [kind(r, share) for kind in lines for r, share in ((2, 0.3), (3, 0.2), (5, 0.1))]
    points = [kind(r, acs) for kind in (PolynomialSampling, GaussianSampling) for r in (1.5, 2, 8)]
    points += [TwoPercentSampling(0.1, 6), PoissonDiscSampling(4, acs)] if size[0] < 100 else []
    for pattern in (*patterns, *points):
        for seed in range(3):
            mask = pattern(size, make_generator(seed, "mask"))
            assert not is_full(mask) and torch.equal(fill_zeros(mask), mask), pattern
            assert not is_full(mask & (radii(*size) < 1)), pattern
    mask = torch.ones(size, dtype=torch.bool)
    mask[:, size[1] - 5] = False
    assert not is_full(mask) and torch.equal(fill_zeros(mask), mask), "one line of hundreds"
    corners = radii(*size) < 1
    corners |= torch.rand(size, generator=make_generator(0, "corners")) < 0.5
    assert not is_full(corners)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("pattern", [EquispacedLines(2, 0.3), PolynomialSampling(2.0, 12)])
def test_an_undersampled_file_says_so_once(name: str, pattern: object, tmp_path: Path, kspace: Tensor) -> None:
    mask = pattern((SIZE, SIZE), make_generator(0))  # type: ignore[operator]
    path = save(tmp_path / name, (kspace * mask[..., None]).repeat(2, 1, 1, 1, 1))
    with pytest.warns(UserWarning) as told:
        case = first_case(path, sampling=SAMPLING)
    assert torch.equal(case.mask, mask) and case.reference is None
    (text,) = [str(w.message) for w in told if "data.sampling is not applied" in str(w.message)]
    acceleration = f"{1 / float(mask.float().mean()):.2f}"
    assert f"{path} is undersampled by the scanner (2 of 2 slices, acceleration {acceleration})" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert first_case(path).reference is None


SIDES = {"columns": (slice(None), slice(12, None)), "rows": (slice(None, -9), slice(None))}


@pytest.mark.parametrize("name", ["a.npy", "plain.h5", "a.cfl"])
@pytest.mark.parametrize("side", SIDES)
def test_partial_fourier_has_no_reference(name: str, side: str, tmp_path: Path, kspace: Tensor) -> None:
    kept = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    kept[SIDES[side]] = True
    partial = complex_to_pairs(pairs_to_complex(kspace) * kept)
    if name == "a.cfl":
        values = pairs_to_complex(partial)[0].permute(1, 2, 0).numpy()
        (tmp_path / "a.hdr").write_text(f"# Dimensions\n{SIZE} {SIZE} 1 {COILS}\n")
        (tmp_path / name).write_bytes(values.tobytes(order="F"))
        path = tmp_path / name
    else:
        path = save(tmp_path / name, partial)
    for sampling in (None, SAMPLING):
        with pytest.warns(UserWarning, match=rf"is partial Fourier, with {side} .* no reference"):
            case = first_case(path, sampling=sampling)
        assert case.reference is None and torch.equal(case.mask, kept)
    with (
        pytest.warns(UserWarning, match="partial Fourier"),
        pytest.raises(InputError, match=r"partial Fourier.*: a measurement without a reference.*nothing to test"),
    ):
        MRIData(str(path), maps=LowResolutionMaps()).setup("test")


def test_each_slice_is_judged_by_itself(tmp_path: Path, kspace: Tensor) -> None:
    half = kspace.clone()
    half[:, :, :, :14] = 0
    path = save(tmp_path / "a.npy", torch.cat([kspace, half]))
    data = MRIData(str(path), maps=LowResolutionMaps())
    with pytest.warns(UserWarning, match=r"columns 14 to 47 of 0 to 47 \(1 of 2 slices"):
        one, other = data.test_dataloader()
    assert one.reference is not None and other.reference is None
    MRIData(str(path), slices="0", maps=LowResolutionMaps()).setup("test")


@pytest.mark.parametrize("columns", [slice(1, -1), slice(4, -4), slice(5, -3), slice(None, -2)])
def test_what_only_pads_kspace_leaves_a_reference(columns: slice, tmp_path: Path, kspace: Tensor) -> None:
    padded = torch.zeros_like(kspace)
    padded[:, :, :, columns] = kspace[:, :, :, columns]
    assert first_case(save(tmp_path / "a.npy", padded), sampling=SAMPLING).reference is not None


def test_fastmri_s_own_padding_leaves_its_target(tmp_path: Path, kspace: Tensor) -> None:
    kspace[:, :, :, :11] = 0
    case = first_case(save(tmp_path / "fastmri.h5", kspace), sampling=SAMPLING)
    assert case.reference is not None and case.mask is not None and not case.mask[:, :11].any()


@pytest.mark.parametrize("dtype", ["S1", "c8", [("a", "i4")]])
def test_a_mask_in_words_is_refused(dtype: object, tmp_path: Path, kspace: Tensor) -> None:
    path = save(tmp_path / "fastmri.h5", kspace)
    with h5py.File(path, "r+") as file:
        file["mask"] = np.zeros(SIZE, dtype=dtype)  # type: ignore[call-overload]
    with pytest.raises(InputError, match=r"The mask of .*fastmri\.h5 holds elements of type .*, expected 0 and 1"):
        open_kspace(path)
