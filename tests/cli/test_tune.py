"""`invrecon tune`: the optimum is found, the search is reproducible, and its result is what `test` then uses."""

from __future__ import annotations

import csv
import inspect
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import invrecon.methods
from invrecon.data.cases import CaseBatch
from invrecon.data.measurement import write_measurement
from invrecon.errors import InputError
from invrecon.methods import Estimate, Method
from invrecon.metrics.image import psnr
from invrecon.operators import ParallelBeamCT
from invrecon.search import (
    ONLY_WITH_NOISE,
    ONLY_WITHOUT_NOISE,
    SPACES,
    Choices,
    Integers,
    LogUniform,
    Search,
    Uniform,
    default_space,
    parse_domain,
)
from invrecon.tune import check_default, find, overrides, read_cases
from tests.cli.tiny import QUIET, SIZE, files_in, reconstruct

GAIN = ("--search", "method.gain: [0.3, 1.3]")


class Gain(Method):
    """`x = gain y`, whose best gain is easily found without a search.

    Args:
        gain: The factor.
        limit: Above it the method diverges.
        power: Whole number that changes nothing.
        log: Text file that gains a line a call.
    """

    def __init__(self, gain: float = 1.0, limit: float = 10.0, power: int = 1, log: str = "log.txt") -> None:
        self.gain, self.limit, self.power, self.log = gain, limit, power, log

    def __call__(self, y: Any, operator: Any, prior: Any = None, *, generators: Any = None) -> Estimate:
        with open(self.log, "a") as file:
            file.write(f"{y.double().sum():.9g}\n")
        return Estimate(mean=self.gain * y if self.gain <= self.limit else y * math.nan)


@pytest.fixture
def config(library: Path, tmp_path: Path) -> str:
    """A configuration of the toy: denoising of one slice by a factor."""
    model = {
        "operator": {"class_path": "Identity", "init_args": {"size": SIZE}},
        "noise": {"class_path": "GaussianNoise", "init_args": {"std": 0.3}},
        "method": {"class_path": "tests.cli.test_tune.Gain", "init_args": {"log": str(tmp_path / "log.txt")}},
    }
    data = {"paths": str(library / "scans" / "a.h5"), "slices": "0", "size": SIZE}
    content = {
        "model": {"class_path": "Reconstruction", "init_args": model},
        "data": {"class_path": "ReconstructionData", "init_args": data},
    }
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.fixture
def tune(invrecon: Callable[..., Any], config: str, tmp_path: Path) -> Callable[..., list[dict[str, str]]]:
    """Tunes the toy and returns the lines of `trials.csv`, but for their times."""

    def call(*options: object, output: str = "out") -> list[dict[str, str]]:
        invrecon(["tune", "--config", config, *QUIET, "--output", str(tmp_path / output), *map(str, options)])
        return trials_of(tmp_path / output)

    return call


def trials_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "trials.csv") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_the_optimum_is_found_and_feeds_the_test(
    invrecon: Callable[..., Any], tune: Callable[..., Any], config: str, tmp_path: Path, library: Path
) -> None:
    trials = tune(*GAIN, "--trials", 8)
    assert len(trials) == 8 and trials[0]["method.gain"] == "1.0"
    text = (tmp_path / "out" / "tuned.yaml").read_text()
    tuned = yaml.safe_load(text)
    method = tuned["model"]["init_args"].pop("method")
    assert tuned == {"model": {"init_args": {}}}  # nothing but what was tuned
    assert method["class_path"] == "tests.cli.test_tune.Gain" and list(method["init_args"]) == ["gain"]
    assert "a/0000 " in text and "a/0001" not in text and str(library) not in text

    options = ["--config", config, "--config", str(tmp_path / "out" / "tuned.yaml"), *QUIET]
    cli = invrecon(["test", *options, "--output", str(tmp_path / "test")])
    with open(tmp_path / "test" / "metrics.csv") as file:
        (row,) = csv.DictReader(file)
    assert float(row["psnr"]) == max(float(trial["psnr"]) for trial in trials) > float(trials[0]["psnr"])
    (batch,) = cli.datamodule.test_dataloader()
    y, _, x = cli.model.measure(batch)
    best = max((n / 500 for n in range(150, 650)), key=lambda gain: psnr(gain * y, x).item())
    assert cli.model.method.gain == method["init_args"]["gain"] == pytest.approx(best, abs=0.05)  # a grid: 0.07
    assert len(set((tmp_path / "log.txt").read_text().split())) == 1  # one measurement for all


def test_the_same_command_goes_on(
    tune: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def num_calls() -> int:
        return len((tmp_path / "log.txt").read_text().split())

    call = Gain.__call__

    def dies(self: Gain, *args: Any, **more: Any) -> Any:
        if num_calls() == 2:
            raise RuntimeError("the power is gone")
        return call(self, *args, **more)

    (tmp_path / "log.txt").touch()
    with monkeypatch.context() as patch:
        patch.setattr("tests.cli.test_tune.Gain.__call__", dies)
        with pytest.raises(RuntimeError, match="power"):
            tune(*GAIN, "--trials", 3)
    first = trials_of(tmp_path / "out")
    assert len(first) == 2 and not (tmp_path / "out" / "tuned.yaml").exists()
    trials = tune(*GAIN, "--trials", 3)
    assert trials[:2] == first and len(trials) == 3 == num_calls()
    tuned = (tmp_path / "out" / "tuned.yaml").read_bytes()
    capsys.readouterr()
    assert tune(*GAIN, "--trials", 3) == trials and num_calls() == 3  # finished: nothing again
    assert capsys.readouterr().out.count("trial 3/3") == 1
    assert tune(*GAIN, "--trials", 3, output="other") == trials  # and the same from the start
    assert (tmp_path / "out" / "tuned.yaml").read_bytes() == (tmp_path / "other" / "tuned.yaml").read_bytes() == tuned
    assert tune(*GAIN, "--trials", 4)[:3] == trials and num_calls() == 7
    refused(lambda: tune(*GAIN, "--trials", 3, "--seed", 1), "another search.*another --output")


def test_failed_trials_count_and_are_not_chosen(
    tune: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gains above the limit diverge: a method that often does gets no more trials than others."""
    trials = tune(*GAIN, "--trials", 3, "--model.method.limit=0.8")
    assert len(trials) == 3 == len((tmp_path / "log.txt").read_text().split())
    failed = [trial for trial in trials if trial["status"] == "failed"]
    assert len(failed) == 2 and all("diverged" in trial["error"] and not trial["psnr"] for trial in failed)
    assert all(float(trial["method.gain"]) > 0.8 for trial in failed)
    (done,) = (trial for trial in trials if trial["status"] == "ok")
    tuned = yaml.safe_load((tmp_path / "out" / "tuned.yaml").read_text())
    assert tuned["model"]["init_args"]["method"]["init_args"] == {"gain": float(done["method.gain"])}
    assert "failed" in capsys.readouterr().out
    refused(lambda: tune(*GAIN, "--trials=2", "--model.method.limit=0", output="none"), "All 2 trials failed.*diverged")
    assert "tuned.yaml" not in files_in(tmp_path / "none")


def test_without_a_search_space_the_methods_own_is_taken(
    invrecon: Callable[..., Any],
    library: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Total variation in the place of the configuration's method; the command that is printed works as written."""
    noise = ("--model.noise=GaussianNoise", "--model.noise.std=0.01")
    more = ("--model.method=TotalVariation", "--model.method.num_iterations=25", "--data.slices=0", *noise)
    args = reconstruct("tune", "fbp_ct.yaml", library / "scans" / "a.h5", tmp_path / "out", *more, "--trials=2")
    invrecon(args)
    trials = trials_of(tmp_path / "out")
    best = max(trials, key=lambda trial: float(trial["psnr"]))
    printed = capsys.readouterr().out.splitlines()[-1].strip()
    command = printed.replace("FILES", str(library / "scans" / "b.h5"))
    cli = invrecon([*shlex.split(command)[1:], "--output", str(tmp_path / "test")])
    assert cli.datamodule.case_ids() == ["b/0000", "b/0001", "b/0002"]
    assert type(cli.model.method).__name__ == "TotalVariation"
    assert cli.model.method.noise_weight == float(best["method.noise_weight"])
    assert cli.model.method.num_iterations == 25 and cli.model.operator.num_views == 12


def test_a_metric_that_the_cases_lack_ends_the_search_at_once(tune: Callable[..., Any], tmp_path: Path) -> None:
    rgb = ("--data=ImageData", "--data.size=32", "--model.operator.num_channels=3")
    image = tmp_path / "image.png"
    Image.fromarray(numpy.arange(3 * SIZE**2).astype(numpy.uint8).reshape(SIZE, SIZE, 3)).save(image)
    refused(
        lambda: tune(*GAIN, "--metric=psnr_body", *rgb, f"--data.paths={image}", "--data.slices=null"),
        "There is no psnr_body of these cases, but psnr, ssim: set --metric",
    )
    assert len((tmp_path / "log.txt").read_text().split()) == 1


def test_a_search_of_what_has_no_effect_says_so(tune: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    tune("--search", "method.power: [1, 9, int]", "--trials=3")
    assert "All 3 trials read the same: nothing of method.power has an effect" in capsys.readouterr().out


def test_cases_that_came_with_their_measurement_are_known_by_it() -> None:
    """Another noise level, other coils: another problem; whether there is noise is theirs to say."""

    def case(**others: Any) -> CaseBatch:
        y = torch.ones(1, 2, 8)
        return CaseBatch(["a/0000"], ["a"], ["a.h5"], [0], torch.ones(1, 2, 4, 4), measurement=y, **others)

    plain, noisy = read_cases([case()], True), read_cases([case(noise_std=torch.tensor([0.1]))], False)
    other, maps = (
        read_cases([case(noise_std=torch.tensor([0.2]))], False),
        read_cases([case(maps=torch.ones(1, 3))], True),
    )
    assert [known for _, known in (plain, noisy, other, maps)] == [False, True, True, False]
    assert len({hashes["a/0000"] for hashes, _ in (plain, noisy, other, maps)}) == 4


def test_samples_are_no_validation_cases(invrecon: Callable[..., Any], tmp_path: Path) -> None:
    args = ["tune", "--config", "tv_ct.yaml", "--output", str(tmp_path / "out"), *QUIET]
    refused(lambda: invrecon(args), "'lung2_sample.h5', a shipped sample.*--data.paths")
    assert not (tmp_path / "out").exists()


def test_keys_deep_inside_and_choices(invrecon: Callable[..., Any], library: Path, tmp_path: Path) -> None:
    """A range of integers, a class by name, and a setting of a setting, read from a file."""
    ranges = {"method.cg_iterations": [1, 2, "int"], "method.transition": {"choices": ["Renoise", "DDIM"]}}
    (tmp_path / "ranges.yaml").write_text(yaml.safe_dump(ranges | {"method.start.sigma": ["1e-2", 1, "log"]}))
    options = (
        *("--model.method=ProximalDiffusion", f"--model.prior={library}/whole.safetensors"),
        *("--model.method.num_levels=2", "--data.slices=0", "--trials=2"),
    )
    args = reconstruct("tune", "fbp_ct.yaml", library / "scans" / "a.h5", tmp_path / "out", *options)
    refused(lambda: invrecon([*args, "--search", str(tmp_path / "ranges.yaml")]), "model.method.start is None")
    (tmp_path / "ranges.yaml").write_text(yaml.safe_dump(ranges))
    invrecon([*args, "--search", str(tmp_path / "ranges.yaml")])
    (default, other) = trials_of(tmp_path / "out")
    assert (default["method.cg_iterations"], default["method.transition"]) == ("10", "null")
    assert other["method.cg_iterations"] in "12" and other["method.transition"] in ("Renoise", "DDIM")
    assert other["status"] == "ok"


REFUSED = {
    "--trials=0": "--trials is 0, expected at least 1",
    "--trials=few": "tune: .*--trials.*few",
    "--metric=seconds": "tune: .*--metric.*psnr",
    "--search=method.gain": "expected a key and its range",
    "--search={": "cannot be read",
    "--search=none.yaml": "none.yaml' cannot be read",
    "--search=method.gain: 3": "method.gain is 3, expected .low, high.",
    "--search=method.gain: [1, 2, cubic]": "cubic.*expected .low, high.",
    "--search=method.gain: [2, 1]": "which is empty: expected low < high",
    "--search=method.gain: [1, 1]": "which is empty",
    "--search=method.gain: [0, 1, log]": "expected low > 0",
    "--search=method.gain: [low, 1]": "an end low, expected a number",
    "--search=method.power: [0.5, 2, int]": "expected whole ends",
    "--search=method.gain: {choices: [1]}": "two or more",
    "--search=method.gain: {choices: [1, 1, 2]}": "each one once",
    "--search=method.gian: [0, 1]": "no model.method.gian to tune: .*Gain, which has gain, limit, power",
    "--search=operator.size: [8, 32, int]": "part of the problem",
    "--search=seed: [0, 9, int]": "all trials share seed",
    "--data.paths=none.h5": "none.h5 does not exist",
    "--no_such_option=1": "no_such_option",
    "--model.method.gain=x": "method.gain",
}


@pytest.mark.parametrize("option", REFUSED)
def test_refusals(tune: Callable[..., Any], option: str, tmp_path: Path) -> None:
    more = () if option.startswith("--search") else GAIN
    refused(lambda: tune(*more, option), REFUSED[option])
    assert not (tmp_path / "out").exists() and not (tmp_path / "log.txt").exists()


def test_keys_are_found_and_their_types_checked() -> None:
    method = {"class_path": "invrecon.methods.Some", "init_args": {"weight": 1.5, "steps": 3, "clip": None, "on": True}}
    model = {"class_path": "invrecon.tasks.Task", "init_args": {"method": method, "prior": "patch"}}
    assert find(model, "method.weight") == 1.5 and find(model, "prior") == "patch"
    refused(lambda: find(model, "methods.weight"), "no model.methods.weight .*model is Task, which has method, prior")
    refused(lambda: find(model, "method.wait"), "model.method is Some, which has weight, steps, clip, on")
    for key in ("prior.size", "method.clip.low", "method.weight.x", "method.on.x"):
        refused(lambda key=key: find(model, key), "nothing to set")
    refused(lambda: check_default("method.steps", 3, Uniform(1.0, 4.0)), r"a whole number.*\[low, high, int\]")
    for value in (True, "patch", [0, 1]):
        refused(lambda value=value: check_default("key", value, Uniform(1.0, 4.0)), "no number: give {choices")
    assert check_default("method.clip", None, Uniform(1.0, 4.0)) is None
    assert check_default("method.steps", 3, Integers(1, 4)) == 3
    assert overrides(model, {"prior": "whole", "method.steps": 4, "method.weight": 2.0}) == {
        "model": {
            "init_args": {
                "prior": "whole",
                "method": {"class_path": "Some", "init_args": {"steps": 4, "weight": 2.0}},
            }
        }
    }


def test_more_refusals(tune: Callable[..., Any], invrecon: Callable[..., Any], tmp_path: Path) -> None:
    twice = ("--search", "{method.gain: [0, 1]}", "--search", "model.method.gain: [0, 1]")
    refused(lambda: tune(*twice), "names method.gain twice")
    inside = ("--search", "{method: {choices: [FBP, DPS]}, method.gain: [0, 1]}")
    refused(lambda: tune(*inside), "method.gain lies inside of model.method")
    refused(lambda: tune(), "Gain has no default search space.*TotalVariation.*--search")
    refused(lambda: invrecon(["tune", "--data.paths=a.h5"]), "No --config was given")
    geometry = ParallelBeamCT(size=SIZE, num_views=12, num_bins=48).geometry
    write_measurement(tmp_path / "measured.h5", torch.rand(1, 12, 48), geometry)
    args = reconstruct("tune", "tv_ct.yaml", tmp_path / "measured.h5", tmp_path / "out", "--trials=2")
    refused(lambda: invrecon(args), "measured.h5 is a measurement without a reference")


@pytest.mark.parametrize(("method", "name"), [(m, name) for m, space in SPACES.items() for name in space])
def test_default_spaces_fit_the_methods(method: str, name: str) -> None:
    """Keys are constructor arguments, ranges hold the default, and the method takes every end."""
    kind, domain = getattr(invrecon.methods, method), SPACES[method][name]
    default = inspect.signature(kind).parameters[name].default
    low, high = domain.value(0.0), domain.value(1.0)
    assert low <= default <= high and isinstance(domain.value(0.5), type(default))
    assert isinstance(kind(**{name: low}), Method) and isinstance(kind(**{name: high}), Method)


def test_default_spaces_speak_of_noise_where_there_is_some() -> None:
    assert all(name in SPACES[method] for method, name in ONLY_WITH_NOISE | ONLY_WITHOUT_NOISE)
    assert list(default_space("TotalVariation", noisy=False)) == ["method.weight"]
    assert list(default_space("TotalVariation", noisy=True)) == ["method.noise_weight"]
    assert all(default_space(method, noisy) for method in SPACES for noisy in (False, True))


DOMAINS = [Uniform(-1.0, 3.0), LogUniform(1e-7, 1e-2), Integers(2, 9), Integers(1, 200, LogUniform), Choices((3, "a"))]


@given(u=st.floats(0, 1))
@pytest.mark.parametrize("domain", DOMAINS, ids=str)
def test_domains(domain: Any, u: float) -> None:
    """Every value is a value of its own point, and what is described is read back."""
    value = domain.value(u)
    assert domain.value(domain.unit(value)) == pytest.approx(value) if not isinstance(value, str) else True
    assert isinstance(domain, Choices) or domain.low <= value <= domain.high
    assert parse_domain("key", domain.describe()) == domain
    assert 0 <= domain.unit(None) <= 1 and 0 <= domain.unit(1e9) <= 1


def test_every_integer_is_as_likely() -> None:
    counts = torch.bincount(torch.tensor([Integers(0, 4).value(u / 1000) for u in range(1000)]))
    assert counts.tolist() == pytest.approx([200] * 5, abs=1)


def searched(num: int, space: Any, score: Callable[[Any], float | None], default: Any, seed: int = 0) -> Search:
    search = Search(space, default, seed)
    for _ in range(num):
        values = search.propose()
        if values is None:
            break
        search.record(values, score(values))
    return search


PLANE = {"a": Uniform(0.0, 1.0), "b": LogUniform(1e-4, 1.0)}


def hill(values: Any) -> float:
    return -((values["a"] - 0.3) ** 2) - (math.log10(values["b"] / 1e-2) / 4) ** 2


def test_narrow_ranges_have_values_too() -> None:
    """Rounding leaves a hundred values of any range at least, and none is tried twice, whole or not."""
    for text in ([1.0001, 1.0004], [0.99991, 0.99999, "log"], [10000, 10004], [-3.00002, -3.00001]):
        domain = parse_domain("key", text)
        assert len({domain.value(u / 1000) for u in range(1001)}) >= 100
    tried = searched(20, {"a": parse_domain("a", [10000, 10004])}, lambda v: v["a"], {"a": 10000}).tried
    assert len({float(values["a"]) for values in tried}) == 20


def test_a_search_begins_with_the_default_and_continues_shorter_ones() -> None:
    default = {"a": 0.9, "b": 0.5}
    short, long = (searched(num, PLANE, hill, default).tried for num in (7, 40))
    assert long[0] == default and long[:7] == short and len({str(values) for values in long}) == 40
    assert searched(7, PLANE, hill, default, seed=1).tried[1:] != short[1:]


@pytest.mark.parametrize("seed", range(5))
def test_a_search_comes_close(seed: int) -> None:
    """To 3 % of a range by 20 trials, a grid of which is 5 % wide; to 8 % of two by 40, whose grid is 16 % wide."""
    line = searched(20, {"a": Uniform(0.0, 1.0)}, lambda v: -abs(v["a"] - 0.37), {"a": 0.9}, seed)
    assert line.tried[line.best]["a"] == pytest.approx(0.37, abs=0.03)  # type: ignore[index]
    plane = searched(40, PLANE, hill, {"a": 0.9, "b": 0.5}, seed)
    assert max(score for score in plane.scores if score is not None) > -(0.08**2)


def test_failures_are_never_best_and_small_spaces_run_out() -> None:
    search = searched(9, {"a": Choices((1, 2, 3))}, lambda v: None if v["a"] == 3 else v["a"], {"a": 1})
    assert sorted(values["a"] for values in search.tried) == [1, 2, 3]
    assert search.tried[search.best] == {"a": 2}  # type: ignore[index]
    assert searched(3, PLANE, lambda values: None, {"a": 0.9, "b": 0.5}).best is None
