"""What a row is; and the rows of table (g): methods, priors, adaptations, those of the shipped configurations."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from benchmarks._methods import load_parts
from benchmarks.claims._lessons import Lesson
from invrecon.adapt import Adaptation, HeldOutRays
from invrecon.methods import (
    FBP,
    GeometricSchedule,
    Langevin,
    Method,
    NoisyEstimateStart,
    NormalisedGuidance,
    ProximalDiffusion,
    Sampler,
    TotalVariation,
)

CHEAP, EM, PUBLISHED = 0, 1, 2  # in the order of work
SLOW = EM  # in the tables where nothing adapts
# The data step and transition of PaDIS (`PaDISNormalised`), over the noise levels of our sampler and from its start: of
# the ways to spend a hundred evaluations that were tried, the best. From white noise, as published, it is 5 dB worse.
DPS = Sampler(GeometricSchedule(50, 0.1, 0.002, 2), NormalisedGuidance(7.6), Langevin(0.5), NoisyEstimateStart())


@dataclass(frozen=True)
class Recipe:
    """A row of the table.

    Attributes:
        title: Its name there.
        method: What reconstructs.
        prior: Name of a shipped prior, what a small network is taught, or None.
        adaptation: What adapts the prior; None for nothing.
        control: Key of the row that is the same without adaptation.
        tier: When it is its turn.
        few: Whether it is too expensive for all slices.
        layout: How patches cover an image, as of `benchmarks._common.make_layout`; None for the prior's own.
        pool: Whether all slices share what adapts.
    """

    title: str
    method: Method
    prior: str | Lesson | None = None
    adaptation: Adaptation | None = None
    control: str | None = None
    tier: int = CHEAP
    few: bool = False
    layout: Mapping[str, Any] | None = None
    pool: bool = False


@cache
def load_recipe(config: str) -> tuple[Sampler, Adaptation]:
    """Returns sampler and adaptation of a shipped configuration, built by the parser that the command line uses."""
    sampler, adaptation = load_parts(config, method=Sampler, adaptation=Adaptation)
    return sampler, adaptation


def under_ours(adaptation: Adaptation) -> Adaptation:
    """Returns a published adaptation for our sampler, which keeps its own transition and ends with its data step."""
    clone = copy.copy(adaptation)
    clone.noise_from = clone.output = "estimate"  # type: ignore[attr-defined]
    return clone


def for_whole(em: Adaptation) -> Adaptation:
    """Returns EM for whole images: a step sees at least one, and fewer, larger steps bear a higher rate."""
    clone = copy.copy(em)
    clone.steps, clone.num_pixels, clone.learning_rate = 40, 25088, 1.5e-3  # type: ignore[attr-defined]
    return clone


def recipes() -> dict[str, Recipe]:
    """Returns the rows by their keys: `ProximalDiffusion` and ellipse priors, unless the title says otherwise.

    Keys that end with `-admm` have the method of `tta_ct.yaml` in its place, in the E-steps of EM as well.
    """
    admm, em_admm = load_recipe("tta_ct")
    ours, em = ProximalDiffusion(), copy.copy(em_admm)
    em.expectation = ProximalDiffusion(num_levels=10, sigma_max=0.05)  # type: ignore[attr-defined]
    rows = {
        "fbp": Recipe("FBP", FBP()),
        "tv": Recipe("TV", TotalVariation()),
        "whole": Recipe("whole", ours, "whole_ellipses"),
        "patch": Recipe("patch", ours, "patch_ellipses"),
        "whole-ct": Recipe("whole, in distribution", ours, "whole_ct"),
        "patch-ct": Recipe("patch, in distribution", ours, "patch_ct"),
        "patch-em": Recipe("patch + EM", ours, "patch_ellipses", em, "patch", EM),
        "whole-em": Recipe("whole + EM", ours, "whole_ellipses", for_whole(em), "whole", EM, few=True),
        "patch-ct-em": Recipe("patch + EM, in distribution", ours, "patch_ct", em, "patch-ct", EM, few=True),
        "patch-admm": Recipe("patch, ADMM", admm, "patch_ellipses"),
        "whole-admm": Recipe("whole, ADMM", admm, "whole_ellipses"),
        "patch-ct-admm": Recipe("patch, in distribution, ADMM", admm, "patch_ct"),
        "patch-em-admm": Recipe("patch + EM, ADMM", admm, "patch_ellipses", em_admm, "patch-admm", EM),
        "whole-em-admm": Recipe("whole + EM, ADMM", admm, "whole_ellipses", for_whole(em_admm), "whole-admm", EM, True),
        "patch-ct-em-admm": Recipe("patch + EM, in distribution, ADMM", admm, "patch_ct", em_admm, "patch-ct-admm", EM,
                                   few=True),
    }  # fmt: skip
    for key in ("patch-em-admm", "patch-ct-em-admm"):
        title = rows[key].title.replace("EM", "EM of all slices")
        rows[f"{key}-pool"] = replace(rows[key], title=title, pool=True, few=False)
    long, title = copy.copy(em_admm), "patch + EM of all slices in 16 rounds, ADMM"
    long.rounds = 16  # type: ignore[attr-defined]
    rows["patch-em-admm-pool-16"] = replace(rows["patch-em-admm-pool"], title=title, adaptation=long)
    for key in ("patch-em", "patch-ct-em", "patch-em-admm", "patch-ct-em-admm"):
        stopped = copy.copy(rows[key].adaptation)
        if stopped.held_out is None:  # type: ignore[union-attr]  # else those rows stop by themselves
            stopped.held_out = HeldOutRays()  # type: ignore[union-attr]
            title = rows[key].title.replace("EM", "EM, stopped by held-out rays")
            rows[f"{key}-stop"] = replace(rows[key], title=title, adaptation=stopped, few=True)
    for kind in ("patch", "whole"):
        rows[f"{kind}-dps"] = Recipe(f"{kind}, DPS", DPS, f"{kind}_ellipses", tier=PUBLISHED, few=True)
    published = (
        ("patch-ss", "patch + SS", "patch, SS's sampler", "patch_ss_ct", "patch"),
        ("whole-ss", "whole + SS", "whole, SS's sampler", "whole_ss_ct", "whole"),
        ("scd", "SCD", "whole, SCD's sampler", "scd_ct", "whole"),
        ("ddip", "DDIP", "whole, DDIP's sampler", "ddip_ct", "whole"),
    )
    for key, title, unadapted, config, kind in published:
        sampler, adaptation = load_recipe(config)
        own = Recipe(f"{title}, own sampler", sampler, f"{kind}_ellipses", adaptation, f"{key}-off", PUBLISHED, True)
        control = adaptation.control(sampler)  # type: ignore[attr-defined]
        rows[f"{key}-off"] = replace(own, title=unadapted, method=control, adaptation=None, control=None)
        rows[f"{key}-own"] = own
        rows[key] = replace(own, title=title, method=ours, adaptation=under_ours(adaptation), control=kind)
    title = "patch + SS, in distribution"
    rows["patch-ct-ss"] = replace(rows["patch-ss"], title=title, prior="patch_ct", control="patch-ct")
    return rows
