"""MRI from a file to a reconstruction with its maps, and what is said of files that are no good."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fastmri.evaluate
import h5py
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from invrecon.data.fastmri_files import write_fastmri
from invrecon.data.intensity import MAGNITUDE
from invrecon.data.kspace import image_kspace
from invrecon.data.mri import MRIData, random_phase
from invrecon.data.phantoms import ellipse_phantom
from invrecon.errors import InputError
from invrecon.operators.coils import ESPIRiT, simulated_maps
from invrecon.operators.sampling import TwoPercentSampling
from invrecon.rng import make_generator
from tests.cli.test_results import rows_of
from tests.cli.tiny import NETWORK, QUIET, files_in, learn, make_prior, make_volume, read

SIZE, COILS, UNIT = 32, 3, 1e-4
SAMPLED = ("--data.sampling.acceleration=2", "--data.sampling.center_fraction=0.32")
ESTIMATED = ("--data.maps.kernel_size=4",)
FAST = ("--model.method.num_levels=2", "--model.precision=32")
CLASSICAL = {
    "zero_filled_mri": (),
    "cgsense_mri": ("--model.method.num_iterations=10",),
    "tv_mri": ("--model.method.num_iterations=25",),
    "wavelet_mri": ("--model.method.num_iterations=10", "--model.method.num_scales=2"),
}


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """K-space of two slices, magnitudes of two files, and a complex patch prior with random weights."""
    folder = tmp_path_factory.mktemp("mri")
    maps = simulated_maps(COILS, (SIZE, SIZE), make_generator(0, "coils"))
    heads = [0.2 + ellipse_phantom(SIZE, make_generator(i, "head"))[0] for i in range(4)]
    kspace = [image_kspace(UNIT * random_phase(m, make_generator(i, "p")), maps) for i, m in enumerate(heads[:2])]
    noise = 1e-3 * UNIT * torch.randn(2, COILS, SIZE, SIZE, 2, generator=torch.Generator().manual_seed(0))
    write_fastmri(folder / "brain.h5", torch.stack(kspace) + noise, matrix=(SIZE, SIZE - 4), patient="p")
    for name in "ab":
        make_volume(folder / "magnitudes" / f"{name}.h5", 1000 * torch.stack(heads).numpy(), units="a.u.")
    make_prior(folder / "prior.safetensors", "patch", {**NETWORK, "image_channels": 2}, intensity=asdict(MAGNITUDE))
    return folder


def arguments(command: str, config: str, scans: Path, output: Path, *more: object, paths: object = None) -> list[str]:
    file = f"--model.prior={scans / 'prior.safetensors'}"
    own = {"udig_dip_mri": (file, "--data.slices=null")}
    prior = {**own, **dict.fromkeys(("recon_mri", "tta_mri"), (file, *FAST))}.get(config, ())
    args = [command, "--config", f"{config}.yaml", "--data.paths", paths or scans / "brain.h5", "--output", output]
    args += [f"--model.operator.size={SIZE}", f"--data.size={SIZE}", *SAMPLED, *ESTIMATED, *prior, *QUIET, *more]
    return [str(arg) for arg in args]


@pytest.fixture(scope="module")
def result(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from invrecon.cli import main

    out = tmp_path_factory.mktemp("result")
    samples = ("--model.method.num_samples=2", "--model.save_samples=true", "--data.batch_size=2")
    with pytest.warns(UserWarning, match=r"is complete, and \d+% of its k-space is used"):
        main(arguments("predict", "recon_mri", scans, out / "predict", *samples))
    main(arguments("test", "recon_mri", scans, out / "test"))
    return out


def test_a_file_of_kspace_becomes_an_image_with_its_maps(result: Path, scans: Path) -> None:
    out = result / "predict"
    names = {"brain.h5", "report.html", "metrics.csv", "volumes.csv", "summary.json", "config.yaml"}
    assert files_in(out) == names | {"figures/brain_0000.png", "figures/brain_0001.png"}
    shape = (2, SIZE, SIZE - 4)  # the matrix that the header asks for
    with h5py.File(out / "brain.h5") as file:
        assert file["mean"].shape == file["phase"].shape == file["std"].shape == shape
        assert file["samples"].shape == file["samples_phase"].shape == (2, 2, SIZE, SIZE - 4)
        assert file.attrs["units"] == "a.u." and file["phase"].attrs["units"] == "rad"
        mean, phase, maps = (file[name][()] for name in ("mean", "phase", "maps"))
        z = file["samples"][()] * np.exp(1j * file["samples_phase"][()])
        std = file["std"][()]
    assert np.allclose(z.mean(1), mean * np.exp(1j * phase), atol=1e-6 * UNIT)
    assert np.allclose((np.abs(z - z.mean(1, keepdims=True)) ** 2).sum(1) ** 0.5, std, atol=1e-6 * UNIT)
    assert mean.min() >= 0 and 0.1 * UNIT < mean.max() < 10 * UNIT and abs(phase).max() <= np.pi
    assert maps.shape == (2, COILS, SIZE, SIZE - 4) and maps.dtype == np.complex64
    strength = (np.abs(maps) ** 2).sum(1)
    assert np.allclose(strength[strength > 0.5], 1, atol=1e-4)


def test_a_prior_adapts_to_a_scan(scans: Path, tmp_path: Path, invrecon: Callable[..., Any]) -> None:
    few = [f"--model.adaptation.{knob}" for knob in ("rounds=2", "steps=2", "num_pixels=1024")]
    few += ["--model.adaptation.expectation.num_levels=2"]
    invrecon(arguments("predict", "tta_mri", scans, tmp_path / "out", *few))
    assert {"brain.h5", "adaptation.json", "report.html", "metrics.csv"} <= files_in(tmp_path / "out")
    first, second = rows_of(tmp_path / "out")
    assert first["stopped_at"] == second["stopped_at"] == "round 2" and float(first["psnr"]) > 0
    assert read(tmp_path / "out" / "brain.h5").shape == (2, SIZE, SIZE - 4)


def test_the_maps_are_those_of_what_was_measured(scans: Path, result: Path) -> None:
    with h5py.File(scans / "brain.h5") as file:
        kspace = torch.view_as_real(torch.from_numpy(file["kspace"][1]))
    config = (result / "predict" / "config.yaml").read_text()
    assert "kernel_size: 4" in config
    from invrecon.operators.sampling import EquispacedLines

    mask = EquispacedLines(2, 0.32)((SIZE, SIZE), make_generator(0, "mask", "brain/0001"))
    expected = torch.view_as_complex(ESPIRiT(4)(kspace * mask[..., None], mask))[..., 2:-2]
    stored = torch.from_numpy(read(result / "predict" / "brain.h5", "maps")[1])
    assert torch.allclose(stored, expected, atol=1e-3)


def test_two_percent_of_kspace_are_two_percent(scans: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from invrecon.cli import main

    args = ["predict", "--config", "recon_mri.yaml", "--data.sampling=TwoPercentSampling", "--print_config"]
    with pytest.raises(SystemExit):
        main(args)
    sampling = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["sampling"]
    assert sampling["init_args"] == {"fraction": 0.02, "acs": 16, "power": 3.5}, "nothing of the config's acceleration"
    mask = TwoPercentSampling(**sampling["init_args"])((320, 320), make_generator(0))
    assert float(mask.float().mean()) == pytest.approx(0.02, rel=1e-3)


@pytest.mark.parametrize("operator", ["RadialMRI", "SpiralMRI"])
def test_a_trajectory_takes_the_place_of_the_grid(
    operator: str, scans: Path, tmp_path: Path, invrecon: Callable[..., Any]
) -> None:
    volume = scans / "magnitudes" / "a.h5"
    args = arguments("test", "recon_mri", scans, tmp_path / "out", "--data.slices=0:2", paths=volume)
    cli = invrecon([*args, f"--model.operator={operator}", f"--model.operator.size={SIZE}"])
    row = rows_of(tmp_path / "out")[0]
    assert "acceleration" not in row, "of a mask that measured nothing here"
    assert type(cli.model.operator).__name__ == operator and row["measurement"].startswith(operator)
    assert float(row["psnr"]) > 0


def test_what_no_coil_sees_is_zero() -> None:
    from invrecon.methods.base import Estimate
    from invrecon.operators.mri import CartesianMRI
    from invrecon.tasks.reconstruction import seen

    maps = simulated_maps(COILS, (6, 5), make_generator(0))[None].repeat(2, 1, 1, 1, 1)
    maps[0, :, :2], maps[1, :, :, 3:] = 0, 0
    x = torch.randn(2, 4, 2, 6, 5)
    estimate = seen(Estimate(x.mean(1), x, x.std(1)), maps)
    for image in (estimate.mean, estimate.samples[:, 1], estimate.std):
        assert (image[0, :, :2] == 0).all() and (image[1, :, :, 3:] == 0).all()
        assert (image[0, :, 2:] != 0).all() and (image[1, :, :, :3] != 0).all()
    operator = CartesianMRI((6, 5))
    operator._set_maps(maps)
    assert torch.equal(operator(estimate.mean), operator(x.mean(1)))  # so the residual is the same


def test_the_table_says_how_much_was_measured(result: Path) -> None:
    for row in (*rows_of(result / "predict"), *rows_of(result / "test")):
        assert 1.8 < float(row["acceleration"]) < 2.4 and 0.1 * UNIT < float(row["scale"]) < 10 * UNIT
        assert row["psnr_body"] == "" and float(row["psnr"]) > 0 and row["patient"] == "p"
        told = f"CartesianMRI, {COILS} coils, {SIZE} x {SIZE}, measured, undersampled afterwards"
        assert row["measurement"] == told


def test_volumes_are_judged_as_fastmri_judges_them(result: Path, scans: Path) -> None:
    with h5py.File(scans / "brain.h5") as file:
        kspace, largest = file["kspace"][()], float(file.attrs["max"])
    maps = read(result / "predict" / "brain.h5", "maps")
    images = np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(kspace, axes=(-2, -1)), norm="ortho"), axes=(-2, -1))
    target = np.abs((maps.conj() * images[..., 2:-2]).sum(1))
    with open(result / "predict" / "volumes.csv") as file:
        (row,) = csv.DictReader(file)
    mean = read(result / "predict" / "brain.h5")
    # The reference has maps of the whole scan, which are nearly those of the measurement.
    assert float(row["nmse"]) == pytest.approx(float(fastmri.evaluate.nmse(target, mean)), rel=2e-3)
    assert float(row["psnr"]) == pytest.approx(float(fastmri.evaluate.psnr(target, mean, largest)), abs=1e-2)
    assert float(row["ssim"]) == pytest.approx(float(fastmri.evaluate.ssim(target, mean, largest)[0]), abs=1e-3)
    assert float(row["max"]) == pytest.approx(largest)
    with h5py.File(scans / "brain.h5") as file:
        stored = file["reconstruction_rss"][()]
    assert float(row["nmse_stored"]) == pytest.approx(float(fastmri.evaluate.nmse(stored, mean)), rel=1e-4)
    assert float(row["psnr_stored"]) == pytest.approx(float(fastmri.evaluate.psnr(stored, mean, largest)), abs=1e-3)
    assert float(row["ssim_stored"]) == pytest.approx(float(fastmri.evaluate.ssim(stored, mean, largest)[0]), abs=1e-4)
    assert files_in(result / "test") == {"metrics.csv", "volumes.csv", "summary.json", "config.yaml"}
    for name in ("predict", "test"):
        summary = json.loads((result / name / "summary.json").read_text())
        assert summary["volumes"].pop("num_volumes") == 1 and summary["psnr"]["mean"] > 0
        kinds = ("", "_stored")
        assert set(summary["volumes"]) == {f"{metric}{kind}" for metric in ("nmse", "psnr", "ssim") for kind in kinds}
    assert summary["volumes"]["nmse"] > 0
    page = (result / "predict" / "report.html").read_text()
    assert f"NMSE {float(row['nmse']):.4f}, PSNR {float(row['psnr']):.2f} dB" in page
    assert f"NMSE {float(row['nmse_stored']):.4f}, PSNR {float(row['psnr_stored']):.2f} dB" in page


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_a_maximum_that_is_none_is_told_and_not_taken(
    factor: float, scans: Path, tmp_path: Path, invrecon: Callable[..., Any]
) -> None:
    (tmp_path / "scan").mkdir()
    with h5py.File(shutil.copy(scans / "brain.h5", tmp_path / "scan" / "brain.h5"), "r+") as file:
        file.attrs["max"] *= factor
        file["reconstruction_rss"][0, 0, 0] = np.nan
    with pytest.warns(UserWarning, match="'max' of .*brain.h5"):
        invrecon(arguments("test", "zero_filled_mri", tmp_path / "scan", tmp_path / "out"))
    with open(tmp_path / "out" / "volumes.csv") as file:
        (row,) = csv.DictReader(file)
    assert 5 < float(row["psnr"]) < 60 and not row.get("psnr_stored")


def test_what_is_known_of_a_volume_is_kept(
    scans: Path, tmp_path: Path, invrecon: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """A volume on disk has no reference any more: its row stays as long as no slice is added to it."""
    out = tmp_path / "out"
    first = [*arguments("predict", "zero_filled_mri", scans, out, "--model.num_figures=0"), "--data.slices=0"]
    invrecon(first)
    texts = [(out / name).read_text() for name in ("volumes.csv", "summary.json")]
    invrecon(first)
    assert texts == [(out / name).read_text() for name in ("volumes.csv", "summary.json")]
    (out / "report.html").unlink()  # as if the power had gone before it was written
    invrecon(first)
    assert texts == [(out / name).read_text() for name in ("volumes.csv", "summary.json")]


def test_a_volume_that_slices_are_added_to_loses_its_row_with_a_word(
    scans: Path, tmp_path: Path, invrecon: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = arguments("predict", "zero_filled_mri", scans, out, "--model.num_figures=0")
    invrecon([*command, "--data.slices=0"])
    assert "volumes" in json.loads((out / "summary.json").read_text())
    capsys.readouterr()
    invrecon([*command, "--data.slices=0:2"])
    assert "volumes.csv leaves out brain: of its slices that were there" in capsys.readouterr().out
    assert not (out / "volumes.csv").exists() and "volumes" not in json.loads((out / "summary.json").read_text())


def test_the_page_speaks_of_magnitudes(result: Path) -> None:
    page = (result / "predict" / "report.html").read_text()
    text = re.sub(r"base64,[^\"]*", "", page)
    assert "those of magnitudes" in text and "magnitude window" in text
    assert not re.search(r"\bHU\b|PSNR, body", text)


def test_numbers_do_not_depend_on_the_batch(
    invrecon: Callable[..., Any], scans: Path, result: Path, tmp_path: Path
) -> None:
    samples = ("--model.method.num_samples=2", "--data.slices=1")
    invrecon(arguments("predict", "recon_mri", scans, tmp_path, *samples))
    alone, together = read(tmp_path / "brain.h5")[0], read(result / "predict" / "brain.h5")[1]
    assert np.allclose(alone, together, atol=1e-4 * UNIT)


@pytest.mark.parametrize("config", CLASSICAL)
def test_methods_that_do_not_sample(config: str, invrecon: Callable[..., Any], scans: Path, tmp_path: Path) -> None:
    invrecon(arguments("predict", config, scans, tmp_path, "--model.num_figures=0", *CLASSICAL[config]))
    assert all(float(row["psnr"]) > 10 for row in rows_of(tmp_path))
    phase = read(tmp_path / "brain.h5", "phase")
    assert phase.min() < -1 and phase.max() > 1  # nothing was clipped to positive values


def test_a_network_is_fitted_to_a_scan(invrecon: Callable[..., Any], scans: Path, tmp_path: Path) -> None:
    few = ("--model.method.num_iterations=3", "--model.method.num_inner=1", "--model.num_figures=0")
    invrecon(arguments("predict", "udig_dip_mri", scans, tmp_path, *few))
    rows = rows_of(tmp_path)
    assert len(rows) == 2 and all(float(row["num_evaluations"]) > 0 and float(row["psnr"]) > 0 for row in rows)


def test_a_fit_tells_how_good_its_iterates_were(invrecon: Callable[..., Any], scans: Path, tmp_path: Path) -> None:
    few = ("--model.method.num_iterations=1", "--model.num_figures=0")
    invrecon(arguments("test", "udig_dip_mri", scans, tmp_path, *few))
    traces = json.loads((tmp_path / "adaptation.json").read_text())
    for row, trace in zip(rows_of(tmp_path), traces.values(), strict=True):
        (step,) = trace["steps"]
        assert "psnr" in trace["curves"] and step["psnr"] == pytest.approx(float(row["psnr"]), abs=1e-3)


@pytest.mark.parametrize("method", ["DDS", "DiffPIR"])
def test_another_method_by_its_name_alone(
    method: str, invrecon: Callable[..., Any], scans: Path, tmp_path: Path
) -> None:
    args = arguments("predict", "recon_mri", scans, tmp_path, f"--model.method={method}", "--model.num_figures=0")
    invrecon([arg for arg in args if "num_levels" not in arg] + ["--model.method.num_levels=2"])
    phase = read(tmp_path / "brain.h5", "phase")
    assert phase.min() < -1 and phase.max() > 1


def test_magnitudes_are_measured_with_coils_phase_and_noise(
    invrecon: Callable[..., Any], scans: Path, tmp_path: Path
) -> None:
    from invrecon.tasks.reconstruction import Reconstruction

    args = arguments("test", "zero_filled_mri", scans, tmp_path, paths=scans / "magnitudes" / "a.h5")
    cli = invrecon([*args, "--data.num_coils=5", "--data.slices=1"])
    (row,) = rows_of(tmp_path)
    assert row["measurement"] == f"CartesianMRI, 5 coils, {SIZE} x {SIZE}, SNRNoise, simulated"
    assert row["method"] == "zero-filled"  # of the class FBP, which is no word of MRI's
    assert isinstance(cli.model, Reconstruction)
    (batch,) = cli.datamodule.test_dataloader()
    y, operator, reference = cli.model.measure(batch)
    assert torch.equal(reference, batch.reference) and y.shape == (1, 5, SIZE, SIZE, 2)
    off = ~batch.mask[0]
    assert (y[0][:, off] == 0).all()
    noise = (y - operator(reference))[0][:, ~off]
    signal = operator(reference)[0][:, ~off]
    assert 10 * (signal.square().mean() / noise.square().mean()).log10() == pytest.approx(30, abs=0.5)
    assert noise.std() == pytest.approx(float(operator.noise_std), rel=0.05)


def test_noise_off_the_mask_is_taken_away(invrecon: Callable[..., Any], scans: Path, tmp_path: Path) -> None:
    noise = ("--model.noise=GaussianNoise", "--model.noise.std=0.1", "--data.slices=1")
    args = arguments("test", "zero_filled_mri", scans, tmp_path, *noise, paths=scans / "magnitudes" / "a.h5")
    cli = invrecon([arg for arg in args if not arg.startswith("--model.noise.snr")])
    (batch,) = cli.datamodule.test_dataloader()
    y, *_ = cli.model.measure(batch)
    assert (y[0][:, ~batch.mask[0]] == 0).all() and (y[0][:, batch.mask[0]] != 0).all()


@pytest.mark.parametrize("config", ["patch_mri", "whole_mri"])
def test_a_complex_prior_is_trained_and_used(
    config: str, invrecon: Callable[..., Any], scans: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    cli = invrecon(
        learn(f"{config}.yaml", scans / "magnitudes", run, "--data.num_phases=1", "--data.batches_per_epoch=1")
    )
    assert "validation/psnr_4_fold_mri" in cli.trainer.callback_metrics
    assert load_file(run / "prior.safetensors")
    card = (run / "prior.md").read_text()
    assert "complex images" in card and not re.search(r"\bHU\b", card)
    args = arguments("predict", "recon_mri", scans, tmp_path / "out", "--model.num_figures=0")
    args = [f"--model.prior={run / 'prior.safetensors'}" if "--model.prior" in arg else arg for arg in args]
    invrecon(args)
    assert read(tmp_path / "out" / "brain.h5").shape == (2, SIZE, SIZE - 4)


def test_a_prior_of_ct_is_not_for_mri(invrecon: Callable[..., Any], scans: Path, library: Path, tmp_path: Path) -> None:
    args = arguments("predict", "recon_mri", scans, tmp_path)
    with pytest.raises(InputError, match="intensity scale"):
        invrecon([*args, f"--model.prior={library / 'patch.safetensors'}"])


def test_a_scan_without_reference_is_predicted_and_not_tested(
    invrecon: Callable[..., Any], scans: Path, tmp_path: Path
) -> None:
    with h5py.File(scans / "brain.h5") as file:
        kspace = torch.view_as_real(torch.from_numpy(file["kspace"][()]))
    mask = (torch.arange(SIZE) % 2 == 0) | ((torch.arange(SIZE) - SIZE // 2).abs() < 6)
    write_fastmri(tmp_path / "scan.h5", kspace, mask=mask)
    with pytest.raises(InputError, match="without a reference"):
        invrecon(arguments("test", "zero_filled_mri", scans, tmp_path / "test", paths=tmp_path / "scan.h5"))
    invrecon(arguments("predict", "zero_filled_mri", scans, tmp_path / "out", paths=tmp_path / "scan.h5"))
    assert "volumes.csv" not in files_in(tmp_path / "out") and "report.html" in files_in(tmp_path / "out")
    (row, _) = rows_of(tmp_path / "out")
    assert row["psnr"] == "" and float(row["acceleration"]) == pytest.approx(SIZE / float(mask.sum()), abs=1e-3)


def spoil(file: h5py.File, what: str) -> None:
    if what == "nan":
        file["kspace"][1, 0, 3, 4] = np.nan
    elif what == "coils":
        del file["kspace"]
        file["kspace"] = np.zeros((2, 0, SIZE, SIZE), np.complex64)
    elif what == "mask":
        file["mask"] = np.ones(SIZE + 1, bool)
    elif what == "centre":
        file["mask"] = abs(np.arange(SIZE) - SIZE // 2) > 3
    elif what == "header":
        header = file["ismrmrd_header"][()].replace(b"<y>32</y>", b"<y>30</y>")
        del file["ismrmrd_header"]
        file["ismrmrd_header"] = header


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nan", r"bad\.h5 has 1 NaN or Inf samples"),
        ("coils", r"bad\.h5 has zero coils"),
        ("mask", rf"mask of .*bad\.h5 has shape \({SIZE + 1},\), but its k-space has {SIZE} columns"),
        ("centre", r"bad\.h5, slice 0: .*\(ACS\)"),
        ("header", r"header of .*bad\.h5 says that k-space has 32 x 30 samples, but it has 32 x 32"),
        ("truncated", r"bad\.h5 .* cannot be opened: it is truncated"),
    ],
)
def test_bad_kspace_says_in_a_sentence_what_is_wrong(what: str, message: str, scans: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.h5"
    content = (scans / "brain.h5").read_bytes()
    path.write_bytes(content[: len(content) // 2] if what == "truncated" else content)
    if what != "truncated":
        with h5py.File(path, "r+") as file:
            spoil(file, what)
    with pytest.raises(InputError, match=message) as caught:
        MRIData(str(path)).setup()
    assert len(str(caught.value).splitlines()) == 1


def test_nothing_is_written_for_bad_kspace(invrecon: Callable[..., Any], scans: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.h5"
    path.write_bytes((scans / "brain.h5").read_bytes())
    with h5py.File(path, "r+") as file:
        spoil(file, "nan")
    with pytest.raises(InputError, match="NaN"):
        invrecon(arguments("predict", "zero_filled_mri", scans, tmp_path / "out", paths=path))
    assert not (tmp_path / "out").exists() or not files_in(tmp_path / "out")
