import pytest
import torch

from invrecon.errors import InputError
from invrecon.methods import CGSENSE
from invrecon.operators import CartesianMRI
from invrecon.operators.coils import simulated_maps
from tests.methods.toy import DenseOperator

F64 = torch.float64


def problem(noise_std=None):
    operator = DenseOperator(torch.randn(20, 36, dtype=F64), (1, 6, 6), noise_std)
    return operator, torch.randn(3, 1, 1, 20, dtype=F64)


def tikhonov(matrix, y, weights, lam):
    """`(M^T W M + lam ||M||^2)^-1 M^T W y`, one sample."""
    normal = matrix.mT @ (weights[:, None] * matrix)
    penalty = lam * torch.linalg.matrix_norm(matrix, ord=2) ** 2 * torch.eye(matrix.shape[1], dtype=F64)
    return torch.linalg.solve(normal + penalty, matrix.mT @ (weights * y))


@pytest.mark.parametrize("lam", [1e-3, 0.1, 10.0])
def test_it_is_tikhonov_s_solution(lam):
    operator, y = problem()
    x = CGSENSE(lam, num_iterations=200, tol=1e-13)(y, operator).mean
    for k in range(3):
        expected = tikhonov(operator.matrix, y[k].flatten(), torch.ones(20, dtype=F64), lam)
        torch.testing.assert_close(x[k].flatten(), expected, rtol=0, atol=1e-5 * float(expected.norm()))


def test_rows_weigh_by_the_precision_of_their_noise():
    std = torch.rand(3, 1, 1, 20, dtype=F64) + 0.1
    std[1, ..., 4] = torch.inf  # of no say
    operator, y = problem(std)
    x = CGSENSE(0.02, num_iterations=200, tol=1e-13)(y, operator).mean
    for k in range(3):
        weights = (std[k].amin() / std[k].flatten()).square()
        expected = tikhonov(operator.matrix, y[k].flatten(), weights, 0.02)
        torch.testing.assert_close(x[k].flatten(), expected, rtol=0, atol=1e-5 * float(expected.norm()))


def test_without_a_penalty_it_is_the_pseudo_inverse():
    operator, y = problem()
    x = CGSENSE(0.0, num_iterations=200, tol=0)(y, operator).mean
    expected = y.flatten(1) @ torch.linalg.pinv(operator.matrix).mT
    torch.testing.assert_close(x.flatten(1), expected, atol=1e-8, rtol=0)


def test_fully_sampled_normalised_coils_give_the_image_back():
    """`A^T A = I`, so a single iteration solves the system: `x / (1 + lam)`."""
    operator = CartesianMRI((7, 6), maps=simulated_maps(4, (7, 6), torch.Generator().manual_seed(0))).double()
    x = torch.randn(2, 2, 7, 6, dtype=F64)
    for lam in (0.0, 0.25):
        estimate = CGSENSE(lam, num_iterations=1)(operator(x), operator)
        torch.testing.assert_close(estimate.mean, x / (1 + lam), atol=1e-6, rtol=0)  # maps are of single precision
        assert estimate.stats["num_operator_calls"] == 3  # the right side, and one product with A^T A


@pytest.mark.parametrize("noise_std", [None, torch.tensor([0.1], dtype=F64)])
def test_the_scale_of_the_operator_does_not_matter(noise_std):
    operator, y = problem(noise_std)
    scaled = DenseOperator(37 * operator.matrix, (1, 6, 6), None if noise_std is None else 37 * noise_std)
    torch.testing.assert_close(CGSENSE()(y, operator).mean, CGSENSE()(37 * y, scaled).mean, atol=1e-6, rtol=0)


def test_a_sample_stops_at_its_own_tolerance():
    operator, y = problem()
    y[0] = operator(operator.adjoint(y[:1]))[0]  # another right side takes another number of iterations
    lam, tol = 0.01, 1e-3
    loose = CGSENSE(lam, 200, tol)(y, operator)
    right = operator.adjoint(y)
    residual = right - operator.normal(loose.mean) - lam * operator.norm() ** 2 * loose.mean
    ratio = residual.flatten(1).norm(dim=1) / right.flatten(1).norm(dim=1)
    assert (ratio <= tol * (1 + 1e-6)).all() and (ratio > 1e-6).all()
    assert loose.stats["num_operator_calls"] < CGSENSE(lam, 200, 1e-10)(y, operator).stats["num_operator_calls"]
    for k in range(3):
        torch.testing.assert_close(CGSENSE(lam, 200, tol)(y[[k]], operator).mean, loose.mean[[k]])


def test_bad_knobs_are_refused():
    for knobs in ({"lam": -1.0}, {"num_iterations": 0}, {"tol": -1e-3}):
        with pytest.raises(InputError):
            CGSENSE(**knobs)
