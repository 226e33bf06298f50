"""Other people's files: whatever they hold, nothing in them is executed, and one sentence says what is wrong."""

from __future__ import annotations

import io
import json
import math
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from invrecon.cli import main
from invrecon.errors import InputError
from invrecon.priors.thirdparty.convert import convert, import_weights
from invrecon.priors.thirdparty.layers import Resample
from invrecon.priors.thirdparty.options import Options
from invrecon.priors.thirdparty.sources import Source
from invrecon.priors.weights import load_prior
from tests.priors.foreign import NCSNPP, SONG, foreign, inputs, network, relative


@pytest.mark.parametrize(
    ("wrapped", "key"),
    [
        (lambda t: {f"module.{k}": v for k, v in t.items()}, None),
        (lambda t: {"state_dict": {f"model.{k}": v for k, v in t.items()}, "step": 7}, None),
        (lambda t: {"net": {k: v + 1 for k, v in t.items()}, "ema": t}, None),
        (lambda t: {"model": {f"module.{k}": v.half() for k, v in t.items()}, "optimizer": {"state": {0: 1}}}, None),
        (lambda t: {**{f"model_ema.{k}": v for k, v in t.items()}, **{f"m.{k}": -v for k, v in t.items()}}, None),
        (lambda t: {**{k: v + 1 for k, v in t.items()}, **{f"b.{k}": v for k, v in t.items()}}, "b"),
    ],
    ids=["module", "state_dict", "net and ema", "fp16", "model_ema", "key"],
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_wrappers_are_looked_through(tmp_path: Path, wrapped: Any, key: str | None, zipped: bool) -> None:
    built = network("song", SONG)
    torch.save(wrapped(foreign(built)), tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    import_weights(tmp_path / "w.pt", tmp_path / "p.safetensors", Options(key=key))
    x, t = inputs(SONG), torch.tensor([-0.7, 0.3])
    prior, _ = load_prior(tmp_path / "p.safetensors")
    assert relative(prior.denoiser.network(x, t), built(x, t)) < 1e-2  # float16 is among them


def test_several_networks_have_to_be_chosen_from() -> None:
    tensors = {**foreign(network("song", SONG), "a."), **foreign(network("song", SONG), "b.")}
    with pytest.raises(InputError, match=r"2 networks, 'a', 'b': choose one by --key"):
        convert(Source(tensors), Options())


class EasyDict(dict[str, Any]):
    """Stands for the class of that name that EDM's snapshots refer to."""


def _reconstruct_persistent_obj(meta: Any) -> Any:
    raise AssertionError("code of the file was called")


class SnapshotPickler(pickle.Pickler):
    """Writes networks as EDM does: class name, source code and attributes."""

    def reducer_override(self, obj: Any) -> Any:
        theirs = type(obj).__module__.startswith("invrecon") or isinstance(obj, SimpleNamespace)
        if not (isinstance(obj, nn.Module | SimpleNamespace) and theirs):
            return NotImplemented
        state = dict(obj.__dict__)
        name = state.pop("class_name", type(obj).__name__)
        source = "import pathlib; raise AssertionError('executed')"
        meta = {"type": "class", "version": 6, "module_src": source, "class_name": name, "state": state}
        return _reconstruct_persistent_obj, (meta,)


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a snapshot of a network, and whatever else, as EDM would."""
    for name, item in {"torch_utils.persistence": _reconstruct_persistent_obj, "dnnlib.util": EasyDict}.items():
        module = ModuleType(name)
        setattr(module, item.__name__, item)
        monkeypatch.setitem(sys.modules, name.partition(".")[0], ModuleType(name.partition(".")[0]))
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(item, "__module__", name)

    def write(built: nn.Module, cls: str = "EDMPrecond", path: Path = tmp_path / "net.pkl", **more: Any) -> Path:
        # Their convolutions have the filter as a buffer.
        for module in built.modules():
            if isinstance(getattr(module, "resample", None), Resample):
                module.register_buffer("resample_filter", module.resample.kernel[None, None])
        root = math.sqrt(0.5)
        arguments = EasyDict(model_type="SongUNet", dropout=0.1, channel_mult=[1, 2], scale=np.sqrt(0.5), **more)
        wrapper = SimpleNamespace(
            class_name=cls,
            _init_args=(),
            _init_kwargs=arguments,
            _parameters=OrderedDict(),
            _buffers=OrderedDict(),
            _modules=OrderedDict(model=built),
            training=False,
            skip_scale=np.float64(root),
        )
        content = {"ema": wrapper, "loss_fn": EasyDict(P_mean=-1.2), "hooks": {1, 2}, "none": None, **more}
        buffer = io.BytesIO()
        SnapshotPickler(buffer).dump(content)
        path.write_bytes(buffer.getvalue())
        return path

    return write


def test_a_snapshot_of_edm_is_read_without_its_classes(snapshot: Any, tmp_path: Path) -> None:
    built = network("song", SONG | NCSNPP)
    x, t = inputs(SONG), torch.tensor([-0.7, 0.3])
    wanted = built(x, t)
    card, notes = import_weights(snapshot(built, "VPPrecond", M=500), tmp_path / "p.safetensors", Options())
    assert card.denoiser["prediction"] == "vp" and card.denoiser["settings"]["num_steps"] == 500
    assert card.network == {"family": "song", **SONG, **NCSNPP}
    prior, _ = load_prior(tmp_path / "p.safetensors")
    torch.testing.assert_close(prior.denoiser.network(x, t), wanted)
    assert not any("channel_mult" in note for note in notes)


class Trap:
    """Makes a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.mark,)


def hostile_files(folder: Path, mark: Path, snapshot: Any) -> dict[str, Path]:
    """Files that would make a mark if anything in them were executed."""
    built, trap = network("song", SONG), Trap(mark)
    act, args = trap.__reduce__()
    act(*args)
    assert mark.exists(), "the trap is no trap"
    mark.unlink()
    files = {name: folder / f"{name}.bin" for name in ("plain", "zip", "legacy", "storage", "old")}
    files["plain"].write_bytes(pickle.dumps(trap))
    files["old"].write_bytes(pickle.dumps({"a": trap}, protocol=2))
    for name, zipped in (("zip", True), ("legacy", False)):
        torch.save({**foreign(built), "trap": trap}, files[name], _use_new_zipfile_serialization=zipped)
    files["edm"] = snapshot(built, path=folder / "edm.pkl", augment=trap)
    # A storage is a file of torch's nested in the pickle: there too.
    inner = io.BytesIO()
    torch.save(trap, inner, _use_new_zipfile_serialization=False)

    class Storage:
        def __reduce__(self) -> Any:
            return torch.storage._load_from_bytes, (inner.getvalue(),)

    files["storage"].write_bytes(pickle.dumps(Storage()))
    files["text"] = folder / "text.pkl"
    files["text"].write_bytes(pickle.dumps(trap, protocol=0))
    return files


@pytest.mark.parametrize("kind", ["plain", "old", "zip", "legacy", "edm", "storage", "text"])
def test_a_hostile_file_is_refused_and_does_nothing(kind: str, snapshot: Any, tmp_path: Path) -> None:
    mark, output = tmp_path / "mark", tmp_path / "p.safetensors"
    path = hostile_files(tmp_path, mark, snapshot)[kind]
    with pytest.raises(InputError, match=path.name):
        main(["import-weights", str(path), "--output", str(output)])
    assert not mark.exists() and not output.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04.",
        b"\x80\x04" + b"(" * 1000 + b".",
        b"\x80\x02i",
        b"\x80\x02\x82\x01.",
        b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.",
        b"\x80\x02ctorch.storage\n_load_from_bytes\nX\x04\x00\x00\x00true\x85R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"\x80\x04]\x94h\x00a.",
        b"\x80\x04}\x94]]s.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\x80\x02Pid\n.",
        b"PK\x03\x04",
        b"hello",
        b"",
        b"\x10\0\0\0\0\0\0\0{}              ",
    ],
    ids=str,
)
def test_an_unrelated_file_is_named_in_one_sentence(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "odd.bin"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"odd\.bin"):
        import_weights(path, tmp_path / "p.safetensors", Options())


def test_a_file_cut_anywhere_is_refused(snapshot: Any, tmp_path: Path) -> None:
    built = network("song", SONG)
    torch.save(foreign(built), tmp_path / "w.pt")
    torch.save(foreign(built), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(built.state_dict(), tmp_path / "w.safetensors")
    for path in (tmp_path / "w.pt", tmp_path / "old.pt", tmp_path / "w.safetensors", snapshot(built)):
        content = path.read_bytes()
        for num in (3, 50, len(content) // 2, len(content) - 20):
            path.write_bytes(content[:num])
            with pytest.raises(InputError, match=path.name):
                import_weights(path, tmp_path / "p.safetensors", Options())
    assert not (tmp_path / "p.safetensors").exists()


@pytest.mark.parametrize(
    "args",
    [("--output", "p.pt"), ("--output", "p.safetensors", "--head-channels", "0"), ("--outpt", "p.safetensors"), ()],
)
def test_wrong_arguments_are_named(args: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--output|--head-channels"):
        main(["import-weights", str(tmp_path / "absent.pt"), *args])


def nested(depth: int) -> bytes:
    """A pickle of a dictionary whose key is a tuple of two equal tuples of two equal tuples ...: 2^depth leaves."""
    value: Any = ()
    for _ in range(depth):
        value = (value, value)
    return b"\x80\x02}" + pickle.dumps(value, protocol=2)[2:-1] + b"K\x01s."


def test_a_small_file_does_not_cost_much_time(tmp_path: Path) -> None:
    (tmp_path / "deep.pkl").write_bytes(nested(64))
    with pytest.raises(InputError, match=r"deep\.pkl.*a key that is neither text nor a number"):
        import_weights(tmp_path / "deep.pkl", tmp_path / "p.safetensors", Options())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma_data": None}, r"sigma_data = None, expected a positive number"),
        ({"sigma_data": "x"}, r"sigma_data = x"),
        ({"sigma_data": 0}, r"sigma_data = 0"),
        ({"resample_filter": "abc"}, r"resample_filter = abc, expected a list of numbers"),
        ({"resample_filter": [None]}, r"resample_filter"),
        ({"family": "VPPrecond", "beta_d": "x"}, r"beta_d = x"),
        ({"family": "VPPrecond", "beta_d": 0}, r"beta_d = 0"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_named(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_file(foreign(network("song", SONG)), tmp_path / "w.safetensors")
    (tmp_path / "s.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=message):
        import_weights(tmp_path / "w.safetensors", tmp_path / "p.safetensors", Options(settings=tmp_path / "s.json"))


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("map_layer0.weight", (32, 0), r"'map_layer0.weight' of shape \(32, 0\) is empty"),
        ("map_label.weight", (8,), r"'map_label.weight' is \(8,\), expected a matrix"),
        ("map_label.weight", (8, 3), r"'map_label.bias' is missing"),
    ],
)
def test_tensors_that_cannot_be_are_named(key: str, shape: tuple[int, ...], message: str, tmp_path: Path) -> None:
    tensors = foreign(network("song", SONG)) | {key: torch.ones(shape)}
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=message):
        import_weights(tmp_path / "w.safetensors", tmp_path / "p.safetensors", Options())


ODD: dict[str, tuple[Callable[[], Tensor], str]] = {
    "expanded": (lambda: torch.zeros(1).expand(10**6, 10**6), r"\(1000000, 1000000\) repeats the 1 numbers"),
    "coo": (lambda: torch.eye(3).to_sparse(), "is sparse_coo, expected a dense one"),
    "csr": (lambda: torch.eye(3).to_sparse_csr(), "is sparse_csr, expected a dense one"),
    "meta": (lambda: torch.empty(3, device="meta"), "on the device 'meta', without numbers"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "is nested"),
    "jagged": (lambda: torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged), "is nested"),
    "float8": (lambda: torch.ones(3).to(torch.float8_e4m3fn), "holds torch.float8_e4m3fn, expected"),
    "complex": (lambda: torch.ones(3, dtype=torch.complex64), "holds torch.complex64, expected"),
    "too large": (lambda: torch.full((3,), 1e300, dtype=torch.float64), "NaN or Inf, as float32"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor", "ignore:The PyTorch API of nested", "ignore:TypedStorage")
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("key", ["junk", "map_layer0.weight", "map_label.weight"])
def test_odd_tensors_are_named_before_anything_is_computed(kind: str, key: str, tmp_path: Path) -> None:
    make, message = ODD[kind]
    torch.save(foreign(network("song", SONG)) | {key: make()}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=f"'{key}' .*{message}"):
        import_weights(tmp_path / "w.pt", tmp_path / "p.safetensors", Options())
    # Beside the network, they are no matter.
    torch.save({"model": foreign(network("song", SONG)), "beside": make()}, tmp_path / "w.pt")
    import_weights(tmp_path / "w.pt", tmp_path / "p.safetensors", Options())


def test_float8_of_safetensors_is_named(tmp_path: Path) -> None:
    tensors = foreign(network("song", SONG))
    tensors["map_layer0.weight"] = tensors["map_layer0.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"'map_layer0.weight' holds torch.float8_e4m3fn"):
        import_weights(tmp_path / "w.safetensors", tmp_path / "p.safetensors", Options())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sigma-data", "inf"], "--sigma-data is inf"),
        (["--data-range", "0", "inf"], "both finite"),
        (["--intensity", "nan", "1", "HU"], "expected finite"),
        (["--patch-sizes", "7"], "multiple"),
        (["--patch-sizes", "8", "7"], "expected multiples of"),
        (["--patch-sizes", "8", "16"], "largest first"),
    ],
    ids=str,
)
def test_numbers_that_spoil_a_prior_are_refused(options: list[str], message: str, tmp_path: Path) -> None:
    save_file(foreign(network("song", SONG)), tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=message):
        main(["import-weights", str(tmp_path / "w.safetensors"), "--output", str(tmp_path / "p.safetensors"), *options])
    assert not (tmp_path / "p.safetensors").exists()
