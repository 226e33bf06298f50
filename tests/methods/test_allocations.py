"""What a step of a sampler allocates, and that reusing memory changes no number.

Counted are tensors of at least an image's size whose memory is new, in the operations that Python asks for.
"""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from invrecon.methods import (
    DDIM,
    AcceleratedRenoise,
    DDSTransition,
    GeometricSchedule,
    Langevin,
    Renoise,
    diffuse,
)
from invrecon.methods.draws import LangevinDataSampler
from invrecon.methods.langevin import PredictorCorrector
from invrecon.methods.transitions import DouglasRachford, PriorNoise, ReverseSDE
from invrecon.operators import UniformBlur
from invrecon.operators.base import conjugate_gradient
from invrecon.rng import make_generators, randn

SHAPE = (2, 1, 32, 32)


class Allocations(TorchDispatchMode):
    """Counts them while it is entered."""

    num = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given, made = (
            {
                t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in tree_leaves(tree)
                if torch.is_tensor(t)
            }
            for tree in ((args, kwargs), result)
        )
        self.num += sum(place not in given and num >= 4 * math.prod(SHAPE) for place, num in made.items())
        return result


def count(function):
    with Allocations() as allocations:
        function()
    return allocations.num


def draws():
    return make_generators(0, ["a", "b"])


def images(seed=0, dtype=torch.float32):
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def halve(x, sigma, generators=None):
    return 0.5 * x


@pytest.mark.parametrize(
    ("transition", "num"),
    [
        (DDIM(1.0), 1),
        (DDIM(0.5), 1),
        (DDIM(0.0), 1),
        (DDSTransition(), 1),
        (Renoise(), 1),
        (AcceleratedRenoise(), 1),
        (Langevin(), 1),
        (ReverseSDE(), 1),
        (DouglasRachford().bind(halve, None, None), 2),  # the state, and the mean that it returns in the end
        (PriorNoise(DDIM(1.0), halve), 2),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, int) else str(value),
)
def test_a_step_allocates_the_new_state_alone(transition, num):
    def run(num_levels):
        schedule = GeometricSchedule(num_levels, 2.0, 0.1)
        return count(lambda: diffuse(images(), halve, schedule, transition, draws()))

    # The denoiser allocates one image a level here, or two where the transition asks it as well.
    asked = 2 if transition.needs_measurement or isinstance(transition, PriorNoise) else 1
    assert (run(24) - run(4)) / 20 <= num + asked


def test_data_steps_by_langevin_allocate_what_the_operator_does():
    operator, sampler = UniformBlur(size=32), LangevinDataSampler
    y = operator(images())
    own = count(lambda: operator.normal(images(1))) - count(lambda: images(1))
    short, long = (count(lambda num=num: sampler(num)(operator, y)(images(), 0.1, draws())) for num in (5, 25))
    assert (long - short) / 20 == own


def test_conjugate_gradients_allocate_what_the_operator_does_unless_a_gradient_is_recorded():
    operator = UniformBlur(size=32)
    rhs, start = operator.adjoint(operator(images())), images(1)

    def solve(num, x0=None):
        return conjugate_gradient(operator.normal, rhs, x0, max_iter=num, tol=0.0)

    own = count(lambda: operator.normal(images(1))) - count(lambda: images(1))
    kept = rhs.clone(), start.clone()
    with torch.no_grad():
        assert (count(lambda: solve(25)) - count(lambda: solve(5))) / 20 == own
        in_place = [solve(7, x0) for x0 in (None, start)]
    assert torch.equal(rhs, kept[0]) and torch.equal(start, kept[1]), "what was given is as it was"
    assert all(torch.equal(solve(7, x0), found) for x0, found in zip((None, start), in_place, strict=True))


def test_the_corrector_allocates_little_beside_its_gradient():
    operator = UniformBlur(size=32)
    y = operator(images())
    own = count(lambda: operator.adjoint(operator(images(1)))) - count(lambda: images(1))

    def run(num_levels):
        method = PredictorCorrector(num_levels, num_samples=1)
        return count(lambda: method(y, operator, Halves(), generators=draws()))

    # Two updates a level. Each: the state, the residual and what weighs the gradient; the denoised image.
    assert (run(24) - run(4)) / 40 <= own + 5


class Halves(torch.nn.Module):
    """A prior."""

    def forward(self, x, sigma, *, generators=None):
        return halve(x, sigma)


@pytest.mark.parametrize("shape", [(1,), (3, 5), (1, 33, 31)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_the_same_in_memory_that_is_reused(shape, dtype):
    like, generators, reference = torch.empty(0, dtype=dtype), draws(), draws()
    buffer = None
    for _ in range(3):
        expected = torch.stack([torch.randn(shape, generator=g, dtype=dtype) for g in reference])
        before, buffer = buffer, randn(shape, generators, like, out=buffer)
        assert torch.equal(buffer, expected) and (before is None or before is buffer)


@pytest.mark.parametrize("wrong", [torch.empty(0), torch.empty(2, 1, 9, 8), torch.empty(2, 1, 8, 8).double(), None])
def test_memory_that_does_not_fit_is_left_alone(wrong):
    like = torch.empty(0)
    wrong = torch.empty(2, 8, 8, 1).movedim(-1, 1).mT if wrong is None else wrong  # in another order
    before = wrong.clone()
    noise = randn((1, 8, 8), draws(), like, out=wrong)
    assert torch.equal(noise, randn((1, 8, 8), draws(), like)) and noise is not wrong
    assert torch.equal(wrong.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize(
    ("transition", "formula"),
    [
        (Langevin(0.5), lambda x, x0, n: x + 0.25 * (x0 - x) + 1.0 * math.sqrt(0.5) * 0.5 * n),
        (Renoise(), lambda x, x0, n: x0 + 0.0 * (x - x0) + 0.4 * 1.0 * n),
        (ReverseSDE(), lambda x, x0, n: x + ((0.5**2 - 0.4**2) / 0.5**2) * (x0 - x) + math.sqrt(0.5**2 - 0.4**2) * n),
        (AcceleratedRenoise(0.2, 0.7), lambda x, x0, n: x0 + 0.2 * 0.4 * n),
    ],
    ids=["langevin", "renoise", "sde", "accelerated"],
)
def test_what_is_given_is_kept_and_no_number_changes(transition, formula):
    x, x0 = images(1), images(2)
    given = x.clone(), x0.clone()
    step, generators, reference = transition.begin(), draws(), draws()
    results = []
    for _ in range(2):
        expected = formula(x, x0, randn(SHAPE[1:], reference, x))
        results.append(step(x, x0, 0.5, 0.4, generators))
        assert torch.equal(results[-1], expected)
    assert torch.equal(x, given[0]) and torch.equal(x0, given[1])
    assert not torch.equal(*results), "the second step leaves the first one's result alone"
    assert transition._noise is None, "and what is shared between runs keeps nothing"


def test_data_steps_by_langevin_change_no_number():
    operator = UniformBlur(size=32)
    y, x0 = operator(images()), images(3)
    r, gamma, generators = 0.1, torch.tensor([3.0, 50.0]), draws()
    given = x0.clone()
    z = LangevinDataSampler(7).draw(operator, y, x0, r, gamma, draws())
    h = 0.2 / (1 + gamma * operator.norm() ** 2)
    pull, weight, spread = (v.reshape(-1, 1, 1, 1) for v in (h, h * gamma, r * (2 * h).sqrt()))
    expected, target = x0, operator.adjoint(y)
    for _ in range(7):
        drift = weight * (operator.normal(expected) - target) + pull * (expected - x0)
        expected = expected - drift + spread * randn(x0.shape[1:], generators, x0)
    assert torch.equal(z, expected) and torch.equal(x0, given)
