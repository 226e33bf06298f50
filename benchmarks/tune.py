"""Tunes the weights of total variation and the knobs of the fast sampler, on a validation patient alone.

    python -m benchmarks.tune --json tune.json [--what tv sampler] [--trials 22] [--slices 5,15,25]

The validation volume is neither trained on nor tested on. TV: every value of its grid. Sampler: first the defaults,
then all changes of a single knob in a seeded order, then seeded draws from the whole grid, until the trials are used
up. All that was tried is in the JSON, best first; a run with more trials continues it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import _common
from benchmarks._common import SETTINGS, VALIDATION, Bench, Entry
from invrecon.errors import InputError
from invrecon.methods import (
    DDIM,
    AcceleratedRenoise,
    DDSTransition,
    Method,
    ProximalConditioning,
    ProximalDiffusion,
    Renoise,
    TotalVariation,
    Transition,
)

Knobs = dict[str, Any]
CLEAN, NOISY = ("20-clean", "60-clean"), ("20-noisy", "60-noisy")
WEIGHTS = (3e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4)
NOISE_WEIGHTS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32)
TRANSITIONS: dict[str, Transition] = {
    "accelerated": AcceleratedRenoise(),
    "accelerated, noise 0.5": AcceleratedRenoise(0.5, 0.5),
    "accelerated, momentum 0": AcceleratedRenoise(0.2, 0.0),
    "Renoise": Renoise(),
    "DDS-0.85": DDSTransition(0.85),
    "DDIM-1": DDIM(1.0),
    "DDIM-0.85": DDIM(0.85),
}
GRID: dict[str, tuple[Any, ...]] = {
    "sigma_max": (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0),
    "noise_factor": (0.5, 1.0, 2.0, 3.0, 5.0, 10.0),
    "max_weight": (100.0, 300.0, 1000.0, 3000.0, 10000.0),
    "cg_iterations": (5, 10, 20),
    "transition": tuple(TRANSITIONS),
}


def default_knobs() -> Knobs:
    """Returns the knobs of the sampler as it comes."""
    sampler = ProximalDiffusion()
    conditioning, transition = sampler.conditioning, _common.plain(sampler.transition)
    assert isinstance(conditioning, ProximalConditioning)
    return {
        "sigma_max": sampler.schedule.sigma_max,
        "noise_factor": conditioning.noise_factor,
        "max_weight": conditioning.max_weight,
        "cg_iterations": conditioning.num_iterations,
        "transition": next(name for name, t in TRANSITIONS.items() if _common.plain(t) == transition),
    }


def sampler_trials(num: int, seed: int) -> list[Knobs]:
    """Returns the first `num` trials; those of a smaller number are always the first of a larger one."""
    rng, default = random.Random(seed), default_knobs()
    single = [{**default, name: value} for name, values in GRID.items() for value in values if value != default[name]]
    rest = [dict(zip(GRID, values, strict=True)) for values in product(*GRID.values())]
    rest = [knobs for knobs in rest if knobs != default and knobs not in single]
    rng.shuffle(single)
    rng.shuffle(rest)
    return [default, *single, *rest][:num]


def make_sampler(knobs: Mapping[str, Any], num_levels: int) -> ProximalDiffusion:
    """Returns the sampler of a trial."""
    settings = {**default_knobs(), **knobs}
    return ProximalDiffusion(
        num_levels=num_levels,
        sigma_max=settings["sigma_max"],
        cg_iterations=settings["cg_iterations"],
        max_weight=settings["max_weight"],
        noise_factor=settings["noise_factor"],
        transition=TRANSITIONS[settings["transition"]],
    )


def label(name: str, knobs: Mapping[str, Any]) -> str:
    """Returns a trial's name."""
    values = (value if isinstance(value, str) else f"{value:g}" for value in knobs.values())
    return " ".join([name, *(f"{key}={value}" for key, value in zip(knobs, values, strict=True))])


def score(
    bench: Bench,
    name: str,
    knobs: Knobs,
    make: Callable[[Knobs], Method],
    settings: Sequence[str],
    prior: str,
    batches: Sequence[Any],
) -> dict[str, Any]:
    """Returns a trial's mean PSNR by setting and over all settings."""
    psnr = {}
    for key in settings:
        # Without noise the noise factor changes nothing: all its values share one run.
        shared = {k: v for k, v in knobs.items() if k != "noise_factor" or key in NOISY}
        entry = Entry(label(name, shared), make(shared), prior)
        rows = [row for b in batches for row in bench.rows(SETTINGS[key], entry, b)]
        psnr[key] = fmean(row["psnr"] for row in rows)
    return {"knobs": knobs, "psnr": psnr, "mean": fmean(psnr.values())}


def report(name: str, trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prints the trials, best first, and returns them so."""
    ranked = sorted(trials, key=lambda trial: trial["mean"], reverse=True)
    settings = list(ranked[0]["psnr"])
    header = [name, *(SETTINGS[key].title for key in settings), "mean PSNR [dB]"]
    lines = [
        (label("", t["knobs"]).strip(), *(f"{value:.2f}" for value in t["psnr"].values()), f"{t['mean']:.2f}")
        for t in ranked
    ]
    print("\n" + _common.markdown(header, lines))
    for key in settings:
        best = max(ranked, key=lambda trial: trial["psnr"][key])
        print(f"Best for {SETTINGS[key].title}: {label('', best['knobs']).strip()} ({best['psnr'][key]:.2f} dB)")
    return ranked


def main(args: list[str] | None = None) -> None:
    parser = _common.make_quality_parser(__doc__, "5,15,25")
    parser.add_argument("--what", nargs="+", choices=("tv", "sampler"), default=["tv", "sampler"])
    parser.add_argument("--trials", type=int, default=22, help="of the sampler")
    parser.add_argument("--levels", type=int, default=50, help="noise levels of the sampler")
    parser.add_argument("--volume", default=VALIDATION, help="in the folder of the benchmark data")
    parser.add_argument("--weights", type=float, nargs="+", default=WEIGHTS, help="of TV, noise-free")
    parser.add_argument("--noise-weights", type=float, nargs="+", default=NOISE_WEIGHTS, help="of TV, with noise")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(args)
    if "heldout" in Path(options.volume).parts:
        raise InputError(f"'{options.volume}' is test data: tune on a validation patient.")
    if "sampler" in options.what:
        _common.weights_hash(options.prior)
    bench = Bench(_common.start(options, "tune"), options.size)
    batches = _common.load_batches(options.volume, options.slices, options.size, options.batch_size)

    def run(name: str, trials: Sequence[Knobs], make: Callable[[Knobs], Method], settings: Sequence[str]) -> None:
        scores = [score(bench, name, knobs, make, settings, options.prior, batches) for knobs in trials]
        bench.record.save(**{name: report(name, scores)})

    if "tv" in options.what:
        run("TV", [{"weight": w} for w in options.weights], lambda k: TotalVariation(weight=k["weight"]), CLEAN)
        noisy = [{"noise_weight": w} for w in options.noise_weights]
        run("TV with noise", noisy, lambda k: TotalVariation(noise_weight=k["noise_weight"]), NOISY)
    if "sampler" in options.what:
        chosen = sampler_trials(options.trials, options.seed)
        run("sampler", chosen, lambda k: make_sampler(k, options.levels), (*CLEAN, *NOISY))


if __name__ == "__main__":
    _common.run(main)
