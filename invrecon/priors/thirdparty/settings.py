"""What an original program's settings state of a network, one at a time: understood, or named."""

from __future__ import annotations

import math
from typing import Any

from invrecon.errors import InputError


def positive(stated: dict[str, Any], key: str) -> int | None:
    """Returns a positive integer that settings state, as a number or as text; None if they do not.

    Raises:
        InputError: If they state something else.
    """
    value = stated.get(key)
    unset = key.startswith("num_head") and value in (-1, "-1")  # guided diffusion's word for it
    if value is None or unset:
        return None
    try:
        number = 0 if isinstance(value, bool) else int(value)
        if number < 1 or number != float(value):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"Its settings say {key} = {value}, expected a positive integer.") from None
    return number


def flag(stated: dict[str, Any], key: str) -> bool:
    """Returns whether settings state something to be so, as JSON or as text; not, if they do not state it.

    Raises:
        InputError: If they state something else.
    """
    value = stated.get(key)
    known = {"none": False, "false": False, "true": True}
    if str(value).lower() not in known:
        raise InputError(f"Its settings say {key} = {value}, expected true or false.")
    return known[str(value).lower()]


def number(stated: dict[str, Any], key: str, default: float) -> float:
    """Returns a positive number that settings state.

    Raises:
        InputError: If they state something else.
    """
    value = stated.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(f"Its settings say {key} = {value}, expected a positive number.")
    return float(value)


def taps(stated: dict[str, Any]) -> list[float] | None:
    """Returns the resampling filter that settings state; None if they do not.

    Raises:
        InputError: If they state something else.
    """
    found = stated.get("resample_filter")
    if found is None:
        return None
    numbers = isinstance(found, list | tuple) and all(isinstance(tap, int | float) for tap in found)
    if not numbers or not math.isfinite(sum(found)) or not sum(found):
        raise InputError(f"Its settings say resample_filter = {found}, expected a list of numbers, as [1, 1].")
    return [float(tap) for tap in found]


def compare(network: dict[str, Any], stated: dict[str, Any]) -> None:
    """Refuses settings that the tensors contradict.

    Raises:
        InputError: If a setting differs from what the tensors show.
    """
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
