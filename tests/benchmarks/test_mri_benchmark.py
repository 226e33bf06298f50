"""The tables of MRI on tiny data: every setting and row, volumes from slices, tuning, what is missing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch

from benchmarks import _mri, mri
from invrecon.adapt import ExpectationMaximisation
from invrecon.data.intensity import MAGNITUDE
from invrecon.data.kspace import image_kspace
from invrecon.data.mri import random_phase
from invrecon.data.phantoms import ellipse_phantom
from invrecon.methods import ProximalDiffusion
from invrecon.metrics.mri import volume_metrics
from invrecon.operators import PolynomialSampling, RandomLines, simulated_maps
from invrecon.rng import make_generator
from tests.cli.tiny import NETWORK, SIZE, make_prior, make_volume

LOAD_METHOD = mri.load_method
LINES, POINTS = RandomLines(2, 0.32), PolynomialSampling(4.0, acs=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data under the names of the real ones, and two priors."""
    folder = tmp_path_factory.mktemp("mri")
    heads = torch.stack([0.2 + ellipse_phantom(SIZE, make_generator(i, "head"))[0] for i in range(5)])
    for name in (_mri.HELD_OUT, mri.VALIDATION, mri.ABDOMEN):
        make_volume(folder / name, 1000 * heads.numpy(), units="a.u.")
    shape = (SIZE, SIZE - 4)
    x = random_phase(heads[0, :, 2:-2], make_generator(0, "p"))
    kspace = image_kspace(x, simulated_maps(3, shape, make_generator(0, "coils")))
    (folder / mri.SCAN).parent.mkdir()
    with h5py.File(folder / mri.SCAN, "w") as file:
        file["data"] = torch.view_as_complex(kspace).numpy()
    for kind in ("patch", "whole"):
        network = {**NETWORK, "image_channels": 2}
        make_prior(folder / f"{kind}.safetensors", kind, network, intensity=asdict(MAGNITUDE))
    return folder


@pytest.fixture(autouse=True)
def tiny(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Points the benchmark at the tiny data, with masks that fit it, and gives the number of threads back."""
    monkeypatch.setenv("INVRECON_DATA", str(folder))
    settings = {
        name: replace(own, sampling=LINES if isinstance(own.sampling, RandomLines) else POINTS)
        for name, own in mri.SETTINGS.items()
    }
    monkeypatch.setattr(mri, "SETTINGS", settings)
    monkeypatch.setattr(mri, "TUNING", {num: replace(own, sampling=LINES) for num, own in mri.TUNING.items()})
    monkeypatch.setattr(mri, "ITERATIONS", {"tv": 25, "wavelet": 5})
    monkeypatch.setattr(mri, "load_method", lambda config: ProximalDiffusion(num_levels=2, clip=None))
    sampler = ProximalDiffusion(num_levels=2, clip=None)
    em = ExpectationMaximisation(rounds=1, steps=1, num_pixels=256, expectation=sampler)
    monkeypatch.setattr(mri, "load_adaptation", lambda config: (sampler, em))
    yield
    torch.set_num_threads(1)


def arguments(folder: Path, out: Path, *more: object) -> list[str]:
    priors = ("--prior", folder / "patch.safetensors", "--whole", folder / "whole.safetensors")
    options = ("--size", SIZE, "--threads", 1, "--max-slices", 2, "--json", out, *priors, *more)
    return [str(option) for option in options]


def read(path: Path) -> dict[str, Any]:
    text = path.read_text()
    assert str(path.parents[1]) not in text and str(Path(__file__).parents[2]) not in text, "a path of this machine"
    return json.loads(text)


def test_every_row_in_every_setting(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, figure = tmp_path / "m.json", tmp_path / "m.png"
    mri.main(arguments(folder, out, "--rows", *mri.ROWS))
    text, result = capsys.readouterr().out, read(out)
    assert not result["failures"] and not result["no_weights"]
    unseen = [name for name, own in mri.SETTINGS.items() if own.file in mri.UNSEEN]
    assert len(unseen) == 6, "nothing is adapted to what the priors have seen"
    assert len(result["parts"]) == 2 * (len(mri.ROWS) * len(mri.SETTINGS) - 3)
    for name, own in result["summaries"].items():
        assert set(own) == set(mri.ROWS) - (set() if name in unseen else {"adapted"})
    assert result["summaries"]["two-percent"]["tv"]["measured"] == pytest.approx(1 / 4, abs=1e-4)
    assert "| Simulated, 2 % | patch |" in text and "25.00 %" in text and "one slice, 2 masks" in text
    assert result["differences"]["real-r8"]["patch - wavelet"]["num_cases"] == 2
    judged = {verdict["claim"] for verdict in result["verdicts"]}
    assert "Simulated, R = 8: patch is at least 2 dB above tv" in judged
    assert "Measured, Poisson disc, R = 8: patch is at least 1 dB above wavelet" in judged
    assert len(judged) == 3 * (1 + 4) + 2 * 4, "of what was aimed at: eightfold simulated, and all of the measured scan"

    mri.main(arguments(folder, out, "--rows", "tv", "--settings", "sim-r8", "real-r4", "--figure", figure))
    assert "dB, " not in capsys.readouterr().out.partition("| Setting")[0], "a second run computes nothing"
    assert read(out)["parts"] == result["parts"] and figure.stat().st_size > 10_000


def test_rows_of_two_processes_make_one_table(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("--settings", "sim-r8")
    for row in ("zero-filled", "cg-sense"):
        mri.main(arguments(folder, tmp_path / f"{row}.json", *settings, "--rows", row))
    capsys.readouterr()
    out, parts = tmp_path / "m.json", [tmp_path / f"{row}.json" for row in ("zero-filled", "cg-sense")]
    mri.main(arguments(folder, out, *settings, "--rows", "zero-filled", "cg-sense", "tv", "--merge", *parts))
    text = capsys.readouterr().out
    assert "tv, slices" in text and "zero-filled, slices" not in text and "cg-sense, slices" not in text
    assert set(read(out)["summaries"]["sim-r8"]) == {"zero-filled", "cg-sense", "tv"}


def test_rows_without_a_prior_are_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m.json"
    args = arguments(tmp_path, out, "--settings", "sim-r8", "--rows", "cg-sense", "patch", "tv")
    mri.main([*args, "--list"])
    assert "| sim-r8 | patch | 0/2 | no weights |" in capsys.readouterr().out and not out.exists()
    mri.main(args)
    text, result = capsys.readouterr().out, read(out)
    assert "No weights: patch (" in text and result["no_weights"] == ["patch"]
    assert set(result["summaries"]["sim-r8"]) == {"cg-sense", "tv"}
    assert {verdict["outcome"] for verdict in result["verdicts"]} == {"not measured"}
    mri.main([*args, "--list"])
    assert "| sim-r8 | tv | 2/2 |" in capsys.readouterr().out


def test_a_damaged_file_does_not_end_the_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_volume(tmp_path / _mri.HELD_OUT, -torch.rand(3, SIZE, SIZE).numpy(), units="a.u.")
    (tmp_path / mri.SCAN).parent.mkdir(parents=True)
    shutil.copy(folder / mri.SCAN, tmp_path / mri.SCAN)
    monkeypatch.setenv("INVRECON_DATA", str(tmp_path))
    out = tmp_path / "out" / "m.json"
    out.parent.mkdir()
    mri.main(arguments(folder, out, "--settings", "sim-r8", "real-r8", "--rows", "zero-filled"))
    result = read(out)
    assert len(result["parts"]) == 2 and list(result["failures"]) == ["Simulated, R = 8, pyrad-brain2"]
    assert "Failed: Simulated, R = 8, pyrad-brain2: " in capsys.readouterr().out


def test_tuning(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mri, "GRIDS", {"cg-sense": (1e-3, 1e-2, 10.0), "tv": (1e-3, 10.0)})
    out = tmp_path / "m.json"
    mri.main(arguments(folder, out, "--tune"))
    tuned = read(out)["tuned"]
    assert set(tuned["tv"]["4"]["psnr"]) == {"0.001", "10.0"} and tuned["tv"]["8"]["best"] == 1e-3
    assert tuned["tv"]["4"]["at_the_edge"] and tuned["cg-sense"]["4"]["best"] != 10.0
    mri.main(arguments(folder, out, "--rows", "zero-filled", "--settings", "sim-r4"))
    assert read(out)["tuned"] == tuned, "a run of rows forgets nothing"


def test_weights_are_of_a_patient_that_nothing_is_tested_on() -> None:
    tested = {setting.file for setting in mri.SETTINGS.values()}
    assert {setting.file for setting in mri.TUNING.values()} == {mri.VALIDATION} and mri.VALIDATION not in tested
    assert mri.WEIGHTS.keys() == mri.GRIDS.keys()
    assert all(min(mri.GRIDS[row]) < weight < max(mri.GRIDS[row]) for row, weight in mri.WEIGHTS.items())


def test_the_prior_rows_take_the_method_of_the_shipped_configuration() -> None:
    method = LOAD_METHOD("recon_mri")
    assert method.needs_prior and vars(method)["clip"] is None, "complex images have no range"


def test_slices_are_the_middle_ones_or_spread() -> None:
    setting = mri.SETTINGS["sim-r4"]
    assert [replace(setting, num_slices=num).slices() for num in (1, 2, 3, 16)] == [[2], [1, 2], [1, 2, 3], [*range(5)]]
    assert replace(setting, num_slices=2, spread=True).slices() == [1, 3]


def test_masks_differ_and_the_scan_does_not() -> None:
    setting = mri.SETTINGS["real-r4"]
    (a,), (b,) = (mri.load_batches(setting, mask, SIZE, 1) for mask in (0, 1))
    assert a.id == ["espirit-full, mask 0/0000"] and b.id == ["espirit-full, mask 1/0000"]
    assert (a.mask != b.mask).any()
    truth, other = (batch.scale[0] * mri.magnitude(batch.reference)[0] for batch in (a, b))
    assert ((truth - other).norm() / truth.norm()) < 0.02  # maps come from the same calibration lines


def test_a_volume_is_the_sum_of_its_slices() -> None:
    target = torch.rand(4, 12, 10, generator=torch.Generator().manual_seed(0))
    estimate = target + 0.1 * torch.randn(4, 12, 10, generator=torch.Generator().manual_seed(1))
    rows = []
    for t, v in zip(target, estimate, strict=True):
        found = volume_metrics(t[None], v[None], float(target.max()))
        energy = float(t.double().square().sum())
        rows.append({"case": "a", "energy": energy, **{f"volume_{name}": found[name] for name in ("psnr", "ssim")}})
        rows[-1]["nmse"] = found["nmse"]
    assert mri.volume_summary(rows) == pytest.approx(volume_metrics(target, estimate), rel=1e-9)
