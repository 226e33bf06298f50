"""Settings that `benchmarks.tune` has found on validation slices, by problem and row."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from benchmarks._methods import changed_arguments
from invrecon.errors import InputError
from invrecon.methods import Method

FOLDER = Path(__file__).parent / "tuned"
TRIALS, SLICES = 8, (8, 20)  # of every row; of the validation volume


def tuned_path(setting: str, row: str, folder: Path | None = None) -> Path:
    """Returns where a row's tuned settings are kept."""
    return (folder or FOLDER) / setting / f"{row}.yaml"


@cache
def read_tuned(path: Path) -> dict[str, Any]:
    """Returns the settings in a tuned.yaml, none where there is no such file.

    Raises:
        InputError: It is none that `invrecon tune` has written.
    """
    if not path.is_file():
        return {}
    try:
        method = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["init_args"]["method"]
        return dict(method["init_args"])
    except (yaml.YAMLError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"'{path}' is no tuned.yaml of `invrecon tune` ({error}): run benchmarks.tune again."
        ) from None


def with_tuned(method: Method, setting: str, row: str) -> Method:
    """Returns the method with what was found for a row in a setting; as it is where nothing was searched."""
    found = read_tuned(tuned_path(setting, row))
    return type(method)(**(changed_arguments(method) | found)) if found else method
