"""From someone's weights to a prior file of ours: find the network, read its architecture, say what was assumed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invrecon.data.intensity import HOUNSFIELD, MAGNITUDE, RGB
from invrecon.errors import InputError
from invrecon.files import atomic_write, sha256
from invrecon.priors.thirdparty import infer, settings
from invrecon.priors.thirdparty.channels import Channels
from invrecon.priors.thirdparty.denoiser import FAMILIES, build_denoiser
from invrecon.priors.thirdparty.labels import fold_labels
from invrecon.priors.thirdparty.locate import locate
from invrecon.priors.thirdparty.options import Options, as_option, require_applicable
from invrecon.priors.thirdparty.preconditioning import MAX_STEPS, PRECONDITIONINGS, Discrete
from invrecon.priors.thirdparty.sources import Source, read_settings, read_source
from invrecon.priors.weights import SUFFIX, PriorCard, build_prior, save_prior

# Tensors that evaluation does not use: augmentation labels, and filters that the architecture holds.
UNUSED = re.compile(r"map_augment\.weight|(.*\.)?resample_filter")
# How EDM's classes precondition, by name.
PRECONDITIONERS = {"iDDPMPrecond": "eps", "VPPrecond": "vp", "VEPrecond": "ve", "EDMPrecond": "edm"}
# Those of the data that priors are used on.
INTENSITIES = {"CT": HOUNSFIELD, "MRI": MAGNITUDE, "RGB": RGB}
UNKNOWN_INTENSITY = {"offset": 0.0, "scale": 1.0, "units": "unknown"}


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
    if output.exists() and output.samefile(path):
        raise InputError(f"--output is '{output}', which is the file that is imported: give another name.")
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
    state = {f"network.{key}": value for key, value in tensors.items() if not UNUSED.fullmatch(key)}
    frame = framing(network, stated, options, notes)
    denoiser = prediction(network, stated, options, notes)
    require_applicable(options, network, denoiser["prediction"])
    colour = network["image_channels"] == 3  # published networks of photographs see them from -1 to 1
    low, high = denoiser["data_range"] = list(options.data_range or ((-1.0, 1.0) if colour else (0.0, 1.0)))
    if options.data_range is None:
        notes.append(
            f"Assumed: images of the network's own intensity, {low:g} to {high:g}, as most networks of "
            f"{'colour' if colour else 'grey or complex'} images (else --data-range, as {'0 1' if colour else '-1 1'})."
        )
    intensity = options.intensity or (asdict(RGB) if colour else dict(UNKNOWN_INTENSITY))
    if options.intensity is None:
        what = "the intensity of RGB images" if colour else "nothing on the physical intensity of 0 and 1"
        known = ", ".join(f"{as_option(scale)} for {name}" for name, scale in INTENSITIES.items())
        notes.append(f"Assumed: {what} (else {known}).")
    denoiser["position_scale"] = frame.pop("position_scale")
    sigma_data = denoiser.pop("sigma_data", 0.5) / (high - low)
    state["sigma_data"] = torch.tensor(sigma_data)
    check(network, denoiser, state)
    state = {key: value.float().contiguous() for key, value in state.items()}  # now that all are known to be wanted
    built = PRECONDITIONINGS[denoiser["prediction"]](**denoiser["settings"])
    first, last = (float(edge) / (high - low) for edge in built.sigma_range)  # type: ignore[misc, union-attr]
    card = PriorCard(
        network=network,
        denoiser=denoiser,
        sigma_data=sigma_data,
        sigma_range=(first, last),
        intensity=intensity,
        data=options.data,
        licence=options.licence,
        training={"num_parameters": sum(v.numel() for k, v in state.items() if k != "sigma_data")},
        **frame,
    )
    return state, card, notes


def architecture(
    tensors: dict[str, Tensor], stated: dict[str, Any], options: Options, notes: list[str]
) -> dict[str, Any]:
    """Returns the network's constructor arguments, and `family`."""
    heads = infer.Heads(options.head_channels, options.num_heads, options.new_attention_order)
    if options.head_channels is None and options.num_heads is None:
        heads.head_channels = settings.positive(stated, "num_head_channels")
        heads.num_heads = settings.positive(stated, "num_heads")
    heads.new_order = heads.new_order or settings.flag(stated, "use_new_attention_order")
    upsampling = settings.positive(stated, "num_heads_upsample")
    if upsampling not in (None, heads.num_heads) and heads.head_channels is None:
        raise InputError("Its decoder has another number of heads than its encoder, which cannot be imported.")
    taps = settings.taps(stated)
    channels = Channels(options.image_channels, options.padding is not None)
    if "time_embed.0.weight" in tensors:
        network = infer.guided_diffusion(tensors, heads, channels)
        require_heads(network, heads)
        order = "all queries, keys, values" if heads.new_order else "a query, key and value per head"
        notes.append(f"Attention order: {order} (--new-attention-order or not; the shapes are the same).")
    else:
        read: Callable[..., dict[str, Any]] = infer.dhariwal if "out_conv.weight" in tensors else infer.song
        network = read(tensors, heads, taps, channels)
        if taps is None and not any(key.endswith("resample_filter") for key in tensors):
            own = network["taps"]
            notes.append(f"Assumed: the resampling filter {own}, of which the file has no buffers (else --settings).")
    if heads.head_channels is None and heads.num_heads is None:
        size = network["head_channels"]
        what = "one attention head" if size is None else f"attention heads of {size} channels"
        notes.append(f"Assumed: {what} (else --head-channels or --num-heads).")
    settings.compare(network, stated)
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


def framing(network: dict[str, Any], stated: dict[str, Any], options: Options, notes: list[str]) -> dict[str, Any]:
    r"""Returns kind, image size, patch sizes and the scale of positions.

    PaDIS's positions are $2 i/(R-1) - 1$ in the padded frame of `R = N + 2 M` pixels, ours $(2 i + 1)/N - 1$ in the
    image of `N`: the same point has $p_{PaDIS} = N/(R-1)\,p$.
    """
    resolution, positions = network.get("resolution"), network["position_channels"] > 0
    size = options.image_size or settings.positive(stated, "image_size")
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
    if settings.flag(stated, "predict_xstart"):
        default = "x0"
    kind = options.prediction or (PRECONDITIONERS[cls] if cls else default)
    if options.prediction is None and cls is None:
        notes.append(f"Assumed: --prediction {default}.")
    own: dict[str, Any] = {}
    result: dict[str, Any] = {"prediction": kind, "settings": own}
    if kind == "edm":
        own["sigma_data"] = result["sigma_data"] = options.sigma_data or settings.number(stated, "sigma_data", 0.5)
    elif kind == "vp":
        own |= {key: settings.number(stated, key, 1.0) for key in ("beta_d", "beta_min") if key in stated}
        own["num_steps"] = num_steps(stated, options)
    elif issubclass(PRECONDITIONINGS[kind], Discrete):
        iddpm = cls == "iDDPMPrecond"
        schedule = options.schedule or stated.get("noise_schedule") or ("cosine" if iddpm else "linear")
        if schedule not in ("linear", "cosine"):
            raise InputError(f"Its settings say noise_schedule = {schedule}, expected linear or cosine.")
        steps = num_steps(stated, options)
        own |= {
            "schedule": schedule,
            "num_steps": steps,
            "nearest": options.nearest_timestep or iddpm,
            "rescale": options.rescale_timesteps or settings.flag(stated, "rescale_timesteps"),
        }
        notes.append(f"Schedule: {schedule}, {steps} steps (--schedule, --num-steps; the tensors do not say).")
    if options.sigma_data is not None:
        result["sigma_data"] = options.sigma_data
    return result


def num_steps(stated: dict[str, Any], options: Options) -> int:
    """Returns the steps of a discrete diffusion, from an option, the settings, or the published networks'."""
    key = "diffusion_steps" if "diffusion_steps" in stated else "M"
    steps = options.num_steps or settings.positive(stated, key) or 1000
    if not 2 <= steps <= MAX_STEPS:
        what = "--num-steps is" if options.num_steps else f"Its settings say {key} ="
        raise InputError(
            f"{what} {steps}, expected 2 to {MAX_STEPS}, the steps of the diffusion that it was trained on."
        )
    return steps


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
