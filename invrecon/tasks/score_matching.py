"""Training of priors by denoising score matching."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as nnf
from torch import Tensor

from invrecon.data.patches import PatchBatch
from invrecon.data.training import PriorTraining
from invrecon.errors import InputError
from invrecon.priors.base import Prior
from invrecon.priors.edm import EDMDenoiser, NoiseProposal
from invrecon.priors.patch import PatchPrior, WholePrior
from invrecon.priors.unet import UNet
from invrecon.priors.weights import PriorCard, load_prior
from invrecon.rng import derive_seed, make_generator
from invrecon.shared import find_shared

BANDS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, math.inf)


def band_names() -> list[str]:
    """Returns the names of the noise bands that the loss is reported in."""
    return [f"{low:g}-{high:g}" for low, high in pairwise(BANDS)]


class ScoreMatching(lightning.LightningModule):
    r"""Learns a denoiser by denoising score matching (Vincent 2011; Karras et al. 2022, eq. 2 and table 1).

    $$ \min_\theta E_{x, \sigma, n}\; w(\sigma)\, \| D_\theta(x + \sigma n, \sigma, p) - x \|^2 $$

    averaged over pixels, on patches `x` at positions `p` drawn by the data module. An exponential moving average of
    the weights is what is validated and exported. Every draw is a function of (seed, rank, step), so a resumed run
    equals the uninterrupted one.

    Args:
        network: The network `F`.
        proposal: Distribution of the training noise levels.
        learning_rate: Peak of the schedule: a linear ramp over `warmup`, then a cosine to zero at `max_steps`.
        warmup: Fraction of the steps spent on the ramp.
        betas: Adam's.
        ema_decay: Decay of the moving average; it starts lower, `min(decay, (1 + t) / (10 + t))`.
        sigma_data: Standard deviation of the data, intensity units; measured on the training data by default.
        initial: A prior file, or the bare name of a shipped one, whose weights (and sigma_data) training starts from.
        half_weights: Whether the exported prior file stores float16, half as large.
    """

    num_patches: Tensor
    num_pixels: Tensor

    def __init__(
        self,
        network: UNet,
        proposal: NoiseProposal,
        learning_rate: float = 1e-3,
        warmup: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.99),
        ema_decay: float = 0.999,
        sigma_data: float | None = None,
        initial: str | None = None,
        half_weights: bool = False,
    ) -> None:
        super().__init__()
        if sigma_data is not None and not sigma_data > 0:
            raise InputError(f"model.sigma_data is {sigma_data}, expected a positive number, or null to measure it.")
        if sigma_data is not None and initial is not None:
            raise InputError(
                "model.initial has a sigma_data of its own, which belongs to its weights: leave out the other."
            )
        if not learning_rate > 0 or not 0 <= ema_decay < 1 or not 0 <= warmup <= 1:
            raise InputError(
                f"model needs learning_rate > 0, 0 <= ema_decay < 1 and 0 <= warmup <= 1, got {learning_rate}, "
                f"{ema_decay} and {warmup}."
            )
        self.denoiser = EDMDenoiser(network, sigma_data or 0.5)
        self.denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = copy.deepcopy(self.denoiser).requires_grad_(False).eval()
        self.proposal = proposal
        self.learning_rate, self.warmup, self.betas = learning_rate, warmup, betas
        self.ema_decay, self.sigma_data = ema_decay, sigma_data
        self.register_buffer("num_patches", torch.zeros((), dtype=torch.int64))
        self.register_buffer("num_pixels", torch.zeros((), dtype=torch.int64))
        self.seed, self.half_weights = 0, half_weights
        self._initial: PriorCard | None = None
        if initial is not None:
            self._start_from(find_shared(initial, "checkpoints", ".safetensors"), network)

    def _start_from(self, path: Path, network: UNet) -> None:
        """Takes weights, sigma_data and counts of a prior file."""
        prior, card = load_prior(path)
        if card.network != network.config:
            raise InputError(
                f"model.initial, '{path}', is a network of {card.network}, the configuration asks for "
                f"{network.config}: set model.network like the prior's."
            )
        for denoiser in (self.denoiser, self.ema):
            denoiser.load_state_dict(prior.denoiser.state_dict())  # type: ignore[union-attr, operator]
        self.sigma_data, self._initial = card.sigma_data, card
        self.num_patches.fill_(int(card.training.get("patches", 0)))
        self.num_pixels.fill_(int(card.training.get("pixels", 0)))

    @property
    def data(self) -> PriorTraining:
        """The data module of the run."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, PriorTraining):
            raise InputError(
                f"ScoreMatching trains on CTTraining or EllipseTraining data; got {type(data).__name__}. Set `data` in "
                "the config, as patch_ct.yaml does."
            )
        return data

    def setup(self, stage: str) -> None:
        """Measures sigma_data on the training data, the same on every rank; a resumed run restores it.

        Raises:
            InputError: Settings of trainer, data and network that do not go together.
        """
        self.seed = self.data.seed
        if stage in ("fit", "validate"):
            self._check_settings()
        if stage == "fit" and self.sigma_data is None:
            measured = self.data.measure_sigma_data()
            if not 0 < measured < math.inf:
                raise InputError(
                    f"The standard deviation of the training images is {measured:g}: they are constant, or no "
                    "numbers, so there is nothing to learn from them; check data.paths."
                )
            for denoiser in (self.denoiser, self.ema):
                denoiser.sigma_data.fill_(measured)

    def _check_settings(self) -> None:
        precision, num = str(self.trainer.precision), self.trainer.accumulate_grad_batches
        if precision in ("bf16-true", "16-true"):
            raise InputError(
                f"trainer.precision is {precision}, in which an average of weights over steps stands still: use "
                f"{precision.replace('true', 'mixed')}, which is as fast, or 32-true."
            )
        if self.data.batches_per_epoch % num:
            raise InputError(
                f"trainer.accumulate_grad_batches is {num}, data.batches_per_epoch {self.data.batches_per_epoch}: an "
                "epoch has to end with a step, so make it a multiple."
            )
        channels = self.denoiser.network.config["image_channels"]  # type: ignore[index, union-attr]
        if channels != self.data.num_channels:
            raise InputError(
                f"model.network.image_channels is {channels}, and the images of {type(self.data).__name__} have "
                f"{self.data.num_channels}: set it so."
            )
        stride = int(self.denoiser.network.stride)  # type: ignore[arg-type]
        if misfits := [size for size in self.data.patch_sizes if size % stride]:
            raise InputError(
                f"data.patch_sizes {self.data.patch_sizes}: {misfits} do not go through this network, which takes "
                f"sides that are multiples of {stride}; change them, or model.network.multipliers."
            )

    def losses(self, denoiser: EDMDenoiser, batch: PatchBatch) -> tuple[Tensor, Tensor]:
        """Returns noise levels `(n,)` and the weighted squared error of each patch `(n,)`.

        Levels and noise are drawn from (seed, batch key) alone; noise on the device, where it is needed.
        """
        sigma = self.proposal.sample(len(batch.x), make_generator(self.seed, "level", batch.key)).to(batch.x)
        device = batch.x.device
        generator = torch.Generator(device).manual_seed(derive_seed(self.seed, "noise", batch.key))
        noise = torch.randn(batch.x.shape, generator=generator, device=device)
        return sigma, denoiser.denoising_losses(batch.x, sigma, noise, batch.position)

    def training_step(self, batch: PatchBatch, batch_index: int) -> Tensor:
        """Returns the mean weighted loss; refuses to go on from a loss that is not finite."""
        torch.manual_seed(derive_seed(self.seed, "dropout", batch.key))  # dropout knows the global generator only
        sigma, losses = self.losses(self.denoiser, batch)
        loss = losses.mean()
        if not torch.isfinite(loss):
            raise InputError(
                f"The training loss is {float(loss.detach())} at step {self.global_step}: training has diverged. The "
                "last checkpoint is intact; lower model.learning_rate, or set trainer.precision to 32-true, and run "
                "again."
            )
        patches, pixels = self.data.batch_counts(batch.key)
        self.num_patches += patches
        self.num_pixels += pixels
        self.log("train/loss", loss.detach(), prog_bar=True)
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and self.global_step % every == 0:
            self._log_bands("train", *self._band_sums(sigma, losses.detach()))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Empties the sums of losses and of patches, one column a noise band."""
        self._validation_sums = torch.zeros(2, len(BANDS) - 1, device=self.device)

    def validation_step(self, batch: PatchBatch, batch_index: int) -> None:
        """Adds up the loss of the averaged weights on the fixed validation patches."""
        if batch.key:
            self._validation_sums += self._band_sums(*self.losses(self.ema, batch))

    def on_validation_epoch_end(self) -> None:
        """Logs the mean validation loss, over all and per noise band.

        Summed over the ranks before any division: a rank may have seen no patch of a band, or none at all.
        """
        sums, counts = self.trainer.strategy.reduce(self._validation_sums, reduce_op="sum")
        if counts.sum() > 0:
            self.log("validation/loss", sums.sum() / counts.sum(), prog_bar=True, sync_dist=True)
        self._log_bands("validation", sums, counts, sync_dist=True)

    @staticmethod
    def _band_sums(sigma: Tensor, losses: Tensor) -> Tensor:
        """Returns the sum of losses and the number of patches of each noise band, `(2, bands)`."""
        band = torch.bucketize(sigma, torch.tensor(BANDS[1:-1], device=sigma.device, dtype=sigma.dtype))
        member = nnf.one_hot(band, len(BANDS) - 1).to(losses)
        return torch.stack([losses @ member, member.sum(dim=0)])

    def _log_bands(self, stage: str, sums: Tensor, counts: Tensor, sync_dist: bool = False) -> None:
        for name, total, count in zip(band_names(), sums, counts, strict=True):
            if count > 0:
                self.log(f"{stage}/loss_{name}", total / count, sync_dist=sync_dist, batch_size=1)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuses a step from gradients that are not finite (before clipping hides them).

        Under `16-mixed` some steps overflow until the loss scale fits: the scaler leaves these out and halves the
        scale. Training has diverged once no scale is small enough.
        """
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.denoiser.parameters() if p.grad is not None])
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if not torch.isfinite(norm) and (scaler is None or scaler.get_scale() < 1):
            raise InputError(
                f"The gradient is not finite at step {self.global_step}: training has diverged. The last checkpoint is "
                "intact; lower model.learning_rate, or set trainer.precision to 32-true, and run again."
            )

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Steps, and moves the averaged weights at once: a checkpoint of this step, by whichever hook, has both."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        t = self.global_step + 1
        decay = min(self.ema_decay, (1 + t) / (10 + t))
        averages: list[Tensor] = list(self.ema.parameters())
        weights: list[Tensor] = list(self.denoiser.parameters())
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1 - decay)

    def configure_optimizers(self) -> Any:
        """Adam under a linear ramp and a cosine to zero.

        Raises:
            InputError: If the Trainer has no last step.
        """
        optimizer = torch.optim.Adam(self.denoiser.parameters(), lr=self.learning_rate, betas=self.betas)
        total = self.trainer.estimated_stepping_batches
        if not math.isfinite(total):
            raise InputError("The schedule needs to know where training ends; set trainer.max_steps or max_epochs.")
        total = max(1, int(total))
        ramp = max(1, round(self.warmup * total))

        def factor(step: int) -> float:
            return min(1.0, (step + 1) / ramp) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Runs both networks in the precision of the Trainer."""
        precision = "bf16" if "bf16" in str(self.trainer.precision) else "32"
        self.denoiser.precision = self.ema.precision = precision

    on_validation_start = on_fit_start

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses to resume from a checkpoint of another network.

        Raises:
            InputError: If a tensor is missing or has another shape.
        """
        found = {key: tuple(value.shape) for key, value in checkpoint["state_dict"].items()}
        wanted = {key: tuple(value.shape) for key, value in self.state_dict().items()}
        for key in sorted(found.keys() | wanted.keys()):
            if found.get(key) != wanted.get(key):
                raise InputError(
                    f"The checkpoint to resume from was written by another network: '{key}' is "
                    f"{found.get(key, 'absent')}, the configuration asks for {wanted.get(key, 'absent')}. Choose "
                    "another --output for the new settings, or go back to the old ones."
                )

    def prior(self) -> Prior:
        """Returns the prior of the averaged weights (sharing them), of the kind that the data module trains."""
        data = self.data
        return WholePrior(self.ema) if data.kind == "whole" else PatchPrior(self.ema, data.patch_sizes[0])

    def card(self) -> PriorCard:
        """Returns what the exported prior file says of itself."""
        data, network, first = self.data, self.denoiser.network, self._initial
        assert isinstance(network, UNet)
        licence: str = data.licence  # type: ignore[attr-defined]
        return PriorCard(
            kind=data.kind,
            network=network.config,
            sigma_data=float(self.ema.sigma_data),
            sigma_range=(self.proposal.sigma_min, self.proposal.sigma_max),
            image_size=data.size,
            patch_sizes=[] if data.kind == "whole" else data.patch_sizes,
            intensity=asdict(data.intensity),
            data=list(dict.fromkeys([*(first.data if first else []), *data.train_names])),
            licence="; ".join(dict.fromkeys([*([first.licence] if first else []), licence])),
            training={
                "steps": self.global_step,
                "patches": int(self.num_patches),
                "pixels": int(self.num_pixels),
                "learning_rate": self.learning_rate,
                "precision": str(self.trainer.precision),
                "num_parameters": sum(p.numel() for p in network.parameters()),
            },
        )
