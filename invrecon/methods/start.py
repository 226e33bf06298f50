"""Starts: the state in which a sampler begins."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invrecon.methods.base import Method
from invrecon.methods.classical import FBP
from invrecon.rng import randn

if TYPE_CHECKING:
    from invrecon.operators.base import LinearOperator


LEAST_NOISE = 1.0  # below an image's own intensity noise surely does not hide that there is none


class Start(ABC):
    """Gives the first state of a sampler."""

    @abstractmethod
    def __call__(
        self, y: Tensor, operator: LinearOperator, sigma: float, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Returns the state `(B, *operator.image_shape)` at noise level `sigma`."""


class NoiseStart(Start):
    """Pure noise, `x = sigma n`: right where `sigma` dwarfs the image; below an image's own intensity it warns."""

    def __call__(
        self, y: Tensor, operator: LinearOperator, sigma: float, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Returns `sigma n`."""
        if sigma < LEAST_NOISE:
            warnings.warn(
                f"A method that starts from pure noise was given a first noise level of {sigma:g}, below the image's "
                "own intensity of 1: it begins with an image of noise. Raise the first level (--model.method.sigma_max "
                "of methods that have it; 10 is common), or start from an estimate (--model.method.start).",
                stacklevel=2,
            )
        return sigma * randn(tuple(operator.image_shape), generators, y)


class EstimateStart(Start):
    """Another method's estimate, as it is: `x = x_hat`.

    Args:
        method: A method that needs no prior; if None the operator's direct inverse, clipped to [0, 1] unless images are
            complex.
    """

    def __init__(self, method: Method | None = None) -> None:
        self.method = FBP(clip=(0.0, 1.0)) if method is None else method
        self._default = method is None

    def __call__(
        self, y: Tensor, operator: LinearOperator, sigma: float, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Returns `x_hat`."""
        # Half of a complex image is negative: by default nothing of it is clipped.
        method = FBP(clip=None) if self._default and operator.complex_images else self.method
        return method(y, operator).mean


class NoisyEstimateStart(EstimateStart):
    """Another method's estimate with noise, `x = x_hat + sigma n`: skips the levels above `sigma`.

    Sound where the estimate's error is below `sigma` and the levels that follow can still mend its artefacts
    (Chung, Sim & Ye, "Come-closer-diffuse-faster", CVPR 2022).
    """

    def __call__(
        self, y: Tensor, operator: LinearOperator, sigma: float, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Returns `x_hat + sigma n`."""
        x = super().__call__(y, operator, sigma, generators)
        return x + sigma * randn(x.shape[1:], generators, x)


class GivenStart(Start):
    """An image that is at hand, with some of the level's noise: `x = x_hat + noise sigma n`.

    Args:
        estimate: `x_hat`, `(B, C, H, W)`; of `k B` states in a batch each `k` in a row begin with the same one.
        noise: Share of the noise, in [0, 1].
    """

    def __init__(self, estimate: Tensor, noise: float = 1.0) -> None:
        self.estimate, self.noise = estimate, noise

    def __call__(
        self, y: Tensor, operator: LinearOperator, sigma: float, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Returns `x_hat + noise sigma n`."""
        x = self.estimate.repeat_interleave(len(y) // len(self.estimate), dim=0)
        return x + self.noise * sigma * randn(x.shape[1:], generators, x)
