"""The network as the unknown: deep image priors, fitted to one measurement at a time."""

from invrecon.methods.dip.fit import Curve, FittedEstimate, Iterate, NetworkFit
from invrecon.methods.dip.fixed import DIP, ReferenceDIP, SelfGuidedDIP
from invrecon.methods.dip.network import DIPUNet, FittedNetwork
from invrecon.methods.dip.sequential import ASeqDIP, Purification, UDiGDIP
from invrecon.methods.dip.stopping import (
    AllIterations,
    DiscrepancyStop,
    HeldOutStop,
    Monitor,
    Quantity,
    StoppingRule,
    WindowedVariance,
    WindowedVarianceStop,
)

__all__ = [
    "DIP",
    "ASeqDIP",
    "AllIterations",
    "Curve",
    "DIPUNet",
    "DiscrepancyStop",
    "FittedEstimate",
    "FittedNetwork",
    "HeldOutStop",
    "Iterate",
    "Monitor",
    "NetworkFit",
    "Purification",
    "Quantity",
    "ReferenceDIP",
    "SelfGuidedDIP",
    "StoppingRule",
    "UDiGDIP",
    "WindowedVariance",
    "WindowedVarianceStop",
]
