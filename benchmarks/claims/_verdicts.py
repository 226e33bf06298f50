"""From rows to verdicts: intervals of shares and of costs, and the words that follow from an interval alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np

from benchmarks._common import Row
from invrecon.metrics.summary import NUM_RESAMPLES, summarise

# 97.5 % points of Student's t by the number of values: a percentile bootstrap of two is their range, which holds the
# mean half of the time, and that of eight still misses it once in eight times.
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306}
HOLDS, FAILS, OPEN, MISSING = "holds", "does not hold", "undecided", "not measured"
REPRODUCED = {HOLDS: "reproduced", FAILS: "not reproduced"}  # in the words of tables of published claims
Entry = Mapping[str, Any]  # mean, low, high (None without an interval) and num_cases


@dataclass(frozen=True)
class Verdict:
    """A claim, what became of it, and the numbers that say so."""

    claim: str
    outcome: str
    because: str = ""


def judge(entry: Entry | None, limit: float, at_least: bool = True) -> str:
    """Says whether a quantity is above its limit (below, unless `at_least`): only if its whole interval is."""
    if entry is None:
        return MISSING
    if entry["low"] is None:
        return OPEN
    low, high = entry["low"] - limit, entry["high"] - limit
    if not at_least:
        low, high = -high, -low
    return HOLDS if low > 0 else FAILS if high < 0 else OPEN


def decide(claim: str, entry: Entry | None, limit: float, unit: str = "dB", at_least: bool = True) -> Verdict:
    """Returns the verdict on a claim that an entry lies above a limit (below, unless `at_least`)."""
    if entry is None:
        return Verdict(claim, MISSING)
    side = "above" if at_least else "below"
    slices = f"{entry['num_cases']} slice{'s' * (entry['num_cases'] != 1)}"
    because = f"{cell(entry, unit)} over {slices}; holds {side} {number(limit, unit)}"
    return Verdict(claim, judge(entry, limit, at_least), because)


def reproduce(
    claim: str, entry: Entry | None, published: str, limit: float = 0.0, unit: str = "dB", at_least: bool = True
) -> Verdict:
    """Returns `decide`'s verdict in words of reproduction, with the published number beside ours."""
    verdict = decide(claim, entry, limit, unit, at_least)
    because = verdict.because.replace("holds", "reproduced") + (f"; published: {published}" if published else "")
    return Verdict(claim, REPRODUCED.get(verdict.outcome, verdict.outcome), because if verdict.because else "")


def number(value: float, unit: str) -> str:
    """Returns a difference in dB, a share in per cent or a multiple."""
    return {"dB": f"{value:+.2f} dB", "%": f"{100 * value:.0f} %", "x": f"{value:.1f} x"}[unit]


def cell(entry: Entry | None, unit: str = "dB") -> str:
    """Returns a mean with its interval."""
    if entry is None:
        return "-"
    if entry["mean"] is None:
        return "no gap"
    if entry["low"] is None:
        return number(entry["mean"], unit)
    low, high, mean = (number(entry[key], unit).split()[0] for key in ("low", "high", "mean"))
    return f"{mean} [{low}, {high}] {unit}"


def difference(a: Sequence[Row] | None, b: Sequence[Row] | None) -> dict[str, Any] | None:
    """Returns the paired difference in PSNR over the slices both have, or None if there are none."""
    entry = contrast((1, a), (-1, b))
    return entry and {**entry, "num_patients": len({row.get("patient") for row in a or ()})}


def contrast(*terms: tuple[float, Sequence[Row] | None], metric: str = "psnr") -> dict[str, Any] | None:
    """Returns mean and interval of a weighted sum of a metric of several rows, over the slices that all of them have.

    Args:
        *terms: Weights and rows.
        metric: What is summed.
    """
    tables = [(weight, {(row["case"], row["slice"]): row for row in rows or ()}) for weight, rows in terms]
    common = set.intersection(*(set(own) for _, own in tables))
    first = [row for key, row in tables[0][1].items() if key in common]
    return interval(first, lambda row: sum(w * own[row["case"], row["slice"]][metric] for w, own in tables))


def interval(rows: Sequence[Row], value: Callable[[Row], float | None]) -> dict[str, Any] | None:
    """Returns mean and interval of a quantity that each row has by itself, or None if none has it."""
    values = [value(row) for row in rows]
    pairs = zip(rows, values, strict=True)
    entry = summarise([{"patient": row.get("patient"), "value": own} for row, own in pairs], ["value"])["value"]
    if not entry["num_cases"]:
        return None
    return {**entry, **student([own for own in values if own is not None and math.isfinite(own)])}


def student(values: Sequence[float]) -> dict[str, float]:
    """Returns Student's 95 % interval of the mean of two to nine values; of more nothing, as they are resampled."""
    if len(values) not in STUDENT:
        return {}
    half = STUDENT[len(values)] * stdev(values) / len(values) ** 0.5
    return {"low": fmean(values) - half, "high": fmean(values) + half}


def ratio(a: Sequence[Row] | None, b: Sequence[Row] | None, metric: str = "seconds") -> dict[str, Any] | None:
    """Returns the mean of a metric's ratio over the slices both have, measured on the same machine."""

    def place(row: Row) -> tuple[Any, ...]:
        return row["case"], row["slice"], row.get("machine")

    other = {place(row): row[metric] for row in b or ()}
    return interval([row for row in a or () if place(row) in other], lambda row: row[metric] / other[place(row)])


def gap_share(
    low: Sequence[Row] | None, part: Sequence[Row] | None, high: Sequence[Row] | None, seed: int = 0
) -> dict[str, Any] | None:
    """Returns the share of a gap in PSNR that is closed, of the mean gap over the slices that all three have.

        share = sum_s (part_s - low_s) / sum_s (high_s - low_s)

    with the two-stage percentile bootstrap of `metrics.summary`, or, of two to nine slices, Student's interval of the
    jackknife's pseudo-values. The mean is None where there is no gap: its own interval is not above 0.
    """
    psnr = [{(str(row["case"]), row["slice"]): row for row in rows or ()} for rows in (low, part, high)]
    common = sorted(psnr[0].keys() & psnr[1].keys() & psnr[2].keys())
    groups: dict[str, list[tuple[float, float]]] = {}
    for key in common:
        a, b, c = (float(rows[key]["psnr"]) for rows in psnr)
        if all(map(math.isfinite, (a, b, c))):
            groups.setdefault(str(psnr[0][key].get("patient")), []).append((b - a, c - a))
    if not groups:
        return None
    values = [np.array(groups[name]) for name in sorted(groups)]
    closed, gap = np.concatenate(values).sum(axis=0)
    num_cases = sum(map(len, values))
    nothing = {"mean": None, "low": None, "high": None, "num_cases": num_cases}
    if num_cases == 1:
        return {**nothing, "mean": float(closed / gap)} if gap > 0 else nothing
    if num_cases in STUDENT:
        pairs = np.concatenate(values)
        if student(pairs[:, 1].tolist())["low"] <= 0:
            return nothing
        left_out = [(closed - c) / (gap - g) for c, g in pairs.tolist()]
        pseudo = [num_cases * closed / gap - (num_cases - 1) * other for other in left_out]
        return {"mean": float(closed / gap), "num_cases": num_cases, **student(pseudo)}
    rng = np.random.default_rng(seed)
    totals = np.zeros((NUM_RESAMPLES, 2))
    drawn = rng.integers(len(values), size=(NUM_RESAMPLES, len(values)))
    for index, group in enumerate(values):
        replicate = np.nonzero(drawn == index)[0]
        picked = rng.integers(len(group), size=(len(replicate), len(group)))
        np.add.at(totals, replicate, group[picked].sum(axis=1))
    if gap <= 0 or np.percentile(totals[:, 1], 2.5) <= 0:
        return nothing
    bounds = np.percentile(totals[:, 0] / np.maximum(totals[:, 1], 1e-9), [2.5, 97.5])
    return {"mean": float(closed / gap), "low": float(bounds[0]), "high": float(bounds[1]), "num_cases": num_cases}
