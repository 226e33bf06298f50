"""The demonstration in MRI: everything it promises is written, from the shipped slices, by the configs' methods."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import invrecon.methods
from invrecon import demo_mri
from invrecon.data.intensity import MAGNITUDE
from invrecon.demo import main as demo_ct
from invrecon.demo_mri import CENTERS, METHODS, main
from invrecon.methods import FBP, ProximalDiffusion, TotalVariation, WaveletL1
from invrecon.operators import EquispacedLines
from invrecon.operators.sampling import achieved_acceleration
from tests.cli.tiny import NETWORK, ROOT, files_in, make_prior

SIZE = 48
CONFIGS = {
    "Zero-filled": "zero_filled_mri",
    "TV": "tv_mri",
    "Wavelet l1": "wavelet_mri",
    "Patch diffusion": "recon_mri",
}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("demo_mri")
    prior = folder / "prior.safetensors"
    make_prior(prior, "patch", {**NETWORK, "image_channels": 2}, intensity=asdict(MAGNITUDE), image_size=SIZE)
    tiny = {
        "Zero-filled": FBP(clip=None),
        "TV": TotalVariation(weight=1e-3, bounds=(-4.0, 4.0), num_iterations=25),
        "Wavelet l1": WaveletL1(weight=1e-3, clip=None, num_iterations=5, num_scales=2),
        "Patch diffusion": ProximalDiffusion(num_levels=2, clip=None),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_mri, "SIZE", SIZE)
        patch.setattr(demo_mri, "METHODS", tiny)
        main(["--prior", str(prior), "--output", str(folder / "out"), "--slices", "3"])
    yield folder / "out"


def test_table_figures_and_page_are_written(output: Path) -> None:
    figures = {f"figures/mni152_sample_0003_R{acceleration}.png" for acceleration in CENTERS}
    assert files_in(output) == {"metrics.csv", "summary.json", "report.html", *figures}
    expected = {f"R = {acceleration}, {name}" for acceleration in CENTERS for name in METHODS}
    assert set(json.loads((output / "summary.json").read_text())) == expected
    page = (output / "report.html").read_text()
    assert all(setting in page for setting in expected)
    assert "magnitudes" in page and "HU" not in re.sub(r"base64,[^\"]*", "", page)
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)  # nothing is fetched


def test_less_of_kspace_gives_a_worse_zero_filled_image(output: Path) -> None:
    with open(output / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(METHODS) * len(CENTERS)
    psnr = {int(row["acceleration"]): float(row["psnr"]) for row in rows if row["method"] == "Zero-filled"}
    assert 10 < psnr[8] < psnr[4]


def test_the_accelerations_are_those_named() -> None:
    for acceleration, center in CENTERS.items():
        mask = EquispacedLines(acceleration, center)((256, 256), torch.Generator().manual_seed(0))
        assert float(achieved_acceleration(mask[None])) == pytest.approx(acceleration, rel=0.03)


def settings_of(x: Any) -> Any:
    return {key: settings_of(value) for key, value in vars(x).items()} if hasattr(x, "__dict__") else x


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_those_of_the_configs(name: str) -> None:
    config = yaml.safe_load((ROOT / "configs" / f"{CONFIGS[name]}.yaml").read_text())
    stated = config["model"]["init_args"]["method"]
    arguments = {key: tuple(v) if isinstance(v, list) else v for key, v in stated["init_args"].items()}
    expected = getattr(invrecon.methods, stated["class_path"])(**arguments)
    assert type(expected) is type(METHODS[name]) and settings_of(expected) == settings_of(METHODS[name])


@pytest.mark.parametrize("intensity", [None, "HU"])
def test_without_its_prior_it_says_so_in_a_sentence(intensity: str | None, tmp_path: Path) -> None:
    path = tmp_path / "absent.safetensors"
    if intensity:
        make_prior(path)
    with pytest.raises(SystemExit) as end:
        main(["--prior", str(path), "--output", str(tmp_path / "out")])
    expected = "is not a prior of complex MR images" if intensity else "There is no weights file"
    assert expected in str(end.value.code) and len(str(end.value.code).splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_demonstration_of_ct_takes_no_prior_of_mri(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        demo_ct(["--prior", "patch_mri", "--output", str(tmp_path / "out")])
    assert "is not a prior of CT images" in str(end.value.code) and not (tmp_path / "out").exists()
