"""Table (f): schedules, data steps and shifts per evaluation, each varied around `ProximalDiffusion`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks._common import Setting
from benchmarks.claims._compare import Claim, Comparison, minus
from benchmarks.claims._recipes import SLOW, Recipe
from benchmarks.claims._run import Table
from benchmarks.claims._verdicts import Entry, interval
from invrecon.methods import (
    AcceleratedRenoise,
    Conditioning,
    DirectInverseConditioning,
    DPSConditioning,
    GeometricSchedule,
    KarrasSchedule,
    KrylovConditioning,
    Langevin,
    NoiseStart,
    NoisyEstimateStart,
    NormalisedGuidance,
    NormGuidance,
    PinvConditioning,
    ProximalConditioning,
    Sampler,
    Schedule,
    SquaredNormGuidance,
    Start,
    VPSchedule,
)

LEVELS, HIGH, LOW = 32, 0.1, 0.002
EPSILON, ZETA = 0.5, 0.3  # PaDIS's Langevin step and published data step
STALL = 0.01  # relative residual above which a data step has stalled
GRADIENTS: dict[str, tuple[str, DPSConditioning]] = {
    "normalised": ("gradient, in units of the operator's norm", NormalisedGuidance(2 * 1.9 / EPSILON)),
    "norm": ("gradient of the norm (PaDIS's code)", NormGuidance(2 * ZETA / EPSILON)),
    "squared": ("gradient of the squared norm over the norm (PaDIS's paper)", SquaredNormGuidance(2 * ZETA / EPSILON)),
}
FLOORS = {"norm": "1.9 % (an independent reproduction)", "squared": "3.1 to 3.7 % (an independent reproduction)"}


def make(schedule: Schedule, conditioning: Conditioning | None = None, start: Start | None = None) -> Sampler:
    """Returns `ProximalDiffusion` with another schedule, data step or start."""
    step = ProximalConditioning(10, 1000.0, 5.0) if conditioning is None else conditioning
    return Sampler(schedule, step, AcceleratedRenoise(), NoisyEstimateStart() if start is None else start)


def karras(num_levels: int = LEVELS, sigma_max: float = HIGH) -> KarrasSchedule:
    """Returns the levels of `ProximalDiffusion`."""
    return KarrasSchedule(num_levels, sigma_max, LOW)


def residual(key: str) -> Any:
    """Returns the quantity: the relative residual of a row."""

    def quantity(table: Table) -> Entry | None:
        return interval(table.get(key, ()), lambda row: row["relative_residual"])

    return quantity


class ChoicesTable(Comparison):
    """The table of schedules, data steps and shifts."""

    letter, title = "f", "Schedules, data steps, shifts per evaluation"
    problems = ("20-clean",)
    reference = "default"
    figure = "Every choice against ProximalDiffusion"

    @classmethod
    def list_recipes(cls) -> dict[str, Recipe]:
        """Returns the rows, in three groups."""
        methods: dict[str, tuple[str, Sampler]] = {
            "default": (f"default: {LEVELS} Karras levels from {HIGH:g}, CG", make(karras())),
            "geometric": ("geometric levels", make(GeometricSchedule(LEVELS, HIGH, LOW))),
            "vp": ("levels of a VP diffusion", make(VPSchedule(LEVELS, HIGH, LOW))),
            **{
                f"levels-{n}": (f"{n} levels", make(karras(n)))
                for n in (LEVELS // 4, LEVELS // 2, 2 * LEVELS, 4 * LEVELS)
            },
            **{f"from-{high:g}": (f"from {high:g}", make(karras(sigma_max=high))) for high in (0.05, 0.2, 0.5)},
            "from-noise": ("from noise at 10", make(karras(sigma_max=10.0), start=NoiseStart())),
            "krylov": ("CG on the data alone, 5 iterations", make(karras(), KrylovConditioning(5))),
            "pinv": ("pseudo-inverse, 10 CG iterations", make(karras(), PinvConditioning(10))),
            "fbp": ("filtered back-projection of the residual", make(karras(), DirectInverseConditioning())),
        }
        rows = {key: Recipe(title, method, "patch_ct") for key, (title, method) in methods.items()}
        for key, (title, guidance) in GRADIENTS.items():
            levels = GeometricSchedule(LEVELS // 2, HIGH, LOW, 2)
            sampler = Sampler(levels, guidance, Langevin(EPSILON), NoisyEstimateStart())
            rows[key] = Recipe(f"{title}, Langevin", sampler, "patch_ct", tier=SLOW, few=True)
        for num in (2, 4):
            shifts = {"class": "RandomShift", "num_shifts": num}
            title = f"{num} shifts an evaluation"
            rows[f"shifts-{num}"] = Recipe(title, make(karras()), "patch_ct", layout=shifts)
            equal = f"{title}, {LEVELS // num} levels"
            rows[f"shifts-{num}-equal"] = Recipe(equal, make(karras(LEVELS // num)), "patch_ct", layout=shifts)
        rows["average"] = Recipe(
            "fixed grid, averaged overlaps",
            make(karras()),
            "patch_ct",
            layout={"class": "OverlapAverage", "stride": 48},
        )
        return rows

    def claims(self, setting: Setting) -> Iterator[Claim]:
        """Yields what is said of schedules, data steps and shifts."""
        yield Claim("Levels of EDM (Karras) are better than geometric ones", minus("default", "geometric"))
        yield Claim("A warm start is better than noise, at as many evaluations", minus("default", "from-noise"))
        yield Claim("Twice as many levels improve ProximalDiffusion", minus(f"levels-{2 * LEVELS}", "default"))
        for key in GRADIENTS:
            title = GRADIENTS[key][0]
            text = f"CG with renoising is better than the {title} with Langevin steps, at as many evaluations"
            yield Claim(text, minus("default", key))
        for key, floor in FLOORS.items():
            text = (
                f"The data step by the {GRADIENTS[key][0]} has stalled after {LEVELS} evaluations: relative residual "
                f"above {100 * STALL:.0f} %"
            )
            yield Claim(text, residual(key), floor, STALL, "%")
        text = (
            f"The data step in units of the operator's norm has not stalled after {LEVELS} evaluations: relative "
            f"residual below {100 * STALL:.0f} %"
        )
        yield Claim(text, residual("normalised"), "0.13 % (an independent reproduction)", STALL, "%", at_least=False)
        text = "Filtered back-projection is a better pseudo-inverse than CG (as VE-DDNM has it)"
        yield Claim(text, minus("fbp", "pinv"))
        for num in (2, 4):
            yield Claim(f"{num} shifts an evaluation are better than one", minus(f"shifts-{num}", "default"))
            text = f"{num} shifts an evaluation are better than one, at as many calls of the network"
            yield Claim(text, minus(f"shifts-{num}-equal", "default"))
        again = "-0.22 dB (an independent reproduction: +3.28 dB on four slices)"
        yield Claim("Averaged overlaps are better than random shifts", minus("average", "default"), again)

    def explain(self) -> str:
        """Returns what the rows are."""
        return (
            "Rows are `ProximalDiffusion` but for what their title says, with the shipped prior `patch_ct`; the "
            "data steps by a gradient through the network stand with Langevin steps, as published, at as many "
            "evaluations and from the same start: what CG gains over them is in part the transition's. Whether a step "
            f"stalls is a question of many more updates than {LEVELS}; the rows say where it is after those. A row "
            "with several shifts an evaluation costs as many calls of the network."
        )
