"""The published adaptations, with their authors' numbers; the samplers they go with are in `configs/`.

All of them reset the network for every measurement. Two things do not carry over and are restated for our operators
and priors: the weight of the data step, which is in units of the authors' operator and here in units of `1 / ||A||^2`,
and noise levels, where a variance-preserving time step becomes a level of the same rank in a Karras schedule from 10.
"""

from __future__ import annotations

import math

from invrecon.adapt.losses import DataLoss, ProximalDataLoss
from invrecon.adapt.selfsupervised import Levels, SelfSupervised
from invrecon.adapt.stopping import HeldOutViews
from invrecon.adapt.trainable import AllWeights, LoRA, Trainable

# The convolutions and linear layers inside residual and attention blocks; stem, head and embedding are outside. Of our
# networks, of guided diffusion's and of EDM's.
BLOCKS = (
    r"^(encoder|bottleneck|attention|decoder|middle_block|output_blocks)\."
    r"|^input_blocks\.(?!0\.)|^(enc|dec)\.\d+x\d+_(?!conv$|aux_)"
)


class SCD(SelfSupervised):
    """Steerable conditional diffusion: low-rank corrections, learned through a few iterations of the data step.

    Published: LoRA of rank 12 inside residual and attention blocks, biases and all else frozen; one Adam (3e-4, no
    weight decay) for the whole run; 18 steps at every fifth of 100 levels and at the last four; 3 CG iterations, which
    the gradient goes through; gamma 0.2; 1e-3 times the sum of TV beside the mean square of the misfit; the noise
    of the DDIM step (eta 0.2) from the network without its corrections; the last denoised image, before its data step,
    is the result. (The paper's K and r are the code's number of steps and rank. Its fifths are counted from the last
    level: 23 levels adapt, here 24.)

    Two of these belong to the authors' operator, a Radon transform of 60 views and 256 pixels with lengths in pixels,
    `||A||^2` about `60 * 256`. Gamma 0.2 is a weight of 3000 in units of `1 / ||A||^2`. A mean square in its units is
    60 times one in those of `ParallelBeamCT` (pixels of 40/256, 512 bins for 363), so TV has 1.7e-5; it is isotropic
    here, anisotropic there.

    Source: Barbano, Denker et al., "Steerable conditional diffusion for out-of-distribution adaptation in medical image
    reconstruction", IEEE TMI 2025 (arXiv 2308.14409), and the command in its public code's README.

    Args:
        rank: Of the corrections.
        learning_rate: Of Adam.
        steps: Steps a level.
        every: Every so many levels adapt ...
        num_last: ... and so many at the end.
        num_iterations: CG iterations in the loss.
        weight: Of the data step in the loss, in units of `1 / ||A||^2`.
        tv_weight: Of total variation in the loss.
        ema: Decay of the average of the weights that the sampler uses; the authors do not average.
        held_out: Views held out to say when to stop; the authors do not stop.
        discrepancy: As in `SelfSupervised`; None does not ask.
    """

    def __init__(
        self,
        rank: int = 12,
        learning_rate: float = 3e-4,
        steps: int = 18,
        every: int = 5,
        num_last: int = 4,
        num_iterations: int = 3,
        weight: float = 3000.0,
        tv_weight: float = 1.7e-5,
        ema: float = 0.0,
        held_out: HeldOutViews | None = None,
        discrepancy: float | None = None,
    ) -> None:
        super().__init__(
            trainable=LoRA(rank, layers=BLOCKS),
            loss=ProximalDataLoss(num_iterations, weight, tv_weight),
            learning_rate=learning_rate,
            steps=steps,
            levels=Levels(every=every, num_last=num_last),
            ema=ema,
            held_out=held_out,
            discrepancy=discrepancy,
            noise_from="unadapted",
            output="denoised",
        )


class DDIP(SelfSupervised):
    """Deep diffusion image prior: as SCD, with an optimiser made anew at each level, and biases that adapt too.

    Published for CT: LoRA of rank 4 and all biases but those of the embedding; AdamW (1e-3; no decay is named, so
    torch's 0.01) anew at each of 50 levels; 10 steps (5 for MRI) at times 20 to 980 of 1000, that is all levels but the
    outermost 2 % at either end; 5 CG iterations on `A^T A` itself (an infinite weight), under the gradient; the noise
    of the step (eta 0.85) from the adapted network.

    Source: Chung & Ye, "Deep diffusion image prior for efficient OOD adaptation in 3D inverse problems", ECCV 2024
    (arXiv 2407.10641), and its public code, 2D. D3IP is its version for volumes: 3 random slices a step and 1 CG
    iteration in the loss.

    Args:
        rank: Of the corrections.
        learning_rate: Of AdamW.
        steps: Steps a level.
        margin: Share of the levels left out at either end.
        num_iterations: CG iterations in the loss.
        weight: Of the data step in the loss, in units of `1 / ||A||^2`. Infinite as published for data without noise.
        weight_decay: Of AdamW.
        ema: Decay of the average of the weights that the sampler uses; the authors do not average.
        held_out: Views held out to say when to stop; the authors do not stop.
        discrepancy: As in `SelfSupervised`; None does not ask.
    """

    def __init__(
        self,
        rank: int = 4,
        learning_rate: float = 1e-3,
        steps: int = 10,
        margin: float = 0.02,
        num_iterations: int = 5,
        weight: float = math.inf,
        weight_decay: float = 0.01,
        ema: float = 0.0,
        held_out: HeldOutViews | None = None,
        discrepancy: float | None = None,
    ) -> None:
        super().__init__(
            trainable=LoRA(rank, layers=BLOCKS, biases=True),
            loss=ProximalDataLoss(num_iterations, weight),
            learning_rate=learning_rate,
            steps=steps,
            levels=Levels(margin=margin),
            keep_optimiser=False,
            weight_decay=weight_decay,
            ema=ema,
            held_out=held_out,
            discrepancy=discrepancy,
            noise_from="adapted",
        )


class PatchSelfSupervision(SelfSupervised):
    r"""Self-supervision of a patch prior: the misfit of the image that its patches make together.

    $$ L(\theta) = \frac{1}{m} \|y - A \textstyle\sum_c G_c^T D_\theta(G_c x_t, c)\|^2 $$

    Published: this loss (a sum there), over the patches of one layout. The authors' code is not public, and they do not
    say what adapts, at what rate, how often, at which levels, or when to stop: all weights, Adam with 1e-5, five steps
    a level, levels below 1 and no stop are ours. Gradients are exact in the memory of one chunk of patches.

    Source: Hu, Song, Fessler & Shen, "Test-time adaptation improves inverse problem solving with patch-based diffusion
    models", IEEE TCI 11 (2025), 980-991 (arXiv 2410.11730).

    Args:
        trainable: What adapts; all weights if None.
        learning_rate: Of Adam.
        steps: Steps a level.
        sigma_max: Level above which nothing adapts.
        ema: Decay of the average of the weights that the sampler uses; 0 does not average.
        held_out: Views held out to say when to stop.
        discrepancy: As in `SelfSupervised`; None does not ask.
    """

    def __init__(
        self,
        trainable: Trainable | None = None,
        learning_rate: float = 1e-5,
        steps: int = 5,
        sigma_max: float = 1.0,
        ema: float = 0.0,
        held_out: HeldOutViews | None = None,
        discrepancy: float | None = None,
    ) -> None:
        super().__init__(
            trainable=AllWeights() if trainable is None else trainable,
            loss=DataLoss(),
            learning_rate=learning_rate,
            steps=steps,
            levels=Levels(sigma_max=sigma_max),
            ema=ema,
            held_out=held_out,
            discrepancy=discrepancy,
            noise_from="adapted",
        )


class WholeSelfSupervision(PatchSelfSupervision):
    """The same for a whole-image prior, whose misfit is taken behind the data step, as in SCD and DDIP.

    Published: that the comparison is with a whole-image prior under the loss of SCD and DDIP. What adapts, rate, steps
    and levels are those of `PatchSelfSupervision`; 5 CG iterations are DDIP's, the weight is that of our samplers' data
    step.

    Source: as `PatchSelfSupervision`, the row "whole image + self-supervision" of its tables.

    Args:
        trainable: What adapts; all weights if None.
        learning_rate: Of Adam.
        steps: Steps a level.
        sigma_max: Level above which nothing adapts.
        num_iterations: CG iterations in the loss.
        weight: Of the data step in the loss, in units of `1 / ||A||^2`.
        ema: Decay of the average of the weights that the sampler uses; 0 does not average.
        held_out: Views held out to say when to stop.
        discrepancy: As in `SelfSupervised`; None does not ask.
    """

    def __init__(
        self,
        trainable: Trainable | None = None,
        learning_rate: float = 1e-5,
        steps: int = 5,
        sigma_max: float = 1.0,
        num_iterations: int = 5,
        weight: float = 1000.0,
        ema: float = 0.0,
        held_out: HeldOutViews | None = None,
        discrepancy: float | None = None,
    ) -> None:
        super().__init__(trainable, learning_rate, steps, sigma_max, ema, held_out, discrepancy)
        self.loss = ProximalDataLoss(num_iterations, weight)
