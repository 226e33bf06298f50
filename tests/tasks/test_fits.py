"""A fit tells where it stopped, in the tables and figures of an adaptation."""

import math

import pytest
import torch

from invrecon.data.cases import CaseBatch
from invrecon.methods.dip import DIP, AllIterations, Curve, DIPUNet, FittedEstimate, HeldOutStop
from invrecon.operators import ParallelBeamCT
from invrecon.tasks.fits import MAX_STEPS, fit_traces
from invrecon.tasks.reconstruction import Reconstruction

SIZE = 16


def estimate(*curves: Curve) -> FittedEstimate:
    return FittedEstimate(torch.zeros(len(curves), 1, 2, 2), stats={}, curves=list(curves))


@pytest.mark.parametrize("num", [1, 2, MAX_STEPS, 5000])
@pytest.mark.parametrize("where", [0.0, 0.37, 1.0])
def test_the_kept_iteration_is_marked_however_long_the_curve(num: int, where: float) -> None:
    kept = 1 + round(where * (num - 1))
    curve = Curve([1.0 / (i + 1) for i in range(num)], [2.0 + i for i in range(num)], kept)
    (trace,) = fit_traces(estimate(curve), DIP(stop=HeldOutStop()))
    assert trace.steps[trace.stopped_at].name == f"iteration {kept}"
    assert len(trace.steps) <= MAX_STEPS + 1 and trace.steps[-1].name == f"iteration {num}"
    assert trace.steps[trace.stopped_at].data_loss == 1 / kept
    assert trace.steps[trace.stopped_at].held_out_loss == 1.0 + kept
    assert trace.reason == f"of {num} iterations, by HeldOutStop"


def test_what_a_rule_measures_otherwise_is_no_loss_of_held_out_data() -> None:
    curve = Curve([3.0, 2.0, 1.0], [math.nan, 5.0, 4.0], 3)
    (plain,) = fit_traces(estimate(curve), DIP(stop=AllIterations()))
    assert [step.held_out_loss for step in plain.steps] == [None, None, None]
    (watched,) = fit_traces(estimate(curve), DIP(stop=HeldOutStop()))
    assert [step.held_out_loss for step in watched.steps] == [None, 5.0, 4.0]


def test_rows_of_a_fit_say_where_it_stopped() -> None:
    operator = ParallelBeamCT(SIZE, num_views=12, num_bins=24)
    x = torch.zeros(2, 1, SIZE, SIZE)
    x[:, :, 5:11, 4:9] = 0.5
    batch = CaseBatch(
        id=["a/0000", "a/0001"], index=[0, 1], patient=["a"] * 2, source=["a.h5"] * 2, voxel_mm=[None] * 2, reference=x
    )
    task = Reconstruction(operator, DIP(network=DIPUNet([4, 8]), num_iterations=12))
    result = task.reconstruct(batch)
    assert result.traces is not None and len(result.traces) == 2
    for row, trace in zip(result.rows, result.traces, strict=True):
        assert row["stopped_at"] == f"iteration {row['kept_iteration']:.0f}" and row["num_iterations"] <= 12
        assert row["held_out_loss"] > 0 and row["data_loss"] > 0 and "num_trainable" not in row
        held_out = [step.held_out_loss for step in trace.steps]
        assert held_out[trace.stopped_at] == min(held_out), "by views that the fit did not see"
