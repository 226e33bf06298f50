"""Tunes rows of the tables of claims, each by as many trials of `invrecon tune`, on a validation patient alone.

    python -m benchmarks.tune [--tables a b] [--settings 20-clean ...] [--rows TotalVariation ...]

What is found, `invrecon tune`'s own tuned.yaml, goes to `benchmarks/claims/tuned/SETTING/ROW.yaml`, from where the
tables take it; the trials stay in `--output`, and the same command goes on where it was interrupted. The validation
volume is neither trained on nor tested on. Rows of one objective (total variation by two solvers) are tuned once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import _common
from benchmarks._common import VALIDATION, Bench, Setting
from benchmarks._methods import changed_arguments
from benchmarks.claims._problems import PROBLEMS
from benchmarks.claims._tuned import SLICES, TRIALS, tuned_path
from benchmarks.claims.table_a import MethodsTable
from benchmarks.claims.table_b import ProblemsTable
from invrecon.cli import main as invrecon
from invrecon.errors import InputError
from invrecon.files import atomic_write
from invrecon.methods import Method

DECIDES = ("trials", "slices", "volume", "size", "seed")  # what all tuned settings of the tables have in common
Jobs = dict[tuple[str, str], tuple[Method, Any]]  # names of setting and row -> method, and its prior if any
TABLES = {table.letter: table for table in (MethodsTable, ProblemsTable)}


def plan(letters: list[str], settings: list[str] | None, rows: list[str] | None) -> Jobs:
    """Returns methods and their priors, by the setting's name and the row's name in the folder of tuned settings.

    Raises:
        InputError: A setting or row that no table has.
    """
    jobs: Jobs = {}
    problems = {name for letter in letters for name in TABLES[letter].problems}
    names = {name for letter in letters for name in TABLES[letter].tuned.values()}
    for given, known, what in ((settings, problems, "--settings"), (rows, names, "--rows")):
        if unknown := set(given or ()) - known:
            raise InputError(
                f"{what} has {', '.join(sorted(unknown))}, expected some of {', '.join(sorted(known))}, which are in "
                f"the tables {', '.join(letters)}."
            )
    for letter in letters:
        table = TABLES[letter]
        recipes = table.list_recipes()
        for setting in table.problems:
            for key, name in table.tuned.items():
                if (settings is None or setting in settings) and (rows is None or name in rows):
                    method = table.start_of(recipes[key].method, PROBLEMS[setting])
                    jobs.setdefault((setting, name), (method, recipes[key].prior))
    return jobs


def arguments(bench: Bench, setting: Setting, method: Method, prior: str | None, data: list[str]) -> Iterator[str]:
    """Yields the arguments of `invrecon test` that are a row: physics, noise, method, prior and cases."""
    operator = bench.operator(setting)
    physics = dict(setting.physics or {"class": type(operator).__name__, "num_views": setting.num_views})
    yield from ("--config", "recon_ct.yaml")
    yield f"--model.operator={physics.pop('class')}"
    if hasattr(operator, "num_bins"):
        physics["num_bins"] = operator.num_bins
    yield from (f"--model.operator.{name}={json.dumps(value)}" for name, value in physics.items())
    noise = _common.plain(setting.noise)
    yield f"--model.noise={noise.pop('class')}"
    yield from (f"--model.noise.{name}={json.dumps(value)}" for name, value in noise.items())
    yield f"--model.method={type(method).__name__}"
    yield from (f"--model.method.{name}={json.dumps(value)}" for name, value in changed_arguments(method).items())
    yield from (f"--model.prior={prior or 'null'}", "--model.mirror=false", f"--model.operator.size={bench.size}")
    yield from (f"--data.size={bench.size}", "--trainer.accelerator=cpu", "--trainer.logger=false", *data)


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tables", nargs="+", choices=tuple(TABLES), default=list(TABLES))
    parser.add_argument("--settings", nargs="+", help="problems of the tables")
    parser.add_argument("--rows", nargs="+", help="names in the folder of tuned settings")
    parser.add_argument("--trials", type=int, default=TRIALS, help="of every row, the default among them")
    parser.add_argument("--slices", default=",".join(map(str, SLICES)), help="of the volume")
    parser.add_argument("--volume", default=VALIDATION, help="in the folder of the benchmark data")
    parser.add_argument("--size", type=int, default=256, help="side of the images")
    parser.add_argument("--seed", type=int, default=0, help="of the search")
    parser.add_argument("--output", type=Path, default=Path("outputs/tune/claims"), help="where the trials go")
    parser.add_argument("--tuned", type=Path, help="where the tuned settings go, in place of the tables' folder")
    options = parser.parse_args(args)
    if "heldout" in Path(options.volume).parts:
        raise InputError(f"'{options.volume}' is test data: tune on a validation patient.")
    changed = [f"--{name}" for name in DECIDES if getattr(options, name) != parser.get_default(name)]
    if options.tuned is None and changed:
        raise InputError(
            f"With another {', '.join(changed)} the tables' own settings would not be alike: name a folder by --tuned."
        )
    jobs = plan(options.tables, options.settings, options.rows)
    bench = Bench(_common.start(argparse.Namespace(**vars(options), json=None), "tune"), options.size)
    volume = _common.data_file(options.volume)
    data = [f"--data.paths={volume}", f"--data.slices={options.slices}", "--data.batch_size=4"]
    failures: list[str] = []
    for (name, row), (method, prior) in jobs.items():
        print(f"\n{PROBLEMS[name].title}, {row}", flush=True)
        own = arguments(bench, PROBLEMS[name], method, prior, data)
        folder = options.output / name / row
        try:
            invrecon(["tune", *own, f"--trials={options.trials}", f"--seed={options.seed}", f"--output={folder}"])
        except InputError as error:  # the other rows are not to blame
            failures.append(f"{PROBLEMS[name].title}, {row}: {error}")
            _common.progress(failures[-1])
            continue
        with atomic_write(tuned_path(name, row, options.tuned)) as file:
            file.write((folder / "tuned.yaml").read_bytes())
    if failures:
        raise InputError(f"{len(failures)} rows were not tuned. {' '.join(failures)}")


if __name__ == "__main__":
    _common.run(main)
