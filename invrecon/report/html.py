"""A run's page: one self-contained HTML file, nothing fetched, readable in light and dark and on paper."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from invrecon.data.intensity import HOUNSFIELD, MAGNITUDE, Intensity
from invrecon.errors import InputError
from invrecon.files import atomic_write
from invrecon.metrics.summary import (
    COLUMNS,
    as_groups,
    describe,
    format_entry,
    format_value,
    heading,
    list_metrics,
)

_ROW_COLUMNS = ("case", "slice", "patient", "method", *COLUMNS, "seed")
CRIME = (
    "The measurement was simulated from the reference by the operator that the reconstruction uses, on the "
    "same grid (an inverse crime), unless the facts above say otherwise: real data are harder."
)
COMPLEX = (
    "PSNR and SSIM are those of magnitudes, slice by slice, with the largest value of the slice's reference as their "
    "data range, to which the reconstruction is clipped; SSIM has a uniform window of 7 x 7 pixels. The reference of "
    "measured k-space is the combination of coils, by maps of the calibration region, of all that was measured. "
    "volumes.csv has NMSE, PSNR and SSIM of volumes (the slices reconstructed), as fastMRI has them: they are higher. "
    "Those that end in _stored are against the root sum of squares of the coils that the file holds, as in fastMRI's "
    "tables: the noise of all coils is in it."
)
RESIDUAL = "The relative residual is ‖A x - y‖ / ‖y‖. With noise, a value far below the noise level is overfitting."
NOTES_WITHOUT_REFERENCE = (
    "There is no reference for this measurement, so there is no image error to report. A small residual says "
    "that the image explains the measurement, not that it is right: with few views very different images do.",
    "Where posterior samples were drawn, their standard deviation shows what the prior leaves open. It has "
    "not been calibrated and is no error bar for a diagnosis.",
)
NOTES_OF_SAMPLES = (
    "These images answer no measurement: they are samples of what the prior takes for likely, and show nobody.",
)
SEAMS = (
    "Seams: gradients across the borders of the patches' grid over those beside them, 1 without seams. A grid that "
    "moves from evaluation to evaluation is taken where it is centred on the image. Seam contrast: the largest value "
    "over all offsets of a grid, over the median; it exceeds 1 by chance, so compare it with that of images without a "
    "grid.",
)


@dataclass(frozen=True)
class Figure:
    """An image of the gallery: PNG bytes or a PNG file, and what it shows."""

    png: bytes | str | os.PathLike[str]
    caption: str = ""


@dataclass(frozen=True)
class Comparison:
    """Images of one slice, to be compared under a slider.

    Attributes:
        images: Label -> PNG bytes of equal size (`figures.image_png`); the first stands left, the last right.
        caption: What they show.
    """

    images: Mapping[str, bytes]
    caption: str = ""


def write_report(
    path: str | os.PathLike[str],
    facts: Mapping[str, Any],
    summary: Mapping[str, Any] | None,
    rows: Iterable[Mapping[str, Any]],
    figures: Sequence[Figure | str | os.PathLike[str]],
    config_text: str = "",
    *,
    title: str = "Reconstruction report",
    subtitle: str = "",
    command: str = "",
    notes: Sequence[str] | None = None,
    comparisons: Sequence[Comparison] = (),
    adaptation: Sequence[Figure] = (),
    adaptation_heading: str = "Adaptation",
    intensity: Intensity = HOUNSFIELD,
) -> Path:
    """Writes the page.

    Args:
        path: `report.html`, written atomically.
        facts: What, when, data, operator, noise, method, prior, seed, versions, hashes: shown in this order;
        a
            mapping as a value becomes one line; None is left out.
        summary: Of `metrics.summarise`, or `{method: summary}` of `metrics.summarise_by`, or one of the
        latter
            for each setting, such as `{'20 views': ..., '60 views': ...}`; None for none.
        rows: Lines of `metrics.csv`.
        figures: The gallery; a bare path is captioned by its stem.
        config_text: The resolved configuration, as YAML.
        title: The page's title.
        subtitle: A line under it.
        command: The command that made the run.
        notes: What a reader has to know to not misread the numbers; by default the notes that fit `rows`.
        comparisons: Slices to compare under a slider.
        adaptation: How the prior was adapted, or a network fitted, to each case.
        adaptation_heading: What these stand under.
        intensity: The scale of the metrics.

    Returns:
        `path`.

    Raises:
        InputError: A figure cannot be read, the disk is full or the folder cannot be written to.
    """
    rows = [dict(row) for row in rows]
    if notes is None:
        notes = _notes(rows, intensity)
    entries = [f if isinstance(f, Figure) else Figure(f, Path(f).stem) for f in figures]
    sections = [
        _section("Summary", _summary_table(summary) if summary else ""),
        _section("Compare", _comparisons(comparisons)),
        _section("Figures", "".join(_figure(f) for f in entries)),
        _section(adaptation_heading, "".join(_figure(f) for f in adaptation)),
        _section("Every slice", _rows_table(rows) if rows else ""),
        _section("How to read this", _list(notes)),
        _section("To make it again", _details("Command", command) + _details("Configuration", config_text)),
    ]
    page = Template((Path(__file__).parent / "report.template.html").read_text(encoding="utf-8")).substitute(
        title=_text(title),
        subtitle=f'<p class="subtitle">{_text(subtitle)}</p>' if subtitle else "",
        facts=_facts(facts),
        sections="\n".join(section for section in sections if section),
    )
    with atomic_write(path) as file:
        file.write(page.encode())
    return Path(path)


def _notes(rows: Sequence[Mapping[str, Any]], intensity: Intensity) -> tuple[str, ...]:
    """What the numbers of these rows are."""
    if any(row.get("psnr") is not None for row in rows):
        return _notes_with_reference(rows, intensity)
    if any(row.get("measurement") == "none" for row in rows):
        return NOTES_OF_SAMPLES + (SEAMS if any(row.get("seams") is not None for row in rows) else ())
    return NOTES_WITHOUT_REFERENCE


def _notes_with_reference(rows: Sequence[Mapping[str, Any]], intensity: Intensity) -> tuple[str, ...]:
    """What the metrics are, on which scale and over which pixels."""
    if intensity.units == MAGNITUDE.units:
        return COMPLEX, CRIME, RESIDUAL
    shift = f"({intensity.units} {'+' if intensity.offset < 0 else '-'} {abs(intensity.offset):g})"
    value = shift if intensity.offset else f"value [{intensity.units}]" if intensity.units else "value"
    scale = f"x = clip({value} / {intensity.scale:g}, 0, 1)" if intensity.scale != 1 else f"x = clip({value}, 0, 1)"
    body = "; “body” means inside the patient's outline alone, where air and table do not flatter"
    has_body = any(row.get("psnr_body") is not None for row in rows)
    what = (
        f"PSNR and SSIM use a data range of 1 on the intensity scale {scale}, both images clipped to it; SSIM has a "
        "uniform window of 7 x 7 pixels. They are computed image by image, over all pixels and channels"
    )
    return f"{what}{body if has_body else ''}.", CRIME, RESIDUAL


def _text(value: Any) -> str:
    return escape(str(value), quote=True)


def _section(name: str, body: str) -> str:
    return f"<section><h2>{_text(name)}</h2>{body}</section>" if body else ""


def _list(items: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{_text(item)}</li>' for item in items)}</ul>" if items else ""


def _facts(facts: Mapping[str, Any]) -> str:
    lines = []
    for key, value in facts.items():
        if value is None or value == "":
            continue
        if isinstance(value, Mapping):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, (list, tuple)):
            value = ", ".join(str(v) for v in value)
        lines.append(f"<div><dt>{_text(key)}</dt><dd>{_text(value)}</dd></div>")
    return f'<dl class="facts">{"".join(lines)}</dl>' if lines else ""


def _summary_table(summary: Mapping[str, Any]) -> str:
    """A line a method; in each group the best mean of every quality metric is set in bold."""
    groups = as_groups(summary)
    metrics = list_metrics(groups)
    head = "".join(f"<th>{_text(heading(m))}{_arrow(m)}</th>" for m in metrics)
    body = []
    for name, group in groups.items():
        if name:
            body.append(f'<tr class="group"><th colspan="{len(metrics) + 1}">{_text(name)}</th></tr>')
        best = {m: _best(m, [s.get(m, {}).get("mean") for s in group.values()]) for m in metrics}
        for label, entries in group.items():
            cells = "".join(_summary_cell(m, entries.get(m), best[m]) for m in metrics)
            body.append(f'<tr><th scope="row">{_text(label or "All slices")}</th>{cells}</tr>')
    lines = dict.fromkeys(describe(s) for group in groups.values() for s in group.values())
    caption = "".join(f'<p class="quiet">Mean [low, high] of {_text(line)}.</p>' for line in lines)
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f'<div class="wide">{table}</div>{caption}'


def _summary_cell(metric: str, entry: Mapping[str, Any] | None, best: float | None) -> str:
    mean, _, interval = format_entry(metric, entry).partition(" [")
    is_best = best is not None and entry is not None and entry.get("mean") == best
    interval = f"<small>[{_text(interval)}</small>" if interval else ""
    return f"<td>{f'<b>{_text(mean)}</b>' if is_best else _text(mean)}{interval}</td>"


def _best(metric: str, means: Sequence[float | None]) -> float | None:
    """The highest mean of several, where higher is better: a small residual or time alone is no merit."""
    values = [mean for mean in means if mean is not None]
    return max(values) if len(values) > 1 and metric in COLUMNS and COLUMNS[metric].better > 0 else None


def _arrow(metric: str) -> str:
    direction = COLUMNS[metric].better if metric in COLUMNS else 0
    return {1: ' <span class="quiet">↑</span>', -1: ' <span class="quiet">↓</span>', 0: ""}[direction]


def _rows_table(rows: Sequence[Mapping[str, Any]]) -> str:
    present = {key for row in rows for key, value in row.items() if value is not None and value != ""}
    columns = [c for c in _ROW_COLUMNS if c in present] + sorted(present - set(_ROW_COLUMNS))
    head = "".join(
        f'<th aria-sort="none"{_words(c)}><button type="button">{_text(_title(c))}</button></th>' for c in columns
    )
    body = "".join("<tr>" + "".join(_row_cell(c, row.get(c)) for c in columns) + "</tr>" for row in rows)
    table = f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="wide tall">{table}</div>'


def _title(column: str) -> str:
    return heading(column) if column in COLUMNS else column.replace("_", " ").capitalize()


def _row_cell(column: str, value: Any) -> str:
    if column in COLUMNS:
        key = "" if value is None else f' data-key="{_text(value)}"'
        return f"<td{key}>{_text(format_value(column, value))}</td>"
    return f"<td{_words(column)}>{_text('' if value is None else value)}</td>"


def _words(column: str) -> str:
    return ' class="words"' if column in ("case", "patient", "method", "stopped_at", "verdict") else ""


def _figure(figure: Figure) -> str:
    caption = f"<figcaption>{_text(figure.caption)}</figcaption>" if figure.caption else ""
    return f'<figure><img alt="{_text(figure.caption)}" src="{_data_uri(figure.png)}">{caption}</figure>'


def _comparisons(comparisons: Sequence[Comparison]) -> str:
    body = "".join(_comparison(comparison) for comparison in comparisons)
    return f'<div class="pair">{body}</div>' if body else ""


def _comparison(comparison: Comparison) -> str:
    """Two images under one slider, each chosen from a list; without scripts the last image simply shows."""
    labels = list(comparison.images)
    if len(labels) < 2:
        return ""
    images = "".join(
        f'<img alt="{_text(label)}" data-label="{_text(label)}" src="{_data_uri(png)}">'
        for label, png in comparison.images.items()
    )

    def choice(side: str, chosen: int) -> str:
        options = "".join(
            f'<option value="{i}"{" selected" if i == chosen else ""}>{_text(label)}</option>'
            for i, label in enumerate(labels)
        )
        return f'<select class="{side}" aria-label="Image on the {side}">{options}</select>'

    choices = f'<div class="choices">{choice("left", 0)}{choice("right", len(labels) - 1)}</div>'
    slider = '<input type="range" min="0" max="100" step="0.1" value="50" aria-label="Where the two images meet">'
    stage = f'<div class="stage">{images}<span class="bar"></span>{slider}</div>'
    caption = f"<figcaption>{_text(comparison.caption)}</figcaption>"
    return f'<figure class="compare">{choices}{stage}{caption}</figure>'


def _details(name: str, content: str) -> str:
    return f"<details><summary>{_text(name)}</summary><pre>{_text(content)}</pre></details>" if content else ""


def _data_uri(png: bytes | str | os.PathLike[str]) -> str:
    if not isinstance(png, bytes):
        path = Path(png)
        try:
            png = path.read_bytes()
        except OSError as error:
            raise InputError(f"Cannot read the figure {path}: {error.strerror}; run the command again.") from error
    return "data:image/png;base64," + base64.b64encode(png).decode()
