"""What every linear operator must satisfy.

An operator whose arguments all have defaults, `size` among them, gets all of it by itself, for images of 8 x 8 pixels
(`test_every_operator.py`). Others, and more shapes, are given by one parametrize line:

    @pytest.mark.parametrize("check", CHECKS)
    @pytest.mark.parametrize("make", [lambda: MyOperator(...)])
    def test_battery(make, check):
        check(make)

Operators should be tiny: some checks form the dense matrix.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from invrecon.errors import InputError
from invrecon.operators import LinearOperator

Make = Callable[[], LinearOperator]


def images(operator: LinearOperator, batch: int = 3, seed: int = 0) -> Tensor:
    """Normal noise shaped like images of `operator`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, *operator.image_shape, generator=generator, dtype=torch.float64)
    return x.to(operator.device, operator.dtype)


def measurements(operator: LinearOperator, batch: int = 3, seed: int = 1) -> Tensor:
    """Normal noise shaped like measurements of `operator`."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(batch, *operator.measurement_shape, generator=generator, dtype=torch.float64)
    return y.to(operator.device, operator.dtype)


def dense(operator: LinearOperator) -> Tensor:
    """The matrix of `operator`, `(M, N)`."""
    size = torch.Size(operator.image_shape).numel()
    basis = torch.eye(size, dtype=operator.dtype, device=operator.device)
    return operator(basis.reshape(size, *operator.image_shape)).reshape(size, -1).T


def inner(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).flatten(1).sum(1)


def relative_error(a: Tensor, b: Tensor) -> float:
    scale = b.double().norm().clamp(min=1e-300)
    return float((a.double() - b.double()).norm() / scale) if bool(b.any()) else float(a.double().norm())


def dot_product_mismatch(operator: LinearOperator) -> float:
    """Largest `|<A x, y> - <x, A^T y>| / (||A x|| ||y||)`."""
    x, y = images(operator), measurements(operator)
    projected = operator(x)
    mismatch = (inner(projected, y) - inner(x, operator.adjoint(y))).abs()
    scale = (inner(projected, projected) * inner(y, y)).sqrt()
    return float((mismatch / scale.clamp(min=1e-30)).max())


def check_shapes(make: Make) -> None:
    operator = make()
    assert operator(images(operator, 2)).shape == (2, *operator.measurement_shape)
    assert operator.adjoint(measurements(operator, 2)).shape == (2, *operator.image_shape)


def check_wrong_shape(make: Make) -> None:
    operator = make()
    with pytest.raises(InputError, match="shape"):
        operator(images(operator)[..., None])
    with pytest.raises(InputError, match="shape"):
        operator.adjoint(measurements(operator)[..., None])


def check_dot_product_float64(make: Make) -> None:
    assert dot_product_mismatch(make().double()) < 1e-12


def check_dot_product_float32(make: Make) -> None:
    assert dot_product_mismatch(make()) < 1e-5


def check_linearity(make: Make) -> None:
    operator = make().double()
    x, z = images(operator), images(operator, seed=2)
    assert relative_error(operator(2.5 * x - z), 2.5 * operator(x) - operator(z)) < 1e-13
    assert not operator(torch.zeros_like(x)).any()


def check_normal(make: Make) -> None:
    operator = make().double()
    x = images(operator)
    assert relative_error(operator.normal(x), operator.adjoint(operator(x))) < 1e-12


def check_gradient_is_adjoint(make: Make) -> None:
    operator = make().double()
    x, y = images(operator).requires_grad_(), measurements(operator).requires_grad_()
    (gradient,) = torch.autograd.grad(operator(x), x, y.detach())
    assert relative_error(gradient, operator.adjoint(y.detach())) < 1e-12
    (gradient,) = torch.autograd.grad(operator.adjoint(y), y, x.detach())
    assert relative_error(gradient, operator(x.detach())) < 1e-12


def check_second_derivative(make: Make) -> None:
    operator = make().double()
    x, y = images(operator).requires_grad_(), measurements(operator)
    (gradient,) = torch.autograd.grad((operator(x) - y).square().sum() / 2, x, create_graph=True)
    direction = images(operator, seed=3)
    (hessian,) = torch.autograd.grad(gradient, x, direction)
    assert relative_error(hessian, operator.normal(direction)) < 1e-12


def check_batch_equals_singles(make: Make) -> None:
    operator = make()
    x, y = images(operator), measurements(operator)
    for function, batch in ((operator, x), (operator.adjoint, y)):
        together = function(batch)
        assert relative_error(function(batch.flip(0)).flip(0), together) < 1e-6
        assert relative_error(torch.cat([function(sample[None]) for sample in batch]), together) < 1e-6


def check_devices(make: Make) -> None:
    operator = make()
    reference = operator(images(operator))
    moved = make().to("meta")
    assert moved.device.type == "meta"
    if torch.cuda.is_available():
        moved = operator.to("cuda")
        on_device = moved(images(moved))
        assert on_device.is_cuda
        assert relative_error(on_device.cpu(), reference) < 1e-5
        assert relative_error(moved.to("cpu")(images(moved)), reference) < 1e-6


def check_copies(make: Make) -> None:
    operator = make()
    x = images(operator)
    expected = operator(x)
    twin = copy.deepcopy(operator)
    assert torch.equal(twin(x), expected)
    assert relative_error(twin.double()(x.double()), expected) < 1e-5
    assert operator(x).dtype == torch.float32, "a copy must not change its original"


def check_stateless(make: Make) -> None:
    operator = make()
    operator(images(operator))
    assert not operator.state_dict()
    assert not list(operator.parameters())


def check_norm(make: Make) -> None:
    operator = make().double()
    largest = float(torch.linalg.matrix_norm(dense(operator), ord=2))
    if type(operator).__name__ == "WhitenedOperator":  # an upper bound, by contract
        assert operator.norm() >= largest * (1 - 1e-4)
    else:
        assert operator.norm() == pytest.approx(largest, rel=1e-3)
        assert operator.norm() <= largest * (1 + 1e-9)


def check_pinv(make: Make) -> None:
    operator = make().double()
    y = operator(images(operator))
    x = operator.pinv(y, max_iter=2000, tol=1e-13)
    assert relative_error(operator(x), y) < 1e-6  # A A^+ A = A
    again = operator.pinv(operator(x), max_iter=2000, tol=1e-13)
    assert relative_error(again, x) < 1e-3  # A^+ A A^+ = A^+


def check_prox(make: Make) -> None:
    operator = make().double()
    x, y = images(operator), measurements(operator)
    weight = torch.tensor([0.01, 1.0, 30.0], dtype=torch.float64, device=operator.device)
    weight = weight / operator.norm() ** 2
    z = operator.prox(x, y, weight, max_iter=300, tol=1e-14)
    gradient = weight[:, None] * operator.adjoint(operator(z) - y).flatten(1) + (z - x).flatten(1)
    assert float(gradient.norm()) < 1e-9 * float(x.norm())
    assert torch.equal(operator.prox(x, y, 0.0), x)


def check_projection_limit(make: Make) -> None:
    operator = make().double()
    x, y = images(operator), operator(images(operator, seed=5))
    z = operator.prox(x, y, float("inf"), max_iter=2000, tol=1e-13)
    assert relative_error(operator(z), y) < 1e-6
    assert relative_error(x + operator.pinv(y - operator(x), max_iter=2000, tol=1e-13), z) < 1e-6


CHECKS = [function for name, function in list(globals().items()) if name.startswith("check_")]
