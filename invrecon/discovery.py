"""What a file defines is known by its name: in a room of this package at once, beside a command once it is named."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

CLASS_PATH = re.compile(r"(?<![\w./])([a-z_]\w*)(?:\.\w+)*\.[A-Z]\w*(?![\w.])")
"""`my_methods.Tikhonov`, of which the first word is taken."""


def modules_below(package: ModuleType) -> Iterator[ModuleType]:
    """Imports all modules of a package and of those below it, but private ones (`_name`), in alphabetical order."""
    for info in iter_modules(package.__path__, f"{package.__name__}."):
        if not info.name.rpartition(".")[2].startswith("_"):
            module = import_module(info.name)
            yield module
            if info.ispkg:
                yield from modules_below(module)


def find_classes(package: ModuleType, *bases: type) -> dict[str, type]:
    """Returns the classes of a package that a config can name and nothing more: public, concrete, all with defaults.

    Args:
        package: Where they are defined, in any module below it.
        bases: What they are subclasses of, any of these.

    Raises:
        ImportError: Two of them have one name.
    """
    found: dict[str, type] = {}
    for module in modules_below(package):
        for name, value in vars(module).items():
            if not (inspect.isclass(value) and issubclass(value, bases) and value.__module__ == module.__name__):
                continue
            if name.startswith("_") or inspect.isabstract(value) or needs_arguments(value):
                continue
            if (other := found.setdefault(name, value)) is not value:
                raise ImportError(f"{other.__module__} and {module.__name__} both define {name}: rename one of them.")
    return found


def needs_arguments(kind: type) -> bool:
    """Says whether a class cannot be made by `kind()`."""
    named = [p for p in inspect.signature(kind).parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return any(p.default is p.empty for p in named)


def export_classes(namespace: dict[str, Any], *bases: type) -> None:
    """Adds to a package what its `__init__` does not list: the last line there, `export_classes(globals(), Method)`.

    Args:
        namespace: Of the package, with an `__all__`.
        bases: As of `find_classes`.
    """
    package = sys.modules[namespace["__name__"]]
    found = find_classes(package, *bases)
    new = sorted(name for name in found if name not in namespace["__all__"])
    namespace.update({name: found[name] for name in new})
    namespace["__all__"] += new


def reach_named_files(args: Iterable[str], folder: Path | None = None) -> None:
    """Lets `my_methods.Tikhonov` be a class of the file `my_methods.py` in the current folder.

    A console command does not look there for modules. The folder is searched last, and only if a class of a module is
    named that is in it and nowhere else. Nothing is imported here.

    Args:
        args: Arguments of a command; of those that are YAML files, `--config=NAME.yaml` too, the text counts.
        folder: The current one if None.
    """
    folder = Path.cwd() if folder is None else folder
    for module in {match[1] for text in _texts(args) for match in CLASS_PATH.finditer(text)}:
        here = (folder / f"{module}.py").is_file() or (folder / module / "__init__.py").is_file()
        if here and module not in sys.modules and find_spec(module) is None:
            sys.path.append(str(folder))


def _texts(args: Iterable[str]) -> Iterator[str]:
    for arg in args:
        path = Path(arg.rpartition("=")[2])
        yield path.read_text(encoding="utf-8", errors="replace") if _is_config(path) else arg


def _is_config(path: Path) -> bool:
    return path.suffix in (".yaml", ".yml") and path.is_file()
