"""The place where every published claim is put to the test.

    python -m benchmarks.claims [--only g] [--settings 20-clean] [--rows patch patch-em] [--threads 2]

A table is a module of this package with a `TITLE` and a function `run(options, path)`; `TABLES` names it. What it finds
is written beside it: `g.json` (all rows; the next run goes on with it), `g.md` (tables, and verdicts in words) and
figures. A slice computed with the same settings, weights, data, threads and machine is not computed again, so that a
run that was stopped goes on, and a run of a few rows adds to what is there.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType

from benchmarks import _common
from benchmarks._common import SETTINGS, TEST_SLICES
from benchmarks.claims import table_g
from invrecon.errors import InputError

TABLES: dict[str, ModuleType] = {"g": table_g}
FOLDER = Path(__file__).parent
PRIORS = ("patch_ellipses", "whole_ellipses", "patch_ct", "whole_ct")


def parse(args: list[str] | None) -> argparse.Namespace:
    """Returns the options; `priors` is a file, or the name of a shipped prior, for each of `PRIORS`."""
    parser = _common.make_parser(__doc__)
    settings = [name for name, setting in SETTINGS.items() if not setting.native]
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES), metavar="TABLE")
    parser.add_argument("--settings", nargs="+", choices=settings, default=settings[:3], metavar="SETTING")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="rows to compute, by key (default all)")
    parser.add_argument("--slices", default=TEST_SLICES, help=f"as of `invrecon test` (default {TEST_SLICES})")
    parser.add_argument("--few", type=int, default=5, metavar="N", help="published recipes on every N-th slice alone")
    parser.add_argument("--priors", nargs="+", default=[], metavar="NAME=FILE", help=f"for {', '.join(PRIORS)}")
    parser.add_argument("--size", type=int, default=256, help="side of the reconstructed images")
    parser.add_argument("--batch-size", type=int, default=4, help="where nothing adapts")
    parser.add_argument("--figure-slice", type=int, default=50)
    parser.add_argument("--redo", action="store_true", help="compute again what the JSON holds already")
    options = parser.parse_args(args)
    named = dict(text.partition("=")[::2] for text in options.priors)
    if unknown := named.keys() - set(PRIORS):
        raise InputError(f"--priors names {', '.join(sorted(unknown))}, expected NAME=FILE of {', '.join(PRIORS)}.")
    if options.few < 1:
        raise InputError(f"--few is {options.few}, expected every how many slices, at least 1.")
    if options.json is not None and len(options.only) > 1:
        raise InputError("--json is a file of one table: name the table by --only.")
    options.priors = {name: named.get(name, name) for name in PRIORS}
    return options


def main(args: list[str] | None = None) -> None:
    options = parse(args)
    for name in options.only:
        print(f"\n({name}) {TABLES[name].TITLE}")
        TABLES[name].run(options, options.json or FOLDER / f"{name}.json")


if __name__ == "__main__":
    _common.run(main)
