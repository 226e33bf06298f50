"""Regularised least squares by conjugate gradients, in MRI known as CG-SENSE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invrecon.errors import InputError
from invrecon.methods.base import Estimate, Method, check_measurement, relative_residual
from invrecon.methods.counting import Counter, count_calls
from invrecon.operators.base import conjugate_gradient

if TYPE_CHECKING:
    from invrecon.operators.base import LinearOperator
    from invrecon.priors.base import Prior


class CGSENSE(Method):
    """Least squares with Tikhonov's penalty, by conjugate gradients from zero; of any operator.

        min_x  ||A x - y||_W^2 + lam ||A||^2 ||x||^2,   that is   (A^T W A + lam ||A||^2 I) x = A^T W y

    `W` weighs rows by the precision of their noise, the best by 1 (`operator.whiten`). In these units `lam` does not
    depend on the operator's scale. Few iterations regularise as well; with `lam = 0` and all iterations it is the
    pseudo-inverse.

    No evaluations; two operator calls an iteration, and one to begin. Asks of the operator its adjoint, of the prior
    nothing.

    Source: Pruessmann, Weiger, Boernert & Boesiger, "Advances in sensitivity encoding with arbitrary k-space
    trajectories", MRM 46 (2001), without its intensity correction, as maps here are normalised.

    Args:
        lam: Weight of the penalty, in units of `||A||^2`; the default was chosen by PSNR on training slices of MRI,
            fourfold and eightfold undersampled at 30 dB.
        num_iterations: Most iterations.
        tol: A sample stops when the equation's residual is `tol` of its right side; 0 runs all iterations.
    """

    def __init__(self, lam: float = 5e-3, num_iterations: int = 50, tol: float = 1e-4) -> None:
        if lam < 0 or tol < 0 or num_iterations < 1:
            raise InputError(
                f"CGSENSE needs lam >= 0, num_iterations >= 1 and tol >= 0, got {lam}, {num_iterations} and {tol}."
            )
        self.lam, self.num_iterations, self.tol = float(lam), num_iterations, float(tol)

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
        calls = Counter()
        weighted, data, _ = count_calls(operator, calls).whiten(y)
        penalty = self.lam * weighted.norm() ** 2 if self.lam else 0.0
        x = conjugate_gradient(
            lambda x: weighted.normal(x) + penalty * x,
            weighted.adjoint(data),
            max_iter=self.num_iterations,
            tol=self.tol,
        )
        return Estimate(
            mean=x,
            stats={
                "num_evaluations": 0.0,
                "num_operator_calls": float(calls.num_calls),
                "relative_residual": relative_residual(operator, x, y),
            },
        )
