"""How the benchmark of fitted networks watches them: fits that go on after their stop, and curves of their iterates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import _common, _mri
from benchmarks._common import FEW_SLICES, Bench, Entry, Row, Setting
from benchmarks._mri import MRIBench, MRISetting
from invrecon.data.cases import CaseBatch
from invrecon.methods import Method
from invrecon.methods.base import Estimate
from invrecon.methods.dip import FittedEstimate, Iterate, Monitor, NetworkFit, StoppingRule
from invrecon.methods.dip.measurement import CaseData
from invrecon.metrics.image import psnr
from invrecon.metrics.mri import relative_magnitudes
from invrecon.operators import LinearOperator, NoiseModel, NoNoise
from invrecon.tasks.reconstruction import Result, seen

EVERY = 25  # iterations between points of a curve


@dataclass(frozen=True, kw_only=True)
class CTSetting(Setting):
    """CT of slices of a file of the benchmark data."""

    noise: NoiseModel = field(default_factory=NoNoise)
    file: str = _common.HELD_OUT
    slices: str = FEW_SLICES


class Continued(StoppingRule):
    """Keeps the iterate that a rule would have kept, and lets the fit go on, to see what would have become of it.

    Args:
        rule: What chooses.
    """

    def __init__(self, rule: StoppingRule) -> None:
        self.rule = rule

    def split(self, operator: LinearOperator, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self.rule.split(operator, rows, generator)

    def monitor(self, data: CaseData) -> Monitor:
        return _ContinuedMonitor(self.rule.monitor(data))


class _ContinuedMonitor(Monitor):
    """Asks a monitor until it says to stop, and never stops."""

    def __init__(self, monitor: Monitor) -> None:
        super().__init__()
        self.monitor, self.over = monitor, False

    def __call__(self, iteration: int, x: Tensor, residual: Tensor) -> bool:
        if not self.over:
            self.over = self.monitor(iteration, x, residual)
            self.image, self.iteration, self.value = self.monitor.image, self.monitor.iteration, self.monitor.value
        return False


class Watched(Method):
    """A fit that keeps what it passed through: nothing else differs.

    Attributes:
        iterates: Every `every`-th iterate and the last, of each case.

    Args:
        fit: What reconstructs.
        every: Iterations between iterates that are kept.
    """

    def __init__(self, fit: NetworkFit, every: int) -> None:
        self.fit, self.every, self.needs_prior = fit, every, fit.needs_prior
        self.iterates: dict[int, list[Iterate]] = {}

    def __call__(self, y: Tensor, operator: LinearOperator, prior: Any = None, *, generators: Any = None) -> Estimate:
        """Reconstructs a batch; see `NetworkFit.__call__`."""
        self.iterates = {}
        return self.fit(y, operator, prior, generators=generators, on_iterate=self._look)

    def _look(self, iterate: Iterate) -> None:
        if iterate.iteration % self.every == 0 or iterate.iteration == self.fit.num_iterations:
            self.iterates.setdefault(iterate.case, []).append(iterate)


class DIPBench(MRIBench):
    """Runs methods on CT and on MRI, and adds to the rows of fits how they went."""

    def task(self, setting: Setting, *arguments: Any) -> Any:
        """Returns the task of the setting's physics."""
        kind = MRIBench if isinstance(setting, MRISetting) else Bench
        return kind.task(self, setting, *arguments)

    def operator(self, setting: Setting) -> LinearOperator:
        """Returns the setting's physics."""
        kind = MRIBench if isinstance(setting, MRISetting) else Bench
        return kind.operator(self, setting)

    def identity(self, setting: Setting, *arguments: Any, **more: Any) -> str:
        """Returns the fingerprint of all that decides a row; how many other slices there are does not."""
        if isinstance(setting, MRISetting):
            return MRIBench.identity(self, replace(setting, num_slices=1), *arguments, **more)
        return Bench.identity(self, setting, *arguments, **more)

    def reconstruct(self, setting: Setting, entry: Entry, batch: CaseBatch) -> Result:
        """Returns the result of a batch."""
        if not isinstance(entry.method, NetworkFit):
            return super().reconstruct(setting, entry, batch)
        watched = Watched(entry.method, EVERY)
        result = super().reconstruct(setting, replace(entry, method=watched), batch)
        for case, row in enumerate(result.rows):
            row |= curve_columns(result, watched.iterates[case], case)
        return result


def curve_columns(result: Result, iterates: Sequence[Iterate], case: int) -> Row:
    """Returns how good iterates were [dB], judged as the row's own PSNR, and the iteration that was kept."""
    assert isinstance(result.estimate, FittedEstimate) and result.reference is not None
    truth, maps = result.reference[case : case + 1], result.batch.maps
    found = []
    for iterate in iterates:
        x = iterate.image
        if maps is not None:
            x = seen(Estimate(x), maps[case : case + 1].to(x.device)).mean
        shown = relative_magnitudes(x, truth) if truth.shape[1] == 2 else (x, truth)
        found.append(float(psnr(*shown)))
    own = result.rows[case]["psnr"]
    return {
        "iterations": [iterate.iteration for iterate in iterates],
        "psnr_trace": [round(value, 4) for value in found],
        "value_trace": [iterate.value if math.isfinite(iterate.value) else None for iterate in iterates],
        "best_psnr": max([own, *found]),
        "last_psnr": found[-1],
        "kept_iteration": result.estimate.curves[case].kept,
    }


def load_batches(setting: CTSetting | MRISetting, size: int, most: int | None) -> list[CaseBatch]:
    """Returns the setting's slices, one a batch: a fit has one image."""
    if isinstance(setting, MRISetting):
        own = setting if most is None else replace(setting, num_slices=min(setting.num_slices, most))
        return _mri.load_batches(own, 0, size, 1)
    return _common.load_batches(setting.file, setting.slices, size, 1)[:most]
