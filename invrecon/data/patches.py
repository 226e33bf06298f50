"""Random patches (or whole images) for training: planned as a few numbers, cut where the images are.

A plan is a function of (seed, rank, step) alone. Nothing is remembered between steps, so a run that is resumed at step
`n` sees exactly what the uninterrupted run would have seen from step `n` on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from invrecon.data.augmentation import Augmentation, Changes, changed_patches
from invrecon.priors.patch import cut_patches, patch_positions
from invrecon.rng import make_generator


class PatchBatch(NamedTuple):
    """Clean patches and their places.

    Attributes:
        x: Clean patches, `(n, C, P, P)`, intensity in [0, 1].
        position: Position channels, `(n, 2, P, P)`.
        key: What the noise of this batch is drawn from, together with the run's seed; empty for a validation batch
            that only fills up a rank's share and does not count.
    """

    x: Tensor
    position: Tensor
    key: str


class PatchPlan(NamedTuple):
    """Where the patches of a batch are cut: few numbers, drawn anywhere; the patches are cut where the images are.

    Attributes:
        image: Which one, `(n,)`.
        top: First row, `(n,)`; negative in the padding.
        left: First column, `(n,)`.
        patch_size: `P`.
        key: As of `PatchBatch`.
        held_out: Whether the images are those that validate.
        changes: What is done to each image first, or None.
    """

    image: Tensor
    top: Tensor
    left: Tensor
    patch_size: int
    key: str
    held_out: bool = False
    changes: Changes | None = None

    def to(self, device: torch.device) -> PatchPlan:
        """Returns the plan on another device."""
        changes = self.changes
        if changes is not None:
            moved: dict[str, Any] = {
                name: x.to(device) for name, x in changes._asdict().items() if isinstance(x, Tensor)
            }
            changes = changes._replace(**moved)
        image, top, left = (item.to(device) for item in (self.image, self.top, self.left))
        return self._replace(image=image, top=top, left=left, changes=changes)


class PatchSampler:
    """Draws patches of random size and place from a stack of zero-padded images (PaDIS, section 3.3).

    One size a batch; corners are uniform over the padded frame; every size gets about the same number of pixels, so
    that a batch costs the same whatever was drawn.

    Args:
        images: Clean images `(N, C, H, W)`, kept as stored; `encode` turns a patch of them into intensities.
        encode: Maps stored values to intensities in [0, 1].
        patch_sizes: Sides in pixels, largest first.
        probabilities: Of each size.
        pad: Width of the zero border in pixels.
        pixels_per_batch: Target number of pixels.
        augmentation: Changes the images at random; None shows them as they are.
        held_out: Whether these are the images that validate.
    """

    def __init__(
        self,
        images: Tensor,
        encode: Any,
        patch_sizes: list[int],
        probabilities: list[float],
        pad: int,
        pixels_per_batch: int,
        augmentation: Augmentation | None = None,
        held_out: bool = False,
    ) -> None:
        self.images, self.encode = images, encode
        self.augmentation, self.held_out = augmentation, held_out
        self.patch_sizes, self.probabilities = patch_sizes, torch.tensor(probabilities, dtype=torch.float)
        self.pad, self.pixels_per_batch = pad, pixels_per_batch

    def num_patches(self, patch_size: int) -> int:
        """Patches of a size in a batch."""
        return max(1, round(self.pixels_per_batch / patch_size**2))

    def draw_size(self, generator: torch.Generator) -> int:
        """Draws a batch's patch size by its probability; the first that is drawn for a batch."""
        return self.patch_sizes[int(torch.multinomial(self.probabilities, 1, generator=generator))]

    def plan(self, generator: torch.Generator, key: str, patch_size: int | None = None) -> PatchPlan:
        """Draws the places of a batch of one patch size, drawn by its probability unless given."""
        patch_size = self.draw_size(generator) if patch_size is None else patch_size
        n, (H, W) = self.num_patches(patch_size), self.images.shape[-2:]
        image = torch.randint(len(self.images), (n,), generator=generator)
        frame = (H + 2 * self.pad, W + 2 * self.pad)
        top, left = (torch.randint(f - patch_size + 1, (n,), generator=generator) - self.pad for f in frame)
        changes = None if self.augmentation is None else self.augmentation.draw(n, generator)
        return PatchPlan(image, top, left, patch_size, key, self.held_out, changes)

    def cut(self, plan: PatchPlan) -> PatchBatch:
        """Returns the patches of a plan, on its device; the images move there once, unless they would fill it."""
        device = plan.image.device
        if self.images.device != device and fits(self.images, device):
            self.images = self.images.to(device)
        if self.images.device == device:
            return self._cut(plan)
        batch = self._cut(plan.to(self.images.device))
        return batch._replace(x=batch.x.to(device), position=batch.position.to(device))

    def _cut(self, plan: PatchPlan) -> PatchBatch:
        place, size = (plan.image, plan.top, plan.left), plan.patch_size
        if plan.changes is None:
            values, inside, position = cut_patches(self.images, *place, size)
            return PatchBatch(self.encode(values) * inside, position, plan.key)
        x = changed_patches(self.images, self.encode, place, size, plan.changes)
        return PatchBatch(x, patch_positions(self.images.shape[-2:], plan.top, plan.left, size), plan.key)

    def draw(self, generator: torch.Generator, key: str, patch_size: int | None = None) -> PatchBatch:
        """Returns a batch of one patch size, drawn by its probability unless given."""
        return self.cut(self.plan(generator, key, patch_size))


def fits(images: Tensor, device: torch.device) -> bool:
    """Says whether images may move to a device: a GPU keeps three quarters of its free memory for the network."""
    return device.type != "cuda" or images.nbytes <= torch.cuda.mem_get_info(device)[0] / 4


def batch_generator(seed: int, key: str) -> torch.Generator:
    """Returns what the batch `key` ("step/rank") of a run is drawn from."""
    return make_generator(seed, "patches", key)


class PatchStream(IterableDataset):
    """The plans of one epoch's batches, starting where the training stands.

    Args:
        sampler: Draws a plan.
        seed: The run's seed.
        rank: This process's rank.
        num_batches: Batches an epoch.
        position: Returns the number of batches already seen, over all epochs.
    """

    def __init__(self, sampler: PatchSampler, seed: int, rank: int, num_batches: int, position: Any) -> None:
        self.sampler, self.seed, self.rank, self.num_batches, self.position = sampler, seed, rank, num_batches, position

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[PatchPlan]:
        start = self.position()
        for step in range(start, (start // self.num_batches + 1) * self.num_batches):
            key = f"{step}/{self.rank}"
            yield self.sampler.plan(batch_generator(self.seed, key), key)


class FixedBatches(IterableDataset):
    """The same batches every time, for validation, shared out over the ranks.

    Args:
        sampler: Draws a plan.
        num_batches: Batches in all.
        rank: This process's rank.
        num_ranks: Number of processes.
    """

    def __init__(self, sampler: PatchSampler, num_batches: int, rank: int, num_ranks: int) -> None:
        self.sampler, self.num_batches, self.rank, self.num_ranks = sampler, num_batches, rank, num_ranks

    def __iter__(self) -> Iterator[PatchPlan]:
        for first in range(0, self.num_batches, self.num_ranks):
            # Every rank gets as many, for each batch is a collective under DDP: what is too many has no key.
            step = first + self.rank
            key = f"validation/{step}"
            plan = self.sampler.plan(make_generator(0, key), key, self.sampler.patch_sizes[0])
            yield plan if step < self.num_batches else plan._replace(key="")
