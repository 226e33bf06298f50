"""Physics: linear operators `y = A x` and noise models.

A file here is known by the names of its classes, listed below (for type checkers) or not.
"""

from invrecon.discovery import export_classes
from invrecon.operators.base import LinearOperator, conjugate_gradient
from invrecon.operators.blur import Blur, CircularBlur, GaussianBlur, MotionBlur, UniformBlur
from invrecon.operators.coils import (
    CoilMaps,
    ESPIRiT,
    LowResolutionMaps,
    WalshMaps,
    noise_covariance,
    normalise_maps,
    prewhiten,
    simulated_maps,
    smooth_phase,
    with_phase,
)
from invrecon.operators.ct import CT, FanBeamCT, LimitedAngleCT, ParallelBeamCT, ct_from_geometry
from invrecon.operators.downsample import BicubicDownsample, BlockDownsample
from invrecon.operators.identity import Identity
from invrecon.operators.mask import BoxInpainting, FourierMask, Inpainting, RandomInpainting
from invrecon.operators.mri import CartesianMRI
from invrecon.operators.noise import (
    GaussianNoise,
    NoiseModel,
    NoNoise,
    RelativeGaussianNoise,
    SNRNoise,
    TransmissionPoisson,
)
from invrecon.operators.nufft import NonCartesianMRI, RadialMRI, SpiralMRI
from invrecon.operators.sampling import (
    EquispacedLines,
    GaussianSampling,
    MagicLines,
    PoissonDiscSampling,
    PolynomialSampling,
    RandomLines,
    Sampling,
    TwoPercentSampling,
    achieved_acceleration,
    calibration_region,
)
from invrecon.operators.spectral import SpectralOperator, Spectrum

__all__ = [
    "CT",
    "BicubicDownsample",
    "BlockDownsample",
    "Blur",
    "BoxInpainting",
    "CartesianMRI",
    "CircularBlur",
    "CoilMaps",
    "ESPIRiT",
    "EquispacedLines",
    "FanBeamCT",
    "FourierMask",
    "GaussianBlur",
    "GaussianNoise",
    "GaussianSampling",
    "Identity",
    "Inpainting",
    "LimitedAngleCT",
    "LinearOperator",
    "LowResolutionMaps",
    "MagicLines",
    "MotionBlur",
    "NoNoise",
    "NoiseModel",
    "NonCartesianMRI",
    "ParallelBeamCT",
    "PoissonDiscSampling",
    "PolynomialSampling",
    "RadialMRI",
    "RandomInpainting",
    "RandomLines",
    "RelativeGaussianNoise",
    "SNRNoise",
    "Sampling",
    "SpectralOperator",
    "Spectrum",
    "SpiralMRI",
    "TransmissionPoisson",
    "TwoPercentSampling",
    "UniformBlur",
    "WalshMaps",
    "achieved_acceleration",
    "calibration_region",
    "conjugate_gradient",
    "ct_from_geometry",
    "noise_covariance",
    "normalise_maps",
    "prewhiten",
    "simulated_maps",
    "smooth_phase",
    "with_phase",
]

export_classes(globals(), LinearOperator, NoiseModel, Sampling, CoilMaps)
