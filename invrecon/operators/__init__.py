"""Physics: linear operators `y = A x` and noise models."""

from invrecon.operators.base import LinearOperator, conjugate_gradient
from invrecon.operators.ct import CT, FanBeamCT, LimitedAngleCT, ParallelBeamCT, ct_from_geometry
from invrecon.operators.identity import Identity
from invrecon.operators.noise import (
    GaussianNoise,
    NoiseModel,
    NoNoise,
    RelativeGaussianNoise,
    TransmissionPoisson,
)

__all__ = [
    "CT",
    "FanBeamCT",
    "GaussianNoise",
    "Identity",
    "LimitedAngleCT",
    "LinearOperator",
    "NoNoise",
    "NoiseModel",
    "ParallelBeamCT",
    "RelativeGaussianNoise",
    "TransmissionPoisson",
    "conjugate_gradient",
    "ct_from_geometry",
]
