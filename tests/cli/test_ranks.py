"""On any number of ranks every slice is treated once, with the numbers of one; several nodes train one prior."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from invrecon.errors import InputError
from invrecon.methods import FBP, Estimate
from tests.cli.tiny import ROOT, environment, files_in, learn, process, read, reconstruct, witness

MEASURED = {"seconds", "peak_memory_mb"}


def arguments(command: str, library: Path, folder: Path, *more: str) -> list[str]:
    """Ten slices of three files, two at once: six batches, so that ranks differ in their load."""
    prior = f"--model.prior={library}/patch.safetensors"
    more = (*witness(folder / "log.txt"), prior, "--data.batch_size=2", "--model.num_figures=0", *more)
    return reconstruct(command, "recon_ct.yaml", library / "scans", folder / "out", *more)


def adaptation(library: Path, folder: Path) -> list[str]:
    """The same slices, each with a prior that is adapted to it."""
    more = (f"--model.prior={library}/patch.safetensors", "--data.batch_size=2", "--model.num_figures=0")
    tiny = ("--model.method.num_levels=2", "--model.adaptation.rounds=1", "--model.adaptation.steps=2")
    return reconstruct("predict", "tta_ct.yaml", library / "scans", folder / "out", *more, *tiny)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "out" / "metrics.csv") as file:
        return [{k: v for k, v in row.items() if k not in MEASURED} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def runs(library: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    """Folders of `test` and `predict` on 1, 2 and 3 ranks, and of a `predict` of one slice on 3."""
    root = tmp_path_factory.mktemp("ranks")
    folders = {(c, n): root / f"{c}{n}" for c in ("test", "predict") for n in (1, 2, 3)} | {"few": root / "few"}
    folders |= {("adapt", n): root / f"adapt{n}" for n in (1, 3)}
    for folder in folders.values():
        folder.mkdir()
    jobs = [(n, arguments(c, library, folders[c, n])) for c in ("test", "predict") for n in (1, 2, 3)]
    few = (f"--data.paths={library}/scans/a.h5", "--data.slices=1")
    jobs += [(3, arguments("predict", library, folders["few"], *few))]
    jobs += [(n, adaptation(library, folders["adapt", n])) for n in (1, 3)]
    result = process(ROOT / "tests" / "cli" / "ranks.py", json.dumps(jobs), cwd=root)
    assert result.returncode == 0, result.stderr
    return folders


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("command", ["test", "predict"])
def test_every_slice_once_with_the_same_numbers(runs: dict[Any, Path], command: str, num_ranks: int) -> None:
    one, several = runs[command, 1], runs[command, num_ranks]
    assert files_in(several / "out") == files_in(one / "out")
    assert rows_of(several) == rows_of(one)
    lines = [(folder / "log.txt").read_text().split("\n")[:-1] for folder in (one, several)]
    alone, shared = ([line.split()[1] for line in file] for file in lines)
    assert Counter(shared) == Counter(alone) and len(set(alone)) == 10
    loads = Counter(line.split()[0] for line in lines[1])
    assert len(loads) == num_ranks and max(loads.values()) <= 10 // num_ranks + 2
    if command == "predict":
        for name in ("a.h5", "b.h5", "c.h5"):
            assert (read(several / "out" / name) == read(one / "out" / name)).all()


def test_adapters_do_not_know_their_rank(runs: dict[Any, Path]) -> None:
    one, several = runs["adapt", 1], runs["adapt", 3]
    assert rows_of(several) == rows_of(one)
    traces = [json.loads((folder / "out" / "adaptation.json").read_text()) for folder in (one, several)]
    assert traces[0] == traces[1]
    for name in ("a.h5", "b.h5", "c.h5"):
        assert (read(several / "out" / name) == read(one / "out" / name)).all()


def test_more_ranks_than_slices(runs: dict[Any, Path]) -> None:
    assert (runs["few"] / "log.txt").read_text().count("\n") == 1
    expected = read(runs["predict", 1] / "out" / "a.h5")[1:2]
    assert (read(runs["few"] / "out" / "a.h5") == expected).all()


def test_the_command_starts_its_ranks_itself(library: Path, tmp_path: Path) -> None:
    args = arguments("predict", library, tmp_path, "--data.slices=0", "--trainer.devices=2", "--trainer.strategy=ddp")
    result = process("-m", "invrecon", *args, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 3
    assert result.stdout.count("Written to") == 1
    assert files_in(tmp_path) == {"log.txt", *(f"out/{name}" for name in files_in(tmp_path / "out"))}


def test_two_nodes_by_torchrun_train_one_prior(library: Path, tmp_path: Path) -> None:
    """The README's line, with two processes as two nodes on loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    train = learn("patch_ct.yaml", library / "scans", tmp_path / "run", "--trainer.num_nodes", "2")
    train += ["--trainer.devices", "1", "--trainer.strategy", "ddp"]
    nodes = []
    for rank in (0, 1):
        torchrun = ["--nnodes", "2", "--node_rank", str(rank), "--nproc_per_node", "1"]
        torchrun += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
        command = [sys.executable, "-m", "torch.distributed.run", *torchrun, "-m", "invrecon", *train]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        nodes.append(subprocess.Popen(command, cwd=tmp_path, env=environment(), **pipes))
    try:
        outputs = [node.communicate(timeout=170)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    assert "".join(outputs).count("The prior is in") == 1
    assert {name for name in files_in(tmp_path) if name.endswith("safetensors")} == {"run/prior.safetensors"}
    card = (tmp_path / "run" / "prior.md").read_text()
    assert "| steps | 4 |" in card
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "run" / "prior.safetensors").values())


class Fails(FBP):
    """Fails on every rank but the first."""

    def __call__(self, *args: Any, **kwargs: Any) -> Estimate:
        """Returns filtered back-projection, or nothing."""
        if os.environ["RANK"] != "0":
            raise InputError("it diverged")
        return super().__call__(*args, **kwargs)


def test_a_rank_that_fails_ends_the_others_with_a_sentence(library: Path, tmp_path: Path) -> None:
    """Slices that the others have finished are kept."""
    more = ("--model.method=tests.cli.test_ranks.Fails", "--data.batch_size=1", "--model.num_figures=0")
    args = reconstruct("predict", "fbp_ct.yaml", library / "scans", tmp_path / "out", *more)
    result = process(ROOT / "tests" / "cli" / "ranks.py", json.dumps([(2, args)]), cwd=tmp_path)
    assert result.returncode != 0
    assert "rank 1: InputError: it diverged" in result.stderr
    assert "rank 0: InputError: Another process of this run has failed" in result.stderr
    assert len(list((tmp_path / "out" / ".parts").glob("*/*.h5"))) == 5
