"""Adaptation while sampling changes nothing where it should not, and lowers the loss where it may."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from invrecon.adapt.base import Trace
from invrecon.adapt.losses import DataLoss, ProximalDataLoss
from invrecon.adapt.presets import BLOCKS, DDIP, SCD, PatchSelfSupervision, WholeSelfSupervision
from invrecon.adapt.selfsupervised import Levels, PriorNoise, SelfSupervised
from invrecon.adapt.stopping import HeldOutViews
from invrecon.adapt.trainable import LoRA
from invrecon.errors import InputError
from invrecon.methods.base import Estimate
from invrecon.methods.conditioning import NormalisedGuidance, ProximalConditioning
from invrecon.methods.padis import PaDISNormalised
from invrecon.methods.plugandplay import AnnealedPnPADMM
from invrecon.methods.sampling import ProximalDiffusion, Sampler
from invrecon.methods.schedule import KarrasSchedule
from invrecon.methods.start import NoiseStart
from invrecon.methods.transitions import DDIM, DDSTransition
from invrecon.operators.base import LinearOperator
from invrecon.operators.ct import ParallelBeamCT
from invrecon.priors.base import Prior
from invrecon.priors.edm import EDMDenoiser
from invrecon.priors.patch import PatchPrior, WholePrior
from invrecon.priors.unet import UNet
from invrecon.rng import make_generators
from tests.priors.foreign import CONFIGS, network
from tests.priors.test_unet import awake

SIZE = 16
OPERATOR = ParallelBeamCT(SIZE, 8, num_bins=24)
NAMES = ["a", "b", "c"]


def make_prior(patches: bool = True, precision: str = "32", attention: bool = False) -> Prior:
    torch.manual_seed(0)
    denoiser = EDMDenoiser(awake(UNet(base_channels=8, multipliers=(1, 2), attention=attention)), 0.3)
    denoiser.precision = precision
    return (PatchPrior(denoiser, 8, 16) if patches else WholePrior(denoiser)).eval()


def measure(num: int = 1) -> Tensor:
    x = torch.rand(num, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    return OPERATOR(torch.nn.functional.avg_pool2d(x, 5, 1, 2))


def fast(num_levels: int = 4, **more: int) -> Sampler:
    return ProximalDiffusion(num_levels, sigma_max=0.5, cg_iterations=3, **more)


def dds(num_levels: int = 4, eta: float = 0.5) -> Sampler:
    schedule, data = KarrasSchedule(num_levels, 1.0, 0.01), ProximalConditioning(3)
    return Sampler(schedule, data, DDSTransition(eta), NoiseStart())


def guided() -> Sampler:
    return Sampler(KarrasSchedule(3, 1.0, 0.01), NormalisedGuidance(1.0), DDIM(0.5), NoiseStart())


def run(
    plan: SelfSupervised, sampler: Sampler, prior: Prior, y: Tensor, names: list[str] = NAMES, pool: bool = False
) -> tuple[Estimate, list[Trace]]:
    return plan(y, OPERATOR, prior, sampler, make_generators(0, names[: len(y)]), pool=pool)


@pytest.mark.parametrize(
    ("sampler", "patches"),
    [
        (fast(3), True),
        (fast(2), False),
        (guided(), True),
        (PaDISNormalised(2, 2), True),
        (fast(2, num_samples=2), True),
    ],
)
def test_without_a_rate_it_is_the_sampler_bit_for_bit(sampler: Sampler, patches: bool) -> None:
    prior, y = make_prior(patches), measure()
    plain = sampler(y, OPERATOR, prior, generators=make_generators(0, ["a"]))
    plan = SelfSupervised(LoRA(2, biases=True), learning_rate=0.0, steps=2, ema=0.5, held_out=HeldOutViews(0.25))
    adapted, (trace, *_) = run(plan, sampler, prior, y)
    assert torch.equal(adapted.mean, plain.mean)
    assert set(trace.movement.values()) == {0.0}
    assert all(step.held_out_loss is not None for step in trace.steps)


@pytest.mark.parametrize("preset", [SCD, DDIP, PatchSelfSupervision, WholeSelfSupervision])
def test_the_control_of_a_published_recipe_is_the_recipe_without_updates(preset: type[SelfSupervised]) -> None:
    prior, y, sampler = make_prior(), measure(), dds(5)
    plan = preset(steps=1, learning_rate=0.0)
    control = plan.control(sampler)(y, OPERATOR, prior, generators=make_generators(0, ["a"])).mean
    assert torch.equal(run(plan, sampler, prior, y)[0].mean, control)
    assert not torch.equal(sampler(y, OPERATOR, prior, generators=make_generators(0, ["a"])).mean, control)


def test_small_gradients_survive_half_precision() -> None:
    """A loss that is a billionth has a gradient that half precision has no numbers for."""
    y = measure()

    class Small(DataLoss):
        def cotangent(self, denoised: Tensor, operator: LinearOperator, y: Tensor) -> Tensor:
            return 1e-9 * super().cotangent(denoised, operator, y)

    moved = []
    for precision in ("16", "32"):
        plan = SelfSupervised(loss=Small(), learning_rate=1e-3, steps=1)
        moved.append(run(plan, fast(1), make_prior(precision=precision), y)[1][0].movement)
    for name, value in moved[1].items():
        assert moved[0][name] == pytest.approx(value, rel=0.3), name


def test_the_prior_stays_as_it_was_whatever_happens() -> None:
    prior, y = make_prior(), measure()
    before = {name: tensor.clone() for name, tensor in prior.state_dict().items()}
    _, (trace,) = run(SelfSupervised(learning_rate=1e-3), fast(), prior, y)
    assert max(trace.movement.values()) > 1e-3

    class Broken(ProximalDataLoss):
        def cotangent(self, denoised: Tensor, operator: object, y: Tensor) -> Tensor:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(SelfSupervised(loss=Broken()), fast(), prior, y)
    assert all(torch.equal(tensor, before[name]) for name, tensor in prior.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in prior.parameters())


def test_a_case_does_not_depend_on_its_batch_and_a_call_not_on_the_last() -> None:
    prior, y = make_prior(), measure(3)
    plan = SelfSupervised(LoRA(2), learning_rate=1e-3, steps=2)
    batch, _ = run(plan, fast(2), prior, y)
    assert torch.equal(batch.mean, run(plan, fast(2), prior, y)[0].mean)
    order = [2, 0, 1]
    permuted, _ = run(plan, fast(2), prior, y[order], [NAMES[i] for i in order])
    assert torch.equal(permuted.mean, batch.mean[order])
    for b, name in enumerate(NAMES):
        assert torch.equal(run(plan, fast(2), prior, y[b : b + 1], [name])[0].mean, batch.mean[b : b + 1])
    pooled, traces = run(plan, fast(2), prior, y, pool=True)
    assert traces[0] is traces[2]
    assert not torch.equal(pooled.mean, batch.mean)


@pytest.mark.parametrize("loss", [DataLoss(), ProximalDataLoss(2, weight=10.0, tv_weight=1e-4)])
def test_the_loss_falls(loss: DataLoss) -> None:
    """Over levels that are nearly one, it falls well below that of the unadapted prior."""
    sampler = Sampler(KarrasSchedule(4, 0.11, 0.1), ProximalConditioning(3), DDIM(0.0))
    prior, y = make_prior(), measure()
    last = {}
    for rate in (0.0, 1e-2):
        _, (trace,) = run(SelfSupervised(loss=loss, learning_rate=rate, steps=4), sampler, prior, y)
        assert (trace.reason, trace.stopped_at) == ("adapted at every chosen level", 3)
        image = trace.steps[-1].image
        assert image is not None
        last[rate] = float(loss(image[None], OPERATOR, y))
        assert float(DataLoss()(image[None], OPERATOR, y)) == pytest.approx(trace.steps[-1].data_loss)
    assert last[1e-2] < 0.5 * last[0.0]


def test_which_levels_adapt() -> None:
    hundred, fifty = ([1.0] * n for n in (100, 50))
    assert Levels().chosen([3.0, 2.0]) == [0, 1]
    scd = SCD().levels.chosen(hundred)
    assert len(scd) == 24 and scd[-5:] == [95, 96, 97, 98, 99]
    assert DDIP().levels.chosen(fifty) == list(range(1, 49))
    assert Levels(margin=0.07).chosen(hundred) == list(range(7, 93))
    assert PatchSelfSupervision().levels.chosen([4.0, 1.1, 1.0, 0.1]) == [2, 3]
    assert Levels(every=3, num_last=1).chosen([1.0] * 6) == [0, 3, 5]
    with pytest.raises(InputError, match=r"margin < 0\.5"):
        Levels(margin=0.5)


def test_it_adapts_where_told_and_counts_what_it_spends() -> None:
    prior, y = make_prior(), measure()
    plan = SelfSupervised(steps=3, levels=Levels(every=2, num_last=1), noise_from="unadapted")
    estimate, (trace,) = run(plan, dds(6), prior, y)
    sigmas = KarrasSchedule(6, 1.0, 0.01).sigmas
    assert [step.sigma for step in trace.steps] == [sigmas[i] for i in (0, 2, 4, 5)]
    # 6 of the sampler, 3 steps at 4 levels, and the unadapted noise at all levels but the last
    assert estimate.stats["num_evaluations"] == 6 + 12 + 5
    plain = dds(6)(y, OPERATOR, prior, generators=make_generators(0, ["a"]))
    assert estimate.stats["num_operator_calls"] > plain.stats["num_operator_calls"]
    held_out = SelfSupervised(steps=3, held_out=HeldOutViews(0.25, patience=99))
    assert run(held_out, dds(6), prior, y)[0].stats["num_evaluations"] == 6 + 6 * (3 + 2)
    many = run(SelfSupervised(steps=1), fast(12), prior, y)[1][0].steps
    pictured = [i for i, step in enumerate(many) if step.image is not None]
    assert len(pictured) == 8 and (pictured[0], pictured[-1]) == (0, 11)
    assert many[0].image is not None and many[0].image.shape == (1, SIZE, SIZE)


def test_an_inner_loop_adapts_once_a_level() -> None:
    _, (trace,) = run(SelfSupervised(steps=1), PaDISNormalised(3, 4), make_prior(), measure())
    assert len(trace.steps) == 3


def test_an_optimiser_that_is_kept_differs_from_a_fresh_one() -> None:
    prior, y = make_prior(), measure()
    means = [
        run(SelfSupervised(learning_rate=1e-3, steps=2, keep_optimiser=keep, weight_decay=decay), fast(2), prior, y)[0]
        for keep, decay in ((True, 0.0), (False, 0.0), (False, 0.1))
    ]
    assert not torch.equal(means[0].mean, means[1].mean)
    assert not torch.equal(means[1].mean, means[2].mean)


def test_the_noise_of_the_step() -> None:
    """With a rate of 0 the adapted and the unadapted prior see the same state in the same layout."""
    prior, y = make_prior(), measure()
    means = {}
    for source in ("estimate", "adapted", "unadapted"):
        plan = SelfSupervised(learning_rate=0.0, steps=1, noise_from=source)
        means[source] = run(plan, dds(3), prior, y)[0].mean
    assert torch.equal(means["adapted"], means["unadapted"])
    assert not torch.equal(means["adapted"], means["estimate"])
    moved = [
        run(SelfSupervised(learning_rate=1e-2, steps=2, noise_from=source), dds(2), prior, y)[0].mean
        for source in ("adapted", "unadapted")
    ]
    assert not torch.equal(moved[0], moved[1])
    x, x0, denoised = torch.randn(3, 1, 1, 4, 4)
    step = PriorNoise(DDIM(0.0), lambda x, sigma: denoised).begin()
    assert torch.allclose(step(x, x0, 2.0, 1.0, []), x0 + (x - denoised) / 2)
    assert torch.equal(step(x, x0, 2.0, 0.0, []), x0)


def test_the_output_may_be_what_the_prior_said_last() -> None:
    prior, y = make_prior(patches=False), measure()
    sampler = dds(1)
    sampler.clip = None
    plan = SelfSupervised(learning_rate=0.0, steps=1, output="denoised")
    x = sampler.start(y, OPERATOR, 1.0, make_generators(0, ["a"]))
    assert torch.equal(run(plan, sampler, prior, y)[0].mean, prior(x, 1.0))


def test_held_out_views_end_an_adaptation_that_harms_them() -> None:
    """It goes on with the weights from before the harm: those of one that adapts so far only."""

    class First(Levels):
        def chosen(self, sigmas: list[float]) -> list[int]:
            return list(range(trace.stopped_at + 1))

    prior, y = make_prior(), measure()
    y = y + 3 * y.std() * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    knobs = {"learning_rate": 0.05, "steps": 4, "held_out": HeldOutViews(0.25, patience=2)}
    _, (trace,) = run(SelfSupervised(**knobs), dds(8), prior, y)
    assert "explained no better" in trace.reason
    assert 0 <= trace.stopped_at == len(trace.steps) - 3 < 5
    _, (shorter,) = run(SelfSupervised(**knobs, levels=First()), dds(8), prior, y)
    assert shorter.movement == trace.movement


def test_the_discrepancy_ends_it_where_the_noise_explains_the_rest() -> None:
    prior, y = make_prior(), measure()
    noisy = OPERATOR._shallow_copy()
    noisy.noise_std = torch.tensor([1e3])
    plan = SelfSupervised(learning_rate=1e-3, discrepancy=1.0)
    _, (trace,) = plan(y, noisy, prior, fast(), make_generators(0, ["a"]))
    assert len(trace.steps) == 1 and "noise" in trace.reason
    assert set(trace.movement.values()) == {0.0}
    with pytest.warns(UserWarning, match="noise level is not known"):
        _, (trace,) = run(plan, fast(2), prior, y)  # without noise it never stops
    assert len(trace.steps) == 2


@pytest.mark.parametrize("plan", [SelfSupervised(noise_from="unadapted"), SelfSupervised(output="denoised")])
def test_a_state_that_is_no_estimate_plus_noise_is_refused(plan: SelfSupervised) -> None:
    # The state of ADMM: with the prior's noise in its place a chest was reconstructed at 5 dB, without a word.
    with pytest.raises(InputError, match=r"AnnealedPnPADMM is not an estimate plus noise.*ProximalDiffusion"):
        run(plan, AnnealedPnPADMM(num_levels=2), make_prior(), measure())


def test_an_adaptation_at_no_level_is_refused() -> None:
    with pytest.raises(InputError, match=r"at none of the sampler's 2 levels.*sigma_max"):
        run(SelfSupervised(levels=Levels(sigma_max=1e-6)), fast(2), make_prior(), measure())


def test_averaged_weights_move_less() -> None:
    prior, y = make_prior(), measure()
    plain, averaged = (
        run(SelfSupervised(learning_rate=1e-3, ema=ema), fast(2), prior, y)[1][0].movement for ema in (0.0, 0.9)
    )
    assert 0 < sum(averaged.values()) < sum(plain.values())


def test_several_samples_share_an_adapter_and_run_at_once() -> None:
    prior, y = make_prior(), measure(2)
    plan = SelfSupervised(LoRA(2), learning_rate=1e-3, steps=2)
    estimate, traces = run(plan, fast(2, num_samples=2), prior, y)
    assert estimate.samples is not None and estimate.samples.shape == (2, 2, 1, SIZE, SIZE)
    assert len(traces) == 2 and not torch.equal(estimate.samples[:, 0], estimate.samples[:, 1])
    with pytest.raises(InputError, match="samples_per_batch"):
        run(plan, fast(2, num_samples=2, samples_per_batch=1), prior, y)


def test_reduced_precision() -> None:
    prior, y = make_prior(precision="bf16"), measure()
    estimate, (trace,) = run(SCD(learning_rate=1e-3, steps=2), fast(3), prior, y)
    assert estimate.mean.dtype == torch.float32 and estimate.mean.isfinite().all()
    assert max(trace.movement.values()) > 0


def test_one_that_diverges_says_where_and_what_to_do() -> None:
    with pytest.raises(InputError, match=r"noise level 0\.\d+.*lower learning_rate"):
        run(SelfSupervised(learning_rate=1e30), fast(), make_prior(), measure())


def test_what_cannot_be_is_refused() -> None:
    for knobs in ({"learning_rate": -1.0}, {"steps": 0}, {"ema": 1.0}, {"weight_decay": -1.0}, {"noise_from": "here"}):
        with pytest.raises(InputError):
            SelfSupervised(**knobs)
    with pytest.raises(InputError, match="Langevin"):
        run(DDIP(), PaDISNormalised(2, 1), make_prior(), measure())


def test_presets_adapt_what_was_published() -> None:
    prior, y = make_prior(attention=True), measure()
    own = prior.denoiser.network
    layers = {n: m for n, m in own.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    inside = [m for n, m in layers.items() if n.split(".")[0] in ("encoder", "bottleneck", "attention", "decoder")]
    assert {n for n in layers if not re.search(BLOCKS, n)} == {
        "embedding.mlp.0", "embedding.mlp.2", "stem", "narrow.0", "head"
    }  # fmt: skip
    named = own.named_parameters()
    biases = sum(p.numel() for n, p in named if n.endswith("bias") and "embedding" not in n)

    def lora(rank: int) -> int:
        return sum(rank * (m.weight[0].numel() + m.weight.shape[0]) for m in inside)

    every = sum(p.numel() for p in own.parameters())
    expected = {SCD: lora(12), DDIP: lora(4) + biases, PatchSelfSupervision: every, WholeSelfSupervision: every}
    for preset, count in expected.items():
        _, (trace,) = run(preset(steps=1), dds(3), prior, y)
        assert trace.num_trainable == count


@pytest.mark.parametrize(
    ("family", "outside"),
    [
        ("guided", {"time_embed.0", "time_embed.2", "input_blocks.0.0", "out.2"}),
        ("song", {"enc.16x16_conv", "dec.16x16_aux_conv", "map_layer0", "map_layer1"}),
        ("dhariwal", {"enc.16x16_conv", "map_layer0", "map_layer1", "out_conv"}),
    ],
)
def test_presets_adapt_the_blocks_of_the_networks_they_were_published_with(family: str, outside: set[str]) -> None:
    built = network(*CONFIGS[family])
    layers = {n for n, m in built.named_modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Linear)}
    assert {n for n in layers if not re.search(BLOCKS, n)} == outside
    free = DDIP().trainable.attach(built)
    biases = sum(p.numel() for n, p in built.named_parameters() if n.endswith("bias") and p.requires_grad)
    embedding = sum(p.numel() for n, p in built.named_parameters() if n.endswith("bias") and not p.requires_grad)
    assert sum(p.numel() for p in free) > biases > 0
    assert embedding == sum(p.numel() for n, p in built.named_parameters() if re.match(r"(time_embed|map_).*bias$", n))


def test_shipped_samplers_have_the_published_numbers(root: Path) -> None:
    published = {
        "scd": (100, 3, 3000.0, "DDIM", 0.2, "SCD", "whole"),
        "ddip": (50, 5, math.inf, "DDSTransition", 0.85, "DDIP", "whole"),
        "patch_ss": (50, 5, 1000.0, "DDSTransition", 0.85, "PatchSelfSupervision", "patch"),
        "whole_ss": (50, 5, 1000.0, "DDSTransition", 0.85, "WholeSelfSupervision", "whole"),
    }
    for name, numbers in published.items():
        model = yaml.safe_load((root / "configs" / f"{name}_ct.yaml").read_text())["model"]["init_args"]
        sampler = model["method"]["init_args"]
        data, transition = sampler["conditioning"]["init_args"], sampler["transition"]
        levels = sampler["schedule"]["init_args"]["num_levels"]
        assert numbers == (
            *(levels, data["num_iterations"], data["max_weight"], transition["class_path"]),
            *(transition["init_args"]["eta"], model["adaptation"], model["prior"].removesuffix("_ellipses")),
        )
