"""The tables of published comparisons: what is in them, their verdicts on rows made by hand, tiny runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import _common
from benchmarks._methods import find_methods
from benchmarks.claims import __main__ as claims
from benchmarks.claims import _compare, _lessons, _page, _verdicts, table_a, table_b, table_d, table_e, table_f
from benchmarks.claims._figures import curves_figure, dots_figure
from benchmarks.claims._problems import PROBLEMS
from benchmarks.claims._run import Run
from invrecon.errors import InputError
from invrecon.methods import ProximalDiffusion, TotalVariation
from invrecon.operators import BlockDownsample, FanBeamCT, UniformBlur
from invrecon.priors.weights import load_prior
from tests.cli.tiny import SIZE, make_prior, make_volume, slices_of_a_chest

TINY_TRAINING = ["--training-steps", "2", "--training-pixels", "1024", "--channels", "8"]


def rows(*psnr: float, **more: Any) -> list[dict[str, Any]]:
    return [{"case": "a", "slice": k, "patient": "a", "psnr": value, **more} for k, value in enumerate(psnr)]


def around(mean: float, spread: float = 0.0, **more: Any) -> list[dict[str, Any]]:
    return rows(*(mean + k + spread * (-1) ** k for k in range(6)), **more)


def outcomes(table: type[Run], setting: str, found: dict[str, Any]) -> dict[str, _verdicts.Verdict]:
    own = table.__new__(table)
    own.recipes = table.list_recipes()
    verdicts = [claim.judge(found) for claim in own.claims(PROBLEMS[setting])]
    assert len({verdict.claim for verdict in verdicts}) == len(verdicts)
    return {verdict.claim: verdict for verdict in verdicts}


def test_words_of_reproduction() -> None:
    entry = {"mean": 1.0, "low": 0.5, "high": 1.5, "num_cases": 4}
    verdict = _verdicts.reproduce("A beats B", entry, "+3.00 dB")
    assert verdict.outcome == "reproduced"
    assert verdict.because == "+1.00 [+0.50, +1.50] dB over 4 slices; reproduced above +0.00 dB; published: +3.00 dB"
    assert _verdicts.reproduce("A beats B", entry, "", limit=2.0).outcome == "not reproduced"
    assert _verdicts.reproduce("A beats B", entry, "", limit=1.0).outcome == "undecided"
    assert _verdicts.reproduce("A beats B", entry, "", limit=2.0, at_least=False).outcome == "reproduced"
    assert _verdicts.reproduce("A beats B", None, "+3.00 dB") == _verdicts.Verdict("A beats B", "not measured")


def test_contrasts_are_of_common_slices() -> None:
    a, b, c = rows(30, 31, 32), rows(29, 29), rows(1, 2, 3)
    found = _verdicts.contrast((1, a), (-1, b), (2, c))
    assert found is not None and (found["mean"], found["num_cases"]) == (4.5, 2)
    assert _verdicts.contrast((1, a), (-1, None)) is None
    shares = _verdicts.contrast((1, rows(1, 1, ssim=0.9)), (-1, rows(1, 1, ssim=0.5)), metric="ssim")
    assert shares is not None and shares["mean"] == pytest.approx(0.4)


def test_the_lead_is_over_the_best_other_row() -> None:
    table = {"ours": around(35), "good": around(34), "bad": around(20), "tv": around(34.5)}
    found = _compare.lead("ours", lambda key: key != "tv")(table)
    assert found is not None and found["mean"] == pytest.approx(1.0)
    assert _compare.lead("good")(table)["mean"] == pytest.approx(-1.0)  # type: ignore[index]
    assert _compare.lead("ours")({"ours": around(1)}) is None


def test_claims_of_methods() -> None:
    psnr = {"PaDIS": 33, "PaDIS-whole": 32, "VEDDNM-warm": 36, "FBP": 28, "TotalVariation": 30, "AnnealedPnPADMM": 37,
            "LangevinDirect-warm": 33.02}  # fmt: skip
    found = {key: around(value, 0.2 * (key == "PaDIS")) for key, value in psnr.items()}
    verdicts = outcomes(table_a.MethodsTable, "20-clean", found)
    assert verdicts["PaDIS is better than whole-image diffusion (DPS), in 50 evaluations"].outcome == "reproduced"
    because = verdicts["PaDIS is better than whole-image diffusion (DPS), in 50 evaluations"].because
    assert because.endswith("published: +0.73 dB with up to 1000")
    assert verdicts["PaDIS is better than VE-DDNM, in 50 evaluations"].outcome == "not reproduced"
    assert verdicts["PaDIS is better than Langevin, in 50 evaluations"].outcome == "undecided"
    assert verdicts["PaDIS is better than patch averaging, in 50 evaluations"].outcome == "not measured"
    (again,) = (v for claim, v in verdicts.items() if "independent reproduction" in claim)
    assert again.outcome == "reproduced" and again.because.endswith("published: +3.67 dB with up to 1000")
    assert (
        verdicts["The default sampler is the best with the patch prior in at most 50 evaluations"].outcome
        == "reproduced"
    )
    assert verdicts["The default sampler is at least 5 dB above total variation"].outcome == "reproduced"
    deblur = outcomes(table_a.MethodsTable, "deblur", found)
    assert "PaDIS is better than VE-DDNM, in 50 evaluations" not in deblur, "the talk has no number there"


def test_every_method_is_in_the_table_at_an_equal_number_of_evaluations() -> None:
    recipes = table_a.MethodsTable.list_recipes()
    for name in find_methods():
        assert {name, f"{name}-warm"} & recipes.keys() or name == "PaDISNormalised", name
    assert recipes[table_a.FULL].method.num_evaluations == 1000
    assert max(r.method.num_evaluations for key, r in recipes.items() if key != table_a.FULL) == table_a.EVALUATIONS
    assert {recipes[key].method.num_evaluations for key in ("PaDIS", "PaDIS-whole", "LangevinDirect-warm")} == {50}
    assert {key for key, _ in table_a.OTHERS.values()} <= recipes.keys()
    table = table_a.MethodsTable.__new__(table_a.MethodsTable)
    table.recipes = recipes
    for key in ("PaDIS", "AnnealedPnPADMM", "ProximalDiffusion", "DDS-warm"):
        method = recipes[key].method
        assert table.start_of(method, PROBLEMS["20-clean"]).schedule.sigma_max == 0.1
        few = table.start_of(method, PROBLEMS["8-clean"])
        assert few.schedule.sigma_max == 0.3 and type(few) is type(method)
        assert key in table.tuned or table.method(key, PROBLEMS["20-clean"]) is method
    assert table.method("FBP", PROBLEMS["8-clean"]) is recipes["FBP"].method


def test_claims_of_training_sets() -> None:
    small = {f"{kind}-{num}": around(value) for kind, values in table_e.PUBLISHED.items()
             for num, value in zip(table_e.NUMBERS, values)}  # fmt: skip
    verdicts = outcomes(table_e.TrainingSetsTable, "20-clean", small)
    assert {verdict.outcome for verdict in verdicts.values()} == {"reproduced"}, "the talk's own numbers"
    (lost,) = (verdict for claim, verdict in verdicts.items() if "lose less" in claim)
    assert lost.because.startswith("+2.43") and lost.because.endswith("published: +2.43 dB")
    del small["whole-28"]
    verdicts = outcomes(table_e.TrainingSetsTable, "20-clean", small)
    assert sum(verdict.outcome == "not measured" for verdict in verdicts.values()) == 2
    assert max(table_e.NUMBERS) == 413


def test_claims_of_choices() -> None:
    found = {"default": around(37, relative_residual=1e-4), "norm": around(30, relative_residual=0.02)}
    found["normalised"] = around(33, relative_residual=0.005)
    verdicts = {k: v.outcome for k, v in outcomes(table_f.ChoicesTable, "20-clean", found).items()}
    stalls = "The data step by the gradient of the norm (PaDIS's code) has stalled after 32 evaluations: "
    stalls += "relative residual above 1 %"
    assert verdicts[stalls] == "reproduced"
    goes_on = "The data step in units of the operator's norm has not stalled after 32 evaluations: "
    assert verdicts[goes_on + "relative residual below 1 %"] == "reproduced"
    assert verdicts["2 shifts an evaluation are better than one"] == "not measured"


@pytest.mark.parametrize("table", claims.CLASSES[:-1], ids=lambda table: table.letter)
def test_claims_speak_of_rows_that_there_are(table: type[Run]) -> None:
    asked: set[str] = set()

    class Noted(dict):
        def get(self, key: str, default: Any = None) -> Any:
            asked.add(key)
            return default

    known = set(table.list_recipes())
    for setting in (*table.problems, *table.others):
        outcomes(table, setting, Noted())
    assert asked and asked <= known
    assert table.reference in known and {recipe.title for recipe in table.list_recipes().values()}


def test_problems(tmp_path: Path) -> None:
    bench = _common.Bench(_common.Record(None, "x", {}), SIZE)
    kinds = {name: type(bench.operator(PROBLEMS[name])) for name in ("fan", "deblur", "deblur-heavy", "sr")}
    assert list(kinds.values()) == [FanBeamCT, UniformBlur, UniformBlur, BlockDownsample]
    assert bench.operator(PROBLEMS["fan"]).measurement_shape == (1, 180, 2 * SIZE)
    assert bench.operator(PROBLEMS["sr"]).measurement_shape == (1, SIZE // 4, SIZE // 4)
    assert not {"fan", "8-clean"} & _common.SETTINGS.keys(), "other benchmarks go through all settings"
    make_volume(tmp_path / "data.h5", slices_of_a_chest(SIZE))
    method = table_a.MethodsTable.list_recipes()["FBP"].method
    found = {name: bench.identity(PROBLEMS[name], method, None, str(tmp_path / "data.h5")) for name in PROBLEMS}
    assert len(set(found.values())) == len(PROBLEMS)


def test_what_layout_and_lesson_decide_is_in_a_fingerprint(tmp_path: Path) -> None:
    prior = str(make_prior(tmp_path / "patch.safetensors"))
    make_volume(tmp_path / "data.h5", slices_of_a_chest(SIZE))
    batch = _common.CaseBatch(
        id=["a/0000"], index=[0], patient=["a"], source=[str(tmp_path / "data.h5")], voxel_mm=[None], reference=None
    )
    bench, setting = _common.Bench(_common.Record(None, "x", {}), SIZE), PROBLEMS["20-clean"]
    plain = _common.Entry("row", table_f.make(table_f.karras()), prior)
    two, four = ({"class": "RandomShift", "num_shifts": n} for n in (2, 4))
    variants = [plain, replace(plain, layout=two), replace(plain, layout=four), replace(plain, weights="w"),
                replace(plain, weights="v")]  # fmt: skip
    assert len({bench.locate(setting, entry, batch)[1] for entry in variants}) == len(variants)
    absent = replace(plain, prior="nowhere", weights="w")
    assert bench.locate(setting, absent, batch)[1] == bench.locate(setting, variants[3], batch)[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data under the names of the real ones, training volumes among them, and two priors."""
    folder = tmp_path_factory.mktemp("tables")
    chest = slices_of_a_chest(SIZE)
    make_volume(folder / _common.HELD_OUT, chest, voxel_mm=(3.0, 16.0, 16.0))
    for index, name in enumerate(_lessons.TRAINING):
        make_volume(folder / name, chest[index : index + 2], patient=f"patient-{index}")
    for kind in ("patch", "whole"):
        make_prior(folder / f"{kind}_ct.safetensors", kind=kind)
    return folder


@pytest.fixture
def tiny(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[dict[str, Any], Path]]:
    """Runs a table on two slices; returns its record and where it is."""
    monkeypatch.setenv("INVRECON_DATA", str(folder))
    _common.load_batches.cache_clear()
    _lessons.training_hashes.cache_clear()
    priors = [f"{name}={folder / name}.safetensors" for name in ("patch_ct", "whole_ct")]

    def run(letter: str, *more: str) -> tuple[dict[str, Any], Path]:
        out = tmp_path / f"{letter}.json"
        options = ["--tables", letter, "--json", str(out), "--slices", "3,5", "--size", str(SIZE), "--threads", "1"]
        networks = ["--folder", str(tmp_path / "priors"), *TINY_TRAINING]
        claims.main([*options, *networks, *more, "--priors", *priors])
        return json.loads(out.read_text()) if out.is_file() else {}, out

    return run


def test_every_method_runs_on_every_problem(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(table_a, "EVALUATIONS", 2)
    monkeypatch.setattr(table_a.MethodsTable, "tuned", {})  # what was found for as many evaluations as the table has
    monkeypatch.setitem(table_a.AVERAGE, "stride", 6)
    keys = ["FBP", "DDS-warm", "DDRM", "PaDIS", "PaDIS-whole", "PaDIS-average", "ProximalDiffusion"]
    content, out = tiny("a", "--settings", "8-clean", "sr", "--rows", *keys)
    assert content["failures"] == {}
    found = {name: set(setting["summaries"]) for name, setting in content["settings"].items()}
    assert found["sr"] == set(keys)
    assert found["8-clean"] == found["sr"] - {"DDRM"}, "CT has no singular values"
    slices = {key: sum(part.startswith(f"sr/{key}/") for part in content["parts"]) for key in ("DDS-warm", "PaDIS")}
    assert slices == {"DDS-warm": 2, "PaDIS": 1}
    page = out.with_suffix(".md").read_text()
    assert "PaDIS (DPS, patch prior), warm start" in page and "published: +0.30 dB" in page
    assert "## 8 views" in page and str(tmp_path) not in page

    monkeypatch.setattr(_common.Bench, "task", lambda *args, **kwargs: pytest.fail("something is computed again"))
    before = out.read_bytes()
    tiny("a", "--settings", "8-clean", "sr", "--rows", *keys)
    assert out.read_bytes() == before
    capsys.readouterr()
    tiny("a", "--settings", "sr", "--list", "--rows", "FBP", "DDS")
    text = capsys.readouterr().out
    assert "| sr | FBP | 2/2 |" in text and "| sr | DDS | 0/1 |" in text and out.read_bytes() == before


def test_problems_from_end_to_end(tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_b, "TotalVariation", lambda: TotalVariation(num_iterations=10))
    monkeypatch.setattr(table_b, "ProximalDiffusion", lambda: ProximalDiffusion(num_levels=2))
    content, out = tiny("b")
    assert content["failures"] == {} and set(content["settings"]) == {"60-clean", "fan", "deblur-heavy"}
    assert all(set(found["summaries"]) == {"fbp", "tv", "whole", "patch"} for found in content["settings"].values())
    verdict = content["settings"]["fan"]["verdicts"][0]
    assert verdict["claim"] == "The patch prior is better than the baseline"
    assert verdict["because"].endswith("published: +9.84 dB")
    assert Image.open(out.with_name("b.png")).width > 500 and "](b.png)" in out.with_suffix(".md").read_text()


def test_tables_of_several_processes_make_one_page(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(table_b, "ProximalDiffusion", lambda: ProximalDiffusion(num_levels=2))
    common = ("--settings", "fan", "--batch-size", "16")
    for row in ("fbp", "patch"):
        _, out = tiny("b", *common, "--rows", row)
        out.rename(tmp_path / f"{row}.json")
    capsys.readouterr()
    merged = [str(tmp_path / f"{row}.json") for row in ("fbp", "patch")]
    content, _ = tiny("b", *common, "--rows", "fbp", "patch", "--merge", *merged)
    assert "s a slice\n" not in capsys.readouterr().out, "nothing is computed again"
    assert {row: len(own) for row, own in content["settings"]["fan"]["summaries"].items()}.keys() == {"fbp", "patch"}
    assert len(content["parts"]) == 4, "two slices, fewer than a batch"

    monkeypatch.setattr(claims, "FOLDER", tmp_path)
    monkeypatch.setattr(_common, "start", lambda *args: pytest.fail("something is opened to be computed"))
    claims.main(["--page", str(tmp_path / "docs" / "claims.md")])
    page = (tmp_path / "docs" / "claims.md").read_text()
    (verdict,) = (v for v in content["settings"]["fan"]["verdicts"] if v["claim"].endswith("better than the baseline"))
    assert f"| {verdict['claim']} | {PROBLEMS['fan'].title} | {verdict['outcome']} | {verdict['because']} |" in page
    assert "(../b.md)" in page and "not measured" not in page and "Not measured yet: " in page
    assert "## (a)" not in page and str(tmp_path) not in page
    with pytest.raises(InputError, match="no record of a table"):
        claims.main(["--page", str(tmp_path / "x.md"), "--tables", "a"])


def test_verdicts_of_all_tables_are_in_the_same_words() -> None:
    verdicts = [{"claim": "EM helps", "outcome": "holds", "because": "+1.00 dB over 2 slices; holds above +0.00 dB"}]
    found = list(_page.list_verdicts({"settings": {"20-clean": {"verdicts": verdicts}, "fan": {"verdicts": []}}}))
    assert found == [("EM helps", "20 views", "reproduced", "+1.00 dB over 2 slices; reproduced above +0.00 dB")]


def test_networks_are_trained_once(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(table_d, "ProximalDiffusion", lambda: table_f.make(table_f.karras(2)))
    content, _ = tiny("d", "--settings", "20-clean", "--rows", "ours-with", "ours-without")
    assert set(content["settings"]["20-clean"]["summaries"]) == {"ours-with", "ours-without"}
    assert capsys.readouterr().out.count("training Lesson") == 2
    networks = sorted((tmp_path / "priors").glob("*/prior.safetensors"))
    stems = [load_prior(path)[0].denoiser.network.stem.weight for path in networks]
    seen = sorted(float(stem[:, 1:].abs().max()) for stem in stems)
    assert seen[0] == 0 < seen[1], "one of them sees no positions"
    assert all(stem[:, 0].abs().max() > 0 for stem in stems)

    before = [path.read_bytes() for path in networks]
    for path in networks:  # a row outlives the network, which comes back the same
        path.unlink()
        (path.parent / "checkpoints" / "last.ckpt").unlink()
    again, _ = tiny("d", "--settings", "20-clean", "--rows", "ours-with", "ours-without")
    assert again == content and "training Lesson" not in capsys.readouterr().out
    tiny("d", "--settings", "20-clean", "--rows", "ours-with", "ours-without", "--redo")
    assert [path.read_bytes() for path in networks] == before


def test_an_interrupted_training_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INVRECON_DATA", str(folder))
    _lessons.training_hashes.cache_clear()
    schools = [_lessons.School(SIZE, 10 * 1024, 1024, 8, tmp_path / name, {}) for name in ("whole", "cut")]
    lesson, step, seen = _lessons.Lesson(num_slices=3), _lessons.ScoreMatching.training_step, []

    def cut(self: Any, batch: Any, batch_index: int) -> Any:
        seen.append(self.global_step)
        if len(seen) == 4:
            raise InputError("the power is off")
        return step(self, batch, batch_index)

    undisturbed = schools[0].teach(lesson)
    with monkeypatch.context() as patch:
        patch.setattr(_lessons.ScoreMatching, "training_step", cut)
        with pytest.raises(InputError, match="power"):
            schools[1].teach(lesson)
        path = schools[1].teach(lesson)
    assert 0 not in seen[4:], "it did not begin again"
    assert path.read_bytes() == undisturbed.read_bytes()


def test_lessons(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INVRECON_DATA", str(folder))
    _lessons.training_hashes.cache_clear()
    school = _lessons.School(256, 250 * 100352, 100352, 24, tmp_path, {})
    for size in (*_lessons.SIZES, None):
        sizes, shares = school.sizes(_lessons.Lesson(size))
        counts = [max(1, round(100352 / side**2)) * side**2 for side in sizes]
        pixels = school.num_steps(_lessons.Lesson(size)) * float(np.dot(shares, counts))
        assert abs(pixels / school.num_pixels - 1) < 0.01, "equal budgets"
    small = _lessons.School(SIZE, 1024, 1024, 8, tmp_path, {})
    few, more, everything = (small.data(_lessons.Lesson(None, num)).load()[0] for num in (2, 5, None))
    assert (len(few), len(more), len(everything)) == (6, 15, 36), "three scales of 2, 5 and all 12 slices"
    assert torch.equal(few[:2], more[:2]), "small sets are part of large ones"
    names = small.data(_lessons.Lesson())
    names.load()
    assert "Lung_Dx-A0002.h5" not in names.train_names and len(names.train_names) == 6
    identities = {small.identity(lesson) for lesson in (
        _lessons.Lesson(), _lessons.Lesson(None), _lessons.Lesson(num_slices=5), _lessons.Lesson(positions=False),
    )}  # fmt: skip
    assert len(identities) == 4 and school.identity(_lessons.Lesson()) not in identities
    with h5py.File(folder / _lessons.TRAINING[0], "r+") as file:
        file.attrs["note"] = "another file"
    before = small.identity(_lessons.Lesson())
    assert replace(small, machine={"threads": 8}).identity(_lessons.Lesson()) == before, "wherever it is taught"
    _lessons.training_hashes.cache_clear()
    _common.file_hash.cache_clear()
    assert small.identity(_lessons.Lesson()) != before, "of other data"


def test_figures(tmp_path: Path) -> None:
    entry = {"mean": 1.0, "low": 0.5, "high": 1.5, "num_cases": 4}
    alone = {"mean": 2.0, "low": None, "high": None, "num_cases": 1}
    dots = dots_figure(tmp_path / "d.png", {"20 views": {"a": entry, "b": alone}, "sr": {"b": entry}}, "PSNR [dB]")
    curves = curves_figure(tmp_path / "c.png", {"patch": {28: entry, 413: alone}, "whole": {28: alone}}, "n", "dB")
    assert Image.open(dots).width > 500 and Image.open(curves).height > 300


def test_what_cannot_be_is_one_sentence() -> None:
    for args, words in (
        (["--tables", "a,z"], "There is no table z, expected some of a, b, c"),
        (["--tables", "b", "--rows", "pach"], "There is no row pach, expected some of fbp, tv, whole, patch"),
        (["--tables", "c,e", "--settings", "sr"], "No table has both the rows and the settings sr"),
        (["--tables", "a,b", "--json", "x.json"], "--json is of one table"),
        (["--merge", "x.json"], "--merge is of one table"),
    ):
        with pytest.raises(InputError, match=words):
            claims.parse(args)
    options = claims.parse(["--tables", "a,b", "c", "--rows", "p8", "patch"])
    assert options.tables == ["b", "c"], "tables without any of the rows are left out"


def teardown_module() -> None:
    torch.set_num_threads(1)
