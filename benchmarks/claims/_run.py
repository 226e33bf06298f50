"""What all tables share: rows in a record that is continued, and a report that is written again whenever it grows."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

from benchmarks import _common, _machine
from benchmarks._common import HELD_OUT, Bench, Entry, Row, Setting
from benchmarks._methods import has_spectrum
from benchmarks.claims._lessons import Lesson, School
from benchmarks.claims._problems import PROBLEMS
from benchmarks.claims._recipes import CHEAP, Recipe
from benchmarks.claims._verdicts import MISSING
from invrecon.data.cases import CaseBatch
from invrecon.errors import InputError
from invrecon.files import atomic_write
from invrecon.methods import DPSConditioning, Method

Table = Mapping[str, Sequence[Row]]  # key of a recipe -> its rows, of one setting
# About, a slice and core, at 256 x 256.
SECONDS = {"evaluation": 0.18, "with gradient": 0.55, "other": 0.1, "iterative": 8.0, "adaptation": 80.0}


class Run(ABC):
    """A table of claims: the rows of one record, and what is made of them.

    Args:
        options: As of `benchmarks.claims`.
        path: The record; report and figures are written beside it.

    Attributes:
        letter: The table's name.
        title: What it is about.
        problems: The settings that it is made of unless others are asked for.
        others: Settings that it knows besides.
        every: Expensive recipes take every so many of the slices.

    Raises:
        InputError: A prior is missing.
    """

    letter: ClassVar[str]
    title: ClassVar[str]
    problems: ClassVar[tuple[str, ...]]
    others: ClassVar[tuple[str, ...]] = ()
    every: ClassVar[int] = 2

    def __init__(self, options: argparse.Namespace, path: Path) -> None:
        self.options, self.path, self.recipes = options, path, self.list_recipes()
        self.few = options.few or self.every
        self.settings = [PROBLEMS[name] for name in self.choose_settings(options)]
        self.chosen = self.choose_rows(options)
        for key in self.chosen:
            if isinstance(prior := self.recipes[key].prior, str):
                _common.weights_hash(options.priors[prior])  # a missing prior is noticed now, not after an hour
        self.together = _common.load_batches(HELD_OUT, options.slices, options.size, options.batch_size)
        self.singles = _common.load_batches(HELD_OUT, options.slices, options.size, 1)
        self.pooled = _common.load_batches(HELD_OUT, options.slices, options.size, len(self.singles))
        record = _common.start(argparse.Namespace(**{**vars(options), "json": path}), f"claims-{self.letter}")
        self.bench = Bench(record, options.size)
        self.school = School.of(options, record.machine)
        self.failures: dict[str, str] = {}

    @classmethod
    @abstractmethod
    def list_recipes(cls) -> dict[str, Recipe]:
        """Returns the rows by their keys."""

    @classmethod
    def choose_rows(cls, options: argparse.Namespace) -> list[str]:
        """Returns the keys of the rows that are asked for."""
        return [key for key in cls.list_recipes() if not options.rows or key in options.rows]

    @classmethod
    def choose_settings(cls, options: argparse.Namespace) -> list[str]:
        """Returns the names of the settings that are asked for."""
        asked = options.settings or cls.problems
        return [name for name in (*cls.problems, *cls.others) if name in asked]

    @abstractmethod
    def find(self, setting: Setting, table: Table) -> dict[str, Any]:
        """Returns all that is made of a setting's rows; a list of `verdicts` is part of it."""

    @abstractmethod
    def introduction(self, machine: str) -> str:
        """Returns what a reader has to know, in Markdown."""

    @abstractmethod
    def describe(self, setting: Setting, table: Table, found: Mapping[str, Any]) -> Iterator[str]:
        """Yields the Markdown of a setting."""

    @abstractmethod
    def figures(self, tables: Mapping[str, Table], findings: Mapping[str, Mapping[str, Any]]) -> None:
        """Draws beside the record, under the endings of `captions`."""

    @abstractmethod
    def captions(self) -> dict[str, str]:
        """Returns captions by the ending of a figure's name."""

    def finish(self) -> None:
        """Does what is left once all rows are there; nothing, if there is nothing more."""
        return

    def method(self, key: str, setting: Setting) -> Method:
        """Returns what reconstructs in a setting."""
        return self.recipes[key].method

    def prior(self, recipe: Recipe) -> str | None:
        """Returns the recipe's prior file, or the name of a shipped one."""
        if isinstance(recipe.prior, Lesson):
            return str(self.school.path(recipe.prior))
        return None if recipe.prior is None else self.options.priors[recipe.prior]

    def has_prior(self, recipe: Recipe) -> bool:
        """Says whether a recipe's rows can be looked for: what is taught here is known without its file."""
        prior = self.prior(recipe)
        return prior is None or isinstance(recipe.prior, Lesson) or _common.has_weights(prior)

    def entry(self, key: str, setting: Setting) -> Entry:
        """Returns a recipe as the benchmarks run it."""
        recipe = self.recipes[key]
        # Networks that were taught here are known by what they were taught: rows outlive the files.
        weights = self.school.identity(recipe.prior) if isinstance(recipe.prior, Lesson) else None
        method, prior = self.method(key, setting), self.prior(recipe)
        return Entry(key, method, prior, recipe.adaptation, layout=recipe.layout, weights=weights, pool=recipe.pool)

    def applies(self, key: str, setting: Setting) -> bool:
        """Says whether a row exists in a setting: some methods need singular values."""
        return not self.recipes[key].method.needs_spectrum or has_spectrum(self.bench.operator(setting))

    def batches(self, recipe: Recipe) -> list[CaseBatch]:
        """Returns the slices in batches; alone where each takes minutes, so that little is lost."""
        batches = self.all_batches(recipe)
        return batches[:: self.few] if recipe.few else batches

    def all_batches(self, recipe: Recipe) -> list[CaseBatch]:
        """Returns the batches of all slices, whether the recipe takes few of them or not."""
        if recipe.pool:
            return self.pooled
        return self.together if recipe.tier == CHEAP else self.singles

    def missing(self, key: str, setting: Setting) -> list[CaseBatch]:
        """Returns the batches of a row that the record lacks."""
        if not self.applies(key, setting):
            return []
        entry = self.entry(key, setting)
        return [b for b in self.batches(self.recipes[key]) if self.bench.find(setting, entry, b) is None]

    def measure(self, setting: Setting, tier: int) -> bool:
        """Computes the chosen rows of a tier, slice by slice; returns whether any of them is new."""
        keys = [key for key in self.chosen if self.recipes[key].tier == tier]
        missing = {key: left for key in keys if (left := self.missing(key, setting))}
        for key in missing:
            if isinstance(lesson := self.recipes[key].prior, Lesson):
                self.school.teach(lesson)
        for batch in self.together if tier == CHEAP else (*self.singles, *self.pooled):
            for key, left in missing.items():
                if not any(batch is own for own in left):
                    continue
                try:
                    self.bench.rows(setting, self.entry(key, setting), batch)
                except InputError as error:  # one that diverged does not end the run
                    self.failures[f"{setting.title}, {self.recipes[key].title}, {batch.id[0]}"] = str(error)
                    _common.progress(str(error))
        return bool(missing)

    def table(self, setting: Setting) -> dict[str, list[Row]]:
        """Returns all rows of a setting that the record holds, chosen now or not."""
        rows: dict[str, list[Row]] = {}
        for key, recipe in self.recipes.items():
            if not self.applies(key, setting) or not self.has_prior(recipe):
                continue
            # An earlier run may have done more slices than `few` says.
            entry = self.entry(key, setting)
            found = [self.bench.find(setting, entry, b) for b in self.all_batches(recipe)]
            rows[key] = [row for part in found for row in part or ()]
        return {key: own for key, own in rows.items() if own}

    def report(self) -> None:
        """Writes what the record holds: summaries into the JSON, tables and verdicts as text, figures."""
        known = [PROBLEMS[name] for name in (*self.problems, *self.others)]
        tables = {setting.name: table for setting in known if (table := self.table(setting))}
        findings = {name: self.find(PROBLEMS[name], table) for name, table in tables.items()}
        plain = {
            name: {**found, "verdicts": [vars(verdict) for verdict in found["verdicts"]]}
            for name, found in findings.items()
        }
        self.bench.record.save(settings=plain, failures=self.failures)
        self.figures(tables, findings)
        text = "\n".join(self._text(tables, findings))
        with atomic_write(self.beside(".md")) as file:
            file.write(text.encode())

    def beside(self, ending: str) -> Path:
        """Returns the path of what stands beside the record."""
        return self.path.with_name(self.path.stem + ending)

    def _text(self, tables: Mapping[str, Table], findings: Mapping[str, dict[str, Any]]) -> Iterator[str]:
        yield f"# ({self.path.stem}) {self.title}\n"
        rows = (row for table in tables.values() for own in table.values() for row in own)
        yield self.introduction(_machine.describe_machines(rows))
        outcomes: dict[str, dict[str, str]] = {}
        for name, found in findings.items():
            for verdict in found["verdicts"]:
                outcomes.setdefault(verdict.claim, {})[name] = verdict.outcome
        yield "## Verdicts\n"
        header = ["Claim", *(PROBLEMS[name].title for name in findings)]
        measured = {claim: own for claim, own in outcomes.items() if set(own.values()) != {MISSING}}
        cells = ([claim, *(own.get(name, "") for name in findings)] for claim, own in measured.items())
        yield _common.markdown(header, cells) + "\n"
        if left := len(outcomes) - len(measured):
            yield f"{left} more claims have not been measured yet.\n"
        for ending, what in self.captions().items():
            if self.beside(ending).is_file():
                yield f"![{what}]({self.beside(ending).name})\n"
        for name, table in tables.items():
            yield from self.describe(PROBLEMS[name], table, findings[name])
        if self.failures:
            yield "## What failed\n"
            yield from (f"- {where}: {why}" for where, why in self.failures.items())

    def list_rows(self) -> None:
        """Prints what the record holds and what is left, with an estimate of its time; computes nothing."""
        lines, total = [], 0.0
        for setting, key in product(self.settings, self.chosen):
            if not self.applies(key, setting):
                continue
            recipe = self.recipes[key]
            num, left = (sum(map(len, found)) for found in (self.batches(recipe), self.missing(key, setting)))
            minutes = left * seconds_a_slice(self.method(key, setting), recipe) / 60
            total += minutes
            lines.append((setting.name, key, f"{num - left}/{num}", f"{minutes:.1f}" if left else ""))
        lessons = {recipe.prior for key in self.chosen if isinstance((recipe := self.recipes[key]).prior, Lesson)}
        untaught = [lesson for lesson in lessons if not self.school.path(lesson).is_file()]
        print(_common.markdown(["Setting", "Row", "Slices done", "Minutes left, about"], lines))
        print(f"\n({self.letter}): {total:.0f} minutes left, about, and {len(untaught)} networks to train")

    def run(self) -> None:
        """Computes what is new; the report is written after each setting of each tier, and when it is interrupted."""
        try:
            for tier, setting in product(sorted({recipe.tier for recipe in self.recipes.values()}), self.settings):
                if self.measure(setting, tier):
                    self.report()
            self.finish()
        finally:
            self.report()
        for setting in self.settings:
            print(f"\n{setting.title}")
            for verdict in self.find(setting, self.table(setting))["verdicts"]:
                print(f"  {verdict.claim}: {verdict.outcome}. {verdict.because}")
        print(f"\nTables and figures: {self.path.with_suffix('.md')}")


def seconds_a_slice(method: Method, recipe: Recipe) -> float:
    """Returns about how long a slice takes on one core."""
    if not method.needs_prior:
        return SECONDS["iterative" if hasattr(method, "num_iterations") else "other"]
    evaluations = method.num_evaluations
    if recipe.layout is not None:
        evaluations *= recipe.layout.get("num_shifts", 1.6)  # overlapping patches of the usual strides
    if recipe.adaptation is not None:
        return SECONDS["adaptation"]
    gradient = method.needs_gradient or isinstance(getattr(method, "conditioning", None), DPSConditioning)
    return SECONDS["other"] + evaluations * SECONDS["with gradient" if gradient else "evaluation"]
