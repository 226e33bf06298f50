"""Operators, physics and denoisers on both sides of deepinv: the same numbers, and errors that say what to do.

Everything runs against a stand-in with deepinv's interfaces, and against deepinv itself where it can be imported; where
only torchvision is missing, in a process of its own in which torchvision is a dummy.
"""
# ruff: noqa: N802 - deepinv's names

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from invrecon.errors import InputError
from invrecon.methods import FBP
from invrecon.neighbours import deepinv as neighbour
from invrecon.neighbours import denoiser_to_deepinv, from_deepinv, to_deepinv
from invrecon.operators import GaussianBlur, Identity, LinearOperator, ParallelBeamCT
from invrecon.priors.analytic import GaussianPrior
from invrecon.priors.base import Prior
from invrecon.rng import make_generators, randn

ROOT = Path(__file__).resolve().parents[2]
SIZE = 12


def stand_in() -> dict[str, ModuleType]:
    """Modules with the parts of deepinv's interfaces that are used."""

    class ZeroNoise(nn.Module):
        def forward(self, x: Tensor, **others: object) -> Tensor:
            return x

    class GaussianNoise(nn.Module):
        sigma: Tensor

        def __init__(self, sigma: float | Tensor = 0.1, rng: torch.Generator | None = None) -> None:
            super().__init__()
            self.rng = rng
            self.register_buffer("sigma", torch.as_tensor(sigma, dtype=torch.float32))

        def forward(self, x: Tensor, sigma: Any = None, seed: int | None = None, **others: object) -> Tensor:
            self.sigma = self.sigma if sigma is None else torch.as_tensor(sigma, dtype=torch.float32)
            return x + self.sigma.reshape(-1, *[1] * (x.ndim - 1)) * torch.randn(x.shape, generator=self.rng)

    class PoissonNoise(nn.Module):
        def forward(self, x: Tensor, **others: object) -> Tensor:
            return torch.poisson(x)

    class Physics(nn.Module):
        def __init__(self, A: Any = None, noise_model: Any = None, max_iter: int = 50, tol: float = 1e-4) -> None:
            super().__init__()
            self.forw, self.noise_model, self.max_iter, self.tol = A, noise_model or ZeroNoise(), max_iter, tol

        def forward(self, x: Tensor, **others: Any) -> Tensor:
            return self.noise_model(self.A(x, **others), **others)

        def A(self, x: Tensor, **others: Any) -> Tensor:
            return self.forw(x, **others)

    class LinearPhysics(Physics):
        def __init__(self, A: Any = None, A_adjoint: Any = None, img_size: Any = None, **others: Any) -> None:
            super().__init__(A, **others)
            self.A_adj, self.img_size = A_adjoint, img_size

        def A_adjoint(self, y: Tensor, **others: Any) -> Tensor:
            return self.A_adj(y, **others)

        def A_adjoint_A(self, x: Tensor, **others: Any) -> Tensor:
            return self.A_adjoint(self.A(x, **others), **others)

        def A_vjp(self, x: Tensor, v: Tensor) -> Tensor:
            return self.A_adjoint(v)

        def A_dagger(self, y: Tensor, **others: Any) -> Tensor:
            return self.A_adjoint(y, **others)

    class MRI(LinearPhysics):
        def __init__(self, mask: Tensor, img_size: Any) -> None:
            super().__init__(lambda x, **others: mask * x, lambda y, **others: mask * y, img_size)

    class Denoiser(nn.Module):
        def __init__(self, device: str = "cpu") -> None:
            super().__init__()
            self.to(device)

    modules = {name: ModuleType(name) for name in ("deepinv", "deepinv.physics", "deepinv.models")}
    root, physics, models = modules.values()
    root.physics, root.models = physics, models  # type: ignore[attr-defined]
    for kind in (ZeroNoise, GaussianNoise, PoissonNoise, Physics, LinearPhysics, MRI):
        setattr(physics, kind.__name__, kind)
    models.Denoiser = Denoiser  # type: ignore[attr-defined]
    return modules


@pytest.fixture(params=["stand-in", "real"])
def deepinv(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """deepinv, or what stands in for it."""
    if request.param == "real":
        pytest.importorskip("deepinv", exc_type=ImportError)
    else:
        for name, module in stand_in().items():
            monkeypatch.setitem(sys.modules, name, module)
    neighbour._classes.cache_clear()
    yield neighbour.load_deepinv()
    neighbour._classes.cache_clear()


def operators() -> list[LinearOperator]:
    return [ParallelBeamCT(SIZE, 5, num_bins=18), GaussianBlur(SIZE, kernel_size=5, std=1.0), Identity((SIZE, 9), 2)]


def image(operator: LinearOperator, num: int = 2, seed: int = 0) -> Tensor:
    return torch.rand(num, *operator.image_shape, generator=torch.Generator().manual_seed(seed))


def gaussian_prior(num_channels: int = 1, size: int = SIZE) -> GaussianPrior:
    n = num_channels * size * size
    factor = torch.randn(n, n, generator=torch.Generator().manual_seed(3), dtype=torch.float64) / n**0.5
    return GaussianPrior(torch.full((num_channels, size, size), 0.4), (0.05 * factor @ factor.T).float())


class Shifting(Prior):
    """A denoiser that draws, as a patch prior does."""

    def forward(self, x: Tensor, sigma: float | Tensor, *, generators: Any = None) -> Tensor:
        return x + randn(x.shape[1:], generators, like=x)


@pytest.mark.parametrize("index", range(3))
def test_a_physics_is_the_operator(deepinv: Any, index: int) -> None:
    operator = operators()[index]
    physics, x = to_deepinv(operator), image(operator)
    assert isinstance(physics, deepinv.physics.LinearPhysics)
    y = operator(x)
    assert torch.equal(physics.A(x), y) and torch.equal(physics(x), y)
    assert torch.equal(physics.A_adjoint(y), operator.adjoint(y))
    assert torch.allclose(physics.A_adjoint_A(x), operator.normal(x))
    assert torch.equal(physics.A_vjp(x, y), operator.adjoint(y))
    assert physics.img_size == operator.image_shape
    u = image(operator, seed=1)
    left, right = (physics.A(u) * y).sum(), (u * physics.A_adjoint(y)).sum()
    assert left.item() == pytest.approx(right.item(), rel=1e-5)


@pytest.mark.parametrize("index", range(3))
def test_its_inverse_and_prox_meet_their_optimality_conditions(deepinv: Any, index: int) -> None:
    """`A^T (A x - y) = 0` and `gamma A^T (A x - y) + x - z = 0`."""
    operator = operators()[index].double()
    physics = to_deepinv(operator, max_iter=2000, tol=1e-10)
    z, y = image(operator, seed=1).double(), operator(image(operator).double())
    gradient = operator.adjoint(operator(physics.A_dagger(y)) - y)
    assert gradient.norm() < 1e-6 * operator.adjoint(y).norm()
    for gamma, start in ((0.7, z), (3.0, None), (torch.tensor([0.2, 5.0], dtype=torch.float64), 0.5)):
        x = physics.prox_l2(start, y, gamma)
        origin = start if isinstance(start, Tensor) else torch.full_like(x, start or 0.0)
        weight = torch.as_tensor(gamma, dtype=torch.float64).reshape(-1, 1, 1, 1)
        right = weight * operator.adjoint(y) + origin  # of the system that is solved; the tolerance is relative to it
        assert (weight * operator.normal(x) + x - right).norm() < 1e-9 * right.norm()


def test_iterations_and_tolerance_of_a_call_count(deepinv: Any) -> None:
    operator = operators()[0]
    physics, y = to_deepinv(operator, max_iter=40), operator(image(operator))
    assert torch.equal(physics.A_dagger(y), operator.pinv(y, max_iter=40, tol=1e-6))
    assert torch.equal(physics.A_dagger(y, max_iter=2, solver="lsqr"), operator.pinv(y, max_iter=2))
    few = physics.prox_l2(None, y, 1.0, max_iter=3, tol=1e-3, verbose=False)
    assert torch.equal(few, operator.prox(torch.zeros_like(few), y, 1.0, max_iter=3, tol=1e-3))


def test_the_noise_level_becomes_gaussian_noise(deepinv: Any) -> None:
    operator = operators()[0]
    assert isinstance(to_deepinv(operator).noise_model, deepinv.physics.ZeroNoise)
    x = image(operator).expand(2, -1, -1, -1)
    operator.noise_std = torch.tensor([0.1, 2.0])
    physics = to_deepinv(operator)
    assert torch.equal(physics.noise_model.sigma, operator.noise_std)
    torch.manual_seed(0)
    error = (physics(x) - operator(x)).flatten(1).std(dim=1)
    assert error.tolist() == pytest.approx([0.1, 2.0], rel=4 / (2 * error[0].numel() * 90) ** 0.5)
    assert (physics(x, sigma=0.0) - operator(x)).abs().max() == 0  # a keyword that is the noise model's alone
    operator.noise_std = torch.rand(2, *operator.measurement_shape)
    with pytest.raises(InputError, match=r"one level an image.*whiten"):
        to_deepinv(operator)


def test_gradients_pass_through_the_physics(deepinv: Any) -> None:
    operator = operators()[0]
    x = image(operator).requires_grad_(True)
    (gradient,) = torch.autograd.grad(to_deepinv(operator).A(x).square().sum() / 2, x)
    assert torch.allclose(gradient, operator.normal(x.detach()), atol=1e-4)


def test_a_denoiser_is_the_prior(deepinv: Any) -> None:
    prior = gaussian_prior()
    denoiser = denoiser_to_deepinv(prior)
    assert isinstance(denoiser, deepinv.models.Denoiser)
    x = torch.randn(3, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    levels = torch.tensor([0.1, 0.5, 2.0])
    assert torch.equal(denoiser(x, 0.3), prior(x, 0.3))
    assert torch.equal(denoiser(x, levels), prior(x, levels))
    for same in (levels.reshape(3, 1, 1, 1), levels.double(), levels.tolist(), levels.numpy()):
        assert torch.equal(denoiser(x, same), prior(x, levels))
    assert torch.equal(denoiser(x, torch.tensor([0.3])), prior(x, 0.3))
    assert torch.equal(denoiser(x, torch.tensor([0.3, 0.0, 0.3]))[1], x[1])
    assert torch.equal(denoiser(x, 0.3, class_labels=None), prior(x, 0.3))
    for wrong in (-0.1, levels[:2], float("nan")):
        with pytest.raises(InputError, match="one noise level, or one an image"):
            denoiser(x, wrong)


def test_a_denoisers_draws_go_on_are_per_image_and_repeatable(deepinv: Any) -> None:
    denoiser, x = denoiser_to_deepinv(Shifting(), seed=5), torch.zeros(3, 1, 4, 4)
    first, second = denoiser(x, 0.1), denoiser(x, 0.1)
    assert not torch.equal(first, second)
    assert torch.equal(first, randn((1, 4, 4), make_generators(5, ["0", "1", "2"]), like=x))
    denoiser.reset()
    assert torch.equal(denoiser(x[:1], 0.1), first[:1])  # alone as in a batch
    assert torch.equal(denoiser(x, 0.1)[0], second[0])
    assert not torch.equal(denoiser_to_deepinv(Shifting(), seed=6)(x, 0.1), first)


def test_a_denoiser_moves_and_is_trained_with_the_prior(deepinv: Any) -> None:
    prior = gaussian_prior()
    denoiser = denoiser_to_deepinv(prior).double()
    x = torch.zeros(1, 1, SIZE, SIZE, dtype=torch.float64, requires_grad=True)
    assert denoiser(x, 0.1).dtype == torch.float64 and prior.mean.dtype == torch.float64
    assert torch.autograd.grad(denoiser(x, 0.1).sum(), x)[0].abs().sum() > 0


def test_plug_and_play_in_their_loop_finds_the_posterior_mode(deepinv: Any) -> None:
    """Proximal gradient descent with physics and denoiser: with a Gaussian prior, `D` is the prox of its density."""
    prior, operator = gaussian_prior(), operators()[1]
    sigma, gamma = 0.2, 1.0
    physics, denoiser = to_deepinv(operator), denoiser_to_deepinv(prior)
    y, x = operator(image(operator, 1)), torch.zeros(1, 1, SIZE, SIZE)
    for _ in range(500):
        x = denoiser(x - gamma * physics.A_vjp(x, physics.A(x) - y), sigma)
    # The fixed point: gamma A^T (A x - y) + sigma^2 C^-1 (x - mu) = 0, times C.
    C = prior.eigenvectors @ torch.diag(prior.eigenvalues) @ prior.eigenvectors.T
    data = (C @ operator.adjoint(operator(x) - y).flatten()).reshape(x.shape)
    assert torch.allclose(gamma * data, -(sigma**2) * (x - prior.mean), atol=2e-6)


@pytest.mark.parametrize("index", range(3))
def test_an_operator_there_and_back(deepinv: Any, index: int) -> None:
    operator = operators()[index]
    operator.noise_std = torch.tensor([0.3])
    back, x = from_deepinv(to_deepinv(operator), operator.image_shape), image(operator)
    assert back.image_shape == operator.image_shape and back.measurement_shape == operator.measurement_shape
    y = operator(x)
    assert torch.equal(back(x), y) and torch.equal(back.adjoint(y), operator.adjoint(y))
    assert back.noise_std is not None and torch.equal(back.noise_std, operator.noise_std)
    assert back.norm() == pytest.approx(operator.norm(), rel=1e-3)
    with pytest.raises(InputError, match="expects images of shape"):
        back(x[..., :-1])


def test_an_operator_of_their_physics(deepinv: Any) -> None:
    """A cyclic shift by a pixel, twice as bright; its direct inverse is what the physics says."""

    def forward(x: Tensor, **others: object) -> Tensor:
        return 2 * x.roll(1, -1)

    def adjoint(y: Tensor, **others: object) -> Tensor:
        return 2 * y.roll(-1, -1)

    physics = deepinv.physics.LinearPhysics(A=forward, A_adjoint=adjoint, max_iter=50)
    operator = from_deepinv(physics, (1, 6, 7))
    x = image(operator)
    assert operator.measurement_shape == (1, 6, 7) and operator.noise_std is None
    assert operator.norm() == pytest.approx(2, rel=1e-4)
    assert torch.allclose(operator.pinv(operator(x)), x, atol=1e-5)
    assert torch.allclose(operator.prox(x, operator(x), 1.0), x, atol=1e-5)
    assert torch.equal(operator.baseline(operator(x)), physics.A_dagger(operator(x)))
    assert operator.double()(x.double()).dtype == torch.float64


def test_complex_images_stay_so(deepinv: Any) -> None:
    """Two channels of MRI are parts of complex numbers, half of which are negative: methods must not clip them."""
    mask = (torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(0)) < 0.6).float()
    theirs = deepinv.physics.MRI(mask=mask, img_size=(2, SIZE, SIZE))
    assert from_deepinv(theirs, (2, SIZE, SIZE)).complex_images
    assert not from_deepinv(theirs, (2, SIZE, SIZE), complex_images=False).complex_images
    ours = Identity((SIZE, SIZE), 2)
    assert not from_deepinv(to_deepinv(ours), ours.image_shape).complex_images
    ours.complex_images = True
    back = from_deepinv(to_deepinv(ours), ours.image_shape)
    x = image(ours) - 0.5
    assert back.complex_images and torch.equal(FBP(clip=None)(back(x), back).mean, x)
    with pytest.raises(InputError, match="clip"):
        FBP()(back(x), back)
    with pytest.raises(InputError, match="Complex images have two channels"):
        from_deepinv(to_deepinv(Identity((SIZE, SIZE), 1)), (1, SIZE, SIZE), complex_images=True)


def test_no_noise_is_none(deepinv: Any) -> None:
    physics = to_deepinv(Identity((4, 4), 1))
    physics.noise_model = deepinv.physics.GaussianNoise(0.0)
    assert from_deepinv(physics, (1, 4, 4)).noise_std is None


def test_what_is_no_operator_is_explained(deepinv: Any) -> None:
    p = deepinv.physics

    def linear(A: Any, A_adjoint: Any = lambda y, **others: y, **more: Any) -> Any:
        return p.LinearPhysics(A=A, A_adjoint=A_adjoint, max_iter=50, **more)

    def same(x: Tensor, **others: object) -> Tensor:
        return x

    for physics, message in (
        (p.Physics(A=same), "Physics is no deepinv.physics.LinearPhysics"),
        (linear(lambda x, **others: 2 * x), "not the transpose"),
        (linear(same, lambda y, **others: y + y.roll(1, -1) - y.roll(-1, -1)), "not the transpose"),  # <x, K x> = 0
        (linear(lambda x, **others: float("nan") * x), "not the transpose"),
        (linear(same, lambda y, **others: y[..., :2]), r"gives \(1, 4, 2\) where A takes .* \(1, 4, 4\)"),
        (linear(same, lambda y, **others: y.reshape(1, 5)), r"A_adjoint .* does not take .* give its image_shape"),
        (linear(lambda x, **others: x.to(torch.complex64)), "complex64.*two real channels"),
        (linear(lambda x, **others: [x, x]), "measures list"),
        (linear(lambda x, **others: x.reshape(1, 5)), r"does not measure images of shape \(1, 4, 4\)"),
        (linear(same, noise_model=p.PoissonNoise()), "PoissonNoise.*ZeroNoise"),
    ):
        with pytest.raises(InputError, match=message):
            from_deepinv(physics, (1, 4, 4))


@pytest.mark.parametrize("error", [ModuleNotFoundError("No module named 'torchvision'"), RuntimeError("no nms")])
def test_without_deepinv_the_error_says_what_to_install(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    class Finder:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            if name == "deepinv":
                raise error

    for name in [name for name in sys.modules if name.partition(".")[0] == "deepinv"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    runpy.run_path(str(neighbour.__file__))  # importing us does not import deepinv
    neighbour._classes.cache_clear()
    for call in (lambda: to_deepinv(Identity(4)), lambda: denoiser_to_deepinv(gaussian_prior(size=4))):
        with pytest.raises(InputError, match=f"{error}.*pip install deepinv.*torchvision"):
            call()


DUMMY = """
import sys, types
from importlib.machinery import ModuleSpec
import pytest, torch, torchmetrics
class Dummy(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})
names = ("transforms", "transforms.functional", "utils", "datasets", "datasets.folder", "datasets.utils")
for name in ("torchvision", *("torchvision." + name for name in names)):
    module = Dummy(name)
    module.__path__, module.__spec__ = [], ModuleSpec(name, None)
    sys.modules[name] = module
    parent, _, own = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], own, module)
sys.exit(pytest.main(["-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", "real", FILE]))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("deepinv") is None or find_spec("torchvision") is not None,
    reason="deepinv is not installed, or runs as it is",
)
def test_deepinv_itself_without_torchvision() -> None:
    """Nothing that is used needs torchvision, which deepinv imports for its data sets and figures."""
    code = DUMMY.replace("FILE", repr(str(Path(__file__))))
    command = [sys.executable, "-W", "ignore", "-c", code]
    result = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=170)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout
