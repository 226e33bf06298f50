"""When to stop: splits that visit every view, and the discrepancy at the noise level."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from invrecon.adapt.stopping import Discrepancy, HeldOutRays, HeldOutViews, held_out_loss, held_out_losses, loss_on
from invrecon.errors import InputError
from invrecon.methods.stopping import restrict_to
from invrecon.operators import Identity, LinearOperator, ParallelBeamCT
from tests.methods.toy import make_toy


def ct(num_views: int = 20) -> LinearOperator:
    return ParallelBeamCT(8, num_views=num_views, num_bins=12).double()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def masks(rule: HeldOutViews, operator: LinearOperator, num: int, seed: int = 0) -> Tensor:
    """Which views each check holds out, `(num, num_views)`; whole ones, of what is not kept."""
    y = torch.zeros(1, *operator.measurement_shape, dtype=torch.float64)
    splits = [rule.split(check, operator, y, generator(seed)) for check in range(num)]
    assert all(torch.equal(kept, ~held_out) for kept, held_out in splits)
    views = torch.stack([held_out[0, 0, :, 0] for _, held_out in splits])
    assert all(torch.equal(view[:, None].expand(held_out[0, 0].shape), held_out[0, 0])
               for view, (_, held_out) in zip(views, splits, strict=True))  # fmt: skip
    return views


# held-out views


@given(num_views=st.integers(2, 70), fraction=st.floats(0.02, 0.5))
def test_rotating_masks_hold_out_every_view_once_a_round(num_views: int, fraction: float) -> None:
    operator = Identity((num_views, 3))
    num_checks = min(num_views, round(1 / fraction))
    drawn = masks(HeldOutViews(fraction), operator, 2 * num_checks)
    assert drawn.dtype == torch.bool and drawn.shape == (2 * num_checks, num_views)
    assert torch.equal(drawn[:num_checks].sum(0), torch.ones(num_views, dtype=torch.long))
    assert torch.equal(drawn[:num_checks], drawn[num_checks:])
    counts = drawn.sum(1)
    assert int(counts.min()) >= 1 and int(counts.max() - counts.min()) <= 1
    assert not (drawn[:, 1:] & drawn[:, :-1]).any()  # never two neighbours at once


def test_five_per_cent_of_the_views() -> None:
    assert set(masks(HeldOutViews(0.05), ct(60), 20).sum(1).tolist()) == {3}
    assert set(masks(HeldOutViews(0.05), ct(20), 20).sum(1).tolist()) == {1}


def test_splits_are_a_function_of_seed_and_check() -> None:
    rule, operator, g = HeldOutViews(), ct(), generator()
    y, state = torch.zeros(1, *operator.measurement_shape), g.get_state()
    first = rule.split(3, operator, y, g)[1]
    assert torch.equal(g.get_state(), state)  # the sampler's draws are left alone
    torch.randn(7, generator=g)
    assert torch.equal(rule.split(3, operator, y, g)[1], first)
    assert not torch.equal(masks(rule, operator, 20), masks(rule, operator, 20, seed=1))


@pytest.mark.parametrize("num_views", [3, 20, 31])
def test_rotating_runs_hold_out_every_ray_that_crosses_the_image_once(num_views: int) -> None:
    operator = ParallelBeamCT(32, num_views=num_views, num_bins=64).double()
    y = torch.zeros(2, *operator.measurement_shape, dtype=torch.float64)
    crossing = operator(torch.ones(1, *operator.image_shape, dtype=torch.float64))[0, 0] > 0
    splits = [HeldOutRays(0.1).split(check, operator, y, generator()) for check in range(10)]
    assert all(torch.equal(kept, ~held_out) for kept, held_out in splits)
    times = sum(held_out[:, 0].long() for _, held_out in splits)
    assert torch.equal(times, crossing.long().expand(2, -1, -1))
    for _, held_out in splits:
        rays = held_out[0, 0]
        starts = rays[:, 1:] & ~rays[:, :-1]
        assert (starts.sum(1) == 1).all()  # one run a view
        assert not (rays[1:] & rays[:-1])[:, 28:36].any()  # neighbouring views lack others
        assert held_out_losses(operator, y[:1], torch.ones(1, 1, 32, 32, dtype=torch.float64), held_out[:1]).min() > 0


@pytest.mark.parametrize(("fraction", "num_parts"), [(0.2, 4 * 16), (0.5, 10)])  # few views are asked in pieces
def test_the_parts_of_a_loss_make_the_whole(fraction: float, num_parts: int) -> None:
    operator = ParallelBeamCT(32, num_views=20, num_bins=64).double()
    x = torch.rand(1, *operator.image_shape, dtype=torch.float64)
    y = operator(torch.rand_like(x))
    held_out = HeldOutViews(fraction).split(0, operator, y, generator())[1]
    parts = held_out_losses(operator, y, x, held_out)
    assert len(parts) == num_parts
    torch.testing.assert_close(parts.mean(0, keepdim=True), held_out_loss(operator, y, x, held_out))


def test_what_is_no_sinogram_is_held_out_by_lines() -> None:
    y, operator = torch.zeros(1, 1, 40, 3), Identity((40, 3))
    pairs = zip(HeldOutRays().split(2, operator, y, generator()), HeldOutViews().split(2, operator, y, generator()),
                strict=True)  # fmt: skip
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_loss_sees_nothing_but_its_rows() -> None:
    operator = ct()
    x = torch.rand(2, *operator.image_shape, dtype=torch.float64)
    y = operator(x)
    kept, held_out = HeldOutViews(0.2).split(0, operator, y, generator())
    assert torch.equal(loss_on(operator, y, x, held_out), torch.zeros(2, dtype=torch.float64))
    spoilt = torch.where(held_out, y + 0.5, y + 3)
    torch.testing.assert_close(loss_on(operator, spoilt, x, held_out), torch.full((2,), 0.25, dtype=torch.float64))
    torch.testing.assert_close(loss_on(operator, spoilt, x, kept), torch.full((2,), 9.0, dtype=torch.float64))


# stopping rules


def test_discrepancy_stops_at_the_noise_level() -> None:
    operator = ct()
    x = torch.rand(2, *operator.image_shape, dtype=torch.float64)
    noise = torch.randn(2, *operator.measurement_shape, dtype=torch.float64)
    std = torch.tensor([0.1, 0.5], dtype=torch.float64)
    operator.noise_std = std
    y = operator(x) + std[:, None, None, None] * noise / noise.square().flatten(1).mean(1).sqrt()[:, None, None, None]
    assert Discrepancy(1.001)(operator, y, x).tolist() == [True, True]
    assert Discrepancy(0.999)(operator, y, x).tolist() == [False, False]
    operator.noise_std = std.flip(0)
    assert Discrepancy()(operator, y, x).tolist() == [True, False]  # each sample by its own level


def test_discrepancy_never_stops_without_noise() -> None:
    toy = make_toy(noise_std=0.0)
    assert Discrepancy()(toy.operator, toy.operator(toy.truth), toy.truth).tolist() == [False]


def test_discrepancy_counts_rays_by_their_precision_and_only_those_seen() -> None:
    operator = ct()
    x = torch.rand(1, *operator.image_shape, dtype=torch.float64)
    std = 0.1 + torch.rand(1, *operator.measurement_shape, dtype=torch.float64)
    operator.noise_std = std
    y = operator(x) + std  # one standard deviation off everywhere
    kept, _ = HeldOutViews(0.5).split(0, operator, y, generator())
    for physics, data in ((operator, y), restrict_to(operator, y, kept)):
        assert Discrepancy(1.001)(physics, data, x).item() is True
        assert Discrepancy(0.999)(physics, data, x).item() is False


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: HeldOutViews(0.0), "fraction"),
        (lambda: HeldOutViews(0.7), "fraction"),
        (lambda: HeldOutViews(patience=0), "patience"),
        (lambda: Discrepancy(0.0), "factor"),
        (lambda: HeldOutViews().split(0, ct(1), torch.zeros(1, 1, 1, 12), generator()), "at least two of them, got 1"),
    ],
)
def test_refusals(make, word: str) -> None:
    with pytest.raises(InputError, match=word):
        make()
