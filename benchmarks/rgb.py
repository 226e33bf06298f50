"""Natural colour images: the linear battery of DPS and DAPS on Kodak photographs, with a patch prior of photographs.

    python -m benchmarks.rgb --json rgb.json [--settings box sr-block] [--rows tv DPS patch] [--list] [--figure FILE]
    python -m benchmarks.rgb --tune --json rgb.json

12 Kodak images of 256 x 256, noise 0.025 on [0, 1] (0.05 on [-1, 1]): Gaussian deblurring (61 x 61, std 3, reflected),
motion deblurring (61 x 61, a path of random direction, intensity 0.5, reflected), uniform deblurring (9 x 9),
super-resolution by 4 (antialiased bicubic, and block means), inpainting of a box of 128 x 128 and of 70 % of the
pixels. It departs from the publications in the images (they have FFHQ and ImageNet, and networks trained on those), in
places (the box is in the middle, the random mask and the path one for all images; theirs are drawn for each image), in
the uniform blur, and in LPIPS, which is left out, as it needs weights that do not come along.

Rows: `baseline` (the direct inverse: the measurement, interpolated, filled by the nearest pixel), `tv` and `wavelet`
with a weight for each setting, `patch` (the default `ProximalDiffusion`), `patch-1` (the same from level 1.0 instead of
0.1, as where a large part is missing), `whole` (likewise from 1.0, with a whole-image prior, if one is named) and
methods of the package by name, with the patch prior and their own defaults, the same in all settings. TV and wavelets
take each channel by itself. DAPS draws its noise on the processor, 20 000 times; `DAPSExact` has exact draws instead.

The run continues where it was stopped: an image whose settings, weights and data are those of the JSON is not computed
again. Processes that run at once each have a JSON of their own, and `--merge` takes up their rows. Rows without a prior
file are left out, and said to be. `--evaluations` and `--warm` make methods shorter; their rows then say so. `--tune`
chooses the weights of `tv` and `wavelet` on parts of three photographs that the priors are trained on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from benchmarks import _common
from benchmarks._common import Bench, Entry, Row, Setting
from benchmarks._methods import find_methods, has_spectrum, shorten, starts_from_noise, tune_weights, warm
from benchmarks.claims._verdicts import difference
from invrecon.data.cases import CaseBatch
from invrecon.data.images import image_files
from invrecon.data.intensity import RGB, Intensity
from invrecon.data.reconstruction import ImageData
from invrecon.errors import InputError
from invrecon.methods import FBP, Method, ProximalDiffusion, Sampler, TotalVariation, WaveletL1
from invrecon.metrics.image import psnr
from invrecon.metrics.summary import format_entry, heading, summarise
from invrecon.operators import GaussianNoise, LinearOperator
from invrecon.report.figures import as_array
from invrecon.report.provenance import fingerprint
from invrecon.report.sheet import Sheet, Window
from invrecon.tasks.reconstruction import Reconstruction, Result

FOLDER = "rgb/test"
KODAK = tuple(f"{FOLDER}/kodim{number:02d}.png" for number in range(1, 13))
VALIDATION = ("rgb/train/100080.jpg", "rgb/train/187029.jpg", "rgb/train/45077.jpg")
SIZE, NOISE = 256, GaussianNoise(0.025)
METRICS = ("psnr", "ssim")


def restoration(name: str, title: str, kind: str, **physics: Any) -> Setting:
    """Returns a setting of colour images."""
    return Setting(name, title, 0, NOISE, physics={"class": kind, "num_channels": 3, **physics})


SETTINGS = {
    setting.name: setting
    for setting in (
        restoration("gauss", "Gaussian blur", "GaussianBlur", kernel_size=61, std=3.0, boundary="reflect"),
        restoration("motion", "Motion blur", "MotionBlur", kernel_size=61, intensity=0.5, boundary="reflect", seed=0),
        restoration("uniform", "Uniform blur 9 x 9", "UniformBlur", kernel_size=9, boundary="reflect"),
        restoration("sr-bicubic", "Super-resolution 4 x, bicubic", "BicubicDownsample", factor=4),
        restoration("sr-block", "Super-resolution 4 x, block means", "BlockDownsample", factor=4),
        restoration("box", "Inpainting, box", "BoxInpainting", box=128),
        restoration("random", "Inpainting, 70 % at random", "RandomInpainting", fraction=0.7, seed=0),
    )
}
CLASSICAL = ("baseline", "tv", "wavelet")
PUBLISHED = ("DPS", "DAPS", "DAPSExact", "DiffPIR", "DDRM", "DDNMPlus")
OWN = ("patch", "patch-1", "whole")
ROWS = (*CLASSICAL, *PUBLISHED, *OWN)
WIDE = 1.0  # first level where what fills a hole at the start is off by more than the usual one
FIGURE_ROWS = ("baseline", "tv", "DPS", "DAPS", "DAPSExact", "patch")  # of DAPS one
GRIDS = {
    "tv": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "wavelet": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
}
# Of `python -m benchmarks.rgb --tune`: best mean PSNR on the middles, 128 x 128, of three training photographs.
WEIGHTS = {
    "tv": {
        "gauss": 3e-3,
        "motion": 3e-3,
        "uniform": 3e-3,
        "sr-bicubic": 3e-2,
        "sr-block": 3e-2,
        "box": 1e-2,
        "random": 3e-3,
    },
    "wavelet": {
        "gauss": 3e-3,
        "motion": 3e-3,
        "uniform": 3e-3,
        "sr-bicubic": 3e-2,
        "sr-block": 3e-2,
        "box": 3e-2,
        "random": 1e-2,
    },
}
ITERATIONS = {"tv": 20000, "wavelet": 500}  # most need hundreds; boxes fill slowly


class ColourReconstruction(Reconstruction):
    """A reconstruction of colour images, which have no body to be judged by itself."""

    def _intensity(self) -> Intensity:
        return RGB


@dataclass
class RGBBench(Bench):
    """Runs methods on colour images.

    Attributes:
        keep: Id of the case whose images are kept; None for none.
        images: Those images, by setting and label.
    """

    reconstruction = ColourReconstruction

    keep: str | None = None
    images: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def operator(self, setting: Setting) -> LinearOperator:
        """Returns the setting's physics; the box covers half of the image's side at any size."""
        physics = dict(setting.physics or {})
        if "box" in physics:
            physics["box"] = physics["box"] * self.size // SIZE
        return super().operator(replace(setting, physics=physics))

    def task(self, setting: Setting, entry: Entry, precision: str | None = None) -> Reconstruction:
        """Returns the task that measures and reconstructs; a prior of other images is refused."""
        task = super().task(setting, entry, precision)
        task.setup("test")
        return task

    def reconstruct(self, setting: Setting, entry: Entry, batch: CaseBatch) -> Result:
        """Returns the result of a batch, and keeps an image of it."""
        result = super().reconstruct(setting, entry, batch)
        if self.keep in batch.id:
            self.images[setting.name, entry.label] = result.estimate.mean[batch.id.index(self.keep)].cpu()
        return result

    def locate(self, setting: Setting, entry: Entry, batch: CaseBatch) -> tuple[list[str], str]:
        """Returns the names of a batch's rows in the record, and their fingerprint: every image is a file."""
        keys, identity = super().locate(setting, entry, batch)
        return keys, fingerprint({"row": identity}, None, [_common.file_hash(path) for path in batch.source])


@cache
def load_images(names: tuple[str, ...], size: int, batch_size: int) -> list[CaseBatch]:
    """Returns images of one folder of the benchmark data, in batches; every image is a source and a case of its own."""
    files = [_common.data_file(name) for name in names]
    folder = image_files(files[0].parent)
    slices = ",".join(str(folder.index(file)) for file in files)
    batches = ImageData(str(files[0].parent), slices, size, batch_size).test_dataloader()
    return [
        replace(batch, id=[f"rgb/{stem}" for stem in batch.patient], source=[str(folder[i]) for i in batch.index])
        for batch in batches
    ]


def middle(batch: CaseBatch, size: int) -> CaseBatch:
    """Returns the middle squares of a batch's images."""
    assert batch.reference is not None
    first = (batch.reference.shape[-1] - size) // 2
    inside = slice(first, first + size)
    return replace(batch, reference=batch.reference[..., inside, inside].contiguous())


def classical(row: str, weight: float) -> Method:
    """Returns a method without a prior; its weight is absolute, and wavelets are averaged over four shifts."""
    common: dict[str, Any] = {"weight": weight, "noise_weight": 0.0, "num_iterations": ITERATIONS[row]}
    return TotalVariation(**common) if row == "tv" else WaveletL1(**common, num_shifts=4)


@dataclass
class Tables:
    """The settings' rows in a record.

    Attributes:
        bench: Where they are computed and kept.
        prior: The patch prior: a file, or the name of a shipped one.
        whole: Likewise the whole-image prior, or None.
        batches: The images.
        evaluations: Most evaluations of a method; None for as many as published.
        warm: Level at which methods that start from noise start, from the direct inverse, instead; None for noise.
    """

    bench: RGBBench
    prior: str
    whole: str | None
    batches: Sequence[CaseBatch]
    evaluations: int | None = None
    warm: float | None = None

    def __post_init__(self) -> None:
        self.failures: dict[str, str] = {}

    def entry(self, setting: Setting, row: str) -> Entry:
        """Returns who competes in a row."""
        if row in CLASSICAL:
            return Entry(row, FBP() if row == "baseline" else classical(row, WEIGHTS[row][setting.name]))
        kind = ProximalDiffusion if row in OWN else find_methods()[row]
        method, label = kind(), row
        if self.evaluations is not None and self.evaluations < method.num_evaluations:
            method = shorten(kind, self.evaluations)
            label += f", {method.num_evaluations} evaluations"
        if row in ("patch-1", "whole"):
            assert isinstance(method, Sampler)
            method = warm(method, WIDE)
        elif self.warm is not None and starts_from_noise(method):
            assert isinstance(method, Sampler)
            method, label = warm(method, self.warm), f"{label}, from {self.warm:g}"
        return Entry(label, method, self.whole if row == "whole" else self.prior)

    def has_weights(self, row: str) -> bool:
        """Says whether a row's prior is there, if it needs one."""
        prior = self.whole if row == "whole" else self.prior
        return row in CLASSICAL or (prior is not None and _common.has_weights(prior))

    def find(self, setting: Setting, entry: Entry) -> list[Row]:
        """Returns the rows that the record holds."""
        return [row for batch in self.batches for row in self.bench.find(setting, entry, batch) or ()]

    def measure(self, setting: Setting, entries: Sequence[Entry]) -> None:
        """Computes the rows that the record lacks, leaving out methods whose singular values there are none of."""
        spectral = has_spectrum(self.bench.operator(setting))
        for entry in entries:
            if entry.method.needs_spectrum and not spectral:
                continue
            for batch in self.batches:
                try:
                    self.bench.rows(setting, entry, batch)
                except InputError as error:  # one that diverged does not end the run
                    self.failures[f"{setting.title}, {entry.label}, {batch.id[0]}"] = _common.without_folder(error)
                    _common.progress(str(error))

    def list_rows(self, settings: Sequence[Setting], rows: Sequence[str]) -> None:
        """Prints what the record holds and what is left."""
        total = sum(map(len, self.batches))
        lines = []
        for setting in settings:
            for row in rows:
                there = self.has_weights(row)
                done = len(self.find(setting, self.entry(setting, row))) if there else 0
                lines.append((setting.name, row, f"{done}/{total}", "" if there else "no weights"))
        print(_common.markdown(["Setting", "Row", "Images done", ""], lines))

    def draw(self, path: Path, settings: Sequence[Setting], rows: Sequence[str], name: str) -> None:
        """Draws an image: settings in rows, methods and the truth in columns; what was not kept is computed."""
        (one,) = load_images((f"{FOLDER}/{name}.png",), self.bench.size, 1)
        assert one.reference is not None
        truth, window = as_array(one.reference[0]), Window("", 0.0, 1.0, units="")
        noise = f"noise {NOISE.std:g}"
        sheet = Sheet(len(settings), len(rows) + 1, truth.shape[:2], name, f"PSNR [dB]; {noise}")
        sheet.titles([*rows, "truth"])
        for line, setting in enumerate(settings):
            images, scores = dict[str, Tensor](), dict[str, float]()
            for row in rows:
                entry = self.entry(setting, row)
                key = setting.name, entry.label
                if key not in self.bench.images:
                    self.bench.reconstruct(setting, entry, one)
                images[row] = self.bench.images[key]
                scores[row] = float(psnr(images[row][None], one.reference))
            side = truth.shape[0] // 5
            box = (2 * side, 2 * side, side)  # the middle, where the box is missing, too
            sheet.row_label(line, setting.title, noise)
            for column, row in enumerate(rows):
                axes = sheet.panel(line, column, as_array(images[row]), window, box)
                sheet.label(axes, f"{scores[row]:.2f}", scores[row] == max(scores.values()))
            sheet.panel(line, len(rows), truth, window, box)
        sheet.save(path)
        print(f"Figure: {path}")


def pairs(rows: Sequence[str]) -> list[tuple[str, str]]:
    """Returns which rows are compared: all with TV, ours with DPS and DAPS."""
    found = [(row, "tv") for row in rows if row != "tv"]
    return found + [(a, b) for a in OWN for b in ("DPS", "DAPS", "DAPSExact") if a in rows and b in rows]


def report(tables: Tables, settings: Sequence[Setting], rows: Sequence[str]) -> dict[str, Any]:
    """Prints the tables of what the record holds; returns what they say."""
    lines, compared = [], []
    summaries: dict[str, Any] = {}
    differences: dict[str, dict[str, Any]] = {}
    most = 0
    present = [row for row in rows if tables.has_weights(row)]
    for setting in settings:
        entries = {row: tables.entry(setting, row) for row in present}
        found = {row: own for row, entry in entries.items() if (own := tables.find(setting, entry))}
        summaries[setting.name], differences[setting.name] = {}, {}
        for row, own in found.items():
            summary = summarise(own, METRICS)
            seconds, evaluations = _common.median_seconds(own), fmean(each.get("num_evaluations", 0) for each in own)
            cells = [format_entry(name, summary[name]) for name in METRICS]
            lines.append((setting.title, entries[row].label, *cells, f"{evaluations:.0f}", f"{seconds:.2f}", len(own)))
            more = {"label": entries[row].label, "num_evaluations": evaluations, "median_seconds": seconds}
            summaries[setting.name][row] = {**summary, **more}
            most = max(most, len(own))
        for a, b in pairs(rows):
            entry = difference(found.get(a), found.get(b))
            if entry is not None:
                differences[setting.name][f"{a} - {b}"] = entry
                compared.append((setting.title, f"{a} - {b}", _common.difference_cell(entry)))
    header = ["Setting", "Row", *map(heading, METRICS), "Evaluations", "s an image, median", "Images"]
    print("\n" + _common.markdown(header, lines) + "\n")
    print(f"{most} image{'s' * (most != 1)}; intervals: 95 % bootstrap over images.")
    priors = {row: (tables.whole if row == "whole" else tables.prior) for row in rows if row not in present}
    if priors:
        print("No weights: " + ", ".join(f"{row} ({prior})" for row, prior in priors.items()))
    for where, why in tables.failures.items():
        print(f"Failed: {where}: {why}")
    if compared:
        print("\n" + _common.markdown(["Setting", "PSNR, paired", "Difference"], compared))
    return {
        "summaries": summaries,
        "differences": differences,
        "no_weights": list(priors),
        "failures": tables.failures,
        "tuned": tune(tables.bench, list(SETTINGS.values()), compute=False),
    }


def tune(bench: RGBBench, settings: Sequence[Setting], compute: bool) -> dict[str, Any]:
    """Returns mean PSNR by row, setting and weight on parts of validation images, of what is there or computed."""
    if not compute and not bench.record.has("tune-"):
        return {}
    bench = replace(bench, size=bench.size // 2)
    batches = [middle(batch, bench.size) for batch in load_images(VALIDATION, 2 * bench.size, 1)]
    tables = Tables(bench, "", None, batches)
    found: dict[str, dict[str, Any]] = {row: {} for row in GRIDS}
    for setting in settings:
        own = replace(setting, name=f"tune-{setting.name}")
        for row, scores in tune_weights(tables, own, GRIDS, classical, compute).items():
            found[row][setting.name] = scores
    return {row: own for row, own in found.items() if own}


def report_tuning(found: Mapping[str, Any]) -> None:
    """Prints a table a row, with a line a setting."""
    for row, by_setting in found.items():
        lines = [
            (
                name,
                *(f"{own['psnr'].get(weight, math.nan):.2f}" for weight in GRIDS[row]),
                f"{own['best']:g}" + (", at the edge" if own["at_the_edge"] else ""),
                f"{WEIGHTS[row][name]:g}",
            )
            for name, own in by_setting.items()
        ]
        header = [f"{row}, PSNR [dB]", *(f"{weight:g}" for weight in GRIDS[row]), "best", "in use"]
        print("\n" + _common.markdown(header, lines))


def main(args: list[str] | None = None) -> None:
    known = [name for name, kind in find_methods().items() if kind.needs_prior]
    parser = _common.make_parser(__doc__)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="SETTING")
    choices = [*CLASSICAL, *OWN, *known]
    parser.add_argument("--rows", nargs="+", choices=choices, metavar="ROW", help=f"default {' '.join(ROWS)}")
    parser.add_argument("--prior", default="patch_rgb", help="patch prior: a file, or the name of a shipped one")
    parser.add_argument("--whole", help="whole-image prior: likewise; none by default")
    parser.add_argument("--max-images", type=int, default=len(KODAK), help="the first so many of the 12")
    parser.add_argument("--size", type=int, default=SIZE, help="side of the images")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--evaluations", type=int, help="at most, where a method can be so short")
    parser.add_argument("--warm", type=float, metavar="SIGMA",
                        help="methods that start from noise start from the direct inverse at this level")  # fmt: skip
    parser.add_argument("--merge", type=Path, nargs="+", default=[], metavar="FILE", help="records to take rows from")
    parser.add_argument("--redo", action="store_true", help="compute again what the JSON holds already")
    parser.add_argument("--list", action="store_true", help="say what is there and what is left, compute nothing")
    parser.add_argument("--tune", action="store_true", help="tune the weights of classical methods, nothing else")
    parser.add_argument("--figure", type=Path, help="PNG of an image, settings in rows and methods in columns")
    parser.add_argument("--figure-image", default="kodim07", choices=[Path(name).stem for name in KODAK])
    options = parser.parse_args(args)
    for name, value in (("max-images", options.max_images), ("evaluations", options.evaluations)):
        if value is not None and value < 1:
            raise InputError(f"--{name} is {value}, expected at least 1.")
    rows = options.rows or [row for row in ROWS if row != "whole" or options.whole]
    settings = [SETTINGS[name] for name in options.settings]
    bench = RGBBench(_common.start(options, "rgb"), options.size)
    if options.tune:
        found = tune(bench, settings, compute=True)
        bench.record.save(tuned=found)
        report_tuning(found)
        return
    batches = load_images(KODAK[: options.max_images], options.size, options.batch_size)
    tables = Tables(bench, options.prior, options.whole, batches, options.evaluations, options.warm)
    if options.list:
        tables.list_rows(settings, rows)
        return
    bench.keep = f"rgb/{options.figure_image}" if options.figure else None
    present = [row for row in rows if tables.has_weights(row)]
    for setting in settings:
        tables.measure(setting, [tables.entry(setting, row) for row in present])
    bench.record.save(**report(tables, settings, rows))
    if options.figure:
        unwanted = "DAPSExact" if "DAPS" in present else "DAPS"
        columns = [row for row in FIGURE_ROWS if row in present and row != unwanted]
        tables.draw(options.figure, settings, columns, options.figure_image)


if __name__ == "__main__":
    _common.run(main)
