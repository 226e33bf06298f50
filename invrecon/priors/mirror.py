"""A prior asked about images or about their mirror images, by turns: what it has of left and right evens out."""

from __future__ import annotations

import torch
from torch import Tensor

from invrecon.priors.base import Cotangent, Prior, broadcast
from invrecon.rng import Generators, make_generators


class MirroredPrior(Prior):
    r"""Asks a prior about the image or about its mirror image, left and right exchanged, at random.

    $$ D'(x, \sigma) = M D(M x, \sigma), \quad M = \text{identity or mirror, each with probability } 1/2 $$

    drawn anew for every sample and evaluation, at no cost. Where the truth's mirror image is as plausible, as it is at
    the low noise levels of a reconstruction, errors that the network makes on one side only do not add up over the
    levels.

    Source: Terris, Moreau, Pustelnik & Tachella, "Equivariant plug-and-play image reconstruction", CVPR 2024 (a random
    transform a step, of a group under which images are invariant).

    Args:
        prior: The prior that is asked.
    """

    def __init__(self, prior: Prior) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, x: Tensor, sigma: float | Tensor, *, generators: Generators | None = None) -> Tensor:
        """Returns `M D(M x)`."""
        mirror, generators = self._draw(x, generators)
        return _turn(self.prior(_turn(x, mirror), sigma, generators=generators), mirror)

    def denoise_vjp(
        self, x: Tensor, sigma: float | Tensor, cotangent: Cotangent, *, generators: Generators | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns `M D(M x)` and `M J_D(M x)^T M v`."""
        mirror, generators = self._draw(x, generators)
        turned = self.prior.denoise_vjp(
            _turn(x, mirror), sigma, lambda d: _turn(cotangent(_turn(d, mirror)), mirror), generators=generators
        )
        return _turn(turned[0], mirror), _turn(turned[1], mirror)

    def backpropagate(
        self, x: Tensor, sigma: float | Tensor, cotangent: Cotangent, *, generators: Generators | None = None
    ) -> Tensor:
        """Returns `M D(M x)` and adds `J_theta(M x)^T M v` to the `.grad` of the prior's parameters."""
        mirror, generators = self._draw(x, generators)
        denoised = self.prior.backpropagate(
            _turn(x, mirror), sigma, lambda d: _turn(cotangent(_turn(d, mirror)), mirror), generators=generators
        )
        return _turn(denoised, mirror)

    @staticmethod
    def _draw(x: Tensor, generators: Generators | None) -> tuple[Tensor, Generators]:
        generators = make_generators(0, [str(i) for i in range(len(x))]) if generators is None else generators
        draws = [bool(torch.rand((), generator=generator) < 0.5) for generator in generators]
        return torch.tensor(draws, device=x.device), generators


def _turn(x: Tensor, mirror: Tensor) -> Tensor:
    return torch.where(broadcast(mirror, x), x.flip(-1), x)
