"""X-ray computed tomography of slices: parallel and flat-detector fan beams."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from invrecon.errors import InputError
from invrecon.operators.base import LinearOperator
from invrecon.operators.fbp import fan_fbp, parallel_fbp
from invrecon.operators.joseph import joseph_matrix, matrix_cache, pixel_centres
from invrecon.operators.sparse import SparseMatrix

if TYPE_CHECKING:
    from invrecon.data import Case, CaseBatch


_norms: dict[tuple[Any, ...], dict[str, float]] = {}
"""Norms by geometry, so that binding case after case to a geometry of its own costs one power iteration."""


class CT(LinearOperator):
    """Line integrals of slices, `y[view, bin] = integral of x along one ray`; a volume is a batch of slices.

    Each ray is one row of a sparse matrix (`invrecon.operators.joseph`), built at first use and shared
    between all operators of equal geometry. Images are `(B, 1, H, W)`, sinograms `(B, 1, views, bins)`; y =
    intensity times the unit of length. All lengths share one unit, free to choose: mm where a scan gives
    them.

    Coordinates: x along columns, y up (row 0 has the largest y), origin at the image centre. At view angle
    `theta` the detector axis is `u = (cos theta, sin theta)` and rays run along `(sin theta, -cos theta)`,
    reversed for fans.

    Args:
        size: Image size, `(H, W)` or one number for both.
        angles: View angles [rad].
        num_bins: Detector cells; a ray meets each at its centre.
        detector_length: Length of the detector, centred.
        field_of_view: Length of the image's longer side; pixels are square.

    Raises:
        InputError: A size, count or length that is not positive, or angles that are not finite.
    """

    kind: ClassVar[str]
    frequency_scaling: ClassVar[float]

    def __init__(
        self,
        size: int | tuple[int, int],
        angles: Sequence[float],
        num_bins: int,
        detector_length: float,
        field_of_view: float,
    ) -> None:
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        name = type(self).__name__
        counts = {"size": min(height, width), "number of views": len(angles), "num_bins": num_bins}
        for key, value in counts.items():
            _require(value >= 1, f"{name}: {key} must be at least 1, got {value}.")
        for key, length in {"detector_length": detector_length, "field_of_view": field_of_view}.items():
            _require(0 < length < math.inf, f"{name}: {key} must be a positive length, got {length}.")
        _require(all(map(math.isfinite, angles)), f"{name}: angles must be finite numbers [rad].")
        super().__init__((1, height, width), (1, len(angles), num_bins))
        self.size = (height, width)
        self.angles = tuple(float(angle) for angle in angles)
        self.num_views, self.num_bins = len(self.angles), num_bins
        self.detector_length = float(detector_length)
        self.field_of_view = float(field_of_view)
        self.matrix: SparseMatrix | None
        self.register_module("matrix", None)

    @property
    def pixel(self) -> float:
        """Side of a pixel, in the unit of length."""
        return self.field_of_view / max(self.size)

    @property
    def bin_width(self) -> float:
        """Width of a detector cell, in the unit of length."""
        return self.detector_length / self.num_bins

    @property
    def geometry(self) -> dict[str, Any]:
        """All that fixes the rays and the image's extent; `ct_from_geometry` takes it back."""
        return {
            "type": self.kind,
            "angles": list(self.angles),
            "num_bins": self.num_bins,
            "detector_length": self.detector_length,
            "field_of_view": self.field_of_view,
        }

    @abstractmethod
    def rays(self, angles: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a point on each ray and its unit direction, `(views, bins, 2)`; angles are `(views, 1)`."""

    @abstractmethod
    def _fbp(self, y: Tensor, pixels: Tensor, window: str, frequency_scaling: float) -> Tensor:
        """Returns the FBP `(N, P)` of sinograms `(N, views, bins)` at pixel centres `(P, 2)`."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns sinograms `(B, 1, views, bins)` of images `(B, 1, H, W)`."""
        self._check(x, self.image_shape, "images")
        if x.is_meta:
            return x.new_empty(len(x), *self.measurement_shape)
        return self._matrix(x)(x.flatten(2)).unflatten(2, self.measurement_shape[1:])

    def adjoint(self, y: Tensor) -> Tensor:
        """Returns back-projections `A^T y`, `(B, 1, H, W)`, of sinograms `(B, 1, views, bins)`."""
        self._check(y, self.measurement_shape, "sinograms")
        if y.is_meta:
            return y.new_empty(len(y), *self.image_shape)
        return self._matrix(y).adjoint(y.flatten(2)).unflatten(2, self.size)

    def fbp(self, y: Tensor, window: str = "hann", frequency_scaling: float | None = None) -> Tensor:
        """Returns the filtered back-projection of `y`, in the units of the image.

        Views are weighted by the angle they stand for, so uneven angles are welcome; lines never measured
        count zero.

        Args:
            y: Sinograms `(B, 1, views, bins)`.
            window: 'hann' or 'ramp' (none).
            frequency_scaling: Cut-off as a fraction of the Nyquist frequency; None: 0.9 (parallel) or 0.3
                (fan), as PaDIS has it.

        Raises:
            InputError: Sinograms of another shape, an unknown window, or a scaling outside (0, 1].
        """
        self._check(y, self.measurement_shape, "sinograms")
        scaling = self.frequency_scaling if frequency_scaling is None else frequency_scaling
        pixels = pixel_centres(self.size, self.pixel, y.device)
        image = self._fbp(y.flatten(0, 1), pixels, window, scaling)
        return image.unflatten(1, self.size).unflatten(0, y.shape[:2])

    def baseline(self, y: Tensor) -> Tensor:
        """Returns the Hann-windowed filtered back-projection."""
        return self.fbp(y)

    def bind(self, case: Case | CaseBatch) -> CT:
        """Returns a copy with the case's noise level and, for a measurement file, its geometry.

        Raises:
            InputError: The case's sinogram does not fit its geometry.
        """
        operator: CT = self
        if case.geometry is not None:
            operator = ct_from_geometry(case.geometry, self.size).to(self.device, self.dtype)
        if case.measurement is not None:
            shape = tuple(case.measurement.shape[-3:])
            names = case.id if isinstance(case.id, str) else ", ".join(case.id)
            _require(
                shape == operator.measurement_shape,
                f"The sinogram of {names} does not fit its geometry: angles and num_bins ask for "
                f"{operator.measurement_shape} (1, views, bins), the sinogram is {shape}; "
                "mend the one that is wrong in the measurement file.",
            )
        return super(CT, operator).bind(case)

    def norm(self) -> float:
        """Returns `||A||_2`, computed once for each geometry in a process."""
        self._norm = _norms.setdefault(self._key(), self._norm)
        return super().norm()

    def extra_repr(self) -> str:
        """Describes the geometry in `print(operator)`."""
        height, width = self.size
        return f"{height} x {width}, {self.num_views} views x {self.num_bins} bins"

    def _key(self) -> tuple[Any, ...]:
        """What operators must have in common to share a matrix."""
        parts = ((k, tuple(v) if isinstance(v, list) else v) for k, v in self.geometry.items())
        return (self.size, *parts)

    def _bins(self, device: torch.device) -> Tensor:
        """Positions of the bin centres on the detector, float64 `(bins,)`."""
        cells = torch.arange(self.num_bins, dtype=torch.float64, device=device)
        return (cells - (self.num_bins - 1) / 2) * self.bin_width

    def _angles(self, device: torch.device) -> Tensor:
        return torch.tensor(self.angles, dtype=torch.float64, device=device)

    def _matrix(self, like: Tensor) -> SparseMatrix:
        """Returns the matrix, building it or taking it from the cache at first use."""
        if like.dtype == torch.float64 != self.dtype:
            raise InputError(
                f"{type(self).__name__} computes in {self.dtype} but was given {like.dtype}; "
                "convert one of them (operator.double() is built anew, in full precision)."
            )
        if self.matrix is None:
            key = (*self._key(), self.dtype, str(self.device))
            self.matrix = matrix_cache.get(key, self._build)
        return self.matrix

    def _build(self) -> SparseMatrix:
        dtype = self.dtype if self.dtype == torch.float64 else torch.float32
        with torch.inference_mode(False), torch.no_grad():  # the matrix outlives the mode it is first used in
            points, directions = self.rays(self._angles(self.device)[:, None])
            return joseph_matrix(points.flatten(0, 1), directions.flatten(0, 1), self.size, self.pixel, dtype)

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles are light: they find the matrix by its key
        return {**self.__dict__, "_modules": {**self._modules, "matrix": None}}

    def _apply(self, fn: Any, recurse: bool = True) -> CT:
        self.matrix = None  # the cache's own stays as it is; the next use finds or builds the one that is due
        return super()._apply(fn, recurse)


class ParallelBeamCT(CT):
    """Parallel-beam CT; the defaults are the PaDIS geometry (8, 20 or 60 views).

    Image domain [-20, 20]^2, 512 bins over [-40, 40], views at the centres of equal cells of the arc,
    `theta_j = (j + 1/2) arc / num_views`. Hu et al., PaDIS, NeurIPS 2024 (arXiv 2406.02462), public code; its
    unit of length is arbitrary, and `norm()**2` is close to 6.03 times the number of views.

    Args:
        size: Image size, `(H, W)` or one number for both.
        num_views: Number of views.
        num_bins: Number of detector cells.
        arc: Span of the view angles [rad].
        field_of_view: Length of the image's longer side, in any unit (mm where a scan gives it).
        detector_length: Length of the detector, in the same unit.
        angles: View angles [rad] in place of `num_views` and `arc`, for measured data.
    """

    kind = "parallel"
    frequency_scaling = 0.9

    def __init__(
        self,
        size: int | tuple[int, int] = 256,
        num_views: int = 20,
        num_bins: int = 512,
        arc: float = math.pi,
        field_of_view: float = 40.0,
        detector_length: float = 80.0,
        angles: list[float] | None = None,
    ) -> None:
        super().__init__(size, _angles(num_views, arc, angles), num_bins, detector_length, field_of_view)

    @classmethod
    def padis(cls, num_views: int = 20, size: int | tuple[int, int] = 256) -> ParallelBeamCT:
        """The PaDIS sparse-view geometry: 8, 20 or 60 views over pi."""
        return cls(size, num_views)

    def rays(self, angles: Tensor) -> tuple[Tensor, Tensor]:
        """Returns points and directions: `p = s u(theta)`, `e = (sin theta, -cos theta)`."""
        s = self._bins(angles.device)
        cos, sin = (f(angles).expand(-1, len(s)) for f in (torch.cos, torch.sin))
        return torch.stack((s * cos, s * sin), -1), torch.stack((sin, -cos), -1)

    def _fbp(self, y: Tensor, pixels: Tensor, window: str, frequency_scaling: float) -> Tensor:
        return parallel_fbp(y, self._angles(y.device), pixels, self.bin_width, window, frequency_scaling)


class LimitedAngleCT(ParallelBeamCT):
    """The PaDIS limited-angle geometry: parallel beams over 2 pi / 3 only, otherwise as `ParallelBeamCT`."""

    def __init__(
        self,
        size: int | tuple[int, int] = 256,
        num_views: int = 20,
        num_bins: int = 512,
        arc: float = 2 * math.pi / 3,
        field_of_view: float = 40.0,
        detector_length: float = 80.0,
        angles: list[float] | None = None,
    ) -> None:
        if angles is None and not arc < math.pi - 1e-6:  # as a configuration of `ParallelBeamCT` states it
            raise InputError(f"LimitedAngleCT has an arc of {arc:.5g}, expected less than pi: state it, as 2.0944.")
        super().__init__(size, num_views, num_bins, arc, field_of_view, detector_length, angles)


class FanBeamCT(CT):
    """Fan-beam CT with a flat detector; the defaults are the PaDIS fan (source and detector at 40, arc pi).

    The source is at `-source_distance` and the detector at `+detector_distance` along the central ray
    `(-sin theta, cos theta)`. An arc of pi is less than a short scan (pi plus the fan angle), hence the
    limited-angle look of its FBP, and the fan does not reach the image's corners; both are so in PaDIS.

    Args:
        size: Image size, `(H, W)` or one number for both.
        num_views: Number of views.
        num_bins: Number of detector cells.
        arc: Span of the view angles [rad].
        field_of_view: Length of the image's longer side, in any unit (mm where a scan gives it).
        detector_length: Length of the detector, in the same unit.
        source_distance: From the source to the centre of rotation; beyond the image's corners.
        detector_distance: From the centre of rotation to the detector.
        angles: View angles [rad] in place of `num_views` and `arc`, for measured data.

    Raises:
        InputError: The source lies within the image, or the detector behind the source.
    """

    kind = "fan"
    frequency_scaling = 0.3

    def __init__(
        self,
        size: int | tuple[int, int] = 256,
        num_views: int = 180,
        num_bins: int = 512,
        arc: float = math.pi,
        field_of_view: float = 40.0,
        detector_length: float = 80.0,
        source_distance: float = 40.0,
        detector_distance: float = 40.0,
        angles: list[float] | None = None,
    ) -> None:
        super().__init__(size, _angles(num_views, arc, angles), num_bins, detector_length, field_of_view)
        corner = self.pixel * math.hypot(*self.size) / 2
        _require(
            corner < source_distance < math.inf,
            f"FanBeamCT: source_distance must exceed the distance of the image's corners, {corner:g}, "
            f"got {source_distance}.",
        )
        _require(
            0 <= detector_distance < math.inf,
            f"FanBeamCT: detector_distance must not be negative, got {detector_distance}.",
        )
        self.source_distance = float(source_distance)
        self.detector_distance = float(detector_distance)

    @classmethod
    def padis(cls, num_views: int = 180, size: int | tuple[int, int] = 256) -> FanBeamCT:
        """The PaDIS fan beam: 180 views over pi, source and detector at 40 from the centre."""
        return cls(size, num_views)

    @property
    def geometry(self) -> dict[str, Any]:
        """All that fixes the rays and the image's extent; `ct_from_geometry` takes it back."""
        distances = {"source_distance": self.source_distance, "detector_distance": self.detector_distance}
        return {**super().geometry, **distances}

    def rays(self, angles: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the source and the unit vectors from it to each bin."""
        s = self._bins(angles.device)
        cos, sin = torch.cos(angles), torch.sin(angles)
        depth = self.source_distance + self.detector_distance
        direction = torch.stack((s * cos - depth * sin, s * sin + depth * cos), -1)
        source = self.source_distance * torch.stack((sin, -cos), -1)
        return source.expand_as(direction), direction / direction.norm(dim=-1, keepdim=True)

    def _fbp(self, y: Tensor, pixels: Tensor, window: str, frequency_scaling: float) -> Tensor:
        magnification = (self.source_distance + self.detector_distance) / self.source_distance
        bin_width = self.bin_width / magnification
        angles = self._angles(y.device)
        return fan_fbp(y, angles, pixels, bin_width, self.source_distance, window, frequency_scaling)


def ct_from_geometry(geometry: Mapping[str, Any], size: int | tuple[int, int]) -> CT:
    """Returns the operator of a measurement file's geometry, for images of `size`.

    Args:
        geometry: `type` ('parallel' or 'fan'), `angles` [rad], `num_bins`, `detector_length`, `field_of_view`
            and, for a fan, `source_distance` and `detector_distance`; lengths in one unit, normally mm.
        size: Image size to reconstruct.

    Raises:
        InputError: A key is missing, unknown, or holds an impossible value.
    """
    common = {"angles", "num_bins", "detector_length", "field_of_view"}
    kinds = {"parallel": common, "fan": common | {"source_distance", "detector_distance"}}
    kind = geometry.get("type")
    if kind not in kinds:
        raise InputError(f"The geometry's type must be one of {', '.join(kinds)}, got {kind!r}.")
    missing, unknown = (sorted(s) for s in (kinds[kind] - set(geometry), set(geometry) - kinds[kind] - {"type"}))
    _require(
        not missing and not unknown,
        f"A {kind} geometry needs {', '.join(sorted(kinds[kind]))}; "
        f"missing: {', '.join(missing) or 'none'}, unknown: {', '.join(unknown) or 'none'}.",
    )
    try:
        angles = [float(angle) for angle in geometry["angles"]]
        num_bins = int(geometry["num_bins"])
        lengths = {key: float(geometry[key]) for key in kinds[kind] - {"angles", "num_bins"}}
    except (TypeError, ValueError) as error:
        raise InputError(f"The {kind} geometry holds something that is not a number ({error}).") from error
    if kind == "parallel":
        return ParallelBeamCT(size, num_bins=num_bins, angles=angles, **lengths)  # type: ignore[arg-type]
    return FanBeamCT(size, num_bins=num_bins, angles=angles, **lengths)  # type: ignore[arg-type]


def _angles(num_views: int, arc: float, angles: Sequence[float] | None) -> list[float]:
    """Centres of `num_views` equal cells of the arc, unless angles are given."""
    if angles is not None:
        return [float(angle) for angle in angles]
    _require(0 < arc <= 2 * math.pi, f"The arc must lie in (0, 2 pi] radians, got {arc}.")
    return [(view + 0.5) * arc / num_views for view in range(num_views)]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)
