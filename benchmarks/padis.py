"""The fast sampler against PaDIS as published, with the same weights: quality and time.

    python -m benchmarks.padis --json padis.json [--evaluations 1000]

Quality: `PaDISNormalised`, whose step does not depend on the geometry, 1000 evaluations, one slice at a time, paired
with ours. Time: `PaDISRepo`, the released code's recipe, is timed over 20 evaluations and extrapolated to 1000, in
float32 as published and, where the hardware has it, in bf16, one slice at a time, in turn with ours in batches. Every
part is kept in the JSON as soon as it is there, and a run that was stopped continues.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import _common, _machine
from benchmarks._common import FEW_SLICES, HELD_OUT, SETTINGS, Bench, Entry, Row
from benchmarks.claims._verdicts import difference
from invrecon.data.cases import CaseBatch
from invrecon.methods import AnnealedPnPADMM, Method, PaDISNormalised, PaDISRepo
from invrecon.precision import has_bfloat16
from invrecon.rng import make_generators

NUM_INNER, PUBLISHED = 10, 1000
OURS, NORMALISED, REPO, REPO_BF16 = "ours", "padis-norm", "padis-repo, float32", "padis-repo, bf16"


def contestant(bench: Bench, method: Method, prior: str, precision: str, batch: CaseBatch) -> Callable[[], Any]:
    """Returns a reconstruction of the batch, without its measurement."""
    task = bench.task(SETTINGS["20-clean"], Entry("timed", method, prior), precision)
    with torch.no_grad():
        y, operator, _ = task.measure(batch.to(bench.record.device))
    assert y is not None
    return lambda: task.method(y, operator, task.prior, generators=make_generators(bench.seed, batch.id))


def timed_rows(device: torch.device) -> dict[str, str]:
    """Returns the precisions that the published recipe is timed in: emulated, bfloat16 would take ten times as long."""
    return {REPO: "32", **({REPO_BF16: "bf16"} if has_bfloat16(device.type) else {})}


def time_all(bench: Bench, prior: str, timed: int, repeats: int, batches: list[CaseBatch]) -> list[Row]:
    """Returns seconds a slice of each contestant, a row a repeat; contestants take turns within a repeat."""
    setting, batch = SETTINGS["20-clean"], batches[0]
    (single,) = _common.load_batches(HELD_OUT, str(batch.index[0]), bench.size, 1)
    ours, repo = AnnealedPnPADMM(), PaDISRepo(num_levels=timed // NUM_INNER, num_inner=NUM_INNER)
    where = {"machine": bench.record.machine, "precision": bench.precision}
    names = timed_rows(bench.record.device)
    runs, rows = None, []
    for repeat in range(repeats):
        more = {"ours": _common.plain(ours), "batch": batch.id, **where}
        identity = bench.identity(setting, repo, prior, batch.source[0], **more)
        row = bench.record.find(f"timing/{repeat}", identity)
        if row is None:
            runs = runs or {
                OURS: contestant(bench, ours, prior, bench.precision, batch),
                **{name: contestant(bench, repo, prior, names[name], single) for name in names},
            }
            scale = {OURS: 1 / len(batch), **dict.fromkeys(names, PUBLISHED / timed)}
            seconds = {}
            for name, run in runs.items():
                _machine.synchronize()
                start = time.perf_counter()
                run()
                _machine.synchronize()
                seconds[name] = scale[name] * (time.perf_counter() - start)
            row = {"seconds": seconds, "ratio": {name: seconds[name] / seconds[OURS] for name in names}}
            bench.record.add({f"timing/{repeat}": row}, identity)
            _common.progress(", ".join(f"{name}: {value:.1f} s a slice" for name, value in seconds.items()))
        rows.append(row)
    return rows


def report(ours: list[Row], published: list[Row], timing: list[Row], evaluations: int) -> dict[str, Any]:
    """Prints the table; returns what it holds."""

    def median(kind: str, name: str) -> float:
        return statistics.median(row[kind][name] for row in timing)

    gain = difference(ours, published)
    assert gain is not None  # the same slices
    lines = [
        ("fast sampler", int(ours[0]["num_evaluations"]), *_common.metric_cells(ours)[:-1],
         f"{median('seconds', OURS):.2f}", "1"),
        (NORMALISED, evaluations, *_common.metric_cells(published), ""),
        *((name, f"{PUBLISHED} (extrapolated)", *["-"] * len(_common.METRICS), f"{median('seconds', name):.0f}",
           f"{median('ratio', name):.0f}") for name in timing[0]["ratio"]),
    ]  # fmt: skip
    header = ["20 views, noise-free", "Evaluations", *_common.METRIC_HEADINGS, "Time, in units of ours"]
    print("\n" + _common.markdown(header, lines))
    print(f"\nPSNR, ours - {NORMALISED}, paired over {len(ours)} slices: {_common.difference_cell(gain)}")
    ratios = [row["ratio"][REPO] for row in timing]
    print(f"Time of {REPO} over ours: {min(ratios):.0f} to {max(ratios):.0f} in {len(ratios)} repeats")
    return {
        "difference": gain,
        "seconds": {name: median("seconds", name) for name in timing[0]["seconds"]},
        "ratio": {name: median("ratio", name) for name in timing[0]["ratio"]},
    }


def main(args: list[str] | None = None) -> None:
    parser = _common.make_quality_parser(__doc__, FEW_SLICES)
    parser.add_argument("--evaluations", type=int, default=PUBLISHED, help="of padis-norm; a multiple of 10")
    parser.add_argument("--timed", type=int, default=20, help="evaluations of padis-repo; a multiple of 10")
    parser.add_argument("--repeats", type=int, default=3, help="of the timing")
    options = parser.parse_args(args)
    _common.weights_hash(options.prior)
    bench = Bench(_common.start(options, "padis"), options.size)
    batches = _common.load_batches(HELD_OUT, options.slices, options.size, options.batch_size)
    timing = time_all(bench, options.prior, options.timed, options.repeats, batches)
    setting = SETTINGS["20-clean"]
    ours = [
        row
        for b in batches
        for row in bench.rows(setting, Entry(OURS, AnnealedPnPADMM(), options.prior, mirror=True), b)
    ]
    method = PaDISNormalised(num_levels=options.evaluations // NUM_INNER, num_inner=NUM_INNER)
    singles = _common.load_batches(HELD_OUT, options.slices, options.size, 1)
    published = [row for b in singles for row in bench.rows(setting, Entry(NORMALISED, method, options.prior), b)]
    bench.record.save(**report(ours, published, timing, options.evaluations))


if __name__ == "__main__":
    _common.run(main)
