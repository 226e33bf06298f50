"""The memory of `predict` does not grow with the number of slices."""

from __future__ import annotations

import tracemalloc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from invrecon.methods import FBP
from tests.cli.tiny import make_volume, reconstruct, slices_of_a_chest

SIDE = 256


@pytest.fixture
def peaks(invrecon: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[int, tuple[int, int]]:
    """By the number of slices: images alive at once, and the peak of NumPy's and Python's memory in bytes."""
    alive: list[weakref.ref[Any]] = []
    counts: list[int] = []
    method = FBP.__call__

    def watched(self: FBP, *args: Any, **kwargs: Any) -> Any:
        estimate = method(self, *args, **kwargs)
        alive.append(weakref.ref(estimate.mean))
        counts.append(sum(reference() is not None for reference in alive))
        return estimate

    monkeypatch.setattr(FBP, "__call__", watched)
    slices, measured = slices_of_a_chest(SIDE), {}
    for num in (2, 4, 20):
        make_volume(tmp_path / f"{num}.h5", np.resize(slices, (num, SIDE, SIDE)).astype(np.int16))
        more = (f"--data.size={SIDE}", f"--model.operator.size={SIDE}", "--data.batch_size=2", "--model.num_figures=0")
        args = reconstruct("predict", "fbp_ct.yaml", tmp_path / f"{num}.h5", tmp_path / f"out{num}", *more)
        counts.clear()
        if num == 2:  # the first run imports and caches
            invrecon(args)
            continue
        tracemalloc.start()
        invrecon(args)
        measured[num] = (max(counts), tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(counts) == num // 2
    return measured


def test_memory_does_not_grow_with_the_number_of_slices(peaks: dict[int, tuple[int, int]]) -> None:
    assert peaks[20][0] == peaks[4][0] <= 3
    kept = 16 * SIDE * SIDE * 4  # what 16 more slices would take
    assert peaks[20][1] - peaks[4][1] < kept / 4
