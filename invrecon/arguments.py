"""What is written on the command line, as the parser understands it."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from pydoc import locate
from typing import Any

import yaml
from jsonargparse import Namespace

from invrecon.errors import InputError
from invrecon.shared import find_shared, shared_folder


def spell(args: list[str]) -> list[str]:
    """Returns arguments of which the parser understands every one.

    - `--config patch_ct.yaml` finds a shipped config by its bare name.
    - `--data.slices 5:` becomes `5::`, for the parser would take it for a mapping; `-1:` is joined to its argument.
    - `--model.method.clip null` becomes `--model.method={"init_args": {"clip": null}}`, a part of a configuration, for
      the parser hands an argument of an argument on as text, and would take it for the word "None".

    Raises:
        InputError: If a config is neither a file nor the name of a shipped one.
    """
    text = "\0".join(_resolve_configs(args))
    text = re.sub(r"--data\.slices\0(?=-\d)", "--data.slices=", text)
    text = re.sub(r"(--data\.slices[\0=]-?\d+:)(?=\0|$)", r"\1:", text)
    text = re.sub(r"(?<![^\0])--((?:model|data)\.\w+)\.([\w.]+)[\0=]null(?=\0|$)", _nest_null, text)
    return text.split("\0") if args else []


def _nest_null(found: re.Match[str]) -> str:
    nested: dict[str, Any] | None = None
    for key in reversed(found[2].removeprefix("init_args.").replace(".init_args.", ".").split(".")):
        nested = {"init_args": {key: nested}}
    return f"--{found[1]}={json.dumps(nested)}"


def _resolve_configs(args: list[str]) -> list[str]:
    """Replaces bare config names by the shipped files of that name; an existing file wins.

    Raises:
        InputError: If a config is neither a file nor the name of a shipped one.
    """
    resolved = list(args)
    for i, arg in enumerate(args):
        if arg in ("--config", "-c") and i + 1 < len(args):
            resolved[i + 1] = str(_config(args[i + 1]))
        elif arg.startswith("--config="):
            resolved[i] = "--config=" + str(_config(arg.removeprefix("--config=")))
    return resolved


def _config(name: str) -> Path:
    path = find_shared(name, "configs", ".yaml")
    if not path.is_file():
        shipped = ", ".join(sorted(p.name for p in shared_folder("configs").glob("*.yaml")))
        raise InputError(f"There is no config file '{name}'; give a path, or one of the shipped configs: {shipped}.")
    return path


def carried_over(configs: Sequence[Path], argument: str, chosen: type, settings: Mapping[str, Any]) -> str | None:
    """Says which settings of another class in the configs a class has been given, for the parser keeps those it knows.

    Args:
        configs: The configs, the last of which wins.
        argument: Name of the model's argument.
        chosen: The class that has taken the other's place.
        settings: Its resolved arguments.

    Returns:
        A sentence; nothing if the class is the configs' own, or has nothing from there but its own defaults.
    """

    def plain(value: Any) -> Any:
        return json.loads(json.dumps(value, default=str))

    own = {name: plain(parameter.default) for name, parameter in inspect.signature(chosen).parameters.items()}
    for path in reversed(configs):
        model = (yaml.safe_load(path.read_text()) or {}).get("model")
        model = model.get("init_args", model) if isinstance(model, dict) else {}
        if argument not in model:
            continue
        given = model[argument]
        if not isinstance(given, dict) or (former := given["class_path"].rpartition(".")[2]) == chosen.__name__:
            return None
        common = {name: plain(value) for name, value in (given.get("init_args") or {}).items() if name in settings}
        kept = {name: value for name, value in common.items() if own.get(name, value) != value == plain(settings[name])}
        listed = ", ".join(
            f"{name} {json.dumps(value)} (its own: {json.dumps(own[name])})" for name, value in kept.items()
        )
        return listed and (
            f"{chosen.__name__} takes over what {path.name} sets for {former}: {listed}. Where that does not suit it, "
            f"give --model.{argument}.NAME VALUE."
        )
    return None


def refuse_null(spec: Any, key: str) -> None:
    """Raises where a class is given null for an argument that cannot be, which the parser takes for unset.

    Args:
        spec: A resolved part of the configuration.
        key: Where it stands, for the message.

    Raises:
        InputError: Naming the first such argument, and its type.
    """
    if isinstance(spec, list | tuple):
        for i, item in enumerate(spec):
            refuse_null(item, f"{key}[{i}]")
    if not isinstance(spec, Namespace) or not isinstance(spec.get("init_args"), Namespace):
        return
    chosen: Any = locate(spec.class_path)
    parameters = inspect.signature(chosen).parameters if inspect.isclass(chosen) else {}
    for name, value in vars(spec.init_args).items():
        if value is None and name in parameters and parameters[name].default is not None:
            annotation = inspect.formatannotation(parameters[name].annotation).strip("'\"")
            if not re.search(r"\b(None|Any|Optional)\b", annotation):
                raise InputError(f"{key}.{name} is null, but {chosen.__name__} needs {annotation}.")
        refuse_null(value, f"{key}.{name}")
