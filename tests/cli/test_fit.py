"""What a training run leaves, where it goes on, and how it ends when it is told to."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from invrecon.cli import main_entry
from invrecon.errors import InputError
from invrecon.priors.weights import load_prior
from invrecon.tasks.previews import TrainingPreviews
from tests.cli.tiny import files_in, learn


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """A tiny `fit` on ellipses."""
    return learn("patch_ellipses.yaml", None, tmp_path / "out")


def test_ctrl_c_ends_a_run_with_a_sentence(
    command: list[str], here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def strike(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainingPreviews, "on_train_epoch_start", strike)
    monkeypatch.setattr("sys.argv", ["invrecon", *command])
    handler = signal.getsignal(signal.SIGINT)  # which the Trainer takes away
    try:
        with pytest.raises(SystemExit) as end:
            main_entry()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert end.value.code == 130
    assert "interrupted; run the same command again" in capsys.readouterr().err


def test_a_run_without_logs(invrecon: Callable[..., Any], command: list[str], tmp_path: Path) -> None:
    invrecon([*command, "--trainer.logger", "false", "--trainer.log_every_n_steps", "0"])
    assert "prior.safetensors" in files_in(tmp_path / "out")


def test_a_run_of_a_few_batches_leaves_the_real_one_alone(
    invrecon: Callable[..., Any], command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    invrecon(command)
    file = tmp_path / "out" / "prior.safetensors"
    before = file.read_bytes(), file.stat().st_mtime_ns
    invrecon([*command, "--trainer.fast_dev_run", "1"])
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before
    assert "leaves no prior" in capsys.readouterr().out


def test_the_newest_checkpoint_counts_be_it_slurms(
    invrecon: Callable[..., Any], command: list[str], tmp_path: Path
) -> None:
    """What a scheduler had saved when it took the job away is of a later step than the last epoch's."""
    out = tmp_path / "out"
    cli = invrecon(command)
    last, taken = out / "checkpoints" / "last.ckpt", out / "hpc_ckpt_1.ckpt"
    shutil.copy(last, taken)
    for newer, older in ((taken, last), (last, taken)):
        os.utime(older, ns=(10**18, 10**18))
        os.utime(newer, ns=(2 * 10**18, 2 * 10**18))
        cli.config_init.fit.ckpt_path = None
        cli.before_fit()
        assert cli.config_init.fit.ckpt_path == str(newer)


def test_a_file_is_no_output(invrecon: Callable[..., Any], command: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match=r"--output '.*out' is a file, not a folder"):
        invrecon(command)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("multipliers=[]", "multipliers of at least 1"),
        ("base_channels=0", "multipliers of at least 1"),
        ("image_channels=2", r"image_channels is 2, and the images of EllipseTraining have 1"),
    ],
)
def test_networks_that_cannot_be(invrecon: Callable[..., Any], command: list[str], network: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        invrecon([*command, f"--model.network.{network}"])


def test_one_name_in_folders_of_patients(
    invrecon: Callable[..., Any], library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Patients of files without a name of their own are their folders; a prior that begins from another says so."""
    import h5py

    for name in "abc":
        target = tmp_path / "scans" / name / "ct.h5"
        target.parent.mkdir(parents=True)
        shutil.copy(library / "scans" / f"{name}.h5", target)
        with h5py.File(target, "a") as file:
            for attributes in (file.attrs, file["data"].attrs):
                attributes.pop("patient", None)
    first = tmp_path / "first"
    invrecon(learn("patch_ct.yaml", tmp_path / "scans", first, "--data.licence=CC0", "--data.validation=[b/ct.h5]"))
    assert "images of a/ct.h5, c/ct.h5 are to be learned" in capsys.readouterr().out
    second = learn("patch_ct.yaml", library / "scans", tmp_path / "second", "--data.licence=CC BY 4.0")
    invrecon([*second, f"--model.initial={first}/prior.safetensors"])
    _, card = load_prior(tmp_path / "second" / "prior.safetensors")
    assert card.data == ["a/ct.h5", "c/ct.h5", "a.h5", "b.h5"] and card.licence == "CC0; CC BY 4.0"


def test_a_run_goes_on_with_the_scans_that_it_began_with(
    invrecon: Callable[..., Any], library: Path, tmp_path: Path
) -> None:
    """With another patient the split changes: who validated would be learned."""
    shutil.copytree(library / "scans", tmp_path / "scans")
    (tmp_path / "scans" / "b.h5").rename(tmp_path / "b.h5")
    command = learn("patch_ct.yaml", tmp_path / "scans", tmp_path / "out")
    invrecon(command)
    (tmp_path / "b.h5").rename(tmp_path / "scans" / "b.h5")
    with pytest.raises(InputError, match=r"begun with data: files to learn from = .*another --output"):
        invrecon([*command, "--trainer.max_steps=6"])


def test_a_run_that_began_with_a_checkpoint_goes_on_with_its_own(
    invrecon: Callable[..., Any], command: list[str], tmp_path: Path
) -> None:
    invrecon(command)
    start = tmp_path / "out" / "checkpoints" / "last.ckpt"
    again = [str(tmp_path / "again") if arg == str(tmp_path / "out") else arg for arg in command]
    again += ["--ckpt_path", str(start)]
    assert invrecon([*again, "--trainer.max_steps=6"]).config_init.fit.ckpt_path == str(start)
    own = tmp_path / "again" / "checkpoints" / "last.ckpt"
    assert invrecon([*again, "--trainer.max_steps=8"]).config_init.fit.ckpt_path == str(own)
