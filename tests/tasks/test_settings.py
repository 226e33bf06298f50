"""Settings of a training run that do not go together are refused before it begins."""

from __future__ import annotations

from pathlib import Path

import h5py
import lightning
import numpy as np
import pytest

from invrecon.data.training import CTTraining
from invrecon.errors import InputError
from invrecon.tasks.checkpoint import AtomicCheckpointIO
from tests.tasks.tiny import fit, make_data, make_model


@pytest.mark.parametrize(
    ("trainer", "data", "match"),
    [
        ({"accumulate_grad_batches": 3}, {}, r"accumulate_grad_batches is 3, data\.batches_per_epoch 5"),
        ({"precision": "bf16-true"}, {}, "average of weights.*bf16-mixed"),
        ({}, {"patch_sizes": [8, 5]}, r"\[5\] do not go through this network.*multiples of 2"),
    ],
)
def test_what_would_hang_or_spoil_a_run_is_refused(tmp_path: Path, trainer: dict, data: dict, match: str) -> None:
    with pytest.raises(InputError, match=match):
        fit(tmp_path, make_model(), make_data(**data), 4, **trainer)


def test_validation_has_the_settings_of_a_training(tmp_path: Path) -> None:
    trainer = lightning.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    with pytest.raises(InputError, match=r"\[5\] do not go through this network"):
        trainer.validate(make_model(), make_data(patch_sizes=[8, 5]))


def test_constant_images_teach_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_data()
    monkeypatch.setattr(data, "measure_sigma_data", lambda: 0.0)
    with pytest.raises(InputError, match="deviation of the training images is 0: they are constant"):
        fit(tmp_path, make_model(), data, 5)


@pytest.mark.parametrize(("steps", "words"), [(5, "weights (unit"), (7, "weights after step 5 of 7 (unit")])
def test_the_card_says_when_its_losses_were_measured(tmp_path: Path, steps: int, words: str) -> None:
    """An epoch has five steps: a run that ends within one was validated before its last."""
    fit(tmp_path, make_model(), make_data(), steps)
    assert f"Validation loss of the averaged {words}" in (tmp_path / "prior.md").read_text()


def test_the_largest_patch_comes_first() -> None:
    with pytest.raises(InputError, match="largest first"):
        make_data(patch_sizes=[4, 8])


@pytest.mark.parametrize("knobs", [{"ema_decay": 1.5}, {"warmup": 5.0}, {"learning_rate": 0.0}])
def test_knobs_out_of_range(knobs: dict) -> None:
    with pytest.raises(InputError, match="learning_rate > 0"):
        make_model(**knobs)


def test_a_prior_is_no_checkpoint(tmp_path: Path) -> None:
    fit(tmp_path, make_model(), make_data(), 5)
    with pytest.raises(InputError, match=r"is a prior.*--model\.initial"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "prior.safetensors")
    with pytest.raises(InputError, match="sigma_data of its own"):
        make_model(sigma_data=0.9, initial=str(tmp_path / "prior.safetensors"))


def test_volumes_that_are_not_in_hounsfield_units(tmp_path: Path) -> None:
    settings = {"size": 16, "patch_sizes": [8], "probabilities": [1.0], "pad": 4, "zooms": [1.0], "couches": 0.0}
    body = np.random.default_rng(0).uniform(0, 1, (4, 16, 16)).astype(np.float32)
    for name, values in (("fraction", body), ("offset", 1000 * body + 24)):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["data"] = values
    with pytest.raises(InputError, match=r"between .* and .*, expected Hounsfield units"):
        CTTraining(str(tmp_path / "fraction.h5"), **settings).setup("fit")
    with pytest.warns(UserWarning, match=r"no air.*offset"):
        CTTraining(str(tmp_path / "offset.h5"), **settings).setup("fit")
