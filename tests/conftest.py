"""What every test gets: one thread, fixed seeds, deterministic property tests, a folder of research data."""

from __future__ import annotations

import gc
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]

torch.set_num_threads(1)
settings.register_profile(
    "invrecon",
    max_examples=15,
    deadline=None,  # a busy machine is no failure
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("invrecon")

# Modules of few and long tests go first, so that no process is left with one at the end while the other is idle.
LONG = [
    "benchmarks/test_claims",
    "cli/test_ranks",
    "tasks/test_resume",
    "test_extending",
    "benchmarks/test_benchmarks",
    "cli/test_bad_input",
    "benchmarks/test_mri_benchmark",
    "tasks/test_training",
    "test_skeleton",
    "test_allocator",
    "cli/test_memory",
    "cli/test_tune",
    "benchmarks/test_rgb_benchmark",
    "benchmarks/test_dip_benchmark",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the long modules first, in their order."""
    order = {Path(__file__).parent / f"{name}.py": i for i, name in enumerate(LONG)}
    assert all(path.is_file() for path in order), "conftest.py names a module that is not there"
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_collection_finish() -> None:
    """Leaves what has been imported by now out of every garbage collection: a tenth of the time of a command."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Every test starts from the same global random state, whatever ran before it in its process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def research_data() -> Path:
    """The folder of larger data sets that INVRECON_DATA names; tests that need it are skipped without one."""
    folder = os.environ.get("INVRECON_DATA", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("INVRECON_DATA does not name a folder")
    return Path(folder)
