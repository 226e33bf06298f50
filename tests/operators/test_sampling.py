"""K-space masks: exact calibration widths and counts, densities, determinism, order independence, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from invrecon.errors import InputError
from invrecon.operators.sampling import (
    EquispacedLines,
    GaussianSampling,
    MagicLines,
    PoissonDiscSampling,
    PolynomialSampling,
    RandomLines,
    TwoPercentSampling,
    achieved_acceleration,
    calibration_region,
    central_block,
    radii,
)
from invrecon.rng import make_generator

LINES = {
    "random": RandomLines,
    "equispaced": EquispacedLines,
    "magic": MagicLines,
}
POINTS = {
    "polynomial": lambda: PolynomialSampling(6.0, 10),
    "gaussian": lambda: GaussianSampling(6.0, (10, 6)),
    "poisson": lambda: PoissonDiscSampling(6.0, 10),
}
ALL = {**LINES, **POINTS}


def draw(sampling, size, seed: int = 0):
    return sampling(size, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", LINES)
@pytest.mark.parametrize(("acceleration", "fraction"), [(4, 0.08), (8, 0.04)])
@pytest.mark.parametrize("size", [(8, 320), (5, 181), (3, 368)])
def test_lines_are_whole_columns_with_the_calibration_lines_of_fastmri(kind, acceleration, fraction, size):
    mask = draw(LINES[kind](acceleration, fraction), size)
    width, num_acs = size[1], round(size[1] * fraction)
    assert mask.shape == size and mask.dtype == torch.bool
    assert torch.equal(mask, mask[:1].expand(size))
    start = (width - num_acs + 1) // 2  # fastMRI's convention
    assert mask[0, start : start + num_acs].all()
    rows, columns = calibration_region(mask)
    assert (rows.start, rows.stop) == (0, size[0])
    assert columns.start <= start and columns.stop >= start + num_acs


@pytest.mark.parametrize(("kind", "tolerance"), [("equispaced", 0.03), ("magic", 0.25)])
@pytest.mark.parametrize(("acceleration", "fraction"), [(4, 0.08), (8, 0.04)])
def test_regular_lines_come_close_to_the_acceleration(kind, tolerance, acceleration, fraction):
    for seed in range(5):
        achieved = float(achieved_acceleration(draw(LINES[kind](acceleration, fraction), (2, 320), seed)))
        assert achieved == pytest.approx(acceleration, rel=tolerance)


def test_random_lines_have_the_acceleration_on_average():
    lines = torch.stack([draw(RandomLines(4, 0.08), (1, 320), seed) for seed in range(200)])
    # 200 masks of 294 outer columns, each kept with p = 0.184: the mean is known to 0.5 %
    assert float(lines.float().mean()) == pytest.approx(1 / 4, rel=0.02)
    assert len({int(mask.sum()) for mask in lines}) > 10


@pytest.mark.parametrize("make", POINTS.values(), ids=POINTS.keys())
@pytest.mark.parametrize("size", [(48, 48), (45, 31)])
def test_points_have_an_exact_number_and_calibration_block(make, size):
    sampling = make()
    mask = draw(sampling, size)
    block = central_block(size, sampling.acs)
    assert int(mask.sum()) == round(size[0] * size[1] / 6)
    assert int(block.sum()) == sampling.acs[0] * sampling.acs[1]
    assert mask[block].all()
    rows, columns = calibration_region(mask)
    assert rows.stop - rows.start >= sampling.acs[0] and columns.stop - columns.start >= sampling.acs[1]


@given(st.integers(1, 20), st.integers(1, 20), st.floats(1, 30))
def test_any_budget_is_met_exactly(height, width, acceleration):
    budget = round(height * width / acceleration)
    for kind in (PolynomialSampling, GaussianSampling, PoissonDiscSampling):
        if budget:
            assert int(draw(kind(acceleration, 0), (height, width)).sum()) == budget


def test_two_percent_is_two_percent():
    mask = draw(TwoPercentSampling(), (320, 320))
    assert int(mask.sum()) == 2048
    assert mask[central_block((320, 320), (16, 16))].all()
    assert float(achieved_acceleration(mask)) == 50


@pytest.mark.parametrize("make", POINTS.values(), ids=POINTS.keys())
def test_points_grow_sparser_away_from_the_centre(make):
    masks = torch.stack([draw(make(), (48, 48), seed) for seed in range(4)]).float().mean(0)
    radius = radii(48, 48)
    rings = [float(masks[(radius >= low) & (radius < low + 0.25)].mean()) for low in (0.25, 0.5, 0.75)]
    assert rings[0] > rings[1] > rings[2]


def test_the_density_is_that_asked_for():
    """A draw of few points without replacement follows the density."""
    radius = radii(31, 31)
    density = (1 - radius).clamp(min=0) ** 2
    counts = (
        torch.stack([draw(PolynomialSampling(100.0, 0, 2.0), (31, 31), seed) for seed in range(400)]).double().sum(0)
    )
    for low in (0.0, 0.3, 0.6):
        ring = (radius >= low) & (radius < low + 0.3)
        expected = float(density[ring].sum() / density.sum())
        assert float(counts[ring].sum() / counts.sum()) == pytest.approx(expected, abs=0.03)


def test_poisson_discs_keep_their_distance():
    """The closest pair of a Poisson-disc pattern is further apart than that of independent points."""

    def closest(mask):
        points = mask.nonzero().double()
        distance = torch.cdist(points, points) + 1e9 * torch.eye(len(points))
        return float(distance.amin(1).quantile(0.01)), float(distance.amin())

    uniform = PoissonDiscSampling(16.0, 0, floor=100.0)
    poisson = closest(draw(uniform, (48, 48)))
    independent = closest(draw(PolynomialSampling(16.0, 0, 0.0), (48, 48)))
    assert poisson[1] >= 2 and independent[1] == 1
    assert poisson[0] > independent[0]


@pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())
def test_a_case_has_its_mask_in_any_order(make):
    sampling, size = make(), (32, 60)
    names = ["a/0000", "a/0001", "b/0000"]
    masks = {name: sampling(size, make_generator(0, "mask", name)) for name in names}
    again = {name: make()(size, make_generator(0, "mask", name)) for name in reversed(names)}
    assert all(torch.equal(masks[name], again[name]) for name in names)
    assert len({masks[name].numpy().tobytes() for name in names}) > 1


@pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())
def test_the_global_state_is_left_alone(make):
    import numpy as np

    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    draw(make(), (32, 60))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_the_calibration_region_is_the_sampled_rectangle():
    mask = central_block((9, 12), (5, 4))
    assert calibration_region(mask) == (slice(2, 7), slice(4, 8))
    mask[2, 5] = False  # a line with a gap is no part of it
    assert calibration_region(mask) == (slice(3, 7), slice(4, 8))
    assert calibration_region(torch.ones(3, 5)) == (slice(0, 3), slice(0, 5))
    rows, columns = calibration_region(torch.zeros(4, 4))
    assert rows.start == rows.stop and columns.start == columns.stop


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomLines(0, 0.08), "acceleration"),
        (lambda: RandomLines(4, 0.3), "center_fraction"),
        (lambda: MagicLines(4, 0.0), "center_fraction"),
        (lambda: draw(EquispacedLines(8, 0.04), (4, 6)), "no column"),
        (lambda: PolynomialSampling(0.5), "acceleration"),
        (lambda: EquispacedLines(4.6, 0.08), "acceleration is 4.6, and patterns of lines have whole numbers"),
        (lambda: PolynomialSampling(8.0, -1), "acs"),
        (lambda: PolynomialSampling(8.0, 24.0), "acs is 24.0, expected a whole number"),
        (lambda: PolynomialSampling(8.0, (24,)), r"acs is \(24,\), expected"),
        (lambda: PolynomialSampling(8.0, (24, 24, 3)), r"acs is \(24, 24, 3\), expected"),
        (lambda: PolynomialSampling(8.0, 4, -1.0), "power"),
        (lambda: GaussianSampling(std=0.0), "std"),
        (lambda: PoissonDiscSampling(floor=0.0), "floor"),
        (lambda: draw(TwoPercentSampling(), (64, 64)), "does not fit"),
        (lambda: draw(GaussianSampling(2.0, (4, 9)), (8, 8)), "does not fit"),
        (lambda: draw(PolynomialSampling(), (0, 8)), "at least one sample"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(InputError, match=message):
        make()
