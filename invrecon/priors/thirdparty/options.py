"""What the tensors of a file do not say, as the user states it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from invrecon.data.intensity import Intensity
from invrecon.errors import InputError


@dataclass
class Options:
    """What the tensors do not say; None is not stated. `command` documents each."""

    key: str | None = None
    settings: Path | None = None
    image_size: int | None = None
    image_channels: int | None = None
    head_channels: int | None = None
    num_heads: int | None = None
    new_attention_order: bool = False
    prediction: str | None = None
    schedule: str | None = None
    num_steps: int | None = None
    nearest_timestep: bool = False
    rescale_timesteps: bool = False
    sigma_data: float | None = None
    data_range: tuple[float, float] | None = None
    intensity: dict[str, Any] | None = None
    padding: int | str | None = None
    patch_sizes: list[int] = field(default_factory=list)
    label: int | None = None
    data: list[str] = field(default_factory=list)
    licence: str = "not stated"


def as_option(intensity: Intensity) -> str:
    """Returns an intensity scale as one types it: `--intensity -1000 3000 HU`."""
    return f"--intensity {intensity.offset:g} {intensity.scale:g} {shlex.quote(intensity.units)}"


def require_applicable(options: Options, network: dict[str, Any], kind: str) -> None:
    """Refuses options that say nothing of the network: it may not be the one that was meant.

    Args:
        options: What was stated.
        network: The arguments of the network that was found.
        kind: What it predicts.

    Raises:
        InputError: If an option does not apply.
    """
    reasons = {}
    if not network["position_channels"]:
        reasons["the network has no positions"] = {"--padding": options.padding is not None}
    if network["family"] != "guided-diffusion":
        reasons["only networks of guided diffusion have it"] = {"--new-attention-order": options.new_attention_order}
    if kind in ("edm", "ve", "vp"):
        reasons[f"what it predicts is {kind}, of a continuous diffusion"] = {
            "--schedule": options.schedule is not None,
            "--num-steps": options.num_steps is not None and kind != "vp",
            "--nearest-timestep": options.nearest_timestep,
            "--rescale-timesteps": options.rescale_timesteps,
        }
    given = {why: [name for name, is_given in names.items() if is_given] for why, names in reasons.items()}
    if found := [f"{', '.join(names)} ({why})" for why, names in given.items() if names]:
        raise InputError(f"Options do not apply to it: {', and '.join(found)}; leave them out.")
