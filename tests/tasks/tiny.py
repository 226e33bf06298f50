"""A training run of seconds: a network of 23 thousand weights on ellipses of 16 x 16 pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from invrecon.data.training import EllipseTraining
from invrecon.priors.edm import NoiseProposal
from invrecon.priors.unet import UNet
from invrecon.tasks.checkpoint import AtomicCheckpointIO, ExportPrior
from invrecon.tasks.score_matching import ScoreMatching


def make_data(**settings: Any) -> EllipseTraining:
    tiny = {"size": 16, "patch_sizes": [8, 4], "probabilities": [0.6, 0.4], "pad": 4, "pixels_per_batch": 512}
    return EllipseTraining(16, **{**tiny, "batches_per_epoch": 5, "validation_batches": 2, **settings})


def make_model(dropout: float = 0.0, **settings: Any) -> ScoreMatching:
    torch.manual_seed(0)
    return ScoreMatching(UNet(base_channels=8, multipliers=(1, 2), dropout=dropout), NoiseProposal(), **settings)


def fit(
    folder: Path,
    model: ScoreMatching,
    data: EllipseTraining,
    max_steps: int = 20,
    *,
    callbacks: tuple[lightning.Callback, ...] = (),
    resume: Path | None = None,
    plugins: tuple[Any, ...] = (),
    every: dict[str, Any] | None = None,
    **settings: Any,
) -> lightning.Trainer:
    """Trains as `invrecon fit` does, without the command line."""
    every = every or {"every_n_epochs": 1, "save_on_train_epoch_end": True}
    standard = [
        ModelCheckpoint(folder / "checkpoints", "last", enable_version_counter=False, **every),
        ExportPrior(str(folder)),
    ]
    quiet = {"devices": 1, "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=max_steps, max_epochs=-1, gradient_clip_val=1.0, log_every_n_steps=1,
        default_root_dir=folder, callbacks=[*callbacks, *standard], plugins=[AtomicCheckpointIO(), *plugins],
        **{**quiet, **settings},
    )  # fmt: skip
    trainer.fit(model, data, ckpt_path=resume)
    return trainer


def checkpoint_of(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def same(a: Any, b: Any) -> bool:
    """Whether two nested structures of tensors and plain values are equal, bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


class Interrupt(lightning.Callback):
    """Raises at the end of a step, as a failing machine would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise ConnectionAbortedError("power cut")
