"""Training throughput of a shipped configuration, and the share of the plain convolution rate that this is.

    python -m benchmarks.training --json training.json [--config patch_ct.yaml] [--steps 40]

Runs `invrecon fit` itself, on ellipse phantoms, and times its steps: data, forward, backward, optimiser and averaged
weights. The plain rate is that of one 3 x 3 convolution of 64 channels on 32 maps of 56 x 56, forward and backward, in
the precision of the training, measured between the steps of the same run.
"""

from __future__ import annotations

import statistics
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from benchmarks import _common
from benchmarks._step_timer import StepTimer

PLAIN = "64 channels, 56^2"


def fit(config: str, steps: int) -> StepTimer:
    """Runs the training and returns its timer."""
    from invrecon.cli import main as invrecon

    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        options = {
            "--config": config,
            "--output": folder,
            "--data": "EllipseTraining",
            "--data.num_phantoms": 32,
            "--data.batches_per_epoch": steps,
            "--trainer.max_steps": steps,
            "--trainer.callbacks": "benchmarks._step_timer.StepTimer",
            "--trainer.limit_val_batches": 0,
            "--trainer.num_sanity_val_steps": 0,
            "--trainer.accelerator": "cpu",
            "--trainer.devices": 1,
            "--trainer.enable_progress_bar": "false",
            "--trainer.enable_model_summary": "false",
        }
        cli = invrecon(["fit", *(f"{key}={value}" for key, value in options.items())])
    callbacks: list[Any] = cli.trainer.callbacks  # type: ignore[attr-defined]
    return next(callback for callback in callbacks if isinstance(callback, StepTimer))


def evaluate(timer: StepTimer) -> dict[str, Any]:
    """Returns throughputs a patch size and over all steps, and the share of the plain rate."""
    plain = {name: statistics.median(values) for name, values in timer.plain.items()}
    sizes = []
    for size in sorted({step["patch_size"] for step in timer.steps}, reverse=True):
        own = [step for step in timer.steps if step["patch_size"] == size]
        seconds = statistics.median(step["seconds"] for step in own)
        rate = own[0]["operations"] / seconds
        sizes.append(
            {"patch_size": int(size), "num_steps": len(own), "patches": int(own[0]["patches"]), "seconds": seconds,
             "patches_per_second": own[0]["patches"] / seconds, "operations_per_second": rate,
             "megapixels_per_second": own[0]["patches"] * size**2 / seconds / 1e6, "share": rate / plain[PLAIN]}
        )  # fmt: skip
    total = {key: sum(step[key] for step in timer.steps) for key in ("seconds", "patches", "operations")}
    overall = {
        "num_steps": len(timer.steps),
        "seconds_per_step": total["seconds"] / len(timer.steps),
        "patches_per_second": total["patches"] / total["seconds"],
        "megapixels_per_second": sum(s["patches"] * s["patch_size"] ** 2 for s in timer.steps) / total["seconds"] / 1e6,
        "share": total["operations"] / total["seconds"] / plain[PLAIN],
    }
    return {"sizes": sizes, "overall": overall, "plain_operations_per_second": plain}


def main(args: list[str] | None = None) -> None:
    parser = _common.make_parser(__doc__, device=False)
    parser.add_argument("--config", default="patch_ct.yaml")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args(args)
    record = _common.start(options, "training")
    result = evaluate(fit(options.config, options.steps))
    header = [
        Path(options.config).name,
        "steps",
        "patches a step",
        "s a step",
        "patches/s",
        "Mpixel/s",
        "GFLOP/s",
        "share of plain",
    ]
    lines = [
        (f"{s['patch_size']}^2", s["num_steps"], s["patches"], f"{s['seconds']:.3f}", f"{s['patches_per_second']:.1f}",
         f"{s['megapixels_per_second']:.3f}", f"{s['operations_per_second'] / 1e9:.0f}", f"{100 * s['share']:.0f} %")
        for s in result["sizes"]
    ]  # fmt: skip
    print("\n" + _common.markdown(header, lines))
    overall, plain = result["overall"], result["plain_operations_per_second"]
    print(
        f"\nAll steps: {overall['patches_per_second']:.1f} patches/s, {overall['megapixels_per_second']:.3f} Mpixel/s, "
        f"{100 * overall['share']:.0f} % of the plain rate ({PLAIN}: {plain[PLAIN] / 1e9:.0f} GFLOP/s)"
    )
    print("Plain 3 x 3 convolutions, GFLOP/s: " + "; ".join(f"{k}: {v / 1e9:.0f}" for k, v in plain.items()))
    record.save(config=Path(options.config).name, **result)


if __name__ == "__main__":
    _common.run(main)
