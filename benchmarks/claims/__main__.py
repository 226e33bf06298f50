"""The place where every published claim is put to the test.

    python -m benchmarks.claims [--tables a,b,g] [--settings 20-clean] [--rows patch patch-em] [--list] [--device auto]
    python -m benchmarks.claims --tables a --merge a1.json a2.json
    python -m benchmarks.claims --page docs/claims.md

A table is a class of this package; `TABLES` names it. What it finds is written beside it: `g.json` (all rows; the next
run goes on with it), `g.md` (tables, and verdicts in words) and figures. A slice computed with the same settings,
weights and data is not computed again, so that a run that was stopped goes on, here or on another machine, and a run of
a few rows adds to what is there; ratios of times are taken within a machine alone. Tables that compare trainings train
small networks first, once; they are kept in `outputs/claims/priors`. `--list` says what there is and what is left, and
computes nothing.

Processes may run at once, each with a record of its own (`--json`), other rows or settings and the same other options;
`--merge` takes up their rows, computes what is missing still, and writes the report. `--page` computes nothing and
writes the verdicts of all records on one page.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import _common
from benchmarks._common import TEST_SLICES
from benchmarks.claims._page import write_page
from benchmarks.claims._problems import PROBLEMS
from benchmarks.claims._run import Run
from benchmarks.claims.table_a import MethodsTable
from benchmarks.claims.table_b import ProblemsTable
from benchmarks.claims.table_c import PatchSizesTable
from benchmarks.claims.table_d import PositionsTable
from benchmarks.claims.table_e import TrainingSetsTable
from benchmarks.claims.table_f import ChoicesTable
from benchmarks.claims.table_g import AdaptationTable
from invrecon.errors import InputError

CLASSES: tuple[type[Run], ...] = (
    MethodsTable,
    ProblemsTable,
    PatchSizesTable,
    PositionsTable,
    TrainingSetsTable,
    ChoicesTable,
    AdaptationTable,
)
TABLES = {table.letter: table for table in CLASSES}
FOLDER = Path(__file__).parent
PRIORS = ("patch_ellipses", "whole_ellipses", "patch_ct", "whole_ct", "drunet_ct")


def parse(args: list[str] | None) -> argparse.Namespace:
    """Returns the options; `priors` is a file, or the name of a shipped prior, for each of `PRIORS`."""
    parser = _common.make_parser(__doc__)
    parser.add_argument("--tables", "--only", nargs="+", metavar="TABLE", help=f"of {','.join(TABLES)} (default all)")
    parser.add_argument("--settings", nargs="+", choices=PROBLEMS, metavar="SETTING", help="(default a table's own)")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="rows to compute, by key (default all)")
    parser.add_argument("--list", action="store_true", help="say what is there and what is left, compute nothing")
    parser.add_argument("--slices", default=TEST_SLICES, help=f"as of `invrecon test` (default {TEST_SLICES})")
    parser.add_argument("--few", type=int, metavar="N", help="slow rows on every N-th slice alone (default 2; g: 5)")
    parser.add_argument("--priors", nargs="+", default=[], metavar="NAME=FILE", help=f"for {', '.join(PRIORS)}")
    parser.add_argument("--size", type=int, default=256, help="side of the reconstructed images")
    parser.add_argument("--batch-size", type=int, default=4, help="where nothing adapts")
    parser.add_argument("--figure-slice", type=int, default=50)
    parser.add_argument("--redo", action="store_true", help="compute again what the JSON holds already")
    parser.add_argument("--merge", type=Path, nargs="+", default=[], metavar="FILE", help="records to take rows from")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the verdicts of all tables, compute nothing")
    parser.add_argument("--training-steps", type=int, default=250, help="of small networks (times training pixels)")
    parser.add_argument("--training-pixels", type=int, default=100352, help="a step of small networks")
    parser.add_argument("--channels", type=int, default=24, help="base channels of small networks")
    parser.add_argument("--folder", type=Path, default=Path("outputs/claims/priors"), help="of small networks")
    options = parser.parse_args(args)
    named = dict(text.partition("=")[::2] for text in options.priors)
    if unknown := named.keys() - set(PRIORS):
        raise InputError(f"--priors names {', '.join(sorted(unknown))}, expected NAME=FILE of {', '.join(PRIORS)}.")
    if options.few is not None and options.few < 1:
        raise InputError(f"--few is {options.few}, expected every how many slices, at least 1.")
    options.priors = {name: named.get(name, name) for name in PRIORS}
    options.tables = [name for text in options.tables or TABLES for name in text.split(",") if name]
    if unknown := set(options.tables) - TABLES.keys():
        raise InputError(f"There is no table {', '.join(sorted(unknown))}, expected some of {', '.join(TABLES)}.")
    known = list(dict.fromkeys(key for name in options.tables for key in TABLES[name].list_recipes()))
    if unknown := set(options.rows or ()) - set(known):
        raise InputError(f"There is no row {', '.join(sorted(unknown))}, expected some of {', '.join(known)}.")
    chosen = [name for name in options.tables if TABLES[name].choose_rows(options)]
    options.tables = [name for name in chosen if TABLES[name].choose_settings(options)]
    if not options.tables:
        raise InputError(f"No table has both the rows and the settings {', '.join(options.settings or ())} asked for.")
    for name in ("json", "merge"):
        if getattr(options, name) and len(options.tables) > 1:
            raise InputError(f"--{name} is of one table: name the table by --tables.")
    return options


def main(args: list[str] | None = None) -> None:
    options = parse(args)
    if options.page is not None:
        write_page(options.page, FOLDER, {name: TABLES[name].title for name in options.tables})
        print(f"Verdicts: {options.page}")
        return
    for name in options.tables:
        print(f"\n({name}) {TABLES[name].title}")
        table = TABLES[name](options, options.json or FOLDER / f"{name}.json")
        if options.list:
            table.list_rows()
        else:
            table.run()


if __name__ == "__main__":
    _common.run(main)
