"""Whole-image and patch priors: wrappers that turn one position-conditioned denoiser into a denoiser of images.

The patch prior models an image by a product over grid offsets of position-dependent patch densities with zero
borders (Hu et al., PaDIS, NeurIPS 2024). Its score at one random offset, drawn anew at each evaluation, is an
unbiased estimate of the average over offsets; other layouts are in `layouts`. No method knows that patches exist.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as nnf
from torch import Tensor

from invrecon.errors import InputError
from invrecon.priors.base import Cotangent, Prior, broadcast, per_sample, pull_back
from invrecon.priors.edm import EDMDenoiser
from invrecon.priors.layouts import Layout, Places, RandomShift, shift_law
from invrecon.rng import Generators, make_generators, randn


def coordinates(num: int, start: Tensor | int = 0, length: int | None = None) -> Tensor:
    """Returns pixel coordinates in the pad-independent frame: 0 at the image's centre, +-1 at its edges.

    $$ p_i = (2 i + 1) / N - 1 $$

    so that patch size, padding and crop may change after training without moving any pixel's position.

    Args:
        num: Number of pixels `N` along the axis.
        start: First index, an int or `(n,)`; negative in the padding.
        length: Number of indices; the whole axis by default.

    Returns:
        `(length,)`, or `(n, length)` for `n` starts.
    """
    index = torch.arange(num if length is None else length)
    if isinstance(start, Tensor):
        index, start = index.to(start.device), start[..., None]
    return (2 * (start + index) + 1) / num - 1


def position_map(rows: Tensor, columns: Tensor) -> Tensor:
    """Returns the position channels (column, row) `(n, 2, P, Q)` of coordinates `(n, P)` and `(n, Q)`."""
    shape = (rows.shape[0], rows.shape[1], columns.shape[1])
    return torch.stack([columns[:, None, :].expand(shape), rows[:, :, None].expand(shape)], dim=1)


def _defaults(generators: Generators | None, num: int) -> Generators:
    # Without generators a call is still deterministic; samplers always pass theirs.
    return make_generators(0, [str(i) for i in range(num)]) if generators is None else generators


def pad_with_noise(x: Tensor, pad: Sequence[int], sigma: Tensor, generators: Generators) -> Tensor:
    """Surrounds `x` with what lies outside an image, seen at the noise level of `x`: zero plus `N(0, sigma^2)`.

    Args:
        x: Noisy images, `(B, C, H, W)`.
        pad: Widths (left, right, top, bottom).
        sigma: Noise standard deviations, `(B,)`.
        generators: One generator a sample.
    """
    if not any(pad):
        return x
    padded = nnf.pad(x, list(pad))
    outside = nnf.pad(torch.zeros_like(x[:1, :1]), list(pad), value=1.0)
    return padded + outside * broadcast(sigma, x) * randn(padded.shape[1:], generators, like=x)


def cut_patches(
    images: Tensor, index: Tensor, top: Tensor, left: Tensor, patch_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Cuts patches out of images that are surrounded by zeros.

    Args:
        images: `(N, C, H, W)`, of any dtype.
        index: Which image each patch is of, `(n,)`.
        top: First row of each patch, `(n,)`; negative in the padding.
        left: First column of each patch, `(n,)`.
        patch_size: `P`.

    Returns:
        Values `(n, C, P, P)`, repeated from the edge where a patch leaves its image; whether a pixel is inside
        `(n, 1, P, P)`; position channels `(n, 2, P, P)`.
    """
    H, W = images.shape[-2:]
    span = torch.arange(patch_size, device=top.device)
    rows, columns = top[:, None] + span, left[:, None] + span
    values = images[
        index[:, None, None, None],
        torch.arange(images.shape[1], device=top.device)[None, :, None, None],
        rows.clamp(0, H - 1)[:, None, :, None],
        columns.clamp(0, W - 1)[:, None, None, :],
    ]
    inside = ((rows >= 0) & (rows < H))[:, None, :, None] & ((columns >= 0) & (columns < W))[:, None, None, :]
    return values, inside, patch_positions((H, W), top, left, patch_size)


def patch_positions(shape: Sequence[int], top: Tensor, left: Tensor, patch_size: int) -> Tensor:
    """Returns the position channels `(n, 2, P, P)` of patches by their first rows and columns `(n,)`."""
    H, W = shape
    return position_map(coordinates(H, top, patch_size), coordinates(W, left, patch_size))


class WholePrior(Prior):
    """The denoiser applied to the whole image at once.

    Sides that the network cannot halve are padded by noise up to the next multiple of its stride.

    Args:
        denoiser: A position-conditioned denoiser.
    """

    def __init__(self, denoiser: EDMDenoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def draw(self, images: Tensor, num_pixels: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws images `(n, C, H, W)` with about `num_pixels` in all, and their position channels `(n, 2, H, W)`."""
        (N, _, H, W), stride = images.shape, getattr(self.denoiser.network, "stride", 1)
        num = max(1, round(num_pixels / (H * W)))
        index = torch.randperm(N, generator=generator).repeat(-(-num // N))[:num].to(images.device)
        rows, columns = coordinates(H, 0, H + -H % stride), coordinates(W, 0, W + -W % stride)
        position = position_map(rows[None], columns[None]).to(images.device).expand(num, -1, -1, -1)
        return nnf.pad(images[index], (0, -W % stride, 0, -H % stride)), position

    def forward(self, x: Tensor, sigma: float | Tensor, *, generators: Generators | None = None) -> Tensor:
        """Returns `D(x, sigma)`, `(B, C, H, W)`."""
        sigma = per_sample(sigma, x)
        (B, _, H, W), stride = x.shape, getattr(self.denoiser.network, "stride", 1)
        pad = (0, -W % stride, 0, -H % stride)
        u = pad_with_noise(x, pad, sigma, _defaults(generators, B)) if any(pad) else x
        rows, columns = coordinates(H, 0, H + pad[3]), coordinates(W, 0, W + pad[1])
        position = position_map(rows[None], columns[None]).to(x.device).expand(B, -1, -1, -1)
        return self.denoiser(u, sigma, position)[..., :H, :W]


_Pull = Callable[[Tensor, Tensor, Tensor, slice], None]


@dataclass(frozen=True)
class _Evaluation:
    """The `u`, `G_c` and `W_c` of one evaluation (see `layouts`), applied to the patches of a chunk at a time.

    Images are put together on a canvas, `(B, C, H', W')`, of their frame's size; the shifts of a sample share it.

    Attributes:
        frames: `u`, `(m B, C, H', W')`, the samples once for each of `m` shifts.
        sigma: Noise standard deviations, `(m B,)`.
        places: Of all patches.
        patch_size: `P`.
        shape: Image size (H, W).
        pad: Widths (left, right, top, bottom).
        num: Samples, `B`.
        blended: Whether any weight is not one.
    """

    frames: Tensor
    sigma: Tensor
    places: Places
    patch_size: int
    shape: tuple[int, int]
    pad: tuple[int, int, int, int]
    num: int
    blended: bool

    def _pixels(self, image: Tensor, chunk: slice) -> Tensor:
        """Returns where the chunk's pixels are in a flat `(B, C, H', W')`, `(n, C, P, P)`; patch `c` in `image[c]`."""
        _, C, H, W = self.frames.shape
        places, span = self.places[chunk], torch.arange(self.patch_size, device=image.device)
        plane = image[chunk, None] * C + torch.arange(C, device=image.device)
        rows, columns = (places.top + self.pad[2])[:, None] + span, (places.left + self.pad[0])[:, None] + span
        return (plane[:, :, None] * H + rows[:, None])[..., None] * W + columns[:, None, None]

    def _weigh(self, patches: Tensor, chunk: slice) -> Tensor:
        if not self.blended:
            return patches
        places = self.places[chunk]
        return patches * (places.row_weights[:, None, :, None] * places.column_weights[:, None, None, :])

    def cut(self, chunk: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Returns patches `G_c u` `(n, C, P, P)`, their noise levels `(n,)` and positions `(n, 2, P, P)`."""
        places, (H, W) = self.places[chunk], self.shape
        patches = self.frames.flatten()[self._pixels(self.places.frame, chunk)]
        position = patch_positions((H, W), places.top, places.left, self.patch_size)
        return patches, self.sigma[places.frame], position

    def pull(self, canvas: Tensor, chunk: slice) -> Tensor:
        """Returns `W_c G_c v` of the images on a canvas, `(n, C, P, P)`."""
        return self._weigh(canvas.flatten()[self._pixels(self.places.frame % self.num, chunk)], chunk)

    def push(self, canvas: Tensor, patches: Tensor, chunk: slice, *, weighted: bool) -> None:
        """Adds `G_c^T W_c` (or `G_c^T`) of patches `(n, C, P, P)` to a canvas."""
        pixels = self._pixels(self.places.frame % self.num, chunk)
        values = self._weigh(patches, chunk) if weighted else patches
        canvas.view(-1).index_add_(0, pixels.flatten(), values.flatten())

    def canvas(self, images: Tensor | None = None) -> Tensor:
        """Returns a canvas of zeros, or of images `(B, C, H, W)` surrounded by zeros."""
        if images is not None:
            return nnf.pad(images, self.pad)
        return self.frames.new_zeros((self.num, *self.frames.shape[1:]))

    def crop(self, canvas: Tensor) -> Tensor:
        """Returns the images of a canvas, `(B, C, H, W)`: what is around them is known to be zero."""
        (H, W), (left, _, top, _) = self.shape, self.pad
        return canvas[..., top : top + H, left : left + W].contiguous()


class PatchPrior(Prior):
    """An image denoiser assembled from patches, by default non-overlapping ones at a random offset (`RandomShift`).

    The padded frame is noise of the state's level around the image, as in training; patches are cut and denoised in
    chunks, so memory is that of one chunk whatever their number.

    Args:
        denoiser: A position-conditioned denoiser of patches.
        patch_size: `P` in pixels, unless the layout has one of its own.
        max_patches: Patches denoised at once, at most.
        layout: Where the patches lie, and how their outputs are put together.

    Raises:
        InputError: If the network's stride does not divide the patch size, or it does not suit the layout.
    """

    def __init__(
        self, denoiser: EDMDenoiser, patch_size: int = 56, max_patches: int = 32, layout: Layout | None = None
    ) -> None:
        super().__init__()
        self.layout = RandomShift() if layout is None else layout
        patch_size = patch_size if self.layout.patch_size is None else self.layout.patch_size
        stride = getattr(denoiser.network, "stride", 1)
        if patch_size < 1 or patch_size % stride:
            raise InputError(
                f"patch_size must be a positive multiple of the network's stride {stride}; got {patch_size}."
            )
        if max_patches < 1:
            raise InputError(f"max_patches must be at least 1; got {max_patches}.")
        self.layout.check(patch_size)
        self.denoiser = denoiser
        self.patch_size = patch_size
        self.max_patches = max_patches

    def draw(self, images: Tensor, num_pixels: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws patches `(n, C, P, P)` with about `num_pixels` in all, and their positions `(n, 2, P, P)`.

        Places are uniform over the padded frame, as in training and as the shifted grid visits them.
        """
        P = self.patch_size
        num = max(1, round(num_pixels / P**2))

        def places(high: int) -> Tensor:
            return torch.randint(high, (num,), generator=generator).to(images.device)

        index = places(len(images))
        pads = ((n, shift_law(n, P)[1]) for n in images.shape[-2:])
        top, left = (places(n + 2 * m - P + 1) - m for n, m in pads)
        values, inside, position = cut_patches(images, index, top, left, P)
        return values * inside, position

    def _lay_out(self, x: Tensor, sigma: float | Tensor, generators: Generators | None) -> _Evaluation:
        """Draws the frames and the places of one evaluation."""
        B, m, shape = x.shape[0], self.layout.num_shifts, (x.shape[-2], x.shape[-1])
        generators = [*_defaults(generators, B)] * m
        sigma = per_sample(sigma, x).repeat(m)
        vertical, horizontal = (self.layout.pad(num, self.patch_size) for num in shape)
        pad = (*horizontal, *vertical)
        frames = pad_with_noise(x.repeat(m, 1, 1, 1), pad, sigma, generators)
        places = self.layout.place(shape, self.patch_size, generators)
        blended = bool((places.row_weights != 1).any() or (places.column_weights != 1).any())
        return _Evaluation(frames, sigma, places.like(x), self.patch_size, shape, pad, B, blended)

    def _chunks(self, evaluation: _Evaluation) -> list[slice]:
        # Equal chunks: three times 32 patches and the four left over take a tenth longer than four times 25.
        num = len(evaluation.places)
        chunks = -(-num // self.max_patches)
        ends = [num * k // chunks for k in range(chunks + 1)]
        return [slice(a, b) for a, b in pairwise(ends)]

    def forward(self, x: Tensor, sigma: float | Tensor, *, generators: Generators | None = None) -> Tensor:
        """Returns `D(x, sigma)`, `(B, C, H, W)`."""
        evaluation = self._lay_out(x, sigma, generators)
        canvas = evaluation.canvas()
        for chunk in self._chunks(evaluation):
            evaluation.push(canvas, self.denoiser(*evaluation.cut(chunk)), chunk, weighted=True)
        return evaluation.crop(canvas)

    def denoise_vjp(
        self,
        x: Tensor,
        sigma: float | Tensor,
        cotangent: Cotangent,
        *,
        generators: Generators | None = None,
    ) -> tuple[Tensor, Tensor]:
        r"""Returns `D(x)` and `J_D(x)^T v`, exact, in the memory of one chunk.

        $$ J_D^T v = \sum_c G_c^T J_c^T W_c G_c v, \qquad J_c = \partial D(G_c u) / \partial (G_c u) $$
        """
        with torch.no_grad():
            evaluation = self._lay_out(x, sigma, generators)
            gradient = evaluation.canvas()

        def pull(patches: Tensor, denoised: Tensor, v: Tensor, chunk: slice) -> None:
            evaluation.push(gradient, torch.autograd.grad(denoised, patches, v)[0], chunk, weighted=False)

        x0 = self._two_passes(evaluation, cotangent, pull, leaves=True)
        return x0, evaluation.crop(gradient)

    def backpropagate(
        self,
        x: Tensor,
        sigma: float | Tensor,
        cotangent: Cotangent,
        *,
        generators: Generators | None = None,
    ) -> Tensor:
        r"""Returns `D(x)`, detached, and adds `J_theta^T v` to its parameters' `.grad`, in the memory of one chunk.

        $$ J_\theta^T v = \sum_c \partial_\theta \langle W_c G_c v, D_\theta(G_c u) \rangle $$
        """
        with torch.no_grad():
            evaluation = self._lay_out(x, sigma, generators)

        def pull(patches: Tensor, denoised: Tensor, v: Tensor, chunk: slice) -> None:
            pull_back(denoised, v)

        return self._two_passes(evaluation, cotangent, pull, leaves=False)

    def _two_passes(self, evaluation: _Evaluation, cotangent: Cotangent, pull: _Pull, *, leaves: bool) -> Tensor:
        """Returns `D(x)`, and calls `pull(G_c u, D(G_c u), W_c G_c v, chunk)` for each chunk, with its graph.

        Only when all of `D(x)` is known is `v = cotangent(D(x))`, so every chunk is denoised twice, the second time
        with its graph; the first chunk's graph is kept from the first pass.
        """

        def denoise(chunk: slice) -> tuple[Tensor, Tensor]:
            patches, levels, positions = evaluation.cut(chunk)
            patches.requires_grad_(leaves)
            return patches, self.denoiser(patches, levels, positions)

        first, *others = self._chunks(evaluation)
        # Weights cached by `torch.nn.utils.parametrize.cached` are made in the first call: it has to have a graph.
        with torch.enable_grad():
            patches, denoised = denoise(first)
        with torch.no_grad():
            canvas = evaluation.canvas()
            evaluation.push(canvas, denoised, first, weighted=True)
            for c in others:
                evaluation.push(canvas, self.denoiser(*evaluation.cut(c)), c, weighted=True)
            x0 = evaluation.crop(canvas)
        with torch.enable_grad():
            v = evaluation.canvas(cotangent(x0).detach())
            pull(patches, denoised, evaluation.pull(v, first), first)
            del patches, denoised
            for c in others:
                pull(*denoise(c), evaluation.pull(v, c), c)
        return x0
