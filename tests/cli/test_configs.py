"""Every shipped config runs, and is found by its bare name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from invrecon.errors import InputError
from tests.cli.tiny import FAST, QUIET, ROOT, SIZE, files_in, learn, read, reconstruct

# What makes each config tiny; a new config needs an entry here, or the first test fails.
TRAINING = ("patch_ct", "whole_ct", "patch_ellipses", "whole_ellipses")
LEVELS = ("--model.method.schedule.num_levels=3", "--model.adaptation.steps=1")
ADAPTATION = {
    "tta_ct": (
        "--model.prior={}/patch.safetensors",
        "--model.method.num_levels=2",
        "--model.adaptation.rounds=1",
        "--model.adaptation.steps=1",
    ),
    "scd_ct": ("--model.prior={}/whole.safetensors", *LEVELS),
    "ddip_ct": ("--model.prior={}/whole.safetensors", *LEVELS),
    "patch_ss_ct": ("--model.prior={}/patch.safetensors", *LEVELS),
    "whole_ss_ct": ("--model.prior={}/whole.safetensors", *LEVELS),
}
RECONSTRUCTION = {
    **ADAPTATION,
    "recon_ct": ("--model.prior={}/patch.safetensors", "--model.method.num_levels=2"),
    "padis_ct": ("--model.prior={}/patch.safetensors", "--model.method.num_levels=2", "--model.method.num_inner=2"),
    "tv_ct": ("--model.method.num_iterations=25",),
    "fbp_ct": (),
}
GENERATION = ("generate_ct",)


def test_every_shipped_config_is_tested() -> None:
    shipped = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert shipped == {*TRAINING, *RECONSTRUCTION, *GENERATION}


@pytest.mark.parametrize("config", TRAINING)
def test_a_prior_is_trained_validated_and_used(
    config: str, invrecon: Callable[..., Any], library: Path, here: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = learn(f"{config}.yaml", library / "scans", run)
    invrecon(command)
    assert {"checkpoints/last.ckpt", "prior.safetensors", "prior.md"} <= files_in(run)
    prior = load_file(run / "prior.safetensors")
    steps = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert steps == 4

    invrecon(command)  # finished: exports the same weights again
    again = load_file(run / "prior.safetensors")
    assert all(torch.equal(prior[key], again[key]) for key in prior)

    cli = invrecon(["validate", *command[1:]])
    assert torch.equal(cli.model.ema.state_dict()["network.stem.weight"], prior["network.stem.weight"])
    assert float(cli.trainer.callback_metrics["validation/loss"]) > 0

    args = (f"--model.prior={run / 'prior.safetensors'}", *FAST)
    invrecon(reconstruct("predict", "recon_ct.yaml", library / "scans" / "a.h5", tmp_path / "out", *args))
    assert read(tmp_path / "out" / "a.h5").shape == (4, SIZE, SIZE)
    assert not files_in(here)


def test_an_interrupted_training_is_continued_by_the_same_command(
    invrecon: Callable[..., Any], library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from invrecon.tasks.score_matching import ScoreMatching

    undisturbed, disturbed = (learn("patch_ct.yaml", library / "scans", tmp_path / name) for name in "ud")
    invrecon(undisturbed)
    step = ScoreMatching.training_step

    def dies(self: Any, batch: Any, batch_index: int) -> Any:
        if self.global_step == 3:
            raise RuntimeError("the power is gone")
        return step(self, batch, batch_index)

    with monkeypatch.context() as patch:
        patch.setattr(ScoreMatching, "training_step", dies)
        with pytest.raises(RuntimeError, match="power"):
            invrecon(disturbed)
    assert not (tmp_path / "d" / "prior.safetensors").exists()
    invrecon(disturbed)
    one, other = (load_file(tmp_path / name / "prior.safetensors") for name in "ud")
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_training_is_not_continued_with_other_data(
    invrecon: Callable[..., Any], library: Path, tmp_path: Path
) -> None:
    invrecon(learn("patch_ct.yaml", library / "scans", tmp_path / "run"))
    card = (tmp_path / "run" / "prior.md").read_text()
    with pytest.raises(InputError, match=r"data\.paths.*another --output"):
        invrecon(learn("patch_ct.yaml", library / "ten.h5", tmp_path / "run"))
    assert (tmp_path / "run" / "prior.md").read_text() == card


@pytest.mark.parametrize("command", ["test", "predict"])
@pytest.mark.parametrize("config", RECONSTRUCTION)
def test_reconstruction_configs(
    config: str, command: str, invrecon: Callable[..., Any], library: Path, here: Path, tmp_path: Path
) -> None:
    more = [option.format(library) for option in RECONSTRUCTION[config]]
    args = reconstruct(command, f"{config}.yaml", library / "scans", tmp_path / "out", "--model.num_figures=0", *more)
    invrecon(args)
    expected = {"config.yaml", "metrics.csv", "summary.json"}
    if config in ADAPTATION:
        expected.add("adaptation.json")
    volumes = {"a.h5", "b.h5", "c.h5", "report.html"} if command == "predict" else set()
    assert files_in(tmp_path / "out") == expected | volumes
    assert not files_in(here)


def test_unconditional_samples(invrecon: Callable[..., Any], library: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = ["predict", "--config", "generate_ct.yaml", "--output", str(out), *QUIET, "--model.num_figures=1"]
    args += [f"--model.prior={library}/whole.safetensors", f"--model.operator.size={SIZE}", f"--data.size={SIZE}"]
    invrecon([*args, "--model.method.schedule.num_levels=2", "--data.num_images=3", "--data.batch_size=2"])
    samples = read(out / "sample.h5")
    assert samples.shape == (3, SIZE, SIZE)
    assert abs(samples[0] - samples[1]).max() > 1  # [HU]: each from a seed of its own
    assert {"report.html", "figures/sample_0001.png"} <= files_in(out)


def test_an_existing_file_wins_over_a_shipped_config(
    invrecon: Callable[..., Any], library: Path, here: Path, tmp_path: Path
) -> None:
    text = (ROOT / "configs" / "fbp_ct.yaml").read_text()
    assert "num_views: 20" in text
    (here / "fbp_ct.yaml").write_text(text.replace("num_views: 20", "num_views: 9"))
    args = reconstruct("test", "fbp_ct.yaml", library / "scans", tmp_path / "out")
    args.remove("--model.operator.num_views=12")
    assert invrecon(args).model.operator.num_views == 9
    (here / "fbp_ct.yaml").unlink()
    assert invrecon([arg.replace("fbp_ct.yaml", "fbp_ct") for arg in args]).model.operator.num_views == 20


def test_an_unknown_config_is_named_with_what_there_is(invrecon: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match=r"no config file 'recon.yaml'.*recon_ct\.yaml"):
        invrecon(["test", "--config", "recon.yaml"])


def test_the_config_that_a_run_keeps_runs_again(invrecon: Callable[..., Any], library: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    more = ("--data.slices", "0:4:2", "--model.noise=RelativeGaussianNoise", "--model.num_figures=0")
    invrecon(reconstruct("predict", "fbp_ct.yaml", library / "ten.h5", first, *more))
    invrecon(["predict", "--config", str(first / "config.yaml"), "--output", str(second)])
    assert (read(first / "ten.h5") == read(second / "ten.h5")).all()
