"""Makes the MRI that ships in `data/` from the MNI152 T1 template of the nilearn package.

    pip download nilearn==0.14.1 --no-deps   # then unpack the wheel, which is a zip archive
    python scripts/make_mri_sample.py nilearn/datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz data

Writes `mni152_sample.h5`: eight axial slices from the cerebellum to the vertex, 1 mm pixels, zero-padded to 256 x 256.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from invrecon.data.intensity import MAGNITUDE
from invrecon.data.mri import fit, magnitude_of
from invrecon.data.volumes import open_volume
from invrecon.files import atomic_h5

SIZE = 256
PATIENT = "MNI152"
SOURCE = "nilearn 0.14.1, mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz, (C) Louis Collins, McGill, see README.md"
SLICES = range(32, 138, 15)  # cerebellum, midbrain, thalamus, ventricles, semioval centre, vertex; there is no face


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make the MRI sample that ships in data/.")
    parser.add_argument("source", help="the template as NIfTI")
    parser.add_argument("output", type=Path, help="the folder to write to")
    options = parser.parse_args()
    volume = open_volume(options.source)
    values = torch.stack([fit(magnitude_of(volume, i), SIZE) for i in SLICES]).round().numpy().astype(np.int16)
    with atomic_h5(options.output / "mni152_sample.h5") as file:
        chunks = (1, SIZE, SIZE)
        file.create_dataset("data", data=values, chunks=chunks, compression="gzip", compression_opts=9, shuffle=True)
        file.attrs.update({"source": f"{SOURCE}; slices {list(SLICES)}", "units": MAGNITUDE.units, "patient": PATIENT})
        if volume.voxel_mm is not None:
            file.attrs["voxel_mm"] = volume.voxel_mm[::-1]


if __name__ == "__main__":
    main()
