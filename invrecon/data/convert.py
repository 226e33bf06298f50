"""Converts scans (DICOM, NIfTI, NRRD, HDF5) into the HDF5 that the data modules read.

    python -m invrecon.data.convert IN [IN ...] OUT --size 256

Dataset `data` `(N, size, size)`: int16 Hounsfield units clipped to [-1024, 3071], slice first, one gzip chunk
per slice; attributes `source`, `units`, `voxel_mm` `(x, y, z)` and `patient` (of DICOM its PatientID:
pseudonymise before you share).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.nn.functional import interpolate, pad

from invrecon.data.hdf5 import HDF5_SUFFIXES
from invrecon.data.volume import Volume, suffix_of
from invrecon.data.volumes import check_hounsfield, find_volumes, open_volume
from invrecon.errors import InputError

LOW, HIGH = -1024.0, 3071.0  # what 12 bits hold [HU]


def convert(
    inputs: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    size: int = 256,
    dataset: str = "data",
    force: bool = False,
) -> list[Path]:
    """Converts every volume found in `inputs`, slice by slice, and returns the files written.

    Slices that are not square are centred in a square of air. An integer factor to `size` is averaged over
    blocks; any other is resampled by antialiased linear interpolation.

    Args:
        inputs: Files or folders; a folder of DICOM files is one volume.
        output: An HDF5 file for a single volume, else a folder, whose files take the names of the inputs.
        size: Side of the slices in pixels.
        dataset: Name of the dataset in HDF5 inputs.
        force: Replace files that exist.

    Raises:
        InputError: If an input is of no use, an output exists, or cannot be written.
    """
    if size < 2:
        raise InputError(f"The size is {size}, expected at least 2 pixels.")
    volumes = [open_volume(path, dataset=dataset) for path in find_volumes(inputs)]
    targets = output_files(volumes, Path(output), force=force)
    for volume, target in zip(volumes, targets, strict=True):
        _write(volume, target, size)
    return targets


def output_files(volumes: Sequence[Volume], output: Path, *, force: bool) -> list[Path]:
    """Returns the file to write for each volume: `output` itself, if it names a file, else one in that folder.

    Raises:
        InputError: Two volumes for one file, or a file that exists already.
    """
    if suffix_of(output) in HDF5_SUFFIXES:
        if len(volumes) > 1:
            raise InputError(f"{len(volumes)} volumes cannot go into one file {output}; name a folder as output.")
        targets = [output]
    else:
        targets = [output / f"{volume.stem}.h5" for volume in volumes]
    if len(set(targets)) < len(targets):
        raise InputError(f"Two inputs would both be written to one file in {output}; convert them one at a time.")
    for target, volume in zip(targets, volumes, strict=True):
        if target.exists() and target.resolve() == volume.path.resolve():
            raise InputError(f"{target} is both input and output; choose another output.")
        if target.exists() and not force:
            raise InputError(f"{target} exists already; choose another output, or replace it with --force.")
    return targets


def resample_slice(hu: Tensor, size: int, *, fill: float = LOW) -> Tensor:
    """Returns a slice `(H, W)` as `(size, size)`: padded to a square, then averaged or interpolated."""
    side = max(hu.shape)
    rest = [side - extent for extent in hu.shape]
    square = pad(hu, (rest[1] // 2, rest[1] - rest[1] // 2, rest[0] // 2, rest[0] - rest[0] // 2), value=fill)
    if side % size == 0:
        k = side // size
        return square.reshape(size, k, size, k).mean(dim=(1, 3))
    return interpolate(square[None, None], (size, size), mode="bilinear", antialias=True, align_corners=False)[0, 0]


def _write(volume: Volume, target: Path, size: int) -> None:
    from invrecon.files import atomic_h5, write_json

    num = len(volume)
    with atomic_h5(target) as file:
        data = file.create_dataset(
            "data", (num, size, size), np.int16, chunks=(1, size, size), compression="gzip", shuffle=True
        )
        low, high = math.inf, -math.inf
        for index in range(num):
            values = volume.read(index)
            low, high = min(low, float(values.amin())), max(high, float(values.amax()))
            hu = resample_slice(values.clamp(LOW, HIGH), size)
            data[index] = hu.round().numpy().astype(np.int16)
        check_hounsfield(volume.path, low, high)  # fractions would be rounded away
        file.attrs["source"] = volume.source or volume.path.name
        file.attrs["units"] = volume.units
        file.attrs["patient"] = volume.patient
        if volume.voxel_mm is not None:
            z, y, x = volume.voxel_mm
            scale = max(volume.shape[1:]) / size
            file.attrs["voxel_mm"] = (x * scale, y * scale, z)
    sidecar = target.with_name(f"{target.stem}.patients.json")
    if len(set(volume.patients)) > 1:
        write_json(sidecar, [[f"{volume.path.name}[{i}]", patient] for i, patient in enumerate(volume.patients)])
    else:
        sidecar.unlink(missing_ok=True)  # it belonged to a file that was replaced


def make_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """Returns a parser of commands that make files of volumes."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("inputs", nargs="+", metavar="IN", help="files or folders: HDF5, NIfTI, NRRD, DICOM")
    parser.add_argument("output", metavar="OUT", help="an .h5 file for one volume, else a folder")
    parser.add_argument("--size", type=int, default=256, help="side of the slices in pixels (default 256)")
    parser.add_argument("--dataset", default="data", help="dataset name in HDF5 inputs (default 'data')")
    parser.add_argument("--force", action="store_true", help="replace existing files")
    return parser


def report(write: Callable[[], list[Path]]) -> int:
    """Writes files, prints their names or what was wrong, and returns the exit status."""
    try:
        written = write()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(str(path) for path in written))
    return 0


def main(args: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = make_parser("python -m invrecon.data.convert", "Convert scans into the HDF5 that invrecon reads.")
    options = vars(parser.parse_args(args))
    return report(partial(convert, options.pop("inputs"), options.pop("output"), **options))


if __name__ == "__main__":
    sys.exit(main())
