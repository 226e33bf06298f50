"""What is reconstructed: one slice (a case) and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from invrecon.errors import InputError

Geometry = dict[str, Any]
VoxelSize = tuple[float, float, float]


@dataclass
class Case:
    """One slice to reconstruct, known by its image or by its measurement.

    Attributes:
        id: `'<file stem>/<slice index:04d>'`, unique within a run.
        patient: The patient's identity, the unit of statistics.
        source: Path of the file.
        index: Index of the slice within the file.
        reference: The image `(1, H, W)`, in colour `(3, H, W)`, in intensity [0, 1], as stored (perhaps finer than
            the reconstruction), complex `(2, H, W)`, or None where nobody knows it.
        measurement: Sinogram `(1, views, bins)` or k-space `(coils, H, W, 2)`; None if it is to be simulated from the
            reference.
        noise_std: Standard deviation of the measurement's noise, a scalar, `(1, views, bins)` or `(coils, 1, 1, 1)`;
            None is noise-free or simulated.
        geometry: How the measurement was taken (`invrecon.data.measurement`); None if simulated.
        voxel_mm: Voxel size `(z, y, x)` of the reference or, for a measurement, of the image asked for [mm].
        maps: Coil sensitivities of MRI `(coils, H, W, 2)`, or None for one coil of sensitivity 1.
        mask: What was measured of k-space, `(H, W)`, or None.
        scale: What the stored values were divided by; 1 where the scale is that of the data module for all.
        maximum: Largest value of the whole volume's reference that the file states, in its own units, or None.
    """

    id: str
    patient: str
    source: str
    index: int
    reference: Tensor | None = None
    measurement: Tensor | None = None
    noise_std: Tensor | None = None
    geometry: Geometry | None = None
    voxel_mm: VoxelSize | None = None
    maps: Tensor | None = None
    mask: Tensor | None = None
    scale: float = 1.0
    maximum: float | None = None


@dataclass
class CaseBatch:
    """Cases of one file: lists of what names them, stacked tensors of what they hold.

    Attributes:
        id: As in `Case`, a list.
        patient: As in `Case`, a list.
        source: As in `Case`, a list of equal entries.
        index: As in `Case`, a list.
        reference: `(B, C, H, W)` or None.
        measurement: `(B, 1, views, bins)`, `(B, coils, H, W, 2)` or None.
        noise_std: `(B,)`, `(B, 1, views, bins)`, `(B, coils, 1, 1, 1)` or None.
        geometry: Of the file, shared by all.
        voxel_mm: As in `Case`, a list.
        maps: `(B, coils, H, W, 2)` or None.
        mask: `(B, H, W)` or None.
        scale: As in `Case`, a list; empty is 1 for all.
        maximum: As in `Case`, a list; empty is None for all.
    """

    id: list[str]
    patient: list[str]
    source: list[str]
    index: list[int]
    reference: Tensor | None = None
    measurement: Tensor | None = None
    noise_std: Tensor | None = None
    geometry: Geometry | None = None
    voxel_mm: Sequence[VoxelSize | None] = ()
    maps: Tensor | None = None
    mask: Tensor | None = None
    scale: Sequence[float] = ()
    maximum: Sequence[float | None] = ()

    def __len__(self) -> int:
        return len(self.id)

    def to(self, device: torch.device | str) -> CaseBatch:
        """Returns the batch with its tensors on `device`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **moved)


def collate_cases(cases: Sequence[Case]) -> CaseBatch:
    """Stacks cases of one file into a batch.

    Raises:
        InputError: If the cases come from different files, or their tensors from different shapes.
    """
    if not cases:
        raise InputError("A batch of no cases was asked for; give at least one.")
    sources = sorted({case.source for case in cases})
    if len(sources) > 1:
        raise InputError(f"A batch mixes cases of {sources}; put cases of one file into a batch.")

    def stack(name: str) -> Tensor | None:
        tensors = [getattr(case, name) for case in cases]
        if all(tensor is None for tensor in tensors):
            return None
        shapes = {None if tensor is None else tuple(tensor.shape) for tensor in tensors}
        if len(shapes) > 1:
            raise InputError(f"The cases of {sources[0]} differ in the shape of their {name}: {shapes}.")
        return torch.stack(tensors)

    return CaseBatch(
        id=[case.id for case in cases],
        patient=[case.patient for case in cases],
        source=[case.source for case in cases],
        index=[case.index for case in cases],
        reference=stack("reference"),
        measurement=stack("measurement"),
        noise_std=stack("noise_std"),
        geometry=cases[0].geometry,
        voxel_mm=[case.voxel_mm for case in cases],
        maps=stack("maps"),
        mask=stack("mask"),
        scale=[case.scale for case in cases],
        maximum=[case.maximum for case in cases],
    )
