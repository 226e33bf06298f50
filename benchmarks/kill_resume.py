"""Kill -9 a tiny training run at random steps, once inside a checkpoint save, and compare with the undisturbed run.

    python -m benchmarks.kill_resume [--kills 5] [--rounds 1] [--seed 0] [--json FILE]

Each round trains a small patch prior on ellipse phantoms by one and the same `invrecon fit` command, which is killed
(SIGKILL) again and again, then once asked to stop (SIGTERM), and run until it ends. The exported prior must be the
undisturbed run's, bit for bit. All runs but the last are forked from this process, which saves them the imports and
lets a kill hit an exact step; the last is the command itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import invrecon.cli
import invrecon.tasks.checkpoint
from invrecon.tasks.score_matching import ScoreMatching

NUM_STEPS, STEPS_PER_EPOCH = 34, 5
CONFIG = """
seed_everything: 0
model:
  class_path: ScoreMatching
  init_args:
    network: {{class_path: UNet, init_args: {{base_channels: 8, multipliers: [1, 2], dropout: 0.1}}}}
    proposal: {{class_path: NoiseProposal}}
data:
  class_path: EllipseTraining
  init_args:
    num_phantoms: 16
    size: 16
    patch_sizes: [8, 4]
    probabilities: [0.6, 0.4]
    pad: 4
    pixels_per_batch: 512
    batches_per_epoch: {epoch}
    validation_batches: 2
trainer:
  max_steps: {steps}
  max_epochs: -1
  precision: 32-true
  gradient_clip_val: 1.0
  log_every_n_steps: 2
  accelerator: cpu
  devices: 1
  enable_progress_bar: false
  enable_model_summary: false
"""


def strike_at_step(step: int, blow: signal.Signals) -> None:
    """Makes this process send itself a signal at the end of an optimiser step."""
    end = ScoreMatching.on_train_batch_end

    def struck(self: ScoreMatching, *args: Any) -> None:
        end(self, *args)
        if self.global_step == step:
            os.kill(os.getpid(), blow)

    ScoreMatching.on_train_batch_end = struck  # type: ignore[method-assign]


def kill_in_save(number: int) -> None:
    """Makes this process kill itself when half of its `number`-th checkpoint (from 1) is written."""
    write, count = invrecon.tasks.checkpoint.atomic_write, 0

    class Half:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: Any) -> None:
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    @contextmanager
    def atomic_write(path: Path) -> Iterator[Any]:
        nonlocal count
        count += path.suffix == ".ckpt"
        with write(path) as file:
            yield Half(file) if count == number else file

    invrecon.tasks.checkpoint.atomic_write = atomic_write


def fork_fit(command: list[str], log: Path, fault: str, at: int) -> int:
    """Runs the command in a fork of this process; returns its exit status, negative for a signal."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            if fault == "save":
                kill_in_save(at)
            elif fault:
                strike_at_step(at, signal.Signals[fault])
            sys.argv = ["invrecon", *command]
            invrecon.cli.main_entry()
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def checkpoint_step(output: Path) -> int:
    """The step of the run's last checkpoint, 0 without one; it must be readable at any time."""
    path = output / "checkpoints" / "last.ckpt"
    return int(torch.load(path, weights_only=True)["global_step"]) if path.is_file() else 0


def weights_hash(output: Path) -> str:
    """SHA-256 over names and bytes of the exported prior's tensors."""
    from safetensors.torch import load_file

    digest = hashlib.sha256()
    for key, value in sorted(load_file(output / "prior.safetensors").items()):
        digest.update(key.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def plan(num_kills: int, rng: random.Random) -> list[tuple[str, int]]:
    """Draws faults in the order of the steps they strike at: kills at steps, one in a save, one SIGTERM."""
    steps = sorted(rng.sample(range(1, NUM_STEPS), num_kills))  # the save's place, then all the others
    faults = [("SIGKILL", step) for step in steps]
    in_save = rng.randrange(1, num_kills) if num_kills > 1 else 0  # preferably where there is a checkpoint to lose
    faults[in_save] = ("save", 1)  # the first save of the run that continues there
    return [*faults, ("SIGTERM", rng.randrange(max(steps[-1], NUM_STEPS // 2), NUM_STEPS))]


def one_round(folder: Path, num_kills: int, rng: random.Random) -> dict[str, Any]:
    """Trains undisturbed and disturbed; returns the faults, what each left, and both hashes."""
    config = folder / "tiny.yaml"
    config.write_text(CONFIG.format(steps=NUM_STEPS, epoch=STEPS_PER_EPOCH))
    log = folder / "log.txt"
    command = ["fit", "--config", str(config), "--output"]
    status = fork_fit([*command, str(folder / "undisturbed")], log, "", 0)
    if status:
        raise RuntimeError(f"the undisturbed run ended with status {status}:\n{log.read_text()[-3000:]}")
    output, rows = folder / "disturbed", []
    for fault, at in plan(num_kills, rng):
        before = checkpoint_step(output)
        status = fork_fit([*command, str(output)], log, fault, at if fault == "save" else max(at, before + 1))
        partial = len(list(output.glob("checkpoints/.*.partial")))
        rows.append(
            {"fault": fault, "at": at, "status": status, "from": before, "checkpoint": checkpoint_step(output),
             "partial_files": partial, "exported": (output / "prior.safetensors").exists()}
        )  # fmt: skip
    last = [sys.executable, "-m", "invrecon", *command, str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(last, capture_output=True, text=True, env=environment)
    if finished.returncode:
        raise RuntimeError(f"the last run ended with status {finished.returncode}:\n{finished.stderr[-3000:]}")
    hashes = {name: weights_hash(folder / name) for name in ("undisturbed", "disturbed")}
    left = [str(path.relative_to(output)) for path in output.rglob("*.partial")]
    cards = [(folder / name / "prior.md").read_text().splitlines() for name in hashes]
    same_card = [a for a, b in zip(*cards, strict=True) if a != b and "| command |" not in a] == []
    return {"faults": rows, "hashes": hashes, "partial_files_left": left, "equal_cards": same_card}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5, help="kills a round, one of them inside a checkpoint save")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng, start, rounds = random.Random(args.seed), time.perf_counter(), []
    for number in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            rounds.append(one_round(Path(folder), args.kills, rng))
        print(f"round {number + 1}\n| fault | at | status | resumed from step | checkpoint after it |")
        print("|---|---|---|---|---|")
        for row in rounds[-1]["faults"]:
            print(f"| {row['fault']} | {row['at']} | {row['status']} | {row['from']} | {row['checkpoint']} |")
        for name, value in rounds[-1]["hashes"].items():
            print(f"{name:12} {value}")
    equal = sum(len(set(r["hashes"].values())) == 1 for r in rounds)
    print(f"{equal} of {len(rounds)} rounds ended with the undisturbed run's weights")
    if args.json:
        result = {
            "rounds": rounds,
            "num_rounds": len(rounds),
            "num_equal": equal,
            "seconds": time.perf_counter() - start,
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(equal != len(rounds))


if __name__ == "__main__":
    main()
