"""A training run goes on as it was begun: with the same model, the same data and the same start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch

from invrecon.data.training import PriorTraining
from invrecon.errors import InputError

LEARNED = ("data: files to learn from", "data: images to learn from")


class SameRun(lightning.Callback):
    """Lets a run go on only with the model and the data that it began with: its prior's card speaks of them.

    Args:
        settings: Model and data, by dotted keys.
        start: The checkpoint that was asked for by name, with which other settings are no mistake.
    """

    def __init__(self, settings: dict[str, Any], start: str | None = None) -> None:
        self.settings, self.start = settings, start

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Adds what is learned from, which is known by now."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, PriorTraining):
            self.settings = {**self.settings, **dict(zip(LEARNED, (data.train_names, data.num_images), strict=True))}

    def state_dict(self) -> dict[str, Any]:
        """Keeps the settings in the checkpoint."""
        return {"settings": self.settings, "start": self.start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compares them.

        Raises:
            InputError: If any differs.
        """
        old = state_dict["settings"]
        for key in sorted(old.keys() | self.settings.keys()):
            unknown = key in LEARNED and key not in old  # of an earlier version
            if self.start is None and not unknown and old.get(key) != self.settings.get(key):
                raise InputError(
                    f"This run was begun with {key.replace('init_args.', '')} = {old.get(key)}, and now it is "
                    f"{self.settings.get(key)}: give another --output, or, to go on from its weights with new "
                    "settings, its checkpoint as --ckpt_path."
                )


def began_from(checkpoint: Path) -> str | None:
    """Returns the checkpoint that the run of this one was asked to begin with, if any."""
    try:
        callbacks = torch.load(checkpoint, map_location="cpu", weights_only=True)["callbacks"]
        return next((state.get("start") for name, state in callbacks.items() if name.startswith("SameRun")), None)
    except Exception:  # damaged: whoever resumes from it will say so
        return None


def what_decides(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings that decide what is learned, by dotted keys: not how it is stored in the end."""
    found = _flatten({key: settings[key] for key in ("model", "data")})
    return {key: value for key, value in found.items() if not key.endswith(".half_weights")}


def _flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Returns a nested dictionary as one of dotted keys."""
    if not isinstance(config, dict):
        return {prefix[:-1]: config}
    return {k: v for key, value in config.items() for k, v in _flatten(value, f"{prefix}{key}.").items()}
