"""Networks fitted to each measurement: deep image priors with and without a diffusion prior that purifies them.

    python -m benchmarks.dip --json dip.json [--settings ct-18 mri-r8] [--rows dip udig-patch] [--figure dip.png]
    python -m benchmarks.dip --tune --json dip.json

Four slices of CT from 18 and 30 parallel views without noise, and of MRI with 8 simulated coils, noise at 30 dB and an
eighth of k-space; of patients in no training set. The estimate is the iterate that the method's rule, which knows the
measurement alone, prefers. The fit then goes on to its last iteration, which costs time and changes nothing, so that
there is a curve of PSNR against iterations with what came of the fit afterwards; the truth is for that curve alone.

The run continues where it was stopped: a slice whose settings, weights and data are those of the JSON is not computed
again. Processes that run at once each have a JSON of their own, and `--merge` takes up their rows. Rows without a prior
file are left out, and said to be. `--tune` tries knobs of uDiG-DIP on validation patients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks import _common, _mri, mri
from benchmarks._common import FEW_SLICES, Entry, Row, Setting
from benchmarks._dip import Continued, CTSetting, DIPBench, load_batches
from benchmarks._mri import MRISetting
from benchmarks.claims._figures import dark_figure, save_figure, style_axes
from benchmarks.claims._verdicts import Verdict, decide, difference, interval
from invrecon.errors import InputError
from invrecon.methods import FBP, Method, ProximalDiffusion, TotalVariation
from invrecon.methods.dip import DIP, ASeqDIP, DIPUNet, NetworkFit, Purification, SelfGuidedDIP, UDiGDIP
from invrecon.metrics.summary import describe, format_entry, heading, summarise
from invrecon.report.sheet import ACCENT, MUTED, TEXT

METRICS = ("psnr", "ssim")
AIM = 2.0  # uDiG-DIP - DIP, at least [dB]
OVERFIT = 0.5  # a fit that loses more than that from its best iterate to its last has explained the noise [dB]


SETTINGS: dict[str, CTSetting | MRISetting] = {
    "ct-18": CTSetting("ct-18", "CT, 18 views", 18),
    "ct-30": CTSetting("ct-30", "CT, 30 views", 30),
    "mri-r8": MRISetting("mri-r8", "MRI, R = 8", sampling=_mri.R8, num_slices=4),
}
TUNING: dict[str, CTSetting | MRISetting] = {
    "ct-18": CTSetting("tune-ct-18", "Validation, CT, 18 views", 18, file=_common.VALIDATION, slices="8,20"),
    "ct-30": CTSetting("tune-ct-30", "Validation, CT, 30 views", 30, file=_common.VALIDATION, slices="8,20"),
    "mri-r8": MRISetting(
        "tune-mri-r8", "Validation, MRI, R = 8", file=_mri.VALIDATION, sampling=_mri.R8, num_slices=2, spread=True
    ),
}
FITS: dict[str, type[NetworkFit]] = {
    "dip": DIP,
    "self-guided": SelfGuidedDIP,
    "aseq": ASeqDIP,
    "udig-patch": UDiGDIP,
    "udig-whole": UDiGDIP,
}
ROWS = ("direct", "tv", *FITS, "patch")  # the last is `ProximalDiffusion` with the patch prior
PRIORS = {f"{anatomy}-{kind}": f"{kind}_{anatomy}" for anatomy in ("ct", "mri") for kind in ("patch", "whole")}
PAIRS = (
    ("udig-patch", "dip"),
    ("udig-whole", "dip"),
    ("udig-patch", "self-guided"),
    ("udig-patch", "aseq"),
    ("udig-patch", "udig-whole"),
    ("udig-patch", "tv"),
    ("udig-patch", "patch"),
)
AIMED = PAIRS[:2]
# Knobs of uDiG-DIP that `--tune` tries, others as they are.
CANDIDATES: dict[str, dict[str, Any]] = {
    "as-it-is": {},
    "no-data-step": {"cg_iterations": 0},
    "published-weight": {"weight": 1.0},
    "light": {"weight": 0.01},
    "rounds-50": {"num_inner": 50},
    "rounds-25": {"num_inner": 25},
    "higher": {"purification": Purification(0.2, 0.05)},
    "lower": {"purification": Purification(0.05, 0.01)},
    "ten-levels": {"purification": Purification(num_levels=10)},
    "average": {"averaging": 0.95},
    "wide": {"network": DIPUNet([64, 128, 256, 256])},
}


def make_fit(kind: type[NetworkFit], num_iterations: int | None = None, **knobs: Any) -> NetworkFit:
    """Returns a fit as it comes but for its knobs; a shorter one has as many rounds, and goes on after its stop.

    Args:
        kind: Its class.
        num_iterations: Most steps; its own number if None.
        **knobs: Its arguments.
    """
    fit = kind(**knobs)
    if num_iterations is not None:
        if isinstance(fit, UDiGDIP):
            fit.num_inner = max(1, round(fit.num_inner * num_iterations / fit.num_iterations))
        fit.num_iterations = num_iterations
    fit.stop = Continued(fit.stop)
    return fit


@dataclass
class Tables:
    """The settings' rows in a record.

    Attributes:
        bench: Where they are computed and kept.
        priors: A prior file, or the name of a shipped one, for each of `PRIORS`.
        num_iterations: Of every fit; None for their own.
        max_slices: Most slices of a setting; None for all.
        widths: Channels of every fitted network's levels; None for its own.
    """

    bench: DIPBench
    priors: Mapping[str, str]
    num_iterations: int | None = None
    max_slices: int | None = None
    widths: list[int] | None = None

    def __post_init__(self) -> None:
        self.failures: dict[str, str] = {}

    def prior(self, setting: Setting, row: str) -> str:
        """Returns the prior of a row that needs one."""
        anatomy = "mri" if isinstance(setting, MRISetting) else "ct"
        return self.priors[f"{anatomy}-{row.removeprefix('udig-')}"]

    def entry(self, setting: Setting, row: str, label: str | None = None, **knobs: Any) -> Entry:
        """Returns who competes in a row.

        Args:
            setting: What is measured.
            row: One of `ROWS`.
            label: Name of its rows, by default the row's.
            **knobs: Of a fit.
        """
        is_mri = isinstance(setting, MRISetting)
        makers: dict[str, Callable[[], Method]] = {
            "direct": partial(FBP, clip=None) if is_mri else FBP,
            "tv": partial(mri.classical, "tv", mri.WEIGHTS["tv"]) if is_mri else TotalVariation,
            "patch": mri.proximal_diffusion if is_mri else ProximalDiffusion,
        }
        if self.widths is not None:
            knobs = {"network": DIPUNet(self.widths)} | knobs
        if is_mri and row.startswith("udig"):
            knobs = {"purification": mri.load_method("udig_dip_mri").purification} | knobs
        method = make_fit(FITS[row], self.num_iterations, **knobs) if row in FITS else makers[row]()
        return Entry(label or row, method, self.prior(setting, row) if method.needs_prior else None)

    def lacks_weights(self, setting: Setting, row: str) -> bool:
        """Says whether a row needs a prior that is not there."""
        entry = self.entry(setting, row)
        return entry.prior is not None and not _common.has_weights(entry.prior)

    def rows(self, setting: CTSetting | MRISetting, entries: Sequence[Entry]) -> dict[str, list[Row]]:
        """Returns rows by their entries' labels, from the record or computed; a slice that fails is left out."""
        found: dict[str, list[Row]] = {entry.label: [] for entry in entries}
        try:
            batches = load_batches(setting, self.bench.size, self.max_slices)
        except InputError as error:
            self._fail(setting, "all", error)
            batches = []
        for batch in batches:
            for entry in entries:
                try:
                    found[entry.label] += self.bench.rows(setting, entry, batch)
                except InputError as error:  # one that diverged does not end the run
                    self._fail(setting, f"{entry.label}, {batch.id[0]}", error)
        return {label: rows for label, rows in found.items() if rows}

    def _fail(self, setting: CTSetting | MRISetting, what: str, error: InputError) -> None:
        why = _common.without_folder(error)
        self.failures[f"{setting.title}, {what}"] = why
        _common.progress(why)


def curve_cells(rows: Sequence[Row]) -> list[str]:
    """Returns the cells of a fit: stop, best and last iterate; none of other methods."""
    if "psnr_trace" not in rows[0]:
        return ["", "", ""]
    means = {name: fmean(row[name] for row in rows) for name in ("kept_iteration", "best_psnr", "last_psnr")}
    return [f"{means['kept_iteration']:.0f}", f"{means['best_psnr']:.2f}", f"{means['last_psnr']:.2f}"]


HEADINGS = ["Setting", "Row", *map(heading, METRICS), "Stopped at iteration", "Best iterate [dB]", "Last iterate [dB]",
            "s a slice, median", "Slices"]  # fmt: skip


def line(title: str, label: str, rows: Sequence[Row]) -> list[str]:
    """Returns a line of a table."""
    summary = summarise(rows, METRICS)
    cells = [format_entry(name, summary[name]) for name in METRICS]
    return [title, label, *cells, *curve_cells(rows), f"{_common.median_seconds(rows):.1f}", str(len(rows))]


def judge_fits(title: str, found: Mapping[str, Sequence[Row]]) -> list[Verdict]:
    """Returns whether plain fits explain the noise in the end and guided ones do not, and what stopping costs."""
    verdicts = []
    for row in ("dip", "udig-patch", "udig-whole"):
        rows = found.get(row)
        loss = interval(rows, lambda own: own["best_psnr"] - own["last_psnr"]) if rows else None
        bound = f"{OVERFIT:.1f} dB from its best iterate to its last"
        if row == "dip":
            verdicts.append(decide(f"{title}: {row} loses more than {bound}", loss, OVERFIT))
        else:
            verdicts.append(decide(f"{title}: {row} loses less than {bound}", loss, OVERFIT, at_least=False))
    return verdicts


def report(tables: Tables, settings: Sequence[CTSetting | MRISetting], rows: Sequence[str]) -> dict[str, Any]:
    """Computes what is missing, prints the tables; returns what they say, and the rows under `found`."""
    found = {}
    without = [(s.title, row) for s in settings for row in rows if tables.lacks_weights(s, row)]
    for setting in settings:
        present = [row for row in rows if (setting.title, row) not in without]
        found[setting.name] = tables.rows(setting, [tables.entry(setting, row) for row in present])
    lines, notes, compared = [], [], []
    summaries: dict[str, Any] = {}
    differences: dict[str, Any] = {}
    verdicts: list[Verdict] = []
    for setting in settings:
        own = found[setting.name]
        for label, table in own.items():
            lines.append(line(setting.title, label, table))
            notes.append(describe(summarise(table, METRICS)))
        summaries[setting.name] = {
            label: {
                **summarise(table, METRICS),
                **{
                    name: interval(table, lambda row, name=name: row[name])  # type: ignore[misc]
                    for name in ("kept_iteration", "best_psnr", "last_psnr")
                    if name in table[0]
                },
                "median_seconds": _common.median_seconds(table),
            }
            for label, table in own.items()
        }
        differences[setting.name] = {}
        for a, b in PAIRS:
            entry = difference(own.get(a), own.get(b))
            outcome = ("", "")
            if (a, b) in AIMED:
                verdicts.append(decide(f"{setting.title}: {a} is at least {AIM:.0f} dB above {b}", entry, AIM))
                outcome = (f"{AIM:.1f} dB", verdicts[-1].outcome)
            if entry is not None:
                differences[setting.name][f"{a} - {b}"] = {**entry, "aim": AIM if (a, b) in AIMED else None}
                compared.append((setting.title, f"{a} - {b}", _common.difference_cell(entry), *outcome))
        verdicts += judge_fits(setting.title, own)
    print("\n" + _common.markdown(HEADINGS, lines) + "\n")
    print("\n".join(dict.fromkeys(notes)))
    print("Best and last iterate: by the truth, among those of the curve. Times are of all iterations, past the stop.")
    if without:
        print("No weights: " + ", ".join(f"{row} ({title})" for title, row in without))
    for where, why in tables.failures.items():
        print(f"Failed: {where}: {why}")
    if compared:
        print("\n" + _common.markdown(["Setting", "PSNR, paired", "Difference", "Aim, at least", "Verdict"], compared))
    print("\n" + "\n".join(f"{own.claim}: {own.outcome} {own.because and f'({own.because})'}" for own in verdicts))
    return {
        "found": found,
        "summaries": summaries,
        "differences": differences,
        "verdicts": [vars(verdict) for verdict in verdicts],
        "no_weights": [f"{title}, {row}" for title, row in without],
        "failures": tables.failures,
    }


def tune(tables: Tables, settings: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """Tries knobs of uDiG-DIP on validation patients, beside the plain fit; prints and returns mean PSNR."""
    lines, scores = [], {}
    for name in settings:
        setting = TUNING[name]
        entries = [tables.entry(setting, "dip")]
        entries += [tables.entry(setting, "udig-patch", label, **CANDIDATES[label]) for label in names]
        found = tables.rows(setting, entries)
        lines += [line(setting.title, label, rows) for label, rows in found.items()]
        scores[name] = {
            label: {key: fmean(row[key] for row in rows) for key in ("psnr", "best_psnr", "last_psnr")}
            for label, rows in found.items()
        }
    print("\n" + _common.markdown(HEADINGS, lines))
    for where, why in tables.failures.items():
        print(f"Failed: {where}: {why}")
    return scores


COLOURS = {"dip": "#ff6b6b", "self-guided": "#c4a5ff", "aseq": "#8fd0ff", "udig-patch": ACCENT, "udig-whole": "#7ddf9a"}


def draw(path: Path, titles: Mapping[str, str], found: Mapping[str, Mapping[str, Sequence[Row]]]) -> None:
    """Draws PSNR against iterations, a panel a setting: means over slices, with the mean stop and other methods' PSNR.

    Args:
        path: PNG, written atomically.
        titles: Of the settings.
        found: Setting -> row -> a row a slice.
    """
    figure = dark_figure(0.8 + 3.4 * len(found), 3.9)
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (name, own) in zip(panels, found.items(), strict=True):
        style_axes(axes)
        num = max(map(len, own.values()), default=0)
        axes.set_title(f"{titles[name]} ({num} slice{'s' * (num != 1)})", color=TEXT, fontsize=8.5)
        for (label, style), colour in zip((("tv", "--"), ("patch", ":")), (MUTED, TEXT), strict=True):
            if label in own:
                level = fmean(row["psnr"] for row in own[label])
                axes.axhline(level, color=colour, linestyle=style, linewidth=1, label=f"{label}, no fit")
        for label, rows in own.items():
            if label not in COLOURS:
                continue
            curve = np.array([row["psnr_trace"] for row in rows]).mean(axis=0)
            axes.plot(rows[0]["iterations"], curve, color=COLOURS[label], linewidth=1.3, label=label)
            stop = fmean(row["kept_iteration"] for row in rows), fmean(row["psnr"] for row in rows)
            axes.plot(*stop, "o", color=COLOURS[label], markeredgecolor=TEXT, markersize=6, zorder=3)
        curves = [value for rows in own.values() for row in rows for value in row.get("psnr_trace", [])]
        levels = [*curves, *(row["psnr"] for rows in own.values() for row in rows)]
        if levels:  # the first iterations resemble nothing
            axes.set_ylim(max(min(levels), float(np.percentile(levels, 5)) - 3), max(levels) + 1)
        axes.set_xlabel("iteration", color=MUTED, fontsize=7.5)
    panels[0].set_ylabel("PSNR [dB]; disks: means at the stop, without the truth", color=MUTED, fontsize=7.5)
    entries = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    look: dict[str, Any] = {"fontsize": 7, "labelcolor": TEXT, "frameon": False, "ncols": max(1, len(entries))}
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", **look)
    save_figure(figure, path)
    print(f"Figure: {path}")


def main(args: list[str] | None = None) -> None:
    parser = _common.make_parser(__doc__)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    for name, prior in PRIORS.items():
        parser.add_argument(f"--{name}", default=prior, help="prior: a file, or the name of a shipped one")
    parser.add_argument("--slices", default=FEW_SLICES, help=f"slices of CT (default {FEW_SLICES})")
    parser.add_argument("--max-slices", type=int, help="at most so many slices of each setting")
    parser.add_argument("--iterations", type=int, help="of every fit, for trials; their own number by default")
    parser.add_argument("--widths", type=int, nargs="+", help="channels of the fitted network, finest level first")
    parser.add_argument("--size", type=int, default=256, help="side of the images")
    parser.add_argument("--merge", type=Path, nargs="+", default=[], metavar="FILE", help="records to take rows from")
    parser.add_argument("--redo", action="store_true", help="compute again what the JSON holds already")
    parser.add_argument("--tune", action="store_true", help="try knobs of uDiG-DIP on validation patients")
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=list(CANDIDATES), metavar="NAME")
    parser.add_argument("--figure", type=Path, help="PNG of PSNR against iterations")
    options = parser.parse_args(args)
    for name in ("max_slices", "iterations"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}, expected at least 1.")
    bench = DIPBench(_common.start(options, "dip"), options.size)
    priors = {name: getattr(options, name.replace("-", "_")) for name in PRIORS}
    tables = Tables(bench, priors, options.iterations, options.max_slices, options.widths)
    if options.tune:
        bench.record.save(tuned=tune(tables, options.settings, options.candidates))
        return
    settings = [
        setting if isinstance(setting, MRISetting) else replace(setting, slices=options.slices)
        for setting in map(SETTINGS.__getitem__, options.settings)
    ]
    results = report(tables, settings, options.rows)
    found = results.pop("found")
    bench.record.save(**results)
    if options.figure:
        draw(options.figure, {setting.name: setting.title for setting in settings}, found)


if __name__ == "__main__":
    _common.run(main)
