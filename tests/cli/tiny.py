"""What the tests of the command line are run on: small slices of a real chest and networks of a few channels."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from invrecon.data.intensity import RGB, Intensity
from invrecon.methods import ProximalDiffusion
from invrecon.priors.weights import PriorCard, build_prior, save_prior

ROOT = Path(__file__).resolve().parents[2]
SIZE = 32
NETWORK = {"image_channels": 1, "position_channels": 2, "base_channels": 8, "multipliers": [1, 2], "num_blocks": 1}
OPERATOR = (f"--model.operator.size={SIZE}", "--model.operator.num_views=12", "--model.operator.num_bins=48")
QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu")
LEARN = (
    *("--model.network.base_channels=8", "--model.network.multipliers=[1,2]", f"--data.size={SIZE}"),
    *("--data.pixels_per_batch=1024", "--data.batches_per_epoch=2", "--data.validation_batches=3"),
    *("--trainer.max_steps=4", "--trainer.log_every_n_steps=1"),
)
PATCHES = ("--data.patch_sizes=[8,4]", "--data.probabilities=[0.5,0.5]", "--data.pad=4")
WHOLE = (f"--data.patch_sizes=[{SIZE}]",)
FAST = ("--model.method.num_levels=2", "--model.num_figures=0")


class Witness(ProximalDiffusion):
    """The fast sampler, which notes every sinogram that it is given.

    Args:
        log: Text file that gains a line a case.
        num_levels: Noise levels.
        num_samples: Samples a case.
    """

    def __init__(self, log: str, num_levels: int = 2, num_samples: int = 1) -> None:
        super().__init__(num_levels=num_levels, num_samples=num_samples)
        self.log = log

    def __call__(self, y: Any, operator: Any, prior: Any = None, *, generators: Any = None) -> Any:
        with open(self.log, "a") as file:
            for sinogram in y:
                file.write(f"{os.environ.get('LOCAL_RANK', '0')} {sinogram.double().sum():.9g}\n")
        return super().__call__(y, operator, prior, generators=generators)


def witness(log: Path) -> tuple[str, ...]:
    """Options that take `Witness` for a method."""
    return "--model.method=tests.cli.tiny.Witness", f"--model.method.log={log}", "--model.method.num_levels=2"


def slices_of_a_chest(size: int) -> np.ndarray:
    """The shipped slices, block-averaged: `(10, size, size)` in HU."""
    with h5py.File(ROOT / "data" / "lung2_sample.h5", "r") as file:
        full = file["data"][:].astype(np.float32)
    factor = full.shape[-1] // size
    return full.reshape(len(full), size, factor, size, factor).mean(axis=(2, 4))


def make_volume(path: Path, values: np.ndarray, dataset: str = "data", **attrs: Any) -> Path:
    """Writes a volume in HU."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.create_dataset(dataset, data=values)
        file.attrs.update({"units": "HU", **attrs})
    return path


def make_photos(folder: Path, num: int = 4) -> Path:
    """Writes smooth colour images, a little larger than `SIZE`."""
    from PIL import Image

    folder.mkdir(parents=True)
    for i in range(num):
        coarse = np.random.default_rng(i).integers(0, 256, (5, 6, 3)).astype(np.uint8)
        Image.fromarray(coarse).resize((SIZE + 8, SIZE), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


def make_rgb_prior(path: Path) -> Path:
    """Writes a patch prior of colour images with random weights."""
    return make_prior(path, "patch", {**NETWORK, "image_channels": 3}, intensity=asdict(RGB))


def make_prior(path: Path, kind: str = "patch", network: dict[str, Any] = NETWORK, **changes: Any) -> Path:
    """Writes a prior with random weights, whose card may say otherwise (`changes`)."""
    settings: dict[str, Any] = {
        "kind": kind,
        "network": network,
        "sigma_data": 0.25,
        "sigma_range": (0.002, 40.0),
        "image_size": SIZE,
        "patch_sizes": [8, 4] if kind == "patch" else [],
        "intensity": asdict(Intensity()),
        "data": ["nothing"],
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = build_prior(PriorCard(**settings)).denoiser
        torch.nn.init.normal_(denoiser.network.head.weight, std=0.02)
    save_prior(path, denoiser.state_dict(), PriorCard(**settings | changes))
    return path


def reconstruct(command: str, config: str, data: object, output: object, *more: object) -> list[str]:
    """The arguments of a tiny `test` or `predict`."""
    args = [command, "--config", config, "--data.paths", data, "--output", output, f"--data.size={SIZE}"]
    shipped = ROOT / "configs" / f"{config.removesuffix('.yaml')}.yaml"
    views = not shipped.is_file() or "num_views" in shipped.read_text()
    operator = OPERATOR if views else OPERATOR[:1]
    return [str(arg) for arg in (*args, *operator, *QUIET, *more)]


def learn(config: str, data: object, output: object, *more: object) -> list[str]:
    """The arguments of a tiny `fit`."""
    sizes = WHOLE if config.startswith("whole") else PATCHES
    source = ("--data.num_phantoms=4",) if "ellipses" in config else ("--data.paths", data)
    args = ["fit", "--config", config, *source, "--output", output, *LEARN, *sizes]
    return [str(arg) for arg in (*args, *QUIET, *more)]


def environment() -> dict[str, str]:
    """For a process of its own: one thread, and this repository importable from anywhere."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def process(*args: object, cwd: Path) -> Any:
    """Runs `python ...` in a process of its own."""
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=170)


def read(path: Path, name: str = "mean") -> np.ndarray:
    """One dataset of a volume."""
    with h5py.File(path, "r") as file:
        return file[name][()]


def files_in(folder: Path) -> set[str]:
    """Names of all files below a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
