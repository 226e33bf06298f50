"""A grid of panels on a dark page, the canvas of every figure; measured in inches."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from invrecon.files import atomic_write

BACKGROUND, TEXT, MUTED, ACCENT = "#0d0f13", "#eceef1", "#8d96a4", "#ffcf70"
PANEL, GAP, LEFT, TOP, MARGIN = 2.3, 0.07, 0.42, 0.72, 0.16  # [inch]
DPI = 160
INSET = 0.36  # side of its inset, as a share of the panel


@dataclass(frozen=True)
class Window:
    """A display window: `low` is black, `high` white, in `units`."""

    name: str
    low: float
    high: float
    units: str = "HU"

    def colours(self, array: np.ndarray) -> np.ndarray:
        """Returns a colour image `(H, W, 3)` on [0, 1], which no colour map sees; a grey one `(H, W)` as it is."""
        return np.clip((array - self.low) / (self.high - self.low), 0, 1) if array.ndim == 3 else array


def grey(array: np.ndarray) -> np.ndarray:
    """Returns the mean over the channels of a colour image `(H, W, 3)`; a grey one `(H, W)` as it is."""
    return array.mean(axis=-1) if array.ndim == 3 else array


class Sheet:
    """A figure of `num_rows x num_columns` panels.

    Args:
        num_rows: Rows.
        num_columns: Columns.
        shape: `(H, W)` of the images; panels have their aspect.
        title: Upper left.
        subtitle: Upper right.
    """

    def __init__(self, num_rows: int, num_columns: int, shape: tuple[int, ...], title: str, subtitle: str) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.shape = shape
        self.panel_height = PANEL * min(max(shape[0] / shape[1], 0.4), 2.5)
        self.width = LEFT + num_columns * PANEL + (num_columns - 1) * GAP + MARGIN
        self.height = TOP + num_rows * self.panel_height + (num_rows - 1) * GAP + MARGIN
        # Figure and canvas made directly: no pyplot, so no global state, no display, no leak over many
        # slices.
        self.figure = Figure(figsize=(self.width, self.height), dpi=DPI, facecolor=BACKGROUND)
        FigureCanvasAgg(self.figure)
        self._text(LEFT, 0.22, title, size=10.5, color=TEXT, weight="bold")
        self._text(self.width - MARGIN, 0.22, subtitle, size=8, color=MUTED, ha="right")

    def titles(self, names: Sequence[str]) -> None:
        """Writes a title above each column."""
        for column, name in enumerate(names):
            centre = LEFT + column * (PANEL + GAP) + PANEL / 2
            self._text(centre, TOP - 0.13, _small_caps(name), size=7.5, color=TEXT, ha="center")

    def row_label(self, row: int, name: str, detail: str) -> None:
        """Writes name and detail along the left edge of a row."""
        centre = TOP + row * (self.panel_height + GAP) + self.panel_height / 2
        for x, text, color in ((0.14, _small_caps(name), TEXT), (0.29, detail, MUTED)):
            self._text(x, centre, text, size=6.8, color=color, ha="center", rotation=90)

    def panel(self, row: int, column: int, array: np.ndarray, window: Window, box: tuple[int, int, int]) -> Any:
        """An image with its zoom in the lower right corner, where a body seldom reaches."""
        from matplotlib.patches import Rectangle

        axes = self._axes(row, column)
        array = window.colours(array)
        style: dict[str, Any] = {"cmap": "gray", "vmin": window.low, "vmax": window.high}
        axes.imshow(array, interpolation="nearest", aspect="auto", **style)
        top, left, size = box
        if size >= 8:
            frame: dict[str, Any] = {"fill": False, "edgecolor": ACCENT, "linewidth": 0.7}
            axes.add_patch(Rectangle((left - 0.5, top - 0.5), size, size, alpha=0.9, **frame))
            inset = axes.inset_axes((1 - INSET, 0, INSET, INSET * PANEL / self.panel_height))
            inset.imshow(array[top : top + size, left : left + size], interpolation="bicubic", aspect="auto", **style)
            _bare(inset, ACCENT, 0.7)
        return axes

    def map(
        self, row: int, column: int, array: np.ndarray, low: float, high: float, signed: bool, cyclic: bool = False
    ) -> Any:
        """A map in colours: diverging, dark at zero, when signed; the same at both ends when cyclic, as phases are."""
        axes = self._axes(row, column)
        return axes.imshow(
            array,
            cmap=_diverging() if signed else "twilight" if cyclic else "inferno",
            vmin=low,
            vmax=high,
            aspect="auto",
            interpolation="nearest",
        )

    def errors(self, row: int, arrays: Mapping[str, np.ndarray], truth: np.ndarray, limit: float, units: str) -> None:
        """A row of signed errors, in colour their mean over the channels, on one scale; its bar under the reference."""
        self.row_label(row, "error", f"± {limit:g} {units}".rstrip())
        mappable = None
        for column, array in enumerate(arrays.values(), start=1):
            mappable = self.map(row, column, grey(array - truth), -limit, limit, signed=True)
            rmse = float(np.sqrt(np.mean((array - truth) ** 2)))
            digits = ".0f" if rmse >= 10 else ".1f" if rmse >= 0.05 else ".2g"
            self.label(mappable.axes, f"RMSE {rmse:{digits}} {units}".rstrip(), False)
        what = "reconstruction - reference" + (", mean of channels" if truth.ndim == 3 else "")
        self.colour_bar(mappable, row, 0, f"{what} [{units}]" if units else what, inside=False)

    def colour_bar(self, mappable: Any, row: int, column: int, label: str, inside: bool) -> None:
        """A slim horizontal bar: at the top of a free cell, or inside, along the lower edge of the map."""
        from matplotlib.patches import Rectangle
        from matplotlib.ticker import FormatStrFormatter, MaxNLocator

        x = LEFT + column * (PANEL + GAP) + 0.12 * PANEL
        y = TOP + row * (self.panel_height + GAP) + (self.panel_height - 0.36 if inside else 0.2)
        if inside:
            mappable.axes.add_patch(
                Rectangle(
                    (0, 0),
                    1,
                    0.42 / self.panel_height,
                    transform=mappable.axes.transAxes,
                    color="black",
                    alpha=0.65,
                    linewidth=0,
                )
            )
        bounds = (x / self.width, 1 - (y + 0.06) / self.height, 0.76 * PANEL / self.width, 0.06 / self.height)
        axes = self.figure.add_axes(bounds)
        bar = self.figure.colorbar(mappable, cax=axes, orientation="horizontal")
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.locator = MaxNLocator(4, symmetric=mappable.norm.vmin < 0)
        if mappable.norm.vmax < 0.01:  # no common factor apart, for which there is no room
            bar.formatter = FormatStrFormatter("%g")
        bar.update_ticks()
        colour = TEXT if inside else MUTED
        axes.tick_params(colors=colour, labelsize=6, length=2, width=0.5, pad=1.5)
        axes.set_xlabel(label, color=colour, fontsize=6.2, labelpad=1.5)

    def label(self, axes: Any, text: str, best: bool) -> None:
        """Writes into the lower left corner of a panel; the best stands out."""
        axes.text(
            0.025,
            0.025,
            text,
            transform=axes.transAxes,
            fontsize=7.5,
            color=ACCENT if best else TEXT,
            weight="bold" if best else "normal",
            bbox={"facecolor": "black", "alpha": 0.55, "edgecolor": "none", "pad": 1.6},
        )

    def scale_bar(self, axes: Any, voxel_mm: Sequence[float] | None) -> None:
        """A bar of a round length, about a fifth of the image."""
        from matplotlib.patheffects import withStroke

        if voxel_mm is None or not float(voxel_mm[-1]) > 0:
            return
        pixel = float(voxel_mm[-1])
        target = 0.25 * self.shape[1] * pixel
        length = max((n for n in (1, 2, 5, 10, 20, 50, 100, 200) if n <= target), default=None)
        if length is None:
            return
        height, width = self.shape
        x0, y = 0.04 * width, 0.955 * height
        outline = [withStroke(linewidth=2.4, foreground="black")]
        line = {"color": TEXT, "linewidth": 1.4, "solid_capstyle": "butt", "path_effects": outline}
        axes.plot([x0, x0 + length / pixel], [y, y], **line)
        text = {"color": TEXT, "fontsize": 6.5, "ha": "center", "path_effects": outline}
        axes.text(x0 + length / pixel / 2, y - 0.03 * height, f"{length} mm", **text)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the PNG atomically."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", facecolor=BACKGROUND, metadata={"Software": "invrecon"})
        with atomic_write(path) as file:
            file.write(buffer.getvalue())
        return Path(path)

    def _axes(self, row: int, column: int) -> Any:
        x = LEFT + column * (PANEL + GAP)
        y = self.height - TOP - (row + 1) * self.panel_height - row * GAP
        bounds = (x / self.width, y / self.height, PANEL / self.width, self.panel_height / self.height)
        axes = self.figure.add_axes(bounds)
        _bare(axes, "#262b34", 0.5)
        return axes

    def _text(self, x: float, y: float, text: str, *, size: float, color: str, **style: Any) -> None:
        # A '$' in a name is a dollar, not mathematics.
        self.figure.text(
            x / self.width,
            1 - y / self.height,
            text,
            fontsize=size,
            color=color,
            va="center",
            parse_math=False,
            **style,
        )


def _small_caps(text: str) -> str:
    """Spaced capitals, by hair spaces."""
    return "\u200a".join(text.upper())


def _bare(axes: Any, edge: str, width: float) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_facecolor("black")
    for spine in axes.spines.values():
        spine.set_color(edge)
        spine.set_linewidth(width)


def _diverging() -> Any:
    """Blue, black, amber: zero is dark, like air, and the signs differ for colour-blind eyes too."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list(
        "error", ["#8fd0ff", "#2f86d6", "#123a66", "#07080a", "#6b3a10", "#dd8426", "#ffc46e"]
    )
