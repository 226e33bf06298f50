"""Figures are drawn, complete, and of the right things."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from invrecon.report import figures, sheet
from invrecon.report.figures import (
    LUNG,
    SOFT_TISSUE,
    case_figure,
    choose_windows,
    comparison_figure,
    image_png,
)


def chest(size: int = 64) -> torch.Tensor:
    """A body of soft tissue in air with two lungs and a spine, [HU]."""
    i, j = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    image = torch.full((size, size), -1000.0)
    image[(i / 0.7) ** 2 + (j / 0.9) ** 2 < 1] = 40.0
    for side in (-0.4, 0.4):
        image[(i / 0.45) ** 2 + ((j - side) / 0.28) ** 2 < 1] = -800.0
    image[((i - 0.45) ** 2 + j**2) < 0.01] = 700.0
    return image


def noisy(image: torch.Tensor, std: float) -> torch.Tensor:
    return image + std * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))


def size_of(path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.verify()
        return image.size


def columns(width: int) -> float:
    inches = width / sheet.DPI - sheet.LEFT - sheet.MARGIN
    return (inches + sheet.GAP) / (sheet.PANEL + sheet.GAP)


def test_windows_follow_the_content():
    abdomen = chest()
    abdomen[abdomen == -800] = 60.0
    assert choose_windows(chest()) == (LUNG, SOFT_TISSUE)
    assert choose_windows(abdomen) == (SOFT_TISSUE,)
    assert choose_windows(np.full((8, 8), -1000.0)) == (SOFT_TISSUE,)


def test_case_figure_has_a_column_an_image(tmp_path):
    reference = chest()
    images = {"FBP": noisy(reference, 200), "TV": noisy(reference, 80), "Ours": noisy(reference, 30)[None]}
    path = case_figure(
        tmp_path / "figures" / "a.png",
        images,
        reference=reference[None],
        std=torch.ones(1, 64, 64),
        title="case $1_000$",
        voxel_mm=(5.0, 2.0, 2.0),
    )
    assert columns(size_of(path)[0]) == pytest.approx(5, abs=0.02)
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


@pytest.mark.parametrize("with_std", [False, True])
def test_case_figure_without_a_reference(tmp_path, with_std):
    image = chest()
    path = case_figure(
        tmp_path / "a.png",
        {"FBP": noisy(image, 200), "Ours": image},
        std=torch.ones(64, 64) if with_std else None,
        residual=torch.randn(1, 20, 90),
    )
    assert columns(size_of(path)[0]) == pytest.approx(3, abs=0.02)


@pytest.mark.parametrize("shape", [(1, 1), (9, 30), (65, 33)])
def test_any_size_and_constant_images(tmp_path, shape):
    zero = np.zeros(shape)
    case_figure(tmp_path / "a.png", {"x": zero}, reference=zero, std=zero, residual=zero, voxel_mm=(1, 1, 1))
    size_of(tmp_path / "a.png")


def test_comparison_figure_shares_the_error_scale(tmp_path):
    reference = chest()
    images = {
        f"{views} views": {"FBP": noisy(reference, 3000 / views), "Ours": noisy(reference, 300 / views)}
        for views in (20, 60)
    }
    path = comparison_figure(tmp_path / "a.png", images, reference, title="t", voxel_mm=(1, 1, 1))
    assert columns(size_of(path)[0]) == pytest.approx(3, abs=0.02)
    errors = [[(x - reference).numpy() for x in row.values()] for row in images.values()]
    assert figures._error_limit(errors) == 50.0  # the best at 20 views has 15 HU: 99.5 % within 42 HU


def test_the_best_psnr_is_marked():
    reference = chest().numpy()
    arrays = {"a": reference + 30, "b": reference + 3}
    labels = figures._psnr_labels(arrays, reference, -1000.0, 3000.0)
    assert labels == {"a": ("40.00 dB", False), "b": ("60.00 dB", True)}
    assert figures._psnr_labels(arrays, None, -1000.0, 3000.0) == {}


def test_the_zoom_never_lies_under_its_inset():
    for seed in range(20):
        image = np.random.default_rng(seed).normal(size=(100, 80)).cumsum(0)
        top, left, size = figures._zoom_box(image, LUNG)
        assert size == 16
        assert top + size <= (1 - sheet.INSET) * 100 or left + size <= (1 - sheet.INSET) * 80


def test_image_png_is_pixel_for_pixel():
    png = image_png(np.array([[-160.0, 240.0], [40.0, 1000.0]]), SOFT_TISSUE)
    with Image.open(io.BytesIO(png)) as image:
        pixels = np.asarray(image.convert("L"))
    assert pixels.tolist()[0] == [0, 255] and pixels[1, 1] == 255 and 125 <= pixels[1, 0] <= 130


def test_importing_reports_is_light():
    code = (
        "import sys, invrecon.report.figures, invrecon.report.html, invrecon.report.store; "
        "print([m for m in ('matplotlib', 'h5py', 'scipy', 'lightning') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stderr
