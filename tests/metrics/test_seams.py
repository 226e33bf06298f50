"""The seam statistic of images whose seams are known, and what must not move it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from invrecon.errors import InputError
from invrecon.metrics import find_seams, scan_seams, seam_statistic
from invrecon.metrics.seams import RESOLUTION

P = 8


def grid(size: tuple[int, int], offset: tuple[int, int] = (0, 0)) -> tuple[Tensor, Tensor]:
    """Row and column of the patch that each pixel belongs to, `(H, 1)` and `(1, W)`."""
    (rows, columns) = (torch.arange(n, dtype=torch.float64) for n in size)
    return ((rows - offset[0]) / P).floor()[:, None], ((columns - offset[1]) / P).floor()[None, :]


def ramp(size: tuple[int, int], slope: tuple[float, float]) -> Tensor:
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in size)
    return slope[0] * rows[:, None] + slope[1] * columns[None, :]


def smooth(num: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    noise = torch.randn(num, 1, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.avg_pool2d(noise, 5, stride=1, padding=2)


@pytest.mark.parametrize("reach", [1, 2, 30, None])
@pytest.mark.parametrize("offset", [(0, 0), (3, 5), (-2, 11)])
@pytest.mark.parametrize("slope", [(1.0, 0.0), (0.3, -0.7), (-2.0, 0.01)])
def test_a_ramp_has_no_seams(offset: tuple[int, int], slope: tuple[float, float], reach: int | None) -> None:
    x = ramp((33, 50), slope)[None, None]
    assert seam_statistic(x, P, offset, reach).item() == pytest.approx(1, abs=1e-12)
    assert torch.allclose(scan_seams(x, P, reach), torch.ones(1, P, P, dtype=torch.float64))


@pytest.mark.parametrize("offset", [(0, 0), (3, 6)])
def test_a_staircase_of_patch_means_is_its_step_over_the_slope(offset: tuple[int, int]) -> None:
    """Across a border the image climbs by `slope + step`, elsewhere by `slope`."""
    slope, step = 0.02, 0.1
    row, column = grid((40, 51), offset)
    x = (ramp((40, 51), (slope, slope)) + step * (row + column))[None, None]
    assert seam_statistic(x, P, offset).item() == pytest.approx((slope + step) / slope)
    assert find_seams(x, P).offset.tolist() == [list(offset)]


def test_a_checkerboard_of_patch_means_is_its_jump_over_the_slope() -> None:
    """Of the borders half go up by `jump + slope`, half down by `jump - slope`: with an even number of patches, `jump`
    in the mean."""
    slope, jump = 0.02, 0.1
    row, column = grid((6 * P, 4 * P))
    board = jump * ((row + column) % 2)
    x = (ramp((6 * P, 4 * P), (slope, -slope)) + board)[None, None]
    assert seam_statistic(x, P).item() == pytest.approx(jump / slope)
    assert seam_statistic(x, P, reach=None).item() == pytest.approx(jump / slope)
    # Half a patch further on the jumps lie elsewhere: out of reach, and 5 of the 41 other steps along the rows, 3 of
    # the 27 along the columns.
    middle = (P // 2, P // 2)
    other = (5 * jump + 36 * slope) / 41 + (3 * jump + 24 * slope) / 27
    assert seam_statistic(x, P, middle).item() == pytest.approx(1)
    assert seam_statistic(x, P, middle, reach=None).item() == pytest.approx(2 * slope / other)


def test_a_board_without_anything_else_is_bounded_and_found() -> None:
    row, column = grid((40, 40), (5, 2))
    x = (0.3 + 0.5 * ((row + column) % 2))[None, None]
    assert seam_statistic(x, P, (5, 2)).item() == pytest.approx(2 / RESOLUTION, rel=1e-6)
    scan = find_seams(x, P)
    assert scan.offset.tolist() == [[5, 2]] and math.isfinite(scan.contrast.item()) and scan.contrast.item() > 100


@pytest.mark.parametrize("reach", [2, None])
@pytest.mark.parametrize("size", [(64, 64), (50, 75)])
def test_white_noise_gives_one(size: tuple[int, int], reach: int | None) -> None:
    """Within 4 standard deviations of the mean over images.

    A step `d` is the difference of two normal pixels: `|d|` has the squared coefficient of variation `pi/2 - 1`. Two
    steps that share a pixel have correlation 1/2, up to sign, and their absolute values (sqrt(3)/2 + pi/12 - 1) /
    (pi/2 - 1); a step shares pixels with at most six others, so a mean over `n` steps has at most 1 + 6 times that of
    the variance of independent ones. Means of borders and of the rest are correlated positively, which the quotient
    only likes.
    """
    num = 64
    x = torch.randn(num, 1, *size, generator=torch.Generator().manual_seed(0))
    cv2 = math.pi / 2 - 1
    inflation = 1 + 6 * (math.sqrt(3) / 2 + math.pi / 12 - 1) / cv2
    counts = []
    for n, other in (size, size[::-1]):
        borders = (n - 1) // P
        others = (
            n - 1 - borders if reach is None else sum(min(i % P, -i % P) in range(1, reach + 1) for i in range(1, n))
        )
        counts += [borders * other, others * other]
    variance = inflation * cv2 / 4 * sum(1 / count for count in counts)
    statistic = seam_statistic(x, P, reach=reach)
    assert statistic.mean().item() == pytest.approx(1, abs=4 * math.sqrt(variance / num))
    assert 4 * math.sqrt(variance / num) < 0.03  # so that the test can fail
    assert statistic.std().item() < 1.3 * math.sqrt(variance)


@settings(max_examples=30, deadline=None)
@given(
    scale=st.floats(1e-3, 1e3),
    sign=st.sampled_from([-1, 1]),
    level=st.floats(-10, 10),
    offset=st.tuples(st.integers(-20, 20), st.integers(-20, 20)),
)
def test_scale_and_level_of_intensity_do_not_matter(
    scale: float, sign: int, level: float, offset: tuple[int, int]
) -> None:
    x = smooth(2, (30, 37))
    expected = seam_statistic(x, P, offset)
    assert torch.allclose(seam_statistic(sign * scale * x + level, P, offset), expected, rtol=1e-6)
    assert torch.allclose(seam_statistic(x, P, (offset[0] + P, offset[1] - 3 * P)), expected)


@settings(max_examples=30, deadline=None)
@given(shift=st.tuples(st.integers(0, P - 1), st.integers(0, P - 1)))
def test_a_grid_moves_with_its_image(shift: tuple[int, int]) -> None:
    """Cropping moves the grid by what was cut off, which the scan finds; transposing swaps the axes."""
    row, column = grid((48, 48))
    levels = torch.rand(7, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = smooth(1, (48, 48)) + levels[row.long(), column.long()]
    cut = x[..., shift[0] :, shift[1] :]
    offset = (-shift[0] % P, -shift[1] % P)
    assert find_seams(cut, P).offset.tolist() == [list(offset)]
    scan = scan_seams(cut, P)
    assert scan[0, offset[0], offset[1]] == pytest.approx(seam_statistic(cut, P, offset).item())
    assert torch.allclose(scan_seams(cut.mT, P), scan.mT)


def test_seams_raise_the_contrast_of_the_scan() -> None:
    x = smooth(8, (64, 64))
    row, column = grid((64, 64), (3, 3))
    levels = torch.randn(8, 1, 10, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    seamed = x + 0.2 * levels[:, :, row.long() + 1, column.long() + 1]
    plain, found = find_seams(x, P), find_seams(seamed, P)
    assert (found.offset == 3).all()
    assert (plain.contrast >= 1).all() and found.contrast.min() > plain.contrast.max()


def test_images_that_are_mostly_or_wholly_constant() -> None:
    x = torch.full((4, 1, 40, 40), 0.1)
    x[1] += 1e-8 * torch.randn(40, 40, generator=torch.Generator().manual_seed(0))  # rounding alone
    x[2, 0, 10:20, 11:15] += ramp((10, 4), (1.0, 0.3)).float()  # off the grid's borders but for one
    x[3] = 0
    statistic = seam_statistic(x, P)
    assert statistic[[0, 3]].tolist() == [1, 1] and statistic[1].item() == pytest.approx(1, abs=0.1)
    assert 0 < statistic[2] < math.inf
    assert find_seams(x, P).contrast[[0, 3]].tolist() == [1, 1]


def test_air_around_an_image_changes_little() -> None:
    """Steps of zero enter borders and their neighbours alike; against all of the image they would change the ratio of
    4 borders to 35 other steps to that of 10 to 77."""
    row, column = grid((40, 40))
    window = torch.hann_window(42, periodic=False, dtype=torch.float64)[1:-1]
    inner = (smooth(1, (40, 40)) * 0.1 + 0.05 * ((row + column) % 2)) * window[:, None] * window
    padded = torch.nn.functional.pad(inner, (3 * P, 3 * P, 3 * P, 3 * P))
    # The rim's own steps are small, and now beside a border.
    assert seam_statistic(padded, P).item() == pytest.approx(seam_statistic(inner, P).item(), rel=0.05)
    expected = seam_statistic(inner, P, reach=None).item() * (4 / 35) / (10 / 77)
    assert seam_statistic(padded, P, reach=None).item() == pytest.approx(expected, rel=0.01)


def test_a_body_in_the_air_shows_no_grid_wherever_it_lies() -> None:
    """Disks whose edge is all there is: what a border meets, the steps beside it meet, too, and those elsewhere not."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(*[torch.arange(96, dtype=torch.float64)] * 2, indexing="ij")
    centres = 30 + 36 * torch.rand(64, 2, generator=generator, dtype=torch.float64)
    x = torch.stack([torch.sigmoid((25 - torch.hypot(rows - a, columns - b)) / 2) for a, b in centres])[:, None]
    near, anywhere = seam_statistic(x, 16), seam_statistic(x, 16, reach=None)
    assert near.mean().item() == pytest.approx(1, abs=4 * near.std().item() / 8)
    assert near.std() < anywhere.std() / 2


def test_values_are_per_image() -> None:
    x = smooth(3, (30, 30)).repeat(1, 2, 1, 1)
    alone = torch.cat([seam_statistic(image[None], P, (1, 2)) for image in x])
    assert seam_statistic(x, P, (1, 2)).shape == (3,) and torch.allclose(seam_statistic(x, P, (1, 2)), alone)
    assert find_seams(x, P).contrast.shape == (3,) and scan_seams(x, P).shape == (3, P, P)
    expected = seam_statistic(x, P)
    x[1, 0, 4, 4] = math.nan
    assert seam_statistic(x, P).isnan().tolist() == [False, True, False]
    assert torch.equal(seam_statistic(x, P)[[0, 2]], expected[[0, 2]])


def test_elsewhere_is_somewhere() -> None:
    with pytest.raises(InputError, match="reach is 0"):
        seam_statistic(torch.zeros(1, 1, 30, 30), P, reach=0)


def test_images_of_whole_numbers() -> None:
    x = (100 * smooth(1, (30, 30))).round()
    assert torch.equal(seam_statistic(x.int(), P), seam_statistic(x, P))


@pytest.mark.parametrize(
    ("shape", "patch_size", "message"),
    [
        ((30, 30), P, "batch of images"),
        ((1, 1, 30, 30, 30), P, "batch of images"),
        ((1, 1, 8, 30), 8, r"\(8, 30\).*less than a side"),
        ((1, 1, 30, 30), 1, "at least 2"),
    ],
)
def test_what_has_no_grid_is_explained(shape: tuple[int, ...], patch_size: int, message: str) -> None:
    for function in (seam_statistic, scan_seams, find_seams):
        with pytest.raises(InputError, match=message):
            function(torch.zeros(shape), patch_size)
