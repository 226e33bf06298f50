"""The seams of unconditional samples are looked for where the prior's patches meet."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from invrecon.priors.edm import EDMDenoiser
from invrecon.priors.layouts import FixedGrid, Layout, OverlapAverage, RandomShift, Stitched
from invrecon.priors.mirror import MirroredPrior
from invrecon.priors.patch import PatchPrior, WholePrior
from invrecon.tasks.generation import seam_columns, seam_grid


def make_prior(layout: Layout | None, patch_size: int = 12) -> PatchPrior:
    return PatchPrior(EDMDenoiser(nn.Identity(), 0.5), patch_size, layout=layout)


@pytest.mark.parametrize(
    ("layout", "size", "offset"),
    [
        (None, 12, -2),  # three patches of 12 exceed 32 by 4, two at each side
        (RandomShift(2), 12, -2),
        (FixedGrid(5), 12, -5),
        (OverlapAverage(4), 4, 0),
        (Stitched(2), 8, 0),  # interiors of 8 tile 32
    ],
)
def test_the_grid_is_that_of_the_layout(layout: Layout | None, size: int, offset: int) -> None:
    grid = seam_grid(make_prior(layout), (32, 32))
    assert grid is not None and grid == (size, (offset, offset))
    images = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    steps = torch.arange(32).sub(offset).div(size, rounding_mode="floor").double()
    columns = seam_columns(images + steps + steps[:, None], make_prior(layout))
    assert min(columns["seams"]) > 2 and min(columns["contrast"]) > 1.5
    assert columns == seam_columns(images + steps + steps[:, None], MirroredPrior(make_prior(layout)))


def test_without_patches_there_is_nothing_to_say() -> None:
    images = torch.rand(2, 1, 32, 32)
    whole = WholePrior(EDMDenoiser(nn.Identity(), 0.5))
    for prior in (None, whole, make_prior(None, 32), make_prior(FixedGrid(), 48), make_prior(OverlapAverage(), 32)):
        assert seam_columns(images, prior) == {}
