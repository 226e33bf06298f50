"""Makes files of fastMRI's format from magnitude volumes: simulated coils, phase and noise.

    python -m invrecon.data.simulate IN [IN ...] OUT --coils 8 --snr 30

Phases and coils are those that `invrecon test --config recon_mri.yaml` gives the same volume with the same number of
coils, size and seed. The files are fully sampled, with a reference, and are read by fastMRI's own tools as well as by
ours. Slices without signal (the air above a head) are left out, and said to be.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from invrecon.data.cases import Case
from invrecon.data.convert import make_parser, output_files, report
from invrecon.data.fastmri_files import write_fastmri
from invrecon.data.kspace import image_kspace
from invrecon.data.mri import MRIData, open_magnitudes
from invrecon.data.volumes import find_volumes, parse_slices
from invrecon.errors import InputError
from invrecon.operators.noise import SNRNoise
from invrecon.rng import make_generator


def simulate(
    inputs: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    size: int = 256,
    num_coils: int = 8,
    snr: float | None = 30.0,
    slices: str | None = None,
    seed: int = 0,
    dataset: str = "data",
    force: bool = False,
) -> list[Path]:
    """Writes the k-space of every volume found in `inputs`, and returns the files written.

        y_c = F (s_c x exp(i phi)) + n

    Args:
        inputs: Files or folders of magnitudes: HDF5, NIfTI, NRRD, DICOM folders.
        output: An HDF5 file for a single volume, else a folder, whose files take the names of the inputs.
        size: Side of the images in pixels; slices are cropped or zero-padded to it.
        num_coils: Simulated coils; 1 is of sensitivity 1, and is stored as single-coil data are.
        snr: Signal over noise of each slice's k-space [dB]; None for no noise.
        slices: As of `MRIData`; slices that are zero throughout are left out.
        seed: Of phases, coils and noise.
        dataset: Name of the dataset in HDF5 inputs.
        force: Replace files that exist.

    A volume that does not state its voxels gets some of 1 mm, as the format has no way to leave them open.

    Raises:
        InputError: If an input is of no use or of several patients, an output exists, or cannot be written.
    """
    if num_coils < 1 or size < 2 or (snr is not None and not math.isfinite(snr)):
        raise InputError(
            f"There are to be {num_coils} coils, {size} pixels a side and {snr} dB, expected at least 1 coil and 2 "
            "pixels, and a finite number of decibels (--snr inf for no noise)."
        )
    noise = None if snr is None else SNRNoise(snr)
    data = MRIData([], size=size, num_coils=num_coils, seed=seed, dataset=dataset)
    volumes = [open_magnitudes(path, dataset) for path in find_volumes(inputs)]
    targets = output_files(volumes, Path(output), force=force)
    chosen = [parse_slices(slices, len(volume), name=str(volume.path)) for volume in volumes]
    for volume in volumes:
        if len(set(volume.patients)) > 1:
            raise InputError(f"{volume.path} is of several patients, and a fastMRI file of one; write one at a time.")
    for volume, target, indices in zip(volumes, targets, chosen, strict=True):
        cases = [data.load(volume, index) for index in indices]
        empty = [case.index for case in cases if case.reference is None or not case.reference.any()]
        if len(empty) == len(cases):
            raise InputError(f"{volume.path} is zero in all slices that were asked for; choose others with --slices.")
        if empty:
            warnings.warn(f"{volume.path} is zero in slices {empty}, which are left out.", stacklevel=2)
        stack = [_measure(case, noise, seed) for case in cases if case.index not in empty]
        voxel_mm = volume.voxel_mm or (1.0, 1.0, 1.0)
        write_fastmri(target, torch.stack(stack), voxel_mm=voxel_mm, patient=volume.patient)
    return targets


def _measure(case: Case, noise: SNRNoise | None, seed: int) -> Tensor:
    assert case.reference is not None
    y = image_kspace(case.reference, case.maps) * case.scale
    return y if noise is None else noise.sample(y[None], [make_generator(seed, "noise", case.id)])[0][0]


def main(args: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = make_parser("python -m invrecon.data.simulate", "Make fastMRI files from magnitude volumes.")
    parser.add_argument("--coils", type=int, default=8, dest="num_coils", help="simulated coils (default 8)")
    parser.add_argument("--snr", type=float, default=30.0, help="of k-space in dB (default 30); inf for no noise")
    parser.add_argument("--slices", help="'3', '1,4,9' or '10:90:5' (default all)")
    parser.add_argument("--seed", type=int, default=0, help="of phases, coils and noise (default 0)")
    options = vars(parser.parse_args(args))
    if options["snr"] == math.inf:
        options["snr"] = None
    return report(partial(simulate, options.pop("inputs"), options.pop("output"), **options))


if __name__ == "__main__":
    sys.exit(main())
