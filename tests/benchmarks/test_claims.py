"""The claims: verdicts from intervals, shares of a gap, recipes as shipped, and a tiny run from end to end."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from benchmarks import _common
from benchmarks.claims import __main__ as claims
from benchmarks.claims import _recipes, _verdicts, table_g
from benchmarks.claims._figures import filled, rounds_figure
from invrecon.adapt import DDIP, SCD, Adaptation, PatchSelfSupervision, SelfSupervised, SuitabilityTest
from invrecon.errors import InputError
from invrecon.methods import FBP, DDSTransition, PaDISNormalised, ProximalDiffusion, Sampler, TotalVariation
from tests.cli.tiny import ROOT, SIZE, make_prior, make_volume, slices_of_a_chest


def rows(*psnr: float, **more: Any) -> list[dict[str, Any]]:
    return [{"case": "a", "slice": k, "patient": "a", "psnr": value, **more} for k, value in enumerate(psnr)]


def entry(low: float | None, high: float | None, mean: float = 1.0) -> dict[str, Any]:
    return {"mean": mean, "low": low, "high": high, "num_cases": 4}


@pytest.mark.parametrize(
    ("low", "high", "limit", "at_least", "word"),
    [
        (0.5, 1.5, 0.0, True, "holds"),
        (0.5, 1.5, 1.0, True, "undecided"),
        (0.5, 1.5, 2.0, True, "does not hold"),
        (0.5, 1.5, 2.0, False, "holds"),
        (0.5, 1.5, 1.0, False, "undecided"),
        (0.5, 1.5, 0.3, False, "does not hold"),
        (0.0, 0.0, 0.0, True, "undecided"),  # the same numbers twice: nothing is better
        (None, None, 0.0, True, "undecided"),
    ],
)
def test_a_verdict_needs_the_whole_interval(
    low: float | None, high: float | None, limit: float, at_least: bool, word: str
) -> None:
    assert _verdicts.judge(entry(low, high), limit, at_least) == word


def test_verdicts_say_why() -> None:
    verdict = _verdicts.decide("A beats B", entry(0.5, 1.5), 0)
    assert verdict == _verdicts.Verdict(
        "A beats B", "holds", "+1.00 [+0.50, +1.50] dB over 4 slices; holds above +0.00 dB"
    )
    assert _verdicts.decide("A beats B", None, 0) == _verdicts.Verdict("A beats B", "not measured")
    assert _verdicts.decide("EM", entry(0.5, 0.7, 0.6), 0.5, "%").because.startswith("60 [50, 70] % over")
    assert _verdicts.decide("EM", entry(None, None), 0).because.startswith("+1.00 dB over")


def test_share_of_a_gap() -> None:
    low, part, high = rows(30, 31, 32, 33), rows(33, 34, 35, 36), rows(34, 35, 36, 37)
    share = _verdicts.gap_share(low, part, high)
    assert share is not None and share["num_cases"] == 4
    assert all(share[key] == pytest.approx(0.75) for key in ("mean", "low", "high"))
    uneven = _verdicts.gap_share(low, rows(30, 34, 36, 33), high)
    assert uneven is not None and uneven["mean"] == pytest.approx(7 / 16)
    assert uneven["low"] < 0 < 7 / 16 < 1 < uneven["high"], "four slices as different as can be"
    many = [rows(*range(30, 46)), rows(*(30 + k + (k % 3) for k in range(16))), rows(*range(34, 50))]
    of_many = _verdicts.gap_share(*many)
    assert of_many is not None and 0 < of_many["low"] < of_many["mean"] < of_many["high"] < 0.5
    assert _verdicts.gap_share(low, part[:2], high[1:]) == {"mean": 0.75, "low": None, "high": None, "num_cases": 1}
    assert _verdicts.gap_share(low, part, []) is None


@pytest.mark.parametrize("num", [2, 3, 5, 8])
def test_intervals_of_few_slices_hold_the_mean(num: int) -> None:
    """A percentile bootstrap of two values is their range, which holds it half of the time."""
    rng = np.random.default_rng(num)
    held = 0
    for _ in range(400):
        found = _verdicts.difference(rows(*rng.normal(1.0, 0.5, num)), rows(*[0.0] * num))
        assert found is not None
        held += found["low"] < 1.0 < found["high"]
    assert 0.92 * 400 <= held <= 0.98 * 400


def test_where_there_is_no_gap_there_is_no_share() -> None:
    low, part = rows(30, 31, 32, 33), rows(33, 34, 35, 36)
    share = _verdicts.gap_share(low, part, rows(29, 32, 31, 34))
    assert share is not None and share["mean"] is None and _verdicts.cell(share, "%") == "no gap"
    assert _verdicts.decide("EM closes it", share, 0.6, "%").outcome == "undecided"


def test_differences_and_costs_are_of_common_slices() -> None:
    a, b = rows(30, 31, 32, seconds=30.0), rows(29, 29, seconds=3.0)
    found = _verdicts.difference(a, b)
    assert found is not None and (found["mean"], found["num_cases"]) == (1.5, 2)
    assert _verdicts.difference(a, []) is None and _verdicts.difference(a, [{**b[0], "case": "b"}]) is None
    cost = _verdicts.ratio(a, b)
    assert cost is not None and (cost["mean"], cost["num_cases"]) == (10.0, 2)
    assert _verdicts.ratio(a, None) is None


def test_what_stopping_lost() -> None:
    trace = {"psnr_trace": [30.0, 32.0, 33.0, 31.0]}
    assert table_g.stopping_loss({**trace, "stopped_step": 1}) == 1.0
    assert table_g.stopping_loss({**trace, "stopped_step": 2}) == 0.0
    assert table_g.stopping_loss({}) is None and table_g.stopping_loss({**trace, "stopped_step": -1}) is None


def test_claims_of_rows_made_by_hand() -> None:
    recipes = table_g.recipes()
    psnr = {"tv": 33, "patch": 32, "patch-ct": 38, "patch-em": 36.5, "whole-em": 33, "patch-dps": 27,
            "patch-ss-off": 31, "patch-ss-own": 32, "whole-ss-own": 32.5, "patch-ct-em": 37.8}  # fmt: skip
    table = {key: rows(*(value + k for k in range(4)), seconds=5.0) for key, value in psnr.items()}
    traced = {"psnr_trace": [32.0, 34.0, 33.9], "stopped_step": 2, "held_out_trace": [3.0, 1.0, 0.9]}
    table["patch-em"] = [{**row, **traced, "seconds": 100.0} for row in table["patch-em"]]
    proximal = ", ProximalDiffusion"
    stop = (f"Stopping without the truth loses at most 0.3 dB of the rounds that were run{proximal}",
            f"EM with that stop costs the in-distribution prior at most 0.1 dB{proximal}")  # fmt: skip
    outcome = {v.claim: v.outcome for v in table_g.judge_claims(table, recipes, _common.SETTINGS["20-clean"])}
    assert {outcome[claim] for claim in stop} == {"not measured"}, "of runs that never stopped nothing is said"
    table |= {f"{key}-stop": table[key] for key in ("patch-em", "patch-ct-em")}
    outcome = {v.claim: v.outcome for v in table_g.judge_claims(table, recipes, _common.SETTINGS["20-clean"])}

    several = "Self-supervision improves the patch prior of ellipses by several dB"
    assert outcome[f"{several}, over DPS (as published)"] == "holds"
    assert outcome[f"{several}, over its own sampler"] == "does not hold"
    assert outcome[f"{several}, under ProximalDiffusion"] == "not measured"
    assert outcome["The CG data step alone explains most of the published gain (patch)"] == "holds"
    assert outcome["Patch prior + SS beats whole-image prior + SS, own samplers"] == "does not hold"
    assert outcome[f"Patch prior + EM beats whole-image prior + EM{proximal}"] == "holds"
    assert outcome["Adapted ellipses beat TV: patch + EM"] == "holds"
    assert outcome["Adapted ellipses beat TV: patch + SS, own sampler"] == "does not hold"
    assert outcome["Adapted ellipses beat TV: whole + EM"] == "undecided"
    assert outcome["Adaptation reaches the in-distribution prior: patch + EM"] == "does not hold"
    assert outcome[f"EM closes at least 60 % of the gap to the in-distribution prior{proximal}"] == "holds"
    assert outcome[stop[0]] == "holds"
    assert outcome[f"EM improves the in-distribution prior{proximal}"] == "does not hold"
    assert outcome[stop[1]] == "does not hold"
    assert outcome[f"EM takes at most 15 times the unadapted time{proximal}"] == "does not hold"
    assert outcome["EM improves the in-distribution prior"] == "not measured", "by ADMM there are no rows yet"
    table |= {f"{key}-admm": table[key] for key in ("patch", "patch-ct", "patch-em")}
    outcome = {v.claim: v.outcome for v in table_g.judge_claims(table, recipes, _common.SETTINGS["20-clean"])}
    assert outcome["EM closes at least 60 % of the gap to the in-distribution prior"] == "holds"
    closed = {v.claim: v.outcome for v in table_g.judge_claims(table, recipes, _common.SETTINGS["60-clean"])}
    assert closed[f"EM closes at least 80 % of the gap to the in-distribution prior{proximal}"] == "does not hold"

    assert outcome["EM of all slices beats TV"] == "not measured"
    table["patch-em-admm-pool"] = [{**row, "seconds": 100.0, "psnr": row["psnr"] + 1} for row in table["patch-em"]]
    outcome = {v.claim: v.outcome for v in table_g.judge_claims(table, recipes, _common.SETTINGS["20-noisy"])}
    assert not any("Self-supervision" in claim for claim in outcome), "the published recipes are for no noise"
    assert outcome["EM of all slices closes at least 60 % of the gap to the in-distribution prior"] == "holds"
    assert outcome["EM of all slices takes at most 3 times the unadapted time"] == "does not hold"


def test_recipes_are_those_of_the_shipped_configurations() -> None:
    recipes = _recipes.recipes()
    for key, config, adaptation in (("scd", "scd_ct", SCD), ("ddip", "ddip_ct", DDIP)):
        settings = yaml.safe_load((ROOT / "configs" / f"{config}.yaml").read_text())["model"]["init_args"]
        own, ours = recipes[f"{key}-own"], recipes[key]
        assert own.method.schedule.num_levels == settings["method"]["init_args"]["schedule"]["init_args"]["num_levels"]
        assert own.prior == settings["prior"] and _common.plain(own.adaptation) == _common.plain(adaptation())
        assert own.adaptation.noise_from != "estimate" == ours.adaptation.noise_from
        assert isinstance(ours.method, ProximalDiffusion) and ours.control == "whole"
    assert isinstance(recipes["patch-ss-own"].adaptation, PatchSelfSupervision)
    assert isinstance(recipes["ddip-own"].method.transition, DDSTransition)
    for key, recipe in recipes.items():
        adapted, control = recipe.adaptation is not None, recipe.control
        assert adapted == (control is not None), key
        if control is not None:  # the same but for the updates
            other, method = recipes[control], recipe.method
            if isinstance(recipe.adaptation, SelfSupervised):
                method = recipe.adaptation.control(method)
            assert other.adaptation is None and other.prior == recipe.prior, key
            assert _common.plain(other.method) == _common.plain(method), key
    pairs = list(table_g.list_pairs(recipes))
    assert all(a in recipes and b in recipes for _, a, b in pairs)
    assert ("patch - whole", "patch-ss-own", "whole-ss-own") in pairs
    assert ("in distribution - ellipses", "patch-ct-em", "patch-em") in pairs


def test_an_adaptation_and_its_test_are_part_of_a_fingerprint(tmp_path: Path) -> None:
    prior = str(make_prior(tmp_path / "whole.safetensors", kind="whole"))
    make_volume(tmp_path / "data.h5", slices_of_a_chest(SIZE))
    batch = _common.CaseBatch(
        id=["a/0000"], index=[0], patient=["a"], source=[str(tmp_path / "data.h5")], voxel_mm=[None], reference=None
    )
    bench = _common.Bench(_common.Record(None, "x", {}), SIZE)
    setting, method = _common.SETTINGS["20-clean"], ProximalDiffusion()
    variants = [(None, None), (SCD(), None), (SCD(rank=2), None), (DDIP(), None), (SCD(), SuitabilityTest())]
    identities = [
        bench.locate(setting, _common.Entry("row", method, prior, *variant), batch)[1] for variant in variants
    ]
    assert len(set(identities)) == len(variants)
    assert identities[0] == bench.identity(setting, method, prior, batch.source[0], batch_size=1)


def shrink(recipe: tuple[Sampler, Adaptation]) -> tuple[Sampler, Adaptation]:
    """Leaves of a recipe what a test has time for."""
    sampler, adaptation = recipe
    sampler.schedule.num_levels = 3
    if hasattr(adaptation, "expectation"):
        adaptation.rounds, adaptation.steps, adaptation.num_pixels = 2, 2, 1024
        adaptation.expectation.schedule.num_levels = 2
    else:
        adaptation.steps = 1
    return sampler, adaptation


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data under the names of the real ones, and the four priors."""
    folder = tmp_path_factory.mktemp("claims")
    make_volume(folder / _common.HELD_OUT, slices_of_a_chest(SIZE), voxel_mm=(3.0, 16.0, 16.0))
    for kind in ("patch", "whole"):
        for data in ("ellipses", "ct"):
            make_prior(folder / f"{kind}_{data}.safetensors", kind=kind, data=[data])
    return folder


@pytest.fixture
def tiny(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The options of a run that takes seconds."""
    load = _recipes.load_recipe.__wrapped__
    monkeypatch.setattr(_recipes, "load_recipe", cache(lambda config: shrink(load(config))))
    monkeypatch.setattr(_recipes, "DPS", PaDISNormalised(num_levels=2, num_inner=1))
    monkeypatch.setattr(_recipes, "TotalVariation", lambda: TotalVariation(num_iterations=10))
    monkeypatch.setattr(_recipes, "ProximalDiffusion", lambda **knobs: ProximalDiffusion(**knobs | {"num_levels": 3}))
    monkeypatch.setenv("INVRECON_DATA", str(folder))
    _common.load_batches.cache_clear()
    priors = [f"{name}={folder / name}.safetensors" for name in claims.PRIORS]
    more = ["--slices", "3,5", "--few", "2", "--figure-slice", "5", "--threads", "1", "--size", str(SIZE)]
    return [*more, "--tables", "g", "--settings", "20-clean", "--priors", *priors]


def test_a_run_from_end_to_end(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out" / "g.json"
    args = ["--json", str(out), *tiny]
    claims.main(args)
    text, content, recipes = capsys.readouterr().out, json.loads(out.read_text()), _recipes.recipes()
    assert content["failures"] == {}
    for key, recipe in recipes.items():
        num = sum(name.startswith(f"20-clean/{key}/") for name in content["parts"])
        assert num == (1 if recipe.few else 2), key
    order = [m[1] for m in re.finditer(r"20 views, ([\w-]+), slices", text)]
    assert order.index("tv") < order.index("patch-em") < order.index("patch-dps") < order.index("scd-own")
    stop = "patch-em-stop" if "patch-em-stop" in recipes else "patch-em"
    row = content["parts"][f"20-clean/{stop}/4DLung-113_HM10395/0003"]
    assert len(row["psnr_trace"]) == len(row["held_out_trace"]) == 3 and 0 <= row["stopped_step"] <= 2
    assert None not in row["psnr_trace"] and row["num_trainable"] > 0
    found = content["settings"]["20-clean"]
    assert set(found["summaries"]) == set(recipes) and found["costs"]["patch-em"]["num_cases"] == 2
    assert {"patch-em", "scd-own", "patch-ss"} <= found["shares"].keys()
    page = out.with_suffix(".md").read_text()
    assert "## Verdicts" in page and "| patch + EM, in distribution |" in page and "](g_rounds.png)" in page
    assert "not measured" not in page and str(out.parent) not in page
    for name, least in (("g.png", 1500), ("g_rounds.png", 400)):
        assert Image.open(out.with_name(name)).width > least

    before = {path.name: path.read_bytes() for path in out.parent.iterdir()}
    monkeypatch.setattr(_common.Bench, "task", lambda *args, **kwargs: pytest.fail("something is computed again"))
    claims.main(args)
    assert before == {path.name: path.read_bytes() for path in out.parent.iterdir()}
    claims.main([*args, "--rows", "fbp"])
    assert out.with_suffix(".md").read_bytes() == before["g.md"], "a run of one row forgets no other"


def test_an_interrupted_run_says_what_it_has_and_goes_on(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rows_of = tmp_path / "g.json", _common.Bench.rows
    args = ["--json", str(out), "--rows", "fbp", "patch", "patch-em", "scd", *tiny]

    def interrupted(self: _common.Bench, setting: Any, entry: _common.Entry, batch: Any) -> Any:
        if entry.label == "scd":
            raise KeyboardInterrupt
        return rows_of(self, setting, entry, batch)

    with monkeypatch.context() as patch:
        patch.setattr(_common.Bench, "rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            claims.main(args)
    page = out.with_suffix(".md").read_text()
    assert "| patch + EM |" in page and "| SCD |" not in page and "not been measured yet" in page
    capsys.readouterr()
    claims.main(args)
    assert re.findall(r"20 views, ([\w-]+), slices", capsys.readouterr().out) == ["scd"]


def test_one_that_diverges_does_not_end_the_run(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverges(self: FBP, *args: Any, **kwargs: Any) -> Any:
        raise InputError("FBP diverged")

    monkeypatch.setattr(FBP, "__call__", diverges)
    claims.main(["--json", str(tmp_path / "g.json"), "--rows", "fbp", "tv", *tiny])
    page = (tmp_path / "g.md").read_text()
    assert "- 20 views, FBP, 4DLung-113_HM10395/0003: FBP diverged" in page and "| TV |" in page


def test_what_cannot_be_is_one_sentence(tiny: list[str], tmp_path: Path) -> None:
    for args, words in (
        (["--rows", "fbq"], "There is no row fbq, expected some of fbp, tv"),
        (["--priors", "patch=x"], "--priors names patch, expected NAME=FILE"),
        (["--rows", "patch-ct", "--priors", "patch_ct=nowhere"], "There is no prior 'nowhere'"),
        (["--few", "0"], "at least 1"),
    ):
        with pytest.raises(InputError, match=words):
            claims.main([*tiny, "--json", str(tmp_path / "g.json"), *args])


def test_the_figure_of_rounds(tmp_path: Path) -> None:
    rounds = [{"psnr_trace": [30.0, 32.0, 33.0], "held_out_trace": [None] * 3, "stopped_step": 1},
              {"psnr_trace": [31.0, 32.0], "held_out_trace": [None] * 2, "stopped_step": 1}]  # fmt: skip
    path = rounds_figure(tmp_path / "r.png", {"20 views": rounds, "60 views": rounds[:1]})
    assert Image.open(path).height > 400
    assert filled([[1, 2, 3], [4, 5]]).tolist() == [[1, 2, 3], [4, 5, 5]]


def teardown_module() -> None:
    torch.set_num_threads(1)
