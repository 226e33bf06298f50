"""Which prior a reconstruction has: the first of those named that was trained at the noise levels of its method."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from invrecon.errors import InputError
from invrecon.priors.weights import SUFFIX, PriorCard, read_card
from invrecon.shared import find_shared

SLACK = 1.01  # of a highest level, which a file may hold rounded
EXPORTED = "prior"  # what `invrecon fit` calls its file


def covers(card: PriorCard, level: float) -> bool:
    """Says whether a prior was trained up to a noise level."""
    return level <= SLACK * card.sigma_range[1]


def choose_prior(names: str | Sequence[str] | None, level: float) -> Path | None:
    """Returns the file of the first prior named that was trained up to a level, or else of the one trained highest.

    Args:
        names: A prior file or the bare name of a shipped one, or several: the best at low levels first.
        level: The highest noise level that the prior will be asked about (`Method.highest_level`).

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
    if len(paths) == 1:  # read when it is loaded
        return paths[0]
    cards = {path: read_card(path) for path in paths}
    highest = max(cards, key=lambda path: cards[path].sigma_range[1])
    return next((path for path, card in cards.items() if covers(card, level)), highest)


def name_prior(path: Path) -> str:
    """Returns the name of a prior file: its own, after its folder's if `invrecon fit` named it as it names all."""
    return f"{path.resolve().parent.name}/{path.stem}" if path.stem == EXPORTED else path.stem


def warn_of_levels(card: PriorCard, name: str, level: float, who: str) -> None:
    """Warns where a prior will be asked about a noise level at which it was never trained.

    Args:
        card: The prior's.
        name: Its name.
        level: The highest level.
        who: What asks.
    """
    if not covers(card, level):
        warnings.warn(
            f"{who} begins at a noise level of {level:g}, and its prior, {name}, was trained up to "
            f"{card.sigma_range[1]:g}: above, its denoiser guesses. Take a prior of all levels (--model.prior "
            "patch_ct, whole_ct or patch_mri), or lower the first level (--model.method.sigma_max).",
            stacklevel=4,
        )
