"""Coil maps: ESPIRiT and its fallbacks on coils that are known, pre-whitening, simulation, errors, one real scan."""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path

import pytest
import torch

from invrecon.errors import InputError
from invrecon.operators.coils import (
    ESPIRiT,
    LowResolutionMaps,
    WalshMaps,
    noise_covariance,
    normalise_maps,
    prewhiten,
    simulated_maps,
    smooth_phase,
    with_phase,
)
from invrecon.operators.fourier import complex_to_channels, complex_to_pairs, ifft2c, pairs_to_complex
from invrecon.operators.mri import CartesianMRI
from invrecon.operators.sampling import central_block
from tests.operators.battery import relative_error

SIZE = (40, 37)


def generator(seed: int = 0):
    return torch.Generator().manual_seed(seed)


def phantom(size=SIZE):
    """A disc with structure and a smooth phase, `(1, 2, H, W)`."""
    rows, columns = (torch.linspace(-1, 1, num) for num in size)
    radius = torch.hypot(rows[:, None] / 0.85, columns / 0.8)
    texture = 1 + 0.4 * torch.cos(7 * rows[:, None]) * torch.cos(5 * columns)
    return with_phase(texture * (radius < 1), smooth_phase(size, generator(3)))[None]


def scan(num_coils: int = 6, size=SIZE, noise: float = 0.0):
    """K-space `(coils, H, W, 2)` of the phantom, and the maps it was made with."""
    maps = simulated_maps(num_coils, size, generator(1))
    kspace = CartesianMRI(size, maps=maps)(phantom(size))[0]
    return kspace + noise * torch.randn(kspace.shape, generator=generator(2)), maps


def unexplained(maps, truth, where):
    """Share of the true sensitivities that the estimated ones do not span, in the norm over pixels of `where`."""
    s, t = pairs_to_complex(maps)[:, where], pairs_to_complex(truth)[:, where]
    return float((t - s * (s.conj() * t).sum(0)).norm() / t.norm())


INSIDE = phantom()[0].norm(dim=0) > 0


@pytest.mark.parametrize(
    ("estimator", "tolerance"),
    [(ESPIRiT(), 0.02), (LowResolutionMaps(), 0.12), (WalshMaps(), 0.12)],
    ids=["espirit", "low-resolution", "walsh"],
)
@pytest.mark.parametrize("size", [SIZE, (48, 48)])
def test_maps_are_recovered_up_to_a_phase(estimator, tolerance, size):
    kspace, truth = scan(size=size)
    inside = phantom(size)[0].norm(dim=0) > 0
    maps = estimator(kspace, central_block(size, (20, 20)))
    assert maps.shape == truth.shape and maps.dtype == torch.float32
    found = maps.square().sum((0, -1))
    assert torch.allclose(found[found > 0], torch.ones(()), atol=1e-5), "normalised where they are not zero"
    assert float((found[inside] > 0).float().mean()) > 0.97
    assert unexplained(maps, truth, inside & (found > 0)) < tolerance


def test_espirit_is_better_than_the_fallbacks():
    kspace, truth = scan()
    errors = [
        unexplained(e(kspace, central_block(SIZE, (16, 16))), truth, INSIDE)
        for e in (ESPIRiT(crop=0), WalshMaps(crop=0))
    ]
    assert errors[0] < errors[1] / 2


def test_espirit_sees_where_there_is_no_object():
    """A small object in a wide field of view: far from it no pixel is consistent with the calibration data."""
    size = (64, 64)
    x = torch.zeros(1, 2, *size)
    x[:, :, 24:40, 24:40] = phantom((16, 16))
    kspace = CartesianMRI(size, maps=simulated_maps(6, size, generator(1)))(x)[0]
    support = ESPIRiT(threshold=0.05)(kspace).square().sum((0, -1)) > 0
    assert support[28:36, 28:36].all()
    assert not support[:6].any() and not support[:, -6:].any()


def test_only_the_calibration_region_counts():
    kspace, _ = scan()
    block = central_block(SIZE, (18, 18))
    other = torch.where(block[..., None], kspace, torch.randn(kspace.shape, generator=generator(5)))
    for estimator in (ESPIRiT(), LowResolutionMaps(), WalshMaps()):
        assert torch.equal(estimator(kspace, block), estimator(other, block))


def test_the_mask_is_found_in_k_space():
    kspace, _ = scan()
    lines = torch.zeros(1, SIZE[1])
    lines[0, 10:26] = 1
    sampled = kspace * lines[..., None]
    assert torch.equal(ESPIRiT()(sampled), ESPIRiT()(kspace, lines))


def test_where_the_centre_is_too_small_for_patches_maps_are_low_resolution_images():
    kspace, _ = scan()
    with pytest.warns(UserWarning, match="8 x 8 samples.*has 6 x 6 of them.*LowResolutionMaps"):
        maps = ESPIRiT()(kspace, central_block(SIZE, (6, 6)))
    assert torch.equal(maps, LowResolutionMaps()(kspace, central_block(SIZE, (6, 6))))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ESPIRiT(kernel_size=4)(kspace, central_block(SIZE, (6, 6)))
    assert not [w for w in said if "LowResolutionMaps" in str(w.message)]
    assert [w for w in said if "are zero where" in str(w.message)], "of so few samples they are good for little"


def test_one_coil_has_unit_maps():
    kspace, _ = scan(num_coils=1)
    maps = ESPIRiT(crop=0)(kspace)
    assert torch.allclose(maps.square().sum((0, -1)), torch.ones(SIZE), atol=1e-5)


def test_sense_with_estimated_maps_is_the_coil_combination():
    kspace, _ = scan(noise=0.01)
    maps = ESPIRiT()(kspace, central_block(SIZE, (20, 20)))
    combined = (pairs_to_complex(maps).conj() * ifft2c(pairs_to_complex(kspace))).sum(0)
    found = CartesianMRI(SIZE, maps=maps).pinv(kspace[None])
    assert relative_error(found, complex_to_channels(combined[None])) < 1e-5


def test_maps_turn_with_the_phases_of_the_coils_alone():
    """The common phase belongs to the image: turning the whole k-space turns no map."""
    kspace, _ = scan()
    turned = complex_to_pairs(pairs_to_complex(kspace) * torch.polar(torch.ones(()), torch.tensor(1.1)))
    for estimator in (ESPIRiT(), LowResolutionMaps(), WalshMaps()):
        before, after = (pairs_to_complex(estimator(k)) for k in (kspace, turned))
        difference = (after - before * (before.conj() * after).sum(0)).norm() / before.norm()
        assert float(difference) < 1e-3
        phase = (before.conj() * after).sum(0)[INSIDE].angle()
        assert float(phase.std()) < 0.02, "one phase for all pixels"


def test_the_real_scan_is_explained_up_to_its_noise():
    folder = Path(os.environ.get("INVRECON_DATA") or Path(__file__).parents[3] / "shared" / "data")
    path = folder / "mri" / "kspace" / "espirit-full.h5"
    if not path.is_file():
        pytest.skip("INVRECON_DATA does not name the folder of research data")
    import h5py

    with h5py.File(path) as file:
        z = torch.from_numpy(file["data"][()])
    z = z / z.abs().amax()
    maps = pairs_to_complex(ESPIRiT()(complex_to_pairs(z), central_block((230, 180), (24, 24))))
    images = ifft2c(z)
    residual = images - maps * (maps.conj() * images).sum(0)
    noise = z[:, :12, :12].abs().square().mean().sqrt() * math.sqrt(z.numel() * 7 / 8)  # 7 of 8 dimensions hold none
    assert float(residual.norm()) < 1.1 * float(noise)
    # SENSE at R = 1 is the combination of coils, and where there is an object that is the root sum of squares.
    combined = (maps.conj() * images).sum(0)
    sense = CartesianMRI((230, 180), maps=complex_to_pairs(maps)).pinv(complex_to_pairs(z)[None])
    assert relative_error(sense, complex_to_channels(combined[None])) < 1e-4
    inside, strength = maps.abs().sum(0) > 0, images.abs().square().sum(0).sqrt()
    difference = float((combined.abs() - strength)[inside].norm() / strength[inside].norm())
    print(f"SENSE at R = 1 against the root sum of squares: {difference:.4f}")
    assert difference < 0.05, "noise makes the root sum of squares larger"


# Pre-whitening ----------------------------------------------------------------------------------------------


def test_white_noise_is_left_of_correlated_noise():
    mixing = torch.randn(4, 4, dtype=torch.complex64, generator=generator()) + 2 * torch.eye(4)
    white = torch.randn(4, 60, 50, 2, generator=generator(1))
    noise = complex_to_pairs(torch.einsum("cd,dhw->chw", mixing, pairs_to_complex(white)))
    covariance = noise_covariance(noise)
    assert relative_error(covariance, complex_to_pairs(mixing @ mixing.mH)) < 0.05
    whitened = prewhiten(noise, covariance)
    identity = torch.view_as_real(torch.eye(4, dtype=torch.complex64))
    assert torch.allclose(noise_covariance(whitened), identity, atol=1e-4)
    assert float(whitened.std()) == pytest.approx(1, abs=0.01), "one per real component"
    both = prewhiten(torch.stack((noise, 2 * noise)), covariance)
    assert torch.allclose(both[1], 2 * whitened, rtol=1e-4, atol=1e-5)


def test_whitening_changes_no_image():
    """Whitened k-space with whitened maps has the same solution: both sides are multiplied by the same matrix."""
    kspace, maps = scan(4)
    covariance = noise_covariance(
        torch.randn(4, 500, 2, generator=generator(4)) * torch.tensor([1.0, 2, 3, 4])[:, None, None]
    )
    whitened_maps = prewhiten(maps, covariance)
    strength = whitened_maps.square().sum((0, -1)).sqrt()
    operator = CartesianMRI(SIZE, maps=normalise_maps(whitened_maps))
    found = operator.pinv(prewhiten(kspace, covariance)[None], tol=1e-9)
    assert relative_error(found / strength, phantom()) < 1e-4


# Simulation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (7, 4), (32, 32)])
def test_simulated_coils_are_normalised_and_smooth(size):
    maps = simulated_maps(5, size, generator())
    assert maps.shape == (5, *size, 2)
    assert torch.allclose(maps.square().sum((0, -1)), torch.ones(size), atol=1e-5)
    if size == (32, 32):
        for axis in (1, 2):
            assert float(maps.diff(dim=axis).square().sum((0, -1)).sqrt().amax()) < 0.25
    assert torch.equal(maps, simulated_maps(5, size, generator()))
    assert not torch.equal(maps, simulated_maps(5, size, generator(1)))


def test_phase_changes_no_magnitude():
    phase = smooth_phase((30, 20), generator())
    magnitude = torch.rand(30, 20)
    image = with_phase(magnitude, phase)
    assert torch.allclose(image.norm(dim=0), magnitude, atol=1e-6)
    assert float(phase.diff(dim=0).abs().amax()) < 1 and float(phase.std()) > 0.1


def test_normalising_leaves_dark_pixels_dark():
    maps = torch.randn(3, 4, 5, 2)
    maps[:, 1, 2] = 0
    normalised = normalise_maps(maps)
    assert not normalised[:, 1, 2].any() and torch.isfinite(normalised).all()
    assert torch.allclose(normalised.square().sum((0, -1))[0], torch.ones(5))


KSPACE = torch.randn(3, 20, 20, 2)


@pytest.mark.parametrize("estimator", [ESPIRiT(), LowResolutionMaps(), WalshMaps()], ids=["espirit", "low", "walsh"])
@pytest.mark.parametrize(
    ("kspace", "mask", "message"),
    [
        (KSPACE, torch.eye(20), "ACS.*has 1 x 1"),
        (KSPACE, torch.arange(400).reshape(20, 20) == 0, "ACS.*has 0 x 0"),
        (KSPACE, torch.ones(20, 21), "mask of shape"),
        (torch.zeros(3, 20, 20, 2), torch.ones(20, 20), "zero throughout"),
        (KSPACE[:0], None, "zero coils"),
        (KSPACE[0], None, "one slice"),
        (torch.complex(KSPACE, KSPACE), None, "one slice"),
        (torch.full((2, 8, 8, 2), math.nan), None, "NaN"),
    ],
)
def test_bad_k_space(estimator, kspace, mask, message):
    with pytest.raises(InputError, match=message):
        estimator(kspace, mask)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ESPIRiT(kernel_size=0), "kernel_size"),
        (lambda: ESPIRiT(kernel_size=9, max_acs=8), "kernel_size"),
        (lambda: ESPIRiT(threshold=0.0), "threshold"),
        (lambda: ESPIRiT(crop=1.0), "crop"),
        (lambda: WalshMaps(block=4), "block"),
        (lambda: LowResolutionMaps(crop=-0.1), "crop"),
        (lambda: LowResolutionMaps(max_acs=0), "max_acs"),
        (lambda: simulated_maps(0, (4, 4), generator()), "num_coils"),
        (lambda: simulated_maps(2, (4, 4), generator(), radius=1.0), "radius"),
        (lambda: noise_covariance(torch.randn(4, 3, 2)), "more samples"),
        (lambda: prewhiten(KSPACE, torch.zeros(2, 2, 2)), "does not fit"),
        (lambda: prewhiten(KSPACE, torch.zeros(3, 3, 2)), "positive definite"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(InputError, match=message):
        make()
