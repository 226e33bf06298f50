from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from tests.data.kspace import COILS, H, N, W


@pytest.fixture
def write_h5(tmp_path: Path) -> Callable[..., Path]:
    """Writes an HDF5 volume of given or random HU."""

    def write(
        name: str = "scan.h5",
        values: np.ndarray | None = None,
        *,
        shape: tuple[int, ...] = (5, 8, 8),
        dataset: str = "data",
        **attrs: object,
    ) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if values is None:
            values = np.random.default_rng(0).integers(-1000, 1000, shape).astype(np.int16)
        with h5py.File(path, "w") as file:
            file.create_dataset(dataset, data=values)
            file.attrs.update(attrs)
        return path

    return write


@pytest.fixture
def kspace() -> torch.Tensor:
    return torch.randn(N, COILS, H, W, 2)
