"""Metrics of volumes of complex images: a file's own target is for coils as they were, not for whitened ones."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from invrecon.data.fastmri_files import read_target, write_fastmri
from invrecon.data.mri import MRIData
from invrecon.metrics.mri import magnitude
from invrecon.operators.coils import LowResolutionMaps
from invrecon.report.complex import volume_rows
from invrecon.report.store import PredictionStore

SIZE, COILS = 16, 3


@pytest.mark.parametrize("states_max", [True, False])
@pytest.mark.parametrize("covariance", [True, False])
@pytest.mark.parametrize("whitened", [True, False])
def test_a_stored_target_is_not_for_whitened_coils(
    whitened: bool, covariance: bool, states_max: bool, tmp_path: Path
) -> None:
    path = tmp_path / "a.h5"
    write_fastmri(path, torch.randn(2, COILS, SIZE, SIZE, 2, generator=torch.Generator().manual_seed(0)))
    with h5py.File(path, "r+") as file:
        if covariance:
            file["noise_covariance"] = np.diag([1.0, 2.0, 30.0])
        if not states_max:
            del file.attrs["max"]
    data = MRIData(str(path), maps=LowResolutionMaps(), prewhiten=whitened)
    store = PredictionStore(tmp_path / "out", provenance={})
    for batch in data.test_dataloader():
        image = magnitude(batch.reference)[0] * batch.scale[0]
        row = {"case": "a", "slice": batch.index[0]} | ({"max": batch.maximum[0]} if any(batch.maximum) else {})
        arrays = {"mean": image + 0.01, "std": None, "reference": image}
        store.save(batch.id[0], "run", arrays, row, source=str(path), voxel_mm=None)
    (row,) = volume_rows(store, {})
    assert row["nmse"] > 0
    # Without `max` a case does not tell whether its coils were mixed: then no target is better than another's.
    assert ("nmse_stored" in row) == (not covariance or (states_max and not whitened))


def test_a_target_is_read_unless_coils_were_mixed(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write_fastmri(path, torch.randn(2, COILS, SIZE, SIZE, 2))
    assert read_target(path, [1], None) is None
    found = read_target(path, [1], 2.0)
    assert found is not None and found.shape == (1, SIZE, SIZE)
    assert read_target(tmp_path / "none.h5", [1], 2.0) is None
