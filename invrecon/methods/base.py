"""What a method is, and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invrecon.errors import InputError

if TYPE_CHECKING:
    from invrecon.operators.base import LinearOperator
    from invrecon.priors.base import Prior

Stats = dict[str, float | list[float]]


@dataclass
class Estimate:
    """A reconstruction, its uncertainty where there is one, and what it cost.

    Attributes:
        mean: The estimate, `(B, C, H, W)`; with several posterior samples, their mean.
        samples: Posterior samples `(B, S, C, H, W)`, or None for a single one.
        std: Pixelwise standard deviation over the samples (unbiased), `(B, C, H, W)`, or None.
        stats: What was measured on the way. A float holds for the whole batch, a list has one number a case.
            `num_evaluations`: denoiser evaluations per posterior sample; `num_operator_calls`: applications
                of `A`
            or `A^T` per posterior sample; `relative_residual`: `||A mean - y|| / ||y||`.
    """

    mean: Tensor
    samples: Tensor | None = None
    std: Tensor | None = None
    stats: Stats = field(default_factory=dict)


class Method(ABC):
    """Turns measurements `y` into images, given the physics and (where needed) a prior.

    Constructor arguments are the method's knobs; a method holds no state between calls.

    Attributes:
        needs_prior: Whether the method cannot work without a denoiser.
        needs_gradient: Whether it takes gradients through the denoiser: two to three times the memory and the time of
            an evaluation.
        needs_spectrum: Whether it needs the operator's singular system, `operator.spectrum()`.
        samples_posterior: Whether its samples are meant to be draws from the posterior, with its spread; those of the
            others lie closer together, and are estimates.
    """

    needs_prior: bool = False
    needs_gradient: bool = False
    needs_spectrum: bool = False
    samples_posterior: bool = False

    @property
    def num_evaluations(self) -> int:
        """Denoiser evaluations for one sample."""
        return 0

    @property
    def highest_level(self) -> float:
        """The highest noise level at which the prior is asked; 0 where there is none.

        Of `self.schedule`, where there is one. Methods that take their level from elsewhere say so here: a prior is
        chosen, and its user warned, by this number.
        """
        schedule = getattr(self, "schedule", None)
        return 0.0 if schedule is None else float(max(schedule.sigmas))

    @abstractmethod
    def __call__(
        self,
        y: Tensor,
        operator: LinearOperator,
        prior: Prior | None = None,
        *,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Estimate:
        """Reconstructs a batch.

        Args:
            y: Measurements `(B, *operator.measurement_shape)`.
            operator: The physics, bound to these cases (`operator.bind(case)`).
            prior: The denoiser `D(x, sigma)`; ignored by methods that need none.
            generators: One generator a case. None stands for a fixed one, the same for every case.

        Raises:
            InputError: `y` does not fit the operator, or a needed prior is missing.
        """


def check_generators(generators: Sequence[torch.Generator] | None, num_cases: int) -> Sequence[torch.Generator]:
    """Returns one generator a case, all equally seeded if there are none: a case never depends on its batch.

    Raises:
        InputError: There are generators, but not one a case.
    """
    if generators is None:
        return [torch.Generator().manual_seed(0) for _ in range(num_cases)]
    if len(generators) != num_cases:
        raise InputError(f"A batch of {num_cases} cases needs as many generators, got {len(generators)}.")
    return generators


def check_range(name: str, bounds: tuple[float, float] | None) -> None:
    """Raises `InputError` unless `bounds` is None or a rising pair."""
    if bounds is not None and not bounds[0] < bounds[1]:
        raise InputError(f"{name} is {tuple(bounds)}, but a range (low, high) with low < high is expected.")


def check_complex_range(
    owner: object, name: str, bounds: tuple[float, float] | None, operator: LinearOperator, instead: str = "null"
) -> None:
    """Raises `InputError` if a range leaves complex images no negative real and imaginary parts (or no positive ones).

    Args:
        owner: Whose range it is.
        name: The argument's.
        bounds: The range, or None.
        operator: The physics.
        instead: What the argument should be.
    """
    if operator.complex_images and bounds is not None and not bounds[0] < 0 < bounds[1]:
        raise InputError(
            f"{type(owner).__name__}: {name} is {tuple(bounds)}, but {type(operator).__name__} has complex images, "
            f"whose real and imaginary parts may be negative: set {name} to {instead}."
        )


def check_measurement(y: Tensor, operator: LinearOperator) -> None:
    """Raises `InputError` unless `y` is a finite real batch of the operator's measurements."""
    expected = tuple(operator.measurement_shape)
    if y.ndim != len(expected) + 1 or tuple(y.shape[1:]) != expected:
        raise InputError(
            f"The measurement has shape {tuple(y.shape)}, but {type(operator).__name__} measures "
            f"(batch, {', '.join(map(str, expected))}): use the operator that made it."
        )
    if not y.is_floating_point():
        raise InputError(f"The measurement has dtype {y.dtype}, but a real floating-point tensor is expected.")
    if not torch.isfinite(y).all():
        raise InputError("The measurement holds NaN or Inf: mask or repair those entries first.")


def check_prior(method: Method, prior: Prior | None) -> Prior:
    """Returns `prior`, or raises `InputError` if the method has to do without."""
    if prior is None:
        raise InputError(
            f"{type(method).__name__} needs a prior and got none: give a prior file (--model.prior), or use "
            "a method that needs no prior, such as FBP or TotalVariation."
        )
    return prior


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Reshapes `(B,)` to `(B, 1, ..., 1)` so that it broadcasts against `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def channel_magnitude(x: Tensor, complex_images: bool) -> Tensor:
    """Returns `|x|`: that of every channel, `(B, C, *S)`, or `(B, 1, *S)` if two are the parts of a complex number."""
    return x.square().sum(dim=1, keepdim=True).sqrt() if complex_images else x.abs()


def norm_per_sample(x: Tensor) -> Tensor:
    """Returns the Euclidean norm of every sample, shape `(B,)`."""
    return x.flatten(1).norm(dim=1)


def relative_residual(operator: LinearOperator, x: Tensor, y: Tensor) -> list[float]:
    """Returns `||A x - y|| / ||y||` for every sample (the absolute residual where `y = 0`)."""
    scale = norm_per_sample(y)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (norm_per_sample(operator(x) - y) / scale).tolist()
