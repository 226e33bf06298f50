"""Methods with the data step on the state itself, without the network's gradient: Langevin, predictor-corrector."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invrecon.errors import InputError
from invrecon.methods.base import norm_per_sample, per_sample
from invrecon.methods.conditioning import Conditioning, Denoiser, DifferentiableDenoiser, Unconditional
from invrecon.methods.sampling import Sampler
from invrecon.methods.schedule import GeometricSchedule, PairedSchedule
from invrecon.methods.start import Start
from invrecon.methods.transitions import Denoised, Langevin, ReverseSDE, Transition

if TYPE_CHECKING:
    from invrecon.operators.base import LinearOperator


class DirectGradient:
    """The likelihood's gradient at the state, as a step that goes with one of size `e` along the prior's score.

        g(x, e) = A^T (y - A x) / (||A||^2 + sigma_y^2 / e)

    For small `e` this is `e grad_x log p(y | x)`, the step of a sampler of the posterior; it never exceeds the gradient
    step `1 / ||A||^2`, which is what remains without noise. Where the noise differs between rays, rows are weighted
    first.

    Args:
        operator: The physics `A`, bound to these cases.
        y: Measurements.
    """

    def __init__(self, operator: LinearOperator, y: Tensor) -> None:
        self.operator, self.y, self.std = operator.whiten(y)
        self.squared_norm = self.operator.norm() ** 2

    def __call__(self, x: Tensor, e: float | Tensor) -> Tensor:
        """Returns `g`, for `e` a number or `(B,)`."""
        gradient = self.operator.adjoint(self.y - self.operator(x))
        if self.std is None:
            return gradient / self.squared_norm
        step = torch.as_tensor(e).to(x)
        return per_sample(step / (self.squared_norm * step + self.std.to(x) ** 2), x) * gradient


def _check_zeta(zeta: float) -> float:
    if not 0 < zeta < 2:
        raise InputError(f"zeta is {zeta}, but the data step is stable only between 0 and 2.")
    return float(zeta)


class DirectConditioning(Conditioning):
    """The denoised image plus a data step taken on the state: `x0 = D + (2 zeta / epsilon) g(x, epsilon sigma^2 / 2)`.

    Under Langevin steps of size `epsilon sigma^2` it moves the state by `zeta g` (see `DirectGradient`) beside the
    prior's step.

    Source: the Langevin baseline of Hu et al., PaDIS, NeurIPS 2024 (there `(zeta / ||r||) min(40, 200 sigma) A^T r`,
    whose length depends on the operator's scale and does not shrink with the residual).

    Args:
        zeta: Data step, dimensionless, below 2.
        epsilon: Langevin step in units of `sigma^2`.
    """

    def __init__(self, zeta: float, epsilon: float) -> None:
        self.zeta, self.epsilon = _check_zeta(zeta), float(epsilon)

    def __call__(self, prior: DifferentiableDenoiser, operator: LinearOperator, y: Tensor) -> Denoiser:
        """Returns the conditional denoiser."""
        gradient = DirectGradient(operator, y)

        def conditional(
            x: Tensor, sigma: float | Tensor, *, generators: Sequence[torch.Generator] | None = None
        ) -> Tensor:
            step = gradient(x, self.epsilon * sigma**2 / 2)
            return step.mul_(2 * self.zeta / self.epsilon).add_(prior(x, sigma, generators=generators))

        return conditional


class CorrectedTransition(Transition):
    """Predictor and corrector, each followed by a data step on the state it gives.

        predictor (sigma' < sigma):  x' = x + (sigma^2 - sigma'^2) s + sqrt(sigma^2 - sigma'^2) z
        corrector (sigma' = sigma):  x' = x + e s + sqrt(2 e) z
        then                         x <- x' + zeta g(x', e),    g as in `DirectGradient`

    with `s = (x0 - x) / sigma^2` and `e` the step along `s` just taken; the subclasses say what the corrector's is. It
    stands after `Unconditional` and on a `PairedSchedule`.

    Source: Song et al., ICLR 2021, Alg. 2 to 5.

    Args:
        snr: Signal-to-noise ratio `r` of the corrector.
        zeta: Data step, dimensionless, below 2.
    """

    estimates = frozenset({"prior"})

    def __init__(self, snr: float, zeta: float) -> None:
        if not snr > 0:
            raise InputError(f"snr is {snr}, but the corrector's signal-to-noise ratio has to be above 0.")
        self.snr, self.zeta = float(snr), _check_zeta(zeta)
        self._predict: Transition = ReverseSDE()
        self._gradient: DirectGradient | None = None

    def bind(self, denoised: Denoised, operator: LinearOperator, y: Tensor) -> Transition:
        """Returns a copy that knows the measurement."""
        bound = copy.copy(self)
        bound._gradient = DirectGradient(operator, y)
        return bound

    def begin(self) -> Transition:
        """Returns a copy that has taken no step."""
        fresh = super().begin()
        assert isinstance(fresh, CorrectedTransition)
        fresh._predict = self._predict.begin()
        return fresh

    @abstractmethod
    def step(self, ratio: Tensor) -> Tensor:
        """Returns the corrector's step `e` `(B,)` for `ratio = ||z|| / ||s||`."""

    def __call__(
        self, x: Tensor, x0: Tensor, sigma: float, sigma_next: float, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Returns the state at `sigma_next`."""
        assert self._gradient is not None, "a measurement comes with bind()"
        if sigma_next < sigma:
            e = x.new_full(x.shape[:1], sigma**2 - sigma_next**2)
            x_next = self._predict(x, x0, sigma, sigma_next, generators)
        else:
            score, noise = (x0 - x).div_(sigma**2), self._draw_noise(x, 1.0, generators)
            length = norm_per_sample(score).clamp(min=torch.finfo(x.dtype).tiny)
            e = self.step(norm_per_sample(noise) / length)
            x_next = score.mul_(per_sample(e, x)).add_(x).add_(noise.mul_(per_sample((2 * e).sqrt(), x)))
        return self._gradient(x_next, e).mul_(self.zeta).add_(x_next)


class StandardCorrection(CorrectedTransition):
    """The score-SDE's corrector, `e = 2 (r ||z|| / ||s||)^2`: about `2 r^2 sigma^2`."""

    def step(self, ratio: Tensor) -> Tensor:
        """Returns `2 (r ratio)^2`."""
        return 2 * (self.snr * ratio) ** 2


class PaDISCorrection(CorrectedTransition):
    """The corrector as PaDIS has it, `e = 2 r ||z|| / ||s||`: about `2 r sigma`, in which units do not match.

    At low noise it exceeds `sigma^2` by far, and so injects noise of `sqrt(4 r sigma)`.
    """

    def step(self, ratio: Tensor) -> Tensor:
        """Returns `2 r ratio`."""
        return 2 * self.snr * ratio


class LangevinDirect(Sampler):
    """Annealed Langevin dynamics with the data step on the state itself.

        x <- x + zeta g(x, epsilon sigma^2 / 2) + (epsilon / 2) (D(x, sigma) - x) + sqrt(epsilon) sigma z

    with `g` as in `DirectGradient`.

    1000 evaluations, two operator calls each; no gradient through the network. Asks of the operator its adjoint, of
    the prior nothing but `D`. Its samples have the posterior's spread, a little more for the finite step (see
    `Langevin`), as far as the updates suffice for the small singular values: one step contracts them by the square of
    their share of the norm.

    Source: the Langevin baseline of Hu et al., PaDIS, NeurIPS 2024, after Song & Ermon, NeurIPS 2019, Alg. 1; the
    operator-normalised step with `epsilon = 0.5` is what an independent reproduction found to work (with `zeta` of 3.5
    to 4, which its own projector bore).

    Args:
        num_levels: Noise levels.
        num_inner: Updates a level.
        sigma_max: First noise level, in intensity units.
        sigma_min: Last noise level.
        zeta: Data step, dimensionless, below 2.
        epsilon: Langevin step in units of `sigma^2`.
        start: The first state; pure noise if None.
        num_samples: Samples a case.
        samples_per_batch: How many samples of each case run at once; all if None.
        clip: Range to which samples are clipped at the end, or None.
    """

    samples_posterior = True

    def __init__(
        self,
        num_levels: int = 100,
        num_inner: int = 10,
        sigma_max: float = 10.0,
        sigma_min: float = 0.002,
        zeta: float = 1.0,
        epsilon: float = 0.5,
        start: Start | None = None,
        num_samples: int = 1,
        samples_per_batch: int | None = None,
        clip: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        super().__init__(
            GeometricSchedule(num_levels, sigma_max, sigma_min, num_inner),
            DirectConditioning(zeta, epsilon),
            Langevin(epsilon),
            start,
            num_samples,
            samples_per_batch,
            clip,
        )


class PredictorCorrector(Sampler):
    """Predictor-corrector sampling with data steps on the state, by the standard rule: `StandardCorrection`.

    `2 K - 1` evaluations for `K` levels (199), two operator calls each; no gradient through the network. Asks of the
    operator its adjoint, of the prior nothing but `D`.

    Source: Song et al., ICLR 2021, Alg. 2; with data steps for CT Song, Shen, Xing & Ermon, ICLR 2022, and Chung & Ye,
    "Score-based diffusion models for accelerated MRI", Med. Image Anal. 80 (2022), Alg. 2, published with `r = 0.16`.

    Args:
        num_levels: Noise levels.
        sigma_max: First noise level, in intensity units.
        sigma_min: Last noise level.
        snr: Signal-to-noise ratio `r` of the corrector.
        zeta: Data step, dimensionless, below 2.
        start: The first state; pure noise if None.
        num_samples: Samples a case.
        samples_per_batch: How many samples of each case run at once; all if None.
        clip: Range to which samples are clipped at the end, or None.
    """

    correction: type[CorrectedTransition] = StandardCorrection

    def __init__(
        self,
        num_levels: int = 100,
        sigma_max: float = 10.0,
        sigma_min: float = 0.002,
        snr: float = 0.16,
        zeta: float = 1.0,
        start: Start | None = None,
        num_samples: int = 1,
        samples_per_batch: int | None = None,
        clip: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        super().__init__(
            PairedSchedule(num_levels, sigma_max, sigma_min),
            Unconditional(),
            self.correction(snr, zeta),
            start,
            num_samples,
            samples_per_batch,
            clip,
        )


class PaDISPredictorCorrector(PredictorCorrector):
    """Predictor-corrector sampling by the rule of PaDIS's released code: `PaDISCorrection`, all else being equal.

    It shows what a corrector step linear in the ratio does, `e = 2 r ||z|| / ||s||`. Their code besides divides the
    corrector's score by the square of the wrong level and shares the predictor's layout; these are left out.

    `2 K - 1` evaluations for `K` levels (199), two operator calls each; no gradient through the network. Asks of the
    operator its adjoint, of the prior nothing but `D`.

    Source: the predictor-corrector baseline of Hu et al., PaDIS, NeurIPS 2024, published with `r = 0.16`.
    """

    correction = PaDISCorrection
