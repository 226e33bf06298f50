"""Magnitudes of MRI as scanners and archives store them: NIfTI and DICOM series with a scale of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from invrecon.data.mri import MRIData, MRITraining, find_mri, open_magnitudes
from invrecon.data.phantoms import ellipse_phantom
from invrecon.errors import InputError
from invrecon.metrics.mri import magnitude
from invrecon.operators.sampling import EquispacedLines
from invrecon.rng import make_generator

from .test_scans import dicom  # type: ignore[import-not-found]

N, H, W = 3, 40, 32
SLOPE = 0.25  # of the stored whole numbers, as MR scanners have it
MODERN = {"Modality": "MR", "PixelSpacing": [1.5, 0.75], "RescaleSlope": SLOPE, "RescaleIntercept": 0}


@pytest.fixture(scope="module")
def stored() -> np.ndarray:
    """Whole numbers, `(N, H, W)`, no symmetry about any axis."""
    heads = [ellipse_phantom(max(H, W), make_generator(i, "head"))[0, :H, :W] for i in range(N)]
    ramp = torch.linspace(0.5, 1, H)[:, None] * torch.linspace(0.6, 1, W)
    return (4000 * torch.stack(heads).clamp(0.05, 1) * ramp).round().short().numpy()


@pytest.fixture(scope="module")
def folder(stored: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same scan as NIfTI and as a DICOM series whose files are not in order."""
    nibabel = pytest.importorskip("nibabel")
    pytest.importorskip("pydicom")
    folder = tmp_path_factory.mktemp("mri")
    values = SLOPE * np.transpose(stored, (2, 1, 0)).astype(np.float32)
    image = nibabel.Nifti1Image(values, np.diag([-0.75, -1.5, 4.0, 1.0]))
    image.header.set_data_dtype(np.int16)  # so that it is saved with a slope
    nibabel.save(image, folder / "scan.nii.gz")
    (folder / "series").mkdir()
    for k in range(N):
        dicom(folder / "series" / f"{(7 * k) % 5}.dcm", stored[k], 4.0 * k, PatientID="M-1", **MODERN)
    return folder


def test_a_nifti_file_with_a_slope_really_has_one(folder: Path) -> None:
    import nibabel

    slope = nibabel.load(folder / "scan.nii.gz").dataobj.slope
    assert 0 < slope < 1


def expected(stored: np.ndarray, size: int) -> Tensor:
    """The values on a square of `size` between the sides: rows cropped, columns padded."""
    out = torch.zeros(N, size, size)
    top, left = (H - size) // 2, (size - W) // 2
    out[:, :, left : left + W] = torch.from_numpy(SLOPE * stored[:, top : top + size].astype(np.float32))
    return out


@pytest.mark.parametrize(("name", "patient"), [("scan.nii.gz", "scan"), ("series", "M-1")])
def test_a_scan_becomes_cases_in_its_own_units(name: str, patient: str, folder: Path, stored: np.ndarray) -> None:
    data = MRIData(str(folder / name), size=36, sampling=EquispacedLines(2, 0.3), num_coils=2, batch_size=N)
    (batch,) = list(data.test_dataloader())
    assert batch.id == [f"{name.split('.')[0]}/{k:04d}" for k in range(N)] and batch.patient == [patient] * N
    assert batch.voxel_mm == [pytest.approx((4.0, 1.5, 0.75))] * N
    image = magnitude(batch.reference)[:, 0] * torch.tensor(batch.scale)[:, None, None]
    assert torch.allclose(image, expected(stored, 36), atol=0.1)  # of up to 1000
    assert image.amax() > 500


def test_a_folder_of_both_is_found_and_trained_on(folder: Path, stored: np.ndarray) -> None:
    assert {path.name for path in find_mri([folder])} == {"scan.nii.gz", "series"}
    knobs = {"patch_sizes": [8], "probabilities": [1.0], "pad": 4, "pixels_per_batch": 256}
    data = MRITraining(str(folder), validation=["series"], num_phases=1, size=36, **knobs)
    train, validation, _ = data.load()
    assert data.train_names == ["scan.nii.gz"] and train.shape == validation.shape == (N, 2, 36, 36)
    for images in (train, validation):  # as stored, but for each slice's scale
        x, y = magnitude(images.float())[:, 0].flatten(1), expected(stored, 36).flatten(1)
        assert torch.allclose(x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True), atol=1e-3)


def test_a_dicom_series_without_a_slope_is_read_as_stored(tmp_path: Path, stored: np.ndarray) -> None:
    pydicom = pytest.importorskip("pydicom")
    for k in range(N):
        dicom(tmp_path / f"{k}.dcm", stored[k], 4.0 * k, **MODERN)
        header = pydicom.dcmread(tmp_path / f"{k}.dcm")
        del header.RescaleSlope, header.RescaleIntercept
        header.save_as(tmp_path / f"{k}.dcm")
    volume = open_magnitudes(tmp_path)
    assert all(torch.equal(volume.read(k), torch.from_numpy(stored[k]).float()) for k in range(N))


def test_a_phase_image_or_ct_is_refused(tmp_path: Path, stored: np.ndarray) -> None:
    for k in range(N):
        dicom(tmp_path / f"{k}.dcm", stored[k], 4.0 * k, **{**MODERN, "RescaleIntercept": -512})
    with pytest.raises(InputError, match="expected magnitudes"):
        MRIData(str(tmp_path), size=36).setup()
