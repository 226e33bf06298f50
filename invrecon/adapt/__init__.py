"""Test-time adaptation: what is trained, by which loss, when to stop, and whether to start."""

from invrecon.adapt.base import Adaptation, Step, Trace
from invrecon.adapt.em import ExpectationMaximisation
from invrecon.adapt.losses import DataLoss, ImplicitProximalDataLoss, ProximalDataLoss, SelfSupervisedLoss
from invrecon.adapt.presets import DDIP, SCD, PatchSelfSupervision, WholeSelfSupervision
from invrecon.adapt.selfsupervised import AdaptingPrior, DenoisedOutput, Levels, PriorNoise, SelfSupervised
from invrecon.adapt.stopping import Discrepancy, HeldOutRays, HeldOutViews, loss_on
from invrecon.adapt.suitability import SuitabilityTest, Verdict
from invrecon.adapt.trainable import AllWeights, Biases, LoRA, Trainable, adapted_copy, movement, num_parameters

__all__ = [
    "DDIP",
    "SCD",
    "Adaptation",
    "AdaptingPrior",
    "AllWeights",
    "Biases",
    "DataLoss",
    "DenoisedOutput",
    "Discrepancy",
    "ExpectationMaximisation",
    "HeldOutRays",
    "HeldOutViews",
    "ImplicitProximalDataLoss",
    "Levels",
    "LoRA",
    "PatchSelfSupervision",
    "PriorNoise",
    "ProximalDataLoss",
    "SelfSupervised",
    "SelfSupervisedLoss",
    "Step",
    "SuitabilityTest",
    "Trace",
    "Trainable",
    "Verdict",
    "WholeSelfSupervision",
    "adapted_copy",
    "loss_on",
    "movement",
    "num_parameters",
]
