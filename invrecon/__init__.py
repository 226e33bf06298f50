"""Image reconstruction with generative priors: a prior, an operator, and methods that use the two.

Submodules and the names below load on first use: `import invrecon` costs next to nothing over `import torch`.
"""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"

_SUBMODULES = (
    "adapt", "data", "errors", "methods", "metrics", "neighbours", "operators", "priors", "report", "rng", "tasks",
)  # fmt: skip
_HOMES = {
    "FBP": "methods.classical",
    "Estimate": "methods.base",
    "FanBeamCT": "operators.ct",
    "InputError": "errors",
    "Intensity": "data.intensity",
    "LimitedAngleCT": "operators.ct",
    "LinearOperator": "operators.base",
    "Method": "methods.base",
    "PaDIS": "methods.padis",
    "ParallelBeamCT": "operators.ct",
    "Prior": "priors.base",
    "ProximalDiffusion": "methods.sampling",
    "TotalVariation": "methods.classical",
    "load_prior": "priors.weights",
    "make_generators": "rng",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> object:
    if name in _SUBMODULES:
        return import_module(f"{__name__}.{name}")
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES, *_HOMES})
