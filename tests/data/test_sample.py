"""The data that ship: small, real, in the documented layouts, and made by the script that says so."""

import os
import subprocess
import sys
from pathlib import Path

import h5py
import torch

from invrecon.data.measurement import is_measurement, open_measurement
from invrecon.data.reconstruction import ReconstructionData
from invrecon.data.volumes import open_volume, read_volume

ENV = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def test_the_folder_is_small_and_licensed(root: Path):
    files = [path for path in (root / "data").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 4e6
    text = (root / "data" / "README.md").read_text()
    assert "pyradiomics" in text and "Copyright 2017 Harvard Medical School" in text
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
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=root, env=ENV)
    assert done.returncode == 0, done.stderr
    assert open_volume(tmp_path / "out" / "lung2_sample.h5").shape == (10, 256, 256)
    assert open_measurement(tmp_path / "out" / "lung2_measurement.h5").shape == (3, 20, 512)


def test_both_are_cases(root: Path):
    data = ReconstructionData(["lung2_sample.h5", "lung2_measurement.h5"])
    assert [len(batch) for batch in data.predict_dataloader()] == [4, 4, 2, 3]


def test_the_scan_it_was_cut_from_agrees(root: Path, research_data: Path):
    full = open_volume(research_data / "ct" / "heldout" / "pyrad-lung2.h5")
    hu, _ = read_volume(root / "data" / "lung2_sample.h5")
    for k, index in enumerate((13, 19, 24, 28, 30, 33, 36, 40, 44, 50)):
        assert torch.equal(hu[k], full.read(index))
