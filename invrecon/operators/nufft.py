"""Non-Cartesian MRI: a Kaiser-Bessel gridding NUFFT on the sparse primitive; radial and spiral trajectories."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as nnf

from invrecon.errors import InputError
from invrecon.operators.fourier import complex_to_channels, pairs_to_complex
from invrecon.operators.joseph import matrix_cache
from invrecon.operators.mri import MRI
from invrecon.operators.sparse import SparseMatrix

if TYPE_CHECKING:
    from invrecon.data import Case, CaseBatch

WIDTH = 7
"""Width of the interpolation kernel, in samples of the twice finer frequency grid."""

BETA = 0.995 * math.pi * math.sqrt((WIDTH * 0.75) ** 2 - 0.8)
"""Kaiser-Bessel's beta: Beatty et al., Eq. 5, times 0.995, which evens the error out over the image."""

_MAX_PLANES = 4
"""Images that are interpolated at once: 8 real columns of one sparse product."""

_norms: dict[tuple[Any, ...], dict[str, float]] = {}
"""Norms by trajectory, so that binding case after case costs one power iteration."""

_densities: dict[tuple[Any, ...], Tensor] = {}
"""Density compensation by trajectory and number of iterations, likewise."""


class NonCartesianMRI(MRI):
    r"""MRI along any trajectory: `y_c[j] = 1 / sqrt(HW) sum_r s_c[r] x[r] exp(-2 pi i k_j . r)`, `r` from the centre.

    Computed as `G F P D`: divide by the kernel's transform (D), zero-pad to twice the size (P), FFT (F), interpolate
    with a Kaiser-Bessel kernel (G, a sparse real matrix). The error is about 1e-6 of the measurement's norm; the
    adjoint is the exact transpose of what is computed. A trajectory on the Cartesian grid gives `CartesianMRI`.

    Source: Jackson et al., IEEE TMI 10 (1991), 473-478 (gridding); Fessler & Sutton, IEEE TSP 51 (2003), Sec. II
    (interpolation); Beatty, Nishimura & Pauly, IEEE TMI 24 (2005), Eq. 5 (shape of the kernel).

    Measurements are `(B, coils, shots, readout, 2)`. A bound case brings its `maps`, and its `geometry['trajectory']`.

    Args:
        size: Side of the image in pixels, or (H, W).
        trajectory: `k`, `(shots, readout, 2)`, row and column component [cycles/pixel], in [-1/2, 1/2].
        maps: Coil sensitivities `(coils, H, W, 2)`; one coil of sensitivity 1 if None.

    Raises:
        InputError: A trajectory of another shape or range; maps as in `MRI`.
    """

    baseline_name = "gridding"

    def __init__(self, size: int | tuple[int, int], trajectory: Tensor, maps: Tensor | None = None) -> None:
        self._trajectory = _check_trajectory(trajectory)
        super().__init__(size, tuple(self._trajectory.shape[:2]), maps)
        digest = hashlib.blake2b(self._trajectory.numpy().tobytes(), digest_size=16).hexdigest()
        self._key = ("nufft", self.image_shape, tuple(self._trajectory.shape), digest)
        self._norm = _norms.setdefault(self._key, {})
        self.matrix: SparseMatrix | None
        self.register_module("matrix", None)
        rows, columns = (_apodisation(num) for num in self.image_shape[1:])
        self._deconvolution: Tensor
        self.register_buffer("_deconvolution", (rows[:, None] * columns).float(), persistent=False)

    @property
    def trajectory(self) -> Tensor:
        """`(shots, readout, 2)` [cycles/pixel], float64."""
        return self._trajectory

    def norm(self) -> float:
        """Returns `||A||_2` of one coil, by power iteration: an upper bound for several with normalised maps."""
        if self.maps is None:
            return super().norm()
        if "norm" not in self._norm:
            NonCartesianMRI(self.image_shape[1:], self._trajectory).to(self.device, self.dtype).norm()  # type: ignore[arg-type]
        return self._norm["norm"]

    def baseline(self, y: Tensor) -> Tensor:
        """Returns the gridding reconstruction `S^H E^H W y`, `W` the density compensation."""
        self._check(y, self.measurement_shape, "k-space")
        weighted = self.density_compensation().to(y) * pairs_to_complex(y)
        return complex_to_channels(self._combine(self._decode(weighted)))

    @torch.no_grad()
    def density_compensation(self, num_iterations: int = 20) -> Tensor:
        """Returns weights `(shots, readout)`: the area of k-space that each sample stands for [cells of the FFT grid].

        `w <- w / (G G^T w)` from 1, `G` the interpolation (its signs cancel). Pipe & Menon, MRM 41 (1999), Eq. 12.

        Args:
            num_iterations: Iterations of the fixed point.
        """
        key = (*self._key, num_iterations)
        if key not in _densities:
            matrix = self._matrix()
            weights = matrix.values.new_ones(matrix.shape[0])
            for _ in range(num_iterations):
                weights = weights / matrix(matrix.adjoint(weights))
            # there the density is 1 / (w I^2) a fine cell, I the kernel's integral over both axes; 4 fine cells are one
            integral = float(_kernel_transform(torch.zeros((), dtype=torch.float64))) ** 2
            _densities[key] = (weights * integral**2 / 4).cpu()
        return _densities[key].to(self.device).reshape(self._trajectory.shape[:2])

    def bind(self: N, case: Case | CaseBatch) -> N:
        """Returns a copy with the case's maps, trajectory and noise level.

        Raises:
            InputError: As in `MRI.bind`, or the trajectory is unusable, or the case was measured on a grid.
        """
        own: Any = self
        if case.mask is not None and case.measurement is not None:
            raise InputError(
                f"This k-space was measured on a Cartesian grid, and {type(self).__name__} samples along trajectories: "
                "take CartesianMRI, or give magnitude images, whose measurement is simulated."
            )
        trajectory = None if case.geometry is None else case.geometry.get("trajectory")
        if trajectory is not None:
            other = _check_trajectory(torch.as_tensor(trajectory))
            if not torch.equal(other, self._trajectory):
                own = NonCartesianMRI(self.image_shape[1:], other).to(self.device, self.dtype)  # type: ignore[arg-type]
        return MRI.bind(own, case)

    def _encode(self, z: Tensor) -> Tensor:
        return _Transform.apply(z, self, False).unflatten(-1, self._trajectory.shape[:2])

    def _decode(self, y: Tensor) -> Tensor:
        return _Transform.apply(y.flatten(-2), self, True)

    def _to_samples(self, z: Tensor) -> Tensor:
        """Returns the samples `(k, shots * readout)` of complex images `(k, H, W)`."""
        left, right, top, bottom = self._margins()
        rows = torch.fft.fft(nnf.pad(z * self._deconvolution, (left, right)), dim=-1)  # before those that are zero
        fine = torch.fft.fft(nnf.pad(rows, (0, 0, top, bottom)), dim=-2)  # leaves columns in one piece
        columns = torch.view_as_real(fine.mT.flatten(1).t().contiguous()).flatten(1)
        samples = self._matrix().csr(transpose=False) @ columns
        return torch.view_as_complex(samples.unflatten(1, (-1, 2))).t()

    def _from_samples(self, y: Tensor) -> Tensor:
        """Returns the transpose of `_to_samples`."""
        height, width = self.image_shape[1:]
        left, _, top, _ = self._margins()
        fine = self._matrix().csr(transpose=True) @ torch.view_as_real(y.t().contiguous()).flatten(1)
        columns = torch.view_as_complex(fine.unflatten(1, (-1, 2))).t().unflatten(-1, (2 * width, 2 * height))
        columns = torch.fft.ifft(columns, norm="forward")[..., top : top + height]
        z = torch.fft.ifft(columns, dim=-2, norm="forward")[:, left : left + width]
        return z.mT * self._deconvolution

    def _margins(self) -> tuple[int, int, int, int]:
        """Zeros left, right, above and below: the image's centre goes to the centre of the twice larger grid."""
        height, width = self.image_shape[1:]
        return (width - width // 2, width // 2, height - height // 2, height // 2)

    def _matrix(self) -> SparseMatrix:
        """Returns the interpolation matrix, building it or taking it from the cache at first use."""
        if self.matrix is None:
            dtype = self.dtype if self.dtype == torch.float64 else torch.float32
            with torch.inference_mode(False), torch.no_grad():  # it outlives the mode it is first used in
                self.matrix = matrix_cache.get(
                    (*self._key, dtype, str(self.device)),
                    lambda: interpolation_matrix(self._trajectory, self.image_shape[1:]).to(self.device, dtype),
                )
        return self.matrix

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles are light: they find the matrix by its key
        return {**self.__dict__, "_modules": {**self._modules, "matrix": None}}

    def _apply(self, fn: Any, recurse: bool = True) -> NonCartesianMRI:
        self.matrix = None  # the cache's own stays as it is; the next use finds or builds the one that is due
        super()._apply(fn, recurse)
        rows, columns = (_apodisation(num) for num in self.image_shape[1:])
        self._deconvolution = (rows[:, None] * columns).to(self._deconvolution)  # never rounded twice
        return self


N = TypeVar("N", bound=NonCartesianMRI)


class _Transform(torch.autograd.Function):
    """`E z` of complex `(..., H, W)`, or `E^H y`; the derivative is the other, to any order and in both modes.

    Few images at a time, so that their grids stay in the cache; a CPU takes them one by one where that spares the copy
    which interleaves them. A result does not depend on what shares its batch.
    """

    @staticmethod
    def forward(z: Tensor, operator: NonCartesianMRI, adjoint: bool) -> Tensor:
        num_axes = 1 if adjoint else 2
        planes = z.resolve_conj().to(operator._matrix().values.dtype.to_complex()).flatten(0, -1 - num_axes)
        function = operator._from_samples if adjoint else operator._to_samples
        num = 1 if z.device.type == "cpu" and not adjoint else _MAX_PLANES
        with torch.autocast(z.device.type, enabled=False):  # it would round the matrix to half precision
            parts = [function(part) for part in planes.split(num)]
        return torch.cat(parts).unflatten(0, z.shape[:-num_axes])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, NonCartesianMRI, bool], output: Tensor) -> None:
        z, ctx.operator, ctx.adjoint = inputs
        ctx.dtype = z.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Transform.apply(grad, ctx.operator, not ctx.adjoint).to(ctx.dtype), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _Transform.apply(tangent, ctx.operator, ctx.adjoint)

    @staticmethod
    def vmap(info: Any, in_dims: Any, z: Tensor, operator: NonCartesianMRI, adjoint: bool) -> tuple[Tensor, int]:
        return _Transform.apply(z.movedim(in_dims[0], 0), operator, adjoint), 0


class RadialMRI(NonCartesianMRI):
    """Radial MRI: spokes through the centre of k-space, `k = rho (sin theta, cos theta)`.

    Source: Winkelmann et al., IEEE TMI 26 (2007), for the golden angle `pi (sqrt 5 - 1) / 2`.

    Args:
        size: Side of the image in pixels, or (H, W).
        num_spokes: Number of spokes; `pi / 2` times the image's side samples k-space fully.
        num_readout: Samples a spoke; twice the image's side if None.
        golden: Spokes follow each other by the golden angle, or else divide pi evenly.
        maps: As in `NonCartesianMRI`.
    """

    def __init__(
        self,
        size: int | tuple[int, int] = 256,
        num_spokes: int = 64,
        num_readout: int | None = None,
        golden: bool = True,
        maps: Tensor | None = None,
    ) -> None:
        side = size if isinstance(size, int) else max(size)
        super().__init__(size, radial_trajectory(num_spokes, num_readout or 2 * side, golden), maps)


class SpiralMRI(NonCartesianMRI):
    """Spiral MRI: Archimedean interleaves from the centre outwards, `k = t/2 (sin, cos)(2 pi (turns t + i / n))`.

    Args:
        size: Side of the image in pixels, or (H, W).
        num_interleaves: Number of shots `n`, each turned by `2 pi / n`.
        num_readout: Samples a shot.
        turns: Turns of one shot; `num_interleaves * turns` of half the image's side samples k-space fully.
        maps: As in `NonCartesianMRI`.
    """

    def __init__(
        self,
        size: int | tuple[int, int] = 256,
        num_interleaves: int = 8,
        num_readout: int = 4096,
        turns: float = 8.0,
        maps: Tensor | None = None,
    ) -> None:
        super().__init__(size, spiral_trajectory(num_interleaves, num_readout, turns), maps)


def radial_trajectory(num_spokes: int, num_readout: int, golden: bool = True) -> Tensor:
    """Returns `(num_spokes, num_readout, 2)` [cycles/pixel]; sample `num_readout // 2` of each spoke is the centre.

    Raises:
        InputError: A count below 1.
    """
    _require_counts(num_spokes=num_spokes, num_readout=num_readout)
    step = math.pi * (math.sqrt(5) - 1) / 2 if golden else math.pi / num_spokes
    theta = torch.arange(num_spokes, dtype=torch.float64)[:, None] * step
    rho = (torch.arange(num_readout, dtype=torch.float64) - num_readout // 2) / num_readout
    return torch.stack((rho * theta.sin(), rho * theta.cos()), -1)


def spiral_trajectory(num_interleaves: int, num_readout: int, turns: float) -> Tensor:
    """Returns `(num_interleaves, num_readout, 2)` [cycles/pixel]; each interleaf starts at the centre.

    Raises:
        InputError: A count below 1, or turns that are not positive.
    """
    _require_counts(num_interleaves=num_interleaves, num_readout=num_readout)
    if not 0 < turns < math.inf:
        raise InputError(f"A spiral's turns must be a positive number, got {turns}.")
    t = torch.arange(num_readout, dtype=torch.float64) / num_readout
    turn = torch.arange(num_interleaves, dtype=torch.float64)[:, None] / num_interleaves
    theta = 2 * math.pi * (turns * t + turn)
    return torch.stack((t / 2 * theta.sin(), t / 2 * theta.cos()), -1)


def interpolation_matrix(trajectory: Tensor, size: tuple[int, ...]) -> SparseMatrix:
    """Returns `G`, `(samples, 4HW)`, float64: the Kaiser-Bessel kernel on the grid of a twice zero-padded FFT.

    Its columns are the grid's points, column by column, in the FFT's own order. The sign `(-1)^(row + column)` shifts
    the image's centre from the middle of the padded grid to its origin, so no array is ever shifted.

    Args:
        trajectory: `(..., 2)` [cycles/pixel].
        size: `(H, W)`.

    Raises:
        InputError: The matrix would have more than 2^31 - 1 entries.
    """
    k = trajectory.reshape(-1, 2).double()
    if len(k) * WIDTH**2 >= 2**31:
        raise InputError(f"A trajectory of {len(k)} samples has too many entries for 32-bit indices; use fewer.")
    grid = torch.tensor(size, dtype=torch.float64) * 2
    position = k * grid  # in samples of the fine grid
    first = (position - WIDTH / 2).ceil()
    near = first[..., None] + torch.arange(WIDTH)  # (samples, 2, WIDTH)
    values = _kernel(position[..., None] - near) * (1 - 2 * near.remainder(2))
    index = near.remainder(grid[:, None]).long()
    columns = index[:, 1, :, None] * int(grid[0]) + index[:, 0, None, :]
    entries = values[:, 1, :, None] * values[:, 0, None, :]
    crow = torch.arange(len(k) + 1) * WIDTH**2
    return SparseMatrix(crow.int(), columns.flatten().int(), entries.flatten(), int(grid.prod()))


def _kernel(u: Tensor) -> Tensor:
    """Returns `I0(beta sqrt(1 - (2 u / width)^2)) / I0(beta)`, zero beyond half the width."""
    inside = (1 - (2 * u / WIDTH).square()).clamp(min=0)
    value = torch.special.i0e(BETA * inside.sqrt()) * torch.exp(BETA * (inside.sqrt() - 1))
    return value / torch.special.i0e(torch.tensor(BETA, dtype=u.dtype)) * (u.abs() <= WIDTH / 2)


def _kernel_transform(v: Tensor) -> Tensor:
    """Returns the kernel's Fourier transform `WIDTH / I0(beta) sinh(q) / q`, `q^2 = beta^2 - (pi WIDTH v)^2 > 0`."""
    q = (BETA**2 - (math.pi * WIDTH * v).square()).sqrt()
    return WIDTH * q.sinh() / q / torch.special.i0(torch.tensor(BETA, dtype=v.dtype))


def _apodisation(num: int) -> Tensor:
    """Returns `1 / (sqrt(num) transform)` at the pixels of one axis, float64 `(num,)`."""
    offset = torch.arange(num, dtype=torch.float64) - num // 2
    return 1 / (_kernel_transform(offset / (2 * num)) * math.sqrt(num))


def _check_trajectory(trajectory: Tensor) -> Tensor:
    trajectory = torch.as_tensor(trajectory).detach().cpu()
    if trajectory.ndim != 3 or trajectory.shape[-1] != 2 or trajectory.numel() == 0 or trajectory.is_complex():
        raise InputError(
            f"A trajectory of shape {tuple(trajectory.shape)} ({trajectory.dtype}) was given, expected real (shots, "
            "readout, 2): row and column component [cycles/pixel]."
        )
    largest = float(trajectory.abs().amax())
    if not largest <= 0.5 + 1e-6:
        raise InputError(
            f"The trajectory reaches {largest:g}, expected cycles/pixel within +-1/2: divide cycles per field of view "
            "by the number of pixels, and radians by 2 pi."
        )
    return trajectory.double().contiguous()


def _require_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"A trajectory's {name} must be at least 1, got {count}.")
