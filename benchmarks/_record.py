"""A record of results that is continued: what has been computed with the same settings is not computed again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from invrecon.errors import InputError
from invrecon.files import write_json

Row = dict[str, Any]


def read_record(path: Path, benchmark: str) -> Row:
    """Returns the content of a record.

    Raises:
        InputError: The file is not a record of this benchmark.
    """
    try:
        content: Row = json.loads(path.read_text())
        if content["benchmark"] != benchmark or not isinstance(content["parts"], dict):
            raise ValueError(content["benchmark"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"'{path}' is no record of the benchmark '{benchmark}': name another file.") from error
    return content


class Record:
    """Results in a JSON file that is written after every part; parts of the same settings are not computed again.

    Args:
        path: The file, or None to keep nothing.
        benchmark: Name of the benchmark, which the file must be of.
        facts: The machine; `device` where it is no CPU that computes.
        redo: Whether to compute again what is there.

    Raises:
        InputError: The file is not a record of this benchmark.
    """

    def __init__(self, path: Path | None, benchmark: str, facts: Mapping[str, Any], redo: bool = False) -> None:
        self.path, self.machine = path, dict(facts)
        self.parts: dict[str, Row] = {}
        self.merged: list[dict[str, Row]] = []
        self.kept: set[str] = set()  # parts of an earlier run that count
        if path is not None and path.is_file():
            self.parts = read_record(path, benchmark)["parts"]
            self.kept = set() if redo else set(self.parts)
        self.content: Row = {"benchmark": benchmark, "machine": self.machine}

    @property
    def device(self) -> torch.device:
        """Where the machine computes."""
        return torch.device(self.machine.get("device", "cpu"))

    def merge(self, paths: Iterable[Path]) -> None:
        """Takes up the parts of other records of this benchmark where they are asked for and fit; writes nothing.

        Raises:
            InputError: One of them is no such record.
        """
        self.merged += [read_record(path, self.content["benchmark"])["parts"] for path in paths]

    def find(self, key: str, identity: str) -> Row | None:
        """Returns a part computed with the same settings, or None."""
        for parts in (self.parts if key in self.kept else {}, *self.merged):
            part = parts.get(key)
            if part and part["fingerprint"] == identity:
                self.parts[key] = part
                self.kept.add(key)
                return part
        return None

    def has(self, prefix: str) -> bool:
        """Says whether there is any part, of whatever settings, whose name begins so."""
        return any(key.startswith(prefix) for parts in (self.parts, *self.merged) for key in parts)

    def add(self, parts: Mapping[str, Row], identity: str) -> None:
        """Keeps parts and writes the file."""
        self.parts |= {key: {**part, "fingerprint": identity} for key, part in parts.items()}
        self.kept |= parts.keys()
        self.save()

    def save(self, **results: Any) -> None:
        """Writes the file, with what was made of the parts."""
        self.content |= results
        if self.path is not None:
            write_json(self.path, {**self.content, "parts": self.parts})
