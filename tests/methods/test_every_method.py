"""What every method without a prior promises: a file of `invrecon/methods` is enough to be tested here."""

import inspect

import pytest
import torch

import invrecon.methods
from invrecon.discovery import needs_arguments
from invrecon.errors import InputError
from invrecon.methods import Method
from invrecon.methods.dip import NetworkFit
from invrecon.operators import ParallelBeamCT
from tests.methods.toy import generators


def is_entrant(value):
    if not (inspect.isclass(value) and issubclass(value, Method)) or inspect.isabstract(value) or value.needs_prior:
        return False
    # Fits of networks take minutes, and are tested in test_dip.py.
    return not needs_arguments(value) and not issubclass(value, NetworkFit)


NAMES = [name for name, value in vars(invrecon.methods).items() if is_entrant(value)]


@pytest.fixture(params=NAMES)
def method(request):
    """The method, with few iterations where it has a number of them."""
    kind = getattr(invrecon.methods, request.param)
    return kind(num_iterations=50) if "num_iterations" in inspect.signature(kind).parameters else kind()


@pytest.fixture(scope="module")
def problem():
    """Three cones in [0, 1] from 8 views, and a noise level each: `(y, operator, noise_std, images)`."""
    operator = ParallelBeamCT(size=16, num_views=8, num_bins=32).double()
    grid = torch.linspace(-1, 1, 16, dtype=torch.float64)
    radius = torch.hypot(grid[:, None], grid)
    x = torch.stack([(1 - radius / reach).clamp(min=0) for reach in (0.7, 0.8, 0.9)])[:, None]
    std = torch.tensor([0.01, 0.02, 0.05], dtype=torch.float64)
    noise = torch.randn(3, *operator.measurement_shape, generator=generators(1)[0], dtype=torch.float64)
    return operator(x) + std[:, None, None, None] * noise, operator, std, x


def run(method, problem, index=(0, 1, 2)):
    y, operator, std, _ = problem
    operator = operator._shallow_copy()
    operator.noise_std = std[list(index)]
    return method(y[list(index)], operator, generators=generators(len(index)))


def test_a_case_does_not_depend_on_its_batch(method, problem):
    together = run(method, problem).mean
    assert together.shape == (3, 1, 16, 16)
    torch.testing.assert_close(run(method, problem, (1, 0, 2)).mean[[1, 0, 2]], together, atol=1e-6, rtol=0)
    torch.testing.assert_close(run(method, problem, (1,)).mean, together[[1]], atol=1e-6, rtol=0)


def error(a, b):
    """`||a - b|| / ||b||` of every sample."""
    return (a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)


def least_error(a, b):
    """That of the best multiple of `a`."""
    dims = tuple(range(1, a.ndim))
    return error((a * b).sum(dims, keepdim=True) / a.square().sum(dims, keepdim=True) * a, b)


def test_its_image_fits_the_data_and_the_truth(method, problem):
    # What has no more of an inverse than the transpose, scaled to fit, leaves 0.33 to 0.43 of the data and 0.50 to
    # 0.58 of the image; an image that is right but for a factor of 1.3 fails as well.
    y, operator, _, x = problem
    estimate = run(method, problem)
    residual, smeared = error(operator(estimate.mean), y), operator.adjoint(y)
    assert (residual < 0.25 * least_error(operator(smeared), y)).all()
    assert (error(estimate.mean, x) < 0.25 * least_error(smeared, x)).all()
    assert estimate.stats["relative_residual"] == pytest.approx(residual.tolist(), rel=1e-6)


def test_rays_count_by_their_precision(method, problem):
    if isinstance(method, invrecon.methods.FBP):
        pytest.skip("a direct inverse knows no weights")
    y, operator, std, x = problem
    operator = operator._shallow_copy()
    operator.noise_std = std[:, None, None, None].expand(y.shape).clone()
    operator.noise_std[:, :, 3] *= 1e4  # a view that says nothing ...
    spoilt = y.clone()
    spoilt[:, :, 3] += torch.randn(3, 1, 32, generator=generators(1)[0], dtype=torch.float64)
    images = [method(data, operator, generators=generators(3)).mean for data in (y, spoilt)]
    assert error(images[1], images[0]).max() < 1e-3  # ... is not listened to
    assert error(images[1], x).max() < 0.2


def test_applications_of_the_operator_are_counted(method, problem):
    y, _, std, _ = problem
    calls = []

    class Counted(ParallelBeamCT):
        def forward(self, x):
            calls.append("A")
            return super().forward(x)

        def adjoint(self, y):
            calls.append("A^T")
            return super().adjoint(y)

    operator = Counted(size=16, num_views=8, num_bins=32).double()
    operator.noise_std = std
    operator.norm()
    calls.clear()
    stats = method(y, operator, generators=generators(3)).stats
    assert stats["num_operator_calls"] == len(calls) - 1  # the residual that is reported takes another


def test_it_asks_no_denoiser(method, problem):
    assert run(method, problem).stats["num_evaluations"] == method.num_evaluations == 0


def test_a_measurement_of_another_operator_is_refused(method, problem):
    y, operator, *_ = problem
    with pytest.raises(InputError, match="ParallelBeamCT measures"):
        method(y[..., :-1], operator)
