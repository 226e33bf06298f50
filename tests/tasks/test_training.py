"""Training of priors: a falling loss, an honest export, two processes, and refusal of anything not finite."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision

from invrecon.data.patches import PatchBatch
from invrecon.errors import InputError
from invrecon.priors.weights import load_prior, read_card
from invrecon.tasks.previews import TrainingPreviews
from invrecon.tasks.score_matching import BANDS, ScoreMatching
from tests.tasks.tiny import checkpoint_of, fit, make_data, make_model, same

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*ended before the epoch ended.*",
    "ignore:.*callbacks used to create the checkpoint.*",
    "ignore:.*The dirpath has changed.*",
    "ignore:.*in eval mode at the start of training.*",
    "ignore:.*has `__len__` defined.*",
    "ignore:.*treespec, LeafSpec.*",
    "ignore:.*exists and is not empty.*",
    "ignore:.*Detected pickle protocol 4.*",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ScoreMatching, lightning.Trainer]:
    """Sixty steps on ellipses of 16 x 16 pixels, with all that a run shows on the way."""
    folder = tmp_path_factory.mktemp("trained")
    torch.set_num_threads(1)
    model, data = make_model(learning_rate=5e-3), make_data(pixels_per_batch=2048, batches_per_epoch=30)
    logger = TensorBoardLogger(str(folder), name="tensorboard", version="")
    previews = TrainingPreviews(every_n_validations=2, num_views=4, num_levels=3)
    trainer = fit(folder, model, data, 60, callbacks=(previews,), logger=logger)
    return folder, model, trainer


def test_loss_falls_and_denoising_beats_the_identity(trained: tuple[Path, ScoreMatching, lightning.Trainer]) -> None:
    folder, model, _ = trained
    data = make_data(pixels_per_batch=2048)
    data.setup()
    batches = [data.on_after_batch_transfer(plan, 0) for plan in data.val_dataloader()]
    fresh = make_model()
    fresh.denoiser.sigma_data.copy_(model.ema.sigma_data)

    def loss(denoiser: torch.nn.Module) -> float:
        with torch.no_grad():
            return float(torch.cat([model.losses(denoiser, batch)[1] for batch in batches]).mean())

    assert loss(model.ema) < 0.75 * loss(fresh.denoiser)
    prior, _ = load_prior(folder / "prior.safetensors")
    x = data.validation_images()
    for sigma, decibels in ((0.1, 1.0), (0.3, 3.0)):  # of PSNR over the identity
        noisy = x + sigma * torch.randn(x.shape)
        gain = 10 * torch.log10((noisy - x).square().mean() / (prior(noisy, sigma) - x).square().mean())
        assert float(gain) > decibels


def test_average_trails_the_weights(trained: tuple[Path, ScoreMatching, lightning.Trainer]) -> None:
    _, model, _ = trained
    pairs = list(zip(model.denoiser.parameters(), model.ema.parameters()))
    assert not any(torch.equal(a, b) for a, b in pairs)
    assert not any(b.requires_grad for _, b in pairs)


def test_average_is_the_recursion_it_claims_to_be(tmp_path: Path) -> None:
    class Reference(lightning.Callback):
        def on_train_batch_start(self, trainer: lightning.Trainer, module: Any, *args: Any) -> None:
            self.step, self.before = trainer.global_step, copy.deepcopy(module.ema)

        def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, *args: Any) -> None:
            t = trainer.global_step
            decay = min(0.9, (1 + t) / (10 + t)) if t > self.step else 1.0  # no step: gradients add up
            steps.append(t)
            for name, value in module.ema.named_parameters():
                weight = module.denoiser.get_parameter(name).detach()
                expected = decay * self.before.get_parameter(name) + (1 - decay) * weight
                torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)

    steps: list[int] = []
    fit(tmp_path, make_model(ema_decay=0.9), make_data(batches_per_epoch=6), 6, callbacks=(Reference(),),
        accumulate_grad_batches=2)  # fmt: skip
    assert steps == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]


def test_export_describes_itself(trained: tuple[Path, ScoreMatching, lightning.Trainer]) -> None:
    folder, model, _ = trained
    prior, card = load_prior(folder / "prior.safetensors")
    assert same(dict(prior.denoiser.state_dict()), dict(model.ema.state_dict()))
    assert card.kind == "patch" and card.patch_sizes == [8, 4] and card.image_size == 16
    assert card.sigma_range == (0.0015, 40.0) and card.sigma_data == float(model.ema.sigma_data) > 0
    assert card.intensity == {"offset": -1000.0, "scale": 3000.0, "units": "HU"}
    assert card.training["steps"] == 60 and card.training["pixels"] == 60 * 2048
    assert card.training["validation"]["loss"] > 0
    text = (folder / "prior.md").read_text()
    for word in ("# prior", "22,873 parameters", "sigma_data", "licence", "random ellipse phantoms", "| all |"):
        assert word in text


def test_tensorboard_shows_what_was_promised(trained: tuple[Path, ScoreMatching, lightning.Trainer]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(trained[0] / "tensorboard"))
    board.Reload()
    scalars = set(board.Tags()["scalars"])
    expected = {"train/loss", "train/patches_per_second", "validation/loss", "validation/psnr_4_views"}
    assert expected <= scalars
    assert any(name.startswith("train/loss_") for name in scalars)
    assert sum(name.startswith("validation/loss_") for name in scalars) == len(BANDS) - 1
    assert len(board.Tags()["images"]) == 2


def test_whole_images_train_the_same_network(tmp_path: Path) -> None:
    data = make_data(patch_sizes=[16], probabilities=[1.0], pad=0)
    fit(tmp_path, make_model(), data, 2)
    card = read_card(tmp_path / "prior.safetensors")
    assert card.kind == "whole" and card.patch_sizes == []
    assert load_prior(tmp_path / "prior.safetensors")[0](torch.rand(1, 1, 16, 16), 0.1).shape == (1, 1, 16, 16)


def test_bfloat16_runs_the_network_and_keeps_the_weights_in_float32(tmp_path: Path) -> None:
    model = make_model()
    fit(tmp_path, model, make_data(), 2, precision="bf16-mixed")
    assert model.denoiser.precision == model.ema.precision == "bf16"
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_run_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"trainer\.max_steps"):
        fit(tmp_path, make_model(), make_data(), -1)


# nothing that is not finite survives


class Poison(lightning.Callback):
    """Makes a loss or a gradient NaN at a step."""

    def __init__(self, step: int, what: str) -> None:
        self.step, self.what = step, what

    def on_train_batch_start(self, trainer: lightning.Trainer, module: Any, batch: PatchBatch, *args: Any) -> None:
        if trainer.global_step == self.step and self.what == "loss":
            batch.x[0, 0, 0, 0] = float("nan")

    def on_after_backward(self, trainer: lightning.Trainer, module: Any) -> None:
        if trainer.global_step == self.step and self.what == "gradient":
            next(module.denoiser.parameters()).grad[0] = float("inf")


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_ends_the_run_and_spares_the_checkpoint(
    tmp_path: Path, what: str
) -> None:
    with pytest.raises(InputError, match=rf"{what} is n.* at step 7.*checkpoint is intact"):
        fit(tmp_path, make_model(), make_data(), callbacks=(Poison(7, what),))
    saved = checkpoint_of(tmp_path)
    assert saved["global_step"] == 5
    assert all(torch.isfinite(value).all() for value in saved["state_dict"].values() if value.is_floating_point())
    assert not (tmp_path / "prior.safetensors").exists()


def test_an_overflow_of_half_precision_costs_a_step_and_not_the_run(tmp_path: Path) -> None:
    scaler, model = torch.amp.GradScaler("cpu", init_scale=8.0), make_model()
    plugins = (MixedPrecision("16-mixed", "cpu", scaler),)
    fit(tmp_path, model, make_data(), callbacks=(Poison(3, "gradient"),), plugins=plugins)
    assert scaler.get_scale() == 4.0, "halved once"
    assert checkpoint_of(tmp_path)["global_step"] > 3
    assert all(torch.isfinite(value).all() for value in model.ema.state_dict().values())


def test_half_precision_that_always_overflows_has_diverged(tmp_path: Path) -> None:
    class Poisoned(Poison):
        def on_after_backward(self, trainer: lightning.Trainer, module: Any) -> None:
            self.step = trainer.global_step
            super().on_after_backward(trainer, module)

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))
    with pytest.raises(InputError, match="gradient is not finite at step"):
        fit(tmp_path, make_model(), make_data(), callbacks=(Poisoned(0, "gradient"),), plugins=(plugin,))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_sigma_data_that_cannot_be_is_refused(value: float) -> None:
    with pytest.raises(InputError, match="sigma_data"):
        make_model(sigma_data=value)


def test_training_starts_from_a_prior(trained: tuple[Path, ScoreMatching, lightning.Trainer], tmp_path: Path) -> None:
    folder, before, _ = trained
    file = str(folder / "prior.safetensors")
    model = make_model(initial=file)
    assert same(dict(model.ema.state_dict()), dict(before.ema.state_dict()))
    assert same(dict(model.denoiser.state_dict()), dict(before.ema.state_dict()))
    fit(tmp_path, model, make_data(), max_steps=5)
    _, card = load_prior(tmp_path / "prior.safetensors")
    assert card.sigma_data == float(before.ema.sigma_data)
    assert card.training["steps"] == 5 and card.training["pixels"] == int(before.num_pixels) + 5 * 512
    with pytest.raises(InputError, match=r"initial.*asks for"):
        make_model(dropout=0.5, initial=file)


# two processes

TWO_RANKS = """
import hashlib, json, os
from pathlib import Path
import lightning, torch
from tests.tasks.tiny import fit, make_data, make_model

class Report(lightning.Callback):
    keys = []

    def on_train_batch_start(self, trainer, module, batch, index):
        self.keys.append(batch.key)

    def on_fit_end(self, trainer, module):
        digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in module.parameters())).hexdigest()
        figures = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("validation")}
        report = {"hash": digest, "keys": self.keys, "figures": figures}
        Path(f"rank{trainer.global_rank}.json").write_text(json.dumps(report))

torch.set_num_threads(1)
child = os.fork()  # what is imported serves both
os.environ["NODE_RANK"] = "0" if child else "1"
fit(Path.cwd(), make_model(), make_data(validation_batches=3), 10, callbacks=(Report(),),
    strategy="ddp", num_nodes=2, use_distributed_sampler=False)
assert not child or os.waitpid(child, 0)[1] == 0
"""


def test_two_processes_agree_and_share_the_data(tmp_path: Path, root: Path) -> None:
    """As two nodes of one process; three validation batches, which two ranks cannot share out evenly."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", TWO_RANKS], cwd=tmp_path, env={**os.environ, **shared},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert reports[0]["hash"] == reports[1]["hash"]
    assert reports[0]["keys"] == [f"{step}/0" for step in range(10)]
    assert reports[1]["keys"] == [f"{step}/1" for step in range(10)]
    prior, card = load_prior(tmp_path / "prior.safetensors")
    assert card.training["pixels"] == 2 * 10 * 512
    # the figures are those of one process on the same weights
    model, data = make_model(), make_data(validation_batches=3)
    data.setup()
    with torch.no_grad():
        batches = (data.on_after_batch_transfer(plan, 0) for plan in data.val_dataloader())
        pairs = [model.losses(prior.denoiser, batch) for batch in batches]
    sigma, losses = (torch.cat(parts) for parts in zip(*pairs))
    for report in reports:
        assert report["figures"]["validation/loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
        assert len(report["figures"]) == 1 + len(torch.bucketize(sigma, torch.tensor(BANDS)).unique())
