"""What `test` and `predict` write, and that the numbers in it are right."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import yaml
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from invrecon.data.intensity import Intensity
from tests.cli.tiny import SIZE, files_in, read, reconstruct

COLUMNS = [
    *("case", "slice", "patient", "method", "psnr", "ssim", "psnr_body", "relative_residual", "num_evaluations"),
    *("num_operator_calls", "seconds", "peak_memory_mb", "seed"),
]


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def results(library: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of a `test` and of a `predict` of the same cases, with two posterior samples each."""
    from invrecon.cli import main

    folders = {}
    for command, more in {"test": (), "predict": ("--model.save_samples=true", "--model.num_figures=1")}.items():
        folders[command] = tmp_path_factory.mktemp(command) / "out"
        options = (f"--model.prior={library}/patch.safetensors", "--model.method.num_levels=2", *more)
        options += ("--model.method.num_samples=2", "--model.noise=RelativeGaussianNoise")
        main(reconstruct(command, "recon_ct.yaml", library / "scans", folders[command], *options))
    return folders


def test_a_row_a_slice(results: dict[str, Path]) -> None:
    rows = rows_of(results["test"])
    assert list(rows[0])[: len(COLUMNS)] == COLUMNS
    numbers = {"a": range(4), "b": range(3), "c": range(3)}
    assert [(row["case"], int(row["slice"])) for row in rows] == [(c, i) for c in numbers for i in numbers[c]]
    assert all(row["patient"] == f"patient-{row['case']}" for row in rows)
    assert all(row["method"] == "AnnealedPnPADMM" and float(row["num_evaluations"]) == 2 for row in rows)
    assert all(float(row[name]) > 0 for row in rows for name in COLUMNS[4:-1])
    assert all(row["seed"] == "0" for row in rows)


def test_predict_has_the_numbers_of_test(results: dict[str, Path]) -> None:
    measured = {"seconds", "peak_memory_mb"}
    test, predict = (
        [{k: v for k, v in row.items() if k not in measured} for row in rows_of(results[command])]
        for command in ("test", "predict")
    )
    assert test == predict


def test_the_summary_is_that_of_the_rows(results: dict[str, Path]) -> None:
    summary = json.loads((results["test"] / "summary.json").read_text())
    rows = rows_of(results["test"])
    for metric in ("psnr", "ssim", "psnr_body", "relative_residual"):
        entry = summary[metric]
        assert entry["mean"] == pytest.approx(np.mean([float(row[metric]) for row in rows]))
        assert entry["low"] < entry["mean"] < entry["high"]
    assert summary["num_patients"] == 3


def test_the_numbers_are_those_of_skimage(results: dict[str, Path], library: Path) -> None:
    encode = Intensity().encode
    for row in rows_of(results["test"]):
        index = int(row["slice"])
        image, reference = (
            encode(torch.from_numpy(read(path / f"{row['case']}.h5", name)[index])).double().numpy()
            for path, name in ((results["predict"], "mean"), (library / "scans", "data"))
        )
        expected = peak_signal_noise_ratio(reference, image, data_range=1.0)
        assert float(row["psnr"]) == pytest.approx(expected, abs=1e-3)
        expected = structural_similarity(reference, image, data_range=1.0)
        assert float(row["ssim"]) == pytest.approx(expected, abs=1e-4)


def test_a_volume_a_case(results: dict[str, Path], library: Path) -> None:
    for name, num in {"a": 4, "b": 3, "c": 3}.items():
        with h5py.File(results["predict"] / f"{name}.h5") as file:
            mean, std, samples = (file[key][()] for key in ("mean", "std", "samples"))
            assert mean.shape == std.shape == (num, SIZE, SIZE) and samples.shape == (num, 2, SIZE, SIZE)
            assert np.allclose(samples.mean(axis=1), mean, atol=0.01)
            assert np.allclose(samples.std(axis=1, ddof=1), std, atol=0.01)
            assert file["slices"][:].tolist() == list(range(num))
            assert file.attrs["units"] == "HU" and -1000 <= mean.min() < -500 and 0 < mean.max() <= 2000
            assert file.attrs["voxel_mm"].tolist() == [5.0, 10.0, 10.0]
            provenance = json.loads(file.attrs["provenance"])
        weights = hashlib.sha256((library / "patch.safetensors").read_bytes()).hexdigest()
        assert provenance["weights_sha256"] == weights
        assert {"invrecon", "torch", "python"} <= provenance["versions"].keys()
        assert provenance["config"]["model"]["init_args"]["method"]["init_args"]["num_samples"] == 2
        assert provenance["command"].startswith("invrecon predict --config recon_ct.yaml")


def test_all_is_in_the_output(results: dict[str, Path]) -> None:
    assert files_in(results["test"]) == {"metrics.csv", "summary.json", "config.yaml"}
    figures = {"figures/a_0002.png", "figures/b_0001.png", "figures/c_0001.png"}
    volumes = {"a.h5", "b.h5", "c.h5"}
    assert files_in(results["predict"]) == files_in(results["test"]) | figures | volumes | {"report.html"}
    config = yaml.safe_load((results["test"] / "config.yaml").read_text())
    assert config["model"]["class_path"].endswith("Reconstruction")


def test_the_report_stands_alone(results: dict[str, Path]) -> None:
    page = (results["predict"] / "report.html").read_text()
    sources = re.findall(r"<(?:img|script|link|iframe)[^>]*?(?:src|href)=\"([^\"]+)", page)
    assert sources and all(source.startswith("data:") for source in sources)
    assert not re.search(r"url\((?!['\"]?data:)", page) and "@import" not in page
    for word in ("AnnealedPnPADMM", "ParallelBeamCT", "RelativeGaussianNoise", "patient-a", "recon_ct.yaml"):
        assert word in page


def test_a_measurement_file_is_reconstructed_as_it_is(invrecon: Callable[..., Any], tmp_path: Path) -> None:
    args = ["predict", "--config", "fbp_ct.yaml", "--data.paths", "lung2_measurement.h5", "--data.slices", "1"]
    invrecon([*args, "--output", str(tmp_path / "out"), "--model.operator.num_views", "60"])
    assert read(tmp_path / "out" / "lung2_measurement.h5").shape == (1, 256, 256)
    (row,) = rows_of(tmp_path / "out")
    assert row["psnr"] == "" and float(row["relative_residual"]) < 1 and row["patient"] == "pyrad-lung2"
    assert not (tmp_path / "out" / "figures").exists() or files_in(tmp_path / "out" / "figures")


def test_a_finer_reference_is_measured_on_its_own_grid(
    invrecon: Callable[..., Any], library: Path, tmp_path: Path, chest: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    from invrecon.operators import ParallelBeamCT
    from invrecon.tasks.reconstruction import Reconstruction

    seen, measure = [], Reconstruction.measure

    def spy(self: Reconstruction, batch: Any) -> Any:
        seen.append(measure(self, batch))
        return seen[-1]

    monkeypatch.setattr(Reconstruction, "measure", spy)
    out = tmp_path / "out"
    invrecon(reconstruct("predict", "fbp_ct.yaml", library / "fine.h5", out, "--model.num_figures=1"))
    x = Intensity().encode(torch.from_numpy(chest[:2]))[:, None]
    fine = ParallelBeamCT(size=2 * SIZE, num_views=12, num_bins=48)
    ((y, operator, reference),) = seen
    assert torch.allclose(y, fine(x), atol=1e-5)
    assert not torch.allclose(y, operator(reference), atol=1e-3)
    assert torch.allclose(reference, torch.nn.functional.avg_pool2d(x, 2), atol=1e-6)
    with h5py.File(out / "fine.h5") as file:
        assert file["mean"].shape == (2, SIZE, SIZE)
        assert file.attrs["voxel_mm"].tolist() == [5.0, 10.0, 10.0]
