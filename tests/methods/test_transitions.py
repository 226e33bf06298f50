import math

import pytest
import torch

from invrecon.errors import InputError
from invrecon.methods import DDIM, DDSTransition, KarrasSchedule, Langevin, Renoise, diffuse
from tests.methods.toy import generators

NUM = 4000
TRUTH = 0.7


def noisy(sigma):
    torch.manual_seed(1)
    return TRUTH + sigma * torch.randn(NUM, 1, 2, 2, dtype=torch.float64)


@pytest.mark.parametrize("transition", [DDIM(0.0), DDIM(0.5), DDIM(1.0), DDSTransition(0.85), Renoise()])
def test_the_true_image_keeps_the_next_level(transition):
    # With x0 exact, x' = x0 + sigma' n whatever the split between kept and fresh noise.
    x0 = torch.full((NUM, 1, 2, 2), TRUTH, dtype=torch.float64)
    x = transition(noisy(1.0), x0, 1.0, 0.4, generators(NUM))
    assert float(x.mean()) == pytest.approx(TRUTH, abs=0.02)
    assert float(x.std()) == pytest.approx(0.4, rel=0.02)


def test_ddim_share_of_fresh_noise():
    # eta = 1: given x, the noise added has standard deviation (s'/s) sqrt(s^2 - s'^2), the ancestral step.
    x = torch.zeros(NUM, 1, 2, 2, dtype=torch.float64)
    fresh = DDIM(1.0)(x, x, 1.0, 0.6, generators(NUM))
    assert float(fresh.std()) == pytest.approx(0.6 * 0.8, rel=0.02)
    assert torch.equal(DDIM(0.0)(x, x, 1.0, 0.6, generators(NUM)), x)


def test_ddim_without_fresh_noise_is_the_euler_step_of_the_flow():
    x, x0 = noisy(1.0), torch.zeros(NUM, 1, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(DDIM(0.0)(x, x0, 1.0, 0.4, generators(NUM)), x + (0.4 - 1.0) * (x - x0) / 1.0)


def test_ancestral_sampling_of_a_gaussian_converges_at_first_order():
    # x0 ~ N(0, 1), so D = x / (1 + sigma^2): the variance of the samples tends to 1 as levels are added.
    def denoise(x, sigma, generators):
        return x / (1 + sigma**2)

    errors = []
    for num_levels in (25, 100):
        x = 50 * torch.randn(NUM, 1, 2, 2, dtype=torch.float64)
        x = diffuse(x, denoise, KarrasSchedule(num_levels, 50, 0.002), DDIM(1.0), generators(NUM))
        errors.append(1 - float(x.var()))
    print(f"variance lacking: {errors[0]:.3f} at 25 levels, {errors[1]:.3f} at 100")
    assert 0 < errors[1] < 0.12
    assert 2.5 < errors[0] / errors[1] < 5


@pytest.mark.parametrize("transition", [DDIM(1.0), DDSTransition(), Renoise()])
def test_the_end_is_the_estimate_itself(transition):
    x, x0 = noisy(0.1), torch.ones(NUM, 1, 2, 2, dtype=torch.float64)
    assert torch.equal(transition(x, x0, 0.1, 0.0, generators(NUM)), x0)


@pytest.mark.parametrize("epsilon", [0.1, 0.5, 1.0])
def test_langevin_stationary_variance(epsilon):
    # Point prior at 0: variance sigma^2 / (1 - epsilon / 4), so 1.026, 1.143 and 1.333.
    sigma, draws = 0.5, generators(NUM)
    x = torch.zeros(NUM, 1, 4, 4, dtype=torch.float64)
    for _ in range(math.ceil(8 / epsilon)):
        x = Langevin(epsilon)(x, torch.zeros_like(x), sigma, 0.4, draws)
    ratio = float(x.var()) / sigma**2
    print(f"epsilon {epsilon}: variance ratio {ratio:.3f}, expected {1 / (1 - epsilon / 4):.3f}")
    assert ratio == pytest.approx(1 / (1 - epsilon / 4), rel=0.02)


def test_langevin_is_silent_at_the_last_level():
    x = noisy(0.1)
    torch.testing.assert_close(Langevin(0.5)(x, torch.zeros_like(x), 0.1, 0.0, generators(NUM)), 0.75 * x)


def test_constants_out_of_range_are_refused():
    for make in (
        lambda: DDIM(1.5),
        lambda: DDIM(-0.1),
        lambda: DDSTransition(2),
        lambda: Langevin(0),
        lambda: Langevin(4),
    ):
        with pytest.raises(InputError):
            make()
