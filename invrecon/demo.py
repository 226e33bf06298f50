"""The demonstration: real chest CT slices of a patient nobody trained on, from 20 and from 60 views.

Run by `make demo` or `python -m invrecon.demo`; writes `outputs/demo/`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invrecon.data.reconstruction import ReconstructionData
from invrecon.files import write_csv, write_json
from invrecon.methods import FBP, Method, ProximalDiffusion, TotalVariation
from invrecon.metrics.image import body_mask, masked_psnr, psnr, ssim
from invrecon.metrics.summary import format_table, summarise
from invrecon.operators import ParallelBeamCT
from invrecon.priors.base import Prior
from invrecon.priors.weights import file_hash, load_prior
from invrecon.report.store import ROW_FIELDS
from invrecon.rng import make_generators
from invrecon.shared import find_shared

VIEWS = (20, 60)
METHODS: dict[str, Method] = {"FBP": FBP(), "TV": TotalVariation(), "Patch diffusion": ProximalDiffusion()}


def reconstruct(
    x: Tensor, ids: list[str], patient: list[str], num_views: int, prior: Prior
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Measures slices `(B, 1, H, W)` from `num_views` views and reconstructs them by every method.

    Returns:
        Images by method, and a line of metrics for every method and slice.
    """
    operator = ParallelBeamCT(size=(x.shape[-2], x.shape[-1]), num_views=num_views)
    y = operator(x)
    operator.norm()  # computed once here, so that no method's time contains it
    mask, images, rows = body_mask(x), {}, []
    for name, method in METHODS.items():
        start = time.perf_counter()
        estimate = method(y, operator, prior, generators=make_generators(0, ids))
        seconds = (time.perf_counter() - start) / len(x)
        images[name] = estimate.mean
        values = {
            "psnr": psnr(estimate.mean, x),
            "ssim": ssim(estimate.mean, x),
            "psnr_body": masked_psnr(estimate.mean, x, mask),
            "relative_residual": torch.tensor(estimate.stats["relative_residual"]),
        }
        for b, case in enumerate(ids):
            stem, index = case.rsplit("/", 1)
            row: dict[str, Any] = {"case": stem, "slice": int(index), "patient": patient[b]}
            row |= {"num_views": num_views, "method": name, "seconds": seconds, "seed": 0}
            row |= {key: float(value[b]) for key, value in values.items()}
            row |= {key: estimate.stats[key] for key in ("num_evaluations", "num_operator_calls")}
            rows.append(row)
        print(f"  {num_views} views, {name}: {values['psnr'].mean():.2f} dB, {seconds:.1f} s a slice", flush=True)
    return images, rows


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
    from invrecon.report.html import Comparison, Figure, write_report

    path = find_shared(prior_name, "checkpoints", ".safetensors")
    prior, card = load_prior(path)
    prior.denoiser.compute_dtype = torch.bfloat16  # type: ignore[union-attr]
    data = ReconstructionData("lung2_sample.h5", slices=slices)
    (batch,) = list(_one_batch(data))
    x = batch.reference
    assert x is not None
    print(f"{len(batch)} slices of {batch.patient[0]}, {x.shape[-2]} x {x.shape[-1]} pixels, noise-free parallel beams")
    images, rows = {}, []
    for num_views in VIEWS:
        images[num_views], new = reconstruct(x, batch.id, batch.patient, num_views, prior)
        rows += new
    summary = {
        f"{num_views} views, {name}": summarise(
            [row for row in rows if row["num_views"] == num_views and row["method"] == name]
        )
        for num_views in VIEWS
        for name in METHODS
    }
    write_csv(output / "metrics.csv", rows, ("num_views", *ROW_FIELDS))
    write_json(output / "summary.json", summary)

    decode, figures, comparisons = data.intensity.decode, [], []
    for b, case in enumerate(batch.id):
        figure = output / "figures" / f"{case.replace('/', '_')}.png"
        settings = {f"{v} views": {name: decode(image[b]) for name, image in images[v].items()} for v in VIEWS}
        title = f"{case.rsplit('/', 1)[0]}, slice {batch.index[b]}"
        comparison_figure(figure, settings, decode(x[b]), title=title, voxel_mm=batch.voxel_mm[b])
        figures.append(Figure(figure, title))
        window = choose_windows(decode(x[b]))[-1]
        last = images[VIEWS[0]]
        if b < 2:
            shown = {
                f"FBP, {VIEWS[0]} views": image_png(decode(last["FBP"][b]), window),
                f"Patch diffusion, {VIEWS[0]} views": image_png(decode(last["Patch diffusion"][b]), window),
            }
            comparisons.append(Comparison(shown, title))
    facts = {
        "data": "real chest CT of one patient, in no training set (pyradiomics sample, BSD-3-Clause)",
        "operator": "parallel beam over 180 degrees, 512 detector bins (PaDIS geometry), no noise",
        "prior": f"{card.kind}, {card.training.get('num_parameters', 0):,} parameters, {len(card.data)} volumes",
        "weights (SHA-256)": file_hash(path),
        "methods": "filtered back-projection (Hann); total variation, tuned and run to its optimum; patch diffusion",
    }
    write_report(
        output / "report.html",
        facts,
        summary,
        rows,
        figures,
        title="From twenty views",
        subtitle="A chest reconstructed by filtered back-projection, total variation and a patch diffusion prior",
        command="make demo",
        comparisons=comparisons,
    )
    return summary


def _one_batch(data: ReconstructionData) -> Sequence[Any]:
    data.batch_size = len(data.case_ids())
    return list(data.test_dataloader())


def main(args: list[str] | None = None) -> None:
    """Parses the few options and runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--prior", default="patch_ct", help="prior file, or the name of a shipped one")
    parser.add_argument("--slices", default="1:8:2", help="slices of the shipped volume, e.g. 0:4")
    options = parser.parse_args(args)
    summary = run(options.output, options.prior, options.slices)
    print(format_table(summary, ("psnr", "ssim", "psnr_body", "seconds")))
    print(f"Look at {options.output / 'report.html'}.")


if __name__ == "__main__":
    main()
