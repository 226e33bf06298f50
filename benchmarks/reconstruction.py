"""The main table: quality and time of every method on a patient in no training set.

    python -m benchmarks.reconstruction --json reconstruction.json [--only 20-clean 60-clean] [--methods FBP TV patch]

16 slices at 256 x 256, PaDIS parallel geometry (512 bins), 20 and 60 views, without noise and with 1 % relative
Gaussian noise; and 7 slices measured on the scanner's own 512 x 512 grid with photon noise (I0 = 1e5) and
reconstructed at 256 x 256, which commits no inverse crime. The run continues where it was stopped: a slice whose
settings, weights and data are those of the JSON is not computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import _common
from benchmarks._common import HELD_OUT, METRIC_HEADINGS, NATIVE, SETTINGS, TEST_SLICES, Bench, Entry, Row, Setting
from benchmarks.claims._verdicts import difference
from invrecon.data.cases import CaseBatch
from invrecon.data.intensity import Intensity
from invrecon.methods import FBP, AnnealedPnPADMM, Method, ProximalDiffusion, TotalVariation
from invrecon.metrics.summary import describe, summarise

METHODS: dict[str, Method] = {
    "FBP": FBP(),
    "TV": TotalVariation(),
    "patch": AnnealedPnPADMM(),
    "whole": AnnealedPnPADMM(),
    "proximal": ProximalDiffusion(),  # with the patch prior, too
}
PAIRS = (("patch", "TV"), ("patch", "whole"), ("patch", "proximal"))
AIMS = {"20-clean": 4.0, "60-clean": 5.0, "20-noisy": 3.5, "60-noisy": 3.5}  # over TV, at least [dB]


def setting_batches(setting: Setting, slices: str, size: int, batch_size: int) -> list[CaseBatch]:
    """Returns the batches of a setting; the native file holds seven slices, and all of them count."""
    if setting.native:
        return _common.load_batches(NATIVE, None, size, batch_size)
    return _common.load_batches(HELD_OUT, slices, size, batch_size)


@torch.no_grad()
def draw(bench: Bench, path: Path, index: int, methods: Sequence[str], priors: dict[str, str]) -> None:
    """Draws one slice from 20 and 60 views by every method."""
    from invrecon.report.figures import comparison_figure

    (batch,) = _common.load_batches(HELD_OUT, str(index), bench.size, 1)
    decode, images = Intensity().decode, dict[str, dict[str, Any]]()
    for name in ("20-clean", "60-clean"):
        row = images[SETTINGS[name].title] = {}
        for label in methods:
            entry = Entry(label, METHODS[label], priors.get(label), mirror=label in priors)
            result = bench.reconstruct(SETTINGS[name], entry, batch)
            row[label], reference = decode(result.estimate.mean[0]), result.reference
    assert reference is not None
    comparison_figure(path, images, decode(reference[0]), title=batch.id[0], voxel_mm=batch.voxel_mm[0])
    print(f"Figure: {path}")


def report(rows: dict[tuple[str, str], list[Row]], settings: Sequence[str], methods: Sequence[str]) -> dict[str, Any]:
    """Prints both tables; returns what they hold."""
    lines = [(SETTINGS[s].title, m, *_common.metric_cells(rows[s, m])) for s in settings for m in methods]
    print("\n" + _common.markdown(["Setting", "Method", *METRIC_HEADINGS], lines) + "\n")
    summaries = {
        s: {m: {**summarise(rows[s, m]), "median_seconds": _common.median_seconds(rows[s, m])} for m in methods}
        for s in settings
    }
    print("\n".join(dict.fromkeys(describe(summary) for group in summaries.values() for summary in group.values())))
    gaps = [row["relative_gap"] for own in rows.values() for row in own if "relative_gap" in row]
    if gaps:
        print(f"TV: relative duality gap at the end at most {max(gaps):.1e}")
    differences: dict[str, dict[str, Any]] = {s: {} for s in settings}
    compared = []
    for s in settings:
        for a, b in PAIRS:
            if a in methods and b in methods:
                aim = AIMS.get(s) if b == "TV" else None
                gain = difference(rows[s, a], rows[s, b])
                assert gain is not None  # the same slices
                entry = differences[s][f"{a} - {b}"] = {**gain, "aim": aim}
                aimed = "" if aim is None else f"{aim:.1f} dB"
                compared.append((SETTINGS[s].title, f"{a} - {b}", _common.difference_cell(entry), aimed))
    if compared:
        print("\n" + _common.markdown(["Setting", "PSNR, paired", "Difference", "Aim, at least"], compared))
    return {"summaries": summaries, "differences": differences}


def main(args: list[str] | None = None) -> None:
    parser = _common.make_quality_parser(__doc__, TEST_SLICES)
    parser.add_argument("--whole", default="whole_ct", help="whole-image prior: a file, or the name of a shipped one")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--figure", type=Path, help="PNG of one slice by all methods")
    parser.add_argument("--figure-slice", type=int, default=50)
    options = parser.parse_args(args)
    priors = {"patch": options.prior, "whole": options.whole, "proximal": options.prior}
    for label in (name for name in priors if name in options.methods):
        _common.weights_hash(priors[label])  # a missing prior is noticed now, not after an hour
    bench = Bench(_common.start(options, "reconstruction"), options.size)
    rows: dict[tuple[str, str], list[Row]] = {}
    for name in options.only:
        setting = SETTINGS[name]
        for batch in setting_batches(setting, options.slices, options.size, options.batch_size):
            for label in options.methods:
                entry = Entry(label, METHODS[label], priors.get(label), mirror=label in priors)
                new = bench.rows(setting, entry, batch)
                rows[name, label] = rows.get((name, label), []) + new
    bench.record.save(**report(rows, options.only, options.methods))
    if options.figure:
        draw(bench, options.figure, options.figure_slice, options.methods, priors)


if __name__ == "__main__":
    _common.run(main)
