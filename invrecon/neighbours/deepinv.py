r"""deepinv: our operators as its physics, our priors as its denoisers, its linear physics as our operators.

    A(x) = A x,   A_adjoint(y) = A^T y,   A_dagger(y) = A^+ y,   denoiser(x, sigma) = D(x, sigma)

Both sides mean the same by these: images `(B, C, H, W)` on [0, 1], complex ones as two real channels, noise levels in
intensity units, `prox_l2(z, y, gamma)` with the weight on the data term. So nothing is rescaled on the way.

Source: the documentation and interfaces of deepinv 0.5 (`deepinv.physics.LinearPhysics`, `deepinv.models.Denoiser`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invrecon.errors import InputError
from invrecon.operators.base import LinearOperator
from invrecon.priors.base import Prior, broadcast
from invrecon.rng import make_generators

if TYPE_CHECKING:
    from deepinv.models import Denoiser
    from deepinv.physics import LinearPhysics

ADJOINT_TOLERANCE = 1e-3
SMALLEST_LEVEL = 1e-6  # at noise level 0 an image comes back as it is; networks take a logarithm


def to_deepinv(operator: LinearOperator, max_iter: int = 50, tol: float = 1e-6) -> LinearPhysics:
    """Returns a deepinv physics that measures by `operator`.

    Its `A_dagger` is our `pinv` and its `prox_l2` our `prox`: in closed form where the operator has one, else by CG.
    A noise level of the operator becomes Gaussian noise, which deepinv's samplers read and `physics(x)` adds.

    Args:
        operator: `A`; it stays shared, so that `physics.to(device)` moves it, too.
        max_iter: CG iterations of `A_dagger` and `prox_l2`, where a call names no other.
        tol: Relative residual at which CG stops, likewise.

    Raises:
        InputError: deepinv is missing, or the noise level differs from ray to ray.
    """
    physics_class, _ = _classes()
    return physics_class(operator, _noise_model(operator), max_iter, tol)


def denoiser_to_deepinv(prior: Prior, seed: int = 0) -> Denoiser:
    """Returns a deepinv denoiser, `forward(x, sigma)`, that is `D(x, sigma)` of `prior`.

    A patch prior draws new shifts at every call, image `i` of a batch from its own generator; `reset()` starts the
    draws again, so that a run can be repeated.

    Args:
        prior: `D`; it stays shared.
        seed: Of the prior's draws.

    Raises:
        InputError: deepinv is missing; later, at a call, a noise level is negative or there is not one an image.
    """
    _, denoiser_class = _classes()
    return denoiser_class(prior, seed)


def from_deepinv(
    physics: LinearPhysics, image_shape: tuple[int, ...], complex_images: bool | None = None
) -> LinearOperator:
    """Returns an operator that measures by a linear physics of deepinv.

    Pseudo-inverse and proximal map are solved by our CG; `baseline`, the direct reconstruction, is `A_dagger` (filtered
    back-projection in tomography). Gaussian noise of the physics becomes `noise_std`, until a case brings its own.

    Args:
        physics: `A`; it stays shared.
        image_shape: Shape of one image, `(C, H, W)`.
        complex_images: Whether the two channels of an image are the parts of complex numbers, whose negative values
            methods keep; if None, where the physics is one of MRI, or an operator of ours that says so.

    Raises:
        InputError: The physics is not linear, does not take such images, measures anything but real tensors, has an
            `A_adjoint` that is no transpose, or noise that is not Gaussian.
    """
    return DeepinvOperator(physics, image_shape, complex_images)


class DeepinvOperator(LinearOperator):
    """`A` of a deepinv physics; made by `from_deepinv`.

    Args:
        physics: A `deepinv.physics.LinearPhysics`.
        image_shape: Shape of one image, `(C, H, W)`.
        complex_images: Whether its two channels are the parts of complex numbers; as the physics says if None.
    """

    def __init__(
        self, physics: LinearPhysics, image_shape: tuple[int, ...], complex_images: bool | None = None
    ) -> None:
        name = type(physics).__name__
        if not isinstance(physics, load_deepinv().physics.LinearPhysics):
            raise InputError(f"{name} is no deepinv.physics.LinearPhysics, and an operator here is linear.")
        tensors = [t for t in (*physics.parameters(), *physics.buffers()) if t.is_floating_point()]
        anchor = torch.empty(0).to(tensors[0]) if tensors else torch.empty(0)
        x = torch.randn(1, *image_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(anchor)
        with torch.no_grad():
            y = _measure(physics, x)
            _check_adjoint(physics, x, y)
        if complex_images and image_shape[0] != 2:
            raise InputError(f"Complex images have two channels, got image_shape {tuple(image_shape)}.")
        super().__init__(tuple(image_shape), tuple(y.shape[1:]))
        self.physics = physics
        self._anchor = anchor
        self.noise_std = _noise_std(physics)
        self.complex_images = _has_complex_images(physics, image_shape) if complex_images is None else complex_images

    def forward(self, x: Tensor) -> Tensor:
        """Returns `A x`."""
        self._check(x, self.image_shape, "images")
        return self.physics.A(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """Returns `A^T y`."""
        self._check(y, self.measurement_shape, "measurements")
        return self.physics.A_adjoint(y)

    def baseline(self, y: Tensor) -> Tensor:
        """Returns the physics' own inverse, `A_dagger(y)`."""
        return self.physics.A_dagger(y)


def load_deepinv() -> Any:
    """Returns the module.

    Raises:
        InputError: It is not installed, or what it imports is not.
    """
    try:
        import deepinv
    except (ImportError, RuntimeError) as error:  # a torchvision made for another torch raises the latter
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"deepinv cannot be imported ({reason}): `pip install deepinv`, and the torchvision that belongs to torch "
            f"{torch.__version__}."
        ) from None
    return deepinv


@cache
def _classes() -> tuple[type[Any], type[Any]]:
    """Returns the physics and the denoiser, whose base classes are there only once deepinv is."""
    deepinv = load_deepinv()
    physics_base: Any = deepinv.physics.LinearPhysics
    denoiser_base: Any = deepinv.models.Denoiser

    # deepinv hands every keyword of a call on to each of its parts, so all of them put up with those of others.
    class OperatorPhysics(physics_base):
        """A physics that measures by one of our operators."""

        def __init__(self, operator: LinearOperator, noise_model: Any, max_iter: int, tol: float) -> None:
            super().__init__(img_size=operator.image_shape, noise_model=noise_model, max_iter=max_iter, tol=tol)
            self.operator = operator

        def A(self, x: Tensor, **others: object) -> Tensor:  # noqa: N802 - deepinv's name, as those below
            """Returns `A x`."""
            return self.operator(x)

        def A_adjoint(self, y: Tensor, **others: object) -> Tensor:  # noqa: N802
            """Returns `A^T y`."""
            return self.operator.adjoint(y)

        def A_adjoint_A(self, x: Tensor, **others: object) -> Tensor:  # noqa: N802
            """Returns `A^T A x`."""
            return self.operator.normal(x)

        def A_dagger(  # noqa: N802
            self,
            y: Tensor,
            solver: str = "CG",
            max_iter: int | None = None,
            tol: float | None = None,
            **others: object,
        ) -> Tensor:
            """Returns `A^+ y`."""
            return self.operator.pinv(y, max_iter=max_iter or self.max_iter, tol=self.tol if tol is None else tol)

        def prox_l2(
            self,
            z: Tensor | float | None,
            y: Tensor,
            gamma: float | Tensor,
            solver: str = "CG",
            max_iter: int | None = None,
            tol: float | None = None,
            **others: object,
        ) -> Tensor:
            """Returns `argmin_x gamma/2 ||A x - y||^2 + 1/2 ||x - z||^2`."""
            if not isinstance(z, Tensor):
                z = torch.full((len(y), *self.operator.image_shape), float(z or 0), dtype=y.dtype, device=y.device)
            iterations, stop = max_iter or self.max_iter, self.tol if tol is None else tol
            return self.operator.prox(z, y, gamma, max_iter=iterations, tol=stop)

    class PriorDenoiser(denoiser_base):
        """A denoiser that is one of our priors."""

        def __init__(self, prior: Prior, seed: int) -> None:
            super().__init__()
            self.prior, self.seed = prior, seed
            self.reset()

        def reset(self) -> None:
            """Starts the prior's draws again."""
            self._generators: list[torch.Generator] = []

        def forward(self, x: Tensor, sigma: Any, **others: object) -> Tensor:
            """Returns `D(x, sigma)`, with `sigma` a number or one an image, of any shape."""
            num, drawn = len(x), len(self._generators)
            levels = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1)
            if len(levels) not in (1, num) or not (levels >= 0).all():
                raise InputError(
                    f"A denoiser takes one noise level, or one an image, at least 0; got {levels.tolist()[:8]} for "
                    f"{num} images."
                )
            levels = levels.expand(num)
            self._generators += make_generators(self.seed, [str(i) for i in range(drawn, num)])
            x0 = self.prior(x, levels.clamp(min=SMALLEST_LEVEL), generators=self._generators[:num])
            return torch.where(broadcast(levels > 0, x), x0, x)

    return OperatorPhysics, PriorDenoiser


def _noise_model(operator: LinearOperator) -> Any:
    """Returns deepinv's noise of an operator's noise level, one number or one an image."""
    noise = load_deepinv().physics
    std = operator.noise_std
    if std is None:
        return noise.ZeroNoise()
    if std.ndim and std.numel() not in (1, len(std)):
        raise InputError(
            f"deepinv's Gaussian noise has one level an image, the operator's noise_std has shape {tuple(std.shape)}: "
            "take the operator and the measurement that `whiten` returns."
        )
    return noise.GaussianNoise(std.reshape(-1))


def _noise_std(physics: Any) -> Tensor | None:
    """Returns the standard deviation of a physics' noise, `(1,)` or `(B,)`, or None."""
    model, known = physics.noise_model, load_deepinv().physics
    if isinstance(model, known.ZeroNoise):
        return None
    if isinstance(model, known.GaussianNoise):
        sigma = model.sigma.reshape(-1)
        return sigma if sigma.any() else None
    raise InputError(
        f"The physics has {type(model).__name__}, and a noise level here is that of Gaussian noise: set its "
        "noise_model to deepinv.physics.ZeroNoise() or GaussianNoise(std)."
    )


def _call(function: Callable[[Tensor], Any], argument: Tensor, failure: str) -> Any:
    """Returns `function(argument)`, or raises `InputError` with what failed and why."""
    try:
        return function(argument)
    except (RuntimeError, ValueError, IndexError, AssertionError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{failure} ({reason}): give its image_shape.") from None


def _measure(physics: Any, x: Tensor) -> Tensor:
    """Returns `A x`, `(1, *measurement_shape)`."""
    name, shape = type(physics).__name__, tuple(x.shape[1:])
    y = _call(physics.A, x, f"{name} does not measure images of shape {shape}")
    if not isinstance(y, Tensor) or not y.is_floating_point() or y.ndim < 2 or len(y) != 1:
        what = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise InputError(
            f"{name} measures {what} in one image of shape {shape}, and an operator here gives one real tensor "
            "(1, ...): take its parts one by one, complex numbers as two real channels."
        )
    return y


def _has_complex_images(physics: Any, image_shape: tuple[int, ...]) -> bool:
    """Says whether the channels of a physics' images are the parts of complex numbers: it is of MRI, or one of ours."""
    own = getattr(physics, "operator", None)
    if isinstance(own, LinearOperator):
        return own.complex_images
    known = load_deepinv().physics
    kinds = tuple(getattr(known, name) for name in ("MRI", "MultiCoilMRI") if hasattr(known, name))
    return image_shape[0] == 2 and isinstance(physics, kinds)


def _check_adjoint(physics: Any, x: Tensor, y: Tensor) -> None:
    """Raises `InputError` unless `<A x, v> = <x, A^T v>`, for a `v` that knows nothing of `x`, and for `A x`."""
    name = type(physics).__name__
    v = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    for measurement in (y, v):
        what = f"A_adjoint of {name} does not take what its A gives of images of shape {tuple(x.shape[1:])}"
        back = _call(physics.A_adjoint, measurement, what)
        if not isinstance(back, Tensor) or back.shape != x.shape:
            shape = tuple(back.shape[1:]) if isinstance(back, Tensor) else type(back).__name__
            raise InputError(
                f"A_adjoint of {name} gives {shape} where A takes images of shape {tuple(x.shape[1:])}: give its "
                "image_shape, or mend it."
            )
        left, right = (y.double() * measurement.double()).sum(), (x.double() * back.double()).sum()
        # `<A x, v>` may all but vanish: what it could be is the measure of an error.
        size = y.double().norm() * measurement.double().norm()
        if not (left - right).abs() <= ADJOINT_TOLERANCE * size:  # nor if one of them is NaN
            raise InputError(
                f"A_adjoint of {name} is not the transpose of its A (<A x, v> is {float(left):.6g}, <x, A^T v> is "
                f"{float(right):.6g}, up to {float(size):.6g} in size), and methods here rely on it: mend it, or leave "
                "A_adjoint to deepinv's adjoint_function."
            )
