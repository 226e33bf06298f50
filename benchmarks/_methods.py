"""What is found by itself: methods by their names, shortened to a number of evaluations; problems by their configs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import yaml
from jsonargparse import ArgumentParser

import invrecon.methods
from benchmarks._common import Entry, Setting, plain
from invrecon import operators
from invrecon.discovery import needs_arguments
from invrecon.methods import (
    FloorSchedule,
    Method,
    NetworkFit,
    NoiseStart,
    NoisyEstimateStart,
    Sampler,
    UnconditionalSampler,
)
from invrecon.operators import LinearOperator, SpectralOperator
from invrecon.shared import find_shared, shared_folder

COUNTS = ("num_levels", "num_iterations")  # what a method is made shorter by, the first that it has


# One of these does not look at data; the others train a network for each image, in thousands of steps.
LEFT_OUT = (UnconditionalSampler, NetworkFit)


def load_parts(config: str, **kinds: type) -> list[Any]:
    """Returns parts of a shipped configuration's model, by name and kind, built by the command line's parser."""
    settings = yaml.safe_load(find_shared(config, "configs", ".yaml").read_text())["model"]["init_args"]
    parser = ArgumentParser(exit_on_error=False)
    for name, kind in kinds.items():
        parser.add_argument(f"--{name}", type=kind)
    built = parser.instantiate_classes(parser.parse_object({name: settings[name] for name in kinds}))
    return [built[name] for name in kinds]


def find_methods() -> dict[str, type[Method]]:
    """Returns every exported method that can be made without arguments, but those of `LEFT_OUT`."""
    found = {}
    for name in invrecon.methods.__all__:
        value = getattr(invrecon.methods, name)
        if not (inspect.isclass(value) and issubclass(value, Method)) or inspect.isabstract(value):
            continue
        if not needs_arguments(value) and not issubclass(value, LEFT_OUT):
            found[name] = value
    return found


def find_problems(known: Iterable[Setting]) -> dict[str, Setting]:
    """Returns settings, by the names of their configs: of operators in `configs/*_ct.yaml` that no known one has."""
    seen = {"ParallelBeamCT", *(setting.physics["class"] for setting in known if setting.physics)}
    found = {}
    for path in sorted(shared_folder("configs").glob("*_ct.yaml")):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        model, data = config.get("model", {}), config.get("data", {})
        if (model.get("class_path"), data.get("class_path")) != ("Reconstruction", "ReconstructionData"):
            continue
        operator, arguments = _named(model["init_args"].get("operator", ""))
        noise, level = _named(model["init_args"].get("noise", "NoNoise"))
        # Of the package: what a config names by its path is not imported for a table.
        if operator not in seen and hasattr(operators, operator) and hasattr(operators, noise):
            seen.add(operator)
            knobs = {key: value for key, value in arguments.items() if key != "size"}
            title = ", ".join([operator, *(f"{key} {value}" for key, value in knobs.items())])
            physics = {"class": operator, **knobs}
            found[path.stem] = Setting(path.stem, title, 0, getattr(operators, noise)(**level), physics=physics)
    return found


def _named(value: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns class and arguments of an entry of a config."""
    if isinstance(value, str):
        return value, {}
    return value["class_path"], dict(value.get("init_args") or {})


def shorten(kind: type[Method], num_evaluations: int) -> Method:
    """Returns a method of at most that many denoiser evaluations, if it can be so short: its levels are made fewer.

    What else there is at a level (inner updates, Euler steps) stays as published, but where that alone would leave
    fewer than ten levels inner updates go first.
    """
    method = kind()
    parameters = inspect.signature(kind).parameters
    name = next((name for name in COUNTS if name in parameters), None)
    if method.num_evaluations <= num_evaluations or name is None:
        return method
    knobs = {}
    each = method.num_evaluations / parameters[name].default
    if "num_inner" in parameters and num_evaluations / each < 10:
        knobs["num_inner"] = max(1, num_evaluations // 10 // 2)
        each *= knobs["num_inner"] / parameters["num_inner"].default
    # Counts need not be proportional to levels: 2 K - 1 for pairs of predictor and corrector.
    knobs[name] = max(1, int(num_evaluations / each))
    while knobs[name] > 1 and kind(**knobs).num_evaluations > num_evaluations:
        knobs[name] -= 1
    shorter = kind(**knobs)
    _reach_floor(shorter)
    return shorter


def changed_arguments(method: Method) -> dict[str, Any]:
    """Returns the arguments by which a method of fewer levels or another first one is made again, where changed.

    Raises:
        ValueError: If there is more to it, as in a warm start.
    """
    kind = type(method)
    parameters = inspect.signature(kind).parameters
    levels = getattr(method, "schedule", method)
    found = {name: getattr(levels, name, None) for name in (*COUNTS, "sigma_max") if name in parameters}
    changed = {name: value for name, value in found.items() if value not in (None, parameters[name].default)}
    if plain(kind(**changed)) != plain(method):
        raise ValueError(f"{kind.__name__} has more than {', '.join(found)} of its own.")
    return changed


def _reach_floor(method: Method) -> None:
    """Lets levels that fall by a fixed ratio down to a floor (`FloorSchedule`) fall faster where they are too few."""
    schedule = getattr(method, "schedule", None)
    if isinstance(schedule, FloorSchedule):
        needed = (schedule.sigma_min / schedule.sigma_max) ** (1 / max(schedule.num_levels - 1, 1))
        schedule.ratio = min(schedule.ratio, needed)


def starts_from_noise(method: Method) -> bool:
    """Says whether a sampler begins with noise that dwarfs the image, and would as well begin with an estimate."""
    return isinstance(method, Sampler) and type(method.start) is NoiseStart and not method.needs_spectrum


def has_spectrum(operator: LinearOperator) -> bool:
    """Says whether an operator's singular values are known."""
    return isinstance(operator, SpectralOperator)


def warm(method: Sampler, sigma: float) -> Sampler:
    """Returns the sampler from the direct inverse and the level `sigma`, in place of noise and its own level."""
    clone = copy.copy(method)
    clone.start, clone.schedule = NoisyEstimateStart(), copy.copy(method.schedule)
    clone.schedule.sigma_max = sigma
    if isinstance(clone.schedule, FloorSchedule):
        clone.schedule.ratio = (clone.schedule.sigma_min / sigma) ** (1 / max(clone.schedule.num_levels - 1, 1))
    return clone


def tune_weights(
    tables: Any,
    setting: Setting,
    grids: Mapping[str, Sequence[float]],
    make: Callable[[str, float], Method],
    compute: bool,
) -> dict[str, dict[str, Any]]:
    """Returns by row the mean PSNR [dB] of each weight and the best weight; without rows that nothing is known of.

    Args:
        tables: What finds and measures rows, as `Tables` of `benchmarks.mri`.
        setting: Of validation.
        grids: Weights by row.
        make: Returns the method of a row and a weight.
        compute: Whether to compute what is not there.
    """
    found = {}
    for row, grid in grids.items():
        entries = {weight: Entry(f"{row} {weight:g}", make(row, weight)) for weight in grid}
        if compute:
            tables.measure(setting, list(entries.values()))
        known = {weight: tables.find(setting, entry) for weight, entry in entries.items()}
        scores = {weight: fmean(own["psnr"] for own in rows) for weight, rows in known.items() if rows}
        if scores:
            best = max(scores, key=lambda weight: scores[weight])
            found[row] = {"psnr": scores, "best": best, "at_the_edge": best in (grid[0], grid[-1])}
    return found
