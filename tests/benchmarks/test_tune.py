"""Rows of the tables are tuned on validation slices, by `invrecon tune`, and the tables take what was found."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks import _common, tune
from benchmarks._methods import changed_arguments, warm
from benchmarks.claims import _tuned
from benchmarks.claims._problems import PROBLEMS
from benchmarks.claims.table_a import EVALUATIONS, MethodsTable
from benchmarks.claims.table_b import ProblemsTable
from invrecon.errors import InputError
from invrecon.methods import ADMMTV, DDS, AnnealedPnPADMM, TotalVariation
from invrecon.search import SPACES
from tests.cli.tiny import SIZE, make_volume, slices_of_a_chest


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """Tunes on two tiny slices; returns the folder of what was found."""
    make_volume(tmp_path / _common.VALIDATION, slices_of_a_chest(SIZE), voxel_mm=(2.0, 2.0, 3.0))
    monkeypatch.setenv("INVRECON_DATA", str(tmp_path))

    def tuned(*more: str) -> Path:
        options = ["--size", str(SIZE), "--threads", "1", "--slices", "2", "--trials", "2"]
        folders = ["--output", str(tmp_path / "trials"), "--tuned", str(tmp_path / "tuned")]
        tune.main([*options, *folders, *more])
        return tmp_path / "tuned"

    yield tuned
    torch.set_num_threads(1)


def test_what_is_found_is_what_the_tables_take(run, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = "deblur"
    folder = run("--tables", "a", "--settings", setting, "--rows", "WaveletL1", "TotalVariation")
    names = {path.stem for path in (folder / setting).iterdir()}
    assert names == {"WaveletL1", "TotalVariation"} and [path.name for path in folder.iterdir()] == [setting]
    text = (folder / setting / "TotalVariation.yaml").read_text()
    assert "trials: 2 of 2" in text and str(folder.parent) not in text, "a path of this machine"
    (knob,) = yaml.safe_load(text)["model"]["init_args"]["method"]["init_args"].items()
    assert knob[0] == "noise_weight"

    monkeypatch.setattr(_tuned, "FOLDER", folder)
    table = MethodsTable.__new__(MethodsTable)
    table.recipes = MethodsTable.list_recipes()
    for key, kind in (("TotalVariation", TotalVariation), ("ADMMTV", ADMMTV)):
        method = table.method(key, PROBLEMS[setting])
        assert type(method) is kind and getattr(method, knob[0]) == knob[1], "two solvers of one objective"
    assert table.method("SIRT", PROBLEMS[setting]) is table.recipes["SIRT"].method, "nothing was searched"
    other = ProblemsTable.__new__(ProblemsTable)
    other.recipes = ProblemsTable.list_recipes()
    assert getattr(other.method("tv", PROBLEMS[setting]), knob[0]) == knob[1]
    assert other.method("patch", PROBLEMS[setting]) is other.recipes["patch"].method


def test_tuning_never_sees_the_held_out_patient() -> None:
    with pytest.raises(InputError, match="test data"):
        tune.main(["--volume", _common.HELD_OUT])


def test_every_tuned_row_begins_as_its_table_has_it() -> None:
    table = MethodsTable.list_recipes()
    for key, name in MethodsTable.tuned.items():
        for setting in ("20-clean", "8-clean"):
            method = MethodsTable.start_of(table[key].method, PROBLEMS[setting])
            again = type(method)(**changed_arguments(method))
            assert _common.plain(again) == _common.plain(method), key
            assert again.num_evaluations <= EVALUATIONS and type(table[name].method).__name__ in SPACES
    few = MethodsTable.start_of(AnnealedPnPADMM(), PROBLEMS["8-clean"])
    assert changed_arguments(few) == {"sigma_max": 0.3}


def test_as_many_trials_for_every_row() -> None:
    """The settings in the repository are of one budget: a row that searched longer would be ahead by that alone."""
    found = {(path.parent.name, path.stem): path.read_text() for path in _tuned.FOLDER.glob("*/*.yaml")}
    assert tune.plan(["a"], None, None).keys() <= found.keys() <= tune.plan(["a", "b"], None, None).keys()
    cases = {f"{Path(_common.VALIDATION).stem}/{index:04d}" for index in _tuned.SLICES}
    for key, text in found.items():
        assert f"trials: {_tuned.TRIALS} of {_tuned.TRIALS} " in text and ", seed: 0" in text, key
        assert set(re.findall(r"^#   (\S+) [0-9a-f]{64}$", text, re.MULTILINE)) == cases, key


def test_what_cannot_be_tuned_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--rows has Totalvariation, expected some of .*TotalVariation"):
        tune.main(["--rows", "Totalvariation"])
    with pytest.raises(InputError, match=r"--settings has 20-noisy, expected some of .*deblur"):
        tune.main(["--settings", "20-noisy"])
    with pytest.raises(InputError, match="another --trials, --size the tables' own settings"):
        tune.main(["--trials", "3", "--size", "64"])
    (tmp_path / "x.yaml").write_text("model: 1")
    with pytest.raises(InputError, match=r"x\.yaml' is no tuned\.yaml"):
        _tuned.read_tuned(tmp_path / "x.yaml")
    with pytest.raises(ValueError, match="more than"):
        changed_arguments(warm(DDS(), 0.1))
