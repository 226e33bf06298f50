"""Thin wrappers that measure what a method spends: denoiser evaluations and operator calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from invrecon.operators.base import LinearOperator
    from invrecon.priors.base import Prior


@dataclass
class Counter:
    """A tally of calls on whole batches."""

    num_calls: int = 0


class CountingPrior:
    """A denoiser that counts its evaluations and keeps the last; one with a vector-Jacobian product counts as one."""

    def __init__(self, prior: Prior, counter: Counter) -> None:
        self.prior = prior
        self.counter = counter
        self._denoised: Tensor | None = None

    def last(self, x: Tensor, sigma: float) -> Tensor:
        """Returns the last evaluation, which was at this state."""
        assert self._denoised is not None, "nothing was evaluated yet"
        return self._denoised

    def __call__(
        self, x: Tensor, sigma: float | Tensor, *, generators: Sequence[torch.Generator] | None = None
    ) -> Tensor:
        """Returns `D(x, sigma)`."""
        self.counter.num_calls += 1
        self._denoised = self.prior(x, sigma, generators=generators)
        return self._denoised

    def denoise_vjp(
        self,
        x: Tensor,
        sigma: float | Tensor,
        cotangent: Callable[[Tensor], Tensor],
        *,
        generators: Sequence[torch.Generator] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns `D(x, sigma)` and `J_D(x)^T cotangent(D(x, sigma))`."""
        self.counter.num_calls += 1
        self._denoised, gradient = self.prior.denoise_vjp(x, sigma, cotangent, generators=generators)
        return self._denoised, gradient

    def backpropagate(
        self,
        x: Tensor,
        sigma: float | Tensor,
        cotangent: Callable[[Tensor], Tensor],
        *,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """Returns `D(x, sigma)` and adds `J_theta^T cotangent(D(x, sigma))` to the `.grad` of its parameters."""
        self.counter.num_calls += 1
        return self.prior.backpropagate(x, sigma, cotangent, generators=generators)


def count_calls(operator: LinearOperator, counter: Counter) -> LinearOperator:
    """Returns a shallow copy of `operator` that counts applications of `A` and `A^T` (`A^T A` counts twice).

    Solvers that the operator inherits or overrides (`prox`, `pinv`) run on the copy, so what they really do
    is counted. The power iteration behind `norm()` is set-up, cached on the original, and not counted.
    """
    clone = operator._shallow_copy()

    def counting(function: Callable[..., Any], cost: int) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            counter.num_calls += cost
            return function(*args)

        return call

    def whiten(y: Tensor) -> tuple[LinearOperator, Tensor, Tensor | None]:
        weighted, y, std = operator.whiten(y)
        return count_calls(weighted, counter), y, std

    replaced = {
        "forward": counting(operator.forward, 1),
        "adjoint": counting(operator.adjoint, 1),
        "normal": counting(operator.normal, 2),
        "norm": operator.norm,
        "whiten": whiten,
    }
    for name, function in replaced.items():
        setattr(clone, name, function)
    return clone
