import math

import pytest
import torch

from invrecon.data.phantoms import Ellipses, ellipse_phantom, random_ellipses, render_ellipses
from invrecon.errors import InputError
from invrecon.rng import make_generator


def one(centre=(0.1, -0.2), axes=(0.5, 0.3), angle=0.4, value=1.0):
    return Ellipses(*(torch.tensor([entry]) for entry in (centre, axes, angle, value)))


@pytest.mark.parametrize("size", [64, (64, 64), 65])
def test_area_of_an_ellipse_is_pi_a_b(size):
    image = render_ellipses(size, one())
    h = 2 / image.shape[-1]
    assert float(image.sum()) * h**2 == pytest.approx(math.pi * 0.5 * 0.3, rel=2e-3)


def test_smooth_edges_converge_faster_than_hard_ones():
    fine = render_ellipses(1024, one(), smooth=False).reshape(1, 64, 16, 64, 16).mean(dim=(2, 4))
    smooth = (render_ellipses(64, one()) - fine).abs()
    hard = (render_ellipses(64, one(), smooth=False) - fine).abs()
    assert smooth.max() < 0.1 < 0.3 < hard.max()


def test_x_runs_right_and_y_up_and_angles_counterclockwise():
    image = render_ellipses(64, one(centre=(0.5, 0.5), axes=(0.1, 0.1)))[0]
    rows, columns = torch.nonzero(image > 0.5).float().mean(dim=0)
    assert rows < 32 < columns
    tilted = render_ellipses(65, one(centre=(0.0, 0.0), axes=(0.8, 0.1), angle=math.pi / 4))[0]
    assert tilted[16, 48] == 1 and tilted[48, 48] == 0  # up right, not down right


def test_ellipses_outside_the_image_leave_it_empty():
    assert render_ellipses(16, one(centre=(5.0, 0.0))).abs().max() == 0


def test_translation_by_a_pixel_shifts_the_image():
    h = 2 / 64
    moved = render_ellipses(64, one(centre=(0.1 + h, -0.2)))
    torch.testing.assert_close(moved[..., 1:], render_ellipses(64, one())[..., :-1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("disk", [0.4745, 0.9])
def test_phantoms_lie_in_their_disk_and_range(disk):
    for k in range(5):
        x = ellipse_phantom(64, make_generator(0, k), disk_diameter=disk)
        axis = (2 * torch.arange(64) + 1) / 64 - 1
        outside = torch.hypot(axis[:, None], axis[None, :]) > disk + 5 / 64  # soft edges
        assert x.shape == (1, 64, 64) and x.dtype == torch.float32
        assert x.min() >= 0 and 0 < x.max() <= 1
        assert x[0, outside].abs().max() == 0


def test_a_phantom_is_a_function_of_its_generator():
    a, b, c = (ellipse_phantom((32, 48), make_generator(0, key)) for key in ("a", "a", "b"))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert a.shape == (1, 32, 48)


def test_numbers_of_ellipses_are_capped_and_vary():
    counts = {len(random_ellipses(make_generator(1, k)).value) for k in range(20)}
    assert len(counts) > 3 and max(counts) <= 140 and min(counts) > 50


@pytest.mark.parametrize("disk", [0.0, 1.5])
def test_a_disk_larger_than_the_image_is_refused(disk):
    with pytest.raises(InputError, match="disk_diameter"):
        ellipse_phantom(16, make_generator(0), disk_diameter=disk)
