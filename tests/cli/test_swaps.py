"""One argument swaps a prior, an operator, a method, the noise, the data or the place of the results."""

from __future__ import annotations

import csv
import dataclasses
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

import invrecon.methods
from invrecon.adapt import ExpectationMaximisation
from invrecon.discovery import needs_arguments
from invrecon.errors import InputError
from invrecon.methods import (
    DDS,
    DIP,
    FBP,
    RED,
    AnnealedPnPADMM,
    Method,
    PnPADMM,
    ProximalDiffusion,
    Purification,
    UDiGDIP,
)
from invrecon.operators import ParallelBeamCT, SNRNoise
from invrecon.priors.weights import read_card, save_prior
from invrecon.shared import find_shared
from invrecon.tasks.adaptation import TestTimeAdaptation
from invrecon.tasks.priors import choose_prior, covers, name_prior
from invrecon.tasks.reconstruction import Reconstruction
from tests.cli.tiny import files_in, reconstruct


@pytest.fixture
def run(invrecon: Callable[..., Any], library: Path, tmp_path: Path) -> Callable[..., Any]:
    """Runs `test` by the fast sampler (or another config) on one slice, with the given options."""

    def call(*options: str, config: str = "recon_ct.yaml", data: object = library / "scans" / "a.h5") -> Any:
        more = [option.replace("LIBRARY", str(library)) for option in options]
        if config == "recon_ct.yaml":
            more = [f"--model.prior={library}/patch.safetensors", "--model.method.num_levels=2", *more]
        if not any(option.startswith("--data.slices") for option in options):
            more = ["--data.slices=0", *more]
        return invrecon(reconstruct("test", config, data, tmp_path / "out", *more))

    return call


def test_views(run: Callable[..., Any]) -> None:
    assert run("--model.operator.num_views", "60").model.operator.measurement_shape == (1, 60, 48)


@pytest.mark.parametrize("options", [("--model.method.clip", "null"), ("--model.method.init_args.clip=null",)])
def test_nothing_takes_the_place_of_a_default(run: Callable[..., Any], options: tuple[str, ...]) -> None:
    method = run(*options).model.method
    assert method.clip is None
    assert len(method.schedule) == 2, "the other settings are kept"


def test_levels_that_the_prior_never_saw_are_named(
    run: Callable[..., Any], library: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    low = tmp_path / "low.safetensors"
    card = dataclasses.replace(read_card(library / "patch.safetensors"), sigma_range=(0.002, 0.5))
    save_prior(low, load_file(library / "patch.safetensors"), card)

    def complaints(*options: str) -> list[str]:
        recwarn.clear()
        run(f"--model.prior={low}", *options)
        return [str(w.message) for w in recwarn if "was trained up" in str(w.message)]

    assert not complaints()  # the default begins at 0.1
    (said,) = complaints("--model.method=DDS")
    assert "DDS begins at a noise level of 10" in said and "0.5" in said and "--model.prior" in said

    both = f"--model.prior=[{low},{library}/patch.safetensors]"
    assert not complaints(both, "--model.method=DDS"), "the first that was trained at the levels of the method"


def test_the_first_prior_that_knows_the_levels_is_taken(library: Path, tmp_path: Path) -> None:
    low, high = tmp_path / "low.safetensors", library / "patch.safetensors"
    save_prior(low, load_file(high), dataclasses.replace(read_card(high), sigma_range=(0.002, 0.5)))
    names = [str(low), str(high)]
    assert [choose_prior(names, level) for level in (0.0, 0.5, 0.6, 40.0)] == [low, low, high, high]
    assert choose_prior(names[::-1], 80.0) == high, "the one trained highest, if none was trained so high"
    assert choose_prior(str(low), 10.0) == low and choose_prior(None, 10.0) is None
    with pytest.raises(InputError, match="an empty list"):
        choose_prior([], 1.0)
    with pytest.raises(InputError, match=r"no weights file 'nowhere'"):
        choose_prior([str(low), "nowhere"], 0.1)
    assert name_prior(low) == "low" and name_prior(tmp_path / "mine" / "prior.safetensors") == "mine/prior"


def test_a_method_without_a_prior_has_none_though_one_is_named(library: Path) -> None:
    """The configuration's stays behind, unread, when `--model.method` replaces its own: no report speaks of it."""
    for method in (FBP(), DIP()):
        task = Reconstruction(ParallelBeamCT(32, 12, 48), method, prior=str(library / "patch.safetensors"), mirror=True)
        assert task.prior is task.card is task.prior_name is task.weights_sha256 is None
        assert task.describe()["prior"] == "none"


def test_a_signal_to_noise_ratio_is_of_k_space() -> None:
    """Of a sinogram, zeros were measured: left without noise they would be told to have it."""
    task = Reconstruction(ParallelBeamCT(32, 12, 48), FBP(), noise=SNRNoise(30.0))
    with pytest.raises(InputError, match=r"SNRNoise leaves out .*ParallelBeamCT are measured"):
        task.setup("test")


def test_the_highest_level_is_that_at_which_the_prior_is_asked(library: Path) -> None:
    levels = {DDS(): 10.0, AnnealedPnPADMM(): 0.1, PnPADMM(sigma=0.9): 0.9, RED(sigma=0.7): 0.7, FBP(): 0.0,
              UDiGDIP(Purification(sigma_max=5.0)): 5.0, DIP(): 0.0}  # fmt: skip
    for method, level in levels.items():
        assert method.highest_level == pytest.approx(level), type(method).__name__
    prior = str(library / "patch.safetensors")
    task = TestTimeAdaptation(
        ParallelBeamCT(32, 12, 48),
        AnnealedPnPADMM(),
        ExpectationMaximisation(expectation=ProximalDiffusion(sigma_max=3.0)),
        prior=prior,
    )
    assert task.highest_level == pytest.approx(3.0), "the E-steps ask, too"


def test_every_shipped_method_of_recon_ct_has_a_prior_of_its_levels() -> None:
    """As the README has it: `--model.method=NAME` is all it takes."""
    names = yaml.safe_load(find_shared("recon_ct", "configs", ".yaml").read_text())["model"]["init_args"]["prior"]
    for name in invrecon.methods.__all__:
        kind = getattr(invrecon.methods, name)
        if not inspect.isclass(kind) or not issubclass(kind, Method) or inspect.isabstract(kind):
            continue
        if not needs_arguments(kind) and (method := kind()).needs_prior:
            path = choose_prior(names, method.highest_level)
            assert path is not None and covers(read_card(path), method.highest_level), name
            assert name != "AnnealedPnPADMM" or path.stem == "patch_ct_fine", "the default has the better one"


def test_what_was_set_for_another_method_is_named(
    run: Callable[..., Any], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    def complaints(*options: str, config: str = str(tmp_path / "out" / "config.yaml")) -> list[str]:
        recwarn.clear()
        run("--output", str(tmp_path / "again"), *options, config=config)
        return [str(w.message) for w in recwarn if "takes over" in str(w.message)]

    assert not complaints("--model.method=DDS", config="recon_ct.yaml"), "it sets nothing for its own method"
    run()  # its config has all that AnnealedPnPADMM was given
    assert not complaints(), "the same method again"
    (said,) = complaints("--model.method=DDS", "--model.method.num_levels=3")
    assert "DDS takes over what config.yaml sets for AnnealedPnPADMM" in said
    assert "sigma_max 0.1 (its own: 10.0)" in said and "num_levels" not in said


@pytest.mark.parametrize("name", ["FanBeamCT", "LimitedAngleCT"])
def test_operator(run: Callable[..., Any], name: str) -> None:
    operator = run(f"--model.operator={name}").model.operator
    assert type(operator).__name__ == name
    assert operator.num_views == 12  # arguments that both have are kept


@pytest.mark.parametrize(
    "options",
    [
        ("--model.method=FBP",),
        ("--model.method", "TotalVariation", "--model.method.num_iterations=25"),
        ("--model.method=PaDISRepo", "--model.method.num_levels=2", "--model.method.num_inner=1"),
    ],
    ids=lambda options: options[-1] if len(options) == 1 else options[1],
)
def test_method(run: Callable[..., Any], options: tuple[str, ...], tmp_path: Path) -> None:
    method = type(run(*options).model.method).__name__
    assert method in " ".join(options)
    with open(tmp_path / "out" / "metrics.csv") as file:
        assert {row["method"] for row in csv.DictReader(file)} == {method}


def knobs(name: str) -> list[str]:
    """Makes a method of the field short."""
    names = inspect.signature(getattr(invrecon.methods, name)).parameters
    return [f"--model.method.{knob}=1" for knob in ("num_inner", "num_ode", "num_steps", "num_prior") if knob in names]


def methods_with(knob: str) -> list[str]:
    """Names of the methods that are made short by a knob."""
    kinds = {name: value for name, value in vars(invrecon.methods).items() if inspect.isclass(value)}
    return [
        name
        for name, kind in kinds.items()
        if issubclass(kind, invrecon.methods.Method)
        and not inspect.isabstract(kind)
        and knob in inspect.signature(kind).parameters
    ]


@pytest.mark.parametrize("name", methods_with("num_iterations"))
def test_every_iteration_runs_by_its_name(run: Callable[..., Any], name: str, tmp_path: Path) -> None:
    cli = run(f"--model.method={name}", "--model.method.num_iterations=2", *knobs(name))
    assert type(cli.model.method).__name__ == name
    with open(tmp_path / "out" / "metrics.csv") as file:
        (row,) = csv.DictReader(file)
    assert float(row["psnr"]) > 0 and float(row["num_operator_calls"]) > 0


@pytest.mark.parametrize("name", methods_with("num_levels"))
def test_every_method_runs_by_its_name(run: Callable[..., Any], name: str, tmp_path: Path) -> None:
    options = (f"--model.method={name}", "--model.method.num_levels=2", *knobs(name))
    if getattr(invrecon.methods, name).needs_spectrum:
        with pytest.raises(InputError, match=r"singular.*ProximalDiffusion"):
            run(*options)
        options += ("--model.operator=BlockDownsample", "--model.operator.factor=2")
    assert type(run(*options).model.method).__name__ == name
    with open(tmp_path / "out" / "metrics.csv") as file:
        (row,) = csv.DictReader(file)
    assert float(row["psnr"]) > 0 and float(row["num_evaluations"]) > 0


def test_prior(run: Callable[..., Any]) -> None:
    assert run("--model.prior", "LIBRARY/whole.safetensors").model.card.kind == "whole"


def test_noise(run: Callable[..., Any], tmp_path: Path) -> None:
    psnr = []
    for level in ("0.01", "0.1"):
        run("--model.noise=RelativeGaussianNoise", "--model.noise.level", level, config="fbp_ct.yaml")
        psnr.append(json.loads((tmp_path / "out" / "summary.json").read_text())["psnr"]["mean"])
    assert psnr[0] > psnr[1] + 0.3


def test_photon_noise_depends_on_a_voxel_size(run: Callable[..., Any], library: Path) -> None:
    poisson = "--model.noise=TransmissionPoisson"
    assert type(run(poisson).model.noise).__name__ == "TransmissionPoisson"
    with pytest.raises(InputError, match="UniformBlur measures no line integrals"):
        run(poisson, "--model.operator=UniformBlur")
    with pytest.warns(UserWarning, match=r"ten\.h5 states no voxel size, on which photon noise depends"):
        run(poisson, "--data.slices=0", config="fbp_ct.yaml", data=library / "ten.h5")


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ("LIBRARY/scans/a.h5", ["a"]),
        ("[LIBRARY/scans/a.h5,LIBRARY/scans/b.h5]", ["a", "b"]),
        ('["LIBRARY/scans/b.h5", "LIBRARY/scans/a.h5"]', ["b", "a"]),
        ("LIBRARY/scans", ["a", "b", "c"]),
    ],
)
def test_paths(run: Callable[..., Any], library: Path, paths: str, expected: list[str]) -> None:
    cli = run("--data.slices=1", config="fbp_ct.yaml", data=paths.replace("LIBRARY", str(library)))
    assert cli.datamodule.case_ids() == [f"{name}/0001" for name in expected]


@pytest.mark.parametrize(
    ("text", "expected", "one_word"),
    [
        ("1:10:5", [1, 6], False),  # a number of base 60 in YAML 1.1
        ("1:3", [1, 2], True),  # another
        ("3", [3], False),  # an integer
        ("1,4,9", [1, 4, 9], True),
        ("8:", [8, 9], False),  # a mapping
        ("8:", [8, 9], True),
        (":2", [0, 1], False),
        ("07", [7], True),  # an octal
    ],
)
def test_slices(
    run: Callable[..., Any], library: Path, text: str, expected: list[int], one_word: bool, tmp_path: Path
) -> None:
    """As on a real command line, where nothing quotes what YAML would take for a number."""
    options = (f"--data.slices={text}",) if one_word else ("--data.slices", text)
    run(*options, config="fbp_ct.yaml", data=library / "ten.h5")
    with open(tmp_path / "out" / "metrics.csv") as file:
        assert [int(row["slice"]) for row in csv.DictReader(file)] == expected


@pytest.mark.parametrize("options", [("--data.slices=-2:",), ("--data.slices", "-2:")])
def test_slices_do_not_count_from_the_end(run: Callable[..., Any], library: Path, options: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match=r"ask for slice -2, but .*ten\.h5 has only 0 to 9"):
        run(*options, config="fbp_ct.yaml", data=library / "ten.h5")


def test_a_shipped_file_is_found_by_its_name(run: Callable[..., Any], here: Path) -> None:
    cli = run("--data.size=256", "--model.operator.size=256", config="fbp_ct.yaml", data="lung2_sample.h5")
    assert cli.datamodule.case_ids() == ["lung2_sample/0000"]


def test_the_default_output_is_a_folder_of_the_command_and_time(
    invrecon: Callable[..., Any], library: Path, here: Path
) -> None:
    args = reconstruct("test", "fbp_ct.yaml", library / "scans" / "a.h5", "")
    at = args.index("--output")
    del args[at : at + 2]
    invrecon(args)
    (out,) = (here / "outputs" / "test").iterdir()
    assert len(out.name) == len("2000-01-01_00-00-00")
    assert files_in(here) == {f"outputs/test/{out.name}/{name}" for name in files_in(out)}
