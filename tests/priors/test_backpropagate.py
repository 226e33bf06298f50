"""The gradient with respect to the weights: exact, in chunks, and nothing but what may change is touched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from invrecon.methods.counting import Counter, CountingPrior
from invrecon.priors.analytic import GaussianPrior
from invrecon.priors.base import Prior
from invrecon.priors.edm import EDMDenoiser
from invrecon.priors.patch import PatchPrior, WholePrior
from invrecon.priors.unet import UNet
from invrecon.rng import make_generators
from tests.priors.test_unet import awake

KEYS = ["a", "b"]


class Watched(EDMDenoiser):
    """Notes how many patches it is given, with a graph and without."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network, 0.3)
        self.batches: dict[bool, list[int]] = {True: [], False: []}

    def forward(self, u: Tensor, sigma: float | Tensor, position: Tensor) -> Tensor:
        self.batches[torch.is_grad_enabled()].append(len(u))
        return super().forward(u, sigma, position)


def denoiser() -> Watched:
    torch.manual_seed(0)
    return Watched(awake(UNet(base_channels=8, multipliers=(1, 2)))).eval().double()


def full_graph(prior: Prior, x: Tensor, sigma: Tensor, target: Tensor) -> tuple[Tensor, list[Tensor]]:
    x0 = prior(x, sigma, generators=make_generators(1, KEYS))
    gradients = torch.autograd.grad(0.5 * (x0 - target).square().sum(), list(prior.parameters()))
    return x0.detach(), list(gradients)


@pytest.mark.parametrize("max_patches", [1, 3, 1000, None], ids=["chunks of 1", "chunks of 3", "all", "whole prior"])
def test_gradient_equals_that_of_the_full_graph(max_patches: int | None) -> None:
    net = denoiser()
    prior = WholePrior(net) if max_patches is None else PatchPrior(net, 8, max_patches)
    reference = WholePrior(net) if max_patches is None else PatchPrior(net, 8, 1000)
    x, target = torch.randn(2, 2, 1, 18, 13, dtype=torch.float64)
    sigma = torch.tensor([0.05, 1.0], dtype=torch.float64)
    expected, gradients = full_graph(reference, x, sigma, target)

    x0 = prior.backpropagate(x, sigma, lambda d: d - target, generators=make_generators(1, KEYS))

    assert not x0.requires_grad
    torch.testing.assert_close(x0, expected, rtol=1e-12, atol=1e-13)
    for parameter, gradient in zip(prior.parameters(), gradients):
        assert parameter.grad is not None
        assert float((parameter.grad - gradient).norm()) <= 1e-12 * float(gradient.norm()) + 1e-14


def test_gradients_add_up() -> None:
    prior = PatchPrior(denoiser(), 8, 4)
    x = torch.randn(1, 1, 12, 12, dtype=torch.float64)
    prior.backpropagate(x, 0.2, torch.ones_like)
    once = [p.grad.clone() for p in prior.parameters() if p.grad is not None]
    prior.backpropagate(x, 0.2, torch.ones_like)
    for parameter, gradient in zip(prior.parameters(), once):
        torch.testing.assert_close(parameter.grad, 2 * gradient)


@pytest.mark.parametrize("size", [16, 40])
def test_memory_is_that_of_one_chunk_whatever_the_image(size: int) -> None:
    net = denoiser()
    PatchPrior(net, 8, max_patches=3).backpropagate(torch.randn(1, 1, size, size).double(), 0.2, torch.ones_like)
    num_patches = (1 + size // 8) ** 2
    assert max(net.batches[True]) == max(net.batches[False]) == 3
    assert sum(net.batches[True]) == num_patches  # each has a graph once
    assert sum(net.batches[False]) == num_patches - 3  # the first chunk's graph is kept, not made again


@pytest.mark.parametrize("kind", ["whole", "patch"])
def test_frozen_weights_and_the_image_get_no_gradient_even_where_gradients_are_off(kind: str) -> None:
    net = denoiser().requires_grad_(False)
    net.network.head.bias.requires_grad_(True)
    prior = WholePrior(net) if kind == "whole" else PatchPrior(net, 8, 5)
    x = torch.randn(1, 1, 16, 16, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        prior.backpropagate(x, 0.3, torch.ones_like)
    moved = [name for name, p in prior.named_parameters() if p.grad is not None]
    assert moved == ["denoiser.network.head.bias"] and x.grad is None


@pytest.mark.parametrize("kind", ["analytic", "whole", "patch"])
def test_without_anything_to_adapt_it_is_the_denoiser(kind: str) -> None:
    net = denoiser().requires_grad_(False)
    priors = {
        "analytic": GaussianPrior(torch.zeros(1, 4, 4).double(), torch.eye(16).double()),
        "whole": WholePrior(net),
        "patch": PatchPrior(net, 8, 2),
    }
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    x0 = priors[kind].backpropagate(x, 0.3, torch.ones_like, generators=make_generators(1, KEYS))
    torch.testing.assert_close(x0, priors[kind](x, 0.3, generators=make_generators(1, KEYS)), rtol=1e-13, atol=0)


def test_counts_as_one_evaluation() -> None:
    counter = Counter()
    prior = PatchPrior(denoiser(), 8, 2)
    CountingPrior(prior, counter).backpropagate(torch.randn(1, 1, 12, 12).double(), 0.3, torch.ones_like)
    assert counter.num_calls == 1
    assert all(p.grad is not None for p in prior.parameters())
