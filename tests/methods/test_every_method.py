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
    return kind(num_iterations=25) if "num_iterations" in inspect.signature(kind).parameters else kind()


@pytest.fixture(scope="module")
def problem():
    """Three smooth images in [0, 1] from 8 views, and a noise level each: `(y, operator, noise_std)`."""
    operator = ParallelBeamCT(size=16, num_views=8, num_bins=32).double()
    grid = torch.linspace(-1, 1, 16, dtype=torch.float64)
    radius = torch.hypot(grid[:, None], grid)
    x = torch.stack([(1 - radius / reach).clamp(min=0) for reach in (0.7, 0.8, 0.9)])[:, None]
    std = torch.tensor([0.01, 0.02, 0.05], dtype=torch.float64)
    noise = torch.randn(3, *operator.measurement_shape, generator=generators(1)[0], dtype=torch.float64)
    return operator(x) + std[:, None, None, None] * noise, operator, std


def run(method, problem, index=(0, 1, 2)):
    y, operator, std = problem
    operator = operator._shallow_copy()
    operator.noise_std = std[list(index)]
    return method(y[list(index)], operator, generators=generators(len(index)))


def test_a_case_does_not_depend_on_its_batch(method, problem):
    together = run(method, problem).mean
    assert together.shape == (3, 1, 16, 16)
    torch.testing.assert_close(run(method, problem, (1, 0, 2)).mean[[1, 0, 2]], together, atol=1e-6, rtol=0)
    torch.testing.assert_close(run(method, problem, (1,)).mean, together[[1]], atol=1e-6, rtol=0)


def test_its_image_fits_the_data(method, problem):
    y, operator, _ = problem
    estimate = run(method, problem)
    residual = (operator(estimate.mean) - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)
    assert residual.max() < 0.5  # nothing at all has 1
    assert estimate.stats["relative_residual"] == pytest.approx(residual.tolist(), rel=1e-6)


def test_it_asks_no_denoiser(method, problem):
    assert run(method, problem).stats["num_evaluations"] == method.num_evaluations == 0


def test_a_measurement_of_another_operator_is_refused(method, problem):
    y, operator, _ = problem
    with pytest.raises(InputError, match="ParallelBeamCT measures"):
        method(y[..., :-1], operator)
