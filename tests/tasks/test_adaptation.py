"""The task of test-time adaptation: what it gives, and that the prior stays as it was, whatever happens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import nn

from invrecon.adapt.base import Adaptation, Step, Trace, private_generator
from invrecon.adapt.em import ExpectationMaximisation
from invrecon.adapt.suitability import SuitabilityTest
from invrecon.adapt.trainable import AllWeights, adapted_copy, movement, num_parameters
from invrecon.data.reconstruction import ReconstructionData
from invrecon.errors import InputError
from invrecon.methods import FBP, ProximalDiffusion, TotalVariation, UnconditionalSampler
from invrecon.operators import ParallelBeamCT
from invrecon.tasks.adaptation import TestTimeAdaptation
from invrecon.tasks.reconstruction import Reconstruction
from tests.cli.tiny import SIZE, make_prior, make_volume, slices_of_a_chest

TROUBLE = {"none": None, "error": RuntimeError("the power is gone"), "interrupt": KeyboardInterrupt()}


class Nudge(Adaptation):
    """Moves the weights at random, which depends on all cases of the batch, and hooks into the network.

    Args:
        size: How far.
        verdict: Of the trace.
        trouble: What happens in the midst of it.
        log: Text file that gains a line a call: the number of cases.
    """

    def __init__(self, size: float = 0.02, verdict: str = "", trouble: str = "none", log: str | None = None) -> None:
        self.size, self.verdict, self.trouble, self.log = size, verdict, trouble, log
        self.trainable = AllWeights()

    def adapt(self, y: Any, operator: Any, prior: Any, sampler: Any, generators: Any) -> Any:
        adapted, parameters = adapted_copy(prior, self.trainable)
        draws = private_generator(generators, "nudge")
        adapted.denoiser.network.register_forward_hook(lambda *unused: None)
        for p in parameters:
            p.data += self.size * torch.randn(p.shape, generator=draws)
        if TROUBLE[self.trouble] is not None:
            raise TROUBLE[self.trouble]
        estimate = sampler(y, operator, adapted, generators=generators)
        if self.log is not None:
            with open(self.log, "a") as file:
                file.write(f"{len(y)}\n")
        image = estimate.mean[0]
        steps = [Step(f"round {k}", None, 4.0**-k, (2.0, 1.0, 1.5)[k], image + 0.1 / 2**k) for k in range(3)]
        reason = "the held-out loss rose"
        moved = movement(prior, adapted)
        return estimate, Trace(steps, 1, reason, num_parameters(parameters), moved, self.verdict)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    make_volume(folder / "a.h5", slices_of_a_chest(SIZE)[:3])
    make_prior(folder / "prior.safetensors", "whole")
    return folder


def task(files: Path, kind: Any = TestTimeAdaptation, **options: Any) -> Any:
    operator = ParallelBeamCT(size=SIZE, num_views=12, num_bins=48)
    if kind is TestTimeAdaptation:
        options = {"adaptation": Nudge(), **options}
    options = {"prior": str(files / "prior.safetensors"), "precision": "32", **options}
    return kind(operator, options.pop("method", ProximalDiffusion(num_levels=2)), **options)


def trainer(folder: Path) -> lightning.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(accelerator="cpu", devices=1, inference_mode=False, default_root_dir=folder, **quiet)


def data(files: Path, **options: Any) -> ReconstructionData:
    return ReconstructionData(str(files / "a.h5"), size=SIZE, **{"batch_size": 2, **options})


def results(files: Path, folder: Path, model: Any, **options: Any) -> list[Any]:
    return trainer(folder).predict(model, datamodule=data(files, **options))


def state(model: Any) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in model.prior.state_dict().items()}


def hooks(module: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(m, kind)) for m in module.modules() for kind in kinds)


@pytest.mark.parametrize("command", ["test", "predict"])
@pytest.mark.parametrize("trouble", list(TROUBLE))
def test_the_prior_stays_as_it_was(files: Path, tmp_path: Path, command: str, trouble: str) -> None:
    model = task(files, adaptation=Nudge(trouble=trouble))
    before, num_hooks = state(model), hooks(model.prior)
    run = getattr(trainer(tmp_path), command)
    if trouble == "none":
        run(model, datamodule=data(files, batch_size=3))
    else:
        with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)):
            run(model, datamodule=data(files, batch_size=3))
    after = model.prior.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert hooks(model.prior) == num_hooks == 0
    assert all(p.grad is None for p in model.prior.parameters())


def test_what_does_not_move_gives_the_result_without_adaptation(files: Path, tmp_path: Path) -> None:
    plain = results(files, tmp_path, task(files, Reconstruction), batch_size=1)
    still = results(files, tmp_path, task(files, adaptation=Nudge(size=0.0)), batch_size=1)
    moved = results(files, tmp_path, task(files), batch_size=1)
    for a, b, c in zip(plain, still, moved):
        assert torch.equal(a.estimate.mean, b.estimate.mean) and not torch.equal(a.estimate.mean, c.estimate.mean)
        assert a.traces is None and len(b.traces) == len(b.batch)
        assert not {"stopped_at", "data_loss", "num_trainable"} & a.rows[0].keys()


def test_a_row_says_how_the_prior_was_adapted(files: Path, tmp_path: Path) -> None:
    model = task(files, adaptation=Nudge(verdict="unsuited"))
    rows = [row for result in results(files, tmp_path, model) for row in result.rows]
    num = sum(p.numel() for p in model.prior.parameters())
    for row in rows:
        assert (row["stopped_at"], row["verdict"], row["num_trainable"]) == ("round 1", "unsuited", num)
        assert (row["data_loss"], row["held_out_loss"]) == (0.25, 1.0)  # of the weights that were used
        assert row["method"] == "ProximalDiffusion + Nudge"
    facts = model.describe()
    assert facts["adaptation"] == "Nudge of AllWeights, anew for every slice" and "whole" in facts["prior"]


def test_pooled_slices_share_an_adapter_and_others_do_not(files: Path, tmp_path: Path) -> None:
    own = results(files, tmp_path, task(files), batch_size=3)
    alone = results(files, tmp_path, task(files), batch_size=1)
    pooled = results(files, tmp_path, task(files, pool=True), batch_size=3)
    moves = [{trace.movement["head"] for trace in result[0].traces} for result in (own, pooled)]
    assert [len(values) for values in moves] == [3, 1]
    separate = torch.cat([result.estimate.mean for result in alone])
    assert torch.allclose(own[0].estimate.mean, separate, atol=1e-6)
    assert not torch.allclose(pooled[0].estimate.mean, separate, atol=1e-4)
    assert "shared" in task(files, pool=True).describe()["adaptation"]


def test_a_prior_that_suits_is_left_alone(files: Path, tmp_path: Path) -> None:
    learner = ExpectationMaximisation(rounds=1, steps=1, num_pixels=256)
    reference = TotalVariation(num_iterations=5)
    always = SuitabilityTest(threshold=1e9, gain=1e-9, reference=reference, learner=learner)
    never = SuitabilityTest(threshold=1e-9, reference=reference)
    plain = results(files, tmp_path, task(files, Reconstruction), batch_size=1)
    suited = results(files, tmp_path, task(files, suitability=always), batch_size=1)
    unsuited = results(files, tmp_path, task(files, suitability=never), batch_size=1)
    assert torch.equal(suited[0].estimate.mean, plain[0].estimate.mean)
    row = suited[0].rows[0]
    assert row["stopped_at"] == "unadapted" and row["verdict"].startswith("in distribution")
    assert row["num_trainable"] == 0 and "data_loss" not in row
    assert unsuited[0].rows[0]["stopped_at"] == "round 1"


@pytest.mark.parametrize("method", [FBP(), UnconditionalSampler()])
def test_only_samplers_fit(files: Path, method: Any) -> None:
    with pytest.raises(InputError, match=f"model.method is {type(method).__name__}, but only a prior that a sampler"):
        task(files, method=method)


def test_what_is_missing_is_named(files: Path) -> None:
    with pytest.raises(InputError, match=r"needs a prior and model.prior is not set"):
        task(files, prior=None)
    with pytest.raises(InputError, match=r"model.adaptation is FBP, which is no adaptation"):
        task(files, adaptation=FBP())
