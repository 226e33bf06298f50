"""Deep image priors with one input throughout: random, a reference, or learned with the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from invrecon.errors import InputError
from invrecon.methods.counting import CountingPrior
from invrecon.methods.dip.fit import NetworkFit, NetworkInput
from invrecon.methods.dip.measurement import CaseData, check_image, fit_scale
from invrecon.methods.dip.network import FittedNetwork
from invrecon.methods.dip.stopping import StoppingRule
from invrecon.methods.start import EstimateStart, Start


class FixedInput(NetworkInput):
    """The same input in every iteration, `x = s f(z)`.

    Args:
        z: In units of the network, `(1, channels, H, W)`.
        scale: `s`.
    """

    def __init__(self, z: Tensor, scale: float) -> None:
        self.z, self.scale = z, scale

    @property
    def channels(self) -> int:
        """Channels of `z`."""
        return self.z.shape[1]

    def image(self, network: nn.Module) -> Tensor:
        """Returns `s f(z)`."""
        return self.scale * network(self.z)


class DIP(NetworkFit):
    r"""Deep image prior: the network of a fixed random input.

    $$ \min_\theta\ \|A f_\theta(z) - y\|^2, \quad z \sim N(0, I) $$

    A convolutional network explains images sooner than noise; stopped in time, that is all the prior there is.

    No evaluations of a prior: a forward and a backward pass of the fitted network an iteration (at most 3000), two
    operator calls each. Asks of the operator that gradients go through it, a direct inverse for the image's unit, and
    images of two dimensions; of the prior nothing.

    Source: Ulyanov, Vedaldi & Lempitsky, "Deep image prior", CVPR 2018, Eq. 2.

    Args:
        input_channels: Channels of the random input.
        network: What is fitted; `DIPUNet()` if None.
        num_iterations: Most steps of Adam.
        learning_rate: Of the weights.
        stop: Which iterate is the estimate; `HeldOutStop()` if None.
        averaging: Decay of the running average of outputs that is judged and returned; 0 takes the outputs themselves.
        clip: Range to which the estimate is clipped, or None.

    Raises:
        InputError: A knob out of range.
    """

    def __init__(
        self,
        input_channels: int = 16,
        network: FittedNetwork | None = None,
        num_iterations: int = 3000,
        learning_rate: float = 1e-3,
        stop: StoppingRule | None = None,
        averaging: float = 0.0,
        clip: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(network, num_iterations, learning_rate, stop, averaging, clip)
        if input_channels < 1:
            raise InputError(f"DIP: input_channels is {input_channels}, but it has to be at least 1.")
        self.input_channels = input_channels

    def input(self, data: CaseData, prior: CountingPrior | None, generator: torch.Generator) -> NetworkInput:
        """Returns white noise."""
        shape = (1, self.input_channels, *data.operator.image_shape[1:])
        z = torch.randn(shape, generator=generator, dtype=data.y.dtype)
        return FixedInput(z.to(data.y.device), data.scale)


class ReferenceDIP(NetworkFit):
    r"""Reference-guided deep image prior: the network's input is an image that resembles the truth.

    $$ \min_\theta\ \|A f_\theta(z_{\mathrm{ref}}) - y\|^2 $$

    No evaluations of a prior: a forward and a backward pass of the fitted network an iteration (at most 3000), two
    operator calls each. Asks of the operator that gradients go through it, a direct inverse for the image's unit and
    the reference, and images of two dimensions; of the prior nothing.

    Source: Zhao, Wu & Zhao, "Reference-driven compressed sensing MR image reconstruction using deep convolutional
    neural networks without pre-training", Sensors 20 (2020), for the idea.

    Args:
        reference: Gives the image: `GivenStart` one that is at hand (an earlier scan), `EstimateStart` that of another
            method, from the rows that the fit sees; their direct inverse if None.
        network: What is fitted; `DIPUNet()` if None.
        num_iterations: Most steps of Adam.
        learning_rate: Of the weights.
        stop: Which iterate is the estimate; `HeldOutStop()` if None.
        averaging: Decay of the running average of outputs that is judged and returned; 0 takes the outputs themselves.
        clip: Range to which the estimate is clipped, or None.

    Raises:
        InputError: A knob out of range; in a call, a reference that is no image of the operator.
    """

    def __init__(
        self,
        reference: Start | None = None,
        network: FittedNetwork | None = None,
        num_iterations: int = 3000,
        learning_rate: float = 1e-3,
        stop: StoppingRule | None = None,
        averaging: float = 0.0,
        clip: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(network, num_iterations, learning_rate, stop, averaging, clip)
        self.reference = reference

    def input(self, data: CaseData, prior: CountingPrior | None, generator: torch.Generator) -> NetworkInput:
        """Returns the reference."""
        z = first_image(self.reference, data, generator, "The reference of ReferenceDIP")
        return FixedInput(z / data.scale, data.scale)


class SelfGuidedDIP(NetworkFit):
    r"""Self-guided deep image prior: the input is learned together with the weights, and guides itself.

    $$ \min_{\theta, z}\ \|A\, \mathbb{E}_\eta f_\theta(z + \eta) - y\|^2
       + \lambda \|A\|^2 \|\mathbb{E}_\eta f_\theta(z + \eta) - z\|^2, \quad \eta \sim U(-a, a) $$

    with `a = noise max |z|`, and the mean over a few draws an iteration. It needs no reference, as it makes its own.

    No evaluations of a prior: a forward and a backward pass of the fitted network, on all draws at once, an iteration
    (at most 3000), two operator calls each. Asks of the operator that gradients go through it, a direct inverse for the
    image's unit and the start, and images of two dimensions; of the prior nothing.

    Source: Liang, Bell, Qu, Wang & Ravishankar, "Analysis of deep image prior and exploiting self-guidance for image
    reconstruction", arXiv 2402.04097.

    Args:
        weight: `lambda`, in units of the data term.
        noise: Amplitude of the noise, in units of the brightest pixel of `z`.
        num_noises: Draws of the noise an iteration.
        input_learning_rate: Of the input, in units of the image's scale.
        start: The first input; the direct inverse of the rows that the fit sees if None.
        network: What is fitted; `DIPUNet()` if None.
        num_iterations: Most steps of Adam.
        learning_rate: Of the weights.
        stop: Which iterate is the estimate; `HeldOutStop()` if None.
        averaging: Decay of the running average of outputs that is judged and returned; 0 takes the outputs themselves.
        clip: Range to which the estimate is clipped, or None.

    Raises:
        InputError: A knob out of range; in a call, a start that is no image of the operator.
    """

    def __init__(
        self,
        weight: float = 0.1,
        noise: float = 0.1,
        num_noises: int = 4,
        input_learning_rate: float = 1e-2,
        start: Start | None = None,
        network: FittedNetwork | None = None,
        num_iterations: int = 3000,
        learning_rate: float = 1e-3,
        stop: StoppingRule | None = None,
        averaging: float = 0.99,
        clip: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(network, num_iterations, learning_rate, stop, averaging, clip)
        if not weight >= 0 or not noise >= 0 or num_noises < 1 or not input_learning_rate > 0:
            raise InputError(
                "SelfGuidedDIP needs weight >= 0, noise >= 0, num_noises >= 1 and input_learning_rate > 0, got "
                f"{weight}, {noise}, {num_noises} and {input_learning_rate}."
            )
        self.weight, self.noise, self.num_noises = float(weight), float(noise), num_noises
        self.input_learning_rate = float(input_learning_rate)
        self.start = start

    def input(self, data: CaseData, prior: CountingPrior | None, generator: torch.Generator) -> NetworkInput:
        """Returns the input that is learned."""
        z = first_image(self.start, data, generator, "The start of SelfGuidedDIP")
        return _LearnedInput(z / data.scale, data, self, generator)


class _LearnedInput(FixedInput):
    """The input as a parameter, with noise."""

    def __init__(self, z: Tensor, data: CaseData, plan: SelfGuidedDIP, generator: torch.Generator) -> None:
        super().__init__(z.clone().requires_grad_(True), data.scale)
        self.data, self.plan, self.generator = data, plan, generator

    def image(self, network: nn.Module) -> Tensor:
        """Returns the mean over the draws of `s f(z + eta)`."""
        shape = (self.plan.num_noises, *self.z.shape[1:])
        uniform = torch.rand(shape, generator=self.generator, dtype=self.z.dtype).to(self.z.device)
        amplitude = self.plan.noise * self.z.detach().abs().max()
        return self.scale * network(self.z + amplitude * (2 * uniform - 1)).mean(dim=0, keepdim=True)

    def penalty(self, x: Tensor) -> Tensor | float:
        """Returns the weighted distance of image and input."""
        return self.plan.weight * self.data.distance(x - self.scale * self.z)

    def parameters(self) -> list[dict[str, Any]]:
        """Returns the input."""
        return [{"params": [self.z], "lr": self.plan.input_learning_rate}]


@torch.no_grad()
def first_image(start: Start | None, data: CaseData, generator: torch.Generator, what: str) -> Tensor:
    """Returns the image with which a fit begins, made of the rows that it sees; by default their direct inverse.

    An estimate is taken at the scale that fits them best (`fit_scale`), a given image as it is.

    Raises:
        InputError: It is no image of the operator.
    """
    if start is None:
        return data.baseline
    x = check_image(start(data.fitted_y, data.fitted_operator, 0.0, [generator]).to(data.y), data.operator, what)
    return fit_scale(x, data.fitted_operator, data.fitted_y) if isinstance(start, EstimateStart) else x
