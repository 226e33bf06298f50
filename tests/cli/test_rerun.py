"""A rerun of `predict` continues where the last one stopped, and never mixes two runs."""

from __future__ import annotations

import csv
import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from invrecon import cli
from invrecon.errors import InputError
from tests.cli.tiny import Witness, files_in, read, reconstruct, witness


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Where `Witness` notes what it reconstructs."""
    return tmp_path / "log.txt"


@pytest.fixture
def command(library: Path, tmp_path: Path, log: Path) -> list[str]:
    """A `predict` of two files of four and three slices, two slices at once."""
    data = f"[{library}/scans/a.h5,{library}/scans/b.h5]"
    more = (*witness(log), f"--model.prior={library}/patch.safetensors", "--data.batch_size=2")
    return reconstruct("predict", "recon_ct.yaml", data, tmp_path / "out", *more, "--model.num_figures=0")


def seen(log: Path) -> list[str]:
    return log.read_text().split("\n")[:-1] if log.exists() else []


def stop_after(monkeypatch: pytest.MonkeyPatch, num_batches: int) -> None:
    """Lets the method fail after a number of batches."""
    calls, reconstruct_batch = [], Witness.__call__

    def fails(self: Witness, *args: Any, **kwargs: Any) -> Any:
        if len(calls) == num_batches:
            raise RuntimeError("the power is gone")
        calls.append(None)
        return reconstruct_batch(self, *args, **kwargs)

    monkeypatch.setattr(Witness, "__call__", fails)


def test_nothing_is_computed_twice(
    invrecon: Callable[..., Any], command: list[str], log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.append("--model.num_figures=1")
    invrecon(command)
    assert len(seen(log)) == 7
    before = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in files_in(tmp_path / "out")}
    first = read(tmp_path / "out" / "a.h5")
    capsys.readouterr()
    invrecon(command)
    assert len(seen(log)) == 7
    assert "7 of 7 slices are complete" in (out := capsys.readouterr().out) and "Nothing is new" in out
    assert "psnr" in out.lower()  # its table is printed all the same
    after = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in files_in(tmp_path / "out")}
    assert before.keys() == after.keys()
    assert all(before[name] == after[name] for name in ("a.h5", "b.h5", "figures/a_0002.png", "report.html"))
    assert (read(tmp_path / "out" / "a.h5") == first).all()


def test_an_interrupted_run_goes_on(
    invrecon: Callable[..., Any],
    command: list[str],
    log: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(RuntimeError, match="power"):
            invrecon(command)
    assert len(seen(log)) == 6
    assert not list(out.glob("*.h5")) and len(list(out.glob(".parts/*/*.h5"))) == 6
    (out / ".parts" / "a" / ".0009.h5.0badcafe.partial").write_bytes(b"a killed write")
    (out / ".parts" / "a" / "0001.h5").write_bytes(b"a part that a failing disk has damaged")

    invrecon(command)
    assert len(seen(log)) == 8  # the one that was missing, and the damaged one
    invrecon([str(undisturbed) if arg == str(out) else arg for arg in command])
    assert files_in(out) == files_in(undisturbed)
    for name in ("a.h5", "b.h5"):
        assert (read(out / name) == read(undisturbed / name)).all()
    rows, expected = ((folder / "metrics.csv").read_text().splitlines() for folder in (out, undisturbed))
    assert [row.split(",")[:7] for row in rows] == [row.split(",")[:7] for row in expected]


@pytest.mark.parametrize(
    "args, sentence",
    [
        (["predict", "--config", "x"], "with the folder that it began as --output"),
        (["predict", "--output=here"], "run the same command again to continue"),
        (["test", "--output", "here"], "`test` begins anew"),
    ],
)
def test_ctrl_c_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str], sentence: str
) -> None:
    def strike() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "main", strike)
    monkeypatch.setattr("sys.argv", ["invrecon", *args])
    with pytest.raises(SystemExit) as end:
        cli.main_entry()
    assert end.value.code == 130 and sentence in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["test", "predict"])
def test_a_run_that_is_terminated_ends_at_once(
    invrecon: Callable[..., Any],
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    """Lightning would end after the batch, or, of the last one and in `predict`, not at all."""
    before, calls = signal.getsignal(signal.SIGTERM), []

    def hangs(*args: Any, **kwargs: Any) -> None:
        calls.append(None)
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it goes on")

    monkeypatch.setattr(Witness, "__call__", hangs)
    monkeypatch.setattr("sys.argv", ["invrecon", kind, *command[1:]])
    with pytest.raises(SystemExit) as end:
        cli.main_entry()
    assert end.value.code == 143 and "invrecon: terminated; " in capsys.readouterr().err
    assert len(calls) == 1 and signal.getsignal(signal.SIGTERM) is before


def test_a_test_is_of_the_slices_that_it_was_asked_for(
    invrecon: Callable[..., Any], command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["test", *command[1:]]
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(RuntimeError, match="power"):
            invrecon(command)
    (tmp_path / "out" / "adaptation.json").write_text("{}")
    invrecon([*command, "--data.slices", "2"])
    with open(tmp_path / "out" / "metrics.csv") as file:
        assert {row["slice"] for row in csv.DictReader(file)} == {"2"}
    assert not (tmp_path / "out" / "adaptation.json").exists()


def test_more_slices_are_added(invrecon: Callable[..., Any], command: list[str], log: Path, tmp_path: Path) -> None:
    invrecon([*command, "--data.slices", "2"])
    invrecon([*command, "--data.slices", "0:3"])
    assert len(seen(log)) == 6  # slices 0, 1 and 2 of two files, each once
    assert read(tmp_path / "out" / "a.h5", "slices").tolist() == [0, 1, 2]


def test_figures_of_added_slices_have_their_reference(
    invrecon: Callable[..., Any], command: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    invrecon([*command, "--data.slices", "0,1", "--model.num_figures=1"])
    assert files_in(out / "figures") == {"a_0001.png", "b_0001.png"}
    invrecon([*command, "--data.slices", "0:3", "--model.num_figures=2"])
    # slice 0 is complete and was not drawn, so that nothing is left to draw it from
    assert files_in(out / "figures") == {f"{name}_000{n}.png" for name in "ab" for n in (1, 2)}
    page = (out / "report.html").read_text()
    assert "a, slice 2, " in page and page.count('data-label="Reference"') == 2


def test_figures_of_earlier_slices_stay_on_the_page(
    invrecon: Callable[..., Any], command: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for slices in ("0", "2"):
        invrecon([*command, f"--data.slices={slices}", "--model.num_figures=1"])
    assert files_in(out / "figures") == {f"{name}_000{n}.png" for name in "ab" for n in (0, 2)}
    page = (out / "report.html").read_text()
    assert all(f"{name}, slice {n}" in page for name in "ab" for n in (0, 2))


def test_a_damaged_part_of_a_slice_not_asked_for_ends_nothing(
    invrecon: Callable[..., Any], command: list[str], tmp_path: Path
) -> None:
    """The power went while another slice was written: the run leaves it to the next one that asks for it."""
    part = tmp_path / "out" / ".parts" / "a" / "0002.h5"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"\x89HDF\r\n\x1a\n")
    invrecon([*command, "--data.slices=0"])
    assert read(tmp_path / "out" / "a.h5", "slices").tolist() == [0]


def test_files_are_added(
    invrecon: Callable[..., Any], command: list[str], library: Path, log: Path, tmp_path: Path
) -> None:
    one = [arg.replace(f",{library}/scans/b.h5", "") for arg in command]
    invrecon([*one, "--data.slices=0"])
    invrecon([*command, "--data.slices=0"])
    assert len(seen(log)) == 2  # each once
    assert {row["case"] for row in csv.DictReader((tmp_path / "out" / "metrics.csv").open())} == {"a", "b"}


def test_a_file_that_has_changed_is_noticed(
    invrecon: Callable[..., Any], command: list[str], library: Path, tmp_path: Path
) -> None:
    scan = tmp_path / "a.h5"
    scan.write_bytes((library / "scans" / "a.h5").read_bytes())
    one = [str(scan) if arg.startswith("[") else arg for arg in command]
    invrecon([*one, "--data.slices=0"])
    os.utime(scan, (1, 1))
    with pytest.raises(InputError, match=r"a\.h5 was made from another version of its input file"):
        invrecon([*one, "--data.slices=0"])


@pytest.mark.parametrize(
    "change", ["--model.operator.num_views=13", "--model.seed=1", "--model.method.num_levels=3", "--model.prior={}"]
)
def test_another_run_keeps_off(
    invrecon: Callable[..., Any], command: list[str], library: Path, tmp_path: Path, change: str, log: Path
) -> None:
    (tmp_path / "out").mkdir()
    invrecon([*command, "--data.slices=0"])
    before = {name: (tmp_path / "out" / name).read_bytes() for name in files_in(tmp_path / "out")}
    with pytest.raises(InputError, match=r"holds results of another run.*Choose another --output"):
        invrecon([*command, "--data.slices=0", change.format(library / "whole.safetensors")])
    assert before == {name: (tmp_path / "out" / name).read_bytes() for name in files_in(tmp_path / "out")}
    assert len(seen(log)) == 2


def test_what_is_no_result_of_ours_is_left_alone(
    invrecon: Callable[..., Any], command: list[str], library: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    scan = (library / "scans" / "a.h5").read_bytes()
    (tmp_path / "out" / "a.h5").write_bytes(scan)
    with pytest.raises(InputError, match="no result of invrecon"):
        invrecon(command)
    assert (tmp_path / "out" / "a.h5").read_bytes() == scan


@pytest.mark.parametrize("num_writes", [1, 5, 11])
def test_a_full_disk(
    invrecon: Callable[..., Any],
    command: list[str],
    log: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_writes: int,
) -> None:
    """It may fill up while the config, a slice or a volume is written: finished files stay whole."""
    left, sync = [2 * num_writes], os.fsync  # a file and its folder are synced for each write

    def full(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match=r"Cannot write .*: the disk is full.*Finished files are intact"):
            invrecon(command)
    assert not [name for name in files_in(tmp_path / "out") if name.endswith(".partial")]
    invrecon(command)
    assert len(seen(log)) <= 9  # at most the batch that could not be written is computed again
    assert read(tmp_path / "out" / "a.h5").shape[0] == 4 and read(tmp_path / "out" / "b.h5").shape[0] == 3
