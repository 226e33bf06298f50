"""Image metrics against scikit-image, and their conventions."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from invrecon.errors import InputError
from invrecon.metrics import body_mask, masked_psnr, psnr, relative_residual, ssim


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    reference = torch.rand(3, 1, 33, 40, generator=generator).cumsum(-1) / 30
    return reference + 0.05 * torch.randn(reference.shape, generator=generator), reference


@pytest.mark.parametrize("data_range", [1.0, 0.7])
def test_agrees_with_skimage(pair, data_range):
    x, reference = pair
    for image, truth, p, s in zip(x, reference, psnr(x, reference, data_range), ssim(x, reference, data_range)):
        a, b = (t[0].double().clip(0, data_range).numpy() for t in (image, truth))
        assert p.item() == pytest.approx(peak_signal_noise_ratio(b, a, data_range=data_range), abs=1e-6)
        assert s.item() == pytest.approx(structural_similarity(b, a, data_range=data_range), abs=1e-6)


def test_ssim_of_channels_and_volumes_agrees_with_skimage():
    generator = torch.Generator().manual_seed(1)
    reference = torch.rand(1, 2, 16, 17, generator=generator)
    x = (reference + 0.1 * torch.randn(reference.shape, generator=generator)).clip(0, 1)
    a, b = reference[0].double().numpy(), x[0].double().numpy()
    assert ssim(x, reference).item() == pytest.approx(
        structural_similarity(a, b, data_range=1, channel_axis=0), abs=1e-6
    )
    volume, truth = (
        x.reshape(1, 1, 2, 16, 17).repeat(1, 1, 4, 1, 1),
        reference.reshape(1, 1, 2, 16, 17).repeat(1, 1, 4, 1, 1),
    )
    expected = structural_similarity(truth[0, 0].double().numpy(), volume[0, 0].double().numpy(), data_range=1)
    assert ssim(volume, truth).item() == pytest.approx(expected, abs=1e-6)


def test_values_are_per_image_and_clipped(pair):
    x, reference = pair
    for metric in (psnr, ssim):
        alone = torch.cat([metric(a[None], b[None]) for a, b in zip(x, reference)])
        assert torch.equal(metric(x, reference), alone)
        assert torch.equal(metric(x, reference), metric(x.clip(0, 1), reference.clip(0, 1)))
        assert metric(x, reference).shape == (3,)


def test_conventions_for_identical_nan_and_constant():
    reference = torch.full((2, 1, 9, 9), 0.5)
    x = reference.clone()
    assert psnr(x, reference).tolist() == [math.inf, math.inf]
    assert ssim(x, reference).tolist() == pytest.approx([1.0, 1.0])
    x[1, 0, 4, 4] = math.nan
    assert psnr(x, reference)[0] == math.inf and psnr(x, reference)[1].isnan()
    assert ssim(x, reference)[1].isnan() and not ssim(x, reference)[0].isnan()


def test_masked_psnr_counts_the_mask_alone():
    reference = torch.zeros(1, 1, 8, 8)
    x = reference.clone()
    x[..., :4] = 0.1
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., :4] = True
    assert masked_psnr(x, reference, mask).item() == pytest.approx(20.0, abs=1e-5)
    assert masked_psnr(x, reference, ~mask).item() == math.inf
    assert masked_psnr(x, reference, torch.zeros_like(mask)).isnan().all()
    x[..., 4:] = math.nan  # outside the mask nothing matters
    assert masked_psnr(x, reference, mask).item() == pytest.approx(20.0, abs=1e-5)


def test_shapes_that_do_not_fit_are_explained():
    with pytest.raises(InputError, match=r"\(1, 1, 8, 8\).*\(1, 1, 9, 9\)"):
        psnr(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 9, 9))
    with pytest.raises(InputError, match="at least 7 pixels"):
        ssim(torch.zeros(1, 1, 6, 30), torch.zeros(1, 1, 6, 30))
    with pytest.raises(InputError, match="batch of images"):
        psnr(torch.zeros(8, 8), torch.zeros(8, 8))


def _disk(size: int, centre: tuple[float, float], radius: float) -> torch.Tensor:
    i, j = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return ((i - centre[0]) ** 2 + (j - centre[1]) ** 2) <= radius**2


def test_body_mask_fills_lungs_and_leaves_the_table_out():
    body = _disk(128, (60, 64), 45)
    lung = _disk(128, (55, 50), 12)
    table = torch.zeros(128, 128, dtype=torch.bool)
    table[105:108, 10:118] = True  # three pixels thick, touching the skin
    image = 0.35 * (body | table).float()
    image[lung] = 0.05
    mask = body_mask(image[None, None])
    assert mask.shape == (1, 1, 128, 128) and mask.dtype == torch.bool
    assert mask[0, 0][lung].all()
    assert (mask[0, 0] ^ body).float().mean() < 0.005
    assert not mask[0, 0, 105:108, :30].any()


def test_body_mask_of_air_is_empty_and_of_a_cut_body_reaches_the_edge():
    assert not body_mask(torch.zeros(1, 1, 16, 16)).any()
    assert body_mask(torch.ones(2, 1, 12, 9)).all()
    assert body_mask(torch.ones(1, 1, 1, 1)).all()
    single = torch.zeros(1, 1, 16, 16)
    single[..., 3, 3] = 1
    assert body_mask(single).sum() == 1


def test_relative_residual_is_per_image():
    matrix = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 4))).float()
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    y = x @ matrix.T
    assert relative_residual(lambda z: z @ matrix.T, x, y).tolist() == [0.0, 0.0]
    assert relative_residual(lambda z: z @ matrix.T, torch.zeros_like(x), y).tolist() == pytest.approx([1.0, 1.0])
