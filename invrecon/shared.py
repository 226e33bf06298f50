"""Where the shipped configs, priors and data are: the repository's folders, or their copies in an installed wheel."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def shared_folder(name: str) -> Path:
    """Returns the folder `configs`, `checkpoints` or `data` that came with this installation."""
    installed = PACKAGE / "_share" / name
    return installed if installed.is_dir() else PACKAGE.parent / name


def find_shared(path: str | Path, folder: str, suffix: str = "") -> Path:
    """Returns `path` if it is a file, else the shipped file of that bare name if there is one, else `path`.

    Args:
        path: What the user wrote.
        folder: `configs`, `checkpoints` or `data`.
        suffix: Ending that may be left out of a bare name.
    """
    path = Path(path)
    if not path.is_file() and path.name == str(path):
        for name in (path.name, path.name + suffix):
            shipped = shared_folder(folder) / name
            if shipped.exists():
                return shipped
    return path
