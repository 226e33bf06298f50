"""The progress of a training run: its bar is of an epoch, and says what is left of the whole run besides."""

from __future__ import annotations

import math
import time
from typing import Any

import lightning
from lightning.pytorch.callbacks import RichProgressBar


class RunProgress(RichProgressBar):
    """Lightning's bar, with the time that is left until the last step (`left`, hours and minutes)."""

    _mark: tuple[float, int] | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Starts the clock of the run."""
        super().on_train_start(trainer, pl_module)
        self._mark = (time.monotonic(), trainer.global_step)

    def get_metrics(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> Any:
        """Returns what stands beside the bar."""
        metrics = super().get_metrics(trainer, pl_module)
        if self._mark is not None:
            began, first = self._mark
            left = time_left(trainer.global_step - first, time.monotonic() - began, self._total(trainer) - first)
            metrics |= {} if left is None else {"left": left}
        return metrics

    @staticmethod
    def _total(trainer: lightning.Trainer) -> float:
        return trainer.max_steps if trainer.max_steps > 0 else trainer.estimated_stepping_batches


def time_left(done: int, seconds: float, total: float) -> str | None:
    """Returns how long the rest takes if it goes on like this, as `3 h 05 min`; None while nobody knows.

    Args:
        done: Steps so far.
        seconds: Their time.
        total: Steps in all; Inf if there is no last one.
    """
    if done < 1 or not math.isfinite(total):
        return None
    minutes = math.ceil(max(0.0, total - done) * seconds / done / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
