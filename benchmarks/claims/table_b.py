"""Table (b): the three harder problems of the talk, by baseline, total variation, whole-image and patch prior."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from benchmarks._common import Setting
from benchmarks.claims._compare import Claim, Comparison, decibels, minus
from benchmarks.claims._problems import FOUND, PROBLEMS
from benchmarks.claims._recipes import Recipe
from benchmarks.claims._tuned import TRIALS, tuned_path
from invrecon.methods import FBP, ProximalDiffusion, TotalVariation

# PSNR [dB] of the talk on PaDIS: baseline, ADMM-TV, whole image, patches.
PUBLISHED = {
    "60-clean": (25.89, 30.93, 35.83, 39.28),
    "fan": (20.07, 25.78, 26.89, 29.91),
    "deblur-heavy": (21.14, 26.03, 28.35, 28.91),
}
ROWS = {"fbp": "the baseline", "tv": "total variation", "whole": "the whole-image prior"}


class ProblemsTable(Comparison):
    """The table of problems."""

    letter, title = "b", "60 views, fan beam, heavy deblurring"
    problems, others = tuple(PUBLISHED), tuple(FOUND)
    reference = "tv"
    figure = "Priors against total variation"
    tuned: ClassVar[Mapping[str, str]] = {"tv": "TotalVariation"}

    @classmethod
    def list_recipes(cls) -> dict[str, Recipe]:
        """Returns the four rows."""
        return {
            "fbp": Recipe("baseline", FBP()),
            "tv": Recipe("TV", TotalVariation()),
            "whole": Recipe("whole", ProximalDiffusion(), "whole_ct"),
            "patch": Recipe("patch", ProximalDiffusion(), "patch_ct"),
        }

    def claims(self, setting: Setting) -> Iterator[Claim]:
        """Yields what the talk's table says of patches, and of the whole-image prior."""
        if setting.name not in PUBLISHED:
            return
        psnr = dict(zip((*ROWS, "patch"), PUBLISHED[setting.name], strict=True))
        for key, name in ROWS.items():
            published = decibels(psnr["patch"] - psnr[key])
            yield Claim(f"The patch prior is better than {name}", minus("patch", key), published)
        published = decibels(psnr["whole"] - psnr["tv"])
        yield Claim("The whole-image prior is better than total variation", minus("whole", "tv"), published)

    def explain(self) -> str:
        """Returns what the rows are."""
        tuned = (PROBLEMS[name].title for name in self.problems if tuned_path(name, "TotalVariation").is_file())
        where = "; ".join(tuned) or "no problem of its own"
        return (
            "*patch* and *whole* are the shipped priors `patch_ct` and `whole_ct`, of one architecture and trained on "
            "as many pixels, under `ProximalDiffusion`; *baseline* is filtered back-projection, or the blurred image. "
            f"Total variation is tuned for {where} ({TRIALS} trials of `invrecon tune` on validation slices), the "
            "sampler is not. Published numbers are of PaDIS's own sampler and other data. A fan beam over 180° is less "
            "than a short scan (180° and the fan's angle): on one side of the patient some edges are seen by no ray, "
            "and where they stand is the prior's guess."
        )
