"""The one sampling loop, and the methods that put a (schedule, conditioning, transition) into it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invrecon.errors import InputError
from invrecon.methods.base import (
    Estimate,
    Method,
    check_complex_range,
    check_generators,
    check_measurement,
    check_prior,
    check_range,
    relative_residual,
)
from invrecon.methods.conditioning import Conditioning, Denoiser, ProximalConditioning
from invrecon.methods.counting import Counter, CountingPrior, count_calls
from invrecon.methods.schedule import GeometricSchedule, KarrasSchedule, Schedule
from invrecon.methods.start import NoiseStart, NoisyEstimateStart, Start
from invrecon.methods.transitions import AcceleratedRenoise, DenoisedTransition, Langevin, Transition
from invrecon.rng import randn, spawn

if TYPE_CHECKING:
    from invrecon.operators.base import LinearOperator
    from invrecon.priors.base import Prior


def diffuse(
    x: Tensor,
    denoise: Denoiser,
    schedule: Schedule,
    transition: Transition,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Runs the reverse diffusion from the state `x` at `schedule.sigma_max` down to a clean image.

    Every diffusion sampler of the package is this loop. At the last level `sigma_next = 0`, so DDIM-type
    transitions return the last estimate itself.

    Args:
        x: The first state, `(B, C, *spatial)`.
        denoise: The (conditional) denoiser.
        schedule: The noise levels.
        transition: The update.
        generators: One generator a sample.
    """
    step = transition.begin()
    for sigma, sigma_next in schedule.steps():
        x0 = denoise(x, sigma, generators=generators)
        x = step(x, x0, sigma, sigma_next, generators)
    return x


def check_ladder(schedule: Schedule, transition: Transition) -> None:
    """Raises `InputError` if levels are to be revisited by a transition that leaves them."""
    if schedule.num_inner > 1 and not transition.stays_at_level:
        raise InputError(
            f"{type(transition).__name__} goes to the next level at once, so num_inner has to be 1, got "
            f"{schedule.num_inner}; use Langevin to update several times at a level."
        )


def check_pair(conditioning: Conditioning, transition: Transition) -> None:
    """Raises `InputError` if a transition is given other estimates than its step is made of."""
    while isinstance(transition, DenoisedTransition):
        transition = transition.transition
    if conditioning.estimate not in transition.estimates:
        fitting = {"posterior": "ProximalConditioning", "prior": "Unconditional", "reflection": "ReflectedConditioning"}
        names = " or ".join(fitting[estimate] for estimate in sorted(transition.estimates))
        raise InputError(
            f"{type(transition).__name__} stands after {names}, not after {type(conditioning).__name__}, where its "
            "step would lead elsewhere: take another transition, or a method that has both."
        )


def check_free(transition: Transition) -> None:
    """Raises `InputError` if a transition makes no step without a measurement."""
    if transition.needs_measurement:
        raise InputError(
            f"{type(transition).__name__} is the step of a reconstruction: without data take DDIM or Langevin."
        )


def sample_prior(
    prior: Denoiser,
    shape: Sequence[int],
    generators: Sequence[torch.Generator],
    schedule: Schedule,
    transition: Transition,
    like: Tensor | None = None,
) -> Tensor:
    """Returns unconditional samples `(len(generators), *shape)` of the prior.

    Args:
        prior: The denoiser.
        shape: Shape of one image, `(C, H, W)`.
        generators: One generator a sample.
        schedule: The noise levels; `sigma_max` has to dwarf the images.
        transition: The update.
        like: Gives dtype and device; float32 on the CPU if None.
    """
    check_ladder(schedule, transition)
    check_free(transition)
    with torch.no_grad():
        x = schedule.sigma_max * randn(tuple(shape), generators, torch.empty(0) if like is None else like)
        return diffuse(x, prior, schedule, transition, generators)


def repeat_cases(operator: LinearOperator, num_cases: int, num: int) -> LinearOperator:
    """Returns `operator` for a batch in which each of the `num_cases` cases comes `num` times in a row."""
    if num == 1:
        return operator
    return operator.select_cases(torch.arange(num_cases).repeat_interleave(num), num_cases)


class Sampler(Method):
    """Draws images from (an approximation of) the posterior by reverse diffusion.

        x0 = conditional(x, sigma),    x' = transition(x, x0, sigma, sigma')

    The state has the image's own size: an image's surroundings, where a patch prior needs them, are the
    prior's business (it pads with noise of the current level, the distribution in which it was trained).

    `len(schedule)` evaluations, times those of the conditioning. Asks of the operator and of the prior what
    conditioning, transition and start ask.

    Source: see its parts.

    Args:
        schedule: The noise levels.
        conditioning: What the measurement does to the denoiser.
        transition: From one level to the next.
        start: The first state; pure noise if None.
        num_samples: Samples a case; with more than one, the estimate is their mean, with a standard
            deviation.
        samples_per_batch: How many samples of each case run at once, to bound memory; all if None. The result
            does not depend on it.
        clip: Range to which every sample is clipped at the end, or None.

    Raises:
        InputError: A count below 1, or `num_inner > 1` with a transition that leaves its level.
    """

    needs_prior = True

    def __init__(
        self,
        schedule: Schedule,
        conditioning: Conditioning,
        transition: Transition,
        start: Start | None = None,
        num_samples: int = 1,
        samples_per_batch: int | None = None,
        clip: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        if num_samples < 1:
            raise InputError(f"num_samples is {num_samples}, but at least one sample is needed.")
        if samples_per_batch is not None and samples_per_batch < 1:
            raise InputError(f"samples_per_batch is {samples_per_batch}, but it has to be at least 1.")
        check_ladder(schedule, transition)
        check_pair(conditioning, transition)
        check_range("clip", clip)
        self.schedule = schedule
        self.conditioning = conditioning
        self.transition = transition
        self.start = NoiseStart() if start is None else start
        self.num_samples = num_samples
        self.samples_per_batch = samples_per_batch
        self.clip = clip

    @property
    def num_evaluations(self) -> int:
        """Denoiser evaluations for one sample: those of the conditioning, at every update."""
        return len(self.schedule) * self.conditioning.num_evaluations

    @torch.no_grad()
    def __call__(
        self,
        y: Tensor,
        operator: LinearOperator,
        prior: Prior | None = None,
        *,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Estimate:
        """Reconstructs a batch; see `Method.__call__`."""
        prior = check_prior(self, prior)
        check_measurement(y, operator)
        check_complex_range(self, "clip", self.clip, operator)
        num_cases, num_samples = y.shape[0], self.num_samples
        chains = spawn(check_generators(generators, num_cases), num_samples)
        chunk = num_samples if self.samples_per_batch is None else min(self.samples_per_batch, num_samples)

        evaluations, calls = Counter(), Counter()
        counted = CountingPrior(prior, evaluations)
        drawn = []
        for first in range(0, num_samples, chunk):
            num = min(chunk, num_samples - first)
            # `chains` is sample-major: those of case b are chains[b * num_samples : (b + 1) * num_samples].
            own = [chains[b * num_samples + s] for b in range(num_cases) for s in range(first, first + num)]
            physics = count_calls(repeat_cases(operator, num_cases, num), calls)
            x = self._draw(y.repeat_interleave(num, dim=0), physics, counted, own)
            drawn.append(x.reshape(num_cases, num, *x.shape[1:]))
        samples = torch.cat(drawn, dim=1)
        mean = samples.mean(dim=1)
        several = num_samples > 1
        num_chunks = len(drawn)
        return Estimate(
            mean=mean,
            samples=samples if several else None,
            std=samples.std(dim=1) if several else None,
            stats={
                "num_evaluations": evaluations.num_calls / num_chunks,
                "num_operator_calls": calls.num_calls / num_chunks,
                "num_samples": float(num_samples),
                "relative_residual": relative_residual(operator, mean, y),
            },
        )

    def _draw(
        self, y: Tensor, operator: LinearOperator, prior: CountingPrior, generators: Sequence[torch.Generator]
    ) -> Tensor:
        x = self.start(y, operator, self.schedule.sigma_max, generators)
        denoise = self.conditioning.along(self.schedule, self.transition)(prior, operator, y)
        transition = self.transition.bind(prior.last, operator, y)
        x = diffuse(x, denoise, self.schedule, transition, generators)
        return x if self.clip is None else x.clamp(*self.clip)


class ProximalDiffusion(Sampler):
    """The fast sampler: one evaluation a level, proximal data conditioning, little noise and momentum between levels.

        x0 = prox(D(x, sigma)),    x' = x0 + momentum (x0 - x0_before) + noise sigma' n

    No gradient goes through the network, and the reverse diffusion begins at a modest noise level from the operator's
    direct inverse. The default transition (`AcceleratedRenoise`) gives an estimate, close to the posterior mean in
    quality, whose samples hardly spread. For samples and their `std` take `transition=DDIM`, `num_levels=50`,
    `sigma_max=10`, `noise_factor=1` and a prior of all levels: on a Gaussian problem their variance is 0.8 of the
    posterior's in the measured directions and 0.9 in the null space (tests/methods/test_posterior.py), and one sample
    is several dB worse. All of it is needed. `noise_factor=5` leaves 0.2 of the variance in the measured directions.
    `sigma_max=0.3` leaves 0.2 in the null space: where the prior spreads further than the first level, samples stay
    near the start.

    One evaluation a level (32), `2 + 2 k` operator calls for `k` CG iterations. Asks of the operator its adjoint and a
    direct inverse for the start, of the prior nothing but `D`.

    Source: Chung, Lee & Ye, DDS, ICLR 2024 (data step); Zhu et al., DiffPIR, CVPR Workshops 2023 (weight by noise
    level, share of noise); Polyak 1964 (momentum); Chung, Sim & Ye, CVPR 2022 (start); Karras et al., NeurIPS 2022
    (levels).

    Args:
        num_levels: Noise levels, and so denoiser evaluations.
        sigma_max: First noise level, in intensity units. It has to exceed the start's error: 0.1 is twice that of
            filtered back-projection from 20 views; from fewer than ten take 0.3.
        sigma_min: Last noise level.
        rho: Exponent of the Karras schedule.
        cg_iterations: CG iterations of the data step.
        max_weight: Cap of the data step's weight, in units of `1 / ||A||^2`.
        noise_factor: Assumed variance of the image given the state, in units of `sigma^2`.
        transition: From one level to the next; `AcceleratedRenoise` if None.
        start: The first state; the clipped direct inverse with noise if None.
        num_samples: Samples a case.
        samples_per_batch: How many samples of each case run at once; all if None.
        clip: Range to which samples are clipped at the end, or None.
    """

    def __init__(
        self,
        num_levels: int = 32,
        sigma_max: float = 0.1,
        sigma_min: float = 0.002,
        rho: float = 7.0,
        cg_iterations: int = 10,
        max_weight: float = 1000.0,
        noise_factor: float = 5.0,
        transition: Transition | None = None,
        start: Start | None = None,
        num_samples: int = 1,
        samples_per_batch: int | None = None,
        clip: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        super().__init__(
            schedule=KarrasSchedule(num_levels, sigma_max, sigma_min, rho),
            conditioning=ProximalConditioning(cg_iterations, max_weight, noise_factor),
            transition=AcceleratedRenoise() if transition is None else transition,
            start=NoisyEstimateStart() if start is None else start,
            num_samples=num_samples,
            samples_per_batch=samples_per_batch,
            clip=clip,
        )


class UnconditionalSampler(Method):
    """Samples of the prior alone: what the network knows before any measurement.

        x <- x + (epsilon / 2) (D(x, sigma) - x) + sqrt(epsilon) sigma z    from pure noise, with the default transition

    The measurement is ignored and may be None; as many images are drawn as there are generators.

    One evaluation an update (300), no operator calls; no gradient through the network. Asks of the operator nothing but
    the shape of its images, of the prior nothing but `D`.

    Source: Song & Ermon, NeurIPS 2019, Alg. 1, with the step rule of Hu et al., PaDIS, NeurIPS 2024 (see `Langevin`).

    Args:
        schedule: Noise levels; 300 geometric ones from 10 to 0.002 if None.
        transition: The update; Langevin with `epsilon = 1` if None.
        clip: Range to which samples are clipped at the end, or None.
    """

    needs_prior = True

    def __init__(
        self,
        schedule: Schedule | None = None,
        transition: Transition | None = None,
        clip: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        self.schedule = GeometricSchedule(300, 10.0, 0.002) if schedule is None else schedule
        self.transition = Langevin(epsilon=1.0) if transition is None else transition
        self.clip = clip
        check_range("clip", clip)
        check_ladder(self.schedule, self.transition)
        check_free(self.transition)

    @property
    def num_evaluations(self) -> int:
        """Denoiser evaluations for one image: one an update."""
        return len(self.schedule)

    def __call__(
        self,
        y: Tensor | None,
        operator: LinearOperator,
        prior: Prior | None = None,
        *,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Estimate:
        """Draws one image of shape `operator.image_shape` per generator."""
        check_complex_range(self, "clip", self.clip, operator)
        counter = Counter()
        counted = CountingPrior(check_prior(self, prior), counter)
        if generators is None:
            generators = check_generators(None, 1 if y is None else y.shape[0])
        like = torch.empty(0, dtype=operator.dtype, device=operator.device) if y is None else y
        x = sample_prior(counted, operator.image_shape, generators, self.schedule, self.transition, like)
        x = x if self.clip is None else x.clamp(*self.clip)
        return Estimate(mean=x, stats={"num_evaluations": float(counter.num_calls), "num_operator_calls": 0.0})
