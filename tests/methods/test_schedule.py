import numpy as np
import pytest

from invrecon.errors import InputError
from invrecon.methods import GeometricSchedule, KarrasSchedule


def test_karras_levels_are_even_in_the_root():
    sigmas = np.array(KarrasSchedule(50, 0.3, 0.002, rho=7).sigmas)
    assert sigmas[0] == pytest.approx(0.3) and sigmas[-1] == pytest.approx(0.002)
    steps = np.diff(sigmas ** (1 / 7))
    assert (steps < 0).all() and np.ptp(steps) < 1e-12


def test_geometric_levels_have_one_ratio():
    sigmas = np.array(GeometricSchedule(300, 10, 0.002).sigmas)
    assert sigmas[0] == pytest.approx(10) and sigmas[-1] == pytest.approx(0.002)
    assert np.ptp(sigmas[1:] / sigmas[:-1]) < 1e-12


def test_level_budget_of_the_published_ladders():
    # Levels above 1, between 0.1 and 1, and below: 41 / 29 / 30 for Karras against 29 / 28 / 43.
    def budget(schedule):
        sigmas = np.array(schedule.sigmas)
        return [
            int((sigmas > 1).sum()),
            int(((sigmas > 0.1) & (sigmas <= 1)).sum()),
            int((sigmas <= 0.1).sum()),
        ]

    assert budget(KarrasSchedule(100, 10, 0.003)) == [41, 29, 30]
    assert budget(GeometricSchedule(100, 10, 0.003)) == [29, 28, 43]


def test_steps_repeat_levels_and_end_at_zero():
    schedule = GeometricSchedule(3, 1.0, 0.25, num_inner=2)
    steps = list(schedule.steps())
    assert len(steps) == len(schedule) == 6
    assert steps[0] == steps[1] == pytest.approx((1.0, 0.5))
    assert steps[4] == steps[5] == pytest.approx((0.25, 0.0))


def test_a_single_level_is_the_first():
    assert KarrasSchedule(1, 0.3, 0.002).sigmas == pytest.approx([0.3])


@pytest.mark.parametrize(
    "arguments", [(0, 1.0, 0.1), (5, 0.1, 1.0), (5, 1.0, 0.0), (5, 1.0, -1.0), (5, float("nan"), 0.1)]
)
def test_impossible_ladders_are_refused(arguments):
    with pytest.raises(InputError):
        GeometricSchedule(*arguments)


def test_bad_repeats_and_exponents_are_refused():
    with pytest.raises(InputError, match="num_inner"):
        GeometricSchedule(3, 1.0, 0.1, num_inner=0)
    with pytest.raises(InputError, match="rho"):
        KarrasSchedule(3, 1.0, 0.1, rho=0)
