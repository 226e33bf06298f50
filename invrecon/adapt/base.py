"""What an adaptation is: a method that fits a copy of the prior to the measurement while it reconstructs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invrecon.errors import InputError
from invrecon.methods.base import Estimate
from invrecon.rng import Generators, derive_seed

if TYPE_CHECKING:
    from invrecon.adapt.suitability import SuitabilityTest
    from invrecon.methods.sampling import Sampler
    from invrecon.operators.base import LinearOperator
    from invrecon.priors.base import Prior


@dataclass
class Step:
    """One look at an adaptation: a round, or a noise level.

    Attributes:
        name: What it was, such as `round 2`.
        sigma: Its noise level, or None.
        data_loss: Mean square of `A x - y` over what the adaptation may see.
        held_out_loss: Of what was kept from it, weighed to stand for the image's error (`held_out_loss`), or None.
        image: The estimate at that point, `(C, H, W)` of one case, or None.
    """

    name: str
    sigma: float | None
    data_loss: float
    held_out_loss: float | None = None
    image: Tensor | None = None


@dataclass
class Trace:
    """How one adapter came to be.

    Attributes:
        steps: In order.
        stopped_at: Index of the step whose weights made the result; -1 for the weights before any adaptation.
        reason: Why there, in words.
        num_trainable: Number of adapted parameters.
        movement: By layer, `||w - w0|| / ||w0||`.
        verdict: What the test for an unsuited prior said, in words; empty without one.
        watched: Number, among the cases that share the adapter, of the one that alone the steps tell of; None if their
            losses are of all, and their images of the first.
    """

    steps: list[Step] = field(default_factory=list)
    stopped_at: int = -1
    reason: str = "not adapted"
    num_trainable: int = 0
    movement: dict[str, float] = field(default_factory=dict)
    verdict: str = ""
    watched: int | None = None


class Adaptation(ABC):
    """Fits a copy of the prior to one measurement, reconstructs with it, and forgets it.

    Constructor arguments are its knobs; it holds no state between calls and never touches the prior it is given.
    """

    @property
    def highest_level(self) -> float:
        """The highest noise level at which it asks the prior, beside those of the sampler."""
        return 0.0

    @abstractmethod
    def adapt(
        self, y: Tensor, operator: LinearOperator, prior: Prior, sampler: Sampler, generators: Generators
    ) -> tuple[Estimate, Trace]:
        """Reconstructs cases that share one adapter.

        Args:
            y: Measurements `(B, *operator.measurement_shape)`.
            operator: The physics, bound to these cases.
            prior: The prior; unchanged.
            sampler: The method that reconstructs.
            generators: One a case. What `sampler` draws from them is what it would draw without adaptation.
        """

    def __call__(
        self,
        y: Tensor,
        operator: LinearOperator,
        prior: Prior,
        sampler: Sampler,
        generators: Generators,
        *,
        pool: bool = False,
        suitability: SuitabilityTest | None = None,
    ) -> tuple[Estimate, list[Trace]]:
        """Reconstructs a batch: each case by its own adapter or, pooled, all of them by one.

        Args:
            y: Measurements `(B, *operator.measurement_shape)`.
            operator: The physics, bound to these cases.
            prior: The prior; unchanged.
            sampler: The method that reconstructs.
            generators: One a case.
            pool: Whether the cases share one adapter.
            suitability: Adapts only where this test finds the prior unsuited; everywhere if None.

        Returns:
            The estimate of the batch, and a trace a case (pooled: the same one).
        """
        if pool or len(y) == 1:
            estimate, trace = self._adapt_where_needed(y, operator, prior, sampler, generators, suitability)
            return estimate, [trace] * len(y)
        estimates, traces = [], []
        for b in range(len(y)):
            one = slice(b, b + 1)
            own = operator.select_cases(one, len(y))
            estimate, trace = self._adapt_where_needed(y[one], own, prior, sampler, generators[one], suitability)
            estimates.append(estimate)
            traces.append(trace)
        return join(estimates), traces

    def _adapt_where_needed(
        self,
        y: Tensor,
        operator: LinearOperator,
        prior: Prior,
        sampler: Sampler,
        generators: Generators,
        suitability: SuitabilityTest | None,
    ) -> tuple[Estimate, Trace]:
        if suitability is None:
            return self.adapt(y, operator, prior, sampler, generators)
        verdict = suitability(y, operator, prior, sampler, generators)
        if verdict.suited:
            estimate = sampler(y, operator, prior, generators=generators)
            trace = Trace(reason="not adapted: the prior suits the measurement")
        else:
            estimate, trace = self.adapt(y, operator, prior, sampler, generators)
        trace.verdict = str(verdict)
        return add_costs(estimate, verdict.stats), trace


def mean_cost(estimate: Estimate, key: str) -> float:
    """Returns what an estimate cost a case, such as its `num_evaluations`; 0 if it does not say."""
    value = estimate.stats.get(key, 0.0)
    return float(value) if isinstance(value, int | float) else sum(value) / len(value)


def add_costs(estimate: Estimate, costs: Mapping[str, float]) -> Estimate:
    """Returns an estimate whose stats count, for every case, what else was spent on it."""

    def plus(value: float | list[float], more: float) -> float | list[float]:
        return [own + more for own in value] if isinstance(value, list) else value + more

    return replace(estimate, stats=estimate.stats | {k: plus(estimate.stats.get(k, 0.0), v) for k, v in costs.items()})


def join(estimates: Sequence[Estimate]) -> Estimate:
    """Returns the estimates of several cases as one of a batch."""

    def cat(name: str) -> Tensor | None:
        tensors = [getattr(estimate, name) for estimate in estimates]
        return None if tensors[0] is None else torch.cat(tensors)

    stats: dict[str, float | list[float]] = {}
    for key in estimates[0].stats:
        values = [estimate.stats[key] for estimate in estimates]
        stats[key] = [v for value in values for v in (value if isinstance(value, list) else [value])]
    return Estimate(torch.cat([estimate.mean for estimate in estimates]), cat("samples"), cat("std"), stats)


def private_generator(generators: Generators, *keys: object) -> torch.Generator:
    """Returns a generator for the adaptation's own draws, a function of the cases' seeds and `keys` alone.

    Taken from the seeds and not from the streams: the sampler's draws stay what they are without adaptation.
    """
    seeds = [generator.initial_seed() for generator in generators]
    return torch.Generator().manual_seed(derive_seed(0, "adaptation", *seeds, *keys))


def private_generators(generators: Generators, *keys: object) -> list[torch.Generator]:
    """Returns one private generator a case."""
    return [private_generator([generator], *keys) for generator in generators]


def check_positive(**values: float) -> None:
    """Raises `InputError` unless every value is positive."""
    for name, value in values.items():
        if not value > 0:
            raise InputError(f"{name} of the adaptation is {value}, expected a positive number.")
