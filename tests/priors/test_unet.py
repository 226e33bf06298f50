"""The U-Net: any size, zero at the start, deaf to nothing it should hear."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from invrecon.priors.edm import EDMDenoiser
from invrecon.priors.unet import LargeUNet, SmallUNet, UNet


def awake(network: nn.Module, seed: int = 0) -> nn.Module:
    """Gives the parameters that start at zero random values, so that every branch speaks."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


@pytest.mark.parametrize("size", [(4, 4), (8, 12), (16, 16), (20, 4)])
@pytest.mark.parametrize("channels", [1, 2])
def test_output_has_the_images_shape(size: tuple[int, int], channels: int) -> None:
    network = UNet(image_channels=channels, base_channels=8)
    x = torch.randn(2, channels + 2, *size)
    assert network.stride == 4
    assert network(x, torch.zeros(2)).shape == (2, channels, *size)


def test_positions_may_be_left_out() -> None:
    assert UNet(position_channels=0, base_channels=8)(torch.randn(1, 1, 8, 8), torch.zeros(1)).shape == (1, 1, 8, 8)


def test_an_untrained_denoiser_is_the_skip_path() -> None:
    """The zero head makes `F = 0`, so `D = c_skip u` exactly."""
    denoiser = EDMDenoiser(UNet(base_channels=8), 0.5)
    u, position = torch.randn(2, 1, 8, 8), torch.randn(2, 2, 8, 8)
    assert torch.equal(denoiser(u, 0.5, position), 0.5 * u)


def test_fully_convolutional_up_to_its_normalisation() -> None:
    """On a periodic input a shift by the stride shifts the output (far from the zero-padded borders)."""
    network = awake(UNet(base_channels=8, multipliers=(1, 2))).eval()
    tile = torch.randn(1, 3, 8, 8)
    y = network(tile.repeat(1, 1, 10, 10), torch.zeros(1))
    inner = y[..., 32:48, 32:48]
    torch.testing.assert_close(inner[..., :8, :8], inner[..., 8:, 8:], rtol=1e-5, atol=1e-6)


def test_every_parameter_and_every_input_matters() -> None:
    network = awake(UNet(base_channels=8, attention=True, num_blocks=2))
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    c_noise = torch.zeros(2, requires_grad=True)
    network(x, c_noise).square().sum().backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent
    assert x.grad is not None and bool((x.grad != 0).all())
    assert c_noise.grad is not None and bool((c_noise.grad != 0).all())


def test_attention_reaches_across_the_image() -> None:
    x = torch.randn(1, 3, 64, 64)
    moved = x.clone()
    moved[..., :2, :2] += 1

    def effect_far_away(attention: bool) -> float:
        torch.manual_seed(0)
        network = awake(UNet(base_channels=8, multipliers=(1, 1), attention=attention)).eval()
        for module in network.modules():  # group statistics would carry information everywhere
            if isinstance(module, nn.GroupNorm):
                module.forward = lambda x, *modulation: x
        difference = network(moved, torch.zeros(1)) - network(x, torch.zeros(1))
        return float(difference[..., 56:, 56:].abs().max().detach())

    assert effect_far_away(False) == 0
    assert effect_far_away(True) > 0


def test_samples_do_not_see_each_other() -> None:
    network = awake(UNet(base_channels=8, attention=True)).eval()
    x, c_noise = torch.randn(3, 3, 8, 8), torch.randn(3)
    alone = torch.cat([network(x[i : i + 1], c_noise[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(network(x, c_noise), alone, rtol=1e-5, atol=1e-5)


def test_config_rebuilds_the_network() -> None:
    network = UNet(base_channels=8, multipliers=[1, 2], num_blocks=2, attention=True, dropout=0.1)
    twin = UNet(**network.config)
    assert twin.config == network.config
    twin.load_state_dict(network.state_dict())


def test_presets_have_their_sizes() -> None:
    with torch.device("meta"):
        small, large = SmallUNet(), LargeUNet()
    assert sum(p.numel() for p in small.parameters()) == 1_239_265
    assert sum(p.numel() for p in large.parameters()) == 37_486_465
    assert isinstance(large.attention, nn.Module) and large.config["attention"]
    with torch.device("meta"):
        assert UNet(**large.config).state_dict().keys() == large.state_dict().keys()
