"""Deep image priors whose input follows their output: aSeqDIP, and uDiG-DIP, which purifies it on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from invrecon.errors import InputError
from invrecon.methods.base import check_prior
from invrecon.methods.conditioning import ProximalConditioning
from invrecon.methods.counting import CountingPrior
from invrecon.methods.dip.fit import FittedEstimate, NetworkFit, NetworkInput, Observer
from invrecon.methods.dip.fixed import FixedInput, first_image
from invrecon.methods.dip.measurement import CaseData
from invrecon.methods.dip.network import FittedNetwork
from invrecon.methods.dip.stopping import StoppingRule
from invrecon.methods.sampling import check_free, check_ladder, diffuse
from invrecon.methods.schedule import GeometricSchedule, KarrasSchedule
from invrecon.methods.start import Start
from invrecon.methods.transitions import DDIM, Transition
from invrecon.rng import Generators, randn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from invrecon.operators.base import LinearOperator
    from invrecon.priors.base import Prior


class SequentialInput(FixedInput):
    """An input that becomes the output every so many iterations, and to which the output is held in between.

    Args:
        z: The first input, `(1, C, H, W)`, an image.
        data: The case.
        weight: Of the autoencoding term.
        num_inner: Iterations an input.
    """

    def __init__(self, z: Tensor, data: CaseData, weight: float, num_inner: int) -> None:
        super().__init__(z / data.scale, data.scale)
        self.data, self.weight, self.num_inner = data, weight, num_inner

    def penalty(self, x: Tensor) -> Tensor | float:
        """Returns the weighted distance of image and input."""
        return self.weight * self.data.distance(x - self.scale * self.z)

    @torch.no_grad()
    def prepare(self, iteration: int, network: nn.Module) -> None:
        """Feeds the output back when an input has had its iterations."""
        round_, step = divmod(iteration - 1, self.num_inner)
        if round_ and not step:
            self.z = self.following(self.image(network), round_) / self.scale

    def following(self, x: Tensor, round_: int) -> Tensor:
        """Returns the input of round `round_` (the first is 0), made of the output `x` of the round before."""
        return x


class ASeqDIP(NetworkFit):
    r"""Autoencoding sequential deep image prior: the output becomes the next input.

    $$ \theta_{k+1} \approx \arg\min_\theta \|A f_\theta(z_k) - y\|^2 + \lambda \|A\|^2 \|f_\theta(z_k) - z_k\|^2,
       \quad z_{k+1} = f_{\theta_{k+1}}(z_k) $$

    by `num_inner` steps of Adam a round, weights and moments going on. The second term slows the fit of the noise. The
    published code for MRI also puts the measured samples back into the next input; here the input is the output itself,
    for every operator.

    No evaluations of a prior: a forward and a backward pass of the fitted network an iteration (at most 3000), two
    operator calls each, and a forward pass between rounds. Asks of the operator that gradients go through it, a direct
    inverse for the image's unit and the start, and images of two dimensions; of the prior nothing.

    Source: Alkhouri, Liang, Bell, Qu, Wang & Ravishankar, "Image reconstruction via autoencoding sequential deep image
    prior", NeurIPS 2024, Alg. 1. Published with `lambda = 1`, 2000 rounds of 2 steps and a learning rate of 1e-4.

    Args:
        weight: `lambda`, in units of the data term.
        num_inner: Steps a round.
        start: The first input; the direct inverse of the rows that the fit sees if None.
        network: What is fitted; `DIPUNet()` if None.
        num_iterations: Most steps of Adam, of all rounds.
        learning_rate: Of the weights.
        stop: Which iterate is the estimate; `HeldOutStop()` if None.
        averaging: Decay of the running average of outputs that is judged and returned; 0 takes the outputs themselves.
        clip: Range to which the estimate is clipped, or None.

    Raises:
        InputError: A knob out of range; in a call, a start that is no image of the operator.
    """

    def __init__(
        self,
        weight: float = 1.0,
        num_inner: int = 2,
        start: Start | None = None,
        network: FittedNetwork | None = None,
        num_iterations: int = 3000,
        learning_rate: float = 1e-3,
        stop: StoppingRule | None = None,
        averaging: float = 0.0,
        clip: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(network, num_iterations, learning_rate, stop, averaging, clip)
        if not weight >= 0 or num_inner < 1:
            raise InputError(
                f"{type(self).__name__} needs weight >= 0 and num_inner >= 1, got {weight} and {num_inner}."
            )
        self.weight, self.num_inner = float(weight), num_inner
        self.start = start

    def input(self, data: CaseData, prior: CountingPrior | None, generator: torch.Generator) -> NetworkInput:
        """Returns the input that follows the output."""
        z = first_image(self.start, data, generator, f"The start of {type(self).__name__}")
        return SequentialInput(z, data, self.weight, self.num_inner)


class Purification:
    r"""Takes out of an image what a diffusion prior does not know: noise up to a level, then reverse diffusion.

    $$ z = \mathrm{diffuse}(x + \sigma n;\ \sigma \to 0) $$

    the reverse diffusion being that of the prior alone. Of the level `sigma` on it decides, above it the image.

    Source: Liang, Alkhouri, Bell, Qu, Wang & Ravishankar, "Sequential diffusion-guided deep image prior for medical
    image reconstruction" (uDiG-DIP), ICASSP 2025, the purification step; Nie et al., "Diffusion models for adversarial
    purification", ICML 2022, Eq. 4, in sigma coordinates.

    Args:
        sigma_max: Level of the first purification, in intensity units.
        sigma_min: Level of the last; in between they fall in a constant ratio.
        num_levels: Evaluations a purification; 1 is a single denoising.
        sigma_end: Last level of each reverse diffusion.
        transition: From one level to the next; `DDIM(0.85)` if None.

    Raises:
        InputError: A level or a number out of range, or a transition that stays at its level.
    """

    def __init__(
        self,
        sigma_max: float = 0.1,
        sigma_min: float = 0.02,
        num_levels: int = 1,
        sigma_end: float = 0.005,
        transition: Transition | None = None,
    ) -> None:
        if not 0 < sigma_end <= sigma_min:
            raise InputError(f"Purification needs 0 < sigma_end <= sigma_min, got {sigma_end} and {sigma_min}.")
        self.sigma_max, self.sigma_min = float(sigma_max), float(sigma_min)
        self.num_levels, self.sigma_end = num_levels, float(sigma_end)
        self.transition = DDIM(0.85) if transition is None else transition
        if self.transition.stays_at_level:
            raise InputError(
                f"{type(self.transition).__name__} stays at its noise level, and a purification comes down: use DDIM."
            )
        check_ladder(KarrasSchedule(num_levels, self.sigma_max, self.sigma_end), self.transition)
        check_free(self.transition)
        self.sigmas(1)

    def sigmas(self, num: int) -> list[float]:
        """Returns the levels of `num` purifications, falling."""
        return GeometricSchedule(num, self.sigma_max, self.sigma_min).sigmas

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: float, prior: Prior | CountingPrior, generators: Generators) -> Tensor:
        """Returns `z` for an image `x` `(B, C, *S)`; a draw from the prior given `x + sigma n`."""
        noisy = x + sigma * randn(x.shape[1:], generators, x)
        return diffuse(
            noisy, prior, KarrasSchedule(self.num_levels, sigma, self.sigma_end), self.transition, generators
        )


class PurifiedInput(SequentialInput):
    """An input that becomes the purified output, at a level that falls from round to round.

    Args:
        z: The first input, `(1, C, H, W)`, an image.
        data: The case.
        weight: Of the autoencoding term.
        num_inner: Iterations an input.
        purification: How.
        sigmas: Its levels.
        cg_iterations: Of the data step before; 0 leaves it out.
        prior: The diffusion prior.
        generator: The case's own.
    """

    def __init__(
        self,
        z: Tensor,
        data: CaseData,
        weight: float,
        num_inner: int,
        purification: Purification,
        sigmas: list[float],
        cg_iterations: int,
        prior: CountingPrior,
        generator: torch.Generator,
    ) -> None:
        super().__init__(z, data, weight, num_inner)
        self.purification, self.sigmas, self.cg_iterations = purification, sigmas, cg_iterations
        self.prior, self.generator = prior, generator

    def following(self, x: Tensor, round_: int) -> Tensor:
        """Returns the purified output."""
        sigma = self.sigmas[round_ - 1]
        z = self.purification(self.consistent(x, sigma), sigma, self.prior, [self.generator])
        check_channels(z.shape[1], x.shape[1])
        return z

    def consistent(self, x: Tensor, sigma: float) -> Tensor:
        """Returns the output closer to the rows that the fit sees, by the data step of `ProximalDiffusion`."""
        if not self.cg_iterations:
            return x
        step = ProximalConditioning(self.cg_iterations, noise_factor=5.0)
        operator, std = self.data.fitted_operator, self.data.std
        weight = step.weight(sigma, None if std is None else x.new_tensor([std]), operator.norm(), x)
        return operator.prox(x, self.data.fitted_y, weight, max_iter=step.num_iterations)


class UDiGDIP(ASeqDIP):
    r"""uDiG-DIP: a deep image prior whose output is purified by a diffusion prior, and fed back.

    $$ \theta_{k+1} \approx \arg\min_\theta \|A f_\theta(z_k) - y\|^2 + \lambda \|A\|^2 \|f_\theta(z_k) - z_k\|^2,
       \quad z_{k+1} = \mathrm{purify}(\mathrm{prox}(f_{\theta_{k+1}}(z_k)), \sigma_k) $$

    with `sigma_k` falling, and the estimate `f_theta(z_k)`. The prior is unconditional, and no gradient goes through
    it: any denoiser of such images serves. The fit is kept near images of the prior, so that it explains noise late or
    never. `prox` is the data step of `ProximalConditioning` on the rows that the fit sees: a network explains the fine
    detail of a measurement long after the coarse one, and what it has not explained yet would be lost to the prior.

    At most 29 evaluations, one between two rounds; an iteration (at most 3000) is a forward and a backward pass of the
    fitted network, with two operator calls. Asks of the operator that gradients go through it, a direct inverse for the
    image's unit and the start, and images of two dimensions; of the prior nothing but `D`, of images with as many
    channels.

    Source: Liang, Alkhouri, Bell, Qu, Wang & Ravishankar, "Sequential diffusion-guided deep image prior for medical
    image reconstruction", ICASSP 2025, without the data step, whose place in the authors' MRI code is taken by
    measured k-space. Level, rounds and steps were not published; these are our own.

    Args:
        purification: What comes between rounds; `Purification()` if None.
        weight: `lambda`, in units of the data term.
        num_inner: Steps a round.
        cg_iterations: CG iterations of the data step; 0 leaves it out.
        start: The first input; the direct inverse of the rows that the fit sees if None.
        network: What is fitted; `DIPUNet()` if None.
        num_iterations: Most steps of Adam, of all rounds.
        learning_rate: Of the weights.
        stop: Which iterate is the estimate; `HeldOutStop()` if None.
        averaging: Decay of the running average of outputs that is judged and returned; 0 takes the outputs themselves.
        clip: Range to which the estimate is clipped, or None.

    Raises:
        InputError: A knob out of range; in a call, a start that is no image of the operator.
    """

    needs_prior = True

    def __init__(
        self,
        purification: Purification | None = None,
        weight: float = 0.1,
        num_inner: int = 100,
        cg_iterations: int = 10,
        start: Start | None = None,
        network: FittedNetwork | None = None,
        num_iterations: int = 3000,
        learning_rate: float = 1e-3,
        stop: StoppingRule | None = None,
        averaging: float = 0.0,
        clip: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(weight, num_inner, start, network, num_iterations, learning_rate, stop, averaging, clip)
        if cg_iterations < 0:
            raise InputError(f"UDiGDIP: cg_iterations is {cg_iterations}, but it must not be negative.")
        self.purification = Purification() if purification is None else purification
        self.cg_iterations = cg_iterations

    @property
    def num_purifications(self) -> int:
        """Purifications between the rounds."""
        return (self.num_iterations - 1) // self.num_inner

    @property
    def highest_level(self) -> float:
        """That of the first purification."""
        return self.purification.sigma_max

    @property
    def num_evaluations(self) -> int:
        """Most denoiser evaluations."""
        return self.num_purifications * self.purification.num_levels

    def __call__(
        self,
        y: Tensor,
        operator: LinearOperator,
        prior: Prior | None = None,
        *,
        generators: Sequence[torch.Generator] | None = None,
        on_iterate: Observer | None = None,
    ) -> FittedEstimate:
        """Reconstructs a batch; see `NetworkFit.__call__`."""
        prior = check_prior(self, prior)
        denoiser = getattr(prior, "denoiser", None)
        check_channels(getattr(denoiser, "image_channels", None), operator.image_shape[0])
        return super().__call__(y, operator, prior, generators=generators, on_iterate=on_iterate)

    def input(self, data: CaseData, prior: CountingPrior | None, generator: torch.Generator) -> NetworkInput:
        """Returns the input that follows the purified output."""
        assert prior is not None
        z = first_image(self.start, data, generator, f"The start of {type(self).__name__}")
        sigmas = self.purification.sigmas(max(1, self.num_purifications))
        own = (self.weight, self.num_inner, self.purification, sigmas, self.cg_iterations)
        return PurifiedInput(z, data, *own, prior, generator)


def check_channels(num: int | None, expected: int) -> None:
    """Raises `InputError` if a prior of `num` image channels (None if unknown) meets images of another number."""
    if num not in (None, expected):
        raise InputError(
            f"UDiGDIP: the prior is one of images with {num} channels, the operator's have {expected}: use a prior of "
            "such images (complex ones have two channels, real and imaginary)."
        )
