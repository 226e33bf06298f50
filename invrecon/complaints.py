"""What the parser of the command line refuses, in one sentence."""

from __future__ import annotations

import inspect
import re
import typing
from pydoc import locate
from typing import Any


def complaint(text: str) -> str:
    """Says in one sentence what is wrong, from a parser's error, which goes through every type that it has tried."""
    key = ".".join(re.findall(r'Parser key "([\w.]+)"', text))
    name = re.search(r"Expected a dot import path string: (\S+)", text)
    if name and (choices := _choices(text, key.rpartition(".")[2])):
        return f"{key} is '{name[1]}', expected one of {', '.join(choices)}."
    noise = (
        r"Parser key|Does not validate|Subtypes:|Errors:|Expected a <class 'NoneType'>|Given value|Problem with given"
    )
    lines = [line.strip(" -.") for line in text.splitlines()]
    wrong = "; ".join(line for line in lines if line and not re.match(noise, line))
    return f"{key + ': ' if key else ''}{wrong}. `invrecon COMMAND --help` lists what there is."


def _choices(text: str, argument: str) -> list[str]:
    """Returns the names of our classes that an argument takes, by its annotation in the class that asks for it."""
    owners = [locate(path) for path in re.findall(r"class_path '([\w.]+)'", text)]
    if owners and inspect.isclass(owners[-1]):
        try:
            hints = typing.get_type_hints(owners[-1].__init__)
        except NameError:  # of names that are imported for the type checker alone
            return []
        kinds = _classes_of(hints.get(argument))
    else:  # an argument of the command itself
        kinds = [locate(path) for path in re.findall(r"Subtypes: \[<class '([\w.]+)'", text)[:1]]
    return sorted({c.__name__ for kind in kinds if inspect.isclass(kind) for c in _concrete(kind)})


def _classes_of(hint: Any) -> list[Any]:
    parts = typing.get_args(hint)
    return [c for part in parts for c in _classes_of(part)] if parts else [hint]


def _concrete(kind: type) -> list[type]:
    subclasses: list[type] = kind.__subclasses__()
    found = [kind, *(c for subclass in subclasses for c in _concrete(subclass))]
    return [
        c for c in found if c.__module__.startswith("invrecon.") and not (inspect.isabstract(c) or c.__name__[0] == "_")
    ]
