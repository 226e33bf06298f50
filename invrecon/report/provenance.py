"""Which run made a result: its identity, and all that a reader needs to make it again."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import invrecon
from invrecon.errors import InputError
from invrecon.files import to_json


def fingerprint(settings: Mapping[str, Any], weights_sha256: str | None = None, inputs: Sequence[str] = ()) -> str:
    """Identity of what decides a run's numbers: its settings, its weights and its input files.

    Args:
        settings: The resolved configuration, without what changes no number (output folder, devices,
        workers).
        weights_sha256: Hash of the prior's file, if there is one.
        inputs: `file_identity` of every input, in any order.

    Returns:
        SHA-256 in hexadecimal.
    """
    content = to_json({"settings": settings, "weights": weights_sha256, "inputs": sorted(inputs)})
    canonical = json.dumps(json.loads(content), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def file_identity(path: str | os.PathLike[str]) -> str:
    """Name, size and time of change, of a folder those of its files: enough to notice another one without reading it.

    Raises:
        InputError: There is no such file.
    """
    path = Path(path)
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}; check the path.") from error
    if path.is_dir():
        files = sorted(entry for entry in path.iterdir() if entry.is_file())
        return f"{path.name}/{','.join(map(file_identity, files))}"
    return f"{path.name}:{status.st_size}:{status.st_mtime_ns}"


def provenance(
    config: Mapping[str, Any] | None = None,
    *,
    weights_sha256: str | None = None,
    prior: str | None = None,
    seed: int | None = None,
    command: Sequence[str] | None = None,
) -> dict[str, Any]:
    """What a reader needs to make the same numbers again: configuration, versions, weights, seed, command."""
    from importlib import metadata

    versions = {"python": platform.python_version(), "invrecon": invrecon.__version__}
    for package in ("torch", "lightning", "numpy", "scipy", "h5py"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "config": dict(config or {}),
        "versions": versions,
        "prior": prior,
        "weights_sha256": weights_sha256,
        "seed": seed,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]] if command is None else command),
    }
