"""The one contract of every prior: a denoiser `D(x, sigma) = E[x0 | x0 + sigma n = x]`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from invrecon.rng import Generators

Cotangent = Callable[[Tensor], Tensor]


def per_sample(sigma: float | Tensor, x: Tensor) -> Tensor:
    """Returns `sigma` as a `(B,)` tensor with the dtype and device of `x` `(B, ...)`."""
    sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
    return sigma.expand(x.shape[0])


def broadcast(values: Tensor, x: Tensor) -> Tensor:
    """Returns `values` `(B,)` shaped `(B, 1, ..., 1)` so that it multiplies `x` `(B, ...)`."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


def pull_back(denoised: Tensor, v: Tensor) -> None:
    """Adds `J_theta^T v` to the `.grad` of every parameter that `denoised` depends on and that requires it.

    The graph is retained, until its last reference goes, because weights held by `torch.nn.utils.parametrize.cached`
    are part of several graphs.
    """
    if denoised.requires_grad:
        torch.autograd.backward(denoised, v.detach(), retain_graph=True)


class Prior(nn.Module, ABC):
    """A denoiser in variance-exploding coordinates, `x = x0 + sigma n`, `n ~ N(0, I)`.

    The score follows by Tweedie's formula, `s(x, sigma) = (D(x, sigma) - x) / sigma^2`.
    """

    @abstractmethod
    def forward(self, x: Tensor, sigma: float | Tensor, *, generators: Generators | None = None) -> Tensor:
        """Returns the posterior mean of the clean image.

        Args:
            x: Noisy images, `(B, C, *S)`.
            sigma: Noise standard deviation, a float or `(B,)`, in intensity units.
            generators: One generator a sample, for priors that draw (random patch shifts).

        Returns:
            `D(x, sigma)`, `(B, C, *S)`.
        """

    def denoise_vjp(
        self,
        x: Tensor,
        sigma: float | Tensor,
        cotangent: Cotangent,
        *,
        generators: Generators | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns `D(x)` and the vector-Jacobian product `J_D(x)^T v` with `v = cotangent(D(x))`.

        This is all that guidance by a gradient through the network needs: for `L(D(x))`, the cotangent is the
        gradient of `L` with respect to `D`, which the operator knows in closed form.

        Args:
            x: Noisy images, `(B, C, *S)`.
            sigma: Noise standard deviation, a float or `(B,)`.
            cotangent: Maps the detached `D(x)` to `v`, of the same shape.
            generators: One generator a sample.
        """
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            x0 = self(x, sigma, generators=generators)
            (gradient,) = torch.autograd.grad(x0, x, cotangent(x0.detach()))
        return x0.detach(), gradient

    def backpropagate(
        self,
        x: Tensor,
        sigma: float | Tensor,
        cotangent: Cotangent,
        *,
        generators: Generators | None = None,
    ) -> Tensor:
        """Returns `D(x)`, detached, and adds `J_theta^T v`, `v = cotangent(D(x))`, to its parameters' `.grad`.

        This is all that adaptation needs: for a loss `L(D_theta(x))`, the cotangent is the gradient of `L` with
        respect to `D`, and what is added is the gradient of `L` with respect to `theta`. Parameters that do not
        require a gradient are left alone.

        Args:
            x: Noisy images, `(B, C, *S)`.
            sigma: Noise standard deviation, a float or `(B,)`.
            cotangent: Maps the detached `D(x)` to `v`, of the same shape.
            generators: One generator a sample.
        """
        with torch.enable_grad():
            x0 = self(x.detach(), sigma, generators=generators)
            pull_back(x0, cotangent(x0.detach()))
        return x0.detach()
