"""Expectation maximisation on one measurement: it learns, it is reproducible, and it leaves the prior alone."""

from __future__ import annotations

import pytest
import torch

from invrecon.adapt import ExpectationMaximisation, HeldOutRays, HeldOutViews, LoRA, SuitabilityTest, Trace
from invrecon.adapt.base import mean_cost
from invrecon.adapt.em import _Learner, spread
from invrecon.data.phantoms import ellipse_phantom
from invrecon.errors import InputError
from invrecon.methods import ProximalDiffusion
from invrecon.methods.base import Estimate
from invrecon.operators import CartesianMRI, ParallelBeamCT, RelativeGaussianNoise
from invrecon.priors.analytic import GaussianPrior
from invrecon.priors.edm import EDMDenoiser
from invrecon.priors.patch import PatchPrior, WholePrior
from invrecon.priors.unet import UNet
from invrecon.report.adaptation import describe_trace, encode_trace
from invrecon.rng import make_generator, make_generators
from invrecon.tasks.reconstruction import trace_columns

SIZE = 24


def make_prior(kind: str = "patch") -> PatchPrior | WholePrior:
    torch.manual_seed(0)
    network = UNet(base_channels=8, multipliers=(1, 2))
    torch.nn.init.normal_(network.head.weight, std=0.02)  # a fresh network's head is zero: nothing below it would learn
    denoiser = EDMDenoiser(network, 0.3)
    return PatchPrior(denoiser, 8) if kind == "patch" else WholePrior(denoiser)


def make_cases(num: int = 1, noise: float = 0.0):
    operator = ParallelBeamCT(SIZE, 12, num_bins=40)
    x = torch.stack([ellipse_phantom(SIZE, make_generator(i, "phantom"), disk_diameter=0.9) for i in range(num)])
    y = operator(x)
    if noise:
        y, std = RelativeGaussianNoise(noise).sample(y, make_generators(0, [str(i) for i in range(num)]))
        operator = operator._shallow_copy()
        operator.noise_std = std
    return x, y, operator


def make_em(**changes) -> ExpectationMaximisation:
    settings = dict(rounds=2, steps=3, learning_rate=2e-3, num_pixels=256)
    return ExpectationMaximisation(expectation=ProximalDiffusion(num_levels=3, sigma_max=0.05), **(settings | changes))


SAMPLER = ProximalDiffusion(num_levels=4)


def run(em, y, operator, prior, names="abc", **options):
    generators = make_generators(0, list(names)[: len(y)])
    return em(y, operator, prior, SAMPLER, generators, **options)


@pytest.mark.parametrize("kind", ["patch", "whole"])
def test_a_rate_of_zero_gives_the_unadapted_result_bit_for_bit(kind: str) -> None:
    _, y, operator = make_cases()
    prior = make_prior(kind)
    adapted, (trace,) = run(make_em(learning_rate=0.0), y, operator, prior)
    assert torch.equal(adapted.mean, SAMPLER(y, operator, prior, generators=make_generators(0, ["a"])).mean)
    assert all(value == 0 for value in trace.movement.values())


@pytest.mark.parametrize("kind", ["patch", "whole"])
def test_a_prior_that_knows_nothing_learns_from_one_measurement(kind: str) -> None:
    # An untrained denoiser, told nothing but the sinogram, comes to know what the image looks like.
    x, y, operator = make_cases()
    prior = make_prior(kind)
    em = make_em(rounds=4, steps=25, num_pixels=1024)
    estimate, (trace,) = run(em, y, operator, prior)
    before = SAMPLER(y, operator, prior, generators=make_generators(0, ["a"])).mean
    gain = 10 * torch.log10((before - x).square().mean() / (estimate.mean - x).square().mean())
    assert gain > 0.5
    assert trace.stopped_at == 4 and len(trace.steps) == 5
    assert max(trace.movement.values()) > 0


def test_the_prior_is_left_as_it_was_also_by_an_exception() -> None:
    _, y, operator = make_cases()
    prior = make_prior()
    before = {name: value.clone() for name, value in prior.state_dict().items()}
    run(make_em(), y, operator, prior)

    class Interrupts(ProximalDiffusion):
        def __call__(self, *args, **options):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ExpectationMaximisation(rounds=1, steps=2, num_pixels=256, expectation=Interrupts())(
            y, operator, prior, SAMPLER, make_generators(0, ["a"])
        )
    assert all(torch.equal(value, before[name]) for name, value in prior.state_dict().items())
    assert all(parameter.grad is None for parameter in prior.parameters())


def test_cases_do_not_know_their_batch() -> None:
    _, y, operator = make_cases(3, noise=0.01)
    prior, em = make_prior(), make_em()
    together, traces = run(em, y, operator, prior)
    order = [2, 0, 1]
    shuffled = operator._shallow_copy()
    shuffled.noise_std = operator.noise_std[order]
    permuted, _ = em(y[order], shuffled, prior, SAMPLER, make_generators(0, ["c", "a", "b"]))
    assert torch.equal(permuted.mean, together.mean[order])
    assert traces[0].steps[-1].data_loss != traces[1].steps[-1].data_loss


def test_a_pool_shares_one_adapter() -> None:
    _, y, operator = make_cases(3)
    _, traces = run(make_em(), y, operator, make_prior(), pool=True)
    assert traces[0] is traces[2]
    _, alone = run(make_em(), y, operator, make_prior())
    assert alone[0].movement != traces[0].movement


@pytest.mark.parametrize(("num", "teachers"), [(1, 16), (2, 3), (5, 8), (9, 4), (32, 16), (33, 7)])
def test_those_that_teach_are_spread_over_the_pool(num: int, teachers: int) -> None:
    chosen = spread(num, teachers)
    assert len(chosen) == len(set(chosen)) == min(num, teachers) and set(chosen) <= set(range(num))
    gaps = torch.tensor([-1, *chosen, num]).diff()
    assert gaps.min() >= 1 and gaps.max() <= -(-num // len(chosen))


def test_more_cases_teach_more() -> None:
    # Six phantoms are reconstructed better by a prior that learned from all of them than by one that learned from one.
    x, y, operator = make_cases(6)
    error = {}
    for teachers in (1, 6):
        em = make_em(steps=25, num_pixels=1024, teachers=teachers)
        estimate, _ = run(em, y, operator, make_prior(), names="abcdef", pool=True)
        error[teachers] = float((estimate.mean - x).square().mean())
    assert error[6] < 0.85 * error[1]


def test_only_those_that_teach_cost_rounds() -> None:
    _, y, operator = make_cases(6)
    costs = []
    for teachers in (2, 4):
        estimate, _ = run(make_em(teachers=teachers), y, operator, make_prior(), names="abcdef", pool=True)
        costs.append(6 * (mean_cost(estimate, "num_evaluations") - SAMPLER.num_evaluations))
    assert costs[1] == pytest.approx(2 * costs[0])


def test_a_pool_tells_of_the_case_that_it_watches() -> None:
    x, y, operator = make_cases(3)
    _, (trace, *_) = run(make_em(), y, operator, make_prior(), pool=True)
    assert trace.watched == 1
    distance = [(trace.steps[-1].image - one).square().mean() for one in x]
    assert int(torch.stack(distance).argmin()) == 1
    record = encode_trace(trace, ["scan/0007", "scan/0008", "scan/0009"])
    assert "of slice 8" in describe_trace(record)
    columns = [trace_columns(trace, case) for case in range(3)]
    assert ["data_loss" in column for column in columns] == [False, True, False]
    assert run(make_em(), y[:1], operator, make_prior())[1][0].watched is None


def test_the_data_loss_joins_in() -> None:
    _, y, operator = make_cases()
    losses = {}
    for weight in (0.0, 100.0):
        em = make_em(rounds=1, steps=12, ema=0.0, sigma_min=0.099, data_weight=weight)
        learner = _Learner(em, make_prior(), torch.Generator().manual_seed(0))
        x = SAMPLER(y, operator, make_prior(), generators=make_generators(0, ["a"])).mean
        spent = learner.learn(x, 1, operator, y, x)
        noisy = x + 0.099 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        denoised = learner.adapted(noisy, 0.099, generators=make_generators(0, ["b"])).detach()
        losses[weight] = float((operator(denoised) - y).square().mean())
        assert (learner.num_operator_calls > 0) == (weight > 0) and spent > 12 * (weight > 0)
    assert losses[100.0] < 0.9 * losses[0.0]
    with pytest.raises(InputError, match="data_weight"):
        make_em(data_weight=-1.0)


def test_rounds_end_where_the_noise_explains_the_rest() -> None:
    _, y, operator = make_cases(noise=0.05)
    _, (trace,) = run(make_em(rounds=3, discrepancy=1e6), y, operator, make_prior())
    assert len(trace.steps) == 1 and "noise" in trace.reason and set(trace.movement.values()) == {0.0}
    _, (trace,) = run(make_em(rounds=3, discrepancy=1e-6), y, operator, make_prior())
    assert len(trace.steps) == 4


def test_what_diverges_says_in_which_round_and_names_the_rate() -> None:
    _, y, operator = make_cases()
    with pytest.raises(InputError, match=r"diverged in round 1.* adaptation\.learning_rate, which is 1e\+30"):
        run(make_em(rounds=1, steps=1, learning_rate=1e30), y, operator, make_prior())
    with pytest.raises(InputError, match="finite"):
        make_em(sigma_max=float("inf"))


def test_a_discrepancy_without_noise_is_told_to_stop_nothing() -> None:
    _, y, operator = make_cases()
    with pytest.warns(UserWarning, match="noise level is not known.*adaptation.held_out"):
        run(make_em(rounds=1, discrepancy=1.0), y, operator, make_prior())


def test_what_it_spends_is_counted() -> None:
    _, y, operator = make_cases()
    plain = SAMPLER(y, operator, make_prior(), generators=make_generators(0, ["a"])).stats
    adapted = run(make_em(), y, operator, make_prior())[0].stats
    for key in ("num_evaluations", "num_operator_calls"):
        assert mean_cost(Estimate(y, stats=adapted), key) > 1.5 * mean_cost(Estimate(y, stats=plain), key)


def test_the_defaults_serve_complex_images() -> None:
    operator = CartesianMRI(SIZE)
    operator._set_mask(torch.ones(1, 1, SIZE))
    operator.noise_std = torch.tensor([0.01])
    torch.manual_seed(0)
    prior = PatchPrior(EDMDenoiser(UNet(image_channels=2, base_channels=8, multipliers=(1, 2)), 0.3), 8)
    y = operator(0.1 * torch.randn(1, 2, SIZE, SIZE))
    em = ExpectationMaximisation(rounds=1, steps=1, num_pixels=256)
    sampler = ProximalDiffusion(num_levels=2, clip=None)
    suitability = SuitabilityTest(learner=ExpectationMaximisation(rounds=1, steps=1, num_pixels=256))
    estimate, (trace,) = em(y, operator, prior, sampler, make_generators(0, ["a"]), suitability=suitability)
    assert estimate.mean.isfinite().all() and "distribution" in trace.verdict


@pytest.mark.parametrize("held_out", [HeldOutViews(0.1, patience=2), HeldOutRays(0.1, patience=2)])
def test_what_is_held_out_chooses_the_round_and_is_never_seen(held_out: HeldOutViews) -> None:
    _, y, operator = make_cases()
    settings = dict(learning_rate=10.0, held_out=held_out)  # a rate that ruins as often as not: rounds differ
    em = make_em(rounds=6, **settings)
    prior = make_prior()
    estimate, (trace,) = run(em, y, operator, prior)
    losses = [step.held_out_loss for step in trace.steps]
    best = losses.index(min(losses))
    assert trace.stopped_at == best
    plain = SAMPLER(y, operator, prior, generators=make_generators(0, ["a"])).mean
    kept = run(make_em(rounds=best, **settings), y, operator, prior)[0].mean if best else plain
    assert torch.equal(estimate.mean, kept)  # rounds after the best one leave nothing behind

    # Whatever the held-out views hold, nothing that the rounds make depends on it.
    from invrecon.adapt.base import private_generator

    _, unseen = em.held_out.split(0, operator, y, private_generator(make_generators(0, ["a"]), "views"))
    other = y + unseen
    images = [run(em, v, operator, prior)[1][0].steps[1].image for v in (y, other)]
    assert torch.equal(*images)


def test_only_what_is_asked_for_moves() -> None:
    _, y, operator = make_cases()
    _, (trace,) = run(make_em(trainable=LoRA(rank=2, layers="bottleneck")), y, operator, make_prior())
    assert {name.split(".")[0] for name, moved in trace.movement.items() if moved} == {"bottleneck"}


def test_a_second_run_gives_the_same_numbers() -> None:
    _, y, operator = make_cases(noise=0.02)
    first, second = (run(make_em(), y, operator, make_prior())[0].mean for _ in range(2))
    assert torch.equal(first, second)


def test_what_cannot_be_learned_from_is_refused() -> None:
    _, y, operator = make_cases()
    with pytest.raises(InputError, match="GaussianPrior"):
        run(make_em(), y, operator, GaussianPrior(torch.zeros(1, 2, 2), torch.eye(4)))
    with pytest.raises(InputError, match="sigma_min < sigma_max"):
        make_em(sigma_min=0.2)
    with pytest.raises(InputError, match="diverged"):
        run(make_em(learning_rate=1e30), y, operator, make_prior())


class Learns(ExpectationMaximisation):
    """Comes back with another prior's reconstruction."""

    def __init__(self, other: GaussianPrior) -> None:
        super().__init__()
        self.other = other

    def adapt(self, y, operator, prior, sampler, generators):
        return sampler(y, operator, self.other, generators=generators), Trace()


def test_a_prior_that_suits_is_not_adapted() -> None:
    x, y, operator = make_cases()
    covariance = 1e-4 * torch.eye(x[0].numel())
    known = GaussianPrior(x[0], covariance)  # a prior that knows this very image
    blurred = GaussianPrior(0.9 * x[0], covariance)  # one that is better than none, and can be bettered
    strange = GaussianPrior(1 - x[0], covariance)  # one that is sure of its negative

    def judge(prior: GaussianPrior, learnt: GaussianPrior):
        test = SuitabilityTest(learner=Learns(learnt))
        return test(y, operator, prior, SAMPLER, make_generators(0, ["a"]))

    verdict = judge(known, blurred)
    assert verdict.suited and verdict.ratio < 0.5 and verdict.learning > 1
    verdict = judge(blurred, known)
    assert not verdict.suited and verdict.ratio < 0.7 and verdict.learning < 0.9
    verdict = judge(strange, known)
    assert not verdict.suited and verdict.ratio > 1 and verdict.learning is None

    class Never(ExpectationMaximisation):
        def adapt(self, *args):
            raise AssertionError("adapted")

    suitability = SuitabilityTest(learner=Learns(blurred))
    estimate, (trace,) = Never()(y, operator, known, SAMPLER, make_generators(0, ["a"]), suitability=suitability)
    assert "suits" in trace.reason and "in distribution" in trace.verdict
    assert torch.equal(estimate.mean, SAMPLER(y, operator, known, generators=make_generators(0, ["a"])).mean)


@pytest.mark.parametrize("noise", [0.2, 1.0])  # above what the known prior leaves
def test_noise_is_nobodys_fault(noise: float) -> None:
    """What nothing could predict of unseen views, their noise, is held against no prior."""
    x, y, operator = make_cases(noise=noise)
    covariance = 1e-4 * torch.eye(x[0].numel())
    known, strange = GaussianPrior(x[0], covariance), GaussianPrior(1 - x[0], covariance)
    for prior, suited in ((known, True), (strange, False)):
        test = SuitabilityTest(learner=Learns(known))
        verdict = test(y, operator, prior, SAMPLER, make_generators(0, ["a"]))
        assert verdict.suited == suited, verdict
        assert verdict.stats["num_evaluations"] >= 4 and verdict.stats["num_operator_calls"] > 100
