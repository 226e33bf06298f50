"""What adapts is what was asked for, starts as the network was, and never touches the prior it was made from."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from invrecon.adapt.trainable import AllWeights, Biases, LoRA, Trainable, adapted_copy, movement, num_parameters
from invrecon.errors import InputError
from invrecon.priors.analytic import GaussianPrior
from invrecon.priors.base import Prior
from invrecon.priors.edm import EDMDenoiser
from invrecon.priors.patch import PatchPrior, WholePrior
from invrecon.priors.unet import UNet
from tests.priors.test_unet import awake

KINDS: dict[str, Trainable] = {
    "all": AllWeights(),
    "biases": Biases(),
    "biases and norms": Biases(norms=True),
    "lora": LoRA(3),
    "lora and biases": LoRA(2, layers="conv|qkv|project", biases=True),
}


def make_prior(max_patches: int = 4) -> PatchPrior:
    torch.manual_seed(0)
    network = UNet(base_channels=8, multipliers=(1, 2), attention=True, dropout=0.2)
    return PatchPrior(EDMDenoiser(awake(network), 0.3).train(), 8, max_patches)


def snapshot(prior: Prior) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in prior.state_dict().items()}


def unchanged(prior: Prior, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in prior.state_dict().items())


def adapt(prior: Prior, parameters: list[nn.Parameter], num_steps: int = 3) -> None:
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(num_steps):
        optimizer.zero_grad()
        prior.backpropagate(torch.randn(1, 1, 12, 12), 0.2, lambda d: d - 1)
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_starts_bit_for_bit_as_the_prior(kind: str) -> None:
    prior = make_prior()
    adapted, _ = adapted_copy(prior, KINDS[kind])
    assert prior.training and not any(module.training for module in adapted.modules())
    x = torch.randn(2, 1, 12, 12)
    assert torch.equal(adapted(x, 0.2), prior.eval()(x, 0.2))
    assert set(movement(prior, adapted).values()) == {0.0}


@pytest.mark.parametrize("kind", KINDS)
def test_adapting_changes_all_that_is_free_and_nothing_else(kind: str) -> None:
    prior = make_prior()
    before = snapshot(prior)
    adapted, parameters = adapted_copy(prior, KINDS[kind])
    free = {id(p) for p in parameters}
    assert len(free) == len(parameters)
    assert {id(p) for p in adapted.parameters() if p.requires_grad} == free
    start = {name: p.detach().clone() for name, p in adapted.named_parameters()}

    adapt(adapted, parameters)

    for name, parameter in adapted.named_parameters():
        assert torch.equal(parameter, start[name]) == (id(parameter) not in free), name
    assert unchanged(prior, before)
    assert all(p.requires_grad and p.grad is None for p in prior.parameters())


def test_the_prior_survives_an_exception() -> None:
    prior = make_prior()
    before = snapshot(prior)
    adapted, parameters = adapted_copy(prior, AllWeights())

    def interrupt(denoised: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapt(adapted, parameters)
        adapted.backpropagate(torch.randn(1, 1, 12, 12), 0.2, interrupt)
    assert unchanged(prior, before)
    assert not any(parametrize.is_parametrized(module) for module in prior.modules())


def test_counts() -> None:
    prior = make_prior()
    network = prior.denoiser.network
    layers = {n: m for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    biases = sum(p.numel() for n, p in network.named_parameters() if n.endswith("bias") and "embedding" not in n)
    gains = sum(m.weight.numel() for m in network.modules() if isinstance(m, nn.GroupNorm))

    def count(trainable: Trainable) -> int:
        return num_parameters(adapted_copy(prior, trainable)[1])

    def lora(rank: int, chosen: dict[str, nn.Module]) -> int:
        return sum(rank * (m.weight[0].numel() + m.weight.shape[0]) for m in chosen.values())

    assert count(AllWeights()) == num_parameters(network.parameters())
    assert count(Biases()) == biases
    assert count(Biases(norms=True)) == biases + gains
    assert count(Biases(exclude=None)) == biases + sum(m.bias.numel() for n, m in layers.items() if "embedding" in n)
    assert count(LoRA(3)) == lora(3, layers)
    assert count(LoRA(4, biases=True)) == lora(4, layers) + biases
    assert count(LoRA(5, layers=r"^decoder.*conv1$")) == 5 * (16 * 9 + 8)
    one = UNet(base_channels=8, multipliers=(1, 2))
    assert num_parameters(LoRA(6, layers="^stem$").attach(one)) == 6 * (3 * 3 * 3 + 8)


def test_correction_is_a_convolution_into_few_channels_and_a_pointwise_one() -> None:
    layer = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, bias=False))
    weight = layer[0].weight.detach().clone()
    up, down = LoRA(2, scale=0.5).attach(layer)
    nn.init.normal_(up)
    x = torch.randn(1, 3, 6, 6)
    inner = nn.functional.conv2d(x, down.reshape(2, 3, 3, 3), padding=1)
    expected = nn.functional.conv2d(x, weight, padding=1) + 0.5 * nn.functional.conv2d(inner, up[:, :, None, None])
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, 1), nn.Linear(4, 6)])
def test_every_kind_of_layer(layer: nn.Module) -> None:
    network = nn.Sequential(layer)
    parameters = LoRA(2).attach(network)
    assert [p.shape for p in parameters] == [(6, 2), (2, layer.weight[0].numel())]
    assert parametrize.is_parametrized(layer, "weight")


def test_directions_depend_on_seed_and_name_alone() -> None:
    def draw(seed: int, layers: str) -> Tensor:
        adapted, _ = adapted_copy(make_prior(), LoRA(4, layers=layers, seed=seed))
        return adapted.denoiser.network.stem.parametrizations.weight[0].down.detach()  # type: ignore[union-attr]

    torch.manual_seed(7)
    first = draw(0, ".")
    assert torch.equal(first, draw(0, "stem"))
    assert not torch.equal(first, draw(1, "."))
    _, wide = LoRA(8).attach(nn.Sequential(nn.Linear(1000, 2)))
    assert float(wide.detach().std()) == pytest.approx(1 / 8, rel=0.05)


@pytest.mark.parametrize("kind", ["lora", "lora and biases"])
def test_half_precision_and_cached_weights(kind: str) -> None:
    """Autocast and `parametrize.cached` change neither what is computed nor that every chunk's gradient arrives."""
    prior, x = make_prior(), torch.randn(1, 1, 20, 20)
    prior.denoiser.precision = "bf16"
    adapted, parameters = adapted_copy(prior, KINDS[kind])
    adapt(adapted, parameters, 1)

    def gradients() -> tuple[Tensor, list[Tensor]]:
        adapted.zero_grad()
        x0 = adapted.backpropagate(x, 0.2, lambda d: d)
        return x0, [p.grad.clone() for p in parameters if p.grad is not None]

    plain, expected = gradients()
    with parametrize.cached():
        cached, found = gradients()
        again, twice = gradients()
    with parametrize.cached(), torch.no_grad():
        assert torch.equal(adapted(x, 0.2), plain)
    assert torch.equal(cached, plain) and torch.equal(again, plain) and plain.dtype == torch.float32
    assert len(expected) == len(found) == len(twice) == len(parameters)
    for a, b, c in zip(expected, found, twice):
        assert a.dtype == torch.float32 and bool(a.isfinite().all()) and bool(a.any())
        assert torch.equal(a, b) and torch.equal(a, c)
    assert adapted(x, 0.2).isfinite().all() and all(p.dtype == torch.float32 for p in adapted.parameters())


def test_weights_in_double_precision_stay_there() -> None:
    adapted, parameters = adapted_copy(make_prior().double(), LoRA(2))
    assert {p.dtype for p in parameters} == {torch.float64}
    assert adapted(torch.randn(1, 1, 8, 8, dtype=torch.float64), 0.1).dtype == torch.float64


def test_an_adapted_prior_can_be_copied_and_adapted_again() -> None:
    adapted, parameters = adapted_copy(make_prior(), LoRA(2))
    adapt(adapted, parameters)
    before, x = snapshot(adapted), torch.randn(1, 1, 12, 12)
    twin = copy.deepcopy(adapted)
    assert torch.equal(twin(x, 0.2), adapted(x, 0.2))
    again, more = adapted_copy(adapted, LoRA(2))
    assert torch.equal(again(x, 0.2), adapted(x, 0.2)) and num_parameters(more) == num_parameters(parameters)
    adapt(again, more)
    adapt(twin, [p for p in twin.parameters() if p.requires_grad])
    assert unchanged(adapted, before)
    assert not torch.equal(again(x, 0.2), adapted(x, 0.2)) and not torch.equal(twin(x, 0.2), adapted(x, 0.2))
    assert max(movement(adapted, again).values()) > 0


# movement


def test_movement_is_relative_and_per_layer() -> None:
    prior = WholePrior(EDMDenoiser(awake(UNet(base_channels=8, multipliers=(1, 2)))))
    adapted, _ = adapted_copy(prior, AllWeights())
    network = adapted.denoiser.network
    with torch.no_grad():
        for parameter in network.stem.parameters():
            parameter.mul_(1.25)
        network.head.bias.add_(3.0)
    moved = movement(prior, adapted)
    head = prior.denoiser.network.head
    expected = 3.0 / float(torch.cat([head.weight.flatten(), head.bias]).detach().norm())
    assert moved.pop("stem") == pytest.approx(0.25, rel=1e-5)
    assert moved.pop("head") == pytest.approx(expected, rel=1e-5)
    assert "encoder.0.0.conv1" in moved and set(moved.values()) == {0.0}


def test_movement_sees_low_rank_corrections() -> None:
    prior = make_prior()
    adapted, (up, down) = adapted_copy(prior, LoRA(1, layers="^stem$", scale=2.0))
    with torch.no_grad():
        up.fill_(0.5)
    stem = prior.denoiser.network.stem
    delta = 2.0 * 0.5 * down.norm() * 8**0.5
    expected = float((delta / torch.cat([stem.weight.flatten(), stem.bias]).norm()).detach())
    moved = movement(prior, adapted)
    assert moved.pop("stem") == pytest.approx(expected, rel=1e-5) and set(moved.values()) == {0.0}


def test_a_zero_layer_that_stays_has_not_moved() -> None:
    prior = WholePrior(EDMDenoiser(UNet(base_channels=8, multipliers=(1, 2))))  # its head is zero
    adapted, _ = adapted_copy(prior, AllWeights())
    assert movement(prior, adapted)["head"] == 0.0
    with torch.no_grad():
        adapted.denoiser.network.head.bias.fill_(1.0)
    assert movement(prior, adapted)["head"] == float("inf")


# refusals


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: LoRA(0), "rank"),
        (lambda: LoRA(-2), "rank"),
        (lambda: LoRA(scale=0.0), "scale"),
        (lambda: LoRA(layers="("), "regular expression"),
        (lambda: Biases(exclude="["), "regular expression"),
        (lambda: adapted_copy(make_prior(), LoRA(layers="transformer")), "among its layers: .*qkv"),
        (lambda: adapted_copy(make_prior(), Biases(exclude=".")), "no bias"),
        (lambda: adapted_copy(GaussianPrior(torch.zeros(1, 2, 2), torch.eye(4)), AllWeights()), "GaussianPrior"),
        (lambda: AllWeights().attach(nn.Identity()), "no parameter"),
    ],
)
def test_refusals_say_what_to_change(make, word: str) -> None:
    with pytest.raises(InputError, match=word):
        make()
