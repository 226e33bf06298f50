"""Fitted networks on tiny data: every row in every setting, and curves that change nothing in what they show."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import _common, _dip, _mri, dip, mri
from invrecon.data.intensity import MAGNITUDE
from invrecon.data.phantoms import ellipse_phantom
from invrecon.methods import ProximalDiffusion, TotalVariation
from invrecon.methods.dip import DIP, DIPUNet, HeldOutStop, Purification, UDiGDIP
from invrecon.operators import RandomLines
from invrecon.rng import make_generator
from tests.cli.tiny import NETWORK, SIZE, make_prior, make_volume, slices_of_a_chest

ITERATIONS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data under the names of the real ones, and four priors."""
    folder = tmp_path_factory.mktemp("dip")
    heads = 1000 * torch.stack([0.2 + ellipse_phantom(SIZE, make_generator(i, "head"))[0] for i in range(4)])
    for name in (_common.HELD_OUT, _common.VALIDATION):
        make_volume(folder / name, slices_of_a_chest(SIZE), voxel_mm=(2.0, 2.0, 3.0))
    for name in (_mri.HELD_OUT, _mri.VALIDATION):
        make_volume(folder / name, heads.numpy(), units="a.u.")
    for kind in ("patch", "whole"):
        make_prior(folder / f"ct-{kind}.safetensors", kind)
        network = {**NETWORK, "image_channels": 2}
        make_prior(folder / f"mri-{kind}.safetensors", kind, network, intensity=asdict(MAGNITUDE))
    return folder


@pytest.fixture(autouse=True)
def tiny(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Points the benchmark at the tiny data, with small networks and short methods."""
    monkeypatch.setenv("INVRECON_DATA", str(folder))
    _common.load_batches.cache_clear()
    guided: dict[str, Any] = {"purification": Purification(num_levels=2), "num_inner": 1000}
    fits = {
        row: partial(kind, network=DIPUNet([4, 8]), **(guided if kind is UDiGDIP else {}))
        for row, kind in dip.FITS.items()
    }
    monkeypatch.setattr(dip, "FITS", fits)
    monkeypatch.setattr(_dip, "EVERY", 5)
    monkeypatch.setattr(mri, "ITERATIONS", {"tv": 25})
    methods = {
        "udig_dip_mri": UDiGDIP(Purification(num_levels=2)),
    }
    monkeypatch.setattr(mri, "load_method", methods.__getitem__)
    monkeypatch.setattr(mri, "ProximalDiffusion", partial(ProximalDiffusion, num_levels=2))
    monkeypatch.setattr(dip, "ProximalDiffusion", partial(ProximalDiffusion, num_levels=2))
    monkeypatch.setattr(dip, "TotalVariation", partial(TotalVariation, num_iterations=25))
    for known in (dip.SETTINGS, dip.TUNING):
        few = {name: replace(own, sampling=RandomLines(2, 0.32)) for name, own in known.items() if "mri" in name}
        for name, setting in few.items():
            monkeypatch.setitem(known, name, setting)
        for name in ("ct-18", "ct-30"):
            chosen = known[name].slices.split(",")[:2]
            monkeypatch.setitem(known, name, replace(known[name], slices=",".join(str(int(i) % 10) for i in chosen)))
    yield
    torch.set_num_threads(1)


def arguments(folder: Path, out: Path, *more: object) -> list[str]:
    priors = [option for name in dip.PRIORS for option in (f"--{name}", folder / f"{name}.safetensors")]
    options = ("--size", SIZE, "--threads", 1, "--max-slices", 2, "--iterations", ITERATIONS, "--slices", "1,4")
    return [str(option) for option in (*options, "--json", out, *priors, *more)]


def read(path: Path) -> dict[str, Any]:
    text = path.read_text()
    assert str(path.parents[1]) not in text and str(Path(__file__).parents[2]) not in text, "a path of this machine"
    return json.loads(text)


def test_every_row_in_every_setting(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, figure = tmp_path / "d.json", tmp_path / "d.png"
    dip.main(arguments(folder, out, "--max-slices", 1))
    text, result = capsys.readouterr().out, read(out)
    assert not result["failures"] and not result["no_weights"]
    assert len(result["parts"]) == len(dip.ROWS) * len(dip.SETTINGS)
    for key, row in result["parts"].items():
        if key.split("/")[1] not in dip.FITS:
            assert "psnr_trace" not in row
            continue
        assert row["iterations"] == [5, 10, ITERATIONS] and len(row["value_trace"]) == 3
        assert row["best_psnr"] >= max(row["psnr"], row["last_psnr"])
        assert row["last_psnr"] == pytest.approx(row["psnr_trace"][-1], abs=1e-4)
        assert 1 <= row["kept_iteration"] <= ITERATIONS
        if row["kept_iteration"] in row["iterations"]:  # a curve is judged as the row is
            shown = row["psnr_trace"][row["iterations"].index(row["kept_iteration"])]
            assert shown == pytest.approx(row["psnr"], abs=1e-4)
        assert row["num_evaluations"] == (4 if "udig" in key else 0), "as many rounds in fewer iterations"
    judged = {verdict["claim"] for verdict in result["verdicts"]}
    assert "MRI, R = 8: udig-whole is at least 2 dB above dip" in judged and len(judged) == 3 * (2 + 3)
    assert result["differences"]["ct-18"]["udig-patch - dip"]["num_cases"] == 1
    assert "| CT, 30 views | aseq |" in text

    some = ("--settings", "ct-18", "mri-r8", "--rows", "dip", "udig-patch")
    dip.main(arguments(folder, out, *some, "--figure", figure))
    more = capsys.readouterr().out.partition("| Setting")[0]
    assert more.count("dB, ") == 4, "of two slices, one is there: a slice does not depend on how many there are"
    assert read(out)["differences"]["mri-r8"]["udig-patch - dip"]["low"] is not None
    assert figure.stat().st_size > 10_000

    parts = read(out)["parts"]
    assert parts.items() >= result["parts"].items()
    dip.main(arguments(folder, out, *some))
    assert "dB, " not in capsys.readouterr().out.partition("| Setting")[0], "a further run computes nothing"
    assert read(out)["parts"] == parts


def test_going_on_and_looking_change_nothing(folder: Path) -> None:
    setting, stop = dip.SETTINGS["ct-18"], HeldOutStop(patience=2)
    (batch,) = _dip.load_batches(replace(setting, slices="1"), SIZE, 1)
    common: dict[str, Any] = {"network": DIPUNet([4, 8]), "num_iterations": 40, "learning_rate": 0.05}
    bench = _dip.DIPBench(_common.Record(None, "dip", {}), SIZE)
    plain = _common.Bench.reconstruct(bench, setting, _common.Entry("plain", DIP(**common, stop=stop)), batch)
    going_on = bench.reconstruct(setting, _common.Entry("on", DIP(**common, stop=_dip.Continued(stop))), batch)
    assert torch.equal(plain.estimate.mean, going_on.estimate.mean)
    assert plain.rows[0]["psnr"] == going_on.rows[0]["psnr"]
    assert plain.estimate.stats["kept_iteration"] == [going_on.rows[0]["kept_iteration"]]
    assert plain.estimate.stats["num_iterations"][0] < 40 == going_on.estimate.stats["num_iterations"][0]


def test_rows_without_a_prior_are_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "d.json"
    dip.main(arguments(tmp_path, out, "--settings", "ct-18", "--rows", "direct", "udig-patch", "--max-slices", 1))
    result = read(out)
    assert result["no_weights"] == ["CT, 18 views, udig-patch"] and "No weights: udig-patch" in capsys.readouterr().out
    assert {verdict["outcome"] for verdict in result["verdicts"]} == {"not measured"}


def test_tuning_is_on_validation_patients(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    knobs = {"as it is": {}, "one level": {"weight": 0.1, "purification": Purification(num_levels=1)}}
    monkeypatch.setattr(dip, "CANDIDATES", knobs)
    out = tmp_path / "d.json"
    dip.main(arguments(folder, out, "--tune", "--settings", "ct-30", "mri-r8", "--max-slices", 1))
    tuned = read(out)["tuned"]
    assert set(tuned) == {"ct-30", "mri-r8"} and set(tuned["ct-30"]) == {"dip", *knobs}
    assert "Validation, MRI, R = 8" in capsys.readouterr().out
    assert all(key.startswith("tune-") for key in read(out)["parts"])


def test_data_that_are_missing_end_only_their_own_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    (tmp_path / "mri").symlink_to(folder / "mri")
    monkeypatch.setenv("INVRECON_DATA", str(tmp_path))
    path = tmp_path / "dip.json"
    dip.main(["--json", str(path), "--settings", "ct-18", "mri-r8", "--rows", "direct", "--size", str(SIZE)])
    content = json.loads(path.read_text())
    (failure,) = content["failures"].values()
    assert "4DLung" in failure and str(tmp_path) not in failure
    assert content["parts"]
