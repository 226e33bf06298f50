"""Every benchmark runs on tiny data with a random prior, prints its table and writes its JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from benchmarks import (
    _common,
    _machine,
    _step_timer,
    denoiser,
    evaluations,
    memory,
    padis,
    reconstruction,
    training,
)
from benchmarks.claims._verdicts import ratio
from invrecon.errors import InputError
from tests.cli.tiny import SIZE, make_prior, make_volume, slices_of_a_chest

COMMON = ["--size", str(SIZE), "--threads", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data under the names of the real ones, and two priors."""
    folder = tmp_path_factory.mktemp("bench")
    chest = slices_of_a_chest(2 * SIZE)
    coarse = chest.reshape(10, SIZE, 2, SIZE, 2).mean(axis=(2, 4))
    for name in (_common.HELD_OUT, _common.VALIDATION):
        make_volume(folder / name, coarse, voxel_mm=(2.0, 2.0, 3.0))
    make_volume(folder / _common.NATIVE, chest[:2])
    make_prior(folder / "patch.safetensors", kind="patch")
    make_prior(folder / "whole.safetensors", kind="whole")
    return folder


@pytest.fixture(autouse=True)
def data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Points the benchmarks at the tiny data, and gives the number of threads back."""
    monkeypatch.setenv("INVRECON_DATA", str(folder))
    _common.load_batches.cache_clear()
    yield
    torch.set_num_threads(1)


def quality(folder: Path, out: Path, *more: object) -> list[str]:
    options = [*COMMON, "--prior", folder / "patch.safetensors", "--json", out, *more]
    return [str(option) for option in options]


def read(path: Path) -> dict[str, Any]:
    text = path.read_text()
    assert str(path.parents[1]) not in text and str(Path(__file__).parents[2]) not in text, "a path of this machine"
    return json.loads(text)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few iterations and levels."""
    methods = {
        "FBP": reconstruction.FBP(),
        "TV": reconstruction.TotalVariation(num_iterations=25),
        "patch": reconstruction.AnnealedPnPADMM(num_levels=3),
        "whole": reconstruction.AnnealedPnPADMM(num_levels=3),
    }
    monkeypatch.setattr(reconstruction, "METHODS", methods)


def test_reconstruction(folder: Path, tmp_path: Path, fast: None, capsys: pytest.CaptureFixture[str]) -> None:
    out, figure = tmp_path / "r.json", tmp_path / "r.png"
    args = quality(folder, out, "--whole", folder / "whole.safetensors", "--slices", "1:6:2", "--batch-size", 2)
    reconstruction.main([*args, "--only", "20-clean", "20-noisy", "20-native", "--methods", "FBP", "TV", "patch"])
    first = read(out)
    assert len(first["parts"]) == 3 * (3 + 3 + 2)
    assert first["differences"]["20-clean"]["patch - TV"]["num_cases"] == 3
    assert set(first["summaries"]["20-native"]) == {"FBP", "TV", "patch"}
    assert "| 20 views, 1 % noise | patch |" in capsys.readouterr().out

    reconstruction.main([*args, "--only", "20-clean", "--figure", str(figure), "--figure-slice", "5"])
    text, second = capsys.readouterr().out, read(out)
    assert "20 views, whole, slices" in text and "20 views, TV, slices" not in text, "only what is new is computed"
    assert all(second["parts"][key] == part for key, part in first["parts"].items())
    assert figure.stat().st_size > 10_000

    reconstruction.main([*args, "--only", "20-clean", "--methods", "FBP", "--redo"])
    assert "20 views, FBP, slices 1, 3" in capsys.readouterr().out


def test_record_belongs_to_its_settings(folder: Path, tmp_path: Path, fast: None) -> None:
    out = tmp_path / "r.json"
    args = [*quality(folder, out, "--slices", "1", "--methods", "FBP", "--only", "20-clean")]
    reconstruction.main(args)
    record = _common.Record(out, "reconstruction", {})
    (key, part), *_ = record.parts.items()
    assert record.find(key, part["fingerprint"]) is not None
    assert record.find(key, "other settings") is None
    with pytest.raises(InputError, match="no record of the benchmark 'padis'"):
        _common.Record(out, "padis", {})


def test_padis(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "p.json"
    args = quality(folder, out, "--slices", "1,4", "--evaluations", 20, "--timed", 20, "--repeats", 2)
    padis.main(args)
    result = read(out)
    assert result["ratio"]["padis-repo, float32"] > 1
    assert sum(key.startswith("timing/") for key in result["parts"]) == 2
    assert sum("/padis-norm/" in key for key in result["parts"]) == 2
    assert "paired over 2 slices" in capsys.readouterr().out
    padis.main(args)
    assert read(out) == result, "a second run computes nothing"


def test_evaluations(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "e.json"
    args = ["--slices", "1,4", "--evaluations", 2, 4, "--num-samples", 2, "--only", "60-clean"]
    evaluations.main(quality(folder, out, *args))
    results = read(out)["results"]
    assert [name.split(", ")[1] for name in results] == [
        "2 evaluations", "4 evaluations", "32 evaluations", "mean of 2 samples of 32",
    ]  # fmt: skip
    assert results["60-clean, 32 evaluations"]["gain"]["mean"] == 0


def test_denoiser(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "d.json"
    args = ["--threads", "1", "--prior", str(folder / "patch.safetensors"), "--json", str(out), "--repeats", "2"]
    denoiser.main([*args, "--batch-size", "2", "--patch-size", "8", "--variants", "fp32", "bf16, channels_last"])
    rows = {row["variant"]: row for row in read(out)["rows"]}
    assert rows["fp32"]["relative_error"] == 0 and 0 < rows["bf16, channels_last"]["relative_error"] < 0.1
    assert rows["fp32"]["patches_per_second"] > 0


def test_denoiser_leaves_out_what_does_not_work(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_(*args: object) -> None:
        raise RuntimeError(f"no compiler in {tmp_path}/bin: install one")

    monkeypatch.setattr(torch, "compile", lambda network: compile_)
    out = tmp_path / "d.json"
    args = ["--threads", "1", "--json", str(out), "--batch-size", "1", "--patch-size", "8", "--repeats", "1"]
    denoiser.main([*args, "--prior", str(folder / "patch.safetensors"), "--variants", "fp32", "fp32, compiled"])
    assert read(out)["left_out"] == {"fp32, compiled": "RuntimeError: no compiler in bin: install one"}


def test_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_step_timer, "SHAPES", {training.PLAIN: (16, 16)})
    config, out = tmp_path / "tiny.yaml", tmp_path / "t.json"
    config.write_text(
        "model: {class_path: ScoreMatching, init_args: {network: {class_path: UNet, init_args: {base_channels: 8, "
        "multipliers: [1, 2]}}, proposal: {class_path: NoiseProposal}}}\n"
        "data: {class_path: EllipseTraining, init_args: {size: 32, patch_sizes: [16, 8], probabilities: [0.5, 0.5], "
        "pad: 4, pixels_per_batch: 512}}\n"
        "trainer: {max_epochs: -1, precision: 32-true, log_every_n_steps: 2}\n"
    )
    training.main(["--config", str(config), "--steps", "12", "--threads", "1", "--json", str(out)])
    result = read(out)
    assert [size["patch_size"] for size in result["sizes"]] == [16, 8]
    assert [size["patches"] for size in result["sizes"]] == [2, 8]
    assert result["overall"]["share"] > 0
    assert result["overall"]["num_steps"] == 8  # without the warm-up and the last, whose end is not seen


def test_operations_of_a_step_are_counted() -> None:
    layer, timer = torch.nn.Conv2d(3, 5, 3, padding=1), _step_timer.StepTimer()
    layer.register_forward_hook(timer._counter(3))
    layer(torch.zeros(2, 3, 4, 4))
    assert timer._operations == 3 * 2 * (2 * 5 * 4 * 4) * (3 * 9)


def test_memory(tmp_path: Path) -> None:
    out = tmp_path / "m.json"
    memory.main([*COMMON, "--methods", "FBP", "--counts", "2", "--repeats", "1", "--json", str(out)])
    result = read(out)
    assert 100 < result["rows"][0]["peak_mb"] < 2000 and result["passed"]


def test_memory_notices_growth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "peak_memory", lambda arguments, threads: (500.0 + 10 * int(arguments[-1][2:]), 1.0))
    with pytest.raises(SystemExit):
        memory.main([*COMMON, "--methods", "FBP", "--counts", "2", "4", "--json", str(tmp_path / "m.json")])
    assert read(tmp_path / "m.json")["passed"] is False


def test_missing_data_and_prior_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        _common.run(lambda: reconstruction.main(["--prior", "nowhere"]))
    assert "There is no prior 'nowhere'" in capsys.readouterr().err
    monkeypatch.setenv("INVRECON_DATA", str(tmp_path))
    with pytest.raises(SystemExit):
        _common.run(lambda: reconstruction.main(["--methods", "FBP"]))
    assert "name its folder by INVRECON_DATA" in capsys.readouterr().err


def test_contestants_take_turns() -> None:
    order: list[str] = []
    seconds = _common.interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=2)
    assert order == ["a", "b", "a", "b", "a", "b"] and [len(values) for values in seconds.values()] == [2, 2]


def test_the_native_file_gets_its_voxel_size(folder: Path) -> None:
    (batch,) = _common.load_batches(_common.NATIVE, None, SIZE, 4)
    assert list(batch.voxel_mm) == [_common.NATIVE_VOXEL_MM] * 2
    with h5py.File(folder / _common.NATIVE) as file:
        assert np.asarray(file["data"]).shape[-1] == 2 * SIZE


def test_rows_outlive_the_machine_and_their_times_do_not_mix(folder: Path) -> None:
    setting, source = _common.SETTINGS["20-clean"], str(folder / _common.HELD_OUT)
    benches = [
        _common.Bench(_common.Record(None, "x", {"processor": name, "threads": threads}), SIZE, precision)
        for name, threads, precision in (("A", 1, "32"), ("B", 8, "bf16"))
    ]
    prior = str(folder / "patch.safetensors")
    identities = {bench.identity(setting, reconstruction.ProximalDiffusion(), prior, source) for bench in benches}
    assert len(identities) == 1
    rows: list[Any] = [{"machine": "A", "precision": "bf16", "seconds": s} for s in (1.0, 2.0, 3.0)]
    rows += [{"machine": "B", "precision": "32", "seconds": 100.0}]
    assert _common.median_seconds(rows) == 2.0
    assert _machine.describe_machines(rows) == "A (bfloat16); B (float32)"
    own = [{"case": "c", "slice": n, "patient": "p", **row} for n, row in enumerate(rows)]
    cost = ratio(own, [{**row, "machine": "A", "seconds": 0.5} for row in own])
    assert cost is not None and cost["num_cases"] == 3 and cost["mean"] == pytest.approx(4.0)


def test_a_machine_is_described_with_what_decides_its_speed() -> None:
    facts = _machine.machine(1)
    capability = torch.backends.cpu.get_cpu_capability()
    assert re.search(rf" \({capability}(, bfloat16)?\), 1 thread, torch ", _machine.describe_machine(facts))
    gpu = {"processor": "NVIDIA H200", "threads": 1, "torch": "2", "python": "3", "device": "cuda"}
    assert _machine.describe_machine(gpu).startswith("NVIDIA H200, torch ")
    assert _common.Record(None, "x", facts).device.type == "cpu"
    assert _common.Record(None, "x", gpu).device.type == "cuda"


def test_a_gpu_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _machine.choose_device("auto") == _machine.choose_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="torch finds no GPU"):
        reconstruction.main(["--methods", "FBP", "--device", "cuda"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _machine.choose_device("auto") == _machine.choose_device("cuda") == torch.device("cuda")


def test_records_of_processes_that_ran_at_once_make_one(tmp_path: Path) -> None:
    for name, parts in {"a": {"1": {"x": 1}, "2": {"x": 2}}, "b": {"2": {"x": 3}, "3": {"x": 4}}}.items():
        _common.Record(tmp_path / f"{name}.json", "x", {}).add(parts, name)
    record = _common.Record(tmp_path / "a.json", "x", {}, redo=True)
    record.merge([tmp_path / "b.json"])
    assert record.find("1", "a") is None, "to be computed again"
    assert record.find("2", "a") is None and record.find("2", "b") == {"x": 3, "fingerprint": "b"}
    assert record.find("3", "b") is not None and record.find("3", "a") is None
    (tmp_path / "c.json").write_text("[]")
    for other in ("c.json", "nowhere.json"):
        with pytest.raises(InputError, match=f"{other}' is no record of the benchmark 'x'"):
            record.merge([tmp_path / other])
