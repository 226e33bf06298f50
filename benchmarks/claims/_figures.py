"""Figures of the tables: rows as dots with intervals, curves against a number, rounds of expectation maximisation."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks._common import Row
from invrecon.files import atomic_write
from invrecon.report.sheet import ACCENT, BACKGROUND, DPI, MUTED, TEXT

GRID, LOSS = "#262b34", "#8fd0ff"
STRETCHED = 8.0  # rows that are further apart [dB] hide what is near zero
TICKS = (1.0, 3.0, 10.0, 30.0, 100.0)
Entry = Mapping[str, Any]


def filled(traces: Sequence[Sequence[float]]) -> np.ndarray:
    """Returns traces as an array; one that ended goes on with its last value."""
    longest = max(map(len, traces))
    return np.array([[*trace, *[trace[-1]] * (longest - len(trace))] for trace in traces])


def rounds_figure(path: str | os.PathLike[str], settings: Mapping[str, Sequence[Row]]) -> Path:
    """Draws, for each setting, PSNR and held-out loss against rounds: means over slices, and their rounds to stop at.

    Args:
        path: PNG, written atomically.
        settings: Title -> rows with `psnr_trace`, `stopped_step` and, where rays were held out, `held_out_trace`.

    Returns:
        `path`.
    """
    figure = dark_figure(0.7 + 2.9 * len(settings), 4.8)
    axes = figure.subplots(2, len(settings), sharex="col", squeeze=False, height_ratios=(3, 2))
    for column, (title, rows) in enumerate(settings.items()):
        top, bottom = axes[:, column]
        style_axes(top)
        style_axes(bottom)
        top.set_title(f"{title} ({len(rows)} slice{'s' * (len(rows) != 1)})", color=TEXT, fontsize=8.5)
        psnr = filled([row["psnr_trace"] for row in rows])
        mean = psnr.mean(axis=0)
        top.plot(mean, color=TEXT, linewidth=1.6, label="PSNR, mean")
        oracle = Counter(int(np.argmax(row["psnr_trace"])) for row in rows)
        chosen = Counter(max(int(row["stopped_step"]), 0) for row in rows)
        _mark(
            top,
            mean,
            oracle,
            len(rows),
            "best round, by the truth (area: share of slices)",
            {"facecolor": "none", "edgecolor": TEXT},
        )
        _mark(
            top,
            mean,
            chosen,
            len(rows),
            "chosen round",
            {"facecolor": ACCENT, "edgecolor": "none", "alpha": 0.8},
        )
        losses = [row["held_out_trace"] for row in rows if None not in row["held_out_trace"]]
        if losses:
            logarithm = np.log(np.maximum(filled(losses), 1e-30))
            bottom.plot(np.exp((logarithm - logarithm[:, :1]).mean(axis=0)), color=LOSS, linewidth=1.6)
            bottom.set_yscale("log")
            _plain_ticks(bottom)
        else:
            bottom.text(0.5, 0.5, "nothing held out", transform=bottom.transAxes, color=MUTED, fontsize=7, ha="center")
        bottom.set_xlabel("round", color=MUTED, fontsize=7.5)
        bottom.set_xlim(-0.4, psnr.shape[1] - 0.6)
        bottom.xaxis.get_major_locator().set_params(integer=True)
        if column == 0:
            top.set_ylabel("PSNR of the round's estimate [dB]", color=MUTED, fontsize=7.5)
            bottom.set_ylabel("held-out loss, of round 0", color=MUTED, fontsize=7.5)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    style = {"fontsize": 7, "labelcolor": TEXT, "frameon": False, "ncols": len(labels) if len(settings) > 1 else 1}
    legend = figure.legend(handles, labels, loc="outside lower center", **style)
    for handle in legend.legend_handles[1:]:
        handle.set_sizes([24])
    return save_figure(figure, path)


def dots_figure(path: str | os.PathLike[str], settings: Mapping[str, Mapping[str, Entry]], xlabel: str) -> Path:
    """Draws a panel a setting: a dot with its interval a row, the same rows in the same order everywhere, best first.

    The axis is linear between -1 and 1 and logarithmic beyond, where rows are that far apart.

    Args:
        path: PNG, written atomically.
        settings: Title -> title of a row -> mean, low and high (None without an interval).
        xlabel: What the means are.

    Returns:
        `path`.
    """
    means: dict[str, list[float]] = {}
    for rows in settings.values():
        for name, entry in rows.items():
            means.setdefault(name, []).append(entry["mean"])
    names = sorted(means, key=lambda name: -fmean(means[name]))
    spread = max(abs(value) for values in means.values() for value in values)
    margin = 0.4 + 0.062 * max(map(len, names))  # of the rows' titles, in inches
    figure = dark_figure(margin + 2.6 * len(settings), 0.9 + 0.19 * len(names))
    for index, (title, rows) in enumerate(settings.items()):
        axes = figure.add_subplot(1, len(settings), index + 1)
        style_axes(axes)
        axes.set_title(title, color=TEXT, fontsize=8.5)
        places = [(len(names) - 1 - names.index(name), entry) for name, entry in rows.items()]
        for place, entry in places:
            _whisker(axes, entry, place, horizontal=True)
        axes.axvline(0, color=MUTED, linewidth=0.7)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.set_yticks(range(len(names)), names[::-1] if index == 0 else [""] * len(names))
        if spread > STRETCHED:
            axes.set_xscale("symlog", linthresh=1.0)
            ticks = [tick for tick in TICKS if tick <= 2 * spread]
            shown = [-tick for tick in ticks[::-1]] + [0.0, *ticks]
            low, high = axes.get_xlim()
            shown = [tick for tick in shown if low <= tick <= high]
            axes.set_xticks(shown, [f"{tick:g}" for tick in shown])
            axes.minorticks_off()
    figure.supxlabel(xlabel, color=MUTED, fontsize=7.5)
    return save_figure(figure, path)


def curves_figure(
    path: str | os.PathLike[str], curves: Mapping[str, Mapping[float, Entry]], xlabel: str, ylabel: str
) -> Path:
    """Draws curves with intervals against a number on a logarithmic axis; one of a single point is a dot.

    Args:
        path: PNG, written atomically.
        curves: Title -> number -> mean, low and high (None without an interval).
        xlabel: What the number is.
        ylabel: What the means are.

    Returns:
        `path`.
    """
    figure = dark_figure(4.6, 3.4)
    axes = figure.add_subplot()
    style_axes(axes)
    for (title, points), colour in zip(curves.items(), (ACCENT, LOSS, TEXT), strict=False):
        axes.plot(list(points), [entry["mean"] for entry in points.values()], "o-", color=colour, label=title, ms=4)
        for x, entry in points.items():
            _whisker(axes, entry, x, horizontal=False, colour=colour)
    numbers = sorted({x for points in curves.values() for x in points})
    axes.set_xscale("log")
    axes.set_xticks(numbers, [f"{number:g}" for number in numbers])
    axes.minorticks_off()
    axes.set_xlabel(xlabel, color=MUTED, fontsize=7.5)
    axes.set_ylabel(ylabel, color=MUTED, fontsize=7.5)
    axes.legend(fontsize=7, labelcolor=TEXT, frameon=False)
    return save_figure(figure, path)


def _whisker(axes: Any, entry: Entry, place: float, horizontal: bool, colour: str = ACCENT) -> None:
    """Draws a mean as a dot, its interval as a line."""
    bounds = [entry["mean"] if entry[key] is None else entry[key] for key in ("low", "high")]
    line = (bounds, [place, place]) if horizontal else ([place, place], bounds)
    dot = (entry["mean"], place) if horizontal else (place, entry["mean"])
    axes.plot(*line, color=colour, linewidth=1.4)
    axes.plot(*dot, "o", color=colour, markersize=3.5)


def dark_figure(width: float, height: float) -> Any:
    """Returns an empty figure, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=BACKGROUND, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: str | os.PathLike[str]) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=BACKGROUND, metadata={"Software": "invrecon"})
    with atomic_write(path) as file:
        file.write(buffer.getvalue())
    return Path(path)


def _mark(axes: Any, curve: np.ndarray, counts: Counter[int], total: int, label: str, style: dict[str, Any]) -> None:
    """Draws a disk on the curve at every round that some slice stops at, its area the share of slices."""
    places = sorted(counts)
    sizes = [20 + 160 * counts[place] / total for place in places]
    axes.scatter(places, curve[places], sizes, linewidth=0.9, zorder=3, label=label, **style)


def _plain_ticks(axes: Any) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7) if high < 30 * low else (1,)))
    if high < 1.6 * low:
        axes.set_yscale("linear")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(ScalarFormatter())


def style_axes(axes: Any) -> None:
    axes.set_facecolor(BACKGROUND)
    axes.grid(color=GRID, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=7, length=2, width=0.5)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MUTED)
        spine.set_linewidth(0.5)
