"""The losses' values and gradients against finite differences, dense algebra and each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from invrecon.adapt.losses import DataLoss, ImplicitProximalDataLoss, ProximalDataLoss, SelfSupervisedLoss
from invrecon.errors import InputError
from invrecon.methods.classical import total_variation
from invrecon.operators import LinearOperator, ParallelBeamCT
from tests.methods.toy import make_toy

LOSSES: dict[str, SelfSupervisedLoss] = {
    "data": DataLoss(),
    "data and TV": DataLoss(tv_weight=0.01),
    "proximal": ProximalDataLoss(3, weight=2.0),
    "proximal and TV": ProximalDataLoss(5, tv_weight=0.01),
    "implicit": ImplicitProximalDataLoss(20, weight=2.0, tv_weight=0.01),
}


def problem() -> tuple[LinearOperator, Tensor, Tensor]:
    operator = ParallelBeamCT(16, num_views=5, num_bins=20).double()
    y = operator(torch.rand(2, 1, 16, 16, dtype=torch.float64))
    return operator, y, torch.rand(2, 1, 16, 16, dtype=torch.float64)


def dense(operator: LinearOperator) -> Tensor:
    size = torch.Size(operator.image_shape).numel()
    return operator(torch.eye(size, dtype=torch.float64).reshape(size, *operator.image_shape)).flatten(1).T


def test_values_against_dense_algebra() -> None:
    operator, y, x = problem()
    A = dense(operator)
    gamma = 2.0 / operator.norm() ** 2
    z = torch.linalg.solve(
        torch.eye(A.shape[1]).double() + gamma * A.T @ A, (x.flatten(1) + gamma * y.flatten(1) @ A).T
    ).T
    for estimate, loss in ((x.flatten(1), DataLoss(0.3)), (z, ProximalDataLoss(60, weight=2.0, tv_weight=0.3))):
        expected = (estimate @ A.T - y.flatten(1)).square().mean(1) + 0.3 * total_variation(estimate.reshape(x.shape))
        torch.testing.assert_close(loss(x, operator, y), expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("kind", LOSSES)
def test_cotangent_equals_finite_differences(kind: str) -> None:
    """With few CG iterations this holds for the unrolled gradient; the implicit one needs CG to have converged."""
    operator, y, x = problem()
    loss, direction, step = LOSSES[kind], torch.randn_like(x), 1e-5
    v = loss.cotangent(x, operator, y)
    change = (loss(x + step * direction, operator, y) - loss(x - step * direction, operator, y)) / (2 * step)
    torch.testing.assert_close((v * direction).flatten(1).sum(1), change, rtol=1e-5, atol=1e-10)  # TV bends
    assert not v.requires_grad


@pytest.mark.parametrize("kind", LOSSES)
def test_the_loss_is_differentiable_and_its_gradient_is_the_cotangent(kind: str) -> None:
    operator, y, x = problem()
    leaf = x.clone().requires_grad_(True)
    loss = LOSSES[kind](leaf, operator, y)
    assert loss.shape == (2,)
    loss.sum().backward()
    with torch.no_grad():
        assert torch.equal(leaf.grad, LOSSES[kind].cotangent(x, operator, y))


@pytest.mark.parametrize("kind", LOSSES)
def test_a_sample_does_not_depend_on_its_batch(kind: str) -> None:
    operator, y, x = problem()
    together = LOSSES[kind].cotangent(x, operator, y)
    alone = [LOSSES[kind].cotangent(x[b : b + 1], operator, y[b : b + 1]) for b in range(2)]
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("num_iterations", [1, 2, 5, 40])
def test_implicit_and_unrolled_losses_have_one_value(num_iterations: int) -> None:
    operator, y, x = problem()
    pair = [kind(num_iterations, 5.0, 0.1) for kind in (ProximalDataLoss, ImplicitProximalDataLoss)]
    unrolled, implicit = (loss(x, operator, y) for loss in pair)
    assert torch.equal(unrolled, implicit)


def test_implicit_gradient_equals_the_unrolled_one_once_cg_has_converged() -> None:
    toy = make_toy()
    x = torch.randn(3, *toy.operator.image_shape, dtype=torch.float64)
    y = toy.y.expand(3, -1, -1, -1)

    def difference(num_iterations: int) -> float:
        losses = [kind(num_iterations, 20.0) for kind in (ProximalDataLoss, ImplicitProximalDataLoss)]
        unrolled, implicit = (loss.cotangent(x, toy.operator, y) for loss in losses)
        return float((unrolled - implicit).norm() / implicit.norm())

    assert difference(1) > 0.05  # they are different gradients,
    assert difference(6) < 1e-8  # of the same function: a matrix of rank 6 is solved in six iterations


def test_implicit_gradient_against_dense_algebra() -> None:
    toy = make_toy()
    A = toy.operator.matrix
    gamma = 20.0 / toy.operator.norm() ** 2
    inverse = torch.linalg.inv(torch.eye(12).double() + gamma * A.T @ A)
    x = torch.randn(1, *toy.operator.image_shape, dtype=torch.float64)
    z = inverse @ (x.flatten() + gamma * A.T @ toy.y.flatten())
    expected = inverse @ (2 / 6 * A.T @ (A @ z - toy.y.flatten()))
    v = ImplicitProximalDataLoss(12, 20.0).cotangent(x, toy.operator, toy.y)
    torch.testing.assert_close(v.flatten(), expected, rtol=1e-7, atol=1e-12)


def test_weights_are_free_of_the_geometrys_scale() -> None:
    x = torch.randn(1, 1, 3, 4, dtype=torch.float64)
    small, large = make_toy(noise_std=0.0), make_toy(noise_std=0.0, scale=100.0)
    loss = ProximalDataLoss(2, weight=3.0)
    a, b = loss.cotangent(x, small.operator, small.y), loss.cotangent(x, large.operator, large.y)
    torch.testing.assert_close(1e4 * a, b, rtol=1e-3, atol=0)


@pytest.mark.parametrize("loss", [DataLoss(tv_weight=1.0), ProximalDataLoss(2, tv_weight=1.0)])
@pytest.mark.parametrize("level", [0.0, 0.4])
def test_total_variation_has_a_finite_subgradient_at_constant_images(loss: SelfSupervisedLoss, level: float) -> None:
    operator, _, x = problem()
    x = torch.full_like(x, level)
    v = loss.cotangent(x, operator, operator(x))
    assert bool(v.isfinite().all())
    assert float(v.abs().max()) < 1e-6  # the data are explained, and a constant image has the least variation


def test_rays_count_by_their_precision() -> None:
    operator, y, x = problem()
    std = torch.ones_like(y)
    std[..., 2, :] = torch.inf
    noisy = operator._shallow_copy()
    noisy.noise_std = std
    spoilt = y.clone()
    spoilt[..., 2, :] += 100.0
    for loss in (DataLoss(), ProximalDataLoss(3)):
        assert torch.equal(loss(x, noisy, y), loss(x, noisy, spoilt))
    noisy.noise_std = torch.tensor([0.1, 0.7], dtype=torch.float64)  # the same for every ray: no weights
    assert torch.equal(DataLoss()(x, noisy, y), DataLoss()(x, operator, y))


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: DataLoss(-1.0), "DataLoss: tv_weight"),
        (lambda: ProximalDataLoss(0), "num_iterations"),
        (lambda: ImplicitProximalDataLoss(weight=0.0), "ImplicitProximalDataLoss needs"),
        (lambda: ImplicitProximalDataLoss(tv_weight=float("nan")), "ImplicitProximalDataLoss: tv_weight"),
    ],
)
def test_refusals(make, word: str) -> None:
    with pytest.raises(InputError, match=word):
        make()
