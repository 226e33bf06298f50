"""Throughput of the denoising network on tiles: precision, memory layout, compilation.

    python -m benchmarks.denoiser --json denoiser.json [--prior patch_ct] [--variants fp32 bf16]

One evaluation of the network on a batch of tiles, without gradients; contestants take turns. Without a prior file the
network is that of the shipped configuration, untrained: the time does not depend on the weights.
"""

from __future__ import annotations

import copy
import re
import statistics
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks import _common
from invrecon.priors.unet import SmallUNet, UNet
from invrecon.priors.weights import load_prior
from invrecon.shared import find_shared

DTYPES = {"fp32": None, "bf16": torch.bfloat16}
VARIANTS = [f"{d}{layout}{mode}" for d in DTYPES for layout in ("", ", channels_last") for mode in ("", ", compiled")]
REFERENCE = "fp32"


def load_network(prior: str) -> UNet:
    """Returns the network of a prior file, or the shipped architecture if there is none."""
    path = find_shared(prior, "checkpoints", ".safetensors")
    if path.is_file():
        return load_prior(path)[0].denoiser.network  # type: ignore[union-attr, return-value]
    print(f"There is no prior '{prior}': an untrained network of the same architecture is timed.")
    network = SmallUNet()
    nn.init.normal_(network.head.weight, std=0.02)  # zero at the start of a training, which would hide errors
    return network.eval().requires_grad_(False)


def contestant(network: nn.Module, variant: str, tiles: Tensor, levels: Tensor) -> Callable[[], Tensor]:
    """Returns an evaluation of a copy of the network, as the variant's name says."""
    dtype = DTYPES[variant.split(",")[0]]
    layout = torch.channels_last if "channels_last" in variant else torch.contiguous_format
    own = copy.deepcopy(network).to(memory_format=layout)  # type: ignore[call-overload]
    tiles = tiles.contiguous(memory_format=layout)
    if "compiled" in variant:
        own = torch.compile(own)

    @torch.no_grad()
    def run() -> Tensor:
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            return own(tiles, levels)

    return run


def main(args: list[str] | None = None) -> None:
    parser = _common.make_parser(__doc__, device=False)
    parser.add_argument("--prior", default="patch_ct", help="prior file, or the name of a shipped one")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, metavar="VARIANT")
    parser.add_argument("--patch-size", type=int, default=56)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args(args)
    record = _common.start(options, "denoiser")
    network, generator = load_network(options.prior), torch.Generator().manual_seed(0)
    channels = network.config["image_channels"] + network.config["position_channels"]  # type: ignore[operator]
    shape = (options.batch_size, channels, options.patch_size, options.patch_size)
    tiles, levels = torch.randn(shape, generator=generator), torch.randn(shape[0], generator=generator)
    runs: dict[str, Callable[[], Tensor]] = {}
    left_out, exact = {}, contestant(network, REFERENCE, tiles, levels)()
    errors = {}
    for variant in options.variants:
        run = contestant(network, variant, tiles, levels)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                errors[variant] = float((run().float() - exact).norm() / exact.norm().clamp(min=1e-30))
            runs[variant] = run
        except Exception as error:  # whatever a compiler may lack
            reason = next(iter(str(error).strip().splitlines()), "")
            left_out[variant] = f"{type(error).__name__}: {re.sub(r'/[^ ]*/', '', reason)}"[:200]  # names, no paths
    seconds = _common.interleave(runs, options.repeats)
    medians = {variant: statistics.median(values) for variant, values in seconds.items()}
    rows = [
        {
            "variant": variant,
            "seconds": median,
            "min_seconds": min(seconds[variant]),
            "patches_per_second": shape[0] / median,
            "megapixels_per_second": shape[0] * options.patch_size**2 / median / 1e6,
            "speedup": medians.get(REFERENCE, median) / median,
            "relative_error": errors[variant],
        }
        for variant, median in medians.items()
    ]
    header = [f"{shape[0]} tiles of {options.patch_size}^2", "ms", "patches/s", "Mpixel/s", "speed-up", "error"]
    lines = [
        (r["variant"], f"{1e3 * r['seconds']:.0f}", f"{r['patches_per_second']:.0f}",
         f"{r['megapixels_per_second']:.2f}", f"{r['speedup']:.2f}", f"{r['relative_error']:.0e}")
        for r in rows
    ]  # fmt: skip
    print("\n" + _common.markdown(header, lines))
    for variant, reason in left_out.items():
        print(f"{variant}: left out ({reason})")
    record.save(rows=rows, left_out=left_out, num_repeats=options.repeats)


if __name__ == "__main__":
    _common.run(main)
