"""Tiny data, tiny priors, and the command line called in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cli.tiny import SIZE, make_photos, make_prior, make_rgb_prior, make_volume, slices_of_a_chest


@pytest.fixture(scope="session")
def chest() -> np.ndarray:
    """Real slices `(10, 64, 64)` in HU."""
    return slices_of_a_chest(2 * SIZE)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory, chest: np.ndarray) -> Path:
    """A folder that every test may read: volumes of three patients, longer and finer ones, photos, and three priors."""
    folder = tmp_path_factory.mktemp("library")
    coarse = slices_of_a_chest(SIZE)
    for name, chosen in {"a": slice(0, 4), "b": slice(4, 7), "c": slice(7, 10)}.items():
        voxel_mm = (10.0, 10.0, 5.0)
        make_volume(folder / "scans" / f"{name}.h5", coarse[chosen], patient=f"patient-{name}", voxel_mm=voxel_mm)
    make_volume(folder / "ten.h5", coarse)
    make_volume(folder / "fine.h5", chest[:2], voxel_mm=(5.0, 5.0, 5.0))
    make_prior(folder / "patch.safetensors", "patch")
    make_prior(folder / "whole.safetensors", "whole")
    make_photos(folder / "photos")
    make_rgb_prior(folder / "rgb.safetensors")
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def invrecon(here: Path) -> Callable[..., Any]:
    """Calls the command line in this process, from an empty working directory."""
    from invrecon.cli import main

    return main
