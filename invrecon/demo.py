"""The demonstration: real chest CT slices of a patient nobody trained on, from 20 and from 60 views.

Run by `make demo` or `python -m invrecon.demo`; writes `outputs/demo/`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invrecon.allocator import keep_freed_memory
from invrecon.data.cases import CaseBatch
from invrecon.data.intensity import HOUNSFIELD, Intensity
from invrecon.data.reconstruction import ReconstructionData
from invrecon.errors import InputError
from invrecon.files import write_csv, write_json
from invrecon.methods import FBP, AnnealedPnPADMM, Method, TotalVariation
from invrecon.metrics.image import body_mask, masked_psnr, psnr, ssim
from invrecon.metrics.mri import relative_magnitudes
from invrecon.metrics.summary import format_table, summarise_by
from invrecon.operators import LinearOperator, ParallelBeamCT
from invrecon.priors.base import Prior
from invrecon.priors.mirror import MirroredPrior
from invrecon.priors.weights import PriorCard, file_hash, load_prior
from invrecon.report.store import ROW_FIELDS
from invrecon.rng import make_generators
from invrecon.shared import find_shared

VIEWS = (20, 60)
METHODS: dict[str, Method] = {"FBP": FBP(), "TV": TotalVariation(), "Patch diffusion": AnnealedPnPADMM()}


def reconstruct(
    methods: Mapping[str, Method],
    y: Tensor,
    operator: LinearOperator,
    x: Tensor,
    prior: Prior,
    batch: CaseBatch,
    setting: str,
    columns: Mapping[str, Any],
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Reconstructs measurements `y` of slices `x`, `(B, C, H, W)`, by every method.

    Args:
        methods: By name.
        y: Measurements, `(B, ...)`.
        operator: That measured them, bound to the slices.
        x: The truth; magnitudes are judged of complex images.
        prior: For the methods that take one.
        batch: The slices' names.
        setting: What was measured, in words.
        columns: The same for the lines of metrics.

    Returns:
        Images by method, and a line of metrics for every method and slice.
    """
    images, rows = {}, []
    for name, method in methods.items():
        start = time.perf_counter()
        estimate = method(y, operator, prior, generators=make_generators(0, batch.id))
        seconds = (time.perf_counter() - start) / len(x)
        images[name] = estimate.mean
        pair = (estimate.mean, x)
        shown, truth = relative_magnitudes(*pair) if operator.complex_images else pair
        values = {"psnr": psnr(shown, truth), "ssim": ssim(shown, truth)}
        if not operator.complex_images:
            values["psnr_body"] = masked_psnr(shown, truth, body_mask(truth))
        values["relative_residual"] = torch.tensor(estimate.stats["relative_residual"])
        for b, case in enumerate(batch.id):
            row: dict[str, Any] = {"case": case.rsplit("/", 1)[0], "slice": batch.index[b], "patient": batch.patient[b]}
            row |= {**columns, "method": name, "seconds": seconds, "seed": 0}
            row |= {key: float(value[b]) for key, value in values.items()}
            row |= {key: estimate.stats[key] for key in ("num_evaluations", "num_operator_calls")}
            rows.append(row)
        print(f"  {setting}, {name}: {values['psnr'].mean():.2f} dB, {seconds:.1f} s a slice", flush=True)
    return images, rows


def write_results(
    output: Path, rows: Mapping[str, Sequence[dict[str, Any]]], column: str, facts: Mapping[str, Any], **page: Any
) -> dict[str, Any]:
    """Writes `metrics.csv`, `summary.json` and `report.html`.

    Args:
        output: Folder to write.
        rows: Setting -> lines of metrics.
        column: The column that tells settings apart.
        facts: Of the page.
        page: What else `write_report` takes.

    Returns:
        The summary, by setting and method.
    """
    from invrecon.report.html import write_report

    every = [row for group in rows.values() for row in group]
    summary = {f"{setting}, {name}": s for setting, group in rows.items() for name, s in summarise_by(group).items()}
    write_csv(output / "metrics.csv", every, (column, *ROW_FIELDS))
    write_json(output / "summary.json", summary)
    write_report(output / "report.html", facts, summary, every, **page)
    return summary


def run(output: Path, prior_name: str, slices: str) -> dict[str, Any]:
    """Runs the demonstration and writes table, figures and page.

    Args:
        output: Folder to write.
        prior_name: A prior file, or the bare name of a shipped one.
        slices: Which slices of the shipped volume.

    Returns:
        The summary, by setting and method.
    """
    from invrecon.report.figures import choose_windows, comparison_figure, image_png
    from invrecon.report.html import Comparison, Figure

    path, prior, card = open_prior(prior_name, HOUNSFIELD, "CT images", "patch_ct.yaml")
    data = ReconstructionData("lung2_sample.h5", slices=slices)
    batch = one_batch(data)
    x = batch.reference
    assert x is not None
    print(f"{len(batch)} slices of {batch.patient[0]}, {x.shape[-2]} x {x.shape[-1]} pixels, noise-free parallel beams")
    images, rows = {}, {}
    for num_views in VIEWS:
        operator = ParallelBeamCT(size=(x.shape[-2], x.shape[-1]), num_views=num_views)
        operator.norm()  # computed once here, so that no method's time contains it
        setting = f"{num_views} views"
        images[setting], rows[setting] = reconstruct(
            METHODS, operator(x), operator, x, MirroredPrior(prior), batch, setting, {"num_views": num_views}
        )

    decode, figures, comparisons = data.intensity.decode, [], []
    for b, case in enumerate(batch.id):
        figure = output / "figures" / f"{case.replace('/', '_')}.png"
        settings = {s: {name: decode(image[b]) for name, image in group.items()} for s, group in images.items()}
        title = f"{case.rsplit('/', 1)[0]}, slice {batch.index[b]}"
        comparison_figure(figure, settings, decode(x[b]), title=title, voxel_mm=batch.voxel_mm[b])
        figures.append(Figure(figure, title))
        if b < 2:
            window, (setting, shown) = choose_windows(decode(x[b]))[-1], next(iter(settings.items()))
            pngs = {f"{name}, {setting}": image_png(shown[name], window) for name in ("FBP", "Patch diffusion")}
            comparisons.append(Comparison(pngs, title))
    facts = {
        "data": "real chest CT of one patient, in no training set (pyradiomics sample, BSD-3-Clause)",
        "operator": "parallel beam over 180 degrees, 512 detector bins (PaDIS geometry), no noise",
        "prior": f"{card.kind}, {card.training.get('num_parameters', 0):,} parameters, {len(card.data)} volumes",
        "weights (SHA-256)": file_hash(path),
        "methods": "filtered back-projection (Hann); total variation, tuned and run to its optimum; patch diffusion",
    }
    return write_results(
        output,
        rows,
        "num_views",
        facts,
        figures=figures,
        comparisons=comparisons,
        title="From twenty views",
        subtitle="A chest reconstructed by filtered back-projection, total variation and a patch diffusion prior",
        command="make demo",
    )


def open_prior(name: str, intensity: Intensity, images: str, config: str) -> tuple[Path, Prior, PriorCard]:
    """Returns a prior's file, the prior, whose network runs in bfloat16 where the hardware has it, and its card.

    Args:
        name: The file, or the bare name of a shipped one.
        intensity: The scale of the images that the demonstration is about.
        images: What they are, in words.
        config: What trains such a prior.

    Raises:
        InputError: The prior is missing, or of other images.
    """
    path = find_shared(name, "checkpoints", ".safetensors")
    prior, card = load_prior(path)
    if card.intensity != asdict(intensity):
        raise InputError(f"'{path}' is not a prior of {images}: give one that {config} has trained.")
    prior.denoiser.precision = "auto"  # type: ignore[union-attr]
    return path, prior, card


def one_batch(data: ReconstructionData) -> CaseBatch:
    """Returns all cases, which are of one file, as one batch."""
    data.batch_size = len(data.case_ids())
    (batch,) = data.test_dataloader()
    return batch


def command_line(
    args: list[str] | None, run: Callable[[Path, str, str], dict[str, Any]], columns: Sequence[str], **defaults: Any
) -> None:
    """Parses the few options of a demonstration, runs it and prints its table.

    Args:
        args: Arguments; those of the process if None.
        run: Takes folder, prior and slices, and returns a summary.
        columns: Of the table.
        defaults: `description`, `output`, `prior` and `slices`.
    """
    parser = argparse.ArgumentParser(description=defaults["description"])
    parser.add_argument("--output", type=Path, default=Path(defaults["output"]))
    parser.add_argument("--prior", default=defaults["prior"], help="prior file, or the name of a shipped one")
    parser.add_argument("--slices", default=defaults["slices"], help="slices of the shipped volume, e.g. 0:4")
    options = parser.parse_args(args)
    keep_freed_memory()
    try:
        summary = run(options.output, options.prior, options.slices)
    except InputError as error:
        sys.exit(f"invrecon: {error}")
    print(format_table(summary, columns))
    print(f"Look at {options.output / 'report.html'}.")


def main(args: list[str] | None = None) -> None:
    """Parses the few options and runs."""
    defaults = {"description": __doc__, "output": "outputs/demo", "prior": "patch_ct_fine", "slices": "1:8:2"}
    command_line(args, run, ("psnr", "ssim", "psnr_body", "seconds"), **defaults)


if __name__ == "__main__":
    main()
