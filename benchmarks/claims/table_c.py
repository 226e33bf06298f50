"""Table (c): patch sizes, from 8 pixels to the whole image, each with a small network of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks._common import Setting
from benchmarks.claims._compare import Claim, Comparison, decibels, minus
from benchmarks.claims._figures import curves_figure
from benchmarks.claims._lessons import SIZES, Lesson
from benchmarks.claims._recipes import Recipe
from benchmarks.claims._run import Table
from benchmarks.claims._verdicts import interval
from invrecon.methods import ProximalDiffusion

# PSNR [dB] at 20 views: of the talk on PaDIS, and of an independent reproduction.
PUBLISHED = {8: 32.57, 16: 32.57, 32: 32.72, 56: 33.57, 96: 33.36, None: 32.84}
REPRODUCTION = {8: 31.55, 16: 29.97, 32: 28.40, 56: 32.82, 96: 34.26, None: 34.25}
BEST = 56


def key_of(size: int | None) -> str:
    """Returns the key of a row."""
    return "whole" if size is None else f"p{size}"


class PatchSizesTable(Comparison):
    """The table of patch sizes."""

    letter, title = "c", "Patch sizes"
    problems = ("20-clean",)
    reference = key_of(BEST)
    figure = "Patch sizes against 56 pixels"

    @classmethod
    def list_recipes(cls) -> dict[str, Recipe]:
        """Returns a row a size."""
        return {
            key_of(size): Recipe(
                "whole image" if size is None else f"{size} pixels", ProximalDiffusion(), Lesson(patch_size=size)
            )
            for size in (*SIZES, None)
        }

    def claims(self, setting: Setting) -> Iterator[Claim]:
        """Yields that 56 pixels are better than any other size."""
        for size, psnr in PUBLISHED.items():
            if size != BEST:
                what = "the whole image" if size is None else f"patches of {size}"
                again = decibels(REPRODUCTION[BEST] - REPRODUCTION[size])
                published = f"{decibels(PUBLISHED[BEST] - psnr)} (an independent reproduction: {again})"
                yield Claim(f"Patches of {BEST} pixels are better than {what}", minus(key_of(BEST), key_of(size)),
                            published)  # fmt: skip

    def explain(self) -> str:
        """Returns what the rows are."""
        school = self.school
        return (
            f"Small networks ({school.base_channels} base channels), one a size, each trained on "
            f"{school.num_pixels / 1e6:.1f} million pixels (to 1 %) of the same 413 slices; patches of smaller sizes "
            "are learned beside the largest, as published. All run under `ProximalDiffusion` with its settings, which "
            "were chosen with the shipped prior of 56 pixels."
        )

    def captions(self) -> dict[str, str]:
        """Returns captions by the ending of a figure's name."""
        return {**super().captions(), "_sizes.png": "PSNR against patch size"}

    def figures(self, tables: Mapping[str, Table], findings: Mapping[str, Mapping[str, Any]]) -> None:
        """Draws the differences, and PSNR against patch size."""
        super().figures(tables, findings)
        for table in tables.values():
            curve = {
                float(size or self.options.size): entry
                for size in PUBLISHED
                if (entry := interval(table.get(key_of(size), ()), lambda row: row["psnr"])) is not None
            }
            if curve:
                title = "20 views; the last is the whole image"
                curves_figure(self.beside("_sizes.png"), {title: curve}, "patch size [pixels]", "PSNR [dB]")
