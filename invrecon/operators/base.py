"""Linear operators `y = A x` and what every one can do: adjoint, norm, pseudo-inverse, proximal map."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from invrecon.errors import InputError

if TYPE_CHECKING:
    from invrecon.data import Case, CaseBatch
    from invrecon.operators.spectral import Spectrum

T = TypeVar("T", bound="LinearOperator")


class LinearOperator(nn.Module, ABC):
    """A linear map `A` from images to measurements; complex images are two real channels.

    A subclass defines `forward` and `adjoint`, differentiable torch code, each the exact transpose of the
    other in the Euclidean inner product (no quadrature weights). The rest of the algebra follows from these
    two.

    Attributes:
        complex_images: Whether the image's two channels are the real and imaginary parts of complex numbers.
        image_shape: Shape of one image without the batch dimension, `(C, *S)`.
        measurement_shape: Shape of one measurement without the batch dimension.
        baseline_name: What the field calls `baseline`, which the method `FBP` returns.
        noise_std: Standard deviation of the measurement noise, in units of `y`: `(B,)` (one a sample), the
            shape of `y` (one a ray), or None for noise-free data. It arrives with the case, by `bind`.

    Args:
        image_shape: See above.
        measurement_shape: See above.
    """

    complex_images: bool = False
    baseline_name: ClassVar[str] = "FBP"
    noise_std: Tensor | None
    _anchor: Tensor

    def __init__(self, image_shape: tuple[int, ...], measurement_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.image_shape = tuple(image_shape)
        self.measurement_shape = tuple(measurement_shape)
        self.register_buffer("noise_std", None, persistent=False)
        self.register_buffer("_anchor", torch.empty(0), persistent=False)  # follows .to(), .double()
        self._norm: dict[str, float] = {}  # shared by bound copies: one power iteration serves them all

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Returns `A x`: `(B, *image_shape)` to `(B, *measurement_shape)`."""

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """Returns `A^T y`: `(B, *measurement_shape)` to `(B, *image_shape)`."""

    def normal(self, x: Tensor) -> Tensor:
        """Returns `A^T A x`, shape `(B, *image_shape)`."""
        return self.adjoint(self(x))

    @property
    def device(self) -> torch.device:
        """The device that inputs must be on."""
        return self._anchor.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision that `A` computes in."""
        return self._anchor.dtype

    @torch.no_grad()
    def norm(self) -> float:
        """Returns the spectral norm `||A||_2` to about 1e-4, by power iteration from a seeded start.

        Computed once and kept. Step sizes in units of `1 / norm()**2` carry over from geometry to geometry.
        """
        if "norm" not in self._norm:
            self._norm["norm"] = _power_iteration(self)
        return self._norm["norm"]

    def pinv(self, y: Tensor, *, max_iter: int = 50, tol: float = 1e-6) -> Tensor:
        """Returns `A^+ y`, the least-squares solution of least norm, by CG on `A^T A x = A^T y` from zero.

        Args:
            y: Measurements `(B, *measurement_shape)`.
            max_iter: Most iterations; few of them regularise.
            tol: Stop a sample when `||A^T (y - A x)|| <= tol ||A^T y||`.
        """
        return conjugate_gradient(self.normal, self.adjoint(y), max_iter=max_iter, tol=tol)

    def prox(self, x: Tensor, y: Tensor, weight: float | Tensor, *, max_iter: int = 10, tol: float = 0.0) -> Tensor:
        r"""Returns the proximal map of the data term, `argmin_z weight/2 ||A z - y||^2 + 1/2 ||z - x||^2`.

        Solved for the correction `d = z - x`, scaled by `s = max(weight, 1)` so that both limits are finite:
        `(1/s I + weight/s A^T A) d = weight/s A^T (y - A x)`. Weight 0 gives `x`; an infinite weight gives
        `x + A^+ (y - A x)`, the projection of `x` onto the images that fit `y` best.

        Args:
            x: Images `(B, *image_shape)`; CG starts there.
            y: Measurements `(B, *measurement_shape)`.
            weight: Non-negative, a float or `(B,)`; its natural unit is `1 / norm()**2`.
            max_iter: Most CG iterations.
            tol: Relative residual at which a sample stops; 0 runs all iterations.
        """
        weight = _per_sample(torch.as_tensor(weight, dtype=x.dtype, device=x.device), x)
        scale = weight.clamp(min=1.0)
        identity, data = 1 / scale, weight.clamp(max=1.0)
        rhs = data * self.adjoint(y - self(x))

        def apply(d: Tensor) -> Tensor:
            return (identity * d).add_(data * self.normal(d))

        return x + conjugate_gradient(apply, rhs, max_iter=max_iter, tol=tol)

    def spectrum(self) -> Spectrum:
        """Returns the singular system `A = U S V^T`, for the operators that have it in closed form.

        Raises:
            InputError: This one has none.
        """
        raise InputError(
            f"Spectral methods such as DDRM and DDNM+ need singular values, {type(self).__name__} has none in closed "
            "form: use ProximalDiffusion, DDNM or DiffPIR, which solve with A and its adjoint."
        )

    def baseline(self, y: Tensor) -> Tensor:
        """Returns the field's direct reconstruction of `y`; by default the pseudo-inverse."""
        return self.pinv(y)

    def bind(self: T, case: Case | CaseBatch) -> T:
        """Returns a shallow copy that carries what differs from case to case (here: the noise level)."""
        bound = self._shallow_copy()
        std = case.noise_std
        bound.noise_std = None if std is None else torch.as_tensor(std).to(self.device, self.dtype)
        return bound

    def select_cases(self: T, chosen: slice | Tensor, num_cases: int) -> T:
        """Returns the physics of some cases of a batch: their noise levels, and whatever else is theirs alone.

        Args:
            chosen: Which cases: a slice, or their numbers.
            num_cases: Cases that the operator is bound to.
        """
        if num_cases == 1:
            return self
        clone = self._shallow_copy()
        std = self.noise_std
        if std is not None and std.ndim in (1, 1 + len(self.measurement_shape)) and len(std) == num_cases:
            clone.noise_std = std[chosen]
        for name, part in self._modules.items():
            if isinstance(part, LinearOperator):
                clone._modules[name] = part.select_cases(chosen, num_cases)
        return clone

    def restrict(self, y: Tensor) -> Tensor:
        """Returns `y` with zeros where nothing was measured; here everything was."""
        self._check(y, self.measurement_shape, "measurements")
        return y

    def whiten(self, y: Tensor) -> tuple[LinearOperator, Tensor, Tensor | None]:
        """Returns `(W A, W y, std)` with `W = min(noise_std) / noise_std`: the noise left is homogeneous.

        Rays count by their precision, the best of each sample by 1; a ray of infinite `noise_std` counts
        nothing.

        Args:
            y: Measurements `(B, *measurement_shape)`.

        Returns:
            The weighted operator and measurements, and the standard deviation `(B,)` of `W y`; the operator
            and `y` themselves when the noise is homogeneous, with std None when there is none.

        Raises:
            InputError: `noise_std` is not positive, or its shape fits neither `(B,)` nor `y`.
        """
        if self.noise_std is None:
            return self, y, None
        std = self._expand_std(self.noise_std, y)
        smallest = std.flatten(1).amin(1)
        if not (smallest > 0).all() or not smallest.isfinite().all():
            raise InputError(
                "The noise level of a measurement must be positive, and finite for at least one ray: got "
                f"{float(smallest.min()):g}. Leave noise_std out where there is no noise."
            )
        if std[0].numel() == 1:
            return self, y, smallest
        weights = _per_sample(smallest, std) / std
        return WhitenedOperator(self, weights), weights * y, smallest

    def _expand_std(self, std: Tensor, y: Tensor) -> Tensor:
        """Gives `std` the batch dimension and the number of dimensions of `y`."""
        batch = y.shape[0]
        std = std.to(y)
        if std.numel() == 1:
            return std.reshape(1, *(1,) * (y.ndim - 1)).expand(batch, *(1,) * (y.ndim - 1))
        if std.ndim == 1 and std.shape[0] == batch:
            return _per_sample(std, y)
        if std.ndim == y.ndim - 1:
            std = std[None]
        fits = std.ndim == y.ndim and all(s in (1, n) for s, n in zip(std.shape, y.shape, strict=True))
        if not fits:
            raise InputError(
                f"A noise_std of shape {tuple(std.shape)} fits neither {batch} samples nor measurements "
                f"of shape {tuple(y.shape)}; give one number a sample or one a ray."
            )
        return std.expand(batch, *std.shape[1:])

    def _shallow_copy(self: T) -> T:
        """Returns a copy sharing all tensors, whose attributes and buffers can be replaced independently."""
        clone = self.__class__.__new__(self.__class__)
        clone.__dict__.update(self.__dict__)
        for registry in ("_parameters", "_buffers", "_modules"):
            clone.__dict__[registry] = self.__dict__[registry].copy()
        return clone

    def _check(self, tensor: Tensor, shape: tuple[int, ...], what: str) -> None:
        """Raises InputError unless `tensor` is `(B, *shape)`."""
        if tuple(tensor.shape[1:]) != shape or tensor.ndim != len(shape) + 1:
            raise InputError(
                f"{type(self).__name__} expects {what} of shape (batch, {', '.join(map(str, shape))}), "
                f"got {tuple(tensor.shape)}."
            )

    @property
    def H(self) -> LinearOperator:  # noqa: N802 - the field's name
        """The adjoint as an operator of its own."""
        return AdjointOperator(self)

    def __matmul__(self, other: LinearOperator) -> LinearOperator:
        if not isinstance(other, LinearOperator):
            return NotImplemented
        return ComposedOperator(self, other)

    def __mul__(self, scalar: float) -> LinearOperator:
        if not isinstance(scalar, int | float):
            return NotImplemented
        return ScaledOperator(self, float(scalar))

    __rmul__ = __mul__


class AdjointOperator(LinearOperator):
    """`A^T` as an operator; `A.H.H` is `A`."""

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(operator.measurement_shape, operator.image_shape)
        self.operator = operator
        self._anchor = operator._anchor

    def forward(self, x: Tensor) -> Tensor:
        """Returns `A^T x`."""
        return self.operator.adjoint(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """Returns `A y`."""
        return self.operator(y)

    def norm(self) -> float:
        """Returns `||A^T|| = ||A||`."""
        return self.operator.norm()

    @property
    def H(self) -> LinearOperator:  # noqa: N802
        """The operator itself."""
        return self.operator


class ComposedOperator(LinearOperator):
    """`A B`: first `B`, then `A`.

    Raises:
        InputError: The image of `B` is not what `A` takes.
    """

    def __init__(self, outer: LinearOperator, inner: LinearOperator) -> None:
        if inner.measurement_shape != outer.image_shape:
            raise InputError(
                f"Cannot compose {type(outer).__name__} @ {type(inner).__name__}: the first takes "
                f"{outer.image_shape}, the second gives {inner.measurement_shape}."
            )
        super().__init__(inner.image_shape, outer.measurement_shape)
        self.outer, self.inner = outer, inner
        same_channels = inner.image_shape[0] == outer.image_shape[0]
        self.complex_images = inner.complex_images or (outer.complex_images and same_channels)
        self._anchor = inner._anchor

    def forward(self, x: Tensor) -> Tensor:
        """Returns `A B x`."""
        return self.outer(self.inner(x))

    def adjoint(self, y: Tensor) -> Tensor:
        """Returns `B^T A^T y`."""
        return self.inner.adjoint(self.outer.adjoint(y))

    def restrict(self, y: Tensor) -> Tensor:
        """Returns `y` with zeros where `A` measures nothing."""
        return self.outer.restrict(y)

    def bind(self, case: Case | CaseBatch) -> ComposedOperator:
        """Returns the composition of both factors bound to the case."""
        bound = ComposedOperator(self.outer.bind(case), self.inner.bind(case))
        bound.noise_std = bound.outer.noise_std
        return bound


class ScaledOperator(LinearOperator):
    """`c A` for a real number `c`."""

    def __init__(self, operator: LinearOperator, scalar: float) -> None:
        super().__init__(operator.image_shape, operator.measurement_shape)
        self.operator, self.scalar = operator, scalar
        self.complex_images = operator.complex_images
        self._anchor = operator._anchor

    def forward(self, x: Tensor) -> Tensor:
        """Returns `c A x`."""
        return self.scalar * self.operator(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """Returns `c A^T y`."""
        return self.scalar * self.operator.adjoint(y)

    def restrict(self, y: Tensor) -> Tensor:
        """Returns `y` with zeros where `A` measures nothing."""
        return self.operator.restrict(y)

    def norm(self) -> float:
        """Returns `|c| ||A||`."""
        return abs(self.scalar) * self.operator.norm()


class WhitenedOperator(LinearOperator):
    """`W A` with one weight in [0, 1] a ray and sample; made by `LinearOperator.whiten`.

    Args:
        operator: `A`.
        weights: `W`, broadcastable to `(B, *measurement_shape)`.
    """

    weights: Tensor

    def __init__(self, operator: LinearOperator, weights: Tensor) -> None:
        super().__init__(operator.image_shape, operator.measurement_shape)
        self.operator = operator
        self.complex_images = operator.complex_images
        self.register_buffer("weights", weights, persistent=False)
        self._anchor = operator._anchor

    def forward(self, x: Tensor) -> Tensor:
        """Returns `W A x`."""
        return self.weights * self.operator(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """Returns `A^T W y`."""
        return self.operator.adjoint(self.weights * y)

    def restrict(self, y: Tensor) -> Tensor:
        """Returns `y` with zeros where nothing was measured or the weight is 0."""
        return (self.weights > 0) * self.operator.restrict(y)

    def select_cases(self, chosen: slice | Tensor, num_cases: int) -> WhitenedOperator:
        """Returns `W A` of some cases; see `LinearOperator.select_cases`."""
        clone = super().select_cases(chosen, num_cases)
        if self.weights.ndim == 1 + len(self.measurement_shape) and len(self.weights) == num_cases > 1:
            clone.weights = self.weights[chosen]
        return clone

    def norm(self) -> float:
        """Returns `||A||`, an upper bound of `||W A||`: the same number whatever cases share the batch."""
        return self.operator.norm()

    def baseline(self, y: Tensor) -> Tensor:
        """Returns the baseline of the unweighted measurement (direct inverses do not know weights)."""
        return self.operator.baseline(torch.where(self.weights > 0, y / self.weights, 0.0))


def conjugate_gradient(
    apply: Callable[[Tensor], Tensor], b: Tensor, x0: Tensor | None = None, *, max_iter: int, tol: float
) -> Tensor:
    """Solves `M x = b` by conjugate gradients, every sample with its own step sizes and its own end.

    Hestenes and Stiefel, J. Res. NBS 49 (1952), Eqs. 3:1. Differentiable: only where no gradient is recorded are `x`,
    residual and direction updated where they lie, to the same bits, so that an iteration allocates what `apply` does.

    Args:
        apply: `x -> M x`, symmetric positive semi-definite, acting on each sample separately.
        b: Right-hand sides `(B, ...)`.
        x0: Start, shape of `b`; None starts at zero, which for singular `M` leads to the solution of least
            norm.
        max_iter: Most iterations.
        tol: A sample stops when `||b - M x|| <= tol ||b||`.
    """
    scratch = None if torch.is_grad_enabled() else torch.empty_like(b)

    def plus(x: Tensor, step: Tensor, p: Tensor) -> Tensor:
        """Returns `x + step p`."""
        step = _per_sample(step, x)
        return x + step * p if scratch is None else x.add_(torch.mul(step, p, out=scratch))

    def dot(u: Tensor, v: Tensor) -> Tensor:
        """Returns inner products, shape `(B,)`."""
        return torch.mul(u, v, out=scratch).flatten(1).sum(1)

    # What is changed from here on is nobody else's.
    x, r = (torch.zeros_like(b), b.clone()) if x0 is None else (x0.clone(), b - apply(x0))
    p, rr = r.clone(), dot(r, r)
    # Beyond the precision's end the recursion has nothing left to divide, and would grow again.
    threshold = max(tol, torch.finfo(b.dtype).eps) ** 2 * dot(b, b)
    for _ in range(max_iter):
        active = rr > threshold
        if not active.any():
            break
        q = apply(p)
        curvature = dot(p, q)
        active = active & (curvature > 0)
        alpha = torch.where(active, rr / torch.where(active, curvature, 1.0), 0.0)
        x, r = plus(x, alpha, p), plus(r, -alpha, q)
        rr_next = dot(r, r)
        beta = torch.where(active, rr_next / torch.where(active, rr, 1.0), 0.0)
        p = r + _per_sample(beta, x) * p if scratch is None else p.mul_(_per_sample(beta, x)).add_(r)
        rr = rr_next
    return x


def _power_iteration(operator: LinearOperator, max_iter: int = 100, tol: float = 1e-6) -> float:
    """Returns `||A||_2`; stops when the Rayleigh quotient of `A^T A` grows by less than `tol` of itself."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, *operator.image_shape, generator=generator, dtype=torch.float64)
    x = x.to(operator.device, operator.dtype)
    value = 0.0
    for _ in range(max_iter):
        x = x / x.norm().clamp(min=torch.finfo(x.dtype).tiny)
        x = operator.normal(x)
        previous, value = value, float(x.norm())
        if value - previous <= tol * value:
            break
    return math.sqrt(value)


def _per_sample(value: Tensor, like: Any) -> Tensor:
    """Shapes a number or a `(B,)` tensor for broadcasting against `like`."""
    return value.reshape(-1, *(1,) * (like.ndim - 1))
