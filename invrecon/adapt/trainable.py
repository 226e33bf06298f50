"""What of a network adapts: all its weights, its biases, or low-rank corrections beside frozen weights."""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from invrecon.errors import InputError
from invrecon.priors.base import Prior
from invrecon.rng import make_generator


class Trainable(ABC):
    """What of a network adapts; a plain object that holds only its knobs."""

    @abstractmethod
    def attach(self, network: nn.Module) -> list[nn.Parameter]:
        """Frees, or adds, what adapts in a frozen network, in place, and returns it.

        Raises:
            InputError: Nothing of the network would adapt.
        """


class AllWeights(Trainable):
    """Every parameter adapts."""

    def attach(self, network: nn.Module) -> list[nn.Parameter]:
        """Frees every parameter."""
        return _free(network.parameters())


class Biases(Trainable):
    """Every bias adapts, those of normalisations too, and nothing else.

    Args:
        norms: Whether the gains of normalisations adapt as well.
        exclude: Regular expression; modules whose dotted name it matches anywhere stay frozen; None excludes none. By
            default the noise embedding of our networks, of guided diffusion's and of EDM's.

    Raises:
        InputError: `exclude` is no regular expression.
    """

    def __init__(self, norms: bool = False, exclude: str | None = "embedding|^time_embed|^map_") -> None:
        self.norms = norms
        self.exclude = exclude
        self._excluded = None if exclude is None else _pattern(exclude, "Biases: exclude")

    def attach(self, network: nn.Module) -> list[nn.Parameter]:
        """Frees the biases."""
        free = []
        for name, module in network.named_modules():
            if self._excluded is not None and self._excluded.search(name):
                continue
            gains = self.norms and isinstance(module, nn.GroupNorm | nn.LayerNorm | nn.BatchNorm2d)
            chosen = {"weight", "bias"} if gains else {"bias"}
            free += [p for key, p in module.named_parameters(recurse=False) if key in chosen]
        if not free:
            raise InputError(
                f"Biases: outside of '{self.exclude}' the network has no bias; name fewer modules to exclude."
            )
        return _free(free)


class LoRA(Trainable):
    r"""Low-rank corrections of convolutions and linear layers; their own weights stay frozen.

    $$ W' = W + s\, U V, \quad U \in R^{out \times r}, \; V \in R^{r \times in\,k\,k} $$

    which for a convolution is a second one with the same kernel size into `r` channels, and a 1x1 convolution from
    there. `V ~ N(0, 1/r^2)` and `U = 0`, so the network starts as it was, bit for bit; `r (in k k + out)` numbers adapt
    in every layer.

    Source: Hu et al., "LoRA: Low-rank adaptation of large language models", ICLR 2022, Eq. 3; for convolutions and
    with this initialisation as in Barbano, Denker et al., "Steerable conditional diffusion", IEEE TMI 2025.

    Args:
        rank: `r`.
        layers: Regular expression; layers whose dotted name it matches anywhere adapt.
        scale: `s`.
        biases: Whether all biases adapt too, except those of the noise embedding (`Biases`).
        seed: Of `V`, a function of it and of the layer's name alone.

    Raises:
        InputError: A rank below 1, a scale of 0, or `layers` is no regular expression.
    """

    def __init__(
        self, rank: int = 4, layers: str = ".", scale: float = 1.0, biases: bool = False, seed: int = 0
    ) -> None:
        if rank < 1:
            raise InputError(f"LoRA: rank is {rank}, but it has to be at least 1.")
        if scale == 0:
            raise InputError("LoRA: scale is 0, so nothing could adapt; give another number.")
        self.rank = rank
        self.layers = layers
        self.scale = float(scale)
        self.biases = biases
        self.seed = seed
        self._chosen = _pattern(layers, "LoRA: layers")

    def attach(self, network: nn.Module) -> list[nn.Parameter]:
        """Adds the corrections.

        Raises:
            InputError: No layer of the network matches `layers`.
        """
        kinds = nn.Conv1d | nn.Conv2d | nn.Linear
        layers = {name: module for name, module in network.named_modules() if isinstance(module, kinds)}
        chosen = {name: module for name, module in layers.items() if self._chosen.search(name)}
        if not chosen:
            some = ", ".join(list(layers)[:: max(1, len(layers) // 5)]) or "none"
            raise InputError(f"LoRA: layers '{self.layers}' matches no layer of the network; among its layers: {some}.")
        parameters: list[nn.Parameter] = []
        for name, layer in chosen.items():
            correction = LowRank(layer.weight, self.rank, self.scale, make_generator(self.seed, "LoRA", name))
            parametrize.register_parametrization(layer, "weight", correction)
            parameters += [correction.up, correction.down]
        return parameters + (Biases().attach(network) if self.biases else [])


class LowRank(nn.Module):
    """`W -> W + scale * up @ down`, in the shape and precision of `W`.

    Args:
        weight: `W`, `(out, in, *kernel)`.
        rank: Columns of `up`.
        scale: Factor of the correction.
        generator: Draws `down`.
    """

    def __init__(self, weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        num_outputs, num_inputs = weight.shape[0], weight.shape[1:].numel()
        self.scale = scale
        self.up = nn.Parameter(weight.new_zeros(num_outputs, rank))
        self.down = nn.Parameter((torch.randn(rank, num_inputs, generator=generator) / rank).to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the corrected weight."""
        with torch.autocast(weight.device.type, enabled=False):  # it would round the small correction
            return weight + self.scale * (self.up @ self.down).reshape(weight.shape)


def adapted_copy(prior: Prior, trainable: Trainable) -> tuple[Prior, list[nn.Parameter]]:
    """Returns a copy of a prior in which only `trainable` can change, and the parameters that can.

    The copy shares no memory with the prior, which therefore stays as it is whatever happens to the copy. It is in
    evaluation mode: no dropout while adapting.

    Raises:
        InputError: The prior has no network, or nothing of it would adapt.
    """
    _network(prior)
    adapted = copy.deepcopy(prior).requires_grad_(False)
    adapted.zero_grad(set_to_none=True)
    parameters = trainable.attach(_network(adapted))
    return adapted.eval(), parameters


def num_parameters(parameters: Iterable[Tensor]) -> int:
    """Returns how many numbers the parameters hold."""
    return sum(p.numel() for p in parameters)


@torch.no_grad()
def movement(prior: Prior, adapted: Prior) -> dict[str, float]:
    """Returns how far every layer of the network has moved, `||w - w0|| / ||w0||`, by its dotted name.

    `w` are the weights in effect, low-rank corrections added, and the biases of one layer in one vector. A layer that
    stayed where it was has 0; one that left zero has infinity.
    """
    before, after = _effective(_network(prior)), _effective(_network(adapted))
    distance = {name: (after[name] - w).norm() for name, w in before.items()}
    return {name: float(d / before[name].norm()) if d > 0 else 0.0 for name, d in distance.items()}


def _effective(network: nn.Module) -> dict[str, Tensor]:
    """Returns each layer's own parameters, as its forward pass sees them, in one vector."""
    layers = {}
    for name, module in network.named_modules():
        if "parametrizations" in name.split("."):
            continue
        keys = [key for key, _ in module.named_parameters(recurse=False)]
        if parametrize.is_parametrized(module):
            keys += list(module.parametrizations)  # type: ignore[arg-type]
        if keys:
            layers[name] = torch.cat([getattr(module, key).flatten().double() for key in sorted(keys)])
    return layers


def _network(prior: Prior) -> nn.Module:
    network = getattr(getattr(prior, "denoiser", None), "network", None)
    if not isinstance(network, nn.Module):
        raise InputError(f"{type(prior).__name__} has no network that could adapt; use a WholePrior or a PatchPrior.")
    return network


def _free(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    free = list(parameters)
    if not free:
        raise InputError("The network has no parameter that could adapt.")
    for parameter in free:
        parameter.requires_grad_(True)
    return free


def _pattern(text: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise InputError(f"{where} is '{text}', which is no regular expression ({error}).") from error
