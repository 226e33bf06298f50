"""The battery of colour images on tiny data: every setting and row, resumed runs, tuning, figures, what is missing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import _common, rgb
from benchmarks._common import Entry
from benchmarks._record import Record
from invrecon.errors import InputError
from invrecon.methods import FBP, ProximalDiffusion
from invrecon.operators import GaussianBlur
from tests.cli.tiny import SIZE, make_photos, make_prior, make_rgb_prior


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs under the names of the real ones, other ones beside them, and a prior."""
    folder = tmp_path_factory.mktemp("rgb")
    photos = sorted(make_photos(folder / "photos").iterdir())
    names = [*rgb.KODAK[:2], "rgb/test/astronaut.png", *rgb.VALIDATION]
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(photos[number % len(photos)]).resize((SIZE + 8, SIZE)).save(folder / name)
    make_rgb_prior(folder / "patch.safetensors")
    return folder


@pytest.fixture(autouse=True)
def tiny(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Points the benchmark at the tiny data, and gives the number of threads back."""
    monkeypatch.setenv("INVRECON_DATA", str(folder))
    monkeypatch.setattr(rgb, "ITERATIONS", {"tv": 25, "wavelet": 3})
    yield
    torch.set_num_threads(1)


def run(folder: Path, out: Path, *more: object) -> None:
    options = ("--size", SIZE, "--threads", 1, "--max-images", 2, "--prior", folder / "patch.safetensors")
    rgb.main([str(option) for option in (*options, "--json", out, *more)])


def read(path: Path) -> dict[str, Any]:
    text = path.read_text()
    assert str(path.parents[1]) not in text and str(Path(__file__).parents[2]) not in text, "a path of this machine"
    return json.loads(text)


def test_every_row_in_every_setting(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, figure = tmp_path / "r.json", tmp_path / "r.png"
    short = ("--evaluations", 3, "--rows", "baseline", "tv", "wavelet", "DPS", "DAPSExact", "DDRM", "patch", "patch-1")
    run(folder, out, *short)
    text, result = capsys.readouterr().out, read(out)
    assert not result["failures"] and not result["no_weights"]
    assert len(result["parts"]) == 2 * (8 * len(rgb.SETTINGS) - 1), "DDRM finds no singular values of a path"
    assert all(row["patient"] in ("kodim01", "kodim02") for row in result["parts"].values())
    assert not any("psnr_body" in row for row in result["parts"].values())
    for setting in rgb.SETTINGS:
        compared = result["differences"][setting]
        assert {"patch - tv", "DPS - tv", "patch - DPS", "patch - DAPSExact"} <= compared.keys()
        assert compared["patch - tv"]["num_cases"] == compared["patch - tv"]["num_patients"] == 2
    assert "| Inpainting, box | DPS, 3 evaluations |" in text and "over images" in text

    run(folder, out, *short, "--settings", "box", "sr-block", "--figure", figure, "--figure-image", "kodim02")
    assert "dB, " not in capsys.readouterr().out.partition("| Setting")[0], "a second run computes nothing"
    assert read(out)["parts"] == result["parts"]
    with Image.open(figure) as sheet:
        assert sheet.width > 2 * sheet.height, "two settings; baseline, TV, DPS, ours and truth"


def test_a_row_does_not_depend_on_its_batch(folder: Path, tmp_path: Path) -> None:
    common = ("--settings", "random", "--rows", "DDRM", "tv", "--evaluations", 2)
    run(folder, tmp_path / "one.json", *common, "--batch-size", 1)
    run(folder, tmp_path / "two.json", *common, "--batch-size", 2)
    one, two = (read(tmp_path / name)["parts"] for name in ("one.json", "two.json"))
    assert {key: row["psnr"] for key, row in one.items()} == pytest.approx({k: row["psnr"] for k, row in two.items()})


def test_another_image_is_computed_anew(folder: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.png" for number in range(2)]
    for level, file in enumerate(files):
        Image.new("RGB", (SIZE, SIZE), (90 * level, 80, 70)).save(file)
    bench = rgb.RGBBench(Record(None, "rgb", {}), SIZE)
    (batch,) = rgb.load_images(rgb.KODAK[:2], SIZE, 2)
    assert batch.id == ["rgb/kodim01", "rgb/kodim02"] and len(set(batch.source)) == 2
    named = [replace(batch, source=[batch.source[0], str(file)]) for file in files]
    identities = {bench.locate(rgb.SETTINGS["box"], Entry("baseline", FBP()), own)[1] for own in (batch, *named)}
    assert len(identities) == 3, "any image of a batch counts, not its first alone"


def test_rows_without_a_prior_are_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out" / "r.json"
    out.parent.mkdir()
    common = ("--settings", "gauss", "--rows", "tv", "DPS", "whole", "patch")
    run(tmp_path, out, *common, "--list")
    assert "| gauss | DPS | 0/2 | no weights |" in capsys.readouterr().out and not out.exists()
    run(tmp_path, out, *common)
    assert set(read(out)["summaries"]["gauss"]) == {"tv"}
    assert read(out)["no_weights"] == ["DPS", "whole", "patch"]
    run(tmp_path, out, *common, "--list")
    assert "| gauss | tv | 2/2 |" in capsys.readouterr().out


def test_a_prior_of_other_images_is_refused(tmp_path: Path) -> None:
    prior = make_prior(tmp_path / "grey.safetensors")
    out = tmp_path / "out" / "r.json"
    out.parent.mkdir()
    run(tmp_path, out, "--settings", "gauss", "--rows", "patch", "--prior", prior)
    assert "intensity scale" in next(iter(read(out)["failures"].values()))


def test_tuning(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rgb, "GRIDS", {"tv": (3e-4, 3e-3, 30.0), "wavelet": (1e-2, 30.0)})
    monkeypatch.setattr(rgb, "ITERATIONS", {"tv": 200, "wavelet": 50})
    out = tmp_path / "r.json"
    run(folder, out, "--tune", "--settings", "random")
    result = read(out)
    assert result["tuned"]["tv"].keys() == {"random"}
    assert result["tuned"]["tv"]["random"]["best"] != 30.0 and result["tuned"]["wavelet"]["random"]["at_the_edge"]
    assert len(result["parts"]) == (3 + 2) * len(rgb.VALIDATION)
    run(folder, out, "--rows", "baseline", "--settings", "random")
    assert read(out)["tuned"] == result["tuned"], "a run of rows forgets nothing"


def test_weights_are_not_chosen_on_test_images() -> None:
    assert not set(rgb.VALIDATION) & set(rgb.KODAK)
    for row, by_setting in rgb.WEIGHTS.items():
        assert by_setting.keys() == rgb.SETTINGS.keys()
        assert all(min(rgb.GRIDS[row]) < weight < max(rgb.GRIDS[row]) for weight in by_setting.values())


def test_the_battery_has_its_published_numbers() -> None:
    bench = rgb.RGBBench(Record(None, "rgb", {}))
    operators = {name: bench.operator(setting) for name, setting in rgb.SETTINGS.items()}
    assert all(operator.image_shape == (3, 256, 256) for operator in operators.values())
    x = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    default = GaussianBlur(256, num_channels=3, boundary="reflect")
    assert torch.equal(operators["gauss"](x), default(x)), "61 x 61 pixels, std 3"
    for name in ("sr-bicubic", "sr-block"):
        assert operators[name].measurement_shape == (3, 64, 64)
    missing = {name: 1 - operators[name](torch.ones_like(x)).mean().item() for name in ("box", "random")}
    assert missing == pytest.approx({"box": 0.25, "random": 0.7}, abs=1e-4)
    assert rgb.NOISE.std == 0.025 and all(setting.noise is rgb.NOISE for setting in rgb.SETTINGS.values())


def test_methods_are_the_published_ones_unless_they_are_shortened_or_warm() -> None:
    bench = rgb.RGBBench(Record(None, "rgb", {}), SIZE)
    gauss = rgb.SETTINGS["gauss"]
    tables = rgb.Tables(bench, "prior", None, [])
    evaluations = {row: tables.entry(gauss, row).method.num_evaluations for row in rgb.PUBLISHED}
    assert evaluations == {"DPS": 1000, "DAPS": 1000, "DAPSExact": 1000, "DiffPIR": 100, "DDRM": 20, "DDNMPlus": 100}
    assert _common.plain(tables.entry(gauss, "patch").method) == _common.plain(ProximalDiffusion())
    assert tables.entry(gauss, "patch-1").method.schedule.sigma_max == 1.0  # type: ignore[attr-defined]
    changed = rgb.Tables(bench, "prior", None, [], evaluations=50, warm=0.3)
    entry = changed.entry(gauss, "DPS")
    assert entry.label == "DPS, 50 evaluations, from 0.3" and entry.method.num_evaluations == 50
    assert changed.entry(gauss, "DDRM").label == "DDRM", "it starts at the data"


def test_wrong_counts_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--max-images is 0"):
        run(folder, tmp_path / "r.json", "--max-images", 0)
