r"""Patch layouts: which patches of the padded frame one evaluation denoises, and how their outputs make an image.

$$ D(x) = \sum_c G_c^T W_c D(G_c u), \qquad
   W_c(i, j) = \frac{h(i - s_c) h(j - t_c)}{\sum_{c'} h(i - s_{c'}) h(j - t_{c'})} $$

with `u` the noisy image in its frame of noise, `G_c` the cutting of the patch whose first pixel is `(s_c, t_c)`, and a
window `h` along each axis. Whatever the window, the weights of a pixel sum to one. The patches form a grid, so the
weights are a product of one factor an axis.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from invrecon.errors import InputError
from invrecon.rng import Generators, randint


@dataclass(frozen=True)
class Places:
    """Where the patches of one evaluation lie and how much each gives of its pixels.

    Attributes:
        frame: Which frame each patch is of, `(n,)`.
        top: First row of each patch, `(n,)`; negative in the padding.
        left: First column of each patch, `(n,)`.
        row_weights: Factor of `W_c` along the rows, `(n, P)`.
        column_weights: Factor of `W_c` along the columns, `(n, P)`.
    """

    frame: Tensor
    top: Tensor
    left: Tensor
    row_weights: Tensor
    column_weights: Tensor

    def __len__(self) -> int:
        return len(self.frame)

    def __getitem__(self, index: slice | Tensor) -> Places:
        return Places(*(value[index] for value in vars(self).values()))

    def like(self, x: Tensor) -> Places:
        """Returns the places on the device of `x`, the weights with its dtype."""
        weights = (self.row_weights.to(x.dtype), self.column_weights.to(x.dtype))
        return Places(*(value.to(x.device) for value in (self.frame, self.top, self.left, *weights)))


def partition(starts: Tensor, window: Tensor) -> Tensor:
    """Returns the window at each start, scaled so that the windows over a pixel sum to one, `(B, K, P)`.

    Args:
        starts: First pixel of each patch along an axis, `(B, K)`.
        window: `h`, `(P,)`, not negative.
    """
    index = (starts[..., None] - starts.min() + torch.arange(len(window))).flatten(1)
    windows = window.expand(*starts.shape, -1)
    total = torch.zeros(len(starts), int(index.max()) + 1, dtype=window.dtype)
    total = total.scatter_add(1, index, windows.flatten(1)).gather(1, index).reshape(windows.shape)
    return windows / total.where(total > 0, torch.ones_like(total))  # where no window reaches, each of them is zero


class Layout(ABC):
    """Where patches lie, and their window.

    Args:
        patch_size: `P` in pixels; that of the prior by default.

    Attributes:
        num_shifts: Frames a sample, each with padding and places of its own, whose average is one evaluation.
    """

    num_shifts: int = 1

    def __init__(self, patch_size: int | None = None) -> None:
        self.patch_size = patch_size

    @abstractmethod
    def pad(self, num: int, patch_size: int) -> tuple[int, int]:
        """Returns the pixels of padding before and after an axis of `num` pixels."""

    @abstractmethod
    def starts(self, num: int, patch_size: int, generators: Generators) -> Tensor:
        """Returns the first pixel of each patch along an axis of `num` pixels, `(B, K)`; every pixel is in a patch."""

    def window(self, patch_size: int) -> Tensor:
        """Returns `h`, `(P,)`, in double precision."""
        return torch.ones(patch_size, dtype=torch.float64)

    def check(self, patch_size: int) -> None:  # noqa: B027 - a layout may suit every size
        """Sees whether patches of this size can be laid out.

        Raises:
            InputError: If not.
        """

    def place(self, shape: tuple[int, int], patch_size: int, generators: Generators) -> Places:
        """Returns the places in every frame, row by row, frame by frame.

        Args:
            shape: Image size (H, W).
            patch_size: `P`.
            generators: One generator a frame: each sample's `num_shifts` times.
        """
        window = self.window(patch_size)
        rows, columns = (self.starts(num, patch_size, generators) for num in shape)
        (B, K), L = rows.shape, columns.shape[1]

        def each_row(values: Tensor) -> Tensor:
            return values.repeat_interleave(L, dim=1).flatten(0, 1)

        def each_column(values: Tensor) -> Tensor:
            return values.repeat(1, K, *[1] * (values.ndim - 2)).flatten(0, 1)

        return Places(
            torch.arange(B).repeat_interleave(K * L),
            each_row(rows),
            each_column(columns),
            each_row(partition(rows, window)) / self.num_shifts,
            each_column(partition(columns, window)),
        )


def shift_law(num: int, patch_size: int) -> tuple[int, int]:
    r"""Returns how many patches cover an axis at any of how many offsets.

    $$ K = 1 + \lfloor N / P \rfloor, \quad M = K P - N $$

    patches along the axis and padding on each of its sides (PaDIS, section 3.2): N = 256, P = 56 gives K = 5, M = 24,
    a padded frame of 304 and 24 offsets; the tiled region `[a - M, a - M + K P)` contains the image `[0, N)` for every
    offset `0 <= a < M`.
    """
    K = 1 + num // patch_size
    return K, K * patch_size - num


class RandomShift(Layout):
    """Non-overlapping patches on a grid at a random offset, drawn anew at each evaluation and for each sample.

    The layout of PaDIS (Hu et al., NeurIPS 2024, section 3.2 and algorithm 1): an unbiased estimate of the average
    over offsets. The average of `num_shifts` offsets costs as many evaluations of the network and has that much less
    variance; each has padding noise of its own.

    Args:
        num_shifts: Offsets an evaluation.
        patch_size: `P` in pixels; that of the prior by default.

    Raises:
        InputError: If there are fewer than one.
    """

    def __init__(self, num_shifts: int = 1, patch_size: int | None = None) -> None:
        super().__init__(patch_size)
        if num_shifts < 1:
            raise InputError(f"layout.num_shifts must be at least 1; got {num_shifts}.")
        self.num_shifts = num_shifts

    def pad(self, num: int, patch_size: int) -> tuple[int, int]:
        """Returns `M` for both sides."""
        _, M = shift_law(num, patch_size)
        return M, M

    def starts(self, num: int, patch_size: int, generators: Generators) -> Tensor:
        """Returns `a - M + k P` of a random offset `a`, `(B, K)`."""
        K, M = shift_law(num, patch_size)
        return randint(M, generators)[:, None] - M + patch_size * torch.arange(K)


class FixedLayout(Layout):
    """A layout that is the same at every evaluation, and laid out once; padding is no wider than its patches reach."""

    _last: tuple[tuple[tuple[int, int], int, int], Places] | None = None

    def place(self, shape: tuple[int, int], patch_size: int, generators: Generators) -> Places:
        """Returns the places of `Layout.place`; those of the last call if it asked for the same."""
        asked, last = (shape, patch_size, len(generators)), self._last
        if last is None or last[0] != asked:
            self._last = last = asked, super().place(shape, patch_size, generators)
        return last[1]

    @abstractmethod
    def grid(self, num: int, patch_size: int) -> Sequence[int]:
        """Returns the first pixel of each patch along an axis of `num` pixels, in order."""

    def pad(self, num: int, patch_size: int) -> tuple[int, int]:
        """Returns by how much the first and the last patch leave the image."""
        grid = self.grid(num, patch_size)
        return max(0, -grid[0]), max(0, grid[-1] + patch_size - num)

    def starts(self, num: int, patch_size: int, generators: Generators) -> Tensor:
        """Returns the same grid for every sample, `(B, K)`."""
        return torch.tensor(self.grid(num, patch_size)).expand(len(generators), -1)


class FixedGrid(FixedLayout):
    """Non-overlapping patches that never move: the naive layout, whose borders are seen in the image.

    With a network of `position_channels: 0` this is the prior of one stationary patch density from which the patch
    diffusion talk sets out; with positions it isolates what shifting the grid is worth.

    Args:
        offset: Pixels by which the first patch begins before the image, `0 <= offset < P`.
        patch_size: `P` in pixels; that of the prior by default.
    """

    def __init__(self, offset: int = 0, patch_size: int | None = None) -> None:
        super().__init__(patch_size)
        self.offset = offset

    def check(self, patch_size: int) -> None:
        """Raises an InputError unless `0 <= offset < P`."""
        if not 0 <= self.offset < patch_size:
            raise InputError(
                f"layout.offset is {self.offset}; expected 0 to {patch_size - 1} for patches of {patch_size} pixels."
            )

    def grid(self, num: int, patch_size: int) -> Sequence[int]:
        """Returns `k P - offset`."""
        return range(-self.offset, num, patch_size)


class OverlapAverage(FixedLayout):
    """Overlapping patches whose outputs are averaged with equal weights (Ozdenizci and Legenstein, TPAMI 2023).

    Patches start every `stride` pixels from the image's first, and the last one ends with the image. The patch
    averaging to which PaDIS compares itself has 56-pixel patches and a stride of 48.

    Args:
        stride: Pixels from patch to patch, `1 <= stride <= P`; half a patch by default.
        patch_size: `P` in pixels; that of the prior by default.
    """

    def __init__(self, stride: int | None = None, patch_size: int | None = None) -> None:
        super().__init__(patch_size)
        self.stride = stride

    def check(self, patch_size: int) -> None:
        """Raises an InputError unless `1 <= stride <= P`."""
        if self.stride is not None and not 1 <= self.stride <= patch_size:
            raise InputError(
                f"layout.stride is {self.stride}; expected 1 to {patch_size}, so that patches of {patch_size} pixels "
                "leave no gap."
            )

    def grid(self, num: int, patch_size: int) -> Sequence[int]:
        """Returns `0, stride, 2 stride, ...` and `N - P`, negative where a patch is larger than the image."""
        stride = max(1, patch_size // 2) if self.stride is None else self.stride
        return [*range(0, num - patch_size, stride), num - patch_size]


class Windowed(OverlapAverage):
    r"""Overlapping patches blended by a smooth window, so that no border of a patch is a border in the image.

    $$ h(i) = \sin^2 \frac{\pi (i + 1/2)}{P} $$

    (Hann), which at a stride of half a patch is a partition of unity by itself and is scaled to one elsewhere.

    Args:
        stride: Pixels from patch to patch, `1 <= stride <= P`; half a patch by default.
        patch_size: `P` in pixels; that of the prior by default.
    """

    def window(self, patch_size: int) -> Tensor:
        """Returns `h`, positive everywhere."""
        return torch.sin(torch.pi * (torch.arange(patch_size, dtype=torch.float64) + 0.5) / patch_size).square()


class Stitched(FixedLayout):
    """Overlapping patches of which only the interior is kept: every pixel is seen with its surroundings.

    The interiors of `P - 2 margin` pixels tile the image, centred on it. With P = 56 and margin 4 the patches are
    those of the patch stitching to which PaDIS compares itself (starts -20, 28, ..., 220 for 256 pixels), where the
    later patch wins instead.

    Args:
        margin: Pixels given away at each side of a patch, `0 <= margin < P / 2`.
        patch_size: `P` in pixels; that of the prior by default.
    """

    def __init__(self, margin: int = 4, patch_size: int | None = None) -> None:
        super().__init__(patch_size)
        self.margin = margin

    def check(self, patch_size: int) -> None:
        """Raises an InputError unless `0 <= margin < P / 2`."""
        if not 0 <= 2 * self.margin < patch_size:
            raise InputError(
                f"layout.margin is {self.margin}; expected 0 to {(patch_size - 1) // 2}, so that something is kept of "
                f"patches of {patch_size} pixels."
            )

    def grid(self, num: int, patch_size: int) -> Sequence[int]:
        """Returns the starts whose interiors tile the image."""
        interior = patch_size - 2 * self.margin
        K = -(-num // interior)
        first = -(K * interior - num) // 2 - self.margin
        return range(first, first + K * interior, interior)

    def window(self, patch_size: int) -> Tensor:
        """Returns 1 in the interior and 0 in the margins."""
        window = torch.zeros(patch_size, dtype=torch.float64)
        window[self.margin : patch_size - self.margin] = 1
        return window


class SkipEmpty(Layout):
    """Another layout without the patches in which the image is known to be zero: their output is zero, unasked.

    Those are the patches wholly in the padding and, with a `radius`, those wholly outside the disc (on an oblong
    image, the ellipse) of that radius about the centre, such as a scanner's field of view. Exact for a prior that
    knows of these zeros.

    Args:
        layout: The other layout; `RandomShift` by default.
        radius: Of the disc, in halves of the image's sides: 1 touches its edges; no disc by default.

    Raises:
        InputError: If the radius is not positive.
    """

    def __init__(self, layout: Layout | None = None, radius: float | None = None) -> None:
        self.layout = RandomShift() if layout is None else layout
        super().__init__(self.layout.patch_size)
        if radius is not None and not radius > 0:
            raise InputError(f"layout.radius must be positive; got {radius}.")
        self.radius, self.num_shifts = radius, self.layout.num_shifts

    def check(self, patch_size: int) -> None:
        """Raises what the other layout does."""
        self.layout.check(patch_size)

    def pad(self, num: int, patch_size: int) -> tuple[int, int]:
        """Returns the padding of the other layout."""
        return self.layout.pad(num, patch_size)

    def starts(self, num: int, patch_size: int, generators: Generators) -> Tensor:
        """Returns the starts of the other layout."""
        return self.layout.starts(num, patch_size, generators)

    def place(self, shape: tuple[int, int], patch_size: int, generators: Generators) -> Places:
        """Returns the places of the other layout that are not known to be empty, their weights unchanged."""
        places = self.layout.place(shape, patch_size, generators)
        kept = torch.ones(len(places), dtype=torch.bool)
        square = torch.zeros(len(places), dtype=torch.float64)
        for num, first in zip(shape, (places.top, places.left), strict=True):
            last = first + patch_size
            kept &= (first < num) & (last > 0)
            # The patch's point nearest to the centre, in the coordinates of the positions: an edge, or the centre.
            square += torch.maximum(2 * first - num, num - 2 * last).clamp(min=0).double().div(num).square()
        return places[kept if self.radius is None else kept & (square < self.radius**2)]
