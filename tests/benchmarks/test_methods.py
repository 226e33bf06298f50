"""Methods are found by themselves and shortened; the clock of the network agrees with what it is hung on."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import invrecon.methods
from benchmarks import _common, _methods, methods
from benchmarks._common import make_layout
from invrecon.errors import InputError
from invrecon.methods import DDS, FBP, Method, NoisyEstimateStart, PaDISRepo, PnPDM, ProximalDiffusion
from invrecon.priors.layouts import RandomShift
from tests.cli.tiny import SIZE, make_prior, make_volume, slices_of_a_chest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data under the name of the real ones, and a prior."""
    folder = tmp_path_factory.mktemp("methods")
    make_volume(folder / _common.HELD_OUT, slices_of_a_chest(SIZE))
    make_prior(folder / "patch.safetensors", kind="patch")
    make_prior(folder / "whole.safetensors", kind="whole")
    return folder


def test_a_new_method_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Newest(DDS):
        """A method of tomorrow."""

    monkeypatch.setattr(invrecon.methods, "Newest", Newest, raising=False)
    monkeypatch.setattr(invrecon.methods, "__all__", [*invrecon.methods.__all__, "Newest"])
    found = _methods.find_methods()
    assert found["Newest"] is Newest and found["FBP"] is FBP
    assert not {"Method", "Sampler", "PaDIS", "UnconditionalSampler"} & found.keys()


@pytest.mark.parametrize("name", [name for name, kind in _methods.find_methods().items() if kind.needs_prior])
def test_methods_are_shortened_to_a_number_of_evaluations(name: str) -> None:
    kind = _methods.find_methods()[name]
    full, short = kind(), _methods.shorten(kind, 20)
    assert isinstance(short, Method) and type(short) is kind
    assert min(full.num_evaluations, 15) <= short.num_evaluations <= 20
    if hasattr(full, "schedule"):
        assert short.schedule.sigma_max == full.schedule.sigma_max
        assert min(short.schedule.sigmas) == pytest.approx(min(full.schedule.sigmas))
    assert _common.plain(_methods.shorten(kind, 10**6)) == _common.plain(full)


def test_warm_starts() -> None:
    method = _methods.shorten(PnPDM, 50)
    assert _methods.starts_from_noise(method) and not _methods.starts_from_noise(PaDISRepo())
    assert not _methods.starts_from_noise(ProximalDiffusion()) and not _methods.starts_from_noise(FBP())
    started = _methods.warm(method, 0.1)
    assert isinstance(started.start, NoisyEstimateStart) and started.schedule.sigmas[0] == pytest.approx(0.1)
    assert started.schedule.sigmas[-1] == pytest.approx(method.schedule.sigma_min)
    assert method.schedule.sigmas[0] == 10.0, "the method itself is left alone"


class Slow(nn.Module):
    """A network that takes its time, forward and backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        x = 2 * x
        if x.requires_grad:
            x.register_hook(lambda gradient: time.sleep(0.05))
        return 3 * x


def test_the_clock_of_a_network_sees_both_passes() -> None:
    network = Slow()
    clock = methods.NetworkClock(network)
    time.sleep(0.03)
    network(torch.ones(2))
    assert clock.seconds > 0.019
    forward = clock.seconds
    x = torch.ones(2, requires_grad=True)
    y = network(x)
    time.sleep(0.03)  # between the passes: outside
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.tolist() == [6.0, 6.0]
    assert clock.seconds > forward + 0.069
    clock.remove()
    before = clock.seconds
    network(torch.ones(2))
    assert clock.seconds == before


def test_a_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("INVRECON_DATA", str(folder))
    _common.load_batches.cache_clear()
    out = tmp_path / "m.json"
    args = ["--prior", str(folder / "patch.safetensors"), "--slices", "3", "--size", str(SIZE), "--threads", "1"]
    options = ["--repeats", "2", "--evaluations", "2", "--json", str(out)]
    methods.main([*args, *options, "--methods", "DDS", "DDRM", "DPS", "PnPADMM"])
    result = json.loads(out.read_text())
    rows = {row["method"]: row for row in result["rows"]}
    assert rows.keys() == {"DDS", "DDRM", "DPS", "PnPADMM"} and result["left_out"] == {}
    assert rows["DDS"]["problem"] == "20 views" and rows["DDRM"]["problem"].startswith("Deblurring")
    assert rows["DPS"]["gradient"] and not rows["DDS"]["gradient"] and rows["DDS"]["evaluations"] == 2
    for row in rows.values():
        assert 0 < row["network_seconds_per_evaluation"] < row["seconds_per_evaluation"]
        assert 0 < row["outside"] < 1 and row["passed"] == (row["outside"] < 0.1)
    assert [row["outside"] for row in result["rows"]] == sorted((r["outside"] for r in rows.values()), reverse=True)
    assert "| DPS | 20 views | 2 | yes |" in capsys.readouterr().out
    with pytest.raises(InputError, match="There is no method XYZ, expected some of"):
        methods.main([*args, "--methods", "XYZ"])


def test_a_layout_by_its_name() -> None:
    layout = make_layout({"class": "RandomShift", "num_shifts": 2})
    assert isinstance(layout, RandomShift) and layout.num_shifts == 2 and make_layout(None) is None


def teardown_module() -> None:
    torch.set_num_threads(1)
