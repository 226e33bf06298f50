"""Settings that `benchmarks.tune` has found on validation slices, by problem and row."""

from __future__ import annotations

from pathlib import Path

import yaml

from benchmarks._methods import changed_arguments
from invrecon.methods import Method

FOLDER = Path(__file__).parent / "tuned"
TRIALS, SLICES = 8, (8, 20)  # of every row; of the validation volume


def tuned_path(setting: str, row: str, folder: Path | None = None) -> Path:
    """Returns where a row's tuned settings are kept."""
    return (folder or FOLDER) / setting / f"{row}.yaml"


def tune(method: Method, setting: str, row: str, folder: Path | None = None) -> Method:
    """Returns the method with what was found for a row in a setting; as it is where nothing was searched."""
    path = tuned_path(setting, row, folder)
    if not path.is_file():
        return method
    node = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["init_args"]["method"]
    kind = type(method)
    return kind(**(changed_arguments(method) | node["init_args"]))
