"""What the benchmark of MRI measures, and how: settings, their cases, and the task that judges volumes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import _common
from benchmarks._common import Bench, Entry, Setting
from invrecon.data.cases import CaseBatch
from invrecon.data.intensity import MAGNITUDE, Intensity
from invrecon.data.kspace_files import is_kspace, open_kspace
from invrecon.data.mri import MRIData, open_magnitudes
from invrecon.data.reconstruction import case_id
from invrecon.methods import Sampler
from invrecon.metrics.mri import magnitude, volume_metrics
from invrecon.operators import (
    CartesianMRI,
    ESPIRiT,
    LinearOperator,
    NoiseModel,
    RandomLines,
    Sampling,
    SNRNoise,
)
from invrecon.tasks.adaptation import TestTimeAdaptation
from invrecon.tasks.reconstruction import Reconstruction, Result

HELD_OUT, VALIDATION = "mri/heldout/pyrad-brain2.h5", "mri/train/pyrad-brain1.h5"
ABDOMEN, SCAN = "mri/ood/CMBCRC-T2-1.h5", "mri/kspace/espirit-full.h5"
NUM_COILS, MAPS = 8, ESPIRiT(kernel_size=4)
NOISE = SNRNoise(30.0)
R4, R8 = RandomLines(4, 0.08), RandomLines(8, 0.04)


@dataclass(frozen=True, kw_only=True)
class MRISetting(Setting):
    """What is measured.

    Attributes:
        file: Of the benchmark data.
        sampling: What of k-space.
        num_slices: How many of the file's slices.
        spread: Whether they are spread evenly over the file; those in its middle, one after the other, otherwise.
        num_masks: How often each slice is measured; masks are then what an interval is over.
        aim: What rows of the patch prior are to gain on classical methods [dB]; None where nothing was aimed at.
        maximum: Largest value of the volume's reference, once it has been read.
    """

    num_views: int = 0
    noise: NoiseModel = NOISE
    file: str = HELD_OUT
    sampling: Sampling
    num_slices: int = 1
    spread: bool = False
    num_masks: int = 1
    aim: float | None = None
    maximum: float | None = None

    def slices(self) -> list[int]:
        """Returns the slices: of N, those from (N - n) // 2 on, or the middles of n equal parts."""
        total = count_slices(_common.data_file(self.file))
        num = min(self.num_slices, total)
        if self.spread:
            return [(2 * k + 1) * total // (2 * num) for k in range(num)]
        return list(range((total - num) // 2, (total + num) // 2))

    def volume(self, mask: int) -> str:
        """Returns the name of what is measured by a mask: the file's, if there is but one."""
        stem = Path(self.file).stem
        return stem if self.num_masks == 1 else f"{stem}, mask {mask}"


@cache
def count_slices(path: Path) -> int:
    """Returns how many slices a file has."""
    return len(open_kspace(path) if is_kspace(path) else open_magnitudes(path))


class VolumeReconstruction(Reconstruction):
    """A reconstruction whose rows hold, besides, what metrics of volumes are made of (`volume_summary`).

    Attributes:
        maximum: The volume's data range, in the file's units; the largest value of each batch's references if None.
    """

    maximum: float | None = None

    def _intensity(self) -> Intensity:
        return MAGNITUDE

    def reconstruct(self, batch: CaseBatch) -> Result:
        """Measures (if need be), reconstructs and judges a batch."""
        result = super().reconstruct(batch)
        assert result.reference is not None
        pairs = zip(magnitude(result.reference), magnitude(result.estimate.mean), batch.scale, result.rows, strict=True)
        for target, estimate, scale, row in pairs:
            found = volume_metrics(scale * target, scale * estimate, self.maximum)
            row |= {"nmse": found["nmse"], "volume_psnr": found["psnr"], "volume_ssim": found["ssim"]}
            row["energy"] = float((scale * target).double().square().sum())
        return result


class VolumeAdaptation(VolumeReconstruction, TestTimeAdaptation):
    """The same with a prior that is adapted to each slice."""


class MRIBench(Bench):
    """Runs methods on MRI."""

    def task(self, setting: Setting, entry: Entry, precision: str | None = None) -> Reconstruction:
        """Returns the task that measures and reconstructs."""
        assert isinstance(setting, MRISetting)
        prior = entry.prior if entry.method.needs_prior else None
        physics = CartesianMRI(self.size)  # its mask, coils and, if measured, size come with the case
        shared = (setting.noise, prior, precision or self.precision, self.seed)
        task: VolumeReconstruction
        if entry.adaptation is None:
            task = VolumeReconstruction(physics, entry.method, *shared, mirror=entry.mirror)
        else:
            assert isinstance(entry.method, Sampler)
            task = VolumeAdaptation(physics, entry.method, entry.adaptation, *shared)
        task.maximum = setting.maximum
        return task.to(self.record.device)

    def operator(self, setting: Setting) -> LinearOperator:
        """Returns the physics without what comes with the case."""
        return CartesianMRI(self.size)

    def identity(self, setting: Setting, *arguments: Any, **more: Any) -> str:
        """Returns the fingerprint of all that decides a row; the mask's number is part of its name."""
        assert isinstance(setting, MRISetting)
        physics = {"sampling": setting.sampling, "maps": MAPS, "num_coils": NUM_COILS, "slices": setting.slices()}
        return super().identity(replace(setting, physics=_common.plain(physics)), *arguments, **more)


def name_batches(setting: MRISetting, mask: int, batch_size: int) -> list[CaseBatch]:
    """Returns the batches of a mask without what they hold: enough to look for their rows."""
    path, chosen = _common.data_file(setting.file), setting.slices()
    groups = [chosen[first : first + batch_size] for first in range(0, len(chosen), batch_size)]
    return [
        CaseBatch(
            id=[f"{setting.volume(mask)}/{case_id(path, index).rsplit('/', 1)[1]}" for index in group],
            patient=[],
            source=[str(path)] * len(group),
            index=group,
        )
        for group in groups
    ]


def load_batches(setting: MRISetting, mask: int, size: int, batch_size: int) -> list[CaseBatch]:
    """Returns the same batches with what they hold."""
    named = name_batches(setting, mask, batch_size)
    data = MRIData(
        str(_common.data_file(setting.file)),
        slices=",".join(map(str, setting.slices())),
        size=size,
        sampling=setting.sampling,
        maps=MAPS,
        num_coils=NUM_COILS,
        seed=mask,
        batch_size=batch_size,
    )
    return [replace(batch, id=own.id) for batch, own in zip(data.test_dataloader(), named, strict=True)]


def largest_value(batches: Sequence[CaseBatch]) -> float:
    """Returns the largest magnitude of the references, in the file's units."""
    peaks = []
    for batch in batches:
        assert batch.reference is not None
        peaks += [scale * float(magnitude(x).amax()) for x, scale in zip(batch.reference, batch.scale, strict=True)]
    return max(peaks)
