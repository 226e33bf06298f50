"""Cases for `test` and `predict`: slices of volumes or sinograms of measurement files, read in turn."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from invrecon.data.cases import Case, CaseBatch, collate_cases
from invrecon.data.images import find_images, open_images
from invrecon.data.intensity import RGB, Intensity
from invrecon.data.measurement import Measurement, is_measurement, open_measurement
from invrecon.data.volume import Volume, file_stem
from invrecon.data.volumes import check_pixels, find_volumes, open_volume, parse_slices
from invrecon.errors import InputError

PACKAGE = Path(__file__).resolve().parents[1]
SHIPPED = (PACKAGE / "_share" / "data", PACKAGE.parent / "data")  # in a wheel, in a checkout


class ReconstructionData(lightning.LightningDataModule):
    """Every selected slice of every file once, in batches that never mix files.

    A file is either a volume, whose slices are references and whose measurement will be simulated, or a
    measurement file, which has no reference. With several processes, batches are dealt out like cards: every
    case is seen exactly once, on one rank, without padding.

    A volume whose slices are `k * size` pixels wide (`k` integer) keeps its resolution in `Case.reference`;
    the task simulates the measurement on the fine grid and compares with the block average, which commits no
    inverse crime.

    Args:
        paths: Files or folders; a name that does not exist here is looked up in the shipped `data/`.
        slices: Selection applied to each file: '3', '1,4,9' or '10:90:5' (end excluded; quote it in YAML);
            None is all.
        size: Side of the reconstructed image in pixels.
        batch_size: Cases reconstructed at once.
        num_workers: Processes that read ahead; reading is cheap beside reconstructing, so 0 is right.
        dataset: The HDF5 dataset that holds a volume.

    Attributes:
        skip_ids: Ids of cases that are already done; set before `predict_dataloader` is called, the same on
            every rank.
        whole_batches: Whether a batch of which anything is left comes whole, so that what is done changes no batch.
    """

    def __init__(
        self,
        paths: list[str] | str = "lung2_sample.h5",
        slices: str | None = None,
        size: int = 256,
        batch_size: int = 4,
        num_workers: int = 0,
        dataset: str = "data",
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("size", size, 2),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise InputError(f"data.{name} is {value}, expected at least {least}.")
        self.paths, self.slices, self.size, self.dataset = paths, slices, size, dataset
        self.batch_size, self.num_workers = batch_size, num_workers
        self.intensity = Intensity()
        self.skip_ids: set[str] = set()
        self.whole_batches = False
        self._files: list[tuple[Volume | Measurement, list[int]]] | None = None

    def setup(self, stage: str | None = None) -> None:
        """Finds the files, checks headers and every selected slice, so that nothing fails hours later.

        Raises:
            InputError: If a file or selection is of no use, two files have one name, or one has no reference to be
                tested against.
        """
        if self._files is not None:
            return
        files: list[tuple[Volume | Measurement, list[int]]] = []
        stems: dict[str, Path] = {}
        for path in self._find():
            file = self._open(path)
            if file.stem in stems:
                raise InputError(
                    f"{path} and {stems[file.stem]} have the same name, which names their results; rename one."
                )
            if stage == "test" and isinstance(file, Measurement):
                raise InputError(
                    f"{path} is a measurement without a reference, so there is nothing to test against: use "
                    "`invrecon predict`."
                )
            stems[file.stem] = path
            indices = parse_slices(self.slices, len(file), name=str(path))
            self._check(file, indices)
            files.append((file, indices))
        self._files = files

    def _check(self, file: Any, indices: list[int]) -> None:
        """Reads the selected slices of a file, or looks at their pixels."""
        if isinstance(file, Measurement):
            for index in indices:
                file.read(index)
        else:
            check_pixels(file, indices, self.intensity)

    def case_index(self) -> list[tuple[Path, list[int]]]:
        """Lists `(file, slice indices)` of all cases, done or not; reads no pixels of its own."""
        self.setup()
        assert self._files is not None
        return [(file.path, list(indices)) for file, indices in self._files]

    def case_ids(self) -> list[str]:
        """Lists the ids of all cases, done or not, in order."""
        return [case_id(path, index) for path, indices in self.case_index() for index in indices]

    def load(self, file: Volume | Measurement, index: int) -> Case:
        """Reads one case."""
        name = case_id(file.path, index)
        if isinstance(file, Measurement):
            sinogram, noise_std = file.read(index)
            return Case(
                id=name,
                patient=file.patient,
                source=str(file.path),
                index=index,
                measurement=sinogram,
                noise_std=noise_std,
                geometry=file.geometry,
                voxel_mm=file.voxel_mm,
            )
        x = self.intensity.encode(file.read(index))
        return Case(
            id=name,
            patient=file.patients[index],
            source=str(file.path),
            index=index,
            reference=x if x.ndim == 3 else x[None],
            voxel_mm=file.voxel_mm,
        )

    def test_dataloader(self) -> DataLoader:
        """All cases of this rank."""
        return self._loader(skip=frozenset())

    def predict_dataloader(self) -> DataLoader:
        """The cases of this rank that are not in `skip_ids`."""
        return self._loader(skip=frozenset(self.skip_ids))

    def _loader(self, skip: frozenset[str]) -> DataLoader:
        self.setup()
        assert self._files is not None
        # Lightning fears that workers repeat an iterable data set; ours share it out
        warnings.filterwarnings("ignore", message=".*IterableDataset. has .__len__. defined")
        rank, num_ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        batches = []
        for file, indices in self._files:
            left = [index for index in indices if case_id(file.path, index) not in skip]
            undone = set(left)
            dealt = indices if self.whole_batches else left
            num = max(1, -(-len(dealt) // self.batch_size))  # of equal size, but for one: none is left alone
            ends = [-(-j * len(dealt) // num) for j in range(num + 1)]
            groups = [dealt[start:end] for start, end in pairwise(ends)]
            batches += [(file, group) for group in groups if not undone.isdisjoint(group)]
        return DataLoader(_Batches(batches[rank::num_ranks], self.load), batch_size=None, num_workers=self.num_workers)

    def _find(self) -> list[Path]:
        return find_volumes(resolve_paths(self.paths))

    def _open(self, path: Path) -> Volume | Measurement:
        if is_measurement(path):
            return open_measurement(path)
        volume = open_volume(path, dataset=self.dataset, units=self.intensity.units)
        _, height, width = volume.shape
        if height != width or height % self.size:
            raise InputError(
                f"{path} has slices of {height} x {width} pixels, expected a multiple of data.size = "
                f"{self.size}; convert it with `python -m invrecon.data.convert {path} OUT.h5 --size "
                f"{self.size}`."
            )
        return volume


class ImageData(ReconstructionData):
    """Natural colour images, `(3, size, size)`, whose measurement will be simulated.

    A PNG or JPEG file is one image; a folder of them is a stack, as an HDF5 dataset is. Of each image the middle
    square is taken and reduced to the size.

    Args:
        paths: PNG, JPEG or HDF5 files, or folders of them.
        slices: Selection applied to each stack, in a folder by sorted name: '3', '1,4,9' or '0:16:2'; None is all.
        size: Side of the images in pixels.
        batch_size: Cases reconstructed at once.
        num_workers: Processes that read ahead; reading is cheap beside reconstructing, so 0 is right.
        dataset: The HDF5 dataset that holds images, `(N, H, W, 3)` or `(N, 3, H, W)`.
    """

    def __init__(
        self,
        paths: list[str] | str,
        slices: str | None = None,
        size: int = 256,
        batch_size: int = 4,
        num_workers: int = 0,
        dataset: str = "data",
    ) -> None:
        super().__init__(paths, slices, size, batch_size, num_workers, dataset)
        self.intensity = RGB

    def _find(self) -> list[Path]:
        return find_images(resolve_paths(self.paths))

    def _open(self, path: Path) -> Volume:
        return open_images(path, self.size, dataset=self.dataset)


class _Batches(IterableDataset):
    """Ready batches, read in turn; iterable, so that no loader re-batches or re-shards what is dealt out."""

    def __init__(
        self,
        batches: Sequence[tuple[Volume | Measurement, list[int]]],
        load: Callable[[Volume | Measurement, int], Case],
    ) -> None:
        self.batches, self.load = batches, load

    def __len__(self) -> int:
        # at least 1: Lightning skips the hooks of a rank without batches, where other ranks may wait for it
        return max(1, len(self.batches))

    def __iter__(self) -> Iterator[CaseBatch]:
        worker = get_worker_info()
        first, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for file, indices in self.batches[first::stride]:
            yield collate_cases([self.load(file, index) for index in indices])


def case_id(path: Path, index: int) -> str:
    """Returns `'<file stem>/<slice index:04d>'`."""
    return f"{file_stem(path)}/{index:04d}"


def resolve_paths(paths: Sequence[str] | str) -> list[Path]:
    """Finds each name as given or, failing that, in the shipped `data/`; an existing file wins.

    Raises:
        InputError: If a name is found in neither.
    """
    resolved = []
    for name in [paths] if isinstance(paths, str) else paths:
        places = [Path(name).expanduser(), *(folder / name for folder in SHIPPED)]
        found = next((place for place in places if place.exists()), None)
        if found is None:
            shipped = sorted({file.name for folder in SHIPPED if folder.is_dir() for file in folder.glob("*.h5")})
            raise InputError(
                f"{name} does not exist, and is none of the shipped files ({', '.join(shipped)}); check data.paths."
            )
        resolved.append(found)
    return resolved
