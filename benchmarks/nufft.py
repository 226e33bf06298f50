"""Times the NUFFT and its adjoint against finufft's torch binding, interleaved in one run, and measures their errors.

    python -m benchmarks.nufft --json nufft.json [--size 256] [--coils 1 8]

Every contestant does the same: coil maps (none for one coil), then the transform of every coil's image, in single
precision; or the adjoint of both. finufft runs as it comes, with its tolerance of 1e-6; once more with FFT plans that
were measured, not guessed; and with the least accurate of its settings, a grid only 1.25 times finer. Errors are
relative to the direct transform by its definition, in double precision, at some of the samples (for the adjoint, of
the pixels). `ratio` is how many times longer than ours. A contestant whose package is not installed is left out.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import _common
from invrecon.operators import NonCartesianMRI, RadialMRI, SpiralMRI
from invrecon.operators.coils import simulated_maps
from invrecon.operators.fourier import channels_to_complex, complex_to_channels, complex_to_pairs, pairs_to_complex

Pair = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]

TRAJECTORIES = {"radial": RadialMRI, "spiral": SpiralMRI}
OURS = "invrecon"
NUM_COMPARED = 100  # samples and pixels of the direct transform


def ours(operator: NonCartesianMRI) -> Pair:
    return operator, operator.adjoint


def finufft(operator: NonCartesianMRI, **options: Any) -> Pair:
    from pytorch_finufft.functional import finufft_type1, finufft_type2

    height, width = operator.image_shape[1:]
    points = (2 * math.pi * operator.trajectory.reshape(-1, 2).t()).float().contiguous()
    maps = None if operator.maps is None else pairs_to_complex(operator.maps)
    scale = 1 / math.sqrt(height * width)

    def forward(x: Tensor) -> Tensor:
        z = channels_to_complex(x)[:, None]
        z = z if maps is None else z * maps
        y = scale * finufft_type2(points, z, isign=-1, modeord=0, **options)
        return complex_to_pairs(y.unflatten(-1, operator.trajectory.shape[:2]))

    def adjoint(y: Tensor) -> Tensor:
        values = pairs_to_complex(y).flatten(-2)
        z = scale * finufft_type1(points, values, (height, width), isign=1, modeord=0, **options)
        return complex_to_channels(z[:, 0] if maps is None else (z * maps.conj()).sum(1))

    return forward, adjoint


CONTESTANTS: dict[str, Callable[[NonCartesianMRI], Pair]] = {
    OURS: ours,
    "finufft": lambda operator: finufft(operator, eps=1e-6),
    "finufft, plans measured": lambda operator: finufft(operator, eps=1e-6, fftw=0),
    "finufft, coarse grid": lambda operator: finufft(operator, eps=3e-5, upsampfac=1.25, fftw=0),
}


def phases(operator: NonCartesianMRI, samples: Tensor, pixels: Tensor) -> Tensor:
    """Returns `exp(-2 pi i k_j . r)` of some samples and pixels, complex128."""
    height, width = operator.image_shape[1:]
    place = torch.stack((pixels // width - height // 2, pixels % width - width // 2))
    return torch.exp(-2j * math.pi * (operator.trajectory.reshape(-1, 2)[samples] @ place.double()))


def errors(operator: NonCartesianMRI, pair: Pair, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Returns the relative errors of the transform at some samples, and of the adjoint at some pixels."""
    num_pixels, num_samples = math.prod(operator.image_shape[1:]), operator.trajectory.shape[:2].numel()
    some_samples, some_pixels = (torch.arange(n)[:: max(1, n // NUM_COMPARED)] for n in (num_samples, num_pixels))
    maps = None if operator.maps is None else pairs_to_complex(operator.maps[0]).to(torch.complex128).flatten(1)
    z = channels_to_complex(x.double()).flatten(1)
    z, scale = z if maps is None else z * maps, math.sqrt(num_pixels)
    exact = torch.cat([(phases(operator, j, torch.arange(num_pixels)) @ z.t()).t() for j in some_samples.split(50)], 1)
    got = pairs_to_complex(pair[0](x))[0].flatten(1)[:, some_samples]
    forward = float((got - exact / scale).norm() / (exact / scale).norm())

    values = pairs_to_complex(y.double())[0].flatten(1)
    parts = [values @ phases(operator, torch.arange(num_samples), r).conj() for r in some_pixels.split(50)]
    combined = torch.cat(parts, 1) / scale
    combined = combined[0] if maps is None else (combined * maps[:, some_pixels].conj()).sum(0)
    got = channels_to_complex(pair[1](y))[0].flatten()[some_pixels]
    return forward, float((got - combined).norm() / combined.norm())


@torch.no_grad()
def measure(name: str, size: int, num_coils: int, repeats: int, left_out: dict[str, str]) -> list[_common.Row]:
    """Returns a row a contestant and direction."""
    generator = torch.Generator().manual_seed(0)
    maps = None if num_coils == 1 else simulated_maps(num_coils, (size, size), generator)
    operator = TRAJECTORIES[name](size, maps=maps)
    x = torch.randn(1, *operator.image_shape, generator=generator)
    y = torch.randn(1, *operator.measurement_shape, generator=generator)
    pairs: dict[str, Pair] = {}
    for contestant, make in CONTESTANTS.items():
        try:
            pairs[contestant] = make(operator)
        except ImportError as error:
            left_out[contestant] = str(error)
    found = {contestant: errors(operator, pair, x, y) for contestant, pair in pairs.items()}
    rows = []
    for k, (direction, data) in enumerate((("forward", x), ("adjoint", y))):
        runs = {contestant: lambda run=pair[k], data=data: run(data) for contestant, pair in pairs.items()}
        seconds = _common.interleave(runs, repeats)
        median = {contestant: statistics.median(values) for contestant, values in seconds.items()}
        for contestant in pairs:
            rows.append(
                {
                    "trajectory": name,
                    "size": size,
                    "num_samples": operator.trajectory.shape[:2].numel(),
                    "num_coils": num_coils,
                    "direction": direction,
                    "name": contestant,
                    "ms": 1e3 * median[contestant],
                    "min_ms": 1e3 * min(seconds[contestant]),
                    "ratio": median[contestant] / median[OURS],
                    "relative_error": found[contestant][k],
                }
            )
    return rows


def main(args: list[str] | None = None) -> None:
    parser = _common.make_parser(__doc__, device=False)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--coils", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--trajectories", nargs="+", choices=TRAJECTORIES, default=list(TRAJECTORIES))
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args(args)
    record = _common.start(options, "nufft")
    warnings.filterwarnings("ignore", message=".*cufinufft.*")
    rows: list[_common.Row] = []
    left_out: dict[str, str] = {}
    for name in options.trajectories:
        for num_coils in options.coils:
            rows += measure(name, options.size, num_coils, options.repeats, left_out)
            _common.progress(f"{name}, {num_coils} coil{'s' * (num_coils > 1)} measured")
    header = [f"{options.size} x {options.size}", "coils", "direction", "NUFFT", "ms", "ratio", "error"]
    lines = [
        (r["trajectory"], r["num_coils"], r["direction"], r["name"], f"{r['ms']:.1f}", f"{r['ratio']:.2f}",
         f"{r['relative_error']:.0e}")
        for r in rows
    ]  # fmt: skip
    print("\n" + _common.markdown(header, lines))
    for contestant, reason in left_out.items():
        print(f"{contestant}: left out ({reason})")
    record.save(rows=rows, left_out=left_out, num_repeats=options.repeats)


if __name__ == "__main__":
    _common.run(main)
