"""From rows (one a slice) to a table: means with bootstrap intervals by patient, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from invrecon.errors import InputError

Row = Mapping[str, Any]
Summary = dict[str, Any]


class Column(NamedTuple):
    """How a metric is printed, and which way is better (+1 higher, -1 lower, 0 neither).

    `digits` are those behind the point, or the significant ones where `style` is `g`: for losses of any scale.
    """

    title: str
    unit: str
    digits: int
    better: int
    style: str = "f"


COLUMNS: dict[str, Column] = {
    "psnr": Column("PSNR", "dB", 2, 1),
    "ssim": Column("SSIM", "", 4, 1),
    "psnr_body": Column("PSNR, body", "dB", 2, 1),
    "seams": Column("Seams", "", 3, 0),
    "contrast": Column("Seam contrast", "", 3, 0),
    "acceleration": Column("Acceleration", "", 2, 0),
    "relative_residual": Column("Residual", "", 5, -1),
    "data_loss": Column("Data loss", "", 3, -1, "g"),
    "held_out_loss": Column("Held-out loss", "", 3, -1, "g"),
    "num_trainable": Column("Adapted parameters", "", 0, 0),
    "num_evaluations": Column("Evaluations", "", 0, 0),
    "num_operator_calls": Column("Operator calls", "", 0, 0),
    "seconds": Column("Time", "s", 2, -1),
    "peak_memory_mb": Column("Memory", "MB", 0, -1),
}
METRICS = tuple(COLUMNS)
ADAPTATION_METRICS = ("data_loss", "held_out_loss", "num_trainable")
NUM_RESAMPLES = 2000


def summarise(rows: Iterable[Row], metrics: Sequence[str] | None = None, seed: int = 0) -> Summary:
    """Means over slices, with 95 % percentile-bootstrap intervals that resample patients, then their slices.

    Slices of one patient are correlated, so patients are drawn with replacement first, then slices within
    each drawn patient (two-stage cluster bootstrap: Davison and Hinkley, Bootstrap Methods, 1997, section
    3.8). With one patient only slices are drawn and `interval` says so; with one value there is no interval
    (None). The result does not depend on the order of the rows.

    Args:
        rows: One mapping a slice with `patient` and the metrics; absent, None, NaN and infinite values are
        left out
            of that metric and counted.
        metrics: Names to summarise; by default those of `METRICS` that some row has.
        seed: Seed of the resampling.

    Returns:
        `{metric: {mean, low, high, num_cases, num_excluded}, num_cases, num_patients, interval}`, ready for
        JSON.
    """
    rows = list(rows)
    if metrics is None:
        metrics = [name for name in METRICS if any(row.get(name) is not None for row in rows)]
    num_patients = len({_patient(row) for row in rows})
    summary: Summary = {}
    for name in metrics:
        groups: dict[str, list[float]] = {}
        for row in rows:
            value = _number(row.get(name))
            if math.isfinite(value):
                groups.setdefault(_patient(row), []).append(value)
        entry = _bootstrap(groups, seed)
        summary[name] = {**entry, "num_excluded": len(rows) - entry["num_cases"]}
    summary["num_cases"] = len(rows)
    summary["num_patients"] = num_patients
    summary["interval"] = _describe_interval(num_patients)
    return summary


def summarise_by(
    rows: Iterable[Row], key: str = "method", metrics: Sequence[str] | None = None, seed: int = 0
) -> dict[str, Summary]:
    """One `summarise` for each value of `key`, in order of first appearance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(row.get(key, "")), []).append(row)
    return {name: summarise(group, metrics, seed) for name, group in groups.items()}


def paired_difference(rows_a: Iterable[Row], rows_b: Iterable[Row], metric: str = "psnr", seed: int = 0) -> Summary:
    """Mean of `a - b` over the slices both have, with the bootstrap interval of `summarise`.

    Slices are matched by `case` and `slice`. Pairing removes what makes slices differ from each other, so the
    interval is much narrower than those of the two means.

    Raises:
        InputError: No slice has the metric, finite, in both.
    """

    def by_key(rows: Iterable[Row]) -> dict[tuple[str, str], Row]:
        return {(str(row.get("case")), str(row.get("slice"))): row for row in rows}

    a, b = by_key(rows_a), by_key(rows_b)
    groups: dict[str, list[float]] = {}
    for key in a.keys() & b.keys():
        difference = _number(a[key].get(metric)) - _number(b[key].get(metric))
        if math.isfinite(difference):
            groups.setdefault(_patient(a[key]), []).append(difference)
    if not groups:
        raise InputError(
            f"No slice has a finite '{metric}' in both results ({len(a)} and {len(b)} rows, "
            f"{len(a.keys() & b.keys())} in common): compare runs over the same cases."
        )
    return {
        **_bootstrap(groups, seed),
        "num_patients": len(groups),
        "interval": _describe_interval(len(groups)),
    }


def format_table(summaries: Mapping[str, Any], metrics: Sequence[str] | None = None) -> str:
    """A plain table for the terminal: a line a method, `mean [low, high]` a metric.

    Args:
        summaries: A summary, `{method: summary}` as of `summarise_by`, or `{setting: {method: summary}}`.
        metrics: Columns; by default every metric some summary has.
    """
    groups = as_groups(summaries)
    named = [(label, summary) for group in groups.values() for label, summary in group.items()]
    metrics = list_metrics(groups) if metrics is None else metrics
    header = ["", *(heading(name) for name in metrics)]
    lines = [[label, *(format_entry(name, s.get(name)) for name in metrics)] for label, s in named]
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]

    def render(cells: list[str]) -> str:
        first, *rest = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "   ".join([first, *rest]).rstrip()

    rule = "─" * (sum(widths) + 3 * (len(widths) - 1))
    body, rest = [], iter(lines)
    for name, group in groups.items():
        body += [name] if name else []
        body += [render(next(rest)) for _ in group]
    footer = dict.fromkeys(describe(summary) for _, summary in named)
    return "\n".join([render(header), rule, *body, rule, *footer])


def as_groups(summaries: Mapping[str, Any]) -> dict[str, dict[str, Summary]]:
    """`{setting: {method: summary}}` from that, from `{method: summary}` or from a single summary."""
    if "num_cases" in summaries:
        return {"": {"": dict(summaries)}}
    if all("num_cases" in summary for summary in summaries.values()):
        return {"": dict(summaries)}
    return {name: dict(group) for name, group in summaries.items()}


def list_metrics(groups: Mapping[str, Mapping[str, Summary]]) -> list[str]:
    """The metrics that some summary has, in order of appearance."""
    summaries = [summary for group in groups.values() for summary in group.values()]
    return list(dict.fromkeys(k for s in summaries for k, v in s.items() if isinstance(v, Mapping)))


def heading(metric: str) -> str:
    """The metric's title with its unit, such as `PSNR [dB]`."""
    column = COLUMNS.get(metric, Column(metric, "", 3, 0))
    return f"{column.title} [{column.unit}]" if column.unit else column.title


def format_value(metric: str, value: Any) -> str:
    """The value with the metric's number of digits; a dash when there is none."""
    number = _number(value)
    if math.isnan(number):
        return "-"
    if math.isinf(number):
        return "∞" if number > 0 else "-∞"
    column = COLUMNS.get(metric, Column(metric, "", 3, 0))
    return f"{number:.{column.digits}{column.style}}"


def format_entry(metric: str, entry: Mapping[str, Any] | None) -> str:
    """`mean [low, high]`, or the mean alone where there is no interval or it has no width."""
    if not entry:
        return "-"
    mean, low, high = (format_value(metric, entry.get(key)) for key in ("mean", "low", "high"))
    return mean if low == high else f"{mean} [{low}, {high}]"


def _bootstrap(groups: Mapping[str, list[float]], seed: int) -> dict[str, Any]:
    """Mean and two-stage bootstrap interval of values grouped by patient."""
    # Sorted throughout: the same numbers whatever order, or rank, they came in.
    values = [np.sort(np.asarray(groups[name], dtype=np.float64)) for name in sorted(groups)]
    num_cases = sum(len(v) for v in values)
    if num_cases == 0:
        return {"mean": None, "low": None, "high": None, "num_cases": 0}
    mean = math.fsum(float(value) for group in values for value in group) / num_cases
    if num_cases == 1:
        return {"mean": mean, "low": None, "high": None, "num_cases": 1}
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(values), size=(NUM_RESAMPLES, len(values)))
    totals, counts = np.zeros(NUM_RESAMPLES), np.zeros(NUM_RESAMPLES)
    for index, group in enumerate(values):
        replicate = np.nonzero(drawn == index)[0]  # a patient drawn k times is resampled k times, independently
        sums = group[rng.integers(len(group), size=(len(replicate), len(group)))].sum(axis=1)
        np.add.at(totals, replicate, sums)
        np.add.at(counts, replicate, len(group))
    low, high = np.percentile(totals / counts, [2.5, 97.5])
    return {"mean": mean, "low": float(low), "high": float(high), "num_cases": num_cases}


def _describe_interval(num_patients: int) -> str:
    if num_patients <= 1:
        return "95 % bootstrap over slices of one patient: it says nothing about other patients"
    return "95 % bootstrap over patients, then over their slices"


def describe(summary: Mapping[str, Any]) -> str:
    """What was averaged, what the interval means and what was left out, as a line."""
    cases, patients = summary.get("num_cases", 0), summary.get("num_patients", 0)
    counted = f"{cases} slice{'s' * (cases != 1)} of {patients} patient{'s' * (patients != 1)}"
    excluded = {k: v["num_excluded"] for k, v in summary.items() if isinstance(v, Mapping) and v.get("num_excluded")}
    names = ", ".join(f"{n} of {k}" for k, n in excluded.items())
    left_out = f"; missing or not finite, left out: {names}" if excluded else ""
    return f"{counted}; intervals: {summary.get('interval', '')}{left_out}"


def _patient(row: Row) -> str:
    return str(row.get("patient") or row.get("case") or "")


def _number(value: Any) -> float:
    """The value as float; NaN for None, empty text (a CSV's absent value) and anything that is no number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
