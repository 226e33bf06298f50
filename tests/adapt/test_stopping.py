"""When to stop: masks that visit every view, operators without views, and the rules on hand-made curves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from invrecon.adapt.stopping import Discrepancy, HeldOutViews, Stopper, held_out_loss, without_views
from invrecon.errors import InputError
from invrecon.operators import Identity, LinearOperator, ParallelBeamCT
from tests.methods.toy import make_toy
from tests.operators.battery import dot_product_mismatch


def ct(num_views: int = 20) -> LinearOperator:
    return ParallelBeamCT(8, num_views=num_views, num_bins=12).double()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def masks(rule: HeldOutViews, operator: LinearOperator, num: int, seed: int = 0) -> Tensor:
    return torch.stack([rule.mask(check, operator, generator(seed)) for check in range(num)])


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


def test_masks_are_a_function_of_seed_and_check() -> None:
    rule, operator, g = HeldOutViews(), ct(), generator()
    state = g.get_state()
    first = rule.mask(3, operator, g)
    assert torch.equal(g.get_state(), state)  # the sampler's draws are left alone
    torch.randn(7, generator=g)
    assert torch.equal(rule.mask(3, operator, g), first)
    assert not torch.equal(masks(rule, operator, 20), masks(rule, operator, 20, seed=1))


def test_without_views_is_an_operator_that_does_not_see_them() -> None:
    operator = ct()
    operator.noise_std = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    held_out = HeldOutViews(0.2).mask(1, operator, generator())
    y = torch.randn(3, *operator.measurement_shape, dtype=torch.float64)
    kept, rest = without_views(operator, y, held_out)

    assert dot_product_mismatch(kept) < 1e-12
    x = torch.rand(3, *operator.image_shape, dtype=torch.float64)
    for masked, full in ((kept(x), operator(x)), (rest, y)):
        assert not masked[..., held_out, :].any()
        assert torch.equal(masked[..., ~held_out, :], full[..., ~held_out, :])
    assert kept.noise_std is operator.noise_std
    spoilt = torch.where(held_out[:, None], 1e6, y)
    assert torch.equal(kept.prox(x, without_views(operator, spoilt, held_out)[1], 0.1), kept.prox(x, rest, 0.1))
    assert torch.equal(kept.adjoint(spoilt), kept.adjoint(y))


def test_held_out_loss_sees_nothing_but_them() -> None:
    operator = ct()
    held_out = HeldOutViews(0.2).mask(0, operator, generator())
    x = torch.rand(2, *operator.image_shape, dtype=torch.float64)
    y = operator(x)
    assert torch.equal(held_out_loss(operator, y, x, held_out), torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(
        held_out_loss(operator, torch.where(held_out[:, None], y + 0.5, y + 100), x, held_out),
        torch.full((2,), 0.25, dtype=torch.float64),
    )


# stopping rules


@pytest.mark.parametrize(
    ("curve", "patience", "stopped", "best"),
    [
        ([5, 4, 3, 2, 1], 1, None, 4),
        ([5, 4, 3, 4, 5, 6, 7], 3, 5, 2),
        ([5, 4, 3, 4, 5, 2, 3, 4, 5], 3, 8, 5),  # a new best starts the count again
        ([5, 3, 4, 3.5, 3.2], 3, 4, 1),  # falling, yet above the best
        ([2, 3], 1, 1, 0),
        ([1, 1, 1, 1, 1], 1, None, 0),  # nothing rises
        ([2, 1, float("nan"), float("inf")], 2, 3, 1),
        ([float("nan")] * 2, 2, 1, 0),
    ],
)
def test_stops_after_so_many_values_above_the_best(
    curve: list[float], patience: int, stopped: int | None, best: int
) -> None:
    rule = HeldOutViews(patience=patience).stopper()
    answers = [rule.update(float(value)) for value in curve]
    assert (answers.index(True) if True in answers else None) == stopped
    assert rule.best == best


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
    held_out = HeldOutViews(0.5).mask(0, operator, generator())
    for physics, data in ((operator, y), without_views(operator, y, held_out)):
        assert Discrepancy(1.001)(physics, data, x).item() is True
        assert Discrepancy(0.999)(physics, data, x).item() is False


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: HeldOutViews(0.0), "fraction"),
        (lambda: HeldOutViews(0.7), "fraction"),
        (lambda: HeldOutViews(patience=0), "patience"),
        (lambda: Stopper(0), "patience"),
        (lambda: Discrepancy(0.0), "factor"),
        (lambda: HeldOutViews().mask(0, make_toy().operator, generator()), "at least two"),
    ],
)
def test_refusals(make, word: str) -> None:
    with pytest.raises(InputError, match=word):
        make()
