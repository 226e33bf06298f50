"""What the tables of published comparisons share: differences from a row of reference, and claims as lists."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from benchmarks import _common
from benchmarks._common import Setting
from benchmarks.claims._figures import dots_figure
from benchmarks.claims._problems import PROBLEMS
from benchmarks.claims._run import Run, Table
from benchmarks.claims._tuned import with_tuned
from benchmarks.claims._verdicts import Entry, Verdict, cell, difference, reproduce
from invrecon.methods import Method
from invrecon.metrics.summary import describe, summarise

RULES = """\
A claim is *reproduced* or *not reproduced* if the whole 95 % interval of its number is on one side of its limit, and
*undecided* otherwise. Differences are paired over the slices that both rows have; slow rows have every {every}. slice.
Intervals are over slices of one patient (bootstraps, of fewer than ten slices Student's), and every network was trained
once: neither other patients nor another training is accounted for.
Measured on {machine}.
"""


@dataclass(frozen=True)
class Claim:
    """A statement about the rows of a setting.

    Attributes:
        text: The statement.
        quantity: What has to lie above the limit (below, unless `at_least`); None where rows are missing.
        published: The number that was published, in words.
        limit: Where reproduction begins.
        unit: `dB`, `%` or `x`.
        at_least: Which side.
    """

    text: str
    quantity: Callable[[Table], Entry | None]
    published: str = ""
    limit: float = 0.0
    unit: str = "dB"
    at_least: bool = True

    def judge(self, table: Table) -> Verdict:
        """Returns the verdict on these rows."""
        return reproduce(self.text, self.quantity(table), self.published, self.limit, self.unit, self.at_least)


def minus(a: str, b: str) -> Callable[[Table], Entry | None]:
    """Returns the quantity: paired difference in PSNR of row `a` from row `b`."""
    return lambda table: difference(table.get(a), table.get(b))


def lead(key: str, over: Callable[[str], bool] = lambda other: True) -> Callable[[Table], Entry | None]:
    """Returns the quantity: by how much a row is ahead of the best other one of those that `over` accepts."""

    def quantity(table: Table) -> Entry | None:
        own = (difference(table.get(key), rows) for other, rows in table.items() if other != key and over(other))
        return min((entry for entry in own if entry is not None), key=lambda entry: entry["mean"], default=None)

    return quantity


def decibels(value: float) -> str:
    """Returns a published difference."""
    return f"{value:+.2f} dB"


class Comparison(Run):
    """A table of rows against a row of reference.

    Attributes:
        reference: Key of the row that the others are compared with.
        figure: Caption of the figure of differences.
        tuned: Rows that have tuned settings, and by which name `benchmarks.tune` keeps them.
    """

    reference: ClassVar[str]
    figure: ClassVar[str]
    tuned: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def start_of(cls, method: Method, setting: Setting) -> Method:
        """Returns a method as it is in a setting before it is tuned."""
        return method

    def method(self, key: str, setting: Setting) -> Method:
        """Returns the recipe's method, tuned for the setting where its row is."""
        method = self.start_of(self.recipes[key].method, setting)
        return with_tuned(method, setting.name, self.tuned[key]) if key in self.tuned else method

    def claims(self, setting: Setting) -> Iterator[Claim]:
        """Yields what is claimed of a setting."""
        yield from ()

    def explain(self) -> str:
        """Returns what the rows are."""
        return ""

    def introduction(self, machine: str) -> str:
        """Returns what the rows are, and how verdicts are found."""
        return f"{self.explain()}\n\n{RULES.format(machine=machine, every=self.few)}"

    def find(self, setting: Setting, table: Table) -> dict[str, Any]:
        """Returns summaries, differences and verdicts."""
        differences = [
            {"a": key, "b": self.reference, **entry}
            for key in table
            if key != self.reference and (entry := difference(table[key], table.get(self.reference))) is not None
        ]
        return {
            "summaries": {key: {**summarise(rows), "median_seconds": _common.median_seconds(rows)}
                          for key, rows in table.items()},
            "differences": differences,
            "verdicts": [claim.judge(table) for claim in self.claims(setting)],
        }  # fmt: skip

    def describe(self, setting: Setting, table: Table, found: Mapping[str, Any]) -> Iterator[str]:
        """Yields rows and verdicts, best first."""
        yield f"## {setting.title}\n"
        compared = {entry["a"]: entry for entry in found["differences"]}
        lines = []
        for key, rows in sorted(table.items(), key=lambda item: -found["summaries"][item[0]]["psnr"]["mean"]):
            evaluations = found["summaries"][key].get("num_evaluations", {}).get("mean")
            lines.append((
                self.recipes[key].title, *_common.metric_cells(rows),
                "-" if evaluations is None else f"{evaluations:.0f}", cell(compared.get(key)), len(rows),
            ))  # fmt: skip
        against = f"PSNR - ({self.recipes[self.reference].title}), paired"
        yield _common.markdown(["", *_common.METRIC_HEADINGS, "Evaluations", against, "Slices"], lines) + "\n"
        notes = (describe(summary) for summary in found["summaries"].values())
        yield "\n".join(f"{note}  " for note in dict.fromkeys(notes)) + "\n"
        cells = ((v.claim, v.outcome, v.because) for v in found["verdicts"])
        yield _common.markdown(["Claim", "Verdict", "Because"], cells) + "\n"

    def captions(self) -> dict[str, str]:
        """Returns captions by the ending of a figure's name."""
        return {".png": self.figure}

    def figures(self, tables: Mapping[str, Table], findings: Mapping[str, Mapping[str, Any]]) -> None:
        """Draws the differences from the row of reference."""
        panels = {
            PROBLEMS[name].title: {self.recipes[entry["a"]].title: entry for entry in found["differences"]}
            for name, found in findings.items()
            if found["differences"]
        }
        if panels:
            against = f"PSNR - ({self.recipes[self.reference].title}) [dB]"
            dots_figure(self.beside(".png"), panels, against)
