"""In which precision a prior's network computes: reduced only where the hardware has the instructions for it."""

from __future__ import annotations

import platform
from functools import cache

import torch

from invrecon.errors import InputError

PRECISIONS = ("auto", "32", "bf16", "16")


def check_precision(precision: str) -> str:
    """Returns a precision as it is.

    Raises:
        InputError: It is none of `PRECISIONS`.
    """
    if precision not in PRECISIONS:
        raise InputError(f"model.precision is '{precision}', expected one of {', '.join(PRECISIONS)}.")
    return precision


def resolve_precision(precision: str, device: torch.device | str) -> str:
    """Returns what `auto` means on a device, `bf16` or `32`; any other precision as it is."""
    if precision != "auto":
        return precision
    return "bf16" if has_bfloat16(torch.device(device).type) else "32"


def reduced_dtype(precision: str, device: torch.device | str) -> torch.dtype | None:
    """Returns the dtype that autocast computes in, None for float32."""
    return {"32": None, "bf16": torch.bfloat16, "16": torch.float16}[resolve_precision(precision, device)]


def training_precision(device_type: str) -> str:
    """Returns the Trainer's precision on a kind of device where none is asked for: `bf16-mixed` or `32-true`."""
    return "bf16-mixed" if has_bfloat16(device_type) else "32-true"


@cache
def has_bfloat16(device_type: str) -> bool:
    """Says whether a kind of device multiplies in bfloat16 by instructions of its own.

    Elsewhere torch emulates it, which is no faster than float32 at best: convolutions of the shipped networks take
    eleven times as long on an x86 processor without AVX-512.
    """
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu":
        return False
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
