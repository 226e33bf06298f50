"""Peak memory of `invrecon predict` on a whole volume and on a few of its slices.

    python -m benchmarks.memory --json memory.json [--methods FBP sampler] [--counts 9 99]

Peak resident memory of the command's own process. Peaks scatter upwards by tens of MB, as the allocator happens to
fragment, so each is the smallest of a few runs. The sampler visits two noise levels only: its memory does not depend on
their number. Exits with status 1 if a run takes 2 GB, or more for each further slice than half an image's worth.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import _common
from benchmarks._common import HELD_OUT
from invrecon.errors import InputError

# A process inherits its parent's peak, so a small one stands between this process and the command.
MEASURE = (
    "import resource, subprocess, sys; status = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL);"
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(status)"
)
METHODS: dict[str, list[str]] = {
    "FBP": ["--config=fbp_ct.yaml"],
    "sampler": ["--config=recon_ct.yaml", "--model.method.num_levels=2"],
}
LIMIT_MB = 2000.0


def peak_memory(arguments: Sequence[str], threads: int) -> tuple[float, float]:
    """Runs `invrecon predict`; returns its peak resident memory [MB] and its seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    root = str(Path(__file__).resolve().parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "invrecon", "predict", *arguments, "--output", str(Path(folder) / "run"),
                   "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]  # fmt: skip
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, *command], capture_output=True, text=True, env=environment
        )
        seconds = time.perf_counter() - start
    if done.returncode:
        raise InputError(f"`invrecon predict` failed: {next(reversed(done.stderr.strip().splitlines()), '')}")
    unit = 1 if sys.platform == "darwin" else 1024
    return int(done.stdout.split()[-1]) * unit / 1e6, seconds


def main(args: list[str] | None = None) -> None:
    parser = _common.make_parser(__doc__, device=False)
    parser.add_argument("--prior", default="patch_ct_fine", help="patch prior: a file, or the name of a shipped one")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--counts", type=int, nargs="+", default=[9, 99], help="numbers of slices, rising")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each count, of which the smallest peak counts")
    parser.add_argument("--size", type=int, default=256, help="side of the reconstructed images")
    options = parser.parse_args(args)
    volume = data_arguments(options.size)
    if "sampler" in options.methods:
        _common.weights_hash(options.prior)
    record = _common.start(options, "memory")
    rows: list[dict[str, Any]] = []
    for method in options.methods:
        prior = [f"--model.prior={options.prior}"] if method == "sampler" else []
        for count in options.counts:
            arguments = [*METHODS[method], *prior, *volume, "--data.slices", f"0:{count}"]
            peak, seconds = min(peak_memory(arguments, options.threads) for _ in range(options.repeats))
            rows.append({"method": method, "num_slices": count, "peak_mb": peak, "seconds": seconds})
            _common.progress(f"{method}, {count} slices: {peak:.0f} MB, {seconds:.0f} s")
    image_mb = options.size**2 * 4 / 1e6
    growth = {}
    for method in options.methods:
        few, many = ([r for r in rows if r["method"] == method][i] for i in (0, -1))
        span = many["num_slices"] - few["num_slices"]
        growth[method] = (many["peak_mb"] - few["peak_mb"]) / span if span else 0.0
    lines = [
        (r["method"], r["num_slices"], f"{r['peak_mb']:.0f}", f"{1e3 * growth[r['method']]:.0f}", f"{r['seconds']:.0f}")
        for r in rows
    ]
    header = ["`invrecon predict`", "slices", "peak memory [MB]", "growth [kB a slice]", "s"]
    print("\n" + _common.markdown(header, lines))
    print(f"\nAn image of {options.size} x {options.size} in float32 takes {1e3 * image_mb:.0f} kB.")
    passed = max(r["peak_mb"] for r in rows) < LIMIT_MB and max(growth.values()) < image_mb / 2
    print(f"Below {LIMIT_MB:.0f} MB and not growing: {'yes' if passed else 'NO'}")
    record.save(rows=rows, growth_mb_per_slice=growth, passed=passed)
    if not passed:
        sys.exit(1)


def data_arguments(size: int) -> list[str]:
    """Returns what points `predict` at the held-out volume."""
    return [f"--data.paths={_common.data_file(HELD_OUT)}", f"--data.size={size}", f"--model.operator.size={size}",
            f"--model.operator.num_bins={2 * size}"]  # fmt: skip


if __name__ == "__main__":
    _common.run(main)
