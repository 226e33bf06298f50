"""Times the CT projector pair against ASTRA's linear kernel and scikit-image, interleaved in one run.

    python benchmarks/projector.py --json projector.json

A row is a forward projection and its (unfiltered) transpose, in milliseconds an image, the median over
repeats; `ratio` is how many times longer than ours. ASTRA and scikit-image take one image at a time. The
repeats of all contestants alternate, so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from invrecon.operators import ParallelBeamCT

Contestant = Callable[[torch.Tensor], object]


def ours(operator: ParallelBeamCT) -> Contestant:
    return lambda x: operator.adjoint(operator(x))


def astra_linear(operator: ParallelBeamCT) -> Contestant:
    import astra
    import numpy as np

    half = operator.field_of_view / 2
    volume = astra.create_vol_geom(*operator.size, -half, half, -half, half)
    rays = astra.create_proj_geom("parallel", operator.bin_width, operator.num_bins, np.array(operator.angles))
    projector = astra.create_projector("linear", rays, volume)

    def run(x: torch.Tensor) -> object:
        for image in x[:, 0].numpy():
            number, sinogram = astra.create_sino(image, projector)
            astra.data2d.delete(number)
            number, back = astra.create_backprojection(sinogram, projector)
            astra.data2d.delete(number)
        return back

    return run


def skimage_radon(operator: ParallelBeamCT) -> Contestant:
    import numpy as np
    from skimage.transform import iradon, radon

    degrees = np.rad2deg(operator.angles)

    def run(x: torch.Tensor) -> object:
        for image in x[:, 0].numpy():
            sinogram = radon(image, degrees, circle=True)
            back = iradon(sinogram, degrees, filter_name=None, circle=True, output_size=len(image))
        return back

    return run


CONTESTANTS = {"invrecon": ours, "astra linear": astra_linear, "skimage radon": skimage_radon}


def measure(size: int, num_views: int, batch: int, repeats: int) -> list[dict[str, object]]:
    """Returns one row a contestant."""
    operator = ParallelBeamCT(size, num_views)
    axis = torch.linspace(-1, 1, size)
    disc = (torch.hypot(axis[None], axis[:, None]) < 0.8).float()
    x = disc * torch.rand(batch, 1, size, size, generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    operator(x[:1])
    build = time.perf_counter() - start
    runs: dict[str, Contestant] = {}
    for name, make in CONTESTANTS.items():
        try:
            runs[name] = make(operator)
        except ImportError as error:
            print(f"{name}: left out ({error})")
    for name, run in runs.items():
        run(x if name == "invrecon" else x[:1])  # warm up
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name, run in runs.items():
            if name == "skimage radon" and repeat >= 2:  # seconds an image: two repeats do
                continue
            start = time.perf_counter()
            run(x)
            seconds[name].append((time.perf_counter() - start) / batch)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        {
            "size": size,
            "num_views": num_views,
            "batch": batch,
            "name": name,
            "ms_per_image": 1e3 * median[name],
            "min_ms_per_image": 1e3 * min(seconds[name]),
            "ratio": median[name] / median["invrecon"],
            "num_repeats": len(seconds[name]),
            "build_seconds": build if name == "invrecon" and batch == 1 else None,
        }
        for name in runs
    ]


def main() -> None:
    """Measures, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--num-views", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    rows = []
    print(f"{'image':>12} {'views':>6} {'batch':>6}  {'projector':<14} {'ms/image':>9} {'ratio':>7}")
    for size in arguments.sizes:
        for batch in arguments.batches:
            for row in measure(size, arguments.num_views, batch, arguments.repeats):
                rows.append(row)
                print(
                    f"{size:>5} x {size:<4} {row['num_views']:>6} {batch:>6}  {row['name']:<14} "
                    f"{row['ms_per_image']:>9.2f} {row['ratio']:>7.2f}",
                    flush=True,
                )
    if arguments.json:
        machine = {
            "processor": platform.processor(),
            "threads": arguments.threads,
            "torch": torch.__version__,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
