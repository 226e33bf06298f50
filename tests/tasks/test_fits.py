"""A fit tells where it stopped, in the tables and figures of an adaptation."""

import json
import math

import pytest
import torch

from invrecon.data.cases import CaseBatch
from invrecon.files import to_json
from invrecon.methods.dip import (
    DIP,
    AllIterations,
    Curve,
    DIPUNet,
    DiscrepancyStop,
    FittedEstimate,
    HeldOutStop,
    Quantity,
    StoppingRule,
    WindowedVarianceStop,
)
from invrecon.methods.dip.measurement import CaseData
from invrecon.metrics.image import psnr
from invrecon.operators import CartesianMRI, LinearOperator, ParallelBeamCT
from invrecon.report.adaptation import encode_trace
from invrecon.tasks.fits import MAX_STEPS, TruthWatch, fit_traces
from invrecon.tasks.reconstruction import Reconstruction

SIZE = 16
HELD_OUT = Quantity("held_out_loss", "held-out rows")


def blob() -> torch.Tensor:
    x = torch.zeros(1, 1, SIZE, SIZE)
    x[:, :, 5:11, 4:9] = 0.5
    return x


def estimate(*curves: Curve) -> FittedEstimate:
    return FittedEstimate(torch.zeros(len(curves), 1, 2, 2), stats={}, curves=list(curves))


@pytest.mark.parametrize("num", [1, 2, MAX_STEPS, 5000])
@pytest.mark.parametrize("where", [0.0, 0.37, 1.0])
def test_the_kept_iteration_is_marked_however_long_the_curve(num: int, where: float) -> None:
    kept = 1 + round(where * (num - 1))
    curve = Curve([1.0 / (i + 1) for i in range(num)], [2.0 + i for i in range(num)], kept, HELD_OUT)
    (trace,) = fit_traces(estimate(curve), DIP(stop=HeldOutStop()))
    assert trace.steps[trace.stopped_at].name == f"iteration {kept}"
    assert len(trace.steps) <= MAX_STEPS + 1 and trace.steps[-1].name == f"iteration {num}"
    assert trace.steps[trace.stopped_at].data_loss == 1 / kept
    assert trace.steps[trace.stopped_at].held_out_loss == 1.0 + kept
    assert trace.reason == f"of {num} iterations, by HeldOutStop"


def test_what_a_rule_measures_otherwise_is_no_loss_of_held_out_data() -> None:
    numbers = [3.0, 2.0, 1.0], [math.nan, 5.0, 4.0], 3
    for quantity in (None, Quantity("discrepancy", "discrepancy", threshold=1.0)):
        (other,) = fit_traces(estimate(Curve(*numbers, quantity)), DIP(stop=AllIterations()))
        assert [step.held_out_loss for step in other.steps] == [None, None, None]
    (watched,) = fit_traces(estimate(Curve(*numbers, HELD_OUT)), DIP(stop=HeldOutStop()))
    assert [step.held_out_loss for step in watched.steps] == [None, 5.0, 4.0]


@pytest.mark.parametrize(
    ("stop", "name", "threshold"),
    [
        (DiscrepancyStop(1.1), "discrepancy", 1.1),
        (WindowedVarianceStop(window=3), "windowed_variance", None),
        (HeldOutStop(), "held_out_loss", None),
        (AllIterations(), None, None),
    ],
)
def test_what_a_rule_follows_is_told_under_its_name(
    stop: StoppingRule, name: str | None, threshold: float | None
) -> None:
    operator = ParallelBeamCT(SIZE, num_views=12, num_bins=24)
    operator.noise_std = torch.tensor([1e-3])
    y = operator(blob())
    fitted = DIP(network=DIPUNet([4, 8]), num_iterations=6, stop=stop)(y, operator)
    record = json.loads(to_json(encode_trace(*fit_traces(fitted, DIP(stop=stop)), ["a/0000"])))
    assert set(record["curves"]) == {"data_loss", name} - {None}
    if name is None:
        return
    assert record["curves"][name]["threshold"] == threshold
    (curve,) = fitted.curves
    assert curve.quantity is not None
    expected = [value / curve.quantity.unit if math.isfinite(value) else None for value in curve.value]
    assert [step[name] for step in record["steps"]] == expected and len(expected) == 6
    assert [value is None for value in expected] == [name == "windowed_variance" and i < 2 for i in range(6)]


@pytest.mark.parametrize("rule", ["HeldOutStop", "DiscrepancyStop"])
def test_the_truth_is_watched_and_changes_nothing(rule: str) -> None:
    operator = ParallelBeamCT(SIZE, num_views=12, num_bins=24)
    operator.noise_std = torch.tensor([1e-3])
    x = blob()
    stop = HeldOutStop() if rule == "HeldOutStop" else DiscrepancyStop()
    method = DIP(network=DIPUNet([4, 8]), num_iterations=13, stop=stop)
    watch = TruthWatch(lambda case, image: float(psnr(image, x[case : case + 1])))
    watched, alone = method(operator(x), operator, on_iterate=watch), method(operator(x), operator)
    assert torch.equal(watched.mean, alone.mean) and watched.curves == alone.curves
    (trace,) = fit_traces(watched, method, watch.psnr)
    record = json.loads(to_json(encode_trace(trace, ["a/0000"])))
    assert list(record["curves"])[-1] == "psnr" and "not used by the rule" in record["curves"]["psnr"]["label"]
    found = {step["name"]: step["psnr"] for step in record["steps"] if step["psnr"] is not None}
    assert list(found) == ["iteration 1", "iteration 6", "iteration 11"] and found["iteration 11"] > 0
    assert record["steps"][-1]["name"] == "iteration 13"
    assert record["steps"][record["stopped_at"]]["name"] == f"iteration {watched.curves[0].kept}"


@pytest.mark.parametrize("kind", ["ct", "mri"])
def test_what_is_fitted_and_what_is_held_out_are_in_one_unit(kind: str) -> None:
    """Of an image that is 0.9 times the truth, both relative losses are 0.01, whatever the measurement's own unit."""
    x = blob() if kind == "ct" else torch.cat([blob(), -blob()], 1)
    operator: LinearOperator = ParallelBeamCT(SIZE, num_views=12, num_bins=24)
    if kind == "mri":
        operator = mri = CartesianMRI(SIZE)
        mri._set_mask((torch.arange(SIZE) % 2 == 0).float()[None, None])
    y = 1e3 * operator(x)
    stop = HeldOutStop()
    data = CaseData(y, operator, stop, torch.Generator().manual_seed(0))
    monitor = stop.monitor(data)
    residual = operator(900 * x) - data.y
    monitor(1, 900 * x, residual)
    curve = Curve([float(data.misfit(residual))], [monitor.value], 1, monitor.quantity)
    (trace,) = fit_traces(estimate(curve), DIP(stop=stop))
    assert trace.steps[0].data_loss == pytest.approx(0.01, rel=1e-4)
    assert trace.steps[0].held_out_loss == pytest.approx(0.01, rel=1e-4)
    labels = [own["label"] for own in encode_trace(trace, ["a/0000"])["curves"].values()]
    assert labels == ["fitted rows", "held-out rows" if kind == "ct" else "all of k-space, by its held-out rows"]


def test_rows_of_a_fit_say_where_it_stopped() -> None:
    operator = ParallelBeamCT(SIZE, num_views=12, num_bins=24)
    x = blob().expand(2, -1, -1, -1)
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
