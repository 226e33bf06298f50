"""Table (e): how much training data patches and whole images need, at equal numbers of pixels seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks._common import Setting
from benchmarks.claims._compare import Claim, Comparison, decibels, minus
from benchmarks.claims._figures import curves_figure
from benchmarks.claims._lessons import Lesson
from benchmarks.claims._recipes import Recipe
from benchmarks.claims._run import Table
from benchmarks.claims._verdicts import Entry, contrast, interval
from invrecon.methods import ProximalDiffusion

ALL = 413  # of 443: the validation patient's 30 are kept out
NUMBERS = (28, 55, 110, 221, ALL)
# PSNR [dB] of the talk on PaDIS, from five-fold smaller to all of its slices, each twice the one before.
PUBLISHED = {"patch": (32.28, 32.43, 33.03, 33.01, 33.57), "whole": (29.12, 31.09, 31.81, 31.36, 32.84)}
SLICES = (144, 288, 576, 1152, 2304)


def loss(table: Table) -> Entry | None:
    """Returns how much more the whole-image prior loses from all slices to the fewest than the patch prior."""
    signs = {("whole", ALL): 1.0, ("whole", NUMBERS[0]): -1.0, ("patch", ALL): -1.0, ("patch", NUMBERS[0]): 1.0}
    return contrast(*((sign, table.get(f"{kind}-{num}")) for (kind, num), sign in signs.items()))


class TrainingSetsTable(Comparison):
    """The table of training sets."""

    letter, title = "e", "Sizes of the training set"
    problems = ("20-clean",)
    reference = f"patch-{ALL}"
    figure = "Training sets against all slices with patches"

    @classmethod
    def list_recipes(cls) -> dict[str, Recipe]:
        """Returns two rows a training set."""
        return {
            f"{kind}-{num}": Recipe(
                f"{kind}, {num} slices", ProximalDiffusion(), Lesson(size, None if num == ALL else num)
            )
            for kind, size in (("patch", 56), ("whole", None))
            for num in NUMBERS
        }

    def claims(self, setting: Setting) -> Iterator[Claim]:
        """Yields patch against whole for every training set, and how much each loses."""
        for index, num in enumerate(NUMBERS):
            published = decibels(PUBLISHED["patch"][index] - PUBLISHED["whole"][index])
            yield Claim(
                f"Of {num} slices, patches learn a better prior than whole images",
                minus(f"patch-{num}", f"whole-{num}"),
                f"{published} of {SLICES[index]}",
            )
        lost = {kind: psnr[-1] - psnr[0] for kind, psnr in PUBLISHED.items()}
        yield Claim(
            f"With {NUMBERS[0]} slices in place of {ALL}, patches lose less than whole images",
            loss,
            decibels(lost["whole"] - lost["patch"]),
        )

    def explain(self) -> str:
        """Returns what the rows are."""
        school = self.school
        return (
            f"Small networks ({school.base_channels} base channels), each trained on {school.num_pixels / 1e6:.1f} "
            "million pixels (to 1 %), patches of 56 pixels or whole images; smaller sets are part of larger ones. One "
            f"validation patient of 30 slices is kept out, so that {ALL} of the 443 slices is all there is. All run "
            "under `ProximalDiffusion`."
        )

    def captions(self) -> dict[str, str]:
        """Returns captions by the ending of a figure's name."""
        return {**super().captions(), "_slices.png": "PSNR against the number of training slices"}

    def figures(self, tables: Mapping[str, Table], findings: Mapping[str, Mapping[str, Any]]) -> None:
        """Draws the differences, and PSNR against the number of slices."""
        super().figures(tables, findings)
        for table in tables.values():
            curves = {
                kind: {
                    float(num): entry
                    for num in NUMBERS
                    if (entry := interval(table.get(f"{kind}-{num}", ()), lambda row: row["psnr"])) is not None
                }
                for kind in PUBLISHED
            }
            drawn = {kind: curve for kind, curve in curves.items() if curve}
            if drawn:
                curves_figure(self.beside("_slices.png"), drawn, "training slices", "PSNR [dB]")
