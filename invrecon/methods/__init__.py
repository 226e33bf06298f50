"""Reconstruction methods: `method(y, operator, prior, generators=...) -> Estimate`.

A file here is known by the names of its classes, listed below (for type checkers) or not.
"""

from invrecon.discovery import export_classes
from invrecon.methods.base import Estimate, Method
from invrecon.methods.cgsense import CGSENSE
from invrecon.methods.classical import ADMMTV, FBP, SIRT, TotalVariation
from invrecon.methods.conditioning import (
    Conditioning,
    DPSConditioning,
    NormalisedGuidance,
    NormGuidance,
    ProximalConditioning,
    ScaledNormGuidance,
    SquaredNormGuidance,
    Unconditional,
)
from invrecon.methods.dip import (
    DIP,
    AllIterations,
    ASeqDIP,
    DIPUNet,
    DiscrepancyStop,
    FittedNetwork,
    HeldOutStop,
    NetworkFit,
    Purification,
    ReferenceDIP,
    SelfGuidedDIP,
    StoppingRule,
    UDiGDIP,
    WindowedVarianceStop,
)
from invrecon.methods.draws import DataSampler, ExactDataSampler, LangevinDataSampler
from invrecon.methods.gibbs import DAPS, DAPSExact, DecoupledConditioning, LikelihoodDraw, PnPDM, PriorDraw
from invrecon.methods.guidance import DPS, DPSNormalised, PiGDM, PiGDMConditioning
from invrecon.methods.langevin import (
    DirectConditioning,
    LangevinDirect,
    PaDISCorrection,
    PaDISPredictorCorrector,
    PredictorCorrector,
    StandardCorrection,
)
from invrecon.methods.padis import PaDIS, PaDISNormalised, PaDISPaper, PaDISRepo
from invrecon.methods.plugandplay import RED, AnnealedPnPADMM, PlugAndPlay, PnPADMM
from invrecon.methods.projection import (
    DDNM,
    DDNMFBP,
    DDS,
    VEDDNM,
    DiffPIR,
    DirectInverseConditioning,
    KrylovConditioning,
    PinvConditioning,
)
from invrecon.methods.reddiff import REDDiff
from invrecon.methods.sampling import ProximalDiffusion, Sampler, UnconditionalSampler, diffuse, sample_prior
from invrecon.methods.schedule import (
    FloorSchedule,
    GeometricSchedule,
    KarrasSchedule,
    PairedSchedule,
    Schedule,
    VPSchedule,
)
from invrecon.methods.spectral import DDRM, DDNMPlus, DDNMPlusTransition, SpectralStart, SpectralTransition
from invrecon.methods.start import EstimateStart, GivenStart, NoiseStart, NoisyEstimateStart, Start
from invrecon.methods.transitions import (
    DDIM,
    AcceleratedRenoise,
    DDSTransition,
    Langevin,
    PriorNoise,
    Renoise,
    ReverseSDE,
    Transition,
)
from invrecon.methods.wavelet import WaveletL1

__all__ = [
    "ADMMTV",
    "CGSENSE",
    "DAPS",
    "DDIM",
    "DDNM",
    "DDNMFBP",
    "DDRM",
    "DDS",
    "DIP",
    "DPS",
    "FBP",
    "RED",
    "SIRT",
    "VEDDNM",
    "ASeqDIP",
    "AcceleratedRenoise",
    "AllIterations",
    "AnnealedPnPADMM",
    "Conditioning",
    "DAPSExact",
    "DDNMPlus",
    "DDNMPlusTransition",
    "DDSTransition",
    "DIPUNet",
    "DPSConditioning",
    "DPSNormalised",
    "DataSampler",
    "DecoupledConditioning",
    "DiffPIR",
    "DirectConditioning",
    "DirectInverseConditioning",
    "DiscrepancyStop",
    "Estimate",
    "EstimateStart",
    "ExactDataSampler",
    "FittedNetwork",
    "FloorSchedule",
    "GeometricSchedule",
    "GivenStart",
    "HeldOutStop",
    "KarrasSchedule",
    "KrylovConditioning",
    "Langevin",
    "LangevinDataSampler",
    "LangevinDirect",
    "LikelihoodDraw",
    "Method",
    "NetworkFit",
    "NoiseStart",
    "NoisyEstimateStart",
    "NormGuidance",
    "NormalisedGuidance",
    "PaDIS",
    "PaDISCorrection",
    "PaDISNormalised",
    "PaDISPaper",
    "PaDISPredictorCorrector",
    "PaDISRepo",
    "PairedSchedule",
    "PiGDM",
    "PiGDMConditioning",
    "PinvConditioning",
    "PlugAndPlay",
    "PnPADMM",
    "PnPDM",
    "PredictorCorrector",
    "PriorDraw",
    "PriorNoise",
    "ProximalConditioning",
    "ProximalDiffusion",
    "Purification",
    "REDDiff",
    "ReferenceDIP",
    "Renoise",
    "ReverseSDE",
    "Sampler",
    "ScaledNormGuidance",
    "Schedule",
    "SelfGuidedDIP",
    "SpectralStart",
    "SpectralTransition",
    "SquaredNormGuidance",
    "StandardCorrection",
    "Start",
    "StoppingRule",
    "TotalVariation",
    "Transition",
    "UDiGDIP",
    "Unconditional",
    "UnconditionalSampler",
    "VPSchedule",
    "WaveletL1",
    "WindowedVarianceStop",
    "diffuse",
    "sample_prior",
]

export_classes(globals(), Method, Schedule, Conditioning, Transition, Start, DataSampler, StoppingRule, FittedNetwork)
