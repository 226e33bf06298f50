"""Augmented patches: exact where nothing changes, turned about the centre, noise of the stated variance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from invrecon.data.augmentation import Augmentation, binomial, changed_patches
from invrecon.errors import InputError
from invrecon.priors.patch import cut_patches
from invrecon.rng import make_generator

SIZE = 32
OFF: dict[str, Any] = {"flip": 0.0, "warp": 0.0, "texture": 0.0}


def blobs(*, channels: int = 1) -> Tensor:
    y, x = torch.meshgrid(torch.linspace(-1, 1, SIZE), torch.linspace(-1, 1, SIZE), indexing="ij")
    image = torch.exp(-8 * ((x - 0.3) ** 2 + (y + 0.2) ** 2)) + 0.4 * torch.exp(-20 * ((x + 0.4) ** 2 + y**2))
    return (0.8 * image)[None, None].repeat(1, channels, 1, 1)


def whole(augmentation: Augmentation, images: Tensor, num: int = 1, seed: int = 0, size: int = SIZE) -> Tensor:
    """Patches that are the whole image."""
    zeros = torch.zeros(num, dtype=torch.long)
    changes = augmentation.draw(num, make_generator(seed))
    return changed_patches(images, Tensor.float, (zeros, zeros, zeros), size, changes)


def centroid(images: Tensor) -> Tensor:
    """Column and row of the centre of mass of images `(n, 1, SIZE, SIZE)`, `(n, 2)`, 0 in the middle."""
    at = (2 * torch.arange(SIZE) + 1) / SIZE - 1
    mass = images.sum((1, 2, 3))
    return torch.stack([(images * at).sum((1, 2, 3)), (images * at[:, None]).sum((1, 2, 3))], dim=1) / mass[:, None]


def test_without_changes_patches_are_those_that_are_cut() -> None:
    images, generator = torch.rand(3, 1, SIZE, SIZE), make_generator(1)
    index = torch.randint(3, (20,), generator=generator)
    top, left = (torch.randint(SIZE, (20,), generator=generator) - 6 for _ in range(2))
    values, inside, _ = cut_patches(images, index, top, left, 12)
    augmentation = Augmentation(**OFF)
    changes = augmentation.draw(20, generator)
    own = changed_patches(images, Tensor.float, (index, top, left), 12, changes)
    assert torch.allclose(own, values * inside, atol=1e-4)


def test_a_flip_mirrors_left_and_right() -> None:
    images = blobs()
    own = whole(Augmentation(**{**OFF, "flip": 1.0}), images)
    assert torch.allclose(own, images.flip(-1), atol=1e-5)


def test_scale_and_rotation_are_about_the_centre_and_keep_the_mass() -> None:
    images = blobs()
    turned = whole(Augmentation(**{**OFF, "warp": 1.0}, rotation=30, scale=1, shift=0), images, 8)
    assert torch.allclose(turned.sum((1, 2, 3)), images.sum().expand(8), rtol=0.02)
    augmentation = Augmentation(**{**OFF, "flip": 0.5, "warp": 1.0}, rotation=30, scale=1.3, shift=0)
    own, turn = whole(augmentation, images, 64), augmentation.draw(64, make_generator(0)).turn
    area = own.sum((1, 2, 3)) / images.sum()
    assert torch.allclose(area, 1 / turn.det().abs(), rtol=0.05)
    assert 1 / 1.7 < float(area.min()) < 0.8 and 1.2 < float(area.max()) < 1.7  # at most 1.3 squared
    assert torch.allclose((turn @ centroid(own)[:, :, None])[:, :, 0], centroid(images).expand(64, 2), atol=0.02)


def test_parts_of_a_changed_image_fit_together() -> None:
    images, augmentation = blobs(), Augmentation(flip=1.0, warp=1.0, texture=1.0, grain=0.0)
    changes = augmentation.draw(1, make_generator(3))
    zero, half = torch.zeros(1, dtype=torch.long), torch.full((1,), SIZE // 2)
    full = changed_patches(images, Tensor.float, (zero, zero, zero), SIZE, changes)
    quarter = changed_patches(images, Tensor.float, (zero, half, zero), SIZE // 2, changes)
    assert torch.allclose(full[..., SIZE // 2 :, : SIZE // 2], quarter, atol=1e-5)


def test_grain_has_the_stated_variance_and_stays_inside() -> None:
    augmentation = Augmentation(**{**OFF, "texture": 1.0}, sharpness=0.0, grain=0.05)
    changes = augmentation.draw(400, make_generator(4))
    zeros = torch.zeros(400, dtype=torch.long)
    own = changed_patches(torch.full((1, 1, SIZE, SIZE), 0.5), Tensor.float, (zeros, zeros, zeros), SIZE, changes)
    ratio = own.std((1, 2, 3)) / changes.grain
    assert ratio.mean() == pytest.approx(1, abs=0.02)
    beyond = changed_patches(torch.full((1, 1, SIZE, SIZE), 0.5), Tensor.float, (zeros, zeros + 40, zeros), 8, changes)
    assert not beyond.any()


def test_contrast_and_gain_change_the_magnitude_of_complex_images_and_not_their_phase() -> None:
    images = torch.randn(1, 2, SIZE, SIZE, generator=make_generator(5)) + 2
    augmentation = Augmentation(**{**OFF, "warp": 1.0}, rotation=0, scale=1, shift=0, gamma=2.0, gain=1.5)
    own = whole(augmentation, images, 4)
    changes = augmentation.draw(4, make_generator(0))
    before, after = torch.view_as_complex(images.movedim(1, -1).contiguous()), own.movedim(1, -1).contiguous()
    after = torch.view_as_complex(after)
    assert torch.allclose(after.angle(), before.angle().expand(4, -1, -1), atol=1e-3)
    expected = changes.gain[:, None, None] * before.abs() ** changes.gamma[:, None, None]
    assert torch.allclose(after.abs(), expected, rtol=1e-3)
    assert changes.gain.min() < 0.95 and changes.gain.max() > 1.05


def test_the_blur_is_binomial_and_keeps_constants() -> None:
    assert torch.allclose(binomial(torch.ones(1, 2, 5, 5)), torch.ones(1, 2, 5, 5))
    inner = torch.zeros(1, 1, 9, 9)
    inner[..., 4, 4] = 1
    row = torch.tensor([1.0, 2.0, 1.0]) / 4
    assert torch.allclose(binomial(inner)[0, 0, 3:6, 3:6], row[:, None] * row)
    assert binomial(inner).sum() == pytest.approx(1)


@pytest.mark.parametrize("knobs", [{"flip": 1.5}, {"scale": 0.5}, {"grain": -1.0}, {"rotation": float("nan")}])
def test_knobs_out_of_range_are_refused(knobs: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(knobs))):
        Augmentation(**knobs)
