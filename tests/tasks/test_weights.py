"""Prior files: bit for bit there and back, and one clear sentence for everything else."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from invrecon.data.intensity import Intensity
from invrecon.errors import InputError
from invrecon.files import sha256
from invrecon.priors.edm import EDMDenoiser
from invrecon.priors.patch import PatchPrior, WholePrior
from invrecon.priors.unet import UNet
from invrecon.priors.weights import PriorCard, file_hash, load_prior, read_card, save_prior

NETWORK = {"base_channels": 8, "multipliers": [1, 2], "num_blocks": 1}
CARD = PriorCard(
    kind="patch",
    network=UNet(**NETWORK).config,
    sigma_data=0.3,
    sigma_range=(0.002, 40.0),
    image_size=16,
    patch_sizes=[8, 4],
    intensity={"offset": -1000.0, "scale": 3000.0, "units": "HU"},
    data=["a.h5"],
    training={"steps": 3},
)


def state(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    denoiser = EDMDenoiser(UNet(**NETWORK), 0.3).to(memory_format=torch.channels_last)
    return {
        key: torch.randn_like(value) if "sigma" not in key else value for key, value in denoiser.state_dict().items()
    }


@pytest.fixture
def prior_file(tmp_path: Path) -> Path:
    save_prior(tmp_path / "prior.safetensors", state(), CARD)
    return tmp_path / "prior.safetensors"


def test_half_a_file_holds_the_same_network(tmp_path: Path, prior_file: Path) -> None:
    save_prior(tmp_path / "half.safetensors", state(), CARD, half=True)
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * prior_file.stat().st_size
    (whole, _), (half, card) = load_prior(prior_file), load_prior(tmp_path / "half.safetensors")
    assert card == CARD and half.denoiser.sigma_data == whole.denoiser.sigma_data
    for key, value in half.denoiser.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, whole.denoiser.state_dict()[key], rtol=5e-4, atol=1e-7)
    x = torch.rand(2, 1, 16, 16)
    torch.testing.assert_close(half(x, 0.1), whole(x, 0.1), atol=5e-3, rtol=0)
    with pytest.raises(InputError, match=r"network\.stem\.weight' are too large for float16"):
        large = {**state(), "network.stem.weight": torch.full((8, 3, 3, 3), 1e5)}
        save_prior(tmp_path / "large.safetensors", large, CARD, half=True)
    assert not (tmp_path / "large.safetensors").exists()


@pytest.fixture
def hostile(tmp_path: Path) -> Callable[..., Path]:
    """Writes a prior file whose header says something else: fields by name, or the whole text."""

    def write(text: str | None = None, tensors: dict[str, Tensor] | None = None, **fields: Any) -> Path:
        card = {**json.loads(json.dumps(CARD.__dict__)), **fields}
        path = tmp_path / "hostile.safetensors"
        content = {key: value.contiguous() for key, value in (tensors or state()).items()}
        save_file(content, path, metadata={"invrecon": text if text is not None else json.dumps(card)})
        return path

    return write


def test_round_trip_is_bit_exact(prior_file: Path) -> None:
    prior, card = load_prior(prior_file)
    loaded = prior.denoiser.state_dict()
    assert loaded.keys() == state().keys()
    assert all(torch.equal(loaded[key], value) for key, value in state().items())
    assert card == CARD == read_card(prior_file)
    assert isinstance(prior, PatchPrior) and prior.patch_size == 8
    assert not prior.training and not any(p.requires_grad for p in prior.parameters())
    assert file_hash(prior_file) == sha256(prior_file)


def test_equal_priors_are_equal_files(tmp_path: Path, prior_file: Path) -> None:
    save_prior(tmp_path / "again.safetensors", state(), CARD)
    assert file_hash(tmp_path / "again.safetensors") == file_hash(prior_file)
    assert [p.name for p in tmp_path.glob(".*")] == []


def test_no_header_length_is_taken_for_a_pickle(tmp_path: Path) -> None:
    """A file begins with the length of its header, whose lowest byte may be that of a pickle, 0x80."""
    first_bytes = set()
    for num in range(0, 256, 8):
        path = tmp_path / f"{num}.safetensors"
        save_prior(path, state(), replace(CARD, licence="x" * num))
        first_bytes.add(path.read_bytes()[0])
        assert len(read_card(path).licence) == num
    assert 0x80 in first_bytes


def test_a_whole_image_prior_comes_back_as_one(tmp_path: Path) -> None:
    save_prior(tmp_path / "whole.safetensors", state(), replace(CARD, kind="whole", patch_sizes=[]))
    assert isinstance(load_prior(tmp_path / "whole.safetensors")[0], WholePrior)


def test_a_file_cut_anywhere_is_refused(prior_file: Path) -> None:
    content = prior_file.read_bytes()
    for num in (0, 1, 7, 100, len(content) // 2, len(content) - 1):
        prior_file.write_bytes(content[:num])
        with pytest.raises(InputError, match="truncated" if num > 8 else "truncated|pickle"):
            load_prior(prior_file)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(InputError, match="There is no weights file"):
            load_prior(path)


class Trap:
    """Makes a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_pickle_is_refused_and_never_run(tmp_path: Path, legacy: bool) -> None:
    mark, path = tmp_path / "mark", tmp_path / "prior.safetensors"
    torch.save({"w": torch.ones(2), "trap": Trap(mark)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match=r"pickle.*execute code.*safetensors"):
        load_prior(path)
    assert not mark.exists()


def test_tensors_without_a_description_are_refused(tmp_path: Path) -> None:
    for metadata in (None, {"format": "pt"}):
        save_file({"w": torch.ones(2)}, tmp_path / "bare.safetensors", metadata=metadata)
        with pytest.raises(InputError, match="no description of a prior"):
            load_prior(tmp_path / "bare.safetensors")


def test_another_architecture_names_the_first_tensor_that_differs(hostile: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"another architecture.*tensor '.*' should be \(.*\) and is \("):
        load_prior(hostile(network={**NETWORK, "base_channels": 16}))
    with pytest.raises(InputError, match="absent"):
        load_prior(hostile(network={**NETWORK, "attention": True}))
    extra = {**state(), "network.extra": torch.ones(1)}
    with pytest.raises(InputError, match=r"'network.extra' should be absent"):
        load_prior(hostile(tensors=extra))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(hostile: Callable[..., Path], value: float) -> None:
    tensors = state()
    tensors["network.stem.weight"][0, 0, 0, 0] = value
    with pytest.raises(InputError, match="NaN or Inf"):
        load_prior(hostile(tensors=tensors))


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int32, torch.bool], ids=str)
def test_weights_of_a_type_that_no_network_computes_in_are_refused(
    hostile: Callable[..., Path], kind: torch.dtype
) -> None:
    tensors = state()
    tensors["network.stem.weight"] = tensors["network.stem.weight"].to(kind)
    with pytest.raises(InputError, match=r"'network.stem.weight' .* is of type .*; expected one of float16, .*float64"):
        load_prior(hostile(tensors=tensors))


def test_a_sigma_data_that_cannot_be_is_refused(hostile: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="sigma_data"):
        load_prior(hostile(tensors={**state(), "sigma_data": torch.tensor(0.0)}))


@pytest.mark.parametrize(
    "fields",
    [
        {"network": {"no_such_argument": 1}},
        {"network": {**NETWORK, "base_channels": 10**9}},
        {"network": {**NETWORK, "base_channels": -8}},
        {"network": {**NETWORK, "base_channels": "8"}},
        {"network": {**NETWORK, "num_blocks": 10**12}},
        {"network": {**NETWORK, "multipliers": [1] * 10**5}},
        {"network": {**NETWORK, "multipliers": []}},
        {"network": "__import__('os').system('true')"},
        {"network": None},
        {"patch_sizes": [7]},
        {"patch_sizes": ["8"]},
        {"sigma_data": "0.3; import os"},
    ],
    ids=str,
)
def test_an_impossible_architecture_is_refused_at_once(hostile: Callable[..., Path], fields: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"hostile\.safetensors"):
        load_prior(hostile(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "neural"},
        {"patch_sizes": []},
        {"format": 99},
        {"format": "one"},
        {"no_such_field": 1},
        {"sigma_range": [1]},
        {"sigma_range": None},
        {"intensity": {}},
        {"intensity": {"offset": "zero", "scale": 1, "units": "HU"}},
        {"text": "{not json"},
        {"text": "[]"},
        {"text": "[" * 200_000},
        {"text": "{}"},
    ],
    ids=lambda fields: str(fields)[:40],
)
def test_a_description_that_makes_no_sense_is_refused(hostile: Callable[..., Path], fields: dict[str, Any]) -> None:
    path = hostile(**fields)
    for read in (read_card, load_prior):
        with pytest.raises(InputError, match=r"hostile\.safetensors"):
            read(path)


@pytest.mark.parametrize(
    "header",
    [
        b'{"w":{"dtype":"F32","shape":[1000000],"data_offsets":[0,4000000]}}',
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}',
        b'{"w":{"dtype":"OBJECT","shape":[1],"data_offsets":[0,4]}}',
        b"\xff\xfe not text",
    ],
)
def test_a_hostile_safetensors_header_is_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "hostile.safetensors"
    for length in (len(header), 2**62):
        path.write_bytes(struct.pack("<Q", length) + header + b"\0" * 4)
        with pytest.raises(InputError, match="cannot be read as a safetensors file"):
            load_prior(path)


def test_another_intensity_scale_is_refused(prior_file: Path) -> None:
    from invrecon.methods import ProximalDiffusion
    from invrecon.operators.ct import ParallelBeamCT
    from invrecon.tasks.reconstruction import Reconstruction

    operator = ParallelBeamCT(size=16, num_views=4, num_bins=24)
    task = Reconstruction(operator=operator, method=ProximalDiffusion(), prior=str(prior_file))
    for intensity, accepted in ((Intensity(), True), (Intensity(-1024.0, 4095.0), False)):
        task._trainer = SimpleNamespace(datamodule=SimpleNamespace(intensity=intensity, size=16))
        if accepted:
            task.setup("test")
        else:
            with pytest.raises(InputError, match=r"intensity scale.*3000.*4095"):
                task.setup("test")
