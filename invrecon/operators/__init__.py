"""Physics: linear operators `y = A x` and noise models."""

from invrecon.operators.base import LinearOperator, conjugate_gradient
from invrecon.operators.blur import Blur, CircularBlur, GaussianBlur, UniformBlur
from invrecon.operators.ct import CT, FanBeamCT, LimitedAngleCT, ParallelBeamCT, ct_from_geometry
from invrecon.operators.downsample import BicubicDownsample, BlockDownsample
from invrecon.operators.identity import Identity
from invrecon.operators.mask import BoxInpainting, FourierMask, Inpainting, RandomInpainting
from invrecon.operators.noise import (
    GaussianNoise,
    NoiseModel,
    NoNoise,
    RelativeGaussianNoise,
    TransmissionPoisson,
)
from invrecon.operators.spectral import SpectralOperator, Spectrum

__all__ = [
    "CT",
    "BicubicDownsample",
    "BlockDownsample",
    "Blur",
    "BoxInpainting",
    "CircularBlur",
    "FanBeamCT",
    "FourierMask",
    "GaussianBlur",
    "GaussianNoise",
    "Identity",
    "Inpainting",
    "LimitedAngleCT",
    "LinearOperator",
    "NoNoise",
    "NoiseModel",
    "ParallelBeamCT",
    "RandomInpainting",
    "RelativeGaussianNoise",
    "SpectralOperator",
    "Spectrum",
    "TransmissionPoisson",
    "UniformBlur",
    "conjugate_gradient",
    "ct_from_geometry",
]
