"""From measurements to images: the task behind `invrecon test` and `invrecon predict`."""

from __future__ import annotations

import math
import resource
import sys
import time
import warnings
from dataclasses import asdict, dataclass, replace
from typing import Any

import lightning
import torch
import torch.nn.functional as nnf
from torch import Tensor

from invrecon.adapt.base import Trace
from invrecon.data.cases import CaseBatch
from invrecon.data.intensity import Intensity
from invrecon.data.kspace import crop
from invrecon.errors import InputError
from invrecon.methods.base import Estimate, Method
from invrecon.methods.classical import FBP
from invrecon.methods.dip import NetworkFit
from invrecon.methods.sampling import UnconditionalSampler
from invrecon.metrics.image import body_mask, masked_psnr, psnr, ssim
from invrecon.metrics.mri import relative_magnitudes
from invrecon.operators.base import LinearOperator
from invrecon.operators.ct import CT, ct_from_geometry
from invrecon.operators.mri import MRI, CartesianMRI
from invrecon.operators.noise import NoiseModel, NoNoise, TransmissionPoisson
from invrecon.operators.sampling import achieved_acceleration
from invrecon.precision import check_precision, resolve_precision
from invrecon.priors.base import Prior
from invrecon.priors.layouts import Layout
from invrecon.priors.mirror import MirroredPrior
from invrecon.priors.patch import PatchPrior
from invrecon.priors.thirdparty.options import as_option
from invrecon.priors.weights import PriorCard, file_hash, load_prior
from invrecon.rng import Generators, make_generators
from invrecon.tasks.fits import TruthWatch, fit_traces
from invrecon.tasks.generation import seam_columns
from invrecon.tasks.priors import choose_prior, name_prior, warn_of_levels


@dataclass
class Result:
    """What one batch gave: arrays `(B, ...)` in intensity units, and a line of metrics a slice.

    Attributes:
        batch: The cases.
        estimate: What the method returned.
        reference: On the reconstruction's grid, or None.
        baseline: The operator's direct inverse, for the figures.
        rows: One dictionary a slice.
        traces: How the prior was adapted, or a network fitted, one a slice (the same one for slices that share an
            adapter), or None.
    """

    batch: CaseBatch
    estimate: Estimate
    reference: Tensor | None
    baseline: Tensor | None
    rows: list[dict[str, Any]]
    traces: list[Trace] | None = None


class Reconstruction(lightning.LightningModule):
    """Reconstructs cases by any method, with any prior and operator.

    A case with a reference is measured first (by the operator on the reference's own grid, then noise); the method
    sees the measurement alone. A case of a measurement file is reconstructed as it is, by the operator of its
    geometry. Every draw is a function of (seed, case), so batches and ranks change nothing.

    Args:
        operator: The physics; for measurement files, whose geometry is their own, the size of its images.
        method: Turns `y` into `x`.
        noise: Noise of simulated measurements; none by default.
        prior: A prior file, or the bare name of a shipped one; or a list of them, of which the first is taken that was
            trained up to the method's highest noise level. Methods without a prior leave it unread.
        precision: Of the prior's network: `32`, `bf16`, `16`, or `auto` for bfloat16 where the hardware has it and
            float32 elsewhere. State and operators are float32 always.
        seed: Of noise and sampling.
        num_figures: Slices a volume that `predict` draws.
        save_samples: Whether `predict` writes every posterior sample beside mean and standard deviation.
        layout: Where a patch prior lays its patches, instead of on a grid at one random offset an evaluation.
        mirror: Whether each evaluation of the prior is of the image or of its mirror image, at random; for images whose
            left and right are alike (`MirroredPrior`).

    Attributes:
        pool: Whether the cases of a batch share what is learned from them, so that batches decide numbers.
    """

    pool: bool = False

    def __init__(
        self,
        operator: LinearOperator,
        method: Method,
        noise: NoiseModel | None = None,
        prior: str | list[str] | None = None,
        precision: str = "auto",
        seed: int = 0,
        num_figures: int = 4,
        save_samples: bool = False,
        layout: Layout | None = None,
        mirror: bool = False,
    ) -> None:
        super().__init__()
        self.operator, self.method, self.noise = operator, method, noise or NoNoise()
        self.precision, self.seed = check_precision(precision), seed
        self.num_figures, self.save_samples = num_figures, save_samples
        self.prior: Prior | None = None
        self.card: PriorCard | None = None
        self.weights_sha256: str | None = None
        self.prior_name: str | None = None
        self._fine: dict[int, LinearOperator] = {}
        if method.needs_prior and prior is None:
            raise InputError(
                f"{type(method).__name__} needs a prior and model.prior is not set: give a prior file, or the name of "
                "a shipped one such as patch_ct."
            )
        self.layout, self.mirror = layout, mirror
        if layout is not None and prior is None:
            raise InputError(f"model.layout is {type(layout).__name__}, but no model.prior is set: give a patch prior.")
        # A configuration's prior stays behind when its method is replaced by one that asks none.
        if method.needs_prior and (path := choose_prior(prior, method.highest_level)) is not None:
            self.prior, self.card = load_prior(path)
            self.prior = self.prior if layout is None else lay_out(self.prior, layout)
            self.prior.denoiser.precision = precision  # type: ignore[union-attr]
            self.prior = MirroredPrior(self.prior) if mirror else self.prior
            self.weights_sha256, self.prior_name = file_hash(path), name_prior(path)

    def setup(self, stage: str) -> None:
        """Checks that prior, data, noise and operator speak of the same images.

        Raises:
            InputError: If the intensity scales, sizes or numbers of channels differ, or the noise is of other data.
        """
        self.noise.check(self.operator)
        if self.card is not None:
            self._check_prior(self.card)
        size = getattr(getattr(self._trainer, "datamodule", None), "size", None)
        if size is not None and self.operator.image_shape[1:] != (size, size):
            raise InputError(
                f"data.size is {size}, but the operator's images are {self.operator.image_shape[1:]}: set "
                "model.operator.size and data.size alike."
            )

    def _check_prior(self, card: PriorCard) -> None:
        intensity, channels = self._intensity(), card.network["image_channels"]
        if card.intensity != asdict(intensity):
            instead = "use a prior of this scale, or train one"
            if card.denoiser:  # someone else's: of its scale, the file says what was typed or assumed at its import
                instead += f"; or, if its images were of this scale, import it again with {as_option(intensity)}"
            raise InputError(
                f"The prior, {self.prior_name}, was trained on the intensity scale {card.intensity}, the data have "
                f"{asdict(intensity)}: {instead}"
                f"{', or set data.intensity like that of the prior' if self._generates() else ''}."
            )
        if channels != self.operator.image_shape[0]:
            raise InputError(
                f"The prior, {self.prior_name}, has {channels} image channels, {type(self.operator).__name__} has "
                f"{self.operator.image_shape[0]}: use a prior of such images"
                f"{', or set model.operator.num_channels' if self._generates() else ''}."
            )
        if self._generates() and channels == 2 and not self.operator.complex_images:
            raise InputError(
                "The prior's two channels are parts of complex numbers, and the operator's images are real: set "
                "model.operator.complex_images to true and model.method.clip to null."
            )
        warn_of_levels(card, str(self.prior_name), self.highest_level, self.label)

    def _generates(self) -> bool:
        return isinstance(self.method, UnconditionalSampler)

    def _intensity(self) -> Intensity:
        return getattr(getattr(self._trainer, "datamodule", None), "intensity", Intensity())

    def measure(self, batch: CaseBatch) -> tuple[Tensor | None, LinearOperator, Tensor | None]:
        """Returns measurements, the operator bound to them, and the reference on the reconstruction's grid.

        A reference `k` times finer than the reconstruction is measured on its own grid and block-averaged, so that
        no inverse crime is committed; one that came with a measurement is for judging alone. A case without either is
        one to generate: its measurement is None.
        """
        if batch.measurement is not None:
            return batch.measurement, self.operator.bind(batch), batch.reference
        x = batch.reference
        if x is None:
            return None, self.operator, None
        factor = x.shape[-1] // self.operator.image_shape[-1]
        operator = self.operator.bind(batch) if factor == 1 else self._finer(factor)
        generators = make_generators(self.seed, [f"noise/{name}" for name in batch.id])
        y, std = self.noise.sample(operator(x), generators, length_mm=self._length_mm(batch))
        return operator.restrict(y), self.operator.bind(replace(batch, noise_std=std)), nnf.avg_pool2d(x, factor)

    def _finer(self, factor: int) -> LinearOperator:
        if not isinstance(self.operator, CT):
            raise InputError(
                f"The reference is {factor} times finer than the images of {type(self.operator).__name__}, which "
                "cannot be put on a finer grid: convert the data, or set data.size and the operator's size to its own."
            )
        if factor not in self._fine:
            height, width = self.operator.image_shape[1:]
            fine = ct_from_geometry(self.operator.geometry, (height * factor, width * factor))
            self._fine[factor] = fine.to(self.device)
        return self._fine[factor]

    def _length_mm(self, batch: CaseBatch) -> Tensor | float:
        """Millimetres per unit of the operator's lengths: 1 unless the scan's field of view says otherwise."""
        if not isinstance(self.operator, CT):
            return 1.0
        if any(voxel is None for voxel in batch.voxel_mm):
            if isinstance(self.noise, TransmissionPoisson):
                warnings.warn(
                    f"{batch.source[0]} states no voxel size, on which photon noise depends: the field of view, "
                    f"{self.operator.field_of_view:g}, is taken as millimetres (model.operator.field_of_view).",
                    stacklevel=2,
                )
            return 1.0
        assert batch.reference is not None
        widths = [voxel[-1] * batch.reference.shape[-1] for voxel in batch.voxel_mm if voxel is not None]
        return torch.tensor(widths, device=self.device) / self.operator.field_of_view

    @property
    def highest_level(self) -> float:
        """The highest noise level at which the prior is asked."""
        return self.method.highest_level

    @property
    def label(self) -> str:
        """The method's name in tables and figures; the direct inverse has that of the operator's field."""
        return self.operator.baseline_name if type(self.method) is FBP else type(self.method).__name__

    def solve(
        self, y: Tensor | None, operator: LinearOperator, generators: Generators
    ) -> tuple[Estimate, list[Trace] | None]:
        """Returns the estimate, and how the prior was adapted to these cases if it was."""
        return self.method(y, operator, self.prior, generators=generators), None  # type: ignore[arg-type]

    def _fit(
        self, y: Tensor, operator: LinearOperator, generators: Generators, batch: CaseBatch, reference: Tensor | None
    ) -> tuple[Estimate, list[Trace] | None]:
        """Returns the estimate of a fitted network, and how it came to be, with the PSNR of iterates if known."""
        assert isinstance(self.method, NetworkFit)
        watch = None if reference is None else TruthWatch(lambda b, x: psnr_of(x, reference, batch, b))
        estimate = self.method(y, operator, self.prior, generators=generators, on_iterate=watch)
        return estimate, fit_traces(estimate, self.method, None if watch is None else watch.psnr)

    def reconstruct(self, batch: CaseBatch) -> Result:
        """Measures (if need be), reconstructs and judges a batch."""
        y, operator, reference = self.measure(batch)
        if y is None and not self._generates():
            raise InputError(
                f"There is no measurement for {type(self.method).__name__} to reconstruct from: draw samples by "
                "--model.method=UnconditionalSampler, or give --data=ReconstructionData with --data.paths."
            )
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # simulating the measurement is none of the method's time
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        generators = make_generators(self.seed, batch.id)
        if y is not None and isinstance(self.method, NetworkFit):
            estimate, traces = self._fit(y, operator, generators, batch, reference)
        else:
            estimate, traces = self.solve(y, operator, generators)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = (time.perf_counter() - start) / len(batch)
        if not torch.isfinite(estimate.mean).all():
            raise InputError(
                f"{type(self.method).__name__} gave NaN or Inf for {', '.join(batch.id)}: it diverged. Lower its step "
                "or weight, or use model.precision 32."
            )
        matrix = (batch.geometry or {}).get("matrix")
        estimate = estimate if batch.maps is None else seen(estimate, batch.maps)
        if matrix is not None:
            estimate = crop_estimate(estimate, matrix)
            reference = None if reference is None else crop(reference, matrix)
        columns: dict[str, list[Any]] = {}
        if reference is not None:
            pair = (estimate.mean, reference)
            shown, truth = relative_magnitudes(*pair) if reference.shape[1] == 2 else pair
            columns = {"psnr": psnr(shown, truth).tolist(), "ssim": ssim(shown, truth).tolist()}
            if self._intensity().units == "HU":  # a photograph has no patient in it
                columns["psnr_body"] = masked_psnr(estimate.mean, reference, body_mask(reference)).tolist()
        if self._generates():
            columns |= seam_columns(estimate.mean, self.prior)
        if isinstance(operator, MRI) and batch.mask is not None:
            if isinstance(operator, CartesianMRI):  # along a trajectory the mask is of no account
                columns["acceleration"] = [round(value, 4) for value in achieved_acceleration(batch.mask).tolist()]
            columns["scale"] = list(batch.scale)
            if reference is not None and any(batch.maximum):
                columns["max"] = list(batch.maximum)
        for name in ("relative_residual", "num_evaluations", "num_operator_calls", "num_iterations", "kept_iteration"):
            value = estimate.stats.get(name)
            if value is not None:
                columns[name] = value if isinstance(value, list) else [value] * len(batch)
        rows = []
        for b, name in enumerate(batch.id):
            row: dict[str, Any] = {
                "case": name.rsplit("/", 1)[0],
                "slice": batch.index[b],
                "patient": batch.patient[b],
                "method": self.label,
                **{key: values[b] for key, values in columns.items()},
                "seconds": seconds,
                "peak_memory_mb": _peak_memory_mb(self.device),
                "seed": self.seed,
                "measurement": self._measurement(batch, operator),
                **({} if traces is None else trace_columns(traces[b], b)),
            }
            rows.append(row)
        baseline = None if y is None else operator.baseline(y)
        baseline = baseline if matrix is None or baseline is None else crop(baseline, matrix)
        return Result(batch, estimate, reference, baseline, rows, traces)

    def _measurement(self, batch: CaseBatch, operator: LinearOperator) -> str:
        """Says in words what was measured, and how."""
        what = f"{type(operator).__name__}, {' x '.join(map(str, operator.measurement_shape[1:]))}"
        if isinstance(operator, MRI):
            coils = f"{operator.num_coils} coil{'s' * (operator.num_coils > 1)}"
            what = f"{type(operator).__name__}, {coils}, {' x '.join(map(str, operator.measurement_shape[1:-1]))}"
        if batch.measurement is not None:
            undersampled = batch.reference is not None and batch.mask is not None and not bool(batch.mask.all())
            return f"{what}, measured{', undersampled afterwards' if undersampled else ''}"
        if batch.reference is None:
            return "none"
        finer = batch.reference.shape[-1] // operator.image_shape[-1]
        grid = f" on a {finer} times finer grid" if finer > 1 else ""
        return f"{what}, {type(self.noise).__name__}, simulated{grid}"

    @torch.no_grad()
    def test_step(self, batch: CaseBatch, batch_index: int) -> Result:  # type: ignore[override]
        """Returns the result of a batch; the writer keeps its metrics.

        Raises:
            InputError: If the case has no reference to be tested against.
        """
        if batch.reference is None:
            raise InputError(
                f"{batch.source[0]} is a measurement without a reference, so there is nothing to test against: "
                "use `invrecon predict`."
            )
        return self.reconstruct(batch)

    @torch.no_grad()
    def predict_step(self, batch: CaseBatch, batch_index: int) -> Result:
        """Returns the result of a batch; the writer keeps its images and metrics."""
        return self.reconstruct(batch)

    def describe(self) -> dict[str, str]:
        """Returns the facts of the run for its report, in words."""
        prior = "none"
        if self.card is not None:
            sizes = f" of {self.card.patch_sizes[0]} pixels" if self.card.patch_sizes else ""
            layout = "" if self.layout is None else f" laid out by {type(self.layout).__name__}"
            layout += ", mirrored at random" if self.mirror else ""
            prior = f"{self.prior_name}: {self.card.kind}{sizes}{layout}, "
            prior += f"trained on {', '.join(self.card.data)} ({self.card.licence})"
        return {
            "method": type(self.method).__name__,
            "prior": prior,
            "precision of the prior": resolve_precision(self.precision, self.device),
            "seed": str(self.seed),
        }


def lay_out(prior: Prior, layout: Layout) -> PatchPrior:
    """Returns a patch prior of the same network with another layout.

    Raises:
        InputError: If it is no patch prior, or the network's stride does not divide the layout's patch size.
    """
    if not isinstance(prior, PatchPrior):
        raise InputError(
            f"model.layout is {type(layout).__name__}, but model.prior is a whole-image prior, which has no patches: "
            "leave the layout out, or give a patch prior such as patch_ct."
        )
    return PatchPrior(prior.denoiser, prior.patch_size, prior.max_patches, layout).eval()


def seen(estimate: Estimate, maps: Tensor) -> Estimate:
    """Returns an estimate with zeros where no coil sees anything: no data speak of it, and the reference is zero.

    Args:
        estimate: Of images `(B, 2, H, W)`.
        maps: `(B, coils, H, W, 2)`.
    """
    support = (maps.square().sum((1, -1)) > 0).to(estimate.mean)[:, None]
    samples = None if estimate.samples is None else support[:, None] * estimate.samples
    std = None if estimate.std is None else support * estimate.std
    return replace(estimate, mean=support * estimate.mean, samples=samples, std=std)


def crop_estimate(estimate: Estimate, matrix: tuple[int, int]) -> Estimate:
    """Returns an estimate with its images cropped."""
    samples, std = (None if x is None else crop(x, matrix) for x in (estimate.samples, estimate.std))
    return replace(estimate, mean=crop(estimate.mean, matrix), samples=samples, std=std)


def psnr_of(image: Tensor, reference: Tensor, batch: CaseBatch, case: int) -> float:
    """Returns the PSNR of an image of one case of the batch [dB], judged like its reconstruction."""
    x, truth, matrix = image, reference[case : case + 1], (batch.geometry or {}).get("matrix")
    x = x if batch.maps is None else seen(Estimate(x), batch.maps[case : case + 1]).mean
    if matrix is not None:
        x, truth = crop(x, matrix), crop(truth, matrix)
    return float(psnr(*(relative_magnitudes(x, truth) if truth.shape[1] == 2 else (x, truth))))


def trace_columns(trace: Trace, case: int = 0) -> dict[str, Any]:
    """Returns what `metrics.csv` says of an adaptation or a fit: losses are the last ones of the weights in use.

    Args:
        trace: How it went.
        case: Number of the case among those of the trace; losses of another one are not its own, and left out.
    """
    used = trace.steps[: trace.stopped_at + 1]
    own = trace.watched in (None, case)
    held_out = [loss for loss in (step.held_out_loss for step in used) if loss is not None and math.isfinite(loss)]
    columns = {
        "stopped_at": used[-1].name if used else "unadapted",
        "data_loss": used[-1].data_loss if used and own else None,
        "held_out_loss": held_out[-1] if held_out and own else None,
        "num_trainable": None if trace.steps and not trace.num_trainable else trace.num_trainable,  # of a prior
        "verdict": trace.verdict or None,
    }
    return {name: value for name, value in columns.items() if value is not None}


def _peak_memory_mb(device: torch.device) -> float:
    """Peak memory so far: of the process on a CPU, of this batch's allocations on a GPU, in [MiB]."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
