"""EDM preconditioning and the noise proposal against their closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from invrecon.errors import InputError
from invrecon.priors.edm import EDMDenoiser, NoiseProposal
from invrecon.priors.unet import UNet

levels = st.floats(1e-3, 50.0)
scales = st.floats(0.05, 2.0)


class Spy(nn.Module):
    """A network that returns a constant and remembers what it was shown."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        self.x, self.c_noise = x, c_noise
        return torch.full_like(x[:, :1], self.value)


def position_of(u: Tensor) -> Tensor:
    return torch.zeros(len(u), 2, *u.shape[2:], dtype=u.dtype)


@given(sigma=levels, s=scales)
def test_coefficients_are_those_of_table_1(sigma: float, s: float) -> None:
    u = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    s = float(torch.tensor(s))  # sigma_data is kept in float32
    skip, one = EDMDenoiser(Spy(0.0), s), EDMDenoiser(Spy(1.0), s)
    c_skip = s**2 / (sigma**2 + s**2)
    c_out = sigma * s / math.sqrt(sigma**2 + s**2)
    torch.testing.assert_close(skip(u, sigma, position_of(u)), c_skip * u)
    torch.testing.assert_close(one(u, sigma, position_of(u)), c_skip * u + c_out)
    torch.testing.assert_close(one.network.x[:, :1], u / math.sqrt(sigma**2 + s**2))
    torch.testing.assert_close(one.network.c_noise, torch.full((3,), math.log(sigma) / 4, dtype=torch.float64))


@given(sigma=levels, s=scales)
def test_weighted_loss_before_training_is_one(sigma: float, s: float) -> None:
    """`w(sigma) c_out^2 = 1`, and the network's ideal target has unit variance."""
    denoiser = EDMDenoiser(Spy(), s)
    c_out = sigma * s / math.sqrt(sigma**2 + s**2)
    assert float(denoiser.loss_weight(torch.tensor(sigma))) * c_out**2 == pytest.approx(1, rel=1e-5)
    # E||c_skip (x + sigma n) - x||^2 for centred data of variance s^2, times the weight, is one as well
    c_skip = s**2 / (sigma**2 + s**2)
    error = (1 - c_skip) ** 2 * s**2 + c_skip**2 * sigma**2
    assert error == pytest.approx(c_out**2)


def test_the_network_sees_unit_variance_at_every_level() -> None:
    generator = torch.Generator().manual_seed(0)
    denoiser = EDMDenoiser(Spy(), 0.3)
    x = 0.3 * torch.randn(8, 1, 64, 64, generator=generator)
    for sigma in (0.002, 0.1, 0.3, 2.0, 40.0):
        u = x + sigma * torch.randn(x.shape, generator=generator)
        denoiser(u, sigma, position_of(u))
        assert float(denoiser.network.x[:, :1].std()) == pytest.approx(1, abs=0.02)


def test_the_image_itself_is_returned_as_the_noise_vanishes() -> None:
    u = torch.rand(2, 1, 8, 8)
    denoiser = EDMDenoiser(Spy(5.0), 0.25)
    errors = [float((denoiser(u, sigma, position_of(u)) - u).abs().max()) for sigma in (1e-1, 1e-3, 1e-6)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5


def test_positions_are_not_scaled_and_levels_are_per_sample() -> None:
    denoiser = EDMDenoiser(Spy(1.0), 0.5)
    u, sigma = torch.rand(3, 1, 4, 4), torch.tensor([0.01, 0.5, 7.0])
    position = torch.rand(3, 2, 4, 4)
    together = denoiser(u, sigma, position)
    torch.testing.assert_close(denoiser.network.x[:, 1:], position, rtol=0, atol=0)
    alone = [denoiser(u[i : i + 1], float(sigma[i]), position[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_a_network_without_positions_sees_the_image_alone() -> None:
    network = UNet(position_channels=0, base_channels=8, multipliers=(1, 2))
    denoiser, u = EDMDenoiser(network, 0.5), torch.rand(2, 1, 8, 8)
    nn.init.normal_(network.head.weight)
    here, there = (denoiser(u, 0.3, torch.full((2, 2, 8, 8), place)) for place in (-1.0, 1.0))
    assert torch.equal(here, there) and here.shape == u.shape


def test_reduced_precision_is_the_networks_alone() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 1, 1)

        def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
            y = self.conv(x)
            self.dtype = y.dtype
            return y

    denoiser = EDMDenoiser(Linear(), 0.5)
    u = torch.rand(1, 1, 8, 8)
    exact = denoiser(u, 1e-3, position_of(u)).detach()
    denoiser.precision = "bf16"
    rough = denoiser(u, 1e-3, position_of(u)).detach()
    assert denoiser.network.dtype == torch.bfloat16 and rough.dtype == torch.float32
    assert float((rough - exact).abs().max()) < 2e-5  # bfloat16's 4e-3 of c_out F, not of the image


@given(q=st.floats(0, 1))
def test_quantiles_invert_the_truncated_distribution(q: float) -> None:
    proposal = NoiseProposal(-1.2, 1.2, 0.01, 20.0)

    def cdf(sigma: float) -> float:
        return 0.5 * (1 + math.erf((math.log(sigma) + 1.2) / (1.2 * math.sqrt(2))))

    sigma = float(proposal.quantile(torch.tensor(q, dtype=torch.float64)))
    assert 0.01 <= sigma <= 20.0
    low, high = cdf(0.01), cdf(20.0)
    assert (cdf(sigma) - low) / (high - low) == pytest.approx(q, abs=1e-9)


def test_default_proposal_covers_what_samplers_visit() -> None:
    sigma = NoiseProposal().quantile((torch.arange(100_000) + 0.5) / 100_000)
    assert 0.0015 <= float(sigma.min()) < 0.002 and 10 < float(sigma.max()) <= 40
    assert float((sigma < 0.01).float().mean()) == pytest.approx(0.13, abs=0.01)
    assert float((sigma > 1).float().mean()) == pytest.approx(0.11, abs=0.01)


@given(num=st.integers(1, 70), seed=st.integers(0, 99))
def test_draws_are_stratified_and_shuffled(num: int, seed: int) -> None:
    proposal = NoiseProposal()
    sigma = proposal.sample(num, torch.Generator().manual_seed(seed))
    assert sigma.shape == (num,) and sigma.dtype == torch.float32
    edges = proposal.quantile(torch.arange(num + 1, dtype=torch.float64) / num)
    ordered = sigma.sort().values.double()
    assert bool((ordered >= edges[:-1] * (1 - 1e-5)).all() and (ordered <= edges[1:] * (1 + 1e-5)).all())
    again = proposal.sample(num, torch.Generator().manual_seed(seed))
    assert torch.equal(sigma, again)
    if num > 20:
        assert not torch.equal(sigma, sigma.sort().values)


@pytest.mark.parametrize(
    "bad", [{"sigma_min": 0.0}, {"sigma_min": 2.0, "sigma_max": 1.0}, {"log_std": 0.0}, {"sigma_max": math.nan}]
)
def test_impossible_proposals_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"sigma_min.*log_std"):
        NoiseProposal(**bad)
