"""The benchmark of unconditional samples: it runs, continues, and sees a grid that is there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks import _common, generation
from benchmarks._methods import load_parts
from invrecon.errors import InputError
from invrecon.methods import Method
from invrecon.shared import find_shared
from tests.cli.tiny import SIZE, make_prior, make_volume, slices_of_a_chest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generation")
    make_volume(folder / _common.VALIDATION, slices_of_a_chest(SIZE), voxel_mm=(2.0, 2.0, 3.0))
    make_prior(folder / "patch.safetensors", kind="patch")
    make_prior(folder / "whole.safetensors", kind="whole")
    return folder


@pytest.fixture(autouse=True)
def data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("INVRECON_DATA", str(folder))
    _common.load_batches.cache_clear()
    yield
    torch.set_num_threads(1)


def arguments(folder: Path, out: Path, *more: object) -> list[str]:
    options = ("--size", SIZE, "--threads", 1, "--levels", 3, "--num-images", 3, "--batch-size", 2, "--slices", "0:6:2")
    priors = ("--prior", folder / "patch.safetensors", "--whole", folder / "whole.safetensors")
    return [str(option) for option in (*options, *priors, "--json", out, *more)]


def test_generation(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, figure = tmp_path / "g.json", tmp_path / "g.png"
    generation.main(arguments(folder, out))
    first = json.loads(out.read_text())
    assert str(folder) not in out.read_text() and str(tmp_path) not in out.read_text()
    assert list(first["summaries"]) == ["CT slices", "patch, shifted", "patch, fixed grid", "whole"]
    assert len(first["parts"]) == 3 * 3
    for summary in first["summaries"].values():
        assert summary["seams"]["num_cases"] == 3 and 0 < summary["seams"]["mean"] < 10
        assert summary["contrast"]["mean"] >= 1 and 0 <= summary["body"]["mean"] <= 1
    assert set(first["differences"]) == {"patch, fixed grid - patch, shifted"}
    assert "| whole | 3 |" in capsys.readouterr().out

    generation.main(arguments(folder, out, "--figure", figure, "--naive", folder / "patch.safetensors"))
    second, text = json.loads(out.read_text()), capsys.readouterr().out
    assert "naive patch, sample/0002" in text and "whole, sample/0002" not in text, "only what is new is computed"
    for key, part in first["parts"].items():
        kept = {name: value for name, value in part.items() if name != "seconds"}  # drawn again for the figure
        assert kept == {name: value for name, value in second["parts"][key].items() if name != "seconds"}
    assert figure.stat().st_size > 10_000
    # The same weights on the same grid from the same noise.
    assert second["summaries"]["naive patch"] == second["summaries"]["patch, fixed grid"]


def test_a_grid_is_seen_in_the_images_that_have_it() -> None:
    patch_size, size = 8, 36
    offset = generation.centred(size, patch_size)
    assert offset == 2  # five patches of 8 around 36 pixels
    cells = (torch.arange(size) + offset) // patch_size
    smooth = torch.linspace(0, 0.5, size).expand(1, 1, size, size)
    seamed = smooth + 0.1 * ((cells[:, None] + cells) % 2)
    plain, seen = generation.judge(torch.cat([smooth, seamed]), patch_size, offset)
    assert plain["seams"] == pytest.approx(1) and plain["contrast"] == pytest.approx(1)
    assert seen["seams"] > 10 and seen["contrast"] > 10
    assert plain["mean"] == pytest.approx(0.25) and seen["mean"] > 0.25


def test_the_sampler_is_that_of_the_shipped_configuration() -> None:
    settings = yaml.safe_load(find_shared("generate_ct", "configs", ".yaml").read_text())["model"]["init_args"]
    (shipped,) = load_parts("generate_ct", method=Method)
    ours = generation.make_sampler(settings["method"]["init_args"]["schedule"]["init_args"]["num_levels"])
    assert _common.plain(ours) == _common.plain(shipped)


def test_only_patches_have_a_grid(folder: Path, tmp_path: Path) -> None:
    whole = str(folder / "whole.safetensors")
    with pytest.raises(InputError, match="has to be a patch prior, got WholePrior"):
        generation.main(arguments(folder, tmp_path / "g.json", "--prior", whole))
