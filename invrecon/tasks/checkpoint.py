"""Training checkpoints that survive a kill at any instant, and the prior that a finished run leaves."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from invrecon.errors import InputError
from invrecon.files import TEMPORARY_SUFFIX, atomic_write
from invrecon.priors.weights import save_prior
from invrecon.tasks.score_matching import ScoreMatching, band_names


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints beside, synced and renamed, so that a kill leaves the old one or the new one.

    Reading never executes code (`weights_only`).
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Saves a checkpoint whole or not at all, and removes what saves that were killed have left."""
        path = Path(path)
        for stale in path.parent.glob(f".{path.name}.*{TEMPORARY_SUFFIX}"):
            stale.unlink(missing_ok=True)
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        with atomic_write(path) as file:
            file.write(buffer.getbuffer())

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Loads tensors and plain values only.

        Raises:
            InputError: If the file is truncated or holds anything else.
        """
        try:
            checkpoint = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except FileNotFoundError:
            raise InputError(f"There is no checkpoint '{path}' to resume from.") from None
        except Exception as error:  # whatever the unpickler makes of damaged bytes
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"The checkpoint '{path}' cannot be read ({reason}): it is truncated or not one of "
                "ours. Remove it to start again, or give another --ckpt_path."
            ) from None
        if Path(path).suffix == ".safetensors":
            raise InputError(
                f"'{path}' is a prior and no checkpoint of a training run: begin from its weights by --model.initial, "
                "or resume from checkpoints/last.ckpt."
            )
        if not isinstance(checkpoint, dict) or not {"state_dict", "pytorch-lightning_version"} <= checkpoint.keys():
            raise InputError(
                f"'{path}' is no checkpoint of a training run: it has no state_dict of ours. Give another --ckpt_path, "
                "as checkpoints/last.ckpt in the folder of a run."
            )
        return checkpoint


class ExportPrior(lightning.Callback):
    """At the end of fit, writes the averaged weights as `prior.safetensors` with a model card `prior.md` beside it.

    Args:
        output: Folder of the run.
        command: The command line, for the card.
    """

    def __init__(self, output: str, command: str = "") -> None:
        self.output, self.command = Path(output), command
        self.figures: dict[str, float] = {}
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        """Keeps the last validation's figures, for a run that died between its last checkpoint and the export."""
        return {"figures": dict(self.figures), "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the figures."""
        self.figures = dict(state_dict["figures"])
        self.step = int(state_dict.get("step", 0))

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Notes what the validation measured."""
        if not trainer.sanity_checking:
            self.step = trainer.global_step
            self.figures |= {
                key.removeprefix("validation/"): round(float(value), 6)
                for key, value in trainer.callback_metrics.items()
                if key.startswith("validation/")
            }

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Exports on rank zero."""
        if not isinstance(pl_module, ScoreMatching) or not trainer.is_global_zero:
            return
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            print("A run of a few batches (fast_dev_run) leaves no prior.")
            return
        card = pl_module.card()
        card.training["command"] = self.command
        card.training["validation"] = self.figures
        if self.figures and self.step:
            card.training["validated"] = self.step
        path = self.output / "prior.safetensors"
        save_prior(path, pl_module.ema.state_dict(), card, pl_module.half_weights)
        with atomic_write(path.with_suffix(".md")) as file:
            file.write(model_card(card, path.stem).encode())
        print(f"The prior is in {path}, its card in {path.with_suffix('.md')}.")


def model_card(card: Any, name: str) -> str:
    """Returns the Markdown card of a prior.

    Args:
        card: A `PriorCard`.
        name: The file's stem.
    """
    training, lines = card.training, [f"# {name}", ""]
    offset, scale, units = (card.intensity[key] for key in ("offset", "scale", "units"))
    if card.network.get("image_channels") == 2:
        intensity = "complex images, divided by the 99th percentile of the image of their calibration region"
    else:
        intensity = f"`x = clip((value - {offset:g}) / {scale:g}, 0, 1)`, value in {units}"
    what = f"patches of {card.patch_sizes} pixels" if card.kind == "patch" else "whole images"
    lines += [
        f"A denoiser `D(x, sigma)` of {card.image_size} x {card.image_size} images, learned from {what} by denoising",
        "score matching.",
        "",
        "| | |",
        "|---|---|",
        f"| architecture | U-Net {card.network} ({training.get('num_parameters', '?'):,} parameters) |",
        f"| intensity | {intensity} |",
        f"| sigma_data | {card.sigma_data:.4f} |",
        f"| trained noise levels | {card.sigma_range[0]:g} to {card.sigma_range[1]:g} |",
        f"| data | {', '.join(card.data)} |",
        f"| licence | {card.licence} |",
        f"| steps | {training.get('steps', 0):,} |",
        f"| patches seen | {training.get('patches', 0):,} |",
        f"| pixels seen | {training.get('pixels', 0):,} |",
        f"| precision | {training.get('precision', '?')} |",
        f"| command | `{training.get('command', '')}` |",
        "",
    ]
    validation = training.get("validation", {})
    if validation:
        at, steps = training.get("validated"), training.get("steps")
        when = f" after step {at:,} of {steps:,}" if at is not None and at != steps else ""
        lines += [f"Validation loss of the averaged weights{when} (unit at initialisation), per noise band:", ""]
        lines += ["| sigma | loss |", "|---|---|"]
        lines += [
            f"| {band} | {validation[f'loss_{band}']:.4f} |" for band in band_names() if f"loss_{band}" in validation
        ]
        lines += [f"| all | {validation['loss']:.4f} |" if "loss" in validation else "", ""]
    return "\n".join(lines)
