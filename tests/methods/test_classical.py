import numpy as np
import pytest
import torch

from invrecon.errors import InputError
from invrecon.methods import ADMMTV, FBP, SIRT, TotalVariation
from invrecon.methods.classical import gradient, gradient_adjoint, total_variation
from tests.methods.toy import DenseOperator


def identity(shape, noise_std=None):
    return DenseOperator(torch.eye(int(np.prod(shape)), dtype=torch.float64), shape, noise_std)


def flat(image):
    return image.reshape(image.shape[0], 1, 1, -1)


def underdetermined(num=3, size=6, num_rays=20, noise_std=None):
    matrix = torch.randn(num_rays, size * size, dtype=torch.float64)
    operator = DenseOperator(matrix, (1, size, size), noise_std)
    x = torch.zeros(num, 1, size, size, dtype=torch.float64)
    for k in range(num):
        x[k, :, 1 : 3 + k, 2:5] = 0.3 + 0.2 * k
    return operator, x, operator(x)


def objective(operator, x, y, weight):
    misfit = (operator(x) - y).flatten(1).square().sum(dim=1) / (2 * operator.norm() ** 2)
    return misfit + weight * total_variation(x)


@pytest.mark.parametrize("shape", [(5, 7), (1, 6), (6, 1), (1, 1), (3, 4, 5)])
def test_gradient_adjoint(shape):
    x = torch.randn(2, 1, *shape, dtype=torch.float64)
    p = torch.randn(len(shape), 2, 1, *shape, dtype=torch.float64)
    assert float((gradient(x) * p).sum() - (x * gradient_adjoint(p)).sum()) == pytest.approx(0, abs=1e-12)


def test_tv_of_a_known_image():
    x = torch.zeros(1, 1, 4, 4)
    x[..., 1:3, 1:3] = 0.5  # forward differences: 7 pixels with a jump, one of them with two
    assert float(total_variation(x)) == pytest.approx(0.5 * (6 + 2**0.5))


def test_denoising_a_step_has_the_analytic_solution():
    # 1-D: each plateau moves by weight / length towards the other.
    y = torch.tensor([0.2] * 4 + [0.8] * 6, dtype=torch.float64).reshape(1, 1, 1, 10)
    x = TotalVariation(weight=0.1, tol=1e-9, num_iterations=5000)(y, identity((1, 1, 10))).mean
    expected = torch.tensor([0.2 + 0.1 / 4] * 4 + [0.8 - 0.1 / 6] * 6, dtype=torch.float64)
    torch.testing.assert_close(x.flatten(), expected, atol=1e-4, rtol=0)


def test_a_large_weight_leaves_the_mean():
    y = torch.rand(2, 1, 5, 5, dtype=torch.float64)
    x = TotalVariation(weight=10.0, tol=1e-9, num_iterations=5000)(flat(y), identity((1, 5, 5))).mean
    torch.testing.assert_close(x, y.mean(dim=(1, 2, 3), keepdim=True).expand_as(x), atol=1e-4, rtol=0)


def test_a_small_weight_leaves_the_data_within_the_range():
    y = torch.linspace(-0.5, 1.5, 25, dtype=torch.float64).reshape(1, 1, 5, 5)
    x = TotalVariation(weight=1e-8, tol=0, num_iterations=3000)(flat(y), identity((1, 5, 5))).mean
    torch.testing.assert_close(x, y.clamp(0, 1), atol=1e-5, rtol=0)


def alternating_directions(matrix, y, size, weight, num_iterations=20000, rho=0.05):
    """Another solver, in numpy: ADMM with exact solves, splitting the gradient and the range."""
    n = size * size
    difference = np.eye(size, k=1) - np.eye(size)
    difference[-1] = 0
    d = np.concatenate([np.kron(difference, np.eye(size)), np.kron(np.eye(size), difference)])
    inverse = np.linalg.inv(matrix.T @ matrix + rho * (d.T @ d + np.eye(n)))
    z, u, v, s = np.zeros(2 * n), np.zeros(2 * n), np.zeros(n), np.zeros(n)
    for _ in range(num_iterations):
        x = inverse @ (matrix.T @ y + rho * (d.T @ (z - u) + v - s))
        pair = (d @ x + u).reshape(2, n)
        length = np.sqrt((pair**2).sum(axis=0))
        z = (pair * np.maximum(1 - weight / rho / np.maximum(length, 1e-300), 0)).ravel()
        v = np.clip(x + s, 0, 1)
        u += d @ x - z
        s += x - v
    return v


def test_against_another_solver():
    operator, _, y = underdetermined(num=2)
    y = y + 0.3 * torch.randn_like(y)
    weight = 3e-3
    x = TotalVariation(weight, tol=1e-8, num_iterations=20000)(y, operator).mean
    for k in range(2):
        scaled = operator.matrix.numpy() / operator.norm()
        other = alternating_directions(scaled, y[k].flatten().numpy() / operator.norm(), 6, weight)
        other = torch.from_numpy(other).reshape(1, 1, 6, 6)
        ours, theirs = (float(objective(operator, z, y[k : k + 1], weight)) for z in (x[k : k + 1], other))
        assert ours == pytest.approx(theirs, rel=1e-5)
        assert float((x[k] - other[0]).abs().max()) < 5e-3


def test_the_default_stop_is_at_the_optimum():
    operator, _, y = underdetermined()
    short = TotalVariation(weight=1e-4)(y, operator)
    long = TotalVariation(weight=1e-4, tol=0, num_iterations=6000)(y, operator)
    best = objective(operator, long.mean, y, 1e-4)
    excess = (objective(operator, short.mean, y, 1e-4) - best) / best
    print(
        "iterations",
        short.stats["num_iterations"],
        "gap",
        short.stats["relative_gap"],
        "excess",
        excess.tolist(),
    )
    assert max(short.stats["relative_gap"]) <= 1e-3
    assert max(short.stats["num_iterations"]) < 1500
    assert (excess < 1e-3).all() and (excess > -1e-9).all()  # the gap bounds the excess
    assert max(long.stats["relative_gap"]) < 1e-6


def test_sparse_data_recover_a_piecewise_constant_image():
    operator, x, y = underdetermined()
    error = (TotalVariation(weight=1e-6, num_iterations=5000)(y, operator).mean - x).norm() / x.norm()
    direct = (FBP()(y, operator).mean - x).norm() / x.norm()
    print(f"relative error: TV {float(error):.1e}, direct inverse {float(direct):.2f}")
    assert error < 0.02 < 0.3 < direct


@pytest.mark.parametrize("noise_std", [None, torch.tensor([0.1], dtype=torch.float64)])
@pytest.mark.parametrize("solver", [TotalVariation, ADMMTV])
def test_the_scale_of_the_operator_does_not_matter(solver, noise_std):
    operator, _, y = underdetermined(noise_std=noise_std)
    scaled = DenseOperator(37 * operator.matrix, (1, 6, 6), None if noise_std is None else 37 * noise_std)
    method = solver(weight=1e-4, tol=0, num_iterations=60)
    torch.testing.assert_close(method(y, operator).mean, method(37 * y, scaled).mean, atol=1e-7, rtol=0)


def test_noise_raises_the_weight():
    operator, x, y = underdetermined()
    noisy = y + 2.0 * torch.randn_like(y)
    bound = DenseOperator(operator.matrix, (1, 6, 6), torch.tensor([2.0, 2.0, 2.0], dtype=torch.float64))
    aware = TotalVariation(weight=1e-6, noise_weight=0.3)(noisy, bound).mean
    unaware = TotalVariation(weight=1e-6, noise_weight=0.3)(noisy, operator).mean
    assert (aware - x).norm() < 0.7 * (unaware - x).norm()
    expected = TotalVariation(weight=0.3 * 2.0 / operator.norm())(noisy, operator).mean
    torch.testing.assert_close(aware, expected)


@pytest.mark.parametrize(("solver", "rounding"), [(TotalVariation, 1e-6), (ADMMTV, 1e-5)])
def test_a_sample_does_not_depend_on_its_batch(solver, rounding):
    operator, _, y = underdetermined()
    y = y.float()
    operator = operator.float()
    method = solver(weight=1e-4)
    together = method(y, operator)
    permuted = method(y[[2, 0, 1]], operator)
    assert len(set(together.stats["num_iterations"])) > 1  # they really stop one by one
    for k in range(3):
        alone = method(y[k : k + 1], operator)
        torch.testing.assert_close(alone.mean[0], together.mean[k], atol=rounding, rtol=0)
        torch.testing.assert_close(permuted.mean[[1, 2, 0][k]], together.mean[k], atol=rounding, rtol=0)


def test_operator_calls_are_what_the_iterations_need():
    operator, _, y = underdetermined(num=1)
    estimate = TotalVariation(weight=1e-4, tol=0, num_iterations=40)(y, operator)
    assert estimate.stats["num_operator_calls"] == 80
    assert estimate.stats["num_evaluations"] == 0


@pytest.mark.parametrize("noise_std", [None, torch.tensor([0.3], dtype=torch.float64)])
def test_both_solvers_of_tv_find_the_same_optimum(noise_std):
    operator, _, y = underdetermined(noise_std=noise_std)
    y = y + 0.3 * torch.randn_like(y)
    weight = 3e-3
    one = TotalVariation(weight, tol=1e-9, num_iterations=3000)(y, operator)
    other = ADMMTV(weight, tol=1e-9)(y, operator)
    assert max(*one.stats["relative_gap"], *other.stats["relative_gap"]) <= 1e-9  # two certificates of the one optimum
    applied = weight if noise_std is None else max(weight, 0.04 * 0.3 / operator.norm())
    torch.testing.assert_close(
        objective(operator, one.mean, y, applied), objective(operator, other.mean, y, applied), rtol=1e-9, atol=0
    )
    torch.testing.assert_close(one.mean, other.mean, atol=1e-4, rtol=0)
    assert other.mean.min() >= 0 and other.mean.max() <= 1


def test_admm_denoises_a_step_as_the_analysis_says():
    y = torch.tensor([0.2] * 4 + [0.8] * 6, dtype=torch.float64).reshape(1, 1, 1, 10)
    x = ADMMTV(weight=0.1, tol=1e-7, num_iterations=1000)(y, identity((1, 1, 10))).mean
    expected = torch.tensor([0.2 + 0.1 / 4] * 4 + [0.8 - 0.1 / 6] * 6, dtype=torch.float64)
    torch.testing.assert_close(x.flatten(), expected, atol=1e-4, rtol=0)


def positive(num_rays=60, noise_std=None):
    matrix = torch.rand(num_rays, 36, dtype=torch.float64) * (torch.rand(num_rays, 36) < 0.3)
    operator = DenseOperator(matrix, (1, 6, 6), noise_std)
    return operator, operator(torch.rand(3, 1, 6, 6, dtype=torch.float64))


def row_weighted(operator, x, y):
    return ((y - operator(x)).flatten(1).square() / operator.matrix.sum(dim=1)).sum(dim=1)


def test_sirt_tends_to_weighted_least_squares():
    operator, y = positive()
    y = y + 0.5 * torch.randn_like(y)
    x = SIRT(num_iterations=2000, bounds=None)(y, operator).mean.flatten(1)
    rows = 1 / operator.matrix.sum(dim=1)
    normal = operator.matrix.mT @ (rows[:, None] * operator.matrix)
    expected = torch.linalg.solve(normal, operator.matrix.mT @ (rows * y.flatten(1)).mT).mT
    torch.testing.assert_close(x, expected, atol=1e-6, rtol=0)
    assert (x - torch.linalg.lstsq(operator.matrix, y.flatten(1).mT).solution.mT).norm() > 1e-2  # not the plain one


@pytest.mark.parametrize(
    ("relaxation", "bounds"), [(1.0, None), (1.9, None), (1.0, (0.0, float("inf"))), (1.5, (0, 0.7))]
)
def test_the_residual_of_sirt_never_grows(relaxation, bounds):
    operator, y = positive()
    y = y + 2.0 * torch.randn_like(y)
    residuals = []
    for num in (*range(1, 12), 30, 100):
        x = SIRT(num, relaxation, bounds=bounds)(y, operator).mean
        residuals.append(row_weighted(operator, x, y))
        if bounds is not None:
            assert x.min() >= bounds[0] and x.max() <= bounds[1]
    history = torch.stack(residuals)
    assert (history.diff(dim=0) <= 1e-12).all()
    assert (history[-1] < history[0]).all()


def test_one_step_of_sirt_by_hand():
    matrix = torch.tensor([[1.0, 1.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    y = torch.tensor([2.0, 6.0, 5.0], dtype=torch.float64).reshape(1, 1, 1, 3)
    x = SIRT(num_iterations=1, bounds=None)(y, DenseOperator(matrix, (1, 1, 3))).mean
    # R y = (1, 2, 0), the last ray misses the image; A^T R y = (1, 7, 0), columns sum to (1, 4, 0).
    assert x.flatten().tolist() == pytest.approx([1.0, 7 / 4, 0.0])


def test_sirt_stops_at_the_noise():
    std = torch.tensor([0.05, 0.2, 0.8], dtype=torch.float64)
    operator, y = positive(noise_std=std)
    y = y + std[:, None, None, None] * torch.randn_like(y)
    method = SIRT(num_iterations=5000, bounds=None, discrepancy=1.2)
    estimate = method(y, operator)
    level = (operator(estimate.mean) - y).flatten(1).norm(dim=1) / (std * 60**0.5)
    assert estimate.stats["discrepancy"] == pytest.approx(level.tolist())
    assert (level <= 1.2).all() and (level > 0.9).all()
    assert estimate.stats["num_iterations"] == sorted(estimate.stats["num_iterations"], reverse=True)
    for k in range(3):
        alone = method(y[k : k + 1], DenseOperator(operator.matrix, (1, 6, 6), std[k : k + 1]))
        torch.testing.assert_close(alone.mean[0], estimate.mean[k], atol=1e-9, rtol=0)
        assert alone.stats["num_iterations"] == [estimate.stats["num_iterations"][k]]


def test_a_ray_of_infinite_noise_has_no_say_in_sirt():
    operator, y = positive()
    std = torch.full((1, 1, 1, 60), 0.1, dtype=torch.float64)
    std[..., 7] = torch.inf
    aware = DenseOperator(operator.matrix, (1, 6, 6), std)
    spoilt = y.clone()
    spoilt[..., 7] += 100.0
    method = SIRT(num_iterations=50, discrepancy=0.0)
    torch.testing.assert_close(method(spoilt, aware).mean, method(y, aware).mean)


def test_sirt_refuses_negative_entries():
    mixed = torch.eye(36, dtype=torch.float64)
    mixed[0, 1:] = 5.0 * (-1.0) ** torch.arange(35)  # its sums betray nothing
    mixed[0, 0] = 100.0
    for matrix in (-torch.eye(36, dtype=torch.float64), torch.randn(50, 36, dtype=torch.float64)):
        with pytest.raises(InputError, match="negative entries"):
            SIRT()(torch.ones(1, 1, 1, len(matrix), dtype=torch.float64), DenseOperator(matrix, (1, 6, 6)))
    difference = torch.tensor([[10.0, -9.0], [-9.0, 10.0]], dtype=torch.float64)
    with pytest.raises(InputError, match="negative entries"):
        y = torch.tensor([1.0, 0.0], dtype=torch.float64).reshape(1, 1, 1, 2)
        SIRT(bounds=None)(y, DenseOperator(difference, (1, 1, 2)))


def test_the_costs_of_admm_and_sirt_are_counted():
    operator, y = positive()
    stats = SIRT(num_iterations=9)(y, operator).stats
    assert (stats["num_operator_calls"], stats["num_evaluations"]) == (2 + 1 + 2 * 9, 0)
    stats = ADMMTV(num_iterations=5, cg_iterations=3, tol=0)(y, operator).stats
    assert stats["num_operator_calls"] == 5 * (2 + 2 + 2 * 3) + 2  # adjoint, forward, CG with its start; the gap
    assert stats["num_iterations"] == [5, 5, 5]


def test_fbp_reports_its_clipping():
    y = torch.linspace(-0.51, 1.5, 25, dtype=torch.float64).reshape(1, 1, 5, 5)
    estimate = FBP()(flat(y), identity((1, 5, 5)))
    torch.testing.assert_close(estimate.mean, y.clamp(0, 1))
    assert estimate.stats["clipped_fraction"] == pytest.approx([float(((y < 0) | (y > 1)).double().mean())])
    torch.testing.assert_close(FBP(clip=None)(flat(y), identity((1, 5, 5))).mean, y)


def test_measurements_that_do_not_fit_are_refused():
    operator = identity((1, 5, 5))
    for y in (
        torch.zeros(25),
        torch.zeros(1, 1, 1, 24),
        torch.full((1, 1, 1, 25), torch.nan),
        torch.zeros(1, 1, 1, 25).int(),
    ):
        for method in (FBP(), TotalVariation(), ADMMTV(), SIRT()):
            with pytest.raises(InputError, match="measurement"):
                method(y, operator)


def test_bad_knobs_are_refused():
    for make in (
        lambda: TotalVariation(weight=0),
        lambda: TotalVariation(noise_weight=-1),
        lambda: TotalVariation(num_iterations=0),
        lambda: TotalVariation(tol=-1),
        lambda: TotalVariation(bounds=(1.0, 0.0)),
        lambda: FBP(clip=(1.0, 1.0)),
        lambda: ADMMTV(cg_iterations=0),
        lambda: ADMMTV(weight=0),
        lambda: SIRT(num_iterations=0),
        lambda: SIRT(relaxation=2.0),
        lambda: SIRT(discrepancy=-1.0),
        lambda: SIRT(bounds=(1.0, 0.0)),
    ):
        with pytest.raises(InputError):
            make()
