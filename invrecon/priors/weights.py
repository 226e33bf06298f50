"""Prior files: safetensors that describe themselves. Loading one never executes code.

The header's `invrecon` entry is a JSON object that holds what is needed to use the weights: kind of prior, network
architecture, sigma_data, sigma range, patch sizes, intensity scale and units, training data and licence.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invrecon.errors import InputError
from invrecon.priors.base import Prior
from invrecon.priors.edm import EDMDenoiser
from invrecon.priors.patch import PatchPrior, WholePrior
from invrecon.priors.unet import UNet
from invrecon.shared import find_shared

FORMAT = 1
SUFFIX = ".safetensors"
WEIGHT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class PriorCard:
    """What a prior file says of itself.

    Args:
        kind: `patch` or `whole`.
        network: Constructor arguments of `UNet`, or of an imported network and its `family`.
        sigma_data: Standard deviation of the training data, intensity units.
        sigma_range: Smallest and largest trained noise level.
        image_size: Side of the training images in pixels: the frame that positions refer to.
        patch_sizes: Trained patch sides, largest first; empty for a whole-image prior.
        intensity: Offset, scale and units of the intensity, `x = clip((value - offset) / scale, 0, 1)`.
        data: Names of the training files.
        licence: Licence of the weights and their data.
        training: Counts and settings of the training run (steps, patches, pixels, command, figures).
        format: Version of this layout.
        denoiser: How an imported network becomes a denoiser: what it predicts, its data range, its positions. Empty
            for EDM preconditioning in intensity units.
    """

    kind: str
    network: dict[str, Any]
    sigma_data: float
    sigma_range: tuple[float, float]
    image_size: int
    patch_sizes: list[int]
    intensity: dict[str, Any]
    data: list[str] = field(default_factory=list)
    licence: str = "not stated"
    training: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT
    denoiser: dict[str, Any] = field(default_factory=dict)


def build_prior(card: PriorCard) -> Prior:
    """Returns an untrained prior of the card's architecture and kind."""
    denoiser = _build_denoiser(card)
    return PatchPrior(denoiser, card.patch_sizes[0]) if card.kind == "patch" else WholePrior(denoiser)


def _build_denoiser(card: PriorCard) -> EDMDenoiser:
    if "family" not in card.network:
        return EDMDenoiser(UNet(**card.network), card.sigma_data)
    from invrecon.priors.thirdparty.denoiser import build_denoiser

    return build_denoiser(card.network, card.denoiser, card.sigma_data)


def save_prior(path: str | Path, state: dict[str, Tensor], card: PriorCard, half: bool = False) -> None:
    """Writes a prior file whole or not at all.

    Args:
        path: Where, ending in `.safetensors`.
        state: State dict of the `EDMDenoiser`.
        card: What the file says of itself.
        half: Whether to store weights as float16, half as large; they are float32 again when loaded. Each is off by
            at most 5e-4 of itself, or 3e-8: an eighth of what bfloat16 rounds it to when the network runs in that.

    Raises:
        InputError: A weight is too large for float16.
    """
    from safetensors.torch import save

    from invrecon.files import atomic_write

    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    if half:
        weights = {key for key, value in tensors.items() if value.ndim and value.is_floating_point()}
        tensors = {key: value.half() if key in weights else value for key, value in tensors.items()}
        if large := [key for key, value in tensors.items() if not torch.isfinite(value).all()]:
            raise InputError(f"The weights of '{large[0]}' are too large for float16: set model.half_weights to false.")
    payload = save(tensors, metadata={"invrecon": json.dumps(asdict(card))})
    with atomic_write(Path(path)) as file:
        file.write(payload)


def read_card(path: str | Path) -> PriorCard:
    """Returns a prior file's card without reading its weights.

    Raises:
        InputError: If the file is missing, is a pickle, is truncated, or is not a prior of ours.
    """
    return _open(find_shared(path, "checkpoints", SUFFIX), weights=False)[0]


def load_prior(path: str | Path) -> tuple[Prior, PriorCard]:
    """Returns the prior of a file, or of that name among the shipped ones, in evaluation mode, frozen, and its card.

    Raises:
        InputError: If the file is missing, is a pickle, is truncated, is not a prior of ours, or its tensors do not
            fit the architecture that it states.
    """
    path = find_shared(path, "checkpoints", SUFFIX)
    card, tensors = _open(path, weights=True)
    expected = _expected_shapes(path, card, len(tensors))
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    for key in sorted(expected.keys() | found.keys()):
        if expected.get(key) != found.get(key):
            raise InputError(
                f"The weights in '{path}' are of another architecture than the file states: tensor '{key}' should be "
                f"{expected.get(key, 'absent')} and is {found.get(key, 'absent')}; export the prior again with "
                "`invrecon fit`."
            )
    for key, value in tensors.items():
        if value.dtype not in WEIGHT_TYPES:
            raise InputError(
                f"Tensor '{key}' in '{path}' is of type {str(value.dtype).removeprefix('torch.')}; expected one of "
                f"{', '.join(str(kind).removeprefix('torch.') for kind in WEIGHT_TYPES)}: export the prior again with "
                "`invrecon fit`."
            )
    if not all(torch.isfinite(value).all() for value in tensors.values()):
        raise InputError(f"The weights in '{path}' hold NaN or Inf; use an earlier checkpoint of the training run.")
    if not tensors["sigma_data"] > 0:
        raise InputError(f"The sigma_data in '{path}' is {float(tensors['sigma_data'])}, expected a positive number.")
    prior = build_prior(card)
    prior.denoiser.load_state_dict(tensors)  # type: ignore[union-attr, operator]
    prior.denoiser.to(memory_format=torch.channels_last)  # type: ignore[union-attr, call-overload]
    return prior.eval().requires_grad_(False), card


def _expected_shapes(path: Path, card: PriorCard, num_tensors: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the tensors that the card's architecture has, without allocating any of them."""
    try:
        network = card.network
        if len(network.get("multipliers", ())) * network.get("num_blocks", 1) > num_tensors:
            raise ValueError("it states more blocks than there are tensors")
        with torch.device("meta"):
            state = build_prior(card).denoiser.state_dict()  # type: ignore[union-attr, operator]
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"The architecture that '{path}' states cannot be built ({reason}): {card.network} with "
            f"patch sizes {card.patch_sizes}; export the prior again with `invrecon fit`."
        ) from None
    return {key: tuple(value.shape) for key, value in state.items()}


def file_hash(path: str | Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no file_digest
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _open(path: Path, *, weights: bool) -> tuple[PriorCard, dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputError(f"There is no weights file '{path}'; give a path, or the bare name of a shipped prior.")
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError as error:
        raise InputError(f"'{path}' cannot be read: {error.strerror}; check its permissions.") from None
    # A safetensors file starts with eight bytes of length, which may be anything, and then the header's brace.
    if head[8:] != b"{" and (head[:1] == b"\x80" or head[:2] == b"PK"):
        raise InputError(
            f"'{path}' is a pickle, which can execute code when it is loaded; expected a {SUFFIX} prior file. "
            "Train one with `invrecon fit`, whose last step exports it."
        )
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("invrecon")
            tensors = {key: file.get_tensor(key) for key in file.keys()} if weights else {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(
            f"'{path}' cannot be read as a safetensors file ({error}): it is truncated or of another format; "
            "copy or export it again."
        ) from None
    if header is None:
        raise InputError(
            f"'{path}' holds tensors but no description of a prior (header entry 'invrecon'); expected a file "
            "exported by `invrecon fit`."
        )
    try:
        fields = json.loads(header)
        if fields["format"] > FORMAT:
            raise InputError(f"'{path}' has format {fields['format']}; this version reads up to {FORMAT}: upgrade.")
        card = PriorCard(**fields)
        card.sigma_range = (float(card.sigma_range[0]), float(card.sigma_range[1]))
        if card.kind not in ("patch", "whole") or (card.kind == "patch" and not card.patch_sizes):
            raise ValueError(f"kind '{card.kind}' with patch sizes {card.patch_sizes}")
        offset, scale, units = (card.intensity[key] for key in ("offset", "scale", "units"))
        if not (isinstance(offset, int | float) and isinstance(scale, int | float) and isinstance(units, str)):
            raise TypeError(f"intensity {card.intensity}")
    except (TypeError, LookupError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"The description in '{path}' cannot be used ({error}); export the prior again.") from None
    return card, tensors
