"""Networks of other people's families, with random weights, and their tensors as the originals save them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from invrecon.priors.base import Prior
from invrecon.priors.thirdparty.convert import import_weights
from invrecon.priors.thirdparty.denoiser import FAMILIES
from invrecon.priors.thirdparty.layers import Resample
from invrecon.priors.thirdparty.options import Options
from invrecon.priors.weights import load_prior

SIZE = 16
GUIDED: dict[str, Any] = {
    "image_channels": 1,
    "out_channels": 2,
    "position_channels": 0,
    "base_channels": 32,
    "stem_channels": 32,
    "multipliers": [1, 2],
    "num_blocks": 1,
    "attention_levels": [1],
    "scale_shift": True,
    "resample": "block",
    "num_heads": 1,
    "head_channels": 64,
    "new_attention_order": False,
}
SONG: dict[str, Any] = {
    "image_channels": 1,
    "out_channels": 1,
    "position_channels": 0,
    "resolution": SIZE,
    "base_channels": 8,
    "multipliers": [1, 2],
    "num_blocks": 1,
    "attention_levels": [1],
    "embedding": "positional",
    "noise_channels": 8,
    "num_features": 32,
    "encoder": "standard",
    "decoder": "standard",
    "taps": [0.5, 0.5],
    "num_heads": 1,
    "head_channels": None,
}
NCSNPP = {"embedding": "fourier", "noise_channels": 16, "encoder": "residual", "taps": [0.125, 0.375, 0.375, 0.125]}
DHARIWAL: dict[str, Any] = {
    "image_channels": 2,
    "out_channels": 2,
    "position_channels": 0,
    "resolution": SIZE,
    "base_channels": 32,
    "multipliers": [1, 2],
    "num_blocks": 1,
    "attention_levels": [1],
    "num_features": 128,
    "taps": [0.5, 0.5],
    "num_heads": 1,
    "head_channels": 64,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "guided": ("guided-diffusion", GUIDED),
    "guided, learned resampling": ("guided-diffusion", GUIDED | {"resample": "conv", "num_blocks": 2}),
    "guided, plain resampling": ("guided-diffusion", GUIDED | {"resample": "plain", "scale_shift": False}),
    "guided, one level": (
        "guided-diffusion",
        GUIDED | {"multipliers": [2], "attention_levels": [0], "resample": "conv"},
    ),
    "guided, half": (
        "guided-diffusion",
        GUIDED | {"base_channels": 64, "multipliers": [0.5, 1, 1], "attention_levels": [1, 2], "out_channels": 1},
    ),
    "guided, no attention level": ("guided-diffusion", GUIDED | {"image_channels": 2, "attention_levels": []}),
    "song": ("song", SONG),
    "song, positions": ("song", SONG | {"position_channels": 2, "num_blocks": 2, "attention_levels": []}),
    "song, ncsnpp": ("song", SONG | NCSNPP),
    "song, pyramids": ("song", SONG | {"encoder": "skip", "decoder": "skip", "multipliers": [1, 1, 2]}),
    "song, wide embedding": ("song", SONG | {"num_features": 16, "image_channels": 3, "out_channels": 3}),
    "dhariwal": ("dhariwal", DHARIWAL),
    "dhariwal, deep": ("dhariwal", DHARIWAL | {"multipliers": [2, 2, 4], "attention_levels": [0, 2], "num_blocks": 2}),
    "dhariwal, iDDPM": ("dhariwal", DHARIWAL | {"out_channels": 4, "attention_levels": []}),
}
ASKED = {"image_size": SIZE, "padding": "none", "patch_sizes": [8]}


def network(name: str, config: dict[str, Any]) -> nn.Module:
    """Builds a network of random weights, none of them zero."""
    built = FAMILIES[name](**config)
    torch.manual_seed(len(str(config)))
    for value in built.state_dict().values():
        value.copy_(0.2 * torch.randn(value.shape) + (0.5 if value.ndim == 1 else 0))
    return built.eval().requires_grad_(False)


def foreign(built: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The tensors as the original saves them: filters are buffers there."""
    tensors = {f"{prefix}{key}": value for key, value in built.state_dict().items()}
    for name, module in built.named_modules():
        if isinstance(module, Resample):
            tensors[f"{prefix}{name.removesuffix('.resample')}.resample_filter"] = module.kernel[None, None]
    return tensors


def options(config: dict[str, Any], **changes: Any) -> Options:
    positions = config["position_channels"] > 0
    asked = {key: value for key, value in ASKED.items() if positions or key == "image_size"}
    if "new_attention_order" in config:  # guided diffusion
        asked |= {"head_channels": config["head_channels"], "image_channels": config["image_channels"]}
    return Options(**asked | changes)


def inputs(config: dict[str, Any], num: int = 2) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(num, config["image_channels"] + config["position_channels"], SIZE, SIZE)


def relative(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, in units of the largest value."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def import_complex_prior(folder: Path) -> Prior:
    """A network of guided diffusion of real and imaginary parts, as another program saves it, made a prior of ours."""
    config = GUIDED | {"image_channels": 2, "out_channels": 4}
    torch.save(foreign(network("guided-diffusion", config)), folder / "theirs.pt")
    asked = options(config, intensity={"offset": 0.0, "scale": 1.0, "units": "a.u."})
    import_weights(folder / "theirs.pt", folder / "prior.safetensors", asked)
    return load_prior(folder / "prior.safetensors")[0]
