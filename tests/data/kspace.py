"""A small k-space, `(N, COILS, H, W, 2)`, and a writer of ISMRMRD raw data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
from torch import Tensor

from invrecon.data.fastmri_files import fastmri_header
from invrecon.data.ismrmrd import GROUP

N, COILS, H, W = 2, 3, 16, 14


def write_ismrmrd(
    path: Path,
    kspace: Tensor,
    columns: Sequence[int] | None = None,
    header: bytes | None = None,
    noise: Tensor | None = None,
    dwell_us: tuple[float, float] = (5.0, 5.0),
    discard: tuple[int, int] = (0, 0),
) -> Path:
    """One readout a column and slice, after a noise scan `(coils, samples, 2)` that is no part of k-space.

    Dwell times are those of the noise scan and of the readouts. Of each readout the first and last samples are marked
    as not to be used, as many as `discard` says; the header then has to state fewer rows, or the same.
    """
    counters = np.dtype(
        [
            *((name, "<u2") for name in ("kspace_encode_step_1", "kspace_encode_step_2", "average", "slice")),
            *((name, "<u2") for name in ("contrast", "phase", "repetition", "set", "segment")),
            ("user", "<u2", (8,)),
        ]
    )
    head = np.dtype(
        [
            ("flags", "<u8"),
            *((name, "<u2") for name in ("number_of_samples", "active_channels", "center_sample")),
            *((name, "<u2") for name in ("discard_pre", "discard_post")),
            ("trajectory_dimensions", "<u2"),
            ("sample_time_us", "<f4"),
            ("idx", counters),
        ]
    )
    real = h5py.vlen_dtype(np.float32)
    slices, coils, rows, width, _ = kspace.shape
    lines = [(s, c) for s in range(slices) for c in (columns or range(width))]
    data = np.zeros(len(lines) + 1, dtype=np.dtype([("head", head), ("traj", real), ("data", real)]))
    data["head"]["sample_time_us"] = dwell_us[1]
    data[0]["head"]["flags"], data[0]["head"]["sample_time_us"] = 1 << 18, dwell_us[0]
    for n, (s, c) in enumerate(lines, start=1):
        data[n]["head"]["number_of_samples"], data[n]["head"]["active_channels"] = rows, coils
        data[n]["head"]["center_sample"] = rows // 2
        data[n]["head"]["discard_pre"], data[n]["head"]["discard_post"] = discard
        data[n]["head"]["idx"]["slice"], data[n]["head"]["idx"]["kspace_encode_step_1"] = s, c
        data[n]["data"] = kspace[s, :, :, c].reshape(-1).numpy()
    data[0]["data"] = np.ones(2, np.float32)
    if noise is not None:
        data[0]["head"]["active_channels"], data[0]["head"]["number_of_samples"] = noise.shape[:2]
        data[0]["data"] = noise.flatten().numpy()
    for n in range(len(data)):
        data[n]["traj"] = np.zeros(0, np.float32)
    with h5py.File(path, "w") as file:
        group = file.create_group(GROUP)
        group.create_dataset("data", data=data)
        text = header or fastmri_header((rows, width), (rows, width), (5.0, 1.0, 1.0))
        group.create_dataset("xml", data=[text.decode()], dtype=h5py.string_dtype())
    return path
