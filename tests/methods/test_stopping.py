"""When to stop: what is held out of every kind of measurement, what counts, and rules on hand-made curves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from invrecon.adapt import ExpectationMaximisation, HeldOutViews, SelfSupervised
from invrecon.adapt.stopping import Discrepancy, loss_on
from invrecon.methods import ProximalDiffusion
from invrecon.methods.dip import AllIterations, DiscrepancyStop, HeldOutStop
from invrecon.methods.dip.measurement import CaseData
from invrecon.methods.stopping import PairedStopper, Stopper, discrepancy, imaged, lines_of, measured, restrict_to
from invrecon.operators import CartesianMRI, LinearOperator, ParallelBeamCT, RandomInpainting
from invrecon.operators.nufft import RadialMRI
from invrecon.priors.edm import EDMDenoiser
from invrecon.priors.patch import PatchPrior
from invrecon.priors.unet import UNet
from invrecon.rng import make_generator, make_generators
from tests.operators.battery import dot_product_mismatch

SIZE = 16


def columns(spacing: int, centre: int, shift: int = 0) -> Tensor:
    """A mask of whole columns: each `spacing`-th and the centre's, `(1, SIZE)`."""
    numbers = torch.arange(SIZE)
    return ((numbers % spacing == shift) | ((numbers - SIZE / 2 + 0.5).abs() < centre / 2)).float()[None]


def points(share: float) -> Tensor:
    """A mask of points, among them four in the centre, `(SIZE, SIZE)`."""
    mask = (torch.rand(SIZE, SIZE, generator=make_generator(0, "points")) < share).float()
    mask[7:9, 7:9] = 1
    return mask


def mri(*masks: Tensor, num_coils: int = 1) -> CartesianMRI:
    """Cases with masks of their own, and as many coils."""
    operator = CartesianMRI(SIZE).double()
    if num_coils > 1:
        maps = torch.randn(len(masks), num_coils, SIZE, SIZE, 2, generator=make_generator(0, "maps")).double()
        operator._set_maps(maps / maps.square().sum((1, 4), keepdim=True).sqrt())
    operator._set_mask(torch.stack(masks))
    return operator


PHYSICS = {
    "views": lambda: ParallelBeamCT(SIZE, num_views=9, num_bins=40).double(),  # some rays miss the image
    "columns": lambda: mri(columns(2, 4)),
    "few columns": lambda: mri(columns(5, 2), num_coils=3),
    "points": lambda: mri(points(0.4), num_coils=2),
    "few points": lambda: mri(points(0.05)),
    "a mask a case": lambda: mri(columns(3, 4), columns(5, 2, 1), num_coils=2),
    "readouts": lambda: RadialMRI(SIZE, num_spokes=6).double(),
    "pixels": lambda: RandomInpainting(SIZE, 0.7).double(),
}


@pytest.fixture(params=list(PHYSICS))
def operator(request: pytest.FixtureRequest) -> LinearOperator:
    return PHYSICS[request.param]()


def rows_of(operator: LinearOperator, num: int = 2) -> Tensor:
    """What was measured, `(num, *measurement_shape)`: known by construction."""
    ones = torch.ones(num, *operator.measurement_shape)
    if isinstance(operator, RandomInpainting):
        return operator(torch.ones(num, *operator.image_shape).double()).bool()
    if isinstance(operator, CartesianMRI):
        return operator.mask.bool()[..., None].expand(ones.shape)
    return operator.restrict(ones).bool()


def noisy(operator: LinearOperator, std: Tensor) -> tuple[Tensor, Tensor]:
    """Two images and what was measured of them: noise whose mean square is the variance, and junk off the mask."""
    x = torch.randn(2, *operator.image_shape, generator=make_generator(0, "x"), dtype=torch.float64)
    rows = rows_of(operator)
    noise = rows * torch.randn(rows.shape, generator=make_generator(0, "noise"), dtype=torch.float64)
    power = noise.square().flatten(1).sum(1) / rows.flatten(1).sum(1)
    level = (std / power.sqrt()).reshape(-1, *[1] * (noise.ndim - 1))
    return x, torch.where(rows, operator(x) + level * noise, 50.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# what counts


def test_the_discrepancy_of_the_truth_is_one_whatever_was_measured(operator: LinearOperator) -> None:
    std = torch.tensor([0.1, 0.4], dtype=torch.float64)
    operator.noise_std = std
    x, y = noisy(operator, std)
    assert torch.equal(measured(operator, y), rows_of(operator))
    torch.testing.assert_close(discrepancy(operator(x) - y, rows_of(operator), std), torch.ones(2).double())
    for physics, data in ((operator, y), restrict_to(operator, y, rows_of(operator))):
        assert Discrepancy(1.001)(physics, data, x).tolist() == [True, True]
        assert Discrepancy(0.999)(physics, data, x).tolist() == [False, False]


def test_a_fit_has_the_same_discrepancy(operator: LinearOperator) -> None:
    operator.noise_std = torch.tensor([0.2, 0.2], dtype=torch.float64)
    x, y = noisy(operator, operator.noise_std)
    for b in range(2):
        own, one = operator.select_cases(slice(b, b + 1), 2), slice(b, b + 1)
        data = CaseData(y[one], own, AllIterations(), generator())
        assert not (data.seen & ~rows_of(operator)[one]).any()
        monitor = DiscrepancyStop().monitor(data)
        monitor(1, x[one], own(x[one]) - data.y)
        # Rays that miss the image are none of its rows: the noise of the others is not exactly average.
        rough = isinstance(operator, ParallelBeamCT)
        assert monitor.value == pytest.approx(1.0, abs=0.3 if rough else 1e-9)


# what is held out


def splits(operator: LinearOperator, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Those of both rules, some checks."""
    found = [HeldOutViews(0.3).split(check, operator, y, generator()) for check in range(3)]
    rows = measured(operator, y)
    return [*found, *(HeldOutStop(0.3).split(operator, rows, generator(seed)) for seed in range(3))]


def test_kept_and_held_out_are_disjoint_whole_lines_of_what_was_measured(operator: LinearOperator) -> None:
    rows = rows_of(operator)
    for kept, held_out in splits(operator, noisy(operator, torch.ones(2))[1]):
        assert torch.equal(kept | held_out, rows) and not (kept & held_out).any()
        assert (kept.flatten(1).any(1) & held_out.flatten(1).any(1)).all()
        if isinstance(operator, CartesianMRI):
            chosen = held_out.any(-1).any(1)  # a point of k-space, in all coils, real and imaginary part
            assert torch.equal(held_out, (chosen[:, None, :, :, None] & rows))
            if operator.mask.shape[2] == 1:
                assert torch.equal(chosen, chosen.any(1, keepdim=True).expand_as(chosen))  # a column
            assert not chosen[:, 7:9, 7:9].any()  # never the fully sampled centre
        else:
            others = [d for d in range(1, rows.ndim) if d != 2]  # a view, a readout, a row of pixels
            assert torch.equal(held_out, held_out.amax(others, keepdim=True) & rows)


def test_every_line_is_held_out_once(operator: LinearOperator) -> None:
    y = noisy(operator, torch.ones(2))[1]
    lines, num_checks = lines_of(operator, rows_of(operator)), 3
    times = sum(HeldOutViews(0.34).split(check, operator, y, generator())[1].int() for check in range(num_checks))
    assert torch.equal(times, ((lines >= 0) & rows_of(operator)).int())


def test_a_case_is_split_as_it_is_alone() -> None:
    operator = PHYSICS["a mask a case"]()
    y = noisy(operator, torch.ones(2))[1]
    for b in range(2):
        alone = splits(operator.select_cases(slice(b, b + 1), 2), y[b : b + 1])[:3]
        for own, both in zip(alone, splits(operator, y), strict=False):
            assert torch.equal(own[0][0], both[0][b]) and torch.equal(own[1][0], both[1][b])
    # Samples of one case in a row are split alike.
    held_out = HeldOutViews(0.3).split(0, operator, y.repeat_interleave(2, dim=0), generator())[1]
    assert torch.equal(held_out[0], held_out[1]) and not torch.equal(held_out[1], held_out[2])


def test_lines_leave_the_centre_of_kspace_alone() -> None:
    operator = mri(columns(3, 4))
    lines = lines_of(operator, rows_of(operator, 1))[0, 0, :, :, 0]
    assert torch.equal(lines, lines[:1].expand_as(lines))
    # Measured are 0, 3, 6 to 9, 12 and 15; the run around 8 that is sampled throughout is 6 to 9.
    expected = torch.full((SIZE,), -1)
    expected[[0, 3, 12, 15]] = torch.arange(4)
    assert torch.equal(lines[0], expected)


@pytest.mark.parametrize(
    ("size", "missing", "centre"),
    [
        (16, [], range(6, 10)),  # complete: a centre of 8 % of the side, 4 to 24 lines
        (64, [], range(30, 35)),
        (512, [], range(244, 268)),
        (64, [0, 63], range(30, 35)),  # nearly so
        (64, [5], range(30, 35)),
        (64, [*range(28), *range(36, 64)], range(30, 34)),  # of a centre alone, half
        (64, [k for k in range(64) if k % 4 and not 20 <= k < 44], range(20, 45)),  # undersampled: all of it
    ],
)
def test_a_centre_is_kept_however_complete_the_scan(size: int, missing: list[int], centre: range) -> None:
    mask = torch.ones(size, dtype=torch.bool)
    mask[missing] = False
    operator = CartesianMRI(size)
    operator._set_mask(mask.float()[None, None])
    lines = lines_of(operator, mask[:, None].expand(1, 1, size, size, 2))[0, 0, 0, :, 0]
    expected = mask.clone()
    expected[list(centre)] = False
    assert torch.equal(lines >= 0, expected) and lines[lines >= 0].tolist() == list(range(int(expected.sum())))


def test_a_fit_to_a_complete_scan_sees_the_brightness_of_the_image() -> None:
    operator = mri(torch.ones(1, SIZE), num_coils=2)
    x = torch.cat([torch.ones(1, 1, SIZE, SIZE), torch.zeros(1, 1, SIZE, SIZE)], 1).double()
    operator._set_maps(torch.tensor([1.0, 0.0]).double().expand(1, 2, SIZE, SIZE, 2) / 2**0.5)
    y = operator(x)
    for seed in range(20):
        data = CaseData(y, operator, HeldOutStop(0.3), generator(seed))
        assert data.held_out.any() and float(data.fitted_y.square().sum() / y.square().sum()) == pytest.approx(1)


def test_what_is_held_out_already_is_no_line(operator: LinearOperator) -> None:
    y = noisy(operator, torch.ones(2))[1]
    kept, held_out = HeldOutViews(0.3).split(0, operator, y, generator())
    seen, y_seen = restrict_to(operator, y, kept)
    for again, more in splits(seen, y_seen):
        assert torch.equal(again | more, kept) and not (more & held_out).any()


def test_the_restricted_operator_knows_its_rows_alone(operator: LinearOperator) -> None:
    operator.noise_std = torch.tensor([0.1, 0.2], dtype=torch.float64)
    x, y = noisy(operator, operator.noise_std)
    kept, held_out = HeldOutViews(0.3).split(1, operator, y, generator())
    seen, y_seen = restrict_to(operator, y, kept)
    assert seen.noise_std is operator.noise_std
    if len(seen.weights) == 1:
        assert dot_product_mismatch(seen) < 1e-12
    assert torch.equal(seen(x), torch.where(kept, operator(x), 0.0)) and torch.equal(y_seen, torch.where(kept, y, 0.0))
    spoilt = torch.where(kept, y, -7.0)
    assert torch.equal(restrict_to(operator, spoilt, kept)[1], y_seen)
    assert torch.equal(seen.adjoint(spoilt), seen.adjoint(y))
    # Off the mask nothing is judged by either part.
    for part in (kept, held_out):
        other = torch.where(part, y, 1e3)
        assert torch.equal(loss_on(operator, other, x, part), loss_on(operator, y, x, part))


@pytest.mark.parametrize("kind", ["em", "self-supervised"])
def test_adaptation_does_not_know_kspace_off_its_mask(kind: str) -> None:
    torch.manual_seed(0)
    network = UNet(image_channels=2, base_channels=8, multipliers=(1, 2))
    torch.nn.init.normal_(network.head.weight, std=0.02)  # a fresh network's head is zero: nothing would move
    prior = PatchPrior(EDMDenoiser(network, 0.3), 8)
    operator = PHYSICS["a mask a case"]().float()
    operator.noise_std = torch.tensor([0.1, 0.2])
    sampler = ProximalDiffusion(num_levels=2, cg_iterations=2, clip=None, num_samples=1 if kind == "em" else 2)
    views = HeldOutViews(0.3, patience=1)
    adaptation = (
        ExpectationMaximisation(1, 2, num_pixels=256, expectation=sampler, held_out=views)
        if kind == "em"
        else SelfSupervised(learning_rate=1e-3, steps=1, held_out=views, discrepancy=1e-3)
    )
    y = noisy(operator, operator.noise_std)[1].float()
    runs = []
    for data in (y, torch.where(rows_of(operator), y, 0.0)):
        estimate, (trace, _) = adaptation(data, operator, prior, sampler, make_generators(0, ["a", "b"]), pool=True)
        losses = [(step.data_loss, step.held_out_loss) for step in trace.steps]
        runs.append((estimate.mean, losses, trace.stopped_at, trace.movement))
    assert torch.equal(runs[0][0], runs[1][0]) and runs[0][1:] == runs[1][1:]
    assert max(runs[0][3].values()) > 0 or runs[0][2] <= 0  # it has moved, or been told to go back


def test_seen_and_held_out_lines_together_tell_the_error_of_all_kspace() -> None:
    """The centre, which is never held out, holds most of an image's error, too, while a fit begins."""
    operator, full = mri(columns(4, 4)), mri(torch.ones(1, SIZE))
    draw = make_generator(0, "error")
    found, expected = [], []
    for brightness in (0.0, 1.0):
        for seed in range(40):
            error = brightness + torch.randn(1, 2, SIZE, SIZE, generator=draw, dtype=torch.float64) / SIZE
            y = operator(torch.zeros_like(error))
            monitor = HeldOutStop(0.3).monitor(CaseData(y, operator, HeldOutStop(0.3), generator(seed)))
            monitor(1, error, operator(error))
            found.append(monitor.value)
            expected.append(float(full(error).square().mean()))
    for part in (slice(0, 40), slice(40, 80)):
        assert sum(found[part]) == pytest.approx(sum(expected[part]), rel=0.15)


# when a curve is over


@pytest.mark.parametrize(
    ("curve", "patience", "stopped", "best"),
    [
        ([5, 4, 3, 2, 1], 1, None, 4),
        ([5, 4, 3, 4, 5, 6, 7], 3, 5, 2),
        ([5, 4, 3, 4, 5, 2, 3, 4, 5], 3, 8, 5),  # a new least starts the count again
        ([5, 3, 4, 3.5, 3.2], 3, 4, 1),  # falling, yet above the least
        ([2, 3], 1, 1, 0),
        ([1, 1, 1, 1, 1], 3, 3, 0),  # nothing is won
        ([2, 1, float("nan"), float("inf")], 2, 3, 1),
        ([float("nan")] * 2, 2, 1, 0),
    ],
)
def test_stops_after_so_many_values_without_a_new_least(
    curve: list[float], patience: int, stopped: int | None, best: int
) -> None:
    rule = Stopper(patience)
    answers = [rule.update(float(value)) for value in curve]
    assert (answers.index(True) if True in answers else None) == stopped
    assert rule.best == best


@pytest.mark.parametrize(
    ("shifts", "patience", "stopped", "best"),
    [
        ([1.0, 0.5, 0.0, 0.0, 0.0], 3, None, 4),  # what cannot be told from the best is kept
        ([0.0, 0.02, 0.01, 0.02, 0.03], 3, None, 4),  # worse, but not by more than chance
        ([1.0, 0.0, 2.0, 3.0, 4.0], 3, 4, 1),
        ([0.0, 2.0, 0.01, 2.0, 2.0], 2, 4, 2),
        ([1.0, 0.0, math.nan, math.inf], 2, 3, 1),
        ([math.nan, math.nan], 2, None, 0),
    ],
)
def test_a_later_step_is_kept_unless_it_is_significantly_worse(
    shifts: list[float], patience: int, stopped: int | None, best: int
) -> None:
    draw = make_generator(1, "parts")
    rule = PairedStopper(patience)
    answers = []
    for shift in shifts:
        answers.append(rule.update(10 + shift + 0.3 * torch.randn(16, generator=draw, dtype=torch.float64)))
    assert (answers.index(True) if True in answers else None) == stopped
    assert rule.best == best


def test_two_equal_steps_are_told_apart_as_often_as_the_test_says() -> None:
    draw, wrong = make_generator(2, "level"), 0
    for _ in range(400):
        rule = PairedStopper(9)
        for _ in range(2):
            rule.update(torch.randn(32, generator=draw, dtype=torch.float64).exp())
        wrong += rule.best == 0
    assert 0.02 < wrong / 400 < 0.09  # 5 % of the pairs, whose first was the better half of the time


def test_unseen_views_stand_for_the_error_of_the_image() -> None:
    """Whatever its frequencies: a view itself has them divided by the frequency."""
    size = 64
    operator = ParallelBeamCT(size, num_views=90, num_bins=128).double()
    rows, columns = torch.meshgrid(*(torch.arange(size, dtype=torch.float64) - size / 2,) * 2, indexing="ij")
    window = torch.exp(-(rows**2 + columns**2) / (2 * 10**2))
    found, plain = [], []
    for period in (32.0, 16.0, 8.0):
        error = window * (torch.cos(2 * torch.pi * rows / period) + torch.cos(2 * torch.pi * columns / period))
        residual = operator((error / error.norm())[None, None])
        found.append(float(imaged(operator, residual).square().mean()))
        plain.append(float(residual.square().mean()))
    assert max(found) < 1.25 * min(found) and max(plain) > 2.5 * min(plain)
    white = torch.zeros(1, 1, 90, 128, dtype=torch.float64)
    white[..., 40] = 1.0  # an impulse has all frequencies alike
    assert float(imaged(operator, white).square().mean()) == pytest.approx(float(white.square().mean()), rel=1e-10)
    kspace = torch.randn(1, 1, SIZE, SIZE, 2)
    assert imaged(mri(torch.ones(1, SIZE)), kspace) is kspace  # the image's own transform
