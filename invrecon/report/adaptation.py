"""How a prior was adapted to a case: as JSON, in words and as a figure."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from invrecon.data.intensity import HOUNSFIELD, Intensity
from invrecon.report.figures import as_array, choose_windows, window_range
from invrecon.report.sheet import ACCENT, BACKGROUND, GAP, LEFT, MUTED, PANEL, TEXT, TOP, Sheet

if TYPE_CHECKING:
    from invrecon.adapt.base import Trace

Record = Mapping[str, Any]
MAX_IMAGES, MAX_LAYERS, NUM_COLUMNS = 8, 20, 4
DATA, GRID = "#8fd0ff", "#262b34"
LOSSES = {"data_loss": ("measurement", DATA), "held_out_loss": ("held out", ACCENT)}
LINEAR = {"psnr"}  # in decibels already


def encode_trace(trace: Trace, cases: Sequence[str], with_images: bool = False) -> dict[str, Any]:
    """Returns a trace ready for JSON.

    Args:
        trace: How an adapter came to be.
        cases: Ids of the cases that share it.
        with_images: Whether to name steps whose images are to be kept.

    Returns:
        The trace's fields, `steps` without images; `cases`; `shown`, the indices of the steps whose images are kept
        (`step_images`); of a fit `curves`, what the numbers of its steps are.
    """
    steps = [asdict(replace(step, image=None)) for step in trace.steps]
    for step in steps:
        del step["image"]
        step |= step.pop("values", {})
    named = getattr(trace, "curves", ())
    curves = {curve.name: {"label": curve.label, "threshold": curve.threshold} for curve in named}
    return {
        "steps": steps,
        "stopped_at": trace.stopped_at,
        "reason": trace.reason,
        "num_trainable": trace.num_trainable,
        "movement": trace.movement,
        "verdict": trace.verdict,
        "watched": trace.watched,
        "cases": list(cases),
        "shown": choose_steps(trace) if with_images else [],
        **({"curves": curves} if curves else {}),
    }


def is_fit(trace: Record) -> bool:
    """Whether a network was fitted from nothing: there are steps, and no layer of a prior that could have moved."""
    return bool(trace["steps"]) and not trace["movement"]


def choose_steps(trace: Trace) -> list[int]:
    """Returns the steps whose images are worth a panel: evenly spread, with the first, last and chosen one."""
    seen = [i for i, step in enumerate(trace.steps) if step.image is not None]
    if len(seen) <= MAX_IMAGES:
        return seen
    places = [round(k * (len(seen) - 1) / (MAX_IMAGES - 1)) for k in range(MAX_IMAGES)]
    chosen = [seen[place] for place in places]
    if trace.stopped_at in seen and trace.stopped_at not in chosen:
        nearest = min(range(1, MAX_IMAGES - 1), key=lambda k: abs(chosen[k] - trace.stopped_at))
        chosen[nearest] = trace.stopped_at
    return chosen


def step_images(trace: Trace, shown: Sequence[int]) -> Tensor:
    """Returns the images of these steps, `(K, C, H, W)` in intensity units."""
    images = [trace.steps[i].image for i in shown]
    return torch.stack([image for image in images if image is not None])


def describe_trace(trace: Record) -> str:
    """Says in words how the prior was adapted, or a network fitted, as a caption."""
    num_cases = len(trace["cases"])
    shared = f", shared by {num_cases} slices" if num_cases > 1 else ""
    furthest = ", ".join(f"{name} ({_percent(value)})" for name, value in _furthest(trace["movement"])[:3])
    adapted = trace["num_trainable"] > 0 and len(trace["steps"]) > 0
    moved = f"what moved most, relative to its weights: {furthest}" if furthest else "no layer moved"
    return _sentences(
        f"{trace['num_trainable']:,} parameters adapted{shared}" if adapted else "",
        _outcome(trace),
        moved if furthest or adapted else "",
        f"the estimates on the way are of {_owner(trace)}" if num_cases > 1 and trace["steps"] else "",
        trace["verdict"],
    )


def adaptation_figure(
    path: str | os.PathLike[str],
    trace: Record,
    images: np.ndarray | None = None,
    *,
    title: str = "",
    subtitle: str = "",
    intensity: Intensity = HOUNSFIELD,
) -> Path:
    """Losses along the steps and the movement of every layer; below, the estimates on the way.

    Of a network that was fitted, and not adapted, there are losses, and what else was measured on the way.

    Args:
        path: PNG, written atomically.
        trace: As of `encode_trace`.
        images: Estimates `(K, H, W)`, in colour `(K, 3, H, W)`, at the steps `trace["shown"]`; None for none.
        title: Such as the case's id.
        subtitle: Such as the method's name.
        intensity: Units of the estimates.

    Returns:
        `path`.
    """
    shown = list(trace.get("shown", ())) if images is not None else []
    num_rows = 1 + math.ceil(len(shown) / NUM_COLUMNS)
    sheet = AdaptationSheet(num_rows, NUM_COLUMNS, (1, 1) if images is None else images.shape[-2:], title, subtitle)
    if is_fit(trace):
        others = [name for name in trace.get("curves", {}) if name not in LOSSES]
        width = NUM_COLUMNS / (1 + len(others))
        sheet.losses(trace, width)
        for k, name in enumerate(others):
            sheet.curve(trace, name, (1 + k) * width, width)
    else:
        sheet.losses(trace)
        sheet.movement(trace)
    if images is not None and shown:
        window = choose_windows(images[-1], intensity)[0]
        owner = f"estimates of {_owner(trace)}" if len(trace["cases"]) > 1 else "estimates"
        for k, index in enumerate(shown):
            row, column = 1 + k // NUM_COLUMNS, k % NUM_COLUMNS
            axes = sheet.panel(row, column, as_array(images[k]), window, (0, 0, 0))
            sheet.label(axes, trace["steps"][index]["name"], index == trace["stopped_at"])
            if column == 0:
                sheet.row_label(row, owner, f"{window.name}, {window_range(window)}")
    return sheet.save(path)


class AdaptationSheet(Sheet):
    """A sheet whose first row holds plots side by side."""

    def losses(self, trace: Record, width: float = 2) -> None:
        """Data and held-out loss along the steps, with a mark and a line of words where it stopped."""
        curves = trace.get("curves", {})
        title = f"{'relative ' if curves else ''}loss along the way"
        axes = self._plot(0, title, left=0.34, bottom=0.64, columns=width)
        named = {key: (curves.get(key, {}).get("label", name), colour) for key, (name, colour) in LOSSES.items()}
        words = _sentences(_outcome(trace), trace["verdict"])
        lines = textwrap.wrap(words, int(45 * width))
        for k, line in enumerate(lines[:3]):
            more = " …" if k == 2 and len(lines) > 3 else ""
            self._text(LEFT + 0.34, TOP + self.panel_height - 0.34 + 0.14 * k, line + more, size=6.5, color=TEXT)
        self._along(axes, trace, named, width)

    def curve(self, trace: Record, name: str, column: float, width: float) -> None:
        """What else was measured along the steps, with the value at which the rule stops."""
        own = trace["curves"][name]
        axes = self._plot(column, name.replace("_", " "), left=0.34, bottom=0.64, columns=width)
        threshold = own["threshold"]
        if threshold is not None:
            axes.axhline(threshold, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)), label=f"stops at {threshold:g}")
        self._along(axes, trace, {name: (own["label"], ACCENT)}, width, log=name not in LINEAR)

    def _along(
        self, axes: Any, trace: Record, curves: Mapping[str, tuple[str, str]], width: float, log: bool = True
    ) -> None:
        """Draws numbers of the steps, by their key with label and colour, and marks where it stopped."""
        from matplotlib.ticker import NullLocator

        steps, stopped = trace["steps"], trace["stopped_at"]
        drawn = False
        for key, (label, colour) in curves.items():
            found = [(i, step.get(key)) for i, step in enumerate(steps)]
            points = [(i, value) for i, value in found if value is not None and (value > 0 or not log)]
            if points:
                size = 3.2 if len(points) <= 30 else 0
                axes.plot(*zip(*points, strict=True), color=colour, lw=1.3, marker="o", ms=size, label=label)
                drawn = True
        if not drawn:
            axes.set_axis_off()
            text = f"no {'loss' if 'data_loss' in curves else 'value'} was recorded"
            axes.text(0.5, 0.5, text, transform=axes.transAxes, color=MUTED, fontsize=7, ha="center")
            return
        axes.margins(y=0.16)
        if log:
            axes.set_yscale("log")
            ticks = _log_ticks(*axes.get_ylim())
            axes.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(axis="y", color=GRID, linewidth=0.5)
        axes.set_xlim(-0.5, len(steps) - 0.5)
        num, last = max(2, int(4 * width)), len(steps) - 1
        places = sorted({round(k * last / (num - 1)) for k in range(num)}) if last >= num else range(len(steps))
        longest = max(len(steps[i]["name"]) for i in places)
        places = list(places)[:: max(1, math.ceil(longest * len(places) / (42 * width)))]  # so that names stay apart
        axes.set_xticks(places, [steps[i]["name"] for i in places])
        if 0 <= stopped < len(steps):
            axes.axvline(stopped, color=TEXT, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        style = {"fontsize": 6.5, "labelcolor": TEXT, "facecolor": BACKGROUND, "edgecolor": "none", "framealpha": 1}
        axes.legend(loc="upper right" if log else "lower right", ncols=2, borderpad=0.2, **style)

    def movement(self, trace: Record) -> None:
        """How far the layers moved that moved furthest, as bars."""
        layers = _furthest(trace["movement"])
        top = layers[:MAX_LAYERS]
        counted = f", {len(top)} of {len(trace['movement'])} layers" if len(trace["movement"]) > len(top) > 0 else ""
        axes = self._plot(2, f"movement of the weights{counted}", left=1.75, bottom=0.06)
        axes.set_axis_off()
        if not top:
            none = "no layer of a prior moved"
            axes.text(0.2, 0.5, none, transform=axes.transAxes, color=MUTED, fontsize=7, ha="center")
            return
        finite = [value for _, value in top if math.isfinite(value)]
        longest = max(finite, default=1.0)
        for k, (name, value) in enumerate(top):
            length = min(value, longest) / longest
            axes.barh(k, length, height=0.62, color=DATA, alpha=0.85)
            style: dict[str, Any] = {"fontsize": 5.8, "va": "center", "parse_math": False}
            axes.text(-0.02, k, _shorten(name, 34), color=TEXT, ha="right", **style)
            axes.text(length + 0.015, k, _percent(value), color=MUTED, ha="left", **style)
        axes.set_xlim(0, 1.16)
        axes.set_ylim(max(len(top), 8) - 0.5, -0.5)

    def _plot(self, column: float, title: str, left: float, bottom: float, columns: float = 2) -> Any:
        """Axes over columns of the first row, with margins in inches."""
        width = columns * (PANEL + GAP) - GAP
        x, y = LEFT + column * (PANEL + GAP), self.height - TOP - self.panel_height
        self._text(x + width / 2, TOP - 0.13, "\u200a".join(title.upper()), size=7.5, color=TEXT, ha="center")
        gutter = 0.12
        bounds = ((x + left) / self.width, (y + bottom) / self.height)
        size = ((width - left - gutter) / self.width, (self.panel_height - bottom - 0.02) / self.height)
        axes = self.figure.add_axes((*bounds, *size), facecolor="none")
        axes.tick_params(colors=MUTED, labelsize=6, length=2, width=0.5, pad=2)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(MUTED)
            spine.set_linewidth(0.5)
        return axes


def _sentences(*texts: str) -> str:
    return " ".join(f"{text[0].upper()}{text[1:].rstrip('. ')}." for text in texts if text)


def _outcome(trace: Record) -> str:
    """Which weights made the result, and why those."""
    steps, stopped = trace["steps"], trace["stopped_at"]
    if not steps:
        return trace["reason"]
    name = f"“{steps[stopped]['name']}”" if 0 <= stopped < len(steps) else "the unadapted weights"
    return f"the result is that of {name} ({trace['reason'].rstrip('. ')})"


def _owner(trace: Record) -> str:
    return f"slice {int(trace['cases'][trace.get('watched') or 0].rsplit('/', 1)[1])}"


def _furthest(movement: Mapping[str, float | None]) -> list[tuple[str, float]]:
    """The layers that moved, furthest first; JSON has no infinity, of a layer that left zero, but null."""
    moved = [(name, math.inf if value is None else value) for name, value in movement.items() if value != 0]
    return sorted(moved, key=lambda item: -item[1])


def _percent(value: float) -> str:
    return f"{100 * value:.2g} %" if math.isfinite(value) else "from zero"


def _shorten(name: str, length: int) -> str:
    """The name without its middle, if it is too long: its ends tell layers apart."""
    half = (length - 1) // 2
    return name if len(name) <= length else f"{name[:half]}…{name[-half:]}"


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between the limits: decades if there are three, else more of each."""
    from matplotlib.ticker import MaxNLocator

    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [d * 10.0**e for e in exponents for d in digits if low <= d * 10.0**e <= high]
        if len(ticks) >= 3:
            return ticks[:: math.ceil(len(ticks) / 8)]
    return [float(tick) for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]
