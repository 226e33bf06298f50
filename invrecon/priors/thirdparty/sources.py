"""Reading what others saved: named tensors, and what the file says of the network, with nothing executed."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invrecon.errors import InputError
from invrecon.priors.thirdparty.pickle import Record, read_pickle, state_dict

# The number that a file of torch's older format begins with, as its first pickle.
TORCH_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
TRUSTED = "re-save its state dict as safetensors where you trust it."
MAX_ITEMS, MAX_DEPTH = 1_000_000, 64


@dataclass
class Source:
    """What a file holds.

    Args:
        tensors: By dotted name.
        settings: What the file says of each network in it, by the prefix of its tensors.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_source(path: Path) -> Source:
    """Reads safetensors, a state dict of torch's, or a network snapshot of EDM.

    Raises:
        InputError: If the file is none of them, is truncated, or holds anything that would have to be executed.
    """
    if not path.is_file():
        raise InputError(f"There is no file '{path}'; give the weights that you want to import.")
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise InputError(f"'{path}' cannot be read: {error.strerror}; check its permissions.") from None
    source = Source()
    if head[8:9] == b"{":
        source.tensors = _read_safetensors(path)
    elif head[:2] == b"PK" or (head[:1] == b"\x80" and TORCH_MAGIC in head[:24]):
        _collect(_read_torch(path), source)
    elif head[:1] == b"\x80":
        _collect(read_pickle(path), source)
    else:
        raise InputError(
            f"'{path}' is neither safetensors, nor a state dict saved by torch, nor a network snapshot of EDM: give "
            "one of these."
        )
    if not source.tensors:
        raise InputError(f"'{path}' holds no tensors; give the weights of a network.")
    return source


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(
            f"'{path}' cannot be read as a safetensors file ({error}): it is truncated or of another format; copy it "
            "again."
        ) from None


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a hostile or damaged file provokes is of many kinds
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found:
            raise InputError(
                f"'{path}' is not read, because it holds more than tensors ('{found[1]}'), which loading would have "
                f"to execute: {TRUSTED}"
            ) from None
        raise InputError(
            f"'{path}' cannot be read as a state dict of torch's: it is truncated, of another kind, or holds more than "
            f"tensors; copy it again, or {TRUSTED}"
        ) from None


def _collect(content: Any, source: Source) -> None:
    """Puts every named tensor of nested dictionaries and recorded networks under its dotted name."""
    todo: list[tuple[str, Any]] = [("", content)]
    for _ in range(MAX_ITEMS):
        if not todo:
            return
        prefix, value = todo.pop()
        if isinstance(value, Tensor):
            source.tensors[prefix.removesuffix(".")] = value
        elif isinstance(value, Record):
            source.tensors |= {f"{prefix}{key}": tensor for key, tensor in state_dict(value).items()}
            source.settings |= {f"{prefix}{key}": found for key, found in _settings(value).items()}
        elif isinstance(value, dict) and prefix.count(".") < MAX_DEPTH:
            todo += [(f"{prefix}{key}.", item) for key, item in value.items() if isinstance(key, str)]
    raise InputError("The file nests more names than any network has; give the state dict alone.")


def _settings(record: Record) -> dict[str, dict[str, Any]]:
    """Returns the constructor arguments of a network inside a preconditioning, or of a bare one, by its prefix."""
    own = {"class_name": record.name, **_arguments(record)}
    modules = record.state.get("_modules")
    model = modules.get("model") if isinstance(modules, dict) else None
    if not isinstance(model, Record):
        return {"": own}
    # The wrapper's own name says how the network is preconditioned; the rest is the network's.
    return {"model.": {**_arguments(model), **own, "model_type": model.name}}


def _arguments(record: Record) -> dict[str, Any]:
    """Returns the plain ones: numbers, texts and lists of them; what nests further no architecture is read from."""
    arguments = record.state.get("_init_kwargs")
    arguments = arguments if isinstance(arguments, dict) else {}
    return {key: value for key, value in arguments.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    scalar = str | int | float | None
    if isinstance(value, list | tuple):
        return len(value) <= MAX_DEPTH and all(isinstance(item, scalar) for item in value)
    return isinstance(value, scalar)


def read_settings(path: Path) -> dict[str, Any]:
    """Reads the settings of the original program, a flat JSON object.

    Raises:
        InputError: If the file is missing or is no such object.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"The settings '{path}' cannot be read: {error.strerror}; check the path.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"The settings '{path}' are not JSON ({error}); give a JSON object.") from None
    if not isinstance(settings, dict):
        raise InputError(f"The settings '{path}' are a {type(settings).__name__}, expected a JSON object.")
    return {key: value for key, value in settings.items() if _is_plain(value)}
