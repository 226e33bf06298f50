"""What a training run shows in TensorBoard beside its losses: pictures, and the quality that counts in the end."""

from __future__ import annotations

import time
from typing import Any

import lightning
import torch
from torch import Tensor

from invrecon.methods.sampling import ProximalDiffusion, sample_prior
from invrecon.methods.schedule import KarrasSchedule
from invrecon.methods.transitions import DDIM
from invrecon.metrics.image import psnr
from invrecon.metrics.mri import magnitude, relative_magnitudes
from invrecon.operators.base import LinearOperator
from invrecon.operators.ct import ParallelBeamCT
from invrecon.operators.downsample import BicubicDownsample
from invrecon.operators.mri import CartesianMRI
from invrecon.operators.sampling import PolynomialSampling
from invrecon.rng import make_generator, make_generators, randn
from invrecon.tasks.score_matching import ScoreMatching


class TrainingPreviews(lightning.Callback):
    """Logs patches per second, denoised examples, unconditional samples and the PSNR of a quick reconstruction.

    All on the middle validation slice with the averaged weights and with generators of their own, so that a run
    with previews learns the same weights as one without. The reconstruction is noise-free: sparse-view CT of an image
    of one channel, four-fold undersampled MRI with one coil of a complex one (shown and judged by its magnitude),
    four-fold super-resolution of any other.

    Args:
        every_n_validations: How often pictures and the reconstruction are made.
        num_views: Views of the CT reconstruction.
        num_levels: Noise levels of the reconstruction and of the unconditional sample.
        sigmas: Noise levels of the denoised examples.
    """

    def __init__(
        self,
        every_n_validations: int = 4,
        num_views: int = 20,
        num_levels: int = 20,
        sigmas: tuple[float, ...] = (0.01, 0.05, 0.2, 1.0),
    ) -> None:
        self.every_n_validations, self.num_views = every_n_validations, num_views
        self.num_levels, self.sigmas = num_levels, sigmas
        self._mark: tuple[float, int] | None = None
        self._operator: LinearOperator | None = None

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Starts the clock of an epoch."""
        self._mark = (time.perf_counter(), int(pl_module.num_patches))

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Logs the epoch's training throughput before validation takes its time."""
        if self._mark is not None and trainer.logger is not None:
            seconds, patches = time.perf_counter() - self._mark[0], int(pl_module.num_patches) - self._mark[1]
            values = {
                "train/patches_per_second": patches / seconds,
                "train/patches": int(pl_module.num_patches),
                "train/pixels": int(pl_module.num_pixels),
            }
            trainer.logger.log_metrics(values, step=trainer.global_step)
            self._mark = None

    @torch.no_grad()
    def on_validation_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Makes the pictures and the quick reconstruction, on rank zero."""
        board: Any = getattr(trainer.logger, "experiment", None)
        due = (trainer.current_epoch + 1) % self.every_n_validations == 0
        if not due or trainer.sanity_checking or not hasattr(board, "add_image") or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, ScoreMatching)
        step, prior = trainer.global_step, pl_module.prior()
        images = pl_module.data.validation_images()
        x = images[len(images) // 2 : len(images) // 2 + 1].to(pl_module.device)
        noise = randn(x.shape[1:], make_generators(0, ["preview"]), like=x)
        denoised = [prior(x + s * noise, s, generators=make_generators(0, [str(s)])) for s in self.sigmas]
        noisy = [x + s * noise for s in self.sigmas]
        board.add_image("denoised (above: noisy)", _grid(noisy, denoised), step)
        schedule = KarrasSchedule(self.num_levels, 10.0, 0.01)
        sample = sample_prior(prior, x.shape[1:], make_generators(0, ["sample"]), schedule, DDIM(1.0), x)
        if self._operator is None:
            self._operator = self._make_operator(*x.shape[1:]).to(x.device)
        y = self._operator(x)
        clip = None if self._operator.complex_images else (0.0, 1.0)
        method = ProximalDiffusion(num_levels=self.num_levels, clip=clip)
        estimate = method(y, self._operator, prior, generators=make_generators(0, ["quick"])).mean
        board.add_image(
            "reference, direct inverse, reconstruction, unconditional sample",
            _grid([x, self._operator.baseline(y), estimate, sample]),
            step,
        )
        pair = relative_magnitudes(estimate, x) if self._operator.complex_images else (estimate, x)
        value = float(psnr(*pair)[0])
        kinds = {ParallelBeamCT: f"{self.num_views}_views", CartesianMRI: "4_fold_mri"}
        problem = kinds.get(type(self._operator), "superresolution")
        trainer.logger.log_metrics({f"validation/psnr_{problem}": value}, step=step)  # type: ignore[union-attr]
        trainer.callback_metrics[f"validation/psnr_{problem}"] = torch.tensor(value)

    def _make_operator(self, num_channels: int, height: int, width: int) -> LinearOperator:
        if num_channels == 1:
            return ParallelBeamCT(size=(height, width), num_views=self.num_views)
        if num_channels == 2:
            mask = PolynomialSampling(4.0, acs=min(height, width) // 8)((height, width), make_generator(0, "quick"))
            return CartesianMRI((height, width), mask)
        return BicubicDownsample(size=(height, width), factor=4, num_channels=num_channels)


def _grid(*rows: list[Tensor]) -> Tensor:
    """Returns rows of images `(1, C, H, W)` as one picture `(1 or 3, rows H, columns W)` in [0, 1].

    Three channels are colours, two a complex image, of which the magnitude is shown.
    """
    shown = [[(magnitude(x) if x.shape[1] == 2 else x)[0] for x in row] for row in rows]
    return torch.cat([torch.cat(row, dim=-1) for row in shown], dim=-2).clamp(0, 1).cpu()
