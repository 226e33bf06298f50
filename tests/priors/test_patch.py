"""The patch prior: its layout law, exact coverage, and that nothing outside it can tell that patches exist."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from invrecon.errors import InputError
from invrecon.priors.base import broadcast, per_sample
from invrecon.priors.edm import EDMDenoiser
from invrecon.priors.layouts import RandomShift, shift_law
from invrecon.priors.patch import PatchPrior, WholePrior, coordinates, pad_with_noise, position_map
from invrecon.priors.unet import UNet
from invrecon.rng import make_generators, randint
from tests.priors.test_unet import awake

sides = st.integers(1, 40)
patch_sizes = st.integers(1, 16)


class Pointwise(nn.Module):
    """A denoiser that treats each pixel by itself, as `EDMDenoiser` is called; it counts what it is given.

    Gaussian pixels of mean `m` and variance `s^2`: `D = m + s^2 / (s^2 + sigma^2) (u - m)`, where the mean may
    depend on the position.
    """

    def __init__(self, slope: float = 0.0) -> None:
        super().__init__()
        self.network = SimpleNamespace(stride=1)
        self.slope, self.batches = slope, []

    def forward(self, u: Tensor, sigma: float | Tensor, position: Tensor) -> Tensor:
        self.batches.append(len(u))
        shrink = broadcast(0.04 / (0.04 + per_sample(sigma, u) ** 2), u)
        mean = 0.5 + self.slope * (position[:, :1] - 2 * position[:, 1:]).to(u.dtype)
        return mean + shrink * (u - mean)


def network(seed: int = 0) -> EDMDenoiser:
    torch.manual_seed(seed)
    return EDMDenoiser(awake(UNet(base_channels=8, multipliers=(1, 2))), 0.3).eval().requires_grad_(False)


def generators(num: int, seed: int = 0) -> list[torch.Generator]:
    return make_generators(seed, [f"case {i}" for i in range(num)])


# the law of the shifted grid


def shifted_grid(prior: PatchPrior, x: Tensor, sigma: Tensor, generators: list[torch.Generator]) -> Tensor:
    """PaDIS, algorithm 1, by the book: pad, draw an offset, reshape into patches, denoise, reshape back, crop."""
    P, (B, C, H, W) = prior.patch_size, x.shape
    (K, M), (L, N) = shift_law(H, P), shift_law(W, P)
    frame = pad_with_noise(x, (N, N, M, M), sigma, generators)
    rows, columns = randint(M, generators).tolist(), randint(N, generators).tolist()
    patches, positions = [], []
    for u, a, b in zip(frame, rows, columns):
        region = u[:, a : a + K * P, b : b + L * P].reshape(C, K, P, L, P)
        patches.append(region.permute(1, 3, 0, 2, 4).reshape(K * L, C, P, P))
        axes = [coordinates(n, s - m, k * P).reshape(k, P) for n, s, m, k in ((H, a, M, K), (W, b, N, L))]
        positions.append(position_map(axes[0].repeat_interleave(L, 0), axes[1].repeat(K, 1)))
    args = torch.cat(patches), sigma.repeat_interleave(K * L), torch.cat(positions)
    chunks = zip(*(arg.split(prior.max_patches) for arg in args))
    denoised = torch.cat([prior.denoiser(*chunk) for chunk in chunks])
    images = []
    for u, a, b in zip(denoised.reshape(B, K, L, C, P, P), rows, columns):
        region = u.permute(2, 0, 3, 1, 4).reshape(C, K * P, L * P)
        images.append(region[:, M - a : M - a + H, N - b : N - b + W])
    return torch.stack(images)


@given(num=sides, p=patch_sizes)
def test_layout_law(num: int, p: int) -> None:
    k, m = shift_law(num, p)
    assert k == 1 + num // p and m == k * p - num
    assert 1 <= m <= p  # at least one offset, and the first and last patch always meet the image or its edge


@pytest.mark.parametrize(
    ("n", "p", "k", "m"), [(256, 56, 5, 24), (256, 64, 5, 64), (256, 96, 3, 32), (256, 16, 17, 16), (512, 56, 10, 48)]
)
def test_layouts_of_the_paper(n: int, p: int, k: int, m: int) -> None:
    assert shift_law(n, p) == (k, m)


@pytest.mark.parametrize(("size", "p", "max_patches"), [((20, 13), 8, 7), ((9, 40), 16, 100), ((16, 16), 8, 3)])
def test_shifted_patches_are_those_of_the_paper_to_the_last_bit(
    size: tuple[int, int], p: int, max_patches: int
) -> None:
    prior = PatchPrior(network(), p, max_patches)
    x, sigma = torch.randn(3, 1, *size), torch.tensor([0.05, 0.3, 2.0])
    expected = shifted_grid(prior, x, sigma, generators(3))
    assert torch.equal(prior(x, sigma, generators=generators(3)), expected)
    x0, product = prior.denoise_vjp(x, sigma, torch.cos, generators=generators(3))
    leaf = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(shifted_grid(prior, leaf, sigma, generators(3)), leaf, torch.cos(expected))
    assert torch.equal(x0, expected)
    torch.testing.assert_close(product, gradient, rtol=1e-5, atol=1e-6)


@given(num=sides, p=patch_sizes)
def test_offsets_cover_the_image_without_overlap(num: int, p: int) -> None:
    k, m = shift_law(num, p)
    for first in RandomShift().starts(num, p, generators(5))[:, 0].tolist():
        assert -m <= first < 0 and first + k * p >= num


def test_coordinates_are_zero_at_the_centre_and_one_at_the_edges() -> None:
    torch.testing.assert_close(coordinates(4), torch.tensor([-0.75, -0.25, 0.25, 0.75]))
    assert float(coordinates(5)[2]) == 0
    torch.testing.assert_close(coordinates(4, -2, 3), torch.tensor([-1.75, -1.25, -0.75]))
    torch.testing.assert_close(coordinates(4, torch.tensor([0, 2]), 2), torch.tensor([[-0.75, -0.25], [0.25, 0.75]]))
    column, row = position_map(coordinates(2)[None], coordinates(3)[None])[0]
    assert column.shape == (2, 3) and torch.equal(column[0], coordinates(3)) and torch.equal(row[:, 0], coordinates(2))


def test_offsets_are_uniform() -> None:
    places = RandomShift().place((5, 4), 4, generators(1600))
    first = torch.arange(0, len(places), 4)
    counts = torch.zeros(3, 4)
    for a, b in zip((places.top[first] + 3).tolist(), (places.left[first] + 4).tolist()):
        counts[a, b] += 1
    expected = 1600 / counts.numel()
    assert float(((counts - expected) ** 2 / expected).sum()) < 31.3  # chi-squared of 11 degrees: p = 0.001


# assembled equals whole


@pytest.mark.parametrize("slope", [0.0, 0.3], ids=["position-free", "position-dependent"])
@pytest.mark.parametrize(("size", "p"), [((16, 16), 8), ((17, 10), 4), ((5, 6), 8)])
def test_assembled_equals_whole_for_a_pointwise_denoiser(slope: float, size: tuple[int, int], p: int) -> None:
    x = torch.randn(3, 2, *size)
    sigma = torch.tensor([0.05, 0.3, 2.0])
    whole = WholePrior(Pointwise(slope))(x, sigma)
    for seed in range(5):
        patched = PatchPrior(Pointwise(slope), p)(x, sigma, generators=generators(3, seed))
        assert torch.equal(patched, whole) if slope == 0 else torch.allclose(patched, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "prior", [WholePrior(network()), PatchPrior(network(), 8, max_patches=7)], ids=["whole", "patch"]
)
def test_a_sample_does_not_depend_on_its_batch(prior: nn.Module) -> None:
    x, sigma = torch.randn(4, 1, 18, 14), torch.tensor([0.01, 0.1, 1.0, 10.0])
    together = prior(x, sigma, generators=generators(4))
    alone = torch.cat([prior(x[i : i + 1], sigma[i : i + 1], generators=[generators(4)[i]]) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    order = [2, 0, 3, 1]
    shuffled = prior(x[order], sigma[order], generators=[generators(4)[i] for i in order])
    torch.testing.assert_close(shuffled, together[order], rtol=1e-4, atol=1e-5)


def test_equal_generators_give_equal_results_and_move_on() -> None:
    prior, x = PatchPrior(network(), 8), torch.randn(2, 1, 16, 16)
    first, second = generators(2), generators(2)
    assert torch.equal(prior(x, 0.3, generators=first), prior(x, 0.3, generators=second))
    assert not torch.equal(prior(x, 0.3, generators=first), prior(x, 0.3, generators=generators(2)))
    assert torch.equal(prior(x, 0.3), prior(x, 0.3))  # no generators: still deterministic
    state = torch.get_rng_state()
    prior(x, 0.3)
    assert torch.equal(state, torch.get_rng_state())  # the global generator is never touched


def test_the_padding_is_noise_of_the_states_level() -> None:
    x, sigma = 100 + torch.zeros(3, 2, 40, 40), torch.tensor([0.1, 1.0, 20.0])
    padded = pad_with_noise(x, (30, 30, 30, 30), sigma, generators(3))
    assert torch.equal(padded[..., 30:70, 30:70], x)
    outside = torch.ones(100, 100, dtype=torch.bool)
    outside[30:70, 30:70] = False
    noise = padded[..., outside]
    torch.testing.assert_close(noise.std(dim=(1, 2)), sigma, rtol=0.03, atol=0)
    assert float((noise.mean(dim=(1, 2)) / sigma).abs().max()) < 0.03


@pytest.mark.parametrize("size", [(16, 16), (15, 17), (1, 1)])
def test_whole_prior_takes_sides_that_the_network_cannot_halve(size: tuple[int, int]) -> None:
    assert WholePrior(network())(torch.randn(2, 1, *size), 0.5).shape == (2, 1, *size)


# chunks


def test_chunks_change_nothing() -> None:
    x = torch.randn(2, 1, 20, 20)
    denoiser = network()
    whole = PatchPrior(denoiser, 8, max_patches=1000)(x, 0.2, generators=generators(2))
    for max_patches in (1, 5, 9):
        chunked = PatchPrior(denoiser, 8, max_patches=max_patches)(x, 0.2, generators=generators(2))
        torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [8, 16, 48])
def test_memory_is_that_of_one_chunk_whatever_the_image(size: int) -> None:
    denoiser = Pointwise()
    prior = PatchPrior(denoiser, 4, max_patches=6)
    x = torch.randn(2, 1, size, size)
    prior(x, 0.2)
    prior.denoise_vjp(x, 0.2, lambda x0: x0)
    assert max(denoiser.batches) <= 6 and max(denoiser.batches) - min(denoiser.batches) <= 1
    # One pass, and two for the product, of which the first chunk is spared the second.
    assert sum(denoiser.batches) == 3 * 2 * (1 + size // 4) ** 2 - denoiser.batches[0]


# vector-Jacobian product


@pytest.mark.parametrize("max_patches", [1, 4, 1000])
def test_chunked_product_equals_full_autograd_for_patches(max_patches: int) -> None:
    denoiser = network().double()
    prior = PatchPrior(denoiser, 8, max_patches=max_patches)
    x, target = torch.randn(2, 1, 10, 12, dtype=torch.float64), torch.randn(2, 1, 10, 12, dtype=torch.float64)
    sigma = torch.tensor([0.1, 2.0], dtype=torch.float64)
    x0, product = prior.denoise_vjp(x, sigma, lambda d: d - target, generators=generators(2))
    leaf = x.clone().requires_grad_(True)
    full = PatchPrior(denoiser, 8, max_patches=1000)(leaf, sigma, generators=generators(2))
    (gradient,) = torch.autograd.grad(0.5 * (full - target).square().sum(), leaf)
    torch.testing.assert_close(x0, full.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(product, gradient, rtol=1e-9, atol=1e-12)
    assert not x0.requires_grad and not product.requires_grad


def test_product_equals_full_autograd_for_whole_images() -> None:
    prior = WholePrior(network().double())
    x, v = torch.randn(2, 1, 9, 11, dtype=torch.float64), torch.randn(2, 1, 9, 11, dtype=torch.float64)
    x0, product = prior.denoise_vjp(x, 0.4, lambda d: v, generators=generators(2))
    leaf = x.clone().requires_grad_(True)
    full = prior(leaf, 0.4, generators=generators(2))
    (gradient,) = torch.autograd.grad((full * v).sum(), leaf)
    torch.testing.assert_close(x0, full.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(product, gradient, rtol=1e-10, atol=1e-12)


def test_product_works_where_gradients_are_off_and_leaves_the_weights_alone() -> None:
    prior = PatchPrior(network(), 8, max_patches=3)
    with torch.no_grad():
        _, product = prior.denoise_vjp(torch.randn(1, 1, 16, 16), 0.3, torch.ones_like)
    assert bool(product.isfinite().all()) and bool(product.any())
    assert all(p.grad is None for p in prior.parameters())


# refusals


@pytest.mark.parametrize(("arguments", "word"), [({"patch_size": 7}, "stride"), ({"patch_size": 0}, "stride")])
def test_a_patch_size_that_the_network_cannot_halve_is_refused(arguments: dict[str, int], word: str) -> None:
    with pytest.raises(InputError, match=word):
        PatchPrior(network(), **arguments)


def test_no_patches_at_once_is_refused() -> None:
    with pytest.raises(InputError, match="max_patches"):
        PatchPrior(network(), 8, max_patches=0)
