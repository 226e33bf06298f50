"""`invrecon import-weights SOURCE --output FILE.safetensors`: other people's priors as ours."""

from __future__ import annotations

import argparse
import math
import re
import shlex
from pathlib import Path
from typing import Any, NoReturn

from invrecon.errors import InputError
from invrecon.priors.thirdparty.convert import import_weights
from invrecon.priors.thirdparty.options import Options
from invrecon.priors.thirdparty.preconditioning import PRECONDITIONINGS

EPILOG = """\
SOURCE is a safetensors file, a state dict saved by torch, or a network snapshot (.pkl) of EDM or PaDIS. Nothing that
it contains is executed. The architecture (levels, widths, blocks, attention levels, resampling, embedding, learned
variance, positions) is read from the tensors' names and shapes; what these cannot say is printed as assumed, with the
option that says otherwise. Example, a 256 x 256 CT network of guided diffusion:

  invrecon import-weights AAPM256_1M.pt --output checkpoints/aapm.safetensors --image-size 256
"""


class _Parser(argparse.ArgumentParser):
    """A parser that raises, so that one sentence can say what was wrong."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"import-weights: {message}; `invrecon import-weights --help` lists what there is.")


def _parser() -> _Parser:
    parser = _Parser(
        "invrecon import-weights",
        description=__doc__,
        epilog=EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # argparse takes a negative number with an exponent for an option, and offers no setting for it.
    parser._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$")
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="weights of a guided-diffusion, EDM or PaDIS network")
    add(
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="the prior to write, ending in .safetensors; folders are created",
    )
    add("--settings", type=Path, metavar="JSON", help="the original program's arguments (num_head_channels, ...)")
    add("--key", metavar="PREFIX", help="which network of several in the file (default: the averaged one)")
    group = parser.add_argument_group("what no shape tells of the network")
    add = group.add_argument
    heads = group.add_mutually_exclusive_group()
    heads.add_argument(
        "--head-channels",
        type=_count,
        metavar="N",
        help="channels of an attention head (default: 64 for DhariwalUNet and for networks of guided diffusion of the "
        "shape of a published one that has 64, all for SongUNet)",
    )
    heads.add_argument("--num-heads", type=_count, metavar="N", help="attention heads, instead")
    add("--new-attention-order", action="store_true", help="guided diffusion's use_new_attention_order")
    add("--label", type=_index, metavar="K", help="the class to fix in a class-conditional network")
    group = parser.add_argument_group("what the network predicts")
    add = group.add_argument
    add(
        "--prediction",
        choices=list(PRECONDITIONINGS),
        help="edm, ve, vp (EDM's classes); eps, v, x0 of a discrete diffusion (default: eps for guided diffusion, "
        "else edm, or what a snapshot says)",
    )
    add("--schedule", choices=["linear", "cosine"], help="of a discrete diffusion (default: linear)")
    add("--num-steps", type=_count, metavar="T", help="its steps (default: 1000)")
    add("--nearest-timestep", action="store_true", help="the nearest timestep (default: interpolated in ln sigma)")
    add("--rescale-timesteps", action="store_true", help="timesteps in units of T/1000, as guided diffusion's option")
    add("--sigma-data", type=float, metavar="S", help="EDM's sigma_data in the network's units (default: 0.5)")
    group = parser.add_argument_group("what its images were")
    add = group.add_argument
    add("--image-size", type=_count, metavar="N", help="side of its training images (EDM: in the tensors' names)")
    add(
        "--image-channels", type=_count, metavar="N", help="their channels, where the network's can be read in two ways"
    )
    add("--data-range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="its values for our 0 and 1 (default: 0 1)")
    add(
        "--intensity",
        nargs=3,
        metavar=("OFFSET", "SCALE", "UNITS"),
        help="x = (value - OFFSET)/SCALE, value in UNITS: -1000 3000 HU for our CT, 0 1 a.u. for MRI, 0 255 '8 bit' "
        "for RGB images (default: that of RGB for three channels, else unknown, which no data are of)",
    )
    add("--padding", type=_padding, metavar="M", help="PaDIS: padding of a side in training; none: positions as ours")
    add("--patch-sizes", type=_count, nargs="+", default=[], metavar="P", help="sides of its patches, largest first")
    add("--data", nargs="+", default=[], metavar="NAME", help="what it was trained on, for the card")
    add("--licence", default="not stated", help="licence of the weights, for the card")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no positive integer")
    return int(text)


def _index(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is no class number")
    return int(text)


def _padding(text: str) -> int | str:
    return "none" if text == "none" else _index(text)


def _intensity(values: list[str] | None) -> dict[str, Any] | None:
    if values is None:
        return None
    try:
        offset, scale = float(values[0]), float(values[1])
    except ValueError:
        raise InputError(
            f"--intensity is {' '.join(values)}, expected two numbers and a unit, as -1000 3000 HU."
        ) from None
    if not 0 < scale < math.inf or not math.isfinite(offset):
        raise InputError(
            f"--intensity has the offset {offset} and the scale {scale}, expected finite ones, a scale > 0."
        )
    return {"offset": offset, "scale": scale, "units": values[2]}


def main(args: list[str]) -> None:
    """Runs `invrecon import-weights`.

    Args:
        args: Arguments after the command's name.

    Raises:
        InputError: If the arguments or the file cannot be used.
    """
    values = vars(_parser().parse_args(args))
    source, output = values.pop("source"), values.pop("output")
    values["intensity"] = _intensity(values["intensity"])
    if values["data_range"] is not None:
        low, high = values["data_range"] = tuple(values["data_range"])
        if not -math.inf < low < high < math.inf:
            raise InputError(f"--data-range is {low:g} {high:g}, expected a lower and a higher value, both finite.")
    if values["sigma_data"] is not None and not 0 < values["sigma_data"] < math.inf:
        raise InputError(f"--sigma-data is {values['sigma_data']}, expected a positive number.")
    command = shlex.join(["invrecon", "import-weights", *args])
    card, notes = import_weights(source, output, Options(**values), command)
    print("\n".join(notes))
    print(f"The {card.kind} prior is in {output}, its card in {output.with_suffix('.md')}.")
