"""Cases that have nothing but a name: what unconditional generation is asked for."""

from __future__ import annotations

from pathlib import Path

import lightning
from torch.utils.data import DataLoader

from invrecon.data.cases import CaseBatch
from invrecon.data.intensity import HOUNSFIELD, Intensity
from invrecon.errors import InputError


class GenerationData(lightning.LightningDataModule):
    """Asks for samples of a prior, dealt out over the ranks.

    Args:
        num_images: Samples in all.
        size: Side of the images in pixels.
        batch_size: Samples drawn at once.
        intensity: The scale of the prior: the project's CT scale, or for natural images `{offset: 0, scale: 255,
            units: 8 bit}`.

    Raises:
        InputError: A number is below 1.
    """

    def __init__(
        self, num_images: int = 4, size: int = 256, batch_size: int = 4, intensity: Intensity = HOUNSFIELD
    ) -> None:
        super().__init__()
        for name, value in (("num_images", num_images), ("size", size), ("batch_size", batch_size)):
            if value < 1:
                raise InputError(f"data.{name} is {value}, expected at least 1.")
        self.num_images, self.size, self.batch_size = num_images, size, batch_size
        self.intensity = intensity
        self.skip_ids: set[str] = set()
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def case_index(self) -> list[tuple[Path, list[int]]]:
        """Lists the one source of all cases, `sample`, and their numbers."""
        return [(Path("sample"), list(range(self.num_images)))]

    def case_ids(self) -> list[str]:
        """Lists `sample/0000`, `sample/0001`, ..."""
        return [f"sample/{index:04d}" for index in range(self.num_images)]

    def predict_dataloader(self) -> DataLoader:
        """The samples of this rank that are not in `skip_ids`."""
        rank, num_ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        left = [name for name in self.case_ids() if name not in self.skip_ids]
        batches = [left[i : i + self.batch_size] for i in range(0, len(left), self.batch_size)]
        cases = [
            CaseBatch(
                id=names,
                patient=["none"] * len(names),
                source=["sample"] * len(names),
                index=[int(name.rsplit("/", 1)[1]) for name in names],
                voxel_mm=[None] * len(names),
            )
            for names in batches[rank::num_ranks]
        ]
        return DataLoader(cases, batch_size=None)  # type: ignore[arg-type]
