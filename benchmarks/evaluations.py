"""What an evaluation buys: quality of the default method against its number of denoiser evaluations.

    python -m benchmarks.evaluations --json evaluations.json [--evaluations 10 20 50 100] [--only 20-clean 60-clean]

The last line of a setting is the mean of four runs, which differ by the patch prior's shifts, at four times the cost.
"""

from __future__ import annotations

from benchmarks import _common
from benchmarks._common import FEW_SLICES, HELD_OUT, SETTINGS, Bench, Entry, Row
from benchmarks.claims._verdicts import difference
from invrecon.methods import AnnealedPnPADMM
from invrecon.metrics.summary import format_entry, heading, summarise


def contestants(evaluations: list[int], num_samples: int) -> tuple[str, dict[str, AnnealedPnPADMM]]:
    """Returns the label of the default, against which all are compared, and the samplers by label."""
    default = AnnealedPnPADMM().schedule.num_levels
    methods = {f"{n} evaluations": AnnealedPnPADMM(num_levels=n) for n in sorted({*evaluations, default})}
    if num_samples > 1:
        label = f"mean of {num_samples} samples of {default}"
        methods[label] = AnnealedPnPADMM(num_samples=num_samples, samples_per_batch=1)
    return f"{default} evaluations", methods


def main(args: list[str] | None = None) -> None:
    parser = _common.make_quality_parser(__doc__, FEW_SLICES)
    parser.add_argument("--evaluations", type=int, nargs="+", default=[10, 20, 50, 100])
    parser.add_argument("--num-samples", type=int, default=4, help="1 leaves the mean of samples out")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=["20-clean", "60-clean"], metavar="SETTING")
    options = parser.parse_args(args)
    _common.weights_hash(options.prior)
    bench = Bench(_common.start(options, "evaluations"), options.size)
    default, methods = contestants(options.evaluations, options.num_samples)
    results, lines = {}, []
    for name in options.only:
        setting, rows = SETTINGS[name], dict[str, list[Row]]()
        for batch in _common.load_batches(HELD_OUT, options.slices, options.size, options.batch_size):
            for label, method in methods.items():
                entry = Entry(label, method, options.prior, mirror=True)
                rows[label] = rows.get(label, []) + bench.rows(setting, entry, batch)
        for label, own in rows.items():
            summary, gain = summarise(own), difference(own, rows[default])
            assert gain is not None  # the same slices
            seconds = _common.median_seconds(own)
            results[f"{name}, {label}"] = {**summary, "gain": gain, "median_seconds": seconds}
            cells = [format_entry(metric, summary[metric]) for metric in ("psnr", "ssim", "relative_residual")]
            lines.append((setting.title, label, *cells, _common.difference_cell(gain), f"{seconds:.2f}"))
    titles = [heading(metric) for metric in ("psnr", "ssim", "relative_residual")]
    header = ["Setting", "Fast sampler", *titles, f"PSNR against {default}, paired", "s a slice, median"]
    print("\n" + _common.markdown(header, lines))
    bench.record.save(results=results)


if __name__ == "__main__":
    _common.run(main)
