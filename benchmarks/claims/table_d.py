"""Table (d): what positions are worth: two small networks, one of which sees none, under three samplers."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks._common import Setting
from benchmarks.claims._compare import Claim, Comparison, decibels, minus
from benchmarks.claims._lessons import Lesson
from benchmarks.claims._recipes import DPS, SLOW, Recipe
from invrecon.methods import DDS, ProximalDiffusion

# Sampler -> what it is, and with - without positions [dB]: of the talk on PaDIS, of an independent reproduction.
SAMPLERS = {
    "ours": ("ProximalDiffusion, from the direct inverse", 33.57 - 24.51, 32.82 - 32.52),
    "dps": ("DPS, from the direct inverse", 33.57 - 24.51, 32.82 - 32.52),
    "noise": ("DDS, from noise", 33.57 - 23.25, 32.82 - 32.42),
}


class PositionsTable(Comparison):
    """The table of positions."""

    letter, title = "d", "With and without positions"
    problems = ("20-clean", "8-clean")
    reference = "ours-with"
    figure = "Networks that see their position, and that do not"

    @classmethod
    def list_recipes(cls) -> dict[str, Recipe]:
        """Returns two rows a sampler."""
        rows: dict[str, Recipe] = {}
        for name, lesson in (("with", Lesson()), ("without", Lesson(positions=False))):
            rows[f"ours-{name}"] = Recipe(f"{name} positions, {SAMPLERS['ours'][0]}", ProximalDiffusion(), lesson)
            rows[f"noise-{name}"] = Recipe(f"{name} positions, {SAMPLERS['noise'][0]}", DDS(), lesson)
            title = f"{name} positions, {SAMPLERS['dps'][0]}"
            rows[f"dps-{name}"] = Recipe(title, DPS, lesson, tier=SLOW, few=True)
        return rows

    def claims(self, setting: Setting) -> Iterator[Claim]:
        """Yields that positions help, under each sampler."""
        for key, (name, talk, again) in SAMPLERS.items():
            published = f"{decibels(talk)} at 20 views (an independent reproduction: {decibels(again)})"
            yield Claim(f"Positions help: {name}", minus(f"{key}-with", f"{key}-without"), published)

    def explain(self) -> str:
        """Returns what the rows are."""
        school = self.school
        return (
            f"Two small networks ({school.base_channels} base channels, patches of 56 pixels, "
            f"{school.num_pixels / 1e6:.1f} million pixels each); in one, the weights of the position channels stay "
            "zero. *DPS* is PaDIS's data step and transition with 100 evaluations; *DDS* has 50 evaluations. "
            "From the direct inverse, the start already says where everything is."
        )
