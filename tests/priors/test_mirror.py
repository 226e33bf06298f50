"""A prior that is asked about mirror images: what it returns, its derivatives, its draws."""

from __future__ import annotations

import pytest
import torch

from invrecon.operators import ParallelBeamCT
from invrecon.priors.analytic import GaussianPrior
from invrecon.priors.edm import EDMDenoiser
from invrecon.priors.mirror import MirroredPrior
from invrecon.priors.patch import PatchPrior, WholePrior
from invrecon.priors.unet import UNet
from invrecon.rng import make_generators
from tests.cli.tiny import SIZE, make_prior

SIGMA = torch.tensor([0.1, 0.3, 0.05, 0.2], dtype=torch.float64)
NAMES = list("abcd")


def make(kind: str) -> PatchPrior | WholePrior:
    torch.manual_seed(0)
    network = UNet(base_channels=8, multipliers=(1, 2), num_blocks=1)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    denoiser = EDMDenoiser(network, 0.2).double()
    return PatchPrior(denoiser, 8) if kind == "patch" else WholePrior(denoiser)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(4, 1, 16, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_each_sample_is_denoised_as_it_is_or_mirrored(x: torch.Tensor) -> None:
    prior = make("whole")
    mirrored, direct = MirroredPrior(prior), prior(x, SIGMA)
    turned = prior(x.flip(-1), SIGMA).flip(-1)
    assert (direct - turned).abs().amax(dim=(1, 2, 3)).min() > 0  # positions make them differ
    counts = torch.zeros(2)
    for seed in range(30):
        for d, plain, other in zip(
            mirrored(x, SIGMA, generators=make_generators(seed, NAMES)), direct, turned, strict=True
        ):
            found = torch.tensor([torch.allclose(d, plain, rtol=1e-12), torch.allclose(d, other, rtol=1e-12)])
            assert found.sum() == 1
            counts += found
    assert 40 <= counts[0] <= 80  # of 120


def test_a_prior_that_knows_no_left_and_right_is_unchanged(x: torch.Tensor) -> None:
    prior = GaussianPrior(torch.full((1, 16, 12), 0.3, dtype=torch.float64), 0.1 * torch.eye(192).double())
    assert torch.allclose(MirroredPrior(prior)(x, SIGMA), prior(x, SIGMA), rtol=1e-12)


@pytest.mark.parametrize("kind", ["patch", "whole"])
def test_its_derivatives_are_those_of_autograd(kind: str, x: torch.Tensor) -> None:
    prior = MirroredPrior(make(kind))
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    leaf = x.clone().requires_grad_(True)
    out = prior(leaf, SIGMA, generators=make_generators(3, NAMES))
    parameters = list(prior.parameters())
    gradient, *weights = torch.autograd.grad(out, [leaf, *parameters], v)

    def cotangent(denoised: torch.Tensor) -> torch.Tensor:
        assert torch.allclose(denoised, out, rtol=1e-10)
        return v

    denoised, vjp = prior.denoise_vjp(x, SIGMA, cotangent, generators=make_generators(3, NAMES))
    assert torch.allclose(denoised, out, rtol=1e-10) and torch.allclose(vjp, gradient, rtol=1e-9, atol=1e-12)
    denoised = prior.backpropagate(x, SIGMA, cotangent, generators=make_generators(3, NAMES))
    assert torch.allclose(denoised, out, rtol=1e-10)
    for parameter, weight in zip(parameters, weights, strict=True):
        assert parameter.grad is not None and torch.allclose(parameter.grad, weight, rtol=1e-8, atol=1e-10)


def test_a_sample_does_not_depend_on_its_batch(x: torch.Tensor) -> None:
    prior = MirroredPrior(make("patch"))
    together = prior(x, 0.1, generators=make_generators(5, NAMES))
    for i, name in enumerate(NAMES):
        assert torch.allclose(prior(x[i : i + 1], 0.1, generators=make_generators(5, [name]))[0], together[i])
    assert torch.equal(prior(x, 0.1), prior(x, 0.1))  # without generators, too, it is a function


def test_the_task_asks_so_and_says_so(tmp_path) -> None:
    from invrecon.methods import AnnealedPnPADMM
    from invrecon.tasks.reconstruction import Reconstruction

    path = str(make_prior(tmp_path / "prior.safetensors"))
    parts = ParallelBeamCT(SIZE, 5), AnnealedPnPADMM(num_levels=3)
    plain, mirrored = (Reconstruction(*parts, prior=path, mirror=mirror) for mirror in (False, True))
    assert isinstance(mirrored.prior, MirroredPrior) and not isinstance(plain.prior, MirroredPrior)
    assert "mirrored" in mirrored.describe()["prior"] and "mirrored" not in plain.describe()["prior"]
