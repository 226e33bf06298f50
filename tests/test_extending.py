"""`docs/extending.md` is true: its files, put into a copy of the project, are tested, run and tabulated at once."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import invrecon.methods
import invrecon.operators
from invrecon.discovery import export_classes, find_classes, reach_named_files
from invrecon.methods import (
    Conditioning,
    DataSampler,
    FittedNetwork,
    Method,
    Schedule,
    Start,
    StoppingRule,
    Transition,
)
from invrecon.operators import CoilMaps, LinearOperator, NoiseModel, Sampling
from tests.cli.tiny import QUIET, SIZE, make_prior, make_volume, slices_of_a_chest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
FILES = dict(re.findall(r"`([\w/]+\.\w+)`:\n\n```\w+\n(.*?)```", PAGE, re.DOTALL))
LINES = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
]
RUN = """
import json, runpy, sys
for name, *args in json.loads(sys.argv[1]):
    sys.argv = [name, *args]
    if name == "invrecon":
        from invrecon.cli import main
        main(args)
    else:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
"""


def python(*args: str, cwd: Path, path: Path, **variables: str) -> str:
    """Runs `python ...` in a process of its own, and returns what it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(path), **variables}
    command = [sys.executable, *args]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, with the files of the page added and nothing else changed."""
    folder = tmp_path_factory.mktemp("project")
    ignore = shutil.ignore_patterns("_share")  # what is compiled is copied, too: it is known by time and size
    for name in ("invrecon", "tests", "benchmarks", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("data", "checkpoints", "pyproject.toml", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    for name, text in FILES.items():
        assert not (folder / name).exists()
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small slice under the name of the benchmarks' data, and a prior."""
    folder = tmp_path_factory.mktemp("tiny")
    from benchmarks._common import HELD_OUT

    make_volume(folder / HELD_OUT, slices_of_a_chest(SIZE)).rename(folder / "scan.h5")
    shutil.copy(folder / "scan.h5", folder / HELD_OUT)
    make_prior(folder / "patch.safetensors")
    return folder


def small(line: str, tiny: Path, output: Path) -> list[str]:
    """A command of the page as `RUN` takes it, made small: tiny slices and a tiny prior."""
    name, *args = shlex.split(line)
    prior = str(tiny / "patch.safetensors")
    if name == "invrecon":
        args += [f"--data.paths={tiny}/scan.h5", "--data.slices=3", f"--data.size={SIZE}", f"--output={output}"]
        return [name, *args, f"--model.operator.size={SIZE}", f"--model.prior={prior}", "--model.num_figures=0", *QUIET]
    assert (name, args[0]) == ("python", "-m")
    bench, args = args[1], args[2:]
    args += ["--size", str(SIZE), "--slices", "3", "--threads", "1", "--json", f"{output}.json"]
    if bench == "benchmarks.methods":
        return [bench, *args, "--prior", prior, "--repeats", "1", "--evaluations", "2"]
    args += ["--priors", f"patch_ct={prior}", f"whole_ct={prior}"]
    return [bench, *args, *(() if "--settings" in args else ("--settings", "20-clean")), *few_rows(args)]


def few_rows(args: list[str]) -> tuple[str, ...]:
    """Options for two rows that take no time, where all are asked for."""
    return () if "--rows" in args else ("--rows", "fbp", "patch")


def test_its_files_are_two_and_two() -> None:
    folders = sorted(str(Path(name).parent) for name in FILES)
    assert folders == ["configs", "configs", "invrecon/methods", "invrecon/operators"]
    code = [line for name, text in FILES.items() if name.endswith(".py") for line in text.splitlines() if line.strip()]
    assert len(code) < 80


@pytest.mark.slow
def test_both_pass_the_tests_that_they_enter(project: Path) -> None:
    commands = [shlex.split(line) for line in LINES if " pytest " in line]
    (folders,) = {tuple(words[3:-2]) for words in commands}
    names = " or ".join(words[-1] for words in commands)
    options = ("-k", names, "-p", "no:xdist", "-p", "no:cacheprovider", "-rA", "-q")
    passed = python("-m", "pytest", *folders, *options, cwd=project, path=project)
    found = set(re.findall(r"^PASSED \S*?(test_\w+)\[([\w-]*)", passed, re.MULTILINE))
    methods = {test for test, case in found if case.startswith("HalfQuadratic")}
    assert methods >= {
        "test_against_the_closed_form",
        "test_exact_data_are_met",
        "test_a_case_does_not_depend_on_its_batch",
        "test_evaluations_are_as_declared",
        "test_the_scale_of_the_operator_does_not_matter",
    }
    from tests.operators.battery import CHECKS

    assert {case for test, case in found} >= {f"RowAverage-{check.__name__}" for check in CHECKS}


@pytest.mark.slow
def test_its_commands_run(project: Path, tiny: Path, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "my_methods.py").write_text(FILES["invrecon/methods/half_quadratic.py"])
    lines = [line for line in LINES if " pytest " not in line]
    commands = [small(line, tiny, tmp_path / str(k)) for k, line in enumerate(lines)]
    python("-c", RUN, json.dumps(commands), cwd=here, path=project, INVRECON_DATA=str(tiny))
    for k, line in enumerate(lines):
        if line.startswith("invrecon"):
            assert (tmp_path / str(k) / "metrics.csv").read_text().count("\n") == 2, line
            config = (tmp_path / str(k) / "config.yaml").read_text()
            for name in re.findall(r"(?<==)(?:\w+\.)*(?:HalfQuadratic|RowAverage)", line):
                assert re.search(rf"class_path: (?:\w+\.)*{re.escape(name)}\n", config), line
        elif "benchmarks.methods" in line:
            (row,) = json.loads((tmp_path / f"{k}.json").read_text())["rows"]
            assert row["method"] == "HalfQuadratic" and row["evaluations"] == 2
        else:
            expected = "| HalfQuadratic |" if "HalfQuadratic" in line else "## RowAverage, width 4"
            assert expected in (tmp_path / f"{k}.md").read_text()


def test_the_problems_of_the_tables_are_those_of_configs() -> None:
    from benchmarks._common import SETTINGS
    from benchmarks._methods import find_problems

    found = find_problems(SETTINGS.values())
    physics = {"class": "BicubicDownsample", "factor": 4}
    setting = found["superres_bicubic_ct"]
    assert (setting.physics, setting.title) == (physics, "BicubicDownsample, factor 4")
    assert type(setting.noise).__name__ == "GaussianNoise"
    assert not found.keys() & {"recon_ct", "recon_rgb", "generate_ct", "tta_ct"}
    assert "superres_bicubic_ct" not in find_problems([setting])


# The finding itself -------------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """Makes and imports a package of the given files, whose `__init__` lists nothing."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(**modules: str) -> ModuleType:
        folder = tmp_path / "rooms"
        (folder / "inner").mkdir(parents=True)
        for name, text in {"__init__": "__all__ = []", "inner/__init__": "", **modules}.items():
            (folder / f"{name}.py").write_text(text)
        for name in [name for name in sys.modules if name.partition(".")[0] == "rooms"]:
            monkeypatch.delitem(sys.modules, name)
        import rooms  # type: ignore[import-not-found]

        return rooms

    yield make
    for name in [name for name in sys.modules if name.partition(".")[0] == "rooms"]:
        del sys.modules[name]


SCHEDULE = "from invrecon.methods import Schedule\nclass {}(Schedule):\n    def interpolate(self, t): return t\n"


def test_classes_are_found_that_a_config_can_name(package: Callable[..., Any]) -> None:
    needing = SCHEDULE.format("Needing") + "    def __init__(self, knob): self.knob = knob\n"
    ready = "    def __init__(self, knob=1): self.knob = knob\n"
    rooms = package(
        **{
            "one": SCHEDULE.format("Plain") + ready + SCHEDULE.format("_Hidden") + ready + needing,
            "inner/two": SCHEDULE.format("Deep") + ready + "from rooms.one import Plain\n",
            "_private": "raise RuntimeError('imported')",
            "abstract": "from invrecon.methods import Schedule\nclass Abstract(Schedule):\n    pass\n",
        }
    )
    assert find_classes(rooms, Schedule).keys() == {"Plain", "Deep"}
    assert find_classes(rooms, Method) == {}
    export_classes(vars(rooms), Schedule)
    assert rooms.__all__ == ["Deep", "Plain"] and rooms.Deep.__module__ == "rooms.inner.two"
    export_classes(vars(rooms), Schedule)
    assert rooms.__all__ == ["Deep", "Plain"], "known already"


def test_a_name_is_given_once(package: Callable[..., Any]) -> None:
    text = SCHEDULE.format("Same") + "    def __init__(self): pass\n"
    with pytest.raises(ImportError, match=r"rooms\.one and rooms\.two both define Same"):
        find_classes(package(one=text, two=text), Schedule)


@pytest.mark.parametrize(
    ("room", "bases"),
    [
        (
            invrecon.methods,
            (Method, Schedule, Conditioning, Transition, Start, DataSampler, StoppingRule, FittedNetwork),
        ),
        (invrecon.operators, (LinearOperator, NoiseModel, Sampling, CoilMaps)),
    ],
    ids=["methods", "operators"],
)
def test_what_is_found_is_exported_once(room: ModuleType, bases: tuple[type, ...]) -> None:
    assert find_classes(room, *bases).items() <= vars(room).items()
    assert len(room.__all__) == len(set(room.__all__))
    assert all(hasattr(room, name) for name in room.__all__)


@pytest.fixture
def search_path(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    return sys.path


@pytest.mark.parametrize(
    "arg",
    [
        "--model.method=mine.Newest",
        "mine.Newest",
        "mine.deep.Newest",
        "--model.operator=[a, mine.Newest]",
        "--config=a.yaml",
        "a.yaml",
    ],
)
def test_a_file_beside_is_reached_if_it_is_named(arg: str, tmp_path: Path, search_path: list[str]) -> None:
    (tmp_path / "mine.py").write_text("raise RuntimeError('imported')")
    config = tmp_path / "a.yaml"
    config.write_text("method:\n  class_path: mine.Newest\n")
    before = list(search_path)
    reach_named_files([arg.replace("a.yaml", str(config))], tmp_path)
    assert search_path == [*before, str(tmp_path)], "last, so that nothing is hidden by it"


@pytest.mark.parametrize("arg", ["--data.paths=mine.h5", "results/mine.Newest", "yours.Newest", "torch.Tensor", "mine"])
def test_a_folder_is_not_searched_for_what_was_not_named(arg: str, tmp_path: Path, search_path: list[str]) -> None:
    for name in ("mine", "torch"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('imported')")
    before = list(search_path)
    reach_named_files([arg], tmp_path)
    assert search_path == before
