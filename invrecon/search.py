"""Where to look for better settings, and in which order: ranges, the defaults of each method, a seeded sequence.

The sequence begins with the default, then alternates between the next point of a scrambled Sobol sequence over all
ranges and a step from the best trial so far. A search of fewer trials is always the beginning of a longer one.

Source: Sobol, "On the distribution of points in a cube and the approximate evaluation of integrals", USSR Comput. Math.
Math. Phys. 7 (1967); scrambling from Owen, "Randomly permuted (t,m,s)-nets and (t,s)-sequences" (1995).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.quasirandom import SobolEngine

from invrecon.errors import InputError
from invrecon.files import to_json
from invrecon.rng import derive_seed, make_generator

Values = dict[str, Any]
FORMS = "[low, high], [low, high, log], [low, high, int], [low, high, int, log] or {choices: [a, b, ...]}"
DIGITS = 4  # significant ones of a number that is tried, if its range is as wide as a tenth of its ends
NUM_ATTEMPTS = 100  # to find a point that has not been tried


class Domain(ABC):
    """The values that a setting may take, as an image of the unit interval."""

    @abstractmethod
    def value(self, u: float) -> Any:
        """Returns the value at `u` in [0, 1]."""

    @abstractmethod
    def unit(self, value: Any) -> float:
        """Returns a point of [0, 1] whose value is `value`, or the nearest there is."""

    @abstractmethod
    def describe(self) -> Any:
        """Returns what `parse_domain` makes this domain of."""


@dataclass(frozen=True)
class Uniform(Domain):
    """Numbers of a range, `low + u (high - low)`."""

    low: float
    high: float

    def value(self, u: float) -> float:
        """Returns the number at `u`, rounded to `DIGITS`."""
        return _rounded(self.low + u * (self.high - self.low), self.low, self.high)

    def unit(self, value: Any) -> float:
        """Returns where a number lies; the middle for anything else."""
        return _clamped((value - self.low) / (self.high - self.low)) if _is_number(value) else 0.5

    def describe(self) -> list[Any]:
        """Returns `[low, high]`."""
        return [self.low, self.high]


@dataclass(frozen=True)
class LogUniform(Domain):
    """Positive numbers of a range, alike in ratio: `low (high / low)^u`."""

    low: float
    high: float

    def value(self, u: float) -> float:
        """Returns the number at `u`, rounded to `DIGITS`."""
        return _rounded(self.low * (self.high / self.low) ** u, self.low, self.high)

    def unit(self, value: Any) -> float:
        """Returns where a number lies; the middle for anything else."""
        if not _is_number(value):
            return 0.5
        return _clamped(math.log(max(value, self.low) / self.low) / math.log(self.high / self.low))

    def describe(self) -> list[Any]:
        """Returns `[low, high, log]`."""
        return [self.low, self.high, "log"]


@dataclass(frozen=True)
class Integers(Domain):
    """Whole numbers from `low` to `high`, both included, spread as those of `spread` between their halves."""

    low: int
    high: int
    spread: type[Uniform] | type[LogUniform] = Uniform

    @property
    def _range(self) -> Uniform | LogUniform:
        return self.spread(self.low - 0.5, self.high + 0.5)

    def value(self, u: float) -> int:
        """Returns the whole number at `u`."""
        return min(max(round(self._range.value(u)), self.low), self.high)

    def unit(self, value: Any) -> float:
        """Returns where a number lies; the middle for anything else."""
        return self._range.unit(value)

    def describe(self) -> list[Any]:
        """Returns `[low, high, int]`, with `log` if so."""
        return [self.low, self.high, "int", *self._range.describe()[2:]]


@dataclass(frozen=True)
class Choices(Domain):
    """Any of several values: numbers, words, class names."""

    options: tuple[Any, ...]

    def value(self, u: float) -> Any:
        """Returns the option at `u`; all are equally wide."""
        return self.options[min(int(u * len(self.options)), len(self.options) - 1)]

    def unit(self, value: Any) -> float:
        """Returns the middle of an option; 0.5 for what is none."""
        return (self.options.index(value) + 0.5) / len(self.options) if value in self.options else 0.5

    def describe(self) -> dict[str, Any]:
        """Returns `{choices: [...]}`."""
        return {"choices": list(self.options)}


Space = dict[str, Domain]
_ZETA = Uniform(0.1, 1.95)  # of the normalised data steps, which are stable below 2
_CAP = LogUniform(30.0, 1e4)  # of a data weight, in units of 1 / ||A||^2

# What is searched by default, by class and constructor argument of its method.
SPACES: dict[str, Space] = {
    "TotalVariation": {"weight": LogUniform(1e-7, 1e-2), "noise_weight": LogUniform(3e-3, 1.0)},
    "ADMMTV": {"weight": LogUniform(1e-7, 1e-2), "noise_weight": LogUniform(3e-3, 1.0)},
    "WaveletL1": {"weight": LogUniform(1e-7, 1e-2), "noise_weight": LogUniform(3e-3, 1.0)},
    "CGSENSE": {"lam": LogUniform(1e-5, 1.0)},
    "SIRT": {"num_iterations": Integers(5, 1000, LogUniform), "discrepancy": Uniform(0.0, 1.5)},
    "AnnealedPnPADMM": {
        "sigma_min": LogUniform(1e-3, 0.03),
        "sigma_max": LogUniform(0.03, 1.0),
        "max_weight": _CAP,
        "noise_factor": LogUniform(0.3, 20.0),
    },
    "PnPADMM": {"sigma": LogUniform(3e-3, 0.3), "max_weight": _CAP},
    "RED": {"sigma": LogUniform(3e-3, 0.3), "max_weight": _CAP},
    "ProximalDiffusion": {
        "sigma_max": LogUniform(0.03, 1.0),
        "max_weight": _CAP,
        "noise_factor": LogUniform(0.3, 20.0),
    },
    "PaDISNormalised": {"zeta": _ZETA},
    "PaDISPaper": {"zeta": LogUniform(0.01, 10.0)},
    "PaDISRepo": {"zeta": LogUniform(0.01, 10.0)},
    "DPS": {"zeta": LogUniform(0.01, 3.0)},
    "DPSNormalised": {"zeta": _ZETA},
    "PiGDM": {"eta": Uniform(0.0, 1.0), "max_weight": _CAP, "prior_std": LogUniform(0.05, 2.0)},
    "LangevinDirect": {"zeta": _ZETA, "epsilon": LogUniform(0.1, 1.0)},
    "PredictorCorrector": {"snr": LogUniform(0.03, 0.5), "zeta": _ZETA},
    "PaDISPredictorCorrector": {"snr": LogUniform(0.03, 0.5), "zeta": _ZETA},
    "VEDDNM": {"epsilon": LogUniform(0.03, 1.0), "noise": Uniform(0.0, 1.0)},
    "DDNMFBP": {"epsilon": LogUniform(0.03, 1.0), "noise": Uniform(0.0, 1.0)},
    "DDNM": {"eta": Uniform(0.0, 1.0), "cg_iterations": Integers(2, 40, LogUniform)},
    "DDNMPlus": {"eta": Uniform(0.0, 1.0)},
    "DDRM": {"eta": Uniform(0.0, 1.0)},
    "DDS": {"eta": Uniform(0.0, 1.0), "max_weight": _CAP, "prior_std": LogUniform(0.01, 1.0)},
    "DiffPIR": {"zeta": Uniform(0.0, 1.0), "max_weight": _CAP, "weight": LogUniform(0.1, 20.0)},
    "DAPS": {"step": LogUniform(0.02, 1.0), "max_weight": _CAP},
    "DAPSExact": {"max_weight": _CAP},
    "PnPDM": {"ratio": Uniform(0.7, 0.98), "max_weight": _CAP},
    "REDDiff": {"weight": LogUniform(0.01, 10.0), "learning_rate": LogUniform(5e-3, 0.5)},
}
# What changes nothing where the measurement has no noise, and what takes its place there.
ONLY_WITH_NOISE = {
    ("TotalVariation", "noise_weight"),
    ("ADMMTV", "noise_weight"),
    ("WaveletL1", "noise_weight"),
    ("SIRT", "discrepancy"),
    ("ProximalDiffusion", "noise_factor"),
    ("AnnealedPnPADMM", "noise_factor"),
    ("PiGDM", "prior_std"),
    ("DDS", "prior_std"),
    ("DiffPIR", "weight"),
}
ONLY_WITHOUT_NOISE = {("TotalVariation", "weight"), ("ADMMTV", "weight"), ("WaveletL1", "weight")}


def default_space(method: str, noisy: bool) -> Space:
    """Returns what is searched of a method unless the user says otherwise, by keys below `model`.

    Args:
        method: The method's class.
        noisy: Whether the measurement has noise.

    Raises:
        InputError: There is no such default.
    """
    if method not in SPACES:
        raise InputError(
            f"{method} has no default search space (there is one for {', '.join(sorted(SPACES))}): say what to tune, "
            f"as in --search 'method.weight: [1e-4, 1e-1, log]'."
        )
    left_out = ONLY_WITHOUT_NOISE if noisy else ONLY_WITH_NOISE
    return {f"method.{name}": domain for name, domain in SPACES[method].items() if (method, name) not in left_out}


def parse_domain(key: str, text: Any) -> Domain:
    """Returns the domain that a user wrote, already read as YAML.

    Raises:
        InputError: It is none of `FORMS`, or leaves nothing to choose from.
    """
    if isinstance(text, Mapping) and list(text) == ["choices"] and isinstance(text["choices"], list):
        options = tuple(text["choices"])
        if len({to_json(option) for option in options}) < max(2, len(options)):
            raise InputError(f"--search {key} has the choices {list(options)}: give two or more, each one once.")
        return Choices(options)
    words = text[2:] if isinstance(text, list) else []
    if not isinstance(text, list) or len(text) < 2 or not set(map(str, words)) <= {"log", "int"}:
        raise InputError(f"--search {key} is {text}, expected {FORMS}.")
    low, high = _number(key, text[0]), _number(key, text[1])
    if not low < high:
        raise InputError(f"--search {key} has the range {text[:2]}, which is empty: expected low < high.")
    if "log" in words and not low > 0:
        raise InputError(f"--search {key} has the logarithmic range {text[:2]}: expected low > 0.")
    spread = LogUniform if "log" in words else Uniform
    if "int" not in words:
        return spread(low, high)
    if low != int(low) or high != int(high):
        raise InputError(f"--search {key} has the range {text[:2]} of integers: expected whole ends.")
    return Integers(int(low), int(high), spread)


class Search:
    """Proposes one trial after another, from the seed and from how the trials so far did.

        trial 0       the default
        even trials   the best so far + N(0, r_n^2),   r_n = n^(-1/d) / 4   (from 4 on)
        others        the next point of the Sobol sequence

    with `n`, half of the trials so far, about the points explored of a `d`-dimensional space: they lie about
    `n^(-1/d)` apart, so that the steps shrink as the whole is known better. Steps over an end of a range are reflected.
    No values are proposed twice.

    Args:
        space: The domains, by key.
        default: The values of the default, by key.
        seed: Of the sequence.
    """

    def __init__(self, space: Space, default: Values, seed: int = 0) -> None:
        if not space:
            raise InputError("There is nothing to tune: give at least one --search.")
        self.space, self.default, self.seed = space, default, seed
        self.engine = SobolEngine(len(space), scramble=True, seed=derive_seed(seed, "search"))
        self.tried: list[Values] = []
        self.scores: list[float | None] = []
        self._seen: set[str] = set()

    @property
    def best(self) -> int | None:
        """The number of the best trial, the first of several; None if none succeeded."""
        done = [(score, -number) for number, score in enumerate(self.scores) if score is not None]
        return -max(done)[1] if done else None

    def propose(self) -> Values | None:
        """Returns the values of the next trial; None if there is nothing left to try."""
        number, best = len(self.tried), self.best
        if number == 0:
            return self.default
        generator = make_generator(self.seed, "refine", number)
        refines = number % 2 == 0 and number > 2 and best is not None
        for attempt in range(NUM_ATTEMPTS):
            if refines and attempt < NUM_ATTEMPTS // 2:
                point = self._near(self.tried[best], generator)  # type: ignore[index]
            else:
                point = self.engine.draw(1, dtype=torch.float64)[0].tolist()
            values = {key: domain.value(u) for (key, domain), u in zip(self.space.items(), point, strict=True)}
            if _identity(values) not in self._seen:
                return values
        return None

    def record(self, values: Values, score: float | None) -> None:
        """Takes note of a trial; its score, the higher the better, is None if it failed."""
        self.tried.append(values)
        self.scores.append(score)
        self._seen.add(_identity(values))

    def _near(self, values: Values, generator: torch.Generator) -> list[float]:
        """Returns a point near that of `values`."""
        radius = (len(self.tried) / 2) ** (-1 / len(self.space)) / 4
        centre = torch.tensor([domain.unit(values[key]) for key, domain in self.space.items()], dtype=torch.float64)
        point = (centre + radius * torch.randn(len(centre), generator=generator, dtype=torch.float64)).abs()
        return torch.where(point > 1, 2 - point, point).clamp(0, 1).tolist()


def check_keys(keys: Sequence[str]) -> None:
    """Raises `InputError` unless the keys are settings of how to reconstruct, none of them part of another."""
    for key in keys:
        first = key.split(".")[0]
        if first in ("operator", "noise", "seed"):
            raise InputError(f"model.{key} is part of the problem, not of its solution: all trials share {first}.")
        inner = next((other for other in keys if other.startswith(f"{key}.")), None)
        if inner:
            raise InputError(f"model.{inner} lies inside of model.{key}: tune one of the two.")


def _number(key: str, text: Any) -> float:
    """`text` as a number; YAML takes 1e-4, without a point, for a word."""
    try:
        number = math.nan if isinstance(text, bool) else float(text)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"--search {key} has an end {text}, expected a number: {FORMS}.")
    return number


def _rounded(value: float, low: float, high: float) -> float:
    share = (high - low) / max(abs(low), abs(high))
    digits = DIGITS + max(0, math.ceil(-math.log10(share)) - 1)  # of a narrow range no fewer values than of a wide one
    return min(max(float(f"{value:.{digits}g}"), low), high)


def _identity(values: Values) -> str:
    """Returns a text that equal values share, be a whole number an integer or not."""
    return to_json({key: float(value) if _is_number(value) else value for key, value in values.items()})


def _clamped(u: float) -> float:
    return min(max(u, 0.0), 1.0)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
