"""Table (a): every method on four problems, at an equal number of evaluations.

The methods are those that the package exports: a new one is in the table as soon as it can be made without arguments.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import ClassVar

from benchmarks._common import Setting
from benchmarks._methods import find_methods, shorten, starts_from_noise, warm
from benchmarks.claims._compare import Claim, Comparison, decibels, lead, minus
from benchmarks.claims._problems import PROBLEMS
from benchmarks.claims._recipes import CHEAP, SLOW, Recipe
from benchmarks.claims._tuned import FOLDER, SLICES, TRIALS, tuned_path
from invrecon.methods import AnnealedPnPADMM, Method, PaDISNormalised, ProximalDiffusion

EVALUATIONS = 50
START, FEW_VIEWS_START = 0.1, 0.3  # first level of warm starts; from 8 views the direct inverse is further off
AVERAGE = {"class": "OverlapAverage", "stride": 48}
STITCHED = {"class": "Stitched", "margin": 4}
DEFAULT, PADIS, WHOLE, TV, BASELINE = "AnnealedPnPADMM", "PaDIS", "PaDIS-whole", "TotalVariation", "FBP"
FULL = "PaDIS-full"  # as published
WITHOUT_LEVELS = ("FBP", "TotalVariation", "PnPADMM", "RED")  # rows that have no ladder of levels to shorten
DRUNET = "drunet_ct"
# Classical rows and the fast samplers; the two solvers of total variation have one minimum, and so one weight.
TUNED = ("TotalVariation", "WaveletL1", "SIRT", "CGSENSE", "PnPADMM", "PnPADMM-drunet", "RED", "RED-drunet", DEFAULT,
         "ProximalDiffusion")  # fmt: skip

# PSNR [dB] of the talk on PaDIS: 20 views, 8 views, deblurring, super-resolution.
PROBLEM_NAMES = ("20-clean", "8-clean", "deblur", "sr")
PADIS_PSNR = (33.57, 29.48, 30.80, 29.47)
OTHERS: dict[str, tuple[str, tuple[float | None, ...]]] = {
    "the baseline": (BASELINE, (24.93, 21.39, 24.54, 25.86)),
    "ADMM-TV": (TV, (26.82, 23.09, 28.22, 25.66)),
    "PnP-ADMM": ("PnPADMM", (26.86, 22.39, 28.82, 26.61)),
    "PnP-RED": ("RED", (27.99, 23.08, 29.91, 26.36)),
    "whole-image diffusion (DPS)": (WHOLE, (32.84, 25.74, 30.19, 29.17)),
    "Langevin": ("LangevinDirect-warm", (33.03, 27.03, 30.60, 26.83)),
    "predictor-corrector": ("PredictorCorrector-warm", (32.35, 23.65, 28.42, 26.97)),
    "VE-DDNM": ("VEDDNM-warm", (31.98, 27.71, None, 26.01)),
    "patch averaging": ("PaDIS-average", (33.35, 28.43, 29.41, 27.67)),
    "patch stitching": ("PaDIS-stitched", (32.87, 26.71, 29.69, 27.50)),
}
REPRODUCTION = {"20-clean": 36.49 - 32.82, "8-clean": 27.12 - 27.65}  # VE-DDNM - PaDIS, normalised, an independent one


class MethodsTable(Comparison):
    """The table of methods."""

    letter, title = "a", "Methods on four problems"
    problems = PROBLEM_NAMES
    reference = TV
    figure = "Every row against total variation"
    tuned: ClassVar[Mapping[str, str]] = {**{name: name for name in TUNED}, "ADMMTV": TV}

    @classmethod
    def list_recipes(cls) -> dict[str, Recipe]:
        """Returns a row a method, two where it starts from noise; with gradients then the warm one alone."""
        rows: dict[str, Recipe] = {}
        for name, kind in find_methods().items():
            method = shorten(kind, EVALUATIONS)
            slow, noise = method.needs_gradient, starts_from_noise(method)
            tier, prior = (SLOW if slow else CHEAP), ("patch_ct" if method.needs_prior else None)
            recipe = Recipe(name, method, prior, tier=tier, few=slow)
            if noise:
                started = warm(method, START)  # type: ignore[arg-type]
                rows[f"{name}-warm"] = replace(recipe, title=f"{name}, warm start", method=started)
            if not (noise and slow):
                rows[name] = replace(recipe, tier=SLOW, few=True) if noise else recipe
        for name in (DEFAULT, "ProximalDiffusion"):
            rows[f"{name}-whole"] = replace(rows[name], title=f"{name}, whole-image prior", prior="whole_ct")
        # The talk's rows under one sampler: normalised DPS from a warm start, PaDIS as it converges in few evaluations.
        padis = rows.pop("PaDISNormalised-warm")
        rows[PADIS] = replace(padis, title="PaDIS (DPS, patch prior), warm start")
        rows[WHOLE] = replace(padis, title="DPS, whole-image prior, warm start", prior="whole_ct")
        rows[FULL] = Recipe("PaDIS, 1000 evaluations, from noise", PaDISNormalised(), "patch_ct", tier=SLOW, few=True)
        rows["PaDIS-average"] = replace(padis, title="PaDIS, patch averaging, warm start", layout=AVERAGE)
        rows["PaDIS-stitched"] = replace(padis, title="PaDIS, patch stitching, warm start", layout=STITCHED)
        for name in ("PnPADMM", "RED"):
            rows[f"{name}-drunet"] = replace(rows[name], title=f"{name}, {DRUNET}", prior=DRUNET)
        return rows

    @classmethod
    def start_of(cls, method: Method, setting: Setting) -> Method:
        """Returns the method, from a higher level where there are few views."""
        schedule = getattr(method, "schedule", None)
        if setting.name != "8-clean" or schedule is None or schedule.sigma_max != START:
            return method
        if isinstance(method, AnnealedPnPADMM):
            return AnnealedPnPADMM(sigma_max=FEW_VIEWS_START)
        if isinstance(method, ProximalDiffusion):
            method = copy.copy(method)
            method.schedule = copy.copy(schedule)
            method.schedule.sigma_max = FEW_VIEWS_START
            return method
        return warm(method, FEW_VIEWS_START)  # type: ignore[arg-type]

    def claims(self, setting: Setting) -> Iterator[Claim]:
        """Yields PaDIS against every row of the talk, and what is claimed here."""
        index = PROBLEM_NAMES.index(setting.name)
        for name, (key, psnr) in OTHERS.items():
            if (other := psnr[index]) is not None:
                published = f"{decibels(PADIS_PSNR[index] - other)} with up to 1000"
                text = f"PaDIS is better than {name}, in {EVALUATIONS} evaluations"
                yield Claim(text, minus(PADIS, key), published)
                if key in WITHOUT_LEVELS:
                    yield Claim(f"PaDIS is better than {name}, in 1000 evaluations", minus(FULL, key), published)
        if setting.name in REPRODUCTION:
            published = f"{decibels(REPRODUCTION[setting.name])} with up to 1000"
            yield Claim(
                f"VE-DDNM, without gradients, is better than PaDIS, in {EVALUATIONS} evaluations (an independent "
                "reproduction)",
                minus("VEDDNM-warm", PADIS),
                published,
            )
        yield Claim(
            f"The default sampler is the best with the patch prior in at most {EVALUATIONS} evaluations",
            lead(DEFAULT, lambda other: self.recipes[other].prior == "patch_ct" and other != FULL),
        )
        if setting.name == "20-clean":
            yield Claim("The default sampler is at least 5 dB above total variation", minus(DEFAULT, TV), limit=5.0)

    def explain(self) -> str:
        """Returns what the rows are."""
        names = sorted({path.stem for path in FOLDER.glob("*/*.yaml")} & set(TUNED))
        where = ", ".join(PROBLEMS[name].title for name in self.problems if tuned_path(name, TV).is_file())
        return (
            f"Every method of the package by its name, with at most {EVALUATIONS} denoiser evaluations: fewer levels, "
            "all else as its defaults have it, where up to 1000 were published. PaDIS has 25 levels of two updates "
            "with the step of its 1000, and VE-DDNM's Langevin steps do not follow so few levels: their rows say "
            "what they are worth in this budget, not what they reach; *PaDIS, 1000 evaluations* is PaDIS as it was "
            "published, beside rows that have no ladder of levels to shorten. *Warm start* begins at the noise level "
            f"{START:g} ({FEW_VIEWS_START:g} from 8 views) from the direct inverse with noise; other rows begin where "
            "the method's source begins, mostly from noise, for which so few evaluations are too few (methods with a "
            "gradient through the network have warm starts alone). Priors are the shipped ones, `patch_ct` and "
            "`whole_ct`, trained on as many pixels, and for plug-and-play also `drunet_ct`, a denoiser of low levels. "
            f"Tuned for each problem ({where}), each by {TRIALS} trials of `invrecon tune` on {len(SLICES)} slices of "
            f"a validation patient (`python -m benchmarks.tune`; what was found is in `tuned/`), are {', '.join(names)}"
            ", and ADMMTV by the weight of TotalVariation, with `patch_ct` or the denoiser named. All others, and the "
            "rows of whole-image priors, have the knobs of the package, chosen for CT where they were chosen at all: "
            "against these the tuned rows have that advantage, also where the default sampler is compared with the "
            "best of all others. Methods that need singular values are absent from CT."
        )
