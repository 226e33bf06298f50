"""Classical methods: the direct inverse, total variation by two solvers, and SIRT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invrecon.errors import InputError
from invrecon.methods.base import (
    Estimate,
    Method,
    channel_magnitude,
    check_complex_range,
    check_measurement,
    check_range,
    norm_per_sample,
    per_sample,
    relative_residual,
)
from invrecon.methods.counting import Counter, count_calls
from invrecon.methods.stopping import PerSampleStop, measured
from invrecon.operators.base import conjugate_gradient

if TYPE_CHECKING:
    from invrecon.operators.base import LinearOperator
    from invrecon.priors.base import Prior


class FBP(Method):
    """The operator's direct inverse `B`, `operator.baseline(y)`: filtered back-projection for CT.

        x = clip(B y)

    No evaluations; operator calls only where the operator makes its direct inverse of them. Asks of the operator
    `baseline`, which is the pseudo-inverse by conjugate gradients if it has none of its own, of the prior nothing.

    Source: Kak & Slaney, "Principles of Computerized Tomographic Imaging", IEEE Press 1988, ch. 3, for CT; for other
    fields see the `baseline` of their operators.

    Args:
        clip: Range to which the image is clipped, or None to leave it. Clipping is worth some dB where the range is
            known, so `stats['clipped_fraction']` tells what share of the pixels it touched.
    """

    def __init__(self, clip: tuple[float, float] | None = (0.0, 1.0)) -> None:
        check_range("clip", clip)
        self.clip = clip

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
        check_measurement(y, operator)
        check_complex_range(self, "clip", self.clip, operator)
        calls = Counter()
        x = count_calls(operator, calls).baseline(y)
        clipped = x if self.clip is None else x.clamp(*self.clip)
        return Estimate(
            mean=clipped,
            stats={
                "num_evaluations": 0.0,
                "num_operator_calls": float(calls.num_calls),
                "relative_residual": relative_residual(operator, clipped, y),
                "clipped_fraction": (clipped != x).flatten(1).float().mean(dim=1).tolist(),
            },
        )


def penalty_weight(weight: float, noise_weight: float, std: Tensor | None, y: Tensor, norm: float) -> Tensor:
    """Returns the weight of a penalty, `max(weight, noise_weight sigma_y / ||A||)`, of every sample `(B,)`."""
    floor = torch.full(y.shape[:1], weight, dtype=y.dtype, device=y.device)
    return floor if std is None else floor.maximum(noise_weight * std.to(y) / norm)


def gradient(x: Tensor) -> Tensor:
    """Returns forward differences along every spatial axis, `(D, B, C, *S)`; 0 across the far edge."""
    return torch.stack([torch.diff(x, dim=axis, append=x.narrow(axis, -1, 1)) for axis in range(2, x.ndim)])


def gradient_adjoint(p: Tensor) -> Tensor:
    """Returns the exact transpose of `gradient`, minus the discrete divergence, `(B, C, *S)`."""
    total = torch.zeros_like(p[0])
    for axis, component in enumerate(p, start=2):
        inner = component.narrow(axis, 0, component.shape[axis] - 1)
        zero = torch.zeros_like(component.narrow(axis, 0, 1))
        total = total - torch.diff(inner, dim=axis, prepend=zero, append=zero)
    return total


def gradient_length(p: Tensor, complex_images: bool) -> Tensor:
    """Returns `||p||_2` over the axes `D`, `(B, C, *S)`; of complex images over both parts too, `(B, 1, *S)`."""
    return channel_magnitude(p.square().sum(dim=0).sqrt(), complex_images)


def total_variation(x: Tensor, complex_images: bool = False) -> Tensor:
    """Returns the isotropic total variation of every sample, `(B,)`: the pixels' sum of `||grad x||_2`."""
    return gradient_length(gradient(x), complex_images).flatten(1).sum(dim=1, dtype=torch.float64)


class TotalVariation(Method):
    """Total variation, solved to a certified duality gap.

        min_x  1/2 ||A x - y||^2 / ||A||^2 + w TV(x)   subject to   low <= x <= high
        w = max(weight, noise_weight sigma_y / ||A||)

    In these units neither weight depends on the geometry's scale; `sigma_y / ||A||` is the noise in units of the image.
    Where the noise differs between rays, rows are weighted first (`operator.whiten`). Each channel counts by itself; a
    complex image counts by `||grad x||_2` over both its parts, which a turn of its phase leaves alone. As the range is
    finite, every primal-dual pair bounds the distance to the optimum, and a sample stops when its relative gap
    `(P - D) / P` falls below `tol`, whatever shares its batch.

    The solver is the over-relaxed primal-dual hybrid gradient with `K = [A / ||A||; grad]` in D dimensions, `||K||^2 <=
    1 + 4 D`. Its speed hinges on the ratio of the steps: dual steps in proportion to `w`, the size of the dual
    variable, take tens of times fewer iterations than unit steps.

    No evaluations; two operator calls an iteration. Asks of the operator its adjoint, of the prior nothing.

    Source: Chambolle & Pock, "A first-order primal-dual algorithm for convex problems with applications to imaging", J.
    Math. Imaging Vis. 40 (2011), Alg. 1; relaxation from Condat, "A primal-dual splitting method", J. Optim. Theory
    Appl. 158 (2013), Alg. 3.1; Sidky, Jorgensen & Pan, "Convex optimization problem prototyping for image
    reconstruction in computed tomography", Phys. Med. Biol. 57 (2012), for CT.

    Args:
        weight: Weight without noise, in the units above. The defaults of both weights suit chest CT at 20 and 60
            views; they were chosen by PSNR on training patients.
        noise_weight: Weight per unit of noise in the image, `sigma_y / ||A||`.
        num_iterations: Most iterations.
        tol: Relative duality gap at which a sample stops; 0 runs all iterations.
        bounds: The range of the image, `(low, high)`.
    """

    relaxation = 1.9
    dual_step = 20.0  # of the gradient's block, in units of w: the size of a dual over that of an edge
    data_step = 200.0  # of the data's block, likewise
    complex_edge = 10.0  # how much larger edges are in complex images, whose unit is a percentile, than in [0, 1]
    largest_dual = 0.05  # where the weight no longer is the dual variable's size
    check_every = 25

    def __init__(
        self,
        weight: float = 3e-6,
        noise_weight: float = 0.04,
        num_iterations: int = 2000,
        tol: float = 1e-3,
        bounds: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        if not weight > 0 or noise_weight < 0:
            raise InputError(f"TV needs weight > 0 and noise_weight >= 0, got {weight} and {noise_weight}.")
        if num_iterations < 1 or tol < 0:
            raise InputError(f"TV needs num_iterations >= 1 and tol >= 0, got {num_iterations} and {tol}.")
        check_range("bounds", bounds)
        self.weight, self.noise_weight, self.tol = float(weight), float(noise_weight), float(tol)
        self.num_iterations, self.bounds = num_iterations, bounds

    @torch.no_grad()
    def __call__(
        self,
        y: Tensor,
        operator: LinearOperator,
        prior: Prior | None = None,
        *,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Estimate:
        """Reconstructs a batch; see `Method.__call__`. Stats add `num_iterations` and each sample's `relative_gap`."""
        check_measurement(y, operator)
        check_complex_range(self, "bounds", self.bounds, operator, "a range about 0, such as (-4.0, 4.0)")
        calls = Counter()
        whitened, data, std = count_calls(operator, calls).whiten(y)
        weight = penalty_weight(self.weight, self.noise_weight, std, y, whitened.norm())
        end = self._solve(whitened, data, weight)
        return Estimate(
            mean=end.result,
            stats={
                "num_evaluations": 0.0,
                "num_operator_calls": float(calls.num_calls),
                "relative_residual": relative_residual(operator, end.result, y),
                **end.stats("relative_gap"),
            },
        )

    def _solve(self, operator: LinearOperator, y: Tensor, weight: Tensor) -> PerSampleStop:
        """Returns the minimiser, with the iterations and relative gap at which each sample stopped."""
        scale = 1 / operator.norm()
        b = scale * y
        x = y.new_zeros(y.shape[0], *operator.image_shape)
        w, size = per_sample(weight, x), weight.clamp(max=self.largest_dual)
        size = size / self.complex_edge if operator.complex_images else size
        step_data, step_grad = per_sample(self.data_step * size, b), per_sample(self.dual_step * size, x)
        curvature = per_sample(self.data_step * size, x) + 4 * (x.ndim - 2) * step_grad
        step = 0.99 / curvature  # 1 % for the tolerance of ||A||

        # Ax = A x / ||A|| and Kt = K^T (q, p) follow x, q and p by linearity, which saves operator calls.
        Ax, q = torch.zeros_like(b), torch.zeros_like(b)
        Kt, p = torch.zeros_like(x), torch.zeros_like(gradient(x))
        end = PerSampleStop(x, self.tol)
        for iteration in range(1, self.num_iterations + 1):
            x_new = (x - step * Kt).clamp(*self.bounds)
            Ax_new = scale * operator(x_new)
            q_new = (q + step_data * (2 * Ax_new - Ax - b)) / (1 + step_data)
            p_new = p + step_grad * gradient(2 * x_new - x)
            p_new = p_new / (gradient_length(p_new, operator.complex_images) / w).clamp(min=1)
            Kt_new = scale * operator.adjoint(q_new) + gradient_adjoint(p_new)

            if iteration % self.check_every == 0 or iteration == self.num_iterations:
                penalty = weight * total_variation(x_new, operator.complex_images)
                gap = self._relative_gap(Ax_new, b, q_new, Kt_new, penalty)
                if end(iteration, x_new, gap):
                    break
            x, Ax, q = (old.lerp(new, self.relaxation) for old, new in ((x, x_new), (Ax, Ax_new), (q, q_new)))
            p, Kt = p.lerp(p_new, self.relaxation), Kt.lerp(Kt_new, self.relaxation)
        return end

    def _relative_gap(self, Ax: Tensor, b: Tensor, q: Tensor, Kt: Tensor, penalty: Tensor) -> Tensor:
        """Returns `(P - D) / P` per sample: the primal objective `P` from `A x`, the dual one `D` at `(q, p)`.

        D = -||q||^2 / 2 - <q, b> + min_{low <= z <= high} <z, K^T (q, p)>
        """

        def total(values: Tensor) -> Tensor:
            return values.flatten(1).sum(dim=1, dtype=torch.float64)

        low, high = self.bounds
        primal = total((Ax - b).square()) / 2 + penalty
        dual = -total(q.square()) / 2 - total(q * b) + total(torch.minimum(low * Kt, high * Kt))
        return (primal - dual) / primal.clamp(min=torch.finfo(b.dtype).tiny)


class ADMMTV(TotalVariation):
    """Total variation by the alternating direction method of multipliers: `TotalVariation`'s optimum, another way.

        x = argmin_x sum_i rho_i/2 ||K_i x - z_i + u_i||^2            (CG, from the last x)
        z_i = prox_{f_i / rho_i}(K_i x + u_i),   u_i <- u_i + K_i x - z_i

    with `K = (A / ||A||, grad, I)`: `f_1 = 1/2 ||. - y / ||A|| ||^2`, `f_2 = w ||.||_{2,1}`, whose proximal map
    shortens the gradient of every pixel by `w / rho` (isotropic), and `f_3` the range. Splitting the data, too,
    leaves CG with a well-conditioned system, the same for all samples. `rho_i u_i` are feasible dual variables, so a
    sample stops by the same certified gap as `TotalVariation`'s, which takes fewer operator calls; `z_3`, which keeps
    to the range, is returned.

    No evaluations; `4 + 2 k` operator calls an iteration for `k` CG iterations, and two every tenth for the gap. Asks
    of the operator its adjoint, of the prior nothing.

    Source: Boyd et al., "Distributed optimization and statistical learning via the alternating direction method of
    multipliers", Found. Trends Mach. Learn. 3 (2011), Eq. 3.5 to 3.7 and 3.19 (over-relaxation); Goldstein & Osher,
    "The split Bregman method for L1-regularized problems", SIAM J. Imaging Sci. 2 (2009), for the shrinkage.

    Args:
        weight: Weight without noise, in the units of `TotalVariation`.
        noise_weight: Weight per unit of noise in the image, `sigma_y / ||A||`.
        num_iterations: Most iterations.
        cg_iterations: CG iterations of each; from 8 on a case's result does not feel its batch's rounding.
        tol: Relative duality gap at which a sample stops; 0 runs all iterations.
        bounds: The range of the image, `(low, high)`.
    """

    relaxation = 1.8
    data_step = 1000.0
    check_every = 10

    def __init__(
        self,
        weight: float = 3e-6,
        noise_weight: float = 0.04,
        num_iterations: int = 500,
        cg_iterations: int = 10,
        tol: float = 1e-3,
        bounds: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__(weight, noise_weight, num_iterations, tol, bounds)
        if cg_iterations < 1:
            raise InputError(f"ADMMTV needs cg_iterations >= 1, got {cg_iterations}.")
        self.cg_iterations = cg_iterations

    def _solve(self, operator: LinearOperator, y: Tensor, weight: Tensor) -> PerSampleStop:
        scale = 1 / operator.norm()
        ratio = self.data_step / self.dual_step  # rho_1 over rho_2 = rho_3
        b = scale * y
        x = y.new_zeros(y.shape[0], *operator.image_shape)
        w = per_sample(weight, x)
        rho = self.dual_step * w.clamp(max=self.largest_dual)
        rho_data = per_sample((ratio * rho).flatten(), b)

        def system(x: Tensor) -> Tensor:
            return ratio * scale**2 * operator.normal(x) + gradient_adjoint(gradient(x)) + x

        r, z, v = b, gradient(x), x
        e, u, s = torch.zeros_like(b), torch.zeros_like(z), torch.zeros_like(v)
        end = PerSampleStop(x, self.tol)
        for iteration in range(1, self.num_iterations + 1):
            target = ratio * scale * operator.adjoint(r - e) + gradient_adjoint(z - u) + (v - s)
            x = conjugate_gradient(system, target, x, max_iter=self.cg_iterations, tol=0.0)
            parts = ((r, e, scale * operator(x)), (z, u, gradient(x)), (v, s, x))
            e, u, s = (dual + old.lerp(new, self.relaxation) for old, dual, new in parts)
            r = (b + rho_data * e) / (1 + rho_data)
            z = u - u / (gradient_length(u, operator.complex_images) * rho / w).clamp(min=1)
            v = s.clamp(*self.bounds)
            e, u, s = e - r, u - z, s - v
            if iteration % self.check_every == 0 or iteration == self.num_iterations:
                q = rho_data * e
                Kt = scale * operator.adjoint(q) + gradient_adjoint(rho * u)
                penalty = weight * total_variation(v, operator.complex_images)
                if end(iteration, v, self._relative_gap(scale * operator(v), b, q, Kt, penalty)):
                    break
        return end


class SIRT(Method):
    """Simultaneous iterative reconstruction: gradient steps normalised by the sums of rows and columns.

        x <- clip(x + relaxation C A^T R (y - A x)),   R = 1 / (A 1),   C = 1 / (A^T 1),   from x = 0

    `A` has no negative entries, so `||C^{1/2} A^T R^{1/2}|| <= 1`: no step has to be found, and the residual
    `||y - A x||_R` never grows. Without a range it tends to the least-squares solution in this norm. Early iterations
    are smooth: the number of them regularises. Rays that miss the image count nothing. Where the noise differs between
    rays, rows are weighted first; where its level is known, a sample stops at the discrepancy principle, as soon as
    `||y - A x|| <= discrepancy sqrt(m) sigma_y`.

    No evaluations; two operator calls an iteration, and three to begin. Asks of the operator its adjoint and that no
    entry be negative, of the prior nothing.

    Source: Gilbert, "Iterative methods for the three-dimensional reconstruction of an object from projections", J.
    Theor. Biol. 36 (1972); Gregor & Benson, "Computational analysis and improvement of SIRT", IEEE Trans. Med. Imaging
    27 (2008); Morozov, "On the solution of functional equations by the method of regularization", Soviet Math. Dokl. 7
    (1966), for the stop.

    Args:
        num_iterations: Most iterations.
        relaxation: Length of a step, in (0, 2).
        discrepancy: Residual at which a sample with noise stops, in units of the noise's; 0 runs all iterations.
        bounds: The range of the image, such as `(0.0, 1e6)` for one without negative values; None for any.
    """

    def __init__(
        self,
        num_iterations: int = 200,
        relaxation: float = 1.0,
        discrepancy: float = 1.0,
        bounds: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        if num_iterations < 1 or not 0 < relaxation < 2 or discrepancy < 0:
            raise InputError(
                "SIRT needs num_iterations >= 1, 0 < relaxation < 2 and discrepancy >= 0, got "
                f"{num_iterations}, {relaxation} and {discrepancy}."
            )
        check_range("bounds", bounds)
        self.num_iterations = num_iterations
        self.relaxation, self.discrepancy = float(relaxation), float(discrepancy)
        self.bounds = bounds

    @torch.no_grad()
    def __call__(
        self,
        y: Tensor,
        operator: LinearOperator,
        prior: Prior | None = None,
        *,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Estimate:
        """Reconstructs a batch; see `Method.__call__`.

        Stats add `num_iterations` and `discrepancy`, the residual in units of the noise's (of `y` without noise).

        Raises:
            InputError: The operator has negative entries.
        """
        check_measurement(y, operator)
        check_complex_range(self, "bounds", self.bounds, operator)
        calls = Counter()
        weighted, data, std = count_calls(operator, calls).whiten(y)
        x = data.new_zeros(len(data), *operator.image_shape)
        columns = self._inverse_sums(weighted.adjoint(torch.ones_like(data)), operator)
        rows = self._inverse_sums(weighted(torch.ones_like(x)), operator)
        x = x if self.bounds is None else x.clamp(*self.bounds)
        num = measured(weighted, data).flatten(1).sum(dim=1).to(data)
        size = norm_per_sample(data) if std is None else std.to(data) * num.sqrt()
        size = size.clamp(min=torch.finfo(data.dtype).tiny)
        end = PerSampleStop(x, 0.0 if std is None else self.discrepancy)
        residual = data - weighted(x)
        first = norm_per_sample(rows.sqrt() * residual)
        for iteration in range(1, self.num_iterations + 1):
            x = x + self.relaxation * columns * weighted.adjoint(rows * residual)
            x = x if self.bounds is None else x.clamp(*self.bounds)
            residual = data - weighted(x)
            if end(iteration, x, norm_per_sample(residual) / size):
                break
        if not (norm_per_sample(rows.sqrt() * residual) <= 1.001 * first).all():
            raise self._negative(operator)
        return Estimate(
            mean=end.result,
            stats={
                "num_evaluations": 0.0,
                "num_operator_calls": float(calls.num_calls),
                "relative_residual": relative_residual(operator, end.result, y),
                **end.stats("discrepancy"),
            },
        )

    def _inverse_sums(self, sums: Tensor, operator: LinearOperator) -> Tensor:
        """Returns `1 / sums`, 0 where no entry contributes."""
        none = 1e-6 * per_sample(sums.abs().flatten(1).amax(dim=1), sums)
        if (sums < -none).any():
            raise self._negative(operator)
        return torch.where(sums > none, 1 / sums, 0.0)

    @staticmethod
    def _negative(operator: LinearOperator) -> InputError:
        return InputError(
            f"SIRT divides by sums of rows and columns and needs an operator without negative entries, "
            f"{type(operator).__name__} has some: use TotalVariation, ADMMTV or WaveletL1."
        )
