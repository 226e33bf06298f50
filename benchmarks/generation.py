"""What a prior knows before any measurement: unconditional samples, and whether they show the grid of their patches.

    python -m benchmarks.generation --json generation.json [--num-images 16] [--figure generation.png]

The sampler is that of `generate_ct.yaml`. The patch prior draws once with the grid shifted at random at every
evaluation and once with a grid that never moves; `--naive` adds a patch prior trained without positions, on the fixed
grid; the whole-image prior has no grid. Slices of a patient in no training set are what samples should look like.

Seam statistic: gradients across the fixed grid's borders over those beside them, 1 without seams. Contrast: its largest
value over all offsets of a grid, over the median; it finds a grid that lies elsewhere, and exceeds 1 by chance, so
compare it with that of the slices. Body-like share: pixels of the largest connected region above -400 HU.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import _common
from benchmarks._common import VALIDATION, Record, Row
from benchmarks._machine import describe_machine
from benchmarks.claims._verdicts import contrast
from invrecon.data.cases import CaseBatch
from invrecon.data.generation import GenerationData
from invrecon.data.intensity import Intensity
from invrecon.errors import InputError
from invrecon.methods import DDIM, KarrasSchedule, UnconditionalSampler
from invrecon.metrics import body_mask, find_seams, seam_statistic, summarise
from invrecon.metrics.summary import format_entry
from invrecon.operators import Identity
from invrecon.precision import PRECISIONS, resolve_precision
from invrecon.priors.layouts import FixedGrid, Layout
from invrecon.priors.patch import PatchPrior
from invrecon.report.provenance import fingerprint
from invrecon.report.sheet import Sheet, Window
from invrecon.tasks.reconstruction import Reconstruction

SHIFTED, FIXED, NAIVE, WHOLE, SLICES = "patch, shifted", "patch, fixed grid", "naive patch", "whole", "CT slices"
COLUMNS = {
    "seams": "Seam statistic",
    "contrast": "Contrast over offsets",
    "mean": "Mean intensity",
    "std": "Std. deviation of intensity",
    "body": "Body-like share",
}
WINDOW = Window("", -1000.0, 400.0)


@dataclass(frozen=True)
class Contestant:
    """Who draws: a prior file, or the name of a shipped one, and where its patches lie if not where they usually do."""

    prior: str
    layout: Layout | None = None


def make_sampler(num_levels: int) -> UnconditionalSampler:
    """Returns the sampler of `generate_ct.yaml`, at a number of levels."""
    return UnconditionalSampler(KarrasSchedule(num_levels, sigma_max=10.0, sigma_min=0.002), DDIM(eta=1.0))


def centred(size: int, patch_size: int) -> int:
    """Returns by how much a grid centred on the image begins before it."""
    return -size % patch_size // 2


def contestants(options: Any, offset: int) -> dict[str, Contestant]:
    """Returns who draws, by label."""
    grid = FixedGrid(offset)
    found = {SHIFTED: Contestant(options.prior), FIXED: Contestant(options.prior, grid)}
    if options.naive:
        found[NAIVE] = Contestant(options.naive, grid)
    return found | {WHOLE: Contestant(options.whole)}


def judge(images: Tensor, patch_size: int, offset: int) -> list[Row]:
    """Returns the statistics of images `(B, 1, H, W)`, a row an image."""
    columns = {
        "seams": seam_statistic(images, patch_size, (-offset, -offset)),
        "contrast": find_seams(images, patch_size).contrast,
        "mean": images.mean(dim=(1, 2, 3)),
        "std": images.std(dim=(1, 2, 3)),
        "body": body_mask(images).float().mean(dim=(1, 2, 3)),
    }
    return [{name: float(values[b]) for name, values in columns.items()} for b in range(len(images))]


@torch.no_grad()
def draw(
    task: Reconstruction, batch: CaseBatch, patch_size: int, offset: int, machine: str
) -> tuple[Tensor, list[Row]]:
    """Returns the samples of a batch and their rows; each sample is a case, and a patient, of its own."""
    result = task.reconstruct(batch)
    images = result.estimate.mean.cpu()
    where = {"machine": machine, "precision": resolve_precision(task.precision, task.device)}
    rows = [
        {"case": "sample", "slice": index, "patient": name, "seconds": own["seconds"], **where, **row}
        for index, name, own, row in zip(
            batch.index, batch.id, result.rows, judge(images, patch_size, offset), strict=True
        )
    ]
    return images, rows


def patch_size_of(task: Reconstruction) -> int:
    """Returns the side of the patches of a task's prior."""
    if not isinstance(task.prior, PatchPrior):
        raise InputError(f"--prior has to be a patch prior, got {type(task.prior).__name__}: its grid is judged.")
    return task.prior.patch_size


def make_task(contestant: Contestant, size: int, num_levels: int, precision: str) -> Reconstruction:
    """Returns the task that draws."""
    method, layout = make_sampler(num_levels), contestant.layout
    return Reconstruction(Identity(size), method, prior=contestant.prior, precision=precision, layout=layout)


def sample(
    record: Record, label: str, contestant: Contestant, options: Any, patch_size: int, offset: int
) -> tuple[Tensor | None, list[Row]]:
    """Returns the first batch of samples, if any was drawn, and a row a sample, from the record where it has them."""
    settings = {
        "sampler": _common.plain(make_sampler(options.levels)),
        "layout": _common.plain(contestant.layout),
        "grid": [patch_size, offset],
        "size": options.size,
        "batch_size": options.batch_size,
        **({} if options.precision == "auto" else {"precision": options.precision}),
    }
    identity = fingerprint(settings, _common.weights_hash(contestant.prior), [])
    task: Reconstruction | None = None
    first, rows = None, list[Row]()
    for batch in GenerationData(options.num_images, options.size, options.batch_size).predict_dataloader():
        keys = [f"{label}/{name}" for name in batch.id]
        found = [row for key in keys if (row := record.find(key, identity)) is not None]
        if len(found) < len(keys) or (options.figure and first is None):
            task = task or make_task(contestant, options.size, options.levels, options.precision).to(record.device)
            images, found = draw(task, batch, patch_size, offset, describe_machine(record.machine))
            first = images if first is None else first
            record.add(dict(zip(keys, found, strict=True)), identity)
            _common.progress(f"{label}, {', '.join(batch.id)}: {found[0]['seconds']:.1f} s a sample")
        rows += found
    return first, rows


def slices(options: Any, patch_size: int, offset: int) -> tuple[Tensor, list[Row]]:
    """Returns slices of a patient in no training set, and their rows."""
    batches = _common.load_batches(VALIDATION, options.slices, options.size, options.batch_size)
    rows, images = [], []
    for batch in batches:
        assert batch.reference is not None
        images.append(batch.reference)
        judged = judge(batch.reference, patch_size, offset)
        names = zip(batch.id, batch.index, batch.patient, judged, strict=True)
        rows += [{"case": name, "slice": index, "patient": patient, **row} for name, index, patient, row in names]
    return torch.cat(images), rows


def report(rows: Mapping[str, list[Row]]) -> dict[str, Any]:
    """Prints the table; returns what it holds."""
    summaries = {label: summarise(own, list(COLUMNS)) for label, own in rows.items()}
    lines = [
        (label, len(rows[label]), *(format_entry(name, summary[name]) for name in COLUMNS))
        for label, summary in summaries.items()
    ]
    print("\n" + _common.markdown(["Prior", "Images", *COLUMNS.values()], lines))
    differences = {
        f"{label} - {SHIFTED}": entry
        for label in (FIXED, NAIVE)
        if (entry := contrast((1, rows.get(label)), (-1, rows[SHIFTED]), metric="seams")) is not None
    }
    print("\nIntervals: 95 %, bootstraps over samples, those of fewer than ten differences Student's; those of the")
    print("slices say nothing about other patients.")
    for name, entry in differences.items():
        print(f"Seam statistic, {name}, from the same noise: {_common.difference_cell(entry, '').strip()}")
    return {"summaries": summaries, "differences": differences}


def draw_figure(path: Path, images: Mapping[str, Tensor], rows: Mapping[str, list[Row]], grid: Iterable[int]) -> None:
    """Draws samples, a row a prior, each with a zoom on a crossing of the grid and its seam statistic."""
    patch_size, offset = grid
    num = min(4, *(len(own) for own in images.values()))
    size = next(iter(images.values())).shape[-1]
    crossing = patch_size * round((size / 2 + offset) / patch_size) - offset
    side = min(patch_size, size // 4)
    sheet = Sheet(len(images), num, (size, size), "Unconditional samples", "zoom: a crossing of the fixed grid")
    for r, (label, own) in enumerate(images.items()):
        sheet.row_label(r, label, f"{WINDOW.low:g} … {WINDOW.high:g} HU")
        for c in range(num):
            array = Intensity().decode(own[c, 0]).numpy()
            axes = sheet.panel(r, c, array, WINDOW, (crossing - side // 2, crossing - side // 2, side))
            sheet.label(axes, f"seams {rows[label][c]['seams']:.2f}", False)
    sheet.save(path)
    print(f"Figure: {path}")


def main(args: list[str] | None = None) -> None:
    parser = _common.make_quality_parser(__doc__, "0:30:4")
    parser.add_argument("--whole", default="whole_ct", help="whole-image prior: a file, or the name of a shipped one")
    parser.add_argument("--naive", help="patch prior trained without positions; left out if not given")
    parser.add_argument("--num-images", type=int, default=8, help="samples of each prior")
    parser.add_argument("--levels", type=int, default=100, help="noise levels, and so evaluations a sample")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto")
    parser.add_argument("--figure", type=Path, help="PNG of the first samples")
    options = parser.parse_args(args)
    patch_size = patch_size_of(make_task(Contestant(options.prior), options.size, 1, options.precision))
    offset = centred(options.size, patch_size)
    competing = contestants(options, offset)
    for contestant in competing.values():
        _common.weights_hash(contestant.prior)  # a missing prior is noticed now, not after an hour
    record = _common.start(options, "generation")
    reference, own = slices(options, patch_size, offset)
    images, rows = {SLICES: reference}, {SLICES: own}
    for label, contestant in competing.items():
        first, rows[label] = sample(record, label, contestant, options, patch_size, offset)
        if first is not None:
            images[label] = first
    record.save(grid={"patch_size": patch_size, "offset": offset}, **report(rows))
    if options.figure:
        draw_figure(options.figure, images, rows, (patch_size, offset))


if __name__ == "__main__":
    _common.run(main)
