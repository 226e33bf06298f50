"""Bootstrap summaries: what is resampled, what is left out, and how they print."""

import math
import random

import numpy as np
import pytest

from invrecon.errors import InputError
from invrecon.metrics import format_table, paired_difference, summarise, summarise_by


def make_rows(
    num_patients: int, num_slices: int, spread_patients: float, spread_slices: float, seed: int = 0
) -> list[dict]:
    rng = np.random.default_rng(seed)
    levels = 35 + spread_patients * rng.normal(size=num_patients)
    return [
        {"case": f"c{p}", "patient": f"p{p}", "slice": s, "psnr": levels[p] + spread_slices * rng.normal()}
        for p in range(num_patients)
        for s in range(num_slices)
    ]


def test_mean_and_keys():
    rows = make_rows(4, 5, 1, 1)
    summary = summarise(rows)
    assert summary["psnr"]["mean"] == pytest.approx(np.mean([r["psnr"] for r in rows]))
    assert summary["psnr"]["low"] < summary["psnr"]["mean"] < summary["psnr"]["high"]
    assert (summary["num_cases"], summary["num_patients"]) == (20, 4)
    assert "patients" in summary["interval"]


def test_patients_are_resampled_before_slices():
    """The interval follows the spread between patients, however many slices each has."""
    summary = summarise(make_rows(12, 50, 2.0, 0.1))
    width = summary["psnr"]["high"] - summary["psnr"]["low"]
    assert width == pytest.approx(2 * 1.96 * 2.0 / math.sqrt(12), rel=0.4)


def test_a_single_patient_resamples_slices_and_says_so():
    summary = summarise(make_rows(1, 100, 0, 1))
    width = summary["psnr"]["high"] - summary["psnr"]["low"]
    assert width == pytest.approx(2 * 1.96 / 10, rel=0.3)
    assert "one patient" in summary["interval"]


def test_covers_the_truth_about_as_often_as_claimed():
    hits = 0
    for seed in range(60):
        entry = summarise(make_rows(15, 3, 1, 1, seed), ["psnr"])["psnr"]
        hits += entry["low"] <= 35 <= entry["high"]
    assert hits >= 51  # 0.95 * 60 = 57; percentile intervals of 15 patients are a little short


def test_order_and_types_do_not_matter():
    rows = make_rows(3, 4, 1, 1)
    shuffled = random.Random(0).sample(rows, len(rows))
    assert summarise(rows) == summarise(shuffled)
    assert summarise(rows)["psnr"] == summarise([{**r, "psnr": str(r["psnr"])} for r in rows])["psnr"]


def test_not_finite_values_are_left_out_and_counted():
    rows = make_rows(2, 3, 1, 1)
    rows += [{"patient": "p0", "psnr": math.inf}, {"patient": "p0", "psnr": math.nan}, {"patient": "p1"}]
    entry = summarise(rows)["psnr"]
    assert entry["num_cases"] == 6 and entry["num_excluded"] == 3 and math.isfinite(entry["mean"])
    assert "3 of psnr" in format_table(summarise(rows))


def test_one_value_has_no_interval_and_none_has_no_mean():
    summary = summarise([{"patient": "p", "psnr": 30.0, "ssim": None}], ["psnr", "ssim"])
    assert summary["psnr"]["mean"] == 30.0 and summary["psnr"]["low"] is None
    assert summary["ssim"]["mean"] is None
    assert "30.00" in format_table(summary)


def test_paired_difference_is_narrower_than_the_means():
    a = make_rows(5, 6, 3, 1)
    b = [{**row, "psnr": row["psnr"] - 0.5} for row in a]
    difference = paired_difference(a, list(reversed(b)))
    assert difference["mean"] == pytest.approx(0.5)
    assert difference["high"] - difference["low"] < 1e-9
    with pytest.raises(InputError, match="No slice"):
        paired_difference(a, [{"case": "other", "slice": 0, "psnr": 1.0}])


def test_table_has_a_line_a_method():
    rows = [{**row, "method": m} for m in ("FBP", "TV") for row in make_rows(2, 2, 1, 1)]
    table = format_table(summarise_by(rows))
    lines = table.splitlines()
    assert lines[2].startswith("FBP") and lines[3].startswith("TV") and "PSNR [dB]" in lines[0]
    assert "4 slices of 2 patients" in lines[-1]
    assert len({len(line) for line in lines[1:5]}) == 1
