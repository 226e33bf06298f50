"""Small networks for the tables that compare trainings: each is taught once, by what `invrecon fit` is made of."""

from __future__ import annotations

import argparse
import fcntl
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from benchmarks import _common
from benchmarks._common import VALIDATION
from invrecon.data.training import CTTraining
from invrecon.precision import training_precision
from invrecon.priors.edm import NoiseProposal
from invrecon.priors.unet import UNet
from invrecon.report.provenance import fingerprint
from invrecon.rng import make_generator
from invrecon.tasks.checkpoint import AtomicCheckpointIO, ExportPrior
from invrecon.tasks.score_matching import ScoreMatching

TRAINING = (
    "ct/train/COVIDNYSBU-axial.h5",
    "ct/train/CRLM-CT-1006.h5",
    "ct/train/LIDC-IDRI-0314.h5",
    VALIDATION,
    "ct/train/NSCLC-R01-001.h5",
    "ct/train/TCGA-100.h5",
    "ct/train/pyrad-lung1.h5",
)
# As `patch_ct.yaml` has them: each slice at three scales, most of them with another couch.
ZOOMS, COUCHES = (1.0, 0.85, 0.7), 0.8
# Patch sizes that are learned beside the largest, and how often (Hu et al., PaDIS, NeurIPS 2024, as reproduced).
SIZES = {
    8: ((8,), (1.0,)),
    16: ((16, 8), (0.7, 0.3)),
    32: ((32, 16, 8), (0.5, 0.3, 0.2)),
    56: ((56, 32, 16), (0.5, 0.3, 0.2)),
    96: ((96, 64, 32), (0.5, 0.3, 0.2)),
}
CHECKPOINTS = 5  # a training
TALKATIVE = ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed")


@dataclass(frozen=True)
class Lesson:
    """What a small network is taught.

    Attributes:
        patch_size: Largest patch, a key of `SIZES`; None for whole images.
        num_slices: Training slices, the first of a fixed order, so that smaller sets are part of larger ones; None for
            all.
        positions: Whether the network sees positions.
    """

    patch_size: int | None = 56
    num_slices: int | None = None
    positions: bool = True


@dataclass(frozen=True)
class School:
    """What all lessons share.

    Attributes:
        size: Side of the images.
        num_pixels: Pixels that every network sees in training, to 1 %.
        pixels_per_batch: Pixels a step, about.
        base_channels: Width of the networks.
        folder: Where they are kept, each in a folder named by its fingerprint.
        machine: Where they are taught; another one rounds otherwise, which is one more training of the same lesson.
    """

    size: int
    num_pixels: int
    pixels_per_batch: int
    base_channels: int
    folder: Path
    machine: Mapping[str, Any]

    @classmethod
    def of(cls, options: argparse.Namespace, machine: Mapping[str, Any]) -> School:
        """Returns the school of the command line's options."""
        pixels = options.training_pixels
        return cls(options.size, options.training_steps * pixels, pixels, options.channels, options.folder, machine)

    def identity(self, lesson: Lesson) -> str:
        """Returns the fingerprint of all that decides a network."""
        own = {key: value for key, value in asdict(self).items() if key not in ("folder", "machine")}
        settings = {**own, "lesson": asdict(lesson), "zooms": ZOOMS, "couches": COUCHES, "sizes": self.sizes(lesson)}
        return fingerprint(settings, None, training_hashes())

    def path(self, lesson: Lesson) -> Path:
        """Returns where the network is, or will be."""
        return self.folder / self.identity(lesson)[:16] / "prior.safetensors"

    def sizes(self, lesson: Lesson) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Returns patch sizes and probabilities."""
        return ((self.size,), (1.0,)) if lesson.patch_size is None else SIZES[lesson.patch_size]

    def data(self, lesson: Lesson) -> FewSlices:
        """Returns the training data of a lesson."""
        sizes, probabilities = self.sizes(lesson)
        side = lesson.patch_size
        pad = 0 if side is None else (1 + self.size // side) * side - self.size  # as far as shifted grids reach
        data = FewSlices(
            [str(_common.data_file(name)) for name in TRAINING],
            validation=[Path(VALIDATION).name],
            size=self.size,
            patch_sizes=list(sizes),
            probabilities=list(probabilities),
            pad=pad,
            pixels_per_batch=self.pixels_per_batch,
            batches_per_epoch=max(1, self.num_steps(lesson) // CHECKPOINTS),
            zooms=list(ZOOMS),
            couches=COUCHES,
        )
        data.num_slices = lesson.num_slices
        return data

    def num_steps(self, lesson: Lesson) -> int:
        """Returns the steps in which a network sees as many pixels as every other."""
        sizes, probabilities = self.sizes(lesson)
        counts = [max(1, round(self.pixels_per_batch / side**2)) * side**2 for side in sizes]
        return max(1, round(self.num_pixels / sum(p * n for p, n in zip(probabilities, counts, strict=True))))

    def teach(self, lesson: Lesson) -> Path:
        """Returns the prior file of a lesson, after training it if it is not there; goes on where that was stopped."""
        path = self.path(lesson)
        if not path.is_file():
            with alone(path.parent):
                if not path.is_file():  # another process may just have taught it
                    self._train(lesson, path)
        return path

    def _train(self, lesson: Lesson, path: Path) -> None:
        checkpoints = path.parent / "checkpoints"
        _common.progress(f"training {lesson}: {self.num_steps(lesson)} steps")
        torch.manual_seed(0)
        network = UNet(base_channels=self.base_channels, multipliers=(1, 2, 4))
        model = ScoreMatching(network if lesson.positions else blind(network), NoiseProposal())
        last = checkpoints / "last.ckpt"
        with quiet():
            trainer = lightning.Trainer(
                accelerator="gpu" if self.machine.get("device") == "cuda" else "cpu",
                devices=1,
                precision=training_precision(self.machine.get("device", "cpu")),
                max_steps=self.num_steps(lesson),
                max_epochs=-1,
                gradient_clip_val=1.0,
                limit_val_batches=0,
                num_sanity_val_steps=0,
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
                default_root_dir=str(path.parent),
                plugins=[AtomicCheckpointIO()],
                callbacks=[
                    ModelCheckpoint(
                        checkpoints,
                        "last",
                        every_n_epochs=1,
                        save_on_train_epoch_end=True,
                        enable_version_counter=False,
                    ),
                    ExportPrior(str(path.parent), f"python -m benchmarks.claims: {lesson}"),
                ],
            )
            trainer.fit(model, datamodule=self.data(lesson), ckpt_path=str(last) if last.is_file() else None)


class FewSlices(CTTraining):
    """CT slices of which only the first `num_slices` of a fixed random order are trained on; all if None."""

    num_slices: int | None = None

    def load(self) -> tuple[Tensor, Tensor, Any]:
        """Reads all volumes and keeps the chosen slices, each at every scale."""
        images, validation, encode = super().load()
        if self.num_slices is not None:
            scales = len(self.zooms)
            total = len(images) // scales
            chosen = torch.randperm(total, generator=make_generator(0, "slices"))[: self.num_slices]
            images = images[torch.cat([chosen + scale * total for scale in range(scales)])]
        return images, validation, encode


def blind(network: UNet) -> UNet:
    """Returns a network that sees no positions: their weights are zero, and with a gradient of zero they stay so."""
    channels = network.config["image_channels"]
    weight = network.stem.weight
    with torch.no_grad():
        weight[:, channels:] = 0

    def mask(gradient: Tensor) -> Tensor:
        return torch.cat([gradient[:, :channels], torch.zeros_like(gradient[:, channels:])], dim=1)

    weight.register_hook(mask)
    return network


@cache
def training_hashes() -> tuple[str, ...]:
    """Returns the hashes of the training data."""
    return tuple(_common.file_hash(_common.data_file(name)) for name in TRAINING)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Waits until no other process is at work in a folder; the system lets go of one that was killed."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps Lightning from saying what it has found."""
    loggers = [logging.getLogger(name) for name in TALKATIVE]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
