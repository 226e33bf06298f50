"""The figure of an adaptation is drawn, complete, and survives odd traces; its caption says what happened."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from invrecon.adapt.base import Step, Trace
from invrecon.files import to_json
from invrecon.methods.dip import Quantity
from invrecon.report import adaptation, sheet
from invrecon.report.adaptation import (
    adaptation_figure,
    choose_steps,
    describe_trace,
    encode_trace,
    is_fit,
    step_images,
)
from invrecon.tasks.fits import FITTED, PSNR, FitStep, FitTrace


def make_trace(num_steps: int = 4, with_images: bool = True, **changes) -> Trace:
    image = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0)) if with_images else None
    steps = [Step(f"round {k}", None, 2.0**-k, 1.5 * 2.0**-k, image) for k in range(num_steps)]
    movement = {f"encoder.{k}.blocks.first_convolution_of_{k}": 0.1 / (k + 1) for k in range(30)}
    values = {"stopped_at": 2, "reason": "the held-out loss rose", "num_trainable": 1234, "movement": movement}
    return Trace(steps, **{**values, **changes})


def encoded(trace: Trace) -> tuple[dict, np.ndarray | None]:
    """As it comes back from a part file."""
    record = encode_trace(trace, ["lung/0003"], with_images=True)
    images = step_images(trace, record["shown"])[:, 0].numpy() * 3000 - 1000 if record["shown"] else None
    return json.loads(to_json(record)), images


def draw(tmp_path, trace: Trace) -> tuple[int, int]:
    path = adaptation_figure(tmp_path / "a.png", *encoded(trace), title="lung, slice 3: $adaptation", subtitle="Ours")
    with Image.open(path) as image:
        image.verify()
        return image.size


@pytest.mark.parametrize(("num_steps", "rows"), [(4, 2), (5, 3), (30, 3)])
def test_a_row_of_plots_and_rows_of_estimates(tmp_path, num_steps, rows):
    width, height = draw(tmp_path, make_trace(num_steps))
    panels = (height / sheet.DPI - sheet.TOP - sheet.MARGIN + sheet.GAP) / (sheet.PANEL + sheet.GAP)
    assert panels == pytest.approx(rows, abs=0.02)
    columns = (width / sheet.DPI - sheet.LEFT - sheet.MARGIN + sheet.GAP) / (sheet.PANEL + sheet.GAP)
    assert columns == pytest.approx(4, abs=0.02)


def texts_of(monkeypatch, tmp_path, trace: Trace) -> str:
    """Every text in the figure."""
    from matplotlib.text import Text

    found: list[str] = []
    save = adaptation.AdaptationSheet.save

    def spy(self, path):
        found.extend(text.get_text() for text in self.figure.findobj(Text))
        return save(self, path)

    monkeypatch.setattr(adaptation.AdaptationSheet, "save", spy)
    draw(tmp_path, trace)
    return " ".join(" ".join(found).replace("\u200a", "").split())


def test_it_says_where_it_stopped_and_what_moved(monkeypatch, tmp_path):
    words = texts_of(monkeypatch, tmp_path, make_trace(verdict="the prior does not suit"))
    for expected in (
        *("The result is that of “round 2” (the held-out loss rose).", "The prior does not suit.", "round 3", "10 %"),
        *("20 OF 30 LAYERS", "encoder.0.blocks…", "held out", "Ours", "lung, slice 3: $adaptation", "ESTIMATES"),
    ):
        assert expected in words
    assert "encoder.25" not in words


def test_a_fit_has_losses_alone(monkeypatch, tmp_path):
    steps = [Step(f"iteration {1 + 25 * k}", None, 2.0**-k, 1.5 * 2.0**-k) for k in range(12)]
    trace = Trace(steps, stopped_at=5, reason="of 276 iterations, by HeldOutStop")
    words = texts_of(monkeypatch, tmp_path, trace)
    assert "LOSS ALONG THE WAY" in words and "MOVEMENT" not in words and "no layer" not in words
    assert "iteration 276" in words and "held out" in words
    record = encode_trace(trace, ["lung/0003"])
    assert is_fit(record) and not is_fit(encode_trace(make_trace(), ["lung/0003"]))
    assert describe_trace(record) == "The result is that of “iteration 126” (of 276 iterations, by HeldOutStop)."


def test_a_fit_shows_what_its_rule_followed(monkeypatch, tmp_path):
    held_out = Quantity("held_out_loss", "held-out rows")
    for quantity in (held_out, Quantity("discrepancy", "discrepancy, of fitted rows", threshold=1.25)):
        steps = [FitStep(f"iteration {k + 1}", None, 2.0**-k, values={"discrepancy": 9.0 / (k + 1)}) for k in range(8)]
        trace = FitTrace(steps, stopped_at=7, reason="of 8 iterations", curves=[FITTED, quantity])
        words = texts_of(monkeypatch, tmp_path, trace)
        shown = quantity is not held_out
        assert "fitted rows" in words and "measurement" not in words
        assert ("DISCREPANCY" in words) == ("discrepancy, of fitted rows" in words) == shown
        assert ("stops at 1.25" in words) == shown


def test_a_fit_shows_the_quality_of_its_iterates_where_there_is_a_truth(monkeypatch, tmp_path):
    steps = [
        FitStep(f"iteration {k + 1}", None, 2.0**-k, values={"psnr": None if k % 2 else k - 3.0}) for k in range(8)
    ]
    trace = FitTrace(steps, stopped_at=7, reason="of 8 iterations", curves=[FITTED, PSNR])
    lines: dict[str, list[float]] = {}
    along = adaptation.AdaptationSheet._along

    def spy(self, axes, *args, **more):
        along(self, axes, *args, **more)
        lines.update({line.get_label(): list(line.get_ydata()) for line in axes.lines})

    monkeypatch.setattr(adaptation.AdaptationSheet, "_along", spy)
    assert "PSNR" in texts_of(monkeypatch, tmp_path, trace)
    assert lines["PSNR [dB], not used by the rule"] == [-3.0, -1.0, 1.0, 3.0] and len(lines["fitted rows"]) == 8


def test_a_value_that_was_never_measured_is_no_plot(monkeypatch, tmp_path):
    curves = [FITTED, Quantity("windowed_variance", "variance of the last 100 images")]
    trace = FitTrace([FitStep("iteration 1", None, 1.0, values={"windowed_variance": None})], 0, "of 1", curves=curves)
    assert "no value was recorded" in texts_of(monkeypatch, tmp_path, trace)


@pytest.mark.parametrize(
    "trace",
    [
        Trace(),
        Trace(reason="not adapted: the prior suits the measurement", verdict="in distribution"),
        make_trace(with_images=False),
        make_trace(1),
        make_trace(movement={"head": math.inf, "first": 0.1, "still": 0.0}),
        make_trace(movement={"still": 0.0}, stopped_at=-1),
        Trace([Step("a", 0.1, 0.0), Step("b", 0.1, math.nan, math.inf)]),
        Trace([Step("a", 0.1, 1.0), Step("b", 0.1, 1.0)], 1, "long reason " * 40),
        Trace([Step("a", 0.1, 1e-30), Step("b", 0.1, 1e10)], 1),
    ],
    ids=["nothing", "suited", "no images", "one step", "from zero", "unmoved", "no losses", "long", "wide"],
)
def test_odd_traces_are_drawn_and_described(tmp_path, trace):
    assert min(draw(tmp_path, trace)) > 0
    caption = describe_trace(encoded(trace)[0])
    assert caption[0].isupper() or caption[0].isdigit()
    assert caption.endswith(".") and ".." not in caption and "  " not in caption


def test_the_caption_says_what_happened():
    trace = make_trace(verdict="out of distribution")
    assert describe_trace(encode_trace(trace, ["lung/0003", "lung/0004"])) == (
        "1,234 parameters adapted, shared by 2 slices. The result is that of “round 2” (the held-out loss rose). What "
        "moved most, relative to its weights: encoder.0.blocks.first_convolution_of_0 (10 %), "
        "encoder.1.blocks.first_convolution_of_1 (5 %), encoder.2.blocks.first_convolution_of_2 (3.3 %). "
        "The estimates on the way are of slice 3. Out of distribution."
    )
    unadapted = Trace(num_trainable=1234, movement={"head": 0.0})
    assert describe_trace(encode_trace(unadapted, ["lung/0003"])) == "Not adapted."


@pytest.mark.parametrize("stopped_at", [-1, 0, 1, 50, 97, 98])
def test_few_images_are_chosen_with_the_one_that_counts(stopped_at):
    chosen = choose_steps(make_trace(99, stopped_at=stopped_at))
    assert len(chosen) == 8 and chosen == sorted(set(chosen)) and (chosen[0], chosen[-1]) == (0, 98)
    assert stopped_at < 0 or stopped_at in chosen
    assert choose_steps(make_trace(8)) == list(range(8)) and choose_steps(make_trace(9, with_images=False)) == []


@pytest.mark.parametrize("limits", [(1e-6, 1.0), (0.9, 2.3), (1.01, 1.04), (1e-30, 1e10), (3e-4, 4e-3)])
def test_ticks_are_round_and_few(limits):
    ticks = adaptation._log_ticks(*limits)
    assert 2 <= len(ticks) <= 8 and all(limits[0] <= tick <= limits[1] for tick in ticks)
