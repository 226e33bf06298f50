"""Every layout is one denoiser of images: weights that sum to one, exact products, nothing that depends on a batch."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from invrecon.errors import InputError
from invrecon.methods import ProximalDiffusion, TotalVariation
from invrecon.operators import ParallelBeamCT
from invrecon.priors.base import broadcast, per_sample
from invrecon.priors.edm import EDMDenoiser
from invrecon.priors.layouts import (
    FixedGrid,
    Layout,
    OverlapAverage,
    Places,
    RandomShift,
    SkipEmpty,
    Stitched,
    Windowed,
)
from invrecon.priors.patch import PatchPrior, WholePrior, pad_with_noise
from invrecon.priors.unet import UNet
from invrecon.rng import make_generators
from invrecon.tasks.adaptation import TestTimeAdaptation
from invrecon.tasks.reconstruction import Reconstruction
from tests.cli.tiny import make_prior
from tests.priors.test_patch import Pointwise, generators
from tests.priors.test_unet import awake

LAYOUTS: dict[str, Callable[[], Layout]] = {
    "shift": RandomShift,
    "two shifts": lambda: RandomShift(num_shifts=2),
    "four shifts": lambda: RandomShift(num_shifts=4),
    "grid": FixedGrid,
    "grid with an offset": lambda: FixedGrid(offset=2),
    "average": OverlapAverage,
    "average of all": lambda: OverlapAverage(stride=1),
    "windowed": Windowed,
    "windowed, oddly": lambda: Windowed(stride=3),
    "stitched": lambda: Stitched(margin=1),
    "skipping": SkipEmpty,
    "skipping two shifts": lambda: SkipEmpty(RandomShift(num_shifts=2)),
    "skipping a disc's outside": lambda: SkipEmpty(OverlapAverage(stride=2), radius=1.5),
}
every_layout = pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
sides, patch_sizes = st.integers(1, 20), st.integers(1, 9)


def network() -> EDMDenoiser:
    torch.manual_seed(0)
    return EDMDenoiser(awake(UNet(base_channels=8, multipliers=(1, 2))), 0.3).eval().requires_grad_(False).double()


def weights_of(places: Places, num: int, shape: tuple[int, int], patch_size: int) -> Tensor:
    """Adds up the weights of every pixel, patch by patch, `(num, H, W)`."""
    P, (H, W) = patch_size, shape
    total = torch.zeros(num, H + 4 * P, W + 4 * P, dtype=torch.float64)
    for frame, top, left, rows, columns in zip(*vars(places).values()):
        total[frame % num, top + 2 * P : top + 3 * P, left + 2 * P : left + 3 * P] += rows[:, None] * columns
    return total[:, 2 * P : 2 * P + H, 2 * P : 2 * P + W]


# weights


@every_layout
@settings(max_examples=10)
@given(height=sides, width=sides, p=patch_sizes, seed=st.integers(0, 99))
def test_weights_of_every_pixel_sum_to_one(
    make: Callable[[], Layout], height: int, width: int, p: int, seed: int
) -> None:
    layout = make()
    try:
        layout.check(p)
    except InputError:
        assume(False)
    frames = generators(2, seed) * layout.num_shifts
    places = layout.place((height, width), p, frames)
    for num, first in ((height, places.top), (width, places.left)):
        before, after = layout.pad(num, p)
        assert int(first.min()) >= -before and int(first.max()) + p <= num + after  # all within the frame
    total = weights_of(places, 2, (height, width), p)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)
    assert float(places.row_weights.min()) >= 0 and float(places.column_weights.min()) >= 0


def test_starts_are_those_of_the_literature() -> None:
    def starts(layout: Layout, patch_size: int) -> list[int]:
        return layout.starts(256, patch_size, generators(1))[0].tolist()

    assert starts(OverlapAverage(48), 56) == [0, 48, 96, 144, 192, 200]
    assert starts(OverlapAverage(), 56) == starts(Windowed(28), 56) == [*range(0, 200, 28), 200]
    assert starts(Stitched(4), 56) == [-20, 28, 76, 124, 172, 220]
    assert starts(FixedGrid(), 64) == [0, 64, 128, 192] and FixedGrid().pad(256, 64) == (0, 0)
    assert starts(FixedGrid(24), 56) == [-24, 32, 88, 144, 200] and FixedGrid(24).pad(256, 56) == (24, 0)


@given(num=sides, p=st.integers(3, 10))
def test_stitched_pixels_are_interior_to_their_patch(num: int, p: int) -> None:
    places = Stitched(margin=1).place((num, num), p, generators(1))
    assert not places.row_weights[:, [0, -1]].any() and not places.column_weights[:, [0, -1]].any()


def test_the_window_is_a_partition_of_unity_by_itself_and_ends_at_zero() -> None:
    window = Windowed().window(8)
    torch.testing.assert_close(window[:4] + window[4:], torch.ones(4, dtype=torch.float64))
    places = Windowed().place((32, 32), 8, generators(1))
    inner = (places.top > 0) & (places.top < 24)
    torch.testing.assert_close(places.row_weights[inner], window.expand(int(inner.sum()), -1))


class PatchMean(Pointwise):
    """A denoiser that answers a patch by its mean: whatever a layout lets through of its patches is seen."""

    def forward(self, u: Tensor, sigma: float | Tensor, position: Tensor) -> Tensor:
        return u.mean(dim=(1, 2, 3), keepdim=True).expand_as(u)


def test_smooth_windows_leave_smaller_steps_than_averages_and_averages_than_grids() -> None:
    x = torch.randn(1, 1, 32, 32, dtype=torch.float64)

    def largest_step(layout: Layout) -> float:
        return float(PatchPrior(PatchMean(), 8, layout=layout)(x, 0.1).diff(dim=-1).abs().max())

    assert largest_step(Windowed()) < largest_step(OverlapAverage()) < largest_step(FixedGrid())


@pytest.mark.parametrize("num_shifts", [2, 4])
def test_more_shifts_have_that_much_less_variance(num_shifts: int) -> None:
    """Shifts are independent, so the mean of `m` of them has `1 / m` of the variance between evaluations."""
    x = torch.linspace(0, 1, 12)[:, None].mul(torch.linspace(1, 2, 12)).expand(600, 1, 12, 12)

    def variance(m: int) -> float:
        return float(
            PatchPrior(PatchMean(), 5, 10**6, RandomShift(m))(x, 0.2, generators=generators(600)).var(0).mean()
        )

    assert variance(num_shifts) * num_shifts == pytest.approx(variance(1), rel=0.12)


# one denoiser


@every_layout
@pytest.mark.parametrize(("size", "p"), [((16, 16), 8), ((17, 10), 5), ((5, 6), 8), ((12, 9), 3)])
def test_assembled_equals_whole_for_a_pointwise_denoiser(
    make: Callable[[], Layout], size: tuple[int, int], p: int
) -> None:
    x, sigma = torch.randn(3, 2, *size, dtype=torch.float64), torch.tensor([0.05, 0.3, 2.0], dtype=torch.float64)
    for slope in (0.0, 0.3):
        whole = WholePrior(Pointwise(slope))(x, sigma)
        patched = PatchPrior(Pointwise(slope), p, 7, make())(x, sigma, generators=generators(3))
        tolerance = 1e-12 if slope == 0 else 1e-6  # positions are in single precision
        torch.testing.assert_close(patched, whole, rtol=0, atol=tolerance)


@every_layout
@pytest.mark.parametrize("max_patches", [5, 1000])
def test_products_equal_full_autograd(make: Callable[[], Layout], max_patches: int) -> None:
    denoiser = network()
    prior, reference = PatchPrior(denoiser, 6, max_patches, make()), PatchPrior(denoiser, 6, 10**6, make())
    x, target = torch.randn(2, 2, 1, 10, 13, dtype=torch.float64)
    sigma = torch.tensor([0.1, 2.0], dtype=torch.float64)
    weight = denoiser.network.stem.weight.requires_grad_(True)
    leaf = x.clone().requires_grad_(True)
    full = reference(leaf, sigma, generators=generators(2))
    image, weights = torch.autograd.grad(0.5 * (full - target).square().sum(), [leaf, weight])

    x0, product = prior.denoise_vjp(x, sigma, lambda d: d - target, generators=generators(2))
    assert weight.grad is None and not x0.requires_grad and not product.requires_grad
    torch.testing.assert_close(x0, full.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(product, image, rtol=1e-9, atol=1e-12)

    with torch.no_grad():
        again = prior.backpropagate(x, sigma, lambda d: d - target, generators=generators(2))
    assert weight.grad is not None
    torch.testing.assert_close(again, full.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(weight.grad, weights, rtol=1e-9, atol=1e-11)


@every_layout
def test_a_sample_does_not_depend_on_its_batch(make: Callable[[], Layout]) -> None:
    prior = PatchPrior(network(), 8, 5, make())
    x, sigma = torch.randn(3, 1, 18, 14, dtype=torch.float64), torch.tensor([0.01, 0.3, 10.0], dtype=torch.float64)
    together = prior(x, sigma, generators=generators(3))
    alone = torch.cat([prior(x[i : i + 1], sigma[i : i + 1], generators=[generators(3)[i]]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)
    order = [2, 0, 1]
    shuffled = prior(x[order], sigma[order], generators=[generators(3)[i] for i in order])
    torch.testing.assert_close(shuffled, together[order], rtol=1e-10, atol=1e-12)


def test_channels_last_images_are_denoised_alike() -> None:
    prior = PatchPrior(Pointwise(0.3), 4, 5, OverlapAverage())
    x = torch.randn(2, 3, 10, 9)
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(prior(last, 0.2), prior(x, 0.2))
    for a, b in zip(prior.denoise_vjp(last, 0.2, torch.cos), prior.denoise_vjp(x, 0.2, torch.cos)):
        assert torch.equal(a, b)


class Watched(Pointwise):
    """Counts how many of the patches it was ever given, and of its answers, are still held when it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[weakref.ref[Tensor]] = []

    def forward(self, u: Tensor, sigma: float | Tensor, position: Tensor) -> Tensor:
        self.batches.append(sum(len(tensor) for ref in self.held if (tensor := ref()) is not None) + len(u))
        answer = super().forward(u, sigma, position)
        self.batches.pop()
        self.held += [weakref.ref(u), weakref.ref(answer)]
        return answer


@every_layout
def test_memory_does_not_grow_with_the_number_of_patches(make: Callable[[], Layout]) -> None:
    denoiser = Watched()
    prior = PatchPrior(denoiser, 8, 4, make())
    prior(torch.randn(2, 1, 24, 24), 0.2)
    prior.denoise_vjp(torch.randn(2, 1, 24, 24), 0.2, torch.cos)
    assert len(denoiser.held) > 12 and max(denoiser.batches) <= 3 * 4  # the first chunk, its answer, and this one


# skipping


def test_patches_in_the_padding_are_skipped_and_nothing_changes() -> None:
    """Where the patch size divides the image's, one offset in `P` leaves a row of patches wholly outside."""
    x = torch.randn(40, 1, 8, 8, dtype=torch.float64)
    all_of_them, fewer = Counting(network()), Counting(network())
    expected = PatchPrior(all_of_them, 4)(x, 0.3, generators=generators(40))
    skipped = PatchPrior(fewer, 4, layout=SkipEmpty())(x, 0.3, generators=generators(40))
    torch.testing.assert_close(skipped, expected, rtol=1e-11, atol=1e-13)
    drawing = generators(40)
    pad_with_noise(x, (4, 4, 4, 4), torch.ones(40), drawing)  # which comes before the places
    drawn = RandomShift().place((8, 8), 4, drawing)
    outside = (drawn.top <= -4) | (drawn.left <= -4)
    assert 0 < int(outside.sum()) == all_of_them.num - fewer.num


class Counting(nn.Module):
    """Counts the patches that a denoiser is given."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser, self.network, self.num = denoiser, denoiser.network, 0

    def forward(self, u: Tensor, sigma: float | Tensor, position: Tensor) -> Tensor:
        self.num += len(u)
        return self.denoiser(u, sigma, position)


class FieldOfView(Pointwise):
    """Gaussian pixels of variance 0.04 within the unit disc, and known to be zero outside of it."""

    def forward(self, u: Tensor, sigma: float | Tensor, position: Tensor) -> Tensor:
        inside = position.double().square().sum(1, keepdim=True) < 1
        return inside * broadcast(0.04 / (0.04 + per_sample(sigma, u) ** 2), u) * u


@pytest.mark.parametrize(
    "make", [RandomShift, lambda: RandomShift(2), FixedGrid, lambda: OverlapAverage(2), Windowed, lambda: Stitched(1)]
)
@pytest.mark.parametrize("size", [(40, 40), (41, 50)])
def test_skipping_is_exact_where_the_prior_knows_of_the_zeros(
    make: Callable[[], Layout], size: tuple[int, int]
) -> None:
    x = torch.randn(2, 1, *size, dtype=torch.float64)
    whole = WholePrior(FieldOfView())(x, 0.1)
    every, some = Counting(FieldOfView()), Counting(FieldOfView())
    for denoiser, layout in ((every, make()), (some, SkipEmpty(make(), radius=1.0))):
        prior = PatchPrior(denoiser, 4, layout=layout)
        torch.testing.assert_close(prior(x, 0.1, generators=generators(2)), whole, rtol=0, atol=1e-12)
    assert some.num < every.num
    _, product = PatchPrior(FieldOfView(), 4, layout=SkipEmpty(make(), radius=1.0)).denoise_vjp(x, 0.1, torch.ones_like)
    torch.testing.assert_close(product, 0.8 * (whole != 0).double(), rtol=0, atol=1e-12)


@given(height=sides, width=sides, p=patch_sizes, radius=st.floats(1e-3, 2), seed=st.integers(0, 99))
def test_no_patch_that_meets_the_disc_is_skipped(height: int, width: int, p: int, radius: float, seed: int) -> None:
    places = SkipEmpty(radius=radius).place((height, width), p, generators(1, seed))
    assert len(places) > 0  # the centre is always in one of them
    missing = weights_of(places, 1, (height, width), p)[0] < 1
    rows, columns = ((2 * torch.arange(n).double() + 1) / n - 1 for n in (height, width))
    assert bool((rows.square()[:, None] + columns.square())[missing].ge(radius**2 - 1e-9).all())


# refusals, and the way in from a file and from the command line


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: RandomShift(0), "num_shifts"),
        (lambda: PatchPrior(Pointwise(), 8, layout=OverlapAverage(0)), "stride"),
        (lambda: PatchPrior(Pointwise(), 8, layout=Windowed(9)), "stride"),
        (lambda: PatchPrior(Pointwise(), 8, layout=Stitched(4)), "margin"),
        (lambda: PatchPrior(Pointwise(), 8, layout=FixedGrid(8)), "offset"),
        (lambda: PatchPrior(Pointwise(), 8, layout=SkipEmpty(FixedGrid(-1))), "offset"),
        (lambda: SkipEmpty(radius=0.0), "radius"),
        (lambda: PatchPrior(network(), 8, layout=RandomShift(patch_size=7)), "stride 2; got 7"),
    ],
)
def test_what_leaves_gaps_or_nothing_is_refused(make: Callable[[], object], word: str) -> None:
    with pytest.raises(InputError, match=word):
        make()


def test_a_layout_may_have_a_patch_size_of_its_own() -> None:
    assert PatchPrior(Pointwise(), 8, layout=SkipEmpty(RandomShift(patch_size=4))).patch_size == 4
    assert PatchPrior(Pointwise(), 8, layout=OverlapAverage(4)).patch_size == 8


@pytest.fixture(params=["patch", "whole"])
def prior_file(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    path = tmp_path / "prior.safetensors"
    make_prior(path, request.param)
    return request.param, str(path)


def test_a_task_lays_out_the_prior_of_a_file(prior_file: tuple[str, str]) -> None:
    kind, path = prior_file
    operator, method = ParallelBeamCT(32, num_views=4), ProximalDiffusion(num_levels=2)

    def task(layout: Layout | None, prior: str | None = path) -> Reconstruction:
        return Reconstruction(operator, method, prior=prior, precision="32", layout=layout)

    if kind == "whole":
        with pytest.raises(InputError, match=r"model\.layout is Windowed, but model\.prior is a whole-image prior"):
            task(Windowed())
        return
    plain, other = task(None), task(OverlapAverage(4))
    assert isinstance(plain.prior, PatchPrior) and isinstance(plain.prior.layout, RandomShift)
    assert isinstance(other.prior, PatchPrior) and isinstance(other.prior.layout, OverlapAverage)
    assert other.prior.patch_size == plain.prior.patch_size and not other.prior.training
    assert not any(p.requires_grad for p in other.prior.parameters())
    assert "OverlapAverage" in other.describe()["prior"] and "laid out" not in plain.describe()["prior"]
    with pytest.raises(InputError, match="stride"):
        task(RandomShift(patch_size=5))
    with pytest.raises(InputError, match=r"no model\.prior is set"):
        Reconstruction(operator, TotalVariation(), layout=Windowed())


@pytest.mark.parametrize("task", [Reconstruction, TestTimeAdaptation])
def test_layouts_go_by_their_names_on_the_command_line(task: type) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(task, "model")
    args = ["--model.operator=Identity", "--model.method=ProximalDiffusion", "--model.layout=OverlapAverage"]
    args += ["--model.adaptation=SelfSupervised"] if task is TestTimeAdaptation else []
    parsed = parser.parse_args([*args, "--model.layout.stride", "28"])
    assert parsed.model.layout.class_path.endswith("OverlapAverage") and parsed.model.layout.init_args.stride == 28
    nested = ["--model.layout=SkipEmpty", "--model.layout.layout=Stitched", "--model.layout.layout.margin=2"]
    layout = parser.parse_args([*args[:2], *args[3:], *nested, "--model.layout.radius=1"]).model.layout
    assert layout.init_args.layout.init_args.margin == 2 and layout.init_args.radius == 1


@pytest.mark.parametrize("layout", [OverlapAverage(stride=5), Stitched(margin=2)], ids=lambda x: type(x).__name__)
def test_a_fixed_layout_is_laid_out_once_for_each_size(layout: Layout) -> None:
    first = layout.place((20, 17), 8, make_generators(0, ["a", "b"]))
    assert layout.place((20, 17), 8, make_generators(1, ["c", "d"])) is first
    for shape, names in (((17, 20), ["a", "b"]), ((20, 17), ["a"])):
        fresh = type(layout)(**{k: v for k, v in vars(layout).items() if k in ("stride", "margin")})
        for name, value in vars(layout.place(shape, 8, make_generators(0, names))).items():
            assert torch.equal(value, getattr(fresh.place(shape, 8, make_generators(0, names)), name))
