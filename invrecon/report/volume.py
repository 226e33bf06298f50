"""The layout of results in HDF5: a part holds one slice, a volume all slices of a case.

Volume: `mean` `(N, H, W)`, in colour `(N, 3, H, W)`, if there are any `std` like it and `samples` `(N, S, ...)`,
float32, gzip, a chunk a slice; of complex images these are magnitudes, with `phase` and `samples_phase` like them
[rad], and coil `maps` `(N, coils, H, W)`, complex64; `slices` `(N,)` their indices in the input, `rows` `(N,)` their
metrics as JSON; attributes `units`, `voxel_mm` (z, y, x) in [mm], `source`, `input`, `fingerprint`,
`provenance` (JSON).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from invrecon.errors import InputError
from invrecon.files import atomic_h5, to_json

if TYPE_CHECKING:
    import h5py

FORMAT = "invrecon-volume-1"
VOLUME_DATASETS = ("mean", "std", "samples", "phase", "samples_phase", "maps")
OTHER_UNITS = {"phase": "rad", "samples_phase": "rad", "maps": "1"}


def write_volume(path: Path, parts: Mapping[int, Path], units: str, provenance: Mapping[str, Any]) -> None:
    """Streams parts, and the slices of a volume that is there already, into a new volume.

    Args:
        path: The volume, replaced atomically at the end.
        parts: Slice index -> part.
        units: Of the images.
        provenance: Written as JSON.

    Raises:
        InputError: The disk is full, or slices disagree in shape or source.
    """
    import h5py

    old = open_volume(path) if path.exists() else None
    try:
        old_positions = {} if old is None else {int(s): n for n, s in enumerate(old["slices"][:])}
        slices = sorted({*parts, *old_positions})
        with h5py.File(next(iter(parts.values())), "r") as first:
            layout = {name: first[name].shape for name in VOLUME_DATASETS if name in first}
            dtypes = {name: np.complex64 if first[name].dtype.kind == "c" else np.float32 for name in layout}
            voxel_mm, source = voxel_of(first), str(first.attrs["source"])
            run, identity = (str(first.attrs[name]) for name in ("fingerprint", "input"))
        with atomic_h5(path) as file:
            for name, shape in layout.items():
                file.create_dataset(
                    name,
                    shape=(len(slices), *shape),
                    dtype=dtypes[name],
                    chunks=(1, *(1,) * (len(shape) - 2), *shape[-2:]),
                    compression="gzip",
                    compression_opts=4,
                    shuffle=True,
                ).attrs["units"] = OTHER_UNITS.get(name, units)
            file.create_dataset("slices", data=np.asarray(slices, dtype=np.int32))
            rows = file.create_dataset("rows", shape=(len(slices),), dtype=h5py.string_dtype())
            for n, index in enumerate(slices):
                if index in parts:
                    with h5py.File(parts[index], "r") as part:
                        _check_part(part, parts[index], layout, source)
                        for name in layout:
                            file[name][n] = part[name][()]
                        rows[n] = part.attrs["row"]
                else:
                    assert old is not None
                    for name in layout:
                        file[name][n] = old[name][old_positions[index]]
                    rows[n] = old["rows"].asstr()[old_positions[index]]
            file.attrs["format"] = FORMAT
            file.attrs["units"] = units
            file.attrs["axes"] = "slice, row, column" if len(layout["mean"]) == 2 else "slice, channel, row, column"
            file.attrs["source"] = source
            file.attrs["fingerprint"] = run
            file.attrs["input"] = identity
            file.attrs["provenance"] = to_json(provenance)
            if voxel_mm is not None:
                file.attrs["voxel_mm"] = np.asarray(voxel_mm)
                file.attrs["voxel_mm_axes"] = "z, y, x"
    finally:
        if old is not None:
            old.close()


def open_volume(path: Path) -> h5py.File:
    """Opens a volume that this store wrote, or says what else the file is."""
    import h5py

    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise InputError(f"{path} is damaged or no HDF5 file: remove it, or choose another --output.") from error
    if file.attrs.get("format") != FORMAT:
        file.close()
        raise InputError(
            f"{path} is no result of invrecon (its attribute 'format' is not '{FORMAT}'): "
            "choose another --output, or move that file away."
        )
    return file


def voxel_of(file: h5py.File) -> tuple[float, float, float] | None:
    """Voxel size (z, y, x) in [mm], if the file knows it."""
    voxel = file.attrs.get("voxel_mm")
    return None if voxel is None else tuple(float(v) for v in voxel)  # type: ignore[return-value]


def read_attributes(path: Path, *names: str) -> list[str]:
    """Attributes of a file, as text."""
    import h5py

    with h5py.File(path, "r") as file:
        return [str(file.attrs[name]) for name in names]


def has_mean(path: Path) -> bool:
    """Whether a part holds an image, and not metrics alone."""
    import h5py

    with h5py.File(path, "r") as file:
        return "mean" in file


def squeeze_channel(value: Tensor | np.ndarray, keep_first: bool) -> np.ndarray:
    """As float32 (or complex64) on the CPU, without the channel axis where it has one entry."""
    if isinstance(value, Tensor):
        value = (value if value.is_complex() else value.float()).detach().cpu().numpy()
    array = np.asarray(value, dtype=np.complex64 if value.dtype.kind == "c" else np.float32)
    axis = 1 if keep_first else 0
    return array.squeeze(axis) if array.ndim > 2 + axis and array.shape[axis] == 1 else array


def _check_part(part: h5py.File, path: Path, layout: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Refuses a part whose images or origin do not fit the others of its case."""
    for name, shape in layout.items():
        if name not in part or part[name].shape != shape:
            found = part[name].shape if name in part else "none"
            raise InputError(
                f"{path} has '{name}' of shape {found} where the first slice of its case has {shape}: "
                "remove it and run the same command again."
            )
    if str(part.attrs["source"]) != source:
        raise InputError(
            f"Two input files share the name '{path.parent.name}' ({source} and {part.attrs['source']}), so "
            "their volumes would overwrite each other: rename one, or choose an --output for each."
        )
