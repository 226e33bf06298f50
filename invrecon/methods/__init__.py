"""Reconstruction methods: `method(y, operator, prior, generators=...) -> Estimate`."""

from invrecon.methods.base import Estimate, Method
from invrecon.methods.classical import FBP, TotalVariation
from invrecon.methods.conditioning import (
    Conditioning,
    DPSConditioning,
    NormalisedGuidance,
    NormGuidance,
    ProximalConditioning,
    SquaredNormGuidance,
    Unconditional,
)
from invrecon.methods.padis import PaDIS, PaDISNormalised, PaDISPaper, PaDISRepo
from invrecon.methods.sampling import ProximalDiffusion, Sampler, UnconditionalSampler, diffuse, sample_prior
from invrecon.methods.schedule import GeometricSchedule, KarrasSchedule, Schedule
from invrecon.methods.start import EstimateStart, GivenStart, NoiseStart, NoisyEstimateStart, Start
from invrecon.methods.transitions import DDIM, AcceleratedRenoise, DDSTransition, Langevin, Renoise, Transition

__all__ = [
    "DDIM",
    "FBP",
    "AcceleratedRenoise",
    "Conditioning",
    "DDSTransition",
    "DPSConditioning",
    "Estimate",
    "EstimateStart",
    "GeometricSchedule",
    "GivenStart",
    "KarrasSchedule",
    "Langevin",
    "Method",
    "NoiseStart",
    "NoisyEstimateStart",
    "NormGuidance",
    "NormalisedGuidance",
    "PaDIS",
    "PaDISNormalised",
    "PaDISPaper",
    "PaDISRepo",
    "ProximalConditioning",
    "ProximalDiffusion",
    "Renoise",
    "Sampler",
    "Schedule",
    "SquaredNormGuidance",
    "Start",
    "TotalVariation",
    "Transition",
    "Unconditional",
    "UnconditionalSampler",
    "diffuse",
    "sample_prior",
]
