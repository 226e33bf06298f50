"""Whole-image and patch priors: wrappers that turn one position-conditioned denoiser into a denoiser of images.

The patch prior models an image by a product over grid offsets of position-dependent patch densities with zero
borders (Hu et al., PaDIS, NeurIPS 2024). Its score at one random offset, drawn anew at each evaluation, is an
unbiased estimate of the average over offsets. No method knows that patches exist.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor

from invrecon.errors import InputError
from invrecon.priors.base import Cotangent, Prior, broadcast, per_sample, pull_back
from invrecon.priors.edm import EDMDenoiser
from invrecon.rng import Generators, make_generators, randint, randn


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
    position = position_map(coordinates(H, top, patch_size), coordinates(W, left, patch_size))
    return values, inside, position


@dataclass(frozen=True)
class Tiling:
    r"""Non-overlapping `P x P` patches on a grid that covers an `N`-pixel axis at any of `M` offsets.

    $$ K = 1 + \lfloor N / P \rfloor, \quad M = K P - N $$

    patches along an axis and padding on each of its sides (PaDIS, section 3.2): N = 256, P = 56 gives K = 5, M = 24,
    a padded frame of 304 and 24 offsets; the tiled region `[a, a + K P)` contains the image `[M, M + N)` for every
    offset `0 <= a < M`.

    Args:
        shape: Image size (H, W).
        patch_size: `P`.
    """

    shape: tuple[int, int]
    patch_size: int

    @property
    def num_patches(self) -> tuple[int, int]:
        """Patches along each axis, `K`."""
        return tuple(1 + n // self.patch_size for n in self.shape)  # type: ignore[return-value]

    @property
    def pad(self) -> tuple[int, int]:
        """Padding on each side of each axis, `M`."""
        return tuple(k * self.patch_size - n for k, n in zip(self.num_patches, self.shape, strict=True))  # type: ignore[return-value]

    def split(self, frame: Tensor, offset: tuple[int, int]) -> Tensor:
        """Cuts a padded frame `(C, H + 2M, W + 2M)` into patches `(K K, C, P, P)`, row by row."""
        (a, b), (k, q), p = offset, self.num_patches, self.patch_size
        region = frame[:, a : a + k * p, b : b + q * p]
        return region.reshape(-1, k, p, q, p).permute(1, 3, 0, 2, 4).reshape(k * q, -1, p, p)

    def assemble(self, patches: Tensor, offset: tuple[int, int]) -> Tensor:
        """Puts patches `(K K, C, P, P)` back and crops to the image, `(C, H, W)`: the border is known to be zero."""
        (a, b), (k, q), p = offset, self.num_patches, self.patch_size
        region = patches.reshape(k, q, -1, p, p).permute(2, 0, 3, 1, 4).reshape(-1, k * p, q * p)
        top, left = self.pad[0] - a, self.pad[1] - b
        return region[:, top : top + self.shape[0], left : left + self.shape[1]]

    def positions(self, offset: tuple[int, int]) -> Tensor:
        """Returns the position channels of the patches at an offset, `(K K, 2, P, P)`."""
        p = self.patch_size
        rows, columns = (
            coordinates(n, torch.arange(k) * p + o - m, p)
            for n, k, o, m in zip(self.shape, self.num_patches, offset, self.pad, strict=True)
        )
        k, q = self.num_patches
        return position_map(rows.repeat_interleave(q, 0), columns.repeat(k, 1))


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


class PatchPrior(Prior):
    """An image denoiser assembled from non-overlapping patches at one random offset a call and a sample.

    The padded frame is noise of the state's level around the image, as in training; patches are denoised in chunks,
    so memory is that of one chunk whatever the image's size.

    Args:
        denoiser: A position-conditioned denoiser of patches.
        patch_size: `P` in pixels.
        max_patches: Patches denoised at once.
    """

    def __init__(self, denoiser: EDMDenoiser, patch_size: int = 56, max_patches: int = 64) -> None:
        super().__init__()
        stride = getattr(denoiser.network, "stride", 1)
        if patch_size < 1 or patch_size % stride:
            raise InputError(
                f"patch_size must be a positive multiple of the network's stride {stride}; got {patch_size}."
            )
        if max_patches < 1:
            raise InputError(f"max_patches must be at least 1; got {max_patches}.")
        self.denoiser = denoiser
        self.patch_size = patch_size
        self.max_patches = max_patches

    def draw(self, images: Tensor, num_pixels: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws patches `(n, C, P, P)` with about `num_pixels` in all, and their positions `(n, 2, P, P)`.

        Places are uniform over the padded frame, as in training and as the shifted grid visits them.
        """
        tiling, P = Tiling((images.shape[-2], images.shape[-1]), self.patch_size), self.patch_size
        num = max(1, round(num_pixels / P**2))

        def places(high: int) -> Tensor:
            return torch.randint(high, (num,), generator=generator).to(images.device)

        index = places(len(images))
        top, left = (places(n + 2 * m - P + 1) - m for n, m in zip(tiling.shape, tiling.pad, strict=True))
        values, inside, position = cut_patches(images, index, top, left, P)
        return values * inside, position

    def _layout(
        self, x: Tensor, sigma: Tensor, generators: Generators | None
    ) -> tuple[Tiling, list[tuple[int, int]], Tensor, Tensor]:
        """Draws each sample's offset; returns tiling, offsets, patches `(B K K, C, P, P)` and their positions."""
        generators = _defaults(generators, x.shape[0])
        tiling = Tiling((x.shape[-2], x.shape[-1]), self.patch_size)
        (m, n) = tiling.pad
        frame = pad_with_noise(x, (n, n, m, m), sigma, generators)
        rows, columns = randint(m, generators).tolist(), randint(n, generators).tolist()
        offsets = list(zip(rows, columns, strict=True))
        patches = torch.cat([tiling.split(f, o) for f, o in zip(frame, offsets, strict=True)])
        positions = torch.cat([tiling.positions(o) for o in offsets]).to(x.device)
        return tiling, offsets, patches, positions

    def _assemble(self, tiling: Tiling, offsets: list[tuple[int, int]], patches: Tensor) -> Tensor:
        per_image = patches.reshape(len(offsets), -1, *patches.shape[1:])
        return torch.stack([tiling.assemble(p, o) for p, o in zip(per_image, offsets, strict=True)])

    def _chunks(self, num: int) -> Iterator[slice]:
        return (slice(i, i + self.max_patches) for i in range(0, num, self.max_patches))

    def forward(self, x: Tensor, sigma: float | Tensor, *, generators: Generators | None = None) -> Tensor:
        """Returns `D(x, sigma)`, `(B, C, H, W)`: each pixel from exactly one patch."""
        sigma = per_sample(sigma, x)
        tiling, offsets, patches, positions = self._layout(x, sigma, generators)
        levels = sigma.repeat_interleave(len(patches) // len(x))
        chunks = [self.denoiser(patches[c], levels[c], positions[c]) for c in self._chunks(len(patches))]
        return self._assemble(tiling, offsets, torch.cat(chunks))

    def denoise_vjp(
        self,
        x: Tensor,
        sigma: float | Tensor,
        cotangent: Cotangent,
        *,
        generators: Generators | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns `D(x)` and `J_D(x)^T v`, exact, in the memory of one chunk.

        Patches do not overlap, so the Jacobian is block diagonal: after a pass without a graph has given `D(x)` and
        `v = cotangent(D(x))`, each chunk is denoised again with its graph and pulls back its own part of `v`.
        """
        sigma = per_sample(sigma, x)
        with torch.no_grad():
            tiling, offsets, patches, positions = self._layout(x, sigma, generators)
            levels = sigma.repeat_interleave(len(patches) // len(x))
            chunks = list(self._chunks(len(patches)))
            if len(chunks) > 1:
                denoised = torch.cat([self.denoiser(patches[c], levels[c], positions[c]) for c in chunks])
        with torch.enable_grad():
            if len(chunks) == 1:  # one chunk's graph fits: keep it instead of denoising twice
                leaf = patches.requires_grad_(True)
                kept = self.denoiser(leaf, levels, positions)
                denoised = kept.detach()
            x0 = self._assemble(tiling, offsets, denoised)
            v = self._split(tiling, offsets, cotangent(x0).detach())
            if len(chunks) == 1:
                (pulled,) = torch.autograd.grad(kept, leaf, v)
            else:
                pulled = torch.cat([self._pull_back(patches[c], levels[c], positions[c], v[c]) for c in chunks])
        return x0, self._assemble(tiling, offsets, pulled)

    def backpropagate(
        self,
        x: Tensor,
        sigma: float | Tensor,
        cotangent: Cotangent,
        *,
        generators: Generators | None = None,
    ) -> Tensor:
        r"""Returns `D(x)`, detached, and adds `J_theta^T v` to its parameters' `.grad`, in the memory of one chunk.

        $$ J_\theta^T v = \sum_c \partial_\theta \langle G_c v, D_\theta(G_c x) \rangle $$

        Each pixel comes from one patch, so once `D(x)` is known, and with it `v = cotangent(D(x))`, every chunk `c` is
        denoised again and pulls back its own part of `v`; only the first keeps its graph from the first pass.
        """
        sigma = per_sample(sigma, x)
        with torch.no_grad():
            tiling, offsets, patches, positions = self._layout(x, sigma, generators)
            levels = sigma.repeat_interleave(len(patches) // len(x))
            first, *others = self._chunks(len(patches))
        # Weights cached by `torch.nn.utils.parametrize.cached` are made in the first call: it has to have a graph.
        with torch.enable_grad():
            kept = self.denoiser(patches[first], levels[first], positions[first])
        with torch.no_grad():
            chunks = [self.denoiser(patches[c], levels[c], positions[c]) for c in others]
            x0 = self._assemble(tiling, offsets, torch.cat([kept.detach(), *chunks]))
        with torch.enable_grad():
            v = self._split(tiling, offsets, cotangent(x0).detach())
            pull_back(kept, v[first])
            del kept
            for c in others:
                pull_back(self.denoiser(patches[c], levels[c], positions[c]), v[c])
        return x0

    def _pull_back(self, patches: Tensor, levels: Tensor, positions: Tensor, v: Tensor) -> Tensor:
        leaf = patches.detach().requires_grad_(True)
        return torch.autograd.grad(self.denoiser(leaf, levels, positions), leaf, v)[0]

    def _split(self, tiling: Tiling, offsets: list[tuple[int, int]], x: Tensor) -> Tensor:
        m, n = tiling.pad
        frame = nnf.pad(x, (n, n, m, m))
        return torch.cat([tiling.split(f, o) for f, o in zip(frame, offsets, strict=True)])
