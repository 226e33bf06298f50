"""Which network of a file is meant, and whether its tensors are plain numbers."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from invrecon.errors import InputError
from invrecon.priors.thirdparty.options import Options
from invrecon.priors.thirdparty.sources import Source

# A tensor that each family has, and no other.
SIGNATURES = {"input_blocks.0.0.weight": "time_embed.0.weight", "map_layer0.weight": "map_layer1.weight"}
# What weights are stored in; others, as float8, are scaled by numbers that a state dict keeps elsewhere.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
    wanted = prefixes if options.key is None else named(options.key.rstrip("."), prefixes)
    if options.key is None and len(prefixes) > 1:
        averaged = {p for p in prefixes if re.search(r"(^|[._])ema", p)}
        wanted = averaged or prefixes
        if len(wanted) == 1:
            notes.append(f"Of {len(prefixes)} networks in the file, the averaged one '{min(wanted)}' is taken.")
    if len(wanted) != 1:
        raise InputError(f"It holds {len(prefixes)} networks, {listed(prefixes)}: choose one by --key.")
    (prefix,) = wanted
    others = tuple(p for p in prefixes if p != prefix and p.startswith(prefix))
    tensors = {
        key.removeprefix(prefix): value
        for key, value in source.tensors.items()
        if key.startswith(prefix) and not (others and key.startswith(others))
    }
    for key, value in tensors.items():
        require_plain(key, value)
    stated = dict(source.settings.get(prefix, {}))
    table = source.tensors.get(prefix.removesuffix("model.") + "u")
    if prefix.endswith("model.") and table is not None and table.ndim == 1 and "class_name" not in stated:
        stated |= {"class_name": "iDDPMPrecond", "M": len(table) - 1}
    return tensors, stated


def named(key: str, prefixes: set[str]) -> set[str]:
    """Returns the prefix of the one network that `--key` names."""
    wanted = {p for p in prefixes if f"{p}.".startswith(f"{key}.")}
    wanted = wanted & {f"{key}."} or wanted
    if not wanted and prefixes == {""}:
        raise InputError(f"--key is '{key}', but it holds one network, whose tensors have no prefix: leave --key out.")
    if len(wanted) != 1:
        problem = f"names {len(wanted)} networks" if wanted else "names no network"
        raise InputError(f"--key is '{key}', which {problem} of it: give one of {listed(wanted or prefixes)}.")
    return wanted


def listed(prefixes: set[str]) -> str:
    """Returns prefixes as one types them."""
    return ", ".join(f"'{p.removesuffix('.')}'" for p in sorted(prefixes))


def require_plain(key: str, value: Tensor) -> None:
    """Refuses a tensor that holds no finite floating-point numbers of its own.

    Raises:
        InputError: If it is empty, sparse, nested, without data, of another dtype, larger than what the file stores of
            it, or holds NaN or Inf.
    """
    again = "take another checkpoint"
    if value.is_nested or value.layout != torch.strided:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise InputError(f"The tensor '{key}' is {kind}, expected a dense one: {again}, or save it dense.")
    if value.device.type != "cpu":
        raise InputError(f"The tensor '{key}' is on the device '{value.device}', without numbers: {again}.")
    if value.dtype not in DTYPES:
        raise InputError(
            f"The tensor '{key}' holds {value.dtype}, expected floating-point numbers of 16, 32 or 64 bits: {again}."
        )
    if not value.numel():
        raise InputError(f"The tensor '{key}' of shape {tuple(value.shape)} is empty; {again}.")
    # Before anything is computed: a view that repeats its numbers is of any size in a small file.
    stored = value.untyped_storage().nbytes() // value.element_size()
    if value.numel() > stored:
        raise InputError(
            f"The tensor '{key}' of shape {tuple(value.shape)} repeats the {stored} numbers that the file holds of "
            f"it; {again}, or save it after .contiguous()."
        )
    if not torch.isfinite(value.float()).all():
        raise InputError(f"The tensor '{key}' holds NaN or Inf, as float32; {again}.")
