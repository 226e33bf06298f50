"""Whatever is wrong with the input, the command line says it in one sentence and leaves nothing half done."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from invrecon import __version__ as invrecon_version
from invrecon.data.measurement import write_measurement
from invrecon.errors import InputError
from invrecon.operators import ParallelBeamCT
from tests.cli.tiny import NETWORK, QUIET, SIZE, files_in, learn, make_prior, make_volume, process, reconstruct

GEOMETRY = ParallelBeamCT(size=SIZE, num_views=12, num_bins=48).geometry


def truncated(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def scan(path: Path, chest: np.ndarray, *, shape: tuple[int, ...] = (4, SIZE, SIZE), **attrs: Any) -> Path:
    return make_volume(path, np.resize(chest, shape), **attrs)


def with_nan(path: Path, chest: np.ndarray) -> Path:
    values = np.resize(chest, (4, SIZE, SIZE))
    values[2, 3, 4] = np.nan
    return make_volume(path, values)


def sinograms(path: Path, chest: np.ndarray, change: Callable[[h5py.File], None]) -> Path:
    write_measurement(path, torch.rand(2, 12, 48), GEOMETRY)
    with h5py.File(path, "a") as file:
        change(file)
    return path


def other_angles(file: h5py.File) -> None:
    del file["geometry/angles"]
    file["geometry/angles"] = np.linspace(0, 3, 11)


def no_geometry(file: h5py.File) -> None:
    del file["geometry"]


def other_scale(file: h5py.File) -> None:
    file.attrs["intensity_scale"] = 1.0


SCANS: dict[str, tuple[Callable[[Path, np.ndarray], Path], str]] = {
    "missing": (lambda p, c: p, "does not exist"),
    "truncated": (lambda p, c: truncated(scan(p, c)), "truncated"),
    "no HDF5": (lambda p, c: (p.write_text("hello"), p)[1], "not HDF5"),
    "wrong dataset": (lambda p, c: scan(p, c, dataset="volume"), "no dataset 'data'.*'volume'"),
    "NaN": (with_nan, "Slice 2 .* 1 NaN or Inf voxels"),
    "constant": (lambda p, c: make_volume(p, np.zeros((4, SIZE, SIZE))), "constant"),
    "complex": (lambda p, c: make_volume(p, np.ones((4, SIZE, SIZE), complex)), "complex"),
    "no slices": (lambda p, c: make_volume(p, np.zeros((0, SIZE, SIZE))), r"shape \(0, 32, 32\)"),
    "1 x 1": (lambda p, c: scan(p, c, shape=(4, 1, 1)), r"shape \(4, 1, 1\)"),
    "other units": (lambda p, c: scan(p, c, units="1/mm"), "units '1/mm', expected 'HU'"),
    "other size": (lambda p, c: scan(p, c, shape=(4, 48, 48)), "48 x 48 pixels"),
    "two axes": (lambda p, c: scan(p, c, shape=(SIZE, SIZE)), "three axes"),
}


def attribute(name: str, value: Any, of: str = "/") -> Callable[[h5py.File], None]:
    return lambda file: file[of].attrs.__setitem__(name, value)


def fan(file: h5py.File) -> None:
    file["geometry"].attrs.update({"type": "fan", "source_distance": 0.1, "detector_distance": 0.0})


def text_noise(file: h5py.File) -> None:
    file["noise_std"] = "low"


SINOGRAMS: dict[str, tuple[Callable[[h5py.File], None], str]] = {
    "other views": (other_angles, r"\(12, 48\) \(views, bins\).* 11 angles"),
    "no geometry": (no_geometry, "no group 'geometry'"),
    "other scale": (other_scale, "'intensity_scale' = 1.0"),
    "a scale in words": (attribute("intensity_scale", "HU"), "'intensity_scale' = HU"),
    "two fields of view": (attribute("field_of_view", [1.0, 2.0], "geometry"), "not a number"),
    "half a bin": (attribute("num_bins", 47.5, "geometry"), "'num_bins' = 47.5"),
    "source inside": (fan, "'source_distance' = 0.1, expected more than"),
    "noise in words": (text_noise, "'noise_std' .* expected numbers"),
    "later version": (attribute("version", 99), "version 99"),
}


def refused(invrecon: Callable[..., Any], args: list[str], message: str) -> str:
    """Expects one sentence or two that match, and returns them."""
    with pytest.raises(InputError, match=message) as error:
        invrecon(args)
    text = str(error.value)
    assert "\n" not in text and 30 < len(text) < 700
    return text


@pytest.mark.parametrize("command", ["test", "predict"])
@pytest.mark.parametrize("what", SCANS)
def test_scans(invrecon: Callable[..., Any], chest: np.ndarray, tmp_path: Path, what: str, command: str) -> None:
    make, message = SCANS[what]
    path = make(tmp_path / "patient_01.h5", chest)
    text = refused(invrecon, reconstruct(command, "fbp_ct.yaml", path, tmp_path / "out"), message)
    assert "patient_01.h5" in text
    assert not files_in(tmp_path / "out")


@pytest.mark.parametrize("what", ["missing", "truncated", "NaN", "constant", "complex", "other size"])
def test_training_scans(invrecon: Callable[..., Any], chest: np.ndarray, tmp_path: Path, what: str) -> None:
    make, message = SCANS[what]
    path = make(tmp_path / "patient_01.h5", chest)
    message = r"\(48, 48\)" if what == "other size" else message
    assert "patient_01.h5" in refused(invrecon, learn("patch_ct.yaml", path, tmp_path / "run"), message)
    assert not (tmp_path / "run" / "prior.safetensors").exists()


@pytest.mark.parametrize("what", SINOGRAMS)
def test_sinograms(invrecon: Callable[..., Any], chest: np.ndarray, tmp_path: Path, what: str) -> None:
    change, message = SINOGRAMS[what]
    path = sinograms(tmp_path / "measured.h5", chest, change)
    assert "measured.h5" in refused(invrecon, reconstruct("predict", "fbp_ct.yaml", path, tmp_path / "out"), message)


NULLS = {
    "model.operator.num_views": "int",
    "model.method.sigma_max": "float",
    "data.size": "int",
    "data.paths": "list",
}


@pytest.mark.parametrize("name", NULLS)
def test_nothing_where_something_is_needed(
    invrecon: Callable[..., Any], library: Path, tmp_path: Path, name: str
) -> None:
    args = reconstruct("test", "recon_ct.yaml", library / "scans", tmp_path / "out", f"--{name}", "null")
    refused(invrecon, args, f"{name} is null, but .* needs .*{NULLS[name]}")


def test_a_measurement_cannot_be_tested(invrecon: Callable[..., Any], tmp_path: Path) -> None:
    path = sinograms(tmp_path / "measured.h5", np.zeros(1), lambda file: None)
    refused(invrecon, reconstruct("test", "fbp_ct.yaml", path, tmp_path / "out"), "without a reference.*predict")


def renamed_tensor(path: Path) -> Path:
    tensors = load_file(make_prior(path))
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors["network.other.weight"] = tensors.pop("network.stem.weight")
    save_file(tensors, path, metadata)
    return path


def pickled(path: Path) -> Path:
    torch.save({"network.stem.weight": torch.zeros(3)}, path)
    return path


def bare(path: Path) -> Path:
    save_file({"weight": torch.zeros(3)}, path)
    return path


WEIGHTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda p: p, "no weights file"),
    "truncated": (lambda p: truncated(make_prior(p)), "truncated"),
    "pickle": (pickled, "is a pickle, which can execute code"),
    "other tensors": (renamed_tensor, "another architecture"),
    "no card": (bare, "no description of a prior"),
    "other scale": (
        lambda p: make_prior(p, intensity={"offset": -1024.0, "scale": 4096.0, "units": "HU"}),
        r"intensity scale.*4096.*3000",
    ),
    "other channels": (lambda p: make_prior(p, network=NETWORK | {"image_channels": 2}), "2 image channels"),
}


def test_weights_of_another_architecture(invrecon: Callable[..., Any], library: Path, tmp_path: Path) -> None:
    """The card says one thing, the tensors another."""
    from invrecon.priors.weights import load_prior, save_prior

    prior, _ = load_prior(make_prior(tmp_path / "wide.safetensors", network=NETWORK | {"base_channels": 16}))
    _, card = load_prior(library / "patch.safetensors")
    save_prior(tmp_path / "prior.safetensors", prior.denoiser.state_dict(), card)
    more = (f"--model.prior={tmp_path}/prior.safetensors", "--model.method.num_levels=2")
    args = reconstruct("predict", "recon_ct.yaml", library / "scans", tmp_path / "out", *more)
    assert "prior.safetensors" in refused(invrecon, args, r"another architecture.*should be \(16,\) and is \(32,\)")


@pytest.mark.parametrize("what", WEIGHTS)
def test_weights(invrecon: Callable[..., Any], library: Path, tmp_path: Path, what: str) -> None:
    make, message = WEIGHTS[what]
    more = (f"--model.prior={make(tmp_path / 'prior.safetensors')}", "--model.method.num_levels=2")
    refused(invrecon, reconstruct("predict", "recon_ct.yaml", library / "scans", tmp_path / "out", *more), message)
    assert not files_in(tmp_path / "out")


OPTIONS = {
    "--model.method=FPB": r"model\.method is 'FPB', expected one of .*FBP, .*TotalVariation",
    "--model.operator=ParalelBeamCT": r"model\.operator is 'ParalelBeamCT', expected one of .*FanBeamCT",
    "--model.noise=FBP": r"model\.noise is 'FBP', expected one of GaussianNoise",
    "--model=Reconstuction": r"model is 'Reconstuction', expected one of Reconstruction, ScoreMatching",
    "--data=CT": r"data is 'CT', expected one of CTTraining, .*ReconstructionData",
    "--model.method=VEDDNM --model.method.conditioning=DPSConditioning": r"one of DirectInverse\w+, PinvConditioning\.",
    "--model.method=PaDIS --model.method.guidance=Unconditional": r"expected one of NormGuidance, (?!.*Unconditional)",
    "--model.operator.num_view=60": r"model\.operator: Option 'num_view' is not accepted",
    "--model.operator.num_views=many": r"model\.operator\.num_views: .*'int'.*many",
    "--model.operator.num_views=0": "number of views must be at least 1, got 0",
    "--model.method=ProximalDiffusion": r"ProximalDiffusion needs a prior",
    "--data.batch_size=0": r"data\.batch_size is 0",
    "--data.slices=2:2": "select nothing",
    "--data.slices=40": "only 0 to 3",
    "--data.slices=first": "not understood",
    "--data.size=24": "a multiple of data.size = 24",
    "--data.size=16": r"data\.size is 16, but the operator's images are \(32, 32\)",
    "--model.precision=8": r"model\.precision is '8'",
    "--no_such_option=1": "no_such_option",
    "--trainer.device=1": r"trainer\.device",
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options(invrecon: Callable[..., Any], library: Path, tmp_path: Path, option: str) -> None:
    args = reconstruct("predict", "fbp_ct.yaml", library / "scans" / "a.h5", tmp_path / "out", *option.split())
    refused(invrecon, args, OPTIONS[option])
    assert not files_in(tmp_path / "out")


COMMANDS = {
    "fit --config recon_ct.yaml --model.prior=PRIOR": "Reconstruction is not for `invrecon fit`",
    "test --config patch_ct.yaml": "ScoreMatching is not for `invrecon test`",
    "test --config generate_ct.yaml --model.prior=PRIOR": "GenerationData is not for `invrecon test`",
    "predict --config fbp_ct.yaml --data=GenerationData": "no measurement for FBP.*UnconditionalSampler",
    "predict --config generate_ct.yaml --model.prior=PRIOR --data.size=32": "the operator's images are .256, 256.",
    "dance --config fbp_ct.yaml": "no command 'dance'.*`fit` learns.*`tune`.*`import-weights`",
    "predict --data.paths=a.h5": "No --config was given",
}


@pytest.mark.parametrize("line", COMMANDS)
def test_commands(invrecon: Callable[..., Any], library: Path, here: Path, line: str) -> None:
    args = line.replace("PRIOR", f"{library}/whole.safetensors").split()
    refused(invrecon, [*args, *QUIET, "--output", "out"] if len(args) > 2 else args, COMMANDS[line])


def test_every_command_is_listed_where_none_is_given(
    invrecon: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    refused(invrecon, [], "No command was given.*`fit`.*`validate`.*`test`.*`predict`.*`tune`.*`import-weights`")
    invrecon(["--version"])
    assert invrecon_version in capsys.readouterr().out


def test_complex_images_are_not_generated_as_real_ones(invrecon: Callable[..., Any], tmp_path: Path) -> None:
    prior = make_prior(tmp_path / "prior.safetensors", network=NETWORK | {"image_channels": 2})
    args = ["predict", "--config", "generate_ct.yaml", "--output", str(tmp_path / "out"), *QUIET]
    args += [f"--model.prior={prior}", "--model.operator.num_channels=2", "--data.num_images=1"]
    args += [f"--{part}={SIZE}" for part in ("model.operator.size", "data.size")]
    args += ["--model.method.schedule.num_levels=2"]
    refused(invrecon, args, "parts of complex numbers.*complex_images to true.*clip to null")
    refused(invrecon, [*args, "--model.operator.complex_images=true"], "set clip to null")
    invrecon([*args, "--model.operator.complex_images=true", "--model.method.clip", "null"])


def test_a_checkpoint_that_is_none(invrecon: Callable[..., Any], library: Path, tmp_path: Path) -> None:
    args = learn("patch_ct.yaml", library / "scans", tmp_path / "run")
    for name, content in {"pickle": b"\x80\x04K\x01.", "text": b"hello"}.items():
        (tmp_path / name).write_bytes(content)
        refused(invrecon, [*args, f"--ckpt_path={tmp_path / name}"], f"checkpoint '.*{name}' cannot be read")
    refused(invrecon, [*args, f"--ckpt_path={tmp_path / 'none'}"], "no checkpoint|not found")
    refused(invrecon, ["validate", *args[1:]], "no checkpoint .*run/checkpoints/last.ckpt' to validate")


def test_a_network_that_does_not_fit_the_checkpoint(
    invrecon: Callable[..., Any], library: Path, tmp_path: Path
) -> None:
    args = learn("patch_ct.yaml", library / "scans", tmp_path / "run")
    invrecon(args)
    before = (tmp_path / "run" / "prior.safetensors").read_bytes()
    refused(invrecon, [*args, "--model.network.base_channels=16"], "another network.*another --output")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    refused(invrecon, [*args, "--model.network.base_channels=16", f"--ckpt_path={last}"], "another network")
    begun = r"begun with model\.learning_rate = 0\.001, and now.* 0\.01"
    refused(invrecon, [*args, "--model.learning_rate=0.01"], begun)
    assert (tmp_path / "run" / "prior.safetensors").read_bytes() == before
    invrecon([*args, "--model.learning_rate=0.01", f"--ckpt_path={last}"])  # asked for by name


def test_a_full_disk_during_training(
    invrecon: Callable[..., Any], library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, sync = [2], os.fsync  # the first checkpoint and its folder

    def full(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    args = learn("patch_ct.yaml", library / "scans", tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        refused(invrecon, args, r"Cannot write .*last\.ckpt: the disk is full")
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 2
    invrecon(args)
    assert (tmp_path / "run" / "prior.safetensors").exists()


def test_an_output_that_is_a_file(invrecon: Callable[..., Any], library: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    refused(invrecon, reconstruct("predict", "fbp_ct.yaml", library / "scans", tmp_path / "out"), "not a folder")
    assert (tmp_path / "out").read_text() == "mine"


SHELL = {
    "no_such.h5": ("--data.paths=no_such.h5",),
    "model.method is 'FPB'": ("--model.method=FPB",),
    "devices": ("--trainer.devices=0",),  # Lightning's own complaint
}


@pytest.mark.parametrize("word", SHELL)
def test_a_sentence_on_stderr_and_a_status(
    word: str, library: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from invrecon.cli import main_entry

    args = reconstruct("predict", "fbp_ct.yaml", library / "scans", "out", *SHELL[word])
    monkeypatch.setattr("sys.argv", ["invrecon", *args])
    with pytest.raises(SystemExit) as end:
        main_entry()
    assert end.value.code == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("invrecon: "))
    assert word in line
    assert not files_in(here)


def test_no_traceback_in_a_shell(library: Path, tmp_path: Path) -> None:
    weights = f"--model.prior={truncated(make_prior(tmp_path / 'prior.safetensors'))}"
    args = reconstruct("test", "recon_ct.yaml", library / "scans", tmp_path / "out", weights)
    result = process("-m", "invrecon", *args, cwd=tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("invrecon: "))
    assert "prior.safetensors" in line and "truncated" in line


@pytest.mark.parametrize("command", ["test", "predict"])
def test_a_checkpoint_is_no_prior(command: str, library: Path, tmp_path: Path, invrecon: Callable[..., Any]) -> None:
    args = reconstruct(command, "fbp_ct.yaml", library / "scans", tmp_path / "out", "--ckpt_path", "last.ckpt")
    with pytest.raises(InputError, match=r"last\.ckpt' is for `invrecon fit` and `validate`.*--model\.prior"):
        invrecon(args)


@pytest.mark.parametrize("command", ["test", "predict"])
def test_a_seed_that_decides_nothing(command: str, library: Path, tmp_path: Path, invrecon: Callable[..., Any]) -> None:
    args = reconstruct(command, "fbp_ct.yaml", library / "scans" / "a.h5", tmp_path / "out", "--seed_everything=3")
    with pytest.raises(InputError, match=r"seed_everything is 3.*model\.seed, which is 0: give --model\.seed 3"):
        invrecon(args)
    invrecon([*args, "--model.seed=3", "--data.slices=0"])


def test_the_arc_of_a_full_scan_is_no_limited_angle(
    library: Path, tmp_path: Path, invrecon: Callable[..., Any]
) -> None:
    """As a run's own configuration states it, which another operator is laid over."""
    args = reconstruct("test", "fbp_ct.yaml", library / "scans" / "a.h5", tmp_path / "out", "--data.slices=0")
    invrecon(args)
    args[args.index("fbp_ct.yaml")] = str(tmp_path / "out" / "config.yaml")
    with pytest.raises(InputError, match=r"arc of 3\.1416, expected less than pi"):
        invrecon([*args, "--model.operator=LimitedAngleCT", "--output", str(tmp_path / "other")])
