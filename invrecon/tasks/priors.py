"""Which prior a reconstruction has: the first of those named that was trained at the noise levels of its method."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from invrecon.errors import InputError
from invrecon.methods.base import Method
from invrecon.priors.weights import SUFFIX, PriorCard, read_card
from invrecon.shared import find_shared

SLACK = 1.01  # of a highest level, which a file may hold rounded


def highest_level(method: Method) -> float:
    """Returns the highest noise level of a method's schedule, 0 without one."""
    schedule = getattr(method, "schedule", None)
    return 0.0 if schedule is None else max(schedule.sigmas)


def covers(card: PriorCard, method: Method) -> bool:
    """Says whether a prior was trained up to the highest noise level of a method."""
    return highest_level(method) <= SLACK * card.sigma_range[1]


def choose_prior(names: str | Sequence[str] | None, method: Method) -> Path | None:
    """Returns the file of the first prior named that covers the levels of a method, of the last one if none does.

    Args:
        names: A prior file or the bare name of a shipped one, or several: the best at low levels first.
        method: What it is for.

    Returns:
        The file, or None where no prior is named.

    Raises:
        InputError: If the list is empty, or a prior is missing or no prior.
    """
    if names is None:
        return None
    paths = [find_shared(name, "checkpoints", SUFFIX) for name in ([names] if isinstance(names, str) else names)]
    if not paths:
        raise InputError(
            "model.prior is an empty list: name a prior, or several of which the first that fits is taken."
        )
    cards = {path: read_card(path) for path in paths} if len(paths) > 1 else {}
    return next((path for path, card in cards.items() if covers(card, method)), paths[-1])


def warn_of_levels(card: PriorCard, method: Method) -> None:
    """Warns where a method begins at a noise level at which its prior was never trained."""
    if not covers(card, method):
        warnings.warn(
            f"{type(method).__name__} begins at a noise level of {highest_level(method):g}, and its prior was trained "
            f"up to {card.sigma_range[1]:g}: above, its denoiser guesses. Take a prior of all levels (--model.prior "
            "patch_ct, whole_ct or patch_mri), or lower the first level (--model.method.sigma_max).",
            stacklevel=4,
        )
