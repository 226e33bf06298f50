"""Undersampled MRI: classical methods, whole-image and patch prior, on simulated and on measured k-space.

    python -m benchmarks.mri --json mri.json [--settings sim-r8 real-r4] [--rows tv patch] [--list] [--figure FILE]
    python -m benchmarks.mri --tune --json mri.json

Simulated: the 16 middle slices of a patient in no training set, 8 coils, noise at 30 dB, a fourth and an eighth of
k-space by random lines with fastMRI's centre fractions; 4 slices with 2 % of k-space; 8 slices of an abdomen, which no
prior has seen. Measured: one slice of a head, fully sampled with 8 coils and undersampled afterwards by 5 masks, coil
maps from the calibration region that is left (ESPIRiT). Lines are random and not equispaced, of which there are but
five patterns at R = 4: the masks have to differ for an interval.

The run continues where it was stopped: a slice whose settings, weights and data are those of the JSON is not computed
again. Processes that run at once each have a JSON of their own, and `--merge` takes up their rows. Rows without a prior
file are left out, and said to be. `--tune` chooses the weights below on a validation patient; the measured scan takes
them as they are, as its images are scaled alike. The row `adapted`, where it is asked for, of the measured scan and the
abdomen alone, lets the patch prior learn each scan first, as `tta_mri.yaml` has it, without the mirror images of the
row `patch`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from benchmarks import _common
from benchmarks._common import Entry, Row
from benchmarks._methods import load_parts, tune_weights
from benchmarks._mri import (
    ABDOMEN,
    R4,
    R8,
    SCAN,
    VALIDATION,
    MRIBench,
    MRISetting,
    largest_value,
    load_batches,
    name_batches,
)
from benchmarks.claims._verdicts import Verdict, decide, difference
from invrecon.adapt import Adaptation
from invrecon.data.intensity import MAGNITUDE, Intensity
from invrecon.errors import InputError
from invrecon.methods import CGSENSE, FBP, Method, ProximalDiffusion, Sampler, TotalVariation, WaveletL1
from invrecon.metrics.mri import magnitude
from invrecon.metrics.summary import describe, format_entry, heading, summarise
from invrecon.operators import (
    NoNoise,
    PoissonDiscSampling,
    PolynomialSampling,
    Sampling,
    TwoPercentSampling,
)
from invrecon.report.sheet import Window

METRICS = ("psnr", "ssim", "nmse")


def measured(name: str, title: str, sampling: Sampling) -> MRISetting:
    """Returns a setting of the measured scan."""
    common: dict[str, Any] = {"file": SCAN, "noise": NoNoise(), "num_masks": 5, "aim": 1.0}
    return MRISetting(name, f"Measured, {title}", sampling=sampling, **common)


SETTINGS = {
    setting.name: setting
    for setting in (
        MRISetting("sim-r4", "Simulated, R = 4", sampling=R4, num_slices=16),
        MRISetting("sim-r8", "Simulated, R = 8", sampling=R8, num_slices=16, aim=2.0),
        measured("real-r4", "R = 4", R4),
        measured("real-r8", "R = 8", R8),
        measured("real-density", "2D variable density, R = 8", PolynomialSampling(8.0)),
        measured("real-poisson", "Poisson disc, R = 8", PoissonDiscSampling(8.0)),
        MRISetting("ood-r4", "Abdomen, R = 4", file=ABDOMEN, sampling=R4, num_slices=8),
        MRISetting("ood-r8", "Abdomen, R = 8", file=ABDOMEN, sampling=R8, num_slices=8),
        MRISetting("two-percent", "Simulated, 2 %", sampling=TwoPercentSampling(), num_slices=4),
    )
}
TUNING = {
    num: MRISetting(
        f"tune-r{num}",
        f"Validation, R = {num}",
        file=VALIDATION,
        sampling=sampling,
        num_slices=3,
        spread=True,
    )
    for num, sampling in ((4, R4), (8, R8))
}
# Row -> which of `PRIORS` it has. *adapted* lets it learn each scan (`tta_mri.yaml`) of a kind unseen in training.
LEARNED = {"whole": "whole", "patch": "patch", "proximal": "patch", "adapted": "patch"}
UNSEEN = (SCAN, ABDOMEN)
ROWS = ("zero-filled", "cg-sense", "tv", "wavelet", *LEARNED)
USUAL = tuple(row for row in ROWS if row != "adapted")  # which takes twelve times as long as `patch`
PRIORS = ("whole", "patch")
CLASSICAL = ("tv", "wavelet")  # what priors are to be better than
PAIRS = (("patch", "tv"), ("patch", "wavelet"), ("patch", "whole"), ("patch", "proximal"), ("proximal", "tv"),
         ("adapted", "tv"), ("adapted", "wavelet"), ("adapted", "patch"))  # fmt: skip
GRIDS = {
    "cg-sense": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "tv": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "wavelet": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
}
# Of `python -m benchmarks.mri --tune`: best mean PSNR on three slices of the validation patient, at R = 4 and at R = 8.
WEIGHTS = {"cg-sense": 3e-3, "tv": 1e-3, "wavelet": 1e-3}
# TV stops at its tolerance. Wavelets do not converge: at R = 8 FISTA has better images, by up to 1 dB, after 100
# iterations than after 300.
ITERATIONS = {"tv": 500, "wavelet": 100}


def has_row(row: str, setting: MRISetting) -> bool:
    """Says whether a setting has a row: nothing is adapted to what the priors have seen."""
    return row != "adapted" or setting.file in UNSEEN


def load_method(config: str) -> Method:
    """Returns the method of a shipped configuration, built by the parser that the command line uses."""
    (method,) = load_parts(config, method=Method)
    return method


def load_adaptation(config: str) -> tuple[Sampler, Adaptation]:
    """Returns sampler and adaptation of a shipped configuration, likewise."""
    sampler, adaptation = load_parts(config, method=Sampler, adaptation=Adaptation)
    return sampler, adaptation


def proximal_diffusion() -> Method:
    """Returns denoising and data step in turn; coils make the system worse conditioned than a sinogram."""
    return ProximalDiffusion(cg_iterations=20, clip=None)


def classical(row: str, weight: float) -> Method:
    """Returns a method without a prior; its weight is absolute, whatever is known of the noise."""
    if row == "cg-sense":
        return CGSENSE(lam=weight)
    common: dict[str, Any] = {"weight": weight, "noise_weight": 0.0, "num_iterations": ITERATIONS[row]}
    if row == "tv":
        return TotalVariation(**common, tol=1e-2, bounds=(-4.0, 4.0))
    return WaveletL1(**common, clip=None)


@dataclass
class Tables:
    """The settings' rows in a record.

    Attributes:
        bench: Where they are computed and kept.
        priors: A prior file, or the name of a shipped one, for each of `PRIORS`.
        batch_size: Slices at once.
    """

    bench: MRIBench
    priors: Mapping[str, str]
    batch_size: int

    def __post_init__(self) -> None:
        self.failures: dict[str, str] = {}

    def entry(self, row: str) -> Entry:
        """Returns who competes in a row."""
        if row == "adapted":
            method, adaptation = load_adaptation("tta_mri")
            return Entry(row, method, self.priors["patch"], adaptation)
        if row in LEARNED:
            method = proximal_diffusion() if row == "proximal" else load_method("recon_mri")
            return Entry(row, method, self.priors[LEARNED[row]], mirror=row != "proximal")  # as recon_mri.yaml has it
        return Entry(row, FBP(clip=None) if row == "zero-filled" else classical(row, WEIGHTS[row]))

    def has_weights(self, row: str) -> bool:
        """Says whether a row's prior is there, if it needs one."""
        return row not in LEARNED or _common.has_weights(self.priors[LEARNED[row]])

    def applies(self, row: str, setting: MRISetting) -> bool:
        """Says whether a setting has a row, whose prior, if it needs one, is there."""
        return self.has_weights(row) and has_row(row, setting)

    def find(self, setting: MRISetting, entry: Entry) -> list[Row]:
        """Returns the rows that the record holds."""
        masks = range(setting.num_masks)
        batches = [batch for mask in masks for batch in name_batches(setting, mask, self.batch_size)]
        return [row for batch in batches for row in self.bench.find(setting, entry, batch) or ()]

    def measure(self, setting: MRISetting, entries: Sequence[Entry]) -> None:
        """Computes the rows that the record lacks."""
        for mask in range(setting.num_masks):
            named = name_batches(setting, mask, self.batch_size)
            missing = [(e, i) for e in entries for i, b in enumerate(named) if not self.bench.find(setting, e, b)]
            if not missing:
                continue
            try:
                batches = load_batches(setting, mask, self.bench.size, self.batch_size)
            except InputError as error:
                self._fail(setting, setting.volume(mask), error)
                continue
            own = replace(setting, maximum=largest_value(batches))
            for entry, index in missing:
                try:
                    self.bench.rows(own, entry, batches[index])
                except InputError as error:  # one that diverged does not end the run
                    self._fail(setting, f"{entry.label}, {named[index].id[0]}", error)

    def _fail(self, setting: MRISetting, what: str, error: InputError) -> None:
        why = _common.without_folder(error)
        self.failures[f"{setting.title}, {what}"] = why
        _common.progress(why)

    def list_rows(self, settings: Sequence[MRISetting], rows: Sequence[str]) -> None:
        """Prints what the record holds and what is left."""
        lines = []
        for setting in settings:
            total = setting.num_masks * len(setting.slices())
            for row in (row for row in rows if has_row(row, setting)):
                done = len(self.find(setting, self.entry(row))) if self.has_weights(row) else 0
                lines.append((setting.name, row, f"{done}/{total}", "" if self.has_weights(row) else "no weights"))
        print(_common.markdown(["Setting", "Row", "Slices done", ""], lines))

    def tune(self, compute: bool) -> dict[str, Any]:
        """Returns the mean PSNR by row, acceleration and weight, and the best weight, of what is there or computed."""
        found: dict[str, Any] = {row: {} for row in GRIDS}
        for num, setting in TUNING.items():
            if not compute and not self.bench.record.has(f"{setting.name}/"):
                continue
            for row, scores in tune_weights(self, setting, GRIDS, classical, compute).items():
                found[row][num] = scores
        return {row: own for row, own in found.items() if own}

    def draw(self, path: Path, settings: Sequence[MRISetting], rows: Sequence[str]) -> None:
        """Draws the middle slice of the first setting's file by every row, in each setting of that file."""
        from invrecon.report.figures import comparison_figure

        own = [setting for setting in settings if setting.file == settings[0].file]
        images: dict[str, dict[str, Tensor]] = {}
        truth = None
        for setting in own:
            (batch,) = load_batches(replace(setting, num_slices=1), 0, self.bench.size, 1)
            row_images = images[setting.title] = {}
            for row in (row for row in rows if self.applies(row, setting)):
                result = self.bench.reconstruct(setting, self.entry(row), batch)
                row_images[row] = batch.scale[0] * magnitude(result.estimate.mean)[0, 0]
                if truth is None and result.reference is not None:
                    truth, first = batch.scale[0] * magnitude(result.reference)[0, 0], batch
        assert truth is not None
        window = Window("magnitude", 0.0, float(truth.flatten().quantile(0.995)), units=MAGNITUDE.units)
        scale = Intensity(0.0, float(truth.amax()), MAGNITUDE.units)
        common: dict[str, Any] = {"title": first.id[0], "window": window, "intensity": scale}
        comparison_figure(path, images, truth, voxel_mm=first.voxel_mm[0], **common)
        print(f"Figure: {path}")


def volume_summary(rows: Sequence[Row]) -> dict[str, float]:
    """Returns fastMRI's metrics of the volumes that rows belong to, of several volumes their means.

    All slices of a volume have its data range, so its PSNR is that of their mean squared error.
    """
    volumes: dict[str, list[Row]] = {}
    for row in rows:
        volumes.setdefault(row["case"], []).append(row)
    found = [
        {
            "psnr": -10 * math.log10(fmean(10 ** (-row["volume_psnr"] / 10) for row in own)),
            "ssim": fmean(row["volume_ssim"] for row in own),
            "nmse": sum(row["nmse"] * row["energy"] for row in own) / sum(row["energy"] for row in own),
        }
        for own in volumes.values()
    ]
    return {name: fmean(volume[name] for volume in found) for name in ("psnr", "ssim", "nmse")}


def explain(setting: MRISetting, summary: Mapping[str, Any]) -> str:
    """Returns what was averaged, and what the interval means."""
    if setting.num_masks == 1:
        return f"{setting.title}: {describe(summary)}"
    num = summary["num_cases"]
    return f"{setting.title}: one slice, {num} masks; intervals: 95 % bootstrap over masks, of this one slice"


def cells(rows: Sequence[Row], summary: Mapping[str, Any]) -> list[str]:
    """Returns a row of the table."""
    nmse, volume = summary["nmse"], volume_summary(rows)
    interval = "" if nmse["low"] is None else f" [{nmse['low']:.4f}, {nmse['high']:.4f}]"
    return [
        *(format_entry(name, summary[name]) for name in ("psnr", "ssim")),
        f"{nmse['mean']:.4f}{interval}",
        f"{volume['psnr']:.2f}",
        f"{volume['ssim']:.4f}",
        f"{volume['nmse']:.4f}",
        f"{100 * measured_share(rows):.2f} %",
        f"{_common.median_seconds(rows):.1f}",
        str(len(rows)),
    ]


def measured_share(rows: Sequence[Row]) -> float:
    """Returns the mean share of k-space that was measured."""
    return fmean(1 / row["acceleration"] for row in rows)


HEADINGS = ["Setting", "Row", heading("psnr"), heading("ssim"), "NMSE", "Volume: PSNR [dB]", "SSIM", "NMSE",
            "Measured", "s a slice, median", "Cases"]  # fmt: skip


def report(tables: Tables, settings: Sequence[MRISetting], rows: Sequence[str]) -> dict[str, Any]:
    """Prints the tables of what the record holds; returns what they say."""
    lines, notes, compared = [], [], []
    summaries: dict[str, Any] = {}
    differences: dict[str, dict[str, Any]] = {}
    verdicts: list[Verdict] = []
    for setting in settings:
        found = {row: tables.find(setting, tables.entry(row)) for row in rows if tables.applies(row, setting)}
        found = {row: own for row, own in found.items() if own}
        summaries[setting.name] = {}
        for row, own in found.items():
            summary = summarise(own, METRICS)
            lines.append((setting.title, row, *cells(own, summary)))
            notes.append(explain(setting, summary))
            more = {"volume": volume_summary(own), "measured": measured_share(own)}
            summaries[setting.name][row] = {**summary, **more, "median_seconds": _common.median_seconds(own)}
        differences[setting.name] = {}
        for a, b in PAIRS:
            if not has_row(a, setting):
                continue
            entry = difference(found.get(a), found.get(b))
            aim = setting.aim if b in CLASSICAL else None
            if aim is not None:
                claim = f"{setting.title}: {a} is at least {aim:.0f} dB above {b}"
                verdicts.append(decide(claim, entry, aim))
            if entry is not None:
                differences[setting.name][f"{a} - {b}"] = {**entry, "aim": aim}
                aimed = ("", "") if aim is None else (f"{aim:.1f} dB", verdicts[-1].outcome)
                compared.append((setting.title, f"{a} - {b}", _common.difference_cell(entry), *aimed))
    print("\n" + _common.markdown(HEADINGS, lines) + "\n")
    print("\n".join(dict.fromkeys(notes)))
    print("Volume: as of the fastMRI challenges, all slices on one data range; several volumes (masks) are averaged.")
    no_weights = {row: tables.priors[row] for row in rows if not tables.has_weights(row)}
    if no_weights:
        print("No weights: " + ", ".join(f"{row} ({prior})" for row, prior in no_weights.items()))
    for where, why in tables.failures.items():
        print(f"Failed: {where}: {why}")
    if compared:
        print("\n" + _common.markdown(["Setting", "PSNR, paired", "Difference", "Aim, at least", "Verdict"], compared))
    return {
        "summaries": summaries,
        "differences": differences,
        "verdicts": [vars(verdict) for verdict in verdicts],
        "no_weights": list(no_weights),
        "failures": tables.failures,
        "tuned": tables.tune(compute=False),
    }


def report_tuning(found: Mapping[str, Any]) -> None:
    """Prints a line a row and acceleration."""
    for row, by_acceleration in found.items():
        scores = {num: own["psnr"] for num, own in by_acceleration.items()}
        weights = list(dict.fromkeys(weight for own in scores.values() for weight in own))
        lines = [(f"R = {num}", *(f"{own.get(w, math.nan):.2f}" for w in weights)) for num, own in scores.items()]
        print("\n" + _common.markdown([f"{row}, PSNR [dB]", *(f"{weight:g}" for weight in weights)], lines))
        for num, own in by_acceleration.items():
            edge = ", at the edge of the grid" if own["at_the_edge"] else ""
            print(f"Best at R = {num}: {own['best']:g}{edge}; in use: {WEIGHTS[row]:g}")


def main(args: list[str] | None = None) -> None:
    parser = _common.make_parser(__doc__)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*USUAL], metavar="ROW")
    parser.add_argument("--prior", default="patch_mri_fine", help="patch prior: a file, or the name of a shipped one")
    parser.add_argument("--whole", default="whole_mri", help="whole-image prior: likewise")
    parser.add_argument("--max-slices", type=int, help="at most so many slices of each setting, and masks")
    parser.add_argument("--size", type=int, default=256, help="side of simulated images")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--redo", action="store_true", help="compute again what the JSON holds already")
    parser.add_argument("--merge", type=Path, nargs="+", default=[], metavar="FILE", help="records to take rows from")
    parser.add_argument("--list", action="store_true", help="say what is there and what is left, compute nothing")
    parser.add_argument("--tune", action="store_true", help="tune the weights of classical methods, nothing else")
    parser.add_argument("--figure", type=Path, help="PNG of a slice, in the settings that share the first one's file")
    options = parser.parse_args(args)
    if options.max_slices is not None and options.max_slices < 1:
        raise InputError(f"--max-slices is {options.max_slices}, expected at least 1.")
    most = options.max_slices or sys.maxsize
    settings = [
        replace(own, num_slices=min(own.num_slices, most), num_masks=min(own.num_masks, most))
        for own in map(SETTINGS.__getitem__, options.settings)
    ]
    if not any(has_row(row, setting) for row in options.rows for setting in settings):
        raise InputError(f"The row adapted is of {', '.join(n for n, own in SETTINGS.items() if own.file in UNSEEN)}.")
    bench = MRIBench(_common.start(options, "mri"), options.size)
    tables = Tables(bench, {"whole": options.whole, "patch": options.prior}, options.batch_size)
    if options.list:
        tables.list_rows(settings, options.rows)
        return
    if options.tune:
        found = tables.tune(compute=True)
        bench.record.save(tuned=found)
        report_tuning(found)
        return
    present = [row for row in options.rows if tables.has_weights(row)]
    for setting in settings:
        tables.measure(setting, [tables.entry(row) for row in present if tables.applies(row, setting)])
    bench.record.save(**report(tables, settings, options.rows))
    if options.figure:
        tables.draw(options.figure, settings, present)


if __name__ == "__main__":
    _common.run(main)
