"""All verdicts on one page, from the records of the tables."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import _common, _machine
from benchmarks._record import read_record
from benchmarks.claims._problems import PROBLEMS
from benchmarks.claims._verdicts import FAILS, HOLDS, MISSING, OPEN, REPRODUCED
from benchmarks.claims.table_a import EVALUATIONS
from invrecon.errors import InputError
from invrecon.files import atomic_write

INTRODUCTION = """\
# Published claims put to the test

Claims about patch-based diffusion priors, about the methods that reconstruct with diffusion priors and about adapting
priors to a measurement, each judged by numbers of this package. All tests are on slices of one patient in no training
set, at 256 x 256 pixels: up to 16 of them, of most tables two or four, as the numbers say. Where trainings are
compared, small networks have seen equal numbers of pixels. Differences are in PSNR, paired over the slices, with 95 %
intervals over slices (bootstrap; of fewer than ten slices Student's): so few say little, and neither other patients nor
another training of a network is accounted for.

A claim is *reproduced* or *not reproduced* if the whole interval of its number is on one side of the limit that is
named beside it, and *undecided* otherwise. What was not reproduced here may well hold elsewhere, for other data,
networks and budgets: the tables say what was run.
"""
FEWER = f", in {EVALUATIONS} evaluations"  # ends claims that are published with up to 1000
OUTCOMES = (REPRODUCED[HOLDS], REPRODUCED[FAILS], OPEN)


def write_page(path: Path, folder: Path, titles: Mapping[str, str]) -> None:
    """Writes the verdicts of all records that there are.

    Args:
        path: The page, Markdown.
        folder: Where the records are, `<letter>.json`, with a report `<letter>.md` beside each.
        titles: Of the tables, by their letters.

    Raises:
        InputError: There is no record, or one of something else.
    """
    records = {letter: folder / f"{letter}.json" for letter in titles}
    found = {letter: read_record(own, f"claims-{letter}") for letter, own in records.items() if own.is_file()}
    if not found:
        raise InputError(f"There is no record of a table ({', '.join(titles)}) in '{folder}': run the tables first.")
    text = "\n".join(_page(path, folder, titles, found))
    with atomic_write(path) as file:
        file.write(text.encode())


def _page(path: Path, folder: Path, titles: Mapping[str, str], found: Mapping[str, Any]) -> Iterator[str]:
    yield INTRODUCTION
    rows = {letter: list(list_verdicts(content)) for letter, content in found.items()}
    link = {letter: Path(os.path.relpath(folder / f"{letter}.md", path.parent)).as_posix() for letter in found}
    counts, fewer = [], f": published with up to 1000 evaluations, put to {EVALUATIONS}"
    for letter, own in rows.items():
        whole, cut = ([row for row in own if (FEWER in row[0]) == is_cut] for is_cut in (False, True))
        for label, part in (("", whole), (fewer, cut)):
            if part:
                numbers = (sum(row[2] == word for row in part) for word in OUTCOMES)
                counts.append((f"[({letter}) {titles[letter]}]({link[letter]}){label}", *numbers))
    yield _common.markdown(["Table", *OUTCOMES], counts) + "\n"
    for letter, own in rows.items():
        content = found[letter]
        machine = _machine.describe_machines(content["parts"].values()) or _machine.describe_machine(content["machine"])
        yield f"## ({letter}) {titles[letter]}\n"
        yield f"[All rows, figures and what they are]({link[letter]}). Measured on {machine}.\n"
        measured = [row for row in own if row[2] != MISSING]
        if measured:
            yield "| Claim | Setting | Verdict | Numbers |\n| --- | --- | --- | --- |"
            yield "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in measured)
            yield ""
        if left := len(own) - len(measured):
            yield f"Not measured yet: {left} verdict{'s' * (left != 1)}.\n"


def list_verdicts(content: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yields claim, setting, verdict and numbers of a record, claim by claim as its report has them."""
    settings: Mapping[str, Any] = content.get("settings", {})
    claims = dict.fromkeys(verdict["claim"] for found in settings.values() for verdict in found["verdicts"])
    for claim in claims:
        for name, found in settings.items():
            for verdict in found["verdicts"]:
                if verdict["claim"] == claim:
                    outcome = REPRODUCED.get(verdict["outcome"], verdict["outcome"])
                    numbers = verdict["because"].replace("; holds", "; reproduced")
                    yield claim, PROBLEMS[name].title if name in PROBLEMS else name, outcome, numbers
