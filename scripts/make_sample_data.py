"""Makes the CT that ships in `data/` from the lung scan of the pyradiomics package.

    python scripts/make_sample_data.py                            # has pip fetch the package's source distribution
    python scripts/make_sample_data.py lung2_image.nrrd --output data

Writes `lung2_sample.h5` (ten slices at 256 x 256) and `lung2_measurement.h5` (sinograms of three others,
without any reference). The source may also be the same scan as HDF5.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from invrecon.data.convert import HIGH, LOW, resample_slice
from invrecon.data.intensity import Intensity
from invrecon.data.measurement import write_measurement
from invrecon.data.volume import Volume
from invrecon.data.volumes import open_volume
from invrecon.errors import InputError
from invrecon.files import atomic_h5
from invrecon.operators import ParallelBeamCT
from invrecon.priors.weights import file_hash
from invrecon.rng import make_generators

SIZE = 256
PATIENT = "pyrad-lung2"
SOURCE = "pyradiomics 3.1.0, data/lung2_image.nrrd, BSD-3-Clause, see README.md"
SLICES = (13, 19, 24, 28, 30, 33, 36, 40, 44, 50)  # liver dome, tumour (24), heart, hila, arch, apex
MEASURED = (22, 31, 42)
NUM_VIEWS = 20
RELATIVE_NOISE = 0.01
SEED = 0
PACKAGE = "pyradiomics==3.1.0"
ARCHIVE_SHA256 = "24722c962a6bbd09bc39c1c67dbffe92435f9692a421fabaae8a6b4511eb48e4"
SCAN_SHA256 = "aa2b94eec79127ed786798ac8dc3c013010e1692d5787bebfae1a1e9685a4651"


def fetch(folder: Path) -> Path:
    """Returns the scan, out of the package's source distribution, which pip unpacks under a folder.

    What pip does after that, asking the package for its metadata, may fail: only the unpacked files are wanted.

    Raises:
        InputError: If pip brought nothing, or not the archive or the scan whose hashes `data/README.md` states.
    """
    (folder / "requirements.txt").write_text(f"{PACKAGE} --hash=sha256:{ARCHIVE_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "-r", "requirements.txt", "--no-binary", ":all:", "--no-deps"]
    command += ["--no-build-isolation", "--no-clean", "--progress-bar", "off"]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "TMPDIR": str(folder)}, capture_output=True, text=True, check=False
    )
    found = sorted(folder.rglob("data/lung2_image.nrrd"))
    if not found:
        raise InputError(f"pip brought no {PACKAGE}; it says: {done.stderr.strip() or done.stdout.strip()}")
    if (sha256 := file_hash(found[0])) != SCAN_SHA256:
        raise InputError(f"data/lung2_image.nrrd of {PACKAGE} has the SHA-256 {sha256}, expected {SCAN_SHA256}.")
    return found[0]


def write_sample(volume: Volume, path: Path) -> None:
    """Writes the chosen slices, in the layout that `invrecon.data.convert` writes."""
    slices = [resample_slice(volume.read(i).clamp(LOW, HIGH), SIZE) for i in SLICES]
    values = torch.stack(slices).round().numpy().astype(np.int16)
    with atomic_h5(path) as file:
        chunks = (1, SIZE, SIZE)
        file.create_dataset("data", data=values, chunks=chunks, compression="gzip", compression_opts=9, shuffle=True)
        file.attrs.update({"source": f"{SOURCE}; slices {list(SLICES)}", "units": "HU", "patient": PATIENT})
        if volume.voxel_mm is not None:
            z, y, x = volume.voxel_mm
            k = volume.shape[1] / SIZE
            file.attrs["voxel_mm"] = (x * k, y * k, z)


def write_sinograms(volume: Volume, path: Path) -> None:
    """Simulates sinograms on the scan's own grid, with 1 % noise: `y = A x + 0.01 mean|A x| n`."""
    x = torch.stack([Intensity().encode(volume.read(i)) for i in MEASURED])[:, None]
    operator = ParallelBeamCT(size=(x.shape[-2], x.shape[-1]), num_views=NUM_VIEWS)
    y = operator(x)[:, 0]
    std = RELATIVE_NOISE * y.abs().mean(dim=(1, 2))
    generators = make_generators(SEED, [f"{PATIENT}/{i}" for i in MEASURED])
    noise = torch.stack([torch.randn(y.shape[1:], generator=g) for g in generators])
    voxel_mm = None
    if volume.voxel_mm is not None:
        z, height, width = volume.voxel_mm
        k = volume.shape[1] / SIZE
        voxel_mm = (z, height * k, width * k)
    write_measurement(
        path,
        y + std[:, None, None] * noise,
        operator.geometry,
        noise_std=std,
        voxel_mm=voxel_mm,
        patient=PATIENT,
        source=f"{SOURCE}; simulated from slices {list(MEASURED)} at {x.shape[-1]} pixels",
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make the CT sample that ships in data/.")
    parser.add_argument("source", nargs="?", help="lung2_image.nrrd, or the same scan as HDF5 (else pip fetches it)")
    parser.add_argument("--output", type=Path, default=Path("data"), help="the folder to write to")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        volume = open_volume(options.source or fetch(Path(folder)))
        write_sample(volume, options.output / "lung2_sample.h5")
        write_sinograms(volume, options.output / "lung2_measurement.h5")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"make_sample_data.py: {error}")
