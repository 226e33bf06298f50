"""Nothing of a reference reaches a reconstruction: a measurement file of the same sinograms gives the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from invrecon.data.measurement import write_measurement
from invrecon.tasks.reconstruction import Reconstruction
from tests.cli.tiny import read, reconstruct

METHODS = {
    "fbp_ct": (),
    "tv_ct": ("--model.method.num_iterations=25",),
    "recon_ct": ("--model.prior={}/patch.safetensors", "--model.method.num_levels=3", "--model.method.num_samples=2"),
    "padis_ct": ("--model.prior={}/whole.safetensors", "--model.method.num_levels=2", "--model.method.num_inner=2"),
}
NOISE = ("NoNoise", "RelativeGaussianNoise", "TransmissionPoisson")
PAIRS = [("padis_ct", "NoNoise"), *((c, n) for c in ("fbp_ct", "tv_ct", "recon_ct") for n in NOISE)]


@pytest.mark.parametrize(("config", "noise"), PAIRS)
def test_a_measurement_file_gives_the_same_bits(
    config: str,
    noise: str,
    invrecon: Callable[..., Any],
    library: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured, measure = [], Reconstruction.measure

    def spy(self: Reconstruction, batch: Any) -> Any:
        measured.append(measure(self, batch))
        return measured[-1]

    more = [option.format(library) for option in METHODS[config]] + ["--model.num_figures=0"]
    with monkeypatch.context() as patch:
        patch.setattr(Reconstruction, "measure", spy)
        data, out = library / "scans" / "a.h5", tmp_path / "known"
        invrecon(reconstruct("predict", f"{config}.yaml", data, out, f"--model.noise={noise}", *more))

    ((y, operator, _),) = measured
    std = operator.noise_std
    noise_std = None if std is None else std if std.ndim == 1 else std[:, 0]
    path = tmp_path / "a.h5"  # the name seeds the draws
    write_measurement(path, y[:, 0], operator.geometry, noise_std=noise_std)
    invrecon(reconstruct("predict", f"{config}.yaml", path, tmp_path / "unknown", *more))
    known, unknown = (read(tmp_path / name / "a.h5") for name in ("known", "unknown"))
    assert (known == unknown).all()


@pytest.mark.parametrize("config", ["recon_ct", "tv_ct"])
def test_another_reference_changes_nothing_but_the_metrics(
    config: str, invrecon: Callable[..., Any], library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same measurement, but every reference that the task could look at is noise."""
    measure = Reconstruction.measure

    def swap(self: Reconstruction, batch: Any) -> Any:
        y, operator, reference = measure(self, batch)
        batch.reference.copy_(torch.rand_like(batch.reference))
        return y, operator, torch.rand_like(reference)

    more = [option.format(library) for option in METHODS[config]] + ["--model.num_figures=0"]
    for name in ("true", "noise"):
        if name == "noise":
            monkeypatch.setattr(Reconstruction, "measure", swap)
        invrecon(reconstruct("predict", f"{config}.yaml", library / "scans" / "a.h5", tmp_path / name, *more))
    assert (read(tmp_path / "true" / "a.h5") == read(tmp_path / "noise" / "a.h5")).all()
    true, noise = ((tmp_path / name / "metrics.csv").read_text() for name in ("true", "noise"))
    assert true != noise
