"""The algebra of operators and the solvers they inherit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from invrecon.errors import InputError
from invrecon.operators import FanBeamCT, LinearOperator, ParallelBeamCT, conjugate_gradient
from tests.operators.battery import CHECKS, dense, images, measurements, relative_error


class Dense(LinearOperator):
    """A matrix, with everything inherited: the base class under test."""

    def __init__(self, rows: int, cols: int, seed: int = 0) -> None:
        super().__init__((1, cols), (1, rows))
        generator = torch.Generator().manual_seed(seed)
        matrix = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
        self.register_buffer("exact", matrix, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x, self.image_shape, "images")
        return x @ self.exact.to(x.dtype).T

    def adjoint(self, y: Tensor) -> Tensor:
        self._check(y, self.measurement_shape, "measurements")
        return y @ self.exact.to(y.dtype)


def whitened() -> LinearOperator:
    operator = Dense(6, 9)
    std = torch.rand(1, 1, 6, generator=torch.Generator().manual_seed(3)) + 0.1
    return operator.bind(SimpleNamespace(noise_std=std)).whiten(measurements(operator, 1))[0]


MAKERS = {
    "tall": lambda: Dense(9, 6),
    "wide": lambda: Dense(6, 9),
    "adjoint": lambda: Dense(6, 9).H,
    "composed": lambda: Dense(5, 6) @ Dense(6, 7),
    "scaled": lambda: -2.5 * Dense(6, 9),
    "whitened": whitened,
    "blurred-sinogram": lambda: Dense(5, 5).H @ Dense(5, 8),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_battery(make, check):
    check(make)


def test_algebra_is_matrix_algebra():
    a, b = Dense(4, 5).double(), Dense(5, 6, seed=1).double()
    torch.testing.assert_close(dense(a @ b), a.exact @ b.exact)
    torch.testing.assert_close(dense(a.H), a.exact.T)
    torch.testing.assert_close(dense((a @ b).H), (a.exact @ b.exact).T)
    torch.testing.assert_close(dense(3 * a), 3 * a.exact)
    torch.testing.assert_close(dense(a * 3), 3 * a.exact)
    assert a.H.H is a


def test_composition_rejects_what_does_not_fit():
    with pytest.raises(InputError, match="Cannot compose"):
        Dense(4, 5) @ Dense(4, 5)
    with pytest.raises(TypeError):
        Dense(4, 5) @ 3
    with pytest.raises(TypeError):
        Dense(4, 5) * "3"


@given(st.integers(1, 4), st.integers(1, 12), st.integers(0, 2**20))
def test_conjugate_gradient_is_the_dense_solve(batch, size, seed):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(batch, size, size, generator=generator, dtype=torch.float64)
    matrix = root @ root.mT + torch.eye(size, dtype=torch.float64)
    b = torch.randn(batch, size, generator=generator, dtype=torch.float64)
    start = torch.randn(batch, size, generator=generator, dtype=torch.float64)

    def apply(x: Tensor) -> Tensor:
        return (matrix @ x[..., None])[..., 0]

    exact = torch.linalg.solve(matrix, b)
    for x0 in (None, start):
        x = conjugate_gradient(apply, b, x0, max_iter=10 * size, tol=1e-12)
        torch.testing.assert_close(x, exact, rtol=1e-6, atol=1e-8)


def test_conjugate_gradient_stops_each_sample_on_its_own():
    """An easy, a hard and a zero system: nobody's result depends on the company."""
    diagonals = torch.stack([torch.ones(8), torch.logspace(0, 4, 8), torch.ones(8)]).double()
    b = torch.ones(3, 8, dtype=torch.float64)
    b[2] = 0
    together = conjugate_gradient(lambda x: diagonals * x, b, max_iter=50, tol=1e-10)
    for i in range(3):
        alone = conjugate_gradient(lambda x, i=i: diagonals[i] * x, b[i : i + 1], max_iter=50, tol=1e-10)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-12, atol=0)
    torch.testing.assert_close(together[:2], b[:2] / diagonals[:2], rtol=1e-8, atol=0)
    assert not together[2].any()


def test_conjugate_gradient_is_differentiable():
    operator = Dense(9, 6).double()
    y = measurements(operator, 1).requires_grad_()
    x = operator.prox(torch.zeros(1, 1, 6, dtype=torch.float64), y, 0.3, max_iter=30)
    (gradient,) = torch.autograd.grad(x.sum(), y)
    a = operator.exact
    exact = 0.3 * torch.linalg.solve(torch.eye(6, dtype=a.dtype) + 0.3 * a.T @ a, a.T).sum(0)
    torch.testing.assert_close(gradient[0, 0], exact, rtol=1e-6, atol=1e-9)


def test_normalised_step_stalls():
    r"""x <- x + c A^T r / ||r|| ends in a two-cycle about the residual c ||A||^2 / 2; plain steps do not."""
    operator = ParallelBeamCT(size=32, num_views=8, num_bins=64)
    square = torch.zeros(1, 1, 32, 32)
    square[..., 8:24, 10:22] = 0.5
    y = operator(square)
    c = 0.05 * float(y.norm()) * 2 / operator.norm() ** 2  # predicts a floor of 5 % of ||y||
    x, plain = torch.zeros_like(square), torch.zeros_like(square)
    norms = []
    for _ in range(600):
        residual = y - operator(x)
        norms.append(float(residual.norm()))
        x = x + c * operator.adjoint(residual) / residual.norm()
        plain = plain + operator.adjoint(y - operator(plain)) / operator.norm() ** 2
    floor = c * operator.norm() ** 2 / 2
    assert (norms[-1] + norms[-2]) / 2 == pytest.approx(floor, rel=0.03)
    assert float((y - operator(plain)).norm()) < 0.1 * floor


class TestWhitening:
    def bound(self, std: Tensor | float | None) -> LinearOperator:
        return Dense(6, 9).bind(SimpleNamespace(noise_std=std))

    def test_noise_free_and_homogeneous_noise_pass_through(self):
        y = measurements(Dense(6, 9))
        for std, expected in (
            (None, None),
            (0.3, torch.full((3,), 0.3)),
            (torch.tensor(0.3), torch.full((3,), 0.3)),
            (torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.1, 0.2, 0.3])),
            (torch.tensor([0.1, 0.2, 0.3]).reshape(3, 1, 1), torch.tensor([0.1, 0.2, 0.3])),
        ):
            bound = self.bound(std)
            operator, weighted, left = bound.whiten(y)
            assert operator is bound
            assert weighted is y
            assert left is None if expected is None else torch.equal(left, expected)

    def test_weights(self):
        std = torch.rand(3, 1, 6, generator=torch.Generator().manual_seed(0)) + 0.5
        std[0, 0, 2] = float("inf")  # a dead ray
        bound = self.bound(std)
        x, y = images(bound), measurements(bound)
        operator, weighted, left = bound.whiten(y)
        assert torch.equal(left, std.flatten(1).amin(1))
        assert float(operator.weights.max()) == 1
        torch.testing.assert_close(weighted, left[:, None, None] / std * y)
        torch.testing.assert_close(operator(x), left[:, None, None] / std * bound(x))
        assert operator.weights[0, 0, 2] == 0
        assert operator.norm() == bound.norm()
        assert operator.baseline(weighted).isfinite().all()

    def test_prox_is_the_weighted_least_squares(self):
        std = torch.rand(2, 1, 6, dtype=torch.float64) + 0.5
        bound = Dense(6, 9).double().bind(SimpleNamespace(noise_std=std))
        x, y, sigma = images(bound, 2), measurements(bound, 2), 0.7
        operator, weighted, left = bound.whiten(y)
        z = operator.prox(x, weighted, sigma**2 / left**2, max_iter=100, tol=1e-14)
        gradient = bound.adjoint((bound(z) - y) / std**2) + (z - x) / sigma**2
        assert float(gradient.norm()) < 1e-8

    @pytest.mark.parametrize("std", [0.0, torch.zeros(3, 1, 6), torch.full((3, 1, 6), float("inf"))])
    def test_impossible_levels(self, std):
        bound = self.bound(std)
        with pytest.raises(InputError, match="positive"):
            bound.whiten(measurements(bound))

    def test_shape_that_fits_nothing(self):
        bound = self.bound(torch.ones(5))
        with pytest.raises(InputError, match="fits neither"):
            bound.whiten(measurements(bound))


def test_bind_leaves_the_original_alone():
    operator = Dense(6, 9)
    bound = operator.bind(SimpleNamespace(noise_std=torch.tensor([0.1, 0.2])))
    assert operator.noise_std is None
    assert bound.exact is operator.exact
    torch.testing.assert_close(bound.double().noise_std, torch.tensor([0.1, 0.2], dtype=torch.float64))
    both = (Dense(5, 6) @ operator).bind(SimpleNamespace(noise_std=0.5))
    assert float(both.noise_std) == 0.5


def test_norm_is_shared_by_bound_copies():
    operator = FanBeamCT(size=12, num_views=5, num_bins=16)
    bound = operator.bind(SimpleNamespace(noise_std=None, geometry=None, measurement=None))
    assert bound.norm() == operator.norm()
    assert bound._norm is operator._norm


def test_relative_error_of_zero_is_absolute():
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0
