"""The data that ship: small, real, in the documented layouts, and made by the script that says so."""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import h5py
import nibabel
import numpy as np
import pytest
import torch

from invrecon.data.measurement import is_measurement, open_measurement
from invrecon.data.mri import MRIData
from invrecon.data.reconstruction import ReconstructionData
from invrecon.data.volumes import open_volume, read_volume
from invrecon.errors import InputError

ENV = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def test_the_folder_is_small_and_licensed(root: Path):
    files = [path for path in (root / "data").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 4e6
    text = (root / "data" / "README.md").read_text()
    assert "pyradiomics" in text and "Copyright 2017 Harvard Medical School" in text
    assert "nilearn" in text and "Copyright (C) 1993-2004 Louis Collins, McConnell Brain Imaging Centre" in text
    assert all(path.name in text for path in files if path.suffix == ".h5")


def test_the_sample_is_a_chest(root: Path):
    hu, volume = read_volume(root / "data" / "lung2_sample.h5")
    assert volume.shape == (10, 256, 256) and volume.patient == "pyrad-lung2"
    assert volume.voxel_mm is not None and volume.voxel_mm[0] == 5.0
    for image in hu:
        assert (image < -950).float().mean() > 0.05  # air
        assert ((image > -100) & (image < 200)).float().mean() > 0.2  # soft tissue
        assert (image > 500).sum() > 50  # bone


def test_the_measurement_has_no_reference(root: Path):
    path = root / "data" / "lung2_measurement.h5"
    assert is_measurement(path) and not is_measurement(root / "data" / "lung2_sample.h5")
    scan = open_measurement(path)
    assert scan.shape == (3, 20, 512) and scan.geometry["type"] == "parallel"
    with h5py.File(path) as file:
        assert set(file) == {"sinograms", "noise_std", "geometry"}
    y, std = scan.read(0)
    assert 0.0095 < float(std / y.abs().mean()) < 0.0105


def test_the_script_that_made_them_runs(root: Path, write_h5, tmp_path: Path):
    source = write_h5(shape=(61, 16, 16), voxel_mm=[0.5, 0.5, 5.0])
    command = [
        sys.executable,
        str(root / "scripts" / "make_sample_data.py"),
        str(source),
        "--output",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=root, env=ENV)
    assert done.returncode == 0, done.stderr
    assert open_volume(tmp_path / "out" / "lung2_sample.h5").shape == (10, 256, 256)
    assert open_measurement(tmp_path / "out" / "lung2_measurement.h5").shape == (3, 20, 512)


def test_what_pip_brings_is_the_scan_or_refused(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = runpy.run_path(str(root / "scripts" / "make_sample_data.py"))

    def pip(command: list[str], cwd: Path, **more: object) -> SimpleNamespace:
        assert "--hash=sha256:" in (cwd / "requirements.txt").read_text() and "download" in command
        if brought is not None:
            (cwd / "pip" / "data").mkdir(parents=True)
            (cwd / "pip" / "data" / "lung2_image.nrrd").write_bytes(brought)
        return SimpleNamespace(stderr="no matching distribution", stdout="", returncode=1)

    monkeypatch.setattr(subprocess, "run", pip)
    brought: bytes | None = None
    with pytest.raises(InputError, match="it says: no matching distribution"):
        script["fetch"](tmp_path)
    brought = b"another scan"
    with pytest.raises(InputError, match="expected aa2b94ee"):
        script["fetch"](tmp_path)


def test_the_brain_is_a_mirrored_average_in_empty_space(root: Path):
    values, volume = read_volume(root / "data" / "mni152_sample.h5", units="a.u.")
    assert volume.shape == (8, 256, 256) and volume.voxel_mm == (1.0, 1.0, 1.0) and volume.patient == "MNI152"
    assert torch.equal(values[:, :, 1:], values[:, :, 1:].flip(2))  # of the symmetric template, about column 128
    for image in values:
        assert image.min() == 0 and 0.05 < (image > 0).float().mean() < 0.4
        assert image[:, :32].max() == image[:8].max() == 0


def test_the_brain_is_cases_of_mri(root: Path):
    values, _ = read_volume(root / "data" / "mni152_sample.h5", units="a.u.")
    (batch,) = MRIData("mni152_sample.h5", num_coils=2, batch_size=8).test_dataloader()
    assert batch.patient == ["MNI152"] * 8 and batch.maps.shape == (8, 2, 256, 256, 2)
    for x, scale, image in zip(batch.reference, batch.scale, values, strict=True):
        assert torch.allclose(scale * x.norm(dim=0), image, atol=1e-3)


def test_the_script_that_made_the_brain_runs(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    x = np.random.default_rng(0).integers(0, 255, (9, 12, 140)).astype(np.uint8)
    nibabel.save(nibabel.Nifti1Image(x, np.eye(4)), tmp_path / "template.nii.gz")
    script = str(root / "scripts" / "make_mri_sample.py")
    monkeypatch.setattr(sys, "argv", [script, str(tmp_path / "template.nii.gz"), str(tmp_path)])
    runpy.run_path(script, run_name="__main__")
    values, volume = read_volume(tmp_path / "mni152_sample.h5", units="a.u.")
    assert volume.shape == (8, 256, 256) and volume.voxel_mm == (1.0, 1.0, 1.0)
    assert sorted(values[0][values[0] > 0].tolist()) == sorted(x[:, :, 32][x[:, :, 32] > 0].astype(float).tolist())


def test_both_are_cases(root: Path):
    data = ReconstructionData(["lung2_sample.h5", "lung2_measurement.h5"])
    assert [len(batch) for batch in data.predict_dataloader()] == [4, 3, 3, 3]  # those of a file as equal as can be


def test_the_scan_it_was_cut_from_agrees(root: Path, research_data: Path):
    full = open_volume(research_data / "ct" / "heldout" / "pyrad-lung2.h5")
    hu, _ = read_volume(root / "data" / "lung2_sample.h5")
    for k, index in enumerate((13, 19, 24, 28, 30, 33, 36, 40, 44, 50)):
        assert torch.equal(hu[k], full.read(index))
