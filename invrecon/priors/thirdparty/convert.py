"""From someone's weights to a prior file of ours: find the network, read its architecture, say what was assumed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invrecon.errors import InputError
from invrecon.files import atomic_write, sha256
from invrecon.priors.thirdparty import infer
from invrecon.priors.thirdparty.denoiser import FAMILIES, build_denoiser
from invrecon.priors.thirdparty.labels import fold_labels
from invrecon.priors.thirdparty.preconditioning import PRECONDITIONINGS, Discrete
from invrecon.priors.thirdparty.sources import Source, read_settings, read_source
from invrecon.priors.weights import SUFFIX, PriorCard, build_prior, save_prior

# A tensor that each family has, and no other.
SIGNATURES = {"input_blocks.0.0.weight": "time_embed.0.weight", "map_layer0.weight": "map_layer1.weight"}
# Tensors that evaluation does not use: augmentation labels, and filters that the architecture holds.
UNUSED = re.compile(r"map_augment\.weight|(.*\.)?resample_filter")
# How EDM's classes precondition, by name.
PRECONDITIONERS = {"iDDPMPrecond": "eps", "VPPrecond": "vp", "VEPrecond": "ve", "EDMPrecond": "edm"}
UNKNOWN_INTENSITY = {"offset": 0.0, "scale": 1.0, "units": "unknown"}


@dataclass
class Options:
    """What the tensors do not say; None is not stated. `command` documents each."""

    key: str | None = None
    settings: Path | None = None
    image_size: int | None = None
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


def import_weights(path: Path, output: Path, options: Options, command: str = "") -> tuple[PriorCard, list[str]]:
    """Converts a file and writes the prior, and its card in Markdown beside it.

    Args:
        path: Safetensors, a state dict saved by torch, or a network snapshot of EDM.
        output: Where to, ending in `.safetensors`.
        options: What the tensors do not say.
        command: What the user typed, for the card.

    Returns:
        The card, and what was found and assumed, a sentence each.

    Raises:
        InputError: If the file cannot be read without executing it, or is no network of a known family.
    """
    if output.suffix != SUFFIX:
        raise InputError(f"--output is '{output}', expected a name that ends in {SUFFIX}.")
    source = read_source(path)
    try:
        state, card, notes = convert(source, options)
        evaluate(state, card)
    except InputError as error:
        raise InputError(f"'{path}' was not imported. {error}") from None
    card.training |= {"source": path.name, "source_sha256": sha256(path), "command": command}
    save_prior(output, state, card)
    with atomic_write(output.with_suffix(".md")) as file:
        file.write(describe(card, notes, output.stem).encode())
    return card, notes


def convert(source: Source, options: Options) -> tuple[dict[str, Tensor], PriorCard, list[str]]:
    """Returns a denoiser's state dict, its card, and what was found and assumed.

    Raises:
        InputError: If no network of a known family is found, or something has to be stated.
    """
    notes: list[str] = []
    tensors, stated = locate(source, options, notes)
    if options.settings is not None:
        stated |= read_settings(options.settings)
    network = architecture(tensors, stated, options, notes)
    tensors = fold_labels(tensors, options.label, notes)
    if any(key.startswith("map_augment.") for key in tensors):
        notes.append("Augmentation labels are left out, as in the original's evaluation.")
    state = {
        f"network.{key}": value.float().contiguous() for key, value in tensors.items() if not UNUSED.fullmatch(key)
    }
    frame = framing(network, stated, options, notes)
    denoiser = prediction(network, stated, options, notes)
    colour = network["image_channels"] == 3  # published networks of photographs see them from -1 to 1
    low, high = denoiser["data_range"] = list(options.data_range or ((-1.0, 1.0) if colour else (0.0, 1.0)))
    if options.data_range is None:
        notes.append(
            f"Assumed: images of the network's own intensity, {low:g} to {high:g}, as most networks of "
            f"{'colour' if colour else 'grey or complex'} images (else --data-range, as {'0 1' if colour else '-1 1'})."
        )
    if options.intensity is None:
        notes.append("Assumed: nothing on the physical intensity of 0 and 1 (--intensity -1000 3000 HU for CT).")
    denoiser["position_scale"] = frame.pop("position_scale")
    sigma_data = denoiser.pop("sigma_data", 0.5) / (high - low)
    state["sigma_data"] = torch.tensor(sigma_data)
    check(network, denoiser, state)
    built = PRECONDITIONINGS[denoiser["prediction"]](**denoiser["settings"])
    first, last = (float(edge) / (high - low) for edge in built.sigma_range)  # type: ignore[misc, union-attr]
    card = PriorCard(
        network=network,
        denoiser=denoiser,
        sigma_data=sigma_data,
        sigma_range=(first, last),
        intensity=options.intensity or dict(UNKNOWN_INTENSITY),
        data=options.data,
        licence=options.licence,
        training={"num_parameters": sum(v.numel() for k, v in state.items() if k != "sigma_data")},
        **frame,
    )
    return state, card, notes


def locate(source: Source, options: Options, notes: list[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors of the one network that a file is about, without their prefix, and what it says of them."""
    prefixes = {
        key[: -len(end)]
        for end, other in SIGNATURES.items()
        for key in source.tensors
        if key.endswith(end) and key[: -len(end)] + other in source.tensors
    }
    prefixes = {prefix for prefix in prefixes if prefix in ("",) or prefix.endswith(".")}
    if not prefixes:
        raise InputError(
            "Its tensors are of no known family, expected a U-Net of guided diffusion ('input_blocks.0.0.weight', "
            "'time_embed.0.weight') or EDM's SongUNet or DhariwalUNet ('map_layer0.weight'); it begins with "
            f"'{min(source.tensors)}'."
        )
    wanted = {p for p in prefixes if options.key is None or f"{p}.".startswith(f"{options.key.rstrip('.')}.")}
    if options.key is None and len(prefixes) > 1:
        averaged = {p for p in prefixes if re.search(r"(^|[._])ema", p)}
        wanted = averaged or prefixes
        if len(wanted) == 1:
            notes.append(f"Of {len(prefixes)} networks in the file, the averaged one '{min(wanted)}' is taken.")
    if len(wanted) != 1:
        names = ", ".join(f"'{p.removesuffix('.')}'" for p in sorted(prefixes))
        raise InputError(f"It holds {len(prefixes)} networks, {names}: choose one by --key.")
    (prefix,) = wanted
    others = tuple(p for p in prefixes if p != prefix and p.startswith(prefix))
    tensors = {
        key.removeprefix(prefix): value
        for key, value in source.tensors.items()
        if key.startswith(prefix) and not (others and key.startswith(others))
    }
    for key, value in tensors.items():
        if not value.numel():
            raise InputError(f"The tensor '{key}' of shape {tuple(value.shape)} is empty; take another checkpoint.")
        if not value.is_floating_point():
            raise InputError(f"The tensor '{key}' holds {value.dtype}, expected floating-point numbers.")
        if not torch.isfinite(value).all():
            raise InputError(f"The tensor '{key}' holds NaN or Inf; take another checkpoint.")
    stated = dict(source.settings.get(prefix, {}))
    table = source.tensors.get(prefix.removesuffix("model.") + "u")
    if prefix.endswith("model.") and table is not None and table.ndim == 1 and "class_name" not in stated:
        stated |= {"class_name": "iDDPMPrecond", "M": len(table) - 1}
    return tensors, stated


def architecture(
    tensors: dict[str, Tensor], stated: dict[str, Any], options: Options, notes: list[str]
) -> dict[str, Any]:
    """Returns the network's constructor arguments, and `family`."""
    heads = infer.Heads(options.head_channels, options.num_heads, options.new_attention_order)
    if options.head_channels is None and options.num_heads is None:
        heads.head_channels = _positive(stated.get("num_head_channels"))
        heads.num_heads = _positive(stated.get("num_heads"))
    heads.new_order = heads.new_order or stated.get("use_new_attention_order") is True
    upsampling = _positive(stated.get("num_heads_upsample"))
    if upsampling not in (None, heads.num_heads) and heads.head_channels is None:
        raise InputError("Its decoder has another number of heads than its encoder, which cannot be imported.")
    taps = _taps(stated)
    if "time_embed.0.weight" in tensors:
        network = infer.guided_diffusion(tensors, heads)
        require_heads(network, heads)
        order = "all queries, keys, values" if heads.new_order else "a query, key and value per head"
        notes.append(f"Attention order: {order} (--new-attention-order or not; the shapes are the same).")
    else:
        read: Callable[..., dict[str, Any]] = infer.dhariwal if "out_conv.weight" in tensors else infer.song
        network = read(tensors, heads, taps)
        if taps is None and not any(key.endswith("resample_filter") for key in tensors):
            own = network["taps"]
            notes.append(f"Assumed: the resampling filter {own}, of which the file has no buffers (else --settings).")
    if heads.head_channels is None and heads.num_heads is None:
        size = network["head_channels"]
        what = "one attention head" if size is None else f"attention heads of {size} channels"
        notes.append(f"Assumed: {what} (else --head-channels or --num-heads).")
    _compare(network, stated)
    found = {key: value for key, value in network.items() if key != "family"}
    notes.insert(0, f"Found: {network['family']}, " + ", ".join(f"{key} {value}" for key, value in found.items()) + ".")
    return network


def require_heads(network: dict[str, Any], heads: infer.Heads) -> None:
    """Refuses a network of guided diffusion whose heads are not stated, nor known of a published one of its shape."""
    shape = (network["base_channels"], tuple(network["multipliers"]))
    known = network["resample"] == "block" and shape in infer.HEADS_OF_64
    if heads.head_channels is None and heads.num_heads is None and not known:
        raise InputError(
            "No shape tells how many heads its attention layers have, and with another number the network is another "
            "one: state --head-channels or --num-heads, or give the original program's arguments with --settings."
        )


def _positive(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _number(stated: dict[str, Any], key: str, default: float) -> float:
    """Returns a positive number that settings state."""
    value = stated.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(f"Its settings say {key} = {value}, expected a positive number.")
    return float(value)


def _taps(stated: dict[str, Any]) -> list[float] | None:
    """Returns the resampling filter that settings state."""
    taps = stated.get("resample_filter")
    if taps is None:
        return None
    numbers = isinstance(taps, list | tuple) and all(isinstance(tap, int | float) for tap in taps)
    if not numbers or not math.isfinite(sum(taps)) or not sum(taps):
        raise InputError(f"Its settings say resample_filter = {taps}, expected a list of numbers, as [1, 1].")
    return [float(tap) for tap in taps]


def _compare(network: dict[str, Any], stated: dict[str, Any]) -> None:
    """Refuses settings that the tensors contradict."""
    facts = {
        "model_channels": network["base_channels"],
        "channel_mult": network["multipliers"],
        "num_res_blocks": network["num_blocks"],
        "num_blocks": network["num_blocks"],
        "img_resolution": network.get("resolution"),
        "embedding_type": network.get("embedding"),
        "encoder_type": network.get("encoder"),
        "decoder_type": network.get("decoder"),
        "use_scale_shift_norm": network.get("scale_shift"),
        "resblock_updown": network.get("resample") == "block",
    }
    single = len(network["multipliers"]) == 1  # what happens between levels cannot be seen in a network of one
    for key, found in facts.items():
        value = stated.get(key, found)
        value = list(value) if isinstance(value, tuple) else value
        skipped = key in ("encoder_type", "decoder_type", "resblock_updown") and single
        if found is not None and type(value) is type(found) and value != found and not skipped:
            raise InputError(f"Its settings say {key} = {value}, its tensors {found}: give the settings of this file.")


def framing(network: dict[str, Any], stated: dict[str, Any], options: Options, notes: list[str]) -> dict[str, Any]:
    r"""Returns kind, image size, patch sizes and the scale of positions.

    PaDIS's positions are $2 i/(R-1) - 1$ in the padded frame of `R = N + 2 M` pixels, ours $(2 i + 1)/N - 1$ in the
    image of `N`: the same point has $p_{PaDIS} = N/(R-1)\,p$.
    """
    resolution, positions = network.get("resolution"), network["position_channels"] > 0
    size = options.image_size or _positive(stated.get("image_size"))
    missing = []
    if resolution is None and size is None:
        missing.append("--image-size (the side of its training images)")
    if positions and options.padding is None:
        missing.append("--padding (the pixels by which PaDIS padded each side in training, often 64 or 24; or none)")
    if positions and not options.patch_sizes:
        missing.append("--patch-sizes (the sides of its training patches, largest first, as 56 32 16)")
    if missing:
        raise InputError(f"Its tensors do not say everything: give {', and '.join(missing)}.")
    scale = 1.0
    if positions and options.padding != "none":
        frame = resolution if size is None else size + 2 * int(options.padding or 0)
        size = int(frame or 0) - 2 * int(options.padding or 0)
        if size < 1:
            raise InputError(f"--padding {options.padding} leaves nothing of its frame of {frame} pixels.")
        scale = size / (frame - 1)  # type: ignore[operator]
        notes.append(f"Positions are multiplied by {scale:.4f}: a frame of {frame} pixels around {size}.")
    elif positions:
        notes.append("Positions are handed over as they are: 0 at the image's centre, 1 at its edges (--padding none).")
    patch = positions or bool(options.patch_sizes)
    return {
        "kind": "patch" if patch else "whole",
        "image_size": size or resolution,
        "patch_sizes": options.patch_sizes,
        "position_scale": scale,
    }


def prediction(network: dict[str, Any], stated: dict[str, Any], options: Options, notes: list[str]) -> dict[str, Any]:
    """Returns what the network predicts, and the settings of its preconditioning."""
    names = f"{stated.get('class_name', '')} {stated.get('family', '')}"
    cls = next((name for name in PRECONDITIONERS if name in names), None)
    if cls is None and network["family"] == "dhariwal" and network["out_channels"] == 2 * network["image_channels"]:
        cls = "iDDPMPrecond"  # of EDM's classes the only one with a learned variance
        notes.append("Two outputs a channel, a learned variance: preconditioned as EDM's iDDPMPrecond.")
    default = "eps" if network["family"] == "guided-diffusion" else "edm"
    if stated.get("predict_xstart") is True:
        default = "x0"
    kind = options.prediction or (PRECONDITIONERS[cls] if cls else default)
    if options.prediction is None and cls is None:
        notes.append(f"Assumed: --prediction {default}.")
    settings: dict[str, Any] = {}
    result: dict[str, Any] = {"prediction": kind, "settings": settings}
    steps = options.num_steps or _positive(stated.get("diffusion_steps", stated.get("M"))) or 1000
    if kind == "edm":
        settings["sigma_data"] = result["sigma_data"] = options.sigma_data or _number(stated, "sigma_data", 0.5)
    elif kind == "vp":
        settings |= {key: _number(stated, key, 1.0) for key in ("beta_d", "beta_min") if key in stated}
        settings["num_steps"] = steps
    elif issubclass(PRECONDITIONINGS[kind], Discrete):
        iddpm = cls == "iDDPMPrecond"
        schedule = options.schedule or stated.get("noise_schedule") or ("cosine" if iddpm else "linear")
        if schedule not in ("linear", "cosine"):
            raise InputError(f"Its settings say noise_schedule = {schedule}, expected linear or cosine.")
        settings |= {
            "schedule": schedule,
            "num_steps": steps,
            "nearest": options.nearest_timestep or iddpm,
            "rescale": options.rescale_timesteps or stated.get("rescale_timesteps") is True,
        }
        notes.append(f"Schedule: {schedule}, {steps} steps (--schedule, --num-steps; the tensors do not say).")
    if options.sigma_data is not None:
        result["sigma_data"] = options.sigma_data
    return result


def check(network: dict[str, Any], denoiser: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Compares every tensor with the network that was found.

    Raises:
        InputError: If it cannot be built, or any name or shape differs.
    """
    try:
        if len(network["multipliers"]) * network["num_blocks"] > len(state):
            raise ValueError("it has more blocks than tensors")
        with torch.device("meta"):
            expected = build_denoiser(network, denoiser, 0.5).state_dict()
    except (TypeError, ValueError, LookupError, ArithmeticError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"Its network cannot be built ({reason}); look at --head-channels and --num-heads.") from None
    for key in sorted(expected.keys() | state.keys()):
        wanted, found = (tuple(s[key].shape) if key in s else "absent" for s in (expected, state))
        if wanted != found:
            raise InputError(
                f"It is another kind of {FAMILIES[network['family']].__name__} than can be imported: its tensor "
                f"'{key.removeprefix('network.')}' should be {wanted} and is {found}."
            )


@torch.no_grad()
def evaluate(state: dict[str, Tensor], card: PriorCard) -> None:
    """Denoises a small image of zeros once, in the middle of the noise levels.

    Raises:
        InputError: If the result holds NaN or Inf, or patches of the sizes given cannot be denoised.
    """
    prior: Any = build_prior(card)
    prior.denoiser.load_state_dict(state)
    smallest = 2 ** (len(card.network["multipliers"]) - 1)
    if odd := [size for size in card.patch_sizes if size % smallest]:
        raise InputError(f"--patch-sizes names {odd[0]}, expected multiples of {smallest}, of its levels.")
    if sorted(card.patch_sizes, reverse=True) != list(card.patch_sizes):
        raise InputError(f"--patch-sizes is {card.patch_sizes}, expected the largest first.")
    size = max(smallest, 16 - 16 % smallest)
    image = torch.zeros(1, card.network["image_channels"], size, size)
    position = torch.zeros(1, 2, size, size)
    sigma = math.sqrt(card.sigma_range[0] * card.sigma_range[1])
    if not torch.isfinite(prior.denoiser(image, torch.tensor([sigma]), position)).all():
        raise InputError(
            f"As it is preconditioned, it makes NaN or Inf of an image of zeros at level {sigma:.4g}: look at "
            "--prediction, --sigma-data, --data-range and --settings."
        )


def describe(card: PriorCard, notes: list[str], name: str) -> str:
    """Returns the Markdown card of an imported prior."""
    training, intensity = card.training, card.intensity
    kind = f"patches of {card.patch_sizes} pixels" if card.kind == "patch" else "whole images"
    lines = [
        f"# {name}",
        "",
        f"A denoiser `D(x, sigma)` of {card.image_size} x {card.image_size} images, trained elsewhere on {kind} and",
        f"imported from `{training['source']}` (SHA-256 `{training['source_sha256']}`).",
        "",
        "| | |",
        "|---|---|",
        f"| network | {card.network} ({training['num_parameters']:,} parameters) |",
        f"| denoiser | {card.denoiser} |",
        f"| intensity | `x = clip((value - {intensity['offset']:g}) / {intensity['scale']:g}, 0, 1)`, value in "
        f"{intensity['units']} |",
        f"| noise levels | {card.sigma_range[0]:g} to {card.sigma_range[1]:g} |",
        f"| data | {', '.join(card.data) or 'not stated'} |",
        f"| licence | {card.licence} |",
        f"| command | `{training['command']}` |",
        "",
        *(f"- {note}" for note in notes),
        "",
    ]
    return "\n".join(lines)
