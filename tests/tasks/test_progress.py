"""What is left of a training run."""

from __future__ import annotations

import math

import pytest

from invrecon.tasks.progress import time_left


@pytest.mark.parametrize(
    ("done", "seconds", "total", "left"),
    [
        (0, 5.0, 100, None),
        (10, 5.0, math.inf, None),
        (50, 60.0, 100, "1 min"),
        (50, 61.0, 100, "2 min"),
        (100, 600.0, 1000, "1 h 30 min"),
        (1, 1800.0, 11, "5 h 00 min"),
        (120, 60.0, 100, "0 min"),
    ],
)
def test_the_rest_takes_as_long_as_what_was_done(done: int, seconds: float, total: float, left: str | None) -> None:
    assert time_left(done, seconds, total) == left
