"""The architecture of a published network, read from its tensors' names and shapes.

What shapes cannot say (attention heads) arrives as `Heads`; everything else is found here, and `convert` then checks
every tensor against the network that was found.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from invrecon.errors import InputError
from invrecon.priors.thirdparty.channels import Channels

Tensors = Mapping[str, Tensor]
HEAD_CHANNELS = 64
# Base channels and multipliers of published networks of guided diffusion whose heads have 64 channels; others of the
# same width (ImageNet at 128 x 128) have four heads.
HEADS_OF_64 = (
    (128, (1, 1, 2, 2, 4, 4)),
    (192, (1, 2, 3, 4)),
    (256, (1, 1, 2, 2, 4, 4)),
    (256, (0.5, 1, 1, 2, 2, 4, 4)),
)


@dataclass
class Heads:
    """What no shape tells of an attention layer.

    Args:
        head_channels: Channels a head; None if not stated.
        num_heads: Heads; None if not stated.
        new_order: Whether queries, keys and values are split before the heads (guided diffusion alone).
    """

    head_channels: int | None = None
    num_heads: int | None = None
    new_order: bool = False

    def chosen(self, widths: Iterable[int], default: int | None) -> dict[str, int | None]:
        """Returns the arguments of the network: what was stated, else `default` channels a head, else one head."""
        if self.head_channels is not None or self.num_heads is not None:
            return {"num_heads": self.num_heads or 1, "head_channels": self.head_channels}
        fits = default is not None and all(width % default == 0 for width in widths)
        return {"num_heads": 1, "head_channels": default if fits else None}


def shape(tensors: Tensors, key: str, num_axes: int) -> tuple[int, ...]:
    """Returns the shape of a tensor that has to be there.

    Raises:
        InputError: If it is not, or has another number of axes.
    """
    if key not in tensors:
        raise InputError(f"The tensor '{key}' is missing: the file is not the whole network, or of another family.")
    found = tuple(tensors[key].shape)
    if len(found) != num_axes:
        raise InputError(f"The tensor '{key}' is {found}, expected {num_axes} axes: only images in 2D are known.")
    return found


def multipliers(widths: list[int], base: int) -> list[float]:
    """Returns the widths in units of `base`, as integers where they are."""
    return [width // base if width % base == 0 else width / base for width in widths]


def guided_diffusion(tensors: Tensors, heads: Heads, channels: Channels) -> dict[str, Any]:
    """Returns the arguments of `GuidedDiffusionUNet`.

    Encoder and decoder have `L (n + 1)` stages each, for `L` levels of `n` blocks: `n + 1` is the number of stages
    of the decoder up to its first upsampling, or, where that has no weights, of the encoder up to a stage without.

    Raises:
        InputError: If the tensors are not those of such a network.
    """
    _, base = shape(tensors, "time_embed.0.weight", 2)
    stem, inputs, *_ = shape(tensors, "input_blocks.0.0.weight", 4)
    outputs, *_ = shape(tensors, "out.2.weight", 4)
    num_in, num_out = (_count(tensors, name) for name in ("input_blocks", "output_blocks"))
    learned = _first(num_out, lambda i: _any(tensors, rf"output_blocks\.{i}\.[12]\.conv\.weight"))
    blocks = _first(num_out, lambda i: _any(tensors, rf"output_blocks\.{i}\.[12]\.in_layers\.0\.weight"))
    bare = _first(num_in, lambda i: not _any(tensors, rf"input_blocks\.{i}\."))
    period, resample = num_out, "conv"
    if blocks is not None:
        period, resample = blocks + 1, "block"
    elif learned is not None:
        period, resample = learned + 1, "conv"
    elif bare is not None:
        period, resample = bare, "plain"
    if period < 2 or num_out % period or num_in != num_out:
        raise InputError(
            f"The network has {num_in} stages in the encoder and {num_out} in the decoder, {period} a level: that is "
            "no U-Net of guided diffusion."
        )
    first = [1 + level * period for level in range(num_out // period)]
    widths = [shape(tensors, f"input_blocks.{i}.0.in_layers.2.weight", 4)[0] for i in first]
    levels = [level for level, i in enumerate(first) if f"input_blocks.{i}.1.qkv.weight" in tensors]
    features, _ = shape(tensors, "input_blocks.1.0.emb_layers.1.weight", 2)
    return {
        "family": "guided-diffusion",
        **channels.read(inputs, outputs, upsampler=True),
        "base_channels": base,
        "stem_channels": stem,
        "multipliers": multipliers(widths, base),
        "num_blocks": period - 1,
        "attention_levels": levels,
        "scale_shift": features == 2 * widths[0],
        "resample": resample,
        **heads.chosen([widths[level] for level in {*levels, len(widths) - 1}], HEAD_CHANNELS),
        "new_attention_order": heads.new_order,
    }


def song(tensors: Tensors, heads: Heads, taps: list[float] | None, channels: Channels) -> dict[str, Any]:
    """Returns the arguments of `SongUNet`.

    Args:
        tensors: Its tensors.
        heads: What is stated of its attention; one head if nothing.
        taps: The resampling filter, for a file without its buffers; if None that of NCSN++ for a residual encoder,
            `[1, 3, 3, 1]`, else `[1, 1]`.
        channels: What is stated of its channels.

    Raises:
        InputError: If the tensors are not those of such a network.
    """
    resolution, names = _levels(tensors)
    fourier = "map_noise.freqs" in tensors
    base, inputs, *_ = shape(tensors, f"enc.{names[0]}_conv.weight", 4)
    features, noise = shape(tensors, "map_layer0.weight", 2)
    outputs, *_ = shape(tensors, f"dec.{names[0]}_aux_conv.weight", 4)
    encoder = "standard"
    for kind, tail in (("skip", "aux_skip.weight"), ("residual", "aux_residual.weight")):
        if any(f"enc.{name}_{tail}" in tensors for name in names):
            encoder = kind
    return {
        "family": "song",
        **channels.read(inputs, outputs),
        "resolution": resolution,
        "base_channels": base,
        **_blocks(tensors, names, base),
        "embedding": "fourier" if fourier else "positional",
        "noise_channels": noise,
        "num_features": features,
        "encoder": encoder,
        "decoder": "skip" if any(f"dec.{name}_aux_conv.weight" in tensors for name in names[1:]) else "standard",
        # NCSN++ has a filter of four taps, and in EDM's networks the residual encoder is its.
        "taps": _taps(tensors) or taps or ([0.125, 0.375, 0.375, 0.125] if encoder == "residual" else [0.5, 0.5]),
        **heads.chosen([], None),
    }


def dhariwal(tensors: Tensors, heads: Heads, taps: list[float] | None, channels: Channels) -> dict[str, Any]:
    """Returns the arguments of `DhariwalUNet`.

    Args:
        tensors: Its tensors.
        heads: What is stated of its attention; 64 channels a head if nothing.
        taps: The resampling filter, for a file without its buffers; `[1, 1]` if None.
        channels: What is stated of its channels.

    Raises:
        InputError: If the tensors are not those of such a network.
    """
    resolution, names = _levels(tensors)
    _, inputs, *_ = shape(tensors, f"enc.{names[0]}_conv.weight", 4)
    features, base = shape(tensors, "map_layer0.weight", 2)
    outputs, *_ = shape(tensors, "out_conv.weight", 4)
    return {
        "family": "dhariwal",
        **channels.read(inputs, outputs),
        "resolution": resolution,
        "base_channels": base,
        **_blocks(tensors, names, base),
        "num_features": features,
        "taps": _taps(tensors) or taps or [0.5, 0.5],
        **heads.chosen([], HEAD_CHANNELS),
    }


def _levels(tensors: Tensors) -> tuple[int, list[str]]:
    """Returns the nominal resolution and the names of the levels, finest first."""
    sides = {int(match[1]) for key in tensors if (match := re.match(r"enc\.(\d{1,6})x\1_", key))}
    if not sides:
        raise InputError("There are no tensors 'enc.<R>x<R>_...': the file is not the whole network.")
    return max(sides), [f"{side}x{side}" for side in sorted(sides, reverse=True)]


def _blocks(tensors: Tensors, names: list[str], base: int) -> dict[str, Any]:
    widths = [shape(tensors, f"enc.{name}_block0.conv0.weight", 4)[0] for name in names]
    found = [re.match(rf"enc\.{names[0]}_block(\d{{1,4}})\.", key) for key in tensors]
    return {
        "multipliers": multipliers(widths, base),
        "num_blocks": 1 + max(int(match[1]) for match in found if match),
        "attention_levels": [i for i, name in enumerate(names) if f"enc.{name}_block0.qkv.weight" in tensors],
    }


def _taps(tensors: Tensors) -> list[float] | None:
    """Returns the resampling filter of unit sum, from any of the buffers that hold its outer product."""
    for key, value in tensors.items():
        if key.endswith("resample_filter") and value.ndim == 4:
            taps = value[0, 0].double().sum(0)
            return (taps / taps.sum()).tolist()
    return None


def _count(tensors: Tensors, name: str) -> int:
    """Returns one more than the largest index below `name`."""
    found = [int(match[1]) for key in tensors if (match := re.match(rf"{name}\.(\d{{1,4}})\.", key))]
    if not found:
        raise InputError(f"There are no tensors '{name}.<i>...': the file is not the whole network.")
    return 1 + max(found)


def _any(tensors: Tensors, pattern: str) -> bool:
    return any(re.match(pattern, key) for key in tensors)


def _first(num: int, test: Callable[[int], bool]) -> int | None:
    return next((i for i in range(num) if test(i)), None)
