"""Sparsity in an orthonormal wavelet basis: the transform and FISTA."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from invrecon.errors import InputError
from invrecon.methods.base import (
    Estimate,
    Method,
    channel_magnitude,
    check_complex_range,
    check_measurement,
    check_range,
    norm_per_sample,
    per_sample,
    relative_residual,
)
from invrecon.methods.classical import penalty_weight
from invrecon.methods.counting import Counter, count_calls
from invrecon.methods.stopping import PerSampleStop

if TYPE_CHECKING:
    from invrecon.operators.base import LinearOperator
    from invrecon.priors.base import Prior


def daubechies(num_moments: int) -> Tensor:
    """Returns Daubechies' low-pass filter with `num_moments` vanishing moments, `(2 num_moments,)`, float64.

        |H(w)|^2 = 2 cos^2(w/2)^p P(sin^2(w/2)),   P(t) = sum_{k < p} binomial(p - 1 + k, k) t^k

    Of the roots of `P` in `z = e^{iw}` those inside the unit circle are kept (minimum phase); it sums to `sqrt(2)`.

    Source: Daubechies, "Orthonormal bases of compactly supported wavelets", Comm. Pure Appl. Math. 41 (1988).

    Args:
        num_moments: `p`, from 1 (Haar) to 10.
    """
    if not 1 <= num_moments <= 10:
        raise InputError(f"A Daubechies wavelet with {num_moments} vanishing moments was asked for, expected 1 to 10.")
    roots_t = np.roots([math.comb(num_moments - 1 + k, k) for k in reversed(range(num_moments))])
    half = 1 - 2 * roots_t.astype(complex)  # cos w = (z + 1/z) / 2
    roots_z = half - np.sqrt(half**2 - 1)
    inside = np.where(np.abs(roots_z) < 1, roots_z, 1 / roots_z)
    taps = np.real(np.poly(np.concatenate([-np.ones(num_moments), inside])))
    return torch.from_numpy(math.sqrt(2) * taps / taps.sum())


def filter_bank(num: int, low: Tensor) -> Tensor:
    """Returns one scale of a periodic wavelet transform as an orthogonal matrix, `(num, num)`.

        W[k, (2k + i) mod num] = h_i,   W[num/2 + k, (2k + i) mod num] = (-1)^i h_{L-1-i}

    Args:
        num: Length of the signal, even.
        low: The low-pass filter `h`, `(L,)`.
    """
    high = low.flip(0) * (-1.0) ** torch.arange(len(low))
    start = 2 * torch.arange(num // 2)[:, None]
    place = (start + torch.arange(len(low))) % num
    halves = [
        torch.zeros(num // 2, num, dtype=low.dtype).scatter_add_(1, place, f.expand(place.shape)) for f in (low, high)
    ]
    return torch.cat(halves)


class Wavelets:
    """An orthonormal wavelet transform of images of any dimension, periodic; its inverse is its transpose.

    Coefficients have the image's shape: along each axis the first `n / 2^J` entries are those of the coarsest scale,
    the next as many its details, then those of the finer scales (Mallat's layout).

    Source: Mallat, "A theory for multiresolution signal decomposition", IEEE Trans. PAMI 11 (1989).

    Args:
        shape: Spatial shape of the images.
        num_scales: `J`, how often each axis is halved.
        num_moments: Vanishing moments of the Daubechies wavelet; 1 is Haar's.
        like: Gives dtype and device.
        complex_images: Whether two channels are the parts of a complex number, whose magnitude is shrunk.

    Raises:
        InputError: An axis cannot be halved as often.
    """

    def __init__(
        self, shape: Sequence[int], num_scales: int, num_moments: int, like: Tensor, complex_images: bool = False
    ) -> None:
        if any(n % 2**num_scales for n in shape):
            possible = min((n & -n).bit_length() - 1 for n in shape)
            if not possible:
                raise InputError(
                    f"Wavelets halve the sides of the image, and {tuple(shape)} has an odd one: choose even sides."
                )
            raise InputError(
                f"A wavelet transform of {num_scales} scales halves the sides of the image as often, but "
                f"{tuple(shape)} can be halved {possible} times: set num_scales to {possible} or less, or choose sides "
                f"divisible by {2**num_scales}."
            )
        low = daubechies(num_moments)
        self.shape, self.complex_images = tuple(shape), complex_images
        self.banks = [[filter_bank(n >> j, low).to(like) for n in shape] for j in range(num_scales)]
        self.coarse = tuple(n >> num_scales for n in shape)

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the coefficients of images `(B, C, *shape)`, of the same shape."""
        c = x.clone()
        for bank in self.banks:
            block = self._corner(c, [len(matrix) for matrix in bank])
            block.copy_(self._along_all_axes(block, bank))
        return c

    def inverse(self, c: Tensor) -> Tensor:
        """Returns the images of coefficients `(B, C, *shape)`: the transpose."""
        x = c.clone()
        for bank in reversed(self.banks):
            block = self._corner(x, [len(matrix) for matrix in bank])
            block.copy_(self._along_all_axes(block, [matrix.mT for matrix in bank]))
        return x

    def shrink(self, x: Tensor, threshold: Tensor) -> Tensor:
        """Returns `argmin_z 1/2 ||z - x||^2 + threshold ||details of z||_1`: soft thresholding of all but the coarsest.

        Args:
            x: Images `(B, C, *shape)`.
            threshold: One a sample, `(B,)`.
        """
        c = self(x)
        length = channel_magnitude(c, self.complex_images)
        direction = c / length.clamp(min=torch.finfo(c.dtype).tiny)
        small = direction * (length - per_sample(threshold, c)).clamp(min=0)
        self._corner(small, self.coarse).copy_(self._corner(c, self.coarse))
        return self.inverse(small)

    def detail_norm(self, x: Tensor) -> Tensor:
        """Returns the sum of the absolute values of all detail coefficients of every sample, `(B,)`."""
        c = self(x)
        self._corner(c, self.coarse).zero_()
        return channel_magnitude(c, self.complex_images).flatten(1).sum(dim=1, dtype=torch.float64)

    @staticmethod
    def _corner(c: Tensor, sizes: Sequence[int]) -> Tensor:
        """Returns a view of the first entries along every axis."""
        for axis, size in enumerate(sizes, start=2):
            c = c.narrow(axis, 0, size)
        return c

    @staticmethod
    def _along_all_axes(x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
        for axis, matrix in enumerate(matrices, start=2):
            x = (x.transpose(axis, -1) @ matrix.mT).transpose(axis, -1)
        return x


class WaveletL1(Method):
    """Least l1 norm of the wavelet details, by FISTA.

        min_x  1/2 ||A x - y||^2 / ||A||^2 + w ||details of Psi x||_1,    w = max(weight, noise_weight sigma_y / ||A||)
        x' = Psi^T soft_w(Psi (z - A^T (A z - y) / ||A||^2)),    z = x' + (t - 1) / t' (x' - x)

    `Psi` is an orthonormal Daubechies transform with periodic borders; the coarsest scale bears no penalty. In these
    units the weights do not depend on the geometry's scale; where the noise differs between rays, rows are weighted
    first. The coefficients of complex images count by their magnitude, so that a turn of the image's phase changes
    nothing. A sample's momentum starts anew when it points uphill, and a sample stops when a step moves it by less than
    `tol` of its norm. The range is applied at the end.

    Sides that cannot be halved `J = num_scales` times are extended, right and below, to the next multiple of `2^J`. The
    unknown is then the extended image `u`, `x = C u` what is cut from it, and `A C` stands for `A`: the penalty of `x`
    is that of its cheapest extension, `min_{u: C u = x} ||details of Psi u||_1`, and every step is as exact as before.

    No evaluations; two operator calls an iteration. Asks of the operator its adjoint, of the prior nothing.

    Source: Beck & Teboulle, "A fast iterative shrinkage-thresholding algorithm for linear inverse problems", SIAM J.
    Imaging Sci. 2 (2009), Eq. 4.1 to 4.3; O'Donoghue & Candes, "Adaptive restart for accelerated gradient schemes",
    Found. Comput. Math. 15 (2015), section 3.2; Coifman & Donoho, "Translation-invariant de-noising" (1995),
    for the shifts; Yu, "Better approximation and faster algorithm using the proximal average", NeurIPS 2013.

    Args:
        weight: Weight without noise, in the units above.
        noise_weight: Weight per unit of noise in the image, `sigma_y / ||A||`.
        num_iterations: Most iterations.
        num_scales: How often the sides of the image are halved.
        num_moments: Vanishing moments of the wavelet, 1 (Haar) to 10.
        num_shifts: Cycle spinning: the transform is placed at as many diagonal shifts, pixel by pixel, and shrinkage
            averaged over them, which takes away the grid's artefacts. This is again the proximal map of a convex
            penalty (their proximal average), so FISTA goes on to converge; with 1 it is the one above.
        tol: Relative step at which a sample stops; 0 runs all iterations.
        clip: Range to which the image is clipped at the end, or None.
    """

    def __init__(
        self,
        weight: float = 1e-5,
        noise_weight: float = 0.05,
        num_iterations: int = 500,
        num_scales: int = 4,
        num_moments: int = 4,
        num_shifts: int = 1,
        tol: float = 1e-5,
        clip: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        if not weight >= 0 or noise_weight < 0 or tol < 0:
            raise InputError(
                f"WaveletL1 needs weight, noise_weight and tol of at least 0, got {weight}, {noise_weight} and {tol}."
            )
        if num_iterations < 1 or min(num_scales, num_shifts) < 1:
            raise InputError(
                "WaveletL1 needs num_iterations >= 1, num_scales >= 1 and num_shifts >= 1, got "
                f"{num_iterations}, {num_scales} and {num_shifts}."
            )
        daubechies(num_moments)
        check_range("clip", clip)
        self.weight, self.noise_weight, self.tol = float(weight), float(noise_weight), float(tol)
        self.num_iterations, self.num_scales, self.num_moments = num_iterations, num_scales, num_moments
        self.num_shifts = num_shifts
        self.clip = clip

    @torch.no_grad()
    def __call__(
        self,
        y: Tensor,
        operator: LinearOperator,
        prior: Prior | None = None,
        *,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Estimate:
        """Reconstructs a batch; see `Method.__call__`.

        Stats add `num_iterations` and `relative_step`, at which each sample stopped.
        """
        check_measurement(y, operator)
        check_complex_range(self, "clip", self.clip, operator)
        calls = Counter()
        weighted, data, std = count_calls(operator, calls).whiten(y)
        weight = penalty_weight(self.weight, self.noise_weight, std, y, weighted.norm())
        multiple = 2**self.num_scales
        if multiple > max(operator.image_shape[1:]):
            raise InputError(
                f"WaveletL1 halves the sides of the image num_scales = {self.num_scales} times, and those of "
                f"{tuple(operator.image_shape[1:])} are shorter than {multiple}: set num_scales lower."
            )
        extended = [-(-n // multiple) * multiple for n in operator.image_shape[1:]]
        wavelets = Wavelets(extended, self.num_scales, self.num_moments, y, operator.complex_images)
        end = self._solve(weighted, data, weight, wavelets)
        mean = end.result[cut(operator)]
        mean = mean if self.clip is None else mean.clamp(*self.clip)
        return Estimate(
            mean=mean,
            stats={
                "num_evaluations": 0.0,
                "num_operator_calls": float(calls.num_calls),
                "relative_residual": relative_residual(operator, mean, y),
                **end.stats("relative_step"),
            },
        )

    def _solve(self, operator: LinearOperator, y: Tensor, weight: Tensor, wavelets: Wavelets) -> PerSampleStop:
        scale = 1 / operator.norm() ** 2
        image = cut(operator)
        x = y.new_zeros(y.shape[0], operator.image_shape[0], *wavelets.shape)
        z, t = x, y.new_ones(y.shape[0])
        end = PerSampleStop(x, self.tol)
        for iteration in range(1, self.num_iterations + 1):
            step = z.clone()
            step[image] -= scale * operator.adjoint(operator(z[image]) - y)
            x_new = self._shrink(step, weight, wavelets)
            length = norm_per_sample(x_new).clamp(min=torch.finfo(x.dtype).tiny)
            if end(iteration, x_new, norm_per_sample(x_new - z) / length):
                break
            uphill = ((z - x_new) * (x_new - x)).flatten(1).sum(dim=1) > 0
            t = torch.where(uphill, 1.0, t)
            t_new = (1 + (1 + 4 * t.square()).sqrt()) / 2
            z = x_new + per_sample((t - 1) / t_new, x) * (x_new - x)
            x, t = x_new, t_new
        return end

    def _shrink(self, x: Tensor, weight: Tensor, wavelets: Wavelets) -> Tensor:
        """Returns the mean over the shifts of the image, shifted, shrunk and shifted back."""
        axes = tuple(range(2, x.ndim))
        total = torch.zeros_like(x)
        for k in range(self.num_shifts):
            shrunk = wavelets.shrink(x.roll((k,) * len(axes), axes), weight)
            total = total + shrunk.roll((-k,) * len(axes), axes)
        return total / self.num_shifts


def cut(operator: LinearOperator) -> tuple[Any, ...]:
    """Returns the index of the operator's images in images that go on to the right and below."""
    return (..., *(slice(n) for n in operator.image_shape[1:]))
