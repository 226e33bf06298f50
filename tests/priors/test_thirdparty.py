"""Other people's networks: understood by their tensors' shapes, evaluated as the original does, exact denoisers."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from invrecon.cli import main
from invrecon.errors import InputError
from invrecon.methods.sampling import ProximalDiffusion
from invrecon.operators import ParallelBeamCT
from invrecon.priors.base import broadcast
from invrecon.priors.patch import PatchPrior, WholePrior
from invrecon.priors.thirdparty.convert import convert, import_weights, require_heads
from invrecon.priors.thirdparty.denoiser import FAMILIES, ImportedDenoiser
from invrecon.priors.thirdparty.infer import Heads
from invrecon.priors.thirdparty.layers import FilteredConv, Resample
from invrecon.priors.thirdparty.options import Options
from invrecon.priors.thirdparty.preconditioning import PRECONDITIONINGS, ContinuousVP, Discrete
from invrecon.priors.thirdparty.sources import Source
from invrecon.priors.weights import load_prior, save_prior
from invrecon.rng import make_generators
from tests.priors.foreign import CONFIGS, GUIDED, SIZE, SONG, foreign, inputs, network, options, relative


@pytest.fixture(scope="module")
def recorded() -> Path:
    """Networks with outputs recorded from the original programs."""
    default = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("INVRECON_DATA") or default) / "weights"
    if not folder.is_dir():
        pytest.skip("INVRECON_DATA does not name the folder of research data")
    return folder


def imported(recorded: Path, folder: Path, name: str, *args: str) -> tuple[Any, dict[str, Tensor]]:
    output = folder / f"{name}.safetensors"
    main(["import-weights", str(recorded / f"{name}.weights.safetensors"), "--output", str(output), *args])
    return load_prior(output)[0], load_file(recorded / f"{name}.io.safetensors")


def test_a_recorded_guided_diffusion_network_is_reproduced(recorded: Path, tmp_path: Path) -> None:
    args = ("--head-channels", "16", "--image-size", "32")
    prior, data = imported(recorded, tmp_path, "guided_diffusion_ct", *args)
    assert relative(prior.denoiser.network(data["x"], data["t"]), data["y"]) < 1e-5
    sigma = Discrete().levels[data["t"].long()].float()
    x = data["x"] * broadcast((1 + sigma**2).sqrt(), data["x"])
    wanted = x - broadcast(sigma, x) * data["y"][:, :1]
    assert relative(prior(x, sigma), wanted) < 1e-4
    settings = str(recorded / "guided_diffusion_ct.json")
    again, _ = imported(recorded, tmp_path, "guided_diffusion_ct", "--settings", settings)
    assert torch.equal(again(x, sigma), prior(x, sigma))


def test_a_recorded_edm_network_is_reproduced(recorded: Path, tmp_path: Path) -> None:
    prior, data = imported(recorded, tmp_path, "edm_ddpmpp")
    assert relative(prior(data["x"], data["sigma"]), data["y"]) < 1e-5


def test_a_recorded_padis_network_is_reproduced_in_its_own_and_in_our_positions(recorded: Path, tmp_path: Path) -> None:
    args = ("--patch-sizes", "8", "4")
    prior, data = imported(recorded, tmp_path, "padis_patch", *args, "--padding", "none")
    assert isinstance(prior, PatchPrior) and prior.patch_size == 8
    assert relative(prior.denoiser(data["x"], data["sigma"], data["x_pos"]), data["y"]) < 1e-5
    prior, data = imported(recorded, tmp_path, "padis_patch", *args, "--padding", "4")
    ours = data["x_pos"] * 15 / 8  # the image is 8 pixels of a frame of 16: 2 i/15 - 1 is 8/15 of our coordinate
    assert relative(prior.denoiser(data["x"], data["sigma"], ours), data["y"]) < 1e-5


@pytest.mark.parametrize("case", CONFIGS, ids=str)
def test_the_architecture_is_read_from_the_tensors(case: str, tmp_path: Path) -> None:
    name, config = CONFIGS[case]
    built, path = network(name, config), tmp_path / "prior.safetensors"
    save_file({key: value.contiguous() for key, value in foreign(built).items()}, tmp_path / "theirs.safetensors")
    card, _ = import_weights(tmp_path / "theirs.safetensors", path, options(config))
    found = {key: value for key, value in card.network.items() if key != "family"}
    # The middle of a U-Net has attention too: of Dhariwal's, heads of 64 channels where these fit, else one.
    fits = config["head_channels"] and config["base_channels"] * config["multipliers"][-1] % 64 == 0
    assert found == config | {"head_channels": 64 if fits else None}
    prior, _ = load_prior(path)
    x, t = inputs(config), torch.tensor([3.0, 500.0]) if name == "guided-diffusion" else torch.tensor([-0.7, 0.3])
    assert relative(prior.denoiser.network(x, t), built(x, t)) < 1e-5
    assert prior(x[:, : config["image_channels"]], 0.3).shape == (2, config["image_channels"], SIZE, SIZE)


def test_what_shapes_do_not_say_is_asked_for() -> None:
    with pytest.raises(InputError, match="--image-size"):
        convert(Source(foreign(network("guided-diffusion", GUIDED))), Options(head_channels=64))
    padis = Source(foreign(network("song", SONG | {"position_channels": 2})))
    with pytest.raises(InputError, match=r"--padding .*--patch-sizes"):
        convert(padis, Options())
    with pytest.raises(InputError, match="leaves nothing"):
        convert(padis, Options(padding=8, patch_sizes=[8]))
    with pytest.raises(InputError, match=r"how many heads.*--head-channels or --num-heads.*--settings"):
        convert(Source(foreign(network("guided-diffusion", GUIDED))), Options(image_size=16))
    _, _, notes = convert(Source(foreign(network("guided-diffusion", GUIDED))), options(GUIDED))
    for option in ("--new-attention-order", "--schedule", "--data-range", "--intensity"):
        assert any(option in note for note in notes)


@pytest.mark.parametrize(("channels", "expected"), [(3, [-1.0, 1.0]), (1, [0.0, 1.0])])
def test_networks_of_photographs_are_taken_to_see_them_from_minus_one(channels: int, expected: list[float]) -> None:
    config = GUIDED | {"image_channels": channels, "out_channels": channels}
    _, card, notes = convert(Source(foreign(network("guided-diffusion", config))), options(config))
    assert card.denoiser["data_range"] == expected
    assert any("Assumed" in note and "--data-range" in note for note in notes)


@pytest.mark.parametrize(
    ("base", "multipliers", "resample", "known"),
    [
        (128, [1, 1, 2, 2, 4, 4], "block", True),  # FFHQ of DPS
        (256, [1, 1, 2, 2, 4, 4], "block", True),  # ImageNet at 256 x 256, AAPM of DDS
        (256, [1, 1, 2, 3, 4], "block", False),  # ImageNet at 128 x 128: four heads
        (128, [1, 1, 2, 2, 4, 4], "conv", False),
        (32, [1, 2], "block", False),
    ],
)
def test_heads_are_known_of_published_shapes_alone(
    base: int, multipliers: list[float], resample: str, known: bool
) -> None:
    found = {"base_channels": base, "multipliers": multipliers, "resample": resample, "head_channels": 64}
    require_heads(found, Heads(num_heads=4))
    if known:
        require_heads(found, Heads())
    else:
        with pytest.raises(InputError, match="how many heads"):
            require_heads(found, Heads())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("enc.8x8_block0.conv1.weight"), "'enc.8x8_block0.conv1.weight' should be .* absent"),
        (lambda t: t.update({"enc.8x8_extra.weight": torch.ones(2)}), "extra.weight' should be absent"),
        (lambda t: t.pop("enc.16x16_conv.weight"), "enc.16x16_conv.weight' is missing"),
        (lambda t: t.update({"enc.16x16_conv.weight": torch.ones(8, 7, 3, 3)}), "7 channels to 1"),
        (lambda t: t.update({"map_layer1.bias": torch.full((32,), math.nan)}), "NaN"),
        (lambda t: t.update({"map_layer1.bias": torch.ones(32, dtype=torch.int64)}), "int64"),
        (lambda t: t.update({"enc.16x16_conv.weight": torch.ones(8, 1, 3, 3, 3)}), "2D"),
        (lambda t: t.pop("map_layer0.weight"), "no known family"),
    ],
)
def test_other_networks_are_refused_by_name(change: Any, message: str) -> None:
    tensors = foreign(network("song", SONG))
    change(tensors)
    with pytest.raises(InputError, match=message):
        convert(Source(tensors), Options())


def test_settings_that_the_tensors_contradict_are_refused(tmp_path: Path) -> None:
    path, source = tmp_path / "s.json", Source(foreign(network("song", SONG)))
    for text, message in (('{"num_blocks": 4}', "num_blocks = 4"), ("[1]", "a list"), ("{", "not JSON")):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            convert(source, Options(settings=path))


@pytest.mark.parametrize("label", [None, 2])
@pytest.mark.parametrize(
    ("case", "layer", "key", "shape"),
    [
        ("guided", "time_embed", "label_emb.weight", (5, 128)),
        ("song", "map_layer0", "map_label.weight", (8, 5)),
        ("dhariwal", "map_layer1", "map_label.weight", (128, 5)),
    ],
)
def test_a_class_is_fixed_exactly(case: str, layer: str, key: str, shape: tuple[int, ...], label: int | None) -> None:
    name, config = CONFIGS[case]
    built, weight = network(name, config), torch.randn(shape)
    tensors = foreign(built) | {key: weight} | ({"map_label.bias": torch.ones(8)} if case == "song" else {})
    tensors |= {} if case == "guided" else {"map_augment.weight": torch.randn(tensors["map_layer0.weight"].shape[1], 9)}
    if case == "guided" and label is None:
        with pytest.raises(InputError, match=r"one of 5 classes.*--label"):
            convert(Source(tensors), options(config))
        return
    state, card, _ = convert(Source(tensors), options(config, label=label))
    folded = FAMILIES[name](**{key: value for key, value in card.network.items() if key != "family"})
    folded.load_state_dict({key.removeprefix("network."): v for key, v in state.items() if key != "sigma_data"})
    onehot = torch.zeros(5) if label is None else torch.eye(5)[label]
    added = weight.T @ onehot if case == "guided" else weight @ onehot * (5**0.5 if case == "song" else 1)
    if case == "song":
        built.map_layer0.register_forward_pre_hook(lambda module, args: args[0] + added + 1)
    else:
        built.get_submodule(layer).register_forward_hook(lambda module, args, out: out + added)
    x, t = inputs(config), torch.tensor([-0.7, 0.3])
    torch.testing.assert_close(folded(x, t), built(x, t), rtol=1e-4, atol=1e-4)


def test_steps_of_the_linear_schedule_are_found_again() -> None:
    """The table of `sigma_i`, and the steps between."""
    table = Discrete()
    assert table.sigma_range == pytest.approx((0.0100, 157.41), rel=1e-4)
    sigma = torch.tensor([0.01, 0.1, 1.0, 10.0, 100.0])
    torch.testing.assert_close(table.step(sigma), torch.tensor([0, 26.41, 258.09, 673.67, 953.05]), rtol=0, atol=6e-3)
    continuous = ContinuousVP()(sigma).c_noise
    torch.testing.assert_close(continuous, torch.tensor([0.92, 26.97, 258.70, 675.37, 956.15]), rtol=0, atol=6e-3)
    every = table.step(table.levels)
    torch.testing.assert_close(every, torch.arange(1000, dtype=torch.float64), rtol=0, atol=1e-6)
    assert Discrete(nearest=True).step(torch.tensor([0.0, 0.1, 1e9])).tolist() == [0, 26, 999]
    assert float(Discrete(num_steps=4000, rescale=True)(torch.tensor([1e9])).c_noise) == pytest.approx(999.75)


def test_iddpm_of_edm_is_the_cosine_schedule() -> None:
    """EDM's recursion (table 1): `u_{j-1}^2 = (u_j^2 + 1)/max(a_{j-1}/a_j, C_1) - 1`, timestep `M - 1 - j`."""
    a = [math.sin(math.pi / 2 * j / 100 / 1.008) ** 2 for j in range(101)]
    u = [0.0]
    for j in range(100, 0, -1):
        u.insert(0, math.sqrt((u[0] ** 2 + 1) / max(a[j - 1] / a[j], 0.001) - 1))
    expected = torch.tensor(u[99::-1], dtype=torch.float64)
    torch.testing.assert_close(Discrete("cosine", 100).levels, expected, rtol=1e-6, atol=0)
    name, config = CONFIGS["dhariwal, iDDPM"]
    tensors = {**foreign(network(name, config), "ema.model."), "ema.u": torch.tensor(u)}
    _, card, _ = convert(Source(tensors), Options())
    settings = {"schedule": "cosine", "num_steps": 100, "nearest": True, "rescale": False}
    assert card.denoiser["prediction"] == "eps" and card.denoiser["settings"] == settings


@pytest.mark.parametrize(
    "change",
    [
        {"network": {**SONG, "family": "other"}},
        {"network": {**SONG, "family": "song", "num_blocks": 10**12}},
        {"network": {**SONG, "family": "song", "resolution": -1}},
        {"network": {**SONG, "family": "song", "head_channels": 0}},
        {"network": {**SONG, "family": "song", "taps": []}},
        {"denoiser": {"prediction": "eps", "settings": {"num_steps": 10**12}}},
        {"denoiser": {"prediction": "eps", "data_range": [1, 0]}},
        {"denoiser": {"prediction": "__import__('os')"}},
        {"denoiser": []},
    ],
    ids=lambda change: str(change)[-40:],
)
def test_an_impossible_card_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    state, card, _ = convert(Source(foreign(network("song", SONG))), Options())
    save_prior(tmp_path / "p.safetensors", state, replace(card, **change))
    with pytest.raises(InputError, match=r"p\.safetensors.* (cannot be built|are of another architecture)"):
        load_prior(tmp_path / "p.safetensors")


class ExactNetwork(nn.Module):
    """What a perfectly trained network returns for data N(0, s^2 I), and a variance after it."""

    def __init__(self, kind: str, sigma: float, s: float) -> None:
        super().__init__()
        self.kind, self.sigma, self.s = kind, sigma, s

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        sigma, shrink = self.sigma, self.s**2 / (self.s**2 + self.sigma**2)
        kept = 1 / (1 + sigma**2) ** 0.5
        if self.kind == "ve":
            out = (shrink - 1) * x / sigma
        elif self.kind == "edm":
            out = torch.zeros_like(x)  # c_skip alone is the answer
        else:
            x0 = shrink * x / kept
            eps = (x / kept - x0) / sigma
            out = {"x0": x0, "v": kept * eps - sigma * kept * x0}.get(self.kind, eps)
        return torch.cat([out, torch.full_like(out, 1e3)], dim=1)


@pytest.mark.parametrize("kind", PRECONDITIONINGS)
@pytest.mark.parametrize("edges", [(0.0, 1.0), (-1.0, 1.0)])
def test_every_prediction_becomes_the_same_denoiser(kind: str, edges: tuple[float, float]) -> None:
    """Data of mean 0 and deviation 0.5 in the network's units have the closed form `m + k (x - m)` in ours."""
    low, scale = edges[0], edges[1] - edges[0]
    x, sigma = torch.randn(2, 1, 4, 4), 0.7
    denoiser = ImportedDenoiser(ExactNetwork(kind, scale * sigma, 0.5), PRECONDITIONINGS[kind](), 0, edges)
    mean, std = -low / scale, 0.5 / scale
    wanted = mean + std**2 / (std**2 + sigma**2) * (x - mean)
    torch.testing.assert_close(denoiser(x, sigma, torch.empty(0)), wanted)
    weight = denoiser.loss_weight(torch.tensor([sigma]))
    assert weight > 0 and (kind != "eps" or float(weight) == pytest.approx(sigma**-2))


def test_resampling_filters_are_those_of_the_equations() -> None:
    x = torch.randn(1, 2, 8, 8)
    torch.testing.assert_close(Resample([1, 1], "down")(x), nn.functional.avg_pool2d(x, 2))
    torch.testing.assert_close(Resample([1, 1], "up")(x), nn.functional.interpolate(x, scale_factor=2.0))
    for taps in ([1, 1], [1, 3, 3, 1]):
        down, up = Resample(taps, "down"), Resample(taps, "up")
        y = torch.randn(1, 2, 4, 4)
        torch.testing.assert_close((down(x) * y).sum(), (x * up(y)).sum() / 4, rtol=1e-4, atol=1e-4)  # a transpose
        conv = FilteredConv(2, 3, taps)
        wide = nn.functional.conv2d(x, conv.weight, None, padding=1 + (len(taps) - 1) // 2)
        f = torch.tensor(taps) / sum(taps)
        rows = sum(f[i] * wide[:, :, i : wide.shape[2] - len(taps) + 1 + i : 2] for i in range(len(taps)))
        both = sum(f[i] * rows[..., i : wide.shape[3] - len(taps) + 1 + i : 2] for i in range(len(taps)))
        torch.testing.assert_close(conv(x), both + conv.bias[:, None, None])


@pytest.mark.parametrize("new", [False, True])
def test_attention_orders_differ_as_documented(new: bool) -> None:
    built = network("guided-diffusion", GUIDED | {"head_channels": 16, "new_attention_order": new})
    block = built.middle_block[1]
    x = torch.randn(1, 64, 3, 3)
    qkv = block.qkv(block.norm(x).flatten(2))[0]
    heads = []
    for h in range(4):
        starts = [part * 64 + h * 16 if new else h * 48 + part * 16 for part in range(3)]
        q, k, v = (qkv[start : start + 16] for start in starts)
        heads.append(v @ torch.softmax(q.T @ k / 4, dim=1).T)
    wanted = x + block.proj_out(torch.cat(heads)[None]).reshape(x.shape)
    torch.testing.assert_close(block(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["guided", "song", "song, positions"])
def test_an_imported_prior_reconstructs(case: str, tmp_path: Path) -> None:
    name, config = CONFIGS[case]
    torch.save(foreign(network(name, config)), tmp_path / "w.pt")
    asked = options(config, data_range=(-1.0, 1.0), intensity={"offset": -1000.0, "scale": 3000.0, "units": "HU"})
    import_weights(tmp_path / "w.pt", tmp_path / "p.safetensors", asked)
    prior, _ = load_prior(tmp_path / "p.safetensors")
    assert isinstance(prior, PatchPrior if "positions" in case else WholePrior)
    operator = ParallelBeamCT(size=SIZE, num_views=6, num_bins=24)
    y = operator(torch.rand(2, 1, SIZE, SIZE))
    method = ProximalDiffusion(num_levels=3)
    both = method(y, operator, prior, generators=make_generators(0, ["a", "b"])).mean
    alone = method(y[1:], operator, prior, generators=make_generators(0, ["b"])).mean
    assert torch.isfinite(both).all() and both.shape == (2, 1, SIZE, SIZE)
    assert relative(both[1:], alone) < 1e-2  # a network of random weights amplifies rounding
