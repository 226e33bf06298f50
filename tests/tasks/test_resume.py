"""A run that is interrupted and started again by the same command ends where the undisturbed run does, bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from invrecon.errors import InputError
from invrecon.priors.edm import NoiseProposal
from invrecon.priors.unet import UNet
from invrecon.priors.weights import read_card
from invrecon.tasks.checkpoint import AtomicCheckpointIO
from invrecon.tasks.previews import TrainingPreviews
from invrecon.tasks.score_matching import ScoreMatching
from tests.tasks.tiny import Interrupt, checkpoint_of, fit, make_data, make_model, same

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
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    torch.set_num_threads(1)
    fit(folder, make_model(dropout=0.2), make_data(), 18)
    return folder


@pytest.mark.parametrize("mid_epoch", [False, True], ids=["from an epoch's end", "from the middle of an epoch"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    undisturbed: Path, tmp_path: Path, mid_epoch: bool
) -> None:
    every = {"every_n_train_steps": 4, "save_on_train_epoch_end": False} if mid_epoch else None
    with pytest.raises(ConnectionAbortedError):
        fit(tmp_path, make_model(dropout=0.2), make_data(), 18, callbacks=(Interrupt(13),), every=every)
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert checkpoint_of(tmp_path)["global_step"] == (12 if mid_epoch else 10)
    torch.manual_seed(123)  # whatever the new process starts from
    fit(tmp_path, make_model(dropout=0.2), make_data(), 18, resume=last)
    expected, found = checkpoint_of(undisturbed), checkpoint_of(tmp_path)
    assert found["global_step"] == expected["global_step"] == 18
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):  # weights, average, counters, optimiser, schedule
        assert same(found[part], expected[part]), part
    cards = [read_card(folder / "prior.safetensors") for folder in (undisturbed, tmp_path)]
    assert cards[0] == cards[1]  # the validation's figures among them
    assert (undisturbed / "prior.safetensors").read_bytes() == (tmp_path / "prior.safetensors").read_bytes()


def test_a_run_that_died_before_its_export_exports_when_run_again(undisturbed: Path, tmp_path: Path) -> None:
    last = undisturbed / "checkpoints" / "last.ckpt"
    fit(tmp_path, make_model(dropout=0.2), make_data(), 18, resume=last)
    assert (tmp_path / "prior.safetensors").read_bytes() == (undisturbed / "prior.safetensors").read_bytes()
    assert (tmp_path / "prior.md").read_text() == (undisturbed / "prior.md").read_text()


def test_previews_and_logging_leave_the_weights_alone(undisturbed: Path, tmp_path: Path) -> None:
    previews = TrainingPreviews(every_n_validations=1, num_views=3, num_levels=2)
    logger = TensorBoardLogger(str(tmp_path), name="tensorboard", version="")
    fit(tmp_path, make_model(dropout=0.2), make_data(), 18, callbacks=(previews,), logger=logger)
    assert same(checkpoint_of(tmp_path)["state_dict"], checkpoint_of(undisturbed)["state_dict"])


def test_a_checkpoint_of_another_network_is_refused(undisturbed: Path, tmp_path: Path) -> None:
    model = ScoreMatching(UNet(base_channels=16, multipliers=(1, 2)), NoiseProposal())
    with pytest.raises(InputError, match=r"another network.*--output"):
        fit(tmp_path, model, make_data(), 18, resume=undisturbed / "checkpoints" / "last.ckpt")


def test_a_damaged_checkpoint_is_refused(undisturbed: Path, tmp_path: Path) -> None:
    content = (undisturbed / "checkpoints" / "last.ckpt").read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"\x80\x04N."):
        path = tmp_path / "last.ckpt"
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"last\.ckpt' cannot be read"):
            AtomicCheckpointIO().load_checkpoint(path)
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.ckpt")
    with pytest.raises(InputError, match=r"other\.ckpt' is no checkpoint of a training run"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(InputError, match="There is no checkpoint"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "absent.ckpt")


def test_loading_a_checkpoint_runs_nothing(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
            return Path.touch, (tmp_path / "mark",)

    torch.save({"state_dict": Trap()}, tmp_path / "trap.ckpt")
    with pytest.raises(InputError, match="cannot be read"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "trap.ckpt")
    assert not (tmp_path / "mark").exists()


def test_a_save_that_fails_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, writer = tmp_path / "last.ckpt", AtomicCheckpointIO()
    first = {"state_dict": {}, "pytorch-lightning_version": "2.5", "step": 1}
    writer.save_checkpoint(first, path)
    (tmp_path / ".last.ckpt.0123.partial").write_bytes(b"left by a kill")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(InputError, match="disk is full"):
        writer.save_checkpoint({**first, "step": 2}, path)
    assert writer.load_checkpoint(path) == first
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]  # neither its own rest nor the older one


def test_a_hash_of_weights_is_of_every_bit() -> None:
    """What the comparisons above rest on."""
    a = {"w": torch.zeros(3)}
    assert same(a, {"w": torch.zeros(3)})
    assert not same(a, {"w": torch.tensor([0.0, 0.0, 1e-45])})
    assert hashlib.sha256(a["w"].numpy().tobytes()).hexdigest() == hashlib.sha256(bytes(12)).hexdigest()


# killed from outside


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory, root: Path) -> dict[str, Any]:
    """One round of the benchmark: a kill at a step, one inside a checkpoint save, a SIGTERM, then to the end."""
    path = tmp_path_factory.mktemp("kill") / "outcome.json"
    command = [sys.executable, "-m", "benchmarks.kill_resume", "--kills", "2", "--seed", "4", "--json", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert path.is_file(), done.stdout + done.stderr
    return json.loads(path.read_text())["rounds"][0]


def test_every_fault_struck_and_work_was_resumed(outcome: dict[str, Any]) -> None:
    faults = outcome["faults"]
    assert sorted(row["fault"] for row in faults) == ["SIGKILL", "SIGTERM", "save"]
    assert all(row["status"] == -9 for row in faults if row["fault"] != "SIGTERM")
    assert not any(row["exported"] for row in faults)  # nothing is exported before the end
    assert any(row["from"] > 0 for row in faults)


def test_a_kill_inside_a_save_leaves_the_checkpoint_before_it(outcome: dict[str, Any]) -> None:
    (row,) = (row for row in outcome["faults"] if row["fault"] == "save")
    assert row["partial_files"] == 1  # it did strike in the middle of the file
    assert row["checkpoint"] == row["from"]
    assert outcome["partial_files_left"] == []  # the next save cleared it away


def test_sigterm_stops_the_run_in_order(outcome: dict[str, Any]) -> None:
    """It ends by itself, neither killed by the signal nor with a traceback's status."""
    (row,) = (row for row in outcome["faults"] if row["fault"] == "SIGTERM")
    assert row["status"] in (0, 143)
    assert row["checkpoint"] >= row["from"]


def test_the_weights_are_those_of_the_undisturbed_run(outcome: dict[str, Any]) -> None:
    assert outcome["hashes"]["disturbed"] == outcome["hashes"]["undisturbed"]


def test_counts_and_validation_figures_are_those_of_the_undisturbed_run(outcome: dict[str, Any]) -> None:
    assert outcome["equal_cards"]
