"""The benchmark of the NUFFT runs without its oracles, and its direct transform is the one that operators compute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import nufft


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(operator: object) -> None:
        raise ImportError("No module named 'finufft'")

    monkeypatch.setattr(nufft, "CONTESTANTS", {nufft.OURS: nufft.ours, "finufft": missing})
    out = tmp_path / "n.json"
    args = ["--size", "16", "--coils", "1", "3", "--repeats", "2", "--threads", "1", "--json", str(out)]
    nufft.main([*args, "--trajectories", "radial"])
    result = json.loads(out.read_text())
    assert [(row["num_coils"], row["direction"]) for row in result["rows"]] == [
        (1, "forward"), (1, "adjoint"), (3, "forward"), (3, "adjoint"),
    ]  # fmt: skip
    assert all(row["relative_error"] < 1e-5 and row["ratio"] == 1 for row in result["rows"])
    assert list(result["left_out"]) == ["finufft"] and "left out" in capsys.readouterr().out


@pytest.mark.parametrize("num_coils", [1, 3])
def test_the_oracle_computes_the_same(num_coils: int) -> None:
    pytest.importorskip("pytorch_finufft")
    maps = None if num_coils == 1 else nufft.simulated_maps(num_coils, (12, 12), torch.Generator().manual_seed(0))
    operator = nufft.SpiralMRI(12, 2, 60, 3.0, maps=maps)
    x, y = (torch.randn(1, *shape) for shape in (operator.image_shape, operator.measurement_shape))
    for own, other in zip(nufft.ours(operator), nufft.finufft(operator, eps=1e-6)):
        z = x if own is operator else y
        assert (own(z) - other(z)).norm() < 1e-4 * own(z).norm()
