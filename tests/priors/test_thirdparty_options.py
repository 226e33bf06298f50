"""What one states of other people's networks: what is assumed without it, and what is refused."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import save_file

from invrecon.cli import main
from invrecon.data.intensity import HOUNSFIELD, MAGNITUDE, RGB, Intensity
from invrecon.errors import InputError
from invrecon.methods import ProximalDiffusion
from invrecon.operators import GaussianBlur, ParallelBeamCT
from invrecon.priors.thirdparty.channels import Channels
from invrecon.priors.thirdparty.convert import convert
from invrecon.priors.thirdparty.options import as_option
from invrecon.priors.thirdparty.sources import Source
from invrecon.priors.weights import read_card
from invrecon.tasks.reconstruction import Reconstruction
from tests.priors.foreign import GUIDED, SIZE, SONG, foreign, network, options

COLOUR = GUIDED | {"image_channels": 3, "out_channels": 6}


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., Path]:
    """Writes a network, and imports it by the command line."""

    def run(family: str, config: dict[str, Any], *args: str) -> Path:
        output = tmp_path / "prior.safetensors"
        save_file(
            {key: value.contiguous() for key, value in foreign(network(family, config)).items()},
            tmp_path / "theirs.safetensors",
        )
        main(["import-weights", str(tmp_path / "theirs.safetensors"), "--output", str(output), *args])
        return output

    return run


GUIDED_ARGS = ("--image-size", str(SIZE), "--head-channels", "64")


def set_up(task: Reconstruction, intensity: Intensity) -> None:
    """Lets a task check its prior against data of an intensity scale."""
    task._trainer = SimpleNamespace(datamodule=SimpleNamespace(intensity=intensity, size=SIZE))
    task.setup("test")


def test_a_colour_network_is_of_rgb_images_where_nothing_is_said(
    command: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    prior = command("guided-diffusion", COLOUR, *GUIDED_ARGS)
    printed = capsys.readouterr().out
    for known in ("--intensity -1000 3000 HU for CT", "--intensity 0 1 a.u. for MRI", "0 255 '8 bit' for RGB"):
        assert known in printed
    operator = GaussianBlur(size=SIZE, num_channels=3, kernel_size=5, std=1.0, boundary="reflect")
    set_up(Reconstruction(operator=operator, method=ProximalDiffusion(), prior=str(prior)), RGB)


def test_a_prior_of_another_scale_says_how_to_import_it_again(command: Callable[..., Path]) -> None:
    config = GUIDED | {"image_channels": 1, "out_channels": 2}
    prior = command("guided-diffusion", config, *GUIDED_ARGS)
    operator = ParallelBeamCT(size=SIZE, num_views=4, num_bins=24)
    for scale in (HOUNSFIELD, MAGNITUDE, RGB):
        with pytest.raises(InputError) as refused:
            set_up(Reconstruction(operator=operator, method=ProximalDiffusion(), prior=str(prior)), scale)
        assert f"import it again with {as_option(scale)}" in str(refused.value)
    prior = command("guided-diffusion", config, *GUIDED_ARGS, "--intensity", "-1000", "3000", "HU")
    set_up(Reconstruction(operator=operator, method=ProximalDiffusion(), prior=str(prior)), HOUNSFIELD)


@pytest.mark.parametrize("scale", [HOUNSFIELD, MAGNITUDE, RGB], ids=lambda scale: scale.units)
def test_a_scale_is_printed_as_one_types_it(scale: Intensity, command: Callable[..., Path]) -> None:
    prior = command("song", SONG, *shlex.split(as_option(scale)))
    assert read_card(prior).intensity == asdict(scale)


def test_negative_numbers_may_have_an_exponent(command: Callable[..., Path]) -> None:
    prior = command("song", SONG, "--intensity", "-1e3", "3.0e+3", "HU", "--data-range", "-1e0", "1")
    assert read_card(prior).intensity == asdict(HOUNSFIELD)


@pytest.mark.parametrize(
    ("family", "config", "args", "message"),
    [
        (
            "guided-diffusion",
            GUIDED,
            [*["--padding", "64", "--prediction", "edm", "--schedule", "cosine", "--nearest-timestep"], *GUIDED_ARGS],
            r"--padding \(the network has no positions\), and --schedule, --nearest-timestep \(what it predicts is edm",
        ),
        ("song", SONG, ["--num-steps", "100"], r"--num-steps \(what it predicts is edm"),
        ("song", SONG, ["--prediction", "vp", "--rescale-timesteps"], r"--rescale-timesteps \(what it predicts is vp"),
        ("song", SONG, ["--new-attention-order"], r"--new-attention-order \(only networks of guided diffusion"),
        ("song", SONG, ["--padding", "none"], r"--padding \(the network has no positions"),
    ],
    ids=["guided", "steps", "vp", "order", "padding"],
)
def test_options_that_do_not_apply_are_refused(
    family: str, config: dict[str, Any], args: list[str], message: str, command: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"Options do not apply to it: .*{message}.*leave them out"):
        command(family, config, *args)
    assert not (tmp_path / "prior.safetensors").exists()


@pytest.mark.parametrize(
    ("prefixes", "key", "message"),
    [
        ([""], "nosuch", r"--key is 'nosuch', but it holds one network, whose tensors have no prefix: leave --key out"),
        (["a."], "nosuch", r"--key is 'nosuch', which names no network of it: give one of 'a'"),
        (["a.", "b."], "nosuch", r"names no network of it: give one of 'a', 'b'"),
        (["a.x.", "a.y.", "b."], "a", r"names 2 networks of it: give one of 'a.x', 'a.y'\."),
        (["a.", "a.b."], "a", ""),
    ],
)
def test_a_key_that_names_no_network_is_answered_with_those_there_are(
    prefixes: list[str], key: str, message: str
) -> None:
    tensors = {name: value for prefix in prefixes for name, value in foreign(network("song", SONG), prefix).items()}
    if not message:
        convert(Source(tensors), options(SONG, key=key))
        return
    with pytest.raises(InputError, match=message):
        convert(Source(tensors), options(SONG, key=key))


@pytest.mark.parametrize("prediction", ["eps", "v", "vp"])
def test_a_diffusion_of_one_step_is_named(prediction: str, tmp_path: Path) -> None:
    source = Source(foreign(network("song", SONG)))
    with pytest.raises(InputError, match=r"--num-steps is 1, expected 2 to 100000"):
        convert(source, options(SONG, num_steps=1, prediction=prediction))
    for text, found in (("1", "= 1"), ('"200000"', "= 200000")):
        (tmp_path / "s.json").write_text(f'{{"diffusion_steps": {text}}}')
        with pytest.raises(InputError, match=f"Its settings say diffusion_steps {found}, expected 2 to 100000"):
            convert(source, options(SONG, settings=tmp_path / "s.json", prediction=prediction))


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"num_head_channels": "16"}, {"head_channels": 16}),
        ({"num_head_channels": 16.0}, {"head_channels": 16}),
        ({"num_head_channels": -1, "num_heads": "4", "num_heads_upsample": "-1"}, {"num_heads": 4}),
        ({"num_heads": 4, "use_new_attention_order": "True"}, {"new_attention_order": True}),
        ({"num_head_channels": "many"}, "num_head_channels = many, expected a positive integer"),
        ({"num_head_channels": 1.5}, r"num_head_channels = 1\.5"),
        ({"num_head_channels": True}, "num_head_channels = True"),
        ({"num_heads": 0}, "num_heads = 0, expected a positive integer"),
        ({"num_heads": 4, "use_new_attention_order": "maybe"}, "use_new_attention_order = maybe, expected true or"),
        ({"num_heads": 4, "predict_xstart": "maybe"}, "predict_xstart = maybe"),
    ],
    ids=str,
)
def test_settings_are_understood_as_numbers_or_as_text(settings: dict[str, Any], found: Any, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps(settings))
    source = Source(foreign(network("guided-diffusion", GUIDED)))
    asked = options(GUIDED, settings=tmp_path / "s.json", head_channels=None)
    if isinstance(found, str):
        with pytest.raises(InputError, match=f"Its settings say {found}"):
            convert(source, asked)
    else:
        card = convert(source, asked)[1]
        assert card.network | found == card.network


def test_folders_of_the_output_are_created_and_the_source_is_kept(command: Callable[..., Path], tmp_path: Path) -> None:
    command("song", SONG)
    theirs, output = tmp_path / "theirs.safetensors", tmp_path / "some" / "folder" / "p.safetensors"
    main(["import-weights", str(theirs), "--output", str(output)])
    assert output.is_file() and output.with_suffix(".md").is_file()
    before = theirs.read_bytes()
    with pytest.raises(InputError, match="which is the file that is imported"):
        main(["import-weights", str(theirs), "--output", str(theirs)])
    assert theirs.read_bytes() == before


@pytest.mark.parametrize(
    ("numbers", "stated", "expected"),
    [
        ((1, 2), Channels(), (1, 0)),
        ((3, 6), Channels(), (3, 0)),
        ((3, 1), Channels(), (1, 2)),  # PaDIS
        ((6, 6), Channels(), "6 channels of an image.*or 3 channels of an image and 3 of another image, with a var"),
        ((6, 6), Channels(6), (6, 0)),
        ((6, 6), Channels(3), "it is conditional, as an upsampler is, and cannot be imported"),
        ((6, 6), Channels(1), "--image-channels is 1, but the network maps 6 channels to 6: 6 channels of an image"),
        ((6, 3), Channels(), "it is conditional"),
        ((2, 2), Channels(), "--image-channels 1 or 2"),
        ((2, 2), Channels(2), (2, 0)),
        ((4, 2), Channels(), "2 of positions, or 2 channels of an image and 2 of another image.*--padding"),
        ((4, 2), Channels(2), "--padding and --patch-sizes"),
        ((4, 2), Channels(positions=True), (2, 2)),
        ((4, 4), Channels(4), (4, 0)),
        ((7, 1), Channels(), "7 channels to 1, expected as many"),
    ],
    ids=str,
)
def test_numbers_of_channels_are_read_in_one_way_or_not(
    numbers: tuple[int, int], stated: Channels, expected: Any
) -> None:
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            stated.read(*numbers, upsampler=True)
    else:
        image, positions = expected
        found = stated.read(*numbers, upsampler=True)
        assert found == {"image_channels": image, "out_channels": numbers[1], "position_channels": positions}


def test_an_upsampler_is_not_taken_for_an_image_of_six_channels(command: Callable[..., Path]) -> None:
    config = GUIDED | {"image_channels": 6, "out_channels": 6}
    with pytest.raises(InputError, match=r"can be 6 channels.*say which by --image-channels 3 or 6\."):
        command("guided-diffusion", config, *GUIDED_ARGS)
    with pytest.raises(InputError, match="it is conditional"):
        command("guided-diffusion", config, *GUIDED_ARGS, "--image-channels", "3")
    command("guided-diffusion", config, *GUIDED_ARGS, "--image-channels", "6")
    config = SONG | {"image_channels": 2, "out_channels": 2}
    command("song", config)
    with pytest.raises(InputError, match=r"2 of positions, or .* and 2 of another image"):
        command("song", config | {"position_channels": 2})
    command("song", config | {"position_channels": 2}, "--padding", "none", "--patch-sizes", "8")
